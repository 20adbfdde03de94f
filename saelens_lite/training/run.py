"""A run: the settings, log and dictionary of one training, in memory or in its folder."""

import json
import logging
import shlex
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from saelens_lite.config import TrainConfig, read_toml
from saelens_lite.dictionary import Dictionary
from saelens_lite.dictionary.folder import CONFIG_FILE
from saelens_lite.errors import ConfigError
from saelens_lite.kinds import is_run, listed, runs_in
from saelens_lite.outputs import restore
from saelens_lite.paths import check_input
from saelens_lite.training.checkpoint import is_interrupted
from saelens_lite.training.curves import Curves
from saelens_lite.training.history import History

if TYPE_CHECKING:
    import pandas as pd

MAX_LOG_BYTES = 1 << 28  # a million lines; a billion tokens give 15,000 by default
SHOWN = ("sparsity", "options", "d_sae", "n_tokens", "batch_size", "lr", "seed")  # settings in notebooks
SUMMARY = {"l0": "L0 {:.1f}", "fvu": "train FVU {:.4f}", "val_fvu": "validation FVU {:.4f}"}
log = logging.getLogger(__name__)


class Run:
    """A training: its settings (`config`), the lines of its log (`history`), its `dictionary`, and its `folder`, if it has one.

    A dictionary that is not given is loaded from the folder when it is first read.
    """

    def __init__(
        self,
        config: TrainConfig,
        dictionary: Dictionary | None,
        history: list[dict[str, Any]] | History,
        folder: Path | None = None,
    ):
        self.config, self.folder = config, folder
        self._dictionary, self._history = dictionary, history

    @classmethod
    def load(cls, folder: str | Path) -> "Run":
        """Return the run in a folder that `train` wrote, finished or not. Its history is that of log.jsonl.

        Raises:
            ConfigError: the folder is not that of a run, or holds several.
        """
        folder = check_input(folder)
        restore(folder)
        if not is_run(folder):
            _refuse(folder)
        tables = read_toml(folder / "config.toml")
        keys = {*TrainConfig.model_fields, "target_hook"}  # the latter of older files
        config = TrainConfig(**{key: value for key, value in tables.items() if key in keys})
        return cls(config, None, read_log(folder / "log.jsonl"), folder)

    @classmethod
    def load_all(cls, folder: str | Path) -> "list[Run]":
        """Return the runs in a folder: several that were trained together, or all in its folders.

        Raises:
            ConfigError: there is no run.
        """
        folder = check_input(folder)
        restore(folder)
        return [cls.load(one) for one in runs_in(folder)] or _refuse(folder)

    @property
    def history(self) -> list[dict[str, Any]]:
        """The lines of the log, oldest first."""
        if isinstance(self._history, History):  # as dicts, they take five times the memory
            self._history = list(self._history)
        return self._history

    @property
    def state(self) -> Literal["finished", "interrupted", "failed", "unfinished"]:
        """The state of the run, as its folder shows it.

        "interrupted": it has a checkpoint to resume from. "failed": it has only its last good dictionary, in last_good/.
        "unfinished": it is being trained, or was killed before its first checkpoint.
        """
        if self.folder is None:
            return "finished"
        is_done = (self.folder / "dictionary" / CONFIG_FILE).exists()
        if is_interrupted(self.folder) or is_interrupted(self.folder.parent):  # of a group, also while it is extended
            return "interrupted"
        has_failed = (self.folder / "last_good" / CONFIG_FILE).exists()
        return "finished" if is_done else "failed" if has_failed else "unfinished"

    @property
    def dictionary(self) -> Dictionary:
        """The trained dictionary; of a failed run, the last good one.

        Raises:
            ConfigError: the run has no dictionary yet.
        """
        if self._dictionary is None:
            places = [self.folder / name for name in ("dictionary", "last_good")]
            place = next((place for place in places if (place / CONFIG_FILE).exists()), None)
            if place is None:
                raise ConfigError(f"{self.folder} has no dictionary yet: {self.what_next}")
            self._dictionary = Dictionary.load(place)
        return self._dictionary

    @property
    def tokens(self) -> int:
        """The number of tokens at the last line of the log."""
        return int(self.history[-1]["tokens"]) if self.history else 0

    @property
    def what_next(self) -> str:
        """The meaning of the run's state, and what to do."""
        if self.state == "failed":
            return f"training failed; its last good dictionary is {self.folder / 'last_good'}"
        if self.state == "interrupted":
            out = self.folder if is_interrupted(self.folder) else self.folder.parent
            return f"the run is interrupted; resume it with: saelens-lite train --resume {shlex.quote(str(out))}"
        return "the run is finished" if self.state == "finished" else "it is still in training, or was killed early"

    def __str__(self) -> str:
        last = self.history[-1] if self.history else {}
        numbers = [form.format(last[name]) for name, form in SUMMARY.items() if name in last]
        parts = [self.config.sparsity, *numbers, f"{self.tokens:,} tokens" if last else "no log"]
        more = "" if self.state == "finished" else f" ({self.what_next})"
        return f"{self.folder or 'run'}: {', '.join(parts)}{more}"

    def __repr__(self) -> str:
        return f"<Run {self}>"

    def _repr_html_(self) -> str:
        settings = {name: getattr(self.config, name) for name in SHOWN}
        if self.config.lr is None:
            settings["lr"] = f"default, up to {max((line.get('lr', 0.0) for line in self.history), default=0.0):.3g}"
        cells = "".join(f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>" for name, value in settings.items())
        curves = self._curves()._repr_svg_() if len(self.history) > 1 else None
        return f"<p>{escape(str(self))}</p><table>{cells}</table>{curves or ''}"

    def to_frame(self) -> "pd.DataFrame":
        """Return the history as a DataFrame, with a row for each line of the log."""
        import pandas as pd

        return pd.DataFrame(self.history)

    def plot(self, path: str | Path | None = None, *, beside: "Sequence[Run]" = ()) -> Curves:
        """Return the curves of the log over tokens: loss, FVU, L0, dead latents and the learning rate.

        They appear as a picture in a notebook and as text in a terminal (`print(run.plot())`).

        Args:
            path: a .png or .svg file to write.
            beside: other runs in the same picture.

        Raises:
            ConfigError: matplotlib or plotext is needed and missing, or the file has another ending.
        """
        curves = self._curves(beside)
        if path is not None:
            curves.save(path)
        return curves

    def _curves(self, beside: "Sequence[Run]" = ()) -> Curves:
        runs = [self, *beside]
        return Curves([str(run.folder or run.config.sparsity) for run in runs], [run.history for run in runs])


def _refuse(folder: Path) -> list[Run]:
    """Raise ConfigError for a folder that is not that of a run; the message says what it is."""
    if several := runs_in(folder):
        raise ConfigError(f"{folder} holds {listed(several)}; choose one of them, or read all by Run.load_all")
    if is_run(folder.absolute().parent):
        raise ConfigError(f"{folder} is a folder in a run; give the folder of the run, {folder.absolute().parent}")
    raise ConfigError(f"{folder} is not the folder of a run: it has no config.toml that `train` wrote; is the path right?")


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the objects in log.jsonl. Invalid lines are skipped, because a run may still be writing the last one."""
    if not path.is_file():
        return []
    if (size := path.stat().st_size) > MAX_LOG_BYTES:
        log.warning("%s has %s bytes, so it is not read; at most %s are", path, f"{size:,}", f"{MAX_LOG_BYTES:,}")
        return []
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            lines.append(value)
    return lines
