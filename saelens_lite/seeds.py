"""Random orders that depend only on a tuple of numbers and words, without a shared generator state."""

import hashlib

import torch
from jaxtyping import Int
from torch import Tensor


def mixed_seed(*numbers: int | str) -> int:
    """Return a 32-bit seed for a tuple of numbers and words; torch's CPU generator reads only the lower 32 bits."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:4], "big")


def permutation(n: int, *seed: int | str) -> Int[Tensor, " n"]:
    """Return a random order of n items."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(mixed_seed(*seed)))
