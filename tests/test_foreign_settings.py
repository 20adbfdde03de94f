"""Settings of other tools beside the weights: hooks, heads, factors, positions and tokens left out are honoured or refused."""

import json
import logging
from pathlib import Path

import pytest
import torch
from foreign import CASES, D_IN, D_SAE, METADATA, edited
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import saelens_lite as sl
from saelens_lite.dictionary.folder import slice_without
from saelens_lite.errors import ConfigError, CorruptFileError, SaelensLiteError


def saelens(folder: Path, **metadata) -> sl.Origin:
    """Return the origin of a SAELens file with that metadata, which the file's own format keeps when it is written again."""
    path = edited("standard", folder, metadata=METADATA | metadata)
    origin = sl.load(path).origin
    assert sl.load(sl.convert(path, folder / "again", "saelens")).origin == origin
    return origin


# Positions and tokens that do not count


@pytest.mark.parametrize(
    ("bounds", "n_ctx"),
    [
        (None, 16),
        ([None], 16),
        ([1, None], 16),
        ([5, -5], 16),
        ([3], 16),
        ([-4, None], 16),
        ([0, None, 2], 16),
        ([1, 12, 3], 16),
        ([2, 100], 16),
        ([3, None], None),
        ([0, None], None),
        ([None, None, 1], None),
    ],
)
def test_positions_outside_of_seqpos_slice_are_excluded(bounds, n_ctx, tmp_path):
    row = list(range(16))
    wanted = set(row) - set(row[slice(*(bounds or [None]))])
    assert saelens(tmp_path, seqpos_slice=bounds, context_size=n_ctx).excluded_positions == tuple(sorted(wanted))


def test_seqpos_slice_before_version_6_stands_at_the_top(tmp_path):
    path = edited("before 6", tmp_path, seqpos_slice=[2, None])
    assert sl.load(path).origin.excluded_positions == (0, 1)


@pytest.mark.parametrize(
    ("bounds", "n_ctx", "reason"),
    [
        ([5, -5], None, r"seqpos_slice is \[5, -5\], but context_size, on which it depends, is missing"),
        ([-5, None], None, "context_size, on which it depends"),
        ([0, None, 2], None, "context_size, on which it depends"),
        ([5, 5], 16, "which leaves 0 of 16 positions"),
        ([20, None], 16, "which leaves 0 of 16 positions"),
        ([0, None, 0], 16, "its step must be at least 1"),
        ([None, None, -1], 16, "its step must be at least 1"),
        ([], 16, "expected up to three whole numbers"),
        ([1, 2, 3, 4], 16, "expected up to three whole numbers"),
        ([True], 16, "expected up to three whole numbers"),
        ([1.5], 16, "expected up to three whole numbers"),
        ("1:", 16, "expected up to three whole numbers"),
        ([2**30, None], None, "which leaves 0 of 1,073,741,824"),
        ([0, 1], 2**31 - 1, "which leaves 1 of 2,147,483,647"),
    ],
)
def test_slices_that_say_nothing_certain_are_refused(bounds, n_ctx, reason, tmp_path):
    path = edited("standard", tmp_path, metadata=METADATA | {"seqpos_slice": bounds, "context_size": n_ctx})
    with pytest.raises(CorruptFileError, match=reason):
        sl.load(path)


@given(
    n_ctx=st.integers(1, 12),
    bounds=st.tuples(*[st.none() | st.integers(-13, 13)] * 2, st.none() | st.integers(1, 5)),
)
def test_a_slice_is_found_again_from_what_it_leaves_out(n_ctx, bounds):
    row = list(range(n_ctx))
    kept = row[slice(*bounds)]
    found = slice_without([p for p in row if p not in kept], n_ctx)
    if kept == row or not kept:
        assert found is None
    else:
        assert row[slice(*found)] == kept


def test_positions_that_are_no_slice_stay_in_our_own_metadata(tmp_path):
    assert slice_without((1, 2), 8) is None
    assert slice_without((0, 1), None) == [2, None]
    assert slice_without((1,), None) is None
    origin = sl.Origin(n_ctx=8, excluded_positions=(0, 3), excluded_token_ids=(7, 5))
    reads = sl.Port(hook="blocks.1.hook_resid_pre", width=D_IN)
    d = sl.Dictionary.create("topk", reads=reads, d_sae=D_SAE, options={"k": 3}, origin=origin)
    folder = d.save(tmp_path / "d")
    metadata = json.loads((folder / "cfg.json").read_text())["metadata"]
    assert "seqpos_slice" not in metadata
    assert metadata["exclude_special_tokens"] == [7, 5]
    assert sl.load(folder).origin == origin


