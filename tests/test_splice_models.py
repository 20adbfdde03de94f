"""Splices, steering and attribution at the ports of several models, against independent torch hooks."""

import copy
import json

import pytest
import torch

import saelens_lite as sl
from saelens_lite.cli.checks import named_models
from saelens_lite.config import ModelFacts, Origin
from saelens_lite.errors import ConfigError
from saelens_lite.interventions import steer

HOOK = "blocks.1.hook_resid_pre"
BASE, CHAT, CHAT_MLP, MINUS = f"base:{HOOK}", f"chat:{HOOK}", "chat:blocks.1.hook_mlp_out", f"chat-base:{HOOK}"
TEXTS = ["The old man said that he would not go.", "It was the best of times"]


@pytest.fixture(scope="module")
def models(random_lm):
    """The random model, and a copy with other weights in its first block."""
    module = copy.deepcopy(random_lm.module)
    torch.manual_seed(5)
    weight = module.transformer.h[0].mlp.c_proj.weight
    weight.add_(0.1 * torch.randn_like(weight))
    return sl.Models({"base": random_lm, "chat": sl.LanguageModel(module, random_lm.tokenizer, name="random chat")})


def dictionary(*keys, writes=None, seed=3):
    """Return a random dictionary of these ports, with a bias."""
    ports = [[sl.Port.of(key, 48) for key in side] for side in (keys, writes or keys)]
    d = sl.Dictionary.create("topk", reads=ports[0], writes=ports[1] if writes else None, d_sae=96, options={"k": 6}, seed=seed)
    d.b_dec.data.copy_(0.1 * torch.randn(d.d_out, generator=torch.Generator().manual_seed(4)))
    return d


def inside(lm, key):
    """Return the module whose output is the activation at one of the hooks above."""
    blocks = lm.module.transformer.h
    return blocks[1].mlp if key.endswith("mlp_out") else blocks[0]


def first(out):
    return out[0] if isinstance(out, tuple) else out


def activation(models, key, tokens):
    """Return the activation at a port by a torch hook; that of a difference by two."""
    names, _, hook = key.partition(":")
    if "-" in names:
        name, minus = names.split("-")
        return activation(models, f"{name}:{hook}", tokens) - activation(models, f"{minus}:{hook}", tokens)
    lm, kept = models[names], []
    handle = inside(lm, key).register_forward_hook(lambda _module, _args, out: kept.append(first(out)))
    lm.module(tokens)
    handle.remove()
    return kept[0]


def logits_with(models, new, tokens, name, keep, added=False):
    """Return the logits of a model with the activations of `new` (by key) at some positions, or with these added there."""
    lm, handles = models[name], []
    for key, part in new.items():
        if key.startswith(name):

            def act(_module, _args, out, part=part):
                y = torch.where(keep[..., None], part + first(out) * added, first(out))
                return (y, *out[1:]) if isinstance(out, tuple) else y

            handles.append(inside(lm, key).register_forward_hook(act))
    logits = lm.module(tokens).logits
    for handle in handles:
        handle.remove()
    return logits


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# Which models


@pytest.mark.parametrize(
    ("values", "models"),
    [
        ([], {}),
        (["gpt2"], {}),
        (["./runs/a=b"], {}),
        (["base=gpt2", "chat=org/gpt2-chat"], {"base": "gpt2", "chat": "org/gpt2-chat"}),
        (["chat=C:\\models=new"], {"chat": "C:\\models=new"}),
    ],
)
def test_models_are_named_on_the_command_line(values, models):
    assert named_models(values) == models


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["base=gpt2", "gpt2"], r"--model gpt2: expected NAME=MODEL, such as --model base=gpt2"),
        (["gpt2", "tiny"], r"--model gpt2: expected NAME=MODEL"),
        (["base="], r"--model base=: expected NAME=MODEL"),
        (["base=gpt2", "base=tiny"], r"--model gives base twice: gpt2 and tiny"),
    ],
)
def test_models_without_a_name_of_their_own_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        named_models(values)


def test_model_for_loads_each_model_as_in_training():
    facts = (
        ModelFacts(name="base", model="tiny"),
        ModelFacts(name="chat", model="tiny", processing=("center_writing_weights",)),
    )
    ports = [sl.Port(hook=HOOK, width=192, model=name) for name in ("base", "chat")]
    d = sl.Dictionary.create("topk", reads=ports, d_sae=8, origin=Origin(models=facts))
    models = sl.model_for(d, device="cpu")
    assert {name: lm.processing for name, lm in models.models.items()} == {f.name: f.processing for f in facts}
    assert list(sl.model_for(d, name={"chat": "tiny"}, device="cpu").models) == ["chat"]
    with pytest.raises(ConfigError, match="revision = 'abc' is the commit of one model"):
        sl.model_for(d, revision="abc")


