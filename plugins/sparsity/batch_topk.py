"""Keep the k·n largest pre-activations of a batch of n tokens. Easy tokens get fewer latents, hard tokens more.

    training:   f = BatchTopK(ReLU(h))       L = ‖x − x̂‖² + α · ‖e − ê‖²
    inference:  f = h · 1[h > θ]             θ = E[smallest positive entry of f in a training batch]

e = x − x̂ is a constant; ê decodes the aux_k largest dead latents of the token. The expectation is a running mean, so that θ
fits the weights at the end of training.
"""

import torch
from pydantic import Field

from saelens_lite.codes import gpu
from saelens_lite.sparsity import (
    DeadLatentsConfig,
    PublishedForm,
    Sparsity,
    Step,
    Support,
    dead_latents_explain,
    support_above,
    support_of_mask,
)

SAMPLED_ROWS = 64  # rows that give the first bound in the search for the largest entries


class BatchTopK(Sparsity):
    """The k largest positive pre-activations per token on average; after training, a threshold."""

    paper = "Bussmann et al. 2024, BatchTopK sparse autoencoders, arXiv:2412.06410"
    homogeneous = False  # scaling one pre-activation may push another out of the largest
    unit_decoder = True

    class Config(DeadLatentsConfig):
        k: int = Field(32, gt=0, description="Latents kept per token, on average over a batch.")
        threshold_decay: float = Field(
            0.8, ge=0, lt=1, description="Weight of the old value in the running mean of θ, per step."
        )

    config: Config

    def __init__(self, config: Config, *, d_in: int, d_sae: int):
        super().__init__(config, d_in=d_in, d_sae=d_sae)
        self.register_buffer("threshold", torch.zeros(d_sae))  # θ, equal for all latents; 0 before the first step

    def activation(self, pre):
        chosen = self.support(pre.detach())
        kept = torch.zeros_like(pre, dtype=torch.bool)
        kept[chosen.row, chosen.latent] = True
        return (pre * kept).relu()

    def support(self, pre) -> Support:
        return largest_positive(pre, self.config.k * len(pre)) if self.training else support_above(pre, self.threshold)

    def values(self, pre, latent):
        return pre.relu()

    def losses(self, step: Step):
        return dead_latents_explain(step, self.config)

    def observe(self, step: Step) -> None:
        value = step.codes.value
        if len(value):
            smallest = torch.where(value > 0, value, torch.inf).min()
            kept = torch.where(self.threshold > 0, self.config.threshold_decay, 0.0)
            moved = self.threshold.lerp(smallest, 1 - kept)
            self.threshold.copy_(torch.where(smallest.isinf(), self.threshold, moved))

    def inference_form(self) -> PublishedForm:
        return PublishedForm("jumprelu", {"threshold": self.threshold})

    @classmethod
    def from_published(cls, tensors, options):
        tensors, options = super().from_published(tensors, options)
        return {name: value.clamp(min=0) if name == "threshold" else value for name, value in tensors.items()}, options


def largest_positive(pre, n: int) -> Support:
    """Return the n largest positive entries of a whole batch, or all if there are fewer. Of equal entries, the first.

    On a GPU, if there are fewer, the largest of the others are there too, because their number is known without waiting.
    """
    if kernels := gpu.kernels(pre):
        return Support(*kernels.n_largest(pre, min(n, pre.numel())))
    candidates = support_of_mask(pre > _lower_bound(pre, n))
    if len(candidates.latent) < n:
        candidates = support_of_mask(pre > 0)
    value = pre[candidates.row, candidates.latent]
    if len(value) <= n:
        return candidates
    nth = value.kthvalue(len(value) - n + 1).values
    keep = value > nth
    keep[(value == nth).nonzero().squeeze(1)[: n - int(keep.sum())]] = True
    return candidates.where(keep)


def _lower_bound(pre, n: int):
    """Return a number ≥ 0 that about 2n entries exceed, estimated from some rows, because sorting a whole batch is slow."""
    sample = pre[:: max(1, len(pre) // SAMPLED_ROWS)].flatten()
    above = 2 * n * len(sample) // pre.numel()
    return sample.topk(min(above, len(sample) - 1) + 1, sorted=True).values[-1].clamp(min=0)
