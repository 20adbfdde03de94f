"""The first step of a training: the untrained dictionary gets thresholds and a scale that fit the first batch."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from saelens_lite.codes import parallel
from saelens_lite.devices import wide
from saelens_lite.dictionary import Dictionary

START_ROWS, START_NUMBERS = 1024, 2**24  # rows and pre-activations that give the first thresholds, at most
MAX_SCALINGS, SAME = 12, 1e-3  # for scaling the untrained encoder


@torch.no_grad()
def fire_rarely_(d: Dictionary, x: Float[Tensor, "batch d_in"], target_l0: float) -> None:
    """Let each latent of the untrained dictionary fire only where it fires most, so that L0 is the target from the start.

    Else half of the latents of a ReLU rule would fire, and a short training would end before the penalty has silenced them.
    The threshold of a latent is the same number of standard deviations above the mean of its pre-activations.
    """
    h = d.pre(x[: max(64, min(START_ROWS, START_NUMBERS // d.d_sae))])
    std, mean = torch.std_mean(h, 0, correction=0)
    n = min(len(h) * d.d_sae - 1, round(target_l0 * len(h)))
    z = parallel.bound_of_largest(((h - mean) / std.clamp_min(torch.finfo(std.dtype).tiny)).flatten(), n)
    d.rule.raise_thresholds_(d, mean + z * std)


@torch.no_grad()
def scale_encoder_(d: Dictionary, x: Float[Tensor, "batch d_in"], and_thresholds: bool) -> None:
    """Multiply W_enc by the number with which the untrained dictionary reconstructs x best.

    Random directions overlap, so their codes add up to more than x or, if rows of W_dec are short, to less. Without the
    factor, training needs hundreds of steps to correct this.

    Args:
        and_thresholds: multiply thresholds too, so that the same latents fire, if the rule is homogeneous.

    Source: Gao et al. 2024, arXiv:2406.04093, section A.1, who match norms instead.
    """
    centred, before = x - d.b_dec, d.W_enc.clone()

    def fit() -> tuple[float, float, float]:
        """Return the squared error, the best factor of the present codes, and the error with that factor."""
        part = wide(parallel.over_latents(d.encode(x).decode(d.W_dec)))
        exact = wide(centred)
        overlap, norm, total = (exact * part).sum(), part.square().sum(), exact.square().sum()
        return tuple((torch.stack([total - 2 * overlap + norm, overlap / norm, total - overlap**2 / norm])).tolist())

    least, factor, expected = fit()
    if not 0 < factor < math.inf:
        return
    if and_thresholds and d.rule.homogeneous:
        d.W_enc.mul_(factor)
        if d.b_enc is not None:
            d.b_enc.mul_(factor)
        d.rule.rescale_(torch.full_like(d.W_enc[0], factor))
        return
    d.W_enc.mul_(factor)
    if abs(fit()[0] - expected) <= SAME * expected:
        return
    d.W_enc.copy_(before)  # the factor also changes which latents fire, so approach it in smaller steps
    for _ in range(MAX_SCALINGS):
        d.W_enc.mul_(factor**0.5)
        error, factor, _ = fit()
        if not error < least:
            d.W_enc.copy_(before)
            return
        if abs(factor - 1) < SAME or not 0 < factor < math.inf:
            return
        least, before = error, d.W_enc.clone()
