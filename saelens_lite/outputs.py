"""Output folders: written under a temporary name, moved into place in one step, and replaced only if no foreign file is lost.

The writer of NAME holds its lock (see `locks`). For a moment, or after a kill, two more names may exist beside NAME:
.NAME.saelens-lite-<16 hex digits>.tmp, which the next writer removes, and the same name with .old, a complete earlier folder,
which is put back if NAME is missing.
"""

import ctypes
import logging
import os
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Literal

from saelens_lite.errors import ConfigError, LockedError, OutputExistsError
from saelens_lite.files import disk_full_is_typed, file_mode, set_mode, sync_file, sync_folder
from saelens_lite.kinds import TEMPORARY, Kind, foreign
from saelens_lite.locks import locked
from saelens_lite.paths import check_input, check_output
from saelens_lite.processes import Team

log = logging.getLogger(__name__)
RESTORE_SECONDS = 2.0  # longer than another process needs for two renames
SHARED_SECONDS = 20.0  # a network file system may show a new file that late


@contextmanager
def new_folder(path: Path, kind: Kind, exists: str = "error", *, any_format: bool = False, lock: bool = True) -> Iterator[Path]:
    """Yield a new temporary folder. It becomes `path` if the block succeeds and is removed if the block fails.

    Args:
        kind: the kind of the new folder. "overwrite" replaces only a folder of this kind that holds no other files.
        any_format: the file names are known only after writing; also replace a folder with the same file names and no others.
        lock: False if the caller already holds the lock on `path` or on a folder above it.

    Raises:
        OutputExistsError: `path` is not empty and `exists` is "error", or it holds other files than this kind.
        ConfigError: `exists` is neither "error" nor "overwrite", or `path` is a folder such as . that cannot be replaced.
        LockedError: another process is writing `path`.
        DiskFullError: the disk is full. The old folder at `path` is unchanged.
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
def new_folder_together(team: Team, path: Path, kind: Kind, exists: str = "error", *, lock: bool = True) -> Iterator[Path]:
    """Do the same as `new_folder` with all processes of a team, which all write into the temporary folder.

    The block must fail in all processes or in none; see `Team.failing_together`.
    """
    with ExitStack() as stack:
        yield team.first(lambda: stack.enter_context(new_folder(path, kind, exists, lock=lock)))
        team.first(stack.close)


@contextmanager
def new_file(path: Path, what: str, exists: str = "error", is_ours: Callable[[Path], bool] = lambda _: True) -> Iterator[None]:
    """Hold the lock on `path` for a block that writes the file by `files.write_file`.

    Args:
        what: the kind of file, for messages.
        is_ours: returns whether the existing file is of this kind. Only such a file is replaced.

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
    """Move the folder `new` to `path`, which is missing, empty or of this kind. The caller holds the lock on `path`.

    If the system can exchange two names in one step, `path` is a complete folder at every moment. Otherwise the old folder is
    moved aside for a moment; `restore` puts it back if the process is killed then.

    Raises:
        OutputExistsError: another kind of file or folder has appeared at `path`.
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
    """Exchange two names in one step. Return whether the system can do that."""
    if sys.platform != "linux":
        return False
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    here, exchanging = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return call(here, os.fsencode(a), here, os.fsencode(b), exchanging) == 0


def temporary(path: Path, ending: Literal["tmp", "old"]) -> Path:
    """Return a new hidden name beside `path` that no other output has."""
    return path.with_name(f".{path.name}.saelens-lite-{secrets.token_hex(8)}.{ending}")


def move_aside(path: Path) -> Path:
    """Move a folder to a hidden name and return that. `remove_old` removes it, and `restore` puts it back."""
    old = temporary(path, "old")
    os.replace(path, old)
    return old


def remove_old(old: Path, path: Path) -> None:
    """Remove a folder that was moved aside from `path`. It first gets a name that `restore` ignores."""
    waste = temporary(path, "tmp")
    os.replace(old, waste)
    remove(waste)


def remove_own(folder: Path, kind: Kind) -> None:
    """Remove a folder of this kind in one step, if it exists. A folder with other files stays, with a warning."""
    if not os.path.lexists(folder):
        return
    if others := foreign(folder, kind):
        log.warning("%s is not removed, because it holds %s", folder, ", ".join(map(repr, others[:3])))
        return
    waste = temporary(folder, "tmp")
    os.replace(folder, waste)
    remove(waste)


def remove(path: Path) -> None:
    """Remove a folder, file or link. Log what cannot be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        if path.exists():
            log.warning("%s cannot be removed completely", path)
    else:
        path.unlink(missing_ok=True)


def leftovers(path: Path, ending: Literal["tmp", "old"]) -> list[Path]:
    """Return the temporary names that killed processes left beside `path`, oldest first.

    The caller holds the lock on `path`. Only names of `temporary` for exactly this path count.
    """
    if not path.parent.is_dir():
        return []
    matches = {beside: TEMPORARY.fullmatch(beside.name) for beside in path.parent.iterdir()}
    names = [beside for beside, match in matches.items() if match and match.groups() == (path.name, ending)]
    return sorted(names, key=lambda left: left.lstat().st_mtime_ns)


