"""The checks of a logger. Each returns a short result, or raises the fault and its remedy."""

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from saelens_lite.cache import TensorSource
from saelens_lite.config import TrainConfig
from saelens_lite.loggers import Logger
from saelens_lite.testing.report import CheckFailed
from saelens_lite.training import train

CONFIG = TrainConfig(sparsity="topk", options={"k": 2}, d_sae=16, n_tokens=400, batch_size=50, log_every=100)


@dataclass
class Bench:
    """A logger and the name that loads it."""

    logger: type[Logger]
    name: str

    @contextmanager
    def run_folder(self) -> Iterator[Path]:
        """Yield a folder for one check."""
        with tempfile.TemporaryDirectory(prefix="check-plugin-") as parent:
            folder = Path(parent) / "run"
            folder.mkdir()
            yield folder

    def started(self, folder: Path, tokens: int = 0) -> Logger:
        """Return a started logger."""
        logger = self.logger()
        logger.start(folder, CONFIG, tokens)
        return logger


def line(tokens: int) -> dict[str, Any]:
    """Return a log line like those of training."""
    return {"step": tokens // 50, "tokens": tokens, "mse": 2.5, "loss": 3.0, "l0": 2.0, "fvu": 0.25, "dead": 0.0, "lr": 1e-3}


def follows_a_run(bench: Bench) -> str:
    """Check that start, log and close work, and that `start` does not change the settings."""
    before = copy.deepcopy(CONFIG.model_dump())
    with bench.run_folder() as folder:
        logger = bench.started(folder)
        for tokens in (100, 200, 300):
            logger.log(line(tokens))
        logger.close()
        written = sum(path.is_file() for path in folder.rglob("*"))
    if CONFIG.model_dump() != before:
        raise CheckFailed("the settings given to start were changed; work on a copy: config.model_dump()")
    return f"3 lines; {written} files in the run folder"


def without_lines(bench: Bench) -> str:
    """Check that a run without a log line can be closed."""
    with bench.run_folder() as folder:
        bench.started(folder).close()
    return "started and closed"


def side_by_side(bench: Bench) -> str:
    """Check that the loggers of two dictionaries in one run do not affect each other."""
    with bench.run_folder() as folder:
        folders = [folder / "0", folder / "1"]
        for one in folders:
            one.mkdir()
        first, second = (bench.started(one) for one in folders)
        first.log(line(100))
        second.log(line(100))
        first.close()
        second.log(line(200))
        second.close()
    return "two runs at once"


def takes_up_again(bench: Bench) -> str:
    """Check that an interrupted run resumes in its folder from an earlier line."""
    with bench.run_folder() as folder:
        logger = bench.started(folder)
        for tokens in (100, 200):
            logger.log(line(tokens))
        logger.close()
        logger = bench.started(folder, tokens=100)
        logger.log(line(200))
        logger.close()
    return "resumed at 100 of 200 tokens"


def changes_no_number(bench: Bench) -> str:
    """Check that a run with the logger has the same history and dictionary as a run without it."""
    x = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    with bench.run_folder() as folder:
        runs = [train(TensorSource(x), CONFIG, folder / out, loggers=which)[0] for out, which in (("a", ()), ("b", bench.name))]
    bare, logged = runs
    if logged.history != bare.history:
        raise CheckFailed(
            "the lines of the run differ from those without the logger; change nothing outside of `log`'s arguments"
        )
    weights = [run.dictionary.state_dict() for run in runs]
    differ = [name for name, value in weights[0].items() if not torch.equal(value, weights[1][name])]
    if differ:
        raise CheckFailed(
            f"{', '.join(differ)} differ from a run without the logger; do not change parameters or torch's settings"
        )
    return f"{len(bare.history)} lines and {len(weights[0])} tensors, the same to the bit"


CHECKS: tuple[tuple[str, Callable[[Bench], str], tuple[str, ...]], ...] = (
    ("follows a run", follows_a_run, ()),
    ("without lines", without_lines, ("follows a run",)),
    ("side by side", side_by_side, ("follows a run",)),
    ("resume", takes_up_again, ("follows a run",)),
    ("numbers", changes_no_number, ("follows a run",)),
)
