"""Shards on disk: safetensors files with a checksum for every few rows, so that what is read can be checked as it is read.

A shard holds a tensor [n d_in] for each hook, the token ids "tokens" [n], and "checksums" [n_keys n_chunks]: the CRC-32 of
each CHUNK rows of each of the others, their names in order.
"""

import hashlib
import math
import zlib
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from saelens_lite.errors import CorruptFileError
from saelens_lite.files import check_header, write_file

CHUNK = 128


def write_shard(path: Path, tensors: dict[str, Tensor]) -> dict:
    """Write a shard in one step; its facts for the manifest: file, n_tokens, bytes, sha256."""
    from safetensors.torch import save_file

    checksums = torch.tensor([[_crc(piece) for piece in tensors[key].split(CHUNK)] for key in sorted(tensors)])
    whole = {key: x.contiguous() for key, x in tensors.items()} | {"checksums": checksums}
    write_file(path, lambda temporary: save_file(whole, temporary))
    return {"file": path.name, "n_tokens": len(tensors["tokens"]), "bytes": path.stat().st_size, "sha256": sha256(path)}


def _crc(x: Tensor) -> int:
    return zlib.crc32(x.contiguous().view(torch.uint8).numpy())


def sha256(file: Path) -> str:
    """The SHA-256 of a file's contents."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "I32": torch.int32, "I64": torch.int64}


class _Stored(NamedTuple):
    """Where the numbers of a tensor begin in a file, and what they are."""

    first: int
    dtype: torch.dtype


class Shard:
    """A shard that is read chunk by chunk through a memory map.

    shapes: what the manifest says it holds, name by name. Raises CorruptFileError when the file holds something else.
    """

    def __init__(self, path: Path, n_bytes: int, shapes: dict[str, tuple[int, ...]]):
        self.path, self.n_bytes = path, n_bytes
        self.n_chunks = -(-shapes["tokens"][0] // CHUNK)
        self.shapes = shapes | {"checksums": (len(shapes), self.n_chunks)}
        self._keys = sorted(shapes)
        self._seen: set[tuple[str, int]] = set()

    def check_size(self) -> None:
        """Raise CorruptFileError unless the file is there with the size the manifest says."""
        size = self.path.stat().st_size if self.path.is_file() else None
        if size != self.n_bytes:
            raise CorruptFileError(f"{self.path}: expected {self.n_bytes:,} bytes, found {size}; capture again")

    @cached_property
    def _stored(self) -> dict[str, _Stored]:
        header, start = check_header(self.path)
        found = {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
        if found != self.shapes:
            raise CorruptFileError(f"{self.path} holds {found}; the manifest says {self.shapes}")
        try:
            stored = {key: _Stored(start + header[key]["data_offsets"][0], _DTYPES[header[key]["dtype"]]) for key in found}
        except KeyError as error:
            raise CorruptFileError(f"{self.path}: numbers of kind {error}; expected one of {', '.join(_DTYPES)}") from None
        n_bytes = sum(math.prod(shape) * stored[key].dtype.itemsize for key, shape in found.items())
        if start + n_bytes != self.n_bytes:
            raise CorruptFileError(
                f"{self.path}: its tensors take {n_bytes:,} bytes, its header leaves {self.n_bytes - start:,}"
            )
        return stored

    @cached_property
    def _bytes(self) -> np.ndarray:
        """The file, mapped into memory for reading only."""
        return np.memmap(self.path, np.uint8, "r")

    def _place(self, key: str, number: int) -> slice:
        """Where in the file the rows of a chunk are."""
        n, *width = self.shapes[key]
        first, dtype = self._stored[key]
        row = math.prod(width) * dtype.itemsize
        return slice(first + number * CHUNK * row, first + min((number + 1) * CHUNK, n) * row)

    @cached_property
    def _checksums(self) -> np.ndarray:
        first = self._stored["checksums"].first
        size = 8 * len(self._keys) * self.n_chunks
        return self._bytes[first : first + size].view(np.int64).reshape(len(self._keys), self.n_chunks)

    def dtype(self, key: str) -> torch.dtype:
        """What the numbers of a tensor are."""
        return self._stored[key].dtype

    def n_bytes_of(self, key: str, number: int) -> int:
        """How long a chunk is."""
        place = self._place(key, number)
        return place.stop - place.start

    def read(self, key: str, number: int, out: np.ndarray) -> None:
        """Copy the bytes of one chunk, which are checked the first time.

        Raises:
            CorruptFileError: they are not what was written.
        """
        out[:] = self._bytes[self._place(key, number)]
        if (key, number) not in self._seen:
            if zlib.crc32(out) != self._checksums[self._keys.index(key), number]:
                raise CorruptFileError(
                    f"{self.path} is damaged: rows {number * CHUNK} … of {key!r} do not match their checksum; capture again"
                )
            self._seen.add((key, number))
