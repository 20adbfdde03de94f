"""SparseCodes: the latents that fire for each activation, and their values."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelens_lite.codes import gpu
from saelens_lite.codes.support import Support, _pointers
from saelens_lite.devices import asynchronous
from saelens_lite.errors import ShapeError


def support_of_mask(mask: Bool[Tensor, "batch d_sae"]) -> Support:
    """Return the (row, latent) pairs where `mask` is true, latents ascending within a row."""
    if mask.device.type == "cpu":  # numpy is several times faster
        flat = torch.from_numpy(np.flatnonzero(mask.contiguous().numpy()))
        row = flat // max(1, mask.shape[1])
        latent = flat - row * mask.shape[1]
    else:
        row, latent = mask.nonzero(as_tuple=True)
    support = Support(_pointers(torch.bincount(row, minlength=len(mask))), latent)
    support.__dict__["row"] = row  # saves the cached property the work
    return support


def support_above(pre: Float[Tensor, "batch d_sae"], threshold: Float[Tensor, " d_sae"] | float) -> Support:
    """Return the pairs whose pre-activation exceeds the threshold of the latent."""
    if kernels := gpu.kernels(pre):
        return Support(*kernels.above(pre, threshold))
    return support_of_mask(pre > threshold)


def support_of_indices(latent: Int[Tensor, "batch k"], among: Int[Tensor, " n"] | None = None) -> Support:
    """Return the support of a table with k latents in each row. among: the latents that the table is chosen from, ascending."""
    n, k = latent.shape
    crow = torch.arange(0, n * k + 1, k, device=latent.device) if k else latent.new_zeros(n + 1)
    return Support(crow, latent.flatten(), among)


def argmax(x: Float[Tensor, "*shape n"]) -> Int[Tensor, "*shape"]:
    """Return the index of the largest entry along the last axis; of equal entries, the first."""
    if x.device.type == "cpu" and x.dtype != torch.bfloat16:  # numpy is several times faster
        return torch.from_numpy(np.asarray(x.detach().numpy().argmax(-1)))
    return x.argmax(-1)


def concatenated(supports: Sequence[Support]) -> Support:
    """Concatenate the rows of several supports."""
    counts = torch.cat([support.crow.diff() for support in supports])
    return Support(_pointers(counts), torch.cat([support.latent for support in supports]))


def picked(x: Float[Tensor, " n"], place: Int[Tensor, " n_picked"]) -> Float[Tensor, " n_picked"]:
    """Return x[place] for distinct places; differentiable, without the atomic sums of indexing."""
    return _Picked.apply(x, place)


class _Picked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, place):
        ctx.n = len(x)
        ctx.save_for_backward(place)
        return x.index_select(0, place)

    @staticmethod
    def backward(ctx, g):
        (place,) = ctx.saved_tensors
        return g.new_zeros(ctx.n).index_copy(0, place, g), None


class SparseCodes(NamedTuple):
    """Codes of any number of activations, zeros left out.

    A latent fires where its code is not zero (see `fires`). The codes of a dictionary are never negative.
    `shape` is the leading shape of the activations they came from; rows run over it in C order.
    """

    support: Support
    value: Float[Tensor, " nnz"]
    d_sae: int
    shape: tuple[int, ...]

    @classmethod
    def of(
        cls, support: Support, value: Float[Tensor, " nnz"], d_sae: int, shape: tuple[int, ...] | None = None
    ) -> "SparseCodes":
        """Return codes with `value` at `support`."""
        return cls(support, value, d_sae, (support.n_rows,) if shape is None else shape)

    @classmethod
    def from_dense(cls, acts: Float[Tensor, "*shape d_sae"]) -> "SparseCodes":
        """Return codes of the non-zero entries of `acts`; differentiable in them."""
        flat = acts.reshape(-1, acts.shape[-1])
        support = support_of_mask(flat != 0)
        value = picked(flat.flatten(), support.flat(acts.shape[-1]))
        return cls.of(support, value, acts.shape[-1], tuple(acts.shape[:-1]))

    @property
    def crow(self) -> Int[Tensor, " rows_plus_1"]:
        """The offset of each row in the entries."""
        return self.support.crow

    @property
    def latent(self) -> Int[Tensor, " nnz"]:
        """The latent of each entry."""
        return self.support.latent

    @property
    def row(self) -> Int[Tensor, " nnz"]:
        """The row of each entry."""
        return self.support.row

    @property
    def n_rows(self) -> int:
        """Number of encoded activations."""
        return self.support.n_rows

    @property
    def fires(self) -> Bool[Tensor, " nnz"]:
        """Mask of the entries that are not zero, where the latent fires. Every count of firing latents counts these."""
        return self.value != 0

    @property
    def fire_counts(self) -> Int[Tensor, " d_sae"]:
        """Number of entries of each latent that are not zero."""
        if asynchronous(self.latent):
            counts = torch.zeros(self.d_sae, dtype=torch.int32, device=self.latent.device)
            return counts.index_add_(0, self.latent, self.fires.int()).long()
        return torch.bincount(self.latent[self.fires], minlength=self.d_sae)

    @property
    def l0(self) -> Int[Tensor, "*shape"]:
        """Number of latents that fire for each activation."""
        fires = F.pad(self.fires.long().cumsum(0), (1, 0))
        return fires[self.crow].diff().reshape(self.shape)

    def to_dense(self) -> Float[Tensor, "*shape d_sae"]:
        """Return the same codes as a dense tensor; differentiable."""
        flat = self.value.new_zeros(self.n_rows * self.d_sae)
        return flat.index_put((self.support.flat(self.d_sae),), self.value).reshape(*self.shape, self.d_sae)

    def decode(self, W_dec: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, "*shape d_in"]:
        """Return Σ value · W_dec[latent] for each activation, without bias; differentiable."""
        if W_dec.shape[0] != self.d_sae:
            raise ShapeError(f"codes over {self.d_sae} latents cannot be decoded by a W_dec of shape {tuple(W_dec.shape)}")
        if not len(self.value):  # embedding_bag refuses an empty bag list
            return W_dec.new_zeros(*self.shape, W_dec.shape[1])
        bags = F.embedding_bag(
            self.latent, W_dec, self.crow, mode="sum", per_sample_weights=self.value, include_last_offset=True
        )
        return bags.reshape(*self.shape, W_dec.shape[1])

    def without_zeros(self) -> "SparseCodes":
        """Return the same codes with stored zeros dropped."""
        keep = self.fires
        return self if bool(keep.all()) else self.where(keep)

    def where(self, keep: Bool[Tensor, " nnz"]) -> "SparseCodes":
        """Return the entries where `keep` is true; differentiable."""
        place = keep.nonzero().squeeze(1)
        return self._replace(support=self.support.where(keep, place), value=picked(self.value, place))

    def rows(self, start: int, stop: int) -> "SparseCodes":
        """Return the codes of rows start … stop − 1, as a flat batch."""
        crow = self.crow[start : stop + 1]
        piece = slice(int(crow[0]), int(crow[-1]))
        support = Support(crow - crow[0], self.latent[piece])
        return self._replace(support=support, value=self.value[piece], shape=(support.n_rows,))

    def to(self, *args, **kwargs) -> "SparseCodes":
        """Move the codes to a device and cast their values to a dtype, as torch.Tensor.to does."""
        value = self.value.to(*args, **kwargs)
        if value.device == self.crow.device:
            return self._replace(value=value)
        return self._replace(support=Support(self.crow.to(value.device), self.latent.to(value.device)), value=value)

    def detach(self) -> "SparseCodes":
        """Return the same codes without gradient."""
        return self._replace(value=self.value.detach())
