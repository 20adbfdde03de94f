"""Log a run: the contract of a logger, which receives the lines of a training log.

Like every plugin, a logger has a name. The smallest useful logger has a single method:

```python
import sys


@sl.register("stderr")
class Stderr(sl.Logger):
    def log(self, line):
        print(line, file=sys.stderr)
```

A package names the class in the entry-point group `saelens_lite.loggers`. If a logger needs further packages, declare them as
an extra with the logger's name. If one is missing, an error before training gives the command that installs it, such as `pip
install 'saelens-lite[tensorboard]'`.

Training keeps its own lines (`Run.history`) and gives copies to the loggers, so no number depends on a logger. A logger that
fails in training is dropped with a warning.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

from saelens_lite import registry
from saelens_lite.config import TrainConfig
from saelens_lite.errors import PluginError

__all__ = ["DEFAULT_LOGGERS", "Logger", "RunLog", "load_loggers", "open_log"]

DEFAULT_LOGGERS = ("jsonl",)


class Logger:
    """Base of all loggers. An object serves one run: `start`, `log` for each line, `close`."""

    plugin_kind: ClassVar[str] = "loggers"
    plugin_name: ClassVar[str]  # set by the registry

    def start(self, folder: Path, config: TrainConfig, tokens: int = 0) -> None:
        """Start the log of a run. Called before the first step; an error stops training.

        Training begins at `tokens`: 0, or the position of the checkpoint that it resumes from. Drop all lines after `tokens`,
        because they will be logged again.
        """

    def log(self, line: dict[str, Any]) -> None:
        """Log one line: numbers by name. line["tokens"] is the horizontal axis."""
        raise NotImplementedError(f"{type(self).__name__} must define log(line)")

    def close(self) -> None:
        """Close the log. Called once if `start` returned, even if training fails."""


class RunLog:
    """The loggers of one run, by name. A logger that fails is dropped with one warning."""

    def __init__(self) -> None:
        self.loggers: dict[str, Logger] = {}

    def log(self, line: Mapping[str, Any]) -> None:
        """Give each logger a copy of the line."""
        for name, logger in list(self.loggers.items()):
            try:
                logger.log(dict(line))
            except Exception as error:  # a logger must not stop the run
                _warn(f"the {name} logger failed; training continues without it", error)
                del self.loggers[name]
                with suppress(Exception):  # its failure is already reported
                    logger.close()

    def close(self) -> None:
        """Close the remaining loggers."""
        while self.loggers:
            name, logger = self.loggers.popitem()
            try:
                logger.close()
            except Exception as error:
                _warn(f"the {name} logger could not be closed", error)


def _warn(what: str, error: Exception) -> None:
    logging.getLogger(__name__).warning("%s: %s: %s", what, type(error).__name__, error)


def load_loggers(names: str | Sequence[str]) -> dict[str, type[Logger]]:
    """Return the classes of loggers by name. `names` may be a single name.

    Raises:
        PluginError: a logger does not exist, or its package is not installed. The message has the pip command.
    """
    return {name: registry.load(name, "loggers") for name in ([names] if isinstance(names, str) else names)}


@contextmanager
def open_log(
    classes: Mapping[str, type[Logger]], folder: Path | None, config: TrainConfig, tokens: int = 0
) -> Iterator[RunLog]:
    """Start loggers on a run folder, and close them after the block.

    Raises:
        PluginError: a logger could not start. The loggers before it are closed.
    """
    run_log = RunLog()
    try:
        for name, logger_class in classes.items():
            run_log.loggers[name] = _started(name, logger_class, folder, config, tokens)
        yield run_log
    finally:
        run_log.close()


def _started(name: str, logger_class: type[Logger], folder: Path, config: TrainConfig, tokens: int) -> Logger:
    try:
        logger = logger_class()
        logger.start(folder, config, tokens)
    except Exception as error:
        raise PluginError(f"the {name} logger cannot start in {folder}: {type(error).__name__}: {error}") from error
    return logger
