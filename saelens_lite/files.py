"""Writing so that a reader never meets half a file: temporary name, fsync, rename."""

import errno
import hashlib
import json
import os
import re
import secrets
import stat
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from saelens_lite.errors import ConfigError, CorruptFileError, DiskFullError, SaelensLiteError
from saelens_lite.paths import NO_ROOM, check_output

MAX_JSON_BYTES = 64 << 20  # of settings files, which may come from strangers
MAX_LIST_BYTES = 1 << 30  # of JSON files that grow with the data: a line or two for each shard or latent
MAX_JSON_DEPTH = 100
MAX_HEADER_BYTES = 16 << 20
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


NO_ENTRY = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)


@contextmanager
def disk_full_is_typed(path: Path) -> Iterator[None]:
    """Within the block, a full disk is a DiskFullError that names `path`, and a place that cannot be written a ConfigError.

    A library may put an error of its own, without a number, in place of the system's, or only quote it.
    """
    try:
        yield
    except SaelensLiteError:
        raise
    except Exception as error:
        codes = {code for cause in _causes(error) for code in _codes(cause)}
        if not codes.isdisjoint(NO_ROOM):
            raise DiskFullError(f"{path} cannot be written: the disk is full, or a limit on it is reached") from error
        if not codes.isdisjoint(NO_ENTRY) or (errno.ENOENT in codes and not path.parent.is_dir()):
            raise ConfigError(f"{path} cannot be written: {error}; choose another place") from error
        raise


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those it was raised in place of."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _codes(error: BaseException) -> Iterator[int]:
    """The numbers that the system gave an error."""
    if isinstance(error, OSError) and error.errno is not None:
        yield error.errno
    yield from (int(code) for code in re.findall(r"\(os error (\d+)\)", str(error)))


