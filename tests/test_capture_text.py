"""Capture from a stream of text: what is stored, what the manifest says of it, and how it ends."""

import functools
import json
import threading
from importlib import import_module

import pytest
import torch
from safetensors.torch import load_file

import saelens_lite as sl
from saelens_lite.errors import TextError
from saelens_lite.tokens import RowBlocks, token_rows

HOOK = "blocks.1.hook_resid_pre"
SETTINGS = {"n_ctx": 32, "pack": True, "min_context": 4, "exclude_positions": (0, 2), "max_token_share": 0.05}


@pytest.fixture
def small_blocks(monkeypatch):
    """Captures whose text comes in blocks of 6 rows."""
    module = import_module("saelens_lite.cache.capture")
    monkeypatch.setattr(module, "RowBlocks", functools.partial(RowBlocks, block_tokens=6 * 32))


def stored(cache, key):
    return torch.cat([load_file(cache.path / shard["file"])[key] for shard in cache.manifest["shards"]])


def test_a_stream_is_captured_whole(lm, documents, tmp_path, small_blocks):
    config = sl.TextConfig(**SETTINGS)
    cache = sl.capture(lm, iter(documents), HOOK, tmp_path / "c", text_config=config, dtype="float32", batch_tokens=100)
    rows = token_rows(lm, documents, text_config=config)
    assert len(rows.tokens) > 12
    found = stored(cache, HOOK)
    expected = lm.run(rows, HOOK)[HOOK][rows.keep]
    order, wanted_order = (x[:, 0].double().sort().indices for x in (found, expected))
    torch.testing.assert_close(found[order], expected[wanted_order], rtol=1e-4, atol=1e-5)
    assert sorted(stored(cache, "tokens").tolist()) == sorted(rows.tokens[rows.keep].tolist())


def test_the_manifest_says_how_the_text_was_read(lm, documents, tmp_path, small_blocks):
    config = sl.TextConfig(**SETTINGS)
    cache = sl.capture(lm, documents, HOOK, tmp_path / "c", text_config=config, n_tokens=250)
    manifest = json.loads((tmp_path / "c/manifest.json").read_text())
    assert sl.TextConfig(**manifest["text_config"]) == config
    tokens = stored(cache, "tokens")
    assert manifest["balance"]["n_kept"] == len(tokens) == 250
    assert manifest["balance"]["largest_share"] == int(torch.bincount(tokens).max()) / 250 <= 0.05
    assert manifest["balance"]["most_capped"]
    assert cache.origin(HOOK).excluded_positions == (0, 2)
    again = sl.capture(lm, documents, HOOK, tmp_path / "d", text_config=config, n_tokens=250)
    assert again.manifest == cache.manifest


def test_the_origin_knows_the_policy(lm, documents, tmp_path):
    for bos, prepended in {"row": True, "document": True, "none": False}.items():
        config = sl.TextConfig(n_ctx=16, bos=bos)
        cache = sl.capture(lm, documents[:2], HOOK, tmp_path / bos, text_config=config)
        assert cache.origin(HOOK).prepend_bos is prepended
    assert sl.capture(lm, documents[0], HOOK, tmp_path / "short", prepend_bos=False).origin(HOOK).prepend_bos is False


def test_a_file_and_its_name(lm, tmp_path):
    path = tmp_path / "pages.jsonl"
    path.write_text('{"body": "Some words on a page."}\n{"body": "Other words."}\n')
    cache = sl.capture(lm, path, HOOK, tmp_path / "c", text_config=sl.TextConfig(column="body"))
    assert cache.origin(HOOK).text == "pages.jsonl"
    ids = [i for t in ("Some words on a page.", "Other words.") for i in lm.tokenizer.encode(t, add_special_tokens=False)]
    assert sorted(stored(cache, "tokens").tolist()) == sorted(ids)


def test_an_error_in_the_middle_leaves_nothing(lm, tmp_path, small_blocks):
    def documents():
        yield "many words " * 500
        raise TextError("the stream broke off")

    before = threading.enumerate()
    with pytest.raises(TextError, match="the stream broke off"):
        sl.capture(lm, documents(), HOOK, tmp_path / "c", n_ctx=32)
    assert not list(tmp_path.iterdir())
    assert threading.enumerate() == before


def test_a_failing_model_ends_the_thread(lm, tmp_path, small_blocks):
    def endless():
        while True:
            yield "many words " * 20

    def fail(x):
        raise RuntimeError("out of memory")

    before = threading.enumerate()
    with lm.replace("blocks.0.hook_resid_pre", fail), pytest.raises(RuntimeError, match="out of memory"):
        sl.capture(lm, endless(), HOOK, tmp_path / "c", n_ctx=32)
    assert not list(tmp_path.iterdir())
    assert threading.enumerate() == before


def test_the_command_line_has_the_same_settings(tmp_path, command):
    def call(*args):
        code, out, err = command(*args)
        assert code == 0, err
        return out

    page = {"body": "It was the best of times, it was the worst of times. " * 40}
    (tmp_path / "a.jsonl").write_text((json.dumps(page) + "\n") * 3)
    call(
        "capture", tmp_path / "a.jsonl", "--hooks", HOOK, "--out", tmp_path / "c", "--column", "body", "--n-ctx", 64, "--pack",
        "--min-context", 8, "--exclude-positions", 0, "--exclude-positions", 1, "--max-token-share", 0.2, "--bos", "document",
    )  # fmt: skip
    manifest = json.loads((tmp_path / "c/manifest.json").read_text())
    wanted = {"column": "body", "n_ctx": 64, "pack": True, "min_context": 8, "exclude_positions": (0, 1), "bos": "document"}
    assert sl.TextConfig(**manifest["text_config"]) == sl.TextConfig(**wanted, max_token_share=0.2)
    run = sl.train(
        sl.ActivationCache.open(tmp_path / "c"), sl.TrainConfig(d_sae=16, n_tokens=512, batch_size=256), tmp_path / "r"
    )
    folder = run[0].folder / "dictionary"
    out = call("eval", folder, "--text", tmp_path / "a.jsonl", "--column", "body", "--n-tokens", 500, "--by-frequency")
    assert "ce_loss_score" in out
    assert "100 – 999 times" in out or "10 – 99 times" in out
