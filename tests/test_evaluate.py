"""Metrics against their formulas, computed here token by token on the plain transformers module."""

import copy
import io
import json
import math

import pytest
import torch
from rich.console import Console

import saelens_lite as sl
from saelens_lite.errors import ConfigError, CorruptFileError, HookError, NonFiniteError, ShapeError, TextError
from saelens_lite.evaluation import EvalReport, frequency_table, position_table, table
from saelens_lite.evaluation.metrics import Kept, Predictions, latent_metrics
from saelens_lite.evaluation.overlap import overlap
from saelens_lite.evaluation.sums import PooledSums
from saelens_lite.model.processing import shuffled_weights
from saelens_lite.tokens import PythonDocs, TokenRows, text_hash, token_rows

HOOK = "blocks.1.hook_resid_pre"


@pytest.fixture(scope="module")
def rows(lm):
    return token_rows(lm, [page.text for page in sl.python_docs()][100:110], n_ctx=48, n_tokens=900)


@pytest.fixture(scope="module")
def stream(lm, rows):
    """Activations [n pos d] in float64, read by a hook of our own."""
    found = []
    handle = lm.module.transformer.h[1].register_forward_pre_hook(lambda _m, args: found.append(args[0].double()))
    with torch.no_grad():
        lm.module(rows.tokens)
    handle.remove()
    return found[0]


def dictionary(lm, name="topk", **options):
    options = options or {"k": 8}
    return sl.Dictionary.create(name, reads=sl.Port(hook=HOOK, width=lm.d_model), d_sae=96, options=options, seed=3)


def log_p(lm, rows, new=None):
    """Log-probabilities [n pos d_vocab] in float64, with `new(x)` in place of the stream."""
    handle = lm.module.transformer.h[1].register_forward_pre_hook(
        lambda _m, args: (args[0] if new is None else new(args[0]), *args[1:])
    )
    with torch.no_grad():
        found = lm.module(rows.tokens).logits.double().log_softmax(-1)
    handle.remove()
    return found


def cross_entropy(rows, log_p):
    """Return the mean nats over the predictions made from kept positions; the last position of a row makes none."""
    places = [(s, t) for s, t in rows.keep.nonzero().tolist() if t < rows.tokens.shape[1] - 1]
    return float(torch.stack([-log_p[s, t, rows.tokens[s, t + 1]] for s, t in places]).mean())


def divergence(rows, log_p, log_q):
    """Return the mean KL(p ‖ q) over all kept positions."""
    return float((log_p.exp() * (log_p - log_q)).sum(-1)[rows.keep].mean())


def test_every_metric_is_its_formula(lm, rows, stream):
    d = dictionary(lm)
    report = sl.evaluate(d, lm, rows, batch_tokens=200, n_bootstrap=20)
    x = stream[rows.keep]
    with torch.no_grad():
        f = d.encode(x.float()).to_dense().double()
        x_hat = f @ d.W_dec.double() + d.b_dec.double()
    error = (x - x_hat).square().sum(1)
    spread = (x - x.mean(0)).square().sum(1)
    fvu = error.sum() / spread.sum()
    clean = log_p(lm, rows)
    new = {
        "sae": log_p(lm, rows, lambda s: torch.where(rows.keep[..., None], d(s).detach(), s)),
        "zero": log_p(lm, rows, torch.zeros_like),
        "mean": log_p(lm, rows, lambda s: x.mean(0).float().expand_as(s)),
    }
    ce = {name: cross_entropy(rows, found) for name, found in {"clean": clean, **new}.items()}
    kl = {name: divergence(rows, clean, found) for name, found in new.items()}
    fired = (f != 0).double().mean(0)
    expected = {
        "l0": (f != 0).sum(1).double().mean(),
        "l1": f.abs().sum(1).mean(),
        "mse": error.mean(),
        "fvu": fvu,
        "explained_variance": 1 - fvu,
        "explained_variance_legacy": (1 - error / spread).mean(),
        "cossim": torch.cosine_similarity(x, x_hat).mean(),
        "l2_ratio": (x_hat.norm(dim=1) / x.norm(dim=1)).mean(),
        "relative_reconstruction_bias": x_hat.square().sum(1).mean() / (x * x_hat).sum(1).mean(),
        "frac_alive": (fired > 0).double().mean(),
        "frac_dense": (fired > 0.1).double().mean(),
        **{f"ce_{name}": value for name, value in ce.items()},
        **{f"kl_{name}": value for name, value in kl.items()},
        "ce_loss_score": (ce["zero"] - ce["sae"]) / (ce["zero"] - ce["clean"]),
        "ce_loss_score_mean": (ce["mean"] - ce["sae"]) / (ce["mean"] - ce["clean"]),
        "kl_div_score": 1 - kl["sae"] / kl["zero"],
        "kl_div_score_mean": 1 - kl["sae"] / kl["mean"],
    }
    assert set(report.metrics) == set(expected)
    for name, value in expected.items():
        assert report[name] == pytest.approx(float(value), rel=2e-5), name
        assert report.metrics[name].low <= report[name] <= report.metrics[name].high or name == "frac_dense", name
    torch.testing.assert_close(report.density.double(), fired, atol=1e-7, rtol=0)
    assert report.n_tokens == len(x)


