"""The codes of a text on disk: appended batch by batch, and read back one block of latents at a time.

entries.bin holds the activations, 10 bytes each: place, latent (counted from the first of its block), value. The entries of a
batch are sorted by block, and blocks.bin says how many entries each block has. The latents that fire together at each place are
stored a second time, because a block holds only its own: lists.bin has each place and how many latents fire there, and
latents.bin has these latents.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from saelens_lite.codes import SparseCodes
from saelens_lite.errors import CorruptFileError
from saelens_lite.features.reduce import Entries
from saelens_lite.files import disk_full_is_typed, file_size, sync

BLOCK = 1024  # latents in a block; more if there would be more than MAX_BLOCKS
MAX_BLOCKS = 64
MAX_ENTRIES = 1 << 22  # activations in memory at once; a single latent may exceed it
ENTRY = np.dtype([("place", "<u4"), ("latent", "<u2"), ("value", "<f4")])
LIST = np.dtype([("place", "<u4"), ("n", "<u4")])
COUNT = np.dtype("<u4")
FILES = ("lists.bin", "latents.bin", "entries.bin", "blocks.bin")


class Lists(NamedTuple):
    """The latents that fire at each place: those of place p are latent[crow[number[p]] : crow[number[p] + 1]]."""

    number: Int[Tensor, " n_places"]
    crow: Int[Tensor, " n_tokens_plus_1"]
    latent: np.ndarray  # on disk

    def count(self, d_sae: int) -> Int[Tensor, " d_sae"]:
        """Return how often each latent fires."""
        counts = np.zeros(d_sae, dtype=np.int64)
        for start in range(0, len(self.latent), MAX_ENTRIES):
            counts += np.bincount(self.latent[start : start + MAX_ENTRIES], minlength=d_sae)
        return torch.from_numpy(counts)


class LatentBlock(NamedTuple):
    """The entries of latents `first` to `first + n − 1`, numbered from `first`."""

    first: int
    n: int
    entries: Entries


class CodeLog:
    """The files of one dictionary; `sizes` are their lengths in bytes after the last complete batch."""

    def __init__(self, folder: Path, d_sae: int, sizes: dict[str, int] | None = None):
        self.folder, self.d_sae = folder, d_sae
        self.block = max(BLOCK, -(-d_sae // MAX_BLOCKS))
        self.n_blocks = -(-d_sae // self.block)
        self.list_dtype = np.dtype("<u2" if d_sae <= 1 << 16 else "<u4")
        self.sizes = {name: (sizes or {}).get(name, 0) for name in FILES}
        self._files: dict[str, BinaryIO] = {}

    def open(self) -> None:
        """Open the files for appending, and cut them to `sizes`.

        Raises:
            CorruptFileError: a file is shorter than that.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, size in self.sizes.items():
            path = self.folder / name
            n_bytes = file_size(path) if os.path.lexists(path) else 0
            if n_bytes < size:
                raise CorruptFileError(f"{path} has {n_bytes:,} bytes, expected {size:,}; delete {self.folder.parent}")
            self._files[name] = open(path, "ab")  # noqa: SIM115 (closed by `close`)
            self._files[name].truncate(size)

    def add(self, place: Int[Tensor, " batch"], codes: SparseCodes) -> None:
        """Append the codes at some places, which must be new."""
        codes = codes.to(torch.float32)  # the stored type
        row, latent, value = (x[codes.fires].cpu() for x in (codes.row, codes.latent, codes.value))
        n_here = torch.bincount(row, minlength=len(place))
        lists = np.empty(len(place), LIST)
        lists["place"], lists["n"] = place.numpy(), n_here.numpy()
        block = latent // self.block
        order = block.argsort(stable=True)
        entries = np.empty(len(latent), ENTRY)
        entries["place"], entries["latent"] = place[row[order]].numpy(), (latent[order] % self.block).numpy()
        entries["value"] = value[order].numpy()
        n_of_block = torch.bincount(block, minlength=self.n_blocks).numpy().astype(COUNT)
        self._append([lists, latent.numpy().astype(self.list_dtype), entries, n_of_block])

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

    def lists(self, n_places: int) -> Lists:
        """Return the latents that fire at each place."""
        lists = np.fromfile(self.folder / "lists.bin", LIST)
        number = torch.zeros(n_places, dtype=torch.int32)
        number[torch.from_numpy(lists["place"].astype(np.int64))] = torch.arange(len(lists), dtype=torch.int32)
        crow = F.pad(torch.from_numpy(lists["n"].astype(np.int64)).cumsum(0), (1, 0))
        return Lists(number, crow, self._mapped("latents.bin", self.list_dtype))

    def _mapped(self, name: str, dtype: np.dtype) -> np.ndarray:
        """Return a file as an array that stays on disk."""
        path = self.folder / name
        return np.asarray(np.memmap(path, dtype, "r")) if path.stat().st_size else np.empty(0, dtype)

    def pieces(self, count: Int[Tensor, " d_sae"]) -> Iterator[LatentBlock]:
        """Yield the entries of all latents, about MAX_ENTRIES at a time; `count` has the number of entries of each latent."""
        entries = self._mapped("entries.bin", ENTRY)
        sizes = np.fromfile(self.folder / "blocks.bin", COUNT).astype(np.int64).reshape(-1, self.n_blocks)
        stops = sizes.cumsum().reshape(sizes.shape)
        starts = stops - sizes
        for number in range(self.n_blocks):
            runs = list(zip(starts[:, number].tolist(), stops[:, number].tolist(), strict=True))
            before = number * self.block
            for start, stop in _ranges(count[before : before + self.block]):
                yield LatentBlock(before + start, stop - start, _within(entries, runs, start, stop))


def _ranges(count: Int[Tensor, " latents"]) -> Iterator[tuple[int, int]]:
    """Yield ranges of latents with at most about MAX_ENTRIES entries; a latent with more is a range by itself."""
    number = (count.cumsum(0) - count) // MAX_ENTRIES
    stops = number.unique_consecutive(return_counts=True)[1].cumsum(0).tolist()
    yield from zip([0, *stops], stops, strict=False)


def _within(entries: np.ndarray, runs: list[tuple[int, int]], start: int, stop: int) -> Entries:
    """Return the entries from a block's runs with latents in a range, renumbered from `start`."""
    parts = [np.empty(0, ENTRY)]
    for first, last in runs:
        run = entries[first:last]
        parts.append(run[(run["latent"] >= start) & (run["latent"] < stop)])
    chosen = np.concatenate(parts)
    place, latent = (torch.from_numpy(chosen[name].astype(np.int64)) for name in ("place", "latent"))
    return Entries(place, latent - start, torch.from_numpy(chosen["value"].astype(np.float32)))
