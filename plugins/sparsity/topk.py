"""Keep the k largest pre-activations of each token; revive dead latents by making them explain the error.

    f = TopK(ReLU(h))    L = ‖x − x̂‖² + α · ‖e − ê‖²

e = x − x̂ (a constant), ê = what the aux_k largest dead latents of the token decode to.
"""

import torch
from pydantic import Field

from saelens_lite.codes import SparseCodes
from saelens_lite.sparsity import (
    PublishedForm,
    RuleConfig,
    Sparsity,
    Step,
    Support,
    largest,
    normalise_decoder_,
    support_of_indices,
)  # fmt: skip


class TopK(Sparsity):
    """The k largest positive pre-activations of each token."""

    paper = "Gao et al. 2024, Scaling and evaluating sparse autoencoders, arXiv:2406.04093, sections 2.3 and A.2"
    homogeneous = False  # scaling one pre-activation may push another out of the k largest
    row_wise = True

    class Config(RuleConfig):
        k: int = Field(32, gt=0, description="Latents kept per token.")
        aux_k: int | None = Field(None, ge=0, description="Dead latents that explain the error; default d_in / 2.")
        aux_coefficient: float = Field(1 / 32, ge=0, description="α, weight of the auxiliary error.")

    config: Config

    def activation(self, pre):
        values, latent = pre.relu().topk(min(self.config.k, self.d_sae), dim=1)
        return pre.new_zeros(pre.shape).scatter(1, latent, values)

    def support(self, pre) -> Support:
        return support_of_indices(largest(pre, min(self.config.k, self.d_sae)))

    def values(self, pre, latent):
        return pre.relu()

    def losses(self, step: Step):
        dead = step.dead.nonzero().squeeze(1)
        aux_k = min(self.config.aux_k if self.config.aux_k is not None else self.d_in // 2, len(dead))
        if aux_k == 0 or self.config.aux_coefficient == 0:
            return {}
        best = torch.cat([largest(pre, aux_k) for pre in step.pre_tiles(dead)])
        support = support_of_indices(dead[best])
        error = (step.x - step.x_hat).detach()
        explained = step.decode(SparseCodes.of(support, step.pre_at(support).relu(), self.d_sae))
        return {"aux": self.config.aux_coefficient * (error - explained).square().sum(1).mean()}

    def after_step(self, dictionary) -> None:
        normalise_decoder_(dictionary)

    def inference_form(self) -> PublishedForm:
        return PublishedForm("topk", settings={"k": min(self.config.k, self.d_sae), "rescale_acts_by_decoder_norm": False})