@pytest.mark.parametrize("hook", ["blocks.1.hook_mlp_out", "blocks.2.attn.hook_z", "blocks.3.hook_resid_post", "hook_embed"])
def test_any_hook(lm, rows, hook):
    """Against whole passes, in which the value at the hook is replaced by hand."""
    d = dictionary(lm)
    report = sl.evaluate(d, lm, rows, hook=hook, n_bootstrap=5, batch_tokens=300)
    x = lm.run(rows, hook)[hook]
    mean = x[rows.keep].double().mean(0).float()
    clean = lm.logits(rows).double().log_softmax(-1)
    with torch.no_grad():
        spliced = torch.where(rows.keep[..., None], d(x), x)
    for name, value in {"sae": spliced, "zero": torch.zeros_like(x), "mean": mean.expand_as(x)}.items():
        with lm.replace(hook, lambda _, value=value: value.clone()):
            found = lm.logits(rows).double().log_softmax(-1)
        assert report[f"ce_{name}"] == pytest.approx(cross_entropy(rows, found), rel=1e-5)
        assert report[f"kl_{name}"] == pytest.approx(divergence(rows, clean, found), rel=1e-4)


def test_mean_predictor_explains_nothing_and_identity_everything(lm, rows, stream):
    mean = dictionary(lm)
    torch.nn.init.zeros_(mean.W_dec)
    mean.b_dec.data.copy_(stream[rows.keep].mean(0))
    perfect = sl.Dictionary.create("l1", reads=sl.Port(hook=HOOK, width=lm.d_model), d_sae=2 * lm.d_model)
    identity = torch.eye(lm.d_model)
    perfect.W_enc.data.copy_(torch.cat([identity, -identity], dim=1))
    perfect.W_dec.data.copy_(torch.cat([identity, -identity]))
    no, all_ = sl.evaluate([mean, perfect], lm, rows, n_bootstrap=20)
    assert no["explained_variance"] == pytest.approx(0, abs=1e-6)
    assert all_["explained_variance"] == pytest.approx(1, abs=1e-6)
    assert all_["ce_loss_score"] == pytest.approx(1, abs=1e-5)
    assert all_["kl_div_score"] == pytest.approx(1, abs=1e-5)
    assert all_["l0"] == pytest.approx(lm.d_model, rel=0.01)


def test_batch_size_does_not_matter_and_several_equal_each_alone(lm, rows):
    pair = [dictionary(lm), dictionary(lm, "gated", coefficient=1.0)]
    settings = {"n_bootstrap": 20, "by_position": True, "by_frequency": True}
    together = sl.evaluate(pair, lm, rows, batch_tokens=64, **settings)
    for d, report in zip(pair, together, strict=True):
        alone = sl.evaluate(d, lm, rows, batch_tokens=10_000, **settings)
        for (name, metric), (_, other) in zip(alone.lines(), report.lines(), strict=True):
            assert tuple(metric) == pytest.approx(tuple(other), rel=1e-6, abs=1e-9), name


