"""Sums over the sequences of a text that do not depend on the order or the division of the work.

Each sum is two float64 numbers: the rounded sum, and the rest that rounding leaves. Together they have about 106 bits, so their
sum is the same to the last bit in whatever order the terms come, and however many processes share them, but for a chance of
about 2^-50 a term. Firing counts are integers.
Source: Knuth 1997, The Art of Computer Programming 2, section 4.2.2, theorem B (the rest of a rounded sum).

Confidence intervals come from a Poisson bootstrap over documents, because the tokens of one text are not independent: replicate
b weighs each document by a Poisson(1) draw. So only the weighted sums are kept, and memory does not depend on the amount of
text. A draw depends on the seed, the number of the document and the replicate, and on nothing else. Few documents have too
little spread in a bootstrap, and documents of unequal size count as fewer: with n = (Σ size)² / Σ size², intervals are widened
by sqrt(n / (n − 1)) · t / z, where t and z are the quantiles of Student's t with n − 1 degrees of freedom and of the normal
distribution. A report says what was drawn: documents, sequences if there are too few documents, or rows without a model.
Source: Chamandy, Muralidharan, Najmi and Naidu 2012, Estimating uncertainty for massive data streams; Hesterberg 2015,
What teachers should know about the bootstrap (the wider percentile interval); Kish 1965, Survey sampling (n).
"""

import math
from collections.abc import Generator, Sequence
from contextlib import closing
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Num
from torch import Tensor

from saelens_lite.evaluation.floors import t_quantile
from saelens_lite.processes import ALONE, Team
from saelens_lite.seeds import mixed_seed

ROUND = 64  # steps of each process between two moments in which the processes learn of each other's errors
DENSITY_REPLICATES = 100  # bootstrap replicates of the firing counts; fewer, because there is a count for each latent
CHUNK = 1 << 15  # numbers that are added at a time; they fit into a CPU's cache
CHUNK_LATENTS = 1 << 14  # latents whose counts are added at a time
_POISSON = np.floor(2.0**32 * np.cumsum([math.exp(-1) / math.factorial(k) for k in range(13)])).astype(np.uint32)


