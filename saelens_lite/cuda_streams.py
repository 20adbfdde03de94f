"""CUDA streams: copies and passes of a model that run beside other work of the same GPU.

On a device without streams these functions work at once, so that callers need no second path.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

T = TypeVar("T")


@runtime_checkable
class Event(Protocol):
    """The end of the work that was queued before the event; `torch.cuda.Event`."""

    def synchronize(self) -> None: ...


class SideStream:
    """A queue of work on a device, beside the queue that is current. Only CUDA has one; elsewhere work is done at once.

    The work begins when the work is done that is in the current queue when this is made.
    """

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))

    @contextmanager
    def queue(self, *, after_current: bool = False) -> Iterator[None]:
        """Queue the work of the block here, if asked after the work that is in the current queue now."""
        if self._stream is None:
            yield
            return
        if after_current:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            yield

    def mark(self) -> Event | None:
        """Return an event that happens when the work queued here so far is done, or None if it is done already."""
        return None if self._stream is None else self._stream.record_event()

    def marked(self, items: Iterable[T]) -> Iterator[tuple[T, Event | None]]:
        """Queue the work of an iterator here, and yield each item with the event that completes it."""
        with self.queue():
            for item in items:
                yield item, self.mark()

    def lend(self, tensors: Iterable[Tensor]) -> None:
        """Keep the memory of tensors of the current queue until the work is done that is queued here when they are deleted."""
        if self._stream is not None:
            for x in tensors:
                x.record_stream(self._stream)

    def take(self, tensors: Iterable[Tensor], mark: Event | None) -> None:
        """Let the current queue use tensors that were computed here, after the event `mark`."""
        if self._stream is not None and mark is not None:
            current = torch.cuda.current_stream(self._stream.device)
            current.wait_event(mark)
            for x in tensors:
                x.record_stream(current)


def to_host(x: Tensor) -> Tensor:
    """Return x on the CPU. From CUDA the copy is only queued, on the current stream; an event tells when it is complete."""
    if x.device.type != "cuda":
        return x.cpu()
    x.record_stream(torch.cuda.current_stream(x.device))
    return torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, non_blocking=True)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Return x on a device. From the CPU to CUDA the copy is only queued, on the current stream."""
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    return (x if x.is_pinned() else x.pin_memory()).to(device, non_blocking=True)


def uploaded(batches: Iterator[dict[str, Tensor]], device: torch.device) -> Iterator[dict[str, Tensor]]:
    """Return batches on a CUDA device, uploaded beside its other work. For other devices, return the same iterator."""
    return _upload(batches, device) if device.type == "cuda" else batches


def _upload(batches: Iterator[dict[str, Tensor]], device: torch.device) -> Iterator[dict[str, Tensor]]:
    side = SideStream(device)
    try:
        for batch in batches:
            if all(x.device == device for x in batch.values()):
                yield batch
                continue
            with side.queue(after_current=any(x.device.type != "cpu" for x in batch.values())):
                there = {name: to_device(x, device) for name, x in batch.items()}
            side.take(there.values(), side.mark())
            yield there
    finally:
        getattr(batches, "close", lambda: None)()
