"""Keep the k largest pre-activations of each token. Dead latents are revived by learning to explain the error.

    f = TopK(ReLU(h))    L = ‖x − x̂‖² + α · ‖e − ê‖²

e = x − x̂ is a constant; ê decodes the aux_k largest dead latents of the token.
"""

from pydantic import Field

from saelens_lite.sparsity import (
    DeadLatentsConfig,
    PublishedForm,
    Sparsity,
    Step,
    Support,
    dead_latents_explain,
    largest,
)


class TopK(Sparsity):
    """The k largest positive pre-activations of each token."""

    paper = "Gao et al. 2024, Scaling and evaluating sparse autoencoders, arXiv:2406.04093, sections 2.3 and A.2"
    homogeneous = False  # scaling one pre-activation may push another out of the k largest
    row_wise = True
    unit_decoder = True
    shardable = True

    class Config(DeadLatentsConfig):
        k: int = Field(32, gt=0, description="Latents kept per token.")

    config: Config

    def activation(self, pre):
        values, latent = pre.relu().topk(min(self.config.k, self.d_sae), dim=1)
        return pre.new_zeros(pre.shape).scatter(1, latent, values)

    def support(self, pre) -> Support:
        return largest(pre, min(self.config.k, self.d_sae))

    def values(self, pre, latent):
        return pre.relu()

    def losses(self, step: Step):
        return dead_latents_explain(step, self.config)

    def inference_form(self) -> PublishedForm:
        return PublishedForm("topk", settings={"k": min(self.config.k, self.d_sae), "rescale_acts_by_decoder_norm": False})
