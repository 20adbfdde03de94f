"""The number type of a model: what is loaded, TF32 products of its forward passes alone, and what is recorded of it."""

import json
import logging
import threading

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import saelens_lite as sl
from saelens_lite import devices
from saelens_lite.cache import TensorSource
from saelens_lite.devices import MATMUL, float32_products, outside_models, tf32_is_on
from saelens_lite.errors import ConfigError
from saelens_lite.evaluation.metrics import Kept, Predictions
from saelens_lite.hub.card import CARD_FILE, card_files
from saelens_lite.model import language_model, loading
from saelens_lite.training import Trainer

HOOK = "blocks.1.hook_resid_pre"
TEXT = "The old man looked at the sea, and the sea looked back at him."


def flags() -> list:
    """Return all that torch says of float32 products on CUDA, by the old names and the new ones."""
    found = []
    for ask in (lambda: MATMUL.allow_tf32, torch.get_float32_matmul_precision, lambda: getattr(MATMUL, "fp32_precision", None)):
        try:
            found.append(ask())
        except RuntimeError:  # the names contradict each other
            found.append("contradiction")
    return found


SETTINGS = {
    "none": lambda: None,
    "old name": lambda: setattr(MATMUL, "allow_tf32", True),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "new name": lambda: setattr(MATMUL, "fp32_precision", "tf32"),
    "new name, exact": lambda: setattr(MATMUL, "fp32_precision", "ieee"),
}


@pytest.fixture(autouse=True)
def torch_as_it_was():
    yield
    torch.set_float32_matmul_precision("highest")
    if hasattr(MATMUL, "fp32_precision"):
        MATMUL.fp32_precision = "none"
        torch.backends.mkldnn.matmul.fp32_precision = "none"


@pytest.fixture
def loads_on_cuda(monkeypatch):
    """Models are loaded as if to CUDA, but stay on the CPU."""
    from transformers import PreTrainedModel

    monkeypatch.setattr(loading, "chosen_device", lambda device: torch.device("cuda"))
    monkeypatch.setattr(PreTrainedModel, "to", lambda self, *_: self)


@pytest.fixture
def on_cuda(random_lm, monkeypatch):
    """The small random model, which says that it is on CUDA."""
    monkeypatch.setattr(sl.LanguageModel, "device", torch.device("cuda"))
    monkeypatch.setattr(random_lm, "tf32", None)
    return random_lm


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("tf32", [True, False, None])
def test_the_flag_holds_in_the_block_and_is_put_back(setting, tf32):
    SETTINGS[setting]()
    before, was_on = flags(), tf32_is_on()
    with float32_products(tf32):
        assert tf32_is_on() == (was_on if tf32 is None else tf32)
        with outside_models():
            assert tf32_is_on() == was_on
            with float32_products(True):
                assert tf32_is_on()
            assert tf32_is_on() == was_on
        assert tf32_is_on() == (was_on if tf32 is None else tf32)
    assert flags() == before


def test_old_and_new_names_agree_while_a_model_runs():
    """Else torch refuses to compute some products."""
    with float32_products(True):
        assert "contradiction" not in flags()


def test_the_flag_is_put_back_after_an_error():
    with pytest.raises(KeyError), float32_products(True):
        raise KeyError
    assert not tf32_is_on()


def test_products_of_another_thread_wait_for_a_model():
    found, inside, may_end = [], threading.Event(), threading.Event()

    def run_model():
        with float32_products(True):
            inside.set()
            may_end.wait(10)

    def train():
        with outside_models():
            found.append(tf32_is_on())

    model, training = threading.Thread(target=run_model), threading.Thread(target=train)
    model.start()
    inside.wait(10)
    training.start()
    training.join(0.2)  # long enough to read the flag, were it not for the lock
    may_end.set()
    model.join()
    training.join()
    assert found == [False]


