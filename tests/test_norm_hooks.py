"""ln1.hook_normalized and its like: the output of a norm before its weight and bias."""

import pytest
import torch
import transformers
from torch import nn

import saelens_lite as sl
from saelens_lite.errors import HookError

TOKENS = torch.arange(14).reshape(2, 7)
SMALL = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0}


def model(family, **settings):
    """Return a small model whose norms have random weights and biases."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**settings)
    architecture = {"GPT2": "GPT2LMHeadModel", "Gemma2": "Gemma2ForCausalLM", "Llama": "LlamaForCausalLM"}[family]
    module = getattr(transformers, architecture)(config)
    for part in module.modules():
        if "norm" in type(part).__name__.lower():
            for parameter in part.parameters():
                nn.init.uniform_(parameter, 0.3, 1.7)
    return sl.LanguageModel(module, None, name=family.lower())


def normed(x, family):
    """Return x divided by its root mean square, for GPT-2 after subtracting its mean, in float64."""
    x = x.double()
    x = x - x.mean(-1, keepdim=True) if family == "GPT2" else x
    eps = {"GPT2": 1e-5, "Gemma2": 1e-6, "Llama": 1e-6}[family]
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


@pytest.mark.parametrize(("family", "settings"), [("GPT2", GPT2), ("Llama", SMALL), ("Gemma2", SMALL)])
@pytest.mark.parametrize("norm", ["blocks.1.ln1", "blocks.1.ln2", "ln_final"])
def test_it_is_the_input_with_unit_mean_square(family, settings, norm):
    lm = model(family, **settings)
    acts = lm.run(TOKENS, [f"{norm}.hook_in", f"{norm}.hook_normalized", f"{norm}.hook_out"])
    expected = normed(acts[f"{norm}.hook_in"], family)
    torch.testing.assert_close(acts[f"{norm}.hook_normalized"].double(), expected, atol=1e-5, rtol=1e-5)
    assert (acts[f"{norm}.hook_out"] - expected).abs().max() > 0.1  # the weight matters


def test_a_replacement_gets_the_weight_and_the_bias():
    lm = model("GPT2", **GPT2)
    module = lm.hook_point("blocks.1.ln2.hook_out").module
    new = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(1))
    with lm.replace("blocks.1.ln2.hook_normalized", lambda x: new):
        out = lm.run(TOKENS, "blocks.1.mlp.hook_in")["blocks.1.mlp.hook_in"]
    torch.testing.assert_close(out, new * module.weight + module.bias, atol=1e-5, rtol=1e-5)


def test_a_weight_of_zero_hides_the_value_before_it():
    lm = model("Llama", **SMALL)
    with torch.no_grad():
        lm.hook_point("blocks.0.ln2.hook_out").module.weight[3] = 0
    with pytest.raises(HookError, match="the weight of its norm is 0 at 1 of 16 entries"):
        lm.run(TOKENS, "blocks.0.ln2.hook_normalized")


def test_a_model_whose_norm_is_missing_says_so():
    lm = model("Llama", **SMALL)
    with pytest.raises(HookError, match=r"no hook 'blocks\.0\.ln3\.hook_normalized'"):
        lm.run(TOKENS, "blocks.0.ln3.hook_normalized")
