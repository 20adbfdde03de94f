"""Documents from strings, files and datasets, a piece at a time; and their tokens, which do not depend on the pieces."""

import itertools
import json
import logging
import sys
import tracemalloc
from pydoc_data.topics import topics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saelens_lite.config import TextConfig
from saelens_lite.errors import ConfigError, CorruptFileError, TextError
from saelens_lite.tokens import Document, PythonDocs, hub_name, name_of, source_name, token_rows
from saelens_lite.tokens.encoding import encode
from saelens_lite.tokens.sources import Piece, read_pieces

TEXTS = ["The quick brown fox. " * 5, "x", "naïve café — Ünïcödé, 漢字 and 🙂\n\ttabs\tand  double  spaces\n", "", "last"]


def read(text, **settings) -> list:
    """Return the documents of a text, their pieces put together."""
    documents = []
    for content, first, _ in read_pieces(text, TextConfig(**settings)):
        if first:
            documents.append(content)
        else:
            documents[-1] += content
    return documents


@pytest.fixture
def files(tmp_path):
    """The same documents as .jsonl and .parquet, with the columns "text", "body" and "ids"."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {"text": TEXTS, "body": [text.upper() for text in TEXTS], "ids": [list(map(ord, text)) for text in TEXTS]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", row_group_size=2)
    records = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, records)) + "\n")
    (tmp_path / "a.txt").write_text("".join(TEXTS), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_files_of_records(files, name):
    assert read(files / name) == TEXTS
    assert read(files / name, column="body") == [text.upper() for text in TEXTS]
    assert read(files / name, token_column="ids") == [list(map(ord, text)) for text in TEXTS]
    assert read([files / name, "between", files / "a.txt"]) == [*TEXTS, "between", "".join(TEXTS)]


def test_a_text_file_is_one_document(files, monkeypatch):
    monkeypatch.setattr("saelens_lite.tokens.sources.READ_CHARS", 7)
    pieces = list(read_pieces(files / "a.txt", TextConfig()))
    assert [piece.first for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    assert {len(piece.content) for piece in pieces[:-1]} == {7}
    assert "".join(piece.content for piece in pieces) == "".join(TEXTS)


def test_datasets_of_every_form(files):
    import datasets

    columns = {"text": TEXTS, "ids": [[1, 2], [], [3], [4, 5, 6], [7]]}
    dataset = datasets.Dataset.from_dict(columns)
    for form in (dataset, dataset.to_iterable_dataset(), dataset.to_list(), iter(dataset), dataset.with_format("torch")):
        assert read(form) == TEXTS
    for form in (dataset, dataset.with_format("numpy"), dataset.with_format("torch")):
        assert read(form, token_column="ids") == columns["ids"]
    splits = datasets.DatasetDict(train=dataset, validation=dataset.select([1, 4]))
    assert read(splits) == TEXTS
    assert read(splits, split="validation") == ["x", "last"]
    with pytest.raises(ConfigError, match=r"no split 'valid'; did you mean validation.*it has train, validation"):
        read(splits, split="valid")


def test_a_dataset_by_its_name(files, monkeypatch):
    """A folder stands in for the Hub: the same loader, streaming, and no network."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    folder = files / "dataset"
    folder.mkdir()
    for split, texts in {"train": TEXTS, "test": ["held", "out"]}.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    assert read(f"hf:{folder}") == TEXTS
    assert (
        read(f"hf:{folder}::test") == read(f"hf:{folder}:default:test") == read(f"hf:{folder}", split="test") == ["held", "out"]
    )
    with pytest.raises(ConfigError, match="split = 'train', but the text names the split 'test'"):
        read(f"hf:{folder}::test", split="train")
    with pytest.raises(TextError, match=r"cannot read the dataset '.*', config None, split 'tset': "):
        read(f"hf:{folder}::tset")
    with pytest.raises(TextError, match="expected a record with the key 'words'; it has text; say which with column="):
        read(f"hf:{folder}", column="words")


def test_which_strings_name_a_dataset():
    assert hub_name("hf:org/name") == ("org/name", None, None)
    assert hub_name("hf:name:config") == ("name", "config", None)
    assert hub_name("hf:org/name:config:split") == ("org/name", "config", "split")
    assert hub_name("hf:org/name::split") == ("org/name", None, "split")
    for text in ("hf:", "hf: a note", "hf:a\nb", "org/name", "see hf:org/name", "hf:a:b:c:d"):
        assert hub_name(text) is None
    assert read("hf: a note") == ["hf: a note"]
    assert read(["hf:org/name"]) == ["hf:org/name"]  # in a list, a string is always a document