def test_tf32_is_for_forward_passes_alone(random_lm, monkeypatch):
    monkeypatch.setattr(random_lm, "tf32", True)
    assert random_lm.is_causal  # tested in float32
    assert random_lm.has_usable_cache
    found = []

    def noted(x):
        found.append(("replacement", tf32_is_on()))
        return x

    handle = random_lm.module.transformer.h[0].register_forward_hook(lambda *_: found.append(("block", tf32_is_on())))
    d = sl.Dictionary.create("topk", reads=sl.Port(hook=HOOK, width=48), d_sae=64, options={"k": 4})
    monkeypatch.setattr(type(d.rule), "encode", _noting(type(d.rule).encode, found))
    try:
        random_lm.run(TEXT, HOOK)
        with random_lm.replace(HOOK, noted):
            random_lm.logits(TEXT)
        with random_lm.splice(d):
            random_lm.logits(TEXT)
        random_lm.generate("The", 2)
    finally:
        handle.remove()
    assert set(found) == {("block", True), ("replacement", False), ("codes", False)}
    assert not tf32_is_on()


def _noting(encode, found):
    def noted(self, encoder):
        found.append(("codes", tf32_is_on()))
        return encode(self, encoder)

    return noted


def test_training_has_products_of_its_own(monkeypatch):
    x = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    config = sl.TrainConfig(d_sae=16, batch_size=20, n_tokens=200, options={"k": 2})
    trainer = Trainer(config, TensorSource(x))
    found = []
    monkeypatch.setattr(type(trainer.dictionary.rule), "support", _noting_support(trainer.dictionary.rule, found))
    with float32_products(True):
        trainer.step(x[:20])
        trainer.validate({"x": x})
    assert found
    assert not any(found)


def _noting_support(rule, found):
    support = type(rule).support

    def noted(self, pre):
        found.append(tf32_is_on())
        return support(self, pre)

    return noted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_cuda_a_model_keeps_the_type_of_its_checkpoint(random_lm, loads_on_cuda, tmp_path, dtype):
    sl.load_model("tiny", dtype=dtype).module.save_pretrained(tmp_path)
    assert {x.dtype for x in load_file(tmp_path / "model.safetensors").values()} == {dtype}
    lm = sl.load_model(tmp_path)
    assert lm.dtype == dtype
    assert lm.tf32 == (True if dtype == torch.float32 else None)
    exact = sl.load_model(tmp_path, dtype="float32")
    assert (exact.dtype, exact.tf32) == (torch.float32, False)


def test_elsewhere_a_model_is_float32(lm):
    auto, named = sl.load_model("tiny", device="cpu"), sl.load_model("tiny", device="cpu", dtype="float32")
    for one in (auto, named):
        assert (one.dtype, one.tf32, one.precision) == (torch.float32, None, "float32")
        assert one.fingerprint() == lm.fingerprint()


@pytest.mark.parametrize("dtype", ["float8", "half", torch.int8, ""])
def test_other_types_are_refused(dtype):
    with pytest.raises(ConfigError, match=r"expected auto, float32, float16, bfloat16"):
        sl.load_model("tiny", device="cpu", dtype=dtype)


@pytest.mark.parametrize(
    ("tf32", "setting", "precision"),
    [(True, "none", "tf32"), (False, "high", "float32"), (None, "high", "tf32"), (None, "none", "float32")],
)
def test_the_precision_of_a_model_on_cuda(on_cuda, tf32, setting, precision):
    SETTINGS[setting]()
    on_cuda.tf32 = tf32
    assert on_cuda.precision == precision


def test_a_stream_of_a_model_with_tf32_is_reopened_with_it(loads_on_cuda, tmp_path):
    sl.load_model("tiny", dtype="float32").module.save_pretrained(tmp_path)
    sl.load_model("tiny").text_tokenizer.save_pretrained(tmp_path)
    for dtype, tf32 in (("auto", True), ("float32", False)):
        stream = sl.ActivationStream(sl.load_model(tmp_path, dtype=dtype), "python-docs", HOOK, buffer_tokens=64)
        assert sl.ActivationStream.reopen(stream.describe()).lm.tf32 is tf32


