"""The claims of each rule's paper: the number of firing latents, learned thresholds, the quality of prefixes."""

import itertools
from types import SimpleNamespace

import pytest
import torch

import saelens_lite as sl
from saelens_lite.cache import TensorSource
from saelens_lite.errors import ConfigError
from saelens_lite.sparsity import load
from saelens_lite.training import Trainer
from saelens_lite.training.step import SparseStep


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def a_rule(name: str, d_in: int = 8, d_sae: int = 32, **options):
    rule_class = load(name)
    return rule_class(rule_class.Config(**options), d_in=d_in, d_sae=d_sae)


def a_step(d: sl.Dictionary, x: torch.Tensor, **more) -> SparseStep:
    return SparseStep(d, x, **{"dead": torch.zeros(d.d_sae, dtype=torch.bool), "progress": 0.5, "warmup": 1.0, **more})


def mask_of(support, d_sae: int) -> torch.Tensor:
    mask = torch.zeros(support.n_rows, d_sae, dtype=torch.bool)
    mask[support.row, support.latent] = True
    return mask


def observed(value: torch.Tensor, **more) -> SimpleNamespace:
    """Return a step with codes of these values, of which only what `more` says is known beside."""
    unknown = dict.fromkeys(
        ("x", "target", "x_hat", "dead", "dead_latents", "progress", "warmup", "coefficient", "decoder_norms", "n_dead")
    )
    sums = {"sum": torch.sum, "min": lambda x: min(x.tolist(), default=torch.inf) + x.new_zeros(()), "first_latent": 0}
    unused = dict.fromkeys(("pre_tiles", "pre_at", "decode", "base", "mean"), len)
    return SimpleNamespace(**{**unknown, **unused, **sums, "codes": SimpleNamespace(value=value), **more})


def largest(pre: torch.Tensor, n: int) -> torch.Tensor:
    """Return the n largest by sorting all of them, of equals the first."""
    best = torch.sort(pre.flatten(), descending=True, stable=True).indices[:n]
    return torch.zeros(pre.numel(), dtype=torch.bool).scatter(0, best, True).reshape(pre.shape)


@pytest.mark.parametrize("rows", [1, 5, 64, 300])
def test_batch_topk_keeps_the_largest_of_the_batch(rows):
    pre = normal(rows, 32)
    support = a_rule("batch_topk", k=3).train().support(pre)
    assert len(support.latent) == 3 * rows
    assert torch.equal(mask_of(support, 32), largest(pre, 3 * rows))
    assert rows == 1 or len(set(support.crow.diff().tolist())) > 1, "every token got the same number of latents"


def test_batch_topk_when_the_rows_it_samples_are_not_like_the_others():
    pre = normal(256, 32).abs()
    pre[::4] += 10
    for k in (1, 7, 9, 31):
        assert torch.equal(mask_of(a_rule("batch_topk", k=k).train().support(pre), 32), largest(pre, k * 256))


def test_batch_topk_of_equals_keeps_the_first():
    pre = (normal(40, 32) * 2).round()
    support = a_rule("batch_topk", k=4).train().support(pre)
    assert torch.equal(mask_of(support, 32), largest(pre, 160))
    assert torch.equal(
        mask_of(a_rule("batch_topk", k=4).train().support(torch.ones(40, 32)), 32).flatten().nonzero()[-1:, 0],
        torch.tensor([159]),
    )


def test_batch_topk_keeps_all_positive_ones_where_they_are_fewer():
    pre = normal(40, 32) - 1.5
    assert torch.equal(mask_of(a_rule("batch_topk", k=31).train().support(pre), 32), pre > 0)
    assert not len(a_rule("batch_topk").train().support(-pre.abs()).latent)


def test_the_threshold_of_batch_topk_is_a_running_mean_of_the_smallest_code():
    rule = a_rule("batch_topk", threshold_decay=0.75)
    for smallest, expected in ((2.0, 2.0), (4.0, 2.5), (None, 2.5), (0.5, 2.0)):
        value = torch.tensor([] if smallest is None else [9.0, 0.0, smallest, 7.0])
        rule.observe(observed(value))
        torch.testing.assert_close(rule.threshold, torch.full((32,), expected))


@pytest.mark.parametrize("rule", ["batch_topk", "matryoshka"])
def test_after_training_a_threshold_lets_as_many_through(planted, rule):
    x, _ = planted(5_000, d_in=32, n_directions=64)
    d = sl.fit(x, rule, options={"k": 4}, d_sae=64, n_tokens=30_000, batch_size=250, lr=5e-3)
    assert d.encode(x).l0.float().mean() == pytest.approx(4, rel=0.05)
    assert len(set(d.encode(x[:100]).l0.tolist())) > 1
    torch.testing.assert_close(d.encode(x[:1]).to_dense(), d.encode(x[:50]).to_dense()[:1])


