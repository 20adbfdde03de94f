"""Activations of a text that several processes compute together, each a share of the model's batches."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from saelens_lite.model import AnyModel, passes
from saelens_lite.prefetch import prefetched
from saelens_lite.processes import Team
from saelens_lite.tokens import RowHash, RowRecord, TokenRows


class UnreadBatch(NamedTuple):
    """Rows for one pass of the model, of whose positions that count the first `n_skipped` are left out.

    read: the record of all rows so far, or None until the rows of an earlier read are known to be the same.
    """

    rows: passes.RowBatch
    n_skipped: int
    n_kept: int
    read: RowRecord | None


def dealt_activations(
    lm: AnyModel,
    blocks: Iterable[TokenRows],
    hooks: Sequence[str],
    batch_tokens: int,
    skip: int,
    read: RowHash,
    workers: Team,
) -> Iterator[tuple[dict[str, Tensor], RowRecord | None]]:
    """Yield the activations at the positions that count, batch by batch, the same in every process.

    Of W workers, number r runs the model on the batches j ≡ r mod W. They exchange what they computed after each W batches, in
    the dtype of the model, so that each holds the activations of W batches. The last batches of a text, fewer than W, are run
    by all. All workers must read equally far.

    Args:
        skip: Leave out this many positions. Batches that lie within them are not run.
        read: Takes in the rows of each batch, also of batches that are not run. Its record after a batch is yielded with the
            activations, or None until the rows of an earlier read are known to be the same.

    Raises:
        ConfigError: the processes read different texts.
        ProcessLostError: one of them ended.
    """
    batches = unread_batches(lm, blocks, batch_tokens, skip, read)
    is_last = False
    while not is_last:
        group = list(itertools.islice(batches, workers.world))
        is_last = len(group) < workers.world
        if workers.world > 1:
            workers.agree({"SHA-256 of the token rows": read.record.sha256, "batches": len(group)}, "texts")
        if workers.world == 1 or is_last:
            pieces = (passes.read(lm, batch.rows, hooks).acts for batch in group)
        else:
            own = passes.read(lm, group[workers.rank].rows, hooks).acts
            shared = {hook: _exchanged(own[hook], [batch.n_kept for batch in group], workers) for hook in hooks}
            pieces = ({hook: shared[hook][i] for hook in hooks} for i in range(len(group)))
        for batch, piece in zip(group, pieces, strict=True):
            yield {hook: x[batch.n_skipped :] for hook, x in piece.items()}, batch.read


def unread_batches(
    lm: AnyModel, blocks: Iterable[TokenRows], batch_tokens: int, skip: int, read: RowHash
) -> Iterator[UnreadBatch]:
    """Yield the batches to run. Rows are shuffled in each block."""
    with prefetched(blocks) as ready:
        for number, rows in enumerate(ready):
            for batch in passes.batches(lm, rows, batch_tokens, "shuffled", seed=number):
                read.add(batch.rows)
                n_kept = batch.rows.n_kept
                n_skipped = min(skip, n_kept)
                skip -= n_skipped
                if n_skipped < n_kept:
                    yield UnreadBatch(batch, n_skipped, n_kept, read.record if read.is_as_expected else None)
    read.end()


def _exchanged(own: Tensor, lengths: list[int], workers: Team) -> list[Tensor]:
    """Return the rows of each worker, whose numbers are known. They travel as bytes, because not every dtype can."""
    sent = own.new_zeros(max(lengths), *own.shape[1:])
    sent[: len(own)] = own
    received = workers.stack(sent.view(torch.uint8)).view(own.dtype)
    return [x[:n] for x, n in zip(received, lengths, strict=True)]
