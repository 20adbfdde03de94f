"""Capture from a model that is larger than the memory allowed for it, with its weights on the disk.

    python scripts/benchmarks/offload.py
    python scripts/benchmarks/offload.py --limit-gb 2 --layers 20       # a deeper model under the same limit

Writes the checkpoint of a Llama with random weights, a few wide layers of 1.1 billion weights in all, one file for each layer.
One process loads it with device_map="auto" and captures a hook in the last layer. It fails if the peak of its resident memory,
as Linux counts it, is not below the limit; parts of the checkpoint that it has mapped count. (RLIMIT_AS does not fit, because
transformers maps all files at once while it loads.) Another process loads the whole model and captures the same without a
limit. Prints one line of JSON for each, and whether the two caches are equal to the byte.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from shared import high_water

N_CTX, VOCAB = 128, 8000


def options() -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--d-model", type=int, default=4096)
    made.add_argument("--d-mlp", type=int, default=11008)
    made.add_argument("--layers", type=int, default=5)
    made.add_argument("--tokens", type=int, default=1024)
    made.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    made.add_argument("--limit-gb", type=float, default=2.0, help="resident memory of the process with weights on the disk")
    made.add_argument("--weights-gb", type=float, default=0.3, help="weights that it keeps in memory between passes")
    made.add_argument("--folder", type=Path, help="for the checkpoint, which is kept; default: a temporary folder")
    made.add_argument("--only", choices=["limited", "whole"], help=argparse.SUPPRESS)
    return made.parse_args()


def write_checkpoint(folder: Path, a: argparse.Namespace) -> int:
    """Write a checkpoint layer by layer, so that this takes the memory of one. Return the bytes of its weights."""
    from transformers import LlamaConfig

    heads = a.d_model // 128
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=a.d_model, intermediate_size=a.d_mlp, num_hidden_layers=a.layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=N_CTX, dtype=a.dtype,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    wide, high = (a.d_mlp, a.d_model), (a.d_model, a.d_mlp)
    layer = {f"self_attn.{name}_proj": (a.d_model, a.d_model) for name in "qkvo"}
    layer |= {"mlp.gate_proj": wide, "mlp.up_proj": wide, "mlp.down_proj": high}
    layer |= {"input_layernorm": (a.d_model,), "post_attention_layernorm": (a.d_model,)}
    parts = [{"model.embed_tokens": (VOCAB, a.d_model)}]
    parts += [{f"model.layers.{i}.{name}": shape for name, shape in layer.items()} for i in range(a.layers)]
    parts += [{"model.norm": (a.d_model,), "lm_head": (VOCAB, a.d_model)}]
    generator, where, n_bytes = torch.Generator().manual_seed(0), {}, 0
    for number, shapes in enumerate(parts):
        weights = {}
        for name, shape in shapes.items():
            drawn = torch.empty(shape).normal_(0, 0.02, generator=generator) if len(shape) > 1 else torch.ones(shape)
            weights[f"{name}.weight"] = drawn.to(getattr(torch, a.dtype))
        file = f"model-{number:05}.safetensors"
        save_file(weights, folder / file, {"format": "pt"})
        where |= dict.fromkeys(weights, file)
        n_bytes += sum(weight.nbytes for weight in weights.values())
    index = {"metadata": {"total_size": n_bytes}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return n_bytes


def captured(a: argparse.Namespace) -> dict[str, Any]:
    """Capture a hook of the last layer, with weights on the disk under the limit, or with all of them in memory."""
    import saelens_lite as sl

    how: dict[str, Any] = {"device": "cpu", "dtype": a.dtype}
    if a.only == "limited":
        how = {"device_map": "auto", "max_memory": {"cpu": int(a.weights_gb * 1e9)}}
    began = time.perf_counter()
    lm = sl.load_model(a.folder, **how)
    loaded = time.perf_counter()
    tokens = torch.randint(VOCAB, (a.tokens // N_CTX, N_CTX), generator=torch.Generator().manual_seed(1))
    hook = f"blocks.{a.layers - 1}.hook_resid_pre"
    cache = sl.capture(lm, tokens, hook, a.folder / a.only, exists="overwrite", text_name="random tokens")
    done = time.perf_counter()
    peak = high_water()[0] / 1e9
    if a.only == "limited" and peak >= a.limit_gb:
        sys.exit(f"the peak of {peak:.2f} GB is not below the limit")
    return {
        "weights": a.only,
        "weights_in_memory_gb": round(sum(w.nbytes for w in lm.module.parameters() if not w.is_meta) / 1e9, 2),
        "limit_gb": a.limit_gb if a.only == "limited" else None,
        "peak_rss_gb": round(peak, 2),
        "load_s": round(loaded - began, 1),
        "tokens_per_s": round(cache.n_tokens / (done - loaded), 1),
    }


def main() -> None:
    a = options()
    if a.only:
        print(json.dumps(captured(a)), flush=True)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = a.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        n_bytes = write_checkpoint(folder, a)
        print(
            json.dumps(
                {
                    "weights_gb": round(n_bytes / 1e9, 2),
                    "weights_millions": n_bytes // getattr(torch, a.dtype).itemsize // 10**6,
                }
            )
        )
        settings = [
            word
            for name, value in vars(a).items()
            if name not in ("only", "folder")
            for word in (f"--{name.replace('_', '-')}", str(value))
        ]
        for only in ("limited", "whole"):
            command = [sys.executable, __file__, *settings, "--folder", str(folder), "--only", only]
            subprocess.run(command, check=True, env={**os.environ, "MALLOC_ARENA_MAX": "1"})
        files = [sorted((folder / only).glob("shard-*")) for only in ("limited", "whole")]
        same = [x.name for x in files[0]] == [x.name for x in files[1]] and all(
            one.read_bytes() == other.read_bytes() for one, other in zip(*files, strict=True)
        )
        print(json.dumps({"same_bytes": same}))


if __name__ == "__main__":
    main()
