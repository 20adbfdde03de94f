"""Token rows: every token once, in order, and only the positions that count."""

import itertools
import json

import pytest
import torch

from saelens_lite.config import TextConfig
from saelens_lite.errors import ConfigError
from saelens_lite.tokens import Document, TokenRows, is_held_out, python_docs, text_hash, token_rows

TEXTS = [
    "The quick brown fox jumps over the lazy dog. " * 5,
    "x",
    "naïve café — Ünïcödé, 漢字 and 🙂\n\ttabs\tand  double  spaces\n",
    "def f(x):\n    return x + 1\n" * 9,
]


def ids_of(lm, text: str) -> list[int]:
    return lm.tokenizer.encode(text, add_special_tokens=False)


def cut(ids: list[int], n: int) -> list[list[int]]:
    return [ids[i : i + n] for i in range(0, len(ids), n)]


@pytest.mark.parametrize("n_ctx", [2, 5, 16, 256])
@pytest.mark.parametrize("prepend_bos", [True, False])
def test_rows_are_the_documents_cut_in_order(lm, n_ctx, prepend_bos):
    rows = token_rows(lm, TEXTS, n_ctx=n_ctx, prepend_bos=prepend_bos)
    wanted = [piece for text in TEXTS for piece in cut(ids_of(lm, text), n_ctx - prepend_bos)]
    assert rows.tokens.shape == rows.keep.shape == (len(wanted), min(n_ctx, max(map(len, wanted)) + prepend_bos))
    for tokens, keep, piece in zip(rows.tokens.tolist(), rows.keep.tolist(), wanted, strict=True):
        row = [lm.bos_id] * prepend_bos + piece
        assert tokens == row + [lm.bos_id] * (len(tokens) - len(row))  # GPT-2 has no token for padding
        assert keep == [False] + [True] * (len(row) - 1) + [False] * (len(tokens) - len(row))
    assert rows.n_kept == sum(len(piece) - (not prepend_bos) for piece in wanted)


def test_kept_tokens_decode_to_the_text(lm):
    for text in TEXTS:
        rows = token_rows(lm, text, n_ctx=9)
        assert lm.tokenizer.decode(rows.tokens[rows.keep]) == text


@pytest.mark.parametrize("n_tokens", [1, 7, 15, 16, 100, 141])
@pytest.mark.parametrize("prepend_bos", [True, False])
def test_n_tokens_is_met_exactly_and_keeps_the_beginning(lm, n_tokens, prepend_bos):
    everything = token_rows(lm, TEXTS, n_ctx=16, prepend_bos=prepend_bos)
    assert everything.n_kept > 141
    rows = token_rows(lm, TEXTS, n_ctx=16, prepend_bos=prepend_bos, n_tokens=n_tokens)
    assert rows.n_kept == n_tokens
    assert rows.keep[-1].any()
    assert torch.equal(rows.tokens[rows.keep], everything.tokens[everything.keep][:n_tokens])


def test_n_tokens_beyond_the_text_gives_all_of_it(lm):
    rows = token_rows(lm, TEXTS, n_ctx=16, n_tokens=10**9)
    assert torch.equal(rows.tokens, token_rows(lm, TEXTS, n_ctx=16).tokens)


def test_no_more_is_read_than_asked_for(lm):
    endless = ("once upon a time " * 20 for _ in itertools.count())
    assert token_rows(lm, endless, n_ctx=32, n_tokens=500).n_kept == 500


def test_one_row_each(lm):
    rows = token_rows(lm, TEXTS, n_ctx=8, text_config=TextConfig(truncate=True))
    assert len(rows.tokens) == len(TEXTS)
    for tokens, keep, text in zip(rows.tokens, rows.keep, TEXTS, strict=True):
        assert tokens[keep].tolist() == ids_of(lm, text)[:7]


def test_a_row_of_bos_and_padding_alone_is_never_made(lm):
    rows = token_rows(lm, ["", TEXTS[0], ""], n_ctx=16)
    assert torch.equal(rows.tokens, token_rows(lm, TEXTS[0], n_ctx=16).tokens)


def test_to_tokens_keeps_a_row_for_each_text(lm):
    rows = lm.to_tokens(TEXTS)
    assert len(rows.tokens) == len(TEXTS)
    assert rows.tokens[:, 0].tolist() == [lm.bos_id] * len(TEXTS)
    assert not rows.keep[:, 0].any()
    long = lm.to_tokens("word " * 5000)
    assert long.tokens.shape == (1, lm.n_ctx)


def test_documents_never_share_a_row(lm):
    """Tokenising a document by itself gives the same rows as tokenising it among others."""
    together = token_rows(lm, TEXTS, n_ctx=16)
    start = 0
    for text in TEXTS:
        alone = token_rows(lm, text, n_ctx=16)
        length = alone.tokens.shape[1]
        assert torch.equal(together.tokens[start : start + len(alone.tokens), :length], alone.tokens)
        start += len(alone.tokens)
    assert start == len(together.tokens)


