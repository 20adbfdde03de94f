"""Checkpoints of a run: all that training needs to resume without a trace, as safetensors and JSON.

`<run>/checkpoints/<tokens>/` holds state.json; <number>.safetensors for each dictionary, and <number>-<part>.safetensors if
several processes held its latents; and checksums.json with the SHA-256 of each file. Any number of processes can resume from
it. A checkpoint appears only when it is complete. The last two are kept, and damaged ones are skipped.

`<run>/checkpoints/history-<number>.jsonl` is the log of a dictionary. Each checkpoint appends its new lines, so that every line
is written once, and state.json has the size and the hash of the part that belongs to the checkpoint.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field, ValidationError, model_validator
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
    shortened,
    write_json,
)
from saelens_lite.kinds import CHECKPOINT, TEMPORARY
from saelens_lite.outputs import new_folder_together, remove, remove_own
from saelens_lite.schemas import (
    Checked,
    Count,
    Number,
    PlainName,
    Positive,
    Seed,
    Sha256,
    String,
    checked,
    explained,
    read_checked,
)
from saelens_lite.tensor_files import read_tensors, tensor_specs, write_tensors
from saelens_lite.training.distribution import Share
from saelens_lite.training.history import History
from saelens_lite.training.sharding import OwnLatents, joined

FORMAT = 5
WITH_HISTORIES = 2  # the format whose state.json holds the logs; 3 and 4 have <number>.jsonl beside it
KEPT = 2
MAX_DICTIONARIES = 10_000
FOLDER, STATE, CHECKSUMS = "checkpoints", "state.json", "checksums.json"
log = logging.getLogger(__name__)

State = tuple[dict[str, Tensor], dict[str, Any]]  # tensors and plain data of one dictionary


class _Checksums(Checked):
    """The content of checksums.json."""

    format: Literal[2, 3, 4, 5]
    sha256: dict[PlainName, Sha256]


class Request(Checked):
    """The request of a run."""

    source: dict[str, Any] | None
    validation_tokens: Count
    data_seed: Seed
    device: Annotated[str, Field(pattern="^[a-z]{1,20}(:[0-9]{1,4})?$")]
    checkpoint_seconds: float
    start_from: list[dict[str, Any]] | None = None  # the dictionaries that training started from
    parallel: Literal["auto", "sweep", "latents", "data"] = "auto"


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
    first_seen: Count = 0
    first_step: Count = 0
    kl_from: Count | None = None
    kl_after: Count | None = None


class _Line(Checked, extra="allow", allow_inf_nan=True):
    """A line of a log: numbers by name."""

    __pydantic_extra__: dict[str, float]
    step: Count
    tokens: Count
    fvu: float
    l0: float


class _Part(Checked):
    """The part of a history file that belongs to a checkpoint."""

    bytes: Count
    sha256: Sha256


class _State(Checked):
    """The content of state.json."""

    configs: Annotated[list[TrainConfig], Field(min_length=1, max_length=MAX_DICTIONARIES)]
    request: Request
    loggers: list[String]
    n_batches: Positive
    dropped: list[str | None] = Field([])
    source: dict[str, Any] | None = None  # a record of the data read so far; the source checks it
    histories: list[_Part] | list[list[Any]] | None = None  # lines in format 2
    dictionaries: list[_Numbers]

    @model_validator(mode="after")
    def _agrees(self) -> "_State":
        numbers, n = self.dictionaries, len(self.configs)
        if not (len(numbers) == n and len(self.dropped) in (0, n) and len(self.histories or numbers) == n):
            raise ValueError(f"{n} configs, {len(numbers)} dictionaries, {len(self.dropped)} dropped; expected equal numbers")
        if len(set(self.loggers)) < len(self.loggers):
            raise ValueError("a logger is named twice")
        ahead = self.n_batches - max(one.n_steps for one in numbers)
        is_done = all(one.n_seen >= config.n_tokens for one, config in zip(numbers, self.configs, strict=True))
        if ahead < 0 or (ahead and not (is_done or any(self.dropped))):  # a dropped one is as it was before its bad step
            raise ValueError(f"n_batches = {self.n_batches}, but no dictionary has seen that many")
        for one, config in zip(numbers, self.configs, strict=True):
            has_rows = bool(config.kl_share)  # a long row may be more than a batch
            in_steps = one.n_steps <= one.n_seen and (has_rows or one.n_seen <= one.n_steps * config.batch_size)
            if not in_steps or max(one.fire_tokens, one.n_sums) > one.n_seen:
                raise ValueError(f"{one.n_seen} tokens in {one.n_steps} steps of {config.batch_size}")
        return self


class KeptDictionary(NamedTuple):
    """All that a checkpoint keeps of one dictionary."""

    config: TrainConfig
    state: State
    latents: OwnLatents  # those in `state`
    history: History
    dropped: str | None


def save_checkpoint(run: Path, dictionaries: Mapping[int, KeptDictionary], loop: dict[str, Any], share: Share) -> None:
    """Write a checkpoint, and remove all but the last KEPT.

    All processes of a training do it together: each writes the tensors of its dictionaries or latents.

    Args:
        dictionaries: those of this process, by number.
        loop: plain data of the whole run.

    Raises:
        DiskFullError: in all processes, if the disk of one is full. The earlier checkpoints are as they were.
    """
    team = share.team
    n_tokens = max(team.gather(max(kept.state[1]["n_seen"] for kept in dictionaries.values())))
    with new_folder_together(team, run / FOLDER / f"{n_tokens:012d}", CHECKPOINT, "overwrite", lock=False) as new:
        with team.failing_together():
            written = _write_own(new, dictionaries, share)
        every = team.gather(written)
        entries = {number: entry for own, _ in every for number, entry in own.items()}
        checksums = {name: sha256 for _, own in every for name, sha256 in own.items()}
        with team.failing_together():
            if team.is_first:
                columns = {key: [entries[number][key] for number in sorted(entries)] for key in entries[0]}
                write_json(new / STATE, loop | columns)
                checksums[STATE] = file_hash(new / STATE)
                write_json(new / CHECKSUMS, {"format": FORMAT, "sha256": dict(sorted(checksums.items()))})
    if team.is_first:
        for old in _checkpoints(run)[KEPT:]:
            remove_own(old, CHECKPOINT)


def _write_own(
    new: Path, dictionaries: Mapping[int, KeptDictionary], share: Share
) -> tuple[dict[int, dict[str, Any]], dict[str, str]]:
    """Write what this process has of a checkpoint. Return the plain data of its dictionaries, and the hash of each file."""
    entries, checksums, layout = {}, {}, share.layout
    for number, kept in dictionaries.items():
        tensors, numbers = kept.state
        if layout.rows.is_first:
            path = _tensors_file(new, number, layout.latents.rank)
            own = tensors if layout.latents.is_first else {k: x for k, x in tensors.items() if kept.latents.divides(k)}
            write_tensors(path, own)
            checksums[path.name] = file_hash(path)
        if share.writes:
            entries[number] = {
                "configs": kept.config.model_dump(mode="json"),
                "dropped": kept.dropped,
                "histories": kept.history.save(_history_file(new.parent, number)),
                "dictionaries": numbers,
            }
    return entries, checksums


def _history_file(folder: Path, i: int) -> Path:
    """Return the file of a dictionary's log in the folder of the checkpoints."""
    return folder / f"history-{i}.jsonl"


