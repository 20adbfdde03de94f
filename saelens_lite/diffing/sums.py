"""Sums over activations from which latent scaling and its intervals follow, without a dense [n d_sae] matrix.

For latent j with codes f and direction d, the least-squares factor β of f d in activations Y [n d] is

    β = argmin_β ‖Y − β f dᵀ‖²  =  dᵀ(Yᵀf) / (‖d‖² ‖f‖²)

so it needs Σ_t f_t ⟨d, y_t⟩ over the rows where the latent fires, which are products sampled at the support of the codes. A
ratio ν of two such factors with the same d and f is A / B, with the numerators A and B alone. For its interval, the sums are
also collected in each unit u (a row of text, or a block of activations), and Σ_u A_u², Σ_u A_u B_u and Σ_u B_u² are kept.
Everything is added in float64, and memory is a few numbers for each latent.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelens_lite.codes import SparseCodes

NORMAL_975 = 1.959963984540054


class Interval(NamedTuple):
    """A ratio of each latent with its 95 % interval; NaN where it cannot be given."""

    value: Float[Tensor, " d_sae"]
    low: Float[Tensor, " d_sae"]
    high: Float[Tensor, " d_sae"]


class PairSums:
    """Sums over the pairs (row, latent) of codes, by latent.

    Numbers are added under a name. `total` is their sum; `product` of two names sums over units the product of their sums.
    """

    def __init__(self, d_sae: int, crossed: tuple[tuple[str, str], ...]):
        """crossed: pairs of names (A, B) whose ratio A / B gets an interval."""
        self.d_sae, self.crossed = d_sae, crossed
        self.total: dict[str, np.ndarray] = {}
        self.product: dict[tuple[str, str], np.ndarray] = {}
        self.n_fires, self.n_units = np.zeros(d_sae, np.int64), np.zeros(d_sae, np.int64)

    def add(self, codes: SparseCodes, unit: Int[Tensor, " n"], values: dict[str, Float[Tensor, " nnz"]]) -> None:
        """Add numbers at the pairs of codes. A unit must not go on in another batch."""
        latent = codes.latent.cpu().numpy()
        pair = unit.cpu().numpy()[codes.row.cpu().numpy()] * self.d_sae + latent
        distinct, place = np.unique(pair, return_inverse=True)
        of = distinct % self.d_sae
        self.n_fires += np.bincount(latent, minlength=self.d_sae)
        self.n_units += np.bincount(of, minlength=self.d_sae)
        sums = {name: np.bincount(place, x.cpu().double().numpy(), len(distinct)) for name, x in values.items()}
        for name, x in sums.items():
            self._add(self.total, name, of, x)
        for a, b in self.crossed:
            for one, other in ((a, a), (a, b), (b, b)):
                self._add(self.product, (one, other), of, sums[one] * sums[other])

    def _add(self, kept: dict, name: object, of: np.ndarray, x: np.ndarray) -> None:
        added = np.bincount(of, x, self.d_sae)
        kept[name] = kept[name] + added if name in kept else added

    def ratio(self, a: str, b: str, min_units: int) -> Interval:
        """Return A / B. Its interval is Fieller's, with the variances and covariance over the units where the latent fires.

        With v = Σ (A_u − θ B_u)² − (A − θ B)² / n over the n units, the interval holds the θ for which

            (A − θ B)² ≤ t² v n / (n − 1)

        t is the quantile of Student's distribution with n − 1 degrees of freedom. NaN if n < min_units, or if the θ have no
        bound, because B may be 0. Source: Fieller 1954.
        """
        total_a, total_b, n = self.total[a], self.total[b], self.n_units.astype(float)
        aa, ab, bb = (self.product[pair] for pair in ((a, a), (a, b), (b, b)))
        with np.errstate(divide="ignore", invalid="ignore"):
            value = total_a / total_b
            q = quantile_975(np.maximum(n - 1, 1)) ** 2 * n / (n - 1)
            r = 1 + q / n
            square = r * total_b**2 - q * bb
            middle = r * total_a * total_b - q * ab
            rest = r * total_a**2 - q * aa
            width = np.sqrt(np.maximum(middle**2 - square * rest, 0)) / square
            known = (n >= min_units) & (square > 0)
            low, high = (np.where(known, middle / square + sign * width, math.nan) for sign in (-1, 1))
        value = np.where(n > 0, value, math.nan)
        return Interval(*(torch.from_numpy(np.where(np.isfinite(x), x, math.nan)).float() for x in (value, low, high)))


def quantile_975(freedom: np.ndarray) -> np.ndarray:
    """Return the 97.5 % quantile of Student's distribution; to 1e-4 from 9 degrees of freedom on.

    Source: Cornish and Fisher's expansion; Abramowitz and Stegun 1964, 26.7.5.
    """
    z = NORMAL_975
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom ** (i + 1) for i, term in enumerate(terms))
