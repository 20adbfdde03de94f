"""Learn a threshold for each latent, directly from the number of firing latents.

    f = ReLU(h) · 1[h > θ]       L = ‖x − x̂‖² + S

where S is one of
    l0:         λ · Σ_i 1[h_i > θ_i]
    target_l0:  λ · d_in · (mean of Σ_i 1[h_i > θ_i] over the batch / target − 1)²
    tanh:       λ · Σ_i tanh(4 f_i ‖W_dec[i]‖) + μ · Σ_{i dead} ReLU(θ_i − h_i) ‖W_dec[i]‖

Neither f nor the count has a useful gradient in θ. Straight-through estimates replace it, with a step of width ε at θ:
    ∂1[h > θ]/∂θ = −K((h − θ)/ε) / ε       ∂f/∂θ = −θ K((h − θ)/ε) / ε       K(u) = 1[|u| < 1/2]
so that pairs just below θ count too. The learned parameter is ln θ. Decoder rows are unit vectors except with tanh.

Adam changes ln θ by about the learning rate per step. The paper starts from θ = ε = 0.001 and takes very many steps; in a short
training of a few hundred steps θ would hardly move. So ln θ is stored divided by threshold_speed, and θ starts higher.
Dictionaries of other tools keep θ itself as the parameter, because exp(ln θ) may differ in the last bit, and θ may be 0.
"""

import math
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from saelens_lite.sparsity import (
    USUAL_L0,
    PublishedForm,
    RuleConfig,
    Sparsity,
    Step,
    Support,
    support_above,
    support_of_indices,
)


class JumpReLU(Sparsity):
    """Pre-activations above a learned threshold, with a penalty on their number."""

    paper = (
        "Rajamanoharan et al. 2024, Jumping ahead: improving reconstruction fidelity with JumpReLU sparse autoencoders, "
        "arXiv:2407.14435; tanh: Conerly et al. 2025, January update of the Transformer Circuits thread"
    )
    row_wise = True
    shardable = True

    class Config(RuleConfig):
        penalty: Literal["l0", "target_l0", "tanh"] | None = Field(
            None, description="The penalty S; default: target_l0, or l0 if only a coefficient is given."
        )
        coefficient: float | None = Field(None, ge=0, description="λ, for activations of norm sqrt(d_in); default: 1.")
        target_l0: float | None = Field(
            None, gt=0, description="Latents per token that the penalty target_l0 aims at; default: 32."
        )
        threshold: float = Field(0.05, gt=0, description="Initial θ, for activations of norm 1; 0.001 in the paper.")
        bandwidth: float = Field(0.01, gt=0, description="ε, for activations of norm 1; 0.001 in the paper.")
        threshold_speed: float = Field(
            10.0, gt=0, description="Learning rate of ln θ relative to the other parameters; 1 in the paper."
        )
        dead_coefficient: float = Field(3e-6, ge=0, description="μ.")
        parameter: Literal["log", "plain"] = Field(
            "log", description="Stored parameter: ln θ / threshold_speed (log), or θ itself (plain)."
        )

        @model_validator(mode="after")
        def _aims_at_target(self):
            of_older_file = self.coefficient is not None and self.target_l0 == USUAL_L0
            if self.target_l0 is not None and not of_older_file and self.chosen_penalty != "target_l0":
                raise ValueError(
                    f"penalty {self.penalty} does not aim at target_l0; leave out penalty, or set coefficient instead"
                )
            return self

        @property
        def chosen_penalty(self) -> str:
            """The penalty, or what follows from the other options."""
            by_coefficient = self.coefficient is not None and self.target_l0 is None
            return self.penalty or ("l0" if by_coefficient else "target_l0")

    config: Config

    def __init__(self, config: Config, *, d_in: int, d_sae: int):
        super().__init__(config, d_in=d_in, d_sae=d_sae)
        threshold = config.threshold * d_in**0.5
        if config.parameter == "plain":
            self.plain_threshold = nn.Parameter(torch.full((d_sae,), threshold))
        else:
            self.scaled_log_threshold = nn.Parameter(torch.full((d_sae,), math.log(threshold) / config.threshold_speed))
        self.width = config.bandwidth * d_in**0.5

    @property
    def unit_decoder(self) -> bool:
        """True except with the penalty tanh, which weights codes by the norms."""
        return self.config.chosen_penalty != "tanh"

    @property
    def threshold(self):
        """θ [d_sae]; differentiable."""
        if self.config.parameter == "plain":
            return self.plain_threshold
        return (self.config.threshold_speed * self.scaled_log_threshold).exp()

    @property
    def target_l0(self) -> float | None:
        return (self.config.target_l0 or USUAL_L0) if self.config.chosen_penalty == "target_l0" else None

    def activation(self, pre):
        return pre.relu() * (pre > self.threshold)

    def support(self, pre) -> Support:
        below = self.width / 2 if self.training else 0.0
        return support_above(pre, self.threshold - below)

    def values(self, pre, latent):
        threshold = self.at(self.threshold, latent)
        return pre.relu() * (pre > threshold) + threshold.detach() * self._edge(pre, threshold)

    def losses(self, step: Step):
        weight = step.warmup * (1.0 if self.config.coefficient is None else self.config.coefficient)
        if self.config.chosen_penalty == "tanh":
            norms = self.at(step.decoder_norms, step.codes.latent)
            count = step.mean((4 * step.codes.value * norms).tanh())
            return {"tanh": weight * count, **self._lift_dead(step)}
        pre, threshold = step.pre_at(step.codes.support).detach(), self.at(self.threshold, step.codes.latent)
        l0 = step.mean((pre > threshold) + self._edge(pre, threshold))
        if self.config.chosen_penalty == "l0":
            return {"l0_penalty": weight * l0}
        return {"l0_penalty": weight * self.d_in * (l0 / self.target_l0 - 1).square()}

    def _edge(self, pre, threshold):
        """Return zeros with the straight-through gradient of 1[h > θ] in θ."""
        inside = (pre.detach() - threshold.detach()).abs() < self.width / 2
        return inside * (threshold.detach() - threshold) / self.width

    def _lift_dead(self, step: Step):
        """Return {"lift": μ Σ ReLU(θ − h) ‖W_dec‖ over dead latents}, or {} if no latent is dead."""
        if not step.n_dead or self.config.dead_coefficient == 0:
            return {}
        dead = step.dead_latents
        support = support_of_indices(dead.expand(len(step.x), -1), among=dead)
        missing = (self.at(self.threshold, support.latent) - step.pre_at(support)).relu()
        norms = self.at(step.decoder_norms, support.latent)
        return {"lift": self.config.dead_coefficient * step.mean(missing * norms)}

    def after_step(self, dictionary) -> None:
        super().after_step(dictionary)
        if self.config.parameter == "plain":
            self.plain_threshold.data.clamp_(min=0)  # below 0 only the gradient would change

    def rescale_(self, scale) -> None:
        if self.config.parameter == "plain":
            self.plain_threshold.data.mul_(scale)
        else:
            self.scaled_log_threshold.data.add_(scale.log() / self.config.threshold_speed)

    def inference_form(self) -> PublishedForm:
        return PublishedForm("jumprelu", {"threshold": self.threshold})

    @classmethod
    def from_published(cls, tensors, options):
        tensors, options = dict(tensors), dict(options)
        if "threshold" in tensors:  # any θ below 0 acts as ReLU
            tensors["plain_threshold"] = tensors.pop("threshold").clamp(min=0)
            options["parameter"] = "plain"
        return tensors, options
