"""Rows cut, packed and overlapping: every token once, in order, with the context that was promised."""

import copy
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import saelens_lite as sl
from saelens_lite.config import TextConfig
from saelens_lite.errors import ConfigError, ShapeError, TextError
from saelens_lite.tokens import RowBlocks, TokenRows, text_hash, token_rows
from saelens_lite.tokens.rows import SpecialTokens, TextHash, cut_rows, joined
from saelens_lite.tokens.sources import Piece

BOS, EOS, FIRST = 1, 2, 100  # ordinary tokens are numbered from FIRST on, through all documents
TEXTS = [
    "The quick brown fox jumps over the lazy dog. " * 9,
    "x",
    "naïve café — 漢字 🙂\n\ttabs\n",
    "def f(x):\n    return x\n" * 12,
]


@st.composite
def cases(draw, **fixed):
    """Draw documents of distinct token ids, settings, n_ctx, special tokens, and the documents as pieces."""
    lengths = draw(st.lists(st.integers(0, 30), min_size=1, max_size=6))
    starts = itertools.accumulate(lengths, initial=FIRST)
    documents = [list(range(start, start + n)) for start, n in zip(starts, lengths, strict=False)]
    bos = draw(st.sampled_from(["row", "document", "none"]))
    n_ctx = draw(st.integers(2, 12))
    settings = {
        "bos": bos,
        "pack": draw(st.booleans()),
        "min_context": draw(st.integers(0, n_ctx - 1 - (bos != "none"))),
        "separator": draw(st.sampled_from(["eos", "bos"])),
    } | fixed
    special = SpecialTokens(BOS if bos != "none" else None, EOS if settings["separator"] == "eos" else BOS)
    pieces = []
    for ids in documents:
        cuts = sorted(draw(st.lists(st.integers(0, len(ids)), max_size=3)))
        parts = [ids[a:b] for a, b in itertools.pairwise([0, *cuts, len(ids)])]
        pieces += [Piece(part, i == 0) for i, part in enumerate(parts)]
    return documents, TextConfig(**settings), n_ctx, special, pieces


def new_tokens(rows) -> list[int]:
    """Return the ordinary tokens of rows, without repeated ones."""
    return [i for row in rows for i in row.ids[row.start :] if i >= FIRST]


@given(cases())
def test_every_token_once_and_in_order(case):
    documents, config, n_ctx, special, pieces = case
    rows = list(cut_rows(pieces, config, n_ctx, special))
    assert new_tokens(rows) == list(itertools.chain(*documents))
    assert all(0 < len(row.ids) <= n_ctx for row in rows)
    assert all(i >= FIRST or i in (BOS, EOS) for row in rows for i in row.ids)


@given(cases())
def test_every_token_sees_the_promised_context(case):
    documents, config, n_ctx, special, pieces = case
    index = {token: (ids, j) for ids in documents for j, token in enumerate(ids)}
    for row in cut_rows(pieces, config, n_ctx, special):
        for position in range(row.start, len(row.ids)):
            if row.ids[position] in index:
                ids, j = index[row.ids[position]]
                n = min(config.min_context, j)
                assert row.ids[position - n : position] == ids[j - n : j]


@given(cases(pack=False))
def test_unpacked_rows_hold_one_document(case):
    """The row k of a document begins min_context tokens before the end of row k − 1."""
    documents, config, n_ctx, special, pieces = case
    expected = []
    for number, ids in enumerate(ids for ids in documents if ids):
        start = end = 0
        while end < len(ids):
            has_bos = config.bos == "row" or (config.bos == "document" and end == 0)
            start = max(0, end - config.min_context)
            expected.append(([BOS] * has_bos + ids[start : start + n_ctx - has_bos], has_bos + end - start, number))
            end = start + n_ctx - has_bos
    assert [tuple(row) for row in cut_rows(pieces, config, n_ctx, special)] == expected


