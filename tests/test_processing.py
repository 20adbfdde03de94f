"""Changes to a model: the same logits, the result transformer-lens gets, and a record that follows the activations."""

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

import saelens_lite as sl
from saelens_lite.errors import ConfigError

CENTERED = ("center_writing_weights",)
HOOK = "blocks.1.hook_resid_pre"
COMMON = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None,
}  # fmt: skip
OPT = {"vocab_size": 97, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LAYER_NORM = {
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    ),  # its unembedding is tied to its embedding
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**COMMON)),
    "phi": lambda: PhiForCausalLM(PhiConfig(**COMMON)),  # its unembedding has a bias
    "opt": lambda: OPTForCausalLM(OPTConfig(**OPT, max_position_embeddings=64, word_embed_proj_dim=32)),
}
OTHERS = {
    "its norms are LlamaRMSNorm, not LayerNorm": lambda: LlamaForCausalLM(LlamaConfig(**COMMON)),
    "the output of a norm is added to its residual stream": lambda: Gemma2ForCausalLM(Gemma2Config(**COMMON, head_dim=8)),
    "the output of a norm is added to its .* stream": lambda: BloomForCausalLM(
        BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4)
    ),
    "transformer-lens does not say what its ln_final is": lambda: OPTForCausalLM(
        OPTConfig(**OPT, max_position_embeddings=64, word_embed_proj_dim=32, do_layer_norm_before=False)
    ),
}
TOKENS = torch.randint(97, (3, 20), generator=torch.Generator().manual_seed(1))


def random_model(make, tokenizer) -> sl.LanguageModel:
    """Return the model with random weights, biases and norms."""
    torch.manual_seed(0)
    module = make()
    for parameter in module.parameters():
        is_vector = parameter.ndim == 1  # biases and norms, which start at 0 and 1
        mean = float(parameter.detach().mean()) if is_vector else 0.0
        torch.nn.init.normal_(parameter, mean=mean, std=0.1 if is_vector else 0.2)
    return sl.LanguageModel(module, tokenizer, name="random")


@pytest.fixture(scope="module")
def centered_lm():
    """The embedded model, loaded with centred writing weights."""
    return sl.load_model("tiny", device="cpu", center_writing_weights=True)


@pytest.mark.parametrize("family", LAYER_NORM)
def test_centring_takes_the_mean_out_of_the_stream_and_nothing_else(lm, family):
    model = random_model(LAYER_NORM[family], lm.tokenizer)
    plain, logits, unembedding = model.run(TOKENS, model.hook_names), model.logits(TOKENS), model.unembedding()
    bridge = model.bridge()
    bridge.enable_compatibility_mode(disable_warnings=True, fold_ln=False, center_unembed=False, fold_value_biases=False)
    with torch.no_grad():
        their_logits, theirs = bridge.run_with_cache(TOKENS)
    assert model.processing == ()
    assert model.center_writing_weights_() is model
    assert model.processing == CENTERED
    centered = model.run(TOKENS, model.hook_names)
    for hook, x in centered.items():
        wanted = plain[hook] - plain[hook].mean(-1, keepdim=True)
        torch.testing.assert_close(x, wanted, rtol=0, atol=2e-5)
        torch.testing.assert_close(x, theirs[hook], rtol=0, atol=2e-5)
        assert x.mean(-1).abs().max() < 1e-5 < plain[hook].mean(-1).abs().max() / 100
    assert (model.logits(TOKENS) - logits).abs().max() <= 1e-4
    assert (model.logits(TOKENS) - their_logits).abs().max() <= 1e-4
    assert torch.equal(model.unembedding(), unembedding)


def test_centring_twice_is_centring_once(lm):
    model = random_model(LAYER_NORM["gpt2"], lm.tokenizer).center_writing_weights_()
    once = {name: x.clone() for name, x in model.module.state_dict().items()}
    model.center_writing_weights_()
    assert model.processing == CENTERED
    for name, x in model.module.state_dict().items():
        torch.testing.assert_close(x, once[name], rtol=0, atol=1e-7)


@pytest.mark.parametrize("reason", OTHERS)
def test_models_that_cannot_be_centred_are_refused_and_left_alone(lm, reason):
    model = random_model(OTHERS[reason], lm.tokenizer)
    before = {name: x.clone() for name, x in model.module.state_dict().items()}
    with pytest.raises(ConfigError, match=f"cannot be centred .*: {reason}; load it with center_writing_weights=False"):
        model.center_writing_weights_()
    assert model.processing == ()
    assert all(torch.equal(x, before[name]) for name, x in model.module.state_dict().items())