# Splices


@pytest.mark.parametrize(
    ("reads", "writes", "ports", "changed"),
    [
        ((BASE, CHAT), None, None, [0, 1]),
        ((BASE, CHAT), None, [CHAT], [1]),
        ((BASE, CHAT), None, HOOK, [0, 1]),
        ((BASE, CHAT), None, BASE, [0]),
        ((BASE, CHAT_MLP), None, None, [0, 1]),
        ((BASE, CHAT, CHAT_MLP), None, [CHAT_MLP, CHAT], [1, 2]),
        ((BASE,), (CHAT_MLP,), None, [0]),
        ((CHAT,), None, None, [0]),
    ],
)
@pytest.mark.parametrize("edits", [(), (sl.Clamp(7, 8.0), sl.Ablate([3, 9, 20]), sl.Add(5, 2.0)), (sl.Add(7, 5.0),)])
@torch.no_grad()
def test_a_splice_changes_the_chosen_ports_of_each_model(models, reads, writes, ports, changed, edits):
    d = dictionary(*reads, writes=writes)
    rows = models.to_tokens(TEXTS)
    written = writes or reads
    x = torch.cat([activation(models, key, rows.tokens) for key in reads], dim=-1)
    codes = d.encode(x).to_dense()
    edited = codes.clone()
    for edit in edits:
        edited[..., list(edit.latents)] = edit.gain * edited[..., list(edit.latents)] + edit.offset
    new = (edited - codes) @ d.W_dec if edits else codes @ d.W_dec + d.b_dec
    parts = new.split(48, dim=-1)
    wanted = {written[i]: parts[i] for i in changed}
    with models.splice(d, edits, ports=ports):
        spliced = {name: models[name].logits(rows) for name in ("base", "chat")}
    for name, logits in spliced.items():
        close(logits, logits_with(models, wanted, rows.tokens, name, rows.keep, added=bool(edits)))
    touched = {written[i].partition(":")[0] for i in changed}
    for name, logits in spliced.items():
        plain = models[name].logits(rows)
        assert torch.equal(logits, plain) == (name not in touched)


@pytest.mark.parametrize("edits", [(), (sl.Clamp(7, 4.0),), (sl.Add(7, 4.0),)])
@torch.no_grad()
def test_a_difference_is_put_on_top_of_the_base_model(models, edits):
    d = dictionary(MINUS)
    rows = models.to_tokens(TEXTS)
    base, chat = (activation(models, key, rows.tokens) for key in (BASE, CHAT))
    codes = d.encode(chat - base).to_dense()
    new = base + codes @ d.W_dec + d.b_dec
    if edits:
        before = codes[..., 7:8] if edits[0].gain == 0 else 0.0
        new = chat + (4.0 - before) * d.W_dec[7]
    plain = models["base"].logits(rows)
    wanted = logits_with(models, {CHAT: new}, rows.tokens, "chat", rows.keep)
    with models.splice(d, edits):
        close(models["chat"].logits(rows), wanted)
        assert torch.equal(models["base"].logits(rows), plain)


