"""Files of named tensors from untrusted sources: safetensors, npz and PyTorch's zip.

Content is checked before it is read. Nothing in a file is executed, and nothing is allocated that the file does not hold:
names, types and shapes come from headers, whose sizes must agree with the size of the file.
"""

import pickletools
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from saelens_lite.arrays import not_finite
from saelens_lite.errors import CorruptFileError
from saelens_lite.files import file_size, is_zip, shortened
from saelens_lite.tensor_files import Spec, tensor_specs

NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
MAX_TENSORS = 1000
MAX_PICKLE_BYTES = 1 << 20  # state dicts of dictionaries have a few thousand
MAX_REPEATS = 30  # repeated tuples in a pickle; n of them unfold to at most exp(n / e) entries
MAX_COMPRESSION = 16  # real weights compress far less
GLOBALS = {  # names that a pickle of tensors may import; torch's own list is longer
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "collections OrderedDict",
    *(
        f"torch {kind}Storage"
        for kind in ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
    ),
}

BEFORE_1_6 = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # a pickle of torch's magic number
MAKE_DICTS = ("EMPTY_DICT", "SETITEM", "SETITEMS")


class TensorFile(ABC):
    """A file of named tensors, known by its header. `specs` has the types and shapes; `read` reads some of the tensors."""

    kind: ClassVar[str]

    def __init__(self, path: Path, specs: Mapping[str, Spec]):
        if len(specs) > MAX_TENSORS:
            raise CorruptFileError(f"{path} holds {len(specs):,} tensors; a dictionary has about a dozen")
        self.path, self.specs = path, dict(specs)

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files that hold the tensors."""
        return (self.path,)

    def ndim(self, name: str) -> int | None:
        """Return the number of axes of a tensor, or None if there is no such tensor."""
        return len(self.specs[name].shape) if name in self.specs else None

    def read(self, names: Iterable[str], finite: bool = True) -> dict[str, Tensor]:
        """Return these tensors.

        Args:
            finite: False if NaN and infinity have a meaning in them.

        Raises:
            CorruptFileError: the file is damaged, or a tensor holds NaN or infinity.
        """
        tensors = self._load(sorted(set(names)))
        for name in not_finite(tensors) if finite else ():
            raise CorruptFileError(f"{self.path}: tensor {name!r} holds NaN or infinity")
        return tensors

    @abstractmethod
    def _load(self, names: list[str]) -> dict[str, Tensor]:
        """Return these tensors without checking their values."""


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
    """An npz file of numpy. Arrays of objects, which are pickles, are refused."""

    kind = "npz"

    def __init__(self, path: Path):
        with _open_zip(path) as archive:
            specs = {m.filename.removesuffix(".npy"): _npy_spec(path, archive, m) for m in _members(path, archive)}
        super().__init__(path, specs)

    def _load(self, names: list[str]) -> dict[str, Tensor]:
        with _open_zip(self.path) as archive:
            try:
                return {name: _array(archive, f"{name}.npy") for name in names}
            except Exception as error:  # any error of zipfile or numpy on a damaged file
                raise CorruptFileError(f"{self.path} is damaged: {type(error).__name__}: {error}") from None


def _array(archive: zipfile.ZipFile, name: str) -> Tensor:
    """Return an array. It is unpacked in pieces, and never beyond the size in its header."""
    with archive.open(name) as file:
        return torch.from_numpy(np.lib.format.read_array(file))


def _npy_spec(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Spec:
    """Return the type and shape in an array's header. Raise CorruptFileError unless the member's size agrees with them."""
    try:
        with archive.open(member) as file:
            version = np.lib.format.read_magic(file)
            shape, _, dtype = NPY_HEADERS[version](file)
            begins = file.tell()
        if dtype.kind not in "fiub" or not dtype.isnative:
            raise ValueError(f"type {dtype} is not supported")
        spec = Spec(torch.from_numpy(np.empty(0, dtype)).dtype, tuple(int(n) for n in shape))
    except Exception as error:  # any error of zipfile or numpy on a damaged file
        raise CorruptFileError(f"{path}: {member.filename[:80]!r} cannot be read: {type(error).__name__}: {error}") from None
    if min(spec.shape, default=0) < 0 or begins + spec.nbytes != member.file_size:
        raise CorruptFileError(f"{path}: {member.filename[:80]!r} has shape {spec.shape} but {member.file_size:,} bytes")
    return spec


class JoinedFiles(TensorFile):
    """Several files that hold one dictionary.

    stacked: True if each file holds tensors of the same names and shapes, which get a new first axis; False if each file holds
        tensors of other names.
    """

    def __init__(self, files: Sequence[TensorFile], stacked: bool = False):
        self.files, self.stacked = tuple(files), stacked
        first, *others = self.files
        self.kind = first.kind
        for file in others:
            if stacked and file.specs != first.specs:
                raise CorruptFileError(
                    f"{file.path}: its tensors differ in name, type or shape from those of {first.path.name}"
                )
            if not stacked and (twice := file.specs.keys() & first.specs.keys()):
                raise CorruptFileError(
                    f"{file.path} holds tensors that {first.path.name} holds too: {shortened(sorted(twice))}"
                )
        specs = {name: spec for file in self.files for name, spec in file.specs.items()}
        if stacked:
            specs = {name: Spec(spec.dtype, (len(self.files), *spec.shape)) for name, spec in specs.items()}
        super().__init__(first.path, specs)

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(file.path for file in self.files)

    def _load(self, names: list[str]) -> dict[str, Tensor]:
        parts = [file.read(name for name in names if name in file.specs) for file in self.files]
        if self.stacked:
            return {name: torch.stack([part[name] for part in parts]) for name in names}
        return {name: tensor for part in parts for name, tensor in part.items()}


class TorchFile(TensorFile):
    """A file written by `torch.save`: a pickle and the numbers of its tensors. Only torch.load(weights_only=True) reads it.

    Before that, every name that the pickle would import must be in `GLOBALS`. Nested dictionaries are flattened to names like
    "activation_state_dict.k". `values` holds the entries that are text or numbers, and `unread` the names of others, such as
    lists.
    """

    kind = "pytorch"

    def __init__(self, path: Path):
        _scan_pickle(path)
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # any error of torch on a damaged file
            reason = str(error).partition("\n")[0][:200]
            raise CorruptFileError(f"{path} cannot be read: {type(error).__name__}: {reason}") from None
        self.tensors: dict[str, Tensor] = {}
        self.values: dict[str, Any] = {}
        self.unread: list[str] = []
        self._met = 0
        self._flatten(path, "", loaded, depth=0)
        for name, tensor in self.tensors.items():
            if tensor.layout != torch.strided or tensor.untyped_storage().nbytes() < tensor.numel() * tensor.itemsize:
                raise CorruptFileError(f"{path}: tensor {name[:80]!r} has shape {tuple(tensor.shape)} but fewer numbers")
        super().__init__(path, {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in self.tensors.items()})

    def _flatten(self, path: Path, prefix: str, value: Any, depth: int) -> None:
        self._met += 1
        if self._met > MAX_TENSORS:  # dictionaries nested many times repeat their entries
            raise CorruptFileError(
                f"{path} holds more than {MAX_TENSORS:,} tensors and settings; a dictionary has about a dozen"
            )
        if isinstance(value, Mapping) and depth < 4:
            for key, inner in value.items():
                self._flatten(path, f"{prefix}.{key}" if prefix else str(key), inner, depth + 1)
        elif isinstance(value, Tensor):
            self.tensors[prefix] = value.detach()
        elif not prefix:
            raise CorruptFileError(f"{path}: its content is a {type(value).__name__}; expected tensors by name")
        elif isinstance(value, str | int | float | None):
            self.values[prefix] = value
        else:  # such as the lists in an optimizer's state
            self.unread.append(prefix[:80])

    def _load(self, names: list[str]) -> dict[str, Tensor]:
        return {name: self.tensors[name].clone() for name in names}


def strings_in_pickle(path: Path) -> set[str]:
    """Return the strings in a PyTorch file's pickle, such as tensor names, without unpickling; empty for other files."""
    try:
        return {argument for _, argument, _ in _pickle_operations(path) if isinstance(argument, str)}
    except CorruptFileError:
        return set()


