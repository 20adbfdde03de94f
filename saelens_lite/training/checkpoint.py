"""Checkpoints of a run: everything that training needs to resume as if nothing had happened; safetensors and JSON.

`<run>/checkpoints/<tokens>/` holds state.json; for each dictionary a safetensors file and its log, <number>.jsonl, which grows
with the run and so is not part of state.json; and checksums.json with the SHA-256 of each. A folder appears when it is whole;
the last two are kept, and a damaged one is passed over.
"""

import logging
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from saelens_lite.config import TrainConfig
from saelens_lite.errors import ConfigError, CorruptFileError
from saelens_lite.files import (
    MAX_LIST_BYTES,
    check_fits_memory,
    check_inside,
    file_hash,
    file_size,
    read_json,
    read_lines,
    read_tensors,
    shortened,
    tensor_specs,
    write_json,
    write_lines,
    write_tensors,
)
from saelens_lite.kinds import CHECKPOINT, TEMPORARY
from saelens_lite.outputs import new_folder, remove, remove_own
from saelens_lite.schemas import Checked, Count, Number, PlainName, Positive, Seed, Sha256, String, checked, read_checked

FORMAT = 4
WITH_HISTORIES = 2  # the format whose state.json holds the logs
KEPT = 2
MAX_DICTIONARIES = 10_000
FOLDER, STATE, CHECKSUMS = "checkpoints", "state.json", "checksums.json"
log = logging.getLogger(__name__)

State = tuple[dict[str, Tensor], dict[str, Any]]  # of one dictionary: tensors and plain data


class _Checksums(Checked):
    """The content of checksums.json."""

    format: Literal[2, 3, 4]
    sha256: dict[PlainName, Sha256]


class _Request(Checked):
    """The request of a run."""

    source: dict[str, Any] | None
    validation_tokens: Count
    data_seed: Seed
    device: Annotated[str, Field(pattern="^[a-z]{1,20}(:[0-9]{1,4})?$")]
    checkpoint_seconds: float


class _Numbers(Checked):
    """The plain data of one dictionary."""

    scales: list[Annotated[Number, Field(gt=0)]]
    target_scales: list[Annotated[Number, Field(gt=0)]]
    variance: Annotated[Number, Field(gt=0)]
    n_seen: Count
    n_steps: Count
    fire_tokens: Count
    sums: dict[String, float]
    n_sums: Count


class _Line(Checked, extra="allow", allow_inf_nan=True):
    """A line of a log: numbers by name."""

    __pydantic_extra__: dict[str, float]
    step: Count
    tokens: Count
    fvu: float
    l0: float


class _Lines(Checked):
    """The log of one dictionary."""

    lines: list[_Line]


class _State(Checked):
    """The content of state.json."""

    configs: Annotated[list[TrainConfig], Field(min_length=1, max_length=MAX_DICTIONARIES)]
    request: _Request
    loggers: list[String]
    n_batches: Positive
    dropped: list[str | None] = Field([])
    source: dict[str, Any] | None = None  # what was read so far; the source checks it
    histories: list[list[Any]] | None = None  # of format 2
    dictionaries: list[_Numbers]

    @model_validator(mode="after")
    def _agrees(self) -> "_State":
        numbers, n = self.dictionaries, len(self.configs)
        if not (len(numbers) == n and len(self.dropped) in (0, n) and len(self.histories or numbers) == n):
            raise ValueError(f"{n} configs, {len(numbers)} dictionaries, {len(self.dropped)} dropped: expected as many of each")
        if len(set(self.loggers)) < len(self.loggers):
            raise ValueError("a logger is named twice")
        if self.n_batches - max(one.n_steps for one in numbers) not in (0, 1):  # 1: all that were left were dropped in the last
            raise ValueError(f"n_batches = {self.n_batches}, but no dictionary has seen as many")
        for one, config in zip(numbers, self.configs, strict=True):
            in_steps = one.n_steps <= one.n_seen <= one.n_steps * config.batch_size
            if not in_steps or max(one.fire_tokens, one.n_sums) > one.n_seen:
                raise ValueError(f"{one.n_seen} tokens in {one.n_steps} steps of {config.batch_size}")
        return self


