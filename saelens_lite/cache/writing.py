"""The shards of a capture, written while the model computes the next activations.

Rows are collected in blocks on the device of the model, which sums each full block. Threads wait for its copy on the host, and
compute its checksums; when a shard is complete, one of them hashes and writes it. Rows of a block stay where they are in memory
until then. The caller of `ShardWriter.add` gets the errors of the threads, and adds complete shards to their journals, in
order.
"""

import logging
import math
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from saelens_lite.cache.journal import Journal
from saelens_lite.cache.shards import CHUNK, chunk_checksums, shard_name, write_shard
from saelens_lite.cache.source import BLOCK, Moments, exact_sums, serial_rows
from saelens_lite.cuda_streams import SideStream, to_host
from saelens_lite.errors import NonFiniteError, SaelensLiteError

MOST_SHARDS, SHARDS_BYTES = 4, 1 << 29  # complete shards that wait to be written: their number, and bytes unless it is one
assert BLOCK % CHUNK == 0
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Writing:
    """A shard that a thread is writing. It returns the manifest entry, and the sums of each hook."""

    path: Path
    journal: Journal
    done: Future[tuple[dict[str, Any], dict[str, Moments]]]


class _Block:
    """Up to BLOCK rows of a shard, in the stored dtype."""

    def __init__(self, like: dict[str, Tensor], size: int, dtype: torch.dtype):
        self.size, self.n = size, 0
        self.rows = {
            key: x.new_empty(size, *x.shape[1:], dtype=x.dtype if key == "tokens" else dtype) for key, x in like.items()
        }
        self._pieces: dict[str, list[Tensor]] = {key: [] for key in like.keys() - {"tokens"}}  # as they came

    @property
    def is_full(self) -> bool:
        """True if there is no room left."""
        return self.n == self.size

    @property
    def device(self) -> torch.device:
        """The device of the activations."""
        return next(self.rows[hook].device for hook in self._pieces)

    def take(self, piece: dict[str, Tensor], start: int) -> int:
        """Copy the rows of a piece from `start` on, as many as there is room for, and return their number."""
        n = min(self.size - self.n, len(piece["tokens"]) - start)
        for key, x in piece.items():
            part = x[start : start + n]
            _copy(self.rows[key][self.n : self.n + n], part)
            if key in self._pieces:
                self._pieces[key].append(part)
        self.n += n
        return n

    def end(self, side: SideStream) -> None:
        """Sum the rows, and begin to copy rows and sums to the host."""
        rows = {key: x[: self.n] for key, x in self.rows.items()}
        sums_of = {hook: exact_sums(rows[hook]) for hook in self._pieces}
        with side.queue(after_current=True):
            self.rows = {key: to_host(x) for key, x in rows.items()}
            self.sums = {hook: tuple(map(to_host, both)) for hook, both in sums_of.items()}
            self._on_host = side.mark()

    def checksums(self) -> dict[str, list[int]]:
        """Wait until the rows are on the host, and return the CRC-32 of each chunk.

        Raises:
            NonFiniteError: a row is not finite.
        """
        if self._on_host is not None:
            self._on_host.synchronize()
        for hook, (_, square) in self.sums.items():
            if not math.isfinite(square):
                largest = torch.stack([x.abs().max().cpu() for x in self._pieces[hook]]).max()
                raise NonFiniteError(
                    f"{hook}: NaN, infinity or a number too large for {self.rows[hook].dtype} (largest {largest:.3g}); if it "
                    "is finite, store float32"
                )
        self._pieces.clear()
        return {key: chunk_checksums(x) for key, x in self.rows.items()}


