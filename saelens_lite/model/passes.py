"""One pass of a model over token rows, in batches: it yields the activations with their rows and positions.

    for read in activations(lm, rows, hooks):        each position that counts, once
        read.acts[hook]                              [n d], at read.position of the rows numbered read.row

All code that runs a model over a text does it here: captures, streams, evaluation, probes and feature stores. A batch is cut
after the last position that must be read. Batches in which no position counts are not run. The order "by length" also skips
such rows.

| order | a batch holds | cut after |
| --- | --- | --- |
| "as it is" | consecutive rows | the last position that counts |
| "by length" | rows of similar length, longest first, as many as their width allows | the next token, which is predicted |
| "shuffled" | rows of similar length from the whole text, with batches in random order | the last position that counts |
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelens_lite.cuda_streams import to_device
from saelens_lite.model.models import AnyModel
from saelens_lite.seeds import permutation
from saelens_lite.tokens import TokenRows

BATCH_TOKENS = {"cpu": 2048, "cuda": 16_384}  # a CPU gains nothing from more; a GPU idles with less
BATCH_LOGITS = {"cpu": 1 << 27, "cuda": 1 << 29}

Order = Literal["as it is", "by length", "shuffled"]


class RowBatch(NamedTuple):
    """Rows that go through the model together, and their numbers among all rows."""

    rows: TokenRows
    number: Int[Tensor, " n"]


class Read(NamedTuple):
    """The activations of a batch at the positions that count, row by row; `row` holds the numbers of their rows."""

    batch: RowBatch
    row: Int[Tensor, " n"]
    position: Int[Tensor, " n"]
    acts: dict[str, Float[Tensor, "n _"]]


def default_batch_tokens(lm: AnyModel, *, with_logits: bool = False) -> int:
    """Return the number of tokens in a forward pass; with logits, fewer if the vocabulary is large."""
    kind = "cpu" if lm.device.type == "cpu" else "cuda"
    return min(BATCH_TOKENS[kind], BATCH_LOGITS[kind] // lm.d_vocab) if with_logits else BATCH_TOKENS[kind]


def read_lengths(lm: AnyModel, rows: TokenRows) -> Int[Tensor, " n_seq"]:
    """Return the number of tokens of each row that must be read to cover the positions that count; 0 if none counts."""
    return rows.counted_lengths if lm.is_causal else rows.lengths * rows.keep.any(1)


def batches(
    lm: AnyModel, rows: TokenRows, batch_tokens: int, order: Order = "by length", *, seed: int = 0
) -> Iterator[RowBatch]:
    """Yield the rows in batches of up to `batch_tokens` tokens, or of a single row; `seed` decides the shuffled order."""
    n_ctx, lengths = rows.tokens.shape[1], read_lengths(lm, rows).cpu()
    for number in _numbers(lengths, n_ctx, batch_tokens, order, seed):
        if longest := int(lengths[number].max()):
            width = min(longest + 1, n_ctx) if order == "by length" else longest
            yield RowBatch(rows.take(number).narrowed(width), number)


def _numbers(
    lengths: Int[Tensor, " n_seq"], n_ctx: int, batch_tokens: int, order: Order, seed: int
) -> Iterator[Int[Tensor, " _"]]:
    """Yield the numbers of the rows of each batch."""
    n_rows = max(1, batch_tokens // n_ctx)
    if order == "as it is":
        yield from torch.arange(len(lengths)).split(n_rows)
    elif order == "shuffled":
        mixed = permutation(len(lengths), "rows", seed)
        groups = mixed[lengths[mixed].argsort(stable=True)].split(n_rows)
        yield from (groups[i] for i in permutation(len(groups), "batches", seed).tolist())
    else:
        falling = lengths.argsort(stable=True, descending=True)
        falling = falling[lengths[falling] > 0]
        start = 0
        while start < len(falling):
            width = min(int(lengths[falling[start]]) + 1, n_ctx)
            yield falling[start : start + max(1, batch_tokens // width)]
            start += max(1, batch_tokens // width)


def read(lm: AnyModel, batch: RowBatch, hooks: Sequence[str]) -> Read:
    """Run the model over a batch, up to the deepest hook."""
    acts = lm.run(batch.rows, hooks)
    row, position = batch.rows.keep.cpu().nonzero(as_tuple=True)
    i, j = to_device(torch.stack([row, position]), lm.device)
    return Read(batch, batch.number[row], position, {hook: acts[hook][i, j] for hook in hooks})


def activations(
    lm: AnyModel, rows: TokenRows, hooks: Sequence[str], batch_tokens: int, order: Order = "by length", *, seed: int = 0
) -> Iterator[Read]:
    """Yield the activations at the hooks, batch by batch; see `batches`."""
    for batch in batches(lm, rows, batch_tokens, order, seed=seed):
        yield read(lm, batch, hooks)