@pytest.fixture(scope="module")
def half_lm():
    return sl.load_model("tiny", device="cpu", dtype="bfloat16")


@pytest.fixture(scope="module")
def captured(half_lm, tmp_path_factory):
    """A cache of a bfloat16 model, and a dictionary trained on it."""
    folder = tmp_path_factory.mktemp("half")
    cache = sl.capture(half_lm, TEXT, HOOK, folder / "cache", n_ctx=16)
    config = sl.TrainConfig(d_sae=16, batch_size=4, n_tokens=16, options={"k": 2})
    return cache, sl.train(cache, config, folder / "run", device="cpu")[0]


def test_a_cache_and_a_dictionary_record_a_type_other_than_float32(captured, cache):
    half, run = captured
    assert half.origin(HOOK).precision == run.dictionary.origin.precision == "bfloat16"
    assert sl.load(run.folder / "dictionary").origin.precision == "bfloat16"
    assert cache.origin(HOOK).precision is None
    assert "precision" not in cache.manifest["origin"]
    assert "in bfloat16." in card_files(run.folder / "dictionary", run.dictionary)[CARD_FILE].decode()


def test_inspect_shows_the_type(captured, command):
    half, run = captured
    assert json.loads(command("inspect", half.path).out)["origin"]["precision"] == "bfloat16"
    ours = json.loads(command("inspect", run.folder).out)["metadata"]["saelens_lite"]
    assert ours["origin"]["precision"] == "bfloat16"


@pytest.mark.parametrize("use", ["evaluate", "store"])
def test_a_model_of_another_type_is_mentioned_once(captured, lm, caplog, use):
    language_model._say_precision.cache_clear()
    _, run = captured
    for _ in range(2):
        if use == "evaluate":
            sl.evaluate(run.dictionary, lm, TEXT, n_bootstrap=0)
        else:
            sl.FeatureStore.build(run.dictionary, lm, TEXT)
    said = [r for r in caplog.records if "numbers will differ slightly" in r.getMessage()]
    assert [r.levelno for r in said] == [logging.WARNING]
    assert (
        said[0].getMessage().startswith("tiny computes in float32, but the dictionary was trained on activations in bfloat16")
    )


@pytest.mark.parametrize(
    ("trained_on", "is_said"),
    [("gpt2", True), ("tiny", False), ("somebody/tiny", False), ("/models/tiny/", False), (None, False)],
)
def test_a_model_of_another_name_is_mentioned_once(lm, trained_on, is_said, caplog):
    """The width fits, so nothing else can tell."""
    language_model._say_model.cache_clear()
    reads = sl.Port(hook=HOOK, width=lm.d_model)
    d = sl.Dictionary.create("topk", reads=reads, d_sae=16, options={"k": 4}, origin=sl.Origin(model=trained_on))
    for _ in range(2):
        with lm.splice(d):
            pass
        sl.attribute(d, lm, TEXT[:40], ablation=False)
    said = [r.getMessage() for r in caplog.records if "this model is called" in r.getMessage()]
    assert (
        said
        == ["the dictionary was trained on gpt2, but this model is called tiny; on another model its numbers mean little"]
        * is_said
    )


def test_a_model_of_the_same_type_is_not_mentioned(captured, half_lm, caplog):
    language_model._say_precision.cache_clear()
    sl.evaluate(captured[1].dictionary, half_lm, TEXT, n_bootstrap=0)
    assert "differ slightly" not in caplog.text


