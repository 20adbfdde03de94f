"""Work done ahead of whoever needs it: an iterator that runs in a thread of its own, a few items in advance."""

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

T = TypeVar("T")


@contextmanager
def prefetched(items: Iterable[T], depth: int = 2) -> Iterator[Iterator[T]]:
    """Within the block, the same items in the same order, at most `depth` of them made before they are asked for.

    What the iterator raises is raised to whoever asks for the next item. The thread ends when the block does, however that
    comes about: it finishes the item at hand and closes the iterator.
    """
    buffer = _Ahead(items, depth)
    try:
        yield buffer
    finally:
        buffer.stop()


class _Ahead(Generic[T]):
    """The items in between, and the thread that makes them; `_changed` guards all of the state."""

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
        except BaseException as error:  # whatever it is, it belongs to the caller
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
        """True once there is room for another item, False when no more are wanted."""
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
        """Let the thread end, and wait until it has."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()
