"""Measure the speed of reading activations: bare module, this library with one and three hooks, and SAELens.

    python scripts/benchmarks/capture.py --peer-python /path/to/venv-with-sae-lens/bin/python

The model has the shape of GPT-2 small and random weights. Each contestant runs it on the same token rows up to block 8 and
returns the activations there; they take turns, and all must agree on the activations. The bare module is transformers' own,
with SDPA attention, stopped by an exception in a forward hook. SAELens's ActivationsStore runs in its own process (only with
--peer-python), on the two kinds of model it can load: "HookedTransformer", its default, and "AutoModelForCausalLM". Only its
forward passes are timed, not its dataset or its mixing buffer. Prints medians over the rounds; each ratio is the median of the
ratios of the rounds.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

import saelens_lite as sl

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

HOOK = "blocks.8.hook_resid_pre"
THREE_HOOKS = [HOOK, "blocks.6.hook_mlp_out", "blocks.4.hook_resid_pre"]
N_CTX = 128

PEER = """
import sys, time, json, torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2LMHeadModel
folder, kind, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.set_num_threads(threads)
tokens = load_file(folder + "/tokens.safetensors")["tokens"]
if kind == "HookedTransformer":
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
    hook = "blocks.8.hook_resid_pre"
    theirs = GPT2LMHeadModel.from_pretrained(folder)
    c = theirs.config
    cfg = HookedTransformerConfig(
        n_layers=c.n_layer, d_model=c.n_embd, n_heads=c.n_head, d_head=c.n_embd // c.n_head, d_mlp=4 * c.n_embd,
        n_ctx=c.n_positions, d_vocab=c.vocab_size, act_fn="gelu_new", normalization_type="LN", eps=c.layer_norm_epsilon,
        device="cpu")
    model = HookedTransformer(cfg)
    model.load_state_dict(convert_gpt2_weights(theirs, cfg), strict=False)
else:
    from sae_lens.load_model import load_model
    hook = "transformer.h.7"
    model = load_model("AutoModelForCausalLM", folder, device="cpu", hook_names=[hook])
from sae_lens import ActivationsStore
store = ActivationsStore(
    model=model, dataset=Dataset.from_dict({"tokens": tokens[0].tolist()}), streaming=False, hook_name=hook,
    hook_head_index=None, context_size=tokens.shape[-1], d_in=768, n_batches_in_buffer=2, total_training_tokens=1,
    store_batch_size_prompts=tokens.shape[1], train_batch_size_tokens=128, prepend_bos=False, normalize_activations="none",
    device=torch.device("cpu"), dtype="float32")
print("ready", flush=True)
for line in sys.stdin:
    batch = tokens[int(line)]
    start = time.perf_counter()
    acts = store.get_activations(batch)
    seconds = time.perf_counter() - start
    save_file({"acts": acts.contiguous()}, folder + "/acts.safetensors")
    print(json.dumps({"seconds": seconds}), flush=True)
"""


class Peer:
    """SAELens in its own process, which waits while others are timed."""

    def __init__(self, python: str, folder: str, kind: str, threads: int):
        command = [python, "-c", PEER, folder, kind, str(threads)]
        self.folder = folder
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        while (line := self.process.stdout.readline()).strip() != "ready":
            if not line:
                raise SystemExit(f"{python} cannot run SAELens; its error stands above")

    def __call__(self, batch: int) -> tuple[float, torch.Tensor]:
        self.process.stdin.write(f"{batch}\n")
        self.process.stdin.flush()
        seconds = json.loads(self.process.stdout.readline())["seconds"]
        return seconds, load_file(f"{self.folder}/acts.safetensors")["acts"]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


class Stop(Exception):
    """Ends the bare module's forward pass."""


def random_gpt2() -> "GPT2LMHeadModel":
    """transformers' model of GPT-2 small's shape with random weights, the same each time."""
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0)).eval()


