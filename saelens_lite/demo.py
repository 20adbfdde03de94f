"""The whole pipeline on the embedded model: text → hook → cache → dictionaries → numbers → features → a folder to publish."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

from saelens_lite.cache import capture
from saelens_lite.config import TrainConfig
from saelens_lite.evaluation import EvalReport, evaluate
from saelens_lite.features import FeatureStore
from saelens_lite.hub import write_card
from saelens_lite.model import load_model
from saelens_lite.outputs import refuse_existing
from saelens_lite.tokens import PythonDocs
from saelens_lite.training import train

RULES = ("topk", "l1", "gated")  # with their defaults, which reach the same L0


class DemoResult(NamedTuple):
    """The output folder, the reports, and the seconds that each part took."""

    folder: Path
    reports: dict[str, EvalReport]
    sample: str
    seconds: dict[str, float]


def demo(
    out: str | Path = "demo",
    *,
    model: str = "tiny",
    d_sae: int = 1536,
    n_tokens: int = 600_000,
    exists: Literal["error", "overwrite"] = "error",
    say: Callable[[str], None] = lambda _: None,
) -> DemoResult:
    """Run the pipeline and write cache/, runs/<rule>/dictionary/ (ready for the Hub) and <rule>.html into `out`.

    It trains on the documentation that comes with every Python, and evaluates on held-out pages.
    """
    out = Path(out)
    refuse_existing(out, exists)
    seconds: dict[str, float] = {}
    clock = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal clock
        now = time.perf_counter()
        seconds[name], clock = now - clock, now

    lm = load_model(model)
    hook = f"blocks.{lm.n_layers // 2}.hook_resid_pre"
    sample = lm.generate("The old man looked at", max_new_tokens=60)
    say(f"{lm}\n  It writes: {sample!r}\n  Hook: {hook}")
    training, held_out = PythonDocs("python-docs:train"), PythonDocs("python-docs:held-out")
    lap("load")

    cache = capture(lm, training, hook, out / "cache", exists="overwrite")
    say(str(cache))
    lap("capture")

    configs = [TrainConfig(sparsity=name, d_sae=d_sae, n_tokens=n_tokens) for name in RULES]
    runs = train(cache, configs, out / "runs", exists="overwrite")
    lap("train")

    reports = evaluate([run.dictionary for run in runs], lm, held_out, n_tokens=60_000)
    for run, report in zip(runs, reports, strict=True):
        write_card(run.folder / "dictionary", run.dictionary, report)
    lap("evaluate")

    for run in runs:
        store = FeatureStore.build(run.dictionary, lm, held_out)
        store.dashboard(out / f"{run.config.sparsity}.html", exists="overwrite")
    lap("features")
    return DemoResult(out, {run.config.sparsity: report for run, report in zip(runs, reports, strict=True)}, sample, seconds)
