"""Gemma Scope and circuit-tracer in all their layouts: dictionaries of several layers, and files with few or no settings."""

import json
import logging
import re
from pathlib import Path

import pytest
import torch
from foreign import normal
from foreign_ports import CASES, N_LAYERS, WIDTH, all_layers, layers, write_layers
from safetensors.torch import load_file, save_file

import saelens_lite as sl
from saelens_lite.errors import ConfigError, CorruptFileError
from saelens_lite.files import write_json
from saelens_lite.formats import JoinedFiles, Known, inspect, open_tensors, read
from saelens_lite.tokens import token_rows


def inputs(d: sl.Dictionary) -> torch.Tensor:
    return normal(40, d.d_in, seed=99).double() * 2 + 0.5


@pytest.mark.parametrize("name", CASES)
def test_codes_outputs_and_hooks_are_those_of_the_tool(name, tmp_path, caplog):
    case = CASES[name]
    with caplog.at_level(logging.WARNING):
        d = sl.load(case.write(tmp_path / "foreign"))
    x = inputs(d)
    wanted, output = case.codes(x), case.x_hat(x)
    assert 0 < (wanted != 0).double().mean() < 1
    d64 = sl.load(d.save(tmp_path / "own")).double()
    torch.testing.assert_close(d64.encode(x).to_dense(), wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(d64(x), output, rtol=1e-6, atol=2e-6)
    assert d.rule.plugin_name == case.rule
    assert (tuple(port.hook for port in d.reads), tuple(port.hook for port in d.writes)) == (case.reads, case.writes)
    assert d.training_record["read_from"]["format"] == case.format
    assert ("one layer's part of the output" in caplog.text) == ("layer of a" in name)
    assert ("the dictionary names none" in caplog.text) == (case.reads == (None,))


@pytest.mark.parametrize("name", ["crosscoder", "a layer of an affine clt", "circuit-tracer, a layer of a clt, jumprelu"])
def test_a_dictionary_of_several_ports_is_saved_and_loaded_as_one_of_ours(name, tmp_path):
    path = CASES[name].write(tmp_path / "foreign")
    d = sl.load(path)
    again = sl.load(d.save(tmp_path / "own"))
    assert (again.ports, again.origin) == (d.ports, d.origin)
    assert all(torch.equal(tensor, d.state_dict()[key]) for key, tensor in again.state_dict().items())
    x = inputs(d).float()
    assert torch.equal(again(x), d(x))
    facts = json.loads(json.dumps(inspect(path)))
    assert (facts["d_in"], facts["d_sae"], facts["d_out"]) == (d.d_in, d.d_sae, d.d_out)
    assert len(facts.get("files", [facts.get("file")])) == {"crosscoder": N_LAYERS, "a layer of an affine clt": 1}.get(name, 2)


WRITTEN = {  # cases that Gemma Scope's second form can hold
    **dict.fromkeys(("crosscoder", "resid_post by its folder", "attn_out by its folder", "transcoder by its folder")),
    "a layer of a crosscoder": "it reads and writes one hook",
    "first release, a layer": "its hooks are one of",
    "first release, the embedding": "its hooks are one of",
}


@pytest.mark.parametrize("name", WRITTEN)
def test_gemma_scope_is_written_where_it_can_hold_a_dictionary(name, tmp_path):
    case, d = CASES[name], sl.load(CASES[name].write(tmp_path / "foreign"))
    own = d.save(tmp_path / "own")
    if WRITTEN[name]:
        with pytest.raises(ConfigError, match=f"cannot be written as gemma_scope: .*{WRITTEN[name]}"):
            sl.convert(own, tmp_path / "theirs", "gemma_scope")
        return
    again = sl.load(sl.convert(own, tmp_path / "theirs", "gemma_scope"))
    x = inputs(d)
    torch.testing.assert_close(again.double().encode(x).to_dense(), case.codes(x), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(again(x), case.x_hat(x), rtol=2e-6, atol=4e-6)
    assert (again.ports, again.origin.model) == (d.ports, d.origin.model)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"sparsity": "topk"}, "its codes are ReLU"),
        ({}, "each of its latents reads one layer"),
        ({"d_sae": 15}, "same width and number of latents"),
        ({"reads": [sl.Port.of(f"{model}:blocks.5.hook_resid_post", 6) for model in ("base", "chat")]}, "layers of one model"),
    ],
)
def test_what_gemma_scope_cannot_hold_is_not_written(more, reason, tmp_path):
    reads = [sl.Port.of(f"blocks.{layer}.hook_resid_post", 6) for layer in (5, 9)]
    d = sl.Dictionary.create(**{"sparsity": "jumprelu", "reads": reads, "d_sae": 16} | more)
    with pytest.raises(ConfigError, match=f"cannot be written as gemma_scope: .*{reason}"):
        sl.convert(d.save(tmp_path / "own"), tmp_path / "theirs", "gemma_scope")
    assert not (tmp_path / "theirs").exists()


