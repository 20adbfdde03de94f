"""Facts from outside a file: they complete what the file says, and do not replace its hooks."""

import logging

import numpy as np
import pytest
import torch
from foreign import CASES

from saelens_lite import Dictionary, Origin, convert
from saelens_lite.files import read_json, write_json
from saelens_lite.formats import Known, read

RNG = np.random.default_rng(0)
TENSORS = {
    "W_enc": RNG.normal(size=(6, 10)),
    "W_dec": RNG.normal(size=(10, 6)),
    "b_enc": RNG.normal(size=10),
    "b_dec": RNG.normal(size=6),
    "threshold": np.full(10, 0.1),
}


@pytest.fixture
def gemma_scope(tmp_path):
    """A file of Gemma Scope's first release, which names neither its model nor its hooks."""
    np.savez(tmp_path / "params.npz", **{name: tensor.astype("float32") for name, tensor in TENSORS.items()})
    return tmp_path


def reference(x: np.ndarray) -> np.ndarray:
    h = x @ TENSORS["W_enc"] + TENSORS["b_enc"]
    return h * (h > TENSORS["threshold"])


@pytest.mark.parametrize("target", [None, "blocks.3.hook_mlp_out"])
def test_facts_about_hooks_and_model_complete_a_file_without_settings(gemma_scope, target):
    hook = "blocks.3.ln2.hook_normalized" if target else "blocks.3.hook_resid_post"
    known = Known(model="google/gemma-2-2b", hook=hook, target=target, release="a-release/its-id", neuronpedia="m/3-res")
    d = read(gemma_scope, known=known)
    assert (d.reads[0].hook, d.writes[0].hook) == (hook, target or hook)
    assert d.writes_what_it_reads == (target is None)
    assert d.origin.model == "google/gemma-2-2b"
    assert d.training_record["read_from"]["release"] == "a-release/its-id"
    assert d.training_record["read_from"]["neuronpedia"] == "m/3-res"
    x = np.random.default_rng(1).normal(size=(5, 6))
    codes = reference(x)
    torch.testing.assert_close(d.encode(x).to_dense(), torch.tensor(codes).float(), atol=1e-5, rtol=1e-5)
    x_hat = torch.tensor(codes @ TENSORS["W_dec"] + TENSORS["b_dec"]).float()
    torch.testing.assert_close(d(x).float(), x_hat, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("stated", "known", "kept"),
    [
        ("gpt2-small", "gpt2", True),
        ("org/a", None, True),
        (None, "org/b", True),
        ("org/a", "org/b", False),
        ("gpt2-small", "org/gpt2-small-tuned", False),
    ],
)
def test_a_revision_stays_with_its_model(stated, known, kept):
    origin = Known(model=known).origin(Origin(model=stated, revision="a1"))
    assert (origin.model, origin.revision) == (known or stated, "a1" if kept else None)


@pytest.mark.parametrize("hook", [None, "blocks.3.hook_resid_post"])
def test_that_no_hook_is_known_is_said_only_if_it_is_true(hook, gemma_scope, tmp_path, caplog):
    path = CASES["circuit-tracer relu"].write(tmp_path / "d")
    (path / "config.yaml").unlink()
    for place in (gemma_scope / "params.npz", path):
        read(place, known=Known(hook=hook, target="blocks.3.hook_mlp_out"))
        assert ("the dictionary names none" in caplog.text) == (hook is None)
        caplog.clear()


def test_a_hook_in_the_file_is_kept_and_the_contradiction_is_logged(tmp_path, caplog):
    Dictionary.create("l1", reads=6, d_sae=10).save(tmp_path / "d")
    folder = convert(tmp_path / "d", tmp_path / "other", format="saelens")
    config = read_json(folder / "cfg.json")
    config["metadata"]["hook_name"] = "blocks.1.hook_resid_pre"
    write_json(folder / "cfg.json", config)
    with caplog.at_level(logging.WARNING):
        d = read(folder, known=Known(hook="blocks.2.hook_resid_pre"))
    assert d.hook == "blocks.1.hook_resid_pre"
    assert "blocks.2.hook_resid_pre, which was not used" in caplog.text