def test_tokens_with_zero_reconstruction_count_as_cosine_zero(lm, rows):
    d = dictionary(lm)
    torch.nn.init.zeros_(d.W_dec)
    report = sl.evaluate(d, lm, rows, n_bootstrap=5)
    assert report["cossim"] == 0
    assert report["l2_ratio"] == 0


def test_intervals_have_the_width_of_the_standard_error():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(400, generator=generator, dtype=torch.float64) * 3 + 1
    sums = PooledSums(4000, seed=1, n_units=400)
    for number, piece in zip(torch.arange(400).split(37), values.split(37), strict=True):
        sums.weigh(number)
        sums.add("value", piece)
        sums.add("n", torch.ones(len(piece)))
    metric = sums.metric(sums["value"] / sums["n"])
    assert metric.value == pytest.approx(float(values.mean()), rel=1e-12)
    assert metric.high - metric.low == pytest.approx(2 * 1.96 * float(values.std()) / 400**0.5, rel=0.06)
    assert metric.low < metric.value < metric.high


def test_same_seed_same_report_and_json_round_trip(lm, rows, tmp_path):
    first, second = (sl.evaluate(dictionary(lm), lm, rows, n_bootstrap=30) for _ in range(2))
    assert first.to_json() == second.to_json(tmp_path / "eval.json")
    again = EvalReport.from_json(tmp_path / "eval.json")
    assert again == first
    assert again.density is None
    read = json.loads((tmp_path / "eval.json").read_text())
    assert read["metrics"]["fvu"]["value"] == first["fvu"]
    assert read["hook"] == HOOK


def test_positions_are_bands_of_their_own_formula(lm, rows, stream):
    d = dictionary(lm)
    report = sl.evaluate(d, lm, rows, by_position=True, n_bootstrap=30)
    assert [(band.low, band.high) for band in report.by_position] == [(1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, 47)]
    mean = stream[rows.keep].mean(0)
    clean = log_p(lm, rows)
    spliced = log_p(lm, rows, lambda s: torch.where(rows.keep[..., None], d(s).detach(), s))
    with torch.no_grad():
        error = (stream - d(stream.float()).double()).square().sum(-1)
    for band in report.by_position:
        inside = rows.keep.clone()
        inside[:, : band.low] = False
        inside[:, band.high + 1 :] = False
        here = rows._replace(keep=inside)
        assert band.n_tokens == here.n_kept
        assert band.fvu.value == pytest.approx(float(error[inside].sum() / (stream - mean)[inside].square().sum()), rel=1e-4)
        assert band.ce_increase.value == pytest.approx(cross_entropy(here, spliced) - cross_entropy(here, clean), rel=1e-4)
    assert "fvu at position 2 – 3" in str(report)
    with pytest.raises(ConfigError, match="by_position=True"):
        position_table({"a": sl.evaluate(d, lm, rows, n_bootstrap=5)})


def test_alive_and_dense_have_intervals():
    """Of 40 latents, each fires in one sequence of 400, half of them also everywhere; so 20 fire in one sequence alone."""
    sums = PooledSums(300, seed=0, n_units=400)
    sums.weigh(torch.arange(400))
    fired = torch.zeros(400, 40, dtype=torch.long)
    fired[torch.arange(40), torch.arange(40)] = 1
    fired[:, :20] = 5
    sums.add("n", torch.full((400,), 10))
    sequence, latent = fired.nonzero(as_tuple=True)
    n_times = fired[sequence, latent]
    sums.add_fired("0", sequence.repeat_interleave(n_times), latent.repeat_interleave(n_times), 40)
    found = latent_metrics(sums, "0")
    assert found["frac_alive"].value == 1
    assert found["frac_alive"].low == pytest.approx(1 - 1.96 * (20 + 2) ** 0.5 / 40, abs=0.04)
    assert found["frac_alive"].high == 1
    assert tuple(found["frac_dense"]) == (0.5, 0.5, 0.5)


def test_without_replicates_or_with_one_sequence_there_is_no_interval(lm, rows):
    for given, n_bootstrap in ((rows, 0), (rows[:1], 20)):
        report = sl.evaluate(dictionary(lm), lm, given, n_bootstrap=n_bootstrap)
        assert all(math.isnan(m.low) and math.isnan(m.high) for m in report.metrics.values())
        assert math.isfinite(report["fvu"])


