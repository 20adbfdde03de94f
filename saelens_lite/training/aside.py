"""Replacement of old runs: they are moved aside until the new run is complete, and put back if it fails early."""

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
    """A block in which a new run is written. Old folders in its place are moved aside.

    If the block succeeds, the old folders are removed. If it fails before the new run has a checkpoint or a dictionary, the
    new folders are removed and the old ones put back; new folders that hold a log and replace nothing stay. If it fails
    later, the new run stays, and the old folders are kept until it is resumed and complete.

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
            log.warning("the earlier run at %s is kept in %s until the new one is complete", self.out, old)

    def _has_log(self) -> bool:
        """Return whether a file other than the settings is not empty."""
        files = (path for folder in self.folders for path in folder.rglob("*") if path.name != "config.toml")
        return any(path.is_file() and path.stat().st_size for path in files)

    def _undo(self) -> None:
        """Remove the new folders, which hold only settings and logs, and put the old ones back."""
        for place, kind in self._places.items():
            remove_own(place, kind)
        for place, old in self._moved:
            if os.path.lexists(place):
                log.warning("%s cannot be put back, because the path exists again; the earlier run is in %s", place, old)
            else:
                os.replace(old, place)
                log.warning("the earlier %s is back in its place", place)


def has_result(out: Path, folders: Sequence[Path]) -> bool:
    """Return whether a run has a checkpoint or a dictionary, which took time to make."""
    kept = (folder / name for folder in folders for name in ("dictionary", "last_good"))
    return is_interrupted(out) or any(path.exists() for path in kept)


def remove_replaced(out: Path, folders: Sequence[Path]) -> None:
    """Remove the old folders that a complete run has replaced. The caller holds the lock on `out`."""
    for place in (*folders, out / FOLDER):
        for old in leftovers(place, "old"):
            remove_old(old, place)


def put_back_runs(out: Path, folders: Sequence[Path], kind: Kind) -> None:
    """Put old runs back if the process that was replacing them was killed before the new run had a result.

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
    """Return the folders of dictionaries in `out` whose old versions were moved aside."""
    names = [path.name for path in out.iterdir()] if out.is_dir() else []
    matches = filter(None, map(TEMPORARY.fullmatch, names))
    return [out / match[1] for match in matches if match[2] == "old" and match[1] != FOLDER]
