"""Nest dictionaries in one: each prefix of the latents must reconstruct alone, so the general latents come first.

    f = BatchTopK(ReLU(h))       x̂_m = Σ_{i < m} f_i W_dec[i] + b_dec
    L = Σ_m ‖x − x̂_m‖² + α · ‖e − ê‖²

over the lengths m of the prefixes, the last of which is d_sae. Everything else is as in batch_topk.
"""

import torch
from einops import rearrange
from pydantic import Field, field_validator

from saelens_lite.codes import SparseCodes, Support
from saelens_lite.sparsity import Step
from saelens_lite_plugins.sparsity.batch_topk import BatchTopK


class Matryoshka(BatchTopK):
    """BatchTopK codes, every prefix of which reconstructs x."""

    paper = "Bussmann et al. 2025, Learning multi-level features with matryoshka sparse autoencoders, arXiv:2503.17547"

    class Config(BatchTopK.Config):
        prefixes: tuple[float, ...] = Field(
            (1 / 32, 3 / 32, 7 / 32, 15 / 32), description="Lengths of all prefixes but the last, as shares of d_sae."
        )

        @field_validator("prefixes")
        @classmethod
        def _increasing_shares(cls, prefixes: tuple[float, ...]) -> tuple[float, ...]:
            if any(not 0 < share < 1 for share in prefixes) or list(prefixes) != sorted(set(prefixes)):
                raise ValueError("prefixes must be shares between 0 and 1, in increasing order")
            return prefixes

    config: Config

    def __init__(self, config: Config, *, d_in: int, d_sae: int):
        super().__init__(config, d_in=d_in, d_sae=d_sae)
        self.register_buffer("ends", torch.tensor(self.lengths()), persistent=False)

    def lengths(self) -> list[int]:
        """Return m for all prefixes but the last."""
        lengths = {max(1, round(share * self.d_sae)) for share in self.config.prefixes}
        return sorted(lengths - {self.d_sae})

    def losses(self, step: Step):
        if not len(self.ends):
            return super().losses(step)
        without_codes = rearrange(step.target - step.base(), "batch d_out -> batch 1 d_out")
        error = without_codes - self._decode_slices(step).cumsum(1)  # a thread for each sum on a GPU
        return {"prefixes": error.square().sum((1, 2)).mean(), **super().losses(step)}

    def _decode_slices(self, step: Step):
        """Return [batch prefix d_out]: the part that each prefix adds to the one before. Every latent is decoded once."""
        ends = self.ends - step.first_latent
        inner = step.codes.where(step.codes.latent < ends[-1])
        latent = inner.latent
        # ascending, because latents ascend within a row
        piece = inner.row * len(ends) + torch.bucketize(latent, ends, right=True)
        begins = torch.searchsorted(piece, torch.arange(len(step.x) * len(ends) + 1, device=piece.device))
        codes = SparseCodes.of(Support(begins, latent), inner.value, inner.d_sae)
        return rearrange(step.decode(codes), "(batch prefix) d_out -> batch prefix d_out", prefix=len(ends))
