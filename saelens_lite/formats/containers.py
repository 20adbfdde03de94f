"""Files of named tensors from strangers: safetensors, npz and PyTorch's zip. What they hold is checked before it is read.

Nothing that stands in a file is ever executed, and nothing is allocated that the file does not hold: names, types and shapes
come from headers, whose sizes have to agree with the size of the file.
"""

import pickletools
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from saelens_lite.arrays import not_finite
from saelens_lite.errors import CorruptFileError
from saelens_lite.files import Spec, file_size, is_zip, tensor_specs

NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
MAX_TENSORS = 1000
MAX_PICKLE_BYTES = 1 << 20  # of which state dicts of dictionaries have a few thousand
MAX_REPEATS = 30  # of tuples in a pickle; n of them unfold to no more than exp(n / e)
MAX_COMPRESSION = 16  # numbers that are worth keeping are compressed far less
GLOBALS = {  # what a pickle of tensors may name; torch's own list is longer
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "collections OrderedDict",
    *(
        f"torch {kind}Storage"
        for kind in ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
    ),
}

MAKE_DICTS = ("EMPTY_DICT", "SETITEM", "SETITEMS")


class TensorFile(ABC):
    """A file of named tensors, known by its header. `specs` says what it holds; `read` reads some of it."""

    kind: ClassVar[str]

    def __init__(self, path: Path, specs: Mapping[str, Spec]):
        if len(specs) > MAX_TENSORS:
            raise CorruptFileError(f"{path} holds {len(specs):,} tensors; a dictionary has a dozen")
        self.path, self.specs = path, dict(specs)

    def ndim(self, name: str) -> int | None:
        """How many axes a tensor has; None where there is no such tensor."""
        return len(self.specs[name].shape) if name in self.specs else None

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Those tensors.

        Raises:
            CorruptFileError: the file is damaged, or one holds NaN or infinity.
        """
        tensors = self._load(sorted(set(names)))
        for name in not_finite(tensors):
            raise CorruptFileError(f"{self.path}: tensor {name!r} holds NaN or infinity")
        return tensors

    @abstractmethod
    def _load(self, names: list[str]) -> dict[str, Tensor]:
        """Those tensors, unchecked."""


class SafetensorsFile(TensorFile):
    """A safetensors file."""

    kind = "safetensors"

    def __init__(self, path: Path):
        super().__init__(path, tensor_specs(path))

    def _load(self, names: list[str]) -> dict[str, Tensor]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in names}
        except (SafetensorError, ValueError, KeyError, TypeError, OSError) as error:
            raise CorruptFileError(f"{self.path} is damaged: {error}") from None


class NpzFile(TensorFile):
    """An npz file of numpy; arrays of objects, which would be pickles, are refused."""

    kind = "npz"

    def __init__(self, path: Path):
        with _open_zip(path) as archive:
            specs = {m.filename.removesuffix(".npy"): _npy_spec(path, archive, m) for m in _members(path, archive)}
        super().__init__(path, specs)

    def _load(self, names: list[str]) -> dict[str, Tensor]:
        with _open_zip(self.path) as archive:
            try:
                return {name: _array(archive, f"{name}.npy") for name in names}
            except Exception as error:  # whatever zipfile and numpy make of a damaged file
                raise CorruptFileError(f"{self.path} is damaged: {type(error).__name__}: {error}") from None


def _array(archive: zipfile.ZipFile, name: str) -> Tensor:
    """An array, unpacked piece by piece: more than its header announced is not."""
    with archive.open(name) as file:
        return torch.from_numpy(np.lib.format.read_array(file))


def _npy_spec(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Spec:
    """What the header of an array says, once the size of the archive's member agrees with it."""
    try:
        with archive.open(member) as file:
            version = np.lib.format.read_magic(file)
            shape, _, dtype = NPY_HEADERS[version](file)
            begins = file.tell()
        if dtype.kind not in "fiub" or not dtype.isnative:
            raise ValueError(f"numbers of type {dtype} are not read")
        spec = Spec(torch.from_numpy(np.empty(0, dtype)).dtype, tuple(int(n) for n in shape))
    except Exception as error:  # whatever zipfile and numpy make of a damaged file
        raise CorruptFileError(f"{path}: {member.filename[:80]!r} is no array: {type(error).__name__}: {error}") from None
    if min(spec.shape, default=0) < 0 or begins + spec.nbytes != member.file_size:
        raise CorruptFileError(f"{path}: {member.filename[:80]!r} has shape {spec.shape} and {member.file_size:,} bytes")
    return spec


