"""Generated text against a plain loop over the transformers module, for models with and without a key-value cache."""

import functools
import logging
import math

import pytest
import torch

import saelens_lite as sl
from saelens_lite.errors import ConfigError, NonFiniteError, ShapeError, TextError
from saelens_lite.model import generation

PROMPT, D_MODEL, HOOK = "The old man", 32, "blocks.1.hook_resid_pre"
SIZES = {
    "hidden_size": D_MODEL, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 48, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
GPT = {"n_embd": D_MODEL, "n_layer": 2, "n_head": 4, "n_positions": 48, "bos_token_id": 0, "eos_token_id": 0}
MAMBA = {"hidden_size": D_MODEL, "num_hidden_layers": 2, "state_size": 4}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_chunk_size": 8, "mamba_n_groups": 1}
FAMILIES = {
    "GPT2LMHeadModel": GPT,
    "OpenAIGPTLMHeadModel": GPT,  # no cache
    "MambaForCausalLM": MAMBA,  # the cache is called cache_params
    "Mamba2ForCausalLM": MAMBA | {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8, "eos_token_id": 0},
    "FalconMambaForCausalLM": MAMBA,
    "RwkvForCausalLM": MAMBA | {"attention_hidden_size": D_MODEL, "context_length": 48},  # the cache is called state
    "RecurrentGemmaForCausalLM": SIZES
    | {"lru_width": D_MODEL, "attention_window_size": 16, "block_types": ["recurrent", "attention"]},  # its blocks keep it
    "JambaForCausalLM": SIZES
    | {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 4, "use_mamba_kernels": False},
    "FalconH1ForCausalLM": SIZES | MAMBA2 | {"mamba_d_ssm": 64},
    "BambaForCausalLM": SIZES | MAMBA2 | {"attn_layer_indices": [1]},  # other logits with its cache than without
    "LlamaForCausalLM": SIZES,
}
CACHED = {"GPT2LMHeadModel", "JambaForCausalLM", "FalconH1ForCausalLM", "LlamaForCausalLM"}


@pytest.fixture(scope="session")
def make(lm):
    """make("LlamaForCausalLM"): a model of two blocks and random weights, with the embedded tokenizer."""
    import transformers

    def made(kind: str, tokenizer=lm.tokenizer, **changes) -> sl.LanguageModel:
        config_name = kind.replace("LMHeadModel", "Config").replace("ForCausalLM", "Config")
        config = getattr(transformers, config_name)(**{"vocab_size": lm.d_vocab} | FAMILIES[kind] | changes)
        torch.manual_seed(0)
        module = getattr(transformers, kind)(config)
        for parameter in module.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
        return sl.LanguageModel(module, tokenizer, name=f"random-{kind}")

    return made


@pytest.fixture(scope="session")
def shared(make):
    """The same, made once; not to be changed."""
    return functools.cache(make)


@torch.no_grad()
def greedy(model: sl.LanguageModel, n: int, prompt: str = PROMPT) -> str:
    """Return the n likeliest tokens one after another, each from a whole pass of the plain module."""
    tokens = torch.tensor([[model.bos_id, *model.tokenizer(prompt)["input_ids"]]])
    for _ in range(n):
        new = model.module(tokens, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        if int(new) == model.bos_id:
            break
        tokens = torch.cat([tokens, new], 1)
    return model.tokenizer.decode(tokens[0, 1:])


@pytest.mark.parametrize("kind", FAMILIES)
def test_generation_is_the_loop_over_whole_passes(shared, kind):
    model = shared(kind)
    wanted = greedy(model, 12)
    assert len(wanted) > len(PROMPT)
    assert model.generate(PROMPT, 12, temperature=0) == wanted
    assert model.has_usable_cache == (kind in CACHED)


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("position", [3, 6, None])
def test_an_edit_acts_at_its_position_in_every_pass(shared, kind, position):
    """In the prompt, among the new tokens, or everywhere but at BOS; against a plain torch hook."""
    model = shared(kind)
    d = sl.Dictionary.create("topk", reads=sl.Port(hook=HOOK, width=D_MODEL), d_sae=64, options={"k": 4})
    n = len(model.tokenizer(PROMPT)["input_ids"]) + 1
    assert n == 4
    point = model.hook_point(HOOK)

    def add(x):
        x = x.clone()
        x[:, slice(1, None) if position is None else slice(position, position + 1)] += 90 * d.W_dec[7]
        return x

    handle = point.on_value(add)
    wanted = greedy(model, 8)
    handle.remove()
    with model.splice(d, sl.Add(7, 90.0, positions=position)):
        assert model.generate(PROMPT, 8, temperature=0) == wanted
    assert wanted != greedy(model, 8)


@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "GPT2LMHeadModel", "JambaForCausalLM"])
@pytest.mark.parametrize("temperature", [0, 0.8, 1.5])
def test_recomputing_gives_the_continuation_of_the_cache(make, kind, temperature):
    model = make(kind)
    cached = model.generate(PROMPT, 20, temperature=temperature, seed=3)
    assert model.has_usable_cache
    model.has_usable_cache = False
    assert model.generate(PROMPT, 20, temperature=temperature, seed=3) == cached
    assert model.generate(PROMPT, 20, temperature=1.5, seed=4) != cached


