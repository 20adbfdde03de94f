"""The pass of the model over the text, which writes codes to disk as they are computed.

In the folder of an unfinished pass (`saelens_lite.resumable`), progress.json records how many batches are on disk and how long
the files were then. The same call resumes after these batches.
"""

import itertools
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from saelens_lite.codes import SparseCodes
from saelens_lite.dictionary import Dictionary
from saelens_lite.errors import (
    ConfigError,
    CorruptFileError,
    NonFiniteError,
    TextError,
)
from saelens_lite.features.code_log import CodeLog
from saelens_lite.files import write_json
from saelens_lite.kinds import STORE, UNFINISHED_STORE
from saelens_lite.model import LanguageModel, passes
from saelens_lite.ports import Hooks, together
from saelens_lite.progress import progress_bar
from saelens_lite.resumable import unfinished
from saelens_lite.schemas import Checked, Count, read_checked
from saelens_lite.tokens import TokenRows

PROGRESS = "progress.json"
MAX_PLACES = 1 << 31
SYNC_SECONDS = 30

log = logging.getLogger(__name__)


class Hooked(NamedTuple):
    """A dictionary and its hooks in the model."""

    dictionary: Dictionary
    hooks: Hooks


@torch.no_grad()
def collect(
    dictionaries: Sequence[Hooked], lm: LanguageModel, rows: TokenRows, batch_tokens: int, folder: Path, what: str
) -> list[CodeLog]:
    """Run the model once and return the codes of the kept tokens by each dictionary, which are on disk below `folder`.

    Raises:
        HookError, ShapeError: the model lacks a hook, or a dictionary has another width.
        NonFiniteError: an activation or a code is NaN or infinite.
        ConfigError: there is too much text for a store.
        DiskFullError: there is no room for the codes.
    """
    n_ctx = rows.tokens.shape[1]
    if rows.tokens.numel() > MAX_PLACES:
        raise ConfigError(f"the text has {rows.tokens.numel():,} positions; give at most {MAX_PLACES:,}")
    progress = _Progress(folder, [one.dictionary.d_sae for one in dictionaries])
    hooks = list(dict.fromkeys(hook for one in dictionaries for hook in one.hooks.reads))
    left = passes.batches(lm, rows, batch_tokens)
    with progress.writing() as code_logs, progress_bar(what, rows.n_kept) as advance:
        for batch in itertools.islice(left, progress.n_batches):
            advance(batch.rows.n_kept, "")
        for batch in left:
            read = passes.read(lm, batch, hooks)
            for one, code_log in zip(dictionaries, code_logs, strict=True):
                code_log.add(read.row * n_ctx + read.position, _codes(one, read))
            progress.add()
            advance(len(read.row), "")
    return code_logs


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


class _Noted(Checked):
    """The content of progress.json: the number of complete batches, and the lengths of the files of each dictionary."""

    n_batches: Count
    sizes: list[dict[Literal["lists.bin", "latents.bin", "entries.bin", "blocks.bin"], Count]]


class _Progress:
    """The progress of a pass, and the files that it writes."""

    def __init__(self, folder: Path, d_sae: list[int]):
        self.folder, self.file = folder, folder / PROGRESS
        self.n_batches, sizes = 0, [{}] * len(d_sae)
        if self.file.exists():
            self.n_batches, sizes = self._read(len(d_sae))
            log.info("resuming in %s after %d batches", folder, self.n_batches)
        self.code_logs = [CodeLog(folder / str(i), n, size) for i, (n, size) in enumerate(zip(d_sae, sizes, strict=True))]
        self._saved = time.monotonic()

    def _read(self, n: int) -> tuple[int, list[dict[str, int]]]:
        """Return the number of complete batches, and the lengths of the files of each of n dictionaries."""
        try:
            noted = read_checked(self.file, _Noted)
        except CorruptFileError as error:
            raise CorruptFileError(f"{error}; delete {self.folder}") from None
        if len(noted.sizes) != n:
            raise CorruptFileError(f"{self.file} is damaged; delete {self.folder}")
        return noted.n_batches, noted.sizes

    @contextmanager
    def writing(self) -> Iterator[list[CodeLog]]:
        """Open the files for the block, and record the complete batches however the block ends."""
        with ExitStack() as stack:
            for code_log in self.code_logs:
                stack.callback(code_log.close)
                code_log.open()
            self._state = self._now()
            try:
                yield self.code_logs
            finally:
                self.save()

    def _now(self) -> dict[str, Any]:
        return {"n_batches": self.n_batches, "sizes": [code_log.sizes for code_log in self.code_logs]}

    def add(self) -> None:
        """Count another complete batch."""
        self.n_batches += 1
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
def working_folder(out: Path | None, request: dict[str, Any], exists: str, inputs: Sequence[Path] = ()) -> Iterator[Path]:
    """Yield the folder for the codes of an unfinished store at `out`; see `unfinished`. Without `out` it is temporary."""
    if out is None:
        with tempfile.TemporaryDirectory(prefix="saelens-lite-") as folder:
            yield Path(folder)
        return

    def has_work(folder: Path) -> bool:
        return (folder / PROGRESS).exists()

    with unfinished(out, STORE, request, UNFINISHED_STORE, has_work, exists, inputs) as folder:
        try:
            yield folder
        except TextError:  # no latent fires: the collected codes are useless
            (folder / PROGRESS).unlink(missing_ok=True)
            raise