def clean_up(path: Path, kind: Kind) -> None:
    """Put back or remove the folders that killed processes left beside `path`. The caller holds the lock on `path`."""
    put_back(path)
    for left in leftovers(path, "tmp"):
        remove(left)
    for old in leftovers(path, "old"):
        if not foreign(old, kind):  # keep a folder of another kind
            remove_old(old, path)


def put_back(path: Path) -> None:
    """Put the newest old folder back at `path` if `path` is missing. The caller holds the lock on `path`."""
    olds = leftovers(path, "old")
    if olds and not os.path.lexists(path):
        os.replace(olds[-1], path)
        log.warning("%s was being replaced when its process was killed; the old folder is restored", path)


def restore(path: Path) -> None:
    """Restore a folder, or a folder above it, that is missing because a process was killed while replacing it.

    For readers. It costs nothing if `path` exists.
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
    """Flush all files below a new folder to the disk and give them the permissions of the umask."""
    mode = file_mode(folder) & 0o666
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_folder(path)
        else:
            set_mode(path, mode)
            sync_file(path)
    sync_folder(folder)


def followed(path: Path) -> Path:
    """Return the real path of an output: the target of a link, so that the link itself stays.

    Raises:
        ConfigError, OutputExistsError: `path` has no name (. and ..), or cannot be written.
    """
    if path.name in ("", ".."):
        raise ConfigError(f"{str(path)!r} cannot be written as a whole; name a new folder in it")
    check_output(path)
    return path.resolve() if path.is_symlink() else path


def refuse_existing(
    path: Path, exists: str, kind: Kind | None = None, choices: tuple[str, ...] = ("error", "overwrite")
) -> None:
    """Raise unless `path` is free, is an empty folder, or may be replaced by the choice `exists`.

    Args:
        kind: the kind of folder that will replace `path`; None for a single file.

    Raises:
        ConfigError: `exists` is not one of the choices.
        OutputExistsError: `path` is not empty and `exists` is "error", or it is not a folder of this kind.
    """
    if exists not in choices:
        raise ConfigError(f"exists = {exists!r}; expected one of {', '.join(choices)}")
    check_output(path)
    if not os.path.lexists(path) or (path.is_dir() and not any(path.iterdir())):
        return
    if exists == "error":
        others = " or ".join(f"exists={choice!r}" for choice in choices[1:])
        raise OutputExistsError(f"{path} already exists and is not empty; choose another place or set {others}")
    if kind is None or exists != "overwrite":
        return
    if not path.is_dir():
        raise OutputExistsError(f"{path} is not a folder, so it is not replaced by a {kind.name}; choose another place")
    if lost := foreign(path, kind):
        more = f" and {len(lost) - 3} more files" if len(lost) > 3 else ""
        raise OutputExistsError(
            f"{path} holds {', '.join(map(repr, lost[:3]))}{more}, which the new {kind.name} would not have. "
            "Overwriting would lose that: move it away, delete the folder yourself, or choose another place"
        )


def refuse_inputs_in(out: Path, inputs: Iterable[Path]) -> None:
    """Raise OutputExistsError if an input is `out` or lies in it, because replacing `out` would remove the input."""
    place = check_output(out).resolve()
    for given in inputs:
        if check_input(given).resolve().is_relative_to(place):
            raise OutputExistsError(f"{given} is an input, and replacing {out} would remove it; choose another place")


def check_shared(path: Path, team: Team, seconds: float = SHARED_SECONDS) -> None:
    """Check that all processes of a team see the same folder above an output. The first one creates it and writes a file there.

    Args:
        seconds: time after which a file that a process does not see counts as missing.

    Raises:
        ConfigError: a process does not see the file, or the first cannot write it.
        DiskFullError: the disk is full.
    """
    if team.world == 1:
        return
    token = temporary(path.absolute(), "tmp")
    with team.failing_together():
        if team.is_first:
            with disk_full_is_typed(path):
                token.parent.mkdir(parents=True, exist_ok=True)
                token.write_text(token.name, encoding="utf-8")
    try:
        name, deadline = team.tell(token.name), time.monotonic() + seconds
        while not (is_seen := name in _names_in(token.parent)) and time.monotonic() < deadline:
            time.sleep(0.05)
        places = team.gather((is_seen, socket.gethostname()))
    finally:
        if team.is_first:
            remove(token)
    if blind := [f"process {rank} on {host}" for rank, (is_seen, host) in enumerate(places) if not is_seen]:
        raise ConfigError(
            f"{token.parent} is not the same folder for all processes: {', '.join(blind)} cannot see the files that process 0 "
            f"on {places[0][1]} writes there; choose a folder on a file system that all machines share"
        )


def _names_in(folder: Path) -> list[str]:
    return os.listdir(folder) if folder.is_dir() else []