@torch.no_grad()
def test_edits_at_positions_and_masks_act_there_alone(models):
    d = dictionary(BASE, CHAT)
    rows = models.to_tokens(TEXTS)
    chat = activation(models, CHAT, rows.tokens)
    x_hat = d(torch.cat([activation(models, BASE, rows.tokens), chat], dim=-1))[..., 48:]
    named, keep = torch.zeros_like(rows.keep), torch.rand(rows.keep.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    named[:, [0, 4]] = True
    push = 3.0 * d.W_dec[7, 48:]
    edit = sl.Add(7, 3.0, positions=[0, 4])
    for edits, settings, new, where in (
        (edit, {}, chat + push, named),
        ((), {"keep": keep}, x_hat, keep),
        (edit, {"keep": keep, "error_term": False}, torch.where(named[..., None], x_hat + push, x_hat), keep),
    ):
        wanted = logits_with(models, {CHAT: new}, rows.tokens, "chat", where)
        with models.splice(d, edits, ports=CHAT, **settings):
            close(models["chat"].logits(rows), wanted)


@torch.no_grad()
def test_rows_padded_on_the_left_are_changed_at_their_own_tokens(models):
    d = dictionary(BASE, CHAT)
    ids, mask = torch.tensor([[7, 7, 0, 30, 41], [0, 50, 60, 70, 80]]), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    with models.splice(d):
        together = models["chat"].logits(ids, attention_mask=mask)
        alone = models["chat"].logits(ids[:1, 2:])
    close(together[:1, 2:], alone)


@pytest.mark.parametrize("keys", [(BASE, CHAT), (MINUS,), (CHAT_MLP, CHAT)])
@torch.no_grad()
def test_greedy_generation_equals_the_likeliest_tokens_of_whole_passes(models, keys):
    d = dictionary(*keys)
    for edits in ((), (sl.Clamp(7, 8.0),), (sl.Add(7, 20.0),)):
        with models.splice(d, edits):
            text = models["chat"].generate("The old man", 6, temperature=0)
            tokens = models.to_tokens("The old man").tokens
            for _ in range(6):
                tokens = torch.cat([tokens, models["chat"].logits(tokens)[:, -1:].argmax(-1)], dim=1)
        assert text == models.first.tokenizer.decode(tokens[0, 1:])


@torch.no_grad()
def test_ports_of_one_model_are_chosen_by_hook(random_lm):
    d, one = dictionary(HOOK, "blocks.1.hook_mlp_out"), {"base": random_lm}
    rows = random_lm.to_tokens(TEXTS)
    x = torch.cat([activation(one, f"base:{hook}", rows.tokens) for hook in (HOOK, "blocks.1.hook_mlp_out")], dim=-1)
    for hook, part in zip((HOOK, "blocks.1.hook_mlp_out"), d(x).split(48, dim=-1), strict=True):
        wanted = logits_with(one, {f"base:{hook}": part}, rows.tokens, "base", rows.keep)
        with random_lm.splice(d, ports=[hook]):
            close(random_lm.logits(rows), wanted)
    with pytest.raises(ConfigError, match=r"no port 'blocks.1.hook_mlp_in'; did you mean blocks.1.hook_mlp_out"):
        random_lm.splice(d, ports=["blocks.1.hook_mlp_in"]).__enter__()


@torch.no_grad()
def test_adding_to_codes_needs_no_other_model(models):
    rows = models.to_tokens(TEXTS)
    for keys, port in (((BASE, CHAT), CHAT), ((MINUS,), MINUS)):
        d = dictionary(*keys)
        with models.splice(d, sl.Add(7, 4.0), ports=port):
            wanted = models["chat"].logits(rows)
        for alone in (models["chat"], sl.Models({"chat": models["chat"]})):
            with alone.splice(d, sl.Add(7, 4.0), ports=port):
                close(models["chat"].logits(rows), wanted)
            for edit in (sl.Clamp(7, 4.0), sl.Ablate(7), sl.Scale(7, 2.0), ()):
                with (
                    pytest.raises(
                        ConfigError, match=r"codes need the activations of them all; given: .* {'base': …, 'chat': …}"
                    ),
                    alone.splice(d, edit, ports=port),
                ):
                    pass
    with (
        pytest.raises(ConfigError, match="belong to the models base and chat; random chat is one of them"),
        models["chat"].splice(dictionary(BASE, CHAT), sl.Add(7, 4.0), ports=HOOK),
    ):
        pass


def test_one_model_under_two_names_is_changed_at_one_port_at_a_time(random_lm):
    twice, d = sl.Models({"base": random_lm, "chat": random_lm}), dictionary(BASE, CHAT)
    with pytest.raises(ConfigError, match=r"are one hook of one model: choose one of them with ports="), twice.splice(d):
        pass
    with twice.splice(d, ports=CHAT):
        random_lm.logits(TEXTS)


def test_passes_that_cannot_be_read_by_the_other_model_are_refused(models):
    chat = models["chat"]
    with models.splice(dictionary(BASE, CHAT)):
        with pytest.raises(ConfigError, match="also reads random, which needs token ids; this pass has none"):
            chat.module(inputs_embeds=torch.zeros(1, 3, 48))
        tokens = models.to_tokens(TEXTS[0]).tokens
        cached = chat.module(tokens[:, :4], use_cache=True).past_key_values
        with pytest.raises(ConfigError, match="needs the whole row; run the model without a cache"):
            chat.module(tokens[:, 4:5], past_key_values=cached, use_cache=True)


# Steering and attribution


def loss(logits, tokens):
    return float(torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:]))


