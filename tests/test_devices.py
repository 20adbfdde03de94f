"""The default device, and float64 sums on devices that lack float64."""

import inspect
import logging

import pytest
import torch
from pretended_device import without_float64

import saelens_lite as sl
from saelens_lite import devices
from saelens_lite.cache import TensorSource
from saelens_lite.cache.source import Moments
from saelens_lite.errors import ConfigError
from saelens_lite.evaluation.controls import PCA, RANDOM
from saelens_lite.interventions.site import Site
from saelens_lite.training import Trainer
from saelens_lite.training.calibration import scale_encoder_

HOOK = "blocks.1.hook_resid_pre"
QUICK = {"d_sae": 16, "batch_size": 20, "n_tokens": 200, "options": {"k": 2}}


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(100, 8, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.5, 2, 8) + 1


@pytest.fixture
def here(monkeypatch):
    """here(cuda=…, mps=…, works=…): what torch says of this computer."""

    def arrange(cuda: bool = False, mps: bool = False, works: bool = True) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: int(cuda))
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(devices, "works", lambda device: works)

    return arrange


@pytest.mark.parametrize("function", [sl.load_model, sl.train, sl.resume, sl.fit])
def test_no_function_names_a_device_by_default(function):
    assert inspect.signature(function).parameters["device"].default is None


@pytest.mark.parametrize(
    ("computer", "expected"),
    [
        ({"cuda": True, "mps": True}, "cuda"),
        ({"mps": True}, "mps"),
        ({"mps": True, "works": False}, "cpu"),
        ({}, "cpu"),
    ],
)
def test_the_natural_device(here, computer, expected):
    here(**computer)
    assert devices.natural_device() == torch.device(expected)


def test_training_and_models_ask_one_function(x, monkeypatch, tmp_path):
    asked = []

    def natural() -> torch.device:
        asked.append(True)
        return torch.device("cpu")

    monkeypatch.setattr(devices, "natural_device", natural)
    for n, work in enumerate(
        (
            lambda: sl.load_model("tiny"),
            lambda: sl.train(TensorSource(x), sl.TrainConfig(**QUICK), tmp_path / "run"),
            lambda: sl.fit(x, **QUICK),
        ),
        1,
    ):
        work()
        assert len(asked) == n


def test_the_log_says_once_where_work_runs(here, caplog):
    here()
    devices._say.cache_clear()
    with caplog.at_level(logging.INFO, logger="saelens_lite"):
        devices.natural_device()
        devices.natural_device()
    assert [record.getMessage() for record in caplog.records] == ["running on cpu, because no device was named"]


def test_a_device_that_computes_something_else_does_not_work(monkeypatch, caplog):
    sample = devices._sample
    assert devices.works.__wrapped__("cpu")

    def wrong(device):
        first, *others = sample(torch.device("cpu"))
        return [first + (0.01 if device.type == "mps" else 0), *others]

    with caplog.at_level(logging.INFO, logger="saelens_lite"):
        monkeypatch.setattr(devices, "_sample", wrong)
        assert not devices.works.__wrapped__("mps")
        monkeypatch.setattr(devices, "_sample", sample)
        assert not devices.works.__wrapped__("meta")  # has no numbers at all: stands for a missing operation
    assert "its results differ from those of the CPU" in caplog.text
    assert "meta is not used: " in caplog.text


def test_devices_that_are_not_there(here, x):
    here()
    with pytest.raises(ConfigError, match=r"device = 'cuda': torch finds no such device here; leave device out to use cpu"):
        sl.fit(x, device="cuda", **QUICK)
    with pytest.raises(ConfigError, match="device = 'gpu': "):
        sl.load_model("tiny", device="gpu")
    here(mps=True, works=False)
    with pytest.raises(ConfigError, match="lacks operations on it that training needs"):
        sl.fit(x, device="mps", **QUICK)


def test_fit_returns_the_dictionary_where_x_is(x):
    """Training may run elsewhere: `fit(x).encode(x)` needs no thought of devices."""
    d = sl.fit(x, **QUICK)
    assert d.W_dec.device == x.device
    d.encode(x)


def test_the_pretended_device_refuses_float64():
    with without_float64() as device:
        x = torch.ones(3, 2, device=device)
        assert x.device.type == device
        for attempt in (
            x.double,
            lambda: x.sum(dtype=torch.float64),
            lambda: torch.zeros(1, dtype=torch.float64, device=device),
        ):
            with pytest.raises(TypeError, match="float64"):
                attempt()
        assert (x + 1).cpu().sum() == 12


def test_statistics_on_a_device_without_float64(x):
    wanted = TensorSource(x).statistics("x")
    with without_float64() as device:
        moments = Moments(8)
        moments.add(x.to(device))
    assert torch.equal(moments.statistics().mean, wanted.mean)
    assert moments.statistics().rms_norm == wanted.rms_norm


