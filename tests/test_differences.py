"""Dictionaries of the difference between two models, made from a source that has the activations of both."""

import logging
import re

import pytest
import torch

import saelens_lite as sl
from saelens_lite.cache import TensorSource, with_differences
from saelens_lite.cache.difference import SAMPLE, DifferenceSource, rounding_variance
from saelens_lite.errors import ConfigError, HookError

HOOK, WIDTH = "blocks.2.hook_resid_pre", 12
BASE, CHAT, DIFFERENCE = f"base:{HOOK}", f"chat:{HOOK}", f"chat-base:{HOOK}"


def parts(n: int = 900, change: float = 0.3, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return activations of two models, of which the second is the first plus a small change."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(n, WIDTH, generator=generator, dtype=torch.float64) * 3 + 1
    moved = base + change * (torch.randn(n, WIDTH, generator=generator, dtype=torch.float64) + 0.5)
    return {BASE: base.to(dtype), CHAT: moved.to(dtype)}


def config(**changes) -> sl.TrainConfig:
    usual = {"hook": DIFFERENCE, "sparsity": "batch_topk", "options": {"k": 3}, "d_sae": 24, "n_tokens": 3000, "batch_size": 60}
    return sl.TrainConfig(**usual | changes)


def same_bytes(one: sl.Dictionary, other: sl.Dictionary) -> bool:
    return all(torch.equal(x, other.state_dict()[name]) for name, x in one.state_dict().items())


def test_a_difference_trains_like_the_subtracted_tensor_to_the_byte():
    both = parts()
    (run,) = sl.train(TensorSource(both), config())
    (wanted,) = sl.train(TensorSource({DIFFERENCE: both[CHAT] - both[BASE]}), config())
    assert run.dictionary.reads == (sl.Port(hook=HOOK, width=WIDTH, model="chat", minus="base"),)
    assert same_bytes(run.dictionary, wanted.dictionary)
    assert run.history[-1]["fvu"] == wanted.history[-1]["fvu"]


def test_a_sweep_holds_differences_and_crosscoders_of_the_same_batches():
    both = parts()
    configs = [config(), config(hook=None, reads=(BASE, CHAT)), config(hook=f"base-chat:{HOOK}"), config(hook=CHAT)]
    together = sl.train(TensorSource(both), configs)
    for one, settings in zip(together, configs, strict=True):
        (alone,) = sl.train(TensorSource(both), settings)
        assert same_bytes(one.dictionary, alone.dictionary)
    assert not torch.equal(together[0].dictionary.b_dec, together[2].dictionary.b_dec)


def test_statistics_are_exact_for_few_activations_and_of_a_fixed_sample_for_many(monkeypatch, caplog):
    both = parts(5000)
    exact = (both[CHAT] - both[BASE]).double()
    source = DifferenceSource(TensorSource(both))
    mean, rms = source.statistics(DIFFERENCE)
    torch.testing.assert_close(mean.double(), exact.mean(0), rtol=1e-5, atol=1e-6)
    assert rms == pytest.approx(float(exact.square().sum(1).mean().sqrt()), rel=1e-6)
    assert len(exact) <= SAMPLE
    monkeypatch.setattr("saelens_lite.cache.difference.SAMPLE", 1000)
    monkeypatch.setattr("saelens_lite.cache.difference.SAMPLE_BATCH", 300)
    with caplog.at_level(logging.INFO):
        sampled = DifferenceSource(TensorSource(both)).statistics(DIFFERENCE)
    assert sampled.rms_norm != rms
    assert sampled.rms_norm == pytest.approx(rms, rel=0.05)
    assert torch.equal(sampled.mean, DifferenceSource(TensorSource(both)).statistics(DIFFERENCE).mean)
    assert "are of 1,000 of 5,000 activations" in caplog.text


def test_held_out_activations_have_the_differences():
    both = parts()
    held, rest = with_differences(TensorSource(both), [DIFFERENCE]).hold_out(100)
    assert torch.equal(held.x[DIFFERENCE], (both[CHAT] - both[BASE])[-100:])
    assert (rest.n_tokens, list(rest.hooks)) == (800, [BASE, CHAT])
    (run,) = sl.train(TensorSource(both), config(), validation_tokens=100)
    assert 0 < run.history[-1]["val_fvu"] < 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [3.0, 1000.0, 2e-5])
def test_the_variance_of_rounding_is_that_of_a_float64_truth(dtype, scale):
    exact = torch.randn(20_000, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * scale
    stored = exact.to(dtype)
    wanted = float((stored.double() - exact).square().sum())
    assert rounding_variance(stored) == pytest.approx(wanted, rel=0.03)
    assert rounding_variance(stored.float(), computed_in=dtype) == pytest.approx(wanted, rel=0.03) or scale == 2e-5


def test_zeros_are_exact():
    assert rounding_variance(torch.zeros(5, 3, dtype=torch.float16)) == 0


@pytest.mark.parametrize(("dtype", "change"), [(torch.float16, 0.006), (torch.bfloat16, 0.05)])
def test_a_difference_that_is_partly_rounding_is_reported(dtype, change, caplog):
    exact, stored = parts(4000, change, torch.float64), parts(4000, change, dtype)
    errors = [(both[CHAT].double() - both[BASE].double()) for both in (stored, exact)]
    noise, made = errors[0] - errors[1], errors[0] - errors[0].mean(0)
    share = 100 * float(noise.square().sum() / made.square().sum())
    assert 1 < share < 50
    sl.train(TensorSource(stored), config(n_tokens=60))
    said = re.search(r"makes about ([\d.]+) % of the variance of chat-base:.*capture with dtype='float32'", caplog.text)
    assert float(said[1]) == pytest.approx(share, rel=0.1)
    caplog.clear()
    sl.train(TensorSource(parts(4000, change)), config(n_tokens=60))
    assert "rounding" not in caplog.text


def test_a_difference_that_is_mostly_rounding_is_refused():
    with pytest.raises(ConfigError, match=r"chat-base:.* is mostly rounding.*float32"):
        sl.train(TensorSource(parts(change=1e-3, dtype=torch.bfloat16)), config())


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({CHAT: torch.ones(9, 4)}, f"activations of {CHAT}, not of '{BASE}'"),
        ({CHAT: torch.ones(9, 4), BASE: torch.ones(9, 5)}, "has the width 4, and 'base:.*' 5"),
    ],
)
def test_a_difference_without_two_parts_of_one_width_is_refused(tensors, reason):
    with pytest.raises(HookError, match=reason):
        sl.train(TensorSource(tensors), config())


def test_other_sources_stay_as_they_are():
    source = TensorSource(parts() | {DIFFERENCE: torch.ones(900, 3)})
    assert with_differences(source, [BASE, CHAT, DIFFERENCE]) is source
