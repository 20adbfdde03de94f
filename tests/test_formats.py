"""Other tools' dictionaries: read, they compute what the tool defines; written, the numbers come back; the rest is refused."""

import hashlib
import json
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from foreign import CASES, D_IN, D_SAE, edited, normal
from safetensors.torch import load_file, save_file

import saelens_lite as sl
from saelens_lite import registry
from saelens_lite.errors import ConfigError, CorruptFileError, OutputExistsError, PluginError
from saelens_lite.formats import TensorFile

X = normal(40, D_IN, seed=99).double() * 2 + 0.5


def load(case, folder) -> sl.Dictionary:
    """Return the dictionary of a case; pickles are asked for by name."""
    return sl.load(case.write(folder / "foreign"), format=case.format if case.pickled else None)


@pytest.mark.parametrize("name", CASES)
def test_read_it_computes_what_its_tool_defines(name, tmp_path):
    case = CASES[name]
    d = load(case, tmp_path)
    assert (d.rule.plugin_name, d.d_in, d.d_sae) == (case.rule, D_IN, D_SAE)
    wanted_codes, wanted = case.codes(X), case.x_hat(X)
    assert 0 < (wanted_codes != 0).double().mean() < 1
    x = X.float()
    codes = d.encode(x)
    torch.testing.assert_close(codes.to_dense().double(), wanted_codes, rtol=1e-5, atol=1e-5)
    for x_hat in (d(x), d.decode(codes, x), d.decode(codes.to_dense(), x)):
        torch.testing.assert_close(x_hat.double(), wanted, rtol=1e-5, atol=1e-5)
    state = d.state_dict()
    for tensor, value in case.exact.items():
        assert torch.equal(state[tensor], value), tensor
    target = None if d.writes_what_it_reads else d.writes[0].hook
    found = {"hook": d.hook, "target": target, **dict(d.origin)}
    assert {key: found[key] for key in case.origin} == case.origin
    assert not d.training
    assert d.training_record["read_from"]["format"] == case.format


@pytest.mark.parametrize("name", CASES)
def test_read_it_is_saved_and_loaded_as_one_of_ours(name, tmp_path):
    d = load(CASES[name], tmp_path)
    again = sl.load(d.save(tmp_path / "own"))
    assert torch.equal(again(X.float()), d(X.float()))
    assert (again.token_norm, again.ports, again.origin) == (d.token_norm, d.ports, d.origin)


def test_thresholds_compare_as_in_the_file(tmp_path):
    d = load(CASES["jumprelu"], tmp_path)
    theta = d.rule.threshold.detach()
    for h, fires in ((theta, False), (torch.nextafter(theta, torch.tensor(torch.inf)), True)):
        assert bool((d.rule.activation(h[None]) != 0).all()) == fires


# Written, and read again


RULES = {
    "l1": {},
    "topk": {"k": 3},
    "gated": {},
    "batch_topk": {"k": 3},
    "jumprelu": {"threshold_speed": 2.0},
    "matryoshka": {"k": 3, "prefixes": (0.25, 0.5)},
    "p_anneal": {},
    "group_max": {"k": 3},
    "matching_pursuit": {"k": 3},
}
WRITTEN = {  # format → rules it has a place for
    "saelens": sorted(RULES.keys() - {"group_max"}),
    "sparsify": ["group_max", "topk"],
    "dictionary_learning": sorted(RULES.keys() - {"group_max", "matching_pursuit"}),
}
ROUNDED = {("dictionary_learning", "jumprelu")}  # b_enc − b_dec W_enc + b_dec W_enc
ALIKE = {"p_anneal": "l1", "batch_topk": "jumprelu", "matryoshka": "jumprelu"}  # published under another rule's name


