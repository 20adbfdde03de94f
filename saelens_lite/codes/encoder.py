"""The encoder product of a batch. Only the entries that a sparsity rule asks for are kept.

    h = (x − b_dec) W_enc + b_enc     transcoders: h = x W_enc + b_enc

This is the only dense product of a training step. It runs without autograd, and in tiles of rows if [batch d_sae] is large.
Gradients are attached to the few entries that the rule chooses.
"""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelens_lite.codes import Support, concatenated
from saelens_lite.codes.products import PreAt, PreDense, pair_products
from saelens_lite.devices import asynchronous

TILE_BYTES = 2**27  # largest size of the pre-activations in memory
GPU_TILE_BYTES = 2**29  # the same on a GPU, which is fast only on large products
LEAST_ROWS, GPU_LEAST_ROWS = 128, 512  # each tile reads all of W_enc, so one of fewer rows is slow


class Spare:
    """Memory for tiles, which the encoders of one loop hand on to each other: fresh memory costs a tenth of a step.

    It keeps one tile for each width, dtype and device.
    """

    def __init__(self) -> None:
        self._memory: dict[tuple, Tensor] = {}

    def take(self, n_rows: int, width: int, like: Tensor) -> Float[Tensor, "at_least_n_rows width"]:
        """Return the memory that was handed on if it fits, else new memory of the dtype and device of `like`."""
        memory = self._memory.pop((width, like.dtype, like.device), None)
        return memory if memory is not None and len(memory) >= n_rows else like.new_empty(n_rows, width)

    def give(self, memory: Float[Tensor, "n_rows width"]) -> None:
        """Hand memory on, unless there is some already."""
        self._memory.setdefault((memory.shape[1], memory.dtype, memory.device), memory)