@torch.no_grad()
def test_training_sums_on_a_device_without_float64(x):
    """The scale of the untrained encoder, and the validation figures; a step itself needs no float64."""
    config = sl.TrainConfig(**QUICK)
    wanted = Trainer(config, TensorSource(x), "cpu")
    scale_encoder_(wanted.dictionary, x, and_thresholds=False)
    with without_float64() as device:
        trainer = Trainer(config, TensorSource(x), device)
        scale_encoder_(trainer.dictionary, x.to(device), and_thresholds=False)
        assert torch.equal(trainer.dictionary.W_enc.cpu(), wanted.dictionary.W_enc)
        assert trainer.validate({"x": x.to(device)}) == wanted.validate({"x": x})


def test_an_evaluation_on_a_device_without_float64(lm, documents):
    d = sl.Dictionary.create("topk", reads=sl.Port(hook=HOOK, width=lm.d_model), d_sae=32, options={"k": 4})
    how = {"text_config": sl.TextConfig(n_ctx=32), "n_tokens": 120, "n_bootstrap": 10, "controls": True}
    wanted = sl.evaluate(d, lm, documents, **how)
    with without_float64() as device:
        found = sl.evaluate(d, sl.load_model("tiny", device=device), documents, **how)
    assert d.W_dec.device.type == "cpu"  # evaluated was a copy
    compared = [(found, wanted), *((found.controls[name], wanted.controls[name]) for name in (RANDOM, PCA))]
    for a, b in compared:  # of shuffled weights not: a tied weight is two on the pretended device
        assert a.metrics.keys() == b.metrics.keys()
        for name, metric in b.metrics.items():
            assert tuple(a.metrics[name]) == pytest.approx(tuple(metric), rel=1e-4, abs=1e-6), name


def test_weights_are_centred_on_a_device_without_float64(documents):
    wanted = sl.load_model("tiny", device="cpu", center_writing_weights=True).module.state_dict()
    with without_float64() as device:
        found = sl.load_model("tiny", device=device).center_writing_weights_().module.state_dict()
        assert all(torch.equal(found[name].cpu(), value) for name, value in wanted.items())


def test_what_has_a_model_runs_on_its_device(lm, monkeypatch):
    """Dictionaries on another device are copied there; the caller's own stays where it is, and the numbers are the same."""
    text = "The old man looked at the sea, and the sea looked back at him."
    d = sl.Dictionary.create("topk", reads=sl.Port(hook=HOOK, width=lm.d_model), d_sae=32, options={"k": 4})
    seen = []
    encode = sl.Dictionary.encode

    def noted(self, x):
        seen.append(self.W_enc.device.type)
        return encode(self, x)

    monkeypatch.setattr(sl.Dictionary, "encode", noted)

    def spliced(model):
        keep = torch.ones_like(lm.to_tokens(text).tokens, dtype=torch.bool)  # new_tensor, for the default, cannot pretend
        with model.splice(d, keep=keep), torch.no_grad():
            return model.logits(text)

    uses = {
        "splice": spliced,
        "attribute, doses": lambda model: (site := Site(d, model)).read(site.rows(text)[0]).error,
        "probe": lambda model: _probed(d, model, text),
        "store": lambda model: sl.FeatureStore.build(d, model, text).tensors.top_value,
    }
    for name, use in uses.items():
        seen.clear()
        wanted = use(lm)
        assert set(seen) == {"cpu"}, name
        seen.clear()
        with without_float64() as device:
            found = use(sl.load_model("tiny", device=device)).cpu()
        assert set(seen) == {device}, name
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        assert d.W_enc.device.type == "cpu", name


def _probed(d, lm, text):
    """Return the AUC of a probe on activations."""
    texts = [f"{i} {text}" for i in range(24)]
    return torch.tensor(sl.probe(d, lm, texts, [i % 2 for i in range(24)], ks=(1,), n_bootstrap=0)["activations"].auc.value)


def test_a_stream_is_trained_on_where_its_model_is(lm, monkeypatch, tmp_path):
    monkeypatch.setattr(devices, "natural_device", lambda: pytest.fail("the model is on a device already"))
    stream = sl.ActivationStream(lm, ["The old man looked at the sea."] * 30, HOOK, buffer_tokens=64)
    (run,) = sl.train(stream, sl.TrainConfig(**QUICK), tmp_path / "run")
    assert run.dictionary.W_dec.device == lm.device


def test_comparisons_run_on_the_natural_device(monkeypatch):
    asked = []
    monkeypatch.setattr(devices, "natural_device", lambda: asked.append(True) or torch.device("cpu"))
    d = sl.Dictionary.create("topk", reads=8, d_sae=16, options={"k": 2})
    sl.compare(d, d)
    assert asked


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    devices.take_gpu.cache_clear()
    try:
        for device in (None, "cuda", "cuda:0", "cuda:1"):
            assert str(devices.chosen_device(device)) == "cuda"
    finally:
        devices.take_gpu.cache_clear()
    assert taken == [1]