@torch.no_grad()
def bare(module: "GPT2LMHeadModel", tokens: torch.Tensor) -> torch.Tensor:
    """What enters block 8, by nothing but transformers and a hook."""
    found = []

    def stop(_module, args):
        found.append(args[0])
        raise Stop

    handle = module.transformer.h[8].register_forward_pre_hook(stop)
    try:
        module.transformer(tokens, use_cache=False)
    except Stop:
        pass
    finally:
        handle.remove()
    return found[0]


def timed(run: Callable[[torch.Tensor], torch.Tensor], batches: torch.Tensor) -> Callable[[int], tuple[float, torch.Tensor]]:
    """A contestant in this process: from the number of a batch to (seconds, activations)."""

    def contestant(batch: int) -> tuple[float, torch.Tensor]:
        start = time.perf_counter()
        acts = run(batches[batch])
        return time.perf_counter() - start, acts

    return contestant


def measure(contestants: dict[str, Callable], rounds: int, n_batches: int) -> dict[str, list[float]]:
    """Seconds of each contestant in each round, after two rounds to warm up; the order turns from round to round."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    order = list(contestants)
    for i in range(rounds + 2):
        answers = {name: contestants[name](i % n_batches) for name in order}
        order = [*order[1:], order[0]]
        for name, (_, acts) in answers.items():
            off = float((acts - answers["bare module"][1]).abs().max())
            if off > 1e-3:
                raise SystemExit(f"{name}: activations differ from the bare module's by up to {off:.1e}")
        if i >= 2:
            for name, (value, _) in answers.items():
                seconds[name].append(value)
    return seconds


def ratio(seconds: dict[str, list[float]], above: str, below: str) -> float:
    """Median over the rounds of one contestant's time divided by another's."""
    return round(statistics.median(a / b for a, b in zip(seconds[above], seconds[below], strict=True)), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8, help=f"token rows in a batch, of {N_CTX} tokens each")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batches", type=int, default=3, help="different batches, used in turn")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peer-python", help="Python of an environment with sae-lens")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    module = random_gpt2()
    lm = sl.LanguageModel(random_gpt2(), sl.load_model("tiny").tokenizer, name="random GPT-2 small")
    generator = torch.Generator().manual_seed(0)
    batches = torch.randint(lm.d_vocab, (args.batches, args.rows, N_CTX), generator=generator)
    contestants = {
        "bare module": timed(lambda tokens: bare(module, tokens), batches),
        "ours, one hook": timed(lambda tokens: lm.run(tokens, HOOK)[HOOK], batches),
        "ours, three hooks": timed(lambda tokens: lm.run(tokens, THREE_HOOKS)[HOOK], batches),
    }
    with tempfile.TemporaryDirectory() as folder:
        peers = {}
        if args.peer_python:
            module.save_pretrained(folder)
            lm.tokenizer.save_pretrained(folder)
            save_file({"tokens": batches}, f"{folder}/tokens.safetensors")
            for kind in ("HookedTransformer", "AutoModelForCausalLM"):
                peers[f"SAELens, {kind}"] = Peer(args.peer_python, folder, kind, args.threads)
        seconds = measure(contestants | peers, args.rounds, args.batches)
        for peer in peers.values():
            peer.close()
    n_tokens = args.rows * N_CTX
    speed = {name: round(n_tokens / statistics.median(values)) for name, values in seconds.items()}
    ratios = {
        "speed, ours / bare module": ratio(seconds, "bare module", "ours, one hook"),
        "time, three hooks / one hook": ratio(seconds, "ours, three hooks", "ours, one hook"),
        **{f"speed, ours / {name}": ratio(seconds, name, "ours, one hook") for name in peers},
    }
    for name, value in speed.items():
        print(f"{name:42} {value:8,} tokens/s")
    for name, value in ratios.items():
        print(f"{name:42} {value:8.3f}")
    if args.json:
        settings = {key: str(value) for key, value in vars(args).items()}
        report = {"settings": settings, "tokens per second": speed, "ratios": ratios, "seconds": seconds}
        args.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    sys.exit(main())
