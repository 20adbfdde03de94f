"""A bare state dict by format="state_dict": names are recognised, the caller says the rest, and nothing is guessed silently."""

import logging

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import saelens_lite as sl
from saelens_lite import formats
from saelens_lite.dictionary.known_names import rules_that_fit
from saelens_lite.errors import ConfigError, CorruptFileError, ShapeError

D_IN, D_SAE, K = 10, 24, 3


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


W_ENC, W_DEC = normal(D_IN, D_SAE, seed=1) * 0.5, normal(D_SAE, D_IN, seed=3)
B_ENC, B_DEC = normal(D_SAE, seed=2) * 0.3, normal(D_IN, seed=4)
X = normal(40, D_IN, seed=9).double() * 2
NAMES = {  # the names of several tools, and whether they hold both matrices transposed
    ("W_enc", "b_enc", "W_dec", "b_dec"): False,
    ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"): True,
    ("encoder_linear.weight", "encoder_linear.bias", "decoder_linear.weight", "decoder_linear.bias"): True,
    ("autoencoder.encoder.weight", "autoencoder.latent_bias", "autoencoder.decoder.weight", "autoencoder.pre_bias"): True,
    ("model.sae.W_E", "model.sae.b_E", "model.sae.W_D", "model.sae.b_D"): False,
    ("w_enc", "b_enc", "w_dec", "b_dec"): False,
}


def written(path, names, transposed, extra=None):
    """Write the tensors under these names and return the file."""
    values = (W_ENC.T, B_ENC, W_DEC.T, B_DEC) if transposed else (W_ENC, B_ENC, W_DEC, B_DEC)
    tensors = {name: x.contiguous() for name, x in zip(names, values, strict=True)}
    tensors |= {name: x.clone() for name, x in (extra or {}).items()}
    if path.suffix == ".npz":
        np.savez(path, **{name: x.numpy() for name, x in tensors.items()})
    elif path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return path


@pytest.mark.parametrize("ending", ["pt", "safetensors", "npz"])
@pytest.mark.parametrize("names", NAMES, ids=lambda names: names[0])
def test_names_of_several_tools_in_every_kind_of_file(names, ending, tmp_path):
    path = written(tmp_path / f"d.{ending}", names, NAMES[names])
    for subtract in (True, False):
        h = (X - B_DEC.double() if subtract else X) @ W_ENC.double() + B_ENC.double()
        codes = h.relu() * torch.zeros_like(h).scatter(1, h.topk(K).indices, 1.0)
        y = codes @ W_DEC.double() + B_DEC.double()
        d = sl.load(path, format="state_dict", rule="topk", options={"k": K}, hook="a", subtract_b_dec=subtract).double()
        assert (d.encode(X).to_dense() - codes).abs().max() < 1e-6 * codes.max()
        assert (d(X) - y).abs().max() < 1e-6 * y.abs().max()
        assert (d.hook, d.source, d.training_record["read_from"]["config"]["names"]["W_enc"]) == ("a", str(path), names[0])


FOUR = ("W_enc", "b_enc", "W_dec", "b_dec")
PAIR = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")


@pytest.mark.parametrize(
    ("extra", "settings", "error", "reason"),
    [
        ({}, {}, ConfigError, r"set rule= to one of .*'l1', 'p_anneal', 'topk' \(with options=.'k'"),
        ({"threshold": B_ENC}, {}, ConfigError, r"set rule= to one of 'batch_topk' .*'jumprelu', .*which take its tensors"),
        ({"oddity": B_ENC}, {"rule": "l1"}, ConfigError, r"tensors \['oddity'\] have no known meaning; set names="),
        ({"other.W_dec": W_DEC}, {"rule": "l1"}, ConfigError, r"several decoders; set prefix= to one of '', 'other\.'"),
        ({"pre_bias": B_DEC}, {"rule": "l1"}, ConfigError, r"b_dec and pre_bias could both be b_dec"),
        ({"k": torch.tensor(4)}, {"rule": "topk", "options": {"k": 3}}, ConfigError, "k = 3, but the tensor k .* holds 4"),
        ({}, {"rule": "l1", "names": {"W_enc": "W_dnc"}}, ConfigError, r"no tensor 'W_dnc'; did you mean W_"),
        ({}, {"rule": "l1", "ignore": ["W_dec"]}, ConfigError, "no tensor has a known name of W_dec"),
        ({}, {"rule": "l1", "b_enc": B_ENC}, ConfigError, "b_enc of the file and of the call"),
        ({}, {"rule": "l1", "d_in": 11}, ShapeError, "d_in = 11"),
        ({}, {"rule": "jumprelu"}, ConfigError, "missing: threshold"),
    ],
)
def test_what_is_not_known_has_to_be_said(extra, settings, error, reason, tmp_path):
    path = written(tmp_path / "d.safetensors", FOUR, False, extra)
    with pytest.raises(error, match=rf"d\.safetensors: .*{reason}"):
        sl.load(path, format="state_dict", **settings)


