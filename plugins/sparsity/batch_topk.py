"""Keep the k·n largest pre-activations of a batch of n tokens. Easy tokens get fewer latents, hard tokens more.

    training:   f = BatchTopK(ReLU(h))       L = ‖x − x̂‖² + α · ‖e − ê‖²
    inference:  f = h · 1[h > θ]             θ = E[smallest positive entry of f in a training batch]

e = x − x̂ is a constant; ê decodes the aux_k largest dead latents of the token. The expectation is a running mean, so that θ
fits the weights at the end of training.
"""

import torch
from pydantic import Field

from saelens_lite.sparsity import (
    DeadLatentsConfig,
    PublishedForm,
    Sparsity,
    Step,
    Support,
    dead_latents_explain,
    largest_positive,
    support_above,
)


class BatchTopK(Sparsity):
    """The k largest positive pre-activations per token on average; after training, a threshold."""

    paper = "Bussmann et al. 2024, BatchTopK sparse autoencoders, arXiv:2412.06410"
    homogeneous = False  # scaling one pre-activation may push another out of the largest
    unit_decoder = True
    shardable = True

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
        return largest_positive(pre, self.config.k) if self.training else support_above(pre, self.threshold)

    def values(self, pre, latent):
        return pre.relu()

    def losses(self, step: Step):
        return dead_latents_explain(step, self.config)

    def observe(self, step: Step) -> None:
        value = step.codes.value
        smallest = step.min(torch.where(value > 0, value, torch.inf))
        kept = torch.where(self.threshold > 0, self.config.threshold_decay, 0.0)
        moved = self.threshold.lerp(smallest, 1 - kept)
        self.threshold.copy_(torch.where(smallest.isinf(), self.threshold, moved))

    def inference_form(self) -> PublishedForm:
        return PublishedForm("jumprelu", {"threshold": self.threshold})

    @classmethod
    def from_published(cls, tensors, options):
        tensors, options = super().from_published(tensors, options)
        return {name: value.clamp(min=0) if name == "threshold" else value for name, value in tensors.items()}, options
