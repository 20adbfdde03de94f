"""The latents that fire: (row, latent) pairs in compressed rows, and the indices that products of a training step need."""

from dataclasses import dataclass
from functools import cached_property
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelens_lite.devices import asynchronous


@dataclass(frozen=True, eq=False)
class Support:
    """The (row, latent) pairs that fire, in compressed rows: row r owns latent[crow[r]:crow[r+1]].

    What the products of a training step need of it is derived once, on first use.

    among: the latents from which the pairs were chosen, ascending, such as the dead ones; None: all.
    """

    crow: Int[Tensor, " rows_plus_1"]
    latent: Int[Tensor, " nnz"]
    among: Int[Tensor, " n_among"] | None = None

    def __post_init__(self) -> None:
        _of_latent.setdefault(id(self.latent), self)

    @classmethod
    def of_latent(cls, latent: Int[Tensor, " nnz"]) -> "Support":
        """Return the support whose `latent` is this very tensor, so that its order is computed once; else a pair a row."""
        known = _of_latent.get(id(latent))
        if known is not None and known.latent is latent:
            return known
        return cls(torch.arange(len(latent) + 1, device=latent.device), latent)

    @property
    def n_rows(self) -> int:
        """Number of rows, empty ones included."""
        return len(self.crow) - 1

    @cached_property
    def row(self) -> Int[Tensor, " nnz"]:
        """The row of each pair."""
        rows = torch.arange(self.n_rows, device=self.crow.device)
        return torch.repeat_interleave(rows, self.crow.diff(), output_size=len(self.latent))

    def where(self, keep: Bool[Tensor, " nnz"], place: Int[Tensor, " n_kept"] | None = None) -> "Support":
        """Return the pairs where `keep` is true. place: their indices, if they are known."""
        place = keep.nonzero().squeeze(1) if place is None else place
        return Support(F.pad(keep.long().cumsum(0), (1, 0))[self.crow], self.latent.index_select(0, place), self.among)

    def flat(self, d_sae: int) -> Int[Tensor, " nnz"]:
        """Return row · d_sae + latent: the index of each pair in a flattened [rows d_sae] tensor."""
        return torch.add(self.latent, self.row, alpha=d_sae)

    @cached_property
    def crow32(self) -> Int[Tensor, " rows_plus_1"]:
        """`crow` as int32, which sparse products read without converting."""
        return self.crow.int()

    @cached_property
    def latent32(self) -> Int[Tensor, " nnz"]:
        """`latent` as int32."""
        return self.latent.int()

    @cached_property
    def _sorted(self) -> tuple[Int[Tensor, " nnz"], Int[Tensor, " nnz"]]:
        return self.latent32.sort(stable=True)

    @property
    def order(self) -> Int[Tensor, " nnz"]:
        """Permutation that sorts the pairs by latent, rows ascending within a latent."""
        return self._sorted[1]

    @cached_property
    def row_by_latent(self) -> Int[Tensor, " nnz"]:
        """The rows of the pairs sorted by latent, int32."""
        return self.row[self.order].int()

    @cached_property
    def counts(self) -> Int[Tensor, " latents"]:
        """Number of rows in which each latent fires, up to the last latent that fires."""
        return torch.bincount(self.latent)

    @cached_property
    def used(self) -> Int[Tensor, " n_used"]:
        """The latents that fire in some row, ascending."""
        return self.counts.nonzero().squeeze(1)

    def as_dense(self, d_sae: int) -> "DensePairs":
        """Return the pairs as entries of a dense matrix."""
        known = self.__dict__.get("dense")
        if known is None or known.d_sae != d_sae:
            known = self.__dict__["dense"] = DensePairs(self, d_sae)
        return known

    def by_latent(self, d_sae: int) -> Int[Tensor, " d_sae_plus_1"]:
        """Return the offset of each latent in the pairs sorted by latent, int32."""
        if not asynchronous(self.latent):
            return _pointers(F.pad(self.counts, (0, d_sae - len(self.counts)))).int()
        every = torch.arange(d_sae + 1, dtype=torch.int32, device=self.latent.device)
        return torch.searchsorted(self._sorted[0], every, out_int32=True)


_of_latent: WeakValueDictionary[int, Support] = WeakValueDictionary()  # by the identity of a support's `latent`


class DensePairs:
    """The pairs of a support as entries of a dense matrix [rows n], with a column for each of some or all latents.

    On a CPU these are the latents that fire. A GPU would have to wait to count them, so there they are those that could fire.
    """

    def __init__(self, support: Support, d_sae: int):
        self.n_rows, self.d_sae = support.n_rows, d_sae
        self.latents = support.among if asynchronous(support.latent) else support.used  # None: all
        self.width = d_sae if self.latents is None else len(self.latents)
        column = support.latent
        if self.width < d_sae:
            place = column.new_empty(d_sae)
            place[self.latents] = torch.arange(self.width, device=place.device)
            column = place.index_select(0, column)
        self.flat = torch.add(column, support.row, alpha=self.width)
        self._last: tuple[Tensor, Tensor] | None = None  # values and their rounded matrix, which is often asked for twice

    def matrix(self, value: Float[Tensor, " nnz"], halves: bool = False) -> Float[Tensor, "batch n"]:
        """Return a dense matrix of the values, rounded to bfloat16 if `halves`, with zeros elsewhere; without gradient."""
        if halves and self._last is not None and self._last[0] is value:
            return self._last[1]
        given = value.bfloat16() if halves else value
        zeros = given.new_zeros(self.n_rows * self.width)
        whole = rearrange(zeros.index_copy_(0, self.flat, given), "(batch n) -> batch n", batch=self.n_rows)
        self._last = (value, whole) if halves else None
        return whole

    def rows_of(self, weight: Float[Tensor, "d_sae d"]) -> Float[Tensor, "n d"]:
        """Return the rows of a weight that belong to these latents."""
        return weight if self.width == len(weight) else weight.index_select(0, self.latents)

    def all_rows(self, product: Float[Tensor, "n d"], d_sae: int) -> Float[Tensor, "d_sae d"]:
        """Return a row for each latent, with zeros for those without a column."""
        return (
            product if self.width == d_sae else product.new_zeros(d_sae, product.shape[1]).index_copy_(0, self.latents, product)
        )


def _pointers(counts: Int[Tensor, " rows"]) -> Int[Tensor, " rows_plus_1"]:
    return F.pad(counts.cumsum(0), (1, 0))