@pytest.mark.parametrize(("said", "ids"), [(None, ()), (True, ()), (False, ()), ([], ()), ([50256, 13, 13], (13, 50256))])
def test_special_tokens_that_saelens_lists_are_excluded(said, ids, tmp_path):
    assert saelens(tmp_path, exclude_special_tokens=said).excluded_token_ids == ids


@pytest.mark.parametrize("said", ["bos", [1.5], [-1], [True], {"ids": []}])
def test_special_tokens_that_are_no_ids_are_refused(said, tmp_path):
    with pytest.raises(CorruptFileError, match=r"exclude_special_tokens is .*; expected true, false or token ids"):
        saelens(tmp_path, exclude_special_tokens=said)


def test_tokens_that_a_run_of_sparsify_left_out_are_excluded(tmp_path):
    path = CASES["sparsify topk"].write(tmp_path / "run")
    assert sl.load(path).origin.excluded_token_ids == ()
    run = path.parent / "config.json"
    for said, ids in (([3, 1], (1, 3)), ([], ()), (None, ())):
        run.write_text(json.dumps({"sae": {"k": 3}, "exclude_tokens": said}))
        assert sl.load(path).origin.excluded_token_ids == ids
    run.write_text(json.dumps({"exclude_tokens": [3]}))  # no run of sparsify
    assert sl.load(path).origin.excluded_token_ids == ()
    run.write_text(json.dumps({"sae": {}, "exclude_tokens": ["a"]}))
    with pytest.raises(CorruptFileError, match=r"exclude_tokens is \['a'\]; expected token ids"):
        sl.load(path)


# Hooks


def test_a_transcoder_that_writes_the_hook_it_reads_is_refused(tmp_path):
    """A dictionary that writes what it reads subtracts b_dec from x; a transcoder does not."""
    hook = "blocks.0.hook_resid_pre"
    writes = sl.Port(hook="blocks.0.hook_resid_post", width=6)
    d = sl.Dictionary.create("l1", reads=sl.Port(hook=hook, width=6), writes=writes, d_sae=8)
    path = d.save(tmp_path / "d") / "cfg.json"
    config = json.loads(path.read_text())
    del config["metadata"]["saelens_lite"]
    path.write_text(json.dumps(config))
    assert sl.load(path.parent).writes == (writes,)
    config["metadata"]["hook_name_out"] = hook
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=f"reads and writes {hook}"):
        sl.load(path.parent)


@pytest.mark.parametrize("key", ["hook_head_index", "hook_point_head_index"])
@pytest.mark.parametrize("head", [0, 2])
def test_the_head_of_a_hook_with_heads_is_part_of_its_name(key, head, tmp_path):
    for number, name in enumerate(("hook_z", "hook_q", "hook_k", "hook_v")):
        hook = f"blocks.5.attn.{name}"
        places = (
            {"metadata": METADATA | {"hook_name": hook, key: head}},
            {"metadata": METADATA | {"hook_name": hook}, key: head},
        )
        for place in places:
            path = edited("standard", tmp_path / f"{number}{len(place)}", reshape_activations="hook_z", **place)
            assert sl.load(path).hook == f"{hook}.head_{head}"
        path = edited("before 6", tmp_path / f"{number} old", hook_point=hook, **{key: head})
        assert sl.load(path).hook == f"{hook}.head_{head}"


@pytest.mark.parametrize("case", ["standard", "before 6"])
@pytest.mark.parametrize("key", ["hook_head_index", "hook_point_head_index", "hook_head_index_out"])
@pytest.mark.parametrize("head", [0, 2])
def test_a_head_of_a_hook_without_heads_is_refused(case, key, head, tmp_path):
    path = edited(case, tmp_path, **{key: head})
    reason = rf"{key} is {head}, but the hook (None|blocks\.8\.hook_resid_pre) is not one that has attention heads"
    with pytest.raises(ConfigError, match=reason):
        sl.load(path)
    config = json.loads((path / "cfg.json").read_text())
    config[key] = None
    (path / "cfg.json").write_text(json.dumps(config | {"metadata": METADATA | {key: head}}))
    with pytest.raises(ConfigError, match=reason):
        sl.load(path)


