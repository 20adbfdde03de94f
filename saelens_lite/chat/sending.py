"""One call to an endpoint: several requests at a time, repeated after faults, until all is answered, paid or stopped."""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress

from saelens_lite.chat.budget import Budget, Size
from saelens_lite.chat.connection import Connection, LostReply, UnfitQuestion
from saelens_lite.chat.contract import Answer, Question
from saelens_lite.chat.kept import Asked, KeptAnswers
from saelens_lite.chat.pace import Pace
from saelens_lite.chat.waits import wait_before
from saelens_lite.errors import BudgetReachedError, ChatUnreachableError

CONNECTS = 3  # attempts to connect to an endpoint that has never answered
IN_A_ROW = 10  # questions that fail one after another before the endpoint counts as unreachable
GRACE = 2.0  # seconds that requests in progress get after Ctrl-C
POLL = 0.02


class Waiting(dict[str, tuple[Asked, Question, Size]]):
    """Questions without an answer, by key: all that decides the answer, the question, and the estimate."""


class Call:
    """The state of a call. `answers` grows while it runs; `error` ends it early.

    `has_replied` is true if the model is known to have answered before, so that the endpoint and the name are right.
    """

    def __init__(
        self,
        connection: Connection,
        budget: Budget,
        kept: KeptAnswers,
        waiting: Waiting,
        advance: Callable,
        has_replied: bool = False,
    ):
        self.connection, self.budget, self.kept, self.advance = connection, budget, kept, advance
        self.config = connection.config
        self.waiting, self._todo = waiting, deque(waiting)
        self.answers: dict[str, Answer] = {}
        self.error: Exception | None = None
        self._has_answered = False  # the endpoint, with any status
        self._has_replied = has_replied  # with a reply of the model, also in an earlier call
        self._pace = Pace(self.config.concurrency, self.config.timeout)
        self._n_lost_in_a_row = 0
        self._open_at = 0.0  # no request before this moment, as the server demands
        self._is_stopped = False  # by Ctrl-C
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self) -> Mapping[str, Answer]:
        """Ask all questions and return the answers by key. After an error or Ctrl-C, `answers` has those until then.

        The event loop has its own thread, because a notebook already runs one, and so that Ctrl-C interrupts only the wait.
        """
        raised: list[BaseException] = []
        ended = threading.Event()  # Thread.join does not wait on after Ctrl-C

        def work() -> None:
            try:
                asyncio.run(self._run())
            except asyncio.CancelledError:
                pass
            except BaseException as error:
                raised.append(error)
            finally:
                ended.set()

        threading.Thread(target=work, name="saelens_lite chat", daemon=True).start()
        try:
            _wait_for(ended)
        except KeyboardInterrupt:
            self._stop(GRACE)
            try:
                _wait_for(ended)
            except KeyboardInterrupt:
                self._stop(0.0)
                _wait_for(ended)
            raise
        if raised or self.error:
            raise raised[0] if raised else self.error  # type: ignore[misc]
        return self.answers

    def _stop(self, grace: float) -> None:
        """Send nothing more, and give requests in progress some seconds."""

        def stop() -> None:
            self._closing.set()
            self._loop.call_later(grace, lambda: [task.cancel() for task in self._workers])  # type: ignore[union-attr]

        self._is_stopped = True
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop has just ended
                self._loop.call_soon_threadsafe(stop)

    async def _run(self) -> None:
        self._closing = asyncio.Event()
        async with self.connection:
            n = min(self.config.concurrency, len(self._todo))
            self._workers = [asyncio.create_task(self._work()) for _ in range(n)]
            self._loop = asyncio.get_running_loop()
            if self._is_stopped:
                self._closing.set()
            await asyncio.gather(*self._workers)

    async def _work(self) -> None:
        while self._todo and not self._closing.is_set():
            key = self._todo.popleft()
            asked, question, size = self.waiting[key]
            try:
                answer = self.kept.get(key)  # of another process, meanwhile
                answer = answer or await self._ask(asked, question, size)
                if answer is None:  # stopped
                    return
                self.answers[key] = answer
                self.advance(1)
            except Exception as error:  # also an unexpected one: the replies in progress are paid, so they are kept first
                self.error = self.error or error
                self._closing.set()
                return

    async def _ask(self, asked: Asked, question: Question, size: Size) -> Answer | None:
        """Return the answer to a question after as many attempts as the settings allow; None if the call is stopped."""
        n, lost = 0, LostReply("", "silent")
        while n <= self.config.retries:
            if n and not await self._wait(self._pause(n - 1, lost)):
                return None
            if not await self._wait(max(0.0, self._open_at - time.monotonic())):
                return None
            reserved = await self._reserve(size)
            if reserved is None:
                return None
            used, estimated, began = Size(0, 0), None, time.monotonic()
            self._pace.begin()
            try:
                answer = await self.connection.answer(question, size.n_input)
                used, estimated = Size(answer.n_input, answer.n_output), size.n_input
                self._has_answered = self._has_replied = True
                self._n_lost_in_a_row = 0
                self._pace.answered(began)
                self.kept.put(asked, answer)
                return answer
            except UnfitQuestion as error:
                self._has_answered = self._has_replied = True
                return Answer(None, str(error))
            except LostReply as error:
                lost = error
                used = reserved if lost.may_be_paid else used
                self._has_answered |= lost.is_answered
                n += 1
                if lost.is_late:
                    self._pace.timed_out(began)
                if lost.is_unconnected and not self._has_answered and n >= CONNECTS:
                    break
            except asyncio.CancelledError:
                used = reserved
                raise
            finally:
                self._pace.end()
                self.budget.settle(reserved, used, estimated)
            if self._closing.is_set():
                return None
        self._n_lost_in_a_row += 1
        if self._is_gone(lost):
            advice = "check the address, the name of the model, and the server"
            if lost.is_late:
                advice = f"raise the timeout, or {advice}"
            raise ChatUnreachableError(
                f"{self.config.base_url} does not answer questions to {self.config.model} as it should: {lost}; {advice}"
            )
        return Answer(None, f"{lost}, {n} times" if n > 1 else str(lost))

    def _is_gone(self, lost: LostReply) -> bool:
        """Return whether the endpoint counts as unreachable after a question has failed."""
        if not self._has_answered and (lost.is_unconnected or not self._has_replied):
            return True
        return self._n_lost_in_a_row >= (IN_A_ROW if self._has_replied else min(IN_A_ROW, len(self.waiting)))

    def _pause(self, n: int, lost: LostReply) -> float:
        """Return the wait before a repetition. A wait that the server demands holds for all questions."""
        if lost.after is not None:
            if lost.after > self.config.longest_wait:
                raise ChatUnreachableError(
                    f"{self.config.base_url} demands a wait of {lost.after:,.0f} seconds ({lost}), more than longest_wait = "
                    f"{self.config.longest_wait:g}"
                )
            self._open_at = max(self._open_at, time.monotonic() + lost.after)
        return wait_before(n, self.config.backoff, self.config.longest_wait, lost.after)

    async def _reserve(self, size: Size) -> Size | None:
        """Wait until a request may begin, and reserve the tokens of its question; None if the call is stopped.

        Raises:
            BudgetReachedError: they would pass a limit, also when no request is in progress.
        """
        while not self._closing.is_set():
            if self._pace.is_full:
                await asyncio.sleep(POLL)
                continue
            if reserved := self.budget.reserve(size):
                return reserved
            if not self.budget.in_progress:
                limit = self.budget.limit_passed_by(self.budget.scaled(size))
                raise BudgetReachedError(f"the next question could pass {limit}; raise that to ask the others")
            await asyncio.sleep(POLL)
        return None

    async def _wait(self, seconds: float) -> bool:
        """Wait, and return whether the call still runs."""
        if seconds <= 0:
            return not self._closing.is_set()
        try:
            await asyncio.wait_for(self._closing.wait(), seconds)
        except TimeoutError:
            return True
        return False


def _wait_for(event: threading.Event) -> None:
    """Wait for an event. On Windows, Ctrl-C interrupts only waits with a limit."""
    while not event.wait(0.2):
        pass
