"""Split the latents into k groups. The largest pre-activation of each group fires if it is positive. Nothing is sorted.

    f_i = ReLU(h_i) · 1[h_i = max of its group]       L = ‖x − x̂‖² + α · ‖e − ê‖²

e = x − x̂ is a constant; ê decodes the aux_k largest dead latents of the token.
"""

import torch
from einops import rearrange
from pydantic import Field

from saelens_lite import errors
from saelens_lite.codes import argmax
from saelens_lite.sparsity import (
    DeadLatentsConfig,
    Sparsity,
    Step,
    Support,
    dead_latents_explain,
    support_of_indices,
)


class GroupMax(Sparsity):
    """The largest pre-activation of each of k groups of neighbouring latents, if it is positive."""

    paper = "Srivastava et al. 2013, Compete to compute (local winner-take-all), NIPS; for dictionaries: EleutherAI's sparsify"
    homogeneous = False  # scaling one pre-activation may make it the largest of its group
    row_wise = True
    shardable = True
    unit_decoder = True

    class Config(DeadLatentsConfig):
        k: int = Field(32, gt=0, description="Number of groups. d_sae must be a multiple of it.")

    config: Config

    def __init__(self, config: Config, *, d_in: int, d_sae: int):
        super().__init__(config, d_in=d_in, d_sae=d_sae)
        if d_sae % config.k:
            raise errors.ConfigError(
                f"{d_sae} latents cannot be split into k = {config.k} groups of equal size; change d_sae or k"
            )

    @property
    def latents_together(self) -> int:
        return self.d_sae // self.config.k

    def _groups(self, pre):
        return rearrange(pre, "batch (group latent) -> batch group latent", latent=self.latents_together)

    def activation(self, pre):
        groups = self._groups(pre)
        winner = torch.zeros_like(groups).scatter(2, argmax(groups).unsqueeze(2), 1.0)
        return rearrange(groups.relu() * winner, "batch group latent -> batch (group latent)")

    def support(self, pre) -> Support:
        groups = self._groups(pre)
        begins = torch.arange(0, pre.shape[1], groups.shape[2], device=pre.device)
        return support_of_indices(begins + argmax(groups))

    def values(self, pre, latent):
        return pre.relu()

    def losses(self, step: Step):
        return dead_latents_explain(step, self.config)
