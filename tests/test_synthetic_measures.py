"""Measures against planted features agree with dense sums in float64, and with dictionaries whose quality is known."""

import inspect
import json
import math
from itertools import permutations

import numpy as np
import pytest
import torch
from rich.console import Group
from scipy.optimize import linear_sum_assignment

import saelens_lite as sl
from saelens_lite.codes import SparseCodes
from saelens_lite.errors import ConfigError, NonFiniteError, ShapeError
from saelens_lite.synthesis.controls import best_thresholds, chosen, most_frequent
from saelens_lite.synthesis.measure import Decoded, matched_cosines, score

N = 4096


@pytest.fixture(scope="module")
def source():
    return sl.synthetic(48, 16, roots=4, p_max=0.4, p_min=0.02, noise=0.1)


@pytest.fixture(scope="module")
def orthogonal():
    """Features without overlap or noise, which a linear encoder reads off exactly."""
    return sl.synthetic(16, 16, roots=0, p_max=0.4, p_min=0.1)


def exact(source, W_dec):
    """Return a dictionary that encodes with its decoder, and fires where a code is well above 0."""
    threshold = {"rule": "jumprelu", "threshold": 1e-2}
    return sl.Dictionary.from_tensors(W_enc=W_dec.T, W_dec=W_dec, b_dec=source.features.bias, axes=AXES, **threshold)


AXES = {"W_enc": "d_in d_sae", "W_dec": "d_sae d_out"}


