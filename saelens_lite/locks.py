"""Locks on outputs: one process at a time writes to a place.

The lock of NAME is the file .NAME.saelens-lite.lock beside it, because Windows removes no folder in which a file is open. The
file names the process that holds the lock, and is removed when the lock is released.
"""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from saelens_lite.errors import LockedError

ENDING = ".saelens-lite.lock"


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold the lock on `path` for the length of a block. The folder above `path` is created where it is missing.

    Args:
        what: the kind of thing that is written, such as "run"; the error of another process names it.

    Raises:
        LockedError: another process, or another part of this one, writes to `path`; the message names the process.
    """
    place = path.absolute() if path.name not in ("", "..") else path.resolve()
    place.parent.mkdir(parents=True, exist_ok=True)
    file = place.with_name(f".{place.name}{ENDING}")
    lock = FileLock(file, timeout=0)  # opens the file anew when its owner removed it in between
    try:
        lock.acquire()
    except Timeout:
        raise LockedError(f"{path} is being written by {_owner(file)}; wait for it or choose another place") from None
    try:
        with suppress(OSError):  # Windows may refuse to write to a locked file; the message of others is then shorter
            file.write_text(f"process {os.getpid()} on {socket.gethostname()} ({what})", encoding="utf-8")
        yield
    finally:
        is_removed = _remove(file)  # while it is held: no other process can hold it yet
        lock.release()
        if not is_removed:  # Windows removes no open file
            _remove(file)


def _owner(file: Path) -> str:
    """Return who holds a lock. The owner writes its name a moment after it takes the lock."""
    for _ in range(25):
        with suppress(OSError, ValueError):
            if name := file.read_text(encoding="utf-8")[:200]:
                return name if name.isprintable() else "another process"
        time.sleep(0.01)
    return "another process"


def _remove(file: Path) -> bool:
    """Remove a file, and return whether that was possible."""
    try:
        file.unlink(missing_ok=True)
    except PermissionError:
        return False
    return True
