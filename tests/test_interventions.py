"""Edits of codes against a dense float64 formula, dose–response against plain splices, and steering."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F

import saelens_lite as sl
from saelens_lite.errors import ConfigError, NonFiniteError, ShapeError, TextError
from saelens_lite.interventions import LogProb, kl_cost, steer
from saelens_lite.tokens import TokenRows

TEXTS = ["The old man said that he would not go.", "import os", "It was the best of times, it was the worst of times, it was"]
PROMPT = "The old man"
HOOK, AFTER = "blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"
MLP_IN, MLP_OUT = "blocks.1.ln2.hook_out", "blocks.1.hook_mlp_out"


@pytest.fixture(scope="module")
def topk():
    """An autoencoder of random directions whose codes are of the size of the activations."""
    return sl.Dictionary.create("topk", reads=sl.Port(hook=HOOK, width=48), d_sae=96, options={"k": 6})


@pytest.fixture(scope="module")
def transcoder():
    """A skip transcoder of random weights."""
    d = sl.Dictionary.create(
        "topk",
        reads=sl.Port(hook=MLP_IN, width=48),
        writes=sl.Port(hook=MLP_OUT, width=48),
        d_sae=96,
        skip=True,
        options={"k": 6},
        seed=1,
    )
    generator = torch.Generator().manual_seed(2)
    for parameter in (d.b_dec, d.W_skip):
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return d


@pytest.fixture(scope="module")
def normalised(topk):
    """An autoencoder that normalises each activation by itself, of the same directions."""
    d = sl.Dictionary(topk.rule, reads=topk.reads, d_sae=96, origin=topk.origin, token_norm="layer_norm")
    d.load_state_dict(topk.state_dict())
    d.b_dec.data.copy_(torch.linspace(-1, 1, 48))
    return d.eval()


@pytest.fixture(params=["topk", "transcoder", "normalised"])
def dictionary(request):
    """Each of the three dictionaries in turn."""
    return request.getfixturevalue(request.param)


def activations(lm, d) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the activations that the dictionary reads, and those at the hook that it writes."""
    (target,) = d.writes
    acts = lm.run(TEXTS, [d.hook, target.hook])
    return acts[d.hook], acts[target.hook]


def edited_activation(lm, d, edits, **settings) -> torch.Tensor:
    """Return the activations that the model reads within a splice."""
    seen = []
    read_there = AFTER if d.writes_what_it_reads else d.writes[0].hook
    with lm.splice(d, edits, **settings), lm.replace(read_there, lambda y: seen.append(y.clone()) or y):
        lm.logits(TEXTS)
    return seen[0]


def busiest(lm, d, n: int) -> list[int]:
    """Return the latents that fire most often."""
    codes = d.encode(activations(lm, d)[0])
    return torch.bincount(codes.latent, minlength=d.d_sae).topk(n).indices.tolist()


def dense(keep: torch.Tensor, codes: torch.Tensor, edits) -> torch.Tensor:
    """Return codes [batch pos d_sae] after edits, one latent and position at a time."""
    codes = codes.clone()
    n = codes.shape[1]
    for edit in edits:
        if edit.positions is None:
            positions = range(n)
        else:
            positions = range(n)[edit.positions] if isinstance(edit.positions, slice) else edit.positions
        for latent in edit.latents:
            for p in positions:
                old = codes[:, p, latent].clone()
                new = {
                    sl.Ablate: lambda _, old=old: 0 * old,
                    sl.Clamp: lambda edit, old=old: 0 * old + edit.value,
                    sl.Scale: lambda edit, old=old: edit.factor * old,
                    sl.Add: lambda edit, old=old: old + edit.amount,
                }[type(edit)](edit)
                codes[:, p, latent] = torch.where(keep[:, p], new, old) if edit.positions is None else new
    return codes


