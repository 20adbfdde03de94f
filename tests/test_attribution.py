"""Attribution against finite differences, forward passes one at a time, scipy, and a model in which all ways agree."""

import copy
import io
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console

import saelens_lite as sl
from saelens_lite.errors import ConfigError, HookError, TextError

TEXTS = ["The old man said that he would not go.", "import os", "It was the best of times, it was the worst"]
HOOK = "blocks.1.hook_resid_pre"
MLP = ("blocks.1.ln2.hook_out", "blocks.1.hook_mlp_out")
PAIR = (5, 9)


def autoencoder(hook: str = HOOK) -> sl.Dictionary:
    d = sl.Dictionary.create("topk", reads=sl.Port(hook=hook, width=48), d_sae=96, options={"k": 6})
    d.b_dec.data.copy_(torch.linspace(-0.1, 0.1, 48))
    return d


@pytest.fixture(scope="module")
def dictionary():
    """An autoencoder of random directions."""
    return autoencoder()


@pytest.fixture(scope="module")
def transcoder():
    """A transcoder of random directions."""
    reads, writes = (sl.Port(hook=hook, width=48) for hook in MLP)
    return sl.Dictionary.create("topk", reads=reads, writes=writes, d_sae=96, skip=True, options={"k": 6})


@pytest.fixture(scope="module")
def normalised(dictionary):
    """An autoencoder that normalises each activation by itself."""
    d = sl.Dictionary(dictionary.rule, reads=dictionary.reads, d_sae=96, origin=dictionary.origin, token_norm="layer_norm")
    d.load_state_dict(dictionary.state_dict())
    return d.eval()


@pytest.fixture(scope="module")
def exact_lm(random_lm):
    """The random model in float64."""
    return sl.LanguageModel(copy.deepcopy(random_lm.module).double(), random_lm.tokenizer, name="exact")


def metric_value(lm, tokens, metric) -> torch.Tensor:
    """Return a metric of one row, in float64."""
    logits = lm.logits(tokens)[0].double()
    if metric == "loss":
        return torch.nn.functional.cross_entropy(logits[:-1], tokens[1:])
    return logits[-1, metric[0]] - logits[-1, metric[1]]


def entries(found) -> list[tuple[int, int, int]]:
    return list(zip(found.row.tolist(), found.position.tolist(), found.latent.tolist(), strict=True))


def rows(lm, texts) -> list[torch.Tensor]:
    return [lm.to_tokens(text).tokens[0] for text in texts]


@pytest.mark.parametrize("name", ["dictionary", "transcoder", "normalised"])
@pytest.mark.parametrize("metric", ["loss", PAIR])
def test_the_gradient_is_the_slope_of_each_code(exact_lm, random_lm, name, metric, request):
    """By central differences of the code, in float64; the float32 model agrees."""
    d = copy.deepcopy(request.getfixturevalue(name)).double()
    target, tokens = d.writes[0].hook, rows(exact_lm, TEXTS)
    found = sl.attribute(d, exact_lm, TEXTS, metric, ablation=False)
    scales = [exact_lm.run(t, HOOK)[HOOK][0].std(-1) if d.token_norm else torch.ones(len(t)) for t in tokens]
    step = 1e-4
    for j, (row, position, latent) in list(enumerate(entries(found)))[::7]:
        ends = []
        for change in (step, -step):
            added = torch.zeros(len(tokens[row]), 48, dtype=torch.float64)
            added[position] = change * scales[row][position] * d.W_dec[latent].detach()
            with exact_lm.replace(target, lambda y, added=added: y + added):
                ends.append(metric_value(exact_lm, tokens[row], metric))
        slope = (ends[0] - ends[1]) / (2 * step)
        assert float(found.gradient[j]) == pytest.approx(float(found.activation[j] * slope), rel=1e-5, abs=1e-9)
    single = sl.attribute(request.getfixturevalue(name), random_lm, TEXTS, metric, ablation=False)
    assert entries(single) == entries(found)
    torch.testing.assert_close(single.gradient.double(), found.gradient, rtol=1e-3, atol=1e-5)
    assert found.ablation is None


@pytest.mark.parametrize("name", ["dictionary", "transcoder", "normalised"])
@pytest.mark.parametrize("metric", ["loss", PAIR])
def test_ablation_is_a_forward_pass_without_the_latent(random_lm, name, metric, request):
    d = request.getfixturevalue(name)
    found = sl.attribute(d, random_lm, TEXTS, metric, batch_tokens=100)
    tokens = rows(random_lm, TEXTS)
    for j, (row, position, latent) in list(enumerate(entries(found)))[::5]:
        clean = metric_value(random_lm, tokens[row], metric)
        with random_lm.splice(d, [sl.Ablate(latent, positions=position)]):
            without = metric_value(random_lm, tokens[row], metric)
        assert float(found.ablation[j]) == pytest.approx(float(clean - without), abs=1e-5)
        assert float(found.value[row]) == pytest.approx(float(clean), abs=1e-5)


