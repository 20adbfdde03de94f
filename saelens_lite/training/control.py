"""Adjust the coefficient λ of a penalty during training so that the dictionary reaches a target L0.

    e = ln(L0 / target)          L0: a running mean over steps
    ln λ ← ln λ + 1.5 · Δe + r · e · min(60 / n_steps, 1)

with e cut to −1 … 1, and λ kept within a factor of 20 of its start. r is the learning rate relative to its peak: λ changes L0
only through the parameters. Counting by shares of the training makes the same constants fit short and long ones.

While the learning rate decays, λ loses its effect. So then the thresholds of all latents are raised by

    u · (mean excess of pre-activations over the thresholds)          u = 100 · (1 − r) · e / n_steps, at most 0.3 e

which changes L0 by the factor exp(−u) if the excess has an exponential distribution.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from saelens_lite.devices import wide

PROPORTIONAL, INTEGRAL, TRIM, MOST_TRIM = 1.5, 60.0, 100.0, 0.3
RANGE = 20.0  # factor by which λ may leave its start
MEMORY = 0.02, 10  # share of the training over which the running mean of L0 reaches back, and the most steps


class L0Control:
    """The coefficient of a penalty, and the running mean of L0 that it follows. Nothing here waits for a GPU."""

    def __init__(self, start: float, target: float, device: torch.device):
        self.target = target
        self.bounds = math.log(start / RANGE), math.log(start * RANGE)
        self.state = wide(torch.tensor([math.log(start), math.nan], device=device))  # ln λ and e

    @property
    def coefficient(self) -> Float[Tensor, ""]:
        """λ."""
        return self.state[0].exp().float()

    def update(
        self, l0: Float[Tensor, ""], lr_share: float, n_steps: int, is_late: bool, stopped: Tensor | None = None
    ) -> Float[Tensor, ""]:
        """Follow the L0 of a batch, and return u. If `stopped` is true, change nothing and return 0."""
        log_coefficient, before = self.state
        now = (wide(l0).to(self.state.device).clamp(min=0.5 * min(1.0, self.target)) / self.target).log()
        error = torch.where(before.isnan(), now, before.lerp(now, 1 / max(1.0, min(MEMORY[0] * n_steps, MEMORY[1]))))
        change = PROPORTIONAL * torch.where(before.isnan(), 0.0, error - before)
        cut = error.clamp(-1, 1)
        new = (log_coefficient + change + lr_share * min(INTEGRAL / n_steps, 1) * cut).clamp(*self.bounds)
        trim = min(MOST_TRIM, TRIM * (1 - lr_share) / n_steps) * cut if is_late else torch.zeros_like(cut)
        state = torch.stack([new, error])
        if stopped is not None:
            state, trim = torch.where(stopped, self.state, state), torch.where(stopped, 0.0, trim)
        self.state = state
        return trim.float()
