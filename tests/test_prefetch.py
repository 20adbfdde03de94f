"""An iterator that runs ahead in a thread: same items, bounded, and gone when the block ends, however it ends."""

import signal
import threading

import pytest

from saelens_lite.errors import TextError
from saelens_lite.prefetch import prefetched


@pytest.fixture(autouse=True)
def no_thread_left():
    """Every test ends with the threads it began with."""
    before = threading.enumerate()
    yield
    assert threading.enumerate() == before


@pytest.mark.parametrize("depth", [1, 2, 7])
def test_same_items_in_order(depth):
    with prefetched(range(50), depth) as items:
        assert list(items) == list(range(50))
        assert list(items) == []


def test_it_runs_ahead_but_not_far():
    taken, lead, made_ahead = 0, [], threading.Event()

    def source():
        for i in range(40):
            lead.append(i - taken)
            if i == 2:
                made_ahead.set()
            yield i

    with prefetched(source(), 3) as items:
        assert made_ahead.wait(60)  # before anything was asked for
        for _ in items:
            taken += 1
    assert 2 <= max(lead) <= 3  # a place is free once its item is taken, a moment before `taken` says so


def test_errors_come_to_the_caller():
    closed = []

    def source():
        try:
            yield from (1, 2)
            raise TextError("line 3 is bad")
        finally:
            closed.append(threading.current_thread())

    with prefetched(source()) as items, pytest.raises(TextError, match="line 3 is bad") as caught:
        list(items)
    assert "source" in [frame.name for frame in caught.traceback]
    assert len(closed) == 1
    assert closed[0] is not threading.main_thread()


def test_items_before_an_error_are_handed_out():
    def source():
        yield from (1, 2)
        raise TextError("bad")

    with prefetched(source(), 5) as items:
        assert [next(items), next(items)] == [1, 2]
        with pytest.raises(TextError):
            next(items)


@pytest.mark.parametrize("how", ["break", "error", "interrupt"])
def test_an_early_end_closes_the_source(how):
    closed = threading.Event()

    def endless():
        try:
            while True:
                yield 0
        finally:
            closed.set()

    def use():
        with prefetched(endless()) as items:
            for n, _ in enumerate(items):
                if n == 3:
                    if how == "break":
                        break
                    if how == "error":
                        raise RuntimeError("the model failed")
                    signal.raise_signal(signal.SIGINT)

    if how == "break":
        use()
    else:
        with pytest.raises(RuntimeError if how == "error" else KeyboardInterrupt):
            use()
    assert closed.is_set()


def test_an_interrupt_reaches_a_caller_who_waits():
    def slow():
        yield 1
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        yield 2

    def use():
        with prefetched(slow(), 1) as items:
            list(items)
            threading.Event().wait(60)  # the signal may arrive only now

    with pytest.raises(KeyboardInterrupt):
        use()


def test_never_asked():
    with prefetched(iter([1, 2, 3])):
        pass
