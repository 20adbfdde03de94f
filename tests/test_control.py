"""Rules with a penalty reach a target L0, because the trainer adjusts the coefficient."""

import math

import pytest
import torch

import saelens_lite as sl
from saelens_lite.cache import TensorSource
from saelens_lite.errors import ConfigError, PluginError
from saelens_lite.training.control import L0Control
from saelens_lite.training.trainer import Trainer

PENALISED = ["l1", "gated", "p_anneal"]


def a_trainer(rule: str, x: torch.Tensor, **settings) -> Trainer:
    config = {"d_sae": 128, "n_tokens": 20_000, "batch_size": 100, "options": {"target_l0": 4.0}} | settings
    return Trainer(sl.TrainConfig(sparsity=rule, **config), TensorSource(x))


@pytest.mark.parametrize("target", [2.0, 10.0])
@pytest.mark.parametrize("rule", [*PENALISED, "jumprelu"])
def test_the_target_is_reached_on_activations_not_trained_on(planted, rule, target):
    x, _ = planted(30_000)
    d = sl.fit(x[:28_000], rule, options={"target_l0": target}, d_sae=128, n_tokens=28_000, batch_size=100)
    assert d.encode(x[28_000:]).l0.float().mean() == pytest.approx(target, rel=0.1)


@pytest.mark.parametrize("rule", PENALISED)
def test_the_coefficient_rises_when_too_many_latents_fire_and_falls_when_too_few_do(rule):
    control = L0Control(2.0, 10.0, torch.device("cpu"))
    assert control.coefficient == pytest.approx(2)
    for l0, grows in ((40.0, True), (2.0, False)):
        control.update(torch.tensor(10.0), 1.0, 1000, is_late=False)
        before = float(control.coefficient)
        for _ in range(20):
            assert control.update(torch.tensor(l0), 1.0, 1000, is_late=False) == 0
        assert (float(control.coefficient) > before) is grows


def test_the_integral_of_a_constant_error_is_its_formula():
    """ln λ = ln λ0 + 60 · r · e · share of the training, where L0 stays e^0.1 times the target."""
    control = L0Control(0.5, 8.0, torch.device("cpu"))
    for _ in range(100):
        control.update(torch.tensor(8 * math.exp(0.1)), 0.5, 400, is_late=False)
    assert float(control.state[0]) == pytest.approx(math.log(0.5) + 60 * 0.5 * 0.1 * 100 / 400, rel=1e-5)


def test_one_step_of_a_short_training_changes_the_coefficient_by_at_most_e():
    control = L0Control(2.0, 10.0, torch.device("cpu"))
    control.update(torch.tensor(1000.0), 1.0, 5, is_late=False)
    assert float(control.coefficient) == pytest.approx(2 * math.e)


def test_the_coefficient_stays_within_a_factor_of_20():
    control = L0Control(2.0, 10.0, torch.device("cpu"))
    for l0, end in ((1000.0, 40.0), (0.0, 0.1)):
        for _ in range(50):
            control.update(torch.tensor(l0), 1.0, 10, is_late=False)
        assert float(control.coefficient) == pytest.approx(end)


def test_late_in_training_thresholds_are_raised_while_the_learning_rate_falls():
    control = L0Control(2.0, 10.0, torch.device("cpu"))
    control.update(torch.tensor(10.0 * math.exp(0.5)), 1.0, 1000, is_late=True)
    assert float(control.update(torch.tensor(10.0 * math.exp(0.5)), 1.0, 1000, is_late=True)) == 0
    assert float(control.update(torch.tensor(10.0 * math.exp(0.5)), 0.4, 1000, is_late=True)) == pytest.approx(
        0.06 * 0.5, rel=1e-5
    )
    assert float(control.update(torch.tensor(10.0 * math.exp(0.5)), 0.4, 1000, is_late=False)) == 0


@pytest.mark.parametrize("rule", PENALISED)
def test_a_bad_batch_read_later_leaves_the_thresholds(planted, rule):
    """As on a GPU, where the host learns of a bad step only later."""
    x, _ = planted(2_000)
    trainer = a_trainer(rule, x, n_tokens=1_000)
    trainer.reads_later = True
    for batch in x[:800].split(100):
        trainer.step(batch)
    trainer.check()
    before = {name: value.clone() for name, value in trainer.dictionary.state_dict().items()}
    bad = x[800:900].clone()
    bad[3, 2] = math.inf
    trainer.step(bad)
    torch.testing.assert_close(dict(trainer.dictionary.state_dict()), before)


@pytest.mark.parametrize("rule", PENALISED)
def test_batches_of_one_row_train(planted, rule):
    x, _ = planted(64)
    d = sl.fit(x, rule, options={"target_l0": 4.0}, d_sae=32, n_tokens=20, batch_size=1)
    assert d.not_finite() is None