EDITS = {
    "ablate": lambda a, b, c: [sl.Ablate([a, b, c])],
    "clamp": lambda a, b, c: [sl.Clamp(a, 8.0)],
    "clamp to a negative value": lambda a, b, c: [sl.Clamp([b, 95], -3)],
    "scale": lambda a, b, c: [sl.Scale((a, c), 2.5)],
    "add": lambda a, b, c: [sl.Add([a, 0], 1.5)],
    "positions": lambda a, b, c: [sl.Clamp(a, 8.0, positions=[0, 2]), sl.Add(b, -1, positions=slice(1, None, 2))],
    "in turn": lambda a, b, c: [
        sl.Add(a, 2.0), sl.Scale([a, b], 3.0), sl.Clamp(c, 1.0), sl.Add([c, a], 0.5), sl.Ablate(b, positions=slice(2, 4)),
    ],
    "nothing": lambda a, b, c: [sl.Ablate([])],
}  # fmt: skip


@pytest.mark.parametrize("error_term", [True, False])
@pytest.mark.parametrize("name", EDITS)
def test_an_edit_is_the_dense_formula(random_lm, dictionary, name, error_term):
    d, edits = dictionary, EDITS[name](*busiest(random_lm, dictionary, 3))
    keep = random_lm.to_tokens(TEXTS).keep
    x, y = (a.double() for a in activations(random_lm, d))
    old = d.encode(x.float()).to_dense().detach().double()
    W_dec, b_dec = d.W_dec.detach().double(), d.b_dec.detach().double()
    mean, scale = (x.mean(-1, keepdim=True), x.std(-1, keepdim=True)) if d.token_norm else (0, 1)
    base = y.clone()
    if not error_term:
        skip = x @ d.W_skip.detach().double().T if d.W_skip is not None else 0
        base[keep] = ((old @ W_dec + b_dec + skip) * scale + mean)[keep]
    wanted = base + (dense(keep, old, edits) - old) @ W_dec * scale
    found = edited_activation(random_lm, d, edits, error_term=error_term)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    assert (name == "nothing") == torch.allclose(found, base.float(), atol=1e-4)


def test_with_edits_the_error_term_is_kept_by_default(random_lm, topk):
    edits = [sl.Clamp(3, 8.0)]
    kept, dropped = (edited_activation(random_lm, topk, edits, error_term=choice) for choice in (True, False))
    assert torch.equal(edited_activation(random_lm, topk, edits), kept)
    assert torch.equal(edited_activation(random_lm, topk, sl.Clamp(3, 8.0)), kept)  # one edit needs no list
    assert not torch.allclose(kept, dropped, atol=1e-2)
    reconstruction = edited_activation(random_lm, topk, [])
    keep = random_lm.to_tokens(TEXTS).keep
    torch.testing.assert_close(reconstruction[keep], topk(activations(random_lm, topk)[0])[keep].detach())


@pytest.mark.parametrize("edits", [[], [sl.Scale(range(96), 1.0)], [sl.Add([1, 2], 0.0)]])
def test_edits_that_change_no_code_change_no_logit(random_lm, dictionary, edits):
    clean = random_lm.logits(TEXTS)
    with random_lm.splice(dictionary, edits, error_term=True):
        assert torch.equal(random_lm.logits(TEXTS), clean)


def test_ablating_all_latents_takes_what_they_decode_to_out_of_the_stream(random_lm, topk):
    x, _ = activations(random_lm, topk)
    decoded = topk.encode(x).to_dense() @ topk.W_dec
    found = edited_activation(random_lm, topk, [sl.Ablate(range(96))])
    keep = random_lm.to_tokens(TEXTS).keep
    torch.testing.assert_close(found[keep], (x - decoded)[keep].detach(), rtol=1e-5, atol=1e-5)
    assert torch.equal(found[:, 0], x[:, 0])
    assert torch.equal(edited_activation(random_lm, topk, [sl.Scale(range(96), 0)]), found)


def test_keep_bounds_where_edits_act(random_lm, topk):
    rows = random_lm.to_tokens(TEXTS)
    x, _ = activations(random_lm, topk)
    found = edited_activation(random_lm, topk, [sl.Add(5, 2.0), sl.Add(6, 3.0, positions=[0, 1])], keep=rows.keep)
    wanted = x + 2 * topk.W_dec[5].detach() * rows.keep[..., None]
    wanted[:, 1] += 3 * topk.W_dec[6].detach()
    torch.testing.assert_close(found, wanted)