@pytest.mark.parametrize(
    ("keys", "ports", "in_model", "changed"),
    [
        ((BASE, CHAT), None, "chat", [CHAT]),
        ((BASE, CHAT), BASE, None, [BASE]),
        ((BASE, CHAT, CHAT_MLP), None, "chat", [CHAT, CHAT_MLP]),
        ((BASE, CHAT, CHAT_MLP), CHAT_MLP, None, [CHAT_MLP]),
        ((MINUS,), None, None, [MINUS]),
    ],
)
@torch.no_grad()
def test_attribution_in_one_model_is_the_effect_at_its_ports(models, keys, ports, in_model, changed):
    d = dictionary(*keys)
    scores = sl.attribute(d, models, TEXTS[0], ports=ports, in_model=in_model)
    name = changed[0].partition(":")[0].partition("-")[0]
    tokens = models.to_tokens(TEXTS[0]).tokens
    codes = d.encode(torch.cat([activation(models, key, tokens) for key in keys], dim=-1)).to_dense()[0]
    clean = loss(models[name].module(tokens).logits, tokens)
    assert float(scores.value[0]) == pytest.approx(clean, abs=1e-5)
    assert scores.hook == " + ".join(changed)
    assert (scores.direct is not None) == (len(changed) == 1 and not changed[0].endswith("mlp_out"))
    parts = dict(zip(keys, d.W_dec.split(48, dim=-1), strict=True))
    for j in range(0, len(scores.latent), 7):
        position, latent = int(scores.position[j]), int(scores.latent[j])
        assert float(scores.activation[j]) == pytest.approx(float(codes[position, latent]), rel=1e-4)
        effects = []
        for share in (1.0, 1e-2):
            removed = {}
            for key in changed:
                push = torch.zeros(1, tokens.shape[1], 48)
                push[0, position] = -share * codes[position, latent] * parts[key][latent]
                removed[f"{name}:{key.partition(':')[2]}"] = push
            without = logits_with(models, removed, tokens, name, torch.ones_like(tokens, dtype=torch.bool), added=True)
            effects.append((clean - loss(without, tokens)) / share)
        assert float(scores.ablation[j]) == pytest.approx(effects[0], abs=1e-4)
        assert float(scores.gradient[j]) == pytest.approx(effects[1], rel=0.1, abs=2e-3)


@torch.no_grad()
def test_doses_push_at_the_chosen_port_with_controls_of_equal_norm_there(models):
    d = dictionary(BASE, CHAT)
    tokens = models.to_tokens(TEXTS[0]).tokens
    keep = models.to_tokens(TEXTS[0]).keep
    metric = lambda logits: logits[:, -1, 5]  # noqa: E731
    response = sl.dose_response(d, models, 7, [3.0], TEXTS[0], metric=metric, n_controls=2, in_model="chat")
    clean = models["chat"].module(tokens).logits
    norms = d.W_dec[:, 48:].norm(dim=1)
    for effect, kl, latent in zip(response.effect[0, :, 0], response.kl[0, :, 0], [7, *response.controls], strict=True):
        push = 3.0 * d.W_dec[latent, 48:] * norms[7] / norms[latent]
        changed = logits_with(models, {CHAT: push}, tokens, "chat", keep, added=True)
        assert float(effect) == pytest.approx(float(changed[0, -1, 5] - clean[0, -1, 5]), abs=1e-4)
        log_p, log_q = (x[0].log_softmax(-1)[keep[0]] for x in (clean, changed))
        assert float(kl) == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), abs=1e-5)
    assert "promoted" not in sl.dose_response(d, models, 7, [3.0], TEXTS[0], n_controls=0, ports=CHAT).metric


@torch.no_grad()
def test_steering_writes_with_one_model_and_measures_its_cost(models):
    d = dictionary(BASE, CHAT)
    settings = {"max_new_tokens": 5, "temperature": 0}
    edit = sl.Add(7, 30.0)
    steered = steer(d, models, "The old man", edit, in_model="chat", **settings)
    assert steered.plain == models["chat"].generate("The old man", 5, temperature=0)
    with models.splice(d, edit, ports=CHAT):
        assert steered.edited == models["chat"].generate("The old man", 5, temperature=0)
    tokens = models.to_tokens(steered.plain).tokens
    keep = models.to_tokens(steered.plain).keep
    changed = logits_with(models, {CHAT: 30.0 * d.W_dec[7, 48:]}, tokens, "chat", keep, added=True)
    log_p, log_q = (x[0].log_softmax(-1)[keep[0]] for x in (models["chat"].module(tokens).logits, changed))
    assert steered.kl == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-4)
    assert steer(d, models["chat"], "The old man", edit, ports=CHAT, **settings) == steered
    with pytest.raises(ConfigError, match="codes need the activations of them all"):
        steer(d, models["chat"], "The old man", sl.Ablate(7), ports=CHAT, **settings)