def test_a_document_is_its_text(lm):
    document = Document("a name", TEXTS[0])
    wanted = token_rows(lm, TEXTS[0], n_ctx=16)
    assert torch.equal(token_rows(lm, [document], n_ctx=16).tokens, wanted.tokens)
    assert torch.equal(token_rows(lm, document, n_ctx=16).tokens, wanted.tokens)


@pytest.mark.parametrize("n_ctx", [0, 1, 257])
def test_n_ctx_out_of_range(lm, n_ctx):
    with pytest.raises(ConfigError, match=rf"n_ctx = {n_ctx}; tiny reads rows of 2 to 256 tokens"):
        token_rows(lm, "text", n_ctx=n_ctx)


@pytest.mark.parametrize("n_tokens", [0, -5])
def test_n_tokens_must_be_positive(lm, n_tokens):
    with pytest.raises(ConfigError, match=f"n_tokens = {n_tokens}"):
        token_rows(lm, "text", n_ctx=16, n_tokens=n_tokens)


def test_taking_rows(lm):
    rows = token_rows(lm, TEXTS, n_ctx=16)
    order = torch.tensor([2, 0])
    assert torch.equal(rows.take(order).tokens, rows.tokens[[2, 0]])
    assert torch.equal(rows[1:3].keep, rows.keep[1:3])
    assert isinstance(rows[1:3], TokenRows)
    tokens, keep, length, *_ = rows
    assert (tokens is rows.tokens, keep is rows.keep, length is rows.length) == (True, True, True)
    n_rows = [-(-len(lm.tokenizer(text, add_special_tokens=False)["input_ids"]) // 15) for text in TEXTS]  # behind BOS
    assert rows.document.tolist() == [number for number, n in enumerate(n_rows) for _ in range(n)]
    assert torch.equal(rows.take(order).document, rows.document[[2, 0]])


def test_text_hash_sees_tokens_and_kept_positions(lm):
    rows = token_rows(lm, TEXTS, n_ctx=16)
    assert text_hash(rows) == text_hash(token_rows(lm, TEXTS, n_ctx=16))
    assert len(text_hash(rows)) == 64
    other_tokens, other_keep = rows.tokens.clone(), rows.keep.clone()
    other_tokens[0, 1] += 1
    other_keep[0, 1] = False
    variants = [rows._replace(tokens=other_tokens), rows._replace(keep=other_keep), rows[:-1]]
    assert len({text_hash(r) for r in [rows, *variants]}) == 4


def test_python_docs():
    documents = python_docs()
    names = [document.name for document in documents]
    assert names == sorted(set(names))
    assert all(document.text.strip() == document.text != "" for document in documents)
    assert sum(len(document.text) for document in documents) > 1_000_000
    by_name = dict(documents)
    assert json.__doc__.strip()[:40] in by_name["module:json.__init__"]
    assert "json.loads" not in names
    assert "loads\n\nDeserialize" in by_name["module:json.__init__"]
    assert "lambda" in by_name["topic:lambda"]
    assert not any(".tests." in name or ".test." in name for name in names)


def test_python_docs_of_a_made_up_library(tmp_path, monkeypatch):
    files = {
        "b.py": '"""Module b."""\nclass C:\n    """A class."""\n    def m(self):\n        """A method."""\ndef f():\n    0\n',
        "a.py": 'def g():\n    """Only a function."""\n',
        "package/inner.py": '"""Inner."""\n',
        "silent.py": "x = 1\n",
        "broken.py": "def (:\n",
        "test/case.py": '"""A test, left out."""\n',
        "site-packages/other.py": '"""Not the standard library."""\n',
    }
    for name, source in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(source)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    first, second = (python_docs.__wrapped__() for _ in range(2))
    assert first == second
    assert [tuple(document) for document in first if not document.name.startswith("topic:")] == [
        ("module:a", "g\n\nOnly a function."),
        ("module:b", "Module b.\n\nC\n\nA class.\n\nC.m\n\nA method."),
        ("module:package.inner", "Inner."),
    ]


def test_held_out_is_a_tenth_and_never_moves():
    names = [f"topic:{i}" for i in range(20_000)]
    held_out = {name for name in names if is_held_out(name)}
    assert 0.09 < len(held_out) / len(names) < 0.11
    assert held_out == {name for name in reversed(names) if is_held_out(name)}
    assert held_out < {name for name in names if is_held_out(name, percent=20)}
    assert not any(is_held_out(name, percent=0) for name in names)
    documents = python_docs()
    share = sum(len(d.text) for d in documents if is_held_out(d.name)) / sum(len(d.text) for d in documents)
    assert 0.03 < share < 0.3