def test_edits_change_activations_of_any_shape(topk):
    x = torch.randn(2, 3, 4, 48, generator=torch.Generator().manual_seed(0))
    change = topk.change(x, [sl.Clamp(7, 2.0)])
    old = topk.encode(x).to_dense()[..., 7:8]
    torch.testing.assert_close(change, (2 - old) * topk.W_dec[7])
    assert topk.change(x[0, 0, 0], [sl.Ablate(7)]).shape == (48,)


def greedy(lm, prompt: str, n: int) -> str:
    """Return the n likeliest tokens in a row, each from a full forward pass."""
    tokens = lm.to_tokens(prompt).tokens
    for _ in range(n):
        tokens = torch.cat([tokens, lm.logits(tokens)[:, -1].argmax(-1, keepdim=True)], dim=1)
    return lm.tokenizer.decode(tokens[0, 1:])


@pytest.mark.parametrize("positions", [None, slice(6, None), slice(0, 3)])
@pytest.mark.parametrize("target", [None, MLP_OUT])
def test_generation_with_a_cache_is_generation_without(lm, target, positions):
    hook = MLP_IN if target else HOOK
    writes = sl.Port(hook=target, width=lm.d_model) if target else None
    d = sl.Dictionary.create("topk", reads=sl.Port(hook=hook, width=lm.d_model), writes=writes, d_sae=96, options={"k": 6})
    fires = d.encode(lm.run(PROMPT, hook)[hook]).latent.unique()
    edits = [sl.Clamp(fires, 6.0, positions=positions), sl.Add(90, 40.0, positions=positions)]
    plain = lm.generate(PROMPT, 14, temperature=0)
    with lm.splice(d, edits):
        assert lm.generate(PROMPT, 14, temperature=0) == greedy(lm, PROMPT, 14) != plain
    assert lm.generate(PROMPT, 14, temperature=0) == plain


