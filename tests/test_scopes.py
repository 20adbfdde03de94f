"""Qwen-Scope, Goodfire, qresearch, OpenAI and Llama Scope: files without all facts, thresholds, and what is refused."""

import json

import pytest
import torch
from foreign import CASES, D_IN, D_SAE, edited, functions, normal, parameters, pick, topk, torch_file
from foreign_scopes import llama_scope, transposed
from safetensors.torch import load_file, save_file

import saelens_lite as sl
from saelens_lite.errors import ConfigError, CorruptFileError
from saelens_lite.formats import Known, read

X = normal(40, D_IN, seed=98).double() * 2


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(("llama scope", "qwen", "goodfire", "deepseek"))])
def test_in_float64_codes_and_output_agree_to_a_millionth_of_their_size(name, tmp_path):
    """Weights with folded scales are rounded to float32."""
    case = CASES[name]
    d = sl.load(case.write(tmp_path / "d"), format=case.format).double()
    for ours, theirs in ((d.encode(X).to_dense(), case.codes(X)), (d(X), case.x_hat(X))):
        assert (ours - theirs).abs().max() < 1e-6 * theirs.abs().max()


@pytest.mark.parametrize("norms", [(7.0, 7.0), (3.2, 1.5)])
def test_the_threshold_of_llama_scope_is_of_unit_rows_and_folded_scales(norms, tmp_path):
    """At the edge: h · ‖W_D‖ just above θ · c_out fires, just below does not; another scale would decide otherwise."""
    theta = 0.6
    path = llama_scope(norms=norms, theta=theta).write(tmp_path / "d")
    d, w = sl.load(path).double(), load_file(path / "checkpoints/final.safetensors")
    c_in, c_out = (D_IN**0.5 / norm for norm in norms)
    length = w["decoder.weight"].double().norm(dim=0)
    encoder, b_enc = w["encoder.weight"].double(), w["encoder.bias"].double()
    for latent in range(D_SAE):
        for factor, fires in ((1 - 1e-4, False), (1 + 1e-4, True)):
            h = factor * theta * c_out / length[latent]
            row = encoder[latent]
            x = row * (h - b_enc[latent]) / (row @ row) / c_in  # with this h
            assert bool(d.encode(x[None]).to_dense()[0, latent] > 0) == fires


def test_llama_scope_is_read_from_its_settings_file_or_folder(tmp_path):
    path = CASES["llama scope"].write(tmp_path / "d")
    assert torch.equal(sl.load(path / "hyperparams.json").W_dec, sl.load(path).W_dec)


@pytest.mark.parametrize(
    ("case", "file", "changes", "reason"),
    [
        ("llama scope", "hyperparams.json", {"norm_activation": "token-wise"}, "'token-wise' is computed from each batch"),
        ("llama scope", "hyperparams.json", {"jump_relu_threshold": None}, "jump_relu_threshold = None; expected a number"),
        ("llama scope", "hyperparams.json", {"jump_relu_threshold": -0.5}, "thresholds are below zero"),
        ("llama scope", "hyperparams.json", {"use_glu_encoder": True}, "a gated encoder"),
        ("llama scope", "hyperparams.json", {"dataset_average_activation_norm": {"in": 0, "out": 1}}, "expected positive"),
        ("llama scope, R1-Distill", "config.json", {"expansion_factor": 3}, "d_sae = 30"),
        ("llamascopium relu", "config.json", {"sae_type": "crosscoder"}, "'crosscoder' is not supported; .* one hook"),
        ("llamascopium relu", "config.json", {"act_fn": "batchtopk"}, "depend on the rest of their batch"),
    ],
)
def test_settings_of_llama_scope_that_change_the_function_are_refused(case, file, changes, reason, tmp_path):
    with pytest.raises((ConfigError, CorruptFileError), match=reason):
        sl.load(edited(case, tmp_path, file, **changes))


def test_llama_scope_without_its_weights_or_norms_says_what_is_missing(tmp_path):
    path = CASES["llama scope"].write(tmp_path / "d")
    (path / "checkpoints/final.safetensors").unlink()
    with pytest.raises(CorruptFileError, match=r"checkpoints/final\.safetensors"):
        sl.load(path)
    path = CASES["llama scope, R1-Distill"].write(tmp_path / "e")
    tensors = load_file(path / "sae_weights.safetensors")
    save_file({name: x for name, x in tensors.items() if "norm" not in name}, path / "sae_weights.safetensors")
    with pytest.raises(ConfigError, match=r"has no number 'dataset_average_activation_norm\.blocks\.15.*: add it"):
        sl.load(path)


