"""Resumable work: unfinished results stay in a hidden folder beside the destination.

request.json in the folder holds the request. Repeat the call to resume; a different call is refused. Only one process at a time
works on a destination (see `saelens_lite.locks`).
"""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from saelens_lite.errors import CorruptFileError, DiskFullError, OutputExistsError
from saelens_lite.files import read_json, write_json
from saelens_lite.fingerprints import like_recorded
from saelens_lite.kinds import Kind
from saelens_lite.locks import locked
from saelens_lite.outputs import clean_up, followed, refuse_existing, refuse_inputs_in, remove, remove_own

REQUEST = "request.json"
PATIENCE = 0.25  # seconds; a reader takes the lock for a moment to see whether the work goes on


def unfinished_folder(out: Path) -> Path:
    """Return the folder of the unfinished work of an output."""
    return out.with_name(f".{out.name}.unfinished")


@contextmanager
def unfinished(
    out: Path,
    kind: Kind,
    request: dict[str, Any],
    work: Kind,
    has_work: Callable[[Path], bool],
    exists: str,
    inputs: Iterable[Path] = (),
) -> Iterator[Path]:
    """Lock `out` and yield the folder of its unfinished work. The block writes the result, a folder of `kind`, to `out`.

    The folder is removed if the block succeeds, or if it fails before any work is done.

    Args:
        work: the kind of the folder of unfinished work.
        has_work: returns whether the folder holds work that is worth keeping.
        inputs: input files of the work.

    Raises:
        OutputExistsError: `exists` is "error", and `out` or unfinished work of another request exists; or one of the two
            folders holds foreign files or an input.
        LockedError: another process works on `out`.
        CorruptFileError: the request of unfinished work cannot be read, and `exists` is "error".
    """
    out = followed(out)
    folder = unfinished_folder(out)
    with locked(out, kind.name, PATIENCE):
        clean_up(out, kind)
        refuse_existing(out, exists, kind)
        refuse_existing(folder, "overwrite", work)
        for place in (out, folder):
            refuse_inputs_in(place, inputs)
        try:
            folder.mkdir(exist_ok=True)
            if not has_work(folder) or not _same_request(folder / REQUEST, request, kind.name, exists):
                start_over(folder, request)
            yield folder
            remove_own(folder, work)
        except DiskFullError as error:
            if not has_work(folder):
                raise
            raise DiskFullError(f"{error}; free some space and repeat the call: complete parts in {folder} are kept") from error
        finally:
            if folder.exists() and not has_work(folder):
                remove_own(folder, work)


def start_over(folder: Path, request: dict[str, Any]) -> None:
    """Empty the folder of unfinished work and write the request, which marks the folder."""
    for path in folder.iterdir():
        if path.name != REQUEST:
            remove(path)
    write_json(folder / REQUEST, request)


def _same_request(file: Path, request: dict[str, Any], what: str, exists: str) -> bool:
    """Return whether the unfinished work has the same request."""
    try:
        earlier = read_json(file, finite=True)
    except CorruptFileError as error:
        if exists == "error":
            raise CorruptFileError(f"unfinished {what}: {error}; delete {file.parent} or set exists='overwrite'") from None
        return False
    wanted = json.loads(json.dumps(like_recorded(request, earlier)))
    other = [key for key in wanted | earlier if (key in earlier, earlier.get(key)) != (key in wanted, wanted.get(key))]
    if other and exists == "error":
        said = ", ".join(f"{key} = {earlier.get(key)!r:.200} (now {wanted.get(key)!r:.200})" for key in other)
        raise OutputExistsError(
            f"{file.parent} holds an unfinished {what} with other settings: {said}; repeat that request, delete it, or set "
            "exists='overwrite'"
        )
    return not other
