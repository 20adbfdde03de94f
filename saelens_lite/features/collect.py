"""The pass of the model over the text, which writes codes to disk as they are computed.

Batches are dealt to the processes of a team. In the folder of an unfinished pass (`saelens_lite.resumable`), each process has a
folder named by its rank, with a code log for each dictionary, and progress.json with the lengths of their files. The logs say
which batches they hold, so the same call resumes with the other batches, also in another number of processes.
"""

import itertools
import logging
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch

from saelens_lite.codes import SparseCodes
from saelens_lite.dictionary import Dictionary
from saelens_lite.errors import (
    ConfigError,
    CorruptFileError,
    NonFiniteError,
    TextError,
)
from saelens_lite.features.code_log import BATCH, Coded, CodeLog, Codes, Sample
from saelens_lite.features.per_model import PartEncoder
from saelens_lite.files import write_json
from saelens_lite.kinds import LOCK, STORE, UNFINISHED_STORE
from saelens_lite.locks import locked
from saelens_lite.model import passes
from saelens_lite.model.models import AnyModel
from saelens_lite.outputs import check_shared, followed
from saelens_lite.ports import Hooks, together
from saelens_lite.processes import ALONE, Team
from saelens_lite.progress import progress_bar
from saelens_lite.resumable import unfinished
from saelens_lite.schemas import Checked, Count, read_checked
from saelens_lite.tokens import TokenRows

PROGRESS = "progress.json"
MAX_PLACES = 1 << 31
SYNC_SECONDS = 30
ROUND = 64  # batches of each process between two moments in which the processes learn of each other's errors

Item = TypeVar("Item")
log = logging.getLogger(__name__)


class Hooked(NamedTuple):
    """A dictionary and its hooks in the model. `models` are the names of those whose parts are kept, if there are several."""

    dictionary: Dictionary
    hooks: Hooks
    models: tuple[str, ...] = ()


class Logged(NamedTuple):
    """The facts that the log of a dictionary's codes depends on."""

    d_sae: int
    n_models: int = 0


@torch.no_grad()
def collect(
    dictionaries: Sequence[Hooked],
    lm: AnyModel,
    rows: TokenRows,
    batch_tokens: int,
    folder: Path,
    what: str,
    seed: int = 0,
    team: Team = ALONE,
) -> list[Codes]:
    """Run the model once and return the codes of the kept tokens by each dictionary, which are on disk below `folder`.

    The processes of the team share the batches, unless they hold the model together and so must run each batch together.

    Raises:
        HookError, ShapeError: the model lacks a hook, or a dictionary has another width.
        NonFiniteError: an activation or a code is NaN or infinite.
        ConfigError: there is too much text for a store.
        DiskFullError: there is no room for the codes.
    """
    n_ctx = rows.tokens.shape[1]
    if rows.tokens.numel() > MAX_PLACES:
        raise ConfigError(f"the text has {rows.tokens.numel():,} positions; give at most {MAX_PLACES:,}")
    parts = [PartEncoder(one.dictionary, one.models) if one.models else None for one in dictionaries]
    keys = (key for one in parts if one is not None for key in one.keys)
    hooks = list(dict.fromkeys((*(hook for one in dictionaries for hook in one.hooks.reads), *keys)))

    def encoded(batch: passes.RowBatch) -> Iterator[Coded]:
        read = passes.read(lm, batch, hooks)
        for one, of_models in zip(dictionaries, parts, strict=True):
            codes = _codes(one, read)
            yield Coded(read.row * n_ctx + read.position, codes, None if of_models is None else of_models.at(codes, read.acts))

    logged = [Logged(one.dictionary.d_sae, len(one.models)) for one in dictionaries]
    with progress_bar(what, rows.n_kept) as advance:

        def counted() -> Iterator[passes.RowBatch]:
            for batch in passes.batches(lm, rows, batch_tokens):
                yield batch._replace(rows=batch.rows._replace(tokens=batch.rows.tokens.long()))
                advance(batch.rows.n_kept, "")

        return written(folder, logged, Sample.of(rows.n_kept, seed), counted(), encoded, team, lm.is_shared)


