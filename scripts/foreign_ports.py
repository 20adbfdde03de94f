"""Files of Gemma Scope and circuit-tracer in all their layouts, beside the numbers they stand for. See scripts/foreign.py.

Nothing here comes from saelens_lite: codes and outputs are the tools' own equations in float64, layer by layer.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from foreign import D_IN, D_SAE, FOUR, Case, above, functions, normal, parameters, pick, relu, topk
from safetensors.torch import save_file
from torch import Tensor

N_LAYERS, WIDTH, LATENTS = 4, 6, 5  # of the dictionaries of several layers
AT = (5, 9, 12, 15)  # the layers of the crosscoder
RESID = tuple(f"blocks.{layer}.hook_resid_post" for layer in AT)
MLP_IN, MLP_OUT = (tuple(f"blocks.{i}.{hook}" for i in range(N_LAYERS)) for hook in ("mlp.hook_in", "hook_mlp_out"))
POINTS = {
    "crosscoder": ("model.layers.{5,9,12,15}.output",) * 2,
    "clt": tuple(f"model.layers.{{all}}.{side}_feedforward_layernorm.output" for side in ("pre", "post")),
}


@dataclass
class PortCase(Case):
    """A case with the hooks that it reads and writes."""

    reads: tuple[str | None, ...] = (None,)
    writes: tuple[str | None, ...] = (None,)


def layers(skip: bool = False, width: int = WIDTH) -> list[dict[str, Tensor]]:
    """Parameters of each layer's latents, which write that layer and later ones."""
    made = []
    for i in range(N_LAYERS):
        p = {
            "w_enc": normal(width, LATENTS, seed=10 * i) * 0.5,
            "b_enc": normal(LATENTS, seed=10 * i + 1) * 0.3,
            "w_dec": normal(LATENTS, N_LAYERS, width, seed=10 * i + 2),
            "b_dec": normal(width, seed=10 * i + 3),
            "threshold": normal(LATENTS, seed=10 * i + 4).abs() * 0.5,
        }
        p["w_dec"][:, :i] = 0
        made.append(p | ({"affine_skip_connection": normal(width, width, seed=10 * i + 5)} if skip else {}))
    return made


def part(p: dict[str, Tensor], i: int) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Codes of the latents of layer i, and their part of the output at layer i and later ones."""
    w = {name: tensor.double() for name, tensor in p.items()}

    def codes(x: Tensor) -> Tensor:
        h = x @ w["w_enc"] + w["b_enc"]
        return relu(h) * (h > w["threshold"]) if "threshold" in w else relu(h)

    def output(x: Tensor) -> Tensor:
        y = torch.einsum("nf,fod->nod", codes(x), w["w_dec"])
        y[:, i] += w["b_dec"]
        if "affine_skip_connection" in w:
            y[:, i] += x @ w["affine_skip_connection"]
        return y[:, i:].flatten(1)

    return codes, output


def all_layers(parts: list[dict[str, Tensor]]) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Codes and output of a dictionary of all layers, by the equations of JumpReLUMultiLayerSAE of Gemma Scope 2."""
    w = {name: torch.stack([p[name] for p in parts]).double() for name in parts[0]}

    def codes(x: Tensor) -> Tensor:
        h = torch.einsum("nld,ldf->nlf", x.unflatten(1, (N_LAYERS, WIDTH)), w["w_enc"]) + w["b_enc"]
        return relu(h) * (h > w["threshold"])

    def output(x: Tensor) -> Tensor:
        y = torch.einsum("nlf,lfod->nod", codes(x), w["w_dec"]) + w["b_dec"]
        if "affine_skip_connection" in w:
            y = y + torch.einsum("nld,lde->nle", x.unflatten(1, (N_LAYERS, WIDTH)), w["affine_skip_connection"])
        return y.flatten(1)

    return lambda x: codes(x).flatten(1), output


def write_layers(parts: list[dict[str, Tensor]], kind: str, config: bool, one: int | None = None) -> Callable[[Path], Path]:
    """Return a writer of Gemma Scope 2's files of several layers."""
    name = "layer_5_9_12_15_width_1m_l0_big" if kind == "crosscoder" else "width_262k_l0_big"

    def write(folder: Path) -> Path:
        inner = folder / kind / name
        inner.mkdir(parents=True)
        for i, p in enumerate(parts):
            save_file(p, inner / f"params_layer_{i}.safetensors")
        if config:
            settings = {
                "architecture": "jump_relu",
                "model_name": "google/gemma-3-270m-pt",
                "type": kind,
                "width": 20,
                "l0": 150,
            }
            settings |= {f"hf_hook_point_{side}": point for side, point in zip(("in", "out"), POINTS[kind], strict=True)}
            settings |= {"affine_connection": "affine_skip_connection" in parts[0]}
            (inner / "config.json").write_text(json.dumps(settings))
        return inner if one is None else inner / f"params_layer_{one}.safetensors"

    return write