@pytest.mark.parametrize(
    ("metadata", "hook"),
    [
        ({"hook_name": "blocks.{layer}.hook_mlp_out", "hook_layer": 4}, "blocks.4.hook_mlp_out"),
        ({"hook_name": "model.layers.10", "model_class_name": "AutoModelForCausalLM"}, "blocks.10.hook_resid_post"),
        ({"hook_name": "transformer.h.3.mlp"}, "blocks.3.mlp.hook_out"),
        ({"hook_name": "somewhere.else"}, "somewhere.else"),
        ({"hook_name": "hook_embed"}, "hook_embed"),
    ],
)
def test_hooks_of_saelens(metadata, hook, tmp_path):
    assert sl.load(edited("standard", tmp_path, metadata=METADATA | metadata)).hook == hook


def test_hooks_before_version_6_have_their_layer_beside_them(tmp_path):
    path = edited("before 6", tmp_path, hook_point="blocks.{layer}.hook_resid_pre", hook_point_layer=7)
    assert sl.load(path).hook == "blocks.7.hook_resid_pre"


def test_metadata_of_a_version_before_6_is_not_what_saelens_reads(tmp_path):
    top = {"hook_name": "blocks.1.hook_resid_pre", "context_size": 64}
    for version, hook in (("5.9.1", "blocks.1.hook_resid_pre"), ("6.0.0-rc.1", METADATA["hook_name"])):
        path = edited("standard", tmp_path / version, metadata=METADATA | {"sae_lens_version": version}, **top)
        assert sl.load(path).hook == hook


UNVERSIONED = {key: value for key, value in METADATA.items() if key != "sae_lens_version"}


@pytest.mark.parametrize("at_top", [(), ("hook_name", "context_size"), ("model_name", "dataset_path")])
def test_a_file_without_a_version_keeps_its_hook_and_model_wherever_they_are(at_top, tmp_path):
    top, metadata = ({k: v for k, v in UNVERSIONED.items() if (k in at_top) == wanted} for wanted in (True, False))
    path = edited("constant norm", tmp_path, metadata=metadata, **top)
    d = sl.load(path)
    assert (d.hook, d.token_norm) == ("blocks.8.hook_resid_pre", "constant_norm")
    assert d.origin == sl.load(edited("constant norm", tmp_path / "versioned")).origin
    assert (d.origin.model, d.origin.text, d.origin.n_ctx) == ("gpt2", "openwebtext", 128)


def test_only_the_form_from_before_version_6_stands_for_a_centred_model(tmp_path):
    unsaid = {key: value for key, value in UNVERSIONED.items() if key != "model_from_pretrained_kwargs"}
    assert sl.load(edited("standard", tmp_path / "a", metadata=unsaid)).origin.processing == ()
    assert sl.load(edited("standard", tmp_path / "b", metadata=None, **unsaid)).origin.processing == ("center_writing_weights",)


def test_a_file_without_a_version_that_contradicts_itself_is_refused(tmp_path):
    path = edited("standard", tmp_path, metadata=UNVERSIONED, hook_name="blocks.2.hook_resid_pre")
    with pytest.raises(CorruptFileError, match=r"hook_name is 'blocks\.2.*', but metadata\.hook_name is 'blocks\.8\."):
        sl.load(path)


@pytest.mark.parametrize("hook", ["blocks.{layer}.hook_resid_pre", "blocks.{all}.hook_resid_pre"])
def test_a_placeholder_that_nothing_fills_is_refused(hook, tmp_path):
    with pytest.raises(ConfigError, match=r"placeholder .*layer"):
        saelens(tmp_path, hook_name=hook)


def test_the_models_revision_is_kept_and_other_loading_options_are_said(tmp_path, caplog):
    options = {
        "revision": "abc",
        "dtype": "bfloat16",
        "center_writing_weights": False,
        "fold_ln": True,
        "fold_value_biases": None,
    }
    path = edited("standard", tmp_path, metadata=METADATA | {"model_from_pretrained_kwargs": options})
    origin = sl.load(path).origin
    assert (origin.revision, origin.processing) == ("abc", ())
    assert "the model was loaded with fold_ln = True, which load_model does not apply" in caplog.text


