"""Locks on outputs: only one process at a time writes to a path.

The lock of NAME is the file .NAME.saelens-lite.lock beside it, because Windows cannot remove a folder with an open file. The
file names the process that holds the lock. It is removed on release.
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
def locked(path: Path, what: str, patience: float = 0.0) -> Iterator[None]:
    """Hold the lock on `path` in a block. The folder above `path` is created if it is missing.

    Args:
        what: the kind of output, such as "run"; the error in another process names it.
        patience: seconds to wait for a process that holds the lock, perhaps only to see whether it is free.

    Raises:
        LockedError: another process, or another part of this one, writes to `path`. The message names the process.
    """
    place = path.absolute() if path.name not in ("", "..") else path.resolve()
    place.parent.mkdir(parents=True, exist_ok=True)
    file = place.with_name(f".{place.name}{ENDING}")
    lock = FileLock(file, timeout=patience)  # reopens the file if its owner removed it
    try:
        lock.acquire()
    except Timeout:
        raise LockedError(f"{path} is being written by {_owner(file)}; wait for it or choose another place") from None
    try:
        with suppress(OSError):  # Windows may refuse to write to a locked file; then the message omits the owner
            file.write_text(f"process {os.getpid()} on {socket.gethostname()} ({what})", encoding="utf-8")
        yield
    finally:
        is_removed = _remove(file)  # removed while held, so that no other process holds it
        lock.release()
        if not is_removed:  # Windows cannot remove an open file
            _remove(file)


def _owner(file: Path) -> str:
    """Return the owner of a lock. The owner writes its name a moment after it takes the lock."""
    for _ in range(25):
        with suppress(OSError, ValueError):
            if name := file.read_text(encoding="utf-8")[:200]:
                return name if name.isprintable() else "another process"
        time.sleep(0.01)
    return "another process"


def _remove(file: Path) -> bool:
    """Remove a file. Return whether that was possible."""
    try:
        file.unlink(missing_ok=True)
    except PermissionError:
        return False
    return True