def _checkpoints(run: Path) -> list[Path]:
    """Return the folders of a run's checkpoints, newest first."""
    folders = [path for path in (run / FOLDER).glob("[0-9]*") if re.fullmatch(r"\d{12,}", path.name) and path.is_dir()]
    return sorted(folders, key=lambda path: int(path.name), reverse=True)


def is_interrupted(run: Path) -> bool:
    """Return whether a run has checkpoints to resume from."""
    return bool(_checkpoints(run))


def load_checkpoint(run: Path) -> tuple[list[State], dict[str, Any]]:
    """Return the newest undamaged checkpoint of a run: the state of each dictionary, and the plain data of the run.

    Raises:
        ConfigError: the run has no checkpoints: it never began, or it is finished.
        CorruptFileError: all checkpoints are damaged.
    """
    error = None
    for checkpoint in _whole_checkpoints(run):
        if not isinstance(checkpoint, CorruptFileError):
            return checkpoint
        error = error or checkpoint
    if error:
        raise CorruptFileError(f"all checkpoints of {run} are damaged; the newest: {error}")
    raise ConfigError(f"{run} has no checkpoints: it has not saved one yet, or the run is finished")


def _whole_checkpoints(run: Path) -> Iterator[tuple[list[State], dict[str, Any]] | CorruptFileError]:
    """Yield the checkpoints of a run, newest first, and the error in place of each damaged one."""
    for folder in _checkpoints(run):
        try:
            yield _read(folder)
        except CorruptFileError as error:
            log.warning("skipping a damaged checkpoint: %s", error)
            yield error


