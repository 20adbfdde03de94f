"""Old runs wait beside their place until the run that replaces them is complete; when that fails at once, they come back."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from saelens_lite.kinds import CHECKPOINTS, TEMPORARY, Kind
from saelens_lite.outputs import leftovers, move_aside, remove, remove_old, remove_own
from saelens_lite.training.checkpoint import FOLDER, is_interrupted

log = logging.getLogger(__name__)


class Aside:
    """The folders of a new run, for the length of a block. What was in their place is moved aside.

    When the block ends well, what was moved aside is removed. When it fails before the new run has a checkpoint or a
    dictionary, the old folders come back, and the new ones are removed unless all they have is a log that replaces nothing.
    Otherwise the new run stays, and the old ones wait until it is resumed and complete.

    Args:
        out: the folder of the run, or of the runs that are trained together.
        folders: a folder for each dictionary: `out` itself, or folders in it.
        kind: the kind of these folders.
    """

    def __init__(self, out: Path, folders: Sequence[Path], kind: Kind):
        self.out, self.folders, self.kind = out, folders, kind
        places = [*folders] if out in folders else [*folders, out / FOLDER]
        self._places = {place: kind if place in folders else CHECKPOINTS for place in places}
        self._moved: list[tuple[Path, Path]] = []

    def __enter__(self) -> "Aside":
        try:
            for place in self._places:
                if os.path.lexists(place):
                    self._moved.append((place, move_aside(place)))
            for folder in self.folders:
                folder.mkdir(parents=True)
        except BaseException:
            self._undo()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            remove_replaced(self.out, self.folders)
        elif not has_result(self.out, self.folders):
            if self._moved or not self._has_log():
                self._undo()
        elif self._moved:
            old = ", ".join(str(moved) for _, moved in self._moved)
            log.warning("the run that was at %s before waits in %s until the new one is complete", self.out, old)

    def _has_log(self) -> bool:
        """Return whether a file other than the settings holds something."""
        files = (path for folder in self.folders for path in folder.rglob("*") if path.name != "config.toml")
        return any(path.is_file() and path.stat().st_size for path in files)

    def _undo(self) -> None:
        """Remove the new folders, which hold nothing but settings and logs, and put the old ones back."""
        for place, kind in self._places.items():
            remove_own(place, kind)
        for place, old in self._moved:
            if os.path.lexists(place):
                log.warning("%s is in the way of what was there before, which is now in %s", place, old)
            else:
                os.replace(old, place)
                log.warning("%s is what it was before", place)


def has_result(out: Path, folders: Sequence[Path]) -> bool:
    """Return whether a run has something that took time to make: a checkpoint or a dictionary."""
    kept = (folder / name for folder in folders for name in ("dictionary", "last_good"))
    return is_interrupted(out) or any(path.exists() for path in kept)


def remove_replaced(out: Path, folders: Sequence[Path]) -> None:
    """Remove what waits beside the folders of a run that is complete. The caller holds the lock on `out`."""
    for place in (*folders, out / FOLDER):
        for old in leftovers(place, "old"):
            remove_old(old, place)


def put_back_runs(out: Path, folders: Sequence[Path], kind: Kind) -> None:
    """Put old runs back where a process was killed before the run that replaces them had a result.

    The caller holds the lock on `out`.
    """
    folders = [*folders, *_waited_for(out)]
    if has_result(out, folders):
        return
    for place in dict.fromkeys((*folders, out / FOLDER)):
        olds = leftovers(place, "old")
        if olds:
            remove_own(place, kind if place in folders else CHECKPOINTS)
            if not os.path.lexists(place):
                os.replace(olds[-1], place)
                log.warning("%s was being replaced when its process was killed; the old run is back", place)
        for left in leftovers(place, "tmp"):
            remove(left)


def _waited_for(out: Path) -> list[Path]:
    """Return the folders of dictionaries in `out` beside which an old one waits."""
    names = [path.name for path in out.iterdir()] if out.is_dir() else []
    matches = filter(None, map(TEMPORARY.fullmatch, names))
    return [out / match[1] for match in matches if match[2] == "old" and match[1] != FOLDER]