def gemma_scope_cases() -> dict[str, PortCase]:
    p, many, skips = parameters(), layers(), layers(skip=True)
    second = {name.lower(): tensor for name, tensor in pick(p, *FOUR, "threshold").items()}
    skip = second | {"affine_skip_connection": p["W_skip"].T.contiguous()}
    plain = functions(p, above(p["threshold"]), subtract=False)
    c = D_IN**0.5

    def named(folder_name: str, tensors: dict[str, Tensor]) -> Callable[[Path], Path]:
        def write(folder: Path) -> Path:
            (folder / folder_name).mkdir(parents=True)
            if "w_enc" in tensors:
                save_file(tensors, folder / folder_name / "params.safetensors")
            else:
                np.savez(folder / folder_name / "params.npz", **{key: tensor.numpy() for key, tensor in tensors.items()})
            return folder / folder_name

        return write

    def case(write, fns, reads, writes=None) -> PortCase:
        reads = (reads,) if isinstance(reads, str | None) else reads
        writes = reads if writes is None else (writes,) if isinstance(writes, str) else writes
        return PortCase("gemma_scope", "jumprelu", write, *fns, "jump_relu", reads=reads, writes=writes)

    first = pick(p, *FOUR, "threshold")
    return {
        "crosscoder": case(write_layers(many, "crosscoder", True), all_layers(many), RESID),
        "crosscoder, no config.json": case(write_layers(many, "crosscoder", False), all_layers(many), RESID),
        "a layer of a crosscoder": case(write_layers(many, "crosscoder", True, 1), part(many[1], 1), RESID[1], RESID[1:]),
        "the last layer of a crosscoder": case(write_layers(many, "crosscoder", False, 3), part(many[3], 3), RESID[3]),
        "a layer of a clt": case(write_layers(many, "clt", True, 0), part(many[0], 0), MLP_IN[0], MLP_OUT),
        "a layer of an affine clt": case(write_layers(skips, "clt", True, 2), part(skips[2], 2), MLP_IN[2], MLP_OUT[2:]),
        "a layer of a clt, no config.json": case(
            write_layers(skips, "clt", False, 3), part(skips[3], 3), MLP_IN[3], MLP_OUT[3]
        ),
        "resid_post by its folder": case(
            named("resid_post/layer_17_width_16k_l0_big", second), plain, "blocks.17.hook_resid_post"
        ),
        "attn_out by its folder": case(named("attn_out_all/layer_3_width_16k_l0_small", second), plain, "blocks.3.attn.hook_z"),
        "mlp_out by its folder": case(named("mlp_out/layer_0_width_1m_l0_medium", second), plain, "blocks.0.hook_mlp_out"),
        "transcoder by its folder": case(
            named("transcoder_all/layer_7_width_262k_l0_small_affine", skip),
            functions(p, above(p["threshold"]), subtract=False, skip=True),
            "blocks.7.mlp.hook_in",
            "blocks.7.hook_mlp_out",
        ),
        "first release, a layer": case(named("layer_3/width_16k/average_l0_71", first), plain, None),
        "first release, the embedding": case(
            named("embedding/width_4k/average_l0_6", first),
            (lambda x: plain[0](x / c), lambda x: plain[1](x / c) * c),
            "hook_embed",
        ),
    }