def save_checkpoint(run: Path, n_tokens: int, states: list[State], loop: dict[str, Any]) -> None:
    """Write a checkpoint and drop all but the last KEPT. `loop`: of all dictionaries; its "histories" hold their log lines."""
    histories = loop["histories"]
    state = {key: value for key, value in loop.items() if key != "histories"}
    with new_folder(run / FOLDER / f"{n_tokens:012d}", CHECKPOINT, "overwrite", lock=False) as new:
        for i, (tensors, _) in enumerate(states):
            write_tensors(_tensors_file(new, i), tensors)
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


def _of_format_4(loop: dict[str, Any]) -> dict[str, Any]:
    """Return the state of an older checkpoint, which has one number for the ports that are read or written, as it is now."""
    for numbers in loop["dictionaries"] if isinstance(loop.get("dictionaries"), list) else []:
        for name in ("scale", "target_scale"):
            if isinstance(numbers, dict) and name in numbers:
                numbers[f"{name}s"] = [numbers.pop(name)]
    return loop


def _read(folder: Path) -> tuple[list[State], dict[str, Any]]:
    """A checkpoint; CorruptFileError when it is not what was written.

    Sizes are compared before anything is hashed, and everything is hashed before tensors are read.
    """
    for place in (folder.parent, folder):
        check_inside(place)
    checksums = read_checked(folder / CHECKSUMS, _Checksums)
    old = checksums.format == WITH_HISTORIES
    loop = _of_format_4(read_json(folder / STATE, limit=MAX_LIST_BYTES if old else None, finite=not old))
    state = checked(folder / STATE, loop, _State)
    n = len(state.configs)
    files = {STATE, *(_tensors_file(folder, i).name for i in range(n))}
    files |= set() if old else {_history_file(folder, i).name for i in range(n)}
    if old != (state.histories is not None) or files != checksums.sha256.keys():
        raise CorruptFileError(f"{folder / CHECKSUMS} names other files: {shortened(files ^ checksums.sha256.keys())}")
    for i, config in enumerate(state.configs):
        _check_sizes(_tensors_file(folder, i), config.d_sae)
    if not old:
        loop["histories"] = [read_lines(_history_file(folder, i), one.n_steps) for i, one in enumerate(state.dictionaries)]
    for i, lines in enumerate(loop["histories"]):
        checked(_history_file(folder, i), {"lines": lines}, _Lines)
    if checksums.sha256 != {name: file_hash(folder / name) for name in files}:
        raise CorruptFileError(f"{folder} is damaged: its files do not match {CHECKSUMS}")
    numbers = loop.pop("dictionaries")
    return [(read_tensors(_tensors_file(folder, i), finite=False), numbers[i]) for i in range(n)], loop


def _tensors_file(folder: Path, i: int) -> Path:
    return folder / f"{i}.safetensors"


def _check_sizes(path: Path, d_sae: int) -> None:
    """Raise CorruptFileError unless a file has the tensors of d_sae latents, which memory has room for."""
    specs = tensor_specs(path)
    counts, decoder = specs.get("since_fired"), specs.get("dictionary.W_dec")
    if counts is None or (counts.dtype, counts.shape) != (torch.int64, (d_sae,)):  # bytes that the file really has
        raise CorruptFileError(f"{path}: since_fired is {counts or 'missing'}, {STATE} says d_sae = {d_sae}")
    if decoder is None or len(decoder.shape) != 2 or decoder.shape[0] != d_sae or not decoder.shape[1]:
        raise CorruptFileError(f"{path}: dictionary.W_dec is {decoder or 'missing'}, {STATE} says d_sae = {d_sae}")
    check_fits_memory(path, file_size(path))


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