def test_one_token_has_no_variance_to_explain(lm, rows):
    keep = torch.zeros_like(rows.keep)
    keep[0, 3] = True
    assert math.isnan(sl.evaluate(dictionary(lm), lm, TokenRows(rows.tokens, keep), n_bootstrap=5)["explained_variance_legacy"])


def test_logits_in_any_layout():
    logits = torch.randn(3, 5, 11, generator=torch.Generator().manual_seed(0))
    other = logits.transpose(0, 1).contiguous().transpose(0, 1)
    tokens, kept = torch.zeros(3, 5, dtype=torch.long), Kept.of(torch.ones(3, 5, dtype=torch.bool))
    expected = -logits.log_softmax(-1)[:, :4, 0].double()
    found = Predictions.of(other, tokens, torch.full((3,), 5), kept).clean_losses().reshape(3, 5)
    torch.testing.assert_close(found[:, :4], expected)


def test_sums_of_each_sequence():
    keep = torch.rand(6, 9, generator=torch.Generator().manual_seed(0)) > 0.5
    keep[2] = False
    values = torch.randn(6, 9, 4, generator=torch.Generator().manual_seed(1)).double()
    kept = Kept.of(keep)
    torch.testing.assert_close(kept.per_sequence(kept.of_each(values)), (values * keep[..., None]).sum(1))


def test_what_a_mask_leaves_out(lm, rows):
    everything = TokenRows(rows.tokens, torch.ones_like(rows.keep))
    assert "not always position 0" in sl.evaluate(dictionary(lm), lm, everything, n_bootstrap=0).excluded
    assert "position 0 always" in sl.evaluate(dictionary(lm), lm, rows, n_bootstrap=0).excluded


def test_rows_are_those_of_the_training_text(lm, documents):
    ours, other = dictionary(lm), dictionary(lm)
    ours.origin = ours.origin.replace(n_ctx=16, excluded_positions=(0, 1, 2))
    report = sl.evaluate(ours, lm, documents, n_bootstrap=0)
    wanted = token_rows(lm, documents, text_config=sl.TextConfig(n_ctx=16, exclude_positions=(0, 1, 2)))
    assert (report.n_tokens, report.text_sha256) == (wanted.n_kept, text_hash(wanted))
    assert report.excluded == "BOS, padding and positions 0, 1, 2"
    with pytest.raises(ConfigError, match=rf"n_ctx = 16, {lm.n_ctx}; exclude_positions = \(0, 1, 2\), \(0,\); evaluate them"):
        sl.evaluate([ours, other], lm, documents)
    config = sl.TextConfig(n_ctx=16, exclude_positions=(0,))
    reports = sl.evaluate([ours, other], lm, documents, text_config=config, n_bootstrap=0)
    assert [r.excluded for r in reports] == ["BOS, padding and position 0"] * 2


def test_controls(lm, rows, stream):
    """A random dictionary of the same size and L0; PCA by singular values; weights in another order."""
    d = dictionary(lm)
    report = sl.evaluate(d, lm, rows, controls=True, n_bootstrap=20)
    random, pca, redrawn = (report.controls[name] for name in ("random", "PCA", "shuffled weights"))
    assert random["l0"] == pytest.approx(report["l0"], abs=0.5)
    assert len(random.density) == d.d_sae
    assert 0 < random["explained_variance"] < pca["explained_variance"]
    x = stream[rows.keep]
    values = torch.linalg.svdvals(x - x.mean(0)).square()
    assert pca["l0"] == pytest.approx(8, abs=1e-9)
    assert pca["fvu"] == pytest.approx(float(values[8:].sum() / values.sum()), rel=1e-4)
    assert redrawn["ce_clean"] > report["ce_clean"] + 1
    assert "shuffled" in redrawn.model
    assert report.metrics == sl.evaluate(d, lm, rows, n_bootstrap=20).metrics
    shown = io.StringIO()
    Console(width=200, file=shown).print(table({"mine": report}))
    assert all(name in shown.getvalue() for name in ("mine", "random", "PCA", "shuffled weights"))
    assert "| – PCA |" in report.to_markdown()
    assert "– PCA" in str(report)
    assert "<td>– PCA</td>" in report._repr_html_()
    Console(width=200, file=shown).print(report)
    assert shown.getvalue().count("– PCA") == 2
    assert EvalReport.from_dict(json.loads(report.to_json())) == report