def written(
    folder: Path,
    logged: list[Logged],
    sample: Sample,
    batches: Iterable[Item],
    encoded: Callable[[Item], Iterable[Coded]],
    team: Team,
    is_shared: bool = False,
) -> list[Codes]:
    """Write the codes of batches by several dictionaries to disk, and return them. Batches that are there are left out.

    Each process takes every n-th of the other batches, so their contents do not depend on the number of processes.

    Args:
        encoded: Function that yields the codes of a batch, once for each dictionary.
        is_shared: True if all processes must run `encoded` on each batch; the first one writes the codes.
    """
    with ExitStack() as stack:
        with team.failing_together():
            for rank in [team.rank, *(_absent(folder, team.world) if team.is_first else [])]:
                stack.enter_context(locked(folder / str(rank), "features"))  # a process of an earlier job may still write
            progress = _Progress(folder, team, logged, sample)
            own_batches = progress.done()
        done = set(np.concatenate(team.gather(own_batches)).tolist())
        left = ((number, batch) for number, batch in enumerate(batches) if number not in done)
        stack.enter_context(progress.writing())
        n = size = ROUND * team.world
        while n == size:
            n = 0
            with team.failing_together():
                for n, (number, batch) in enumerate(itertools.islice(left, size), 1):
                    is_own = team.is_first if is_shared else (n - 1) % team.world == team.rank
                    if not (is_own or is_shared):
                        continue
                    pieces = encoded(batch)
                    for code_log, coded in zip(progress.code_logs, pieces, strict=True):
                        if is_own:
                            code_log.add(number, *coded)
                    if is_own:
                        progress.add()
        with team.failing_together():
            stack.close()
    with team.failing_together():
        return _all_codes(folder, team, logged, sample, progress)


def _codes(one: Hooked, read: passes.Read) -> SparseCodes:
    """Return the codes of a batch of activations. Raise NonFiniteError if an activation or a code is not finite."""
    x = together(read.acts, one.hooks.reads)
    codes = one.dictionary.encode(x.to(one.dictionary.W_enc.device))
    for what, numbers in (("activations", x), ("codes", codes.value.float())):
        if not torch.isfinite(numbers).all():
            raise NonFiniteError(
                f"{one.dictionary.place}: the {what} of the batch with row {int(read.row[0])} hold NaN or infinity"
            )
    return codes


def _all_codes(folder: Path, team: Team, logged: list[Logged], sample: Sample, own: "_Progress") -> list[Codes]:
    """Return the codes of each dictionary in the logs of all processes, also of those that worked on them before."""
    kept = own.others | {own.folder: own.code_logs}
    logs = [kept[path] if path in kept else _read(path, logged, sample) for path in _ranks(folder)]
    logs = logs or [own.code_logs]
    is_own = [one[0].folder.parent == own.folder or one[0].folder.parent in own.others for one in logs]
    return [Codes(of_one, is_own, own.folder / "sorted.bin", team) for of_one in zip(*logs, strict=True)]


def _ranks(folder: Path) -> list[Path]:
    """Return the folders of the processes that have written batches, by rank."""
    paths = [path.parent for path in folder.glob(f"*/{PROGRESS}") if path.parent.name.isdecimal()]
    return sorted(paths, key=lambda path: int(path.name))


def _absent(folder: Path, world: int) -> list[int]:
    """Return the ranks without a process in this job whose processes in an earlier job left files, or their locks."""
    names = (match[1] if (match := LOCK.fullmatch(path.name)) else path.name for path in folder.glob("*"))
    return sorted({int(name) for name in names if name.isdecimal() and int(name) >= world})


class _Noted(Checked):
    """The content of progress.json: the lengths of the files of each dictionary after the last complete batch."""

    n_batches: Count
    sizes: list[dict[Literal["batches.bin", "lists.bin", "latents.bin", "entries.bin", "blocks.bin"], Count]]


