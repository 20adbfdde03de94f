"""Files of crosscoders for model diffing, beside the numbers they stand for. See scripts/foreign.py.

Nothing here comes from saelens_lite: codes and outputs are the tools' own equations in float64, port by port.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from foreign import Case, normal, relu, torch_file
from safetensors.torch import save_file
from torch import Tensor

N, WIDTH, LATENTS, K = 2, 6, 16, 3
NAMES = ("CROSSCODER", "SAE", "MIXED", "NONE", "DECOUPLED")
HOOK = "blocks.13.hook_resid_post"
BOTH = (f"base:{HOOK}", f"chat:{HOOK}")
MODELS = {"base": "google/gemma-2-2b", "chat": "google/gemma-2-2b-it"}
CONFIG = {"activation_dim": WIDTH, "dict_size": LATENTS, "num_layers": N}
NULLS = dict.fromkeys(("activation_mean", "activation_std", "encoder_layers", "latent_processor", "num_decoder_layers"))


@dataclass
class CrosscoderCase(Case):
    """A case with the keys of the ports that it reads, and whether another tool's file can say all of it again."""

    keys: tuple[str | None, ...] = (None, None)
    models: tuple[tuple[str, str | None], ...] = ()


def tensors(n: int = N, read: int | None = None) -> dict[str, Tensor]:
    """Return parameters of a crosscoder; port 1 has longer directions than port 0, and latent 3 is of one port only."""
    made = {
        "encoder.weight": normal(read or n, WIDTH, LATENTS, seed=1) * 0.5,
        "encoder.bias": normal(LATENTS, seed=2) * 0.3,
        "decoder.weight": normal(n, LATENTS, WIDTH, seed=3) * torch.arange(1.0, n + 1)[:, None, None],
        "decoder.bias": normal(n, WIDTH, seed=4),
    }
    made["decoder.weight"][0, 3] = 0
    return made


def statistics(*shape: int, unset: bool = False) -> dict[str, Tensor]:
    """Return the buffers of NormalizableMixin. The scale is the target over the root of the summed variances."""
    mean, std = normal(*shape, seed=5), normal(*shape, seed=6).abs() + 0.5
    scale = 1.3 / (std.square().sum(-1) + 1e-8).sqrt()
    if unset:
        mean, std, scale = mean * torch.nan, std * torch.nan, torch.ones_like(scale)
    names = ("activation_mean", "activation_std", "activation_global_scale", "target_rms")
    return dict(zip(names, (mean, std, scale, torch.tensor(1.3)), strict=True))


def functions(w: dict[str, Tensor], norm: str | None = None, alphas=(1.0, 0.1), read=(0, 1)):
    """Return (codes, x_hat) by the equations of CrossCoder, or of BatchTopKCrossCoder with a code normalisation."""
    w = {name: tensor.double() for name, tensor in w.items()}
    n = len(w["decoder.weight"])
    mean, scale = w.get("activation_mean", torch.tensor(torch.nan)), w.get("activation_global_scale")
    normalised = not mean.isnan().any()
    by_port = w["decoder.weight"].norm(dim=2).sum(0)
    joined = w["decoder.weight"].norm(dim=(0, 2))
    weight = {"CROSSCODER": by_port, "SAE": joined, "MIXED": alphas[0] * joined + alphas[1] * by_port}.get(norm, 1.0)

    def codes(x: Tensor) -> Tensor:
        z = x.unflatten(1, (n, WIDTH))
        z = (z - mean) * scale[:, None] if normalised else z
        f = relu(torch.einsum("nld,ldf->nf", z[:, list(read)], w["encoder.weight"]) + w["encoder.bias"])
        return f if norm is None else f * (f * weight > w["threshold"])

    def x_hat(x: Tensor) -> Tensor:
        y = torch.einsum("nf,lfd->nld", codes(x), w["decoder.weight"]) + w["decoder.bias"]
        y = y / (scale[:, None] + 1e-8) + mean if normalised else y
        return y.flatten(1)

    return codes, x_hat