def test_a_rule_without_an_encoder_bias_must_raise_thresholds_itself():
    class Unbiased(sl.Sparsity):
        encoder_bias = False
        Config = sl.PenaltyConfig
        plugin_name = "unbiased"

        def activation(self, pre):
            return pre.relu()

    rule = Unbiased(sl.PenaltyConfig(), d_in=4, d_sae=8)
    with pytest.raises(PluginError, match=r"the sparsity rule unbiased has no encoder bias; .* must define raise_thresholds_"):
        rule.raise_thresholds_(sl.Dictionary(rule, reads=4, d_sae=8), torch.ones(8))


def test_nothing_changes_after_a_bad_step():
    control = L0Control(2.0, 10.0, torch.device("cpu"))
    control.update(torch.tensor(20.0), 0.5, 1000, is_late=True)
    before = control.state.clone()
    assert control.update(torch.tensor(math.nan), 0.5, 1000, is_late=True, stopped=torch.tensor(True)) == 0
    assert torch.equal(control.state, before)


@pytest.mark.parametrize("rule", PENALISED)
def test_raised_thresholds_are_those_above_which_latents_fire(rule):
    """With an exponential excess of mean m, raising thresholds by u · m leaves exp(−u) of the firing pairs."""
    d = sl.Dictionary.create(rule, reads=4, d_sae=6)
    pre = torch.empty(200_000, 6).exponential_(0.5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        bias = d.b_enc if d.b_enc is not None else d.rule.b_gate
        codes = sl.SparseCodes.from_dense(d.rule.activation(pre))
        excess = d.rule.excess(codes)
        d.rule.raise_thresholds_(d, 0.7 * excess.expand(6))
        fires = d.rule.activation(pre + bias if rule != "gated" else pre) > 0
    assert float(excess) == pytest.approx(2, rel=0.01)
    torch.testing.assert_close(bias.detach(), (-0.7 * excess).expand(6))
    assert float(fires.float().mean()) == pytest.approx(math.exp(-0.7), rel=0.01)


@pytest.mark.parametrize("rule", PENALISED)
def test_the_untrained_dictionary_fires_as_often_as_the_target_says(rule):
    x = 3 + torch.randn(500, 24, generator=torch.Generator().manual_seed(1))
    trainer = a_trainer(rule, x, lr=1e-12, options={"target_l0": 7.0})
    trainer.calibrate(x)
    d, scaled = trainer.dictionary, x * trainer.scales[0]
    codes = d.encode(scaled)
    assert float(codes.l0.float().mean()) == pytest.approx(7, abs=0.01)
    left = (scaled - d.decode(codes)).detach()
    part = codes.decode(d.W_dec).detach()
    assert abs(float((left * part).sum())) < 1e-4 * float(part.square().sum())  # no common factor of the codes would be better


@pytest.mark.parametrize("rule", PENALISED)
def test_the_state_of_the_control_is_part_of_a_checkpoint(planted, rule):
    x, _ = planted(4_000)
    whole, first, second = (a_trainer(rule, x) for _ in range(3))
    batches = x.split(100)
    for batch in batches:
        whole.step(batch)
    for batch in batches[:25]:
        first.step(batch)
    second.restore(*first.state())
    for batch in batches[25:]:
        second.step(batch)
    assert torch.equal(second.control.state, whole.control.state)
    assert torch.equal(second.dictionary.W_dec, whole.dictionary.W_dec)
    assert whole.log_line()["coefficient"] == pytest.approx(float(whole.control.coefficient), abs=1e-6)


@pytest.mark.parametrize("rule", PENALISED)
def test_a_coefficient_without_a_target_stays(planted, rule):
    x, _ = planted(1_000)
    trainer = a_trainer(rule, x, options={"coefficient": 2.0})
    trainer.step(x[:100])
    assert trainer.control is None
    assert "coefficient" not in trainer.log_line()


@pytest.mark.parametrize("rule", PENALISED)
def test_an_option_that_contradicts_another_is_refused(rule):
    with pytest.raises(ConfigError, match="a coefficient of 0 cannot be adjusted to reach target_l0"):
        sl.Dictionary.create(rule, reads=4, d_sae=8, options={"coefficient": 0, "target_l0": 5})
    with pytest.raises(ConfigError, match="penalty tanh does not aim at target_l0"):
        sl.Dictionary.create("jumprelu", reads=4, d_sae=8, options={"penalty": "tanh", "target_l0": 5})
    with pytest.raises(ConfigError, match="penalty l0 does not aim at target_l0"):
        sl.Dictionary.create("jumprelu", reads=4, d_sae=8, options={"penalty": "l0", "coefficient": 1, "target_l0": 5})
