"""The command that runs the whole pipeline once."""

from pathlib import Path

from saelens_lite.cli.base import app, console
from saelens_lite.cli.options import Exists


@app.command
def demo(out: Path = Path("demo"), *, exists: Exists = "error") -> None:
    """Run the whole pipeline once on the embedded model. No network is needed.

    Parameters
    ----------
    out
        Folder for the results.
    """
    from saelens_lite.demo import demo as run_demo
    from saelens_lite.evaluation import table

    say = console()
    result = run_demo(out, exists=exists, say=say.print)
    say.print(table(result.reports))
    parts = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in result.seconds.items())
    say.print(f"{sum(result.seconds.values()):.0f} s: {parts}")
    say.print(f"Features: open {result.folder / 'topk.html'} in a browser (also l1.html, gated.html)")
    say.print(f"Ready for the Hub: {result.folder / 'runs'}/*/dictionary")