def test_a_position_that_is_still_to_be_generated(random_lm, topk):
    n = random_lm.to_tokens(PROMPT).tokens.shape[1]
    plain = random_lm.generate(PROMPT, 8, temperature=0)
    with random_lm.splice(topk, [sl.Add(7, 60.0, positions=n + 3)]):
        edited = random_lm.generate(PROMPT, 8, temperature=0)
        with pytest.raises(ShapeError, match=rf"names position {n + 3}; this row has positions 0 to {n - 1}"):
            random_lm.logits(PROMPT)
        with pytest.raises(ShapeError, match=rf"names position {n + 3}; this row has positions 0 to {n + 1}"):
            random_lm.generate(PROMPT, 2)
    shared = random_lm.generate(PROMPT, 4, temperature=0)
    assert edited.startswith(shared)
    assert plain.startswith(shared)
    assert edited != plain


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sl.Ablate(-1), r"Ablate: latents = -1; expected whole numbers ≥ 0"),
        (lambda: sl.Ablate(torch.tensor([1.0])), r"Ablate: latents = \[1\.0\]; expected whole numbers"),
        (lambda: sl.Ablate("7"), r"Ablate: latents = '7'; expected whole numbers"),
        (lambda: sl.Ablate(torch.tensor([True, False])), r"latents = \[True, False\]; expected whole numbers"),
        (lambda: sl.Clamp(1, float("nan")), r"Clamp: value = nan; expected a finite number"),
        (lambda: sl.Scale(1, float("inf")), r"Scale: factor = inf; expected a finite number"),
        (lambda: sl.Add(1, True), r"Add: amount = True; expected a finite number"),
        (lambda: sl.Add(1, 1, positions=[-1]), r"= \[-1\]; expected whole numbers ≥ 0; the last of a prompt is lm"),
        (lambda: sl.Add(1, 1, positions=slice(-3, None)), r"Add: positions = \[-3\]; expected whole numbers ≥ 0"),
        (lambda: sl.Add(1, 1, positions=slice(None, None, 0)), r"a slice cannot have a step of 0"),
    ],
)
def test_edits_that_make_no_sense(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_edits_are_plain_frozen_values():
    assert sl.Clamp(torch.tensor([7, 7, 3]), 8) == sl.Clamp((7, 3), 8.0)
    assert repr(sl.Add(3, 2, positions=5)) == "Add(latents=(3,), positions=(5,), amount=2.0)"
    with pytest.raises(dataclasses.FrozenInstanceError):
        sl.Add(3, 2).amount = 3


def test_a_latent_that_does_not_exist(random_lm, topk):
    with (
        pytest.raises(ConfigError, match=r"no latent 96; this dictionary has latents 0 to 95"),
        random_lm.splice(topk, [sl.Ablate([1, 96])]),
    ):
        pass


@pytest.fixture(scope="module")
def response(random_lm, topk):
    """Doses of one latent on texts of uneven length."""
    return sl.dose_response(topk, random_lm, 7, [-2, 0, 3.0], TEXTS, n_controls=4, seed=3, batch_tokens=50)


def test_each_dose_is_a_splice_of_its_own(random_lm, topk, response):
    """By splicing every dose of every latent into each text alone."""
    assert response.effect.shape == response.kl.shape == (3, 5, 3)
    promoted = (random_lm.unembedding() @ topk.W_dec[7].detach()).topk(10).indices
    norms = topk.W_dec.detach().norm(dim=1)
    for r, text in enumerate(TEXTS):
        clean = random_lm.logits(text)[0].double().log_softmax(-1)
        before = clean[1:, promoted].exp().sum(-1).log().mean()
        assert float(response.clean[r]) == pytest.approx(float(before), abs=1e-5)
        for i, dose in enumerate(response.doses):
            for j, latent in enumerate([7, *response.controls]):
                with random_lm.splice(topk, [sl.Add(latent, dose * float(norms[7] / norms[latent]))]):
                    new = random_lm.logits(text)[0].double().log_softmax(-1)
                after = new[1:, promoted].exp().sum(-1).log().mean()
                kl = F.kl_div(new[1:], clean[1:], reduction="none", log_target=True).sum(-1).mean()
                assert float(response.effect[i, j, r]) == pytest.approx(float(after - before), abs=2e-5)
                assert float(response.kl[i, j, r]) == pytest.approx(float(kl), abs=2e-5)


def test_a_dose_counts_in_the_units_of_what_is_decoded(random_lm, normalised):
    found = sl.dose_response(normalised, random_lm, 7, [2.0], TEXTS[0], metric="loss", n_controls=0)
    before = random_lm.logits(TEXTS[0])
    with random_lm.splice(normalised, [sl.Add(7, 2.0)]):
        after = random_lm.logits(TEXTS[0])
    tokens = random_lm.to_tokens(TEXTS[0]).tokens[0]
    loss = [F.cross_entropy(logits[0, :-1].double(), tokens[1:]) for logits in (before, after)]
    assert float(found.effect) == pytest.approx(float(loss[1] - loss[0]), abs=2e-5)
    assert abs(float(found.effect)) > 1e-3


def test_what_a_dose_response_says(random_lm, topk, response):
    again = sl.dose_response(topk, random_lm, 7, [-2, 0, 3.0], TEXTS, n_controls=4, seed=3, batch_tokens=50)
    assert torch.equal(again.effect, response.effect)
    fires = set(torch.cat([topk.encode(random_lm.run(t, HOOK)[HOOK][0, 1:]).latent for t in TEXTS]).tolist())
    assert set(response.controls) <= fires - {7}
    assert len(set(response.controls)) == 4
    assert response.controls != sl.dose_response(topk, random_lm, 7, [1], TEXTS, n_controls=4, seed=4).controls
    down, none, up = response.to_dict()["doses"]
    assert down["effect"] < none["effect"] == pytest.approx(0, abs=1e-5)
    assert up["effect"] > 0.01
    assert [none["kl"], none["control_kl"]] == pytest.approx([0, 0], abs=1e-6)
    assert up["effect"] == pytest.approx(float(response.effect[2, 0].mean()))
    assert up["effect_se"] == pytest.approx(float(response.effect[2, 0].std() / 3**0.5))
    assert up["beaten"] == int((response.effect[2, 1:].mean(-1) < up["effect"]).sum())
    assert response.table().row_count == 3
    assert dataclasses.replace(response, metric="logit of '[/b]'").table().caption.plain.startswith("change of logit of '[/b]'")


def test_the_largest_activation_is_that_of_the_positions_that_count(random_lm, topk):
    """The first position of a row does not count, however strongly a latent fires there."""
    codes = [topk.encode(random_lm.run(text, HOOK)[HOOK]).to_dense()[0].detach() for text in TEXTS]
    first, later = codes[0][0], torch.cat([code[1:] for code in codes]).amax(0)
    latent = int((first - later).argmax())
    assert first[latent] > later[latent]
    found = sl.dose_response(topk, random_lm, latent, [1.0], TEXTS, n_controls=0)
    assert found.max_activation == pytest.approx(float(later[latent]), abs=1e-5)


def test_the_plot_shows_the_latent_and_its_controls(response):
    by_dose, by_cost = response.plot().axes
    assert len(by_dose.lines) == len(by_cost.lines) == 5
    assert list(by_dose.lines[-1].get_xdata()) == [-2, 0, 3]
    assert by_dose.lines[-1].get_ydata() == pytest.approx(response.effect[:, 0].mean(-1).tolist())
    assert by_cost.lines[-1].get_xdata() == pytest.approx(response.kl[:, 0].mean(-1).tolist())


@pytest.mark.parametrize("metric", ["loss", (5, 9), LogProb("It", position=2), lambda logits: logits[:, -1, 11]])
def test_metrics_of_a_dose(random_lm, transcoder, metric):
    found = sl.dose_response(transcoder, random_lm, 7, [2], TEXTS[0], metric=metric, n_controls=0)
    tokens = random_lm.to_tokens(TEXTS[0]).tokens[0]

    def value() -> float:
        logits = random_lm.logits(TEXTS[0])[0].double()
        if metric == "loss":
            return float(F.cross_entropy(logits[:-1], tokens[1:]))
        if metric == (5, 9):
            return float(logits[-1, 5] - logits[-1, 9])
        word = random_lm.tokenizer("It")["input_ids"][-1]
        return float(logits.log_softmax(-1)[2, word]) if isinstance(metric, LogProb) else float(logits[-1, 11])

    before = value()
    with random_lm.splice(transcoder, [sl.Add(7, 2)]):
        assert float(found.effect) == pytest.approx(value() - before, abs=1e-5)
    assert "control_effect" not in found.summary()[0]
    assert found.table().row_count == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"latent": 96}, ConfigError, r"no latent 96"),
        ({"doses": []}, ConfigError, r"expected at least one dose"),
        ({"doses": [1, float("nan")]}, ConfigError, r"amount = nan; expected a finite number"),
        ({"n_controls": 96}, ConfigError, r"other latents fire on the text; give more text, or n_controls below 96"),
        ({"metric": "los"}, ConfigError, r"metric = 'los'; expected 'loss', a pair of tokens"),
        ({"metric": ("The old", " man")}, ConfigError, r"'The old' is not one token of random: \['The', ' old'\]"),
        ({"metric": (5, 10**6)}, ConfigError, r"1000000 is not a token id of random: ids go from 0 to"),
        ({"metric": "loss", "position": 12}, ConfigError, r"position = 12; the row has \d+ tokens"),
        ({"metric": "promoted", "position": 99}, ConfigError, r"position = 99; the row has \d+ tokens"),
        ({"metric": lambda logits: logits[:, 0]}, ShapeError, r"the metric of logits \[1, \d+, \d+\] is \[1, \d+\]; expected"),
        ({"metric": lambda logits: logits[:, 0, 0] / 0}, NonFiniteError, r"is NaN or infinite"),
        ({"text": ""}, TextError, r"empty text"),
        ({"text": torch.tensor([[0]])}, TextError, r"row 0 has no position that counts"),
    ],
)
def test_dose_responses_that_cannot_be(random_lm, topk, change, error, message):
    asked = {"latent": 7, "doses": [1], "text": TEXTS[0], "n_controls": 2} | change
    with pytest.raises(error, match=message):
        sl.dose_response(topk, random_lm, **asked)


