"""Windows's rules for files: what is open can be neither removed, nor renamed, nor replaced, and only files that were opened
for writing can be synced. Windows itself has them anyway; macOS does not say what is
open, so that only the last holds there."""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


def _in_use() -> set[Path]:
    """Return the files that this process has open or mapped, where the system says so."""
    if not Path("/proc/self/maps").exists():
        return set()
    names = {line.split(maxsplit=5)[5].strip() for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            if stat.S_ISREG(os.stat(f"/proc/self/fd/{descriptor}").st_mode):
                names.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        except OSError:  # the descriptor of the listing itself
            continue
    return {Path(name) for name in names}


def _whole(path: Any, folder: int | None) -> Path:
    place = Path(os.readlink(f"/proc/self/fd/{folder}")) if folder is not None else Path.cwd()
    return place / os.fspath(path)


def _refuse_in_use(*paths: Path) -> None:
    for used in _in_use():
        for path in paths:
            if used == path or path in used.parents:
                raise PermissionError(errno.EACCES, f"Windows: {used} is open", str(path))


@contextmanager
def windows_rules() -> Iterator[None]:
    """Make os treat files in the block as on Windows."""
    if os.name == "nt":
        yield
        return
    import fcntl

    fsync, replace, rename, unlink, remove = os.fsync, os.replace, os.rename, os.unlink, os.remove

    def synced(file: Any) -> None:
        number = file if isinstance(file, int) else file.fileno()
        is_file = stat.S_ISREG(os.fstat(number).st_mode)
        if is_file and fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Windows: os.fsync of a file that was opened for reading")
        fsync(number)

    def moved(move: Callable, may_replace: bool) -> Callable:
        def act(source: Any, target: Any) -> None:
            old, new = _whole(source, None), _whole(target, None)
            if new.is_dir() or (new.exists() and not may_replace):
                raise PermissionError(errno.EACCES, "Windows: there is something already", str(new))
            _refuse_in_use(old, new)
            move(source, target)

        return act

    def removed(remove: Callable) -> Callable:
        def act(path: Any, *, dir_fd: int | None = None) -> None:
            _refuse_in_use(_whole(path, dir_fd))
            remove(path, dir_fd=dir_fd)

        return act

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", synced)
        patch.setattr("saelens_lite.outputs.exchange", lambda a, b: False)
        patch.setattr(os, "replace", moved(replace, may_replace=True))
        patch.setattr(os, "rename", moved(rename, may_replace=False))
        patch.setattr(os, "unlink", removed(unlink))
        patch.setattr(os, "remove", removed(remove))
        yield
