"""Frequent tokens are thinned out to the share that was asked for, evenly, and the same text gives the same positions."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from saelens_lite.config import TextConfig
from saelens_lite.errors import TextError
from saelens_lite.tokens import RowBlocks, TokenRows
from saelens_lite.tokens.balance import TokenBalance

D_VOCAB = 400


def zipf(n_rows: int, n_ctx: int = 32, seed: int = 0) -> TokenRows:
    """Return rows of tokens whose frequencies fall like 1 / rank, as they do in text."""
    weights = 1 / torch.arange(1, D_VOCAB + 1)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.multinomial(weights, n_rows * n_ctx, replacement=True, generator=generator).reshape(n_rows, n_ctx)
    keep = torch.ones_like(tokens, dtype=torch.bool)
    keep[:, 0] = False
    return TokenRows(tokens, keep)


def thinned(rows: TokenRows, share: float, rows_at_once: int = 10**9) -> tuple[torch.Tensor, TokenBalance]:
    balance, kept = TokenBalance(share, D_VOCAB), []
    for start in range(0, len(rows.tokens), rows_at_once):
        part = rows[start : start + rows_at_once]
        kept.append(balance.thin(part.tokens, part.keep))
        balance.count(part.tokens[part.keep], part.tokens[kept[-1]])
    return torch.cat(kept), balance


def best_possible(counts: np.ndarray, share: float) -> int:
    """Return the largest N with Σ min(count, share · N) ≥ N: what nobody who knows the whole text could exceed."""
    n = counts.sum()
    for _ in range(1000):
        n = np.minimum(counts, np.maximum(1, share * n)).sum()
    return int(n)


@pytest.mark.parametrize(("share", "least"), [(0.3, 0.999), (0.05, 0.99), (0.02, 0.99), (0.01, 0.97), (0.005, 0.9)])
def test_no_token_exceeds_its_share_and_little_is_lost(share, least):
    rows = zipf(3000)
    keep, _ = thinned(rows, share)
    counts, before = (torch.bincount(rows.tokens[mask], minlength=D_VOCAB).numpy() for mask in (keep, rows.keep))
    assert not (keep & ~rows.keep).any()
    assert counts.max() <= share * counts.sum()
    assert counts.sum() >= least * best_possible(before, share)
    rare = before < 0.8 * counts.max()
    assert counts[rare].sum() >= least * before[rare].sum()  # what is not frequent is left alone, but for the first rows


@given(
    ids=st.lists(st.lists(st.integers(0, 12), min_size=4, max_size=4), min_size=1, max_size=30),
    share=st.floats(0.01, 0.99),
    rows_at_once=st.integers(1, 30),
)
def test_the_cap_holds_at_every_moment_and_blocks_do_not_matter(ids, share, rows_at_once):
    tokens = torch.tensor(ids)
    rows = TokenRows(tokens, torch.ones_like(tokens, dtype=torch.bool))
    keep, balance = thinned(rows, share)
    assert torch.equal(keep, thinned(rows, share, rows_at_once)[0])
    seen: Counter[int] = Counter()
    for row, mask in zip(tokens.tolist(), keep.tolist(), strict=True):
        seen.update(token for token, kept in zip(row, mask, strict=True) if kept)
        assert max(seen.values()) <= max(1, share * seen.total())
    assert balance.kept.tolist() == [seen[i] for i in range(D_VOCAB)]
    assert torch.equal(keep[:10], thinned(rows[:10], share)[0])  # a longer text begins like a shorter one


def test_the_place_in_a_row_makes_no_difference():
    rows = zipf(4000)
    keep, _ = thinned(rows, 0.01)
    commonest = rows.keep & (rows.tokens == 0)
    chances = [int((keep & commonest)[:, p].sum()) for p in range(1, 32)]
    expected = commonest[:, 1:].sum(0).numpy() * sum(chances) / int(commonest.sum())
    assert stats.chisquare(chances, expected * sum(chances) / expected.sum()).pvalue > 0.01


def test_through_blocks_and_up_to_n_tokens(lm, documents):
    config = TextConfig(n_ctx=32, max_token_share=0.03)
    blocks = RowBlocks(lm, documents, config, n_tokens=300, block_tokens=64)
    rows = list(blocks)
    counts = Counter(i for block in rows for i in block.tokens[block.keep].tolist())
    assert counts.total() == blocks.n_kept == 300
    assert max(counts.values()) <= 0.03 * 300
    again = list(RowBlocks(lm, documents, config, n_tokens=300))
    assert [i for block in again for i in block.tokens[block.keep].tolist()] == [
        i for block in rows for i in block.tokens[block.keep].tolist()
    ]
    plain = Counter()
    for block in RowBlocks(lm, documents, config.replace(max_token_share=None)):
        plain.update(block.tokens[block.keep].tolist())
    record = blocks.record()["balance"]
    assert record["n_kept"] == 300 < record["n_seen"] < plain.total()
    assert record["largest_share"] == max(counts.values()) / 300
    assert record["n_capped_ids"] >= len(record["most_capped"]) > 3
    lost = [entry["seen"] - entry["kept"] for entry in record["most_capped"]]
    assert lost == sorted(lost, reverse=True)
    assert record["n_seen"] - 300 == sum(lost) or record["n_capped_ids"] > len(lost)
    for entry in record["most_capped"]:
        assert entry["kept"] == counts[entry["id"]]
        assert entry["kept"] < entry["seen"] <= plain[entry["id"]]
        assert entry["token"] == lm.tokenizer.decode([entry["id"]])
    assert RowBlocks(lm, documents).record()["balance"] is None


def test_a_share_no_text_can_have():
    balance, tokens = TokenBalance(0.001, D_VOCAB), torch.zeros(1_100_000, dtype=torch.long)
    with pytest.raises(
        TextError, match=r"max_token_share = 0\.001 leaves 1 of 1,100,000 positions: the text has only 1 different"
    ):
        balance.count(tokens, tokens[:1])
