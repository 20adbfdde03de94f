"""Ctrl-C and SIGTERM during training: they take effect after the current step, so that its state can be saved."""

import signal
import threading
from collections.abc import Callable
from typing import Any


class Stopping:
    """A block in which the first Ctrl-C or SIGTERM only sets `signal`. The second one acts as usual.

    Outside the main thread, where Python delivers no signals, nothing changes.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Callable | int | None] = {}

    def __enter__(self) -> "Stopping":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: Any) -> None:
        self._restore()

    def _remember(self, number: int, _frame: Any) -> None:
        self.signal = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set from Python