def test_metrics_of_predictions_are_exact_for_logits_in_bfloat16():
    generator = torch.Generator().manual_seed(0)
    clean, new = ((3 * torch.randn(2, 5, 300, generator=generator)).bfloat16() for _ in range(2))
    tokens = torch.randint(300, (2, 5), generator=generator)
    predictions = Predictions.of(clean.clone(), tokens, torch.tensor([5, 5]), Kept.of(torch.ones(2, 5, dtype=torch.bool)))
    p, q = clean.double().log_softmax(-1), new.double().log_softmax(-1)
    target = tokens.roll(-1, 1)
    target[:, -1] = -100  # the last token has no next one
    wanted = [F.nll_loss(log.flatten(0, 1), target.flatten(), reduction="none") for log in (p, q)]
    cross_entropy, kl = predictions.losses(new)
    torch.testing.assert_close(predictions.clean_losses(), wanted[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(cross_entropy, wanted[1], rtol=1e-5, atol=0)
    torch.testing.assert_close(kl, (p.exp() * (p - q)).sum(-1).flatten(), rtol=1e-5, atol=0)


def test_a_report_in_bfloat16_is_near_the_one_in_float32(lm, half_lm, documents):
    d = sl.Dictionary.create("topk", reads=sl.Port(hook=HOOK, width=lm.d_model), d_sae=96, options={"k": 8}, seed=3)
    how = {"n_tokens": 400, "n_bootstrap": 0}
    wanted, report = sl.evaluate(d, lm, documents, **how), sl.evaluate(d, half_lm, documents, **how)
    for name in ("fvu", "mse", "cossim", "ce_clean", "ce_zero", "ce_mean", "ce_sae"):
        assert report[name] == pytest.approx(wanted[name], rel=0.02), name


def test_attribution_in_bfloat16_agrees_with_float32(lm, half_lm):
    d = sl.Dictionary.create("topk", reads=sl.Port(hook=HOOK, width=lm.d_model), d_sae=96, options={"k": 8}, seed=3)
    exact, half = (sl.attribute(d, model, TEXT, ablation=False) for model in (lm, half_lm))
    effects = []
    for found in (exact, half):
        table = torch.zeros(len(found.tokens[0]), 96)
        table[found.position, found.latent] = found.gradient
        assert found.gradient.dtype == torch.float32
        effects.append(table.flatten())
    assert torch.corrcoef(torch.stack(effects))[0, 1] > 0.95


def test_a_dictionary_is_copied_to_a_device_once_and_stays_as_it_is():
    d = sl.Dictionary.create("jumprelu", reads=8, d_sae=16)
    assert devices.on_device(d, torch.device("cpu")) is d
    there = devices.on_device(d, torch.device("meta"))
    assert {x.device.type for x in there.state_dict().values()} == {"meta"}
    assert {x.device.type for x in d.state_dict().values()} == {"cpu"}
    assert there.state_dict().keys() == d.state_dict().keys()
    assert [name for name, _ in there.named_parameters()] == [name for name, _ in d.named_parameters()]
    assert not any(p.requires_grad for p in there.parameters())
    assert all(p.requires_grad for p in d.parameters())


def test_commands_load_models_of_a_type(captured, command, tmp_path):
    _, run = captured
    (tmp_path / "text.txt").write_text(TEXT * 10)
    cache = ("capture", tmp_path / "text.txt", "--hooks", HOOK, "--out", tmp_path / "cache", "--n-tokens", 60)
    stream = ("train", "--text", tmp_path / "text.txt", "--hook", HOOK, "--d-sae", 16, "--n-tokens", 64, "--batch-size", 16)
    for args in (cache, (*stream, "--buffer-tokens", 32, "--out", tmp_path / "run")):
        code, _, err = command(*args, "--model-dtype", "bfloat16")
        assert code == 0, err
    assert sl.ActivationCache.open(tmp_path / "cache").origin(HOOK).precision == "bfloat16"
    assert sl.load(tmp_path / "run/dictionary").origin.precision == "bfloat16"
    numbers = tmp_path / "numbers.json"
    losses = set()
    for dtype in ("float32", "bfloat16"):
        code, _, err = command(
            "eval", run.folder / "dictionary", "--text", tmp_path / "text.txt", "--model-dtype", dtype, "--json", numbers
        )
        assert code == 0, err
        (report,) = json.loads(numbers.read_text()).values()
        losses.add(str(report["metrics"]["ce_clean"]))
    assert len(losses) == 2
    assert command("eval", run.folder / "dictionary", "--model-dtype", "int8").code == 2
