"""Conversion of activations from arrays, DataFrames and lists to tensors; numbers as JSON can hold them."""

import math
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from saelens_lite.errors import ShapeError

Name = TypeVar("Name")
ArrayLike = Any  # a tensor, a numpy array, a DataFrame, or a list or tuple of numbers or of these


def as_tensor(x: ArrayLike, name: str = "x", device: torch.device | None = None) -> Tensor:
    """Return activations as a tensor. Tensors stay unchanged; everything else is copied to `device` (default: the CPU).

    Arrays keep their dtype, lists of Python numbers become float32, and lists of tensors are stacked on their device.

    Raises:
        ShapeError: x holds something other than numbers, its rows differ in length, or its type is unknown.
    """
    if isinstance(x, Tensor):
        return x
    if isinstance(x, list | tuple) and x and all(isinstance(row, Tensor) for row in x):
        try:
            return torch.stack(tuple(x))
        except RuntimeError as error:
            raise ShapeError(f"{name} is {described(x)}, tensors that do not fit together: {error}") from None
    array = _numbers(x, name)
    if isinstance(x, list | tuple) and not _holds_arrays(x):
        array = array.astype(np.float32)
    array = np.array(
        array, dtype=array.dtype.newbyteorder("="), order="C"
    )  # torch accepts only native byte order and positive strides
    try:
        return torch.from_numpy(array).to(device)
    except TypeError as error:  # torch lacks some unsigned types, and MPS lacks float64
        raise ShapeError(f"{name} is {described(x)}, which torch cannot hold: {error}") from None


def not_finite(tensors: Mapping[Name, Tensor]) -> list[Name]:
    """Return the names of the tensors that hold NaN or infinity."""
    return [name for name, x in tensors.items() if x.is_floating_point() and not bool(torch.isfinite(x).all())]


def plain(values: Any) -> dict[str, Any]:
    """Return a named tuple, and those in it, as plain data; None stands for NaN and infinity, which JSON does not have."""
    return {key: _plain_value(value) for key, value in values._asdict().items()}


def _plain_value(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return plain(value) if hasattr(value, "_asdict") else value


def _numbers(x: ArrayLike, name: str) -> np.ndarray:
    """Return an array of numbers."""
    wanted = "expected a tensor of activations, an array of numpy, a DataFrame, or a list of rows of numbers"
    if isinstance(x, Mapping):
        raise ShapeError(f"{name} is {described(x)}; {wanted}: give one of its values")
    if not (isinstance(x, np.ndarray | list | tuple) or hasattr(x, "__array__")):
        raise ShapeError(f"{name} is {described(x)}; {wanted}")
    try:
        array = np.asarray(x)
    except Exception as error:  # numpy raises ValueError for rows of different lengths; other libraries raise other errors
        raise ShapeError(f"{name} is {described(x)}, not an array of numbers: {error}; {wanted}") from None
    if array.dtype.kind not in "fiub":
        raise ShapeError(f"{name} is {described(x)}, which holds {array.dtype}, not real numbers; {wanted}")
    return array


def _holds_arrays(x: list | tuple) -> bool:
    """Return whether the innermost lists hold arrays (with a dtype) instead of Python numbers."""
    while isinstance(x, list | tuple) and x:
        x = x[0]
    return hasattr(x, "dtype")


def described(x: Any) -> str:
    """Describe a value for a message: its type, and its shape and dtype if it has them."""
    facts = [f"{key} {tuple(value) if key == 'shape' else value}" for key in ("shape", "dtype") if (value := _fact(x, key))]
    if isinstance(x, list | tuple):
        facts = [f"{len(x):,} entries"]
    elif isinstance(x, Mapping):
        facts = [f"keys {', '.join(map(repr, list(x)[:3]))}"]
    name = f"{type(x).__module__.partition('.')[0]}.{type(x).__qualname__}".removeprefix("builtins.")
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}" + (f" of {', '.join(facts)}" if facts else "")


def _fact(x: Any, key: str) -> Any:
    """Return an attribute, or None if it is missing or a method."""
    value = getattr(x, key, None)
    return None if callable(value) else value