def earlier_states(run: Path, i: int) -> Iterator[State]:
    """Yield the states of dictionary number i in the undamaged checkpoints of a run, newest first."""
    for checkpoint in _whole_checkpoints(run):
        if not isinstance(checkpoint, CorruptFileError):
            yield checkpoint[0][i]


def _of_format_4(loop: dict[str, Any]) -> dict[str, Any]:
    """Return the content of an older state.json, which has one scale for all ports of a side, in the current form."""
    for numbers in loop["dictionaries"] if isinstance(loop.get("dictionaries"), list) else []:
        for name in ("scale", "target_scale"):
            if isinstance(numbers, dict) and name in numbers:
                numbers[f"{name}s"] = [numbers.pop(name)]
    return loop


def _read(folder: Path) -> tuple[list[State], dict[str, Any]]:
    """Return a checkpoint: the state of each dictionary, and the plain data of the run.

    Sizes are checked before files are hashed, and hashes before tensors are read.

    Raises:
        CorruptFileError: the checkpoint is not as it was written.
    """
    for place in (folder.parent, folder):
        check_inside(place)
    checksums = read_checked(folder / CHECKSUMS, _Checksums)
    old = checksums.format == WITH_HISTORIES
    loop = _of_format_4(read_json(folder / STATE, limit=MAX_LIST_BYTES if old else None, finite=not old))
    state = checked(folder / STATE, loop, _State)
    n = len(state.configs)
    parts = [[_tensors_file(folder, i, part) for part in range(_n_parts(i, checksums.sha256))] for i in range(n)]
    files = {STATE, *(path.name for paths in parts for path in paths)}
    files |= {f"{i}.jsonl" for i in range(n) if checksums.format in (3, 4)}
    if files != checksums.sha256.keys():
        raise CorruptFileError(f"{folder / CHECKSUMS} names other files: {shortened(files ^ checksums.sha256.keys())}")
    for config, paths in zip(state.configs, parts, strict=True):
        for path in paths:
            _check_sizes(path, config.d_sae, len(paths))
    loop["histories"] = _histories(folder, checksums.format, state)
    if checksums.sha256 != {name: file_hash(folder / name) for name in files}:
        raise CorruptFileError(f"{folder} is damaged: its files do not match {CHECKSUMS}")
    numbers = loop.pop("dictionaries")
    return [(_read_parts(paths), numbers[i]) for i, paths in enumerate(parts)], loop


def _n_parts(i: int, names: Iterable[str]) -> int:
    """Return the number of files that hold the tensors of dictionary number i."""
    return 1 + sum(bool(re.fullmatch(rf"{i}-\d+\.safetensors", name)) for name in names)


