"""What the final norm of a model does, found by trying it out.

    norm(x) = scale ⊙ (x − m) / √(mean (x − m)² + ε) + bias          m = mean x, or 0

transformers has dozens of classes for it, which multiply by their weight, by 1 + weight or by nothing, and name ε as they like.
"""

import copy
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

PROBE = 2.0**40  # ε is nothing beside its square, which float32 still holds


class FinalNorm(NamedTuple):
    """A norm in float64 on the CPU: what it multiplies by, and whether it takes the mean off first."""

    module: nn.Module
    scale: Float[Tensor, " d"]
    centres: bool

    @classmethod
    @torch.no_grad()
    def of(cls, module: nn.Module, d: int) -> "FinalNorm":
        """What a norm of d numbers does."""
        exact = copy.deepcopy(module).cpu().double()
        x = torch.full((d,), PROBE, dtype=torch.float64)
        x[1::2] = -PROBE
        normed = _odd_part(exact, x)
        centres = bool((_odd_part(exact, x + PROBE) - normed).abs().max() <= 1e-3 * normed.abs().max())
        centred = x - x.mean() if centres else x
        return cls(exact, normed * centred.square().mean().sqrt() / centred, centres)

    @torch.no_grad()
    def divisor(self, x: Float[Tensor, "*shape d"]) -> Float[Tensor, "*shape"]:
        """√(mean (x − m)² + ε), float64; 1 where x − m is zero."""
        x = x.cpu().double()
        scaled = self.scale * (x - x.mean(-1, keepdim=True) if self.centres else x)
        square, product = scaled.square().sum(-1), (scaled * _odd_part(self.module, x)).sum(-1)
        return torch.where(square > 0, square / product, 1)


def _odd_part(norm: nn.Module, x: Float[Tensor, "*shape d"]) -> Float[Tensor, "*shape d"]:
    """What a norm gives without its bias. Hooks on it, such as those of a splice in force, are left out."""
    return (norm.forward(x) - norm.forward(-x)) / 2
