"""Captures of several models over the same token ids: one cache whose keys name the models."""

import json

import pytest
import torch

import saelens_lite as sl
from saelens_lite.errors import ConfigError, CorruptFileError, HookError

HOOK, OTHER = "blocks.1.hook_resid_pre", "blocks.2.hook_mlp_out"
SETTINGS = {"n_ctx": 32, "dtype": "float32", "shard_tokens": 101, "batch_tokens": 128}


def tuned():
    """Return the embedded model with other weights in its first block."""
    other = sl.load_model("tiny", device="cpu")
    with torch.no_grad():
        other.blocks[0].mlp.c_proj.weight.mul_(0.5)
    return other


@pytest.fixture(scope="module")
def chat():
    return tuned()


@pytest.fixture(scope="module")
def together(lm, chat, documents, tmp_path_factory):
    """A cache of two models, both in memory."""
    out = tmp_path_factory.mktemp("several") / "cache"
    hooks = [HOOK, f"chat:{OTHER}"]
    return sl.capture({"base": lm, "chat": chat}, documents, hooks, out, text_name="docs", **SETTINGS)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def all_of(cache):
    shards = [cache.read_shard(i) for i in range(len(cache.manifest["shards"]))]
    return {key: torch.cat([shard[key] for shard in shards]) for key in shards[0]}


def test_activations_are_those_of_each_model_alone(together, lm, chat, documents, tmp_path):
    assert together.hooks == (f"base:{HOOK}", f"chat:{HOOK}", f"chat:{OTHER}")
    x = all_of(together)
    for name, model in {"base": lm, "chat": chat}.items():
        alone = sl.capture(model, documents, [HOOK, OTHER], tmp_path / name, **SETTINGS)
        own = all_of(alone)
        assert torch.equal(own["tokens"], x["tokens"])
        for key in together.hooks:
            if key.startswith(name):
                hook = key.split(":")[1]
                assert torch.equal(own[hook], x[key])
                assert torch.equal(alone.statistics(hook).mean, together.statistics(key).mean)
                assert alone.statistics(hook).rms_norm == together.statistics(key).rms_norm
    assert not torch.allclose(x[f"base:{HOOK}"], x[f"chat:{HOOK}"], atol=0.1)


def test_origins_name_the_models(together, lm):
    origin = together.origin(f"chat:{HOOK}")
    assert (origin.model, origin.model_class, [facts.name for facts in origin.models]) == (None, None, ["base", "chat"])
    assert origin.of("base").model == lm.name == "tiny"
    assert (origin.text, origin.n_ctx, origin.prepend_bos) == ("docs", 32, True)


def test_differences_are_stored_at_their_key(together, lm, chat, documents, tmp_path):
    key = f"chat-base:{HOOK}"
    cache = sl.capture({"base": lm, "chat": chat}, documents, key, tmp_path / "c", **SETTINGS)
    x = all_of(together)
    assert torch.equal(all_of(cache)[key], x[f"chat:{HOOK}"] - x[f"base:{HOOK}"])


def test_a_crosscoder_trains_on_the_cache(together, tmp_path):
    reads = (f"base:{HOOK}", f"chat:{HOOK}")
    config = sl.TrainConfig(reads=reads, d_sae=32, options={"k": 4}, n_tokens=512, batch_size=64)
    d = sl.train(together, config, tmp_path / "run")[0].dictionary
    assert [(port.model, port.hook) for port in d.reads] == [("base", HOOK), ("chat", HOOK)]
    assert [facts.name for facts in d.origin.models] == ["base", "chat"]


def test_a_hook_that_a_model_lacks_is_refused(lm, chat, documents, tmp_path):
    with pytest.raises(HookError, match=r"blocks\.99"):
        sl.capture({"base": lm, "chat": chat}, documents, "blocks.99.hook_resid_pre", tmp_path / "c")
    with pytest.raises(ConfigError, match="no model 'other'; the models are base, chat"):
        sl.capture({"base": lm, "chat": chat}, documents, f"other:{HOOK}", tmp_path / "c")


@pytest.mark.parametrize("key", [HOOK, f"other:{HOOK}", f"chat-other:{HOOK}"])
def test_manifests_whose_keys_name_other_models_are_refused(together, tmp_path, key):
    manifest = json.loads((together.path / "manifest.json").read_text())
    manifest["hooks"][key] = manifest["hooks"].pop(f"chat:{OTHER}")
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CorruptFileError, match="names no model, or another than base, chat"):
        sl.ActivationCache.open(tmp_path)