def test_a_transcoder_that_names_no_target(random_lm, transcoder):
    d = copy.deepcopy(transcoder)
    d.writes = (sl.Port(width=48),)
    for ask in (
        lambda: sl.dose_response(d, random_lm, 7, [1.0], TEXTS[0], n_controls=0),
        lambda: sl.attribute(d, random_lm, TEXTS[0]),
        lambda: kl_cost(d, random_lm, [sl.Ablate(7)], TEXTS[0]),
    ):
        with pytest.raises(ConfigError, match="which hook it writes"):
            ask()


def test_rows_in_which_nothing_counts(random_lm, topk):
    rows = random_lm.to_tokens(TEXTS)
    keep = rows.keep.clone()
    keep[1] = False
    with pytest.raises(TextError, match="row 1 has no position that counts"):
        sl.attribute(topk, random_lm, TokenRows(rows.tokens, keep))


def test_activations_on_another_device(random_lm, topk):
    """Functions that get a model copy the dictionary to it; a dictionary alone refuses, and says what to do."""
    d = copy.deepcopy(topk).to("meta")
    x = random_lm.run(TEXTS[0], HOOK)[HOOK]
    with pytest.raises(ConfigError, match=r"x is on cpu, the dictionary on meta.*dictionary\.to\('cpu'\)"):
        d.encode(x)


