"""Hook names against plain torch hooks, in every family that transformer-lens knows and transformers builds small."""

import copy
import warnings

import hook_identities
import pytest
import torch

import saelens_lite as sl
from saelens_lite.errors import HookError

OUTCOMES = {  # of embed, mid, post, hidden and write
    ("holds", "holds", "holds", "holds", "holds"): (
        "Apertus; Arcee; Bamba; BitNet; Bloom; Ernie4_5; Exaone4; GPT2LMHeadModel; GPTBigCode; GPTNeo; Gemma2; Gemma3; "
        "Gemma; Glm4; Glm; Granite; HunYuanDenseV1; Jais2; Lfm2; Llama; Ministral3; Mistral; ModernBertDecoder; Mpt; "
        "Nemotron; OPT; Olmo2; Olmo3; Olmo; OlmoHybrid; Phi3; Qwen2; Qwen3; Qwen3_5; SeedOss; SmolLM3; StableLm; "
        "Starcoder2; VaultGemma; Youtu; GPTNeoX, sequential; Falcon, sequential"
    ),
    ("holds", "holds", "holds", "1 holds, 1 refused", "holds"): (
        "Afmoe; DeepseekV2; DeepseekV3; Ernie4_5_Moe; Glm4Moe; Glm4MoeLite; GlmMoeDsa; Jamba; Laguna; Lfm2Moe; "
        "Qwen2Moe, one dense layer; Qwen3Moe, one dense layer; Qwen3Next, one dense layer; Ernie4_5_Moe, one dense "
        "layer; Llama4, one dense layer"
    ),
    ("holds", "holds", "holds", "refused", "holds"): (
        "FlexOlmo; GptOss; GraniteMoe; JetMoe; Llama4; MiniMaxM2; Mixtral; Olmoe; Qwen2Moe; Qwen3Moe; Qwen3Next; "
        "Qwen3_5Moe"
    ),
    ("holds", "none", "holds", "holds", "none"): (
        "CodeGen; Cohere2; Cohere; Falcon; GPTJ; GPTNeoX; Phi; Falcon, two norms; StableLm, parallel"
    ),
    ("holds", "refused", "holds", "holds", "refused"): (
        "BertForMaskedLM; BertLMHeadModel; OpenAIGPTLMHeadModel; RobertaForMaskedLM; OPT, norms behind"
    ),
    ("holds", "none", "none", "none", "none"): (
        "FalconMamba; Mamba2; Mamba; NemotronH; Zamba2"
    ),
    ("refused", "holds", "holds", "holds", "holds"): (
        "NanoChat; XGLMForCausalLM; OPT, projected, norms before"
    ),
    ("holds", "refused", "holds", "holds", "holds"): (
        "FalconH1; Bloom, stream behind the norm"
    ),
    ("holds", "1 holds, 1 none", "none", "none", "none"): (
        "GraniteMoeHybrid; Rwkv"
    ),
    ("refused", "none", "none", "refused", "none"): (
        "DeepseekV4"
    ),
    ("holds", "holds", "refused", "holds", "refused"): (
        "Gemma4"
    ),
    ("refused", "refused", "refused", "refused", "refused"): (
        "HrmText"
    ),
    ("refused", "none", "none", "none", "none"): (
        "RecurrentGemma"
    ),
    ("refused", "refused", "holds", "holds", "refused"): (
        "OPT, projected"
    ),
}  # fmt: skip
FAMILIES = {family: outcomes for outcomes, families in OUTCOMES.items() for family in families.split("; ")}
TOKENS = torch.randint(20, 97, (3, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def make(lm):
    """make("OPTForCausalLM", do_layer_norm_before=False): a small model with random weights."""

    def make(kind: str, **settings) -> sl.LanguageModel:
        return sl.LanguageModel(
            hook_identities.build(kind, hook_identities.FAMILIES.get(kind, {}) | settings), lm.tokenizer, name="random"
        )

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_are_what_their_names_mean_or_are_refused(lm, family):
    """embed = the first stream, pre + attn = mid, mid + mlp = post, hook_post enters the down projection."""
    name = family if "," in family or family.endswith(("LM", "Model")) else f"{family}ForCausalLM"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own, about kernels that are not installed
        outcomes = hook_identities.check_family(name, lm.tokenizer)
    assert tuple(str(outcomes[check]) for check in hook_identities.CHECKS) == FAMILIES[family]


def test_a_wrong_tensor_is_called_wrong(lm, monkeypatch):
    """The script itself: hooks as transformer-lens names them, unchecked."""
    from saelens_lite.model import hooks, identities

    def unchecked(self, name: str) -> hooks.HookPoint:
        return hooks.resolve(name, self.module, self.known)

    monkeypatch.setattr(identities.Identities, "point", unchecked)
    for family in ("OPT, norms behind", "Bloom, stream behind the norm", "NanoChatForCausalLM"):
        assert any(found.outcomes["WRONG"] for found in hook_identities.check_family(family, lm.tokenizer).values()), family


def test_scaled_outputs_are_what_is_added_to_the_stream(make):
    """Granite multiplies what attention and MLP give, and the embedding."""
    model = make("GraniteForCausalLM", embedding_multiplier=12.0, residual_multiplier=0.25)
    block = model.blocks[0]
    own = {}
    block.self_attn.register_forward_hook(lambda _, args, out: own.update(attn=out[0]))
    block.mlp.register_forward_hook(lambda _, args, out: own.update(mlp=out))
    names = ["hook_embed", "blocks.0.hook_attn_out", "blocks.0.hook_mlp_out"]
    embed, attn, mlp = model.run(TOKENS, names).values()
    assert torch.equal(embed, 12 * model.module.model.embed_tokens(TOKENS))
    assert torch.equal(attn, own["attn"] / 4)
    assert torch.equal(mlp, own["mlp"] / 4)


@pytest.mark.parametrize("hook", ["blocks.0.hook_attn_out", "blocks.1.hook_mlp_out", "hook_embed"])
def test_what_replaces_a_scaled_output_is_what_is_added(make, hook):
    model = make("GraniteForCausalLM", embedding_multiplier=12.0, residual_multiplier=0.25)
    shift = torch.randn(*TOKENS.shape, 32, generator=torch.Generator().manual_seed(2))
    at = {"blocks.0.hook_attn_out": "blocks.0.hook_resid_mid", "blocks.1.hook_mlp_out": "blocks.1.hook_resid_post"}
    with model.replace(hook, lambda x: x + shift):
        logits = model.logits(TOKENS)
    with model.replace(at.get(hook, "blocks.0.hook_resid_pre"), lambda x: x + shift):
        wanted = model.logits(TOKENS)
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "GPTNeoXForCausalLM", "Gemma2ForCausalLM", "GraniteForCausalLM"])
def test_rounding_in_half_precision_is_no_reason_to_refuse(make, kind, dtype):
    """Also where one direction of the stream is far larger than the others, as in trained models."""
    model = make(kind)
    exact = model.hook_names
    half = copy.deepcopy(model.module).to(dtype)
    half.get_input_embeddings().weight.data[:, 3] = 300.0
    assert sl.LanguageModel(half, model.tokenizer, name="half").hook_names == exact
    assert {"blocks.0.hook_attn_out", "blocks.1.hook_mlp_out"} <= set(exact)


