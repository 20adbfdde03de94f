"""Streams of several models over the same token ids, and runs that are resumed on them."""

import copy
import itertools

import pytest
import torch
from interrupted import Interrupted

import saelens_lite as sl
from saelens_lite.cache import open_source
from saelens_lite.errors import ConfigError, SourceChangedError, Stopped

HOOK = "blocks.1.hook_resid_pre"
KEYS = [f"base:{HOOK}", f"chat:{HOOK}"]
SETTINGS = {"text_config": sl.TextConfig(n_ctx=32), "buffer_tokens": 128, "batch_tokens": 64}


@pytest.fixture(scope="module")
def models(lm, tmp_path_factory):
    """Two models that can be loaded again: the embedded one, and one of other weights in a folder."""
    folder = tmp_path_factory.mktemp("models") / "tuned"
    module = copy.deepcopy(lm.module)
    module.transformer.h[0].mlp.c_proj.weight.mul_(0.5)
    module.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return {"base": lm, "chat": sl.load_model(str(folder), device="cpu")}


@pytest.fixture
def text(documents, tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(documents))
    return path


def some(source, keys, n=5):
    batches = list(itertools.islice(source.batches(keys, 25, 3), n))
    return {key: torch.cat([batch[key] for batch in batches]) for key in keys}


def test_batches_are_those_of_each_model_alone(models, documents):
    x = some(sl.ActivationStream(models, documents, HOOK, **SETTINGS), KEYS)
    for name, lm in models.items():
        alone = some(sl.ActivationStream(lm, documents, HOOK, **SETTINGS), [HOOK])
        assert torch.equal(x[f"{name}:{HOOK}"], alone[HOOK])
    assert not torch.allclose(x[KEYS[0]], x[KEYS[1]], atol=0.1)


def test_differences_can_be_streamed(models, documents):
    x = some(sl.ActivationStream(models, documents, HOOK, **SETTINGS), KEYS)
    key = f"chat-base:{HOOK}"
    assert torch.equal(some(sl.ActivationStream(models, documents, key, **SETTINGS), [key])[key], x[KEYS[1]] - x[KEYS[0]])


def test_origins_and_hooks_name_the_models(models, documents):
    stream = sl.ActivationStream(models, documents, HOOK, **SETTINGS)
    assert list(stream.hooks) == KEYS
    assert [facts.name for facts in stream.origin(KEYS[0]).models] == ["base", "chat"]
    with pytest.raises(ConfigError, match="no model 'other'"):
        sl.ActivationStream(models, documents, f"other:{HOOK}", **SETTINGS)


def test_a_stream_of_two_models_is_opened_again(models, text):
    source = sl.ActivationStream(models, text, HOOK, **SETTINGS)
    description = source.describe()
    again = open_source(description)
    assert again.describe() == description
    one, other = some(source, KEYS), some(again, KEYS)
    assert all(torch.equal(one[key], other[key]) for key in KEYS)
    again.expect(source.record())


def test_streams_of_other_models_are_refused(models, text):
    record = sl.ActivationStream(models, text, HOOK, **SETTINGS).record()
    for others in ({"base": models["base"], "chat": models["base"]}, {"chat": models["chat"], "base": models["base"]}):
        with pytest.raises(SourceChangedError, match="weights = "):
            sl.ActivationStream(others, text, HOOK, **SETTINGS).expect(record)
    with pytest.raises(SourceChangedError, match="weights = "):
        sl.ActivationStream(models["base"], text, HOOK, **SETTINGS).expect(record)


@pytest.mark.parametrize("ports", [{"reads": tuple(KEYS)}, {"hook": f"chat-base:{HOOK}"}])
def test_an_interrupted_training_on_two_models_has_the_same_bytes(models, text, tmp_path, ports):
    config = sl.TrainConfig(**ports, d_sae=64, n_tokens=1000, batch_size=100, options={"k": 4})

    def stream():
        return sl.ActivationStream(models, text, HOOK, **SETTINGS)

    (whole,) = sl.train(stream(), config, tmp_path / "alone")
    with pytest.raises(Stopped):
        sl.train(Interrupted(stream(), 6), config, tmp_path / "run")
    (resumed,) = sl.resume(tmp_path / "run")  # loads both models
    expected = whole.dictionary.state_dict()
    assert all(torch.equal(x, expected[name]) for name, x in resumed.dictionary.state_dict().items())
