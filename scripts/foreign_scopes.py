"""Files of Qwen-Scope, Goodfire, qresearch, OpenAI and Llama Scope's older layouts; see `foreign`.

`foreign` imports this file at its end. Import `CASES` from there.
"""

import json
from dataclasses import replace
from pathlib import Path

import torch
from foreign import (
    D_IN,
    D_SAE,
    FOUR,
    Case,
    K,
    functions,
    openai_cases,
    parameters,
    pick,
    relu,
    safetensors,
    topk,
    torch_file,
)
from safetensors.torch import save_file
from torch import Tensor

HERE, THERE = "blocks.8.ln2.hook_normalized", "blocks.8.hook_mlp_out"


def transposed(p: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the parameters with the axes of torch.nn.Linear."""
    return {name: tensor.T.contiguous() if name in ("W_enc", "W_dec") else tensor for name, tensor in p.items()}


def linear(p: dict[str, Tensor], encoder: str, decoder: str) -> dict[str, Tensor]:
    """Return the state dict of two linear layers."""
    w = transposed(p)
    return {
        f"{encoder}.weight": w["W_enc"],
        f"{encoder}.bias": w["b_enc"],
        f"{decoder}.weight": w["W_dec"],
        f"{decoder}.bias": w["b_dec"],
    }


def within(folder: str, write):
    """Return a writer in a folder of that name."""
    return lambda where: write(where / folder)


def pickle_cases() -> dict[str, Case]:
    p = parameters()
    exact = pick(p, "W_enc", "W_dec", "b_dec")
    plain, chosen = functions(p, relu, subtract=False), functions(p, topk(K), subtract=False)
    config = {"model_type": "topk_sae", "base_model": "Qwen/Qwen3-1.7B-Base", "d_model": D_IN, "d_sae": D_SAE, "k": K}
    config |= {"num_layers": 28, "hook_point": "resid_post", "dtype": "float32"}
    content = pick(transposed(p), *FOUR)

    def qwen(where: Path) -> Path:
        return torch_file(content, "layer5.sae.pt", config)(where) / "layer5.sae.pt"

    def layers(encoder: str, decoder: str, name: str):
        return torch_file(linear(p, encoder, decoder), name)

    llama, deepseek = "Llama-3.1-8B-Instruct-SAE-l19.pth", "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt"
    at_llama = {"model": "meta-llama/Llama-3.1-8B-Instruct", "hook": "blocks.19.hook_resid_post", "target": None}
    at_deepseek = {"model": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "hook": "blocks.19.hook_resid_pre"}
    return {
        "qwen scope": Case(
            "qwen_scope",
            "topk",
            qwen,
            *chosen,
            "topk_sae",
            True,
            exact,
            {"model": "Qwen/Qwen3-1.7B-Base", "hook": "blocks.5.hook_resid_post", "target": None},
        ),
        "goodfire": Case(
            "goodfire", "l1", layers("encoder_linear", "decoder_linear", llama), *plain, "ReLU", True, exact, at_llama
        ),
        "goodfire, named by its folder": Case(
            "goodfire",
            "l1",
            within("Llama-3.3-70B-Instruct-SAE-l50", layers("encoder_linear", "decoder_linear", "sae.pt")),
            *plain,
            "ReLU",
            True,
            exact,
            {"model": "meta-llama/Llama-3.3-70B-Instruct", "hook": "blocks.50.hook_resid_post"},
        ),
        "deepseek r1": Case(
            "deepseek_r1", "l1", layers("encoder", "decoder", deepseek), *plain, "ReLU", True, exact, at_deepseek
        ),
    }


def more_openai_cases() -> dict[str, Case]:
    """Return the dictionaries of `foreign` stored otherwise, and one with a tied decoder."""
    flat = {name: case for name, case in openai_cases().items()}
    p = parameters()
    tied = p | {"W_dec": p["W_enc"].T}
    state = {"pre_bias": p["b_dec"], "encoder.weight": p["W_enc"].T.contiguous(), "latent_bias": p["b_enc"]}
    both = state | {"decoder.weight": p["W_dec"].T.contiguous(), "stats_last_nonzero": torch.zeros(D_SAE, dtype=torch.long)}
    chosen = {"activation": "TopK", "activation_state_dict": {"k": K, "postact_fn": "ReLU"}}
    shared = state | {"decoder.linear.weight": state["encoder.weight"]}
    codes, x_hat = functions(tied, relu)
    at = {"model": "gpt2", "hook": "blocks.8.hook_resid_mid"}
    return {
        "openai TopK, nested": replace(flat["openai TopK"], write=torch_file({"autoencoder": both | chosen}, "v5.pt")),
        "openai TopK, named by its folders": replace(
            flat["openai TopK"],
            write=within("resid_post_attn_v5_32k/autoencoders", torch_file(both | chosen, "8.pt")),
            origin=at,
        ),
        "openai ReLU, without a name of it": replace(flat["openai ReLU"], write=torch_file(both, "v1.pt")),
        "openai ReLU, tied": Case("openai", "l1", torch_file(shared, "v1.pt"), codes, x_hat, "ReLU", True, pick(tied, *FOUR)),
    }


def llama_scope(
    act_fn: str = "jumprelu",
    *,
    norms: tuple[float, float] | None = (7.0, 7.0),
    by_norm: bool = True,
    bias: bool = True,
    subtract: bool = False,
    theta: float = 0.6,
) -> Case:
    """Return a dictionary in Llama Scope's first layout.

    The codes follow the tool's own loading, step by step: it folds the average norms into the weights, makes the rows of the
    decoder unit vectors, and compares with the threshold. Its codes are of that scale; ours, of the weights in the file.
    """
    w = {name: tensor.bfloat16() for name, tensor in linear(parameters(), "encoder", "decoder").items()}
    target = HERE if norms is None or norms[0] == norms[1] else THERE
    config = {
        "device": "cuda:0",
        "dtype": "torch.bfloat16",
        "hook_point_in": HERE,
        "hook_point_out": target,
        "expansion_factor": D_SAE / D_IN,
        "d_model": D_IN,
        "d_sae": D_SAE,
        "use_decoder_bias": bias,
        "apply_decoder_bias_to_pre_encoder": subtract,
        "act_fn": act_fn,
        "jump_relu_threshold": theta,
        "norm_activation": "dataset-wise" if norms else None,
        "dataset_average_activation_norm": dict(zip(("in", "out"), norms, strict=True)) if norms else None,
        "sparsity_include_decoder_norm": by_norm,
        "top_k": 50,
        "init_decoder_norm": 0.5,
    } | ({} if norms else {"norm_activation": "inference"})
    if not bias:
        w.pop("decoder.bias")

    def write(folder: Path) -> Path:
        (folder / "checkpoints").mkdir(parents=True)
        save_file(w, folder / "checkpoints/final.safetensors")
        (folder / "hyperparams.json").write_text(json.dumps(config))
        return folder

    c_in, c_out = (D_IN**0.5 / norm for norm in norms) if norms else (1.0, 1.0)
    encoder, b_enc, decoder = (w[name].double() for name in ("encoder.weight", "encoder.bias", "decoder.weight"))
    b_dec = w["decoder.bias"].double() / c_out if bias else torch.zeros(D_IN, dtype=torch.float64)
    b_enc, decoder = b_enc / c_in, decoder * c_in / c_out
    unit = decoder.norm(dim=0) if by_norm else torch.ones(D_SAE, dtype=torch.float64)
    encoder, b_enc, decoder = encoder * unit[:, None], b_enc * unit, decoder / unit

    def theirs(x: Tensor) -> Tensor:
        h = (x - b_dec if subtract else x) @ encoder.T + b_enc
        return torch.where(h > theta, h, 0)

    return Case(
        "llamascopium",
        "jumprelu",
        write,
        lambda x: theirs(x) * c_in / unit,
        lambda x: theirs(x) @ decoder.T + b_dec,
        "sae jumprelu",
        origin={"hook": HERE, "target": target if target != HERE else None},
    )


def distilled(with_d_sae: bool = False) -> Case:
    """Return a dictionary in the layout of Llama-Scope-R1-Distill, whose thresholds were trained in scaled units."""
    p = parameters()
    w = {name: tensor.double() for name, tensor in p.items()}
    hook, norm = "blocks.15.hook_resid_post", 7.0
    tensors = linear(p, "encoder", "decoder") | {"log_jumprelu_threshold": p["threshold"].log()}
    tensors[f"dataset_average_activation_norm.{hook}"] = torch.tensor(norm)
    config = {"expansion_factor": 2.4, "d_model": D_IN, "hook_point_in": hook, "hook_point_out": hook, "act_fn": "jumprelu"}
    config |= {"norm_activation": "dataset-wise", "sparsity_include_decoder_norm": True, "use_decoder_bias": True}
    c = D_IN**0.5 / norm

    def codes(x: Tensor) -> Tensor:
        h = c * x @ w["W_enc"] + w["b_enc"]
        return torch.where(h * w["W_dec"].norm(dim=1) > p["threshold"].log().exp().double(), h, 0)

    return Case(
        "llamascopium",
        "jumprelu",
        safetensors(tensors, "sae_weights.safetensors", config | ({"d_sae": D_SAE} if with_d_sae else {}), "config.json"),
        lambda x: relu(codes(x)),
        lambda x: (relu(codes(x)) @ w["W_dec"] + w["b_dec"]) / c,
        "sae jumprelu",
        origin={"hook": hook, "target": None},
    )


def scope_cases() -> dict[str, Case]:
    return (
        pickle_cases()
        | more_openai_cases()
        | {
            "llama scope": llama_scope(),
            "llama scope, trained with topk": llama_scope("topk"),
            "llama scope transcoder": llama_scope(norms=(3.2, 1.5), theta=0.3),
            "llama scope transcoder, norms of rows left out": llama_scope(norms=(3.2, 1.5), by_norm=False),
            "llama scope without decoder.bias": llama_scope(bias=False),
            "llama scope, decoder.bias subtracted": llama_scope(subtract=True),
            "llama scope, scales folded in": llama_scope(norms=None),
            "llama scope, R1-Distill": distilled(),
            "llama scope, R1-Distill with d_sae": distilled(with_d_sae=True),
        }
    )
