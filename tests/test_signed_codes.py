"""Codes are never negative, and all that counts firing latents counts the same."""

import pytest
import torch

import saelens_lite as sl
from saelens_lite import registry
from saelens_lite.cache import TensorSource
from saelens_lite.codes import SparseCodes
from saelens_lite.errors import PluginError
from saelens_lite.evaluation.metrics import Kept, add_codes
from saelens_lite.evaluation.sums import PooledSums
from saelens_lite.sparsity import register, support_of_mask
from saelens_lite.training import Trainer

NEGATIVE = r"sparsity rule signed_of_tests gave a negative code \(-\d.*\)\. Codes must be ≥ 0, .*\.relu\(\)"


@pytest.fixture
def signed():
    """A rule whose codes have a sign, by its activation and by its values."""

    @register("signed_of_tests")
    class Signed(sl.Sparsity):
        def activation(self, pre):
            return pre * (pre.abs() > 1)

        def support(self, pre):
            return support_of_mask(pre.abs() > 1)

        def values(self, pre, latent):
            return pre

    yield "signed_of_tests"
    registry.unregister("signed_of_tests")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("training", [True, False])
def test_a_dictionary_refuses_to_give_negative_codes(signed, training):
    d = sl.Dictionary.create(signed, reads=8, d_sae=32).train(training)
    with pytest.raises(PluginError, match=NEGATIVE):
        d.encode(normal(20, 8))
    with pytest.raises(PluginError, match=NEGATIVE):
        d(normal(20, 8))
    d.b_enc.data.fill_(100)
    assert (d.encode(normal(20, 8)).l0 == 32).all()


def test_training_refuses_negative_codes_and_leaves_the_parameters(signed, monkeypatch):
    monkeypatch.setattr("saelens_lite.training.trainer.scale_encoder_", lambda *_, **__: None)  # which encodes
    x = normal(64, 8)
    trainer = Trainer(sl.TrainConfig(sparsity=signed, d_sae=32, batch_size=64, n_tokens=640), TensorSource(x))
    before = {name: p.clone() for name, p in trainer.dictionary.state_dict().items()}
    with pytest.raises(PluginError, match=NEGATIVE):
        trainer.step(x)
    assert all(torch.equal(p, before[name]) for name, p in trainer.dictionary.state_dict().items())
    with pytest.raises(PluginError, match=NEGATIVE):
        sl.fit(x, signed, d_sae=32, n_tokens=640, batch_size=64)


def test_a_code_of_nan_fires_and_is_not_dropped():
    codes = SparseCodes.from_dense(torch.ones(1, 3))._replace(value=torch.tensor([0.0, torch.nan, 1.0]))
    assert codes.l0.tolist() == [2]
    assert codes.without_zeros().latent.tolist() == [1, 2]
    d = sl.Dictionary.create("topk", reads=4, d_sae=4, options={"k": 4})
    d.b_enc.data[1] = torch.nan
    assert d.encode(torch.ones(2, 4)).value.isnan().sum() == 2


def test_evaluation_does_not_count_stored_zeros():
    acts = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 4.0], [0.0, 0.0, 0.0], [5.0, 6.0, 7.0]])
    codes = SparseCodes.from_dense(torch.ones(4, 3))._replace(value=acts.flatten())
    kept = Kept.of(torch.ones(2, 2, dtype=torch.bool))
    both = []
    for given in (codes, codes.without_zeros()):
        sums = PooledSums(n_bootstrap=0, seed=0, n_units=2)
        sums.weigh(torch.arange(2))
        add_codes(sums, "d", given, kept)
        both.append({"l0": sums["d.l0"], "l1": sums["d.l1"], "fired": sums.fired("d")})
    assert both[0]["l0"].flatten()[0] == 7
    assert both[0]["fired"][:, 0].tolist() == [2, 2, 3]
    assert all(torch.equal(both[0][name], both[1][name]) for name in both[0])


def test_evaluation_and_store_count_the_same_below_a_threshold_of_zero(lm):
    hook, text = "blocks.2.hook_resid_pre", "python-docs:held-out"
    d = sl.Dictionary.create("jumprelu", reads=sl.Port(hook=hook, width=lm.d_model), d_sae=256, options={"parameter": "plain"})
    d.rule.plain_threshold.data.copy_(torch.linspace(-3, 3, 256))
    report = sl.evaluate(d, lm, text, n_tokens=2000)
    store = sl.FeatureStore.build(d, lm, text, n_tokens=2000)
    assert float(store.density.sum()) == pytest.approx(report["l0"], rel=1e-6)
    assert report["l0"] > 1