def test_the_parts_of_all_layers_add_up_to_the_cross_layer_transcoder(tmp_path):
    parts = layers(skip=True)
    folder = write_layers(parts, "clt", config=True)(tmp_path / "foreign")
    x = normal(30, N_LAYERS * WIDTH, seed=98)
    total = torch.zeros(30, N_LAYERS, WIDTH)
    for i in range(N_LAYERS):
        d = sl.load(folder / f"params_layer_{i}.safetensors")
        total[:, i:] += d(x[:, i * WIDTH : (i + 1) * WIDTH]).detach().unflatten(1, (-1, WIDTH))
    torch.testing.assert_close(total.flatten(1).double(), all_layers(parts)[1](x.double()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("one", [None, 1])
def test_a_crosscoder_and_a_layer_of_it_are_evaluated(one, lm, tmp_path):
    path = write_layers(layers(width=lm.d_model), "crosscoder", True, one)(tmp_path / "foreign")
    settings = path / "config.json" if one is None else path.parent / "config.json"
    point = "model.layers.{0,1,2,3}.output"
    write_json(settings, json.loads(settings.read_text()) | {"hf_hook_point_in": point, "hf_hook_point_out": point})
    d = sl.load(path)
    rows = token_rows(lm, [sl.python_docs()[100].text], n_ctx=16, n_tokens=100)
    report = sl.evaluate(d, lm, rows, n_bootstrap=3)
    acts = lm.run(rows, [port.hook for port in d.reads])
    x = torch.cat([acts[port.hook] for port in d.reads], dim=-1)[rows.keep]
    assert report["l0"] == pytest.approx(float((d.encode(x).to_dense() != 0).sum(1).double().mean()))
    assert report["fvu"] > 0


def test_facts_of_the_release_list_complete_a_layer_of_a_clt(tmp_path, caplog):
    path = CASES["a layer of a clt"].write(tmp_path / "foreign")
    known = Known(model="google/gemma-3-270m", hook="blocks.0.mlp.hook_in", target="blocks.0.hook_mlp_out", release="r/0")
    d = read(path, known=known)
    assert [port.hook for port in d.writes] == [f"blocks.{i}.hook_mlp_out" for i in range(N_LAYERS)]
    assert d.origin.model == "google/gemma-3-270m"
    assert "was not used" not in caplog.text


def test_the_release_list_names_the_hook_of_embeddings_in_a_folder_of_any_name(tmp_path):
    case = CASES["first release, the embedding"]
    path = case.write(tmp_path / "foreign").rename(tmp_path / "mine")
    d = read(path, known=Known(hook="hook_embed"))
    x = inputs(d)
    torch.testing.assert_close(d.double()(x), case.x_hat(x), rtol=1e-6, atol=5e-6)


@pytest.mark.parametrize(
    ("stated", "id"),
    [("gemma-v3-1b-pt", "google/gemma-3-1b-pt"), ("google/gemma-3-270m-pt", "google/gemma-3-270m"), ("a/b", "a/b")],
)
def test_models_of_gemma_scope_are_named_as_on_the_hub(stated, id, tmp_path):
    path = CASES["crosscoder"].write(tmp_path / "foreign")
    write_json(path / "config.json", json.loads((path / "config.json").read_text()) | {"model_name": stated})
    assert sl.load(path).origin.model == id


def change(file, **tensors):
    """Replace tensors of a file, or remove those given as None."""
    save_file({name: tensor for name, tensor in (load_file(file) | tensors).items() if tensor is not None}, file)


def test_a_decoder_that_writes_earlier_layers_is_cut_and_logged(tmp_path, caplog):
    path = CASES["a layer of a crosscoder"].write(tmp_path / "foreign")
    before = sl.load(path)
    w_dec = load_file(path)["w_dec"]
    w_dec[2, 0, 1] = 0.25
    change(path, w_dec=w_dec)
    caplog.clear()
    assert torch.equal(sl.load(path).W_dec, before.W_dec)
    assert "ports before the one it reads, with weights up to 0.25" in caplog.text


@pytest.mark.parametrize(
    ("case", "edit", "error", "reason"),
    [
        (
            "crosscoder",
            lambda p: (p / "params_layer_2.safetensors").unlink(),
            CorruptFileError,
            "params_layer_0.* to params_layer_3",
        ),
        ("crosscoder", lambda p: p.rename(p.parent / "mine"), ConfigError, "name the file of one, such as .*params_layer_0"),
        (
            "crosscoder",
            lambda p: change(p / "params_layer_1.safetensors", b_dec=torch.zeros(7)),
            CorruptFileError,
            "tensors differ",
        ),
        ("a layer of a clt", lambda p: p.rename(p.parent / "layer.safetensors"), ConfigError, "call it params_layer_"),
        ("a layer of a clt", lambda p: change(p, w_dec=torch.zeros(5, 2000, 0)), CorruptFileError, "is of 2,000 layers"),
        ("a layer of a clt", lambda p: change(p, w_enc=torch.zeros(6, 4)), CorruptFileError, "d_sae = 5|d_sae = 4"),
        (
            "circuit-tracer, a layer of a clt",
            lambda p: (p.parent / "W_dec_1.safetensors").unlink(),
            CorruptFileError,
            "W_dec_1.* is missing",
        ),
        (
            "circuit-tracer, scan_name",
            lambda p: (p / "config.yaml").write_text("model_kind: other"),
            ConfigError,
            "model_kind is 'other'",
        ),
    ],
)
def test_files_that_do_not_agree_are_refused(case, edit, error, reason, tmp_path):
    path = CASES[case].write(tmp_path / "foreign")
    moved = edit(path)
    if isinstance(moved, Path):  # without a name or settings that tell what it is
        path = moved
        if path.is_dir():
            (path / "config.json").unlink()
    with pytest.raises(error, match=reason):
        sl.load(path, format=CASES[case].format)


def test_points_of_another_number_of_layers_are_refused(tmp_path):
    path = CASES["crosscoder"].write(tmp_path / "foreign")
    settings = json.loads((path / "config.json").read_text())
    write_json(path / "config.json", settings | {"hf_hook_point_in": "model.layers.{5,9}.output"})
    with pytest.raises(CorruptFileError, match=r"names 2 layers; the tensors are of 4"):
        sl.load(path)


@pytest.mark.parametrize("name", ["a layer of a clt", "circuit-tracer, a layer of a clt"])
def test_a_folder_of_a_cross_layer_transcoder_asks_for_one_layer(name, tmp_path):
    path = CASES[name].write(tmp_path / "foreign")
    with pytest.raises(ConfigError, match=rf"name the file of one, such as {path.parent}"):
        sl.load(path.parent)


def test_transcoders_that_are_elsewhere_are_named(tmp_path):
    address = "hf://google/gemma-scope-2b-pt-transcoders/layer_0/width_16k/average_l0_76/params.npz"
    for listed in (f"- {address}", f"- {{id: a, layer: 0, filepath: '{address}'}}"):
        (tmp_path / "config.yaml").write_text(f"model_kind: transcoder_set\nscan: null\ntranscoders:\n  {listed}\n")
        with pytest.raises(ConfigError, match=re.escape(f"load the file of one, such as {address}")):
            sl.load(tmp_path)
    (tmp_path / "config.yaml").write_text("transcoders: [{id: a}]\n")
    with pytest.raises(CorruptFileError, match="an entry without"):
        sl.load(tmp_path)


def test_a_temporal_sae_is_refused_by_its_name(tmp_path):
    folder = tmp_path / "layer_12" / "temporal"
    folder.mkdir(parents=True)
    (folder / "conf.yaml").write_text("llm: {dimin: 6}\nsae: {exp_factor: 2}\n")
    tensors = {"D": normal(12, 6, seed=1), "E": normal(6, 12, seed=2), "b": normal(6, seed=3)}
    save_file(tensors | {"attn_layers.0.k_ctx.weight": normal(6, 6, seed=4)}, folder / "latest_ckpt.safetensors")
    for path in (folder, folder / "latest_ckpt.safetensors"):
        with pytest.raises(ConfigError, match=r"holds a temporal SAE, which predicts .* from earlier tokens"):
            sl.load(path)


def test_files_are_joined_by_name_or_stacked(tmp_path):
    for name, tensors in {"a": {"u": torch.ones(2)}, "b": {"v": torch.zeros(2)}, "c": {"u": torch.full((2,), 3.0)}}.items():
        save_file(tensors, tmp_path / name)
    a, b, c = (open_tensors(tmp_path / name) for name in "abc")
    both, stacked = JoinedFiles([a, b]), JoinedFiles([a, c], stacked=True)
    assert both.read(["u", "v"]).keys() == {"u", "v"}
    assert (stacked.specs["u"].shape, stacked.read(["u"])["u"].tolist()) == ((2, 2), [[1, 1], [3, 3]])
    with pytest.raises(CorruptFileError, match=r"c holds tensors that a holds too: \['u'\]"):
        JoinedFiles([a, c])
    with pytest.raises(CorruptFileError, match="b: its tensors differ"):
        JoinedFiles([a, b], stacked=True)