class TorchFile(TensorFile):
    """What `torch.save` wrote: a pickle beside the numbers of its tensors. Read by torch.load(weights_only=True) alone.

    Before that, every name the pickle would import has to be one of `GLOBALS`. Dictionaries within dictionaries are
    flattened, "activation_state_dict.k"; `values` has what is no tensor.
    """

    kind = "pytorch"

    def __init__(self, path: Path):
        _scan_pickle(path)
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # whatever torch makes of a damaged file
            reason = str(error).partition("\n")[0][:200]
            raise CorruptFileError(f"{path} cannot be read: {type(error).__name__}: {reason}") from None
        self.tensors: dict[str, Tensor] = {}
        self.values: dict[str, Any] = {}
        self._met = 0
        self._flatten(path, "", loaded, depth=0)
        for name, tensor in self.tensors.items():
            if tensor.layout != torch.strided or tensor.untyped_storage().nbytes() < tensor.numel() * tensor.itemsize:
                raise CorruptFileError(f"{path}: tensor {name[:80]!r} has shape {tuple(tensor.shape)}, and fewer numbers")
        super().__init__(path, {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in self.tensors.items()})

    def _flatten(self, path: Path, prefix: str, value: Any, depth: int) -> None:
        self._met += 1
        if self._met > MAX_TENSORS:  # one dictionary, met again and again inside others, makes very many out of few
            raise CorruptFileError(f"{path} holds more than {MAX_TENSORS:,} tensors and settings; a dictionary has a dozen")
        if isinstance(value, Mapping) and depth < 4:
            for key, inner in value.items():
                self._flatten(path, f"{prefix}.{key}" if prefix else str(key), inner, depth + 1)
        elif isinstance(value, Tensor):
            self.tensors[prefix] = value.detach()
        elif isinstance(value, str | int | float | None):
            self.values[prefix] = value
        else:
            raise CorruptFileError(
                f"{path}: {prefix[:80] or 'the whole of it'!r} is a {type(value).__name__}; expected tensors by name"
            )

    def _load(self, names: list[str]) -> dict[str, Tensor]:
        return {name: self.tensors[name].clone() for name in names}


def strings_in_pickle(path: Path) -> set[str]:
    """The strings in a PyTorch file's pickle, tensor names among them, without unpickling it; empty if it is no such file."""
    try:
        return {argument for _, argument, _ in _pickle_operations(path) if isinstance(argument, str)}
    except CorruptFileError:
        return set()


def _scan_pickle(path: Path) -> None:
    """Raise CorruptFileError if unpickling would need more than `GLOBALS`, or does what state dicts never do.

    A tuple met again and again inside others takes forever as the key of a dictionary; a tensor that is changed after it was
    made can be made to allocate what the file does not hold.
    """
    made_by, tuples, repeats = "", set(), 0  # the last value; where in the memo there are tuples, and how often they are used
    for operation, argument, _ in _pickle_operations(path):
        name = operation.name
        if name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4") or (name == "GLOBAL" and argument not in GLOBALS):
            raise CorruptFileError(
                f"{path} is a pickle that would import {str(argument)[:80]!r}; only tensors, numbers and strings are read"
            )
        if name in ("BINPUT", "LONG_BINPUT"):
            (tuples.add if "TUPLE" in made_by else tuples.discard)(argument)
            continue
        repeats += name in ("BINGET", "LONG_BINGET") and argument in tuples
        if repeats > MAX_REPEATS or (name == "BUILD" and made_by not in MAKE_DICTS):
            raise CorruptFileError(f"{path} is a pickle that repeats tuples or changes a tensor; no state dict does")
        made_by = name


def _pickle_operations(path: Path) -> list[tuple[Any, Any, int | None]]:
    with _open_zip(path) as archive:
        members = _members(path, archive)
        pickles = [m for m in members if m.filename.endswith(".pkl")]
        if any(m.compress_type != zipfile.ZIP_STORED for m in members) or len(pickles) != 1:
            raise CorruptFileError(f"{path} was not written by torch.save (of version 1.6 or later)")
        if pickles[0].file_size > MAX_PICKLE_BYTES:
            raise CorruptFileError(f"{path}: its pickle has {pickles[0].file_size:,} bytes; it is no dictionary")
        try:
            with archive.open(pickles[0]) as file:
                return list(pickletools.genops(file.read(pickles[0].file_size)))
        except Exception as error:  # whatever a damaged pickle makes of it
            raise CorruptFileError(f"{path} is damaged: {type(error).__name__}: {error}") from None


def _open_zip(path: Path) -> zipfile.ZipFile:
    file_size(path)
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise CorruptFileError(f"{path} is not a zip file, or damaged: {error}") from None


def _members(path: Path, archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """The files in an archive, which together are no larger than it could hold."""
    members = [m for m in archive.infolist() if not m.is_dir()]
    size = file_size(path)
    if len(members) > MAX_TENSORS or sum(m.file_size for m in members) > MAX_COMPRESSION * size:
        raise CorruptFileError(f"{path} has {size:,} bytes and announces far more than fits into them")
    return members


def open_tensors(path: Path) -> TensorFile:
    """The file of tensors at `path`, of whichever kind its first bytes show; a pickle is refused here.

    Raises:
        CorruptFileError: it is none, or damaged.
    """
    file_size(path)
    return NpzFile(path) if is_zip(path) else SafetensorsFile(path)


def tensor_names(path: Path) -> set[str]:
    """The names of the tensors in a safetensors or npz file; empty if it is none."""
    try:
        return set(open_tensors(path).specs)
    except CorruptFileError:
        return set()
