"""The codes of a text on disk: each process appends its batches to a log, and all logs are read one block of latents at a time.

entries.bin holds the activations, 10 bytes each: place, latent (counted from the first of its block), value; of several models,
also the part of each model, 4 bytes each. The entries of a batch are sorted by block, and blocks.bin says how many entries each
block has. batches.bin has the number of each batch and how
many tokens it holds. The latents that fire together are stored a second time for a sample of the tokens, because a block holds
only its own: lists.bin has each place and how many latents fire there, and latents.bin has these latents.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelens_lite.codes import SparseCodes
from saelens_lite.errors import CorruptFileError
from saelens_lite.features.reduce import Entries
from saelens_lite.features.sampling import uniform
from saelens_lite.files import disk_full_is_typed, file_size, sync
from saelens_lite.processes import ALONE, Team

BLOCK = 1024  # latents in a block; more if there would be more than MAX_BLOCKS
MAX_BLOCKS = 64
MAX_ENTRIES = 1 << 22  # activations in memory at once; a single latent may exceed it
MAX_LISTS = 1 << 22  # tokens whose latents are stored together, about; if there are more, a sample of them
MAX_TABLE = 1 << 24  # places that are numbered by a table; more are searched
ENTRY = [("place", "<u4"), ("latent", "<u2"), ("value", "<f4")]
LIST = np.dtype([("place", "<u4"), ("n", "<u4")])
BATCH = np.dtype([("number", "<u4"), ("n", "<u4")])
COUNT = np.dtype("<u4")
FILES = ("batches.bin", "lists.bin", "latents.bin", "entries.bin", "blocks.bin")


class Sample(NamedTuple):
    """A share of all places, drawn from a seed; it does not depend on batches or processes."""

    seed: int = 0
    share: float = 1.0

    @classmethod
    def of(cls, n_tokens: int, seed: int) -> "Sample":
        """Return the sample that holds about MAX_LISTS of so many tokens, or all of them."""
        return cls(seed, min(1.0, MAX_LISTS / n_tokens))

    def holds(self, place: Int[Tensor, " n"]) -> Bool[Tensor, " n"]:
        """Return a mask of the places that are in the sample."""
        if self.share >= 1:
            return torch.ones_like(place, dtype=torch.bool)
        return uniform(self.seed, "partners", place) < self.share


class Lists(NamedTuple):
    """The latents that fire at each sampled place: those of list i are latent[crow[i] : crow[i + 1]].

    `number` has the list of each place, if there are few places; else `place` has the place of each list, ascending.
    """

    sample: Sample
    crow: Int[Tensor, " n_lists_plus_1"]
    latent: np.ndarray  # of one log, on disk
    number: Int[Tensor, " n_places"] | None
    place: Int[Tensor, " n_lists"]
    order: Int[Tensor, " n_lists"]

    def find(self, place: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """Return the number of the list of each place, which must be in the sample."""
        if self.number is not None:
            return self.number[place].long()
        return self.order[torch.searchsorted(self.place, place)]


class Coded(NamedTuple):
    """The places of a batch, the codes there, and with several models, the parts of each at the entries of the codes."""

    place: Int[Tensor, " batch"]
    codes: SparseCodes
    parts: Float[Tensor, "nnz n_models"] | None = None


class LatentBlock(NamedTuple):
    """The entries of latents `first` to `first + n − 1`, numbered from `first`."""

    first: int
    n: int
    entries: Entries


class CodeLog:
    """The files of one dictionary and one process; `sizes` are their lengths in bytes after the last complete batch.

    n_models: number of models of which entries have parts.
    """

    def __init__(
        self,
        folder: Path,
        d_sae: int,
        sizes: dict[str, int] | None = None,
        sample: Sample | None = None,
        n_models: int = 0,
    ):
        self.folder, self.d_sae, self.sample = folder, d_sae, sample or Sample()
        self.entry = np.dtype(ENTRY + ([("part", "<f4", (n_models,))] if n_models else []))
        self.block = max(BLOCK, -(-d_sae // MAX_BLOCKS))
        self.n_blocks = -(-d_sae // self.block)
        self.list_dtype = np.dtype("<u2" if d_sae <= 1 << 16 else "<u4")
        self.sizes = {name: (sizes or {}).get(name, 0) for name in FILES}
        self._count: Tensor | None = None if self.sizes["entries.bin"] else torch.zeros(d_sae, dtype=torch.long)
        self._files: dict[str, BinaryIO] = {}

    def check(self) -> None:
        """Raise CorruptFileError if a file is shorter than its recorded length, or the entries are not as many as recorded."""
        for name, size in self.sizes.items():
            path = self.folder / name
            n_bytes = file_size(path) if os.path.lexists(path) else 0
            if n_bytes < size:
                raise self._damaged(name, f"has {n_bytes:,} bytes, expected {size:,}")
        n_entries = int(self.n_entries().sum()) if self.sizes["blocks.bin"] else 0
        if n_entries * self.entry.itemsize != self.sizes["entries.bin"]:
            raise self._damaged("blocks.bin", f"counts {n_entries:,} entries, but entries.bin has another number")

    def _damaged(self, name: str, problem: str) -> CorruptFileError:
        return CorruptFileError(f"{self.folder / name} {problem}; delete {self.folder.parent.parent}")

    def open(self) -> None:
        """Open the files for appending, and cut them to `sizes`.

        Raises:
            CorruptFileError: a file is shorter than that.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.check()
        for name, size in self.sizes.items():
            self._files[name] = open(self.folder / name, "ab")  # noqa: SIM115 (closed by `close`)
            self._files[name].truncate(size)

    def add(
        self,
        number: int,
        place: Int[Tensor, " batch"],
        codes: SparseCodes,
        parts: Float[Tensor, "nnz n_models"] | None = None,
    ) -> None:
        """Append the codes of a batch, which has a number, at some places, which must be new."""
        codes = codes.to(torch.float32)  # the stored type
        row, latent, value = (x[codes.fires].cpu() for x in (codes.row, codes.latent, codes.value))
        n_here = torch.bincount(row, minlength=len(place))
        listed = self.sample.holds(place)
        lists = np.empty(int(listed.sum()), LIST)
        lists["place"], lists["n"] = place[listed].numpy(), n_here[listed].numpy()
        together = latent if self.sample.share >= 1 else latent[listed[row]]
        block = latent // self.block
        order = block.argsort(stable=True)
        entries = np.empty(len(latent), self.entry)
        entries["place"], entries["latent"] = place[row[order]].numpy(), (latent[order] % self.block).numpy()
        entries["value"] = value[order].numpy()
        if parts is not None:
            entries["part"] = parts[codes.fires].float().cpu()[order].numpy()
        n_of_block = torch.bincount(block, minlength=self.n_blocks).numpy().astype(COUNT)
        batch = np.array([(number, len(place))], BATCH)
        self._append([batch, lists, together.numpy().astype(self.list_dtype), entries, n_of_block])
        if self._count is not None:
            self._count += torch.bincount(latent, minlength=self.d_sae)

    def _append(self, pieces: list[np.ndarray]) -> None:
        with disk_full_is_typed(self.folder):
            for name, piece in zip(self.sizes, pieces, strict=True):
                self._files[name].write(memoryview(piece).cast("B") if len(piece) else b"")
        self.sizes = {name: size + piece.nbytes for (name, size), piece in zip(self.sizes.items(), pieces, strict=True)}

    def sync(self) -> None:
        """Flush everything appended to the disk."""
        with disk_full_is_typed(self.folder):
            for file in self._files.values():
                sync(file)

    def close(self) -> None:
        """Close the files."""
        with disk_full_is_typed(self.folder), ExitStack() as stack:
            while self._files:
                stack.callback(self._files.popitem()[1].close)

    def read(self, name: str, dtype: np.dtype) -> np.ndarray:
        """Return the complete part of a file as an array that stays on disk."""
        shape = self.sizes[name] // dtype.itemsize
        return np.asarray(np.memmap(self.folder / name, dtype, "r", shape=shape)) if shape else np.empty(0, dtype)

    def count(self) -> Int[Tensor, " d_sae"]:
        """Return how often each latent fires. A log that was resumed is read for that."""
        if self._count is None:
            self._count = torch.zeros(self.d_sae, dtype=torch.long)
            for number in range(self.n_blocks):
                part = self._count[number * self.block : (number + 1) * self.block]
                for run in self.runs(number):
                    part += torch.from_numpy(np.bincount(run["latent"], minlength=len(part)))
        return self._count

    def n_entries(self) -> Int[Tensor, " n_blocks"]:
        """Return the number of entries of each block."""
        total = np.zeros(self.n_blocks, np.int64)
        for sizes in self._sizes_of_blocks():
            total += sizes.sum(0)
        return torch.from_numpy(total)

    def _sizes_of_blocks(self) -> Iterator[np.ndarray]:
        """Yield the number of entries of each batch and block, some batches at a time."""
        n_batches = self.sizes["blocks.bin"] // (COUNT.itemsize * self.n_blocks)
        with open(self.folder / "blocks.bin", "rb") as file:
            for start in range(0, n_batches, 4096):
                n = min(4096, n_batches - start)
                yield np.fromfile(file, COUNT, n * self.n_blocks).astype(np.int64).reshape(n, self.n_blocks)

    def runs(self, number: int) -> Iterator[np.ndarray]:
        """Yield the entries of a block, a batch at a time."""
        before = 0
        with open(self.folder / "entries.bin", "rb") as file:  # not mapped, because mapped pages count as memory
            for sizes in self._sizes_of_blocks():
                stops = before + sizes.cumsum().reshape(sizes.shape)[:, number]
                for start, n in zip((stops - sizes[:, number]).tolist(), sizes[:, number].tolist(), strict=True):
                    if n:
                        file.seek(start * self.entry.itemsize)
                        run = np.empty(n, self.entry)
                        if file.readinto(memoryview(run).cast("B")) != run.nbytes:
                            raise self._damaged("entries.bin", "ends too early")
                        yield run
                before += int(sizes.sum())


