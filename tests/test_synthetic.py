"""Synthetic activations: firing probabilities, hierarchy and codes are as stated, and every batch can be drawn again."""

import inspect
import itertools
import math

import numpy as np
import pytest
import torch
from interrupted import Interrupted
from scipy.stats import multivariate_normal, norm

import saelens_lite as sl
from saelens_lite.errors import ConfigError, HookError, SourceChangedError, Stopped
from saelens_lite.synthesis.planted import compensated, planted_tree, unit_directions, zipf
from saelens_lite.synthesis.settings import SyntheticConfig

PLAIN = {"roots": 0, "correlation": 0.0, "magnitude_std": (0.0, 0.0), "directions": "random", "bias": 0.0}


def rates(source, n):
    """Return the share of n activations in which each feature fires."""
    return source.sample(n).codes.fire_counts.double() / n


def z_scores(observed, expected, n):
    return (observed - expected).abs() / (expected * (1 - expected) / n).sqrt()


def test_probabilities_follow_zipf_between_their_bounds():
    p = zipf(SyntheticConfig(n_features=50, exponent=0.7, p_max=0.3, p_min=0.01)).numpy()
    ranks = np.arange(1, 51) ** -0.7
    assert p == pytest.approx(0.01 + 0.29 * (ranks - 50**-0.7) / (1 - 50**-0.7))
    assert (p[0], p[-1]) == pytest.approx((0.3, 0.01))


def test_l0_sets_the_sum_of_the_probabilities():
    p = zipf(SyntheticConfig(n_features=300, exponent=1.0, p_max=0.2, l0=7.5)).numpy()
    assert p.sum() == pytest.approx(7.5)
    assert p.max() == 0.2
    below = np.arange(300)[p < 0.2]
    assert p[below] * (below + 1) == pytest.approx(p[below[0]] * (below[0] + 1))


@pytest.mark.parametrize("correlation", [0.0, 0.35])
def test_features_outside_trees_fire_with_their_probabilities(correlation):
    s = sl.synthetic(200, 8, **PLAIN | {"correlation": correlation, "rank": 4}, p_max=0.4, p_min=0.002)
    z = z_scores(rates(s, 40_000), zipf(s.config), 40_000)
    assert z.max() < 4.5
    assert z.square().mean() == pytest.approx(1, abs=0.5)


def test_common_causes_give_pairs_the_probability_of_a_gaussian_copula():
    s = sl.synthetic(12, 8, **PLAIN | {"correlation": 0.5, "rank": 3}, exponent=0.2, p_max=0.2, p_min=0.05)
    f, n = s.features, 60_000
    active = s.sample(n).active.double()
    joint = (active.T @ active / n).numpy()
    covariance = (f.factor.double() @ f.factor.double().T).numpy()
    t = norm.isf(zipf(s.config).numpy())
    pairs = list(itertools.combinations(range(12), 2))
    expected = np.array([
        multivariate_normal.cdf([-t[i], -t[j]], cov=[[1, covariance[i, j]], [covariance[i, j], 1]]) for i, j in pairs
    ])  # fmt: skip
    observed = np.array([joint[i, j] for i, j in pairs])
    z = (observed - expected) / np.sqrt(expected * (1 - expected) / n)
    assert np.abs(z).max() < 4.5
    independent = np.array([zipf(s.config)[i] * zipf(s.config)[j] for i, j in pairs])
    assert np.abs(expected / independent - 1).max() > 0.5


def test_trees_are_numbered_by_generations():
    tree = planted_tree(SyntheticConfig(n_features=20, roots=2, branching=3, depth=2))
    assert tree.parent.tolist() == [-1, -1, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 5]
    assert tree.n_children.tolist() == [3] * 6 + [0] * 14
    assert tree.first_child[:6].tolist() == [2, 5, 8, 11, 14, 17]
    assert tree.n_levels == 3


def test_the_last_parent_has_fewer_children_if_features_are_short():
    tree = planted_tree(SyntheticConfig(n_features=8, roots=2, branching=4, depth=3))
    assert tree.n_children.tolist() == [4, 2, 0, 0, 0, 0, 0, 0]
    assert tree.parent.tolist() == [-1, -1, 0, 0, 0, 0, 1, 1]


def test_the_benchmark_has_its_published_size():
    """Of 16,384 features, 128 trees of four children over three generations hold 10,880; 34 are active on average."""
    config = SyntheticConfig(n_features=16_384, d_in=768)
    assert planted_tree(config).n_members == 128 * (1 + 4 + 16 + 64)
    s = sl.synthetic(16_384, 8, directions="random")
    assert float(s.sample(4096).codes.l0.double().mean()) == pytest.approx(34, abs=1.5)