def reference(source, dictionary, truth):
    """Return all measures from dense float64 arrays."""
    x, c = truth.x.double().numpy(), truth.codes.to_dense().double().numpy()
    with torch.no_grad():
        a = dictionary.encode(truth.x).to_dense().double().numpy()
        x_hat = dictionary(truth.x).double().numpy()
    W, D = dictionary.W_dec.detach().double().numpy(), source.directions.double().numpy()
    cosine = np.abs(W @ D.T) / np.linalg.norm(W, axis=1)[:, None] / np.linalg.norm(D, axis=1)[None]
    rows, columns = linear_sum_assignment(-cosine)
    nearest = cosine.argmax(1)
    precision, recall, f1 = [], [], []
    for i, j in enumerate(nearest):
        both, fires, active = ((a[:, i] != 0) & (c[:, j] > 0)).sum(), (a[:, i] != 0).sum(), (c[:, j] > 0).sum()
        precision.append(both / fires if fires else 0.0)
        recall.append(both / active if active else 0.0)
        f1.append(2 * precision[-1] * recall[-1] / (precision[-1] + recall[-1]) if both else 0.0)
    return {
        "mcc": cosine[rows, columns].mean(),
        "uniqueness": len(set(nearest.tolist())) / len(W),
        "precision": np.mean(precision),
        "recall": np.mean(recall),
        "f1": np.mean(f1),
        "explained_variance": 1 - ((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum(),
        "l0": (a != 0).sum(1).mean(),
        "true_l0": (c > 0).sum(1).mean(),
        "dead": (~(a != 0).any(0)).mean(),
        "shrinkage": (np.linalg.norm(x_hat, axis=1) / np.linalg.norm(x, axis=1)).mean(),
    }


@pytest.mark.parametrize("d_sae", [20, 64])
def test_measures_agree_with_dense_sums_in_float64(source, d_sae):
    generator = torch.Generator().manual_seed(d_sae)
    dictionary = sl.Dictionary.create("topk", reads=16, d_sae=d_sae, options={"k": 4}, seed=1)
    dictionary.W_dec.data += 0.3 * torch.randn(d_sae, 16, generator=generator)
    dictionary.b_enc.data[:2] = -1e3
    report = source.measure(dictionary, N, seed=3)
    expected = reference(source, dictionary, source.sample(N, seed=3))
    assert list(report.metrics) == list(expected)
    for name, value in expected.items():
        assert report[name] == pytest.approx(value, rel=1e-6), name
    assert report["dead"] == 2 / d_sae
    assert report.n == N


def test_the_true_dictionary_is_perfect_in_any_order(orthogonal):
    for order in (torch.arange(16), torch.randperm(16, generator=torch.Generator().manual_seed(0))):
        report = orthogonal.measure(exact(orthogonal, orthogonal.directions[order]), N)
        for name in ("mcc", "uniqueness", "precision", "recall", "f1", "explained_variance", "shrinkage"):
            assert report[name] == pytest.approx(1, abs=1e-5), name
        assert report["l0"] == report["true_l0"]
        assert report["dead"] == 0
        assert report.feature.tolist() == order.tolist()


def test_the_sign_of_a_direction_does_not_count(orthogonal):
    dictionary = exact(orthogonal, orthogonal.directions)
    dictionary.W_dec.data.neg_()
    report = orthogonal.measure(dictionary, N)
    assert (report["mcc"], report["f1"]) == pytest.approx((1, 1))
    assert report["explained_variance"] < 0


def test_a_latent_that_merges_two_features_lowers_precision_and_mcc(orthogonal):
    D = orthogonal.directions.clone()
    D[0] = 0.8 * orthogonal.directions[0] + 0.6 * orthogonal.directions[1]
    D = torch.cat([D[:1], D[2:]])  # 15 latents: one for features 0 and 1, and one for each other
    report = orthogonal.measure(exact(orthogonal, D), N)
    active = orthogonal.sample(N).active
    either, first = float((active[:, 0] | active[:, 1]).sum()), float(active[:, 0].sum())
    assert report["mcc"] == pytest.approx((14 + 0.8) / 15)
    assert report["uniqueness"] == 1
    assert report["precision"] == pytest.approx((14 + first / either) / 15)
    assert report["recall"] == pytest.approx(1)


def test_latents_that_split_a_feature_lower_recall_and_uniqueness(orthogonal):
    n_half, D = N // 2, orthogonal.directions
    pieces = []
    for truth in orthogonal.pieces(N):
        acts = truth.codes.to_dense()
        half = acts[:, :1].clone()
        acts = torch.cat([acts, half], dim=1)
        acts[::2, 0], acts[1::2, 16] = 0, 0  # latent 0 fires in odd rows only, its copy in even rows
        pieces.append(Decoded(truth, SparseCodes.from_dense(acts), truth.x))
    report = score(orthogonal, torch.cat([D, D[:1]]), pieces)
    active = orthogonal.sample(N).active[:, 0].double()
    shares = float(active[1::2].sum() / active.sum()), float(active[::2].sum() / active.sum())
    assert n_half == len(active[::2])
    assert report["uniqueness"] == 16 / 17
    assert report["mcc"] == pytest.approx(1)
    assert report["precision"] == 1
    assert report["recall"] == pytest.approx((15 + sum(shares)) / 17)
    assert report["f1"] == pytest.approx((15 + sum(2 * s / (1 + s) for s in shares)) / 17)


def test_the_matching_is_the_best_of_all():
    cosine = torch.rand(4, 6, generator=torch.Generator().manual_seed(0))
    best = max(sum(float(cosine[i, j]) for i, j in enumerate(chosen)) for chosen in permutations(range(6), 4))
    assert float(matched_cosines(cosine).sum()) == pytest.approx(best)


def test_intervals_are_as_wide_as_theory_says(source):
    report = source.measure(sl.Dictionary.create("topk", reads=16, d_sae=24, options={"k": 4}), 16_384)
    l0 = source.sample(16_384).codes.l0.double()
    metric = report.metrics["true_l0"]
    assert (metric.high - metric.low) / 2 == pytest.approx(1.96 * float(l0.std()) / 128, rel=0.3)
    assert metric.low < metric.value < metric.high
    assert math.isnan(report.metrics["mcc"].low)


def test_controls_are_ordered_as_their_quality_is(source):
    dictionary = sl.Dictionary.create("topk", reads=16, d_sae=24, options={"k": 4})
    report = source.measure(dictionary, N, controls=True)
    oracle, linear, random = (report.controls[name] for name in ("oracle", "linear", "random"))
    assert [oracle[name] for name in ("mcc", "uniqueness", "precision", "recall", "f1", "dead")] == pytest.approx([1] * 5 + [0])
    assert (linear["mcc"], linear["uniqueness"]) == pytest.approx((1, 1))
    assert oracle["f1"] > linear["f1"] > random["f1"] + 0.1
    assert random["l0"] == pytest.approx(report["l0"], abs=0.5)
    truth = source.sample(N)
    top = most_frequent(source.sample(1 << 14, seed=1), 24)
    assert oracle["l0"] == pytest.approx(float(truth.active[:, top].double().sum(1).mean()))


def test_the_linear_control_reads_off_features_without_overlap(orthogonal):
    dictionary = sl.Dictionary.create("topk", reads=16, d_sae=16, options={"k": 4})
    linear = orthogonal.measure(dictionary, N, controls=True).controls["linear"]
    assert [linear[name] for name in ("f1", "explained_variance")] == pytest.approx([1, 1], abs=2e-3)


def test_thresholds_have_the_largest_f1():
    generator = torch.Generator().manual_seed(0)
    active = torch.rand(300, 5, generator=generator) < 0.2
    h = torch.randn(300, 5, generator=generator) + 1.5 * active
    thresholds = best_thresholds(h, SparseCodes.from_dense(active.float()))

    def f1(i, threshold):
        fires = h[:, i] > threshold
        return float(2 * (fires & active[:, i]).sum() / (fires.sum() + active[:, i].sum()))

    for i in range(5):
        assert f1(i, thresholds[i]) == pytest.approx(max(f1(i, t) for t in [1e-3, *h[:, i][h[:, i] > 1e-3].tolist()]))


def test_chosen_codes_are_columns_of_the_dense_ones(source):
    codes, features = source.sample(500).codes, torch.tensor([3, 7, 40])
    assert torch.equal(chosen(codes, features).to_dense(), codes.to_dense()[:, features])


def test_a_report_is_a_table_a_frame_and_a_file(source, tmp_path):
    report = source.measure(sl.Dictionary.create("topk", reads=16, d_sae=24, options={"k": 4}), 2048, controls=True)
    text = str(report)
    assert "2,048 synthetic activations of 48 features" in text
    assert all(name in text for name in ("mcc", "uniqueness", "f1", "oracle", "linear", "random"))
    assert not isinstance(report.table(), Group)
    frame = report.to_frame()
    assert frame["dictionary"].tolist() == ["dictionary", "oracle", "linear", "random"]
    assert frame["f1"][1] == 1
    report.to_json(tmp_path / "report.json")
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["metrics"]["f1"]["value"] == report["f1"]
    assert content["metrics"]["mcc"]["low"] is None
    assert content["settings"]["n_features"] == 48
    assert set(content["controls"]) == {"oracle", "linear", "random"}


def test_other_dictionaries_and_too_few_activations_are_refused(source):
    with pytest.raises(ShapeError, match="of width 16"):
        source.measure(sl.Dictionary.create("topk", reads=12, d_sae=24))
    with pytest.raises(ShapeError, match="expected an autoencoder"):
        source.measure(sl.Dictionary.create("topk", reads=16, writes=8, d_sae=24))
    with pytest.raises(ConfigError, match="at least 2,048"):
        source.measure(sl.Dictionary.create("topk", reads=16, d_sae=24), 100)
    unchecked = inspect.unwrap(type(source).measure)  # without the type checks of tests
    with pytest.raises(ConfigError, match="expected an integer"):
        unchecked(source, sl.Dictionary.create("topk", reads=16, d_sae=24), 4096.5)
    with pytest.raises(ConfigError, match="'x' is not a dictionary"):
        unchecked(source, "x")
    bad = sl.Dictionary.create("topk", reads=16, d_sae=24)
    bad.W_dec.data[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="W_dec"):
        source.measure(bad)


def test_any_integer_is_a_seed(source):
    dictionary = sl.Dictionary.create("topk", reads=16, d_sae=24, options={"k": 4})
    reports = [source.measure(dictionary, 2048, seed=seed) for seed in (-1, 2**70, -1)]
    assert reports[0] == reports[2] != reports[1]


@pytest.mark.parametrize("controls", [False, True])
def test_a_dictionary_of_normalised_activations_is_measured(source, controls):
    """Reconstructions of a dictionary with a token norm are those of its forward pass."""
    W = source.directions
    settings = {"rule": "topk", "options": {"k": 4}, "token_norm": "layer_norm", "axes": AXES}
    dictionary = sl.Dictionary.from_tensors(W_enc=W.T, W_dec=W, b_dec=torch.zeros(16), **settings)
    report = source.measure(dictionary, N, seed=1, controls=controls)
    expected = reference(source, dictionary, source.sample(N, seed=1))
    assert report["explained_variance"] == pytest.approx(expected["explained_variance"], rel=1e-6)
    assert report["shrinkage"] == pytest.approx(expected["shrinkage"], rel=1e-6)
