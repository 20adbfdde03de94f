"""The shuffled order in which stored activations are read, with bounded memory.

Rows are stored in chunks. Each epoch draws the chunks in random order and fills pools with them. The rows of a pool are
shuffled perfectly, so a batch mixes chunks from the whole data. Its rows follow from its number alone, so reading can start at
any batch.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from saelens_lite.cuda_streams import SideStream, to_device
from saelens_lite.errors import ConfigError
from saelens_lite.prefetch import prefetched
from saelens_lite.seeds import permutation

Pool = tuple[dict[str, Tensor], Int[Tensor, " _"]]
MAX_UPLOAD = 1 << 31  # bytes of a pool that is uploaded; a GPU holds two


def part_of(batch_size: int, rank: int, world: int) -> slice:
    """Return the rows of each batch that process number `rank` of `world` reads. All parts in order are the batch.

    Raises:
        ConfigError: the rank is out of range, or the batch cannot be divided into equal parts.
    """
    if not 0 <= rank < world:
        raise ConfigError(f"rank = {rank}, world = {world}; expected at least one process and a rank from 0 to {world - 1}")
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
    device: torch.device | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Yield batches of exactly `batch_size` rows without end, from number `start` on.

    Args:
        lengths: number of rows of each chunk.
        pool_rows: approximate number of rows of a pool.
        load: returns the rows of some chunks, in order; a thread calls it in advance.
        part: rows of each batch to yield; default: all (see `part_of`).
        device: device of the batches; default: that of the rows. To CUDA, whole pools are uploaded in advance.
    """

    def pools() -> Iterator[Pool]:
        epoch, skip = divmod(start * batch_size, int(lengths.sum()))
        for epoch_number in itertools.count(epoch):
            for number, chunks in enumerate(_groups(lengths, pool_rows, seed, epoch_number)):
                n = int(lengths[chunks].sum())
                if skip >= n:
                    skip -= n
                    continue
                order = permutation(n, seed, epoch_number, number)[skip:]
                yield {name: placed(x) for name, x in load(chunks.tolist()).items()}, placed(order)
                skip = 0

    def placed(x: Tensor) -> Tensor:
        return x if device is None else to_device(x, device)

    with prefetched_pools(pools(), device or torch.device("cpu")) as ready:
        yield from cut_into_batches(ready, batch_size, part)


@contextmanager
def prefetched_pools(pools: Iterable[Pool], device: torch.device, read: Iterable[Tensor] = ()) -> Iterator[Iterator[Pool]]:
    """Yield an iterator over the same pools, one of which a thread computes in advance, on CUDA on a stream of its own.

    read: tensors that already exist, and that `pools` reads.
    """
    side = SideStream(device)
    side.lend(read)

    def taken(ready: Iterator[tuple[Pool, Any]]) -> Iterator[Pool]:
        for (tensors, order), mark in ready:
            side.take([*tensors.values(), order], mark)
            yield tensors, order

    with prefetched(side.marked(pools), depth=1) as ready:
        yield taken(ready)


def _groups(lengths: Int[np.ndarray, " n_chunks"], pool_rows: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Return the chunks in the order of an epoch, in groups of about `pool_rows` rows. Chunks stay whole."""
    order = permutation(len(lengths), seed, epoch).numpy()
    before = np.cumsum(lengths[order]) - lengths[order]
    return np.split(order, np.flatnonzero(np.diff(before // pool_rows)) + 1)


def cut_into_batches(pools: Iterable[Pool], batch_size: int, part: slice | None = None) -> Iterator[dict[str, Tensor]]:
    """Yield batches of `batch_size` rows, or a part of each batch.

    Rows that remain at the end of a pool begin the next batch.

    Args:
        pools: tensors, and the order in which to take their rows.
    """
    part = part or slice(0, batch_size)
    left: dict[str, Tensor] = {}
    n_left = 0

    def wanted(rows: Int[Tensor, " n"]) -> Int[Tensor, " n_wanted"]:
        """Return those of the next rows of a batch, which already has n_left, that belong to the part."""
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
