"""One training step. `DenseStep` is the definition, in plain dense autograd; `SparseStep` computes the same losses and
gradients with one dense product, and is what training uses."""

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelens_lite.codes import SparseCodes, Support
from saelens_lite.codes.encoder import Encoder
from saelens_lite.codes.products import Decode
from saelens_lite.dictionary import Dictionary, sparse_codes


class DenseStep:
    """What a rule is offered in a training step (see `saelens_lite.sparsity.Step`), and the step's losses.

    x: Float[batch d_in] is scaled as the dictionary expects it. `halves` is for the sparse step.
    """

    def __init__(
        self,
        dictionary: Dictionary,
        x: Float[Tensor, "batch d_in"],
        *,
        dead: Bool[Tensor, " d_sae"],
        progress: float,
        warmup: float,
        halves: bool = False,
    ):
        self.dictionary, self.x, self.dead = dictionary, x, dead
        self.progress, self.warmup, self.halves = progress, warmup, halves
        self.codes = self._encode()
        self.x_hat = self.decode(self.codes) + dictionary.b_dec

    def _encode(self) -> SparseCodes:
        rule = self.dictionary.rule
        self._h = self.dictionary.pre(self.x)
        support = rule.support(self._h.detach())
        value = rule.values(self.pre_at(support), support.latent)
        if value is None:
            value = rule.activation(self._h)[support.row, support.latent]
        return SparseCodes.of(support, value, self.dictionary.d_sae)

    def losses(self) -> dict[str, Float[Tensor, ""]]:
        """mse = mean over the batch of Σ_d (x − x̂)², and what the rule adds; training minimises their sum."""
        return {"mse": (self.x - self.x_hat).square().sum(1).mean(), **self.dictionary.rule.losses(self)}

    @property
    def decoder_norms(self) -> Float[Tensor, " d_sae"]:
        """‖W_dec[i]‖; differentiable."""
        return torch.linalg.vector_norm(self.dictionary.W_dec, dim=1)

    def pre_tiles(self, latents: Int[Tensor, " n"]) -> Iterator[Float[Tensor, "rows n"]]:
        """Pre-activations of some latents, without gradient, a tile of rows after the other."""
        yield self._h.detach()[:, latents]

    def pre_at(self, support: Support) -> Float[Tensor, " nnz"]:
        """Pre-activations at chosen pairs; differentiable."""
        return self._h[support.row, support.latent]

    def decode(self, codes: SparseCodes, frozen: bool = False) -> Float[Tensor, "batch d_in"]:
        """Σ value · W_dec[latent], without bias; differentiable. frozen: no gradient reaches W_dec."""
        weight = self.dictionary.W_dec
        return codes.to_dense() @ (weight.detach() if frozen else weight)

    def bias(self, frozen: bool = False) -> Float[Tensor, " d_in"]:
        """b_dec; frozen: without gradient."""
        return self.dictionary.b_dec.detach() if frozen else self.dictionary.b_dec


class SparseStep(DenseStep):
    """The same with one dense product: the encoder runs without autograd, and everything after it sees only the support."""

    def _encode(self) -> SparseCodes:
        d = self.dictionary
        self._encoder = Encoder(d.W_enc, d.b_enc, d.b_dec, self.x, self.halves)
        return sparse_codes(d.rule, self._encoder)

    def pre_tiles(self, latents: Int[Tensor, " n"]) -> Iterator[Float[Tensor, "rows n"]]:
        """Pre-activations of some latents, without gradient, a tile of rows after the other."""
        return self._encoder.tiles(latents)

    def pre_at(self, support: Support) -> Float[Tensor, " nnz"]:
        """Pre-activations at chosen pairs; differentiable."""
        return self._encoder.at(support)

    def decode(self, codes: SparseCodes, frozen: bool = False) -> Float[Tensor, "batch d_in"]:
        """Σ value · W_dec[latent], without bias; differentiable. frozen: no gradient reaches W_dec."""
        weight = self.dictionary.W_dec
        return Decode.apply(codes.value, weight.detach() if frozen else weight, codes.support)
