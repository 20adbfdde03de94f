"""The order in which stored activations are read: shuffled over everything, with bounded memory, and known in advance.

Rows are stored in chunks. An epoch draws the chunks in random order and fills one pool after the other with them; the
rows of a pool are shuffled perfectly. A batch is thus a draw from chunks all over the data. Where a batch stands in all
of this follows from its number alone, so a reader can begin anywhere.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from saelens_lite.prefetch import prefetched
from saelens_lite.seeds import permutation

Pool = tuple[dict[str, Tensor], Int[Tensor, " _"]]


def shuffled_batches(
    lengths: Int[np.ndarray, " n_chunks"],
    pool_rows: int,
    load: Callable[[list[int]], dict[str, Tensor]],
    batch_size: int,
    seed: int,
    start: int = 0,
) -> Iterator[dict[str, Tensor]]:
    """Endless batches of exactly `batch_size` rows, from number `start` on.

    lengths: rows of each chunk. load: the rows of some chunks, one after the other, which a thread asks for in advance.
    """

    def pools() -> Iterator[Pool]:
        epoch, skip = divmod(start * batch_size, int(lengths.sum()))
        for epoch_number in itertools.count(epoch):
            for number, chunks in enumerate(_groups(lengths, pool_rows, seed, epoch_number)):
                n = int(lengths[chunks].sum())
                if skip >= n:
                    skip -= n
                    continue
                yield load(chunks.tolist()), permutation(n, seed, epoch_number, number)[skip:]
                skip = 0

    with prefetched(pools(), depth=1) as ready:
        yield from cut_into_batches(ready, batch_size)


def _groups(lengths: Int[np.ndarray, " n_chunks"], pool_rows: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Chunks in the order of an epoch, in groups of about `pool_rows` rows; a chunk stays whole."""
    order = permutation(len(lengths), seed, epoch).numpy()
    before = np.cumsum(lengths[order]) - lengths[order]
    return np.split(order, np.flatnonzero(np.diff(before // pool_rows)) + 1)


def cut_into_batches(pools: Iterable[Pool], batch_size: int) -> Iterator[dict[str, Tensor]]:
    """Batches of `batch_size` rows from (tensors, order of their rows); what is left over goes to the front of the next."""
    left: dict[str, Tensor] = {}
    n_left = 0
    for tensors, order in pools:
        done = 0
        while n_left + len(order) - done >= batch_size:
            rows = order[done : done + batch_size - n_left]
            yield _joined(left, _rows(tensors, rows))
            left, n_left, done = {}, 0, done + len(rows)
        left = _joined(left, _rows(tensors, order[done:]))
        n_left += len(order) - done


def _rows(tensors: dict[str, Tensor], rows: Int[Tensor, " n"]) -> dict[str, Tensor]:
    return {name: x.index_select(0, rows.to(x.device)) for name, x in tensors.items()}


def _joined(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.cat([first[name], x]) for name, x in second.items()} if first else second
