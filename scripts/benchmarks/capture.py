"""Measure the speed of reading activations: bare module, this library with one and three hooks, and SAELens.

    python scripts/benchmarks/capture.py --peer-python /path/to/venv-with-sae-lens/bin/python

The model has the shape of GPT-2 small and random weights. Each contestant runs it on the same token rows up to block 8 and
returns the activations there; they take turns, and all must agree on the activations. The bare module is transformers' own,
with SDPA attention, stopped by an exception in a forward hook. SAELens's ActivationsStore runs in its own process (only with
--peer-python), on the two kinds of model it can load: "HookedTransformer", its default, and "AutoModelForCausalLM". Only its
forward passes are timed, not its dataset or its mixing buffer. Prints medians over the rounds; each ratio is the median of the
ratios of the rounds.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from shared import HOOK, N_CTX, Peer, hooked_transformer, parser, random_gpt2, source, write_report

import saelens_lite as sl

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

THREE_HOOKS = [HOOK, "blocks.6.hook_mlp_out", "blocks.4.hook_resid_pre"]

PEER = """
import sys, time, json, torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
folder, kind, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.set_num_threads(threads)
tokens = load_file(folder + "/tokens.safetensors")["tokens"]
if kind == "HookedTransformer":
    hook = "blocks.8.hook_resid_pre"
    model = hooked_transformer(folder)
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


class TimedPeer(Peer):
    """SAELens in its own process, asked like a contestant in this one."""

    def __init__(self, python: str, folder: str, kind: str, threads: int):
        super().__init__(python, source(hooked_transformer) + PEER, folder, kind, threads)
        self.folder = folder

    def __call__(self, batch: int) -> tuple[float, torch.Tensor]:
        seconds = self.ask(batch)["seconds"]
        return seconds, load_file(f"{self.folder}/acts.safetensors")["acts"]


class Stop(Exception):
    """Ends the bare module's forward pass."""


@torch.no_grad()
def bare(module: "GPT2LMHeadModel", tokens: torch.Tensor) -> torch.Tensor:
    """Capture the input of block 8 with only transformers and a hook."""
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
    """Return a contestant in this process: from the number of a batch to (seconds, activations)."""

    def contestant(batch: int) -> tuple[float, torch.Tensor]:
        start = time.perf_counter()
        acts = run(batches[batch])
        return time.perf_counter() - start, acts

    return contestant


def measure(contestants: dict[str, Callable], rounds: int, n_batches: int) -> dict[str, list[float]]:
    """Return the seconds of each contestant in each round, after two rounds to warm up; the order turns from round to round."""
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
    """Return the median over the rounds of one contestant's time divided by another's."""
    return round(statistics.median(a / b for a, b in zip(seconds[above], seconds[below], strict=True)), 3)


def main() -> None:
    options = parser(__doc__, rounds=9)
    options.add_argument("--rows", type=int, default=8, help=f"token rows in a batch, of {N_CTX} tokens each")
    options.add_argument("--batches", type=int, default=3, help="different batches, used in turn")
    args = options.parse_args()
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
                peers[f"SAELens, {kind}"] = TimedPeer(args.peer_python, folder, kind, args.threads)
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
    write_report(args, {"tokens per second": speed, "ratios": ratios, "seconds": seconds})


if __name__ == "__main__":
    sys.exit(main())
