"""Output folders: written under a temporary name, put in place in one step, and replaced only when that loses nothing foreign.

The writer of NAME holds its lock (see `locks`). Beside NAME there may be, for a moment or after a kill,
.NAME.saelens-lite-<16 hex digits>.tmp, which the next writer removes, and the same with .old, an earlier folder that is whole
and is put back when NAME is missing.
"""

import ctypes
import logging
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Literal

from saelens_lite.errors import ConfigError, LockedError, OutputExistsError
from saelens_lite.files import disk_full_is_typed, file_mode, set_mode, sync_file, sync_folder
from saelens_lite.kinds import TEMPORARY, Kind, foreign
from saelens_lite.locks import locked
from saelens_lite.paths import check_input, check_output

log = logging.getLogger(__name__)
RESTORE_SECONDS = 2.0  # longer than another process needs for two renames


@contextmanager
def new_folder(path: Path, kind: Kind, exists: str = "error", *, any_format: bool = False, lock: bool = True) -> Iterator[Path]:
    """A fresh temporary folder that becomes `path` when the block ends well and vanishes when it does not.

    Args:
        kind: what is written. With "overwrite", only a folder of this kind that holds nothing else is replaced.
        any_format: the names of the files are only known when they are written; a folder that holds files of the same names
            and no others is also replaced.
        lock: False when the caller holds the lock on `path`, or on a folder around it.

    Raises:
        OutputExistsError: `path` holds something and `exists` is "error", or it holds something other than this kind.
        ConfigError: `exists` is neither "error" nor "overwrite", or `path` is a folder such as . that cannot be replaced.
        LockedError: another process is writing `path`.
        DiskFullError: there is no room for it; what was at `path` is still there.
    """
    path = followed(path)
    refuse_existing(path, exists, None if any_format else kind)
    with disk_full_is_typed(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path, kind.name) if lock else nullcontext():
        clean_up(path, kind)
        refuse_existing(path, exists, None if any_format else kind)
        new = temporary(path, "tmp")
        new.mkdir()
        try:
            with disk_full_is_typed(path):
                yield new
                _sync_tree(new)
                replace_folder(new, path, kind.like(new) if any_format else kind)
        finally:
            remove(new)


@contextmanager
def new_file(path: Path, what: str, exists: str = "error", is_ours: Callable[[Path], bool] = lambda _: True) -> Iterator[None]:
    """Hold the lock on `path` for a block that writes the file, with `files.write_file` or what uses it.

    Args:
        what: the kind of file, for messages.
        is_ours: returns whether a file that is there is of this kind; only such a file is replaced.

    Raises:
        OutputExistsError: the file exists and `exists` is "error", or it is a folder or a file of another kind.
        LockedError: another process is writing `path`.
    """
    refuse_existing(path, exists)
    if path.is_dir():
        raise OutputExistsError(f"{path} is a folder; name a file in it")
    with locked(path, what):
        refuse_existing(path, exists)
        if path.exists() and not is_ours(path):
            raise OutputExistsError(f"{path} is not a {what}; choose another file, or delete it yourself")
        for left in leftovers(path, "tmp"):
            remove(left)
        yield


def replace_folder(new: Path, path: Path, kind: Kind) -> None:
    """Put the folder `new` in place of `path`, which is missing, empty or of this kind. The caller holds the lock on `path`.

    Where the system can exchange two names in one step, there is a whole folder at `path` at every moment. Elsewhere the old
    folder waits beside it for a moment; `restore` puts it back if the process is killed then.

    Raises:
        OutputExistsError: something other than this kind has come to `path` in the meantime.
    """
    refuse_existing(path, "overwrite", kind)
    if not path.exists():
        os.replace(new, path)
    elif exchange(new, path):
        remove(new)
    else:
        old = move_aside(path)
        try:
            os.replace(new, path)
        except BaseException:
            os.replace(old, path)
            raise
        remove_old(old, path)
    sync_folder(path.parent)


def exchange(a: Path, b: Path) -> bool:
    """Exchange two names in one step, and return whether the system and the file system could."""
    if sys.platform != "linux":
        return False
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    here, exchanging = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return call(here, os.fsencode(a), here, os.fsencode(b), exchanging) == 0


def temporary(path: Path, ending: Literal["tmp", "old"]) -> Path:
    """Return a new hidden name beside `path` that no other output can have."""
    return path.with_name(f".{path.name}.saelens-lite-{secrets.token_hex(8)}.{ending}")


def move_aside(path: Path) -> Path:
    """Give a folder a hidden name, and return that; `remove_old` removes it, and `restore` puts it back."""
    old = temporary(path, "old")
    os.replace(path, old)
    return old


def remove_old(old: Path, path: Path) -> None:
    """Remove a folder that was moved aside from `path`. From the first moment on, it is no longer one to put back."""
    waste = temporary(path, "tmp")
    os.replace(old, waste)
    remove(waste)