def test_the_latents_of_a_prompt_are_those_of_all_models(models):
    d = dictionary(BASE, CHAT)
    tokens = models.to_tokens(TEXTS[0]).tokens
    with torch.no_grad():
        codes = d.encode(torch.cat([activation(models, key, tokens) for key in (BASE, CHAT)], dim=-1)).to_dense()[0]
    view = sl.prompt_view(d, models.models, TEXTS[0], top=6)
    fires = {(position, latent) for position, latent in codes.nonzero().tolist() if position > 0}
    assert {(row.position, row.latent) for row in view.rows} == fires
    attributed = sl.prompt_view(d, models, TEXTS[0], "attribution", in_model="chat")
    wanted = sl.attribute(d, models, TEXTS[0], in_model="chat", ablation=False)
    entries = zip(wanted.position.tolist(), wanted.latent.tolist(), wanted.gradient.tolist(), strict=True)
    effects = {(position, latent): effect for position, latent, effect in entries}
    assert all(row.attribution == effects[row.position, row.latent] for row in attributed.rows)


def test_effects_are_measured_in_one_model(models):
    d = dictionary(BASE, CHAT)
    message = r"effects are measured in one model at a time: give in_model='base' or in_model='chat'"
    for act in (
        lambda **where: sl.attribute(d, models, TEXTS[0], **where),
        lambda **where: sl.dose_response(d, models, 7, [1.0], TEXTS[0], **where),
        lambda **where: steer(d, models, TEXTS[0], sl.Add(7, 1.0), **where),
        lambda **where: sl.prompt_view(d, models, TEXTS[0], "attribution", **where),
    ):
        with pytest.raises(ConfigError, match=message):
            act()
        with pytest.raises(ConfigError, match="no model 'other'; the models are base, chat"):
            act(in_model="other")
        with pytest.raises(ConfigError, match=r"has no port of base:.* in that model, so nothing changes there"):
            act(in_model="chat", ports=BASE)
    with pytest.raises(ConfigError, match="names one of several models, but one was given"):
        sl.attribute(dictionary(HOOK), models["base"], TEXTS[0], in_model="base")


# The command line


def test_commands_steer_and_attribute_in_a_named_model(models, command, tmp_path, monkeypatch):
    monkeypatch.setattr("saelens_lite.model.loading.load_model", lambda name, **_: models[str(name)])
    d = dictionary(BASE, CHAT)
    d.save(tmp_path / "d")
    named = ["--model", "base=base", "--model", "chat=chat"]
    steered = command(
        "steer", str(tmp_path / "d"), "--prompt", "The old man", "--add", "7=30", "--port", CHAT, "--max-new-tokens", "4",
        "--temperature", "0", *named,
    )  # fmt: skip
    assert steered.code == 0, steered.err
    wanted = steer(d, models, "The old man", sl.Add(7, 30.0), ports=CHAT, max_new_tokens=4, temperature=0)
    assert f"{wanted.kl:.4f} nats per token" in steered.out
    out = tmp_path / "scores.json"
    said = command("attribute", str(tmp_path / "d"), "--prompt", TEXTS[0], "--in-model", "chat", "--json", str(out), *named)
    assert said.code == 0, said.err
    wanted = sl.attribute(d, models, TEXTS[0], in_model="chat").to_dict()
    assert json.loads(out.read_text()) == json.loads(json.dumps(wanted))
    said = command("attribute", str(tmp_path / "d"), "--prompt", TEXTS[0], "--in-model", "other", *named)
    assert (said.code, said.out) == (2, "")
    assert "--in-model other: --model gives base and chat" in said.err
    said = command("attribute", str(tmp_path / "d"), "--prompt", TEXTS[0], *named)
    assert said.code == 2
    assert "measured in one model at a time" in said.err


def test_a_folder_with_an_equals_sign_in_its_name_is_one_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=0.1").mkdir()
    assert named_models(["lr=0.1"]) == {}
    assert named_models(["base=gpt2"]) == {"base": "gpt2"}