def test_parts_of_a_checkpoint_are_chosen_or_ignored(tmp_path, caplog):
    tensors = {"model": dict(zip(PAIR, (W_ENC.T, B_ENC, W_DEC.T, B_DEC), strict=True)), "optimizer": {"state": {0: B_ENC}}}
    torch.save(tensors | {"epoch": 3, "mu": B_DEC}, tmp_path / "d.pt")
    load = {"format": "state_dict", "rule": "l1", "subtract_b_dec": False}
    assert torch.equal(sl.load(tmp_path / "d.pt", **load, prefix="model.").W_dec, W_DEC)
    d = sl.load(tmp_path, **load, ignore=["optimizer.*"], names={"mean": "mu"})
    torch.testing.assert_close(d.b_dec, 2 * B_DEC)
    assert "entries ['epoch'] were not used" in caplog.text


def test_a_checkpoint_of_a_training_is_read_past_its_lists(tmp_path, caplog):
    module = torch.nn.ModuleDict({"encoder": torch.nn.Linear(D_IN, D_SAE), "decoder": torch.nn.Linear(D_SAE, D_IN)})
    optimizer = torch.optim.Adam(module.parameters())
    module.decoder(module.encoder(X.float()).relu()).sum().backward()
    optimizer.step()
    settings = {"layers": [1, 2], "nested": {"a": {"b": {"c": {"d": 1}}}}}
    torch.save({"model": module.state_dict(), "optimizer": optimizer.state_dict(), "cfg": settings}, tmp_path / "d.pt")
    d = sl.load(tmp_path / "d.pt", format="state_dict", rule="l1", prefix="model.", subtract_b_dec=False)
    torch.testing.assert_close(d(X.float()), module.decoder(module.encoder(X.float()).relu()), rtol=1e-5, atol=1e-5)
    assert "cfg.layers" in caplog.text


def test_the_k_of_the_file_counts_and_statistics_do_not(tmp_path):
    extra = {"k": torch.tensor(K), "num_batches_not_active": torch.zeros(D_SAE)}
    path = written(tmp_path / "d.npz", FOUR, False, extra)
    assert sl.load(path, format="state_dict", rule="topk").rule.config.k == K


def test_a_b_dec_that_may_or_may_not_be_subtracted_is_told(tmp_path, caplog):
    path = written(tmp_path / "d.npz", FOUR, False)
    sl.load(path, format="state_dict", rule="l1", subtract_b_dec=True)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    sl.load(path, format="state_dict", rule="l1")
    assert "b_dec is subtracted from x before the encoder; if that is right, set subtract_b_dec=True" in caplog.text


@pytest.mark.parametrize("names", [PAIR, tuple(f"model.{name.replace('der.', 'der_linear.')}" for name in PAIR)])
def test_the_bias_of_a_decoder_layer_is_not_subtracted_on_a_guess(names, tmp_path):
    path = written(tmp_path / "d.npz", names, True)
    with pytest.raises(ConfigError, match=rf"whether {names[3]} is subtracted .*: set subtract_b_dec=False if"):
        sl.load(path, format="state_dict", rule="l1")
    for subtract in (True, False):
        h = (X - B_DEC.double() if subtract else X) @ W_ENC.double() + B_ENC.double()
        d = sl.load(path, format="state_dict", rule="l1", subtract_b_dec=subtract).double()
        assert (d.encode(X).to_dense() - h.relu()).abs().max() < 1e-6 * h.max()


def test_a_stored_k_is_used_whole_or_not_at_all(tmp_path, caplog):
    path = written(tmp_path / "d.npz", FOUR, False, {"k": torch.tensor(8.5)})
    with pytest.raises(ConfigError, match=r"tensor k of the file holds 8\.5, not a whole number"):
        sl.load(path, format="state_dict", rule="topk")
    sl.load(path, format="state_dict", rule="l1")
    assert "the tensor k of the file holds 8.5, which rule='l1' does not use" in caplog.text


def test_other_formats_take_no_settings(tmp_path):
    folder = sl.Dictionary.create("l1", reads=4, d_sae=8).save(tmp_path / "d")
    with pytest.raises(ConfigError, match="rule can be set with format='state_dict' only"):
        sl.load(folder, rule="topk")


def test_inspect_names_the_tensors_and_the_rules_that_take_them(tmp_path):
    facts = formats.inspect(written(tmp_path / "d.npz", PAIR, True, {"odd": B_ENC}), "state_dict")
    assert facts["names"]["W_enc"] == "encoder.weight"
    assert facts["not recognised"] == ["odd"]
    assert {"l1", "topk"} <= set(facts["rules"])
    assert "jumprelu" not in facts["rules"]
    assert rules_that_fit(["W_enc", "W_dec", "b_dec", "b_gate", "r_mag", "b_mag"]) == ["gated"]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04nothing", b"\x80\x02cos\nsystem\n(S'true'\ntR."])
@pytest.mark.parametrize("ending", ["pt", "npz", "safetensors"])
def test_damaged_files_and_pickles_of_code_are_refused(content, ending, tmp_path):
    (tmp_path / f"d.{ending}").write_bytes(content)
    with pytest.raises(CorruptFileError):
        sl.load(tmp_path / f"d.{ending}", format="state_dict", rule="l1")
    with pytest.raises(CorruptFileError, match="missing"):
        sl.load(tmp_path / "elsewhere.pt", format="state_dict", rule="l1")
