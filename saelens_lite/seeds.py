"""Random orders that follow from a tuple of numbers and words alone: no generator has a state to share."""

import hashlib

import torch
from jaxtyping import Int
from torch import Tensor


def mixed_seed(*numbers: int | str) -> int:
    """Return a seed for each tuple of numbers; torch's CPU generator looks at the lower 32 bits only."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:4], "big")


def permutation(n: int, *seed: int | str) -> Int[Tensor, " n"]:
    """Return a random order of n things."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(mixed_seed(*seed)))