def survivors(base, parent, probability):
    """Return the probabilities after the hierarchy of independent features, by counting all subsets of siblings."""
    out = list(probability)
    for one in sorted(set(parent) - {-1}):
        children = [i for i, of in enumerate(parent) if of == one]
        for i in children:
            total = 0.0
            for others in itertools.product([0, 1], repeat=len(children) - 1):
                rest = [j for j in children if j != i]
                chance = math.prod(base[j] if on else 1 - base[j] for j, on in zip(rest, others, strict=True))
                total += chance / (1 + sum(others))
            out[i] = out[one] * base[i] * total
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize(("n", "roots", "true_l0", "of_children"), [(1024, None, 7.3, 0.46), (1024, 128, 13.1, 1.0)])
def test_the_true_l0_is_what_the_guide_says(n, roots, true_l0, of_children):
    s = sl.synthetic(n, 8, directions="random", roots=roots)
    rate, child = rates(s, 16_384), s.features.tree.parent >= 0
    assert s.true_l0 == pytest.approx(true_l0, abs=0.2)
    assert s.true_l0 == pytest.approx(float(rate.sum()), abs=0.2)
    assert float(rate[child].sum() / s.features.wanted[child].sum()) == pytest.approx(of_children, abs=0.02)


def test_exclusive_children_fire_with_the_probability_that_all_subsets_of_siblings_give():
    s = sl.synthetic(23, 8, **PLAIN | {"roots": 2}, branching=3, depth=2, p_max=0.5, p_min=0.05)
    base = compensated(zipf(s.config), s.features.tree, exclusive=True)
    expected = survivors(base.tolist(), s.features.tree.parent.tolist(), base.tolist())
    assert z_scores(rates(s, 60_000), expected, 60_000).max() < 4.5


def test_the_compensation_is_that_of_the_paper():
    tree = planted_tree(SyntheticConfig(n_features=5, roots=1, branching=2, depth=2))
    wanted = torch.tensor([0.5, 0.1, 0.2, 0.05, 0.04], dtype=torch.float64)
    base = compensated(wanted, tree, exclusive=True)
    assert base.tolist() == pytest.approx([0.5, 0.2 * 1.4, 0.4 * 1.2, 0.5 * 1.4, 0.4 * 1.5])
    assert compensated(wanted, tree, exclusive=False).tolist() == pytest.approx([0.5, 0.2, 0.4, 0.5, 0.4])


@pytest.mark.parametrize("exclusive", [True, False])
def test_children_fire_only_with_their_parent_and_exclude_each_other(exclusive):
    s = sl.synthetic(60, 8, roots=4, branching=3, depth=2, exclusive=exclusive, p_max=0.5, p_min=0.05, correlation=0.2)
    active, parent = s.sample(6000).active, s.features.tree.parent
    child = (parent >= 0).nonzero().squeeze(1)
    assert not (active[:, child] & ~active[:, parent[child]]).any()
    siblings = torch.zeros(6000, 60).index_add_(1, parent[child], active[:, child].float())
    assert (siblings.max() == 1) if exclusive else (siblings.max() == 3)
    assert active[:, child].any(0).all()


def test_the_code_of_a_child_grows_with_that_of_its_parent():
    settings = {"roots": 1, "branching": 2, "depth": 1, "magnitude_std": (0.8, 0.0), "p_max": 0.6, "p_min": 0.3}
    for scaled in (True, False):
        s = sl.synthetic(3, 8, **PLAIN | settings, scale_children=scaled)
        acts = s.sample(20_000).codes.to_dense().double()
        both = acts[(acts[:, 1] > 0)]
        parent, child = both[:, 0] / s.features.mean[0], both[:, 1] / s.features.mean[1]
        slope = float(((parent - parent.mean()) * (child - child.mean())).mean() / parent.var())
        assert slope == pytest.approx(1.0 if scaled else 0.0, abs=0.06)


def test_activations_are_the_sum_of_directions_bias_and_noise():
    s = sl.synthetic(40, 16, roots=2, noise=0.3, bias=2.0, p_max=0.4, p_min=0.05)
    truth = s.sample(5000)
    rest = truth.x.double() - truth.codes.to_dense().double() @ s.directions.double() - s.features.bias.double()
    assert s.features.bias.norm() == pytest.approx(2.0)
    assert rest.std() == pytest.approx(0.3, rel=0.02)
    assert rest.mean() == pytest.approx(0, abs=0.01)
    clean = sl.synthetic(40, 16, roots=2, bias=2.0, p_max=0.4, p_min=0.05).sample(100)
    dense = clean.codes.to_dense().double() @ s.directions.double() + s.features.bias.double()
    assert torch.allclose(clean.x.double(), dense, atol=1e-5)


def test_codes_have_the_mean_and_deviation_of_their_feature():
    s = sl.synthetic(6, 8, **PLAIN | {"magnitude_std": (0.5, 0.2)}, magnitude=(5.0, 4.0), exponent=0.1, p_max=0.5, p_min=0.4)
    acts = s.sample(40_000).codes.to_dense().double()
    fires = acts > 0
    mean = acts.sum(0) / fires.sum(0)
    std = ((acts - mean).square() * fires).sum(0).div(fires.sum(0)).sqrt()
    assert mean.tolist() == pytest.approx(torch.linspace(5, 4, 6).tolist(), abs=0.03)
    assert std.tolist() == pytest.approx(s.features.std.tolist(), abs=0.02)
    assert (s.features.std.max() - s.features.std.min()) > 0.1


