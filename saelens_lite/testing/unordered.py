"""Detection of sums without a fixed order on a GPU, where one operation adds several floats to one cell by atomics."""

import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ALWAYS = ("embedding_dense_backward", "_embedding_bag_backward", "_embedding_bag_dense_backward", "index_reduce")
ORDERLESS = ("amax", "amin")  # reductions whose result does not depend on the order


class UnorderedSums(TorchDispatchMode):
    """A block that records in `noted` the operations that sum floats without a fixed order, with the line of the call.

    Operations of a backward pass have no line in the code and are recorded as "backward pass".
    """

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
        if _sums_floats(given) and _may_collide(name, given):
            self.noted.append(f"{name} ({_place()})")
        return func(*args, **kwargs)


def _sums_floats(given: dict[str, Any]) -> bool:
    """Return whether an argument is a tensor of floats."""
    return any(isinstance(value, Tensor) and value.is_floating_point() for value in given.values())


def _may_collide(name: str, given: dict[str, Any]) -> bool:
    """Return whether an operation may add several numbers to one cell without a fixed order on a GPU."""
    if name in ALWAYS:
        return True
    if name == "bincount":
        return given.get("weights") is not None
    if name == "index_add":
        return _repeats(given["index"].unsqueeze(0), 1)
    if name == "scatter_add" or (name == "scatter" and given.get("reduce") is not None):
        return _repeats(given["index"], given["dim"])
    if name == "scatter_reduce":
        return given["reduce"] not in ORDERLESS and _repeats(given["index"], given["dim"])
    if name == "put":
        return bool(given.get("accumulate")) and _repeats(given["index"].flatten().unsqueeze(0), 1)
    if name in ("index_put", "_index_put_impl", "_unsafe_index_put"):
        return bool(given.get("accumulate")) and _cells_repeat([index for index in given["indices"] if index is not None])
    return False


def _repeats(index: Tensor, dim: int) -> bool:
    """Return whether an index repeats along a dimension."""
    if not index.ndim or index.shape[dim] < 2:
        return False
    return bool((index.sort(dim=dim).values.diff(dim=dim) == 0).any())


def _cells_repeat(indices: list[Tensor]) -> bool:
    """Return whether the indices of several axes name a cell twice. A mask never does."""
    if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
        return False
    cells = torch.stack([index.flatten() for index in torch.broadcast_tensors(*indices)], dim=1)
    return len(cells.unique(dim=0)) < len(cells)


def _place() -> str:
    """Return the line that called an operation, or "backward pass"."""
    frames = [frame for frame in traceback.extract_stack() if frame.filename != __file__]
    if any(frame.filename.replace("\\", "/").endswith("torch/autograd/graph.py") for frame in frames):
        return "backward pass"
    own = [
        frame
        for frame in frames
        if not frame.filename.startswith("<") and not {"torch", "jaxtyping"} & {*Path(frame.filename).parts}
    ]
    return f"{Path(own[-1].filename).name}:{own[-1].lineno}"