def test_a_cache_that_gives_other_logits_is_found_out(make, caplog):
    """Not by its name: the same model with a cache that forgets its first token."""
    model = make("LlamaForCausalLM")
    attention = model.module.model.layers[0].self_attn
    attend = attention.forward
    assert model.has_usable_cache
    del model.has_usable_cache

    def forget(*args, past_key_values=None, **kwargs):
        if past_key_values is not None and past_key_values.get_seq_length():
            past_key_values.layers[0].keys[:, :, 0] = 0
        return attend(*args, past_key_values=past_key_values, **kwargs)

    attention.forward = forget
    with caplog.at_level(logging.INFO, logger="saelens_lite.model"):
        assert model.generate(PROMPT, 6, temperature=0) == greedy(model, 6)
    assert not model.has_usable_cache
    assert "random-LlamaForCausalLM generates without a key-value cache" in caplog.text


def test_trying_out_the_cache_calls_no_replacement_in_force(make):
    """Nor does it advance the global random numbers."""
    model = make("LlamaForCausalLM")
    seen = []
    torch.manual_seed(0)
    with model.replace(HOOK, lambda x: (seen.append(x.shape[1]), x)[1]):
        model.generate(PROMPT, 3, temperature=0)
    n = len(model.tokenizer(PROMPT)["input_ids"]) + 1
    assert seen == [n, 1, 1]
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(1), after)