class ShardWriter:
    """A writer that collects pieces of activations, and writes each shard as soon as it is full.

    The activations of each journal are in shards of their own. Use the writer in a `with` block, which writes the remaining
    rows at its end. After an error in the block, complete shards stay, and the journals have a line for each.
    """

    def __init__(self, folder: Path, shard_tokens: int, dtype: torch.dtype):
        self.folder, self.shard_tokens, self.dtype = folder, shard_tokens, dtype
        folder.mkdir(exist_ok=True)
        self.n_added = 0
        self._journal: Journal | None = None
        self._number = 0  # of the shard that is being filled
        self._threads = ThreadPoolExecutor(MOST_SHARDS + 1, "saelens-lite-write")
        self._side: SideStream | None = None
        self._blocks: list[_Block] = []  # of the shard that is being filled
        self._checksums: list[Future[dict[str, list[int]]]] = []  # of its full blocks
        self._checked: deque[Future[dict[str, list[int]]]] = deque()  # those whose errors are not known yet
        self._writing: deque[_Writing] = deque()
        self._n = 0  # rows in the shard that is being filled

    def begin(self, journal: Journal) -> None:
        """Begin a new shard, behind the complete ones of a journal, to which the next pieces belong."""
        if self._n:
            self._end_shard()
        journal.begin()
        self._journal, self._number = journal, journal.heading.first_shard + len(journal.shards)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None:
                if self._n:
                    self._end_shard()
                while self._writing:
                    self._note_next()
        finally:
            self._leave()

    def add(self, piece: dict[str, Tensor]) -> None:
        """Add a piece: a tensor [n …] for each key, with the same keys in each call.

        Raises:
            NonFiniteError: activations, of this piece or an earlier one, are not finite in the stored dtype.
            DiskFullError: an earlier shard does not fit on the disk.
        """
        while self._checked and self._checked[0].done():
            self._checked.popleft().result()
        while self._writing and self._writing[0].done.done():
            self._note_next()
        n, done = len(piece["tokens"]), 0
        while done < n:
            if not self._blocks or self._blocks[-1].is_full:
                self._blocks.append(_Block(piece, min(BLOCK, self.shard_tokens - self._n), self.dtype))
            taken = self._blocks[-1].take(piece, done)
            done, self._n = done + taken, self._n + taken
            if self._blocks[-1].is_full:
                self._end_block()
            if self._n == self.shard_tokens:
                self._end_shard()
        self.n_added += n

    def _end_block(self) -> None:
        block = self._blocks[-1]
        if self._side is None:
            self._side = SideStream(block.device)
        block.end(self._side)
        self._checksums.append(self._threads.submit(block.checksums))
        self._checked.append(self._checksums[-1])

    def _end_shard(self) -> None:
        """Begin to write the shard, once few enough others are being written."""
        if not self._blocks[-1].is_full:
            self._end_block()
        n_bytes = sum(x.nbytes for block in self._blocks for x in block.rows.values())
        while len(self._writing) >= max(1, min(MOST_SHARDS, SHARDS_BYTES // n_bytes)):
            self._note_next()
        path = self.folder / shard_name(self._number)
        done = self._threads.submit(_write, path, self._blocks, self._checksums)
        self._writing.append(_Writing(path, self._journal, done))
        self._blocks, self._checksums, self._n, self._number = [], [], 0, self._number + 1

    def _note_next(self) -> None:
        """Wait until the next shard is on the disk, and add it to its journal. Raise the error of the thread if it failed."""
        first = self._writing[0]
        first.journal.note(*first.done.result())
        self._writing.popleft()

    def _leave(self) -> None:
        """End the threads. Add complete shards to their journals, up to the first that failed, and delete the others."""
        self._threads.shutdown(cancel_futures=not self._writing)
        while self._writing and not self._writing[0].done.exception():
            try:
                self._note_next()
            except (SaelensLiteError, OSError) as error:  # the error that ended the block is the one to report
                log.warning("%s is not in its journal: %s", self._writing[0].path.name, error)
                break
        for shard in self._writing:
            shard.path.unlink(missing_ok=True)


def _copy(to: Tensor, x: Tensor) -> None:
    """Copy rows; on a CPU, some at a time."""
    size = serial_rows(x) if x.device.type == "cpu" else len(x)
    for some, rows in zip(to.split(size), x.split(size), strict=True):
        some.copy_(rows)


def _write(
    path: Path, blocks: list[_Block], checksums: list[Future[dict[str, list[int]]]]
) -> tuple[dict[str, Any], dict[str, Moments]]:
    """Write a shard from the blocks of its rows, whose checksums are being computed. Return its facts and sums."""
    of_chunks: dict[str, list[int]] = {key: [] for key in sorted(blocks[0].rows)}
    for future in checksums:
        for key, crcs in future.result().items():
            of_chunks[key] += crcs
    facts = write_shard(
        path, {key: [block.rows[key] for block in blocks] for key in of_chunks}, torch.tensor([*of_chunks.values()])
    )
    moments = {hook: Moments(blocks[0].rows[hook].shape[1]) for hook in blocks[0].sums}
    for block in blocks:
        for hook, total in moments.items():
            total.add_sums(block.n, *block.sums[hook])
    return facts, moments
