"""The contract of a logger: where the lines of a training log go.

Loggers are found by name like all plugins; the smallest useful one is a method:

    @register("stderr")
    class Stderr(Logger):
        def log(self, line):
            print(line, file=sys.stderr)

Training keeps its lines itself (`Run.history`) and hands out copies, so that no number depends on a logger. One that fails
while training runs is dropped with a warning.
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
    """Base of all loggers. An object follows one run: `start`, `log` for each line, `close`."""

    plugin_kind: ClassVar[str] = "loggers"
    plugin_name: ClassVar[str]  # set by the registry

    def start(self, folder: Path, config: TrainConfig, tokens: int = 0) -> None:
        """Called before the first step, with the run folder; what it raises keeps training from beginning.

        Training begins at `tokens`: 0, or those of the checkpoint it resumes from. What was logged beyond them will be
        logged again, and is to be forgotten.
        """

    def log(self, line: dict[str, Any]) -> None:
        """Called with each line: numbers by name, among them the horizontal axis, line["tokens"]."""
        raise NotImplementedError(f"{type(self).__name__} must define log(line)")

    def close(self) -> None:
        """Called once after `start` returned, however training ends."""


class RunLog:
    """The loggers of one run, by name. One that fails is left out from there on, with one warning."""

    def __init__(self) -> None:
        self.loggers: dict[str, Logger] = {}

    def log(self, line: Mapping[str, Any]) -> None:
        """Give each logger a copy of the line."""
        for name, logger in list(self.loggers.items()):
            try:
                logger.log(dict(line))
            except Exception as error:  # whatever a logger raises, the run is worth more
                _warn(f"the {name} logger failed; training goes on without it", error)
                del self.loggers[name]
                with suppress(Exception):  # it has failed, and that was said
                    logger.close()

    def close(self) -> None:
        """Close the loggers that are left."""
        while self.loggers:
            name, logger = self.loggers.popitem()
            try:
                logger.close()
            except Exception as error:
                _warn(f"the {name} logger could not be closed", error)


def _warn(what: str, error: Exception) -> None:
    logging.getLogger(__name__).warning("%s: %s: %s", what, type(error).__name__, error)


def load_loggers(names: str | Sequence[str]) -> dict[str, type[Logger]]:
    """Return the classes of loggers, by name; a single name may stand for itself.

    Raises:
        PluginError: no such logger, or a package it needs is not installed; the message has the pip command.
    """
    return {name: registry.load(name, "loggers") for name in ([names] if isinstance(names, str) else names)}


@contextmanager
def open_log(
    classes: Mapping[str, type[Logger]], folder: Path | None, config: TrainConfig, tokens: int = 0
) -> Iterator[RunLog]:
    """Loggers started on a run folder, for the length of a block.

    Raises:
        PluginError: a logger could not start; those before it are closed.
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
