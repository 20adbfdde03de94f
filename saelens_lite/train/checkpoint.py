"""Checkpoints of a run: everything that training needs to resume as if nothing had happened; safetensors and JSON.

`<run>/checkpoints/<tokens>/` holds state.json; for each dictionary a safetensors file and its log, <number>.jsonl, which grows
with the run and so is not part of state.json; and checksums.json with the SHA-256 of each. A folder appears when it is whole;
the last two are kept, and a damaged one is passed over.
"""

import logging
import math
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from saelens_lite.errors import ConfigError, CorruptFileError
from saelens_lite.files import (
    file_hash,
    read_json,
    read_lines,
    read_tensors,
    write_json,
    write_lines,
    write_tensors,
)
from saelens_lite.kinds import CHECKPOINT, TEMPORARY
from saelens_lite.outputs import new_folder, remove, remove_own

FORMAT = 3
WITH_HISTORIES = 2  # the format whose state.json holds the logs
KEPT = 2
FOLDER, STATE, CHECKSUMS = "checkpoints", "state.json", "checksums.json"
log = logging.getLogger(__name__)

State = tuple[dict[str, Tensor], dict[str, Any]]  # of one dictionary: tensors and plain data


def save_checkpoint(run: Path, n_tokens: int, states: list[State], loop: dict[str, Any]) -> None:
    """Write a checkpoint and drop all but the last KEPT. `loop`: of all dictionaries; its "histories" hold their log lines."""
    histories = loop["histories"]
    state = {key: value for key, value in loop.items() if key != "histories"}
    with new_folder(run / FOLDER / f"{n_tokens:012d}", CHECKPOINT, "overwrite", lock=False) as new:
        for i, (tensors, _) in enumerate(states):
            write_tensors(new / f"{i}.safetensors", tensors)
        for i, lines in enumerate(histories):
            write_lines(_history_file(new, i), lines)
        write_json(new / STATE, {**state, "dictionaries": [numbers for _, numbers in states]})
        checksums = {path.name: file_hash(path) for path in sorted(new.iterdir())}
        write_json(new / CHECKSUMS, {"format": FORMAT, "sha256": checksums})
    for old in _checkpoints(run)[KEPT:]:
        remove_own(old, CHECKPOINT)


def _history_file(folder: Path, i: int) -> Path:
    return folder / f"{i}.jsonl"


def _checkpoints(run: Path) -> list[Path]:
    """The folders of a run's checkpoints, the newest first."""
    found = [path for path in (run / FOLDER).glob("[0-9]*") if re.fullmatch(r"\d{12,}", path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name), reverse=True)


def is_interrupted(run: Path) -> bool:
    """Whether there is a run that can be resumed."""
    return bool(_checkpoints(run))


def load_checkpoint(run: Path) -> tuple[list[State], dict[str, Any]]:
    """The newest checkpoint of a run that is not damaged: the dictionaries' states, and the loop's.

    Raises:
        ConfigError: the run has none: it never began, or it is finished.
        CorruptFileError: all are damaged.
    """
    error = None
    for found in _whole_checkpoints(run):
        if not isinstance(found, CorruptFileError):
            return found
        error = error or found
    if error:
        raise CorruptFileError(f"{run} has no checkpoint that is not damaged: {error}")
    raise ConfigError(f"{run} has no checkpoints: there is nothing to resume, or the run is finished")


def _whole_checkpoints(run: Path) -> Iterator[tuple[list[State], dict[str, Any]] | CorruptFileError]:
    """The checkpoints of a run, the newest first; an error for each that is damaged."""
    for folder in _checkpoints(run):
        try:
            yield _read(folder)
        except CorruptFileError as found:
            log.warning("passing over a damaged checkpoint: %s", found)
            yield found


def earlier_states(run: Path, i: int) -> Iterator[State]:
    """The states of dictionary number i in the checkpoints of a run that are whole, the newest first."""
    for found in _whole_checkpoints(run):
        if not isinstance(found, CorruptFileError):
            yield found[0][i]


def _read(folder: Path) -> tuple[list[State], dict[str, Any]]:
    """A checkpoint; CorruptFileError when it is not what was written."""
    content = read_json(folder / CHECKSUMS)
    if content.get("format") not in (WITH_HISTORIES, FORMAT):
        raise CorruptFileError(f"{folder / CHECKSUMS}: format {content.get('format')!r}, this version reads {FORMAT}")
    checksums = content.get("sha256", {})
    if STATE not in checksums or checksums != {name: _sha256_or_none(folder / name) for name in checksums}:
        raise CorruptFileError(f"{folder} is damaged: its files do not match {CHECKSUMS}")
    loop = read_json(folder / STATE, limit=math.inf if content["format"] == WITH_HISTORIES else None)
    states = loop.pop("dictionaries")
    if content["format"] != WITH_HISTORIES:
        loop["histories"] = [read_lines(_history_file(folder, i)) for i in range(len(states))]
    return [(read_tensors(folder / f"{i}.safetensors", finite=False), numbers) for i, numbers in enumerate(states)], loop


def _sha256_or_none(path: Path) -> str | None:
    return file_hash(path) if path.is_file() else None


def remove_checkpoints(run: Path) -> None:
    """Remove the checkpoints of a run that is finished, the newest last, and their folder where nothing else is in it."""
    for old in reversed(_checkpoints(run)):
        remove_own(old, CHECKPOINT)
    folder = run / FOLDER
    if folder.is_dir():
        for left in folder.iterdir():
            if (match := TEMPORARY.fullmatch(left.name)) and re.fullmatch(r"\d{12,}", match[1]):
                remove(left)
        with suppress(OSError):  # not empty
            folder.rmdir()
