"""Reading begins again at a place in a text, without tokenising the text before, and gives the rows of one pass."""

import functools

import pytest
import torch

import saelens_lite as sl
from saelens_lite.errors import SourceChangedError
from saelens_lite.tokens import Place, RowBlocks, TextHash, blocks, encoding

SETTINGS = [
    {},
    {"pack": True, "min_context": 3},
    {"pack": True, "bos": "document"},
    {"truncate": True},
    {"bos": "none", "min_context": 5},
    {"token_column": "ids"},
]


@pytest.fixture(autouse=True)
def short_stretches(monkeypatch):
    monkeypatch.setattr(blocks, "encode", functools.partial(encoding.encode, stretch=300, context=40))


@pytest.fixture(scope="module")
def texts(documents):
    return [documents[0], "", "<|endoftext|>" * 60 + documents[1], *documents[2:]]


def reading(lm, text, settings, **more) -> RowBlocks:
    config = sl.TextConfig(n_ctx=32, **settings)
    if "token_column" in settings:
        text = [{"ids": lm.tokenizer.encode(document, add_special_tokens=False)} for document in text]
    return RowBlocks(lm, text, config, block_tokens=5 * 32, **more)


@pytest.mark.parametrize("is_one_document", [False, True])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_rows_behind_a_place_are_those_of_one_pass(lm, texts, settings, is_one_document):
    text = ["".join(texts)] if is_one_document else texts
    whole = reading(lm, text, settings)
    read, places = [], []
    for rows in whole:
        read.append(rows)
        places.append(whole.place)
    assert places[-1] is None  # behind the end, where a longer text may go on in another way
    assert len(read) > 3 or settings == {"truncate": True}
    for i, place in enumerate(places[:-1]):
        again = reading(lm, text, settings, start=Place.model_validate_json(place.model_dump_json()))
        for rows in read[: i + 1]:
            again.hash.add_marked(TextHash.marked(rows))
        for rows, j in zip(again, range(i + 1, len(read)), strict=True):
            for name in ("tokens", "keep", "length"):
                assert torch.equal(getattr(rows, name), getattr(read[j], name))
            assert again.place == places[j]
        assert again.record() == whole.record()
        assert (again.n_blocks, again.n_kept, again.width) == (whole.n_blocks, whole.n_kept, whole.width)


def test_another_text_before_a_place_is_noticed(lm, texts):
    whole = reading(lm, texts, {})
    places = [whole.place for _ in whole]
    place = places[len(places) // 2]
    assert place.document > 1
    others = [[texts[1], texts[0], *texts[2:]], [texts[0] + ".", *texts[1:]], texts[:2], ["x" * 500], []]
    others.append([*texts[: place.document], "other " * 400, *texts[place.document + 1 :]])
    for other in others:
        with pytest.raises(SourceChangedError):
            list(reading(lm, other, {}, start=place))


def test_the_text_before_a_place_is_not_tokenised(lm, texts, monkeypatch):
    seen, ids = [], encoding._ids
    monkeypatch.setattr(encoding, "_ids", lambda tokenizer, given: seen.append(sum(map(len, given))) or ids(tokenizer, given))
    whole = reading(lm, texts, {})
    places = [whole.place for _ in whole]
    total = sum(seen)
    seen.clear()
    list(reading(lm, texts, {}, start=places[-2]))
    assert sum(seen) < total / 3


def test_no_place_is_given_where_all_must_be_read_again(lm, texts):
    for balanced in (reading(lm, texts, {"max_token_share": 0.1}), RowBlocks(lm, torch.ones(9, 4, dtype=torch.long))):
        assert {balanced.place for _ in balanced} == {None}
