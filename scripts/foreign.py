"""Files of other tools, written from what is known of their formats, beside the numbers they stand for.

Nothing here comes from saelens_lite: `Case.codes` and `Case.x_hat` are the tool's own equations in float64.
"""

import json
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

D_IN, D_SAE, K = 10, 24, 3


@dataclass
class Case:
    """A dictionary of another tool: how to write it, and what it computes from x: float64 [batch d_in]."""

    format: str
    rule: str
    write: Callable[[Path], Path]
    codes: Callable[[Tensor], Tensor]
    x_hat: Callable[[Tensor], Tensor]
    architecture: str
    pickled: bool = False
    exact: dict[str, Tensor] = field(default_factory=dict)  # our tensors that are the file's to the bit
    origin: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)  # that `load` is told, because the files do not state them


def normal(*shape: int, seed: int) -> Tensor:
    """Normal float32 numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def parameters(d_out: int = D_IN) -> dict[str, Tensor]:
    """W_enc [d_in d_sae], b_enc, W_dec [d_sae d_out], b_dec, threshold, … at random."""
    return {
        "W_enc": normal(D_IN, D_SAE, seed=1) * 0.5,
        "b_enc": normal(D_SAE, seed=2) * 0.3,
        "W_dec": normal(D_SAE, d_out, seed=3),
        "b_dec": normal(d_out, seed=4),
        "threshold": normal(D_SAE, seed=5).abs(),
        "W_skip": normal(d_out, D_IN, seed=6) * 0.3,
        "b_gate": normal(D_SAE, seed=7),
        "r_mag": normal(D_SAE, seed=8) * 0.3,
        "b_mag": normal(D_SAE, seed=9),
    }


def relu(h: Tensor) -> Tensor:
    return h.clamp(min=0)


def topk(k: int) -> Callable[[Tensor], Tensor]:
    def act(h: Tensor) -> Tensor:
        return relu(h) * torch.zeros_like(h).scatter(-1, h.topk(k, dim=-1).indices, 1.0)

    return act


def above(threshold: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda h: relu(h) * (h > threshold.double())


def group_max(k: int) -> Callable[[Tensor], Tensor]:
    def act(h: Tensor) -> Tensor:
        groups = relu(h).unflatten(-1, (k, -1))
        return (groups * (groups == groups.amax(-1, keepdim=True))).flatten(-2)

    return act


def functions(p: dict[str, Tensor], act, subtract: bool = True, skip: bool = False):
    """Return (codes, x_hat) by the usual equations."""
    w = {name: tensor.double() for name, tensor in p.items()}

    def codes(x: Tensor) -> Tensor:
        return act((x - w["b_dec"] if subtract else x) @ w["W_enc"] + w["b_enc"])

    def x_hat(x: Tensor) -> Tensor:
        y = codes(x) @ w["W_dec"] + w["b_dec"]
        return y + x @ w["W_skip"].T if skip else y

    return codes, x_hat


def safetensors(tensors: dict[str, Tensor], name: str, config: dict[str, Any] | None, config_name: str):
    """Return a writer of a folder with one file of tensors and one of settings."""

    def write(folder: Path) -> Path:
        folder.mkdir(parents=True)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name)
        if config is not None:
            (folder / config_name).write_text(json.dumps(config))
        return folder

    return write


def torch_file(content: Any, name: str, config: dict[str, Any] | None = None):
    """Return a writer of one file by torch.save, in a folder with its settings or by itself."""

    def write(folder: Path) -> Path:
        folder.mkdir(parents=True)
        torch.save(content, folder / name)
        if config is None:
            return folder / name
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return write


def pick(p: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: p[name] for name in names}


FOUR = ("W_enc", "b_enc", "W_dec", "b_dec")
METADATA = {
    "sae_lens_version": "6.5.0",
    "model_name": "gpt2-small",
    "model_class_name": "HookedTransformer",
    "hook_name": "blocks.8.hook_resid_pre",
    "context_size": 128,
    "prepend_bos": True,
    "dataset_path": "openwebtext",
    "model_from_pretrained_kwargs": {"center_writing_weights": True},
}
ORIGIN = {
    "model": "gpt2",
    "hook": "blocks.8.hook_resid_pre",
    "n_ctx": 128,
    "prepend_bos": True,
    "text": "openwebtext",
    "processing": ("center_writing_weights",),
}


def saelens(
    architecture: str,
    rule: str,
    tensors,
    act,
    *,
    settings=None,
    subtract=True,
    skip=False,
    d_out=None,
    x_hat=None,
    codes=None,
    exact=(),
    metadata=METADATA,
    origin=ORIGIN,
    p=None,
) -> Case:
    p = p or parameters(d_out or D_IN)
    config = (
        {
            "architecture": architecture,
            "d_in": D_IN,
            "d_sae": D_SAE,
            "dtype": "float32",
            "apply_b_dec_to_input": subtract,
            "normalize_activations": "none",
            "reshape_activations": "none",
            "metadata": metadata,
        }
        | ({"d_out": d_out} if d_out else {})
        | (settings or {})
    )
    own = functions(p, act, subtract, skip)
    return Case(
        "saelens",
        rule,
        safetensors(pick(p, *tensors), "sae_weights.safetensors", config, "cfg.json"),
        codes or own[0],
        x_hat or own[1],
        architecture,
        exact=pick(p, *exact),
        origin=origin,
    )


def saelens_cases() -> dict[str, Case]:
    p = parameters()
    w = {name: tensor.double() for name, tensor in p.items()}

    def gated(x, base):
        h = (x - base) @ w["W_enc"]
        return (h + w["b_gate"] > 0) * relu(h * w["r_mag"].exp() + w["b_mag"])

    def by_norms(x):
        return topk(K)(((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]) * w["W_dec"].norm(dim=1))

    def layer_norm(x):
        mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        codes, x_hat = functions(p, topk(K))
        z = (x - mean) / (std + 1e-5)
        return codes(z), x_hat(z) * std + mean

    def constant_norm(x):
        norm = x.norm(dim=-1, keepdim=True) / D_IN**0.5
        codes, x_hat = functions(p, relu, subtract=False)
        return codes(x / norm), x_hat(x / norm) * norm

    unit = p | {"W_dec": p["W_dec"] / p["W_dec"].norm(dim=1, keepdim=True)}

    def pursuit(x):
        W = unit["W_dec"].double()
        residual, codes = x - w["b_dec"], torch.zeros(len(x), D_SAE, dtype=torch.float64)
        for _ in range(4):
            best = relu(residual @ W.T).max(1, keepdim=True)
            codes.scatter_add_(1, best.indices, best.values)
            residual = residual - best.values * W[best.indices[:, 0]]
        return codes

    zero = w["b_dec"] * 0
    edges = p | {"threshold": p["threshold"] * torch.tensor([0.0, -1.0, 1.0]).repeat(D_SAE // 3)}
    gates = ("W_enc", "b_gate", "r_mag", "b_mag", "W_dec", "b_dec")
    stops = {"max_iterations": 4, "residual_threshold": 0.0, "stop_on_duplicate_support": False}
    old = {k: v for k, v in METADATA.items() if k not in ("sae_lens_version", "model_from_pretrained_kwargs", "hook_name")}
    old |= {"hook_point": METADATA["hook_name"], "metadata": None}
    scaled = p | {"scaling_factor": normal(D_SAE, seed=10).exp()}
    return {
        "standard": saelens("standard", "l1", FOUR, relu, exact=FOUR),
        "not centred": saelens(
            "standard",
            "l1",
            FOUR,
            relu,
            exact=FOUR,
            metadata=METADATA | {"model_from_pretrained_kwargs": {}},
            origin=ORIGIN | {"processing": ()},
        ),
        "b_dec not subtracted": saelens("standard", "l1", FOUR, relu, subtract=False, exact=("W_enc", "W_dec", "b_dec")),
        "topk": saelens("topk", "topk", FOUR, topk(K), settings={"k": K}, exact=FOUR),
        "topk by norms": saelens(
            "topk",
            "topk",
            FOUR,
            None,
            settings={"k": K, "rescale_acts_by_decoder_norm": True},
            codes=by_norms,
            x_hat=lambda x: by_norms(x) / w["W_dec"].norm(dim=1) @ w["W_dec"] + w["b_dec"],
        ),
        "topk, layer_norm": saelens(
            "topk",
            "topk",
            FOUR,
            None,
            settings={"k": K, "normalize_activations": "layer_norm"},
            exact=FOUR,
            codes=lambda x: layer_norm(x)[0],
            x_hat=lambda x: layer_norm(x)[1],
        ),
        "constant norm": saelens(
            "standard",
            "l1",
            FOUR,
            None,
            subtract=False,
            codes=lambda x: constant_norm(x)[0],
            settings={"normalize_activations": "constant_norm_rescale"},
            x_hat=lambda x: constant_norm(x)[1],
        ),
        "jumprelu": saelens("jumprelu", "jumprelu", (*FOUR, "threshold"), above(p["threshold"]), exact=FOUR),
        "thresholds of 0 and less": saelens(
            "jumprelu", "jumprelu", (*FOUR, "threshold"), above(edges["threshold"]), p=edges, exact=FOUR
        ),
        "gated": saelens(
            "gated",
            "gated",
            gates,
            None,
            codes=lambda x: gated(x, w["b_dec"]),
            exact=("W_enc", "W_dec", "b_dec"),
            x_hat=lambda x: gated(x, w["b_dec"]) @ w["W_dec"] + w["b_dec"],
        ),
        "gated, not subtracted": saelens(
            "gated",
            "gated",
            gates,
            None,
            subtract=False,
            codes=lambda x: gated(x, zero),
            x_hat=lambda x: gated(x, zero) @ w["W_dec"] + w["b_dec"],
        ),
        "matching_pursuit": saelens(
            "matching_pursuit",
            "matching_pursuit",
            ("W_dec", "b_dec"),
            None,
            p=unit,
            settings=stops,
            codes=pursuit,
            x_hat=lambda x: pursuit(x) @ unit["W_dec"].double() + w["b_dec"],
            exact=("W_dec", "b_dec"),
        ),
        "transcoder": saelens("transcoder", "l1", FOUR, relu, subtract=False, d_out=7, exact=FOUR),
        "skip_transcoder": saelens(
            "skip_transcoder", "l1", (*FOUR, "W_skip"), relu, subtract=False, skip=True, d_out=7, exact=(*FOUR, "W_skip")
        ),
        "jumprelu_transcoder": saelens(
            "jumprelu_transcoder", "jumprelu", (*FOUR, "threshold"), above(p["threshold"]), subtract=False, d_out=7, exact=FOUR
        ),
        "jumprelu_skip_transcoder": saelens(
            "jumprelu_skip_transcoder",
            "jumprelu",
            (*FOUR, "threshold", "W_skip"),
            above(p["threshold"]),
            subtract=False,
            skip=True,
            d_out=7,
            exact=FOUR,
        ),
        "before 6": saelens("standard", "l1", FOUR, relu, settings=old, exact=FOUR),
        "before 6, topk": saelens(
            "topk",
            "topk",
            FOUR,
            topk(K),
            exact=FOUR,
            settings=old
            | {
                "architecture": "standard",
                "activation_fn_str": "topk",
                "activation_fn_kwargs": {"k": K},
                "normalize_activations": False,
            },
        ),
        "before 6, scaling_factor": saelens(
            "standard",
            "l1",
            (*FOUR, "scaling_factor"),
            relu,
            settings=old | {"finetuning_scaling_factor": True},
            p=scaled,
            x_hat=lambda x: functions(p, relu)[0](x) * scaled["scaling_factor"].double() @ w["W_dec"] + w["b_dec"],
        ),
        "before 6, finetuning_scaling_factor": saelens(
            "standard",
            "l1",
            (*FOUR, "finetuning_scaling_factor"),
            relu,
            settings=old | {"finetuning_scaling_factor": True},
            p=p | {"finetuning_scaling_factor": scaled["scaling_factor"]},
            x_hat=lambda x: functions(p, relu)[0](x) * scaled["scaling_factor"].double() @ w["W_dec"] + w["b_dec"],
        ),
        "before 6, a factor of one": saelens(
            "standard",
            "l1",
            (*FOUR, "scaling_factor"),
            relu,
            settings=old | {"finetuning_scaling_factor": False},
            p=p | {"scaling_factor": torch.ones(D_SAE)},
            exact=FOUR,
        ),
        "topk without k": saelens("topk", "topk", FOUR, relu, exact=FOUR),  # 100, of 24 latents
    }


def sparsify_cases() -> dict[str, Case]:
    p = parameters()
    names = {"encoder.weight": p["W_enc"].T, "encoder.bias": p["b_enc"], "W_dec": p["W_dec"], "b_dec": p["b_dec"]}
    common = {
        "expansion_factor": 32,
        "normalize_decoder": True,
        "num_latents": D_SAE,
        "k": K,
        "multi_topk": False,
        "d_in": D_IN,
    }

    def case(act, rule, settings, tensors=names, name="layers.3.mlp", exact=FOUR, **origin):
        transcode, skip = settings.get("transcode", False), settings.get("skip_connection", False)
        write = safetensors(tensors, "sae.safetensors", common | settings, "cfg.json")
        codes, x_hat = functions(p, act, subtract=not transcode, skip=skip)
        architecture = f"{settings['activation']}{' transcoder' if transcode or skip else ''}"
        return Case(
            "sparsify",
            rule,
            lambda folder: write(folder / name),
            codes,
            x_hat,
            architecture,
            exact=pick(p, *exact),
            origin=origin,
        )

    skip = {"activation": "topk", "transcode": True, "skip_connection": True}
    return {
        "sparsify topk": case(topk(K), "topk", {"activation": "topk"}, name="h.8", hook="blocks.8.hook_resid_post"),
        "sparsify groupmax": case(group_max(K), "group_max", {"activation": "groupmax"}, hook="blocks.3.mlp.hook_out"),
        "sparsify transcoder": case(
            topk(K),
            "topk",
            {"activation": "topk", "transcode": True},
            hook="blocks.3.mlp.hook_in",
            target="blocks.3.mlp.hook_out",
        ),
        "sparsify skip, no transcode": case(
            topk(K),
            "topk",
            {"activation": "topk", "skip_connection": True},
            tensors=names | {"W_skip": p["W_skip"]},
            exact=("W_enc", "W_dec", "b_dec", "W_skip"),
            hook="blocks.3.mlp.hook_in",
            target="blocks.3.mlp.hook_out",
        ),
        "sparsify skip": case(topk(K), "topk", skip, tensors=names | {"W_skip": p["W_skip"]}, target="blocks.3.mlp.hook_out"),
    }


def dictionary_learning_cases() -> dict[str, Case]:
    p = parameters()
    linear = {
        "encoder.weight": p["W_enc"].T.contiguous(),
        "encoder.bias": p["b_enc"],
        "decoder.weight": p["W_dec"].T.contiguous(),
    }
    theta = torch.tensor(0.6)
    counts = {"b_dec": p["b_dec"], "k": torch.tensor(K, dtype=torch.int32), "threshold": theta}
    groups = {"group_sizes": torch.tensor([4, 8, 12])}
    w = {name: tensor.double() for name, tensor in p.items()}

    def gated(x):
        h = (x - w["b_dec"]) @ w["W_enc"]
        return (h + w["b_gate"] > 0) * relu(h * w["r_mag"].exp() + w["b_mag"])

    def case(name, rule, tensors, act, subtract=True, codes=None, x_hat=None, exact=FOUR, trainer=None, content=None):
        trainer = {
            "dict_class": name,
            "activation_dim": D_IN,
            "dict_size": D_SAE,
            "lm_name": "EleutherAI/pythia-70m",
            "layer": 3,
            "submodule_name": "resid_post_layer_3",
            "k": K,
        } | (trainer or {})
        own = functions(p, act, subtract)
        write = torch_file(content or OrderedDict(tensors), "ae.pt", {"trainer": trainer, "buffer": {"ctx_len": 128}})
        origin = {"model": "EleutherAI/pythia-70m", "hook": "blocks.3.hook_resid_post", "n_ctx": 128}
        return Case("dictionary_learning", rule, write, codes or own[0], x_hat or own[1], name, True, pick(p, *exact), origin)

    mean = normal(D_IN, seed=20) * 3
    plain = pick(p, *FOUR)
    gates = {
        "decoder_bias": p["b_dec"],
        "encoder.weight": linear["encoder.weight"],
        "decoder.weight": linear["decoder.weight"],
        "r_mag": p["r_mag"],
        "gate_bias": p["b_gate"],
        "mag_bias": p["b_mag"],
    }
    wrapped = {"state_dict": linear | counts, "act_mean": mean, "step": 5, "note": "a", "config": {"lr": 0.1, "seed": None}}
    unset = counts | {"threshold": torch.tensor(-1.0)}
    shifted = functions(p, above(theta))
    return {
        "AutoEncoder": case("AutoEncoder", "l1", linear | {"bias": p["b_dec"]}, relu),
        "AutoEncoderNew": case(
            "AutoEncoderNew", "l1", linear | {"decoder.bias": p["b_dec"]}, relu, False, exact=("W_enc", "W_dec", "b_dec")
        ),
        "AutoEncoderTopK": case("AutoEncoderTopK", "topk", linear | counts, topk(K)),
        "BatchTopKSAE": case("BatchTopKSAE", "batch_topk", linear | counts, above(theta)),
        "BatchTopKSAE, threshold unset": case("BatchTopKSAE", "batch_topk", linear | unset, relu),
        "MatryoshkaBatchTopKSAE": case("MatryoshkaBatchTopKSAE", "matryoshka", plain | counts | groups, above(theta)),
        "JumpReluAutoEncoder": case(
            "JumpReluAutoEncoder",
            "jumprelu",
            plain | {"threshold": p["threshold"]},
            above(p["threshold"]),
            False,
            exact=("W_enc", "W_dec", "b_dec"),
        ),
        "GatedAutoEncoder": case(
            "GatedAutoEncoder",
            "gated",
            gates,
            None,
            codes=gated,
            exact=("W_enc", "W_dec", "b_dec"),
            x_hat=lambda x: gated(x) @ w["W_dec"] + w["b_dec"],
        ),
        "act_mean": case(
            "BatchTopKSAE",
            "batch_topk",
            None,
            None,
            content=wrapped,
            codes=lambda x: shifted[0](x - mean.double()),
            x_hat=lambda x: shifted[1](x - mean.double()) + mean.double(),
            exact=("W_enc", "b_enc", "W_dec"),
        ),
    }


def openai_cases() -> dict[str, Case]:
    p = parameters()
    state = {
        "pre_bias": p["b_dec"],
        "encoder.weight": p["W_enc"].T.contiguous(),
        "latent_bias": p["b_enc"],
        "decoder.weight": p["W_dec"].T.contiguous(),
        "stats_last_nonzero": torch.zeros(D_SAE, dtype=torch.long),
    }
    with_topk = state | {"activation": "TopK", "activation_state_dict": {"k": K, "postact_fn": "ReLU"}}
    with_relu = state | {"activation": "ReLU", "activation_state_dict": {}}

    def normalised(x):
        mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        codes, x_hat = functions(p, topk(K))
        z = (x - mean) / (std + 1e-5)
        return codes(z), x_hat(z) * std + mean

    codes, x_hat = functions(p, relu)
    return {
        "openai TopK": Case(
            "openai",
            "topk",
            torch_file(with_topk, "v5.pt"),
            lambda x: normalised(x)[0],
            lambda x: normalised(x)[1],
            "TopK",
            True,
            pick(p, *FOUR),
        ),
        "openai ReLU": Case("openai", "l1", torch_file(with_relu, "v1.pt"), codes, x_hat, "ReLU", True, pick(p, *FOUR)),
    }


def gemma_scope_cases() -> dict[str, Case]:
    p = parameters()
    five = pick(p, *FOUR, "threshold")

    def npz(folder: Path) -> Path:
        folder.mkdir(parents=True)
        np.savez(folder / "params.npz", **{name: tensor.numpy() for name, tensor in five.items()})
        return folder

    second = {name.lower(): tensor for name, tensor in five.items()}
    skip = second | {"affine_skip_connection": p["W_skip"].T}
    config = {"architecture": "jump_relu", "model_name": "google/gemma-3-1b-pt", "hf_hook_point_in": "model.layers.7.output"}
    through = config | {
        "hf_hook_point_in": "model.layers.7.pre_feedforward_layernorm.output",
        "hf_hook_point_out": "model.layers.7.post_feedforward_layernorm.output",
    }
    exact = pick(p, "W_enc", "W_dec", "b_dec")
    plain = functions(p, above(p["threshold"]), subtract=False)
    skipped = functions(p, above(p["threshold"]), subtract=False, skip=True)
    name = "params.safetensors"
    return {
        "gemma scope": Case("gemma_scope", "jumprelu", npz, *plain, "jump_relu", exact=exact),
        "gemma scope, the file": Case(
            "gemma_scope", "jumprelu", lambda f: npz(f) / "params.npz", *plain, "jump_relu", exact=exact
        ),
        "gemma scope 2": Case(
            "gemma_scope",
            "jumprelu",
            safetensors(second, name, config, "config.json"),
            *plain,
            "jump_relu",
            exact=exact,
            origin={"model": "google/gemma-3-1b-pt", "hook": "blocks.7.hook_resid_post", "target": None},
        ),
        "gemma scope 2 skip": Case(
            "gemma_scope",
            "jumprelu",
            safetensors(skip, name, through, "config.json"),
            *skipped,
            "jump_relu",
            exact=exact | {"b_enc": p["b_enc"], "W_skip": p["W_skip"]},
            origin={"hook": "blocks.7.mlp.hook_in", "target": "blocks.7.hook_mlp_out"},
        ),
    }


def llamascopium_cases() -> dict[str, Case]:
    p = parameters()
    w = {name: tensor.double() for name, tensor in p.items()}
    four = {"W_E": p["W_enc"], "b_E": p["b_enc"], "W_D": p["W_dec"], "b_D": p["b_dec"]}
    log_threshold = {"activation_function.log_jumprelu_threshold": p["threshold"].log()}
    here, there = "blocks.5.ln2.hook_normalized", "blocks.5.hook_mlp_out"

    def case(act, rule, settings, tensors, norms=(None, None), by_norm=True, times_norms=False, subtract=False):
        target = there if len(norms) == 2 and settings.get("out") else here
        config = {
            "sae_type": "sae",
            "d_model": D_IN,
            "expansion_factor": D_SAE / D_IN,
            "hook_point_in": here,
            "hook_point_out": target,
            "sparsity_include_decoder_norm": by_norm,
            "norm_activation": "inference" if norms[0] is None else "dataset-wise",
            "top_k": K,
            **{key: value for key, value in settings.items() if key != "out"},
        }
        names = {
            f"dataset_average_activation_norm.{hook}": torch.tensor(norm)
            for hook, norm in zip((here, target), norms, strict=True)
            if norm
        }
        c_in, c_out = (D_IN**0.5 / norm if norm else 1.0 for norm in norms)
        n = w["W_dec"].norm(dim=1) if by_norm else torch.ones(D_SAE, dtype=torch.float64)

        def codes(x):
            return act(((c_in * x - subtract * w["b_dec"]) @ w["W_enc"] + w["b_enc"]) * n) / n

        def x_hat(x):
            return (codes(x) @ w["W_dec"] + (w["b_dec"] if "b_D" in tensors else 0)) / c_out

        write = safetensors(tensors | names, "sae_weights.safetensors", config, "config.json")
        origin = {"hook": here, "target": target if target != here else None}
        return Case(
            "llamascopium",
            rule,
            write,
            (lambda x: codes(x) * n) if times_norms else codes,
            x_hat,
            f"sae {settings['act_fn']}",
            origin=origin,
        )

    biasless = {name: tensor for name, tensor in four.items() if name != "b_D"}
    jump = {"act_fn": "jumprelu"}
    return {
        "llamascopium relu": case(relu, "l1", {"act_fn": "relu"}, four),
        "llamascopium, b_D subtracted": case(
            relu, "l1", {"act_fn": "relu", "apply_decoder_bias_to_pre_encoder": True}, four, norms=(7.0, 7.0), subtract=True
        ),
        "llamascopium topk": case(topk(K), "topk", {"act_fn": "topk"}, four, norms=(7.0, 7.0), times_norms=True),
        "llamascopium topk, no norms": case(topk(K), "topk", {"act_fn": "topk"}, four, by_norm=False),
        "llamascopium jumprelu": case(above(p["threshold"]), "jumprelu", jump, four | log_threshold, norms=(7.0, 7.0)),
        "llamascopium without b_D": case(
            above(p["threshold"]), "jumprelu", jump | {"use_decoder_bias": False}, biasless | log_threshold, by_norm=False
        ),
        "llamascopium transcoder": case(
            above(p["threshold"]), "jumprelu", jump | {"out": True}, four | log_threshold, norms=(7.0, 2.0)
        ),
    }


def circuit_tracer_cases() -> dict[str, Case]:
    p = parameters()
    names = {"W_enc": p["W_enc"].T, "b_enc": p["b_enc"], "W_dec": p["W_dec"], "b_dec": p["b_dec"]}
    above_it = {"activation_function.threshold": p["threshold"]}

    def case(activation, rule, act, tensors, said="", layer=3, skip=False, the_file=False, at=""):
        config = (
            "model_name: google/gemma-2-2b\nmodel_kind: transcoder_set\n# where it stands\n"
            f"feature_input_hook: '{at}ln2.hook_normalized'\nfeature_output_hook: 'hook_mlp_out'\nscan: null\n{said}"
        )

        def write(folder: Path) -> Path:
            folder.mkdir(parents=True)
            (folder / "config.yaml").write_text(config)
            whole = {key: tensor.contiguous() for key, tensor in (tensors | ({"W_skip": p["W_skip"]} if skip else {})).items()}
            save_file(whole, folder / f"layer_{layer}.safetensors")
            if the_file:
                save_file(whole, folder / "layer_0.safetensors")
            return folder / f"layer_{layer}.safetensors" if the_file else folder

        origin = {
            "model": "google/gemma-2-2b",
            "hook": f"blocks.{layer}.ln2.hook_normalized",
            "target": f"blocks.{layer}.hook_mlp_out",
        }
        exact = pick(p, *FOUR, *(["W_skip"] if skip else []))
        own = functions(p, act, subtract=False, skip=skip)
        return Case("circuit_tracer", rule, write, *own, f"{activation} transcoder", exact=exact, origin=origin)

    return {
        "circuit-tracer relu": case("relu", "l1", relu, names),
        "circuit-tracer skip": case("relu", "l1", relu, names, "activation: relu\n", skip=True),
        "circuit-tracer topk": case("topk", "topk", topk(K), names, f"activation: topk\nk: {K}\n"),
        "circuit-tracer jumprelu": case("jumprelu", "jumprelu", above(p["threshold"]), names | above_it, skip=True),
        "circuit-tracer, k in the file": case("topk", "topk", topk(K), names | {"k": torch.tensor(K)}, "activation: topk\n"),
        "circuit-tracer, a placeholder": case("relu", "l1", relu, names, at="blocks.{layer}."),
        "circuit-tracer, one of two files": case("relu", "l1", relu, names, layer=1, the_file=True),
    }


from foreign_practice import PRACTICE  # noqa: E402 (they use the parts above)
from foreign_saelens import SAELENS  # noqa: E402
from foreign_scopes import scope_cases  # noqa: E402

CASES = (
    saelens_cases()
    | sparsify_cases()
    | dictionary_learning_cases()
    | openai_cases()
    | gemma_scope_cases()
    | llamascopium_cases()
    | circuit_tracer_cases()
    | SAELENS
    | PRACTICE
    | scope_cases()
)


def edited(case: str, folder: Path, name: str = "cfg.json", inner: str | None = None, **changes: Any) -> Path:
    """Return a case's files with other settings."""
    path = CASES[case].write(folder / "foreign")
    config = json.loads((path / name).read_text())
    (config[inner] if inner else config).update(changes)
    (path / name).write_text(json.dumps(config))
    return path
