"""Loading by the wrong name, from the wrong place, without a file: the error says what was found, and its advice works."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from foreign import CASES as OTHERS
from foreign import normal
from foreign_crosscoders import CASES as CROSSCODERS
from safetensors.torch import load_file, save_file

import saelens_lite as sl
from saelens_lite import registry
from saelens_lite.errors import ConfigError, CorruptFileError, SaelensLiteError
from saelens_lite.formats import inspect

CASES = OTHERS | {name: CROSSCODERS[name] for name in ("crosscoder, relu, older",)}
CASE = {case.format: name for name, case in reversed(CASES.items())}  # one of each format
FORMATS = [*sorted(CASE), "saelens_lite"]


def write(format: str, folder: Path) -> Path:
    """Return a file or folder of a format."""
    if format == "saelens_lite":
        return sl.Dictionary.create("group_max", reads=10, d_sae=24, options={"k": 3}).save(folder)
    return CASES[CASE[format]].write(folder)


def follow(path: Path, format: str | None = None) -> tuple[sl.Dictionary, int]:
    """Load, doing what each error says; and how many errors there were."""
    for errors in range(3):
        try:
            return sl.load(path, format=format), errors
        except SaelensLiteError as error:
            load, say = (re.findall(pattern, str(error)) for pattern in (r": load (\S+)", r"(?:set|with) format='(\w+)'"))
            if not load and not say:
                raise
            path, format = Path(load[0]) if load else path, say[0] if say else None
    raise AssertionError(f"in a circle: {path} {format}")


@pytest.mark.parametrize("named", FORMATS)
@pytest.mark.parametrize("held", FORMATS)
def test_the_wrong_name_is_answered_by_the_right_one(held, named, tmp_path):
    path = write(held, tmp_path / "foreign")
    if held == named:
        assert follow(path, named)[1] == 0
    elif (held, named) == ("saelens_lite", "saelens"):  # ours are SAELens folders
        assert follow(sl.Dictionary.create("topk", reads=4, d_sae=8).save(tmp_path / "topk"), named)[1] == 0
    else:
        with pytest.raises(CorruptFileError, match=f"holds a dictionary of {held}, not of {named}; set format='{held}'"):
            sl.load(path, format=named)
        assert follow(path, named)[1] == 1


@pytest.mark.parametrize("held", FORMATS)
def test_from_one_or_two_folders_above_the_advice_leads_to_the_dictionary(held, tmp_path):
    write(held, tmp_path / "run" / "inner" / "foreign")
    for folder in (tmp_path / "run" / "inner", tmp_path / "run"):
        with pytest.raises(CorruptFileError, match=f"holds no dictionary itself, but below it .* of {held}: load "):
            sl.load(folder)
        for format in (None, held):
            assert follow(folder, format)[1] == 1


@pytest.mark.parametrize("held", FORMATS)
def test_from_a_single_file_the_advice_leads_to_its_folder(held, tmp_path):
    path = write(held, tmp_path / "foreign")
    for file in sorted(path.iterdir()) if path.is_dir() else ():
        for format in (None, held):
            assert follow(file, format)[1] <= 1


def test_from_a_folder_inside_the_advice_leads_above(tmp_path):
    path = write("saelens", tmp_path / "foreign")
    (path / "checkpoints").mkdir()
    with pytest.raises(CorruptFileError, match=r"the folder above it .*saelens: load"):
        sl.load(path / "checkpoints")
    assert follow(path / "checkpoints")[1] == 1


def test_one_of_several_dictionaries_is_named(tmp_path):
    for layer in (3, 4):
        write("sparsify", tmp_path / "run" / str(layer))
    with pytest.raises(CorruptFileError, match=r"several dictionaries, .* of sparsify: load \S+/3/\S+$"):
        sl.load(tmp_path / "run")


# formats whose files are not always the same, or of which one file has all that is needed
SINGLE = ("circuit_tracer", "crosscoder_learning", "deepseek_r1", "gemma_scope", "goodfire", "hook_z", "openai", "qwen_scope")


@pytest.mark.parametrize("held", [format for format in FORMATS if format not in SINGLE])
def test_a_file_that_is_missing_is_named(held, tmp_path):
    path = write(held, tmp_path / "foreign")
    for file in sorted(path.iterdir()):
        content = file.read_bytes()
        file.unlink()
        pattern = re.sub(r"\d", ".", file.name).replace("layer_.", r"layer_[0*]")
        for format in (None, held):
            with pytest.raises(CorruptFileError, match=rf"{pattern}.* is missing"):
                sl.load(path, format=format)
        file.write_bytes(content)


def test_a_format_of_folders_refuses_a_file(tmp_path):
    (tmp_path / "notes").write_text("x")
    with pytest.raises(CorruptFileError, match=r"is a file; .*sparsify.* folder with cfg\.json and sae\.safet"):
        sl.load(tmp_path / "notes", format="sparsify")


def test_files_of_a_format_with_other_tensors_are_told_what_is_expected(tmp_path):
    (tmp_path / "d").mkdir()
    config = {"architecture": "standard", "d_in": 10, "d_sae": 24}
    (tmp_path / "d" / "cfg.json").write_text(json.dumps(config))
    save_file({"encoder.weight": normal(24, 10, seed=1)}, tmp_path / "d" / "sae_weights.safetensors")
    with pytest.raises(CorruptFileError, match=r"missing: \['W_dec', 'W_enc', 'b_dec', 'b_enc'\]; not expected: \['encoder"):
        sl.load(tmp_path / "d")


WITHOUT_WHICH_A_FILE_IS_ANOTHER_DICTIONARY = {
    *("affine_skip_connection", "activation_function.threshold", "k"),  # the settings do not name them
    *("scaling_factor", "finetuning_scaling_factor"),
}


@pytest.mark.parametrize(
    "case",
    sorted({name for name in CASE.values() if not CASES[name].pickled} | {"gated", "sparsify skip", "gemma scope, the file"}),
)
def test_a_tensor_that_is_missing_is_named_beside_those_that_are_there(case, tmp_path):
    path = CASES[case].write(tmp_path / "foreign")
    place = path if path.is_file() else next(p for p in path.iterdir() if p.suffix in (".safetensors", ".npz"))
    tensors = dict(np.load(place)) if place.suffix == ".npz" else load_file(place)
    optional = WITHOUT_WHICH_A_FILE_IS_ANOTHER_DICTIONARY | ({"W_skip"} if case.startswith("circuit") else set())
    for name in tensors.keys() - optional:
        others = {key: tensor for key, tensor in tensors.items() if key != name}
        np.savez(place, **others) if place.suffix == ".npz" else save_file(others, place)
        with pytest.raises(CorruptFileError, match=re.escape(name)) as raised:
            sl.load(path)
        if not name.startswith("dataset_average"):  # a number beside the weights
            assert f"missing: ['{name}']; not expected: none; found: {sorted(others)}" in str(raised.value)


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_tensors_of_no_format_are_shown_the_way_in(kind, tmp_path):
    tensors = {"encoder_linear.weight": normal(24, 10, seed=1), "decoder_linear.weight": normal(10, 24, seed=2)}
    path = tmp_path / f"d.{kind}"
    torch.save(tensors, path) if kind == "pt" else save_file(tensors, path)
    with pytest.raises(CorruptFileError, match=r"it holds tensors .*: .*Dictionary\.from_tensors"):
        sl.load(path)


def test_pickles_in_folders_are_not_read_on_the_way(tmp_path, monkeypatch):
    write("openai", tmp_path / "run")
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(CorruptFileError, match=r"load \S+\.pt with format='openai'$"):
        sl.load(tmp_path / "run")
    with pytest.raises(ConfigError, match="read only on request: set format='openai'"):
        sl.load(next((tmp_path / "run").iterdir()))


def test_our_own_name_is_taken_wherever_a_format_is_named(tmp_path, command):
    path = sl.Dictionary.create("topk", reads=4, d_sae=8).save(tmp_path / "d")
    assert sl.load(path, format="saelens_lite").rule.plugin_name == "topk"
    assert inspect(path, "saelens_lite")["sparsity"] == "topk"
    code, out, _ = command("inspect", path, "--format", "saelens_lite")
    assert (code, json.loads(out)["metadata"]["saelens_lite"]["sparsity"]) == (0, "topk")
    (path / "cfg.json").write_text("{}")
    with pytest.raises(CorruptFileError, match="holds a dictionary of saelens, not of saelens_lite; set format='saelens'"):
        sl.load(path, format="saelens_lite")
    save_file({}, path / "sae_weights.safetensors")
    with pytest.raises(CorruptFileError, match="holds no dictionary written by saelens_lite; leave out format="):
        sl.load(path, format="saelens_lite")


def test_every_built_in_format_is_tried_here():
    never_without_facts = {"crosscoder_model_diff"}  # its files lack the scales
    assert set(registry.names("formats")) == set(FORMATS) - {"saelens_lite"} | never_without_facts


def test_any_pair_of_layers_is_not_taken_for_a_dictionary_of_a_certain_model(tmp_path):
    path = CASES["deepseek r1"].write(tmp_path / "foreign")
    other = path.rename(path.with_name("mine.pt")) if path.is_file() else next(path.iterdir()).rename(path / "mine.pt")
    with pytest.raises(CorruptFileError, match="load them with format='state_dict' and rule="):
        sl.load(other)
    assert sl.load(other, format="deepseek_r1").hook is None


@pytest.mark.parametrize("format", [None, "state_dict", "openai"])
def test_a_file_of_torch_before_1_6_and_a_missing_file_are_told(format, tmp_path):
    torch.save({"W_dec": normal(4, 3, seed=1)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CorruptFileError, match=r"old\.pt is in the form of torch before version 1\.6.* save it again with"):
        sl.load(tmp_path / "old.pt", format=format)
    for name in ("nope.safetensors", "nope.pt"):
        with pytest.raises(CorruptFileError, match=rf"{name} is missing; is it the file you meant"):
            sl.load(tmp_path / name, format=format)
