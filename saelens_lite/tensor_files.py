"""Files of tensors (safetensors). The size of a file is compared with its header before memory is allocated."""

import hashlib
import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saelens_lite.arrays import not_finite
from saelens_lite.errors import CorruptFileError
from saelens_lite.files import check_fits_memory, file_size, open_file, parsed_json, shortened, write_file

MAX_HEADER_BYTES = 16 << 20
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
STORED_DTYPES = {  # names in safetensors
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
SAFETENSORS_ORDER = ("I64", "F64", "F32", "I32", "BF16", "F16", "I16", "I8", "U8", "BOOL")  # in which it stores tensors


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors to a safetensors file in one step."""
    from safetensors.torch import save_file

    whole = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    write_file(path, lambda temporary: save_file(whole, temporary))


def write_tensor_blocks(path: Path, tensors: Mapping[str, Sequence[Tensor]]) -> str:
    """Write tensors, each in consecutive blocks of rows, to a safetensors file in one step. Return the SHA-256 of the file.

    The bytes are those of `write_tensors`. The blocks are on the CPU, and are not joined in memory.
    """
    digest = hashlib.sha256()

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            for piece in _safetensors(tensors):
                digest.update(piece)
                file.write(piece)

    write_file(path, write)
    return digest.hexdigest()


def _safetensors(tensors: Mapping[str, Sequence[Tensor]]) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a safetensors file: its header, then the tensors, those with the widest entries first."""
    dtypes = {dtype: name for name, dtype in STORED_DTYPES.items()}
    order = sorted(tensors, key=lambda name: (SAFETENSORS_ORDER.index(dtypes[tensors[name][0].dtype]), name))
    header, stop = {}, 0
    for name in order:
        blocks = tensors[name]
        start, stop = stop, stop + sum(x.nbytes for x in blocks)
        shape = [sum(map(len, blocks)), *blocks[0].shape[1:]]
        header[name] = {"dtype": dtypes[blocks[0].dtype], "shape": shape, "data_offsets": [start, stop]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for name in order:
        for x in tensors[name]:
            yield memoryview(x.contiguous().flatten().view(torch.uint8).numpy())


class Spec(NamedTuple):
    """The type and shape of a tensor that has not been read."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its entries."""
        return math.prod(self.shape) * self.dtype.itemsize


def check_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return the header of a safetensors file and the offset of its tensors, after comparing the file's size with the header.

    Raises:
        CorruptFileError: the file is missing, truncated or not safetensors, or its tensors overlap or leave gaps.
    """
    size = file_size(path)
    try:
        with open_file(path) as file:
            start = file.read(8)
            header_size = struct.unpack("<Q", start)[0] if len(start) == 8 else MAX_HEADER_BYTES + 1
            if header_size > min(size, MAX_HEADER_BYTES):
                raise CorruptFileError(f"{path}: not a safetensors file, or truncated ({size:,} bytes)")
            header = parsed_json(file.read(header_size).decode())
        places = sorted(tuple(entry["data_offsets"]) for name, entry in header.items() if name != "__metadata__")
        if not all(len(place) == 2 and all(type(n) is int and n >= 0 for n in place) for place in places):
            raise ValueError("tensors need a first and a last byte")
    except OSError as error:
        raise CorruptFileError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        raise CorruptFileError(f"{path} is damaged: {error}") from None
    end = max((stop for _, stop in places), default=0)
    if 8 + header_size + end != size:
        raise CorruptFileError(
            f"{path}: header announces {8 + header_size + end:,} bytes, the file has {size:,}; it is truncated or damaged"
        )
    for (first, _), (_, before) in zip(places, [(0, 0), *places], strict=False):
        if first != before:
            raise CorruptFileError(f"{path} is damaged: its tensors overlap, or leave a gap, at byte {before:,}")
    return header, 8 + header_size


def tensor_specs(path: Path) -> dict[str, Spec]:
    """Return the type and shape of each tensor of a safetensors file, after checking its header.

    Raises:
        CorruptFileError: the file is missing, truncated or not safetensors, or a tensor has an unsupported type.
    """
    header = check_header(path)[0]
    header.pop("__metadata__", None)
    return {name: _spec(path, name, entry) for name, entry in header.items()}


def _spec(path: Path, name: str, entry: Any) -> Spec:
    """Return the dtype and shape of a tensor from a safetensors header, after checking its offsets."""
    try:
        begin, end = entry["data_offsets"]
        spec = Spec(STORED_DTYPES[entry["dtype"]], tuple(entry["shape"]))
    except (KeyError, TypeError, ValueError):
        raise CorruptFileError(f"{path}: the header entry of tensor {name[:80]!r} is damaged, or of a type not read") from None
    if not all(type(n) is int and 0 <= n < 1 << 63 for n in spec.shape) or spec.nbytes != end - begin:
        raise CorruptFileError(f"{path}: tensor {name[:80]!r} has shape {spec.shape} at bytes {begin!r} to {end!r}")
    return spec


def check_axes(path: Path, specs: Mapping[str, Spec], axes: Mapping[str, str], sizes: Mapping[str, int]) -> None:
    """Raise CorruptFileError unless a file has exactly these tensors and every axis name has one length.

    axes: names of each tensor's axes, such as "d_sae top_n"; sizes: the lengths that are known.
    """
    if missing := axes.keys() ^ specs.keys():
        raise CorruptFileError(f"{path}: expected tensors {', '.join(axes)}; missing or not expected: {shortened(missing)}")
    sizes = dict(sizes)
    for name, wanted in axes.items():
        named, shape = wanted.split(), specs[name].shape
        if len(named) != len(shape) or any(sizes.setdefault(axis, n) != n for axis, n in zip(named, shape, strict=True)):
            known = ", ".join(f"{axis} = {sizes[axis]}" for axis in named if axis in sizes)
            raise CorruptFileError(f"{path}: {name} has shape {shape}, expected [{wanted}] with {known}")


def read_tensors(path: Path, finite: bool = True) -> dict[str, Tensor]:
    """Return all tensors of a safetensors file, copied to memory, so that the file may be replaced afterwards.

    Sizes are checked against the header before memory is allocated.

    Raises:
        CorruptFileError: the file is missing, truncated, not safetensors or larger than memory, has an unsupported dtype, or
            (`finite`) holds NaN or infinity.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    tensor_specs(path)
    check_fits_memory(path, file_size(path))
    try:
        tensors = {name: x.clone() for name, x in load_file(path).items()}  # a mapped file cannot be removed on Windows
    except (SafetensorError, ValueError, KeyError, TypeError, OSError) as error:
        raise CorruptFileError(f"{path} is damaged: {error}") from None
    for name in not_finite(tensors) if finite else ():
        raise CorruptFileError(f"{path}: tensor {name!r} holds NaN or infinity")
    return tensors