class Metric(NamedTuple):
    """A value and its 95 % bootstrap confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]" if self.has_interval else f"{self.value:.4g}"

    @property
    def has_interval(self) -> bool:
        """False if there is no interval, as for a text of one sequence."""
        return not math.isnan(self.low)

    @property
    def interval(self) -> str:
        """The interval as text."""
        return f"{self.low:.4g} … {self.high:.4g}" if self.has_interval else "–"

    @property
    def short(self) -> str:
        """The value, to three digits or to the first digit of half of the interval, and that half if there is an interval."""
        half = (self.high - self.low) / 2
        if not math.isfinite(self.value) or self.value == 0:
            shown = f"{self.value:.4g}"
        else:
            digits = [2 - math.floor(math.log10(abs(self.value)))]
            digits += [-math.floor(math.log10(half))] if math.isfinite(half) and half > 0 else []
            shown = f"{self.value:.{min(max(*digits, 0), 9)}f}"
        return shown + (f" ±{half:.1g}" if half < 9.5 else f" ±{half:,.0f}" if self.has_interval else "")


def with_interval(values: Float[Tensor, " replicates"]) -> Metric:
    """Return entry 0 with the central 95 % of the other entries that are finite, or with NaN if no other entry is."""
    replicates = values[1:][torch.isfinite(values[1:])]
    if not len(replicates):
        return Metric(float(values[0]), math.nan, math.nan)
    low, high = torch.quantile(replicates, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Metric(float(values[0]), low, high)


def poisson_weights(seed: int, number: Sequence[int], n: int) -> Int[Tensor, "n_seq n"]:
    """Return n Poisson(1) draws for each sequence. Row i depends only on the seed and number[i], and begins alike for every n.

    The draws are the inverse of the distribution function at 32 random bits, from a counter-based generator (Philox).
    """
    raw = [np.random.Philox(key=seed, counter=[0, 0, i, 0]).random_raw((n + 1) // 2).view(np.uint32)[:n] for i in number]
    drawn = np.searchsorted(_POISSON, np.stack(raw) if raw else np.zeros((0, n), np.uint32), side="right")
    return torch.from_numpy(drawn)


def run_in_rounds(steps: Generator[None, None, None], team: Team) -> None:
    """Run all steps of this process, such as its batches. An error in one process is raised in all.

    The processes meet after every ROUND steps, and those without steps come to the remaining meetings. All steps together may
    take any time, but those of one round must take less than SAELENS_LITE_TIMEOUT.
    """
    with closing(steps):
        is_left = True
        while team.any(is_left):
            with team.failing_together():
                is_left = sum(1 for _ in islice(steps, ROUND)) == ROUND


class ExactSums:
    """Sums of float64 tensors by name, the same in any order of their terms."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, name: str, x: Float[Tensor, "..."]) -> None:
        """Add a tensor, which is overwritten."""
        if name not in self._sums:
            self._sums[name] = x.contiguous(), torch.zeros_like(x, memory_format=torch.contiguous_format)
            return
        size = CHUNK if x.device.type == "cpu" else x.numel()
        parts = (whole.reshape(-1).split(size) for whole in (*self._sums[name], x))
        for total, rest, term in zip(*parts, strict=True):
            new = total + term
            back = new - total
            term.sub_(back)
            torch.sub(new, back, out=back)
            rest.add_(total.sub_(back)).add_(term)
            total.copy_(new)

    def __getitem__(self, name: str) -> Float[Tensor, "..."]:
        return self._value(name)

    def _value(self, name: str, part: Any = ...) -> Float[Tensor, "..."]:
        """Return a sum, or part of it."""
        total, rest = (x[part] for x in self._sums[name])
        return torch.where(total.isfinite(), total + rest, total)  # the rest of an infinite sum is NaN

    def pool(self, team: Team) -> None:
        """Add the sums of all processes, which then have the same."""
        if team.world == 1:
            return
        shapes: dict[str, tuple[int, ...]] = {}
        for known in team.gather({name: tuple(total.shape) for name, (total, _) in self._sums.items()}):
            shapes |= known
        for name, shape in shapes.items():
            own = self._sums.pop(name, None) or (torch.zeros(shape, dtype=torch.float64),) * 2
            parts = [team.stack(part.cpu()) for part in own]
            for total in parts[0]:
                ExactSums.add(self, name, total.clone())
            self._sums[name][1].add_(parts[1].sum(0))


