"""Penalise ReLU codes by a p-norm, weighted by decoder norms.

    f = ReLU(h)          L = ‖x − x̂‖² + λ · Σ_i f_i^p · ‖W_dec[i]‖^p

p = 1 is the usual L1 penalty; p < 1 is closer to counting latents. With the weights, shrinking codes and growing directions
does not lower the penalty, so the norms need no constraint.
"""

from pydantic import Field

from saelens_lite.sparsity import PenaltyConfig, PublishedForm, Sparsity, Step, Support, root_of_batch, support_above


class L1(Sparsity):
    """ReLU codes, penalised by λ Σ f^p ‖W_dec‖^p."""

    paper = "Bricken et al. 2023, Towards Monosemanticity; decoder-norm weighting: Conerly et al. 2024, April update"
    row_wise = True
    shardable = True
    lr_factor = staticmethod(root_of_batch)

    class Config(PenaltyConfig):
        usual_coefficient = 0.3
        p: float = Field(1.0, gt=0, le=2, description="Exponent of the penalty.")

    config: Config

    def activation(self, pre):
        return pre.relu()

    def support(self, pre) -> Support:
        return support_above(pre, 0.0)

    def values(self, pre, latent):
        return pre.relu()

    def losses(self, step: Step):
        weighted = step.codes.value * self.at(step.decoder_norms, step.codes.latent)
        if self.config.p != 1:  # the slope at 0 is infinite for p < 1
            weighted = step.codes.fires * weighted.clamp_min(1e-12).pow(self.config.p)
        return {"l1": step.coefficient * step.mean(weighted)}

    def inference_form(self) -> PublishedForm:
        return PublishedForm("standard")