def remove_own(folder: Path, kind: Kind) -> None:
    """Remove a folder of this kind in one step, if it is there; one that holds anything else stays, with a warning."""
    if not os.path.lexists(folder):
        return
    if found := foreign(folder, kind):
        log.warning("%s is not removed, because it holds %s", folder, ", ".join(map(repr, found[:3])))
        return
    waste = temporary(folder, "tmp")
    os.replace(folder, waste)
    remove(waste)


def remove(path: Path) -> None:
    """Remove a folder, file or link; what cannot be removed is named in the log."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        if path.exists():
            log.warning("%s cannot be removed completely", path)
    else:
        path.unlink(missing_ok=True)


def leftovers(path: Path, ending: Literal["tmp", "old"]) -> list[Path]:
    """Return what processes that were killed while they wrote `path` left beside it, the oldest first.

    The caller holds the lock on `path`. Only names of `temporary` for exactly this path count.
    """
    if not path.parent.is_dir():
        return []
    matches = {beside: TEMPORARY.fullmatch(beside.name) for beside in path.parent.iterdir()}
    found = [beside for beside, match in matches.items() if match and match.groups() == (path.name, ending)]
    return sorted(found, key=lambda left: left.lstat().st_mtime_ns)


def clean_up(path: Path, kind: Kind) -> None:
    """Put back or remove what killed processes left beside `path`. The caller holds the lock on `path`."""
    put_back(path)
    for left in leftovers(path, "tmp"):
        remove(left)
    for old in leftovers(path, "old"):
        if not foreign(old, kind):  # one of another kind may be waiting
            remove_old(old, path)


def put_back(path: Path) -> None:
    """Put the newest old folder back at `path` if there is nothing. The caller holds the lock on `path`."""
    olds = leftovers(path, "old")
    if olds and not os.path.lexists(path):
        os.replace(olds[-1], path)
        log.warning("%s was being replaced when its process was killed; the old one is back", path)


def restore(path: Path) -> None:
    """Put a folder, or the one around it, back that is missing because a process was killed while it replaced it.

    For readers. Where `path` exists, this costs nothing.
    """
    if os.path.lexists(check_input(path)):
        return
    if path.parent.name and not path.parent.exists():
        restore(path.parent)
    deadline = time.monotonic() + RESTORE_SECONDS
    while not os.path.lexists(path) and leftovers(path, "old"):
        try:
            with locked(path, "restored folder"):
                put_back(path)
        except LockedError:  # another process is between two renames, or is training a new run
            if time.monotonic() > deadline:
                return
            time.sleep(0.01)


def _sync_tree(folder: Path) -> None:
    """Flush all files below a new folder to the disk, with the permissions that the umask gives."""
    mode = file_mode(folder) & 0o666
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_folder(path)
        else:
            set_mode(path, mode)
            sync_file(path)
    sync_folder(folder)


def followed(path: Path) -> Path:
    """Return the place that is written when `path` is asked for: the target of a link, so that the link stays.

    Raises:
        ConfigError, OutputExistsError: `path` has no name, as . and .. have none; nothing can be written there.
    """
    if path.name in ("", ".."):
        raise ConfigError(f"{str(path)!r} cannot be written as a whole; name a new folder in it")
    check_output(path)
    return path.resolve() if path.is_symlink() else path


def refuse_existing(
    path: Path, exists: str, kind: Kind | None = None, choices: tuple[str, ...] = ("error", "overwrite")
) -> None:
    """Raise unless `path` is free, an empty folder, or `exists` says what to do with it.

    Args:
        kind: what will replace `path`; None where a single file is replaced.

    Raises:
        ConfigError: `exists` is not one of the choices.
        OutputExistsError: there is something and `exists` is "error", or something that is not a folder of this kind.
    """
    if exists not in choices:
        raise ConfigError(f"exists = {exists!r}; expected one of {', '.join(choices)}")
    check_output(path)
    if not os.path.lexists(path) or (path.is_dir() and not any(path.iterdir())):
        return
    if exists == "error":
        others = " or ".join(f"exists={choice!r}" for choice in choices[1:])
        raise OutputExistsError(f"{path} already exists and is not empty; choose another place or say {others}")
    if kind is None or exists != "overwrite":
        return
    if not path.is_dir():
        raise OutputExistsError(f"{path} is not a folder, so no {kind.name} is put in its place; choose another place")
    if found := foreign(path, kind):
        more = f" and {len(found) - 3} more files" if len(found) > 3 else ""
        raise OutputExistsError(
            f"{path} holds {', '.join(map(repr, found[:3]))}{more}, which the new {kind.name} would not have. "
            "Overwriting would lose that: move it away, delete the folder yourself, or choose another place"
        )


def refuse_inputs_in(out: Path, inputs: Iterable[Path]) -> None:
    """Raise OutputExistsError when one of the inputs is `out` or lies in it, so that replacing `out` would remove it."""
    place = check_output(out).resolve()
    for given in inputs:
        if check_input(given).resolve().is_relative_to(place):
            raise OutputExistsError(f"{given} is read, and would be removed when {out} is replaced; choose another place")
