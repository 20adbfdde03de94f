"""Shards on disk: safetensors files with a checksum for every few rows, so that what is read can be checked as it is read.

A shard holds a tensor [n d_in] for each hook, the token ids "tokens" [n], and "checksums" [n_keys n_chunks]: the CRC-32 of
each CHUNK rows of each of the others, their names in order.
"""

import hashlib
import zlib
from functools import cached_property
from pathlib import Path

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
    def _file(self):
        from safetensors import safe_open

        header = check_header(self.path)
        found = {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
        if found != self.shapes:
            raise CorruptFileError(f"{self.path} holds {found}; the manifest says {self.shapes}")
        return safe_open(self.path, framework="pt")

    @cached_property
    def _checksums(self) -> Tensor:
        return self._file.get_tensor("checksums")

    def chunk(self, key: str, number: int) -> Tensor:
        """The rows of one chunk, checked the first time.

        Raises:
            CorruptFileError: they are not what was written.
        """
        rows = self._file.get_slice(key)[number * CHUNK : (number + 1) * CHUNK]
        if (key, number) not in self._seen:
            if _crc(rows) != int(self._checksums[self._keys.index(key), number]):
                raise CorruptFileError(
                    f"{self.path} is damaged: rows {number * CHUNK} … of {key!r} do not match their checksum; capture again"
                )
            self._seen.add((key, number))
        return rows
