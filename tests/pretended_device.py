"""A device that is pretended: an accelerator without float64, as MPS is one, on computers that have none.

Tensors that are there say so (`device.type` is KIND), and only what moves them to the CPU gives their numbers. An operation
that would make a tensor of float64 there raises TypeError, with the words of torch on MPS.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from saelens_lite import devices

KIND = "meta"  # torch has no other device without memory that any build of it knows


class _There(Tensor):
    """A tensor on the pretended device; `inner` has its numbers."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> "_There":
        return Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype, device=KIND
        )

    def __init__(self, inner: Tensor):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Return an operation on the numbers; its result is where it was asked for, else where its arguments are."""
    there = any(isinstance(x, _There) for x in tree_leaves((args, kwargs)))
    if kwargs.get("device") is not None:
        there = torch.device(kwargs["device"]).type == KIND
        kwargs = {**kwargs, "device": torch.device("cpu")}

    def wrapped(x: Any) -> Any:
        if not there or not isinstance(x, Tensor):
            return x
        if x.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")
        return _There(x)

    args, kwargs = tree_map(lambda x: x.inner if isinstance(x, _There) else x, (args, kwargs))
    return tree_map(wrapped, function(*args, **kwargs))


class _Pretending(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


@contextmanager
def without_float64() -> Iterator[str]:
    """Provide such a device in the block and yield its name."""
    with pytest.MonkeyPatch.context() as patch, _Pretending():
        patch.setattr(devices, "WITHOUT_FLOAT64", frozenset({KIND}))
        yield KIND
