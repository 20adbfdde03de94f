"""Warnings about settings that train badly are logged once, and only then."""

import pytest
import torch

import saelens_lite as sl
from saelens_lite.cache.source import TensorSource


@pytest.mark.parametrize(("n_tokens", "is_said"), [(640, False), (704, True)])
def test_many_passes_over_few_activations_are_mentioned_once(n_tokens, is_said, caplog):
    source = TensorSource({"x": torch.randn(32, 8, generator=torch.Generator().manual_seed(0))})
    config = sl.TrainConfig(hook="x", d_sae=16, batch_size=32, n_tokens=n_tokens, options={"k": 2})
    sl.train(source, [config, config.replace(seed=1)])
    said = [record.getMessage() for record in caplog.records if "passes" in record.getMessage()]
    assert len(said) == is_said
    if is_said:
        assert said[0].startswith("training on 704 tokens passes 22 times over the 32 activations there are; capture more text")
