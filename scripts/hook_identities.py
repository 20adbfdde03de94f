"""Check that hooks are what their names mean, for every family that transformer-lens knows and transformers can build small.

    python scripts/hook_identities.py [FAMILY...]

    embed   hook_embed (+ hook_pos_embed) = input of the first block
    mid     resid_pre + attn_out = resid_mid
    post    resid_mid + mlp_out = resid_post, or resid_pre + attn_out + mlp_out = resid_post for parallel blocks
    hidden  mlp.hook_post = input of the down projection
    write   a new value of resid_mid is read by the MLP and added to its output: new + mlp_out = resid_post

Each model has random weights. Plain torch hooks read the inputs and outputs of its blocks and their parts. An entry is «holds»,
«refused» (a HookError; the reasons are below the table), «none» (the family has no such part) or «WRONG», with the number of
layers when layers differ. The exit code is 1 if any is wrong.
"""

import argparse
import inspect
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import saelens_lite as sl
from saelens_lite.errors import HookError, ModelNotFoundError

D_MODEL, N_VOCAB, N_LAYERS, TOLERANCE = 32, 97, 2, 1e-5
TOKENS = torch.randint(20, N_VOCAB, (2, 6), generator=torch.Generator().manual_seed(0))
CHECKS = ("embed", "mid", "post", "hidden", "write")
DOWN = {"down_proj", "c_proj", "fc2", "fc_out", "dense_4h_to_h", "w2", "wo", "dense", "value", "Wo"}
ATTENTION = re.compile(r"attn|attention|mixer|mamba|conv|rec|temporal|ssm|gate$|expert")
SMALL = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "kv_lora_rank"), D_MODEL),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), N_LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "intermediate_size_mlp"), 48),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "top_k", "num_key_value_heads", "moe_k"), 2),
    **dict.fromkeys(("head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 8),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0),
    "vocab_size": N_VOCAB, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24, "q_lora_rank": 16, "n_group": 1,
    "topk_group": 1, "rotary_dim": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "expert_ffn_hidden_size": 16, "index_head_dim": 8, "index_n_heads": 2,
}  # fmt: skip
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8}
DENSE_FIRST = {"first_k_dense_replace": 1}
LATENT = DENSE_FIRST | {"num_key_value_heads": 4, "head_dim": 8}
FAMILIES: dict[str, dict[str, Any]] = {  # settings that the defaults need to be small or to differ where it matters
    "BambaForCausalLM": MAMBA | {"attn_layer_indices": [1]},
    "CodeGenForCausalLM": {"n_ctx": 64},
    "DeepseekV2ForCausalLM": LATENT,
    "DeepseekV3ForCausalLM": LATENT,
    "Glm4MoeLiteForCausalLM": LATENT,
    "GlmMoeDsaForCausalLM": LATENT,
    "YoutuForCausalLM": LATENT,
    "Zamba2ForCausalLM": {"layers_block_type": ["mamba", "hybrid"], "layer_types": ["mamba", "hybrid"]},
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]]},
    "Gemma4ForCausalLM": {"vocab_size_per_layer_input": N_VOCAB, "hidden_size_per_layer_input": 8, "global_head_dim": 8},
    "GraniteForCausalLM": {"embedding_multiplier": 12.0, "residual_multiplier": 0.22},
    "GraniteMoeForCausalLM": {"embedding_multiplier": 12.0, "residual_multiplier": 0.22},
    "GraniteMoeHybridForCausalLM": MAMBA
    | {"layer_types": ["mamba", "attention"], "embedding_multiplier": 12.0, "residual_multiplier": 0.22},
    "Glm4MoeForCausalLM": DENSE_FIRST,
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "Mamba2ForCausalLM": {"num_heads": 8, "head_dim": 8, "state_size": 8},
    "JambaForCausalLM": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "NemotronHForCausalLM": {"layers_block_type": ["mamba", "attention"]},
    "OlmoHybridForCausalLM": HYBRID,
    "Qwen3NextForCausalLM": HYBRID,
    "Qwen3_5ForCausalLM": HYBRID,
    "Qwen3_5MoeForCausalLM": HYBRID,
    "RecurrentGemmaForCausalLM": {"block_types": ["recurrent", "attention"]},
    "RobertaForMaskedLM": {"pad_token_id": 1},
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "OPT, norms behind": ("OPTForCausalLM", {"do_layer_norm_before": False}),
    "OPT, projected": ("OPTForCausalLM", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    "OPT, projected, norms before": ("OPTForCausalLM", {"word_embed_proj_dim": 16}),
    "GPTNeoX, sequential": ("GPTNeoXForCausalLM", {"use_parallel_residual": False}),
    "Falcon, sequential": ("FalconForCausalLM", {"parallel_attn": False}),
    "Falcon, two norms": ("FalconForCausalLM", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "StableLm, parallel": ("StableLmForCausalLM", {"use_parallel_residual": True}),
    "Bloom, stream behind the norm": ("BloomForCausalLM", {"apply_residual_connection_post_layernorm": True}),
    "Qwen2Moe, one dense layer": ("Qwen2MoeForCausalLM", {"mlp_only_layers": [0]}),
    "Qwen3Moe, one dense layer": ("Qwen3MoeForCausalLM", {"mlp_only_layers": [0]}),
    "Qwen3Next, one dense layer": ("Qwen3NextForCausalLM", HYBRID | {"mlp_only_layers": [1]}),
    "Ernie4_5_Moe, one dense layer": ("Ernie4_5_MoeForCausalLM", {"moe_layer_start_index": 1, "moe_layer_end_index": 1}),
    "Llama4, one dense layer": ("Llama4ForCausalLM", {"moe_layers": [1]}),
}


class Found(NamedTuple):
    """Return the result of one check for a family: the number of layers per outcome, and the reasons for refusals."""

    outcomes: Counter
    reasons: dict[str, str]

    def __str__(self) -> str:
        outcomes = +self.outcomes
        if len(outcomes) == 1:
            return next(iter(outcomes))
        return ", ".join(f"{n} {outcome}" for outcome, n in sorted(outcomes.items()))


def families() -> dict[str, tuple[str, dict[str, Any]]]:
    """Return the class and the settings of every family that transformers has, and of variants."""
    import transformers
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES

    known = sorted(name for name in SUPPORTED_ARCHITECTURES if hasattr(transformers, name))
    return {name: (name, FAMILIES.get(name, {})) for name in known} | VARIANTS


def build(name: str, settings: dict[str, Any]) -> nn.Module:
    """Return a small model of a transformers class with random weights."""
    import transformers

    kind = getattr(transformers, name)
    torch.manual_seed(0)
    config = small(kind.config_class, settings)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError("encoder and decoder: not one residual stream")
    with torch.device("meta"):
        n = sum(parameter.numel() for parameter in kind(config).parameters())
    if n > 3_000_000:
        raise ValueError(f"{n:,} parameters even so")
    module = kind(config).eval()
    for parameter in module.parameters():
        is_vector = parameter.ndim == 1  # biases and norms, which start at 0 and 1
        mean = float(parameter.detach().float().mean()) if is_vector else 0.0
        nn.init.normal_(parameter, mean=mean, std=0.1)
    for key, buffer in module.named_buffers():
        if "scalar" in key:
            buffer.fill_(0.5)
    return module


def small(kind: Any, settings: dict[str, Any]) -> Any:
    """Return a config of a class with small sizes."""
    keys = set(inspect.signature(kind.__init__).parameters) | set(getattr(kind, "__dataclass_fields__", {}))
    inner = {
        key: small(sub, settings)
        for key, sub in getattr(kind, "sub_configs", {}).items()
        if inspect.isclass(sub) and key in keys
    }
    sizes = {key: value for key, value in (SMALL | settings).items() if key in keys or (key in settings and not inner)}
    return kind(**(sizes | inner))


@contextmanager
def tensors_of(module: nn.Module) -> Iterator[dict[tuple[str, str], list[Tensor]]]:
    """Note every tensor that enters or leaves a module, by its name and side, with plain torch hooks."""
    noted: dict[tuple[str, str], list[Tensor]] = {}

    def note(name: str, side: str, value: Any) -> None:
        value = value[0] if isinstance(value, tuple | list) and value else value
        if isinstance(value, Tensor) and value.is_floating_point():
            noted.setdefault((name, side), []).append(value.clone())

    handles = []
    for name, part in module.named_modules():
        handles += [
            part.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: note(name, "in", args[0] if args else kwargs.get("hidden_states")),
                with_kwargs=True,
            ),
            part.register_forward_hook(lambda _, args, out, name=name: note(name, "out", out)),
        ]
    try:
        yield noted
    finally:
        for handle in handles:
            handle.remove()


