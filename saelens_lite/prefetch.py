"""Prefetching: run an iterator in its own thread, a few items ahead of the reader."""

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

T = TypeVar("T")


@contextmanager
def prefetched(items: Iterable[T], depth: int = 2) -> Iterator[Iterator[T]]:
    """Yield an iterator over the same items, with at most `depth` of them computed in advance.

    An error of the iterator is raised at the next item. At the end of the block the thread finishes its current item, closes
    the iterator and stops.
    """
    buffer = _Ahead(items, depth)
    try:
        yield buffer
    finally:
        buffer.stop()


class _Ahead(Generic[T]):
    """The queue of items and the thread that fills it. `_changed` guards the state."""

    def __init__(self, items: Iterable[T], depth: int):
        self._items, self._depth = items, depth
        self._ready: deque[T] = deque()
        self._error: BaseException | None = None
        self._ended = self._stopped = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="saelens-lite-prefetch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._fill(iter(self._items))
        except BaseException as error:  # passed on to the reader
            self._error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _fill(self, iterator: Iterator[T]) -> None:
        try:
            while self._wait_for_room():
                try:
                    item = next(iterator)
                except StopIteration:
                    return
                with self._changed:
                    self._ready.append(item)
                    self._changed.notify_all()
        finally:
            if hasattr(iterator, "close"):
                iterator.close()

    def _wait_for_room(self) -> bool:
        """Wait until the queue has room and return True, or return False if the reader has stopped."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or len(self._ready) < self._depth)
            return not self._stopped

    def __iter__(self) -> "_Ahead[T]":
        return self

    def __next__(self) -> T:
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._ended)
            if self._ready:
                self._changed.notify_all()
                return self._ready.popleft()
        if self._error is not None:
            raise self._error
        raise StopIteration

    def stop(self) -> None:
        """Stop the thread and wait for its end."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()
