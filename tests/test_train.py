"""Training: same seed, same bytes; planted directions are found; schedules, logs and counters are right."""

import itertools
import json

import pytest
import torch
from scipy.optimize import linear_sum_assignment

import saelens_lite as sl
from saelens_lite import registry
from saelens_lite.cache import TensorSource
from saelens_lite.config import read_toml, train_configs
from saelens_lite.errors import ConfigError, HookError, PluginError, ShapeError
from saelens_lite.training import Trainer

HOOKS = ["blocks.1.hook_resid_pre", "blocks.2.hook_mlp_out"]
SMALL = {"d_sae": 48, "n_tokens": 1500, "batch_size": 100, "lr": 3e-3, "log_every": 300}
SWEEP = [
    sl.TrainConfig(hook=HOOKS[0], sparsity="topk", options={"k": 4, "aux_k": 8}, dead_after=300, **SMALL),
    sl.TrainConfig(hook=HOOKS[1], sparsity="l1", options={"p": 0.5}, seed=3, **SMALL),
    sl.TrainConfig(hook=HOOKS[0], sparsity="gated", **{**SMALL, "n_tokens": 800, "lr": 1e-3}),
]


def x_like(n: int, d_in: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d_in, generator=torch.Generator().manual_seed(seed)) * torch.linspace(0.5, 2, d_in) + 1


def assert_same_bits(a: sl.Dictionary, b: sl.Dictionary) -> None:
    assert a.state_dict().keys() == b.state_dict().keys()
    assert all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())
    assert (a.density is None) == (b.density is None)
    assert a.density is None or torch.equal(a.density, b.density)


def test_the_same_seed_gives_the_same_bits(cache):
    first, second = sl.train(cache, SWEEP), sl.train(cache, SWEEP)
    for a, b in zip(first, second, strict=True):
        assert_same_bits(a.dictionary, b.dictionary)
        assert a.history == b.history


def test_each_seed_changes_the_result(cache):
    config = SWEEP[0]
    base, other_seed = (sl.train(cache, c)[0].dictionary for c in (config, config.replace(seed=1)))
    other_data = sl.train(cache, config, data_seed=1)[0].dictionary
    assert not torch.equal(base.W_dec, other_seed.W_dec)
    assert not torch.equal(base.W_dec, other_data.W_dec)


def test_dictionaries_of_a_sweep_have_the_bytes_of_training_alone(cache):
    together = sl.train(cache, SWEEP, data_seed=7)
    for run, config in zip(together, SWEEP, strict=True):
        (alone,) = sl.train(cache, config, data_seed=7)
        assert run.config == alone.config == config
        assert_same_bits(run.dictionary, alone.dictionary)
        assert run.history == alone.history


@pytest.mark.parametrize(
    ("rule", "options", "least"),
    [
        ("topk", {"k": 4}, 0.95),
        ("l1", {"coefficient": 2.5}, 0.9),
        ("gated", {"coefficient": 4.0}, 0.9),
        ("batch_topk", {"k": 4}, 0.95),
        ("jumprelu", {"coefficient": 1.0}, 0.95),
        ("jumprelu", {"target_l0": 4.0}, 0.95),
        ("jumprelu", {"penalty": "tanh"}, 0.95),
        ("matryoshka", {"k": 4}, 0.95),
        ("p_anneal", {"coefficient": 1.0}, 0.95),
        ("matching_pursuit", {"k": 4}, 0.95),
    ],
)
def test_planted_directions_are_found(planted, rule, options, least):
    x, directions = planted(50_000)
    d = sl.fit(x, rule, options=options, d_sae=128, n_tokens=120_000, batch_size=512, lr=1e-2)
    learned = torch.nn.functional.normalize(d.W_dec.detach(), dim=1)
    cosines = directions @ learned.T
    matched = cosines[linear_sum_assignment(-cosines.numpy())]
    assert matched.mean() >= least
    codes = d.encode(x[:5000])
    assert 3 < codes.l0.float().mean() < 6  # four are active
    error = (x[:5000] - d.decode(codes)).square().sum() / (x[:5000] - x[:5000].mean(0)).square().sum()
    assert error < 0.2


def best_scale(centred, W_enc, W_dec):
    """Return the factor with which ReLU codes reconstruct best."""
    part = torch.relu(centred @ W_enc) @ W_dec
    return (centred * part).sum() / part.square().sum()


