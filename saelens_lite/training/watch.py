"""The figures of the steps that the host has not read yet.

On a CPU the host reads the figures of each step before the parameters change. On a GPU, reading makes the host wait and the
GPU idle, so there the figures of many steps are read at once, and a flag on the device stops all updates after a bad step.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

MOST_UNREAD = 256  # steps


class Watch:
    """The losses and other figures of the steps since the last reading. `stopped` is true after a bad step."""

    def __init__(self, device: torch.device):
        self.stopped = torch.zeros((), dtype=torch.bool, device=device)
        self._rows: list[tuple[tuple[str, ...], Tensor]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def note(self, figures: Mapping[str, Tensor], least: Tensor) -> None:
        """Keep the figures of a step, each a tensor with one number. A step is bad if one is not finite, or if `least` < 0."""
        row = torch.stack(list(figures.values()))
        self.stopped = self.stopped | ~torch.isfinite(row).all() | (least < 0)
        self._rows.append((tuple(figures), row))

    def read(self) -> list[dict[str, float]]:
        """Return the figures of each step since the last reading, after waiting for the device."""
        if not self._rows:
            return []
        values = iter(torch.cat([row for _, row in self._rows]).tolist())
        steps = [{name: next(values) for name in names} for names, _ in self._rows]
        self._rows = []
        return steps