@given(cases(pack=True))
def test_packed_rows_are_full_and_documents_separated(case):
    documents, config, n_ctx, special, pieces = case
    rows = list(cut_rows(pieces, config, n_ctx, special))
    assert all(len(row.ids) == n_ctx for row in rows[:-1])
    last_of = {ids[-1]: k for k, ids in enumerate(documents) if ids}
    begins = {ids[0] for ids in documents if ids}
    for row in rows:
        assert (row.ids[0] == BOS) or config.bos != "row"
        for before, here in itertools.pairwise(row.ids):
            if before in last_of:
                assert here == special.separator
            if here in begins and config.bos == "document":
                assert before == BOS
        if config.bos == "none":
            assert not {BOS, EOS} & set(row.ids) - {special.separator}
    n_special = sum(i < FIRST for row in rows for i in row.ids)
    assert n_special <= 2 * len(last_of) + len(rows) * (config.bos != "none")


@given(cases(truncate=True))
def test_truncated_documents_are_what_fits_one_row(case):
    documents, config, n_ctx, special, pieces = case
    rows = list(cut_rows(pieces, config, n_ctx, special))
    assert new_tokens(rows) == [i for ids in documents for i in ids[: n_ctx - (config.bos != "none")]]
    if not config.pack:
        assert len(rows) == sum(len(ids) > 0 for ids in documents)


def test_packing_by_example():
    pieces = [Piece([100, 101, 102], True), Piece([103], True), Piece([104, 105, 106, 107, 108, 109], True)]

    def packed(n_ctx, bos, separator=EOS, **settings):
        special = SpecialTokens(BOS if bos != "none" else None, separator)
        return [row.ids for row in cut_rows(pieces, TextConfig(pack=True, bos=bos, **settings), n_ctx, special)]

    b, s = BOS, EOS
    assert packed(5, "row") == [[b, 100, 101, 102, s], [b, 103, s, 104, 105], [b, 106, 107, 108, 109]]
    assert packed(5, "none") == [[100, 101, 102, s, 103], [104, 105, 106, 107, 108], [109]]
    assert packed(6, "document") == [[b, 100, 101, 102, s, b], [b, 103, s, b, 104, 105], [106, 107, 108, 109]]
    assert packed(6, "document", BOS) == [[b, 100, 101, 102, b, 103], [b, 104, 105, 106, 107, 108], [109]]
    assert packed(5, "row", min_context=2)[2:] == [[b, 104, 105, 106, 107], [b, 106, 107, 108, 109]]


# --- through the tokenizer ---


def ids_of(lm, text: str) -> list[int]:
    return lm.tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize(
    "settings", [{}, {"pack": True}, {"min_context": 7}, {"pack": True, "min_context": 5, "separator": "bos"}]
)
@pytest.mark.parametrize("bos", ["row", "document", "none"])
def test_kept_tokens_are_the_text(lm, settings, bos):
    exclude = () if bos != "row" else (0,)  # where BOS heads every row, position 0 costs no token
    config = TextConfig(n_ctx=16, bos=bos, exclude_positions=exclude, **settings)
    rows = token_rows(lm, TEXTS, text_config=config)
    assert rows.tokens[rows.keep].tolist() == [i for text in TEXTS for i in ids_of(lm, text)]
    assert not (rows.keep & (rows.tokens == lm.bos_id)).any()
    if config.pack:
        ordinary = rows.tokens != lm.bos_id
        assert ordinary[:-1, -2:].any(1).all()  # no padding but in the last row