def folder(weights: dict[str, Tensor], config: dict[str, Any], run: dict[str, Any] | None = None) -> Callable[[Path], Path]:
    """Return a writer of config.json and model.safetensors, as push_to_hub makes them, with the run's settings beside."""

    def write(place: Path) -> Path:
        place.mkdir(parents=True)
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, place / "model.safetensors")
        (place / "config.json").write_text(json.dumps(config))
        if run is not None:
            (place / "trainer_config.json").write_text(json.dumps({"trainer": run}))
        return place

    return write


def crosscoder(norm: str | None = None, *, stats: bool | None = None, theta: float = 1.5, older: bool = False, **more: Any):
    """Return a case of a crosscoder. stats: None for a file without the buffers, False for NaN in them."""
    read, config = more.pop("read", (0, 1)), dict(CONFIG)
    w = tensors(read=len(read)) | more.pop("change", {})
    w |= {} if stats is None else statistics(N, WIDTH, unset=not stats)
    id_only = more.pop("id_only", False)
    if norm is not None:
        w |= {"k": torch.tensor(K, dtype=torch.int32), "threshold": torch.tensor(theta)}
        config |= {"k": K} | ({} if older or id_only else NULLS | {"code_normalization": norm})
    if not older and norm is not None:
        w["code_normalization_id"] = torch.tensor(NAMES.index(norm) + 1)
    alphas = more.pop("alphas", (1.0, 0.1))
    if norm == "MIXED":
        config |= dict(zip(("code_normalization_alpha_sae", "code_normalization_alpha_cc"), alphas, strict=True))
    config |= {"encoder_layers": list(read)} if read != (0, 1) else {}
    run, pickled = more.pop("run", None), more.pop("pickled", False)
    if pickled:
        whole = torch_file({f"_orig_mod.{name}": x for name, x in w.items()}, "model_final.pt", {"trainer": config})
        write = lambda place: whole(place) / "model_final.pt"  # noqa: E731
    else:
        write = folder(w, config, run)
    rule, kind = ("l1", "CrossCoder") if norm is None else ("jumprelu", "BatchTopKCrossCoder")
    own = functions(w, norm, alphas, read)
    return CrosscoderCase("crosscoder_learning", rule, write, *own, kind, pickled=pickled, **more)


def sae(stats: bool | None) -> CrosscoderCase:
    """Return a case of BatchTopKSAE, of differences."""
    w = {
        "encoder.weight": normal(LATENTS, WIDTH, seed=1) * 0.5,
        "encoder.bias": normal(LATENTS, seed=2) * 0.3,
        "decoder.weight": normal(WIDTH, LATENTS, seed=3),
        "b_dec": normal(WIDTH, seed=4),
        "k": torch.tensor(K, dtype=torch.int32),
        "threshold": torch.tensor(0.6),
    }
    w |= {} if stats is None else statistics(WIDTH, unset=not stats)
    v = {name: tensor.double() for name, tensor in w.items()}

    def codes(x: Tensor) -> Tensor:
        z = (x - v["activation_mean"]) * v["activation_global_scale"] if stats else x
        f = relu((z - v["b_dec"]) @ v["encoder.weight"].T + v["encoder.bias"])
        return f * (f > v["threshold"])

    def x_hat(x: Tensor) -> Tensor:
        y = codes(x) @ v["decoder.weight"].T + v["b_dec"]
        return y / (v["activation_global_scale"] + 1e-8) + v["activation_mean"] if stats else y

    write = folder(w, {"activation_dim": WIDTH, "dict_size": LATENTS, "k": K})
    key = f"chat-base:{HOOK}"
    facts, models = {"hook": key, "models": MODELS}, tuple(MODELS.items())
    return CrosscoderCase(
        "crosscoder_learning", "batch_topk", write, codes, x_hat, "BatchTopKSAE", facts=facts, keys=(key,), models=models
    )


