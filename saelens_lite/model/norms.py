"""The scale, bias and centring of a norm, measured from its outputs.

    norm(x) = scale ⊙ (x − m) / √(mean (x − m)² + ε) + bias          m = mean x, or 0

transformers has dozens of classes for it. They multiply by their weight, by 1 + weight or by nothing, and their names of ε
differ.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saelens_lite.model.spread import whole_copy

PROBE = 2.0**40  # its square makes ε negligible and still fits in float32


class FinalNorm(NamedTuple):
    """A norm in float64 on the CPU: its module, its scale, and whether it subtracts the mean."""

    module: nn.Module
    scale: Float[Tensor, " d"]
    centres: bool

    @classmethod
    @torch.no_grad()
    def of(cls, module: nn.Module, d: int) -> "FinalNorm":
        """Measure a norm of d numbers."""
        exact = whole_copy(module).cpu().double()
        x = torch.full((d,), PROBE, dtype=torch.float64)
        x[1::2] = -PROBE
        normed = _odd_part(exact, x)
        centres = bool((_odd_part(exact, x + PROBE) - normed).abs().max() <= 1e-3 * normed.abs().max())
        centred = x - x.mean() if centres else x
        return cls(exact, normed * centred.square().mean().sqrt() / centred, centres)

    @torch.no_grad()
    def divisor(self, x: Float[Tensor, "*shape d"]) -> Float[Tensor, "*shape"]:
        """Return √(mean (x − m)² + ε) in float64; 1 where x − m is zero."""
        x = x.cpu().double()
        scaled = self.scale * (x - x.mean(-1, keepdim=True) if self.centres else x)
        square, product = scaled.square().sum(-1), (scaled * _odd_part(self.module, x)).sum(-1)
        return torch.where(square > 0, square / product, 1)


@torch.no_grad()
def scale_and_bias(module: nn.Module, d: int) -> tuple[Float[Tensor, " d"], Float[Tensor, " d"]] | None:
    """Return the scale and the bias of a norm of d numbers, in float64 on the CPU; None if the module is not such a norm."""
    norm = FinalNorm.of(module, d)
    x = torch.linspace(PROBE, 2 * PROBE, d, dtype=torch.float64)
    x[::2] *= -1
    once, twice = _odd_part(norm.module, x), _odd_part(norm.module, 2 * x)
    if not torch.isfinite(norm.scale).all() or (once - twice).abs().max() > 1e-3 * once.abs().max():
        return None
    return norm.scale, (norm.module.forward(x) + norm.module.forward(-x)) / 2


def _odd_part(norm: nn.Module, x: Float[Tensor, "*shape d"]) -> Float[Tensor, "*shape d"]:
    """Return a norm's output without its bias. Hooks on the norm, such as those of an active splice, do not act."""
    return (norm.forward(x) - norm.forward(-x)) / 2
