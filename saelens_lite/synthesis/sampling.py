"""Sampling of codes: which features fire in each row, and how strongly.

Given the common causes e of a row, features without a parent fire independently, feature i with probability

    p_i(e) = Φ((factor_i · e − threshold_i) / rest_i)

No normal numbers are drawn for the many features that do not fire. A cell (row, feature) fires if at least one point of a
Poisson process of rate λ = −ln(1 − p) falls into it, which has exactly the probability p. Points are drawn at a rate that does
not depend on the row and that suffices where factor_i · e is at most REACH of its standard deviations; each is kept with the
ratio of both rates. The few cells above that get additional points for the difference.

Children are drawn only in the rows in which their parent fires, with the same probability p_i(e). Of several exclusive children
that fire, one is kept, each with equal chance.
"""

from typing import NamedTuple

import numpy as np
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
        rest = f.rest[:, None]
        self.weights = torch.cat([f.factor / rest, -f.threshold[:, None] / rest], dim=1)  # · (e, 1) is the argument of Φ
        self.free = (f.tree.parent < 0).nonzero().squeeze(1)  # features without a parent
        norm = f.factor[self.free].norm(dim=1)
        self.units = (f.factor[self.free] / norm.clamp(min=1e-30)[:, None]).T.contiguous()
        self.usual_rate = _rate((REACH * norm - f.threshold[self.free]) / f.rest[self.free])
        self.is_correlated = bool((norm > 0).any())

    def _argument(
        self, causes: Float[Tensor, "batch rank_plus_1"], row: Int[Tensor, " n"], feature: Int[Tensor, " n"]
    ) -> Float[Tensor, " n"]:
        """Return the argument of Φ in the probability of some cells."""
        return causes.index_select(0, row).mul_(self.weights.index_select(0, feature)).sum(1)

    def codes(self, n: int, generator: torch.Generator) -> SparseCodes:
        """Return the codes of n new rows."""
        f, device = self.features, self.features.factor.device
        causes = torch.randn(n, f.factor.shape[1], generator=generator, device=device)
        row, feature = self._free_cells(causes, generator)
        causes = F.pad(causes, (0, 1), value=1.0)
        parents = self._with_codes(row, feature, generator)
        parts = [parents]
        for _ in range(f.tree.n_levels - 1):
            parents = self._children(parents, causes, generator)
            parts.append(parents)
        row, feature, value = (torch.cat(part) for part in zip(*parts, strict=True))
        order = (row * len(f.mean) + feature).argsort()
        crow = F.pad(torch.bincount(row, minlength=n).cumsum(0), (1, 0))
        return SparseCodes.of(Support(crow, feature[order]), value[order], len(f.mean))

    def _free_cells(
        self, causes: Float[Tensor, "batch rank"], generator: torch.Generator
    ) -> tuple[Int[Tensor, " n_fired"], Int[Tensor, " n_fired"]]:
        """Return rows and features of the cells that fire, of features without a parent."""
        n, n_features = len(causes), len(self.features.mean)
        place = _repeated(torch.poisson(n * self.usual_rate, generator=generator).long())
        row = torch.randint(n, (len(place),), generator=generator, device=place.device)
        feature = self.free.index_select(0, place)
        if self.is_correlated:
            with_one = F.pad(causes, (0, 1), value=1.0)
            usual = self.usual_rate.index_select(0, place)
            kept = self._draw(len(place), generator).mul_(usual) < _rate(self._argument(with_one, row, feature))
            row, feature = row[kept], feature[kept]
            more_row, more_place = self._beyond_reach(causes)
            more = self.free.index_select(0, more_place)
            lacking = _rate(self._argument(with_one, more_row, more)) - self.usual_rate.index_select(0, more_place)
            added = self._draw(len(more), generator) < -torch.expm1(-lacking)
            row, feature = torch.cat([row, more_row[added]]), torch.cat([feature, more[added]])
        cell = torch.unique(row * n_features + feature)
        row = cell // n_features
        return row, cell - row * n_features

    def _beyond_reach(self, causes: Float[Tensor, "batch rank"]) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
        """Return the cells (row, place in `free`) in which the common causes add more than REACH standard deviations."""
        rows, places = [], []
        for begin in range(0, len(self.free), BLOCK):
            cells = support_of_mask(causes @ self.units[:, begin : begin + BLOCK] > REACH)
            rows.append(cells.row)
            places.append(begin + cells.latent)
        return torch.cat(rows), torch.cat(places)

    def _drawn_codes(self, feature: Int[Tensor, " n"], generator: torch.Generator) -> Float[Tensor, " n"]:
        """Return a code for each cell, which is not always positive."""
        normal = torch.randn(len(feature), generator=generator, device=feature.device)
        return self.features.mean.index_select(0, feature) + self.features.std.index_select(0, feature) * normal

    def _with_codes(self, row: Int[Tensor, " n"], feature: Int[Tensor, " n"], generator: torch.Generator) -> Firing:
        """Return cells with their codes; those whose code would not be positive are left out."""
        value = self._drawn_codes(feature, generator)
        fires = value > 0
        return Firing(row[fires], feature[fires], value[fires])

    def _children(self, parents: Firing, causes: Float[Tensor, "batch rank_plus_1"], generator: torch.Generator) -> Firing:
        """Return the children that fire in the rows of their parents."""
        tree = self.features.tree
        count = tree.n_children.index_select(0, parents.feature)
        of = _repeated(count)
        number = torch.arange(len(of), device=of.device) - (count.cumsum(0) - count).index_select(0, of)
        child = tree.first_child.index_select(0, parents.feature).index_select(0, of) + number
        row = parents.row.index_select(0, of)
        fires = self._draw(len(child), generator) < torch.special.ndtr(self._argument(causes, row, child))
        of, row, child = of[fires], row[fires], child[fires]
        value = self._drawn_codes(child, generator)
        kept = value > 0
        if self.exclusive:
            score = torch.randint(1, 1 << 62, (len(child),), generator=generator, device=child.device) * kept
            best = torch.ones_like(count).scatter_reduce(0, of, score, "amax")
            kept = score == best.index_select(0, of)
        if self.scale_children:
            share = parents.value / self.features.mean.index_select(0, parents.feature)
            value = value * share.index_select(0, of)
        return Firing(row[kept], child[kept], value[kept])

    def _draw(self, n: int, generator: torch.Generator) -> Float[Tensor, " n"]:
        return torch.rand(n, generator=generator, device=self.features.factor.device)


def _rate(argument: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Return −ln(1 − Φ(argument)), the rate at which a cell gets points."""
    return -torch.special.log_ndtr(-argument)


def _repeated(counts: Int[Tensor, " n"]) -> Int[Tensor, " total"]:
    """Return 0, 1, 2, …, each as often as its count."""
    if counts.device.type == "cpu":  # numpy is many times faster
        return torch.from_numpy(np.repeat(np.arange(len(counts)), counts.numpy()))
    return torch.repeat_interleave(counts)
