"""Work that can be resumed: until it is finished it lies in a hidden folder beside its destination.

request.json in the folder says what was asked; the same call resumes, another one is refused. One process at a time works on a
destination; see `saelens_lite.locks`.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from saelens_lite.errors import CorruptFileError, DiskFullError, OutputExistsError
from saelens_lite.files import read_json, write_json
from saelens_lite.kinds import Kind
from saelens_lite.locks import locked
from saelens_lite.outputs import clean_up, followed, refuse_existing, refuse_inputs_in, remove, remove_own

REQUEST = "request.json"


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
    """The folder of unfinished work on `out`, locked; the block puts the result, a folder of `kind`, at `out`.

    The folder goes when the block ends well, and when it fails before there is any work in it.

    Args:
        work: the kind of the folder of unfinished work.
        has_work: returns whether something in the folder is worth keeping.
        inputs: files that the work reads.

    Raises:
        OutputExistsError: `out`, or unfinished work on something else, is there and `exists` is "error"; one of the two folders
            holds files of another kind, or one of the inputs.
        LockedError: another process is at work on `out`.
        CorruptFileError: the request of unfinished work cannot be read, and `exists` is "error".
    """
    out = followed(out)
    folder = out.with_name(f".{out.name}.unfinished")
    with locked(out, kind.name):
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
            raise DiskFullError(f"{error}; make room and run the same again: what is whole in {folder} stays") from error
        finally:
            if folder.exists() and not has_work(folder):
                remove_own(folder, work)


def start_over(folder: Path, request: dict[str, Any]) -> None:
    """Remove what is in the folder of unfinished work, and note what was asked. The folder always has a request, its mark."""
    for path in folder.iterdir():
        if path.name != REQUEST:
            remove(path)
    write_json(folder / REQUEST, request)


def _same_request(file: Path, request: dict[str, Any], what: str, exists: str) -> bool:
    """Return whether the unfinished work whose request is in a file was asked for in the same words."""
    try:
        found = read_json(file, finite=True)
    except CorruptFileError as error:
        if exists == "error":
            raise CorruptFileError(f"unfinished {what}: {error}; delete {file.parent} or say exists='overwrite'") from None
        return False
    wanted = json.loads(json.dumps(request))
    other = [key for key in wanted | found if (key in found, found.get(key)) != (key in wanted, wanted.get(key))]
    if other and exists == "error":
        said = ", ".join(f"{key} = {found.get(key)!r:.200} (now {wanted.get(key)!r:.200})" for key in other)
        raise OutputExistsError(
            f"{file.parent} holds an unfinished {what} with other settings: {said}; ask for the same, delete it, or say "
            "exists='overwrite'"
        )
    return not other