def test_a_keep_of_another_shape(random_lm, topk):
    keep = random_lm.to_tokens(TEXTS[0]).keep
    with random_lm.splice(topk, [sl.Add(5, 2.0)], keep=keep):
        with pytest.raises(ShapeError, match=r"keep is \[1, \d+\]; blocks\.0\.hook_resid_post is \[batch pos d\] = \[3, "):
            random_lm.logits(TEXTS)
        with pytest.raises(ShapeError, match=r"= \[1, 1, 48\]"):
            random_lm.generate(TEXTS[0], 3)


def test_a_latent_without_direction(random_lm):
    d = sl.Dictionary.create("topk", reads=sl.Port(hook=HOOK, width=48), d_sae=8, options={"k": 2})
    d.W_dec.data[3] = 0
    with pytest.raises(ConfigError, match=r"latent 3 has no direction"):
        sl.dose_response(d, random_lm, 3, [1], TEXTS, n_controls=0)


def test_steering_shows_both_texts_and_the_cost(random_lm, topk):
    edits = [sl.Add(7, 30.0)]
    found = steer(topk, random_lm, PROMPT, edits, max_new_tokens=10, seed=5)
    assert found.plain == random_lm.generate(PROMPT, 10, seed=5)
    with random_lm.splice(topk, edits):
        assert found.edited == random_lm.generate(PROMPT, 10, seed=5) != found.plain
    assert found.kl == kl_cost(topk, random_lm, edits, found.plain) > 0.1
    with pytest.raises(ConfigError, match="at least one edit"):
        steer(topk, random_lm, PROMPT, [])


def test_the_cost_counts_every_token_once(random_lm, topk):
    edits = [sl.Clamp(7, 3.0)]
    n = [int(random_lm.to_tokens(text).keep.sum()) for text in TEXTS]
    each = [kl_cost(topk, random_lm, edits, text) for text in TEXTS]
    pooled = sum(a * b for a, b in zip(n, each, strict=True)) / sum(n)
    assert kl_cost(topk, random_lm, edits, TEXTS) == pytest.approx(pooled, rel=1e-5)
