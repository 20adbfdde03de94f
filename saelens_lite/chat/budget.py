"""The tokens and dollars that a chat model has spent, and the limits that it may not pass."""

import threading
from collections.abc import Sequence
from typing import NamedTuple

from saelens_lite.chat.contract import Estimate
from saelens_lite.chat.settings import ChatConfig
from saelens_lite.errors import BudgetError


class Size(NamedTuple):
    """Tokens of a question, and of its answer."""

    n_input: int
    n_output: int


class Spent(NamedTuple):
    """Tokens that a chat model has used, by the server's count, and US dollars if the prices are known.

    A reply that was lost on the way counts as its question's estimate, because the server may have charged it.
    """

    n_input: int
    n_output: int
    dollars: float | None


class Budget:
    """Tokens that are spent, and those reserved for questions in progress. Several threads may use it.

    A reservation is the estimate of a question and the longest answer that it allows. If questions turn out longer than their
    estimates, later reservations grow in the same proportion.
    """

    def __init__(self, config: ChatConfig):
        self.config = config
        self._reserved: list[Size] = []
        self._spent = Size(0, 0)
        self._estimated, self._counted = 0, 0  # input tokens of the questions that were answered
        self._lock = threading.Lock()

    @property
    def spent(self) -> Spent:
        """Tokens and dollars until now."""
        return Spent(*self._spent, self.dollars(self._spent))

    def dollars(self, size: Size) -> float | None:
        """Return the price of tokens, None if it is not known."""
        if self.config.input_price is None or self.config.output_price is None:
            return None
        return (size.n_input * self.config.input_price + size.n_output * self.config.output_price) / 1e6

    def limit_passed_by(self, size: Size) -> str | None:
        """Return the limit that so many more tokens would pass, as «dollar_limit = 5»; None if all fit."""
        total = _sum([self._spent, *self._reserved, size])
        if self.config.token_limit is not None and sum(total) > self.config.token_limit:
            return f"token_limit = {self.config.token_limit:,}"
        if self.config.dollar_limit is not None and (self.dollars(total) or 0) > self.config.dollar_limit:
            return f"dollar_limit = {self.config.dollar_limit:g}"
        return None

    def check(self, estimate: Estimate) -> None:
        """Raise BudgetError if the estimate, with what is spent already, passes a limit."""
        if limit := self.limit_passed_by(Size(estimate.n_input, estimate.n_output)):
            before = "" if self._spent == (0, 0) else f", after {_words(self._spent, self.spent.dollars)}"
            needed = _words(Size(estimate.n_input, estimate.n_output), estimate.dollars)
            raise BudgetError(
                f"{estimate.n_questions:,} questions would take up to {needed}{before}; {limit}. Nothing was sent: raise the "
                "limit, or ask fewer questions"
            )

    def reserve(self, size: Size) -> Size | None:
        """Reserve tokens and return how many; None if they would pass a limit."""
        with self._lock:
            reserved = self.scaled(size)
            if self.limit_passed_by(reserved):
                return None
            self._reserved.append(reserved)
            return reserved

    def scaled(self, size: Size) -> Size:
        """Return an estimate that has grown as much as questions turned out longer than their estimates."""
        longer = max(1.0, self._counted / self._estimated) if self._estimated else 1.0
        return Size(round(size.n_input * longer), size.n_output)

    @property
    def in_progress(self) -> bool:
        """True if tokens are reserved, some of which may become free."""
        return bool(self._reserved)

    def settle(self, reserved: Size, used: Size, estimated: int | None = None) -> None:
        """Put what was used in the place of a reservation.

        estimated: estimate of the question's tokens, if `used` is the server's count.
        """
        with self._lock:
            self._reserved.remove(reserved)
            self._spent = _sum([self._spent, used])
            if estimated is not None:
                self._estimated, self._counted = self._estimated + estimated, self._counted + used.n_input


def _sum(sizes: Sequence[Size]) -> Size:
    return Size(sum(size.n_input for size in sizes), sum(size.n_output for size in sizes))


def _words(size: Size, dollars: float | None) -> str:
    price = "" if dollars is None else f" ({dollars:,.2f} dollars)"
    return f"{size.n_input:,} input and {size.n_output:,} output tokens{price}"