def jumprelu(d_in: int, d_sae: int, **options) -> sl.Dictionary:
    """Return random weights, and thresholds about which there are many pre-activations."""
    options["threshold_speed"] = 1.0
    d = sl.Dictionary.create("jumprelu", reads=d_in, d_sae=d_sae, options=options).train()
    d.rule.scaled_log_threshold.data.copy_(normal(d_sae, seed=3) * 0.2 - 0.5)
    return d


def test_a_threshold_stored_as_it_is_has_the_gradient_of_its_logarithm_over_itself():
    log = jumprelu(8, 32, bandwidth=0.1)
    theta = log.rule.threshold.detach()
    plain = sl.Dictionary.create("jumprelu", reads=8, d_sae=32, options={"bandwidth": 0.1, "parameter": "plain"}).train()
    torch.testing.assert_close(plain.rule.threshold, torch.full((32,), 0.05 * 8**0.5))
    plain.rule.plain_threshold.data.copy_(theta)
    x = normal(500, 8)
    (by_log,) = torch.autograd.grad(a_step(log, x).losses()["l0_penalty"], log.rule.scaled_log_threshold)
    (by_itself,) = torch.autograd.grad(a_step(plain, x).losses()["l0_penalty"], plain.rule.plain_threshold)
    torch.testing.assert_close(by_itself, by_log / theta)
    assert by_itself.any()
    norms = plain.W_dec.norm(dim=1).mul_(3).detach()
    plain.W_dec.data.mul_(3)
    plain.fold_decoder_norms_()
    torch.testing.assert_close(plain.rule.threshold, theta * norms)


def test_the_gradient_of_l0_is_its_finite_difference_over_the_bandwidth():
    """With a rectangular kernel, the estimate (Rajamanoharan et al., section 4) is exactly that."""
    d = jumprelu(8, 32, bandwidth=0.1, coefficient=1.0)
    x = normal(500, 8)
    (found,) = torch.autograd.grad(a_step(d, x).losses()["l0_penalty"], d.rule.scaled_log_threshold)
    h, theta, width = d.pre(x).detach(), d.rule.scaled_log_threshold.detach().exp(), 0.1 * 8**0.5
    above, below = ((h > theta + width / 2).sum(0), (h > theta - width / 2).sum(0))
    torch.testing.assert_close(found, theta * (above - below) / width / 500)
    assert (found < 0).all()


def test_the_gradient_of_the_error_is_that_of_its_expectation():
    """x ~ N(0, 1), one latent of weight 1: E(x − x̂)² = ∫ x² φ(x) over x < θ, whose derivative is θ² φ(θ)."""
    d = jumprelu(1, 1, bandwidth=0.05)
    d.W_enc.data.fill_(1)
    d.W_dec.data.fill_(1)
    (found,) = torch.autograd.grad(a_step(d, normal(400_000, 1)).losses()["mse"], d.rule.scaled_log_threshold)
    theta = d.rule.scaled_log_threshold.detach().exp()
    expected = theta**2 * torch.exp(-(theta**2) / 2) / (2 * torch.pi) ** 0.5
    torch.testing.assert_close(found, theta * expected, rtol=0.05, atol=0)


def test_pairs_just_below_the_threshold_are_seen_and_do_not_fire():
    d = jumprelu(8, 32, bandwidth=0.1)
    x = normal(200, 8)
    fires = d.pre(x) > d.rule.scaled_log_threshold.exp()
    codes = a_step(d, x).codes
    assert len(codes.value) > int(fires.sum())
    assert torch.equal(codes.l0, fires.sum(1))
    assert len(d.eval().encode(x).value) == int(fires.sum())


def test_a_threshold_learns_as_much_faster_as_it_is_told():
    x = normal(500, 8)
    moved = {}
    for speed in (1.0, 10.0):
        options = {"threshold_speed": speed, "threshold": 0.3, "bandwidth": 0.5}
        config = sl.TrainConfig(
            sparsity="jumprelu", options=options, d_sae=32, batch_size=500, warmup=0, sparsity_warmup=0, lr=1e-3
        )
        trainer = Trainer(config, TensorSource(x))
        torch.testing.assert_close(trainer.dictionary.rule.threshold, torch.full((32,), 0.3 * 8**0.5))
        trainer.step(x)
        moved[speed] = trainer.dictionary.rule.threshold.log() - torch.tensor(0.3 * 8**0.5).log()
    torch.testing.assert_close(moved[1.0].abs(), torch.full((32,), 1e-3), rtol=0.01, atol=0)
    torch.testing.assert_close(moved[10.0], 10 * moved[1.0], rtol=0.01, atol=0)


