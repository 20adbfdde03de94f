"""The command that plots training logs."""

from pathlib import Path

from saelens_lite.cli.base import app, console, say


@app.command
def plot(runs: list[Path], *, out: Path | None = None) -> None:
    """Plot the logs of runs over tokens: loss, FVU, L0, dead latents and the learning rate, in the terminal or to a file.

    Parameters
    ----------
    runs
        Folders of runs, finished or not. A folder with several runs stands for all of them.
    out
        File for a picture, .png or .svg; replaces an earlier one. Default: print the curves.
    """
    from saelens_lite.training import Run

    first, *others = [run for folder in runs for run in Run.load_all(folder)]
    curves = first.plot(out, beside=others)
    if out:
        console().print(str(out), markup=False)
    else:
        say(curves)
