"""Checks of the paths that users give. A path that cannot work is an error before the work begins."""

import errno
import os
import re
from pathlib import Path
from tempfile import TemporaryFile

from saelens_lite.errors import ConfigError, CorruptFileError, DiskFullError, OutputExistsError

MAX_NAME, MAX_PATH = 255, 4096  # bytes; the limits of nearly all file systems
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # EFBIG: the file is larger than the file system or a quota allows
WEIGHT_ENDINGS = (".safetensors", ".npz", ".pt", ".pth", ".bin", ".ckpt")  # of files of tensors
ROOM_IN_NAME = 40  # bytes added to the name of an output while it is written
ROOM_IN_PATH = 256  # bytes for the names of files in an output folder
_ADDRESS = re.compile(r"[a-z][a-z0-9+]+:/.+", re.DOTALL)  # pathlib makes one slash of two


def is_address(path: str | Path) -> bool:
    """Return whether a path is an address such as hf://user/repo rather than a file or folder of this computer."""
    return _ADDRESS.fullmatch(str(path)) is not None


def check_input(path: str | Path) -> Path:
    """Return the path after checking it. A missing file is left to the reader, which has a better error.

    Raises:
        ConfigError: the name is not possible.
        CorruptFileError: the path leads through a file, a broken link or a folder that may not be read.
    """
    path = _possible(path)
    try:
        path.stat()
    except FileNotFoundError:
        if link := _broken_link(path):
            raise CorruptFileError(f"{path} cannot be read: {link}; is that the path you meant?") from None
    except OSError as error:
        raise CorruptFileError(f"{path} cannot be read: {error.strerror}; is that the path you meant?") from None
    return path


def check_output(path: str | Path, probe: bool = True) -> Path:
    """Return the path of an output after checking it. `probe` also tries whether a file can be made there.

    Raises:
        ConfigError: the name is not possible, or the place is not writable.
        OutputExistsError: the path is a broken link, or leads through a file.
    """
    path = _possible(path, ROOM_IN_NAME, ROOM_IN_PATH)
    if link := _broken_link(path):
        raise OutputExistsError(f"{path} cannot be written: {link}; remove the link, or choose another place")
    try:
        above = next((folder for folder in path.absolute().parents if os.path.lexists(folder)), path)
        if not above.is_dir():
            raise OutputExistsError(f"{path} cannot be written, because {above} is not a folder; choose another place")
        if probe:  # permissions are not enough: a file system can be read-only or refuse new names
            with TemporaryFile(dir=above):
                pass
        path.exists()
    except OSError as error:
        why = DiskFullError if error.errno in NO_ROOM else ConfigError
        raise why(f"{path} cannot be written: {error.strerror}; choose another place") from None
    return path


def _possible(path: str | Path, room_in_name: int = 0, room_in_path: int = 0) -> Path:
    """Return the path, or raise if its name or whole path is not possible with this many more bytes."""
    try:
        whole = os.fsencode(path)
    except UnicodeEncodeError:
        raise ConfigError(f"{str(path)!r} cannot be a path: it holds half of a character (a lone surrogate)") from None
    if b"\0" in whole:
        raise ConfigError(f"{str(path)!r} cannot be a path: it holds a NUL character")
    names = whole.replace(b"\\", b"/").rstrip(b"/").split(b"/") if os.name == "nt" else whole.rstrip(b"/").split(b"/")
    longest, most = max(len(name) + room_in_name * (name is names[-1]) for name in names), MAX_NAME - room_in_name
    if longest > MAX_NAME:
        raise ConfigError(
            f"{_shortened(path)} cannot be a path: a name in it is too long; at most {most} bytes are possible here"
        )
    if len(os.fsencode(Path(path).absolute())) > MAX_PATH - room_in_path:
        raise ConfigError(f"{_shortened(path)} cannot be a path: it is longer than {MAX_PATH - room_in_path} bytes")
    return Path(path)


def names_a_folder(model: str | Path) -> bool:
    """Return whether the name of a model can only be that of a folder, and not an id of the Hub."""
    return isinstance(model, Path) or model.startswith((".", "/", "~")) or model.count("/") > 1


def _shortened(path: str | Path) -> str:
    text = str(path)
    return text if len(text) < 200 else f"{text[:80]}…{text[-40:]}"


def _broken_link(path: Path) -> str | None:
    """Describe the broken link in a path, or return None."""
    for place in (path, *path.parents):
        if place.is_symlink() and not place.exists():
            return f"{place} is a link to {os.readlink(place)}, which is missing"
    return None


def no_dictionary_at(path: Path) -> str:
    """Return the message for a path at which there is nothing: a file, if it has the ending of one, or a folder."""
    if path.suffix in WEIGHT_ENDINGS:
        return f"{path} is missing; is it the file you meant?"
    return f"{path / 'cfg.json'} is missing; is {path} the folder you meant?"