def test_target_l0_is_reached(planted):
    x, _ = planted(5_000, d_in=32, n_directions=64)
    options = {"target_l0": 4.0}
    d = sl.fit(x, "jumprelu", options=options, d_sae=64, n_tokens=50_000, batch_size=250, lr=5e-3)
    assert d.encode(x).l0.float().mean() == pytest.approx(4, rel=0.05)


def nested(n: int) -> torch.Tensor:
    """Return [n 32]: two of eight general directions per token, each with one of its four special ones."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(40, 32, generator=generator), dim=1)
    general = torch.rand(n, 8, generator=generator).topk(2, dim=1).indices
    special = 8 + 4 * general + torch.randint(4, (n, 2), generator=generator)
    return directions[general].sum(1) + 0.7 * directions[special].sum(1)


def test_the_first_prefix_is_worth_more_than_the_best_latents_without_nesting():
    x = nested(5_000)
    settings = {"d_sae": 40, "n_tokens": 40_000, "batch_size": 200, "lr": 5e-3}
    matryoshka = sl.fit(x, "matryoshka", options={"k": 4, "prefixes": (0.2,)}, **settings)
    plain = sl.fit(x, "batch_topk", options={"k": 4}, **settings)

    def error(d: sl.Dictionary, latents: torch.Tensor) -> float:
        codes = d.encode(x).to_dense()
        x_hat = codes[:, latents] @ d.W_dec[latents] + d.b_dec
        return float((x - x_hat).detach().square().sum() / (x - x.mean(0)).square().sum())

    eight = torch.arange(8)
    assert error(matryoshka, torch.arange(40)) < 0.1
    assert error(matryoshka, eight) < 0.8 * error(plain, eight)
    strongest = plain.encode(x).to_dense().square().mean(0).topk(8).indices
    assert error(matryoshka, eight) < 0.9 * error(plain, strongest)


def test_matryoshka_decodes_every_latent_once():
    d = sl.Dictionary.create("matryoshka", reads=8, d_sae=32, options={"k": 6, "prefixes": (0.25, 0.5, 0.75)}).train()
    step, decoded = a_step(d, normal(20, 8)), []
    decode = step.decode
    step.decode = lambda codes, frozen=False: decoded.append(codes) or decode(codes, frozen)
    step.losses()
    assert [len(codes.value) for codes in decoded] == [int((step.codes.latent < 24).sum())]


def test_prefixes_of_matryoshka():
    assert a_rule("matryoshka", d_sae=64).lengths() == [2, 6, 14, 30]
    assert a_rule("matryoshka", d_sae=8).lengths() == [1, 2, 4]
    assert a_rule("matryoshka", d_sae=1).lengths() == []
    for prefixes in ((0.5, 0.25), (0.5, 0.5), (0.0, 0.5), (0.5, 1.0)):
        with pytest.raises(ConfigError, match=r"Matryoshka: prefixes = .*shares between 0 and 1, in increasing order"):
            load("matryoshka").Config(prefixes=prefixes)


def test_the_penalty_of_p_anneal_keeps_its_value_when_p_falls():
    rule = a_rule("p_anneal", p_end=0.2, start=0.2)
    value = normal(1000).abs() + 1e-3
    step = observed(value, x=normal(100, 8), coefficient=1.0, mean=lambda x: x.sum() / 100)
    penalty = rule.losses(step)["lp"]
    torch.testing.assert_close(penalty, value.sum() / 100)
    for progress, p in ((0.1, 1.0), (0.2, 1.0), (0.4, 0.8), (0.6, 0.6), (1.0, 0.2)):
        step.progress = progress
        rule.observe(step)
        assert float(rule.p) == pytest.approx(p)
        torch.testing.assert_close(rule.losses(step)["lp"], penalty)
    torch.testing.assert_close(rule.growth, value.sum() / value.double().pow(0.2).sum().float())


def test_p_anneal_of_nothing_that_fires():
    rule = a_rule("p_anneal")
    rule.observe(observed(torch.zeros(0), progress=0.9))
    assert float(rule.growth) == 1


def test_p_falls_to_its_end_in_training_and_fewer_latents_fire(planted):
    x, _ = planted(5_000, d_in=32, n_directions=64)
    settings = {"d_sae": 64, "n_tokens": 60_000, "batch_size": 250, "lr": 5e-3}
    annealed, constant = (sl.fit(x, "p_anneal", options={"coefficient": 0.5, "p_end": p}, **settings) for p in (0.2, 1.0))
    assert float(annealed.rule.p) == pytest.approx(0.2, abs=0.01)
    assert float(constant.rule.growth) == 1
    assert annealed.encode(x).l0.float().mean() < 0.9 * constant.encode(x).l0.float().mean()


def test_group_max_fires_once_in_each_group():
    d = sl.Dictionary.create("group_max", reads=8, d_sae=30, options={"k": 5})
    codes = d.encode(normal(50, 8)).to_dense()
    h = d.pre(normal(50, 8))
    for begin in range(0, 30, 6):
        group = slice(begin, begin + 6)
        torch.testing.assert_close(codes[:, group].sum(1), h[:, group].amax(1).relu())
        assert ((codes[:, group] != 0).sum(1) == (h[:, group].amax(1) > 0)).all()


def test_groups_are_of_one_size():
    with pytest.raises(ConfigError, match=r"^30 latents cannot be split into k = 4 groups of equal size; change d_sae or k$"):
        sl.fit(normal(20, 8), "group_max", options={"k": 4}, d_sae=30)


def pursuit(atoms: torch.Tensor, x: torch.Tensor, k: int) -> torch.Tensor:
    """Return codes of the textbook's loop, one activation at a time, in float64."""
    atoms, codes = atoms.double(), torch.zeros(len(x), len(atoms), dtype=torch.double)
    for row, activation in enumerate(x.double()):
        for _ in range(k):
            fit = (atoms @ (activation - codes[row] @ atoms)).relu()
            codes[row, fit.argmax()] += fit.max()
    return codes