def test_the_embedded_corpus_by_its_name():
    for name in PythonDocs.NAMES:
        assert read(name) == [document.text for document in PythonDocs(name)]
        assert name_of(name) == source_name(name) == name
    with pytest.raises(TextError, match="no part 'python-docs:tset'"):
        read("python-docs:tset")
    assert read("python-docs: a note") == ["python-docs: a note"]
    assert read(["python-docs"]) == ["python-docs"]
    assert name_of("python-docs: a note") is source_name("python-docs: a note") is None


def test_documents_and_strings():
    assert read("text") == read(Document("name", "text")) == ["text"]
    assert read(iter(["a", Document("name", "b")])) == ["a", "b"]


def test_a_string_that_names_a_file(files, monkeypatch):
    monkeypatch.chdir(files)
    for text in (str(files / "a.jsonl"), ["first", "a.txt"]):
        with pytest.raises(ConfigError, match=r"names a file; strings are read as text, so give Path\("):
            read(text)
    for text in ("nowhere.txt", "a\0.txt", "long " * 1000 + ".txt"):
        assert read(text) == [text]


@pytest.mark.parametrize(
    "line", ["not json", '{"words": "no key"}', '["a list"]', '{"text": 3}', '{"text": null}', "[" * 100_000]
)
def test_lines_that_are_no_records(tmp_path, line):
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(TextError, match=r"bad\.jsonl, line 2: expected a record with the key 'text'"):
        read(tmp_path / "bad.jsonl")


@pytest.mark.parametrize(
    "ids", ['"text"', "[1, 2.5]", "[[1], [2]]", "3", "null", "[true]", "[1e400]", "[99999999999999999999999]"]
)
def test_values_that_are_no_token_ids(tmp_path, ids):
    (tmp_path / "bad.jsonl").write_text('{"ids": ' + ids + "}\n")
    with pytest.raises(TextError, match=r"line 1: expected a record with the key 'ids' that holds a list of token ids; found"):
        read(tmp_path / "bad.jsonl", token_column="ids")