def _read_parts(paths: list[Path]) -> dict[str, Tensor]:
    """Return the tensors of a dictionary. Those with an entry for each latent are joined from all parts."""
    first, *others = (read_tensors(path, finite=False) for path in paths)
    if not others:
        return first
    of_latents = others[0].keys()
    if any(part.keys() != of_latents for part in others) or not of_latents <= first.keys():
        raise CorruptFileError(f"{paths[0]} and the other parts of the dictionary do not hold the same tensors")
    try:
        return {
            name: joined(name, [x, *(part[name] for part in others)]) if name in of_latents else x for name, x in first.items()
        }
    except RuntimeError as error:
        raise CorruptFileError(f"{paths[0]} and the other parts of the dictionary do not fit together: {error}") from None


def _histories(folder: Path, number: int, state: _State) -> list[History]:
    """Return the log of each dictionary, as far as a checkpoint of format `number` tells."""
    histories = []
    for i, one in enumerate(state.dictionaries):
        part = state.histories[i] if state.histories else None
        is_right = part is None if number in (3, 4) else isinstance(part, list if number == WITH_HISTORIES else _Part)
        if not is_right:
            raise CorruptFileError(f"{folder / STATE} is damaged: 'histories' are not those of format {number}")
        if isinstance(part, _Part):
            file = _history_file(folder.parent, i)
            histories.append(History.load(file, part.bytes, part.sha256, one.n_steps, _check_line))
            continue
        lines = read_lines(folder / f"{i}.jsonl", one.n_steps) if part is None else part
        for line in lines:
            checked(folder, line, _Line)
        histories.append(History(lines))
    return histories


def _check_line(text: bytes, place: str) -> None:
    """Raise CorruptFileError unless a line of a log holds numbers by name."""
    try:
        _Line.model_validate_json(text)
    except ValidationError as error:
        raise CorruptFileError(explained(place, _Line, error)) from None


def _tensors_file(folder: Path, i: int, part: int = 0) -> Path:
    """Return the file of a dictionary's tensors; of the second process that holds its latents, and the following, a part."""
    return folder / (f"{i}-{part}.safetensors" if part else f"{i}.safetensors")


def _check_sizes(path: Path, d_sae: int, n_parts: int) -> None:
    """Raise CorruptFileError unless the tensors of a file are of an equal part of d_sae latents and fit into memory."""
    n, rest = divmod(d_sae, n_parts)
    if rest:
        raise CorruptFileError(
            f"{path.parent} has {n_parts} parts of a dictionary with {d_sae} latents, which is not a multiple"
        )
    specs = tensor_specs(path)
    counts, decoder = specs.get("since_fired"), specs.get("dictionary.W_dec")
    if counts is None or (counts.dtype, counts.shape) != (torch.int64, (n,)):  # bytes that the file really has
        raise CorruptFileError(f"{path}: since_fired is {counts or 'missing'}, {STATE} says d_sae = {d_sae} in {n_parts}")
    if decoder is None or len(decoder.shape) != 2 or decoder.shape[0] != n or not decoder.shape[1]:
        raise CorruptFileError(f"{path}: dictionary.W_dec is {decoder or 'missing'}, {STATE} says d_sae = {d_sae}")
    check_fits_memory(path, file_size(path))


def remove_checkpoints(run: Path) -> None:
    """Remove the checkpoints of a finished run, newest last, and their folder if nothing else is in it."""
    for old in reversed(_checkpoints(run)):
        remove_own(old, CHECKPOINT)
    folder = run / FOLDER
    if folder.is_dir():
        for left in folder.iterdir():
            match = TEMPORARY.fullmatch(left.name)
            if (match and re.fullmatch(r"\d{12,}", match[1])) or re.fullmatch(r"history-\d+\.jsonl", left.name):
                remove(left)
        with suppress(OSError):  # not empty
            folder.rmdir()
