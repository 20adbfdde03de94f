"""Explain a token step by step: take the latent that fits the residual best, subtract its part, repeat.

    r_0 = x − b_dec       i_t = argmax_i ⟨W_dec[i], r_{t−1}⟩       v_t = ReLU(⟨W_dec[i_t], r_{t−1}⟩)
    r_t = r_{t−1} − v_t W_dec[i_t]       f_i = Σ_{t: i_t = i} v_t       L = ‖x − x̂‖² = ‖r_k‖²

Each latent sees only the residual of the earlier ones, so two similar latents do not both fire. Encoder and decoder are one
matrix with unit rows. The residual is never formed: with h = (x − b_dec) W_decᵀ, each step subtracts v_t W_dec[i_t] W_decᵀ from
h. Given the latents, v solves a triangular system in their inner products; the gradient of all steps goes through it. Steps
with v = 0 are left out. The latents may be chosen from rounded numbers; v is exact.
"""

import torch
from einops import rearrange
from pydantic import Field

from saelens_lite.codes import SparseCodes, argmax
from saelens_lite.sparsity import PublishedForm, RuleConfig, Sparsity, Support, sum_at

LARGEST_GRAM = 16_384  # most latents for which all inner products of W_dec are kept in memory (1 GiB)
CHUNK = 64  # rows per pursuit on a CPU, so that h stays in the cache


class MatchingPursuit(Sparsity):
    """Codes from k steps of matching pursuit."""

    paper = (
        "Costa et al. 2025, From flat to hierarchical: extracting sparse representations with matching pursuit, "
        "arXiv:2506.03093"
    )
    encoder_bias = False
    homogeneous = False  # a longer row of W_dec would win more steps
    row_wise = True
    tied = True
    unit_decoder = True

    class Config(RuleConfig):
        k: int = Field(32, gt=0, description="Steps, and the largest number of firing latents.")

    config: Config

    def encode(self, encoder) -> SparseCodes:
        W_dec, k = encoder.W_enc.T, self.config.k
        latent, explains = self.pursue(encoder, W_dec.detach())
        support, place = distinct(latent, self.d_sae)
        h = rearrange(self.at(encoder.at(support), place), "(batch step) -> batch step", step=k)
        chosen = rearrange(self.at(W_dec, latent.flatten()), "(batch step) d_in -> batch step d_in", step=k)
        overlap = torch.einsum("bsd,btd->bst", chosen, chosen)
        dtype = torch.promote_types(h.dtype, torch.float32)  # bfloat16 has no triangular solver
        h, overlap = h.to(dtype), overlap.to(dtype)
        v = solve(overlap, h)
        if bool((explains & (v <= 0)).any()):  # can happen with rounded numbers, or if the residual is 0
            explains = explains & (fits(h.detach(), overlap.detach()) > 0)
            v = solve(overlap * explains[:, None, :], h)
        v = (v * explains).relu().to(encoder.x.dtype)
        return SparseCodes.of(support, sum_at(v.flatten(), place, len(support.latent)), self.d_sae)

    @torch.no_grad()
    def pursue(self, encoder, W_dec):
        """Return the latent of each step and whether its v is positive, both [batch step]."""
        n_rows = len(encoder.x)
        gram = W_dec @ W_dec.T if self.d_sae <= min(n_rows * (self.config.k - 1), LARGEST_GRAM) else None
        chunks = []
        for tile in encoder.tiles():
            for rows in tile.split(CHUNK if tile.device.type == "cpu" else len(tile)):
                h, steps = rows.to(W_dec.dtype, copy=True), []
                for _ in range(self.config.k):
                    best = argmax(h)
                    v = h.gather(1, best.unsqueeze(1)).relu_()
                    explained = gram.index_select(0, best) if gram is not None else W_dec.index_select(0, best) @ W_dec.T
                    h.addcmul_(explained, v, value=-1)
                    steps.append((best, v.squeeze(1) > 0))
                chunks.append([torch.stack(part, 1) for part in zip(*steps, strict=True)])
        return [torch.cat(part) for part in zip(*chunks, strict=True)]

    def inference_form(self) -> PublishedForm:
        settings = {"max_iterations": self.config.k, "residual_threshold": 0.0, "stop_on_duplicate_support": False}
        return PublishedForm("matching_pursuit", settings=settings)


def solve(overlap, h):
    """Return v [batch step] with h_t = v_t + Σ_{s < t} overlap_ts v_s."""
    column = rearrange(h, "batch step -> batch step 1")
    return torch.linalg.solve_triangular(overlap, column, upper=False, unitriangular=True).squeeze(2)


def fits(h, overlap):
    """Return v [batch step]: h at each step less the earlier steps' part, or 0 if that is negative."""
    v = torch.zeros_like(h)
    for step in range(h.shape[1]):
        explained = (overlap[:, step, :step] * v[:, :step]).sum(1)
        v[:, step] = (h[:, step] - explained).relu()
    return v


def distinct(latent, d_sae: int) -> tuple[Support, torch.Tensor]:
    """Return the support of a table [batch step] whose rows may repeat a latent, and the index of each entry in the support."""
    rows = torch.arange(len(latent) + 1, device=latent.device)
    flat, place = (rows[:-1, None] * d_sae + latent).flatten().unique(return_inverse=True)
    return Support(torch.searchsorted(flat, rows * d_sae), flat % d_sae), place