def test_loading_with_centred_weights(lm, centered_lm, documents, tmp_path):
    assert (lm.processing, centered_lm.processing) == ((), CENTERED)
    assert "center_writing_weights" in repr(centered_lm)
    assert "center_writing_weights" not in repr(lm)
    assert (centered_lm.logits(documents) - lm.logits(documents)).abs().max() <= 1e-4
    assert torch.equal(centered_lm.unembedding(), lm.unembedding())
    assert centered_lm.run(documents, HOOK)[HOOK].mean(-1).abs().max() < 1e-4
    assert lm.run(documents, HOOK)[HOOK].mean(-1).abs().max() > 1e-2
    assert centered_lm.module.lm_head.weight is not centered_lm.module.transformer.wte.weight
    assert lm.module.lm_head.weight is lm.module.transformer.wte.weight
    centered_lm.module.save_pretrained(tmp_path)  # what was untied stays untied
    centered_lm.tokenizer.save_pretrained(tmp_path)
    assert torch.equal(sl.load_model(tmp_path, device="cpu").logits(documents), centered_lm.logits(documents))


def test_the_record_follows_the_activations(lm, centered_lm, documents, tmp_path):
    """Cache → dictionary → disk → the model it fits, and no other."""
    cache = sl.capture(centered_lm, documents, HOOK, tmp_path / "cache", n_ctx=32)
    assert sl.ActivationCache.open(tmp_path / "cache").origin(HOOK).processing == CENTERED
    assert cache.statistics(HOOK).mean.mean().abs() < 1e-3
    config = sl.TrainConfig(d_sae=16, batch_size=32, n_tokens=64, options={"k": 4})
    run = sl.train(cache, config, tmp_path / "run")[0]
    d = sl.Dictionary.load(run.dictionary.save(tmp_path / "dictionary"))
    assert d.origin.processing == CENTERED
    with centered_lm.splice(d):
        assert centered_lm.logits(documents).isfinite().all()
    assert sl.evaluate(d, centered_lm, documents)["ce_clean"] > 0
    wanted = (
        r"the dictionary belongs to tiny with processing \['center_writing_weights'\]; tiny was loaded with \[\]: "
        r"use load_model\(\.\.\., center_writing_weights=True\)"
    )
    with pytest.raises(ConfigError, match=wanted), lm.splice(d):
        pass
    with pytest.raises(ConfigError, match=wanted):
        sl.evaluate(d, lm, documents)
    with pytest.raises(ConfigError, match=wanted):
        sl.FeatureStore.build(d, lm, documents)


@pytest.mark.parametrize(
    ("origin", "fits_plain", "fits_centered"),
    [
        (sl.Origin(model="tiny"), True, False),
        (sl.Origin(model="tiny", processing=CENTERED), False, True),
        (sl.Origin(processing=CENTERED), False, True),
        (sl.Origin(), True, True),  # activations of unknown descent
    ],
)
def test_which_dictionaries_fit_which_model(lm, centered_lm, origin, fits_plain, fits_centered):
    for model, fits in ((lm, fits_plain), (centered_lm, fits_centered)):
        if fits:
            model.check_origin(origin)
        else:
            with pytest.raises(ConfigError, match=f"center_writing_weights={model is lm}"):
                model.check_origin(origin)


def test_gelu_in_one_kernel_is_the_same_function(lm):
    from transformers.activations import NewGELUActivation

    plain = LAYER_NORM["gpt2"]().eval()
    model = sl.LanguageModel(LAYER_NORM["gpt2"](), lm.tokenizer, name="random")
    model.module.load_state_dict(plain.state_dict())
    assert any(isinstance(part, NewGELUActivation) for part in plain.modules())
    assert not any(isinstance(part, NewGELUActivation) for part in model.module.modules())
    torch.testing.assert_close(model.logits(TOKENS), plain(TOKENS).logits.detach(), rtol=0, atol=1e-5)
    x = torch.cat([torch.linspace(-30, 30, 100_001), torch.randn(100_000) / 100])
    torch.testing.assert_close(model.module.transformer.h[0].mlp.act(x), NewGELUActivation()(x), rtol=1e-5, atol=1e-6)
