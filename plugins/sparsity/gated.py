"""Choose the firing latents and their values separately, so that the penalty does not shrink the codes.

    π = h + b_gate       f = 1[π > 0] · ReLU(h · exp(r_mag) + b_mag)
    L = ‖x − x̂‖² + λ · Σ_i ReLU(π_i) + ‖x − x̂_gate‖²

with h = (x − b_dec) W_enc and x̂_gate = ReLU(π) W_dec + b_dec, where W_dec and b_dec are constants. Decoder rows are unit
vectors, because small free rows with a large r_mag would evade the penalty.
"""

import torch
from torch import nn

from saelens_lite.codes import parallel
from saelens_lite.sparsity import PenaltyConfig, PublishedForm, Sparsity, Step, Support, support_above


class Gated(Sparsity):
    """Codes from a gate that chooses the latents and a rescaled, shifted copy of the pre-activation that gives the value."""

    paper = "Rajamanoharan et al. 2024, Improving dictionary learning with gated sparse autoencoders, arXiv:2404.16014"
    encoder_bias = False
    row_wise = True
    shardable = True
    unit_decoder = True

    class Config(PenaltyConfig):
        usual_coefficient = 1.0

    config: Config

    def __init__(self, config: Config, *, d_in: int, d_sae: int):
        super().__init__(config, d_in=d_in, d_sae=d_sae)
        self.b_gate = nn.Parameter(torch.zeros(d_sae))
        self.r_mag = nn.Parameter(torch.zeros(d_sae))
        self.b_mag = nn.Parameter(torch.zeros(d_sae))

    def activation(self, pre):
        return (pre + self.b_gate > 0) * (pre * self.r_mag.exp() + self.b_mag).relu()

    def support(self, pre) -> Support:
        return support_above(pre, -self.b_gate)

    def values(self, pre, latent):
        gate = pre > -self.at(self.b_gate.detach(), latent)
        return gate * (pre * self.at(self.r_mag.exp(), latent) + self.at(self.b_mag, latent)).relu()

    def losses(self, step: Step):
        latent = step.codes.latent
        gate = (step.pre_at(step.codes.support) + self.at(self.b_gate, latent)).relu()
        x_gate = step.decode(step.codes._replace(value=gate), frozen=True) + step.base(frozen=True)
        return {
            "gate_l1": step.coefficient * step.mean(gate),
            "gate_error": (step.target - x_gate).square().sum(1).mean(),
        }

    def raise_thresholds_(self, dictionary, by) -> None:
        self.b_gate.sub_(by)

    def excess(self, codes):
        pre = (codes.value - self.at(self.b_mag, codes.latent)) / self.at(self.r_mag.exp(), codes.latent)
        above = (codes.fires * (pre + self.at(self.b_gate, codes.latent)).relu()).sum()
        return parallel.total(above) / parallel.total(codes.fires.sum()).clamp(min=1)

    def rescale_(self, scale) -> None:
        self.b_gate.data.mul_(scale)
        self.b_mag.data.mul_(scale)

    def inference_form(self) -> PublishedForm:
        return PublishedForm("gated", {"b_gate": self.b_gate, "r_mag": self.r_mag, "b_mag": self.b_mag})
