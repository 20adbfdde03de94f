"""The part of a batch and of a dictionary that this process holds, and what it exchanges with the other processes in a step.

A training on several devices can be split along two axes:

- rows: each process has other rows of the batch, and all latents. Gradients are averaged.
- latents: each process has all rows, and other latents, with their moments and counters. For each row, processes exchange the
  values of their k largest pre-activations, add up their parts of x̂, and the gradient of the input bias.

`using(layout)` says how the training in a block is split; without it, one process holds everything, and all functions here are
those of one process. The functions must be called by all processes of a layout, in the same order.

The result does not depend on the number of processes, but for the order of sums: the k largest pre-activations are exact, and
of equal ones the first latents count, as in a single process.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelens_lite.codes import support_of_indices
from saelens_lite.codes.choice import largest_latents, largest_positive_pairs
from saelens_lite.codes.support import Support
from saelens_lite.processes import ALONE, Team


class Layout(NamedTuple):
    """The processes that share a training.

    rows: those with other rows and the same latents as this one. latents: those with the same rows and other latents.
    everyone: all of them, ordered by their rows, then by their latents.
    """

    rows: Team = ALONE
    latents: Team = ALONE
    everyone: Team = ALONE


ALL_HERE = Layout()
_current: ContextVar[Layout] = ContextVar("layout", default=ALL_HERE)


@contextmanager
def using(layout: Layout) -> Iterator[None]:
    """Use a layout in a block."""
    token = _current.set(layout)
    try:
        yield
    finally:
        _current.reset(token)


class _Sum(torch.autograd.Function):
    """Σ part · factor over processes that compute the same loss from it, so the gradient of a part is that of the sum."""

    @staticmethod
    def forward(ctx, part, team, factor):
        return team.sum(part) * factor

    @staticmethod
    def backward(ctx, g):
        return g, None, None


def over_latents(part: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return the sum of what each process has computed from its latents; differentiable."""
    team = _current.get().latents
    return part if team.world == 1 else _Sum.apply(part, team, 1)


def batch_mean(part: Float[Tensor, ""], n_rows: int) -> Float[Tensor, ""]:
    """Return Σ part / number of rows over all rows and latents, given the sum and the rows of this process; differentiable.

    The gradient is that of part / n_rows, because gradients are averaged over the processes with other rows.
    """
    layout, mean = _current.get(), part / n_rows
    return mean if layout.everyone.world == 1 else _Sum.apply(mean, layout.everyone, 1 / layout.rows.world)


def total(part: Tensor) -> Tensor:
    """Return the sum over all rows and latents, given that of this process; without gradient."""
    return _current.get().everyone.sum(part.detach())


def least(entries: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    """Return the least entry over all rows and latents, given those of this process, or inf; without gradient."""
    own = entries.detach().amin() if len(entries) else entries.new_full((), torch.inf)
    return _current.get().everyone.min(own)


def first_latent(n_latents: int) -> int:
    """Return the number of the first latent of this process, if each has `n_latents`."""
    return _current.get().latents.rank * n_latents


def largest(pre: Float[Tensor, "batch n"], k: int) -> Support:
    """Return the k largest pre-activations of each row; of equal ones, the first."""
    return largest_of([pre], k)


def largest_of(tiles: Iterable[Float[Tensor, "rows n"]], k: int, among: Int[Tensor, " n"] | None = None) -> Support:
    """Return the k largest pre-activations of each row, given tiles of rows.

    among: the latents of the columns, ascending; default: all.
    """
    team = _current.get().latents
    tables, values = [], []
    for pre in tiles:
        tables.append(largest_latents(pre, min(k, pre.shape[1])))
        if team.world > 1:
            tables[-1] = tables[-1].sort(1).values
            values.append(pre.gather(1, tables[-1]))
    table = torch.cat(tables)
    support = support_of_indices(table if among is None else among[table], among)
    if team.world == 1:
        return support
    return support.where(_best(torch.cat(values), k, team).flatten())


def _best(value: Float[Tensor, "batch n"], k: int, team: Team) -> Bool[Tensor, "batch n"]:
    """Return which values are among the k largest of all processes in their row; of equal ones, the first.

    value: the at most k largest of this process, in the order of their latents.
    """
    every = team.stack(F.pad(value, (0, k - value.shape[1]), value=-torch.inf))
    kth = rearrange(every, "process batch k -> batch (process k)").topk(k, dim=1).values[:, -1:]
    n_larger, n_equal = (every > kth).sum((0, 2)), (every == kth).sum(2)
    room = k - n_larger - n_equal[: team.rank].sum(0)
    is_equal = value == kth
    return value.isnan() | (value > kth) | (is_equal & (is_equal.cumsum(1) <= room[:, None]))


def largest_positive(pre: Float[Tensor, "batch d_sae"], k: int) -> Support:
    """Return the k · n largest positive pre-activations of a batch of n rows, or all if there are fewer.

    Of equal ones, the first count, by row and then by latent.
    On a GPU, if there are fewer, the largest of the others are there too, because their number is known without waiting.
    """
    layout = _current.get()
    n = k * len(pre) * layout.rows.world
    support = largest_positive_pairs(pre, n)
    if layout.everyone.world == 1:
        return support
    value = pre[support.row, support.latent].nan_to_num(nan=torch.inf)  # NaN counts as largest, so that it is noticed
    every = layout.everyone.cat(value)
    if len(every) <= n:
        return support
    nth = every.kthvalue(len(every) - n + 1).values
    row = support.row + layout.rows.rank * len(pre)
    place = row * (layout.latents.world * pre.shape[1]) + first_latent(pre.shape[1]) + support.latent
    ties = layout.everyone.cat(place[value == nth]).sort().values
    last = ties[n - 1 - int((every > nth).sum())]
    return support.where((value > nth) | ((value == nth) & (place <= last)))


def bound_of_largest(x: Float[Tensor, " m"], n: int) -> Float[Tensor, ""]:
    """Return a number halfway between the nth largest entry over all latents and the next, given the entries of this process.

    No entry is near it, so rounding does not change which entries are above.
    """
    best = x.topk(min(n + 1, len(x))).values
    return _current.get().latents.cat(best).topk(n + 1).values[-2:].mean()
