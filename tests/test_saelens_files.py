"""SAELens's files of all versions and its checkpoints: right to a millionth, or refused with a reason one can act on."""

import json

import pytest
import torch
from foreign import CASES, D_IN, D_SAE, edited, normal
from foreign_practice import PRACTICE
from foreign_saelens import SAELENS, SCALE
from safetensors.torch import load_file, save_file

import saelens_lite as sl
from saelens_lite.errors import ConfigError, CorruptFileError
from saelens_lite.formats import Known, read

X = normal(40, D_IN, seed=99).double() * 2 + 0.5
AVERAGE = {"normalize_activations": "expected_average_only_in"}


def close(value: torch.Tensor, wanted: torch.Tensor) -> bool:
    return bool((value - wanted).abs().max() <= 1e-6 * wanted.abs().max())


@pytest.mark.parametrize("name", [*SAELENS, *PRACTICE])
def test_codes_and_outputs_differ_by_rounding_only(name, tmp_path):
    case = CASES[name]
    d = sl.load(case.write(tmp_path / "foreign"), format=case.format).double()
    wanted = case.codes(X)
    assert 0 < (wanted != 0).double().mean() < 1
    assert close(d.encode(X).to_dense(), wanted)
    assert close(d(X), case.x_hat(X))


def test_a_checkpoint_gives_float32_and_its_density(tmp_path):
    d = sl.load(CASES["saelens batchtopk"].write(tmp_path / "d"))
    assert d.W_enc.dtype == torch.float32
    assert torch.allclose(d.density, torch.full((D_SAE,), 0.01))
    rows = d.W_dec.norm(dim=1)
    assert torch.allclose(rows, torch.ones(D_SAE))
    assert d.training_record["read_from"]["config"]["k"] == 2.5


def test_the_id_on_neuronpedia_is_kept_unless_the_index_states_another(tmp_path):
    path = CASES["saelens 5"].write(tmp_path / "d")
    assert sl.load(path).training_record["read_from"]["neuronpedia"] == "gpt2-small/8-res-jb"
    for known, wanted in ((Known(release="a/b"), "gpt2-small/8-res-jb"), (Known(neuronpedia="m/2"), "m/2")):
        assert read(path, known=known).training_record["read_from"]["neuronpedia"] == wanted
    path = edited("saelens 5", tmp_path / "list", neuronpedia_id=["a"])
    assert "neuronpedia" not in sl.load(path).training_record["read_from"]


def test_a_factor_that_the_file_lacks_may_come_from_the_index(tmp_path):
    path = edited("standard", tmp_path, **AVERAGE)
    with pytest.raises(ConfigError, match=r"add scaling_factor to .*activation_scaler\.json, or fold it in"):
        sl.load(path)
    d = read(path, known=Known(scale=SCALE)).double()
    assert close(d(X), CASES["standard"].x_hat(SCALE * X) / SCALE)
    assert read(path, known=Known(token_norm="constant_norm")).token_norm == "constant_norm"
    d = read(CASES["saelens scaled"].write(tmp_path / "stated"), known=Known(scale=2.0)).double()
    assert close(d(X), CASES["saelens scaled"].x_hat(X))  # its own factor counts


@pytest.mark.parametrize(
    ("case", "changes", "scaler", "reason"),
    [
        ("standard", AVERAGE, {"scaling_factor": None}, "whose statistics are not in the file"),
        ("standard", AVERAGE, {"scaling_factor": 0}, "scaling_factor is 0.0; expected a number above 0"),
        ("standard", AVERAGE, {"scaling_factor": "1"}, "scaling_factor is '1'; expected int or float"),
        ("standard", {}, {"scaling_factor": 2.0}, "scaling_factor is 2.0, but normalize_activations in .* is 'none'"),
        ("standard", {"normalize_activations": "constant_scalar_rescale"}, None, "add activation_normalization_factor to"),
        ("standard", {"normalize_activations": "covariance_whitening"}, None, "matrices are in activation_whitening.safe"),
        ("standard", {"normalize_activations": "by hand"}, None, "normalize_activations is 'by hand'; supported are none, "),
        ("transcoder", AVERAGE, {"scaling_factor": 2.0}, "the factor of a transcoder's output is unknown"),
        ("standard", {"architecture": "abstopk"}, None, r"'abstopk' with 'relu' \(its codes can be negative"),
        ("standard", {"architecture": "temporal"}, None, r"'temporal' with 'relu' \(its codes depend on earlier tokens"),
        ("topk", {"activation_fn_kwargs": {"signed": True}}, None, "activation_fn_kwargs.signed is true"),
        ("saelens 5", {"activation_fn_str": "tanh-relu"}, None, "architecture 'standard' with 'tanh-relu'"),
        ("saelens 5", {"hook_head_index": -1}, None, "hook_head_index = -1; expected a whole number"),
        (
            "saelens 5",
            {"hook_name": "blocks.5.attn.hook_pattern", "hook_head_index": 1},
            None,
            "hook_pattern is not one that has",
        ),
    ],
)
def test_settings_that_leave_the_function_open_are_refused(case, changes, scaler, reason, tmp_path):
    path = edited(case, tmp_path, **changes)
    if scaler is not None:
        (path / "activation_scaler.json").write_text(json.dumps(scaler))
    with pytest.raises((ConfigError, CorruptFileError), match=reason):
        sl.load(path)


def test_matrices_of_another_width_are_refused(tmp_path):
    path = CASES["saelens whitened"].write(tmp_path / "d")
    tensors = load_file(path / "activation_whitening.safetensors")
    save_file(tensors | {"mean": torch.zeros(D_IN + 1)}, path / "activation_whitening.safetensors")
    with pytest.raises(CorruptFileError, match="expected mean, matrix and inverse_matrix of d_in = 10"):
        sl.load(path)
    del tensors["mean"]
    save_file(tensors, path / "activation_whitening.safetensors")
    with pytest.raises(CorruptFileError, match="expected mean, matrix and inverse_matrix of d_in = 10"):
        sl.load(path)
