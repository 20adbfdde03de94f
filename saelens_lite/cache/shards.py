"""Shards on disk: safetensors files with a checksum for every few rows, so that what is read can be checked as it is read.

A shard holds a tensor [n d_in] for each hook, the token ids "tokens" [n], and "checksums" [n_keys n_chunks]: the CRC-32 of
each CHUNK rows of each of the others, their names in order.
"""

import hashlib
import math
import zlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from saelens_lite.errors import CorruptFileError
from saelens_lite.files import Spec, check_header, file_hash, file_size, tensor_specs, write_tensors
from saelens_lite.schemas import Checked, PlainName, Positive, Sha256

CHUNK = 128
MANIFEST = "manifest.json"


def write_shard(path: Path, tensors: dict[str, Tensor]) -> dict:
    """Write a shard in one step; its facts for the manifest: file, n_tokens, bytes, sha256."""
    checksums = torch.tensor([[_crc(piece) for piece in tensors[key].split(CHUNK)] for key in sorted(tensors)])
    write_tensors(path, tensors | {"checksums": checksums})
    return {"file": path.name, "n_tokens": len(tensors["tokens"]), "bytes": path.stat().st_size, "sha256": file_hash(path)}


def _crc(x: Tensor) -> int:
    return zlib.crc32(x.contiguous().view(torch.uint8).numpy())


class Facts(Checked):
    """The entry of a shard in a manifest."""

    file: PlainName
    n_tokens: Positive
    bytes: Positive
    sha256: Sha256

    def check_name(self, number: int) -> None:
        """Raise CorruptFileError unless the file is called as the shard of that number is."""
        if self.file != (wanted := shard_name(number)):
            raise CorruptFileError(f"shard number {number} is in {self.file!r}, expected {wanted}; capture again")


def shard_name(number: int) -> str:
    """The file of a shard."""
    return f"shard-{number:05d}.safetensors"


def check_size(path: Path, n_bytes: int) -> None:
    """Raise CorruptFileError unless a shard is there with the size the manifest says."""
    size = file_size(path) if path.exists() else None
    if size != n_bytes:
        raise CorruptFileError(f"{path}: expected {n_bytes:,} bytes, found {size}; capture again")


class Shard:
    """A shard that is read chunk by chunk; nothing of it stays open or mapped.

    widths: d_in of each hook. What the file holds is checked before anything else of it is read.
    """

    def __init__(self, path: Path, n_bytes: int, n_tokens: int, widths: dict[str, int], dtype: torch.dtype):
        a_row = 4 + dtype.itemsize * sum(widths.values())
        if not 0 < a_row * n_tokens < n_bytes:
            raise CorruptFileError(f"{path} has {n_bytes:,} bytes; the manifest says {n_tokens:,} tokens of {a_row:,} bytes")
        self.path, self.n_bytes, self.n_tokens = path, n_bytes, n_tokens
        self.n_chunks = -(-n_tokens // CHUNK)
        self.shapes = {"tokens": (n_tokens,), **{hook: (n_tokens, d_in) for hook, d_in in widths.items()}}
        self.dtypes = {"tokens": torch.int32, **dict.fromkeys(widths, dtype)}
        self._keys = sorted(self.shapes)
        self._checked = {key: bytearray(self.n_chunks) for key in self._keys}

    def check_header(self) -> None:
        """Raise CorruptFileError unless the file holds the tensors that the manifest says."""
        _ = self._first

    @cached_property
    def _first(self) -> dict[str, int]:
        """Where in the file each tensor begins. CorruptFileError when the header is not that of such a shard."""
        specs = tensor_specs(self.path)
        header, start = check_header(self.path)
        shapes = self.shapes | {"checksums": (len(self._keys), self.n_chunks)}
        dtypes = self.dtypes | {"checksums": torch.int64}
        for key in sorted(specs.keys() | shapes.keys()):
            wanted = Spec(dtypes[key], shapes[key]) if key in shapes else None
            if (found := specs.get(key)) != wanted:
                raise CorruptFileError(
                    f"{self.path}: {key[:80]!r} is {found or 'missing'}; the manifest says {wanted or 'nothing'}"
                )
        return {key: start + header[key]["data_offsets"][0] for key in specs}

    @cached_property
    def _checksums(self) -> np.ndarray:
        checksums = np.empty((len(self._keys), self.n_chunks), np.int64)
        self._fill(checksums.reshape(-1).view(np.uint8), self._first["checksums"])
        return checksums

    def _fill(self, out: np.ndarray, first: int) -> None:
        """Read bytes from place `first` of the file on."""
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(first)
                n = file.readinto(out)
        except OSError as error:
            raise CorruptFileError(f"{self.path} cannot be read: {error}") from error
        if n != len(out):
            raise CorruptFileError(f"{self.path} is truncated: {n:,} of {len(out):,} bytes at {first:,}; capture again")

    def rows(self, number: int) -> int:
        """How many rows a chunk has."""
        return min(CHUNK, self.n_tokens - number * CHUNK)

    def row_bytes(self, key: str) -> int:
        """How long a row of a tensor is."""
        return self.dtypes[key].itemsize * math.prod(self.shapes[key][1:])

    def read(self, key: str, number: int, out: np.ndarray) -> None:
        """Put the bytes of one chunk into `out`; they are checked the first time.

        Raises:
            CorruptFileError: they are not what was written, or cannot be read.
        """
        self._fill(out, self._first[key] + number * CHUNK * self.row_bytes(key))
        if not self._checked[key][number]:
            if zlib.crc32(out) != self._checksums[self._keys.index(key), number]:
                raise CorruptFileError(
                    f"{self.path} is damaged: rows {number * CHUNK} … of {key!r} do not match their checksum; capture again"
                )
            self._checked[key][number] = True


def checksums_hash(shards: Iterable[Shard]) -> str:
    """Return the SHA-256 of the checksums of all rows in some shards; nothing else of them is read."""
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(np.ascontiguousarray(shard._checksums))
    return digest.hexdigest()


def read_chunks(shards: Sequence[Shard], chunks: Iterable[Sequence[int]], key: str) -> Tensor:
    """The rows of some chunks, [shard, chunk] each, one after the other. CorruptFileError where they are damaged."""
    places = [(shards[shard], number) for shard, number in chunks]
    first = places[0][0]
    rows = sum(shard.rows(number) for shard, number in places)
    content = np.empty(rows * first.row_bytes(key), np.uint8)
    stop = 0
    for shard, number in places:
        start, stop = stop, stop + shard.rows(number) * shard.row_bytes(key)
        shard.read(key, number, content[start:stop])
    return torch.from_numpy(content).view(first.dtypes[key]).reshape(rows, *first.shapes[key][1:])