def write_file(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary neighbour, then put it in place of `path` in one step.

    Raises:
        DiskFullError: there is no room for it; what was at `path` is still there.
    """
    check_output(path)
    temporary = path.with_name(f".{path.name}.saelens-lite-{secrets.token_hex(8)}.tmp")
    try:
        with disk_full_is_typed(path):
            temporary.touch()
            mode = file_mode(temporary)
            write(temporary)
            set_mode(temporary, mode)
            sync_file(temporary)
            os.replace(temporary, path)
            sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def file_mode(path: Path) -> int:
    """Return the permissions of a file, which are those of the umask for one that was just created."""
    return stat.S_IMODE(path.stat().st_mode)


def set_mode(path: Path, mode: int) -> None:
    """Give a file these permissions; some libraries create files that only their owner can read."""
    if os.name == "posix" and file_mode(path) != mode:
        path.chmod(mode)


def sync(file: IO) -> None:
    """Flush an open file to the disk. Windows does that only for files opened for writing."""
    file.flush()
    os.fsync(file.fileno())


def sync_file(path: Path) -> None:
    """Flush a file that is written and closed to the disk."""
    with open(path, "r+b") as file:
        sync(file)


def sync_folder(path: Path) -> None:
    """Flush the names in a folder to the disk, where the system can."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def append_line(path: Path, line: str) -> None:
    """Append a line to a file and flush it to the disk. DiskFullError when there is no room for it."""
    with disk_full_is_typed(path), open(path, "a", encoding="utf-8", newline="\n") as file:
        file.write(line + "\n")
        sync(file)


def file_hash(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Put tensors in a safetensors file in one step."""
    from safetensors.torch import save_file

    whole = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    write_file(path, lambda temporary: save_file(whole, temporary))


def write_text(path: Path, text: str) -> None:
    """Put `text` in the file in one step."""
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline="\n"))


def write_json(path: Path, value: Any, limit: int | float | None = None) -> None:
    """Put `value` in the file as indented JSON in one step; NaN and infinity are refused.

    limit: as for `read_json`, so that what is written can be read; infinite for files that only other tools read.

    Raises:
        ConfigError: the file would be larger than `limit`, or nested deeper than `read_json` allows.
        DiskFullError: there is no room for it.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    size, most = len(text.encode()), MAX_JSON_BYTES if limit is None else limit
    if size > most:
        raise ConfigError(f"{path} would have {size:,} bytes; at most {most:,} can be read again. Nothing was written")
    if nesting(value) > MAX_JSON_DEPTH:
        raise ConfigError(f"{path} would be nested deeper than {MAX_JSON_DEPTH} levels, which cannot be read again")
    write_text(path, text)


def write_lines(path: Path, values: Iterable[dict[str, Any]]) -> None:
    """Write a file with a JSON object on each line; it may be as long as the disk has room for."""
    with disk_full_is_typed(path), open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(value) + "\n" for value in values)
        sync(file)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects in a file of `write_lines`. CorruptFileError when it is missing or a line is not an object."""
    file_size(path)
    values = []
    with open(path, encoding="utf-8") as file:
        try:
            values += map(json.loads, file)
        except (ValueError, RecursionError) as error:
            raise CorruptFileError(f"{path}, line {len(values) + 1}: not valid JSON: {error}") from None
    if not all(isinstance(value, dict) for value in values):
        raise CorruptFileError(f"{path}: a line holds something other than a JSON object")
    return values


def file_size(path: Path) -> int:
    """Bytes of a file.

    Raises:
        CorruptFileError: it is missing, or no file: a folder, or a pipe, which reading would wait for.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        raise CorruptFileError(f"{path} is missing; is {path.parent} the folder you meant?") from None
    except OSError as error:
        raise CorruptFileError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:  # a NUL
        raise CorruptFileError(f"{str(path)!r} cannot be read: {error}") from None
    if not stat.S_ISREG(found.st_mode):
        raise CorruptFileError(f"{path} is no file")
    return found.st_size


def nesting(value: Any) -> int:
    """How deep the tables and lists of a JSON value are nested."""
    depth, level = 0, [value]
    while level := [inner for outer in level if isinstance(outer, dict | list) for inner in _inside(outer)]:
        depth += 1
    return depth


def _inside(value: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def _parsed(text: str) -> Any:
    """A JSON value that can be written again, with bounds on its depth; ValueError or RecursionError where it is none."""
    value = json.loads(text)
    if nesting(value) > MAX_JSON_DEPTH:
        raise ValueError(f"nested deeper than {MAX_JSON_DEPTH} levels")
    if "\\u" in text:
        json.dumps(value, ensure_ascii=False).encode()  # halves of characters are an error
    return value


def read_json(path: Path, limit: int | float | None = None) -> dict[str, Any]:
    """Return the object in a JSON file of at most `limit` bytes (default MAX_JSON_BYTES).

    Raises:
        CorruptFileError: the file is missing, too large, not JSON, or not an object.
    """
    size = file_size(path)
    if size > (MAX_JSON_BYTES if limit is None else limit):
        raise CorruptFileError(f"{path}: {size:,} bytes is too large for a settings file")
    try:
        value = _parsed(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CorruptFileError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CorruptFileError(f"{path} holds a {type(value).__name__}, not an object")
    return value


def check_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file whose size is what the header says, and where in the file the tensors begin.

    Raises:
        CorruptFileError: missing, truncated, or not safetensors.
    """
    size = file_size(path)
    try:
        with open(path, "rb") as file:
            start = file.read(8)
            header_size = struct.unpack("<Q", start)[0] if len(start) == 8 else MAX_HEADER_BYTES + 1
            if header_size > min(size, MAX_HEADER_BYTES):
                raise CorruptFileError(f"{path}: not a safetensors file, or truncated ({size:,} bytes)")
            header = _parsed(file.read(header_size).decode())
        end = max((int(t["data_offsets"][1]) for name, t in header.items() if name != "__metadata__"), default=0)
    except OSError as error:
        raise CorruptFileError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        raise CorruptFileError(f"{path} is damaged: {error}") from None
    if 8 + header_size + end != size:
        raise CorruptFileError(
            f"{path}: header announces {8 + header_size + end:,} bytes, the file has {size:,}; it is truncated or damaged"
        )
    return header, 8 + header_size


def read_tensors(path: Path, finite: bool = True) -> dict[str, Tensor]:
    """Return all tensors of a safetensors file, copied to memory: the file may be replaced or removed afterwards.

    Sizes are checked against the header before anything is allocated.

    Raises:
        CorruptFileError: missing, truncated, not safetensors, an odd dtype, or (`finite`) NaN or infinity inside.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    check_header(path)
    try:
        tensors = {name: x.clone() for name, x in load_file(path).items()}  # a mapped file cannot be removed on Windows
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CorruptFileError(f"{path} is damaged: {error}") from None
    for name, tensor in tensors.items():
        if finite and tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CorruptFileError(f"{path}: tensor {name!r} holds NaN or infinity")
    return tensors
