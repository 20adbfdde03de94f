"""Files of hook_z dictionaries, dictionary_learning and sparsify as people have them, beside the numbers they stand for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from foreign import D_IN, D_SAE, FOUR, Case, K, above, functions, normal, parameters, pick, relu, safetensors, topk
from torch import Tensor


def hook_z_cases() -> dict[str, Case]:
    p = parameters()
    name = "gpt2-small_L5_Hcat_z_lr1.20e-03_l11.00e+00_ds49152_bs4096_dc1.00e-06_rsanthropic_rie25000_nr4_v9"
    config = {"seed": 49, "batch_size": 4096, "model_name": "gpt2-small", "layer": 5, "site": "z", "seq_len": 128}
    config |= {"act_name": "blocks.5.attn.hook_z", "act_size": D_IN, "dict_size": D_SAE, "enc_dtype": "fp32", "l1_coeff": 1.0}

    def write(folder: Path) -> Path:
        folder.mkdir(parents=True)
        torch.save(pick(p, *FOUR), folder / f"{name}.pt")
        (folder / f"{name}_cfg.json").write_text(json.dumps(config))
        (folder / "another_cfg.json").write_text(json.dumps({"act_name": "blocks.6.attn.hook_z"}))
        return folder / f"{name}.pt"

    origin = {"hook": "blocks.5.attn.hook_z", "model": "gpt2", "n_ctx": 128, "prepend_bos": True}
    return {"hook_z": Case("hook_z", "l1", write, *functions(p, relu), "ReLU", True, pick(p, *FOUR), origin)}


def dictionary_learning_cases() -> dict[str, Case]:
    p, mean = parameters(), normal(D_IN, seed=20) * 3
    w = {name: tensor.double() for name, tensor in p.items()}
    linear = {"encoder.weight": p["W_enc"].T.contiguous(), "encoder.bias": p["b_enc"]}
    linear |= {"decoder.weight": p["W_dec"].T.contiguous()}
    theta = torch.tensor(0.6)
    counts = {"b_dec": p["b_dec"], "k": torch.tensor(K, dtype=torch.int32), "threshold": theta}
    biased, plain = linear | {"bias": p["b_dec"]}, pick(p, *FOUR)
    gates = {"decoder_bias": p["b_dec"], "r_mag": p["r_mag"], "gate_bias": p["b_gate"], "mag_bias": p["b_mag"]}
    gates |= {name: linear[name] for name in ("encoder.weight", "decoder.weight")}

    def gated(x: Tensor) -> Tensor:
        h = (x - w["b_dec"]) @ w["W_enc"]
        return (h + w["b_gate"] > 0) * relu(h * w["r_mag"].exp() + w["b_mag"])

    def case(
        rule: str,
        name: str,
        content: Any,
        act: Callable | None = None,
        file: str = "ae.pt",
        hook: str = "blocks.3.hook_resid_post",
        subtract: bool = True,
        own: tuple | None = None,
        exact: tuple[str, ...] = FOUR,
        **trainer: Any,
    ) -> Case:
        trainer = {
            "lr": 5e-05,
            "steps": 0,
            "activation_dim": D_IN,
            "dict_size": D_SAE,
            "device": "cuda:0",
            "layer": 3,
            "lm_name": "meta-llama/Llama-3.1-8B-Instruct",
            "submodule_name": "resid_post_layer_3",
        } | trainer
        buffer = {"d_submodule": D_IN, "io": "out", "n_ctxs": 2000, "ctx_len": 1024, "device": "cuda:0"}

        def write(folder: Path) -> Path:
            path = folder / "resid_post_layer_3" / "trainer_0"
            (path / file).parent.mkdir(parents=True)
            torch.save(content, path / file)
            (path / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": buffer}))
            return path if file == "ae.pt" else path / file

        origin = {"hook": hook, "model": "meta-llama/Llama-3.1-8B-Instruct", "n_ctx": 1024}
        own = own or functions(p, act, subtract)
        return Case("dictionary_learning", rule, write, *own, name, True, pick(p, *exact), origin)

    def centred(codes: Callable, x_hat: Callable) -> tuple[Callable, Callable]:
        return (lambda x: codes(x - mean.double()), lambda x: x_hat(x - mean.double()) + mean.double())

    batch, nested = linear | counts, functions(p, above(theta))
    kept = ("W_enc", "W_dec", "b_dec")
    return {
        "BatchTopKTrainer": case(
            "batch_topk",
            "BatchTopKSAE",
            batch,
            above(theta),
            trainer_class="BatchTopKTrainer",
            dict_class="BatchTopKSAE",
            k=K,
            threshold_beta=0.999,
        ),
        "TrainerTopK, k in the settings": case(
            "topk", "AutoEncoderTopK", linear | {"b_dec": p["b_dec"]}, topk(K), trainer_class="TrainerTopK", k=K
        ),
        "StandardTrainerAprilUpdate": case(
            "l1",
            "AutoEncoder",
            biased,
            relu,
            trainer_class="StandardTrainerAprilUpdate",
            hook="blocks.3.mlp.hook_out",
            submodule_name="mlp_out_layer_3",
        ),
        "PAnnealTrainer": case(
            "l1",
            "AutoEncoder",
            biased,
            relu,
            trainer_class="PAnnealTrainer",
            hook="blocks.3.attn.hook_out",
            submodule_name="attention_out_layer_3",
        ),
        "StandardTrainerNew": case(
            "l1",
            "AutoEncoderNew",
            linear | {"decoder.bias": p["b_dec"]},
            relu,
            subtract=False,
            exact=kept,
            trainer_class="StandardTrainerNew",
        ),
        "GatedAnnealTrainer": case(
            "gated",
            "GatedAutoEncoder",
            gates,
            own=(gated, lambda x: gated(x) @ w["W_dec"] + w["b_dec"]),
            exact=kept,
            trainer_class="GatedAnnealTrainer",
            hook="blocks.3.attn.hook_out",
            submodule_name="attn_out_layer_3",
        ),
        "MatryoshkaBatchTopKTrainer, fractions": case(
            "matryoshka",
            "MatryoshkaBatchTopKSAE",
            plain | {"threshold": theta, "k": counts["k"]},
            above(theta),
            trainer_class="MatryoshkaBatchTopKTrainer",
            k=K,
            group_fractions=[0.26, 0.74],
            group_weights=None,
        ),
        "JumpReluTrainer": case(
            "jumprelu",
            "JumpReluAutoEncoder",
            plain | {"threshold": p["threshold"]},
            above(p["threshold"]),
            subtract=False,
            exact=kept,
            trainer_class="JumpReluTrainer",
            bandwidth=0.001,
            target_l0=20,
        ),
        "ae_1000.pt": case(
            "batch_topk",
            "BatchTopKSAE",
            {"state_dict": batch, "act_mean": mean, "step": 1000},
            file="checkpoints/ae_1000.pt",
            own=centred(*nested),
            exact=("W_enc", "b_enc", "W_dec"),
            dict_class="BatchTopKSAE",
            k=K,
        ),
    }


def sparsify_cases() -> dict[str, Case]:
    p = parameters()
    tensors = {"encoder.weight": p["W_enc"].T, "encoder.bias": p["b_enc"], "W_dec": p["W_dec"], "b_dec": p["b_dec"]}
    first = {"expansion_factor": 32, "normalize_decoder": True, "num_latents": D_SAE, "k": K, "signed": False, "d_in": D_IN}

    def case(name: str, config: dict[str, Any], skip: bool = False, exact: tuple[str, ...] = FOUR, **origin: Any) -> Case:
        write = safetensors(tensors | ({"W_skip": p["W_skip"]} if skip else {}), "sae.safetensors", config, "cfg.json")

        def in_a_run(folder: Path) -> Path:
            path = write(folder / name)
            run = {"sae": config, "model": "EleutherAI/pythia-70m", "exclude_tokens": [7]}
            (folder / "config.json").write_text(json.dumps(run))
            (folder / "state.pt").write_bytes(b"not read")
            return path

        act = f"topk{' transcoder' if skip else ''}"
        origin = {"excluded_token_ids": (7,)} | origin
        return Case("sparsify", "topk", in_a_run, *functions(p, topk(K), skip=skip), act, exact=pick(p, *exact), origin=origin)

    old = {key: value for key, value in first.items() if key not in ("num_latents", "expansion_factor")}
    skip = {key: value for key, value in first.items() if key != "signed"} | {"multi_topk": False, "skip_connection": True}
    seeds = {"activation": "topk", "transcode": False, "skip_connection": False, "multi_topk": False}
    return {
        "sparsify, of a layer": case("layers.3", first, hook="blocks.3.hook_resid_post"),
        "sparsify, of the embedding": case("embed_tokens", old | {"num_latents": D_SAE}, hook="hook_embed"),
        "sparsify, a seed": case("layers.3/seed1", first | seeds, hook="blocks.3.hook_resid_post"),
        "sparsify, the best": case("best/layers.3/seed0", first | seeds, hook="blocks.3.hook_resid_post"),
        "sparsify, skip of before": case(
            "layers.5.mlp", skip, True, ("W_enc", "W_dec", "b_dec", "W_skip"), hook="blocks.5.mlp.hook_in"
        ),
    }


PRACTICE = hook_z_cases() | dictionary_learning_cases() | sparsify_cases()