def _scan_pickle(path: Path) -> None:
    """Raise CorruptFileError if unpickling would import more than `GLOBALS`, or do what state dicts never do.

    A tuple that is nested many times takes forever to hash as the key of a dictionary. A tensor that is changed after its
    creation can allocate more than the file holds.
    """
    made_by, tuples, repeats = "", set(), 0  # last operation; memo entries with tuples; uses of these
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
            raise CorruptFileError(f"{path} is a pickle that repeats tuples or changes a tensor; a state dict does neither")
        made_by = name


def _pickle_operations(path: Path) -> list[tuple[Any, Any, int | None]]:
    with _open_zip(path) as archive:
        members = _members(path, archive)
        pickles = [m for m in members if m.filename.endswith(".pkl")]
        if any(m.compress_type != zipfile.ZIP_STORED for m in members) or len(pickles) != 1:
            raise CorruptFileError(f"{path} was not written by torch.save (of version 1.6 or later)")
        if pickles[0].file_size > MAX_PICKLE_BYTES:
            raise CorruptFileError(f"{path}: its pickle has {pickles[0].file_size:,} bytes, too many for a dictionary")
        try:
            with archive.open(pickles[0]) as file:
                return list(pickletools.genops(file.read(pickles[0].file_size)))
        except Exception as error:  # any error of pickletools on a damaged pickle
            raise CorruptFileError(f"{path} is damaged: {type(error).__name__}: {error}") from None


def _open_zip(path: Path) -> zipfile.ZipFile:
    file_size(path)
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        check_new_enough(path)
        raise CorruptFileError(f"{path} is not a zip file or is damaged: {error}") from None


def _members(path: Path, archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """Return the files in an archive. Raise CorruptFileError if they are together larger than it can hold."""
    members = [m for m in archive.infolist() if not m.is_dir()]
    size = file_size(path)
    if len(members) > MAX_TENSORS or sum(m.file_size for m in members) > MAX_COMPRESSION * size:
        raise CorruptFileError(f"{path} has {size:,} bytes but declares content far too large for them")
    return members


def check_new_enough(path: Path) -> None:
    """Raise CorruptFileError if a file is one that torch wrote before version 1.6, a bare pickle."""
    with path.open("rb") as file:
        if file.read(len(BEFORE_1_6)) == BEFORE_1_6:
            raise CorruptFileError(
                f"{path} is in the form of torch before version 1.6, which is not read: load it with torch.load(…, "
                "weights_only=True), and save it again with torch.save of version 1.6 or later"
            )


def open_tensors(path: Path) -> TensorFile:
    """Return the file of tensors at `path`. Its first bytes tell npz from safetensors; pickles are refused.

    Raises:
        CorruptFileError: the file is of another kind or damaged.
    """
    file_size(path)
    check_new_enough(path)
    return NpzFile(path) if is_zip(path) else SafetensorsFile(path)


def tensor_names(path: Path) -> set[str]:
    """Return the names of the tensors in a safetensors or npz file; empty for other files."""
    try:
        return set(open_tensors(path).specs)
    except CorruptFileError:
        return set()
