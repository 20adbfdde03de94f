"""Metrics against their formulas, computed here token by token on the plain transformers module."""

import json

import pytest
import torch

import saelens_lite as sl
from saelens_lite.errors import ConfigError, HookError, ShapeError, TextError
from saelens_lite.evaluate.metrics import PooledSums
from saelens_lite.tokens import token_rows

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
    return sl.Dictionary.create(name, d_in=lm.d_model, d_sae=96, options=options, origin=sl.Origin(hook=HOOK), seed=3)


def cross_entropy(lm, rows, new=None):
    """Mean nats per prediction between two kept positions, with `new(x)` in place of the stream."""
    handle = lm.module.transformer.h[1].register_forward_pre_hook(
        lambda _m, args: (args[0] if new is None else new(args[0]), *args[1:])
    )
    with torch.no_grad():
        log_p = lm.module(rows.tokens).logits.double().log_softmax(-1)
    handle.remove()
    losses = [
        -log_p[s, t, rows.tokens[s, t + 1]]
        for s in range(rows.tokens.shape[0])
        for t in range(rows.tokens.shape[1] - 1)
        if rows.keep[s, t] and rows.keep[s, t + 1]
    ]
    return float(torch.stack(losses).mean())


def test_every_metric_is_its_formula(lm, rows, stream):
    d = dictionary(lm)
    report = sl.evaluate(d, lm, rows, batch_tokens=200, n_bootstrap=20)
    x = stream[rows.keep]
    with torch.no_grad():
        f = d.encode(x.float()).to_dense().double()
        x_hat = f @ d.W_dec.double() + d.b_dec.double()
    error = (x - x_hat).square().sum(1)
    fvu = error.sum() / (x - x.mean(0)).square().sum()
    keep = rows.keep[..., None]
    clean, zero = cross_entropy(lm, rows), cross_entropy(lm, rows, torch.zeros_like)
    spliced = cross_entropy(lm, rows, lambda s: torch.where(keep, d(s).detach(), s))
    expected = {
        "l0": (f != 0).sum(1).double().mean(),
        "l1": f.abs().sum(1).mean(),
        "mse": error.mean(),
        "fvu": fvu,
        "explained_variance": 1 - fvu,
        "cossim": torch.cosine_similarity(x, x_hat).mean(),
        "l2_ratio": (x_hat.norm(dim=1) / x.norm(dim=1)).mean(),
        "relative_reconstruction_bias": x_hat.square().sum(1).mean() / (x * x_hat).sum(1).mean(),
        "ce_clean": clean,
        "ce_zero": zero,
        "ce_sae": spliced,
        "ce_loss_score": (zero - spliced) / (zero - clean),
    }
    assert set(report.metrics) == set(expected)
    for name, value in expected.items():
        assert report[name] == pytest.approx(float(value), rel=2e-5), name
    torch.testing.assert_close(report.density.double(), (f != 0).double().mean(0), atol=1e-7, rtol=0)
    assert report.frac_alive == pytest.approx(float((f != 0).any(0).double().mean()))
    assert report.n_tokens == len(x)


def test_mean_predictor_explains_nothing_and_identity_everything(lm, rows, stream):
    mean = dictionary(lm)
    torch.nn.init.zeros_(mean.W_dec)
    mean.b_dec.data.copy_(stream[rows.keep].mean(0))
    perfect = sl.Dictionary.create("l1", d_in=lm.d_model, d_sae=2 * lm.d_model, origin=sl.Origin(hook=HOOK))
    identity = torch.eye(lm.d_model)
    perfect.W_enc.data.copy_(torch.cat([identity, -identity], dim=1))
    perfect.W_dec.data.copy_(torch.cat([identity, -identity]))
    no, all_ = sl.evaluate([mean, perfect], lm, rows, n_bootstrap=20)
    assert no["explained_variance"] == pytest.approx(0, abs=1e-6)
    assert all_["explained_variance"] == pytest.approx(1, abs=1e-6)
    assert all_["ce_loss_score"] == pytest.approx(1, abs=1e-5)
    assert all_["l0"] == pytest.approx(lm.d_model, rel=0.01)


def test_batch_size_does_not_matter_and_several_equal_each_alone(lm, rows):
    pair = [dictionary(lm), dictionary(lm, "gated", coefficient=1.0)]
    together = sl.evaluate(pair, lm, rows, batch_tokens=64, n_bootstrap=20)
    for d, report in zip(pair, together, strict=True):
        alone = sl.evaluate(d, lm, rows, batch_tokens=10_000, n_bootstrap=20)
        for name in alone.metrics:
            assert report[name] == pytest.approx(alone[name], rel=1e-6), name


def test_tokens_with_zero_reconstruction_count_as_cosine_zero(lm, rows):
    d = dictionary(lm)
    torch.nn.init.zeros_(d.W_dec)
    report = sl.evaluate(d, lm, rows, n_bootstrap=5)
    assert report["cossim"] == 0
    assert report["l2_ratio"] == 0


def test_intervals_have_the_width_of_the_standard_error():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(400, generator=generator, dtype=torch.float64) * 3 + 1
    sums = PooledSums(4000, seed=1)
    for piece in values.split(37):
        sums.next_sequences(len(piece))
        sums.add("value", piece)
        sums.add("n", torch.ones(len(piece)))
    metric = sums.metric(sums["value"] / sums["n"])
    assert metric.value == pytest.approx(float(values.mean()), rel=1e-12)
    assert metric.high - metric.low == pytest.approx(2 * 1.96 * float(values.std()) / 400**0.5, rel=0.06)
    assert metric.low < metric.value < metric.high


def test_same_seed_same_report_and_json_round_trip(lm, rows, tmp_path):
    first, second = (sl.evaluate(dictionary(lm), lm, rows, n_bootstrap=30) for _ in range(2))
    assert first.to_json() == second.to_json(tmp_path / "eval.json")
    read = json.loads((tmp_path / "eval.json").read_text())
    assert read["metrics"]["fvu"]["value"] == first["fvu"]
    assert read["hook"] == HOOK


def test_bad_input(lm, rows):
    narrow = sl.Dictionary.create("l1", d_in=7, d_sae=16, origin=sl.Origin(hook=HOOK))
    with pytest.raises(ShapeError, match=rf"{lm.d_model}.*takes \[\.\.\., 7\]"):
        sl.evaluate(narrow, lm, rows)
    with pytest.raises(ConfigError, match="need one hook"):
        sl.evaluate(sl.Dictionary.create("l1", d_in=lm.d_model, d_sae=16), lm, rows)
    with pytest.raises(HookError, match="did you mean"):
        sl.evaluate(dictionary(lm), lm, rows, hook="blocks.1.hook_resid_prr")
    with pytest.raises(TextError, match="no text"):
        sl.evaluate(dictionary(lm), lm, [""])