def test_entries_are_the_latents_that_fire_where_the_dictionary_was_trained(random_lm, dictionary):
    found = sl.attribute(dictionary, random_lm, TEXTS, ablation=False)
    wanted = []
    for row, text in enumerate(TEXTS):
        codes = dictionary.encode(random_lm.run(text, HOOK)[HOOK][0]).to_dense().detach()
        wanted += [(row, p, i, float(codes[p, i])) for p, i in codes.nonzero().tolist() if p > 0]
    ours = [(*entry, value) for entry, value in zip(entries(found), found.activation.tolist(), strict=True)]
    assert [entry[:3] for entry in sorted(ours)] == [entry[:3] for entry in sorted(wanted)]
    assert [e[3] for e in sorted(ours)] == pytest.approx([e[3] for e in sorted(wanted)], abs=1e-5)
    assert "".join(found.tokens[0][1:]) == TEXTS[0]
    ends = sl.attribute(dictionary, random_lm, TEXTS, ablation=False, at=iter([0, -1]))
    lengths = [len(tokens) for tokens in found.tokens]
    assert {entry[:2] for entry in entries(ends)} == {(row, p) for row, n in enumerate(lengths) for p in (0, n - 1)}


def test_direct_effects_go_through_the_final_norm_alone(exact_lm, dictionary):
    """f W_dec through ln_f with its divisor held, and the two rows of the head."""
    d = copy.deepcopy(dictionary).double()
    found = sl.attribute(d, exact_lm, TEXTS, PAIR, ablation=False)
    transformer, head = exact_lm.module.transformer, exact_lm.module.lm_head.weight
    for row, tokens in enumerate(rows(exact_lm, TEXTS)):
        last = f"blocks.{exact_lm.n_layers - 1}.hook_resid_post"
        stream = exact_lm.run(tokens, last)[last][0, -1]
        divisor = (stream.var(unbiased=False) + transformer.ln_f.eps).sqrt()
        for j, (r, position, latent) in enumerate(entries(found)):
            if r == row:
                written = found.activation[j] * d.W_dec[latent].detach()
                normed = (written - written.mean()) / divisor * transformer.ln_f.weight
                wanted = normed @ (head[PAIR[0]] - head[PAIR[1]]) if position == len(tokens) - 1 else 0.0
                assert float(found.direct[j]) == pytest.approx(float(wanted), rel=1e-6, abs=1e-9)
    assert found.direct.abs().max() > 0.01


def test_there_is_no_direct_effect_off_the_stream(random_lm, transcoder):
    found = sl.attribute(transcoder, random_lm, TEXTS[0], PAIR, ablation=False)
    assert found.direct is None
    assert list(found.effects) == ["gradient"]
    assert found.agreement == {}


def linear(lm) -> sl.LanguageModel:
    """Return a model that adds nothing to its stream and divides by a constant in its final norm."""
    module = copy.deepcopy(lm.module)
    for name, parameter in module.named_parameters():
        if "c_proj" in name:
            parameter.data.zero_()
    module.transformer.ln_f.eps = 1e12
    module.transformer.ln_f.weight.data.mul_(1e6)
    return sl.LanguageModel(module, lm.tokenizer, name="linear")


def test_in_a_linear_model_all_ways_agree(random_lm, dictionary):
    lm = linear(random_lm)
    found = sl.attribute(dictionary, lm, TEXTS, PAIR)
    torch.testing.assert_close(found.gradient, found.ablation, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.gradient, found.direct, rtol=1e-4, atol=1e-5)
    assert found.ablation.abs().max() > 0.1
    assert set(found.agreement) == {("ablation", "gradient"), ("ablation", "direct"), ("gradient", "direct")}
    for both in found.agreement.values():
        assert both.pearson == pytest.approx(1, abs=1e-5)
        assert both.spearman == pytest.approx(1, abs=1e-3)


def test_latents_bias_and_error_make_up_the_linear_metric(random_lm, dictionary):
    """At the last position, Σ effects + error + bias is the difference of logits but for the final norm's bias."""
    lm = linear(random_lm)
    found = sl.attribute(dictionary, lm, TEXTS[0], PAIR, ablation=False)
    direction = lm.unembedding()[PAIR[0]] - lm.unembedding()[PAIR[1]]
    ln_f, head = lm.module.transformer.ln_f, lm.module.lm_head.weight
    constant = (ln_f.bias @ head.T)[PAIR[0]] - (ln_f.bias @ head.T)[PAIR[1]]
    total = found.gradient.sum() + found.error[0] + dictionary.b_dec.detach() @ direction / 1e6 + constant
    assert float(total) == pytest.approx(float(found.value[0]), abs=1e-4)


def test_nothing_is_left_on_the_parameters(random_lm, dictionary):
    sl.attribute(dictionary, random_lm, TEXTS[0], ablation=False)
    for module in (random_lm.module, dictionary):
        assert all(p.grad is None for p in module.parameters())
    assert not any(p.requires_grad for p in random_lm.module.parameters())
    assert all(p.requires_grad for p in dictionary.parameters())
    assert not random_lm.logits(TEXTS[0]).requires_grad


