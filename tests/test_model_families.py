"""Architectures beyond GPT-2: every hook against transformer-lens's own values, and what a forward pass may cost."""

import copy
import functools

import pytest
import torch

import saelens_lite as sl
from saelens_lite.errors import HookError, ModelNotFoundError
from saelens_lite.model.hooks import HookPoint
from saelens_lite.model.partial_forward import PartialForward

D_MODEL, N_VOCAB = 32, 97
USUAL = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")
COMMON = {
    "vocab_size": N_VOCAB, "hidden_size": D_MODEL, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None,
}  # fmt: skip
NO_MLP_WIDTH = {key: value for key, value in COMMON.items() if key != "intermediate_size"}
OPT = {"vocab_size": N_VOCAB, "hidden_size": D_MODEL, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = COMMON | {"num_key_value_heads": 2}
HEADS = GROUPED | {"head_dim": 8}
FAMILIES = {
    "GPTNeoX": COMMON,  # parallel attention and MLP, as in Pythia
    "GPTNeoX sequential": COMMON | {"use_parallel_residual": False},
    "Llama": GROUPED,
    "Gemma2": HEADS | {"sliding_window": 8},  # norms before and after each sublayer
    "Gemma3": HEADS | {"sliding_window": 8},
    "Qwen2": GROUPED,
    "Qwen3": HEADS,
    "Mistral": GROUPED | {"sliding_window": 8},
    "Phi": COMMON,  # parallel
    "OPT": OPT | {"max_position_embeddings": 64, "word_embed_proj_dim": D_MODEL},  # its MLP has no module of its own
    "Falcon": NO_MLP_WIDTH,  # parallel, and adds the attention's output to the MLP's in place
    "Olmo2": COMMON,  # norms after each sublayer only
    "Mixtral": GROUPED | {"num_local_experts": 4},
    "Bloom": {"vocab_size": N_VOCAB, "hidden_size": D_MODEL, "n_layer": 2, "n_head": 4},  # no position embeddings
}
NORMS = {
    "Olmo": COMMON,  # no weight
    "Cohere": COMMON,  # a LayerNorm of its own; logits are scaled
    "Granite": COMMON | {"logits_scaling": 4.0},  # logits are scaled
    "Nemotron": GROUPED,  # a LayerNorm that multiplies by 1 + weight
    "Gemma": HEADS,  # 1 + weight
    "Gemma4": HEADS | {"sliding_window": 8},  # the weight itself
    "Qwen3_5": HEADS,  # 1 + weight
}
PARALLEL = {"GPTNeoX", "Phi", "Falcon"}
EAGER = {"Gemma2", "Bloom"}  # transformers has no SDPA for them
MASKED = {"Gemma3", "Mistral", "Falcon"}  # sliding windows need a mask; transformers always makes one for Falcon
TOKENS = torch.randint(N_VOCAB, (3, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def family_lm(lm):
    """family_lm("Llama"): a model of the family with two blocks and random weights, biases and norms."""
    import transformers

    @functools.cache
    def make(family: str) -> sl.LanguageModel:
        name = family.removesuffix(" sequential")
        config_class = getattr(transformers, f"{name}TextConfig", None) or getattr(transformers, f"{name}Config")
        torch.manual_seed(0)
        module = getattr(transformers, f"{name}ForCausalLM")(config_class(**(FAMILIES | NORMS)[family]))
        for parameter in module.parameters():
            is_vector = parameter.ndim == 1  # biases and norms, which start at 0 and 1
            mean = float(parameter.detach().mean()) if is_vector else 0.0
            torch.nn.init.normal_(parameter, mean=mean, std=0.1 if is_vector else 0.2)
        return sl.LanguageModel(module, lm.tokenizer, name=f"random-{family.replace(' ', '-')}")

    return make


def assert_near(found: torch.Tensor, wanted: torch.Tensor, what: str = "", near: float = 1e-5) -> None:
    """Equal to `near` of the largest entry of each activation (at least 1): float32 in another order of summation."""
    assert found.shape == wanted.shape, what
    error = (found - wanted).abs().amax(-1) / wanted.abs().amax(-1).clamp_min(1)
    assert error.max() <= near, f"{what}: off by {error.max():.1e}"


def attentions(model: sl.LanguageModel) -> set[str]:
    """Return the kinds of attention that a model's parts are set to."""
    return {part.config._attn_implementation for part in model.module.modules() if hasattr(part, "config")}


@pytest.mark.parametrize("family", [*FAMILIES, *NORMS])
def test_the_last_stream_becomes_logits_by_unembedding_and_divisor(family_lm, family):
    """Up to what is the same at all positions: the biases of norm and head."""
    model = family_lm(family)
    stream, logits = model.run(TOKENS, "ln_final.hook_in")["ln_final.hook_in"], model.logits(TOKENS)
    config = model.module.config
    logits = logits / getattr(config, "logit_scale", 1) * getattr(config, "logits_scaling", 1)
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = cap * (logits / cap).atanh()
    rest = logits - stream @ model.unembedding().T / model.final_norm_divisor(stream)[..., None]
    assert_near(rest, rest[:1, :1].expand_as(rest))


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Falcon", "GPTNeoX"])
def test_attribution_by_gradient_is_ablation_of_small_codes(family_lm, family):
    model = family_lm(family)
    exact = sl.LanguageModel(copy.deepcopy(model.module).double(), model.tokenizer, name="exact")
    d = sl.Dictionary.create(
        "topk", reads=sl.Port(hook="blocks.1.hook_mlp_out", width=D_MODEL), d_sae=64, options={"k": 3}
    ).double()
    d.W_dec.data.mul_(3e-3)
    found = sl.attribute(d, exact, TOKENS)
    assert found.gradient.abs().max() > 1e-5
    assert_near(found.ablation / found.gradient.abs().max(), found.gradient / found.gradient.abs().max(), near=5e-3)


@pytest.mark.parametrize("family", ["Gemma2", "Cohere", "Granite"])
def test_direct_effects_are_those_on_logits_as_they_are(family_lm, family):
    """A cap and a scale of the logits count: the metric's slope when the last stream changes, its norm's divisor held."""
    model = family_lm(family)
    exact = sl.LanguageModel(copy.deepcopy(model.module).double(), model.tokenizer, name="exact")
    last = "blocks.1.hook_resid_post"
    d = sl.Dictionary.create("topk", reads=sl.Port(hook=last, width=D_MODEL), d_sae=64, options={"k": 3}).double()
    tokens = TOKENS[0]
    found = sl.attribute(d, exact, tokens, (5, 9), ablation=False)
    stream, config = exact.run(tokens, last)[last][0, -1], exact.module.config
    raw = exact.module.get_output_embeddings()(exact.module.model.norm(stream))
    divisor = exact.final_norm_divisor(stream)

    def metric(u: torch.Tensor) -> torch.Tensor:
        u = u * getattr(config, "logit_scale", 1) / getattr(config, "logits_scaling", 1)
        if cap := getattr(config, "final_logit_softcapping", None):
            u = cap * (u / cap).tanh()
        return u[5] - u[9]

    at_end = found.position == len(tokens) - 1
    assert at_end.sum() == 3
    for j in at_end.nonzero().flatten().tolist():
        added = found.activation[j] * d.W_dec[found.latent[j]].detach() @ exact.unembedding().double().T / divisor
        slope = (metric(raw + 1e-4 * added) - metric(raw - 1e-4 * added)) / 2e-4
        assert float(found.direct[j]) == pytest.approx(float(slope), rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_are_transformer_lens_own(family_lm, family):
    """All at once and one by one; neither model disturbs the other."""
    model = family_lm(family)
    attention, logits = attentions(model), model.logits(TOKENS)
    others = ["hook_embed", "blocks.1.attn.hook_in", "blocks.1.mlp.hook_in", "ln_final.hook_out"]
    others += [] if family == "Mixtral" else ["blocks.1.mlp.hook_post"]  # theirs is the output of the mixture
    hooks = model.hook_names + others + (["hook_pos_embed"] if family == "OPT" else [])
    before = model.run(TOKENS, hooks)
    bridge = model.bridge()
    with torch.no_grad():
        their_logits, theirs = bridge.run_with_cache(TOKENS)
    assert list(before) == hooks
    for hook in hooks:
        assert_near(before[hook], theirs[hook], hook)
        assert torch.equal(model.run(TOKENS, hook)[hook], before[hook]), hook
    assert_near(model.logits(TOKENS), their_logits, "logits")
    assert torch.equal(model.logits(TOKENS), logits)
    assert attentions(model) == attention == ({"eager"} if family in EAGER else {"sdpa"})
    with torch.no_grad():
        assert torch.equal(bridge(TOKENS), their_logits)
    known_to_them = [f"blocks.{i}.{hook}" for i in range(2) for hook in USUAL if f"blocks.{i}.{hook}" in theirs]
    assert model.hook_names == known_to_them
    assert ("blocks.0.hook_resid_mid" in model.hook_names) == (family not in PARALLEL)


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_of_a_block_add_up(family_lm, family):
    model = family_lm(family)
    acts = model.run(TOKENS, model.hook_names)
    for i in range(2):
        pre, post, attn, mlp = (acts[f"blocks.{i}.hook_{part}"] for part in ("resid_pre", "resid_post", "attn_out", "mlp_out"))
        assert_near(post, pre + attn + mlp)
        if family not in PARALLEL:
            assert_near(acts[f"blocks.{i}.hook_resid_mid"], pre + attn)
    assert torch.equal(acts["blocks.0.hook_resid_post"], acts["blocks.1.hook_resid_pre"])


@pytest.mark.parametrize("family", ["Llama", "Phi", "Gemma3", "OPT"])
def test_hook_z_is_the_heads_side_by_side(family_lm, family):
    model = family_lm(family)
    hook = "blocks.1.attn.hook_z"
    with torch.no_grad():
        theirs = model.bridge().run_with_cache(TOKENS, names_filter=[hook])[1][hook]
    assert theirs.shape == (*TOKENS.shape, 4, 8)
    assert_near(model.run(TOKENS, hook)[hook], theirs.flatten(-2), hook)


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - EAGER - MASKED))
@pytest.mark.parametrize(("hook", "n_attentions"), [("blocks.1.hook_resid_pre", 1), ("blocks.1.hook_attn_out", 2)])
def test_attention_is_fused_causal_and_without_a_mask(family_lm, family, hook, n_attentions, monkeypatch):
    """A mask, even of ones, would take attention off its fast path."""
    calls = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def spy(*args, attn_mask=None, is_causal=False, **kwargs):
        calls.append((len(args), attn_mask, is_causal))
        return attend(*args, attn_mask=attn_mask, is_causal=is_causal, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    family_lm(family).run(TOKENS, hook)
    assert calls == [(3, None, True)] * n_attentions


@pytest.mark.parametrize("family", ["Llama", "GPTNeoX", "OPT"])
def test_no_keys_and_values_are_kept(family_lm, family, monkeypatch):
    from transformers.cache_utils import Cache

    model = family_lm(family)

    def refuse(*_args, **_kwargs):
        raise AssertionError("a cache was made")

    monkeypatch.setattr(Cache, "update", refuse)
    model.run(TOKENS, "blocks.1.hook_resid_post")
    model.logits(TOKENS)


@pytest.mark.parametrize("family", ["Llama", "GPTNeoX", "Falcon"])
@pytest.mark.parametrize("hook", ["blocks.1.hook_resid_pre", "blocks.0.hook_resid_post"])
def test_nothing_runs_behind_the_deepest_hook(family_lm, family, hook):
    model = family_lm(family)
    second_block = model.hook_point("blocks.1.hook_resid_pre").module
    late = [*second_block.children(), model.module.get_output_embeddings(), model.hook_point("ln_final.hook_in").module]
    ran = []
    handles = [module.register_forward_pre_hook(lambda module, _: ran.append(module)) for module in late]
    try:
        model.run(TOKENS, [hook, "hook_embed"])
        assert ran == []
        model.logits(TOKENS)
        assert len(ran) >= 4
    finally:
        for handle in handles:
            handle.remove()


def test_values_are_the_callers_own(family_lm):
    """Falcon adds the attention's output to the MLP's in place; what was captured before must not change."""
    model = family_lm("Falcon")
    hook = "blocks.0.hook_mlp_out"
    alone = model.run(TOKENS, hook)[hook]
    with_later = model.run(TOKENS, [hook, "blocks.1.hook_resid_post"])
    assert torch.equal(alone, with_later[hook])
    assert not with_later["blocks.1.hook_resid_post"].requires_grad


@pytest.mark.parametrize(
    ("family", "hook", "wanted"),
    [
        ("Phi", "blocks.1.hook_resid_mid", r"; its attention and MLP read the same stream, so no such hook lies between them"),
        ("Llama", "blocks.1.hook_resid_midd", r"2 blocks; did you mean blocks\.1\.hook_resid_mid, "),
        ("Llama", "hook_embedd", r"; did you mean hook_embed, "),
        ("Llama", "blocks.1.hook_mlp_in", r"is the residual stream that the MLP's norm reads: use blocks\.1\.hook_resid_mid$"),
        ("Phi", "blocks.1.hook_mlp_in", r"before the norm whose output the MLP reads: use blocks\.1\.mlp\.hook_in$"),
        ("OPT", "blocks.1.hook_attn_in", r"that the norm before attention reads: use blocks\.1\.hook_resid_pre$"),
        ("Llama", "blocks.1.hook_q_input", r"that the norm before attention reads: use blocks\.1\.hook_resid_pre$"),
        ("Llama", "blocks.1.attn.hook_result", r"each head's part of hook_attn_out: use blocks\.1\.attn\.hook_z, what W_O"),
        (
            "Mixtral",
            "blocks.1.mlp.hook_post",
            r"; its MLP is a mixture of experts, .*: use blocks\.1\.mlp\.hook_in or blocks\.1",
        ),
        ("Llama", "blocks.1.attn.hook_zz", r"; did you mean blocks\.1\.attn\.hook_z, "),
        ("Llama", "hook_pos_embed", r"no hook 'hook_pos_embed' in LlamaForCausalLM"),
        ("Llama", "rotary_emb.hook_out", r"no hook 'rotary_emb\.hook_out'"),
        ("Phi", "blocks.1.ln2.hook_in", r"no hook 'blocks\.1\.ln2\.hook_in' in PhiForCausalLM with 2 blocks"),
        ("Qwen3", "blocks.1.attn.q_norm.hook_out", r"is torch.float32 \[3, 20, 4, 8\] for tokens \[3 20\]; only activations"),
        (
            "Llama",
            "embed.hook_in",
            r"embed.hook_in is torch.int64 \[3, 20\] for tokens \[3 20\]; only",
        ),
    ],
)
def test_hooks_that_cannot_be_served(family_lm, family, hook, wanted):
    model = family_lm(family)
    with pytest.raises(HookError, match=wanted):
        model.run(TOKENS, [hook, "blocks.0.hook_resid_pre"])
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.module.modules())


def test_a_hook_that_the_forward_pass_never_reaches(family_lm, monkeypatch):
    model = family_lm("Llama")
    monkeypatch.setattr(model, "hook_point", lambda name: HookPoint(name, torch.nn.Identity(), "out"))
    with pytest.raises(HookError, match=r"the forward pass of LlamaForCausalLM never .* blocks\.0\.hook_resid_pre"):
        model.run(TOKENS, ["blocks.0.hook_resid_pre"])


def test_values_of_another_shape_are_not_replaced(family_lm):
    """The norm of each query, which is apart for each head."""
    hook = "blocks.1.attn.q_norm.hook_out"
    model = family_lm("Qwen3")
    wanted = r"q_norm.hook_out of Qwen3ForCausalLM is torch.float32 \[3, 20, 4, 8\]; only \[batch pos d\] can be replaced"
    with model.replace(hook, lambda x: x), pytest.raises(HookError, match=wanted):
        model.logits(TOKENS)


@pytest.mark.parametrize("hook", ["ln2.hook_out", "hook_mlp_out", "mlp.hook_post"])
def test_rows_of_a_sublayer_on_one_long_row_are_told_apart(family_lm, hook):
    """OPT's MLP works on [batch·pos d]; a replacement sees [batch pos d], and what it gives arrives in the right rows."""
    model = family_lm("OPT")
    hook = f"blocks.0.{hook}"
    x, point = model.run(TOKENS, hook)[hook], model.hook_point(hook)
    factor = torch.rand(*TOKENS.shape, 1, generator=torch.Generator().manual_seed(3))

    def new(value: torch.Tensor) -> torch.Tensor:
        assert torch.equal(value, x)
        return value * factor

    if point.side == "in":
        handle = point.module.register_forward_pre_hook(lambda _, args: (args[0] * factor.flatten()[:, None],))
    else:
        handle = point.module.register_forward_hook(lambda _, args, out: out * factor.flatten()[:, None])
    wanted = model.logits(TOKENS)
    handle.remove()
    with model.replace(hook, new):
        assert_near(model.logits(TOKENS), wanted)
    assert (wanted - model.logits(TOKENS)).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["Llama", "GPTNeoX", "Gemma2"])
@pytest.mark.parametrize("hook", ["blocks.1.hook_resid_pre", "blocks.0.hook_attn_out", "hook_embed"])
def test_a_replaced_value_is_what_the_rest_reads(family_lm, family, hook):
    model = family_lm(family)
    before = model.run(TOKENS, hook)[hook]
    logits = model.logits(TOKENS)
    with model.replace(hook, lambda x: x * 2):
        assert torch.equal(model.run(TOKENS, hook)[hook], before * 2)
        assert (model.logits(TOKENS) - logits).abs().max() > 1e-3
    assert torch.equal(model.logits(TOKENS), logits)


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - PARALLEL))
def test_a_replaced_middle_of_a_block_reaches_its_mlp_and_its_output(family_lm, family):
    """resid_post = resid_mid + mlp_out, also of a resid_mid that was put there; other positions keep theirs to the bit."""
    model = family_lm(family)
    names = ["blocks.0.hook_resid_mid", "blocks.0.hook_mlp_out", "blocks.0.hook_resid_post"]
    before = model.run(TOKENS, names[-1])[names[-1]]
    new = torch.randn(*TOKENS.shape, D_MODEL, generator=torch.Generator().manual_seed(2))
    new[1] = model.run(TOKENS, names[0])[names[0]][1]
    with model.replace(names[0], lambda _: new.clone()):
        mid, mlp, post = model.run(TOKENS, names).values()
        logits = model.logits(TOKENS)
    assert torch.equal(mid, new)
    assert_near(post, new + mlp)
    assert torch.equal(post[1], before[1])
    with model.replace(names[2], lambda _: post.clone()):
        assert_near(model.logits(TOKENS), logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_partial_forward_gives_the_logits_of_a_whole_pass(family_lm, family):
    """Without running the blocks in front of the hook again, and for other activations than those it was tried on."""
    model = family_lm(family)
    for hook in model.hook_names:
        partial = PartialForward(model, [hook], TOKENS)
        acts, clean = partial.read(TOKENS, [hook])
        x = acts[hook]
        assert torch.equal(clean, model.logits(TOKENS))
        assert torch.equal(x, model.run(TOKENS, hook)[hook]), hook
        new = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
        with model.replace(hook, lambda _, new=new: new.clone()):
            wanted = model.logits(TOKENS)
        first = model.blocks[0]
        ran = []
        handle = next(first.children()).register_forward_hook(lambda *_, ran=ran: ran.append("first block"))
        assert_near(partial.logits(TOKENS, new), wanted, hook)
        handle.remove()
        behind = "blocks.1" in hook or hook == "blocks.0.hook_resid_post"
        assert partial.n_skipped == behind + (hook == "blocks.1.hook_resid_post"), hook
        assert bool(ran) == (not behind), hook
        assert partial.is_whole_stream == hook.endswith(("resid_pre", "resid_post"))
    assert torch.equal(model.logits(TOKENS), clean)


@pytest.mark.parametrize("probe", [TOKENS, torch.full_like(TOKENS, 5), TOKENS[:, :1]], ids=["text", "constant", "one token"])
@pytest.mark.parametrize(("take", "n_skipped"), [(lambda memory: memory[-1], 1), (list.pop, 0)])
def test_a_model_whose_blocks_read_more_than_the_stream(family_lm, take, n_skipped, probe):
    """The second block adds what the first one's attention gave, and in one case it can be had only once."""
    model = sl.LanguageModel(copy.deepcopy(family_lm("Llama").module), family_lm("Llama").tokenizer, name="remembering")
    first, second = model.blocks
    memory = []
    first.self_attn.register_forward_hook(lambda _module, _args, out: memory.append(out[0]))
    second.register_forward_hook(lambda _module, _args, out: out + take(memory))
    hook = "blocks.1.hook_resid_pre"
    partial = PartialForward(model, [hook], probe)
    assert (partial.n_skipped, partial.is_whole_stream) == (n_skipped, False)
    x = partial.read(TOKENS, [hook])[0][hook]
    found = partial.logits(TOKENS, x / 2)
    with model.replace(hook, lambda x: x / 2):
        assert_near(found, model.logits(TOKENS))


def test_an_architecture_nobody_knows(family_lm):
    module = copy.deepcopy(family_lm("Llama").module)
    module.__class__ = type("UnheardOf", (type(module),), {})
    model = sl.LanguageModel(module, family_lm("Llama").tokenizer, name="somebody's")
    with pytest.raises(ModelNotFoundError, match=r"transformer-lens has no hooks for UnheardOf \(somebody's\)"):
        model.run(TOKENS, "blocks.0.hook_resid_pre")
