"""Rows of a corpus for models that read far more than a corpus needs: how long they are, and who says otherwise."""

import json
import logging
from importlib import import_module

import pytest
import torch

import saelens_lite as sl
from saelens_lite.cache import open_source
from saelens_lite.errors import ConfigError, OutputExistsError
from saelens_lite.evaluation.probing import _rows
from saelens_lite.tokens import RowBlocks, token_rows

HOOK = "blocks.1.hook_resid_pre"
LONG = "The old man looked at the sea, and the sea looked back. " * 200


@pytest.fixture(scope="module")
def wide(lm):
    """A small Llama that reads 131,072 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=lm.d_vocab, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=131_072, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return sl.LanguageModel(LlamaForCausalLM(config), lm.tokenizer, name="wide")


def dictionary(**origin):
    return sl.Dictionary.create(
        "topk", reads=sl.Port(hook=HOOK, width=16), d_sae=32, options={"k": 2}, origin=sl.Origin(**origin)
    )


def test_rows_have_1024_tokens_unless_told_and_the_log_says_so_once(wide, caplog):
    with caplog.at_level(logging.INFO, logger="saelens_lite"):
        rows = token_rows(wide, LONG)
    assert [record.getMessage() for record in caplog.records] == [
        "rows have 1,024 tokens; wide reads up to 131,072: set n_ctx= for more"
    ]
    assert rows.tokens.shape[1] == 1024
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="saelens_lite"):
        whole = token_rows(wide, LONG, n_ctx=4096)
    assert len(whole.tokens) == 1
    assert whole.n_kept == rows.n_kept > 2048
    assert not caplog.records


def test_shorter_contexts_are_whole_rows(lm, caplog):
    with caplog.at_level(logging.INFO, logger="saelens_lite"):
        assert token_rows(lm, LONG).tokens.shape[1] == lm.n_ctx == 256
    assert not caplog.records


def test_min_context_has_to_fit_the_default(wide):
    with pytest.raises(ConfigError, match=r"min_context = 1100 leaves no room for new tokens; .* 1022 for n_ctx = 1024"):
        token_rows(wide, LONG, text_config=sl.TextConfig(min_context=1100))
    assert token_rows(wide, LONG, text_config=sl.TextConfig(min_context=1100, n_ctx=1500)).tokens.shape[1] == 1500


def test_prompts_may_be_longer(wide):
    rows = wide.to_tokens(LONG)
    assert rows.tokens.shape == (1, 1 + len(wide.tokenizer(LONG)["input_ids"]))
    assert wide.run(LONG, HOOK)[HOOK].shape[1] == rows.tokens.shape[1] > 2048


@pytest.mark.parametrize(
    ("origins", "settings", "width"),
    [
        ([{}], {}, 1024),
        ([{"n_ctx": 300}], {}, 300),
        ([{"n_ctx": 2000}], {}, 2000),
        ([{}], {"n_ctx": 1500}, 1500),
        ([{"n_ctx": 300}], {"n_ctx": 1500}, 1500),
        ([{}, {"n_ctx": 1024}], {}, 1024),
    ],
)
@pytest.mark.parametrize("use", ["evaluate", "store"])
def test_the_dictionarys_own_rows_come_before_the_default(wide, monkeypatch, tmp_path, origins, settings, width, use):
    widths = []
    run = wide.module.forward
    monkeypatch.setattr(wide.module, "forward", lambda tokens, **kw: (widths.append(tokens.shape[1]), run(tokens, **kw))[1])
    dictionaries = [dictionary(**origin) for origin in origins]
    if use == "evaluate":
        sl.evaluate(dictionaries, wide, LONG, text_config=sl.TextConfig(**settings), n_bootstrap=2)
        assert max(widths) == width
    else:
        stores = sl.FeatureStore.build(dictionaries, wide, LONG, text_config=sl.TextConfig(**settings), out=tmp_path / "stores")
        assert {store.tensors.tokens.shape[1] for store in stores} == {width}


def test_dictionaries_of_other_rows_than_the_default_are_not_evaluated_together(wide):
    with pytest.raises(ConfigError, match="rows of different kinds, n_ctx = 1024, 512"):
        sl.evaluate([dictionary(), dictionary(n_ctx=512)], wide, LONG)


def test_texts_that_are_probed_are_cut_there_too(wide):
    assert _rows(dictionary(), wide, "data", [LONG, "short"], "max").tokens.shape == (2, 1024)
    assert _rows(dictionary(n_ctx=100), wide, "data", [LONG, "short"], "max").tokens.shape == (2, 100)


def test_a_capture_records_the_length_of_its_rows(wide, tmp_path):
    cache = sl.capture(wide, LONG, HOOK, tmp_path / "cache")
    assert cache.origin(HOOK).n_ctx == 1024
    manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text())
    assert manifest["text_config"]["n_ctx"] == 1024


def test_an_unfinished_capture_of_longer_rows_is_not_continued_with_shorter_ones(wide, tmp_path, monkeypatch):
    """The tokens that count are the same for any length of rows; only the settings tell."""
    module = import_module("saelens_lite.cache.writing")
    write, calls = module.write_shard, []

    def fail_later(*args):
        calls.append(args)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_shard", fail_later)
        with pytest.raises(KeyboardInterrupt):
            sl.capture(wide, LONG, HOOK, tmp_path / "cache", n_ctx=2000, shard_tokens=300)
    with pytest.raises(OutputExistsError):
        sl.capture(wide, LONG, HOOK, tmp_path / "cache", shard_tokens=300)
    cache = sl.capture(wide, LONG, HOOK, tmp_path / "cache", n_ctx=2000, shard_tokens=300)
    assert cache.origin(HOOK).n_ctx == 2000


def test_a_stream_is_opened_again_with_the_rows_it_had(wide, tmp_path, monkeypatch):
    """Also one that was described when rows were as long as the model's context."""
    book = tmp_path / "book.txt"
    book.write_text(LONG)
    stream = sl.ActivationStream(wide, book, HOOK, buffer_tokens=64)
    monkeypatch.setattr("saelens_lite.cache.described.load_model", lambda **_: wide)
    description = stream.describe()
    assert description["text_config"]["n_ctx"] == 1024
    assert open_source(description)._rows().n_ctx == 1024
    assert open_source(description).describe() == description
    description["text_config"]["n_ctx"] = None
    assert open_source(description)._rows().n_ctx == 131_072


def test_the_length_of_blocks_follows(wide):
    assert RowBlocks(wide, LONG, block_tokens=4096).block_rows == 4