def check(module: nn.Module, tokenizer: Any) -> dict[str, Found]:
    """Compare the hooks of a model with tensors taken by plain torch hooks."""
    lm = sl.LanguageModel(module, tokenizer, name="random")
    with tensors_of(module) as noted, torch.no_grad():
        module(TOKENS, use_cache=False)
    found = {check: Found(Counter(), {}) for check in CHECKS}

    def served(name: str) -> Tensor | str:
        """Return the tensor at a hook, or why it is refused; "none" where the family has no such part."""
        try:
            return lm.run(TOKENS, name)[name]
        except HookError as error:
            return "none" if str(error).startswith("no hook") and "experts" not in str(error) else str(error)

    def add(which: str, values: list[Tensor | str], holds: Callable[[], bool] = lambda: True) -> None:
        """Count the outcome of one check of one layer; a refusal must name hooks that can be served."""
        refusals = [value for value in values if isinstance(value, str)]
        outcome = ("holds" if holds() else "WRONG") if not refusals else "none" if "none" in refusals else "refused"
        if outcome == "refused":
            found[which].reasons.setdefault(re.sub(r"blocks\.\d+", "blocks.N", refusals[0]), "")
            instead = re.findall(r"[\w.]*hook_\w+", refusals[0].partition("use ")[2])
            if (lm.blocks and not instead) or any(isinstance(served(name), str) for name in instead):
                outcome = "WRONG"
        found[which].outcomes[outcome] += 1

    if not lm.blocks:  # several stacks, each of which runs more than once
        for which in CHECKS[1:]:
            add(which, [served(f"{stack}_blocks.{i}.hook_resid_pre") for stack in "HL" for i in range(N_LAYERS)])
        add("embed", [served("hook_embed")], lambda: False)
        return found
    (blocks,) = [
        name
        for name, part in module.named_modules()
        if isinstance(part, nn.ModuleList) and len(part) == len(lm.blocks) and part[0] is lm.blocks[0]
    ]
    entering = [noted.get((f"{blocks}.{i}", "in"), [None])[0] for i in range(len(lm.blocks))]
    leaving = [noted.get((f"{blocks}.{i}", "out"), [None])[0] for i in range(len(lm.blocks))]
    embed, positions = served("hook_embed"), served("hook_pos_embed")
    if isinstance(positions, str):
        add("embed", [embed], lambda: near(entering[0], embed))
    else:
        add("embed", [embed, positions], lambda: near(entering[0], embed, positions))
    for i, (pre, post) in enumerate(zip(entering, leaving, strict=True)):
        inside = {key: value for key, (value, *_) in noted.items() if key[0].startswith(f"{blocks}.{i}.")}
        ins = [value for (_, side), value in inside.items() if side == "in"]
        mid, attn, mlp = (served(f"blocks.{i}.hook_{part}") for part in ("resid_mid", "attn_out", "mlp_out"))
        outs = [value for (_, side), value in inside.items() if side == "out"]
        if attn == "none" and isinstance(mid, Tensor):  # a layer with another mixer in place of attention
            add("mid", [], lambda pre=pre, mid=mid, outs=outs: any(near(mid, pre, out) for out in outs))
        elif isinstance(attn, str) or isinstance(mlp, str) or not near(post, pre, attn, mlp):
            add("mid", [attn, mid], lambda pre=pre, attn=attn, mid=mid: near(mid, pre, attn))
        else:
            add("mid", [mid], lambda pre=pre, attn=attn, mid=mid: near(mid, pre, attn))  # parallel, unless there is a middle
        if isinstance(mid, Tensor):
            add("post", [mlp], lambda mid=mid, mlp=mlp, post=post: near(post, mid, mlp))
        else:  # in parallel, or the sums go through norms
            ends = [post, *(inside[name, "in"] for name, side in inside if side == "out" and near(post, inside[name, side]))]
            if isinstance(attn, Tensor) and not any(near(value, pre, attn) for value in ins):
                parallel = isinstance(mlp, Tensor) and near(post, pre, attn, mlp)
                found["mid"].outcomes["WRONG"] += int(not parallel)

            def holds(pre=pre, post=post, attn=attn, mlp=mlp, ends=ends, inside=inside) -> bool:
                if isinstance(attn, Tensor) and near(post, pre, attn, mlp):
                    return True
                return any(near(end, stream, mlp) for end in ends for stream in inside.values())

            add("post", [mlp], holds)
        downs = [
            value
            for (name, side), value in inside.items()
            if side == "in"
            and name.split(".")[-1] in DOWN
            and not ATTENTION.search(name.removeprefix(f"{blocks}.{i}.").lower())
        ]
        hidden = served(f"blocks.{i}.mlp.hook_post")
        add("write", [mid, mlp], partial(writes, lm, i))
        add("hidden", [hidden], lambda downs=downs, hidden=hidden: bool(downs) and near(downs[-1], hidden))
    return found


