"""The planted features: firing probabilities, trees, common causes, codes and directions.

Firing probabilities follow Zipf's law, p_i = p_min + (p_max − p_min) (i^−s − n^−s) / (1 − n^−s). Features are numbered by them,
and trees take the numbers generation by generation: first all roots, then the children of the first root, and so on. The other
features belong to no tree.

Source: Chanin and Garriga-Alonso 2026, arXiv:2602.14687. There, directions are moved apart by 100 steps of Adam on the sum of
squared overlaps; here by projections, which reach the minimum of the same sum at a small part of the cost.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from saelens_lite.seeds import mixed_seed
from saelens_lite.synthesis.settings import SyntheticConfig

PROJECTIONS = 10  # of the directions; after them the sum of squared overlaps is within 1e-3 of its minimum
MOST_COMMON = 0.99  # share of a feature's variance that common causes may have


class Tree(NamedTuple):
    """The hierarchy of features. A feature without a parent has `parent` −1. Children of a feature have following numbers."""

    parent: Int[Tensor, " n_features"]
    first_child: Int[Tensor, " n_features"]
    n_children: Int[Tensor, " n_features"]
    n_levels: int

    @property
    def n_members(self) -> int:
        """Number of features in trees, roots included."""
        return int(((self.parent >= 0) | (self.n_children > 0)).sum())


class PlantedFeatures(NamedTuple):
    """All that decides which features fire, how strongly, and what they add to an activation.

    wanted: the firing probabilities that are aimed at. base: those before the hierarchy. A feature without a parent fires
    where factor · e + rest · u > threshold, with independent standard normal e [rank], common to all features, and u.
    """

    tree: Tree
    wanted: Float[Tensor, " n_features"]
    base: Float[Tensor, " n_features"]
    factor: Float[Tensor, "n_features rank"]
    rest: Float[Tensor, " n_features"]
    threshold: Float[Tensor, " n_features"]
    mean: Float[Tensor, " n_features"]
    std: Float[Tensor, " n_features"]
    directions: Float[Tensor, "n_features d_in"]
    bias: Float[Tensor, " d_in"]

    def to(self, device: torch.device) -> "PlantedFeatures":
        """Return the features on a device."""
        tree = Tree(*(part.to(device) for part in self.tree[:3]), self.tree.n_levels)
        return PlantedFeatures(tree, *(part.to(device) for part in self[1:]))


def planted_features(config: SyntheticConfig) -> PlantedFeatures:
    """Return the features of a seed."""
    n = config.n_features

    def generator(name: str) -> torch.Generator:
        return torch.Generator().manual_seed(mixed_seed("synthetic", config.seed, name))

    tree = planted_tree(config)
    wanted = zipf(config)
    base = compensated(wanted, tree, config.exclusive) if config.compensate else wanted
    factor = config.correlation * torch.randn(n, config.rank, generator=generator("causes"), dtype=torch.float64)
    norm = factor.norm(dim=1, keepdim=True)
    factor = factor * (MOST_COMMON**0.5 / norm).clamp(max=1)
    rest = (1 - factor.square().sum(1)).sqrt()
    first, last = config.magnitude
    mean, std = config.magnitude_std
    spread = (mean + std * torch.randn(n, generator=generator("codes"), dtype=torch.float64)).abs()
    shift = F.normalize(torch.randn(config.d_in, generator=generator("bias"), dtype=torch.float64), dim=0)
    numbers = {
        "wanted": wanted,
        "base": base,
        "factor": factor,
        "rest": rest,
        "threshold": -torch.special.ndtri(base),
        "mean": torch.linspace(first, last, n, dtype=torch.float64),
        "std": spread,
        "directions": unit_directions(n, config.d_in, config.directions == "spread", generator("directions")),
        "bias": config.bias * shift,
    }
    return PlantedFeatures(tree, **{name: value.float() for name, value in numbers.items()})


def zipf(config: SyntheticConfig) -> Float[Tensor, " n_features"]:
    """Return the firing probabilities that are aimed at, in float64, the largest first."""
    falling = torch.arange(1, config.n_features + 1, dtype=torch.float64) ** -config.exponent
    if config.l0 is not None:
        low, high = 0.0, config.l0 / float(falling[-1])
        for _ in range(100):
            middle = (low + high) / 2
            is_low = float((middle * falling).clamp(max=config.p_max).sum()) < config.l0
            low, high = (middle, high) if is_low else (low, middle)
        return (high * falling).clamp(max=config.p_max)
    if config.n_features == 1:
        return falling * config.p_max
    share = (falling - falling[-1]) / (1 - falling[-1])
    return config.p_min + (config.p_max - config.p_min) * share


def planted_tree(config: SyntheticConfig) -> Tree:
    """Return the hierarchy. The last parent has fewer children if there are not enough features."""
    n = config.n_features
    parent, first, count = (torch.full((n,), value) for value in (-1, 0, 0))
    generation, begin, n_levels = range(config.n_roots), config.n_roots, min(config.n_roots, 1)
    for _ in range(config.depth):
        n_new = min(len(generation) * config.branching, n - begin)
        if n_new <= 0:
            break
        numbers = torch.arange(n_new)
        parent[begin : begin + n_new] = generation.start + numbers // config.branching
        first[generation.start : generation.stop] = begin + config.branching * torch.arange(len(generation))
        generation, begin, n_levels = range(begin, begin + n_new), begin + n_new, n_levels + 1
    has_parent = parent >= 0
    count.index_add_(0, parent[has_parent], has_parent[has_parent].long())
    return Tree(parent, first, count, n_levels)


def compensated(wanted: Float[Tensor, " n_features"], tree: Tree, exclusive: bool) -> Float[Tensor, " n_features"]:
    """Return the probabilities before the hierarchy: p_i / p_parent · (1 + Σ p_sibling / p_parent), at most 1.

    The sum is over the other children of the parent, and is left out if children do not exclude each other. The hierarchy then
    leaves about the wanted probabilities, unless they are too large for the parent.
    """
    child = (tree.parent >= 0).nonzero().squeeze(1)
    parent = tree.parent[child]
    base, share = wanted.clone(), wanted[child] / wanted[parent]
    of_all = torch.zeros_like(wanted).index_add(0, parent, share)[parent]
    base[child] = (share * (1 + of_all - share) if exclusive else share).clamp(max=1)
    return base


def unit_directions(n: int, d_in: int, spread: bool, generator: torch.Generator) -> Float[Tensor, "n d_in"]:
    """Return n random unit vectors in float64, moved apart if `spread`.

    They are projected in turn on the tight frames, for which Σ_{i≠j} <d_i, d_j>² is smallest, and on the unit vectors. If there
    are no more vectors than dimensions, they become orthogonal.
    Source: Tropp, Dhillon, Heath and Strohmer 2005, Designing structured tight frames via an alternating projection method.
    """
    directions = F.normalize(torch.randn(n, d_in, generator=generator, dtype=torch.float64), dim=1)
    for _ in range(PROJECTIONS if spread else 0):
        tall = n >= d_in
        gram = directions.T @ directions if tall else directions @ directions.T
        values, vectors = torch.linalg.eigh(gram)
        inverse_root = (vectors * values.clamp(min=1e-12).rsqrt()) @ vectors.T
        directions = F.normalize(directions @ inverse_root if tall else inverse_root @ directions, dim=1)
    return directions
