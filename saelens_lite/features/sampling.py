"""Random numbers that depend only on a seed, a purpose and coordinates, without the state of a generator.

    u(seed, purpose, i, j, …) = upper 53 bits of splitmix64 of all of them, as a fraction
Source: Steele, Lea and Flood 2014, Fast splittable pseudorandom number generators (the mixing function).
"""

import hashlib

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelens_lite.features.tensors import NONE

GOLDEN, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def uniform(seed: int, purpose: str, *coordinates: Int[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return float64 numbers in [0, 1), one for each tuple of coordinates, which are broadcast."""
    digest = hashlib.sha256(f"{seed} {purpose}".encode()).digest()
    mixed = torch.tensor(int.from_bytes(digest[:8], "little", signed=True))
    for coordinate in coordinates:
        mixed = _mixed(mixed ^ coordinate)
    return _shifted(mixed, 11).double() * 2.0**-53


def _mixed(x: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    x = x + _signed(GOLDEN)
    x = (x ^ _shifted(x, 30)) * _signed(FIRST)
    x = (x ^ _shifted(x, 27)) * _signed(SECOND)
    return x ^ _shifted(x, 31)


def _shifted(x: Int[Tensor, "..."], n: int) -> Int[Tensor, "..."]:
    """Return x shifted right as an unsigned integer."""
    return (x >> n) & ((1 << (64 - n)) - 1)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x


def distinct(n: Int[Tensor, "*shape"], u: Float[Tensor, "*shape k"]) -> Int[Tensor, "*shape k"]:
    """Return k distinct integers from 0 to n − 1, ascending; all sets are equally likely. If n < k, NONE fills the rest.

    Source: Bentley and Floyd 1987, A sample of brilliance.
    """
    k = u.shape[-1]
    size = n.clamp(max=k)
    chosen = torch.full_like(u, NONE, dtype=torch.long)
    for step in range(k):
        last = n - size + step
        drawn = (u[..., step] * (last + 1)).long()
        taken = (chosen == drawn[..., None]).any(-1)
        chosen[..., step] = torch.where(step < size, torch.where(taken, last, drawn), NONE)
    largest = torch.iinfo(torch.long).max
    ascending = torch.where(chosen == NONE, largest, chosen).sort(-1).values
    return torch.where(ascending == largest, NONE, ascending)