def writes(lm: sl.LanguageModel, i: int) -> bool:
    """Return whether a new hook_resid_mid of a block is a term of what leaves the block."""
    names = [f"blocks.{i}.hook_mlp_out", f"blocks.{i}.hook_resid_post"]
    new = torch.randn(*TOKENS.shape, D_MODEL, generator=torch.Generator().manual_seed(1))
    with lm.replace(f"blocks.{i}.hook_resid_mid", lambda _: new.clone()):
        mlp, post = lm.run(TOKENS, names).values()
    return near(post, new, mlp)


def near(total: Tensor | None, *terms: Tensor) -> bool:
    """Return whether a tensor is a sum of others, up to float32's rounding."""
    if total is None or any(term.numel() != total.numel() for term in terms):
        return False
    total, *terms = (value.reshape(-1, value.shape[-1]).double() for value in (total, *terms))
    if any(term.shape != total.shape for term in terms):
        return False
    return bool((sum(terms) - total).abs().max() <= TOLERANCE * total.abs().max())


def check_family(name: str, tokenizer: Any) -> dict[str, Found]:
    """Build a family and check its hooks."""
    return check(build(*families()[name]), tokenizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", nargs="*", help="the families to check; default: all")
    asked = parser.parse_args().family
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    tokenizer = sl.load_model("tiny", device="cpu").tokenizer
    table, reasons, unbuilt, n_wrong = [], dict[str, list[str]](), dict[str, str](), 0
    for name, (kind, settings) in families().items():
        if asked and name not in asked:
            continue
        try:
            module = build(kind, settings)
            with torch.no_grad():
                module(TOKENS, use_cache=False)
        except Exception as error:
            unbuilt[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
            continue
        try:
            found = check(module, tokenizer)
        except (ModelNotFoundError, ValueError, AttributeError, RuntimeError) as error:
            unbuilt[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            continue
        table.append([name, *(str(found[check]) for check in CHECKS)])
        n_wrong += sum(found[check].outcomes["WRONG"] for check in CHECKS)
        for check_ in CHECKS:
            for reason in found[check_].reasons:
                reasons.setdefault(reason, []).append(name)
    width = max(len(row[0]) for row in table)
    for row in [["family", *CHECKS], *table]:
        print(f"{row[0]:{width}s} ", *(f"{cell:22s}" for cell in row[1:]))
    print(f"\n{len(table)} families built; {n_wrong} wrong\n\nRefused:")
    for reason, names in reasons.items():
        print(f"- {reason}  [{', '.join(names)}]")
    print("\nNot built:")
    for name, reason in unbuilt.items():
        print(f"- {name}: {reason}")
    sys.exit(bool(n_wrong))


if __name__ == "__main__":
    main()
