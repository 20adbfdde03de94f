"""Hooks, splices and generation against transformer-lens, plain PyTorch hooks and recomputation."""

import copy

import pytest
import torch

import saelens_lite as sl
from saelens_lite.errors import ConfigError

TEXTS = ["The old man said that he would not go.", "import os", "It was the best of times, it was the worst of times, it was"]


@pytest.fixture(params=["lm", "random_lm"])
def model(request):
    """Each of the two models in turn."""
    return request.getfixturevalue(request.param)


class Stub:
    """The interface of a dictionary that a splice needs, with a reconstruction of the test's choosing."""

    def __init__(self, reconstruct, hook: str = "blocks.1.hook_resid_pre", excluded: tuple[int, ...] = (0,)):
        self.reconstruct = reconstruct
        self.origin = sl.Origin(excluded_positions=excluded)
        self.reads = self.writes = (sl.Port(hook=hook, width=48),)
        self.writes_what_it_reads = True
        self.seen: list[tuple[int, ...]] = []

    def check_input(self, x):
        self.seen.append(tuple(x.shape))

    def __call__(self, x):
        return self.reconstruct(x)


def identity(x):
    return x


def assert_near(found: torch.Tensor, wanted: torch.Tensor, what: str = "") -> None:
    """Equal to 1e-5 of the largest entry of each activation (at least 1): float32 in another order of summation."""
    error = (found - wanted).abs().amax(-1) / wanted.abs().amax(-1).clamp_min(1)
    assert found.shape == wanted.shape
    assert error.max() <= 1e-5, f"{what}: off by {error.max():.1e}"


def test_every_usual_hook_is_transformer_lens_own(model):
    names = [
        f"blocks.{i}.{hook}"
        for i in range(model.n_layers)
        for hook in ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")
    ]
    assert model.hook_names == names
    rows = model.to_tokens(TEXTS)
    ours = model.run(rows, names)
    with torch.no_grad():
        logits, theirs = model.bridge().run_with_cache(rows.tokens)
    assert list(ours) == names
    for name in names:
        assert ours[name].shape == (*rows.tokens.shape, model.d_model)
        assert_near(ours[name], theirs[name], name)
    assert_near(model.logits(rows), logits, "logits")


def test_hooks_of_one_block_are_five_different_places(random_lm):
    acts = list(random_lm.run(TEXTS, [n for n in random_lm.hook_names if n.startswith("blocks.1.")]).values())
    assert len(acts) == 5
    for i, x in enumerate(acts):
        for y in acts[i + 1 :]:
            assert (x - y).abs().max() > 0.01


def test_a_block_ends_where_the_next_begins_and_its_parts_add_up(model):
    acts = model.run(TEXTS, model.hook_names)
    for i in range(model.n_layers):
        pre, mid, post, attn, mlp = (acts[n] for n in model.hook_names[5 * i : 5 * i + 5])
        assert_near(mid, pre + attn)
        assert_near(post, mid + mlp)
        if i + 1 < model.n_layers:
            assert torch.equal(post, acts[f"blocks.{i + 1}.hook_resid_pre"])


def test_other_hooks_of_transformer_lens_are_served_too(random_lm):
    acts = random_lm.run(TEXTS, ["embed.hook_out", "blocks.0.ln1.hook_in", "ln_final.hook_out"])
    transformer = random_lm.module.transformer
    tokens = random_lm.to_tokens(TEXTS).tokens
    torch.testing.assert_close(acts["embed.hook_out"], transformer.wte(tokens))
    torch.testing.assert_close(
        acts["blocks.0.ln1.hook_in"], transformer.wte(tokens) + transformer.wpe.weight[: tokens.shape[1]]
    )
    torch.testing.assert_close(acts["ln_final.hook_out"], transformer(tokens).last_hidden_state)


def test_hooks_behind_the_last_block(random_lm):
    acts = random_lm.run(TEXTS, ["unembed.hook_in", "unembed.hook_out"])
    torch.testing.assert_close(acts["unembed.hook_in"], random_lm.module.transformer(random_lm.to_tokens(TEXTS).tokens)[0])
    torch.testing.assert_close(acts["unembed.hook_out"], random_lm.logits(TEXTS))


