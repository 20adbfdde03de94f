"""Files: a reader never sees half a file, and a file from a stranger cannot do harm.

Writing: temporary name, fsync, rename. Reading: only regular files inside their folder are opened. Files of tensors are in
`tensor_files`, so that this module does not import torch.
"""

import errno
import hashlib
import json
import math
import os
import re
import secrets
import stat
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import IO, Any

from saelens_lite.errors import ConfigError, CorruptFileError, DiskFullError, SaelensLiteError
from saelens_lite.paths import NO_ROOM, check_input, check_output

MAX_JSON_BYTES = 64 << 20  # for settings files, which may come from strangers
MAX_LIST_BYTES = 1 << 30  # for JSON files that grow with the data: a line or two per shard or latent
MAX_JSON_DEPTH = 100
MAX_JSON_VALUES = 6_000_000  # per file: small values take a hundred times their bytes in memory
MAX_LINE_BYTES = 1 << 20
PIECE = 1 << 20  # bytes read at once

NO_ENTRY = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)


@contextmanager
def disk_full_is_typed(path: Path) -> Iterator[None]:
    """Turn a full disk in the block into a DiskFullError that names `path`, and other write errors into a ConfigError.

    A library may replace the system's error by its own, without a number, or only quote it.
    """
    try:
        yield
    except SaelensLiteError:
        raise
    except Exception as error:
        codes = {code for cause in _causes(error) for code in _codes(cause)}
        if not codes.isdisjoint(NO_ROOM):
            raise DiskFullError(f"{path} cannot be written: the disk is full or a quota is reached") from error
        if not codes.isdisjoint(NO_ENTRY) or (errno.ENOENT in codes and not path.parent.is_dir()):
            raise ConfigError(f"{path} cannot be written: {error}; choose another place") from error
        raise


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and its causes."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _codes(error: BaseException) -> Iterator[int]:
    """Yield the error numbers of an error."""
    if isinstance(error, OSError) and error.errno is not None:
        yield error.errno
    yield from (int(code) for code in re.findall(r"\(os error (\d+)\)", str(error)))