@pytest.mark.parametrize("kind", ["GPT2LMHeadModel", "MambaForCausalLM"])
@pytest.mark.parametrize("as_list", [False, True])
def test_generation_ends_at_the_models_own_end_token(make, kind, as_list):
    """A token among the new ones is declared to end the text; it is left out of it."""
    model = make(kind, tie_word_embeddings=False)
    row = torch.tensor([[model.bos_id, *model.tokenizer(PROMPT)["input_ids"]]])
    n = row.shape[1]
    with torch.no_grad():
        for _ in range(12):
            row = torch.cat([row, model.module(row, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], 1)
    new = row[0, n:].tolist()
    end = next(i for i in new if i != new[0])
    wanted = model.tokenizer.decode(row[0, 1 : n + new.index(end)])
    model.module.generation_config.eos_token_id = [model.d_vocab - 1, end] if as_list else end
    assert model.generate(PROMPT, 12, temperature=0) == wanted != PROMPT


def test_generation_ends_at_the_tokenizers_end_token(make):
    """By far the likeliest, always; the model's settings name none."""
    model = make("GPT2LMHeadModel", tie_word_embeddings=False)
    model.module.generation_config.eos_token_id = None
    model.module.transformer.ln_f.bias.data.fill_(5.0)
    model.module.lm_head.weight.data[model.tokenizer.eos_token_id] = 10.0
    calls = []
    model.module.register_forward_hook(lambda *_: calls.append(1))
    assert model.generate(PROMPT, 6, temperature=0) == PROMPT
    assert model.generate(PROMPT, 6, temperature=1.0) == PROMPT
    calls.clear()
    model.generate(PROMPT, 6)
    assert len(calls) == 1


@pytest.mark.parametrize("kind", ["GPT2LMHeadModel", "OpenAIGPTLMHeadModel"])
def test_a_prompt_may_leave_room_for_one_token(shared, kind):
    """The context holds BOS, the prompt and the continuation."""
    model = shared(kind)
    words = model.tokenizer.decode([model.tokenizer(" the")["input_ids"][0]] * (model.n_ctx - 1))
    one_less = words[: -len(" the")]
    assert len(model.tokenizer(one_less)["input_ids"]) == model.n_ctx - 2
    assert model.generate(one_less, 5, temperature=0) == greedy(model, 1, one_less)
    for full in (words, words + " the"):
        with pytest.raises(ShapeError, match=r"the prompt has 4[78] tokens; random-\w+ reads at most 48 with the BOS token"):
            model.generate(full, 5)


@pytest.mark.parametrize("temperature", [-1.0, math.nan, math.inf])
def test_temperatures_that_cannot_be(shared, temperature):
    with pytest.raises(ConfigError, match=rf"temperature = {temperature}; expected a finite number, 0 or more"):
        shared("GPT2LMHeadModel").generate(PROMPT, 2, temperature=temperature)


@pytest.mark.parametrize("n", [0, -1])
def test_at_least_one_token_is_asked_for(shared, n):
    with pytest.raises(ConfigError, match=rf"max_new_tokens = {n}; expected 1 or more"):
        shared("GPT2LMHeadModel").generate(PROMPT, n)


def test_the_coldest_temperature_is_the_likeliest_token(shared):
    model = shared("GPT2LMHeadModel")
    assert model.generate(PROMPT, 8, temperature=1e-320) == greedy(model, 8)


@pytest.mark.parametrize("kind", ["GPT2LMHeadModel", "MambaForCausalLM"])
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_logits_that_are_no_numbers_are_refused(shared, kind, temperature):
    model = shared(kind)
    with model.replace(HOOK, lambda x: x * math.nan), pytest.raises(NonFiniteError, match="logits are NaN or infinite"):
        model.generate(PROMPT, 3, temperature=temperature)
    assert model.generate(PROMPT, 6, temperature=0) == greedy(model, 6)


def test_models_name_their_longest_row_in_several_ways(lm):
    from transformers import MptConfig, MptForCausalLM, XLNetConfig, XLNetLMHeadModel

    mpt = MptForCausalLM(MptConfig(vocab_size=lm.d_vocab, d_model=32, n_layers=2, n_heads=4, max_seq_len=24))
    model = sl.LanguageModel(mpt, lm.tokenizer, name="mpt")
    assert model.n_ctx == 24
    assert model.logits(torch.zeros(1, 24, dtype=torch.long)).shape[1] == 24
    with pytest.raises(ShapeError, match="rows of 25 tokens; mpt takes at most 24"):
        model.logits(torch.zeros(1, 25, dtype=torch.long))
    xlnet = XLNetLMHeadModel(XLNetConfig(vocab_size=lm.d_vocab, d_model=32, n_layer=2, n_head=4, d_inner=48))
    assert xlnet.config.max_position_embeddings == -1
    assert sl.LanguageModel(xlnet, lm.tokenizer, name="xlnet").n_ctx == 2048


@pytest.mark.parametrize("positions", [slice(2, None), slice(None, None, 2), slice(1, 9, 3), slice(1, 3), slice(60, None)])
def test_slices_of_positions_are_those_of_a_row_as_long_as_the_context(shared, positions):
    model = shared("GPT2LMHeadModel")
    d = sl.Dictionary.create("topk", reads=sl.Port(hook=HOOK, width=D_MODEL), d_sae=64, options={"k": 4})
    tokens = torch.arange(1, 21)[None]
    with model.splice(d, sl.Add(7, 9.0, positions=positions)):
        found = model.run(tokens, "blocks.1.hook_resid_pre")[HOOK]
    wanted = model.run(tokens, HOOK)[HOOK]
    named = [i for i in range(model.n_ctx)[positions] if i < 20]
    wanted[:, named] += 9 * d.W_dec[7].detach()
    torch.testing.assert_close(found, wanted)


def test_end_tokens_are_those_of_the_tokenizer_and_of_the_settings(make):
    model = make("LlamaForCausalLM")
    settings = model.module.generation_config
    found = []
    for named in (None, 5, [5, 6]):
        settings.eos_token_id = named
        found.append(generation.end_ids(model))
    assert found == [{0}, {0, 5}, {0, 5, 6}]


def test_a_model_whose_positions_read_later_ones_does_not_generate(lm):
    from transformers import BertConfig, BertLMHeadModel

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    bert = BertLMHeadModel(BertConfig(vocab_size=lm.d_vocab, initializer_range=0.2, **sizes))
    model = sl.LanguageModel(bert, lm.tokenizer, name="bert")
    with pytest.raises(ConfigError, match="generate needs a model that predicts the next token"):
        model.generate(PROMPT, 3)


@pytest.mark.parametrize("prompt", [["one", "two"], torch.tensor([[1, 2]])])
def test_one_text_is_continued(shared, prompt):
    with pytest.raises(TextError, match=f"one string; found a {type(prompt).__name__}"):
        generation.generate(shared("GPT2LMHeadModel"), prompt, 3, temperature=0, top_k=None, seed=0)


@pytest.mark.parametrize("kind", ["GPT2LMHeadModel", "LlamaForCausalLM"])
@pytest.mark.parametrize("edits", [[], [sl.Add(7, 90.0)], [sl.Add(7, 90.0, positions=[3])]])
def test_a_splice_acts_on_new_tokens_of_the_modules_own_generation_too(shared, kind, edits):
    """Generation runs with a cache, one position at a time, so that each pass seems to begin at position 0."""
    model = shared(kind)
    d = sl.Dictionary.create("topk", reads=sl.Port(hook=HOOK, width=D_MODEL), d_sae=64, options={"k": 4})
    ids = model.to_tokens(PROMPT).tokens
    with model.splice(d, edits):
        wanted = model.generate(PROMPT, 8, temperature=0)
        found = model.module.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    assert model.tokenizer.decode(found[0, 1:], skip_special_tokens=True) == wanted
    assert wanted != model.generate(PROMPT, 8, temperature=0)
