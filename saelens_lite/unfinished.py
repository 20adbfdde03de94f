"""Work that can be resumed: until it is finished it lies in a hidden folder beside its destination.

request.json in the folder says what was asked; the same call resumes, another one is refused. One process at a time works in
the folder. Its lock is a file beside the folder, because Windows removes no folder in which a file is open.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from saelens_lite.errors import CorruptFileError, DiskFullError, LockedError, OutputExistsError
from saelens_lite.files import read_json, refuse_existing, refuse_nameless, remove_leftovers, write_json

REQUEST, LOCK = "request.json", ".lock"  # LOCK: the ending of the lock beside the folder


@contextmanager
def unfinished(out: Path, request: dict[str, Any], what: str, has_work: Callable[[Path], bool], exists: str) -> Iterator[Path]:
    """The folder of work on `out`, locked; the block puts the result at `out`.

    The folder goes when the block ends well, and when it fails before there is any work in it.

    Raises:
        OutputExistsError: `out`, or unfinished work on something else, is there and `exists` is "error".
        LockedError: another process is at work on `out`.
        CorruptFileError: what was asked cannot be read, and `exists` is "error".
    """
    refuse_nameless(out)
    folder = out.with_name(f".{out.name}.unfinished")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _locked(folder.with_name(folder.name + LOCK)):
            try:
                folder.mkdir(exist_ok=True)
                refuse_existing(out, exists)
                if not has_work(folder) or not _same_request(folder / REQUEST, request, what, exists):
                    start_over(folder, request)
                yield folder
                remove_leftovers(out)
                shutil.rmtree(folder)
            finally:
                if folder.exists() and not has_work(folder):
                    shutil.rmtree(folder)
    except Timeout:
        raise LockedError(f"another process is writing {out}; wait for it or choose another place") from None
    except DiskFullError as error:
        if not folder.exists():
            raise
        raise DiskFullError(f"{error}; make room and run the same again: what is whole in {folder} stays") from error


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock for the length of a block; its file is removed afterwards. Timeout when another process holds it."""
    lock = FileLock(path, timeout=0)
    lock.acquire()
    try:
        yield
    finally:
        removed = _removed(path)  # while it is held, so that nobody else can hold it yet
        lock.release()
        if not removed:  # Windows removes no open file
            _removed(path)


def _removed(path: Path) -> bool:
    """Remove a file, and return whether that worked."""
    try:
        path.unlink(missing_ok=True)
    except PermissionError:
        return False
    return True


def start_over(folder: Path, request: dict[str, Any]) -> None:
    """Remove what is in the folder, and note what was asked."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    write_json(folder / REQUEST, request)


def _same_request(file: Path, request: dict[str, Any], what: str, exists: str) -> bool:
    """Whether the unfinished work whose request is in a file was asked for in the same words."""
    try:
        found = read_json(file)
    except CorruptFileError as error:
        if exists == "error":
            raise CorruptFileError(f"unfinished {what}: {error}; delete {file.parent} or say exists='overwrite'") from None
        return False
    other = [key for key in request if found.get(key) != json.loads(json.dumps(request[key]))]
    if other and exists == "error":
        said = ", ".join(f"{key} = {found.get(key)!r} (now {request[key]!r})" for key in other)
        raise OutputExistsError(
            f"{file.parent} holds an unfinished {what} with other settings: {said}; ask for the same, delete it, or say "
            "exists='overwrite'"
        )
    return not other