@pytest.mark.parametrize(
    ("hooks", "last_run", "first_not_run"),
    [
        (["blocks.0.hook_resid_pre"], "wpe", "h.0.ln_1"),
        (["blocks.1.hook_attn_out", "blocks.0.hook_mlp_out"], "h.1.attn", "h.1.ln_2"),
        (["blocks.1.hook_resid_mid"], "h.1.attn", "h.1.mlp"),
        (["blocks.1.hook_mlp_out"], "h.1.mlp", "h.2"),
        (["blocks.0.hook_resid_pre", "blocks.1.hook_resid_post"], "h.1.mlp", "h.2"),
        (["blocks.2.hook_resid_post"], "h.2.mlp", "ln_f"),
    ],
)
def test_the_forward_pass_stops_at_the_deepest_hook(random_lm, hooks, last_run, first_not_run):
    ran = []
    transformer = random_lm.module.transformer
    handles = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name), always_call=True)
        if name == last_run
        else module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
        for name, module in transformer.named_modules()
        if name
    ]
    try:
        random_lm.run(TEXTS, hooks)
    finally:
        for handle in handles:
            handle.remove()
    assert ran.count(last_run) == 1
    assert first_not_run not in ran
    assert "ln_f" not in ran
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in transformer.modules())


def test_padding_does_not_change_what_comes_before_it(model):
    rows = model.to_tokens(TEXTS)
    together = model.run(TEXTS, model.hook_names)
    for i, text in enumerate(TEXTS):
        alone = model.run(text, model.hook_names)
        n = int(rows.keep[i].sum()) + 1
        for name in model.hook_names:
            assert alone[name].shape[:2] == (1, n)
            assert_near(together[name][i, :n], alone[name][0], name)


def test_texts_tokens_and_token_rows_mean_the_same(random_lm):
    rows = random_lm.to_tokens(TEXTS[0])
    hook = "blocks.2.hook_resid_post"
    wanted = random_lm.run(TEXTS[0], hook)[hook]
    for same in (rows, rows.tokens, rows.tokens[0], [TEXTS[0]]):
        assert torch.equal(random_lm.run(same, [hook, hook])[hook], wanted)


def test_a_local_folder_gives_the_same_model(random_lm, tmp_path):
    random_lm.module.save_pretrained(tmp_path)
    random_lm.tokenizer.save_pretrained(tmp_path)
    for where in (tmp_path, str(tmp_path)):
        loaded = sl.load_model(where, device="cpu")
        assert torch.equal(loaded.to_tokens(TEXTS).tokens, random_lm.to_tokens(TEXTS).tokens)
        assert torch.equal(loaded.logits(TEXTS), random_lm.logits(TEXTS))
        assert not any(p.requires_grad for p in loaded.module.parameters())
        assert not loaded.module.training
        assert (loaded.d_model, loaded.n_layers, loaded.n_ctx, loaded.name) == (48, 3, 40, str(tmp_path))


