"""Several models that read the same token ids, and the keys that name their activations."""

import re

import pytest
import torch

import saelens_lite as sl
from saelens_lite.config import ModelFacts, Origin
from saelens_lite.errors import ConfigError, HookError
from saelens_lite.model import Models, as_model
from saelens_lite.ports import split_key

HOOK = "blocks.1.hook_resid_pre"
TEXTS = ["The old man said that he would not go.", "It was the best of times"]


@pytest.fixture(scope="module")
def models(lm):
    """The embedded model twice; the second has other weights in its first block."""
    other = sl.load_model("tiny")
    with torch.no_grad():
        other.blocks[0].mlp.c_proj.weight.mul_(0.5)
    return Models({"base": lm, "chat": other})


@pytest.mark.parametrize(
    ("key", "parts"),
    [
        (HOOK, (None, None, HOOK)),
        (f"base:{HOOK}", ("base", None, HOOK)),
        (f"chat-base:{HOOK}", ("chat", "base", HOOK)),
        ("v1.5_a:transformer.h.0", ("v1.5_a", None, "transformer.h.0")),
    ],
)
def test_keys_are_split_and_joined(key, parts):
    assert split_key(key) == parts
    port = sl.Port.of(key, 7)
    assert (port.key, port.width) == (key, 7)
    assert sl.Port(**port.model_dump()) == port
    assert ("minus" in port.model_dump()) == (parts[1] is not None)


@pytest.mark.parametrize(
    "settings",
    [{"model": "a-b"}, {"model": "a:b"}, {"minus": "base"}, {"model": "a", "minus": "a"}, {"model": "", "minus": "b"}],
)
def test_ports_refuse_names_that_keys_cannot_hold(settings):
    with pytest.raises(ConfigError, match=r"cannot name a model|needs a hook and another model"):
        sl.Port(hook=HOOK, width=3, **settings)


def test_activations_are_those_of_each_model_and_their_difference(models):
    keys = [f"chat-base:{HOOK}", f"base:{HOOK}", "chat:blocks.0.hook_mlp_out"]
    acts = models.run(TEXTS, keys)
    base, chat = (models[name].run(TEXTS, [HOOK, "blocks.0.hook_mlp_out"]) for name in ("base", "chat"))
    assert list(acts) == keys
    assert torch.equal(acts[keys[0]], chat[HOOK] - base[HOOK])
    assert float(acts[keys[0]].abs().max()) > 0.1
    assert torch.equal(acts[keys[1]], base[HOOK])
    assert torch.equal(acts[keys[2]], chat["blocks.0.hook_mlp_out"])


def test_token_ids_with_padding_keep_their_places(models):
    ids = torch.tensor([[7, 7, 30, 41], [50, 60, 70, 80]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    acts = models.run(ids, f"chat:{HOOK}", attention_mask=mask)
    wanted = models["chat"].run(ids, HOOK, attention_mask=mask)
    assert torch.equal(acts[f"chat:{HOOK}"][mask.bool()], wanted[HOOK][mask.bool()])


def test_hooks_and_models_that_are_missing_are_named(models):
    with pytest.raises(ConfigError, match="no model 'other'; the models are base, chat"):
        models.run(TEXTS, f"other:{HOOK}")
    with pytest.raises(ConfigError, match=rf"names no model; write 'base:{re.escape(HOOK)}'"):
        models.run(TEXTS, HOOK)
    with pytest.raises(HookError, match="blocks"):
        models.run(TEXTS, "chat:blocks.99.hook_resid_pre")
    assert models.has_hook(f"chat-base:{HOOK}")
    assert not models.has_hook(HOOK)
    assert models.keys_of([HOOK]) == [f"base:{HOOK}", f"chat:{HOOK}"]


def test_models_with_other_token_ids_are_refused(lm, random_lm):
    other = sl.LanguageModel(random_lm.module, None, name="ids only")
    with pytest.raises(ConfigError, match="do not read the same token ids: ids only has no tokenizer"):
        as_model({"base": lm, "chat": other})


def test_hooks_of_a_dictionary_are_keys(models):
    ports = [sl.Port(hook=HOOK, width=192, model=name) for name in ("base", "chat")]
    d = sl.Dictionary.create("topk", reads=ports, d_sae=8)
    assert models.hooks_of(d).reads == models.hooks_of(d).writes == (f"base:{HOOK}", f"chat:{HOOK}")
    with pytest.raises(ConfigError, match=r"belongs to several models.*'base': …, 'chat': …"):
        models["base"].hooks_of(d)
    minus = sl.Dictionary.create("topk", reads=sl.Port(hook=HOOK, width=192, model="chat", minus="base"), d_sae=8)
    with pytest.raises(ConfigError, match="belongs to several models"):
        models["base"].hooks_of(minus)


def test_origins_have_the_facts_of_each_model(models):
    origin = Origin(models=models.facts, n_ctx=64)
    assert origin.of("chat") == Origin(model="tiny", model_class="GPT2LMHeadModel", n_ctx=64)
    assert Origin(**origin.model_dump(mode="json")) == origin
    assert "models" not in Origin(model="tiny").model_dump()
    changed = origin.replace(models=(ModelFacts(name="base", model="tiny", processing=("center_writing_weights",)),))
    with pytest.raises(ConfigError, match="center_writing_weights=True"):
        models.check_origin(changed)


def test_a_dictionary_keeps_the_facts_of_the_models_that_it_reads(models):
    origin = Origin(models=models.facts, n_ctx=64)
    one = sl.Dictionary.create("topk", reads=sl.Port(hook=HOOK, width=192, model="chat"), d_sae=8, origin=origin)
    assert [facts.name for facts in one.origin.models] == ["chat"]
    assert Models({"chat": models["chat"]}).hooks_of(one).reads == (f"chat:{HOOK}",)
    assert models["chat"].hooks_of(one).reads == (HOOK,)
    both = sl.Dictionary.create("topk", reads=sl.Port(hook=HOOK, width=192, model="chat", minus="base"), d_sae=8, origin=origin)
    assert both.origin == origin


def test_judges_of_one_model_refuse_differences_and_crosscoders(models):
    from saelens_lite_plugins.judges.saebench import dense_sae

    origin = Origin(models=models.facts)
    chat, base = (sl.Port(hook=HOOK, width=192, model=name) for name in ("chat", "base"))
    for ports in ([sl.Port(hook=HOOK, width=192, model="chat", minus="base")], [base, chat]):
        with pytest.raises(ConfigError, match="gives the dictionary activations of one model"):
            dense_sae(sl.Dictionary.create("topk", reads=ports, d_sae=8, origin=origin))
    assert dense_sae(sl.Dictionary.create("topk", reads=chat, d_sae=8, origin=origin)).cfg.model_name == "tiny"


def test_check_hook_says_that_it_is_for_one_hook_of_one_model(models):
    d = sl.Dictionary.create("topk", reads=sl.Port(hook=HOOK, width=192, model="chat", minus="base"), d_sae=8)
    for lm in (models, models["chat"]):
        with pytest.raises(ConfigError, match="evaluate gives the error of each port"):
            sl.check_hook(d, lm, "python-docs:held-out")