class Codes:
    """The codes of one dictionary: the logs of all processes that have worked on them.

    Args:
        is_own: for each log, True if this process counts it; each log is counted by one process.
        scratch: a file that this process may write to while it reads a block.
    """

    def __init__(self, logs: Sequence[CodeLog], is_own: Sequence[bool], scratch: Path, team: Team = ALONE):
        self.logs, self.is_own, self.scratch, self.team = list(logs), is_own, scratch, team
        self.d_sae, self.block, self.n_blocks, self.entry = logs[0].d_sae, logs[0].block, logs[0].n_blocks, logs[0].entry

    @property
    def folder(self) -> Path:
        """The folder of the unfinished pass."""
        return self.scratch.parent.parent

    @property
    def reduced_folder(self) -> Path:
        """The folder for the numbers of these codes."""
        return self.folder / "reduced" / self.logs[0].folder.name

    def count(self) -> Int[Tensor, " d_sae"]:
        """Return how often each latent fires. All processes call this together."""
        with self.team.failing_together():
            own = [log.count() for log, is_own in zip(self.logs, self.is_own, strict=True) if is_own]
        return self.team.sum(sum(own, torch.zeros(self.d_sae, dtype=torch.long)))

    def own_blocks(self) -> list[int]:
        """Return the blocks of latents that this process reduces. Large blocks are dealt first, each to the least loaded."""
        n_entries, load, dealt = self.n_entries().tolist(), [0] * self.team.world, [[] for _ in range(self.team.world)]
        for block in sorted(range(self.n_blocks), key=lambda i: -n_entries[i]):
            rank = load.index(min(load))
            load[rank] += n_entries[block] + 1
            dealt[rank].append(block)
        return sorted(dealt[self.team.rank])

    @property
    def n_tokens(self) -> int:
        """Number of tokens in the logs."""
        return sum(int(log.read("batches.bin", BATCH)["n"].sum(dtype=np.int64)) for log in self.logs)

    @property
    def n_listed(self) -> int:
        """Number of tokens whose latents are stored together."""
        return sum(log.sizes["lists.bin"] for log in self.logs) // LIST.itemsize

    def lists(self, n_places: int) -> Lists:
        """Return the latents that fire at each place of the sample. Those of several logs are joined in memory."""
        lists = np.concatenate([log.read("lists.bin", LIST) for log in self.logs])
        latents = [log.read("latents.bin", log.list_dtype) for log in self.logs]
        crow = F.pad(torch.from_numpy(lists["n"].astype(np.int64)).cumsum(0), (1, 0))
        place, number, order = torch.from_numpy(lists["place"].astype(np.int64)), None, torch.zeros(0, dtype=torch.long)
        if n_places <= MAX_TABLE:
            number = torch.zeros(n_places, dtype=torch.int32)
            number[place] = torch.arange(len(lists), dtype=torch.int32)
        else:
            place, order = place.sort()
        latent = latents[0] if len(latents) == 1 else np.concatenate(latents)
        return Lists(self.logs[0].sample, crow, latent, number, place, order)

    def n_entries(self) -> Int[Tensor, " n_blocks"]:
        """Return the number of entries of each block of latents."""
        return torch.stack([log.n_entries() for log in self.logs]).sum(0)

    def pieces(self, number: int, count: Int[Tensor, " d_sae"]) -> Iterator[LatentBlock]:
        """Yield the entries of a block of latents, about MAX_ENTRIES at a time. Each is read once.

        count: number of entries of each latent of the dictionary.
        """
        before = number * self.block
        ranges = _ranges(count[before : before + self.block])
        runs = (run for log in self.logs for run in log.runs(number))
        if len(ranges) == 1:
            pieces: Iterator[np.ndarray] = iter([np.concatenate([np.empty(0, self.entry), *runs])])
        else:
            pieces = self._partitioned(runs, ranges, count[before : before + self.block])
        for (start, stop), entries in zip(ranges, pieces, strict=True):
            place, latent = (torch.from_numpy(entries[name].astype(np.int64)) for name in ("place", "latent"))
            value = torch.from_numpy(entries["value"].astype(np.float32))
            part = torch.from_numpy(entries["part"].astype(np.float32)) if "part" in entries.dtype.names else None
            yield LatentBlock(before + start, stop - start, Entries(place, latent - start, value, part))

    def _partitioned(
        self, runs: Iterator[np.ndarray], ranges: list[tuple[int, int]], count: Int[Tensor, " latents"]
    ) -> Iterator[np.ndarray]:
        """Yield the entries of each range of latents. They are first written to the scratch file, range by range."""
        range_of = np.repeat(np.arange(len(ranges), dtype=np.uint16), [stop - start for start, stop in ranges])
        sizes = np.array([int(count[start:stop].sum()) for start, stop in ranges])
        ends = sizes.cumsum()
        position = ends - sizes
        with disk_full_is_typed(self.scratch):
            try:
                with open(self.scratch, "wb") as file:
                    for chunk in _joined(runs):
                        which = range_of[chunk["latent"]]
                        chosen = chunk[which.argsort(kind="stable")]
                        n_each = np.bincount(which, minlength=len(ranges))
                        stops = n_each.cumsum()
                        for i in np.flatnonzero(n_each):
                            file.seek(int(position[i]) * self.entry.itemsize)
                            file.write(memoryview(chosen[stops[i] - n_each[i] : stops[i]]).cast("B"))
                        position += n_each
                for stop, size in zip(ends.tolist(), sizes.tolist(), strict=True):
                    yield np.fromfile(self.scratch, self.entry, size, offset=(stop - size) * self.entry.itemsize)
            finally:
                self.scratch.unlink(missing_ok=True)


def _ranges(count: Int[Tensor, " latents"]) -> list[tuple[int, int]]:
    """Return ranges of latents with at most about MAX_ENTRIES entries; a latent with more is a range by itself."""
    number = (count.cumsum(0) - count) // MAX_ENTRIES
    stops = number.unique_consecutive(return_counts=True)[1].cumsum(0).tolist()
    return list(zip([0, *stops], stops, strict=False))


def _joined(runs: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield arrays of at least MAX_ENTRIES entries from shorter ones; the last may have fewer."""
    waiting: list[np.ndarray] = []
    n = 0
    for run in runs:
        waiting.append(run)
        n += len(run)
        if n >= MAX_ENTRIES:
            yield np.concatenate(waiting)
            waiting, n = [], 0
    if waiting:
        yield np.concatenate(waiting)