@pytest.mark.parametrize(
    "settings", [{}, {"pack": True}, {"min_context": 7}, {"bos": "none", "pack": True}, {"truncate": True}]
)
@pytest.mark.parametrize("n_tokens", [None, 1, 60, 137])
def test_blocks_are_the_rows_all_at_once(lm, settings, n_tokens):
    config = TextConfig(n_ctx=16, **settings)
    whole = token_rows(lm, TEXTS, text_config=config, n_tokens=n_tokens)
    for block_tokens in (1, 50, 10_000):
        stream = RowBlocks(lm, iter(TEXTS), config, n_tokens=n_tokens, block_tokens=block_tokens)
        blocks = list(stream)
        rows = joined(blocks, stream.pad)
        assert torch.equal(rows.tokens, whole.tokens)
        assert torch.equal(rows.keep, whole.keep)
        assert all(len(block.tokens) <= max(1, block_tokens // 16) for block in blocks)
        assert stream.record()["text_sha256"] == text_hash(whole)
        assert stream.record()["n_rows"] == len(whole.tokens)
        assert stream.n_kept == whole.n_kept
    available = token_rows(lm, TEXTS, text_config=config).n_kept
    assert whole.n_kept == min(n_tokens or available, available)


def test_excluded_positions_do_not_count(lm):
    everything, without = (
        token_rows(lm, TEXTS, text_config=TextConfig(n_ctx=16, exclude_positions=positions)) for positions in ((), (0, 3, 99))
    )
    assert torch.equal(everything.tokens, without.tokens)
    assert torch.equal(without.keep[:, 3], torch.zeros_like(without.keep[:, 3]))
    everything.keep[:, 3] = False
    assert torch.equal(everything.keep, without.keep)


def test_every_special_token_is_left_out(lm):
    """Not only BOS: whatever the tokenizer calls special."""
    import copy

    other = copy.copy(lm)
    other.tokenizer = copy.deepcopy(lm.tokenizer)
    other.tokenizer.add_special_tokens({"additional_special_tokens": [" the"]})
    (special,) = ids_of(other, " the")
    rows = token_rows(other, "see the dog and the cat<|endoftext|>there", n_ctx=16)
    assert (rows.tokens == special).sum() == 2
    assert not rows.keep[(rows.tokens == special) | (rows.tokens == lm.bos_id)].any()
    between = ("see", " dog and", " cat", "there")
    assert rows.tokens[rows.keep].tolist() == [i for text in between for i in ids_of(lm, text)]


# --- ids instead of text ---


def test_token_rows_stand_as_they_are(lm):
    ids = torch.randint(1, lm.d_vocab, (7, 12), generator=torch.Generator().manual_seed(0))
    ids[2, 5] = lm.bos_id
    for dtype in (torch.int64, torch.int32, torch.int16):
        rows = token_rows(lm, ids.to(dtype))
        assert torch.equal(rows.tokens, ids)
        expected = ids != lm.bos_id
        expected[:, 0] = False
        assert torch.equal(rows.keep, expected)
    blocks = list(RowBlocks(lm, TokenRows(ids, expected), n_tokens=40, block_tokens=24))
    assert [len(block.tokens) for block in blocks] == [2, 2]
    assert torch.cat([block.tokens[block.keep] for block in blocks]).tolist() == ids[expected][:40].tolist()


def test_documents_of_ids_are_cut_like_text(lm):
    ids = [ids_of(lm, text) for text in TEXTS]
    for settings in ({}, {"pack": True}, {"bos": "none"}, {"min_context": 3}):
        config = TextConfig(n_ctx=16, **settings)
        of_text = token_rows(lm, TEXTS, text_config=config)
        of_ids = config.replace(token_column="ids")
        for head in ([], [lm.bos_id])[: 1 + (config.bos != "none")]:  # a BOS of their own is not doubled
            rows = token_rows(lm, [{"ids": head + x} for x in ids], text_config=of_ids)
            assert torch.equal(rows.tokens, of_text.tokens)
            assert torch.equal(rows.keep, of_text.keep)


def test_ids_of_another_model(lm):
    config = TextConfig(token_column="ids")
    for bad in (lm.d_vocab, -1):
        with pytest.raises(TextError, match=rf"document 1 has token ids from .*; tiny has ids 0 to {lm.d_vocab - 1}"):
            token_rows(lm, [{"ids": [5, 6]}, {"ids": [5, bad]}], text_config=config)
        with pytest.raises(ShapeError, match=f"from 0 to {lm.d_vocab - 1}"):
            token_rows(lm, torch.tensor([[5, bad]]))
    with pytest.raises(ShapeError, match=r"expected integer token ids.* found a torch.Tensor of shape \(0, 4\)"):
        token_rows(lm, torch.zeros(0, 4, dtype=torch.long))
    with pytest.raises(ShapeError, match="rows of 300 tokens; tiny takes at most 256"):
        token_rows(lm, torch.ones(2, 300, dtype=torch.long))


@pytest.mark.parametrize("settings", [{"pack": True}, {"min_context": 2}, {"truncate": True}, {"n_ctx": 4}])
def test_rows_are_not_cut_again(lm, settings):
    with pytest.raises(ConfigError, match="token rows of 8 are used unchanged"):
        token_rows(lm, torch.ones(2, 8, dtype=torch.long), text_config=TextConfig(**settings))


# --- settings ---


def test_settings_that_do_not_fit(lm):
    with pytest.raises(ConfigError, match=r"min_context = 15 leaves no room for new tokens; .* 14 for n_ctx = 16"):
        token_rows(lm, "text", text_config=TextConfig(n_ctx=16, min_context=15))
    with pytest.raises(ConfigError, match="unknown key 'packed'; did you mean pack"):
        TextConfig(packed=True)
    with pytest.raises(ConfigError, match=r"exclude_positions\.1 = -3"):
        TextConfig(exclude_positions=(0, -3))
    with pytest.raises(ConfigError, match="max_token_share = 0"):
        TextConfig(max_token_share=0)
    with pytest.raises(TextError, match="nothing was left after tokenising"):
        token_rows(lm, "three words here", text_config=TextConfig(exclude_positions=tuple(range(256))))


def test_a_tokenizer_without_bos(lm):
    import copy

    bare = copy.copy(lm)
    bare.bos_id = None
    with pytest.raises(ConfigError, match="the tokenizer of tiny has no BOS token; set bos='none'"):
        token_rows(bare, TEXTS)
    assert token_rows(bare, torch.tensor([[5, 6, 7]])).n_kept == 2  # rows as they stand need none
    with pytest.raises(ConfigError, match="has no BOS token to put between packed documents"):
        token_rows(bare, TEXTS, text_config=TextConfig(bos="none", pack=True, separator="bos"))
    rows = token_rows(bare, TEXTS, text_config=TextConfig(bos="none", exclude_positions=()))
    assert rows.tokens[rows.keep].tolist() == [i for text in TEXTS for i in ids_of(lm, text)]


def test_settings_are_kept_by_replace():
    config = TextConfig(pack=True).replace(n_ctx=8)
    assert (config.pack, config.n_ctx) == (True, 8)
    assert config.model_fields_set == {"pack", "n_ctx"}
    assert config == TextConfig(pack=True, n_ctx=8)
    assert sl.TextConfig is TextConfig


def test_the_hash_is_of_what_counts(lm):
    rows = token_rows(lm, TEXTS, n_ctx=16)
    wider = joined([rows, TokenRows(torch.ones(1, 40, dtype=torch.long), torch.zeros(1, 40, dtype=torch.bool))], 0)
    assert text_hash(wider[:-1]) == text_hash(rows)
    piecewise = TextHash()
    for block in (rows[:3], rows[3:4], rows[4:]):
        piecewise.add(block)
    assert piecewise.hexdigest() == text_hash(rows)
    assert text_hash(rows.take(torch.tensor([1, 0]))) != text_hash(rows[:2])
    merged = TokenRows(rows.tokens[:2].reshape(1, -1), rows.keep[:2].reshape(1, -1))
    assert text_hash(merged) != text_hash(rows[:2])


def test_rows_are_padded_with_what_ends_a_document(lm):
    """So that a prediction made from its last token is compared with its end."""
    other = copy.copy(lm)
    other.tokenizer = copy.deepcopy(lm.tokenizer)
    other.tokenizer.eos_token = other.tokenizer.convert_ids_to_tokens(700)
    rows = token_rows(other, ["short", "a text of more tokens than the other one has"])
    length = int(rows.keep[0].nonzero().max()) + 1
    assert rows.tokens[0, 0] == lm.bos_id
    assert set(rows.tokens[0, length:].tolist()) == {700}
    assert not rows.keep[0, length:].any()