def make(rule: str, d_out: int | None = None, skip: bool = False, hook: str = "blocks.2.hook_resid_pre") -> sl.Dictionary:
    """Return a dictionary of random parameters."""
    reads = sl.Port(hook=hook, width=D_IN)
    writes = sl.Port(hook="blocks.2.hook_mlp_out", width=d_out) if d_out else None
    origin = sl.Origin(model="gpt2")
    d = sl.Dictionary.create(rule, reads=reads, writes=writes, d_sae=D_SAE, skip=skip, options=RULES[rule], origin=origin)
    for seed, parameter in enumerate(d.parameters()):
        parameter.data.copy_(normal(*parameter.shape, seed=seed) * (0.5 if parameter.ndim == 1 else 1))
    for buffer in d.buffers():
        buffer.fill_(0.75)
    if d.rule.tied:
        d.rule.after_step(d)
    return d


@pytest.mark.parametrize(("format", "rule"), [(format, rule) for format, rules in WRITTEN.items() for rule in rules])
def test_written_and_read_again(format, rule, tmp_path):
    d = make(rule)
    own = d.save(tmp_path / "own")
    path = sl.convert(own, tmp_path / "theirs", format)
    again = sl.load(path, format=format)
    saelens_name = ALIKE.get(rule, rule) if format == "saelens" else "l1" if rule == "p_anneal" else rule
    assert again.rule.plugin_name == saelens_name
    x = X.float()
    if (format, rule) in ROUNDED:
        torch.testing.assert_close(again.encode(x).to_dense(), d.encode(x).to_dense(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(again(x), d(x), rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(again.encode(x).to_dense(), d.encode(x).to_dense())
        assert torch.equal(again(x), d(x))
        for name, tensor in d.named_parameters():
            assert name.startswith("rule.") or torch.equal(again.state_dict()[name], tensor)
    written_again = sl.convert(path, tmp_path / "again", format, source_format=format)
    for file in path.iterdir():
        if file.suffix == ".safetensors":
            assert file.read_bytes() == (written_again / file.name).read_bytes()


TRANSCODERS = {  # format → rules whose transcoders it has a place for
    "saelens": ["batch_topk", "jumprelu", "l1", "matryoshka", "p_anneal"],
    "sparsify": ["group_max", "topk"],
    "circuit_tracer": ["batch_topk", "jumprelu", "l1", "matryoshka", "p_anneal", "topk"],
}


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(("format", "rule"), [(format, rule) for format, rules in TRANSCODERS.items() for rule in rules])
def test_transcoders_written_and_read_again(format, rule, skip, tmp_path):
    d = make(rule, d_out=D_IN, skip=skip)
    again = sl.load(sl.convert(d.save(tmp_path / "own"), tmp_path / "theirs", format))
    assert again.rule.plugin_name == (rule if format == "sparsify" else ALIKE.get(rule, rule))
    assert not again.writes_what_it_reads
    assert torch.equal(again.encode(X.float()).to_dense(), d.encode(X.float()).to_dense())
    assert torch.equal(again(X.float()), d(X.float()))
    assert (again.W_skip is None) != skip
    if format != "sparsify":  # whose files name no hooks
        assert (again.origin.model, again.ports) == (d.origin.model, d.ports)


@pytest.mark.parametrize("rule", ["l1", "jumprelu"])
def test_saelens_transcoders_of_another_width(rule, tmp_path):
    d = make(rule, d_out=7, skip=True)
    path = sl.convert(d.save(tmp_path / "own"), tmp_path / "theirs", "saelens")
    config = json.loads((path / "cfg.json").read_text())
    assert config["architecture"] == {"l1": "skip_transcoder", "jumprelu": "jumprelu_skip_transcoder"}[rule]
    assert (config["d_out"], config["apply_b_dec_to_input"]) == (7, False)
    assert config["metadata"]["hook_name_out"] == "blocks.2.hook_mlp_out"
    assert torch.equal(sl.load(path)(X.float()), d(X.float()))


def test_densities_are_kept_by_saelens(tmp_path):
    d = make("topk")
    d.density = torch.linspace(0, 1, D_SAE)
    again = sl.load(sl.convert(d.save(tmp_path / "own"), tmp_path / "theirs", "saelens"))
    torch.testing.assert_close(again.density, d.density, rtol=1e-5, atol=1e-9)


def test_sparsify_widths_by_expansion_factor(tmp_path):
    d = sl.Dictionary.create("topk", reads=D_IN, d_sae=2 * D_IN, options={"k": 3})
    path = sl.convert(d.save(tmp_path / "own"), tmp_path / "theirs", "sparsify")
    config = json.loads((path / "cfg.json").read_text())
    for factor, fits in ((2, True), (3, False)):
        (path / "cfg.json").write_text(json.dumps(config | {"num_latents": 0, "expansion_factor": factor}))
        if fits:
            assert torch.equal(sl.load(path)(X.float()), d(X.float()))
        else:
            with pytest.raises(CorruptFileError, match=r"encoder\.weight has shape \(20, 10\), expected .* d_sae = 30"):
                sl.load(path)


@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        (("transcoder_set", "cross_layer_transcoder"), ConfigError, "model_kind is .cross_layer_transcoder., but"),
        (("scan: null", "activation: tanh"), ConfigError, "no rule computes 'tanh'"),
        (("scan: null", "activation: topk"), CorruptFileError, "k is missing; add a line such as k: 32"),
        (("scan: null", "activation: topk\nk: many"), CorruptFileError, "k is 'many'; expected int"),
        (("scan: null", "activation: jumprelu"), CorruptFileError, r"missing: \['activation_function\.threshold'\]"),
        (("feature_input_hook", "hook"), CorruptFileError, "feature_input_hook is missing"),
        (("scan: null", "scan: &a [1]\nb: *a"), CorruptFileError, "YAML aliases"),
        (("scan: null", "scan: [1"), CorruptFileError, "is not valid YAML"),
        (("scan: null", "scan: " + "[" * 5000), CorruptFileError, "is not valid YAML: it is nested more than 100 levels deep"),
        (("scan: null", "scan: " + "a" * 70_000), CorruptFileError, "too large for a settings file"),
        (("scan: null", "scan: !!python/object/apply:os.getcwd []"), None, ""),
    ],
)
def test_settings_of_circuit_tracer(change, error, reason, tmp_path):
    path = CASES["circuit-tracer relu"].write(tmp_path / "foreign")
    (path / "config.yaml").write_text((path / "config.yaml").read_text().replace(*change))
    if error is None:
        d = sl.load(path)
        assert d.training_record["read_from"]["config"]["scan"] == []
    else:
        with pytest.raises(error, match=reason):
            sl.load(path, format="circuit_tracer")


def test_a_folder_of_several_layers(tmp_path):
    path = CASES["circuit-tracer, one of two files"].write(tmp_path / "foreign").parent
    with pytest.raises(
        ConfigError, match=r"holds transcoders of 2 layers; name the file of one, such as .*layer_0\.safetensors"
    ):
        sl.load(path)


def test_every_dtype_is_kept(tmp_path):
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        own = make("topk").to(dtype).save(tmp_path / "own", exists="overwrite")
        for format in WRITTEN:
            again = sl.load(sl.convert(own, tmp_path / format, format, exists="overwrite"), format=format)
            assert again.W_dec.dtype == dtype
            assert torch.equal(again.W_enc, make("topk").to(dtype).W_enc)


@pytest.mark.parametrize("rule", ["l1", "topk", "jumprelu", "batch_topk"])
@pytest.mark.parametrize("skip", [False, True])
def test_circuit_tracer_files(rule, skip, tmp_path, caplog):
    """The equations of circuit-tracer on the file, and its settings line by line."""
    d = make(rule, d_out=D_IN, skip=skip, hook="blocks.2.ln2.hook_normalized")
    folder = sl.convert(d.save(tmp_path / "own"), tmp_path / "theirs", "circuit_tracer")
    config = dict(line.split(": ", 1) for line in (folder / "config.yaml").read_text().splitlines())
    config = {key: json.loads(value) for key, value in config.items()}
    assert (config["model_kind"], config["feature_input_hook"]) == ("transcoder_set", "ln2.hook_normalized")
    assert (config["feature_output_hook"], config.get("k")) == ("hook_mlp_out", 3 if rule == "topk" else None)
    t = {name: tensor.double() for name, tensor in load_file(folder / "layer_2.safetensors").items()}
    assert ("W_skip" in t) == skip
    h = X @ t["W_enc"].T + t["b_enc"]
    if config["activation"] == "topk":
        codes = h * torch.zeros_like(h).scatter(-1, h.topk(3, dim=-1).indices, 1.0)
        assert "circuit-tracer keeps negative codes" in caplog.text
    else:
        codes = h * (h > t.get("activation_function.threshold", 0))
        assert config["activation"] == ("relu" if rule == "l1" else "jumprelu")
    y = codes @ t["W_dec"] + t["b_dec"] + (X @ t["W_skip"].T if skip else 0)
    torch.testing.assert_close(d.encode(X.float()).to_dense().double(), codes, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(d(X.float()).double(), y, rtol=1e-5, atol=1e-5)


# What has no place is refused, and nothing is left behind


def uneven(d: sl.Dictionary) -> sl.Dictionary:
    d.rule.threshold[3] = 0.5
    return d


@pytest.mark.parametrize(
    ("format", "dictionary", "reason"),
    [
        (
            "saelens",
            lambda: make("group_max"),
            "a group_max dictionary of .* cannot be written as saelens: SAELens has no architecture with",
        ),
        ("saelens", lambda: make("topk", d_out=7), "a topk dictionary of .*: SAELens has no architecture 'topk_transcoder'"),
        ("sparsify", lambda: make("l1"), "supports only topk, group_max"),
        ("sparsify", lambda: make("topk", d_out=7), "one read hook and one write hook of the same width"),
        ("dictionary_learning", lambda: make("group_max"), "no class computes it"),
        ("dictionary_learning", lambda: make("topk", d_out=D_IN), "no class computes it"),
        (
            "dictionary_learning",
            lambda: uneven(make("batch_topk")),
            "BatchTopKSAE has one threshold, but .* differ",
        ),
        ("circuit_tracer", lambda: make("l1"), "transcoders whose input and output have the same width"),
        ("circuit_tracer", lambda: make("gated", d_out=D_IN), "supports only relu, topk, jumprelu"),
        ("circuit_tracer", lambda: make("l1", d_out=D_IN, hook="somewhere"), "it needs hooks of a single layer"),
        ("gemma_scope", lambda: make("topk"), r"its codes are ReLU\(h\) above a threshold"),
        ("qwen_scope", lambda: make("topk"), "qwen_scope files can be read, not written"),
    ],
)
def test_what_a_format_has_no_place_for(format, dictionary, reason, tmp_path):
    own = dictionary().save(tmp_path / "own")
    with pytest.raises(ConfigError, match=reason):
        sl.convert(own, tmp_path / "theirs", format)
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def test_per_token_norms_are_lost_by_other_formats(tmp_path):
    d = load(CASES["openai TopK"], tmp_path)
    own = d.save(tmp_path / "own")
    for format in ("sparsify", "dictionary_learning"):
        with pytest.raises(ConfigError, match="the layer_norm of each activation would be lost"):
            sl.convert(own, tmp_path / "theirs", format)
    again = sl.load(sl.convert(own, tmp_path / "theirs", "saelens"))
    assert torch.equal(again(X.float()), d(X.float()))
    with pytest.raises(ConfigError, match="needs x, to undo the layer_norm of each activation"):
        d.decode(d.encode(X.float()))
    with pytest.raises(ConfigError, match="needs a dictionary that writes the one port that it reads"):
        sl.Dictionary(make("topk").rule, reads=D_IN, d_sae=D_SAE, writes=7, token_norm="layer_norm")
    with pytest.raises(ConfigError, match="token_norm = 'rms'; expected one of None, layer_norm, constant_norm"):
        sl.Dictionary(make("topk").rule, reads=D_IN, d_sae=D_SAE, token_norm="rms")


def test_an_output_that_exists_is_kept(tmp_path):
    own = make("topk").save(tmp_path / "own")
    with pytest.raises(OutputExistsError):
        sl.convert(own, own, "sparsify")
    assert sl.load(own).rule.plugin_name == "topk"
    with pytest.raises(OutputExistsError, match=r"is an input, and replacing .* would remove it"):
        sl.convert(own, own, "sparsify", exists="overwrite")
    theirs = sl.convert(own, tmp_path / "theirs", "sparsify")
    assert sl.load(sl.convert(own, theirs, "sparsify", exists="overwrite")).rule.plugin_name == "topk"
    with pytest.raises(OutputExistsError, match=r"sae\.safetensors"):
        sl.convert(own, theirs, "dictionary_learning", exists="overwrite")
    with pytest.raises(PluginError, match="no formats plugin is called 'sparsfy'; did you mean sparsify"):
        sl.convert(own, tmp_path / "x", "sparsfy")


@pytest.mark.parametrize(
    ("case", "changes", "reason"),
    [
        ("standard", {"normalize_activations": "expected_average_only_in"}, "whose statistics are not in the file"),
        ("standard", {"normalize_activations": ["none"]}, "normalize_activations is"),
        ("standard", {"architecture": "temporal"}, "no rule computes the codes of architecture 'temporal'"),
        ("before 6", {"activation_fn": "tanh-relu"}, "architecture 'standard' with 'tanh-relu'"),
        ("matching_pursuit", {"residual_threshold": 0.01}, "stops early"),
        ("matching_pursuit", {"apply_b_dec_to_input": False}, "starts from x − b_dec"),
        ("transcoder", {"normalize_activations": "layer_norm"}, "a transcoder .*layer_norm"),
        ("sparsify topk", {"signed": True}, "keeps negative codes"),
        ("sparsify skip", {"transcode": False}, "an autoencoder with a skip connection"),
        ("llamascopium relu", {"act_fn": "batchtopk"}, "codes by 'batchtopk' depend on the rest of their batch"),
        ("llamascopium relu", {"use_glu_encoder": True}, "a gated encoder"),
        (
            "llamascopium relu",
            {"norm_activation": "token-wise"},
            "norm_activation 'token-wise' is computed from each batch or token",
        ),
    ],
)
def test_what_has_no_place_here(case, changes, reason, tmp_path):
    path = edited(case, tmp_path, "config.json" if case.startswith("llama") else "cfg.json", **changes)
    with pytest.raises(ConfigError, match=reason):
        sl.load(path)


def test_settings_and_tensors_have_to_agree(tmp_path):
    for changes, reason in (
        ({"d_sae": 25}, r"W_enc has shape \(10, 24\), expected \[d_in d_sae\] with d_in = 10 d_sae = 25"),
        ({"d_in": "10"}, "d_in is '10'; expected int"),
        ({"d_in": True}, "d_in is 'True'; expected int"),
        ({"d_in": -10}, "d_in = -10; expected a whole number"),
        ({"d_in": None}, "d_in = None; expected a whole number"),
        ({"architecture": "jumprelu"}, r"tensors missing: \['threshold'\]; not expected: none"),
        ({"architecture": "gated"}, r"not expected: \['b_enc'\]"),
        ({"architecture": "topk", "k": 0}, "TopK: k = 0: input should be greater than 0"),
    ):
        with pytest.raises(CorruptFileError, match=reason):
            sl.load(edited("standard", tmp_path / str(changes), **changes))
    with pytest.raises(CorruptFileError, match=r"k = 3, but .* has trainer\.k = 4"):
        sl.load(edited("BatchTopKSAE", tmp_path, "config.json", "trainer", k=4), format="dictionary_learning")


@pytest.mark.parametrize(
    ("trainer", "hook"),
    [
        ({"submodule_name": "mlp_out_layer_2"}, "blocks.2.mlp.hook_out"),
        ({"submodule_name": "attention_out_layer_2"}, "blocks.2.attn.hook_out"),
        ({"submodule_name": "gpt_neox.layers.4"}, "blocks.4.hook_resid_post"),
        ({"submodule_name": "somewhere"}, None),
        ({"submodule_name": None}, "blocks.3.hook_resid_post"),
        ({"submodule_name": None, "layer": None}, None),
    ],
)
def test_hooks_of_dictionary_learning(trainer, hook, tmp_path):
    path = edited("AutoEncoder", tmp_path, "config.json", "trainer", **trainer)
    assert sl.load(path, format="dictionary_learning").hook == hook


def test_llamascopium_without_an_encoder_or_with_several(tmp_path):
    path = CASES["llamascopium relu"].write(tmp_path / "foreign")
    tensors = load_file(path / "sae_weights.safetensors")
    W_E = tensors.pop("W_E")
    for change, error, reason in (
        ({}, CorruptFileError, r"tensors missing: \['W_E'\]"),
        ({"W_E": W_E[None]}, ConfigError, "a gated encoder, or an encoder of several layers, is not supported"),
    ):
        save_file(tensors | change, path / "sae_weights.safetensors")
        with pytest.raises(error, match=reason):
            sl.load(path, format="llamascopium")


def test_groups_that_do_not_add_up(tmp_path):
    path = edited("MatryoshkaBatchTopKSAE", tmp_path, "config.json")
    state = torch.load(path / "ae.pt", weights_only=True)
    for sizes in ([4, 8], [4, -4, 24], []):
        torch.save(state | {"group_sizes": torch.tensor(sizes, dtype=torch.int64)}, path / "ae.pt")
        with pytest.raises(CorruptFileError, match="group_sizes must be positive and add up to dict_size"):
            sl.load(path, format="dictionary_learning")


def test_settings_that_are_no_json_do_not_keep_a_dictionary_from_being_saved(tmp_path):
    d = sl.load(edited("standard", tmp_path, lr=float("nan"), l1=float("inf")))
    again = sl.load(d.save(tmp_path / "own"))
    config = again.training_record["read_from"]["config"]
    assert (config["lr"], config["l1"]) == ("NaN", "Infinity")


# Finding the format


def test_a_folder_that_holds_nothing_known(tmp_path):
    (tmp_path / "empty").mkdir()
    names = ", ".join(sorted(registry.names("formats")))
    with pytest.raises(CorruptFileError, match=rf"cfg\.json is missing; .* meant\? .*{names}"):
        sl.load(tmp_path / "empty")
    (tmp_path / "text").write_text("no dictionary")
    with pytest.raises(CorruptFileError, match=f"text holds no dictionary of saelens_lite.*{names}"):
        sl.load(tmp_path / "text")
    with pytest.raises(CorruptFileError, match=r"nowhere/cfg\.json is missing; is .*nowhere the folder you meant\?"):
        sl.load(tmp_path / "nowhere")
    with pytest.raises(PluginError, match="no formats plugin is called 'sae_lens'; did you mean saelens"):
        sl.load(tmp_path / "empty", format="sae_lens")


@pytest.mark.parametrize("case", ["AutoEncoder", "openai ReLU"])
def test_pickles_are_read_on_request_only(case, tmp_path, monkeypatch):
    path = CASES[case].write(tmp_path / "foreign")
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(
        ConfigError, match=f"looks like {CASES[case].format}, whose files are pickles, which are read only on request"
    ):
        sl.load(path)


def test_files_are_known_by_what_they_hold(tmp_path):
    """Each case is detected by its own format alone, whatever a single file is called that has no settings beside it."""
    found = {}
    for name, case in CASES.items():
        path = case.write(tmp_path / name / "foreign")
        needs_name = case.format == "deepseek_r1" or path.parent.name == "checkpoints"
        if path.is_file() and not list(path.parent.glob(f"{path.stem}_cfg.json")) and not needs_name:
            path = path.rename(path.with_name("renamed"))
        readers = [registry.load(format, "formats")() for format in registry.names("formats")]
        found[name] = [reader.plugin_name for reader in readers if reader.detect(path)]
    assert found == {name: [case.format] for name, case in CASES.items()}


def test_weights_without_their_settings_are_not_taken_for_another_tools(tmp_path):
    """Tensors of these names belong to Gemma Scope in an npz file alone."""
    path = CASES["jumprelu"].write(tmp_path / "foreign")
    with pytest.raises(CorruptFileError, match="holds no dictionary"):
        sl.load(path / "sae_weights.safetensors")


def test_a_broken_format_of_a_stranger_disturbs_nobody(tmp_path, monkeypatch):
    plugins, point = registry.plugins, EntryPoint("broken", "nowhere_of_tests:Nothing", "saelens_lite.formats")
    broken = registry.Plugin("broken", "formats", "stranger", "1", point.value, point)
    monkeypatch.setattr(registry, "plugins", lambda kind="sparsity": [*plugins(kind), *([broken] if kind == "formats" else [])])
    assert load(CASES["standard"], tmp_path).rule.plugin_name == "l1"


def test_our_cfg_json_says_the_same_to_everybody(tmp_path):
    folder = make("topk").save(tmp_path / "own")
    config = json.loads((folder / "cfg.json").read_text())
    for key, value in (("k", 4), ("dtype", "float16"), ("architecture", "standard"), ("normalize_activations", "layer_norm")):
        (folder / "cfg.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(CorruptFileError, match=key if key != "dtype" else "cfg.json says float16"):
            sl.load(folder)
    (folder / "cfg.json").write_text(json.dumps(config))
    assert sl.load(folder).rule.config.k == 3


# The command line


@pytest.mark.parametrize("name", ["topk, layer_norm", "AutoEncoderTopK", "openai TopK", "gemma scope", "sparsify skip"])
def test_inspect_reads_no_weights(name, tmp_path, monkeypatch, command):
    case = CASES[name]
    path = case.write(tmp_path / "foreign")
    monkeypatch.setattr(TensorFile, "read", lambda self, names: {n: torch.tensor(3) for n in names})
    code, out, err = command("inspect", path, *(["--format", case.format] if case.pickled else []))
    assert (code, err) == (0, "")
    facts = json.loads(out)
    assert (facts["format"], facts["architecture"], facts["sparsity"]) == (case.format, case.architecture, case.rule)
    assert (facts["d_in"], facts["d_sae"], facts["d_out"]) == (D_IN, D_SAE, D_IN)
    assert {t["shape"] == [D_IN, D_SAE] or t["shape"] == [D_SAE, D_IN] for t in facts["tensors"].values()} == {True, False}
    file = path if path.is_file() else path / facts["file"]["name"]
    assert facts["file"]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    found = facts["origin"] | {"hook": facts["reads"], "target": facts.get("writes")}
    assert {key: found[key] for key in case.origin} == json.loads(json.dumps(case.origin))


def test_convert_on_the_command_line(tmp_path, command):
    path = CASES["AutoEncoderTopK"].write(tmp_path / "foreign")
    code, _, err = command("convert", path, tmp_path / "out", "--format", "saelens")
    assert (code, (tmp_path / "out").exists()) == (2, False)
    assert "read only on request: set --format dictionary_learning" in err
    request = ("--source-format", "dictionary_learning")
    code, out, _ = command("convert", path, tmp_path / "out", "--format", "saelens_lite", *request)
    assert (code, out.strip()) == (0, str(tmp_path / "out"))
    assert sl.load(tmp_path / "out").rule.config.k == 3
    code, out, _ = command("inspect", tmp_path / "out")
    assert json.loads(out)["metadata"]["saelens_lite"]["sparsity"] == "topk"


def test_dictionary_load_reads_our_own_folders_only(tmp_path):
    """An address or another tool's folder is refused with the name of the function that reads it."""
    path = CASES["standard"].write(tmp_path / "theirs")
    with pytest.raises(CorruptFileError, match=r"was not written by saelens_lite; use saelens_lite\.load"):
        sl.Dictionary.load(path)
    own = sl.load(path).save(tmp_path / "own")
    assert torch.equal(sl.Dictionary.load(own).W_dec, sl.load(own).W_dec)
    assert sl.load(own).source == str(own)
    for address in ("hf://user/repo/a@v1", Path("hf://user/repo")):
        with pytest.raises(ConfigError, match=r"is an address; .* Use saelens_lite\.load\('hf:/"):
            sl.Dictionary.load(address)
