"""One training step in plain, dense autograd: the definition that faster paths must agree with."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelens_lite.codes import SparseCodes, Support
from saelens_lite.dictionary import Dictionary, codes_at


class DenseStep:
    """What a rule is offered in a training step (see `saelens_lite.sparsity.Step`), and the step's losses.

    x: Float[batch d_in] is scaled as the dictionary expects it.
    """

    def __init__(
        self,
        dictionary: Dictionary,
        x: Float[Tensor, "batch d_in"],
        *,
        dead: Bool[Tensor, " d_sae"],
        progress: float,
        warmup: float,
    ):
        self.dictionary, self.x, self.dead = dictionary, x, dead
        self.progress, self.warmup = progress, warmup
        self._h = dictionary.pre(x)
        self.pre = self._h.detach()
        self.codes = codes_at(dictionary.rule, self._h, dictionary.rule.support(self.pre))
        self.x_hat = self.decode(self.codes) + dictionary.b_dec

    def losses(self) -> dict[str, Float[Tensor, ""]]:
        """mse = mean over the batch of Σ_d (x − x̂)², and what the rule adds; training minimises their sum."""
        return {"mse": (self.x - self.x_hat).square().sum(1).mean(), **self.dictionary.rule.losses(self)}

    @property
    def decoder_norms(self) -> Float[Tensor, " d_sae"]:
        """‖W_dec[i]‖; differentiable."""
        return torch.linalg.vector_norm(self.dictionary.W_dec, dim=1)

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
