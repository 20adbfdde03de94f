"""Shards on disk: safetensors files with a checksum for every CHUNK rows, which are checked when they are read.

A shard holds a tensor [n d_in] for each hook, the token ids "tokens" [n], and "checksums" [n_keys n_chunks]: the CRC-32 of
each chunk of each other tensor, in alphabetical order of their names.
"""

import hashlib
import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from io import FileIO
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from saelens_lite.errors import CorruptFileError
from saelens_lite.files import file_size
from saelens_lite.schemas import Checked, PlainName, Positive, Sha256
from saelens_lite.tensor_files import Spec, check_header, tensor_specs, write_tensor_blocks

CHUNK = 128
MANIFEST, SHARDS = "manifest.json", "shards"  # a file of each cache, and the folder of shards in an unfinished one


def write_shard(path: Path, rows: dict[str, Sequence[Tensor]], checksums: Int[Tensor, "n_keys n_chunks"]) -> dict:
    """Write a shard in one step, and return its manifest entry: file, n_tokens, bytes, sha256.

    Args:
        rows: the tensors, each in consecutive blocks of rows.
        checksums: those of `chunk_checksums`, for each key in alphabetical order.
    """
    sha256 = write_tensor_blocks(path, {**rows, "checksums": [checksums]})
    n_tokens = sum(map(len, rows["tokens"]))
    return {"file": path.name, "n_tokens": n_tokens, "bytes": path.stat().st_size, "sha256": sha256}


def chunk_checksums(x: Tensor) -> list[int]:
    """Return the CRC-32 of each chunk of rows."""
    return [zlib.crc32(chunk.view(torch.uint8).numpy()) for chunk in x.contiguous().split(CHUNK)]


class Facts(Checked):
    """The entry of a shard in a manifest."""

    file: PlainName
    n_tokens: Positive
    bytes: Positive
    sha256: Sha256

    def check_name(self, number: int) -> None:
        """Raise CorruptFileError unless the file has the name of the shard with that number."""
        if self.file != (wanted := shard_name(number)):
            raise CorruptFileError(f"shard number {number} is in {self.file!r}, expected {wanted}; capture again")


def shard_name(number: int) -> str:
    """Return the file name of a shard."""
    return f"shard-{number:05d}.safetensors"


def check_size(path: Path, n_bytes: int) -> None:
    """Raise CorruptFileError unless a shard exists and has the size in the manifest."""
    size = file_size(path) if path.exists() else None
    if size != n_bytes:
        raise CorruptFileError(f"{path}: expected {n_bytes:,} bytes, found {size}; capture again")


class Shard:
    """A shard that is read chunk by chunk, without keeping the file open or mapped.

    widths: d_in of each hook. The header of the file is checked before any other part of it is read.
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
        """Raise CorruptFileError unless the file holds the tensors in the manifest."""
        _ = self._first

    @cached_property
    def _first(self) -> dict[str, int]:
        """Offset of each tensor in the file. CorruptFileError if the header does not match the manifest."""
        specs = tensor_specs(self.path)
        header, start = check_header(self.path)
        shapes = self.shapes | {"checksums": (len(self._keys), self.n_chunks)}
        dtypes = self.dtypes | {"checksums": torch.int64}
        for key in sorted(specs.keys() | shapes.keys()):
            wanted = Spec(dtypes[key], shapes[key]) if key in shapes else None
            if (spec := specs.get(key)) != wanted:
                raise CorruptFileError(
                    f"{self.path}: {key[:80]!r} is {spec or 'missing'}; the manifest says {wanted or 'nothing'}"
                )
        return {key: start + header[key]["data_offsets"][0] for key in specs}

    @cached_property
    def _checksums(self) -> np.ndarray:
        checksums = np.empty((len(self._keys), self.n_chunks), np.int64)
        with self.opened() as file:
            self._fill(file, checksums.reshape(-1).view(np.uint8), self._first["checksums"])
        return checksums

    @contextmanager
    def opened(self) -> Iterator[FileIO]:
        """Open the file for `read`, after its header is checked. Raise CorruptFileError if it cannot be read in the block."""
        self.check_header()
        try:
            with open(self.path, "rb", buffering=0) as file:
                yield file
        except OSError as error:
            raise CorruptFileError(f"{self.path} cannot be read: {error}") from error

    def _fill(self, file: FileIO, out: np.ndarray, first: int) -> None:
        """Read bytes into `out`, from offset `first` of the file on."""
        file.seek(first)
        if (n := file.readinto(out)) != len(out):
            raise CorruptFileError(f"{self.path} is truncated: {n:,} of {len(out):,} bytes at {first:,}; capture again")

    def rows(self, number: int) -> int:
        """Return the number of rows of a chunk."""
        return min(CHUNK, self.n_tokens - number * CHUNK)

    def row_bytes(self, key: str) -> int:
        """Return the number of bytes of a row of a tensor."""
        return self.dtypes[key].itemsize * math.prod(self.shapes[key][1:])

    def read(self, file: FileIO, key: str, number: int, out: np.ndarray) -> None:
        """Read the bytes of one chunk into `out`, and check them the first time. `file` is the one of `opened`.

        Raises:
            CorruptFileError: they do not match their checksum, or cannot be read.
        """
        self._fill(file, out, self._first[key] + number * CHUNK * self.row_bytes(key))
        if not self._checked[key][number]:
            if zlib.crc32(out) != self._checksums[self._keys.index(key), number]:
                raise CorruptFileError(
                    f"{self.path} is damaged: the chunk of {key!r} at row {number * CHUNK} does not match its checksum; "
                    "capture again"
                )
            self._checked[key][number] = True


def checksums_hash(shards: Iterable[Shard]) -> str:
    """Return the SHA-256 of the checksums in some shards, without reading their rows."""
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(np.ascontiguousarray(shard._checksums))
    return digest.hexdigest()


def read_chunks(
    shards: Sequence[Shard], chunks: Sequence[Sequence[int]], key: str, *, readers: int = 1, pinned: bool = False
) -> Tensor:
    """Return the rows of some chunks, given as [shard, chunk], in order.

    Args:
        readers: number of threads that read.
        pinned: return memory from which CUDA copies without waiting.

    Raises:
        CorruptFileError: the chunks are damaged.
    """
    first = shards[chunks[0][0]]
    rows = [shards[shard].rows(number) for shard, number in chunks]
    content = torch.empty(sum(rows) * first.row_bytes(key), dtype=torch.uint8, pin_memory=pinned)
    parts = np.split(content.numpy(), np.cumsum(rows)[:-1] * first.row_bytes(key))
    by_shard = sorted(range(len(chunks)), key=lambda i: chunks[i])

    def read(reader: int) -> None:
        mine = by_shard[reader * len(chunks) // readers : (reader + 1) * len(chunks) // readers]
        for shard, places in groupby(mine, key=lambda i: chunks[i][0]):
            with shards[shard].opened() as file:
                for i in places:
                    shards[shard].read(file, key, chunks[i][1], parts[i])

    if readers == 1:
        read(0)
    else:
        with ThreadPoolExecutor(readers) as threads:
            list(threads.map(read, range(readers)))
    return content.view(first.dtypes[key]).reshape(sum(rows), *first.shapes[key][1:])
