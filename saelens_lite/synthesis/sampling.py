"""Sampling of codes: which features fire in each row, and how strongly.

Given the common causes e of a row, features without a parent fire independently, feature i with probability

    p_i(e) = Φ((factor_i · e − threshold_i) / rest_i)

No normal numbers are drawn for the many features that do not fire. A cell (row, feature) fires if at least one point of a Poisson
process of rate λ = −ln(1 − p) falls into it, which has exactly the probability p. Points are drawn at a rate that does not
depend on the row and that suffices where factor_i · e is at most REACH of its standard deviations; each is kept with the ratio
of both rates. The few cells above that get additional points for the difference.

Children are drawn only in the rows in which their parent fires, with the same probability p_i(e). Of several exclusive children
that fire, one is kept, each with equal chance.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from saelens_lite.codes import SparseCodes, Support, support_of_mask
from saelens_lite.synthesis.planted import PlantedFeatures

REACH = 2.5
BLOCK = 4096  # features whose common causes are summed at once


class Firing(NamedTuple):
    """Features that fire: the row, the feature and its code of each."""

    row: Int[Tensor, " n"]
    feature: Int[Tensor, " n"]
    value: Float[Tensor, " n"]


class Sampler:
    """A sampler of the codes of planted features."""

    def __init__(self, features: PlantedFeatures, exclusive: bool, scale_children: bool):
        self.features, self.exclusive, self.scale_children = features, exclusive, scale_children
        f = features
        self.free = (f.tree.parent < 0).nonzero().squeeze(1)  # features without a parent
        self.norm = f.factor.norm(dim=1)
        self.is_correlated = bool((self.norm > 0).any())
        self.usual_rate = self._rate(self.free, REACH * self.norm[self.free])

    def _rate(self, feature: Int[Tensor, " n"], common: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Return −ln(1 − p) of features, given what the common causes add to each."""
        f = self.features
        return -torch.special.log_ndtr((f.threshold[feature] - common) / f.rest[feature])

    def _common(
        self, causes: Float[Tensor, "batch rank"], row: Int[Tensor, " n"], feature: Int[Tensor, " n"]
    ) -> Float[Tensor, " n"]:
        """Return factor · e of some cells."""
        return (causes.index_select(0, row) * self.features.factor.index_select(0, feature)).sum(1)

    def codes(self, n: int, generator: torch.Generator) -> SparseCodes:
        """Return the codes of n new rows."""
        f, device = self.features, self.features.factor.device
        causes = torch.randn(n, f.factor.shape[1], generator=generator, device=device)
        parents = self._with_values(*self._free_cells(n, causes, generator), generator)
        parts = [parents]
        for _ in range(f.tree.n_levels - 1):
            parents = self._children(parents, causes, generator)
            parts.append(parents)
        row, feature, value = (torch.cat(part) for part in zip(*parts, strict=True))
        order = (row * len(f.mean) + feature).argsort()
        crow = F.pad(torch.bincount(row, minlength=n).cumsum(0), (1, 0))
        return SparseCodes.of(Support(crow, feature[order]), value[order], len(f.mean))

    def _free_cells(
        self, n: int, causes: Float[Tensor, "batch rank"], generator: torch.Generator
    ) -> tuple[Int[Tensor, " n_fired"], Int[Tensor, " n_fired"]]:
        """Return rows and features of the cells that fire, of features without a parent."""
        counts = torch.poisson(n * self.usual_rate, generator=generator).long()
        place = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
        row = torch.randint(n, (len(place),), generator=generator, device=counts.device)
        feature = self.free[place]
        if self.is_correlated:
            kept = self._draw(len(place), generator) * self.usual_rate[place] < self._rate(
                feature, self._common(causes, row, feature)
            )
            more_row, more_place = self._beyond_reach(causes)
            more = self.free[more_place]
            lacking = self._rate(more, self._common(causes, more_row, more)) - self.usual_rate[more_place]
            added = self._draw(len(more), generator) < -torch.expm1(-lacking)
            row, feature = torch.cat([row[kept], more_row[added]]), torch.cat([feature[kept], more[added]])
        cell = torch.unique(row * len(self.features.mean) + feature)
        return cell // len(self.features.mean), cell % len(self.features.mean)

    def _beyond_reach(self, causes: Float[Tensor, "batch rank"]) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
        """Return the cells (row, place in `free`) in which the common causes add more than REACH standard deviations."""
        rows, places = [], []
        for begin in range(0, len(self.free), BLOCK):
            feature = self.free[begin : begin + BLOCK]
            unit = self.features.factor[feature] / self.norm[feature].clamp(min=1e-30)[:, None]
            cells = support_of_mask(causes @ unit.T > REACH)
            rows.append(cells.row)
            places.append(begin + cells.latent)
        return torch.cat(rows), torch.cat(places)

    def _with_values(self, row: Int[Tensor, " n"], feature: Int[Tensor, " n"], generator: torch.Generator) -> Firing:
        """Return cells with their codes; those whose code would not be positive are left out."""
        f = self.features
        normal = torch.randn(len(row), generator=generator, device=row.device)
        value = f.mean[feature] + f.std[feature] * normal
        fires = value > 0
        return Firing(row[fires], feature[fires], value[fires])

    def _children(self, parents: Firing, causes: Float[Tensor, "batch rank"], generator: torch.Generator) -> Firing:
        """Return the children that fire in the rows of their parents."""
        f = self.features
        count = f.tree.n_children[parents.feature]
        of = torch.repeat_interleave(torch.arange(len(count), device=count.device), count)
        number = torch.arange(len(of), device=of.device) - (count.cumsum(0) - count)[of]
        child, row = f.tree.first_child[parents.feature][of] + number, parents.row[of]
        probability = torch.special.ndtr((self._common(causes, row, child) - f.threshold[child]) / f.rest[child])
        fires = self._draw(len(child), generator) < probability
        of, row, child = of[fires], row[fires], child[fires]
        normal = torch.randn(len(child), generator=generator, device=child.device)
        value = f.mean[child] + f.std[child] * normal
        kept = value > 0
        if self.exclusive:
            score = torch.randint(1, 1 << 62, (len(child),), generator=generator, device=child.device) * kept
            best = torch.ones_like(count).scatter_reduce(0, of, score, "amax")
            kept = score == best[of]
        if self.scale_children:
            value = value * parents.value[of] / f.mean[parents.feature[of]]
        return Firing(row[kept], child[kept], value[kept])

    def _draw(self, n: int, generator: torch.Generator) -> Float[Tensor, " n"]:
        return torch.rand(n, generator=generator, device=self.features.factor.device)