@pytest.mark.parametrize("seed", ["", "seed0", "seed_12", "seed1/seed2"])
@pytest.mark.parametrize(
    ("module", "hook"),
    [
        ("layers.5", "blocks.5.hook_resid_post"),
        ("layers.5.mlp", "blocks.5.mlp.hook_out"),
        ("transformer.h.2.attn", "blocks.2.attn.hook_out"),
        ("embed_tokens", "hook_embed"),
        ("somewhere", None),
    ],
)
def test_hooks_of_sparsify_are_those_of_the_module_whatever_the_seed(module, hook, seed, tmp_path):
    path = CASES["sparsify topk"].write(tmp_path / "foreign")
    folder = tmp_path / "run" / module / seed
    folder.parent.mkdir(parents=True, exist_ok=True)
    path.rename(folder)
    assert sl.load(folder).hook == hook


@pytest.mark.parametrize(
    ("inside", "outside", "hooks"),
    [
        ("blocks.{layer}.hook_resid_mid", "blocks.{layer}.hook_mlp_out", ("blocks.3.hook_resid_mid", "blocks.3.hook_mlp_out")),
        ("blocks.3.hook_resid_mid", "mlp.hook_out", ("blocks.3.hook_resid_mid", "blocks.3.mlp.hook_out")),
        ("layers.{layer}.mlp", "model.layers.{layer}.mlp", ("blocks.3.mlp.hook_in", "blocks.3.mlp.hook_out")),
    ],
)
def test_hooks_of_circuit_tracer(inside, outside, hooks, tmp_path):
    d = sl.load(circuit_tracer(tmp_path, inside, outside))
    assert (d.hook, d.writes[0].hook) == hooks


@pytest.mark.parametrize(
    ("inside", "error", "reason"),
    [
        ("blocks.{all}.hook_resid_mid", ConfigError, "placeholder .*layer"),
        ("blocks.4.hook_resid_mid", CorruptFileError, "but the file is that of layer 3"),
    ],
)
def test_hooks_of_circuit_tracer_that_are_not_known_are_refused(inside, error, reason, tmp_path):
    with pytest.raises(error, match=reason):
        sl.load(circuit_tracer(tmp_path, inside, "hook_mlp_out"), format="circuit_tracer")


def test_a_placeholder_of_a_file_without_a_number_is_refused(tmp_path):
    path = circuit_tracer(tmp_path, "blocks.{layer}.hook_resid_mid", "hook_mlp_out")
    file = (path / "layer_3.safetensors").rename(path / "mine.safetensors")
    with pytest.raises(ConfigError, match=r"placeholder .*layer"):
        sl.load(file)


def circuit_tracer(folder: Path, inside: str, outside: str) -> Path:
    path = CASES["circuit-tracer relu"].write(folder / "foreign")
    text = (path / "config.yaml").read_text().replace("'ln2.hook_normalized'", f"'{inside}'")
    (path / "config.yaml").write_text(text.replace("'hook_mlp_out'", f"'{outside}'"))
    return path


def buffer(folder: Path, submodule: str, **changes) -> Path:
    """Return files of dictionary_learning with another buffer."""
    path = edited("AutoEncoder", folder, "config.json", "trainer", submodule_name=submodule)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"buffer": {"ctx_len": 128} | changes}))
    return path


def test_what_enters_a_module_is_not_what_leaves_it(tmp_path):
    for io, hook in (("in", "blocks.4.mlp.hook_in"), ("out", "blocks.4.mlp.hook_out")):
        path = buffer(tmp_path / io, "gpt_neox.layers.4.mlp", io=io)
        assert sl.load(path, format="dictionary_learning").hook == hook
    for number, (submodule, changes, reason) in enumerate(
        (
            ("gpt_neox.layers.4.mlp", {"io": "in_and_out"}, "input and output differ"),
            ("resid_post_layer_3", {"io": "in"}, "'resid_post_layer_3', an activation"),
            ("attn_out_layer_3", {"layer": 3}, "attention heads"),
        )
    ):
        with pytest.raises(ConfigError, match=reason):
            sl.load(buffer(tmp_path / str(number), submodule, **changes), format="dictionary_learning")


# Settings that change the function


