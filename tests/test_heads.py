"""One attention head as a hook: a part of hook_z, hook_q, hook_k or hook_v."""

import pytest
import torch

import saelens_lite as sl
from saelens_lite.errors import HookError
from saelens_lite.files import read_json

WHOLE = "blocks.2.attn.hook_z"
HEAD = f"{WHOLE}.head_1"
TEXT = "the quick brown fox jumps over the lazy dog, and the dog sleeps on"

TEXTS = [f"{TEXT} while {i} cats watch {i + 3} birds" for i in range(20)]


@pytest.fixture(scope="module")
def n_heads(lm):
    return lm.module.config.n_head


@pytest.fixture(scope="module")
def grouped(lm):
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, bos_token_id=0, eos_token_id=0, pad_token_id=None,
    )  # fmt: skip
    return sl.LanguageModel(transformers.LlamaForCausalLM(config), None, name="grouped")


def test_the_heads_side_by_side_are_the_whole(lm, n_heads):
    heads = [f"{WHOLE}.head_{i}" for i in range(n_heads)]
    acts = lm.run(TEXT, [WHOLE, *heads])
    assert torch.equal(torch.cat([acts[head] for head in heads], -1), acts[WHOLE])


@pytest.mark.parametrize(("hook", "number"), [("hook_q", 4), ("hook_k", 2), ("hook_v", 2), ("hook_z", 4)])
def test_keys_and_values_have_the_heads_that_the_queries_share(grouped, hook, number):
    tokens = torch.arange(12).reshape(2, 6)
    heads = [f"blocks.1.attn.{hook}.head_{i}" for i in range(number)]
    acts = grouped.run(tokens, [f"blocks.1.attn.{hook}", *heads])
    assert acts[heads[0]].shape == (2, 6, 8)
    assert torch.equal(torch.cat([acts[head] for head in heads], -1), acts[f"blocks.1.attn.{hook}"])
    with pytest.raises(HookError, match=rf"no head {number} at .*{hook} of .*: it has {number} heads of width 8, head_0 to"):
        grouped.hook_point(f"blocks.1.attn.{hook}.head_{number}")


def test_a_hook_without_heads_is_refused(lm):
    with pytest.raises(HookError, match=r"hook_resid_pre of .* do not lie head by head; those at blocks\.1\.attn\.hook_z do"):
        lm.hook_point("blocks.1.hook_resid_pre.head_0")
    with pytest.raises(HookError, match=r"no hook 'blocks\.1\.attn\.hook_zz' .*did you mean blocks\.1\.attn\.hook_z"):
        lm.hook_point("blocks.1.attn.hook_zz.head_0")


def test_a_replacement_changes_the_part_of_its_head_alone(lm, n_heads):
    before = lm.run(TEXT, WHOLE)[WHOLE]
    d_head = before.shape[-1] // n_heads
    wanted = before.clone()
    wanted[..., d_head : 2 * d_head] *= -2
    with lm.replace(HEAD, lambda x: -2 * x):
        of_head = lm.logits(TEXT)
    with lm.replace(WHOLE, lambda _: wanted):
        assert torch.equal(lm.logits(TEXT), of_head)
    assert not torch.equal(lm.logits(TEXT), of_head)


def test_a_dictionary_of_one_head_is_trained_measured_and_spliced(lm, n_heads, tmp_path):
    cache = sl.capture(lm, TEXTS, [HEAD, WHOLE], tmp_path / "cache", n_tokens=400)
    d_head = lm.d_model // n_heads
    assert [cache.d_in(hook) for hook in (HEAD, WHOLE)] == [d_head, lm.d_model]
    config = sl.TrainConfig(sparsity="topk", d_sae=32, options={"k": 4}, hook=HEAD, n_tokens=4000, batch_size=100)
    (run,) = sl.train(cache, config)
    run.dictionary.save(tmp_path / "dictionary")
    d = sl.load(tmp_path / "dictionary")
    assert (d.hook, d.d_in) == (HEAD, d_head)
    report = sl.evaluate(d, lm, TEXTS, n_tokens=200, n_bootstrap=10)
    x = lm.run(TEXT, HEAD)[HEAD][:, 1:]
    assert report.hook == HEAD
    assert 0 < report["fvu"] < 1
    with lm.splice(d):
        logits = lm.logits(TEXT)
    whole = lm.run(TEXT, WHOLE)[WHOLE].clone()
    whole[:, 1:, d_head : 2 * d_head] = d(x)
    with lm.replace(WHOLE, lambda _: whole):
        torch.testing.assert_close(lm.logits(TEXT), logits, rtol=1e-4, atol=1e-4)
    store = sl.FeatureStore.build(d, lm, TEXTS, out=tmp_path / "store", n_tokens=200)
    assert store.info.reads == (HEAD,)


def test_a_saved_dictionary_of_a_head_names_it_as_saelens_does(tmp_path):
    d = sl.Dictionary.create("topk", reads=sl.Port(hook=HEAD, width=8), d_sae=16, options={"k": 2})
    metadata = read_json(d.save(tmp_path / "own") / "cfg.json")["metadata"]
    assert (metadata["hook_name"], metadata["hook_head_index"]) == (WHOLE, 1)
    assert sl.load(tmp_path / "own").hook == HEAD
    assert sl.load(sl.convert(tmp_path / "own", tmp_path / "other", format="saelens")).hook == HEAD