class PooledSums(ExactSums):
    """Weighted sums over sequences: entry 0 has weight 1 for each sequence, entries 1 … n are bootstrap replicates.

    n_units: number of documents of equal size, or of others that the bootstrap draws, in all processes; below two there are no
        intervals.
    """

    def __init__(self, n_bootstrap: int, seed: int, n_units: int | float):
        super().__init__()
        self.n_bootstrap, self.n_units = n_bootstrap, n_units
        self._seed = mixed_seed("bootstrap", seed)
        self._fired: dict[str, Tensor] = {}
        self._weights = torch.empty(0, dtype=torch.float64)
        self._waiting: dict[str, Tensor] = {}
        self._columns: dict[str, dict[str, slice | int]] = {}  # by name of a sum: the columns that it has in a table

    def weigh(self, number: Int[Tensor, " n"]) -> None:
        """Set the weights of the next sequences, given the number of the document of each, or of the sequence itself."""
        self._add_waiting()
        drawn = poisson_weights(self._seed, number.tolist(), self.n_bootstrap)
        self._weights = torch.cat([torch.ones(1, len(number)), drawn.T]).double()

    def add(self, name: str, per_sequence: Num[Tensor, "n ..."]) -> None:
        """Add sums over the tokens of each sequence (scalars or vectors)."""
        if name in self._waiting:
            self._add_waiting()
        self._waiting[name] = per_sequence.cpu().double()

    def _add_waiting(self) -> None:
        """Add all that was measured on the last sequences: one product for one table is faster than one for each sum."""
        if not self._waiting:
            return
        table, width, columns = " ".join(self._waiting), 0, {}
        for name, x in self._waiting.items():
            columns[name] = slice(width, width + x.shape[1]) if x.ndim > 1 else width
            width += x.shape[1] if x.ndim > 1 else 1
            self._columns.setdefault(name, {})[table] = columns[name]
        super().add(table, self._weights @ torch.cat([x.reshape(len(x), -1) for x in self._waiting.values()], dim=1))
        self._waiting = {}

    def __getitem__(self, name: str) -> Float[Tensor, "replicates ..."]:
        self._add_waiting()
        columns = self._columns[name]
        return sum(self._value(table, (slice(None), columns[table])) for table in sorted(columns))  # the same in all processes

    def add_fired(self, name: str, sequence: Int[Tensor, " nnz"], latent: Int[Tensor, " nnz"], d_sae: int) -> None:
        """Count the latents that fire, given the sequence of the batch and the latent for each time that one fires.

        The counts of a dictionary take 8 · (1 + DENSITY_REPLICATES) bytes for each latent, so 808 MB for a million latents. The
        work and the memory beside them grow with the number of pairs, not with d_sae.
        """
        weights = self._weights[: 1 + DENSITY_REPLICATES].T.float()  # sums over a batch are exact in float32
        n = len(weights)
        fired = self._fired.setdefault(name, torch.zeros(d_sae, weights.shape[1], dtype=torch.float64))
        key = latent * n + sequence
        if n * d_sae <= 4 * len(key):  # a dense table is no larger than the codes, and faster
            table = torch.bincount(key, minlength=n * d_sae).reshape(d_sae, n)
            fired.add_(table.cpu().float() @ weights)
            return
        pair, count = (x.cpu() for x in key.unique(return_counts=True))
        latents, n_of_latent = (pair // n).unique_consecutive(return_counts=True)
        start = F.pad(n_of_latent.cumsum(0), (1, 0))
        for first in range(0, len(latents), CHUNK_LATENTS):
            ends = start[first : first + CHUNK_LATENTS + 1]
            some = slice(int(ends[0]), int(ends[-1]))
            counts = F.embedding_bag(
                pair[some] % n, weights, ends - ends[0],
                mode="sum", per_sample_weights=count[some].float(), include_last_offset=True,
            )  # fmt: skip
            fired.index_add_(0, latents[first : first + CHUNK_LATENTS], counts.double())

    def fired(self, name: str) -> Float[Tensor, "d_sae replicates"]:
        """Return how often each latent fired: in column 0 on the text, in others on the replicates."""
        return self._fired[name]

    def pool(self, team: Team = ALONE) -> None:
        """Add the sums and counts of all processes, which then have the same."""
        self._add_waiting()
        super().pool(team)
        if team.world == 1:
            return
        for columns in team.gather(self._columns):
            for name, places in columns.items():
                self._columns[name] = places | self._columns.get(name, {})
        shapes: dict[str, tuple[int, ...]] = {}
        for known in team.gather({name: tuple(counts.shape) for name, counts in self._fired.items()}):
            shapes |= known
        for name, shape in shapes.items():
            self._fired[name] = team.sum(self._fired.pop(name, torch.zeros(shape, dtype=torch.float64)))

    @cached_property
    def widening(self) -> float:
        """The factor by which intervals are wider than the central 95 % of the replicates."""
        return (self.n_units / (self.n_units - 1)) ** 0.5 * t_quantile(0.975, self.n_units - 1) / t_quantile(0.975, math.inf)

    def metric(self, values: Float[Tensor, " replicates"]) -> Metric:
        """Return entry 0 with an interval: the central 95 % of the replicates, made wider. A single unit gives no interval."""
        if self.n_units < 2:
            return with_interval(values[:1])
        value, low, high = with_interval(values)
        return Metric(value, value - (value - low) * self.widening, value + (high - value) * self.widening)