def circuit_tracer_cases() -> dict[str, PortCase]:
    p, many, skips = parameters(), layers(), layers(skip=True)
    four = pick(p, *FOUR)
    upper = four | {"W_enc": p["W_enc"].T.contiguous()}
    lower = {name.lower(): tensor for name, tensor in four.items()} | {"threshold": p["threshold"]}
    lower |= {"affine_skip_connection": p["W_skip"].T.contiguous()}
    hooks = ("mlp.hook_in", "mlp.hook_out")

    def yaml(inside: str, outside: str, kind: str = "transcoder_set", more: str = "") -> str:
        names = f"feature_input_hook: '{inside}'\nfeature_output_hook: '{outside}'\n"
        return f"model_name: meta-llama/Llama-3.2-1B\nmodel_kind: {kind}\n{names}scan_name: [a, b]\n{more}"

    def one(fns, tensors, config, reads, writes, rule="l1", name="layer_3", beside=None) -> PortCase:
        def write(folder: Path) -> Path:
            folder.mkdir(parents=True)
            save_file(tensors, folder / f"{name}.safetensors")
            for file, text in {"config.yaml": config, "wanb-config.yaml": beside}.items():
                if text is not None:
                    (folder / file).write_text(text)
            return folder if name == "layer_3" else folder / f"{name}.safetensors"

        return PortCase("circuit_tracer", rule, write, *fns, "", reads=(reads,), writes=(writes,))

    def clt(parts, layer, rule) -> PortCase:
        def write(folder: Path) -> Path:
            folder.mkdir(parents=True)
            for i, w in enumerate(parts):
                small = {f"W_enc_{i}": w["w_enc"].T.contiguous(), f"b_enc_{i}": w["b_enc"], f"b_dec_{i}": w["b_dec"]}
                if rule == "jumprelu":
                    small |= {f"threshold_{i}": w["threshold"], f"W_skip_{i}": w["affine_skip_connection"]}
                save_file(small, folder / f"W_enc_{i}.safetensors")
                save_file({f"W_dec_{i}": w["w_dec"][:, i:].contiguous()}, folder / f"W_dec_{i}.safetensors")
            (folder / "config.yaml").write_text(yaml("hook_resid_mid", "hook_mlp_out", "cross_layer_transcoder"))
            return folder / f"W_enc_{layer}.safetensors"

        known = parts[layer] if rule == "jumprelu" else {key: w for key, w in parts[layer].items() if key != "threshold"}
        reads = (f"blocks.{layer}.hook_resid_mid",)
        return PortCase("circuit_tracer", rule, write, *part(known, layer), "", reads=reads, writes=MLP_OUT[layer:])

    plain = functions(p, relu, subtract=False)
    copied = functions(p, above(p["threshold"]), subtract=False, skip=True)
    square = {**lower, "w_enc": normal(D_IN, D_IN, seed=31), "b_enc": p["b_enc"][:D_IN], "w_dec": p["W_dec"][:D_IN]}
    square |= {"threshold": p["threshold"][:D_IN]}
    as_ours = {"W_enc": square["w_enc"], "b_enc": square["b_enc"], "W_dec": square["w_dec"], "b_dec": p["b_dec"]}
    of_square = functions(as_ours | {"W_skip": p["W_skip"]}, above(square["threshold"]), subtract=False, skip=True)
    places = [f"blocks.3.{hook}" for hook in hooks]
    table = (
        "transcoders:\n  - {id: a, layer: 2, filepath: other.safetensors}\n  - {id: b, layer: 3, filepath: mine.safetensors}\n"
    )
    turned = lower | {"w_enc": upper["W_enc"]}
    return {
        "circuit-tracer, scan_name": one(plain, upper, yaml(*hooks), *places),
        "circuit-tracer, lower case": one(copied, lower, yaml(*hooks), *places, rule="jumprelu"),
        "circuit-tracer, lower case, turned": one(copied, turned, yaml(*hooks), *places, rule="jumprelu"),
        "circuit-tracer, lower case, square": one(of_square, square, yaml(*hooks), *places, rule="jumprelu"),
        "circuit-tracer, no config.yaml": one(plain, upper, None, None, None, beside="d_model:\n  value: 10\n"),
        "circuit-tracer, a table": one(plain, upper, yaml(*hooks, more=table), *places, name="mine"),
        "circuit-tracer, nnsight": one(
            plain, upper, yaml("layers.{layer}.odd_layernorm", "layers.{layer}.mlp.other"), None, None
        ),
        "circuit-tracer, topk of the stream": one(
            functions(p, topk(3), subtract=False),
            upper,
            yaml("hook_resid_post", "hook_resid_post", more="activation: topk\nk: 3\n"),
            *["blocks.3.hook_resid_post"] * 2,
            rule="topk",
        ),
        "circuit-tracer, a layer of a clt": clt(many, 1, "l1"),
        "circuit-tracer, a layer of a clt, jumprelu": clt(skips, 2, "jumprelu"),
        "circuit-tracer, the last layer of a clt": clt(many, 3, "l1"),
    }


CASES = gemma_scope_cases() | circuit_tracer_cases()
assert D_SAE > D_IN > WIDTH
