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

from saelens_lite.errors import ConfigError
from saelens_lite.prefetch import prefetched
from saelens_lite.seeds import permutation

Pool = tuple[dict[str, Tensor], Int[Tensor, " _"]]


def part_of(batch_size: int, rank: int, world: int) -> slice:
    """Return the rows of each batch that process number `rank` of `world` reads; one after the other, they are the batch.

    Raises:
        ConfigError: there is no process of that number, or the batch cannot be divided into equal parts.
    """
    if not 0 <= rank < world:
        raise ConfigError(f"rank = {rank}, world = {world}; expected a rank from 0 to {world - 1} of at least one process")
    if batch_size % world:
        raise ConfigError(f"batch_size = {batch_size} cannot be divided equally among {world} processes; choose a multiple")
    n = batch_size // world
    return slice(rank * n, (rank + 1) * n)


def shuffled_batches(
    lengths: Int[np.ndarray, " n_chunks"],
    pool_rows: int,
    load: Callable[[list[int]], dict[str, Tensor]],
    batch_size: int,
    seed: int,
    start: int = 0,
    part: slice | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Yield batches of exactly `batch_size` rows without end, from number `start` on.

    Args:
        lengths: rows of each chunk.
        load: returns the rows of some chunks, one after the other; a thread calls it in advance.
        part: the rows of each batch that are wanted, if not all of them (see `part_of`).
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
        yield from cut_into_batches(ready, batch_size, part)


def _groups(lengths: Int[np.ndarray, " n_chunks"], pool_rows: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Chunks in the order of an epoch, in groups of about `pool_rows` rows; a chunk stays whole."""
    order = permutation(len(lengths), seed, epoch).numpy()
    before = np.cumsum(lengths[order]) - lengths[order]
    return np.split(order, np.flatnonzero(np.diff(before // pool_rows)) + 1)


def cut_into_batches(pools: Iterable[Pool], batch_size: int, part: slice | None = None) -> Iterator[dict[str, Tensor]]:
    """Yield batches of `batch_size` rows, or a part of each, from (tensors, order of their rows).

    Rows that are left over go to the front of the next batch.
    """
    part = part or slice(0, batch_size)
    left: dict[str, Tensor] = {}
    n_left = 0

    def wanted(rows: Int[Tensor, " n"]) -> Int[Tensor, " n_wanted"]:
        """Keep those of the next rows of a batch, which has n_left already, that are in the part."""
        return rows[max(0, part.start - n_left) : max(0, part.stop - n_left)]

    for tensors, order in pools:
        done = 0
        while n_left + len(order) - done >= batch_size:
            rows = order[done : done + batch_size - n_left]
            yield _joined(left, _rows(tensors, wanted(rows)))
            left, n_left, done = {}, 0, done + len(rows)
        left = _joined(left, _rows(tensors, wanted(order[done:])))
        n_left += len(order) - done


def _rows(tensors: dict[str, Tensor], rows: Int[Tensor, " n"]) -> dict[str, Tensor]:
    return {name: x.index_select(0, rows.to(x.device)) for name, x in tensors.items()}


def _joined(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.cat([first[name], x]) for name, x in second.items()} if first else second