def write_file(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file, then move it to `path` in one step.

    Raises:
        DiskFullError: the disk is full. The old file at `path` is unchanged.
    """
    check_output(path, probe=False)
    temporary = path.with_name(f".{path.name}.saelens-lite-{secrets.token_hex(8)}.tmp")
    try:
        with disk_full_is_typed(path):
            try:
                temporary.touch()
            except OSError:
                check_output(path)  # says why in words
                raise
            mode = file_mode(temporary)
            write(temporary)
            set_mode(temporary, mode)
            sync_file(temporary)
            os.replace(temporary, path)
            sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def file_mode(path: Path) -> int:
    """Return the permissions of a file. A new file has those of the umask."""
    return stat.S_IMODE(path.stat().st_mode)


def set_mode(path: Path, mode: int) -> None:
    """Set the permissions of a file. Some libraries create files that only the owner can read."""
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
    """Flush the names in a folder to the disk, if the system can."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def append_line(path: Path, line: str) -> None:
    """Append a line to a file and flush it to the disk. Raise DiskFullError if the disk is full."""
    with disk_full_is_typed(path), open(path, "a", encoding="utf-8", newline="\n") as file:
        file.write(line + "\n")
        sync(file)


def file_hash(content: Path | bytes, algorithm: str = "sha256", prefix: bytes = b"") -> str:
    """Return the hash of a file or of bytes, behind a prefix, in hexadecimal. Raise CorruptFileError if it cannot be opened."""
    with BytesIO(content) if isinstance(content, bytes) else open_file(content) as file:
        return hashlib.file_digest(file, lambda: hashlib.new(algorithm, prefix)).hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write text to a file in one step."""
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline="\n"))


def write_json(path: Path, value: Any, limit: int | float | None = None) -> None:
    """Write `value` to a file as indented JSON in one step. NaN and infinity are errors.

    limit: as for `read_json`, so that the file can be read again; infinite for files that only other tools read.

    Raises:
        ConfigError: the file would be larger than `limit`, or nested deeper than `read_json` allows.
        DiskFullError: the disk is full.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    size, most = len(text.encode()), MAX_JSON_BYTES if limit is None else limit
    if size > most:
        raise ConfigError(f"{path} would have {size:,} bytes; at most {most:,} can be read again. Nothing was written")
    if nesting(value) > MAX_JSON_DEPTH:
        raise ConfigError(f"{path} would be nested deeper than {MAX_JSON_DEPTH} levels, which cannot be read again")
    write_text(path, text)


def read_lines(path: Path, most: int | float = math.inf) -> list[dict[str, Any]]:
    """Return the objects in a file with one JSON object per line.

    Raises:
        CorruptFileError: the file is missing, has more than `most` lines, or has a line that is too long or not an object.
    """
    values: list[dict[str, Any]] = []
    with open_file(path) as file:
        while line := file.readline(MAX_LINE_BYTES + 1):
            place = f"{path}, line {len(values) + 1}"
            if len(line) > MAX_LINE_BYTES or len(values) >= most:
                raise CorruptFileError(f"{place}: expected at most {most:,} lines of {MAX_LINE_BYTES:,} bytes")
            try:
                value = json.loads(line.decode())
            except (ValueError, RecursionError) as error:
                raise CorruptFileError(f"{place}: not valid JSON: {error}") from None
            if not isinstance(value, dict):
                raise CorruptFileError(f"{path}: a line holds something other than a JSON object")
            values.append(value)
    return values


def file_size(path: Path) -> int:
    """Return the size of a file in bytes.

    Raises:
        CorruptFileError: the path is missing, is a folder, a device or a pipe (which would block a reader), or is a link that
            leaves its folder.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        raise CorruptFileError(f"{path} is missing; is {path.parent} the folder you meant?") from None
    except OSError as error:
        raise CorruptFileError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:  # a NUL
        raise CorruptFileError(f"{str(path)!r} cannot be read: {error}") from None
    if not stat.S_ISREG(status.st_mode):
        raise CorruptFileError(f"{path} is not a file")
    check_inside(path)
    return status.st_size


def check_inside(path: Path) -> None:
    """Raise CorruptFileError if a file or folder is a link that leaves its folder.

    Snapshots in the cache of the Hub's client link to files in the blobs/ folder beside them, which is allowed.
    """
    if path.is_symlink() and not _stays_inside(path):
        target = os.path.realpath(path)
        raise CorruptFileError(f"{path} is a link to {target}, outside of its folder; replace the link by a copy")


def _stays_inside(link: Path) -> bool:
    folder, target = Path(os.path.realpath(link.parent)), Path(os.path.realpath(link))
    homes = [folder, *(above.parent / "blobs" for above in (folder, *folder.parents) if above.name == "snapshots")]
    return any(target.is_relative_to(home) for home in homes)


def named_file(path: str | Path) -> Path:
    """Return the file that a user named. Links are followed, because they are the user's own.

    A link in a snapshot of the Hub's cache is kept, because its name and the files beside it count.
    """
    path = check_input(path)
    return Path(os.path.realpath(path)) if path.is_file() and not (path.is_symlink() and _stays_inside(path)) else path


def is_zip(path: Path) -> bool:
    """Return whether a file is a zip archive with an intact directory."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        return False


def open_file(path: Path) -> BufferedReader:
    """Open a regular file for reading bytes. Raise the errors of `file_size`."""
    file_size(path)
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        file = os.fdopen(os.open(path, flags), "rb")
    except OSError as error:
        raise CorruptFileError(f"{path} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # replaced since the check
        file.close()
        raise CorruptFileError(f"{path} is not a file")
    return file


def nesting(value: Any) -> int:
    """Return the nesting depth of a JSON value."""
    depth, level = 0, [value]
    while level := [inner for outer in level if isinstance(outer, dict | list) for inner in _inside(outer)]:
        depth += 1
    return depth


def _inside(value: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def parsed_json(text: str, finite: bool = False) -> Any:
    """Parse a JSON value of limited depth that can be written again.

    finite: refuse NaN and infinity, which are not JSON.

    Raises:
        ValueError, RecursionError: the text is not such a value.
    """
    value = json.loads(text, parse_constant=_refused, parse_float=_finite) if finite else json.loads(text)
    if nesting(value) > MAX_JSON_DEPTH:
        raise ValueError(f"nested deeper than {MAX_JSON_DEPTH} levels")
    if "\\u" in text:
        json.dumps(value, ensure_ascii=False).encode()  # lone surrogates are an error
    return value


def _refused(name: str) -> float:
    raise ValueError(f"{name} is not a number of JSON")


def _finite(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise ValueError(f"{digits[:40]} is too large for a number")
    return value


def _text_of(path: Path, most: int | float) -> str:
    """Return the text of a JSON file, read in pieces.

    Sparse files and files with too many values are refused before they cost memory."""
    size = file_size(path)
    if size > most:
        raise CorruptFileError(f"{path}: {size:,} bytes is too large for a settings file")
    pieces, n_values = [], 0
    with open_file(path) as file:
        while piece := file.read(PIECE):
            n_values += sum(map(piece.count, (b",", b"[", b"{")))
            if b"\0" in piece:
                raise CorruptFileError(f"{path} is not valid JSON: it holds NUL bytes")
            if n_values > MAX_JSON_VALUES:
                raise CorruptFileError(f"{path} holds more than {MAX_JSON_VALUES:,} values, the largest number that is read")
            pieces.append(piece)
    return b"".join(pieces).decode()


def read_json(path: Path, limit: int | float | None = None, finite: bool = False) -> dict[str, Any]:
    """Return the object in a JSON file of at most `limit` bytes (default MAX_JSON_BYTES).

    finite: refuse NaN and infinity, which our own files never hold.

    Raises:
        CorruptFileError: the file is missing, too large, not JSON, or not an object.
    """
    try:
        value = parsed_json(_text_of(path, MAX_JSON_BYTES if limit is None else limit), finite)
    except OSError as error:
        raise CorruptFileError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CorruptFileError(f"{path} holds a {type(value).__name__}, not an object")
    return value


def shortened(names: Iterable[str], most: int = 8) -> str:
    """Join names for a message, shortened if they are many or long."""
    names = sorted(names)
    return f"{[name[:80] for name in names[:most]]}{' …' if len(names) > most else ''}" if names else "none"


def differences(missing: Iterable[str], surplus: Iterable[str], there: Iterable[str]) -> str:
    """Describe the tensors that a file lacks, and those that it should not hold, beside those that it holds."""
    return f"tensors missing: {shortened(missing)}; not expected: {shortened(surplus)}; found: {shortened(there)}"


def _memory() -> int | float:
    """Return the memory of this machine in bytes, or infinity if the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return math.inf


def check_fits_memory(what: str | Path, n_bytes: int) -> None:
    """Raise CorruptFileError if something announces more bytes than this machine has memory."""
    if n_bytes > _memory():
        raise CorruptFileError(f"{what} takes {n_bytes:,} bytes, and this machine has {_memory():,} bytes of memory")
