"""One training step. `DenseStep` is the definition, in plain dense autograd; `SparseStep` computes the same losses and
gradients with one dense product, and is what training uses."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelens_lite.codes import SparseCodes, Support
from saelens_lite.codes.products import Decode, PreAt, PreDense
from saelens_lite.dictionary import Dictionary, codes_at
from saelens_lite.sparsity import Sparsity


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
        self.pre, self.codes = self._encode()
        self.x_hat = self.decode(self.codes) + dictionary.b_dec

    def _encode(self) -> tuple[Float[Tensor, "batch d_sae"], SparseCodes]:
        """Pre-activations without gradient, and the codes."""
        self._h = self.dictionary.pre(self.x)
        rule = self.dictionary.rule
        return self._h.detach(), codes_at(rule, self._h, rule.support(self._h.detach()))

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


class SparseStep(DenseStep):
    """The same with one dense product: the encoder runs without autograd, and everything after it sees only the support."""

    _known_pre_at: tuple[Support | None, Tensor | None] = (None, None)

    def _encode(self) -> tuple[Float[Tensor, "batch d_sae"], SparseCodes]:
        d, rule = self.dictionary, self.dictionary.rule
        with torch.no_grad():
            self._centred = self.x - d.b_dec
            self.pre = torch.mm(self._centred, d.W_enc) if d.b_enc is None else torch.addmm(d.b_enc, self._centred, d.W_enc)
            support = rule.support(self.pre)
        if type(rule).values is not Sparsity.values:
            value = rule.values(self.pre_at(support), support.latent)
        else:
            acts = rule.activation(PreDense.apply(d.W_enc, d.b_enc, d.b_dec, self.pre, self._centred))
            value = acts.flatten()[support.flat(d.d_sae)]
        return self.pre, SparseCodes.of(support, value, d.d_sae)

    def pre_at(self, support: Support) -> Float[Tensor, " nnz"]:
        """Pre-activations at chosen pairs; differentiable."""
        known_support, known = self._known_pre_at
        if support is not known_support:  # asked twice, a support costs one backward pass
            d = self.dictionary
            known = PreAt.apply(d.W_enc, d.b_enc, d.b_dec, self.pre, self._centred, support)
            self._known_pre_at = support, known
        return known

    def decode(self, codes: SparseCodes, frozen: bool = False) -> Float[Tensor, "batch d_in"]:
        """Σ value · W_dec[latent], without bias; differentiable. frozen: no gradient reaches W_dec."""
        weight = self.dictionary.W_dec
        return Decode.apply(codes.value, weight.detach() if frozen else weight, codes.support)