def test_a_middle_whose_change_cannot_reach_the_output_is_only_read(make):
    """Gemma 4 multiplies the sum of a block by a number of its own before it hands it on."""
    model, hook = make("Gemma4ForCausalLM"), "blocks.0.hook_resid_mid"
    logits = model.logits(TOKENS)
    with model.replace(hook, lambda x: x):
        assert torch.equal(model.logits(TOKENS), logits)
    with (
        model.replace(hook, lambda x: x + 1),
        pytest.raises(HookError, match=f"{hook} can be read but not replaced: its block's"),
    ):
        model.logits(TOKENS)


def test_hooks_in_force_neither_see_nor_change_the_check(make):
    model = make("LlamaForCausalLM")
    seen = []

    def new(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.shape)
        return x * 3

    with model.replace("blocks.0.hook_resid_pre", new), model.replace("blocks.0.ln2.hook_in", lambda x: x + 1):
        assert "blocks.0.hook_resid_mid" in model.hook_names
        assert seen == []
        model.logits(TOKENS)
    assert seen == [(3, 7, 32)]


def test_the_check_runs_once_and_only_for_names_that_promise_a_sum(make):
    model, passes = make("LlamaForCausalLM"), []
    model.module.register_forward_pre_hook(lambda _, args: passes.append(tuple(args[0].shape)))
    for hook in ("blocks.0.hook_resid_pre", "blocks.1.hook_resid_post", "blocks.1.mlp.hook_post"):
        model.run(TOKENS, hook)
    assert passes == [(3, 7)] * 3
    for _ in range(2):
        model.run(TOKENS, ["hook_embed", "blocks.1.hook_attn_out"])
    assert passes == [(3, 7)] * 3 + [(1, 4)] + [(3, 7)] * 2


def test_a_model_whose_blocks_run_more_than_once_is_refused(make):
    with pytest.raises(HookError, match=r"L_blocks\.0\.hook_resid_pre of HrmText.* runs more than once in a forward pass"):
        make("HrmTextForCausalLM").run(TOKENS, "L_blocks.0.hook_resid_pre")


def test_refusals_name_the_tensors_that_can_be_had(make):
    """Those of a post-norm block: the sum before its norm, and what the MLP reads."""
    model = make("OPTForCausalLM", do_layer_norm_before=False)
    layer, noted = model.blocks[0], {}
    layer.self_attn_layer_norm.register_forward_hook(lambda _, args, out: noted.update(sum=args[0], read=out))
    wanted = (
        r"blocks\.0\.hook_resid_mid of OPT.*; use blocks\.0\.ln1\.hook_in for that sum, or blocks\.0\.mlp\.hook_in for what"
    )
    with pytest.raises(HookError, match=wanted):
        model.run(TOKENS, "blocks.0.hook_resid_mid")
    pre, attn, summed, read = model.run(
        TOKENS, [f"blocks.0.{name}" for name in ("hook_resid_pre", "hook_attn_out", "ln1.hook_in", "mlp.hook_in")]
    ).values()
    assert torch.equal(pre + attn, summed)
    assert torch.equal(summed, noted["sum"])
    assert torch.equal(read, noted["read"])
    assert not any(name.endswith("mid") for name in model.hook_names)
