"""Modules of transformers models, by whose paths other tools name hooks: the hook holds the module's own tensor."""

import pytest
import torch

import saelens_lite as sl
from saelens_lite.formats import hook_of_module

HEADS = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
PLAIN = {key: value for key, value in HEADS.items() if key not in ("num_key_value_heads", "head_dim")}
GPT2 = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0}
FAMILIES = {  # with the name of a model
    "Gemma2": ("google/gemma-2-2b", HEADS),
    "Gemma3": ("google/gemma-3-1b-pt", HEADS),
    "Gemma": ("google/gemma-2b", HEADS),
    "Olmo2": ("allenai/OLMo-2-1124-7B", PLAIN),
    "Llama": ("meta-llama/Llama-3.2-1B", HEADS),
    "Qwen3": ("Qwen/Qwen3-1.7B-Base", HEADS),
    "GPT2": ("gpt2", GPT2),
    "GPTNeoX": ("EleutherAI/pythia-70m", PLAIN),
    "Phi": ("microsoft/phi-2", PLAIN),
    "Bloom": ("bigscience/bloom", {"vocab_size": 50, "hidden_size": 16, "n_layer": 2, "n_head": 4}),
}
TOKENS = torch.arange(14).reshape(2, 7)


@pytest.fixture
def random_model(lm):
    def make(family: str) -> sl.LanguageModel:
        import transformers

        name, settings = FAMILIES[family]
        config_class = getattr(transformers, f"{family}TextConfig", None) or getattr(transformers, f"{family}Config")
        torch.manual_seed(0)
        module = transformers.AutoModelForCausalLM.from_config(config_class(**settings))
        for parameter in module.parameters():
            mean = float(parameter.detach().mean()) if parameter.ndim == 1 else 0.0
            torch.nn.init.normal_(parameter, mean=mean, std=0.2)
        return sl.LanguageModel(module, lm.tokenizer, name=name)

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_the_hook_of_a_module_holds_what_the_module_takes_and_returns(random_model, family):
    model = random_model(family)
    seen: dict[str, torch.Tensor] = {}

    def noting(path: str):
        def note(_module, args, kwargs, output):
            before = args[0] if args else kwargs.get("hidden_states")
            after = output[0] if isinstance(output, tuple) else output
            seen.update({f"{path}.{side}": x.clone() for side, x in (("input", before), ("output", after)) if x is not None})

        return note

    for path, module in model.module.named_modules():
        if path and "rotary" not in path and module is not model.module.base_model:
            module.register_forward_hook(noting(path), with_kwargs=True)
    model.module(TOKENS, use_cache=False)
    values = dict(seen)  # the passes below see other tokens
    hooks = {path: hook for path in values if (hook := hook_of_module(path, model=model.name)) is not None}
    for path, hook in hooks.items():
        x = model.run(TOKENS, hook)[hook]
        torch.testing.assert_close(x, values[path].reshape(-1, *x.shape[1:]).expand_as(x), msg=f"{path}: {hook}")
    for side in ("input", "output"):
        assert f"{_blocks(model)}.1.mlp.{side}" in hooks


def _blocks(model: sl.LanguageModel) -> str:
    return next(path for path, module in model.module.named_modules() if path.endswith((".layers", ".h")))


@pytest.mark.parametrize(
    ("module", "side", "model", "hook"),
    [
        ("layers.3.mlp", "output", None, "blocks.3.mlp.hook_out"),
        ("model.layers[3].mlp.output", "input", None, "blocks.3.mlp.hook_out"),
        ("model.layers[3].self_attn.output[0]", "input", None, "blocks.3.attn.hook_out"),
        ("layers.3.post_feedforward_layernorm", "output", None, "blocks.3.hook_mlp_out"),
        ("layers.3.post_attention_layernorm", "output", "google/gemma-2-2b", "blocks.3.hook_attn_out"),
        ("layers.3.post_attention_layernorm", "output", "google/gemma-2b", "blocks.3.ln2.hook_out"),
        ("model.language_model.layers.3", "output", None, "blocks.3.hook_resid_post"),
        ("model.vision_tower.encoder.layers.3", "output", None, None),
        ("layers.3.somewhere", "output", None, None),
    ],
)
def test_the_hook_of_a_module_by_its_path(module, side, model, hook):
    assert hook_of_module(module, side, model) == hook


def test_a_norm_with_two_meanings_names_no_hook_unless_the_model_is_known(caplog):
    assert hook_of_module("layers.3.post_attention_layernorm") is None
    assert "of the attention's output in some models and of the MLP's input in others" in caplog.text