def test_redrawn_weights_have_the_same_entries(lm):
    before = {name: weight.clone() for name, weight in lm.module.named_parameters()}
    name = "transformer.wte.weight"
    order = torch.randperm(before[name].numel(), generator=torch.Generator().manual_seed(1))  # it is the first weight
    with lm.redrawn(seed=1) as redrawn:
        after = dict(redrawn.module.named_parameters())
        assert before.keys() == after.keys()
        for other, weight in before.items():
            assert torch.equal(weight.flatten().sort().values, after[other].flatten().sort().values)
        assert torch.equal(after[name].flatten(), before[name].flatten()[order])
        assert redrawn.module.lm_head.weight is after[name]
        with pytest.raises(ConfigError, match="in random order: use the model that `redrawn` gives"):
            lm.logits([[1, 2]])
    assert all(torch.equal(weight, before[name]) for name, weight in lm.module.named_parameters())


def test_redrawing_in_pieces_mixes_all_of_a_weight_and_can_be_undone(monkeypatch):
    monkeypatch.setattr("saelens_lite.model.processing.MOST_ENTRIES", 100)
    weight = torch.nn.Parameter(torch.arange(2500.0).reshape(50, 50), requires_grad=False)
    module, undo = torch.nn.ParameterDict({"a": weight}), []
    with shuffled_weights(module, 0, undo):
        assert undo
        x = weight.flatten()
        assert torch.equal(x.sort().values, torch.arange(2500.0))
        moved = (x - torch.arange(2500.0)).abs().mean()
        assert 2500 / 3 * 0.9 < moved < 2500 / 3 * 1.1  # the mean distance of two random places is a third
        assert torch.corrcoef(torch.stack([x % 25, torch.arange(2500.0) % 25]))[0, 1].abs() < 0.06
        assert torch.corrcoef(torch.stack([x, torch.arange(2500.0)]))[0, 1].abs() < 0.06
    assert not undo
    assert torch.equal(weight, torch.arange(2500.0).reshape(50, 50))


def test_redrawing_a_centred_model_is_undone_to_the_byte(random_lm):
    lm = copy.copy(random_lm)
    lm.module = copy.deepcopy(random_lm.module)
    lm.center_writing_weights_()
    before = lm.fingerprint()
    with lm.redrawn() as redrawn:
        assert redrawn.processing == lm.processing
        assert redrawn.module.transformer.wte.weight.mean(1).abs().max() < 1e-7
    assert lm.fingerprint() == before


@pytest.mark.parametrize(
    ("trained", "text", "disjoint", "why"),
    [
        ("python-docs:train", PythonDocs("python-docs:held-out"), True, "without a document in common"),
        ("python-docs", PythonDocs("python-docs:held-out"), False, "holds documents of the other"),
        ("python-docs:train", "python-docs:train", False, "holds documents"),
        ("book.txt", PythonDocs("python-docs"), None, "only these names could be compared"),
        ("book.txt", ["no name"], None, "has no name to compare with that of the training text, book.txt"),
        (None, PythonDocs("python-docs"), None, "does not say what it was trained on"),
    ],
)
def test_whether_the_text_was_trained_on(lm, trained, text, disjoint, why, caplog):
    d = dictionary(lm)
    d.origin = d.origin.replace(text=trained)
    report = sl.evaluate(d, lm, text, n_tokens=300, n_bootstrap=5)
    assert report.disjoint is disjoint
    assert why in report.disjoint_why
    assert (why in caplog.text) == (disjoint is not True)
    assert (report.caution in str(report)) == bool(report.caution or disjoint)