def test_texts_together_are_texts_alone(random_lm, dictionary):
    """Padding changes nothing, nor do rows of token ids in place of text."""
    together = sl.attribute(dictionary, random_lm, TEXTS)
    for row, tokens in enumerate(rows(random_lm, TEXTS)):
        alone = sl.attribute(dictionary, random_lm, tokens)
        here = together.row == row
        assert alone.tokens[0] == together.tokens[row]
        for name in ("position", "latent", "activation", "gradient", "direct", "ablation"):
            torch.testing.assert_close(getattr(together, name)[here], getattr(alone, name), msg=name)
    as_rows = sl.attribute(dictionary, random_lm, random_lm.to_tokens(TEXTS), ablation=False)
    assert torch.equal(as_rows.gradient, together.gradient)


def test_the_metric_at_a_position(random_lm, dictionary):
    tokens = rows(random_lm, TEXTS)[0]
    loss = sl.attribute(dictionary, random_lm, tokens, position=3, ablation=False)
    logits = random_lm.logits(tokens)[0]
    assert float(loss.value) == pytest.approx(float(-logits[3].log_softmax(-1)[tokens[4]]), abs=1e-5)
    assert not loss.gradient[loss.position > 3].any()
    assert loss.gradient[loss.position == 3].any()
    own = sl.attribute(dictionary, random_lm, tokens, lambda x: -x[:, 3].log_softmax(-1)[:, int(tokens[4])], ablation=False)
    torch.testing.assert_close(own.gradient, loss.gradient)
    same = sl.attribute(dictionary, random_lm, tokens, position=3 - len(tokens), ablation=False)
    assert torch.equal(same.gradient, loss.gradient)


def test_tokens_are_named_by_text(random_lm, dictionary):
    ids = tuple(random_lm.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in (" he", " she"))
    by_text = sl.attribute(dictionary, random_lm, TEXTS[0], (" he", " she"), ablation=False)
    by_id = sl.attribute(dictionary, random_lm, TEXTS[0], ids, ablation=False)
    assert torch.equal(by_text.gradient, by_id.gradient)
    assert by_text.metric == by_id.metric == "logit of ' he' − logit of ' she'"


def test_agreement_is_that_of_scipy(random_lm, dictionary):
    from scipy.stats import pearsonr, spearmanr

    found = sl.attribute(dictionary, random_lm, TEXTS, PAIR)
    assert (found.direct == 0).sum() > 10  # ties
    for (a, b), both in found.agreement.items():
        x, y = getattr(found, a).double(), getattr(found, b).double()
        assert both.spearman == pytest.approx(spearmanr(x, y).statistic, abs=1e-9)
        assert both.pearson == pytest.approx(pearsonr(x, y).statistic, abs=1e-9)


def test_what_an_attribution_says(random_lm, dictionary):
    found = sl.attribute(dictionary, random_lm, TEXTS)
    strongest = found.strongest(3)
    assert found.ablation[strongest].abs().tolist() == found.ablation.abs().topk(3).values.tolist()
    assert found.table(4).row_count == 4
    assert found.only(found.ablation > 0).latent.tolist() == found.latent[found.ablation > 0].tolist()
    assert "Spearman" in found.table().caption.plain
    bracketed = io.StringIO()
    Console(file=bracketed).print(replace(found, metric="logit of '[/b]'").table())  # a token that reads like markup
    assert "logit of '[/b]'" in bracketed.getvalue()
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["ablation"] == found.ablation.tolist()
    assert plain["agreement"]["ablation, gradient"]["pearson"] == found.agreement["ablation", "gradient"].pearson
    silent = autoencoder()
    silent.W_enc.data.zero_()
    nothing = sl.attribute(silent, random_lm, TEXTS)
    assert len(nothing.latent) == 0
    assert nothing.to_dict()["agreement"]["ablation, gradient"] == {"spearman": None, "pearson": None}
    assert nothing.table().row_count == 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"metric": "logit"}, ConfigError, r"metric = 'logit'; expected 'loss', a pair of tokens"),
        ({"metric": (" he", " she and")}, ConfigError, r"' she and' is not one token"),
        ({"metric": lambda logits: logits[:, -1].argmax(-1).float()}, ConfigError, r"has no gradient"),
        ({"metric": lambda logits: logits[:, -1, 0], "position": 1}, ConfigError, r"leave out position="),
        ({"position": -1}, ConfigError, r"position = -1; the row has \d+ tokens, .* positions 0 to"),
        ({"text": torch.tensor([1, 2]), "at": 2}, ConfigError, r"at = 2; expected positions of the row, which has 2 tokens"),
        ({"at": []}, ConfigError, r"at = \(\); expected positions"),
        ({"text": ""}, TextError, r"empty text"),
        ({"hook": "blocks.9.hook_resid_pre"}, HookError, r"no hook 'blocks\.9"),
    ],
)
def test_attributions_that_cannot_be(random_lm, dictionary, change, error, message):
    with pytest.raises(error, match=message):
        sl.attribute(dictionary, random_lm, **{"text": TEXTS[0], "ablation": False} | change)
