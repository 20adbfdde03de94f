"""A cache holds what the model computes, once each, and gives it back in an order that the seed decides."""

import hashlib
import itertools
import json
from collections import Counter

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.optimize import linear_sum_assignment

import saelens_lite as sl
from saelens_lite.cache import TensorSource
from saelens_lite.cache.shards import CHUNK
from saelens_lite.errors import ConfigError, HookError, NonFiniteError, ShapeError
from saelens_lite.tokens import token_rows

HOOKS = ["blocks.1.hook_resid_pre", "blocks.2.hook_mlp_out"]


def whole(cache: sl.ActivationCache) -> dict[str, torch.Tensor]:
    """Return all shards one after another, read with nothing but safetensors."""
    shards = [load_file(cache.path / shard["file"]) for shard in cache.manifest["shards"]]
    return {key: torch.cat([shard[key] for shard in shards]) for key in shards[0]}


def expected(lm, rows) -> dict[str, torch.Tensor]:
    """Return activations and tokens at the positions that count, row by row."""
    acts = {name: [] for name in HOOKS}
    for tokens, keep in zip(rows.tokens, rows.keep, strict=True):
        for name, x in lm.run(tokens[None], HOOKS).items():
            acts[name].append(x[0, keep])
    return {"tokens": rows.tokens[rows.keep], **{name: torch.cat(x) for name, x in acts.items()}}


