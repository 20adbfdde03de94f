"""Captures of several models over the same token ids: one cache whose keys name the models."""

import copy
import gc
import json
import os
import weakref

import pytest
import torch

import saelens_lite as sl
from saelens_lite.errors import ConfigError, CorruptFileError, HookError, SourceChangedError

HOOK, OTHER = "blocks.1.hook_resid_pre", "blocks.2.hook_mlp_out"
SETTINGS = {"n_ctx": 32, "dtype": "float32", "shard_tokens": 257, "batch_tokens": 128}


@pytest.fixture(autouse=True)
def without_waiting_for_the_disk(monkeypatch):
    """Nothing cuts the power during these tests."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def copied(lm, name, factor=1.0):
    """Return a model of its own in memory; a factor other than 1 changes the weights of its first block."""
    module = copy.deepcopy(lm.module)
    module.transformer.h[0].mlp.c_proj.weight.mul_(factor)
    return sl.LanguageModel(module, lm.tokenizer, name=name)


@pytest.fixture(scope="module")
def base(random_lm):
    return copied(random_lm, "random")


@pytest.fixture(scope="module")
def chat(random_lm):
    return copied(random_lm, "tuned", 0.5)


@pytest.fixture(scope="module")
def together(base, chat, documents, tmp_path_factory):
    """A cache of two models, both in memory."""
    out = tmp_path_factory.mktemp("several") / "cache"
    hooks = [HOOK, f"chat:{OTHER}"]
    return sl.capture({"base": base, "chat": chat}, documents, hooks, out, text_name="docs", **SETTINGS)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def all_of(cache):
    shards = [cache.read_shard(i) for i in range(len(cache.manifest["shards"]))]
    return {key: torch.cat([shard[key] for shard in shards]) for key in shards[0]}


def test_activations_are_those_of_each_model_alone(together, base, chat, documents, tmp_path):
    assert together.hooks == (f"base:{HOOK}", f"chat:{HOOK}", f"chat:{OTHER}")
    x = all_of(together)
    for name, model in {"base": base, "chat": chat}.items():
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


def test_origins_name_the_models(together):
    origin = together.origin(f"chat:{HOOK}")
    assert (origin.model, origin.model_class, [facts.name for facts in origin.models]) == (None, None, ["base", "chat"])
    assert [origin.of(name).model for name in ("base", "chat")] == ["random", "tuned"]
    assert (origin.text, origin.n_ctx, origin.prepend_bos) == ("docs", 32, True)


def test_differences_are_stored_at_their_key(together, base, chat, documents, tmp_path):
    key = f"chat-base:{HOOK}"
    cache = sl.capture({"base": base, "chat": chat}, documents, key, tmp_path / "c", **SETTINGS)
    x = all_of(together)
    assert torch.equal(all_of(cache)[key], x[f"chat:{HOOK}"] - x[f"base:{HOOK}"])


def test_a_crosscoder_trains_on_the_cache(together, tmp_path):
    reads = (f"base:{HOOK}", f"chat:{HOOK}")
    config = sl.TrainConfig(reads=reads, d_sae=32, options={"k": 4}, n_tokens=512, batch_size=64)
    d = sl.train(together, config, tmp_path / "run")[0].dictionary
    assert [(port.model, port.hook) for port in d.reads] == [("base", HOOK), ("chat", HOOK)]
    assert [facts.name for facts in d.origin.models] == ["base", "chat"]


def test_a_hook_that_a_model_lacks_is_refused(base, chat, documents, tmp_path):
    with pytest.raises(HookError, match=r"blocks\.99"):
        sl.capture({"base": base, "chat": chat}, documents, "blocks.99.hook_resid_pre", tmp_path / "c")
    with pytest.raises(ConfigError, match="no model 'other'; the models are base, chat"):
        sl.capture({"base": base, "chat": chat}, documents, f"other:{HOOK}", tmp_path / "c")


@pytest.mark.parametrize("key", [HOOK, f"other:{HOOK}", f"chat-other:{HOOK}"])
def test_manifests_whose_keys_name_other_models_are_refused(together, tmp_path, key):
    manifest = json.loads((together.path / "manifest.json").read_text())
    manifest["hooks"][key] = manifest["hooks"].pop(f"chat:{OTHER}")
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CorruptFileError, match="names no model, or another than base, chat"):
        sl.ActivationCache.open(tmp_path)


class Loader:
    """Functions that load two models, which record what they loaded and refuse to load while an earlier model is in memory."""

    def __init__(self, lm, **stops):
        self.lm, self.loaded, self._alive, self.stops = lm, [], [], stops

    def models(self):
        return {"base": lambda: self._load("base"), "chat": lambda: self._load("chat")}

    def _load(self, name):
        gc.collect()
        assert [alive for alive in self._alive if alive() is not None] == []
        model = copied(self.lm, "tuned", 0.5) if name == "chat" else copied(self.lm, "random")
        n_left = self.stops.get(name)
        if n_left is not None and name in self.loaded:
            run, calls = model.run, iter(range(n_left))

            def stopping(*args, **kwargs):
                if next(calls, None) is None:
                    raise KeyboardInterrupt
                return run(*args, **kwargs)

            model.run = stopping
        self.loaded.append(name)
        self._alive.append(weakref.ref(model.module))
        return model


HOOKS = [HOOK, f"chat:{OTHER}"]


def test_one_model_at_a_time_gives_the_same_bytes(together, base, documents, tmp_path):
    loader = Loader(base)
    cache = sl.capture(loader.models(), documents, HOOKS, tmp_path / "c", text_name="docs", **SETTINGS)
    assert loader.loaded == ["base", "chat", "base"]  # chat is still in memory after it was looked at
    assert contents(cache.path) == contents(together.path)
    cache.verify()
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_an_interrupted_capture_runs_no_finished_model_again(together, base, documents, tmp_path):
    arguments = (documents, HOOKS, tmp_path / "c")
    with pytest.raises(KeyboardInterrupt):
        sl.capture(Loader(base, base=4).models(), *arguments, text_name="docs", **SETTINGS)
    parts = tmp_path / ".c.unfinished" / "parts"
    assert (parts / "1" / "manifest.json").exists()
    assert len([*(parts / ".0.unfinished" / "shards").iterdir()]) >= 1
    again = Loader(base)
    cache = sl.capture(again.models(), *arguments, text_name="docs", **SETTINGS)
    assert again.loaded == ["base", "chat", "base"]  # chat was looked at, and not run
    assert contents(cache.path) == contents(together.path)


def test_an_interrupted_join_is_resumed(together, base, documents, tmp_path, monkeypatch):
    from saelens_lite.cache import in_turn

    arguments, n_joined = (documents, HOOKS, tmp_path / "c"), iter(range(2))
    write = in_turn.write_shard
    with monkeypatch.context() as patch:

        def stopping(*args):
            if next(n_joined, None) is None:
                raise KeyboardInterrupt
            return write(*args)

        patch.setattr(in_turn, "write_shard", stopping)
        with pytest.raises(KeyboardInterrupt):
            sl.capture(Loader(base).models(), *arguments, text_name="docs", **SETTINGS)
    unfinished = tmp_path / ".c.unfinished"
    assert len([*(unfinished / "shards").iterdir()]) == 2
    assert not (unfinished / "parts" / "0" / "shard-00000.safetensors").exists()  # its place on the disk is free
    with pytest.raises(SourceChangedError, match="the text changed"):
        sl.capture(Loader(base).models(), documents[:-1], HOOKS, tmp_path / "c", text_name="docs", **SETTINGS)
    again = Loader(base)
    cache = sl.capture(again.models(), *arguments, text_name="docs", **SETTINGS)
    assert again.loaded == ["base", "chat"]
    assert contents(cache.path) == contents(together.path)


def test_what_cannot_be_captured_one_model_at_a_time(base, chat, documents, tmp_path):
    names = {"base": "tiny", "chat": "tiny"}
    with pytest.raises(ConfigError, match="needs two models at once; give loaded models, or read chat and base"):
        sl.capture(names, documents, f"chat-base:{HOOK}", tmp_path / "c")
    with pytest.raises(ConfigError, match="not an iterator"):
        sl.capture(names, iter(documents), HOOK, tmp_path / "c")
    with pytest.raises(HookError, match=r"blocks\.99"):
        sl.capture(names, documents, "base:blocks.99.hook_resid_pre", tmp_path / "c")
    with pytest.raises(ConfigError, match="returned a str; expected a LanguageModel"):
        sl.capture({"base": lambda: "tiny"}, documents, HOOK, tmp_path / "c")
    each = iter([base, chat, chat])
    with pytest.raises(ConfigError, match="loading 'base' twice gave two different models"):
        sl.capture({"base": lambda: next(each), "chat": lambda: next(each)}, documents, HOOK, tmp_path / "c", **SETTINGS)


def test_names_of_models_are_loaded(documents, tmp_path):
    cache = sl.capture({"base": "tiny"}, documents, HOOK, tmp_path / "c", n_tokens=50, n_ctx=16)
    assert (cache.hooks, cache.n_tokens, cache.origin(cache.hooks[0]).of("base").model) == ((f"base:{HOOK}",), 50, "tiny")


def test_the_command_captures_several_models(command, documents, tmp_path):
    text = tmp_path / "book.txt"
    text.write_text(" ".join(documents))
    models = ("--model", "base=tiny", "--model", "chat=tiny")
    for out, flags in {"together": (), "in-turn": ("--one-at-a-time",)}.items():
        usual = ("--n-tokens", 60, "--n-ctx", 16, "--out", tmp_path / out)
        code, _, err = command("capture", text, *models, "--hook", HOOK, "--hook", f"chat:{OTHER}", *usual, *flags)
        assert code == 0, err
    cache = sl.ActivationCache.open(tmp_path / "together")
    assert cache.hooks == (f"base:{HOOK}", f"chat:{HOOK}", f"chat:{OTHER}")
    assert contents(tmp_path / "in-turn") == contents(cache.path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--model", "base=tiny", "--model", "tiny"), "expected NAME=MODEL"),
        (("--model", "base=tiny", "--hook", f"chat:{HOOK}"), "no model 'chat'; --model gives base"),
        (("--model", "base=tiny", "--hook", "base:blocks.99.hook_resid_pre"), "no hook 'blocks.99.hook_resid_pre'"),
        (("--model", "tiny", "--one-at-a-time"), "--one-at-a-time needs several models"),
        (("--model", "base=tiny", "--model", "chat=tiny", "--model-revision", "main"), "--model-revision is for one model"),
    ],
)
def test_the_command_refuses_wrong_models(command, tmp_path, flags, message):
    code, _, err = command("capture", "python-docs", "--hook", HOOK, *flags, "--out", tmp_path / "c")
    assert (code, message in err) == (2, True), err
