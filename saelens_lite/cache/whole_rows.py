"""Whole token rows of a text in a shuffled order, for training that runs the model on rows."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from saelens_lite.cache.dealt import UnreadBatch
from saelens_lite.seeds import permutation
from saelens_lite.tokens import RowRecord, TokenRows
from saelens_lite.tokens.rows import joined

POOL = 1 << 16  # positions that count in the rows that are shuffled together


class RowPool(NamedTuple):
    """Rows that are shuffled together, and the record of all rows up to them, if it is known."""

    rows: TokenRows
    record: RowRecord | None


def row_pools(batches: Iterable[UnreadBatch], pad: int) -> Iterator[RowPool]:
    """Yield the rows of one reading of a text in pools of about POOL positions that count.

    Rows in which no position counts, or of which positions are skipped, are left out.
    """
    rows: list[TokenRows] = []
    n, record = 0, None
    for batch in batches:
        here, counts = batch.rows.rows, batch.rows.rows.keep.sum(1)
        chosen = (counts > 0) & (counts.cumsum(0) - counts >= batch.n_skipped)
        record = batch.read
        if chosen.any():
            rows.append(here.take(chosen))
            n += int(counts[chosen].sum())
        if n >= POOL:
            yield RowPool(joined(rows, pad), record)
            rows, n = [], 0
    if rows:
        yield RowPool(joined(rows, pad), record)


def row_batches(pools: Iterable[TokenRows], n_positions: int, seed: int) -> Iterator[TokenRows]:
    """Yield batches of as many whole rows as have at most n_positions positions that count, or of one longer row.

    The rows of each pool are shuffled; the order depends only on them and on the seed. Each batch is cut after the last
    position that counts.
    """
    for number, pool in enumerate(pools):
        shuffled = pool.take(permutation(len(pool.tokens), seed, "rows", number))
        counts = shuffled.keep.sum(1).tolist()
        first = n = 0
        for i, count in enumerate(counts):
            if i > first and n + count > n_positions:
                yield _narrowed(shuffled, first, i)
                first, n = i, 0
            n += count
        yield _narrowed(shuffled, first, len(counts))


def _narrowed(rows: TokenRows, first: int, stop: int) -> TokenRows:
    some = rows.take(torch.arange(first, stop))
    return some.narrowed(int(some.counted_lengths.max()))