def test_dtype_of_loading(lm):
    half = sl.load_model("tiny", device="cpu", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half.run("a", "blocks.1.hook_resid_pre")["blocks.1.hook_resid_pre"].dtype == torch.bfloat16
    assert lm.dtype == torch.float32


def test_an_identity_splice_changes_nothing(model):
    stub = Stub(identity)
    before = model.logits(TEXTS)
    with model.splice(stub):
        inside = model.logits(TEXTS)
    assert stub.seen == [(*model.to_tokens(TEXTS).tokens.shape, model.d_model)]
    assert torch.equal(inside, before)
    assert torch.equal(model.logits(TEXTS), before)


@pytest.mark.parametrize("excluded", [(0,), (), (0, 3)])
@pytest.mark.parametrize("hook", ["blocks.1.hook_resid_pre", "blocks.0.hook_resid_post"])
def test_a_zero_splice_is_a_forward_with_zeros_at_the_positions_that_count(model, hook, excluded):
    ids = model.to_tokens(TEXTS).tokens
    position = torch.arange(ids.shape[1])
    special = torch.isin(ids, torch.tensor(model.tokenizer.all_special_ids))  # BOS and padding
    kept = (special | torch.isin(position, torch.tensor(excluded, dtype=torch.long)))[..., None].float()
    block = model.module.transformer.h[1]
    handle = block.register_forward_pre_hook(lambda _, args: (args[0] * kept, *args[1:]))
    try:
        wanted = model.logits(TEXTS)
    finally:
        handle.remove()
    with model.splice(Stub(torch.zeros_like, hook=hook, excluded=excluded)):
        found = model.logits(TEXTS)
    assert torch.equal(found, wanted)
    assert not torch.allclose(found, model.logits(TEXTS), atol=1e-3)


def test_a_splice_leaves_bos_and_padding_alone(model):
    after, keep = "blocks.1.hook_resid_pre", model.to_tokens(TEXTS).keep
    before = model.run(TEXTS, after)[after]
    with model.splice(Stub(lambda x: x + 1, hook="blocks.0.hook_resid_post")):
        inside = model.run(TEXTS, after)[after]
    assert not keep.all(1).any()
    assert torch.equal(inside[~keep], before[~keep])
    assert torch.equal(inside[keep], before[keep] + 1)


def test_keep_chooses_the_replaced_positions(random_lm):
    rows = random_lm.to_tokens(TEXTS)
    after = "blocks.1.hook_resid_pre"
    before = random_lm.run(rows, after)[after]
    with random_lm.splice(Stub(torch.zeros_like, hook="blocks.0.hook_resid_post"), keep=rows.keep):
        inside = random_lm.run(rows, after)[after]
    assert torch.equal(inside, before * ~rows.keep[..., None])


def test_hook_argument_of_a_splice(random_lm):
    stub = Stub(torch.zeros_like, hook="blocks.1.hook_resid_pre")
    with random_lm.splice(stub, hook="blocks.2.hook_resid_pre"):
        acts = random_lm.run(TEXTS, ["blocks.1.hook_resid_post", "blocks.2.ln1.hook_in"])
    assert acts["blocks.1.hook_resid_post"].abs().max() > 0
    assert not acts["blocks.2.ln1.hook_in"][random_lm.to_tokens(TEXTS).keep].any()
    stub.reads = stub.writes = (sl.Port(width=48),)
    with pytest.raises(ConfigError, match="does not say which hook it belongs to; give hook="), random_lm.splice(stub):
        pass


def test_a_splice_ends_when_the_block_fails(random_lm):
    before = random_lm.logits(TEXTS)
    with pytest.raises(ZeroDivisionError), random_lm.splice(Stub(torch.zeros_like)):
        raise ZeroDivisionError
    assert torch.equal(random_lm.logits(TEXTS), before)


def test_a_dictionary_splices_its_reconstruction(random_lm):
    hook = "blocks.0.hook_resid_post"
    d = sl.Dictionary.create("topk", reads=sl.Port(hook=hook, width=48), d_sae=96, options={"k": 5})
    before = random_lm.run(TEXTS, hook)[hook]
    with random_lm.splice(d):
        inside = random_lm.run(TEXTS, "blocks.1.hook_resid_pre")["blocks.1.hook_resid_pre"]
    keep = random_lm.to_tokens(TEXTS).keep
    torch.testing.assert_close(inside[keep], d(before)[keep].detach())
    assert torch.equal(inside[~keep], before[~keep])


def test_generation_repeats_by_seed(lm):
    settings = {"max_new_tokens": 25, "temperature": 1.0}
    first = lm.generate("The old man", seed=3, **settings)
    assert first == lm.generate("The old man", seed=3, **settings)
    assert first != lm.generate("The old man", seed=4, **settings)
    assert first.startswith("The old man")


def greedy(model, prompt: str, n: int) -> str:
    """Return the n likeliest tokens in a row, each from a full forward pass."""
    tokens = model.to_tokens(prompt).tokens
    for _ in range(n):
        tokens = torch.cat([tokens, model.logits(tokens)[:, -1].argmax(-1, keepdim=True)], dim=1)
    return model.tokenizer.decode(tokens[0, 1:])


def test_cached_generation_is_recomputed_generation(model):
    assert model.generate("The old man", 20, temperature=0.0) == greedy(model, "The old man", 20)


def test_top_k_of_one_is_greedy(model):
    assert model.generate("It was", 12, temperature=1.0, top_k=1) == model.generate("It was", 12, temperature=0.0)


def test_generation_stops_at_the_end_of_the_context(random_lm):
    text = random_lm.generate("It was", 1000)
    rows = random_lm.to_tokens("It was")
    assert random_lm.generate("It was", random_lm.n_ctx - rows.tokens.shape[1]) == text


def test_generation_under_a_splice(model):
    plain = model.generate("The old man", 15, seed=1)
    with model.splice(Stub(identity)):
        assert model.generate("The old man", 15, seed=1) == plain
    # Position 0 is the BOS token of the first pass only, not the one token of each later pass.
    with model.splice(Stub(lambda x: -x)):
        spliced = model.generate("The old man", 15, temperature=0.0)
        assert spliced == greedy(model, "The old man", 15)
    assert spliced != model.generate("The old man", 15, temperature=0.0)


def test_generation_leaves_no_position_behind(model):
    after = "blocks.1.hook_resid_pre"
    first = model.run(TEXTS, after)[after][:, 0]
    model.generate("The old man", 5)
    with model.splice(Stub(torch.zeros_like, hook="blocks.0.hook_resid_post")):
        assert torch.equal(model.run(TEXTS, after)[after][:, 0], first)


def test_unembedding_gives_the_logits_up_to_a_shift_and_a_factor(model):
    x = model.run(TEXTS[0], f"blocks.{model.n_layers - 1}.hook_resid_post")[f"blocks.{model.n_layers - 1}.hook_resid_post"][0]
    centred = x - x.mean(-1, keepdim=True)
    direct = (centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()) @ model.unembedding().T
    from_norm_bias = model.module.transformer.ln_f.bias @ model.module.lm_head.weight.T
    torch.testing.assert_close(direct + from_norm_bias, model.logits(TEXTS[0])[0], rtol=1e-4, atol=1e-3)


def test_token_strings_are_what_the_tokenizer_decodes(lm):
    strings = lm.token_strings()
    assert len(strings) == lm.d_vocab
    ids = lm.to_tokens("The old man").tokens[0, 1:].tolist()
    assert "".join(strings[i] for i in ids) == "The old man"
    assert strings[lm.bos_id] == "<|endoftext|>"


def test_tokenizer_hash_is_that_of_the_rules_not_of_the_last_call(lm, tmp_path):
    wanted = lm.tokenizer_hash
    assert len(wanted) == 64
    tokenizer = copy.deepcopy(lm.tokenizer)
    same = sl.LanguageModel(lm.module, tokenizer, name="same")
    tokenizer("a longer text", max_length=2, truncation=True)
    assert tokenizer.backend_tokenizer.to_str() != lm.tokenizer.backend_tokenizer.to_str()
    assert same.tokenizer_hash == wanted
    tokenizer.save_pretrained(tmp_path)
    assert sl.LanguageModel(lm.module, type(tokenizer).from_pretrained(tmp_path), name="read").tokenizer_hash == wanted
    tokenizer.add_tokens(["unheard-of"])
    assert same.tokenizer_hash != wanted


def test_a_tokenizer_written_in_python_has_a_hash_too(lm):
    from transformers import ByT5Tokenizer

    one, other = (sl.LanguageModel(lm.module, ByT5Tokenizer(extra_ids=n), name="bytes").tokenizer_hash for n in (125, 100))
    assert one != other
    assert one == sl.LanguageModel(lm.module, ByT5Tokenizer(), name="bytes").tokenizer_hash


def test_repr_says_what_it_is(random_lm):
    assert "GPT2LMHeadModel" in repr(random_lm)
    assert "3 layers, d_model 48, n_ctx 40" in repr(random_lm)