def with_factor(folder: Path, said: bool | None, name: str = "scaling_factor", value: float = 2.0) -> Path:
    """Return a SAELens folder with a scaling factor of each latent."""
    path = edited("standard", folder, finetuning_scaling_factor=said)
    tensors = load_file(path / "sae_weights.safetensors")
    save_file(tensors | {name: torch.full((D_SAE,), value)}, path / "sae_weights.safetensors")
    return path


@pytest.mark.parametrize("said", [False, None])
@pytest.mark.parametrize("name", ["scaling_factor", "finetuning_scaling_factor"])
def test_a_factor_that_the_settings_deny_is_refused_unless_it_is_one(said, name, tmp_path):
    with pytest.raises(ConfigError, match=f"holds {name}, which differs from 1, but finetuning_scaling_factor"):
        sl.load(with_factor(tmp_path / "two", said, name))
    d = sl.load(with_factor(tmp_path / "one", said, name, 1.0))
    assert torch.equal(d.W_dec, CASES["standard"].exact["W_dec"])


def test_a_factor_leaves_the_codes_and_multiplies_what_they_decode_to(tmp_path):
    d, plain = sl.load(with_factor(tmp_path, True)), CASES["standard"].exact
    x = torch.ones(3, D_IN)
    codes = ((x - plain["b_dec"]) @ plain["W_enc"] + plain["b_enc"]).clamp(min=0)
    torch.testing.assert_close(d.encode(x).to_dense(), codes)
    torch.testing.assert_close(d(x), 2 * codes @ plain["W_dec"] + plain["b_dec"])


def test_a_factor_that_is_promised_is_there_once(tmp_path):
    with pytest.raises(CorruptFileError, match=r"missing: \['scaling_factor'\]"):
        sl.load(edited("standard", tmp_path / "none", finetuning_scaling_factor=True))
    path = with_factor(tmp_path / "two", True)
    tensors = load_file(path / "sae_weights.safetensors")
    save_file(tensors | {"finetuning_scaling_factor": tensors["scaling_factor"].clone()}, path / "sae_weights.safetensors")
    with pytest.raises(CorruptFileError, match=r"not expected: \['finetuning_scaling_factor'\]"):
        sl.load(path)


def test_k_is_said_once_or_the_tools_own_default_is_taken_and_said(tmp_path, caplog):
    assert sl.load(CASES["topk without k"].write(tmp_path / "saelens")).rule.config.k == 100
    assert "does not say k; 100 is used, as in SAELens" in caplog.text
    assert sl.load(edited("sparsify topk", tmp_path, k=None)).rule.config.k == 32
    assert "does not say k; 32 is used, as in sparsify" in caplog.text
    caplog.clear()
    path = edited("topk", tmp_path / "kwargs", k=None, activation_fn_kwargs={"k": 5})
    assert sl.load(path).rule.config.k == 5
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    with pytest.raises(CorruptFileError, match=r"k is 3, but activation_fn_kwargs\.k is 5"):
        sl.load(edited("topk", tmp_path / "both", activation_fn_kwargs={"k": 5}))
    with pytest.raises(CorruptFileError, match="activation_fn is 'topk', but k is missing"):  # SAELens 6 would take a ReLU
        sl.load(edited("before 6, topk", tmp_path / "neither", activation_fn_kwargs={}))


def test_k_of_circuit_tracer_is_the_same_in_both_places(tmp_path):
    path = CASES["circuit-tracer, k in the file"].write(tmp_path / "foreign")
    config = path / "config.yaml"
    config.write_text(config.read_text() + "k: 4\n")
    with pytest.raises(CorruptFileError, match=r"k = 3, but .*config\.yaml has k = 4"):
        sl.load(path)


