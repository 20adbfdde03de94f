"""One training step: from a batch of activations to the update of the parameters.

Follow one batch. x is [batch d_in], the dictionary has d_sae latents, and its rule makes few of them fire.

**1. The batch.** `Trainer.step` takes raw activations of the hooks that the dictionary reads and writes, one tensor for each.
Each is multiplied by its scale, so that its RMS norm is sqrt(d) (for a transcoder, the RMS norm around the mean), and the
tensors are concatenated: x from the hooks that are read, the target y from those that are written. If these are the same
hooks, y = x. If they are not, the mean of x is subtracted beforehand, because b_dec then belongs to y and cannot centre x.
Before the first step of an autoencoder, W_enc is multiplied by the number that makes the untrained dictionary reconstruct
best.

**2. The encoder product.** `codes/encoder.py` computes the pre-activations

    h = (x − b_dec) W_enc + b_enc          [batch d_sae]

with x alone in place of x − b_dec if the dictionary writes other hooks than it reads. This is the only dense product of the
step. It runs without autograd, in tiles of rows, each of at most 128 MiB, or 512 MiB on a GPU. There h may be a bfloat16
product with float32 sums (`encoder_precision`), from which only the support is chosen.

**3. The rule chooses.** `rule.support(h)` returns the pairs (row, latent) that fire, the *support*; top-k, for example,
returns the k largest of each row. No gradient flows through the choice. `rule.values` turns the pre-activations at the
support, which are differentiable, into codes:

    f = values(h at the support)           [nnz], nnz ≪ batch · d_sae

If h was rounded, its values at the support are computed again in float32. A rule that only defines `activation` gets all of h
instead, and its support is where the result is not zero.

**4. Decoding.** With S the sparse matrix [batch d_sae] that holds f at the support,

    x̂ = S W_dec + b_dec                    (+ x W_skipᵀ with a skip connection)

**5. The losses.** `losses` returns mse = mean over the batch of Σ_d (y − x̂)² and what the rule adds: a penalty, or an
auxiliary reconstruction by dead latents. Training minimises their sum. With `kl_share`, a weighted mean of mse and the KL of
the model's predictions takes the place of mse in the last steps (`saelens_lite.training.kl`). A latent is dead when it has not
fired for `dead_after` tokens.

**6. The backward pass.** The gradient at h is zero off the support, so the backward pass needs only the pairs that fired. With
e the gradient at x̂, v = f, and G the sparse matrix that holds the gradient at h, which follows from dv through the rule:

    dv     = ⟨W_dec[latent], e[row]⟩       [nnz]
    dW_dec = Sᵀ e                          [d_sae d_out]
    dW_enc = (x − b_dec)ᵀ G                [d_in d_sae]
    db_enc = Σ_rows G                      [d_sae]
    db_dec = Σ_rows e − W_enc db_enc       (the second term only if b_dec is subtracted from x)

`codes/products.py` computes these. Both weight gradients use one index, the support sorted by latent, which is built once.
That is O(nnz · d_in) work beside the 2 · batch · d_in · d_sae operations of the encoder product; the usual dense step has five
such products. If the support is large, as in an untrained L1 dictionary, dense products give the same quantities faster. They
are used when the support holds more than 15 % of all (row, latent) pairs of the latents that fire in the batch. Every sum has a
fixed order, so the same seed gives the same bytes.

**7. The update.** If a loss or the gradient is not finite, the step raises NonFiniteError and the parameters stay as they
were. Otherwise the gradient is clipped to the norm `clip_grad_norm`, and Adam takes a step. The learning rate follows a
schedule: linear warm-up, plateau, linear decay to zero. Then the rule may adjust running estimates (`observe`) and parameters
(`after_step`: unit-norm rows of W_dec, for example), and the trainer updates its counts of what fired.

**Several ports.** A dictionary that writes several ports has a direction d_p for each, and its latents have the size
f · Σ_p ‖d_p‖: L1 is weighted by the sum of the norms, and top-k chooses by it. Nothing but f d_p shows in x̂, so most rules fix
the free factor by Σ_p ‖d_p‖ = 1, which `normalise_decoder_` restores after each step. Then the choice by f, on which everything
above rests, is the choice by f · Σ_p ‖d_p‖.

**On a GPU** the host does not wait for the step. The losses are read when a line is logged; a flag on the device stops all
updates after a bad step. The dead latents are listed before every 16th step. A rule with k latents in each row or batch never
waits; other rules wait once or twice, for the size of their support. Top-k reads h once, for the maxima of groups of columns,
and then looks only at the groups with the largest ones; of entries that are equal in bfloat16, it takes the first. Large
supports use dense bfloat16 products with float32 sums, from a share that `codes/products.py` lists, and dead latents that
explain the error take their values from h. One kernel clips the gradient, takes Adam's step, restores unit rows and rounds
W_enc for the next h.

**On several devices** (`codes/parallel.py`), each has other rows of the batch or other latents, with their moments and
counters. With other rows, the gradients are averaged before the update. With other latents, the devices exchange the values of
their k largest pre-activations, so that the choice is exact, and add up their parts of x̂; then each has the whole error e, and
the gradients of its latents need nothing from the others.

`DenseStep` is the definition, in plain dense autograd. `SparseStep`, which training uses, computes the same losses and
gradients as described above. The tests compare the two, and both with a float64 reference.
"""

from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelens_lite.codes import SparseCodes, Support, parallel
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
        """Yield the pre-activations of all or some latents, without gradient, in one tile."""
        yield self._h.detach() if latents is None else self._h.detach()[:, latents]

    def choose(self, rule_support: Callable[[Tensor], Support], whole: bool = False) -> Support:
        """Return the support that a rule chooses."""
        return rule_support(self._h.detach())

    def at(self, support: Support) -> Float[Tensor, " nnz"]:
        """Return the pre-activations at the support; differentiable."""
        return self._h[support.row, support.latent]

    def dense(self) -> Float[Tensor, "batch d_sae"]:
        """Return all pre-activations; differentiable."""
        return self._h


