"""Batches in a fixed order, on which two tools train alike. Needs only torch and numpy, because both processes import it."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor


class Stored:
    """The rows of a .npy file [n d_in], float32, from the first to the last."""

    def __init__(self, file: str):
        self.file = file
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
