"""The latents that fire: (row, latent) pairs in compressed rows, and the indices that products of a training step need."""

from dataclasses import dataclass
from functools import cached_property
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Support:
    """The (row, latent) pairs that fire, in compressed rows: row r owns latent[crow[r]:crow[r+1]].

    What the products of a training step need of it is derived once, on first use.
    """

    crow: Int[Tensor, " rows_plus_1"]
    latent: Int[Tensor, " nnz"]

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

    def where(self, keep: Bool[Tensor, " nnz"]) -> "Support":
        """Return the pairs where `keep` is true."""
        return Support(F.pad(keep.long().cumsum(0), (1, 0))[self.crow], self.latent[keep])

    def flat(self, d_sae: int) -> Int[Tensor, " nnz"]:
        """Return row · d_sae + latent: the index of each pair in a flattened [rows d_sae] tensor."""
        return self.row * d_sae + self.latent

    @cached_property
    def crow32(self) -> Int[Tensor, " rows_plus_1"]:
        """`crow` as int32, which sparse products read without converting."""
        return self.crow.int()

    @cached_property
    def latent32(self) -> Int[Tensor, " nnz"]:
        """`latent` as int32."""
        return self.latent.int()

    @cached_property
    def order(self) -> Int[Tensor, " nnz"]:
        """Permutation that sorts the pairs by latent, rows ascending within a latent."""
        return self.latent32.argsort(stable=True)

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

    @cached_property
    def as_dense(self) -> "DensePairs":
        """The pairs as entries of a dense matrix over the used latents."""
        return DensePairs(self)

    def by_latent(self, d_sae: int) -> Int[Tensor, " d_sae_plus_1"]:
        """Return the offset of each latent in the pairs sorted by latent, int32."""
        return _pointers(F.pad(self.counts, (0, d_sae - len(self.counts)))).int()


_of_latent: WeakValueDictionary[int, Support] = WeakValueDictionary()  # by the identity of a support's `latent`


class DensePairs:
    """The pairs of a support as entries of a dense matrix [rows n_used]."""

    def __init__(self, support: Support):
        self.n_rows, self.used = support.n_rows, support.used
        column = support.latent
        if len(self.used) < len(support.counts):
            place = torch.empty_like(support.counts)
            place[self.used] = torch.arange(len(self.used), device=place.device)
            column = place[column]
        self.flat = support.row * len(self.used) + column

    def matrix(self, value: Float[Tensor, " nnz"]) -> Float[Tensor, "batch n_used"]:
        """Return a dense matrix of the values, with zeros elsewhere; without gradient."""
        zeros = value.new_zeros(self.n_rows * len(self.used))
        return rearrange(zeros.index_copy_(0, self.flat, value), "(batch used) -> batch used", batch=self.n_rows)

    def rows_of(self, weight: Float[Tensor, "d_sae d"]) -> Float[Tensor, "n_used d"]:
        """Return the rows of a weight that belong to used latents."""
        return weight if len(self.used) == len(weight) else weight.index_select(0, self.used)


def _pointers(counts: Int[Tensor, " rows"]) -> Int[Tensor, " rows_plus_1"]:
    return F.pad(counts.cumsum(0), (1, 0))