@pytest.mark.parametrize(
    ("trained", "evaluated", "disjoint"),
    [
        ("hf:a/b", "hf:a/b::train", None),
        ("hf:a/b", "hf:a/b::test", True),
        ("hf:a/b:x:train", "hf:a/b:y:test", None),
        ("hf:a/b:x:train", "hf:a/b:x:test", True),
        ("book.txt", "copy.txt", None),
        ("same.txt", "same.txt", None),
    ],
)
def test_names_of_sources(trained, evaluated, disjoint):
    assert overlap(sl.Origin(text=trained), evaluated, "1").disjoint is disjoint
    assert overlap(sl.Origin(text=trained, text_sha256="1"), evaluated, "1").disjoint is False


def test_a_file_that_was_captured_is_known_again(lm, tmp_path, documents):
    (tmp_path / "book.txt").write_text(documents[-1])
    cache = sl.capture(lm, tmp_path / "book.txt", HOOK, tmp_path / "cache", n_ctx=32)
    (run,) = sl.train(cache, sl.TrainConfig(d_sae=32, n_tokens=200, batch_size=100, options={"k": 4}))
    (tmp_path / "copy.txt").write_text(documents[-1])
    report = sl.evaluate(run.dictionary, lm, tmp_path / "copy.txt", n_tokens=None, n_bootstrap=5)
    assert report.disjoint is False
    assert "token for token" in report.caution
    assert sl.evaluate(run.dictionary, lm, tmp_path / "book.txt", n_tokens=50, n_bootstrap=5).disjoint is None


def test_report_as_text_html_and_markdown(lm, rows):
    report = sl.evaluate(dictionary(lm), lm, rows, n_bootstrap=20, text_name="a <b> text")
    assert "a &lt;b> text" in report.to_markdown()
    assert f"| fvu | {report['fvu']:.4g} | " in report.to_markdown()
    assert "<td>fvu</td>" in report._repr_html_()
    assert "a &lt;b&gt; text" in report._repr_html_()
    shown = io.StringIO()
    Console(width=200, file=shown).print(report)
    assert "kl_div_score_mean" in shown.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "evaluation of format None; this version reads 2"),
        ('{"format": 2}', "is not an evaluation: KeyError"),
        ('{"format": 2, "metrics": {"l0": 3}}', "is not an evaluation"),
        ('{"format": 2, "metrics": {"l0": {"value": "oops", "low": 1, "high": 2}}}', "value is 'oops'"),
        ("[1]", "holds a list"),
        ("{", "not valid JSON"),
    ],
)
def test_files_that_are_no_report(tmp_path, content, message):
    (tmp_path / "eval.json").write_text(content)
    with pytest.raises(CorruptFileError, match=message):
        EvalReport.from_json(tmp_path / "eval.json")


def test_content_that_is_no_report(lm, rows):
    good = sl.evaluate(dictionary(lm), lm, rows, n_bootstrap=0, by_position=True).to_dict()
    deep = good
    for _ in range(5000):
        deep = good | {"controls": {"a": deep}}
    band = good | {"by_position": [good["by_position"][0] | {"low": "x"}]}
    for content in ([], good | {"n_tokens": "many"}, good | {"disjoint": "no"}, band, deep):
        with pytest.raises(CorruptFileError, match="the report is not an evaluation"):
            EvalReport.from_dict(content)
    earlier = {key: value for key, value in good.items() if key != "read_hook"}
    assert EvalReport.from_dict(earlier).read_hook is None


def test_names_are_not_taken_for_markup(lm, rows):
    report = sl.evaluate(dictionary(lm), lm, rows, n_bootstrap=0, text_name="[/b].txt", by_frequency=True, by_position=True)
    named = {"x[red]": report}
    shown = io.StringIO()
    for grid in (table(named), frequency_table(named), position_table(named), report):
        Console(width=200, file=shown).print(grid)
    assert shown.getvalue().count("x[red]") == 4
    assert "[/b].txt" in shown.getvalue()