def test_the_list_supplies_a_factor_that_a_file_of_llama_scope_lacks(tmp_path):
    case, c = CASES["llama scope, R1-Distill"], D_IN**0.5 / 7.0  # the list states the factor of x, as SAELens does
    path = case.write(tmp_path / "d")
    weights = path / "sae_weights.safetensors"
    tensors = load_file(weights)
    own = read(path, known=Known(scale=3 * c)).double()
    save_file({name: x for name, x in tensors.items() if "norm" not in name}, weights)
    for d in (own, read(path, known=Known(scale=c)).double()):
        for ours, theirs in ((d.encode(X).to_dense(), case.codes(X)), (d(X), case.x_hat(X))):
            assert (ours - theirs).abs().max() < 1e-6 * theirs.abs().max()
    save_file({name.replace("blocks.15", "blocks.16"): x for name, x in tensors.items()}, weights)
    with pytest.raises(CorruptFileError, match=r"has no number .*blocks\.15"):
        read(path, known=Known(scale=c))


def test_attention_of_llamascopium_is_refused_by_its_kind(tmp_path):
    path = edited("llamascopium relu", tmp_path, "config.json", sae_type="lorsa")
    save_file({f"W_{kind}": normal(4, 3, seed=1) for kind in "QKVO"}, path / "sae_weights.safetensors")
    with pytest.raises(ConfigError, match="sae_type 'lorsa' is not supported"):
        sl.load(path)


def test_a_latent_of_llama_scope_without_a_direction_never_fires(tmp_path):
    path = CASES["llama scope"].write(tmp_path / "d")
    place = path / "checkpoints/final.safetensors"
    w = load_file(place)
    w["decoder.weight"][:, 3] = 0
    save_file(w, place)
    codes = sl.load(path).encode(X.float()).to_dense()
    assert not codes[:, 3].any()
    assert codes.any()


@pytest.mark.parametrize(
    ("folder", "known", "model"),
    [
        ("SAE-Res-Qwen3-1.7B-Base-W32K-L0_5", None, "Qwen/Qwen3-1.7B-Base"),
        ("models--Qwen--SAE-Res-Qwen3.5-27B-W80K-L0_5/snapshots/0", None, "Qwen/Qwen3.5-27B"),
        ("anywhere", Known(k=5, model="Qwen/Qwen3-8B-Base"), "Qwen/Qwen3-8B-Base"),
    ],
)
def test_qwen_scope_without_settings_takes_k_from_its_folder_or_the_list(folder, known, model, tmp_path):
    p = parameters()
    path = torch_file(pick(transposed(p), "W_enc", "b_enc", "W_dec", "b_dec"), "layer27.sae.pt")(tmp_path / folder)
    d = read(path, format="qwen_scope", known=known)
    assert (d.origin.model, d.hook) == (model, "blocks.27.hook_resid_post")
    codes, x_hat = functions(p, topk(5), subtract=False)
    torch.testing.assert_close(d.double().encode(X).to_dense(), codes(X), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(d(X), x_hat(X), rtol=1e-6, atol=1e-6)


def test_qwen_scope_without_k_or_of_another_kind_is_refused(tmp_path):
    path = CASES["qwen scope"].write(tmp_path / "d")
    config = json.loads((path.parent / "config.json").read_text())
    for changes, reason in (
        ({"hook_point": "mlp_out"}, "hook_point 'mlp_out' is not supported"),
        ({"model_type": "jumprelu_sae"}, "model_type 'jumprelu_sae' is not supported"),
        ({"d_sae": D_SAE + 1}, f"W_enc has shape .* d_sae = {D_SAE + 1}"),
        ({"k": None}, r"no file says k, .* put the repository's config\.json beside it"),
    ):
        (path.parent / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises((ConfigError, CorruptFileError), match=reason):
            sl.load(path, format="qwen_scope")


def test_batch_top_k_of_goodfire_is_refused_with_the_way_out(tmp_path):
    state = {"W": normal(D_IN, D_SAE, seed=1), "b_enc": normal(D_SAE, seed=2), "b_dec": normal(D_IN, seed=3)}
    path = torch_file(state, "DeepSeek-R1-SAE-l37.pt")(tmp_path / "d")
    with pytest.raises(ConfigError, match=r"depend on the rest of their batch.*from_tensors with rule='topk'"):
        sl.load(path, format="goodfire")