class DenseStep:
    """One training step on a batch: the codes, x_hat and losses. Rules see it as `saelens_lite.sparsity.Step`.

    Args:
        x, target: scaled activations, as the dictionary expects them. The target is x by default.
        dead: true for latents that have not fired for `dead_after` tokens.
        progress: share of the training tokens that have been seen.
        warmup: factor of the sparsity penalty, 0 to 1.
        coefficient: the present coefficient of the rule's penalty; default: the first.
        dead_latents: the dead latents, ascending, if they are known; a GPU has to wait to list them.
        n_dead: number of dead latents on all devices, if it is known.
        input_bias: stands for the dictionary's, to collect the gradient that comes from the encoder.
        halves, spare, rounded: for the encoder of the sparse step: bfloat16 products, memory to reuse, and W_enc in bfloat16.
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
        coefficient: float | Float[Tensor, ""] | None = None,
        dead_latents: Int[Tensor, " n_dead"] | None = None,
        n_dead: int | None = None,
        halves: bool = False,
        spare: Spare | None = None,
        rounded: Float[Tensor, "d_in d_sae"] | None = None,
        input_bias: Float[Tensor, " d_in"] | None = None,
    ):
        self.dictionary, self.x, self.target, self.dead = dictionary, x, x if target is None else target, dead
        self.progress, self.warmup, self._dead_latents = progress, warmup, dead_latents
        self._n_dead = n_dead
        if coefficient is None:
            coefficient = getattr(dictionary.rule.config, "first_coefficient", 1.0)
        self.coefficient = warmup * coefficient
        self.input_bias = dictionary.input_bias if input_bias is None else input_bias
        encoder = (dictionary.W_enc, dictionary.b_enc, self.input_bias, x)
        self._encoder = self.encoder_class(*encoder, halves, spare, rounded)
        self.codes = dictionary.rule.encode(self._encoder)
        self.x_hat = self.decode(self.codes) + dictionary.base(x)

    def losses(self) -> dict[str, Float[Tensor, ""]]:
        """Return mse = mean over the batch of Σ_d (target − x̂)², and the losses of the rule. Training minimises their sum."""
        mse = F.mse_loss(self.x_hat, self.target, reduction="sum") / len(self.x)
        return {"mse": mse, **self.dictionary.rule.losses(self)}

    def release(self) -> None:
        """Free the memory of the pre-activations for the next step."""
        self._encoder.release()

    @property
    def dead_latents(self) -> Int[Tensor, " n_dead"]:
        """The dead latents, ascending."""
        if self._dead_latents is None:
            self._dead_latents = self.dead.nonzero().squeeze(1)
        return self._dead_latents

    @property
    def n_dead(self) -> int:
        """The number of dead latents on all devices."""
        return len(self.dead_latents) if self._n_dead is None else self._n_dead

    @property
    def decoder_norms(self) -> Float[Tensor, " d_sae"]:
        """The norm of each latent's direction, summed over the write ports; differentiable."""
        return self.dictionary.decoder_norms()

    @property
    def first_latent(self) -> int:
        """The number of the latent that is number 0 here."""
        return parallel.first_latent(self.codes.d_sae)

    def mean(self, x: Float[Tensor, " nnz"]) -> Float[Tensor, ""]:
        """Return Σx / number of rows, over all rows and latents; differentiable."""
        return parallel.batch_mean(x.sum(), len(self.x))

    def sum(self, x: Float[Tensor, " nnz"]) -> Float[Tensor, ""]:
        """Return Σx over all rows and latents; without gradient."""
        return parallel.total(x.sum())

    def min(self, x: Float[Tensor, " nnz"]) -> Float[Tensor, ""]:
        """Return the least entry of x over all rows and latents, or infinity; without gradient."""
        return parallel.least(x)

    def pre_tiles(self, latents: Int[Tensor, " n"]) -> Iterator[Float[Tensor, "rows n"]]:
        """Yield the pre-activations of some latents in tiles of rows, without gradient."""
        return self._encoder.tiles(latents)

    def pre_at(self, support: Support) -> Float[Tensor, " nnz"]:
        """Return the pre-activations at the support; differentiable."""
        return self._encoder.at(support)

    def decode(self, codes: SparseCodes, frozen: bool = False) -> Float[Tensor, "batch d_out"]:
        """Return Σ value · W_dec[latent], without bias; differentiable. With frozen=True no gradient reaches W_dec."""
        weight = self.dictionary.W_dec
        return parallel.over_latents(codes.to_dense() @ (weight.detach() if frozen else weight))

    def base(self, frozen: bool = False) -> Float[Tensor, "batch_or_one d_out"]:
        """Return the part of x_hat that does not depend on the codes: b_dec, plus x W_skipᵀ with a skip connection.

        With frozen=True it is a constant: no gradient reaches the parameters.
        """
        base = torch.atleast_2d(self.dictionary.base(self.x))
        return base.detach() if frozen else base


class SparseStep(DenseStep):
    """The same step with one dense product: the encoder runs without autograd, and only the support is used after it."""

    encoder_class = Encoder

    def decode(self, codes: SparseCodes, frozen: bool = False) -> Float[Tensor, "batch d_out"]:
        """Return Σ value · W_dec[latent], without bias; differentiable. With frozen=True no gradient reaches W_dec."""
        weight = self.dictionary.W_dec
        part = Decode.apply(codes.value, weight.detach() if frozen else weight, codes.support, self._encoder.halves)
        return parallel.over_latents(part)
