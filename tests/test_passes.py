"""One pass of a model over token rows: each position that counts comes once, for all orders and batch sizes."""

from itertools import chain, pairwise

import pytest
import torch

from saelens_lite.model import passes
from saelens_lite.tokens import TokenRows, token_rows

HOOKS = ["blocks.1.hook_resid_pre", "blocks.2.hook_mlp_out"]
ORDERS = ("as it is", "by length", "shuffled")
N_CTX = 24


@pytest.fixture(scope="module")
def rows(lm, documents) -> TokenRows:
    """Rows of different lengths; one whole row and a part of another do not count."""
    whole = token_rows(lm, documents, n_ctx=N_CTX, n_tokens=700)
    keep = whole.keep.clone()
    keep[3], keep[5, 2:9] = False, False
    assert len({int(n) for n in whole.counted_lengths}) > 5
    return whole._replace(keep=keep)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("batch_tokens", [1, 3 * N_CTX + 5, 10**6])
def test_activations_come_once_with_their_row_and_position(lm, rows, order, batch_tokens):
    whole = lm.run(rows, HOOKS)
    n_seen = torch.zeros_like(rows.keep, dtype=torch.long)
    for read in passes.activations(lm, rows, HOOKS, batch_tokens, order, seed=1):
        n_seen.index_put_((read.row, read.position), torch.tensor(1), accumulate=True)
        for hook in HOOKS:
            torch.testing.assert_close(read.acts[hook], whole[hook][read.row, read.position], rtol=1e-4, atol=1e-4)
    assert torch.equal(n_seen, rows.keep.long())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("batch_tokens", [1, 3 * N_CTX + 5, 10**6])
def test_batches_are_within_the_budget_and_hold_only_needed_positions(lm, rows, order, batch_tokens):
    lengths = rows.counted_lengths
    for batch in passes.batches(lm, rows, batch_tokens, order):
        n, width = batch.rows.tokens.shape
        assert n == 1 or n * width <= batch_tokens
        longest = int(lengths[batch.number].max())
        assert width == (min(longest + 1, rows.tokens.shape[1]) if order == "by length" else longest) > 0
        assert torch.equal(batch.rows.tokens, rows.tokens[batch.number, :width])
        assert torch.equal(batch.rows.lengths, rows.lengths[batch.number].clamp(max=width))


def numbers(lm, rows: TokenRows, order: str, seed: int = 0) -> list[list[int]]:
    return [batch.number.tolist() for batch in passes.batches(lm, rows, 4 * N_CTX, order, seed=seed)]


def test_rows_come_in_the_requested_order(lm, rows):
    n_seq, lengths = len(rows.tokens), rows.counted_lengths
    assert list(chain(*numbers(lm, rows, "as it is"))) == list(range(n_seq))
    by_length = list(chain(*numbers(lm, rows, "by length")))
    assert sorted(by_length) == [i for i in range(n_seq) if lengths[i]]
    assert lengths[by_length].tolist() == sorted(lengths[by_length].tolist(), reverse=True)
    shuffled = numbers(lm, rows, "shuffled")
    assert sorted(chain(*shuffled)) == list(range(n_seq))
    assert shuffled == numbers(lm, rows, "shuffled")
    assert shuffled != numbers(lm, rows, "shuffled", seed=1)
    spans = sorted(sorted(lengths[group].tolist()) for group in shuffled)
    assert all(one[-1] <= other[0] for one, other in pairwise(spans))


@pytest.mark.parametrize("order", ORDERS)
def test_batches_in_which_nothing_counts_are_not_run(lm, rows, order):
    nothing = rows._replace(keep=torch.zeros_like(rows.keep))
    assert list(passes.activations(lm, nothing, HOOKS, 100, order)) == []


def test_rows_of_a_model_that_reads_both_ways_are_read_to_their_end(lm, rows, monkeypatch):
    monkeypatch.setattr(lm, "is_causal", False)
    counted = rows._replace(keep=rows.keep & (torch.arange(rows.tokens.shape[1]) < 3))
    wanted = [n if counts else 0 for n, counts in zip(rows.lengths.tolist(), counted.keep.any(1).tolist(), strict=True)]
    assert passes.read_lengths(lm, counted).tolist() == wanted
    assert max(wanted) > 3


def test_lengths_are_those_of_the_rows_without_padding(rows):
    assert rows.lengths.tolist() == rows.holds_token.sum(1).tolist()
    assert rows._replace(length=None).lengths.tolist() == [rows.tokens.shape[1]] * len(rows.tokens)


def test_the_default_batch_shrinks_with_the_vocabulary_only_where_logits_are_computed(lm, monkeypatch):
    assert passes.default_batch_tokens(lm) == passes.default_batch_tokens(lm, with_logits=True) == 2048
    monkeypatch.setattr(lm, "d_vocab", 1 << 20)
    assert passes.default_batch_tokens(lm) == 2048
    assert passes.default_batch_tokens(lm, with_logits=True) == 128