def test_what_cannot_be_read(files, monkeypatch):
    with pytest.raises(TextError, match=r"no text file at .*nowhere\.txt"):
        read(files / "nowhere.txt")
    (files / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(TextError, match=r"latin\.txt is not UTF-8 text"):
        read(files / "latin.txt")
    (files / "a.pdf").write_bytes(b"%PDF")
    with pytest.raises(ConfigError, match=r"cannot read \.pdf files; give \.txt, \.md, \.csv, \.jsonl or \.parquet"):
        read(files / "a.pdf")
    with pytest.raises(
        ConfigError, match=r"has no column 'txt'; did you mean text\?; it has text, body, ids; say which with column="
    ):
        read(files / "a.parquet", column="txt")
    with pytest.raises(ConfigError, match=r"has no column 'tokens'.*; say which with token_column="):
        read(files / "a.parquet", token_column="tokens")
    with pytest.raises(TextError, match=r"a\.parquet, row 0: expected a record with the key 'ids' that holds text; found \["):
        read(files / "a.parquet", column="ids")
    whole = (files / "a.parquet").read_bytes()
    for damaged in (b"", b"not parquet at all", whole[: len(whole) // 2], whole[:200] + b"\0" * 50 + whole[250:]):
        (files / "b.parquet").write_bytes(damaged)
        with pytest.raises((CorruptFileError, TextError), match=r"b\.parquet"):
            read(files / "b.parquet")
    for text in ("a string", ["a string"], Document("a", "b"), files / "a.txt"):
        with pytest.raises(ConfigError, match="token_column = 'ids' is for "):
            read(text, token_column="ids")
    with pytest.raises(TextError, match="item 1: expected a string, a Document, a Path or a record; found int"):
        list(read_pieces(iter(["a", 1]), TextConfig()))
    for package, text in {"pyarrow": files / "a.parquet", "datasets": "hf:org/name"}.items():
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(ConfigError, match=rf"needs {package}: pip install 'saelens-lite\["):
                read(text)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_a_large_file_is_never_in_memory(tmp_path, suffix):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path, line = tmp_path / f"large{suffix}", "a line of text of no importance, of which there are many\n" * 10
    n = 10_000
    if suffix == ".parquet":
        pq.write_table(pa.table({"text": [f"{i} {line}" for i in range(n)]}), path, row_group_size=500, compression="none")
    else:
        with open(path, "w") as file:
            file.writelines(line if suffix == ".txt" else json.dumps({"text": line}) + "\n" for _ in range(n))
    assert path.stat().st_size > 4e6
    n_chars = arrow = 0
    tracemalloc.start()
    for piece in read_pieces(path, TextConfig()):
        n_chars += len(piece.content)
        arrow = max(arrow, pa.total_allocated_bytes())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n_chars >= n * len(line)
    assert peak < 1e6
    assert arrow < 2e6


def test_nothing_is_read_before_it_is_needed(lm):
    taken = itertools.count()

    def documents():
        while True:
            next(taken)
            yield "once upon a time, " * 30

    assert token_rows(lm, documents(), n_ctx=32, n_tokens=500).n_kept == 500
    assert next(taken) < 200


# --- the tokens of long documents ---


def encoded(tokenizer, text, cuts=(), **sizes) -> tuple[list[int], int]:
    """Return the tokens of a document handed over in pieces that end at `cuts`, and in how many stretches they came."""
    ends = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [Piece(text[a:b], i == 0) for i, (a, b) in enumerate(itertools.pairwise(ends))]
    found = list(encode(tokenizer, pieces, **sizes))
    assert [piece.first for piece in found] == [True] + [False] * (len(found) - 1)
    return [i for piece in found for i in piece.content], len(found)


@pytest.fixture(scope="module")
def prefixing():
    """A tokenizer of the SentencePiece kind: spaces become "▁", and one is put before every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace()
    corpus = list(topics.values())[:10]
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>"], show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


words = st.sampled_from(
    ["the", " the", "\n", "\n\n", "    ", " 1234", "foo.bar(", "é", "漢字", "🙂", "'s", "...", "\t", "\r\n", "A"]
)


@given(parts=st.lists(words, min_size=60, max_size=200), cuts=st.lists(st.integers(0, 800), max_size=4))
def test_pieces_do_not_change_tokens(lm, parts, cuts):
    text = "".join(parts)
    whole = lm.tokenizer.encode(text, add_special_tokens=False)
    assert encoded(lm.tokenizer, text, cuts, stretch=100, context=40)[0] == whole


@pytest.mark.parametrize("which", ["tiny", "prefixing"])
@pytest.mark.parametrize("stretch", [150, 333, 2000])
def test_long_documents_have_the_tokens_of_the_whole(lm, prefixing, which, stretch):
    tokenizer = lm.tokenizer if which == "tiny" else prefixing
    for text in list(topics.values())[10:13]:
        whole = tokenizer.encode(text, add_special_tokens=False)
        ids, n_stretches = encoded(tokenizer, text, stretch=stretch, context=60)
        assert ids == whole
        assert n_stretches >= len(text) // (stretch + 60)


def test_text_without_spaces_is_cut_too(lm):
    text = "".join(chr(0x4E00 + i * 37 % 5000) for i in range(2000))
    ids, n_stretches = encoded(lm.tokenizer, text, stretch=150, context=40)
    assert ids == lm.tokenizer.encode(text, add_special_tokens=False)
    assert n_stretches > 5


def test_text_without_any_border_is_cut_all_the_same(caplog):
    def one_token_a_text(texts, **_):
        return {"input_ids": [[len(text)] for text in texts]}

    with caplog.at_level(logging.WARNING):
        ids, n_stretches = encoded(one_token_a_text, "a" * 1000, stretch=150, context=40)
    assert sum(ids) == 1000
    assert n_stretches == len(ids) == 7
    assert "have no safe border between tokens" in caplog.text


def test_short_documents_stay_apart(lm):
    pieces = [Piece(text, True) for text in TEXTS] * 40
    found = [piece.content for piece in encode(lm.tokenizer, iter(pieces)) if piece.content]
    assert found == [lm.tokenizer.encode(p.content, add_special_tokens=False) for p in pieces if p.content]


def test_file_and_string_have_the_same_rows(lm, files, monkeypatch):
    monkeypatch.setattr("saelens_lite.tokens.sources.READ_CHARS", 11)
    from_file, from_string = (token_rows(lm, text, n_ctx=16) for text in (files / "a.txt", "".join(TEXTS)))
    assert torch.equal(from_file.tokens, from_string.tokens)
    assert torch.equal(from_file.keep, from_string.keep)