def assert_same_multiset(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float) -> None:
    """Check that one matching of read to wanted positions makes all tensors agree, relative to the largest entry of a row."""
    assert len(found["tokens"]) == len(wanted["tokens"])
    a, b = (torch.cat([side[name].double() for name in HOOKS], dim=1) for side in (found, wanted))
    i, j = linear_sum_assignment(torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").numpy())
    assert torch.equal(found["tokens"][i].long(), wanted["tokens"][j])
    for name in HOOKS:
        x, y = found[name][i].double(), wanted[name][j].double()
        assert ((x - y).abs() <= tolerance * y.abs().amax(1, keepdim=True)).all()


@pytest.mark.parametrize(
    ("dtype", "tolerance", "shard_tokens", "batch_tokens"),
    [
        ("float32", 1e-6, 101, 128),
        ("float32", 3e-6, 10_000, 1),  # the model runs on shorter rows
        ("float16", 2**-11 + 1e-6, 7, 64),
        ("bfloat16", 2**-8 + 1e-6, 50, 8192),
    ],
)
def test_captured_values_are_the_models(lm, documents, tmp_path, dtype, tolerance, shard_tokens, batch_tokens):
    rows = token_rows(lm, documents[:3], n_ctx=32)
    settings = {"n_ctx": 32, "dtype": dtype, "shard_tokens": shard_tokens, "batch_tokens": batch_tokens}
    cache = sl.capture(lm, documents[:3], HOOKS, tmp_path / "cache", **settings)
    found = whole(cache)
    assert {found[name].dtype for name in HOOKS} == {getattr(torch, dtype)}
    assert_same_multiset(found, expected(lm, rows), tolerance)
    sizes = [shard["n_tokens"] for shard in cache.manifest["shards"]]
    assert sum(sizes) == rows.n_kept == cache.n_tokens
    assert all(size == shard_tokens for size in sizes[:-1])
    assert 0 < sizes[-1] <= shard_tokens


def test_float16_is_the_rounding_of_the_models_value(lm, tmp_path):
    text = "The old man said that he would not go."
    cache = sl.capture(lm, text, HOOKS[0], tmp_path / "cache", dtype="float16")
    rows = lm.to_tokens(text)
    assert torch.equal(whole(cache)[HOOKS[0]], lm.run(rows, HOOKS[0])[HOOKS[0]][rows.keep].half())


def test_token_rows_and_text_give_the_same_cache(lm, documents, tmp_path):
    rows = token_rows(lm, documents, n_ctx=32, n_tokens=150)
    a = sl.capture(lm, rows, HOOKS, tmp_path / "a")
    b = sl.capture(lm, documents, HOOKS, tmp_path / "b", n_ctx=32, n_tokens=150)
    assert a.n_tokens == 150
    assert {shard["sha256"] for shard in a.manifest["shards"]} == {shard["sha256"] for shard in b.manifest["shards"]}
    assert a.manifest == b.manifest | {"text_config": None}
    assert b.manifest["text_config"] == json.loads(sl.TextConfig(n_ctx=32).model_dump_json())


def test_statistics_are_those_of_all_activations(cache):
    for name, x in whole(cache).items():
        if name in HOOKS:
            x64 = x.numpy().astype(np.float64)
            found = cache.statistics(name)
            np.testing.assert_allclose(found.mean.numpy(), x64.mean(0), rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(found.rms_norm, np.sqrt((x64**2).sum(1).mean()), rtol=1e-6)


def test_statistics_of_a_tensor():
    x = torch.randn(100_001, 5, generator=torch.Generator().manual_seed(0)) + torch.arange(5)
    found = TensorSource(x).statistics("x")
    x64 = x.numpy().astype(np.float64)
    np.testing.assert_allclose(found.mean.numpy(), x64.mean(0), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found.rms_norm, np.sqrt((x64**2).sum(1).mean()), rtol=1e-9)


def test_the_manifest_says_what_is_there(cache, lm, documents):
    manifest = json.loads((cache.path / "manifest.json").read_text())
    rows = token_rows(lm, documents, n_ctx=32)
    assert manifest["format"] == 2
    assert manifest["dtype"] == "float32"
    assert manifest["n_rows"] == len(rows.tokens)
    assert manifest["origin"] == {
        "model": "tiny",
        "revision": None,
        "model_class": "GPT2LMHeadModel",
        "processing": [],
        "n_ctx": 32,
        "prepend_bos": True,
        "text": "some docs",
        "text_sha256": manifest["text_sha256"],
        "excluded_positions": [0],
        "excluded_token_ids": [],
    }
    assert {name: entry["d_in"] for name, entry in manifest["hooks"].items()} == dict.fromkeys(HOOKS, 192)
    assert sorted(p.name for p in cache.path.iterdir()) == ["manifest.json", *(shard["file"] for shard in manifest["shards"])]
    for i, shard in enumerate(manifest["shards"]):
        content = (cache.path / shard["file"]).read_bytes()
        assert shard["file"] == f"shard-{i:05d}.safetensors"
        assert shard["sha256"] == hashlib.sha256(content).hexdigest()
        assert shard["bytes"] == len(content)
        assert shard["n_tokens"] == len(load_file(cache.path / shard["file"])["tokens"])
    assert len(manifest["shards"]) > 3


def test_the_cache_answers_for_its_hooks(cache):
    assert list(cache.hooks) == HOOKS
    assert cache.d_in(HOOKS[1]) == 192
    assert cache.origin(HOOKS[1]) == sl.Origin(
        model="tiny",
        model_class="GPT2LMHeadModel",
        n_ctx=32,
        prepend_bos=True,
        text="some docs",
        text_sha256=cache.manifest["text_sha256"],
    )
    assert f"{cache.n_tokens:,} tokens" in repr(cache)
    with pytest.raises(
        HookError, match=r"has no activations of 'blocks\.1\.hook_resid_post'; did you mean blocks\.1\.hook_resid_pre"
    ):
        cache.d_in("blocks.1.hook_resid_post")
    with pytest.raises(HookError, match=r"blocks\.1\.resid"):
        cache.batches(["blocks.1.resid"], 8, 0)


def row_keys(x: torch.Tensor) -> list[bytes]:
    return [row.numpy().tobytes() for row in x]


@pytest.mark.parametrize("batch_size", [1, 17, 100, 333])
@pytest.mark.parametrize("mixed", [1, 2, 8])
def test_every_activation_once_an_epoch(cache, monkeypatch, batch_size, mixed):
    monkeypatch.setattr(sl.ActivationCache, "POOL_TOKENS", mixed * CHUNK)
    stored = whole(cache)
    n = cache.n_tokens
    pairs = Counter(zip(*(row_keys(stored[name]) for name in HOOKS), strict=True))
    n_batches = -(-2 * n // batch_size)
    batches = list(itertools.islice(cache.batches(HOOKS, batch_size, seed=5), n_batches))
    assert all(batch.keys() == set(HOOKS) for batch in batches)
    assert {len(x) for batch in batches for x in batch.values()} == {batch_size}
    seen = list(zip(*(row_keys(torch.cat([batch[name] for batch in batches])) for name in HOOKS), strict=True))
    first, second = seen[:n], seen[n : 2 * n]
    assert Counter(first) == Counter(second) == pairs  # the hooks stay side by side, too
    assert first != second


@pytest.mark.parametrize(("n", "batch_size"), [(10, 3), (10, 10), (3, 10), (1, 4)])
def test_every_row_of_a_tensor_once_an_epoch(n, batch_size):
    x = torch.arange(float(n))[:, None]
    source = TensorSource(x)
    batches = list(itertools.islice(source.batches(source.hooks, batch_size, seed=0), -(-3 * n // batch_size)))
    assert {tuple(batch["x"].shape) for batch in batches} == {(batch_size, 1)}
    seen = torch.cat([batch["x"] for batch in batches])[: 3 * n].reshape(3, n)
    assert torch.equal(seen.sort(dim=1).values, x.T.expand(3, n))


@pytest.mark.parametrize("kind", ["cache", "tensors"])
def test_the_batches_of_several_processes_are_those_of_one(cache, kind):
    source = cache if kind == "cache" else TensorSource({hook: whole(cache)[hook] for hook in HOOKS})
    batches = list(itertools.islice(source.batches(HOOKS, 48, seed=1, start=2), 9))
    ranks = [itertools.islice(source.batches(HOOKS, 48, 1, 2, rank, 4), 9) for rank in range(4)]
    for batch, *parts in zip(batches, *ranks, strict=True):
        for hook in HOOKS:
            assert torch.equal(torch.cat([part[hook] for part in parts]), batch[hook])
    with pytest.raises(ConfigError, match="50 cannot be divided equally among 4 processes"):
        source.batches(HOOKS, 50, 0, rank=1, world=4)


def test_the_seed_decides_the_order(cache):
    def some(seed):
        return torch.cat([batch[HOOKS[0]] for batch in itertools.islice(cache.batches(HOOKS[:1], 50, seed), 20)])

    assert torch.equal(some(0), some(0))
    assert not torch.equal(some(0), some(1))
    assert not torch.equal(some(0)[:200], whole(cache)[HOOKS[0]][:200])


def test_what_cannot_be_captured(lm, random_lm, tmp_path):
    out = tmp_path / "cache"
    with pytest.raises(ConfigError, match="name at least one hook"):
        sl.capture(lm, "text", [], out)
    with pytest.raises(ConfigError, match="n_ctx = 1000; tiny reads rows of 2 to 256 tokens"):
        sl.capture(lm, "text", HOOKS, out, n_ctx=1000)
    with (
        random_lm.replace("blocks.1.hook_resid_pre", lambda x: x * 1e6),
        pytest.raises(NonFiniteError, match=r"blocks\.2\.hook_resid_pre: NaN, infinity or a number too large for .*float16"),
    ):
        sl.capture(random_lm, "text", "blocks.2.hook_resid_pre", out)
    assert not list(tmp_path.iterdir())


def test_what_is_no_source():
    with pytest.raises(ShapeError, match=r"x has shape \(0, 4\); expected \[n d_in\] with at least one row"):
        TensorSource(torch.zeros(0, 4))
