"""Files of SAELens and of its checkpoints as people have them, of all its versions, beside the numbers they stand for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from foreign import D_IN, D_SAE, FOUR, Case, K, above, functions, normal, parameters, pick, relu, safetensors, topk
from safetensors.torch import save_file
from torch import Tensor

OLDEST = {  # all keys of version 1 and 2
    "model_name": "gpt2-small",
    "hook_point": "blocks.0.hook_resid_pre",
    "hook_point_layer": 0,
    "hook_point_head_index": None,
    "dataset_path": "Skylion007/openwebtext",
    "is_dataset_tokenized": False,
    "context_size": 128,
    "use_cached_activations": False,
    "cached_activations_path": "activations/Skylion007_openwebtext/gpt2-small/blocks.0.hook_resid_pre",
    "d_in": D_IN,
    "n_batches_in_buffer": 128,
    "total_training_tokens": 300000000,
    "store_batch_size": 32,
    "device": "mps",
    "seed": 42,
    "dtype": "torch.float32",
    "b_dec_init_method": "geometric_median",
    "expansion_factor": 32,
    "from_pretrained_path": None,
    "l1_coefficient": 8e-05,
    "lr": 0.0004,
    "lr_scheduler_name": None,
    "lr_warm_up_steps": 5000,
    "train_batch_size": 4096,
    "use_ghost_grads": False,
    "feature_sampling_window": 1000,
    "feature_sampling_method": None,
    "resample_batches": 1028,
    "feature_reinit_scale": 0.2,
    "dead_feature_window": 5000,
    "dead_feature_estimation_method": "no_fire",
    "dead_feature_threshold": 1e-08,
    "log_to_wandb": True,
    "wandb_project": "mats_sae_training_gpt2",
    "wandb_entity": None,
    "wandb_log_frequency": 100,
    "n_checkpoints": 10,
    "checkpoint_path": "checkpoints/y1t51byy",
    "d_sae": D_SAE,
    "tokens_per_buffer": 67108864,
    "run_name": "24576-L1-8e-05-LR-0.0004-Tokens-3.000e+08",
}
VERSION_5 = {
    "architecture": "standard",
    "d_in": D_IN,
    "d_sae": D_SAE,
    "activation_fn_str": "relu",
    "activation_fn_kwargs": {},
    "apply_b_dec_to_input": True,
    "finetuning_scaling_factor": False,
    "normalize_activations": "none",
    "context_size": 128,
    "model_name": "gpt2",
    "hook_name": "blocks.8.hook_resid_pre",
    "hook_layer": 8,
    "hook_head_index": None,
    "prepend_bos": True,
    "dataset_path": "apollo-research/openwebtext",
    "dataset_trust_remote_code": True,
    "dtype": "float32",
    "device": "cuda",
    "sae_lens_training_version": "5.9.1",
    "neuronpedia_id": "gpt2-small/8-res-jb",
    "model_from_pretrained_kwargs": {"center_writing_weights": True},
}
VERSION_6 = {
    "d_in": D_IN,
    "d_sae": D_SAE,
    "dtype": "float32",
    "device": "cpu",
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "reshape_activations": "none",
    "architecture": "standard",
    "metadata": {
        "sae_lens_version": "6.39.0",
        "sae_lens_training_version": "6.39.0",
        "dataset_path": "monology/pile-uncopyrighted",
        "hook_name": "model.layers.10",
        "model_name": "google/gemma-2-2b",
        "model_class_name": "AutoModelForCausalLM",
        "hook_head_index": None,
        "context_size": 256,
        "seqpos_slice": [None],
        "model_from_pretrained_kwargs": {"dtype": "bfloat16"},
        "prepend_bos": True,
        "exclude_special_tokens": [2, 1],
        "sequence_separator_token": "bos",
        "disable_concat_sequences": False,
        "training_architecture": "batchtopk",
        "training_architecture_details": {"k": 60.5, "topk_threshold_lr": 0.01},
    },
}
ORIGIN_6 = {
    "hook": "blocks.10.hook_resid_post",
    "model": "google/gemma-2-2b",
    "model_class": "AutoModelForCausalLM",
    "processing": (),
    "n_ctx": 256,
    "excluded_token_ids": (1, 2),
}
ORIGIN_1 = {"hook": "blocks.0.hook_resid_pre", "model": "gpt2", "processing": ("center_writing_weights",), "n_ctx": 128}
SCALE = 0.37


def whitening() -> dict[str, Tensor]:
    """Return a mean, a matrix and its inverse, as SAELens writes them: float64."""
    turn = torch.linalg.qr(normal(D_IN, D_IN, seed=30).double())[0]
    lengths = normal(D_IN, seed=31).double().abs() + 0.5
    matrix, inverse = turn * lengths, (turn / lengths).T
    return {
        "mean": normal(D_IN, seed=32).double(),
        "matrix": matrix.contiguous(),
        "inverse_matrix": inverse.contiguous(),
    }


def beside(write: Callable[[Path], Path], scaler: Any = None, matrices: dict[str, Tensor] | None = None, name: str = ""):
    """Return a writer that adds the other files of a checkpoint of a training."""

    def all_of_them(folder: Path) -> Path:
        path = write(folder / name if name else folder)
        (path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": scaler, "has_whitening": bool(matrices)}))
        if matrices:
            save_file(matrices, path / "activation_whitening.safetensors")
        (path / "runner_cfg.json").write_text(json.dumps({"sae": {"k": 1}, "model_name": "another", "hook_name": "wrong"}))
        (path / "trainer_state.pt").write_bytes(b"not read")
        save_file({"sparsity": torch.full((D_SAE,), -2.0)}, path / "sparsity.safetensors")
        save_file({"n_dataset_processed": torch.tensor(5)}, path / "activations_store_state.safetensors")
        return path

    return all_of_them


def case(rule, architecture, tensors, codes, x_hat, config, origin, exact=(), p=None, **files) -> Case:
    write = safetensors(tensors, "sae_weights.safetensors", config, "cfg.json")
    write = beside(write, **files) if files else write
    return Case("saelens", rule, write, codes, x_hat, architecture, exact=pick(p or parameters(), *exact), origin=origin)


def settings_cases() -> dict[str, Case]:
    """Return cases of the settings of all versions, beside weights that need no change."""
    p = parameters()
    four, plain = pick(p, *FOUR), functions(p, relu)
    tm = OLDEST | {"model_name": "gpt2", "model_class_name": "HookedTransformer", "hook_point": "blocks.0.hook_mlp_out"}
    tm |= {"hook_point_eval": "blocks.{layer}.attn.pattern"}
    tm_origin = ORIGIN_1 | {"hook": "blocks.0.hook_mlp_out"}
    jh = VERSION_5 | {"hook_name": "blocks.25.hook_resid_post", "hook_eval": "NOT_IN_USE", "hook_layer": 25}
    of_head = VERSION_5 | {"hook_name": "blocks.5.attn.hook_z", "hook_head_index": 3}
    mixed = VERSION_6 | {"hook_name": "model.layers.10", "hook_layer": 10, "sae_lens_version": "6.43.0"}
    cases = {
        "saelens 1": (OLDEST, ORIGIN_1, "blocks.8.hook_resid_pre_768"),
        "saelens 1, hook_point_eval": (tm, tm_origin, "sae_group_gpt2_blocks.0.hook_mlp_out_24576:v1"),
        "saelens 5": (VERSION_5, {"hook": "blocks.8.hook_resid_pre", "processing": ("center_writing_weights",)}, ""),
        "saelens 5, hook_eval": (jh, {"hook": "blocks.25.hook_resid_post"}, "v5_32k_layer_0.pt"),
        "saelens 5, one head": (of_head, {"hook": "blocks.5.attn.hook_z.head_3"}, ""),
        "saelens 6": (VERSION_6, ORIGIN_6, ""),
        "saelens 6, keys in both places": (mixed, ORIGIN_6, ""),
    }
    return {
        name: case("l1", "standard", four, *plain, config, origin, FOUR, scaler=None, name=folder)
        for name, (config, origin, folder) in cases.items()
    }


def scaled_cases() -> dict[str, Case]:
    """Return cases of activations that are scaled or whitened before the dictionary, and back after it."""
    p, white = parameters(), whitening()
    w = {name: tensor.double() for name, tensor in p.items()}

    def scaled(act, names=FOUR):
        codes, x_hat = functions(p, act)
        return pick(p, *names), lambda x: codes(SCALE * x), lambda x: x_hat(SCALE * x) / SCALE

    def whitened(subtract):
        codes, x_hat = functions(p, relu, subtract)
        back = white["inverse_matrix"], white["mean"]
        z = lambda x: (x - white["mean"]) @ white["matrix"]  # noqa: E731
        return pick(p, *FOUR), lambda x: codes(z(x)), lambda x: x_hat(z(x)) @ back[0] + back[1]

    def gated_codes(x):
        h = (x - white["mean"]) @ white["matrix"] @ w["W_enc"]
        return (h + w["b_gate"] > 0) * relu(h * w["r_mag"].exp() + w["b_mag"])

    def gated_x_hat(x):
        return (gated_codes(x) @ w["W_dec"] + w["b_dec"]) @ white["inverse_matrix"] + white["mean"]

    average = VERSION_6 | {"normalize_activations": "expected_average_only_in"}
    scalar = VERSION_6 | {"normalize_activations": "constant_scalar_rescale", "activation_normalization_factor": SCALE}
    white_6 = VERSION_6 | {"normalize_activations": "covariance_whitening"}
    kept = {"apply_b_dec_to_input": False}
    gates = pick(p, "W_enc", "b_gate", "r_mag", "b_mag", "W_dec", "b_dec")
    thresholds = scaled(above(p["threshold"]), (*FOUR, "threshold"))
    jump = average | {"architecture": "jumprelu"}
    return {
        "saelens scaled": case("l1", "standard", *scaled(relu), average, ORIGIN_6, scaler=SCALE),
        "saelens 5, scaled": case(
            "l1", "standard", *scaled(relu), VERSION_5 | {"normalize_activations": True}, {}, scaler=SCALE
        ),
        "saelens scaled jumprelu": case("jumprelu", "jumprelu", *thresholds, jump, ORIGIN_6, scaler=SCALE),
        "saelens fixed scale": case("l1", "standard", *scaled(relu), scalar, ORIGIN_6),
        "saelens whitened": case("l1", "standard", *whitened(True), white_6, ORIGIN_6, matrices=white),
        "saelens whitened, b_dec kept": case("l1", "standard", *whitened(False), white_6 | kept, ORIGIN_6, matrices=white),
        "saelens whitened, gated, b_dec kept": case(
            "gated",
            "gated",
            gates,
            gated_codes,
            gated_x_hat,
            white_6 | kept | {"architecture": "gated"},
            ORIGIN_6,
            matrices=white,
        ),
    }


def checkpoint_cases() -> dict[str, Case]:
    """Return cases of checkpoints of a training, in its own form."""
    p, white = parameters(), whitening()
    w = {name: tensor.double() for name, tensor in p.items()}
    theta, norms = torch.tensor(0.6, dtype=torch.float64), w["W_dec"].norm(dim=1)
    four = pick(p, *FOUR)

    def exported(act, x, by_norms=True, into=lambda x: x):
        """Codes with unit rows of W_dec: those that SAELens exports."""
        return act(((into(x) - w["b_dec"]) @ w["W_enc"] + w["b_enc"]) * (norms if by_norms else 1))

    def decoded(codes, by_norms=True):
        return codes / (norms if by_norms else 1) @ w["W_dec"] + w["b_dec"]

    def batch(x, **how):
        return exported(lambda h: h * (h > theta), x, **how)

    def scaled(x):  # rows of W_dec are unit vectors once the scale is folded in
        return batch(x, into=lambda x: SCALE * x) / SCALE

    def whitened(x):
        return batch(x, into=lambda x: (x - white["mean"]) @ white["matrix"])

    common = VERSION_6 | {"k": 2.5, "topk_threshold_lr": 0.01, "rescale_acts_by_decoder_norm": True, "decoder_init_norm": 0.1}
    common |= {"aux_loss_coefficient": 1.0, "use_sparse_activations": False}
    batchtopk = common | {"architecture": "batchtopk"}
    nested = common | {"architecture": "matryoshka_batchtopk", "matryoshka_widths": [4, 12, D_SAE], "k": 3}
    plain = {"rescale_acts_by_decoder_norm": False}
    jump = VERSION_6 | {"architecture": "jumprelu", "jumprelu_bandwidth": 0.001, "l0_coefficient": 1.0}
    with_theta = four | {"topk_threshold": theta}
    average, covariance = ({"normalize_activations": n} for n in ("expected_average_only_in", "covariance_whitening"))

    def of(architecture, codes, x_hat, config, rule="jumprelu", tensors=with_theta, exact=(), **files):
        return case(rule, architecture, tensors, codes, x_hat, config, ORIGIN_6, exact, **({"scaler": None} | files))

    return {
        "saelens batchtopk": of("batchtopk", batch, lambda x: decoded(batch(x)), batchtopk),
        "saelens batchtopk, not by norms": of(
            "batchtopk",
            lambda x: batch(x, by_norms=False),
            lambda x: decoded(batch(x, by_norms=False), False),
            batchtopk | plain,
            exact=FOUR,
        ),
        "saelens batchtopk, scaled": of(
            "batchtopk", scaled, lambda x: decoded(scaled(x) * SCALE) / SCALE, batchtopk | average, scaler=SCALE
        ),
        "saelens batchtopk, whitened": of(
            "batchtopk",
            whitened,
            lambda x: decoded(whitened(x)) @ white["inverse_matrix"] + white["mean"],
            batchtopk | covariance,
            matrices=white,
        ),
        "saelens matryoshka": of("matryoshka_batchtopk", batch, lambda x: decoded(batch(x)), nested),
        "saelens topk checkpoint": of(
            "topk",
            lambda x: exported(topk(K), x),
            lambda x: decoded(exported(topk(K), x)),
            common | {"architecture": "topk", "k": K},
            rule="topk",
            tensors=four,
        ),
        "saelens log_threshold": of(
            "jumprelu",
            *functions(p, above(p["threshold"])),
            jump,
            tensors=four | {"log_threshold": p["threshold"].log()},
            exact=FOUR,
        ),
    }


SAELENS = settings_cases() | scaled_cases() | checkpoint_cases()
