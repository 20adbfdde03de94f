"""Warnings about settings that train badly are logged once, and only then."""

import pytest
import torch

import saelens_lite as sl
from saelens_lite.cache.source import TensorSource
from saelens_lite.training.advice import warn_of_l0


@pytest.mark.parametrize(("n_tokens", "is_said"), [(640, False), (704, True)])
def test_many_passes_over_few_activations_are_mentioned_once(n_tokens, is_said, caplog):
    source = TensorSource({"x": torch.randn(32, 8, generator=torch.Generator().manual_seed(0))})
    config = sl.TrainConfig(hook="x", d_sae=16, batch_size=32, n_tokens=n_tokens, options={"k": 2})
    sl.train(source, [config, config.replace(seed=1)])
    said = [record.getMessage() for record in caplog.records if "passes" in record.getMessage()]
    assert len(said) == is_said
    if is_said:
        assert said[0].startswith("training on 704 tokens passes 22 times over the 32 activations there are; capture more text")


@pytest.mark.parametrize(("d_sae", "l0", "is_said"), [(512, 52.0, True), (512, 51.0, False), (256, 100.0, False)])
def test_a_dictionary_that_is_not_sparse_is_mentioned(d_sae, l0, is_said, caplog):
    warn_of_l0("runs/a", sl.Dictionary.create("topk", reads=4, d_sae=d_sae), {"l0": l0})
    assert ("more than a tenth of the 512 latents, so the dictionary is not sparse" in caplog.text) is is_said


@pytest.mark.parametrize("rule", ["l1", "jumprelu"])
@pytest.mark.parametrize(("l0", "is_said"), [(22.1, True), (21.9, False), (18.1, False), (17.9, True)])
def test_a_missed_target_is_mentioned_by_the_rows_not_trained_on(rule, l0, is_said, caplog):
    d = sl.Dictionary.create(rule, reads=4, d_sae=1024, options={"target_l0": 20})
    warn_of_l0("runs/a", d, {"l0": 20.0, "val_l0": l0})
    assert (f"runs/a: L0 is {l0}, but target_l0 is 20" in caplog.text) is is_said


def test_a_rule_without_a_target_misses_none(caplog):
    warn_of_l0("runs/a", sl.Dictionary.create("l1", reads=4, d_sae=1024, options={"coefficient": 1}), {"l0": 3.0})
    assert not caplog.text