def test_directions_overlap_as_little_as_they_can():
    generator = torch.Generator().manual_seed(0)
    frame = unit_directions(600, 40, True, generator)
    assert torch.allclose(frame.norm(dim=1), torch.ones(600, dtype=torch.float64))
    assert float((frame @ frame.T).square().sum()) == pytest.approx(600**2 / 40, rel=1e-4)
    square = unit_directions(30, 40, True, generator)
    assert torch.allclose(square @ square.T, torch.eye(30, dtype=torch.float64), atol=1e-9)
    s = sl.synthetic(600, 40, directions="random", roots=0)
    cosine = (s.directions.double() @ s.directions.double().T).fill_diagonal_(0).abs()
    assert torch.allclose(s.coherence.double(), cosine.amax(1), atol=1e-5)


def small(**changes):
    return sl.synthetic(96, 12, **{"roots": 4, "p_max": 0.3, "p_min": 0.01, **changes})


def batches(source, n, start=0, size=32, seed=0, **part):
    return [batch["x"] for batch in itertools.islice(source.batches(["x"], size, seed, start, **part), n)]


def test_the_same_seed_gives_the_same_bytes_from_any_batch_on():
    first = batches(small(), 6)
    for begin in range(6):
        assert all(map(torch.equal, batches(small(), 6 - begin, begin), first[begin:]))
    assert len({bytes(x.numpy()) for x in first}) == 6
    assert not torch.equal(batches(small(), 1, seed=1)[0], first[0])
    assert not torch.equal(batches(small(seed=1), 1)[0], first[0])


def test_the_parts_of_a_batch_are_the_batch():
    whole = batches(small(), 2)
    parts = [batches(small(), 2, rank=rank, world=4) for rank in range(4)]
    assert all(torch.equal(torch.cat([part[i] for part in parts]), whole[i]) for i in range(2))


def test_held_out_activations_and_samples_are_in_no_batch():
    s = small()
    held, rest = s.hold_out(300)
    rows = [tuple(row.tolist()) for x in (*batches(rest, 60), held.x["x"], s.sample(300).x) for row in x]
    silent = tuple(s.features.bias.tolist())
    counted = [row for row in rows if row != silent]
    assert len(set(counted)) == len(counted) > 1000


def test_statistics_are_those_of_the_batches():
    s = small(bias=3.0)
    x = torch.cat(batches(s, 40, size=1000)).double()
    stats = s.statistics("x")
    assert torch.allclose(stats.mean.double(), x.mean(0), atol=0.05)
    assert stats.rms_norm == pytest.approx(float(x.square().sum(1).mean().sqrt()), rel=0.02)


CONFIGS = [
    sl.TrainConfig(sparsity=rule, options={"k": 3}, d_sae=24, batch_size=32, n_tokens=640) for rule in ("topk", "batch_topk")
]


def test_an_interrupted_run_is_resumed_to_the_same_bytes(tmp_path):
    sl.train(small(), CONFIGS, tmp_path / "alone", validation_tokens=64)
    with pytest.raises(Stopped):
        sl.train(Interrupted(small(), 7), CONFIGS, tmp_path / "run", validation_tokens=64)
    sl.resume(tmp_path / "run", small())
    for name in ("0-topk", "1-batch_topk"):
        for file in ("log.jsonl", "dictionary/sae_weights.safetensors"):
            assert (tmp_path / "run" / name / file).read_bytes() == (tmp_path / "alone" / name / file).read_bytes()


def test_a_run_is_not_resumed_with_other_activations(tmp_path):
    with pytest.raises(Stopped):
        sl.train(Interrupted(small(), 3), CONFIGS[0], tmp_path / "run")
    with pytest.raises(SourceChangedError, match="noise"):
        sl.resume(tmp_path / "run", small(noise=0.1))
    with pytest.raises(ConfigError, match="give source="):
        sl.resume(tmp_path / "run")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"p_min": 0.5}, "^SyntheticConfig: p_min = 0.5 must be smaller than p_max"),
        ({"l0": 2000.0}, "raise p_max"),
        ({"roots": 5000}, "roots = 5000 is more than n_features"),
        ({"branchings": 2}, "branching"),
        ({"n_features": 0}, "n_features"),
        ({"magnitude": (0.0, 1.0)}, "magnitude"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        sl.synthetic(**settings)


def test_unknown_hooks_and_empty_samples_are_refused():
    s = small()
    with pytest.raises(HookError, match="have the hook 'x'"):
        next(s.batches(["y"], 8, 0))
    with pytest.raises(ConfigError, match="at least 1"):
        s.sample(0)
    with pytest.raises(ConfigError, match=r"n = 2\.5; expected an integer"):
        inspect.unwrap(type(s).pieces)(s, 2.5)  # without the type checks of tests
    with pytest.raises(ConfigError, match="at least 1"):
        s.hold_out(0)
