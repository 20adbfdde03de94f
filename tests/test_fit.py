"""`fit`: training on activations in memory, with settings that follow from the number of rows."""

import pytest
import torch
from sklearn.datasets import load_digits

import saelens_lite as sl
from saelens_lite.errors import ConfigError, PluginError


def rows(n: int, d_in: int = 6) -> torch.Tensor:
    return torch.randn(n, d_in, generator=torch.Generator().manual_seed(0))


def share_unexplained(d: sl.Dictionary, x: torch.Tensor) -> float:
    """Return the FVU in float64."""
    x, x_hat = x.double(), d(x).detach().double()
    return float((x - x_hat).square().sum() / (x - x.mean(0)).square().sum())


@pytest.mark.parametrize(
    ("n", "batch_size", "n_tokens"),
    [(5, 5, 100), (20, 8, 400), (1600, 32, 32_000), (5000, 100, 100_000), (300_000, 2048, 3_000_000)],
)
def test_steps_follow_the_number_of_rows(monkeypatch, n, batch_size, n_tokens):
    """At least ten passes, and up to twenty to make 1,000 steps."""
    configs = []

    def train(source, config, **settings):
        configs.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr("saelens_lite.training.fit.train", train)
    for given in ({}, {"validation_tokens": 10}):
        with pytest.raises(KeyboardInterrupt):
            sl.fit(torch.zeros(n + given.get("validation_tokens", 0), 2), **given)
        assert (configs[-1].batch_size, configs[-1].n_tokens) == (batch_size, n_tokens)
    for given in ({"batch_size": 7}, {"n_tokens": 50}):
        with pytest.raises(KeyboardInterrupt):
            sl.fit(torch.zeros(n, 2), **given)
        assert configs[-1].batch_size == given.get("batch_size", batch_size)
        assert configs[-1].n_tokens == given.get("n_tokens", min(max(7000, 10 * n), 20 * n))


def test_the_defaults_learn_a_small_dataset():
    """Of the 64 pixels of a digit, PCA needs 8 components for what 8 of 64 latents should explain at least."""
    images = torch.tensor(load_digits().data, dtype=torch.float32)
    d = sl.fit(images, d_sae=64, k=8, validation_tokens=300)
    held_out, others = images[-300:], images[:-300]
    _, _, directions = torch.linalg.svd(others - others.mean(0), full_matrices=False)
    rest = held_out - others.mean(0)
    rest = rest - rest @ directions[:8].T @ directions[:8]
    pca = float(rest.square().sum() / (held_out - held_out.mean(0)).square().sum())
    assert share_unexplained(d, held_out) < 0.8 * pca
    assert d.history[-1]["val_fvu"] == pytest.approx(share_unexplained(d, held_out), rel=1e-4)
    assert d.history[-1]["val_l0"] == pytest.approx(d.encode(held_out).l0.float().mean().item())


def test_the_history_has_the_lines_of_the_log():
    d = sl.fit(rows(90), d_sae=8, k=2, batch_size=10, n_tokens=200)
    assert [line["tokens"] for line in d.history] == list(range(10, 201, 10))
    assert sl.Dictionary.create("topk", reads=6, d_sae=8).history == []


def test_options_of_the_rule_can_be_given_directly():
    settings = {"d_sae": 8, "batch_size": 10, "n_tokens": 50}
    direct, in_options = sl.fit(rows(50), k=3, **settings), sl.fit(rows(50), options={"k": 3}, **settings)
    assert torch.equal(direct.W_dec, in_options.W_dec)
    both = sl.fit(rows(50), k=3, options={"aux_k": 2}, **settings)
    assert (both.rule.config.k, both.rule.config.aux_k) == (3, 2)
    assert sl.fit(rows(50), "l1", coefficient=0.5, **settings).rule.config.coefficient == 0.5


class Unread:
    """Data that must not be read."""

    def __array__(self, *args, **kwargs):
        raise AssertionError("the data were read")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"kk": 3}, ConfigError, r"unknown key 'kk'; did you mean k\? It is neither .* option of topk, which has .*k"),
        (
            {"batchsize": 3},
            ConfigError,
            r"unknown key 'batchsize'; did you mean batch_size\? It is neither a field of TrainConfig",
        ),
        (
            {"sparsity": "l1", "k": 3},
            ConfigError,
            r"unknown key 'k'; it is neither .* nor an option of l1, which has coefficient",
        ),
        ({"k": 3, "options": {"k": 4}}, ConfigError, r"k is given twice: k=3 and options=\{'k': 4\}"),
        ({"k": 0}, ConfigError, "k = 0: input should be greater than 0"),
        ({"options": {"k": "many"}}, ConfigError, "k = 'many'"),
        ({"n_tokens": -1}, ConfigError, "n_tokens = -1"),
        ({"sparsity": "topkk"}, PluginError, "did you mean topk"),
    ],
)
def test_bad_settings_are_refused_before_the_data_are_read(settings, error, message):
    with pytest.raises(error, match=message):
        sl.fit(Unread(), **settings)


def test_too_many_rows_to_validate_on():
    with pytest.raises(ConfigError, match="20 activations to validate on: there are 20"):
        sl.fit(rows(20), d_sae=8, k=2, validation_tokens=20)
