"""Conversion of a state dict, with our names, to parameters of a dictionary: float32, finite, with axes in our order."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from saelens_lite.errors import NonFiniteError, ShapeError


def float_tensors(values: Mapping[str, Any]) -> dict[str, Tensor]:
    """Copy tensors, arrays and numbers to float32 tensors. None entries are left out.

    Raises:
        ShapeError: a value is of another type.
        NonFiniteError: a value holds NaN or infinity.
    """
    tensors = {}
    for name, value in values.items():
        if value is None:
            continue
        try:
            tensor = torch.as_tensor(value).detach()
        except (TypeError, ValueError, RuntimeError):
            raise ShapeError(f"{name} is a {type(value).__name__}; expected a tensor or an array") from None
        if tensor.is_complex() or tensor.dtype == torch.bool or tensor.layout != torch.strided:
            raise ShapeError(f"{name} is a {tensor.layout} tensor of {tensor.dtype}; expected a dense one of real numbers")
        tensors[name] = tensor.to("cpu", torch.float32, copy=True)
        if not torch.isfinite(tensors[name]).all():
            raise NonFiniteError(f"{name} holds NaN or infinity (as float32)")
    return tensors


def sizes_of(tensors: Mapping[str, Tensor], *, transcoder: bool) -> dict[str, int]:
    """Return d_in, d_sae and d_out.

    d_sae is the length of b_enc, else of another vector over latents, else the size that b_dec does not have, else the larger
    one.

    Raises:
        ShapeError: the tensors contradict each other. The message names the wrong one.
    """
    W_dec = _matrix("W_dec", tensors["W_dec"])
    W_enc = _matrix("W_enc", tensors["W_enc"]) if "W_enc" in tensors else W_dec
    shared = [size for size in W_enc.shape if size in W_dec.shape]
    if not shared:
        raise ShapeError(
            f"W_enc has shape {tuple(W_enc.shape)} and W_dec {tuple(W_dec.shape)}; expected the number of latents in both"
        )
    matrices = {"W_enc", "W_dec", "W_skip", "b_dec"}
    latents = {name: len(tensor) for name, tensor in tensors.items() if tensor.numel() > 1 and name not in matrices}
    if latents:
        name, d_sae = next(iter(latents.items()))
        if d_sae not in shared:
            raise ShapeError(f"{name} has {d_sae} entries; W_enc has shape {tuple(W_enc.shape)}, W_dec {tuple(W_dec.shape)}")
    elif "b_dec" in tensors and tensors["b_dec"].shape[:1] and len(tensors["b_dec"]) in W_dec.shape:
        d_sae = _other(W_dec, len(tensors["b_dec"]))
    else:
        d_sae = max(shared)
    if d_sae not in shared:
        raise ShapeError(f"W_enc has shape {tuple(W_enc.shape)}; one of its sizes must be d_sae = {d_sae}")
    sizes = {"d_in": _other(W_enc, d_sae), "d_sae": d_sae, "d_out": _other(W_dec, d_sae)}
    if not transcoder and sizes["d_in"] != sizes["d_out"]:
        raise ShapeError(
            f"W_enc has shape {tuple(W_enc.shape)} and W_dec {tuple(W_dec.shape)}: with {d_sae} latents the input has "
            f"{sizes['d_in']} entries and the output {sizes['d_out']}; give writes= if the output is of another hook"
        )
    if min(sizes.values()) < 1:
        raise ShapeError(f"W_enc has shape {tuple(W_enc.shape)} and W_dec {tuple(W_dec.shape)}; expected no empty tensor")
    if d_sae in (sizes["d_in"], sizes["d_out"]):
        logging.getLogger(__name__).warning(
            "a square matrix does not show its axes: W_enc is taken as [d_in d_sae], W_dec as [d_sae d_out]"
        )
    return sizes


def in_order(name: str, tensor: Tensor, *wanted: int) -> Tensor:
    """Return a parameter in the wanted shape: unchanged, transposed, or a repeated number.

    Raises:
        ShapeError: the tensor has another shape.
    """
    if tuple(tensor.shape) == wanted:
        return tensor
    if len(wanted) == 2 and tuple(tensor.shape) == wanted[::-1]:
        return tensor.T
    if len(wanted) == 1 and tensor.numel() == 1:
        return tensor.reshape(1).expand(wanted)
    turned = " or the other way round" if len(wanted) == 2 else ""
    raise ShapeError(f"{name} has shape {tuple(tensor.shape)}; expected {wanted}{turned}")


def _matrix(name: str, tensor: Tensor) -> Tensor:
    if tensor.ndim != 2:
        raise ShapeError(f"{name} has shape {tuple(tensor.shape)}; expected a matrix")
    return tensor


def _other(matrix: Tensor, size: int) -> int:
    """Return the size of the axis that is not `size` long, or `size` for a square matrix."""
    rows, columns = matrix.shape
    return columns if rows == size else rows
