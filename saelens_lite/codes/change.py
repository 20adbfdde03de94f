"""Edits of codes and their effect on the reconstruction. Only the latents that an edit names are read."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelens_lite.codes import SparseCodes


@runtime_checkable
class CodeChange(Protocol):
    """code ← gain · code + offset, for some latents."""

    @property
    def latents(self) -> tuple[int, ...]: ...

    @property
    def gain(self) -> float: ...

    @property
    def offset(self) -> float: ...


def scaled(codes: SparseCodes, edits: Sequence[CodeChange], at: Sequence[Bool[Tensor, "*_shape"]]) -> SparseCodes:
    """Return (Π gain − 1) · code for the codes that fire: the change by the gains of the edits, applied in order."""
    factor = torch.ones_like(codes.value)
    for edit, here in zip(edits, at, strict=True):
        if edit.gain != 1:
            hit = torch.isin(codes.latent, _indices(edit.latents, factor)) & here.expand(codes.shape).reshape(-1)[codes.row]
            factor = torch.where(hit, edit.gain * factor, factor)
    return codes._replace(value=(factor - 1) * codes.value).without_zeros()


def offsets(
    edits: Sequence[CodeChange], at: Sequence[Bool[Tensor, "*shape"]], W_dec: Float[Tensor, "d_sae d"]
) -> Float[Tensor, "*shape d"]:
    """Return Σ offset · W_dec[latent]: the change by the offsets of the edits, applied in order. Independent of the
    codes.
    """
    latents = sorted({latent for edit in edits if edit.offset for latent in edit.latents})
    index = _indices(latents, W_dec)
    total = W_dec.new_zeros(*at[0].shape, len(latents))
    for edit, here in zip(edits, at, strict=True):
        hit = here[..., None] & torch.isin(index, _indices(edit.latents, W_dec))
        total = torch.where(hit, edit.gain * total + edit.offset, total)
    return total @ W_dec.index_select(0, index)


def _indices(latents: Sequence[int], like: Tensor) -> Int[Tensor, " n"]:
    return torch.tensor(latents, dtype=torch.long, device=like.device)