@pytest.mark.parametrize("gram", [0, 10**9], ids=["inner products when needed", "all inner products"])
def test_matching_pursuit_is_the_textbooks(monkeypatch, gram):
    monkeypatch.setitem(load("matching_pursuit").pursue.__globals__, "LARGEST_GRAM", gram)
    d = sl.Dictionary.create("matching_pursuit", reads=6, d_sae=20, options={"k": 9})
    d.b_dec.data.copy_(normal(6, seed=2))
    x = normal(150, 6)
    wanted = pursuit(d.W_dec.detach(), x - d.b_dec.detach(), 9)
    assert (wanted != 0).sum(1).min() < 9, "no latent was taken twice"
    torch.testing.assert_close(d.encode(x).to_dense().double(), wanted, rtol=1e-4, atol=1e-5)
    assert (d.encode(x).l0 == (wanted != 0).sum(1)).all()


def test_each_step_of_the_pursuit_explains_more():
    x = normal(100, 12)
    errors = []
    for k in range(1, 8):
        d = sl.Dictionary.create("matching_pursuit", reads=12, d_sae=60, options={"k": k})
        errors.append((x - d(x)).square().sum(1))
    assert all((after <= before + 1e-6).all() for before, after in itertools.pairwise(errors))
    assert errors[-1].sum() < 0.2 * errors[0].sum()


def test_of_two_similar_latents_pursuit_fires_one():
    """Top-k gives both to a token that only one of them explains."""
    fired = {}
    for rule in ("topk", "matching_pursuit"):
        d = sl.Dictionary.create(rule, reads=3, d_sae=3, options={"k": 2})
        d.W_dec.data.copy_(torch.nn.functional.normalize(torch.tensor([[1.0, 0, 0], [1, 0.1, 0], [0, 0, 1]]), dim=1))
        if rule == "topk":
            d.W_enc.data.copy_(d.W_dec.data.T)
        fired[rule] = d.encode(torch.tensor([[2.0, 0, 0.1]])).latent.tolist()
    assert sorted(fired["topk"]) == [0, 1]
    assert sorted(fired["matching_pursuit"]) == [0, 2]


def test_a_tied_dictionary_has_one_matrix():
    d = sl.fit(normal(200, 6), "matching_pursuit", options={"k": 2}, d_sae=12, batch_size=50, n_tokens=2000)
    assert {name for name, _ in d.named_parameters()} == {"W_dec", "b_dec"}
    assert torch.equal(d.W_enc, d.W_dec.T)
    torch.testing.assert_close(d.W_dec.norm(dim=1), torch.ones(12))
    assert d.double().W_enc.dtype == torch.double
    with pytest.raises(AttributeError, match="W_encoder"):
        d.W_encoder