def test_five_steps_agree_with_a_float64_reference():
    """The reference is the whole loop for the L1 rule, written from the formulas."""
    d_in, n, size, coefficient, lr = 6, 160, 32, 2.0, 1e-2
    x = x_like(64, d_in)
    config = sl.TrainConfig(
        sparsity="l1", options={"coefficient": coefficient}, d_sae=20, n_tokens=n, batch_size=size, lr=lr,
        warmup=0.25, decay=0.25, sparsity_warmup=0.5, clip_grad_norm=1.0, betas=(0.8, 0.95),
    )  # fmt: skip
    source = TensorSource(x)
    (run,) = sl.train(source, config)

    x64 = x.double()
    scale = d_in**0.5 / x64.square().sum(1).mean().sqrt()
    start = sl.Dictionary.create("l1", reads=d_in, d_sae=20)
    p = {"W_enc": start.W_enc, "b_enc": start.b_enc, "W_dec": start.W_dec, "b_dec": x64.mean(0) * scale}
    p = {name: value.detach().double() for name, value in p.items()}
    first, second = ({name: torch.zeros_like(value) for name, value in p.items()} for _ in range(2))
    for t, batch in enumerate(itertools.islice(source.batches(["x"], size, 0), n // size), 1):
        y = batch["x"].double() * scale
        if t == 1:
            p["W_enc"] = p["W_enc"] * best_scale(y - p["b_dec"], p["W_enc"], p["W_dec"])
        p = {name: value.requires_grad_() for name, value in p.items()}
        f = torch.relu((y - p["b_dec"]) @ p["W_enc"] + p["b_enc"])
        x_hat = f @ p["W_dec"] + p["b_dec"]
        penalty = coefficient * min(1.0, (t - 1) * size / n / 0.5) * (f * p["W_dec"].norm(dim=1)).sum(1).mean()
        gradients = torch.autograd.grad(((y - x_hat) ** 2).sum(1).mean() + penalty, list(p.values()))
        norm = sum(g.square().sum() for g in gradients).sqrt()
        progress = ((t - 1) * size + size / 2) / n
        rate = lr * min(1.0, progress / 0.25, (1 - progress) / 0.25)
        for (name, value), g in zip(p.items(), [g * min(1.0, 1 / (norm + 1e-6)) for g in gradients], strict=True):
            first[name] = 0.8 * first[name] + 0.2 * g
            second[name] = 0.95 * second[name] + 0.05 * g**2
            change = (first[name] / (1 - 0.8**t)) / ((second[name] / (1 - 0.95**t)).sqrt() + 1e-8)
            p[name] = (value - rate * change).detach()
    norms = p["W_dec"].norm(dim=1)
    wanted = {
        "W_enc": p["W_enc"] * norms * scale,
        "b_enc": p["b_enc"] * norms,
        "W_dec": p["W_dec"] / norms[:, None] / scale,
        "b_dec": p["b_dec"] / scale,
    }
    for name, value in wanted.items():
        torch.testing.assert_close(
            getattr(run.dictionary, name).detach().double(),
            value,
            rtol=1e-4,
            atol=1e-5,
            msg=lambda m, name=name: f"{name}: {m}",
        )


def test_scaled_activations_give_the_same_codes():
    x = x_like(400, 8)
    for rule in ("l1", "topk", "gated", "batch_topk", "jumprelu", "matryoshka", "p_anneal", "group_max"):
        options = {"k": 3} if rule in ("topk", "batch_topk", "matryoshka", "group_max") else {}
        settings = {"d_sae": 24, "n_tokens": 2000, "batch_size": 50, "lr": 1e-2, "options": options}
        small, large = sl.fit(x, rule, **settings), sl.fit(x * 64, rule, **settings)
        torch.testing.assert_close(large(x * 64), small(x) * 64, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(large.encode(x * 64).to_dense(), small.encode(x).to_dense(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("warmup", "decay", "expected"),
    [
        (0.1, 0.2, {0: 0, 0.05: 0.5, 0.1: 1, 0.5: 1, 0.8: 1, 0.9: 0.5, 0.95: 0.25, 1: 0, 1.3: 0}),
        (0, 0.5, {0: 1, 0.5: 1, 0.75: 0.5, 1: 0}),
        (0.5, 0, {0: 0, 0.25: 0.5, 0.5: 1, 1: 1}),
        (0, 0, {0: 1, 0.5: 1, 1: 1}),
        (1, 1, {0.25: 0.25, 0.5: 0.5, 0.75: 0.25}),
    ],
)
def test_learning_rate_schedule(warmup, decay, expected):
    config = sl.TrainConfig(warmup=warmup, decay=decay, lr=4e-3, d_sae=8)
    trainer = Trainer(config, TensorSource(x_like(10, 4)))
    assert {progress: pytest.approx(trainer.lr_at(float(progress))) for progress in expected} == {
        progress: share * 4e-3 for progress, share in expected.items()
    }


def test_the_log_has_the_learning_rate_of_each_step():
    config = sl.TrainConfig(d_sae=8, n_tokens=1000, batch_size=100, warmup=0.2, decay=0.4, lr=1e-2, log_every=1)
    (run,) = sl.train(TensorSource(x_like(100, 4)), config)
    middle = [(i + 0.5) / 10 for i in range(10)]
    assert [line["lr"] for line in run.history] == pytest.approx([1e-2 * min(1, m / 0.2, (1 - m) / 0.4) for m in middle])


def test_the_default_learning_rate_follows_widths_and_steps():
    short, long = ({"n_tokens": n * 512, "batch_size": 512} for n in (800, 80_000))
    assert sl.TrainConfig(d_sae=2048, **short).peak_lr(576) == pytest.approx(0.05 / 24)
    assert sl.TrainConfig(d_sae=2048 * 16, **short).peak_lr(576) == pytest.approx(0.05 / 24 / 2)
    assert sl.TrainConfig(d_sae=2048, **long).peak_lr(576) == pytest.approx(0.05 / 24 / 10)
    assert sl.TrainConfig(d_sae=16, **short).peak_lr(4) == 0.01
    assert sl.TrainConfig(d_sae=2048, lr=1e-3).peak_lr(576) == 1e-3
    lr = {}
    for rule in ("topk", "l1", "p_anneal"):
        config = sl.TrainConfig(sparsity=rule, d_sae=32768, n_tokens=2048, batch_size=1024, warmup=0, decay=0)
        lr[rule] = Trainer(config, TensorSource(x_like(100, 64))).peak_lr
    assert lr == pytest.approx({"topk": 0.05 / 8 / 2, "l1": 0.05 / 8, "p_anneal": 0.05 / 8})


@pytest.mark.parametrize(
    ("n_tokens", "batch_size"), [(1, 64), (63_999, 64), (64_000, 128), (1_000_000, 1024), (1_024_000, 2048), (10**12, 2048)]
)
def test_the_default_batch_gives_500_steps_if_it_can(n_tokens, batch_size):
    assert sl.TrainConfig(n_tokens=n_tokens).batch_size == batch_size
    assert sl.TrainConfig(n_tokens=n_tokens).replace(n_tokens=10**7).batch_size == 2048
    assert sl.TrainConfig(n_tokens=n_tokens, batch_size=100).batch_size == 100


def test_a_run_folder_holds_settings_log_and_dictionary(cache, tmp_path):
    config = SWEEP[0]
    (run,) = sl.train(cache, config, tmp_path / "run")
    assert run.folder == tmp_path / "run"
    assert sorted(p.name for p in run.folder.iterdir()) == ["config.toml", "data.json", "dictionary", "log.jsonl"]
    assert train_configs(read_toml(run.folder / "config.toml")) == [config]
    lines = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    assert lines == run.history
    assert [line["tokens"] for line in lines] == [300, 600, 900, 1200, 1500]
    assert [line["step"] for line in lines] == [3, 6, 9, 12, 15]
    assert all({"loss", "mse", "l0", "fvu", "dead", "lr"} <= line.keys() for line in lines)
    assert all(0 < line["l0"] <= 4 for line in lines)
    loaded = sl.Dictionary.load(run.folder / "dictionary")
    loaded.density = torch.where((loaded.density - run.dictionary.density).abs() < 1e-6, run.dictionary.density, torch.nan)
    assert_same_bits(loaded, run.dictionary)  # equal to the bit, except the density, which is stored as a logarithm
    assert loaded.origin == cache.origin(HOOKS[0])
    assert loaded.training_record == {"config": config.model_dump(mode="json"), "tokens": 1500, "steps": 15}
    assert sl.TrainConfig(**loaded.training_record["config"]) == config


def test_several_dictionaries_get_numbered_folders(cache, tmp_path):
    runs = sl.train(cache, SWEEP, tmp_path / "runs")
    assert [run.folder.name for run in runs] == ["0-topk", "1-l1", "2-gated"]
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["0-topk", "1-l1", "2-gated"]
    for run, config in zip(runs, SWEEP, strict=True):
        assert train_configs(read_toml(run.folder / "config.toml")) == [config]
        assert torch.equal(sl.Dictionary.load(run.folder / "dictionary").W_enc, run.dictionary.W_enc)
        assert json.loads((run.folder / "log.jsonl").read_text().splitlines()[-1])["tokens"] == config.n_tokens


def test_config_toml_holds_every_field():
    config = sl.TrainConfig(
        hook="h",
        reads=("h",),
        writes=("t",),
        skip=True,
        sparsity="gated",
        options={"coefficient": 1.5},
        d_sae=3,
        n_tokens=4,
        batch_size=5,
        lr=6e-4,
        betas=(0.5, 0.6),
        encoder_precision="float32",
        warmup=0.1,
        decay=0.3,
        sparsity_warmup=0.4,
        clip_grad_norm=2.0,
        normalize="none",
        dead_after=7,
        kl_share=0.3,
        kl_coefficient=2.0,
        kl_lr=0.5,
        seed=8,
        log_every=9,
    )
    assert all(getattr(config, name) != field.default for name, field in sl.TrainConfig.model_fields.items())
    tables = {**config.model_dump(mode="json"), "dictionary": [{}, {"d_sae": 30, "options": {"coefficient": 2.5}}]}
    first, second = train_configs(tables)
    assert first == config
    assert second == config.replace(d_sae=30, options={"coefficient": 2.5})


def test_settings_without_clipping_load_unchanged(cache, tmp_path):
    config = SWEEP[0].replace(clip_grad_norm=0)
    (run,) = sl.train(cache, config, tmp_path / "run")
    assert train_configs(read_toml(run.folder / "config.toml")) == [config]


def test_logged_numbers_of_the_first_step():
    x = x_like(64, 6)
    config = sl.TrainConfig(sparsity="l1", d_sae=12, n_tokens=640, batch_size=64, log_every=64, options={"coefficient": 2.0})
    (run,) = sl.train(TensorSource(x), config)
    scale = 6**0.5 / x.double().square().sum(1).mean().sqrt()
    centred = (x.double() - x.double().mean(0)) * scale
    start = sl.Dictionary.create("l1", reads=6, d_sae=12)
    codes = torch.relu(centred @ start.W_enc.double())
    codes = codes * best_scale(
        centred, start.W_enc.detach().double(), start.W_dec.detach().double()
    )  # the encoder that training begins with
    mse = (centred - codes @ start.W_dec.double()).square().sum(1).mean().item()
    line = run.history[0]
    assert line["mse"] == pytest.approx(mse, rel=1e-4)
    assert line["fvu"] == pytest.approx(mse / centred.square().sum(1).mean().item(), rel=1e-4)
    assert line["l0"] == pytest.approx((codes > 0).sum(1).double().mean().item(), rel=1e-4)
    assert line["l1"] == 0  # the warm-up begins at zero
    assert line["loss"] == pytest.approx(mse, rel=1e-4)
    assert run.history[1]["l1"] > 0


def test_density_is_the_firing_frequency():
    x = x_like(100, 6)
    config = sl.TrainConfig(d_sae=16, n_tokens=1000, batch_size=50, options={"k": 3}, lr=1e-12, decay=0.2)
    (run,) = sl.train(TensorSource(x), config)  # no parameter changes; the last 200 tokens are two epochs
    fires = run.dictionary.encode(x).to_dense() != 0
    torch.testing.assert_close(run.dictionary.density, fires.float().mean(0))
    assert 0 < run.dictionary.density.max() < 1


@pytest.mark.parametrize("n_steps", [1, 3])
def test_a_short_run_has_a_density(n_steps):
    config = sl.TrainConfig(d_sae=16, n_tokens=50 * n_steps, batch_size=50, options={"k": 3}, decay=0.2)
    (run,) = sl.train(TensorSource(x_like(100, 6)), config)
    assert run.dictionary.density is not None
    assert run.dictionary.density.sum() > 0


def test_a_trainer_that_waits_holds_no_gradients():
    """Of many dictionaries that are trained together, only one needs them at a time."""
    x = x_like(64, 6)
    trainer = Trainer(sl.TrainConfig(d_sae=16, options={"k": 3}, n_tokens=640, batch_size=64), TensorSource(x))
    trainer.backward(x)
    assert trainer.dictionary.W_enc.grad is not None
    trainer.step(x)
    assert all(p.grad is None for p in (*trainer.dictionary.parameters(), *trainer.optimizer.parameters.values()))


def test_computing_gradients_changes_neither_parameters_nor_counters():
    x = x_like(64, 6)
    trainer = Trainer(sl.TrainConfig(d_sae=16, options={"k": 3}, n_tokens=640, batch_size=64), TensorSource(x))
    trainer.step(x)
    before = {name: tensor.clone() for name, tensor in trainer.state()[0].items()}
    trainer.backward(x)
    after = trainer.state()[0]
    assert all(torch.equal(before[name], after[name]) for name in before | after)
    assert (trainer.n_seen, trainer.n_steps) == (64, 1)


def test_dead_counters_count_tokens():
    """Latent 0 always fires, latent 1 never, latent 2 when x > 0."""
    settings = {"d_sae": 3, "n_tokens": 10_000, "batch_size": 10, "lr": 1e-12, "normalize": "none", "dead_after": 25}
    config = sl.TrainConfig(sparsity="l1", options={"coefficient": 1.0}, **settings)
    trainer = Trainer(config, TensorSource(torch.tensor([[1.0], [-1.0]])))
    d = trainer.dictionary
    d.b_dec.data.zero_()
    d.W_enc.data.copy_(torch.tensor([[0.0, 0.0, 1.0]]))
    d.b_enc.data.copy_(torch.tensor([1.0, -1.0, 0.0]))
    up, down = torch.ones(10, 1), -torch.ones(10, 1)
    expected = [[0, 10, 0], [0, 20, 10], [0, 30, 20], [0, 40, 30], [0, 50, 0], [0, 57, 7]]
    dead = [0.0, 0.0, 1 / 3, 2 / 3, 1 / 3, 1 / 3]
    for x, since, share in zip([up, down, down, down, up, down[:7]], expected, dead, strict=True):
        trainer.step(x)
        assert trainer.since_fired.tolist() == since
        assert trainer.log_line()["dead"] == pytest.approx(share, abs=1e-6)
    assert (trainer.n_seen, trainer.n_steps) == (57, 6)


def test_the_auxiliary_loss_begins_when_latents_are_dead():
    x = torch.eye(4).repeat(10, 1)[:40]
    config = sl.TrainConfig(d_sae=32, n_tokens=200, batch_size=40, options={"k": 1}, dead_after=80, lr=1e-9, log_every=1)
    (run,) = sl.train(TensorSource(x), config)
    assert ["aux" in line for line in run.history] == [False, False, True, True, True]


def test_fit_agrees_with_train_on_a_tensor():
    x = x_like(200, 6)
    settings = {"d_sae": 16, "n_tokens": 1000, "batch_size": 50, "lr": 1e-2, "seed": 5}
    d = sl.fit(x, "topk", options={"k": 2}, **settings)
    (run,) = sl.train(TensorSource(x), sl.TrainConfig(sparsity="topk", options={"k": 2}, **settings), data_seed=5)
    assert_same_bits(d, run.dictionary)
    assert d.origin.excluded_positions == ()
    assert d.training_record["tokens"] == 1000
    assert (d.encode(x).l0 <= 2).all()


def test_fit_learns_from_fewer_rows_than_a_batch():
    x = x_like(60, 6)
    d = sl.fit(x, "l1", d_sae=16, lr=1e-2, n_tokens=600)
    start = sl.Dictionary.create("l1", reads=6, d_sae=16)
    assert not torch.allclose(
        torch.nn.functional.normalize(d.W_enc.T.detach()), torch.nn.functional.normalize(start.W_enc.T.detach())
    )


def test_fit_reduces_the_error(planted):
    x, _ = planted(2000, d_in=16, n_directions=24, active=2)
    start = sl.fit(x, d_sae=24, batch_size=100, n_tokens=100, lr=1e-12, options={"k": 2})
    d = sl.fit(x, d_sae=24, batch_size=100, n_tokens=20_000, lr=1e-2, options={"k": 2})
    assert (x - d(x)).square().mean() < 0.5 * (x - start(x)).square().mean()


def test_train_refuses_bad_requests(cache, tmp_path):
    with pytest.raises(ConfigError, match="nothing to train: give at least one TrainConfig"):
        sl.train(cache, [])
    with pytest.raises(ConfigError, match=r"need the same batch_size; found \[10, 100\]"):
        sl.train(cache, [SWEEP[0], SWEEP[1].replace(batch_size=10)], tmp_path / "run")
    sizes = [sl.TrainConfig(n_tokens=n, hook=HOOKS[0]) for n in (1_000_000, 50_000)]
    with pytest.raises(ConfigError, match=r"found \[64, 1024\], the defaults for their n_tokens; set batch_size"):
        sl.train(cache, sizes, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"several hooks; .* hook=: blocks\.1\.hook_resid_pre, blocks\.2"):
        sl.train(cache, sl.TrainConfig(), tmp_path / "run")
    with pytest.raises(HookError, match=r"has no activations of 'blocks\.0\.hook_resid_pre'"):
        sl.train(cache, sl.TrainConfig(hook="blocks.0.hook_resid_pre"), tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_fit_refuses_an_empty_tensor():
    with pytest.raises(ShapeError, match=r"x has shape \(0, 3\); expected \[n d_in\] with at least one row"):
        sl.fit(torch.zeros(0, 3), d_sae=8)


@pytest.mark.parametrize("rule", ["l1", "topk", "gated", "batch_topk", "matryoshka", "p_anneal", "group_max", "jumprelu"])
def test_calibration_makes_the_untrained_codes_fit_best(rule):
    """With the best common factor of all codes, the residual is orthogonal to the decoded codes; the support stays."""
    x = 3 + torch.randn(256, 24, generator=torch.Generator().manual_seed(1))
    options = {"coefficient": 1.0} if rule in ("l1", "gated", "p_anneal", "jumprelu") else {"k": 8}
    config = sl.TrainConfig(sparsity=rule, options=options, d_sae=96, n_tokens=2560, batch_size=256, lr=1e-12)
    trainer = Trainer(config, TensorSource(x))
    d, scaled = trainer.dictionary, x * trainer.scales[0]
    before = d.encode(scaled)
    trainer.step(x)
    d = trainer.dictionary.double()
    with torch.no_grad():
        codes = d.encode(scaled.double())
        part = codes.decode(d.W_dec)
        left = scaled.double() - d.b_dec - part
        untrained = scaled.double() - d.b_dec - before._replace(value=before.value.double()).decode(d.W_dec)
    if rule == "jumprelu":  # its threshold stays, so other pairs fire
        assert left.square().sum() < 0.7 * untrained.square().sum()
        assert len(codes.value) != len(before.value)
    else:
        assert abs(float((left * part).sum())) < 1e-4 * float(part.square().sum())
        ratio = codes.value / before.value.detach()
        assert torch.equal(codes.latent, before.latent)
        assert not 0.9 < float(ratio.mean()) < 1.1
        torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-3, atol=0)


def test_calibration_leaves_a_tied_encoder_unchanged():
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    config = sl.TrainConfig(sparsity="matching_pursuit", d_sae=16, n_tokens=640, batch_size=64, lr=1e-12)
    trainer = Trainer(config, TensorSource(x))
    before = trainer.dictionary.W_dec.detach().clone()
    trainer.step(x)
    torch.testing.assert_close(trainer.dictionary.W_dec.detach(), before, rtol=0, atol=1e-6)


def test_a_rule_that_calls_a_loss_by_the_name_of_the_sum_is_refused():
    class Summed(sl.Sparsity):
        def activation(self, pre):
            return pre.relu()

        def losses(self, step):
            return {"loss": step.codes.value.sum()}

    sl.register("summed")(Summed)
    try:
        with pytest.raises(PluginError, match=r"the rule summed calls a loss 'loss'"):
            sl.fit(torch.randn(64, 8), sparsity="summed", d_sae=16, n_tokens=64, batch_size=32)
    finally:
        registry.unregister("summed")
