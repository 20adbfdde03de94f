"""The file data.json of a finished run: the activations that it was trained on, so that it can be extended."""

from pathlib import Path
from typing import Any, Literal

from saelens_lite.cache import Source
from saelens_lite.cache.resumed import record_of
from saelens_lite.errors import ConfigError
from saelens_lite.files import write_json
from saelens_lite.schemas import Checked, String, read_checked
from saelens_lite.training.checkpoint import Request

FILE = "data.json"


class Finished(Checked):
    """The content of data.json."""

    format: Literal[1]
    request: Request
    loggers: list[String]
    source: dict[str, Any] | None  # a record of the data that were read


def write_finished(folder: Path, request: dict[str, Any], source: Source, loggers: list[str]) -> None:
    """Write data.json into the folder of a run."""
    write_json(folder / FILE, {"format": 1, "request": request, "loggers": loggers, "source": record_of(source)})


def read_finished(folder: Path) -> Finished:
    """Return the content of data.json.

    Raises:
        ConfigError: the run is of an earlier version, which did not write the file.
        CorruptFileError: the file is damaged.
    """
    if not (folder / FILE).exists():
        raise ConfigError(
            f"{folder} does not say which activations it was trained on, because an earlier version wrote it; start a new run "
            "from its dictionary: train(…, start_from=dictionary), or train --start-from"
        )
    return read_checked(folder / FILE, Finished)
