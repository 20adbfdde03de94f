"""The folders of runs: their names, their kind and their locks."""

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from saelens_lite import registry
from saelens_lite.config import TrainConfig
from saelens_lite.kinds import RUN, Kind
from saelens_lite.locks import locked


def run_folders(out: Path, configs: Sequence[TrainConfig]) -> list[Path]:
    """Return the folder of each dictionary: `out` for a single one, numbered folders in `out` for several."""
    if len(configs) == 1:
        return [out]
    return [out / f"{i}-{c.sparsity}" for i, c in enumerate(configs)]


def run_kind() -> Kind:
    """Return the kind of a run folder. Each logger may write to a subfolder that has its name."""
    return RUN.allowing(*(f"{re.escape(name)}/.*" for name in registry.names("loggers")))


@contextmanager
def locked_folders(*folders: Path) -> Iterator[None]:
    """Hold the locks on the folders of runs, each once."""
    with ExitStack() as stack:
        for folder in dict.fromkeys(folders):
            stack.enter_context(locked(folder, "run"))
        yield