@pytest.mark.parametrize(
    ("case", "changes", "reason"),
    [
        ("standard", {"reshape_activations": "hook_q"}, "reshape_activations is 'hook_q'"),
        ("transcoder", {"apply_b_dec_to_input": True}, "in a transcoder b_dec belongs only to the output"),
        ("jumprelu", {"activation_fn": "tanh-relu"}, "architecture 'jumprelu' with 'tanh-relu'"),
        ("gated", {"activation_fn_str": "topk"}, "architecture 'gated' with 'topk'"),
        ("sparsify topk", {"embed_skip": True}, "embed_skip is true .its output depends on tokens"),
        ("sparsify topk", {"gram_lookup": True}, "gram_lookup is true"),
        ("sparsify topk", {"activation": "relu"}, "no rule computes activation 'relu'"),
        ("gemma scope 2", {"type": "clt"}, "type is 'clt', but w_dec has shape .*, without an axis of layers"),
        ("gemma scope 2", {"type": "crosscoder"}, "type is 'crosscoder', but w_dec has shape .*, without an axis of layers"),
        ("gemma scope 2", {"type": "other"}, "type 'other' with architecture 'jump_relu'"),
        ("gemma scope 2", {"architecture": "topk"}, "with architecture 'topk'"),
        ("gemma scope 2", {"affine_connection": True}, "affine_connection is true, but tensor"),
        ("gemma scope 2 skip", {"type": "sae"}, "type is 'sae', but it has a skip connection"),
        ("llamascopium relu", {"sae_type": "lorsa"}, "sae_type 'lorsa' is not supported"),
        ("llamascopium relu", {"d_sae": 25}, "d_sae = 25"),
        (
            "llamascopium transcoder",
            {"apply_decoder_bias_to_pre_encoder": True},
            "apply_decoder_bias_to_pre_encoder .* transcoder",
        ),
    ],
)
def test_settings_that_are_not_computed_are_refused(case, changes, reason, tmp_path):
    ours = case.startswith(("gemma", "llama"))
    with pytest.raises(SaelensLiteError, match=reason):
        sl.load(edited(case, tmp_path, "config.json" if ours else "cfg.json", **changes))


def test_a_transcoder_of_gemma_scope_is_one_where_its_settings_say_so(tmp_path):
    d = sl.load(edited("gemma scope 2", tmp_path, "config.json", type="transcoder"))
    assert not d.writes_what_it_reads


def test_a_module_of_gemma_scope_without_a_hook_is_said(tmp_path, caplog):
    d = sl.load(edited("gemma scope 2", tmp_path, "config.json", hf_hook_point_in="model.layers.7.odd.output"))
    assert d.hook is None
    assert "no hook is known for model.layers.7.odd.output" in caplog.text


# Thresholds below zero


def with_a_threshold_below_zero(name, folder):
    path = CASES[name].write(folder)
    file = next(iter(path.glob("layer_*.safetensors")), path / "ae.pt")
    tensors = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
    key = next(key for key in tensors if key.endswith("threshold"))
    tensors[key][2] = -1.0
    save_file(tensors, file) if file.suffix == ".safetensors" else torch.save(tensors, file)
    return path, tensors


def test_thresholds_below_zero_of_tools_that_do_not_rectify_are_refused(tmp_path):
    """There a code is h where h > θ, which is negative between θ and zero."""
    path, _ = with_a_threshold_below_zero("circuit-tracer jumprelu", tmp_path / "foreign")
    with pytest.raises(ConfigError, match="1 thresholds are below zero"):
        sl.load(path)


def test_thresholds_below_zero_act_as_zero_in_a_tool_that_rectifies(tmp_path):
    path, w = with_a_threshold_below_zero("JumpReluAutoEncoder", tmp_path / "foreign")
    d = sl.load(path, format="dictionary_learning").double()
    x = torch.randn(40, D_IN, generator=torch.Generator().manual_seed(5)).double()
    h = x @ w["W_enc"].double() + w["b_enc"].double()
    assert ((h > -1) & (h < 0))[:, 2].any()
    torch.testing.assert_close(d.encode(x).to_dense(), (h * (h > w["threshold"].double())).relu(), rtol=1e-5, atol=1e-5)


def test_settings_of_others_above_a_dictionary_of_sparsify_do_not_matter(tmp_path, caplog):
    path = CASES["sparsify topk"].write(tmp_path / "run")
    for content in ("{", "[1]", '{"sae": {}}', '{"exclude_tokens": "all"}'):
        (tmp_path / "config.json").write_text(content)
        assert sl.load(path).origin.excluded_token_ids == ()
        assert ("config.json" in caplog.text) == (content in ("{", "[1]"))
        caplog.clear()


def test_top_k_of_circuit_tracer_without_k_says_where_to_add_it(tmp_path):
    path = CASES["circuit-tracer topk"].write(tmp_path / "d")
    config = path / "config.yaml"
    config.write_text("".join(line for line in config.read_text().splitlines(True) if not line.startswith("k:")))
    with pytest.raises(CorruptFileError, match=r"config\.yaml: .* topk, but k is missing; add a line such as k: 32"):
        sl.load(path)
