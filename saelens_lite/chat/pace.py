"""The number of requests at the same time, which falls where an endpoint is too slow for so many."""

import logging
import time
from collections import deque

log = logging.getLogger(__name__)


class Pace:
    """The requests in progress, and how many there may be.

    A server that answers one question at a time makes the others wait. If it answers c questions within a time-out while n > c
    are in progress, n requests wait longer than the time-out, and those that are given up may still occupy the server. So the
    number falls to c, at least 1. It rises by one when an answer is so quick that one more request would still be answered in
    half of the time-out.

    Args:
        most: Requests at the same time, at most.
        timeout: Seconds after which a request counts as lost.
    """

    def __init__(self, most: int, timeout: float):
        self.most = self.now = most
        self.timeout = timeout
        self._running = 0
        self._answered: deque[float] = deque(maxlen=most)  # times of the last answers

    @property
    def is_full(self) -> bool:
        """True if no further request may begin."""
        return self._running >= self.now

    def begin(self) -> None:
        """Count a request that begins."""
        self._running += 1

    def end(self) -> None:
        """Count a request that ends, in whatever way."""
        self._running -= 1

    def answered(self, began: float) -> None:
        """Take note of an answer to a request that began at that time (time.monotonic)."""
        now = time.monotonic()
        self._answered.append(now)
        if self.now < self.most and (now - began) * (self._running + 1) / max(1, self._running) < self.timeout / 2:
            self.now = min(self.most, max(self.now, self._running + 1))

    def timed_out(self, began: float) -> None:
        """Take note of a request without an answer in time."""
        n_answered = max(1, sum(at >= began for at in self._answered))
        if n_answered < self.now:
            self.now = n_answered
            log.warning(
                "no reply within %g seconds, so the endpoint now gets %d at a time instead of %d questions; a longer timeout "
                "may be better",
                self.timeout,
                self.now,
                self.most,
            )
