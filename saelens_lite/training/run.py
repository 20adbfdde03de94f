"""The result of training: a dictionary with its settings and its log."""

from pathlib import Path
from typing import Any, NamedTuple

from saelens_lite.config import TrainConfig
from saelens_lite.dictionary import Dictionary


class Run(NamedTuple):
    """A trained dictionary, its settings (`config`), the lines of its log (`history`) and its `folder`, if it was written."""

    config: TrainConfig
    dictionary: Dictionary
    history: list[dict[str, Any]]
    folder: Path | None
