"""One training step. `DenseStep` is the definition, in plain dense autograd; `SparseStep` computes the same losses and
gradients with one dense product, and is what training uses."""

from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelens_lite.codes import SparseCodes, Support
from saelens_lite.codes.encoder import Encoder, Spare
from saelens_lite.codes.products import Decode
from saelens_lite.dictionary import Dictionary


class DenseEncoder(Encoder):
    """Pre-activations in plain dense autograd."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        h = (self.x if self.input_bias is None else self.x - self.input_bias) @ self.W_enc
        self._h = h if self.b_enc is None else h + self.b_enc

    def tiles(self, latents: Int[Tensor, " n"] | None = None, whole: bool = False) -> Iterator[Float[Tensor, "rows n"]]:
        """Pre-activations of all latents or some, without gradient, in one tile."""
        yield self._h.detach() if latents is None else self._h.detach()[:, latents]

    def choose(self, rule_support: Callable[[Tensor], Support], whole: bool = False) -> Support:
        """The support a rule chooses."""
        return rule_support(self._h.detach())

    def at(self, support: Support) -> Float[Tensor, " nnz"]:
        """Pre-activations at chosen pairs; differentiable."""
        return self._h[support.row, support.latent]

    def dense(self) -> Float[Tensor, "batch d_sae"]:
        """All pre-activations; differentiable."""
        return self._h


class DenseStep:
    """What a rule is offered in a training step (see `saelens_lite.sparsity.Step`), and the step's losses.

    x: Float[batch d_in] and target: Float[batch d_out], by default x itself, are scaled as the dictionary expects them.
    `halves` and `spare` are for the sparse step's encoder.
    """

    encoder_class: ClassVar[type[Encoder]] = DenseEncoder

    def __init__(
        self,
        dictionary: Dictionary,
        x: Float[Tensor, "batch d_in"],
        target: Float[Tensor, "batch d_out"] | None = None,
        *,
        dead: Bool[Tensor, " d_sae"],
        progress: float,
        warmup: float,
        halves: bool = False,
        spare: Spare | None = None,
    ):
        self.dictionary, self.x, self.target, self.dead = dictionary, x, x if target is None else target, dead
        self.progress, self.warmup = progress, warmup
        self._encoder = self.encoder_class(dictionary.W_enc, dictionary.b_enc, dictionary.input_bias, x, halves, spare)
        self.codes = dictionary.rule.encode(self._encoder)
        self.x_hat = self.decode(self.codes) + dictionary.base(x)

    def losses(self) -> dict[str, Float[Tensor, ""]]:
        """mse = mean over the batch of Σ_d (target − x̂)², and what the rule adds; training minimises their sum."""
        mse = F.mse_loss(self.x_hat, self.target, reduction="sum") / len(self.x)
        return {"mse": mse, **self.dictionary.rule.losses(self)}

    def release(self) -> None:
        """Hand the memory of the pre-activations on to the next step."""
        self._encoder.release()

    @property
    def decoder_norms(self) -> Float[Tensor, " d_sae"]:
        """The norm of each latent's direction, summed over the ports that are written; differentiable."""
        return self.dictionary.decoder_norms()

    def pre_tiles(self, latents: Int[Tensor, " n"]) -> Iterator[Float[Tensor, "rows n"]]:
        """Pre-activations of some latents, without gradient, a tile of rows after the other."""
        return self._encoder.tiles(latents)

    def pre_at(self, support: Support) -> Float[Tensor, " nnz"]:
        """Pre-activations at chosen pairs; differentiable."""
        return self._encoder.at(support)

    def decode(self, codes: SparseCodes, frozen: bool = False) -> Float[Tensor, "batch d_out"]:
        """Σ value · W_dec[latent], without bias; differentiable. frozen: no gradient reaches W_dec."""
        weight = self.dictionary.W_dec
        return codes.to_dense() @ (weight.detach() if frozen else weight)

    def base(self, frozen: bool = False) -> Float[Tensor, "batch_or_one d_out"]:
        """What decoded codes are added to: b_dec, and the skip connection's part where there is one; frozen: a constant."""
        base = torch.atleast_2d(self.dictionary.base(self.x))
        return base.detach() if frozen else base


class SparseStep(DenseStep):
    """The same with one dense product: the encoder runs without autograd, and everything after it sees only the support."""

    encoder_class = Encoder

    def decode(self, codes: SparseCodes, frozen: bool = False) -> Float[Tensor, "batch d_out"]:
        """Σ value · W_dec[latent], without bias; differentiable. frozen: no gradient reaches W_dec."""
        weight = self.dictionary.W_dec
        return Decode.apply(codes.value, weight.detach() if frozen else weight, codes.support)
