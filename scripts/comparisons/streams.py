"""Batches in a fixed order, on which two tools train alike. Needs only torch and numpy, because both processes import it.

A stream has `mean`, `rms_norm` and `batches(batch_size)`; `opened(stream.description)` makes the same stream again.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class Stored:
    """The rows of a .npy file [n d_in], float32, from the first to the last."""

    def __init__(self, file: str):
        self.description = {"kind": "Stored", "file": file}
        self.x = np.load(file, mmap_mode="r")
        total, square = np.zeros(self.x.shape[1]), 0.0
        for rows in np.array_split(self.x, 1 + len(self.x) // 65_536):
            total += rows.sum(0, dtype=np.float64)
            square += float(np.square(rows, dtype=np.float64).sum())
        self.mean = torch.from_numpy(total / len(self.x)).float()
        self.rms_norm = (square / len(self.x)) ** 0.5

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """Yield all whole batches, once."""
        for start in range(0, len(self.x) - batch_size + 1, batch_size):
            yield torch.from_numpy(self.x[start : start + batch_size].copy())


class Sample(NamedTuple):
    """Activations made of planted directions, x [n d_in], and which are in them, active [n n_directions]."""

    x: Tensor
    active: Tensor


@dataclass
class Planted:
    """x = s · (Σ_i c_i direction_i + noise), without end, each batch new.

    Directions are random unit vectors. Direction i (from 1) is in x with probability p_i = min(p_max, c · i^−exponent),
    independently of the others, c chosen so that `active` of them are in x on average; c_i is then uniform in 0.5 … 1.5.
    Noise is normal, of deviation `noise` in each coordinate. s makes the root mean square norm of x sqrt(d_in).
    """

    d_in: int = 256
    n_directions: int = 1024
    active: float = 8.0
    exponent: float = 1.0
    p_max: float = 0.5
    noise: float = 0.0
    seed: int = 0

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.seed)
        self.directions = F.normalize(torch.randn(self.n_directions, self.d_in, generator=generator), dim=1)
        self.p = _zipf(self.n_directions, self.active, self.exponent, self.p_max)
        mean = self.p @ self.directions.double()  # codes that are not 0 are 1 on average, 13/12 squared
        spread = float((self.p * 13 / 12 - self.p.square()).sum()) + self.d_in * self.noise**2
        self.scale = (self.d_in / (float(mean.square().sum()) + spread)) ** 0.5
        self.mean, self.rms_norm = (self.scale * mean).float(), self.d_in**0.5

    @property
    def description(self) -> dict[str, Any]:
        """Return the description from which `opened` makes the same stream."""
        return {"kind": "Planted", **asdict(self)}

    def sample(self, n: int, generator: torch.Generator) -> Sample:
        """Return n new activations."""
        drawn = torch.rand(n, self.n_directions, generator=generator)
        p = self.p.float()
        active = drawn < p
        flat = torch.from_numpy(np.flatnonzero(active.numpy()))  # several times faster than torch's
        direction = flat % self.n_directions
        strength = 0.5 + drawn.flatten()[flat] / p[direction]  # below p it is uniform there: one random number for both
        begins = F.pad(torch.bincount(flat // self.n_directions, minlength=n).cumsum(0), (1, 0))
        x = F.embedding_bag(
            direction, self.directions, begins, mode="sum", per_sample_weights=strength, include_last_offset=True
        )
        if self.noise:
            x += self.noise * torch.randn(x.shape, generator=generator)
        return Sample(self.scale * x, active)

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """New batches without end, the same each time this is called."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        while True:
            yield self.sample(batch_size, generator).x

    def held_out(self, n: int) -> Sample:
        """Return activations that are in none of the batches."""
        return self.sample(n, torch.Generator().manual_seed(self.seed + 2))


def _zipf(n: int, total: float, exponent: float, largest: float) -> Tensor:
    """Return min(largest, c · i^−exponent) for i = 1 … n in float64, with c such that they add up to `total`."""
    falling = torch.arange(1, n + 1, dtype=torch.float64) ** -exponent
    low, high = 0.0, total / float(falling[-1])
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if float((middle * falling).clamp(max=largest).sum()) < total else (low, middle)
    return (high * falling).clamp(max=largest)


def opened(description: dict[str, Any]) -> Stored | Planted:
    """Return the stream that describes itself so."""
    kinds = {"Stored": Stored, "Planted": Planted}
    return kinds[description["kind"]](**{k: v for k, v in description.items() if k != "kind"})