class Encoder:
    """The pre-activations of x: Float[batch d_in], computed on demand.

    halves: choose the support from a bfloat16 product with float32 sums, then compute its values again in float32.
    spare: memory of an earlier encoder; `release` hands it on.
    rounded: W_enc in bfloat16, if it is at hand.
    """

    def __init__(
        self,
        W_enc: Float[Tensor, "d_in d_sae"],
        b_enc: Float[Tensor, " d_sae"] | None,
        input_bias: Float[Tensor, " d_in"] | None,
        x: Float[Tensor, "batch d_in"],
        halves: bool = False,
        spare: Spare | None = None,
        rounded: Float[Tensor, "d_in d_sae"] | None = None,
    ):
        self._spare = spare or Spare()
        self._rounded = rounded
        self.W_enc, self.b_enc, self.input_bias, self.x = W_enc, b_enc, input_bias, x
        self.halves = halves and W_enc.dtype == torch.float32
        self.centred = x.detach() if input_bias is None else (x - input_bias).detach()
        self._buffer: Tensor | None = None
        self._pre: Tensor | None = None  # all pre-activations, if they fit into one tile
        self._pre_is_rounded = False
        self._known: tuple[Support | None, Tensor | None] = (None, None)

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.W_enc.shape[1]

    def tiles(
        self, latents: Int[Tensor, " n"] | None = None, whole: bool = False, halves: bool | None = None
    ) -> Iterator[Float[Tensor, "rows n"]]:
        """Yield the pre-activations of all or some latents, one tile of rows at a time, without gradient.

        The next tile overwrites the last one. Do not write to a tile. whole: yield one tile of any size.
        """
        halves = self.halves if halves is None else halves
        if self._pre is not None and halves >= self._pre_is_rounded:
            yield self._pre if latents is None else self._pre.index_select(1, latents)
            return
        x, weight, bias = self._factors(latents, halves)
        n_rows = tile_rows(weight.shape[1], x)
        pieces = (x,) if whole else x.split(n_rows)
        buffer = self._spare.take(len(pieces[0]), weight.shape[1], x)
        if weight.shape[1] == self.d_sae:
            self._buffer = buffer
        for piece in pieces:
            out = buffer[: len(piece)]
            yield torch.mm(piece, weight, out=out) if bias is None else torch.addmm(bias, piece, weight, out=out)
        if latents is None and len(x) <= n_rows:
            self._pre, self._pre_is_rounded = buffer[: len(x)], halves

    def _factors(self, latents: Int[Tensor, " n"] | None, halves: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return x, the weight and the bias of the product for all or some latents, rounded to bfloat16 if `halves`."""
        weight = self.W_enc.detach() if self._rounded is None or not halves else self._rounded
        bias = None if self.b_enc is None else self.b_enc.detach()
        if latents is not None:
            weight = weight.T.index_select(0, latents).T
            bias = None if bias is None else bias.index_select(0, latents)
        if not halves:
            return self.centred, weight, bias
        x, weight = self.centred.bfloat16(), weight.T.bfloat16().T
        if x.is_cuda:
            return x, weight, None if bias is None else bias.bfloat16()
        return x.float(), weight.float(), bias  # bfloat16 products are slow on a CPU; those of the rounded numbers are equal

    def release(self) -> None:
        """Hand the memory of the pre-activations on; they are computed again if they are asked for once more."""
        if self._buffer is not None:
            self._spare.give(self._buffer)
        self._buffer = self._pre = None

    def choose(self, rule_support: Callable[[Tensor], Support], whole: bool = False) -> Support:
        """Return the support that a rule chooses, tile by tile. The pre-activations at the support are kept."""
        supports, values = [], []
        with torch.no_grad():
            for pre in self.tiles(whole=whole):
                supports.append(rule_support(pre))
                if not self.halves:
                    values.append(pre.flatten().index_select(0, supports[-1].flat(self.d_sae)))
        support = supports[0] if len(supports) == 1 else concatenated(supports)
        if not self.halves:
            self._known = support, self._attach(support, values[0] if len(values) == 1 else torch.cat(values))
        return support

    def at(self, support: Support) -> Float[Tensor, " nnz"]:
        """Return the pre-activations at a support; differentiable."""
        known_support, known = self._known
        if known is None or support is not known_support:  # a support that is asked for twice costs one backward pass
            known = self._attach(support, self._values(support))
            self._known = support, known
        return known

    def dense(self) -> Float[Tensor, "batch d_sae"]:
        """Return all pre-activations; differentiable. The backward pass is cheap if few gradients are not zero."""
        (pre,) = self.tiles(whole=True, halves=False)
        return PreDense.apply(self.W_enc, self.b_enc, self.input_bias, self.x, pre, self.centred)

    def _attach(self, support: Support, value: Float[Tensor, " nnz"]) -> Float[Tensor, " nnz"]:
        return PreAt.apply(self.W_enc, self.b_enc, self.input_bias, self.x, value, self.centred, support, self.halves)

    @torch.no_grad()
    def _values(self, support: Support) -> Float[Tensor, " nnz"]:
        """Return the pre-activations at a support, without gradient."""
        of_dead = support.among is not None and asynchronous(self.centred)  # for them, rounded values do
        if self._pre is not None and (of_dead or not self._pre_is_rounded):
            return self._pre.flatten().index_select(0, support.flat(self.d_sae)).to(self.centred.dtype)
        value = pair_products(support, self.centred, self.W_enc.T, self.halves)
        return value if self.b_enc is None else value + self.b_enc.index_select(0, support.latent)


def tile_rows(width: int, like: Float[Tensor, "batch d_in"]) -> int:
    """Return the number of rows of a tile of the dtype and device of `like`.

    A tile stays within its limit in bytes, unless it would then have very few rows. With hundreds of thousands of latents it is
    larger, but never larger than W_enc.
    """
    limit, least = (GPU_TILE_BYTES, GPU_LEAST_ROWS) if like.is_cuda else (TILE_BYTES, LEAST_ROWS)
    return max(1, min(least, like.shape[1]), limit // max(1, width * like.element_size()))