def test_bad_input(lm, rows, random_lm):
    narrow = sl.Dictionary.create("l1", reads=sl.Port(hook=HOOK, width=7), d_sae=16)
    with pytest.raises(ShapeError, match=rf"{lm.d_model}.*takes \[\.\.\., 7\]"):
        sl.evaluate(narrow, lm, rows)
    with pytest.raises(ConfigError, match=r"does not say which hook.*give hook="):
        sl.evaluate(sl.Dictionary.create("l1", reads=lm.d_model, d_sae=16), lm, rows)
    with pytest.raises(HookError, match="did you mean"):
        sl.evaluate(dictionary(lm), lm, rows, hook="blocks.1.hook_resid_prr")
    with pytest.raises(TextError, match="no text"):
        sl.evaluate(dictionary(lm), lm, [""])
    with pytest.raises(TextError, match="none of the positions"):
        sl.evaluate(dictionary(lm), lm, TokenRows(rows.tokens, torch.zeros_like(rows.keep)))
    with pytest.raises(ConfigError, match="batch_tokens = 0"):
        sl.evaluate(dictionary(lm), lm, rows, batch_tokens=0)
    with pytest.raises(ConfigError, match="n_bootstrap = -1"):
        sl.evaluate(dictionary(lm), lm, rows, n_bootstrap=-1)
    spoilt = dictionary(lm)
    spoilt.W_dec.data[3] = torch.nan
    with pytest.raises(NonFiniteError, match="W_dec of the dictionary holds NaN"):
        sl.evaluate(spoilt, lm, rows)
    broken = sl.LanguageModel(copy.deepcopy(random_lm.module), random_lm.tokenizer, name="broken")
    broken.module.transformer.wte.weight[5] = torch.nan
    with pytest.raises(NonFiniteError, match="hold NaN"):
        sl.evaluate(dictionary(broken), broken, torch.randint(1, 9, (3, 20)))


@pytest.mark.parametrize("hook", ["blocks.1.hook_mlp_out", "blocks.2.hook_resid_pre"])
def test_a_transcoder_is_measured_at_its_target(lm, rows, hook):
    read = "blocks.1.mlp.hook_in"
    ports = {"reads": sl.Port(hook=read, width=lm.d_model), "writes": sl.Port(hook=hook, width=lm.d_model)}
    d = sl.Dictionary.create("topk", **ports, d_sae=64, skip=True, options={"k": 4}, seed=1)
    torch.nn.init.normal_(d.W_skip, std=0.05, generator=torch.Generator().manual_seed(0))
    report = sl.evaluate(d, lm, rows, n_bootstrap=5, controls=True)
    acts = lm.run(rows, [read, hook])
    x, y = acts[read], acts[hook]
    with torch.no_grad():
        y_hat = d(x)
    kept = rows.keep
    fvu = (y - y_hat)[kept].double().square().sum() / (y[kept].double() - y[kept].double().mean(0)).square().sum()
    assert report["fvu"] == pytest.approx(float(fvu), rel=1e-5)
    assert (report.read_hook, report.hook) == (read, hook)
    assert EvalReport.from_dict(report.to_dict()).read_hook == read
    assert f"{read} → {hook}" in str(report)
    with lm.replace(hook, lambda y: torch.where(kept[..., None], y_hat, y)):
        assert report["ce_sae"] == pytest.approx(cross_entropy(rows, lm.logits(rows).double().log_softmax(-1)), rel=1e-5)
    assert report.controls["PCA"]["explained_variance"] > 0
    with pytest.raises(ConfigError, match=f"found blocks.1.hook_resid_pre, blocks.1.mlp.hook_in → {hook}"):
        sl.evaluate([d, dictionary(lm)], lm, rows)


def test_transcoders_that_cannot_be_measured(lm, rows):
    def made(read, written=None):
        reads, writes = (sl.Port(hook=hook, width=lm.d_model) for hook in (read, written))
        return sl.Dictionary.create("topk", reads=reads, writes=writes, d_sae=16, options={"k": 4})

    backwards = made("blocks.2.hook_mlp_out", "blocks.1.hook_mlp_out")
    with pytest.raises(HookError, match=r"blocks\.1\.hook_mlp_out before blocks\.2\.hook_mlp_out"):
        sl.evaluate(backwards, lm, rows)
    aimless = made("blocks.1.mlp.hook_in")
    with pytest.raises(ConfigError, match="does not say which hook it writes"):
        sl.evaluate(aimless, lm, rows)
    with pytest.raises(ConfigError, match="does not say which hook it writes"), lm.splice(aimless):
        pass
