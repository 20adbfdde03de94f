"""Penalise ReLU codes by a p-norm whose p falls in training, from L1 (easy to minimise) towards counting latents.

    f = ReLU(h)          L = ‖x − x̂‖² + λ_t · Σ_i f_i^p

p is 1 at first and then falls linearly to p_end. When p changes to p', λ_t is multiplied by Σ f^p / Σ f^p' over the batch, so
that the penalty keeps its value. Decoder rows are unit vectors.
"""

import torch
from pydantic import Field

from saelens_lite.sparsity import PenaltyConfig, PublishedForm, Sparsity, Step, Support, root_of_batch, support_above


class PAnneal(Sparsity):
    """ReLU codes, penalised by λ Σ f^p with p falling from 1 to p_end."""

    paper = (
        "Karvonen et al. 2024, Measuring progress in dictionary learning for language model interpretability, arXiv:2408.00113"
    )
    row_wise = True
    shardable = True
    lr_factor = staticmethod(root_of_batch)
    unit_decoder = True

    class Config(PenaltyConfig):
        usual_coefficient = 0.5
        p_end: float = Field(0.2, gt=0, le=1, description="Exponent at the end of training.")
        start: float = Field(0.25, ge=0, lt=1, description="Share of training after which the exponent begins to fall.")

    config: Config

    def __init__(self, config: Config, *, d_in: int, d_sae: int):
        super().__init__(config, d_in=d_in, d_sae=d_sae)
        self.register_buffer("p", torch.tensor(1.0))
        self.register_buffer("growth", torch.tensor(1.0))  # λ_t / λ

    def activation(self, pre):
        return pre.relu()

    def support(self, pre) -> Support:
        return support_above(pre, 0.0)

    def values(self, pre, latent):
        return pre.relu()

    def losses(self, step: Step):
        return {"lp": step.coefficient * self.growth * step.mean(powers(step.codes.value, self.p))}

    def observe(self, step: Step) -> None:
        if step.progress <= self.config.start:
            return
        annealed = (step.progress - self.config.start) / (1 - self.config.start)
        p = 1 - annealed * (1 - self.config.p_end)
        before, after = (step.sum(powers(step.codes.value, exponent)) for exponent in (self.p, p))
        self.growth.mul_(torch.where(after > 0, before / after, 1.0))
        self.p.fill_(p)

    def inference_form(self) -> PublishedForm:
        return PublishedForm("standard")


def powers(value, p):
    """Return f^p for each code."""
    return (value > 0) * value.clamp_min(1e-12).pow(p)  # the slope at 0 is infinite for p < 1