def model_diff(name: str, settings: dict[str, Any], keys: tuple[str, str], named: tuple, **facts: Any) -> CrosscoderCase:
    """Return a case of crosscoder-model-diff-replication, whose factors are not in the files."""
    w, scale = tensors(), torch.tensor(facts["scale"]).double()
    four = {
        "W_enc": w["encoder.weight"],
        "W_dec": w["decoder.weight"].transpose(0, 1).contiguous(),
        "b_enc": w["encoder.bias"],
        "b_dec": w["decoder.bias"],
    }
    v = {key: tensor.double() for key, tensor in four.items()}

    def codes(x: Tensor) -> Tensor:
        return relu(torch.einsum("nld,ldf->nf", x.unflatten(1, (N, WIDTH)) * scale[:, None], v["W_enc"]) + v["b_enc"])

    def x_hat(x: Tensor) -> Tensor:
        return ((torch.einsum("nf,fld->nld", codes(x), v["W_dec"]) + v["b_dec"]) / scale[:, None]).flatten(1)

    def write(place: Path) -> Path:
        place.mkdir(parents=True)
        torch.save(four, place / f"{name}.pt")
        config = {"d_in": WIDTH, "dict_size": LATENTS, "seq_len": 1024, "hook_point": "blocks.14.hook_resid_pre", "l1_coeff": 2}
        (place / ("cfg.json" if name == "cc_weights" else f"{name}_cfg.json")).write_text(json.dumps(config | settings))
        return place if name == "cc_weights" else place / f"{name}.pt"

    own = CrosscoderCase("crosscoder_model_diff", "l1", write, codes, x_hat, "CrossCoder", True, facts=facts)
    own.keys, own.models = keys, named
    return own


PRE = "blocks.14.hook_resid_pre"
NAMED = {"facts": {"hook": HOOK, "models": MODELS}, "keys": BOTH, "models": tuple(MODELS.items())}
OWN_RUN = {"layer": 13, "lm_name": None, "ports": list(BOTH), "models": MODELS}
CASES: dict[str, CrosscoderCase] = {
    "crosscoder, relu, older": crosscoder(**NAMED),
    "crosscoder, relu, statistics": crosscoder(stats=True),
    "crosscoder, batch topk": crosscoder("CROSSCODER", stats=False, **NAMED),
    "crosscoder, batch topk, statistics": crosscoder("CROSSCODER", stats=True),
    "crosscoder, batch topk, older": crosscoder("CROSSCODER", older=True),
    "crosscoder, batch topk, SAE": crosscoder("SAE", stats=False, id_only=True),
    "crosscoder, batch topk, SAE, statistics": crosscoder("SAE", stats=True),
    "crosscoder, batch topk, MIXED": crosscoder("MIXED", stats=True, alphas=(0.7, 0.3)),
    "crosscoder, batch topk, NONE": crosscoder("NONE", stats=True, theta=0.5),
    "crosscoder, batch topk, never set": crosscoder("CROSSCODER", stats=False, theta=-1.0),
    "crosscoder, batch topk, no direction": crosscoder(
        "CROSSCODER", stats=True, change={"decoder.weight": tensors()["decoder.weight"] * (torch.arange(LATENTS) != 5)[:, None]}
    ),
    "crosscoder, one side is read": crosscoder("CROSSCODER", stats=True, read=(1,)),
    "crosscoder, sides are read in turn": crosscoder("CROSSCODER", stats=True, read=(1, 0)),
    "crosscoder, a layer": crosscoder(
        stats=False,
        run={"layer": 13, "lm_name": "a-b"},
        keys=(f"model_0:{HOOK}", f"model_1:{HOOK}"),
        models=(("model_0", None), ("model_1", None)),
    ),
    "crosscoder, named by its run": crosscoder("NONE", run=OWN_RUN, keys=BOTH, models=tuple(MODELS.items()), theta=0.5),
    "crosscoder, a checkpoint": crosscoder("CROSSCODER", stats=True, pickled=True),
    "differences": sae(True),
    "differences, not normalised": sae(False),
    "differences, older": sae(None),
    "model diff": model_diff(
        "cc_weights",
        {"model_name": "gemma-2-2b"},
        (f"base:{PRE}", f"chat:{PRE}"),
        tuple(MODELS.items()),
        scale=(0.28, 0.24),
        models=MODELS,
    ),
    "model diff, a checkpoint": model_diff(
        "3",
        {"model_name_A": MODELS["base"], "model_name_B": MODELS["chat"]},
        (f"A:{PRE}", f"B:{PRE}"),
        (("A", MODELS["base"]), ("B", MODELS["chat"])),
        scale=(0.28, 0.24),
    ),
}