def _read(folder: Path, logged: list[Logged], sample: Sample) -> list[CodeLog]:
    """Return the code logs of a process, one for each dictionary, as far as progress.json says that they are complete."""
    file, sizes = folder / PROGRESS, [{}] * len(logged)
    if file.exists():
        try:
            noted = read_checked(file, _Noted)
        except CorruptFileError as error:
            raise CorruptFileError(f"{error}; delete {folder.parent}") from None
        wanted = [BATCH.itemsize * noted.n_batches] * len(logged)
        if [one.get("batches.bin") for one in noted.sizes] != wanted:
            raise CorruptFileError(f"{file} is damaged; delete {folder.parent}")
        sizes = noted.sizes
        log.info("resuming in %s after %d batches", folder, noted.n_batches)
    each = enumerate(zip(logged, sizes, strict=True))
    logs = [CodeLog(folder / str(i), one.d_sae, size, sample, one.n_models) for i, (one, size) in each]
    for code_log in logs:
        code_log.check()
    return logs


class _Progress:
    """The progress of a process in a pass, and the files that it writes."""

    def __init__(self, folder: Path, team: Team, logged: list[Logged], sample: Sample):
        self.folder = folder / str(team.rank)
        self.file = self.folder / PROGRESS
        self.code_logs = _read(self.folder, logged, sample)
        absent = [path for path in _ranks(folder) if int(path.name) >= team.world] if team.is_first else []
        self.others = {path: _read(path, logged, sample) for path in absent}
        self._saved = time.monotonic()

    def done(self) -> np.ndarray:
        """Return the numbers of the batches that this process has written. The first adds those of ranks without a process."""
        logs = [self.code_logs, *self.others.values()]
        return np.concatenate([np.array(of_rank[0].read("batches.bin", BATCH)["number"]) for of_rank in logs])

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Open the files for the block, and record the complete batches however the block ends."""
        with ExitStack() as stack:
            for code_log in self.code_logs:
                stack.callback(code_log.close)
                code_log.open()
            self._state = self._now()
            try:
                yield
            finally:
                self.save()

    def _now(self) -> dict[str, Any]:
        sizes = [code_log.sizes for code_log in self.code_logs]
        return {"n_batches": sizes[0]["batches.bin"] // BATCH.itemsize, "sizes": sizes}

    def add(self) -> None:
        """Count another complete batch."""
        self._state = self._now()
        if time.monotonic() - self._saved > SYNC_SECONDS:
            self.save()

    def save(self) -> None:
        """Flush the complete batches to the disk and record them in progress.json; do nothing before the first batch."""
        if not self._state["n_batches"]:
            return
        for code_log in self.code_logs:
            code_log.sync()
        write_json(self.file, self._state)
        self._saved = time.monotonic()


@contextmanager
def working_folder(
    out: Path | None, request: dict[str, Any] | None, exists: str, inputs: Sequence[Path] = (), team: Team = ALONE
) -> Iterator[Path]:
    """Lock `out`, and yield the folder for the codes of its unfinished store; see `unfinished`.

    Without `out` or without a request, the folder is temporary. The first process makes, locks and removes it, and all use it.

    Raises:
        ConfigError: the processes do not share the folder.
    """
    with ExitStack() as stack:
        with team.failing_together():
            folder = stack.enter_context(_own_folder(out, request, exists, inputs)) if team.is_first else Path()
        folder = team.tell(folder)
        is_temporary = out is None or request is None
        check_shared(folder if is_temporary else followed(out), team)  # its file is beside that, and removed after a kill
        yield folder


@contextmanager
def _own_folder(out: Path | None, request: dict[str, Any] | None, exists: str, inputs: Sequence[Path]) -> Iterator[Path]:
    if out is None or request is None:
        with ExitStack() as stack:
            if out is not None:
                stack.enter_context(locked(followed(out), STORE.name))
            yield Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="saelens-lite-")))
        return

    def has_work(folder: Path) -> bool:
        return any(folder.glob(PROGRESS)) or any(folder.glob(f"*/{PROGRESS}"))  # the former of earlier versions

    with unfinished(out, STORE, request, UNFINISHED_STORE, has_work, exists, inputs) as folder:
        try:
            yield folder
        except TextError:  # no latent fires: the collected codes are useless
            for path in _ranks(folder):
                (path / PROGRESS).unlink(missing_ok=True)
            raise
