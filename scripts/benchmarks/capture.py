"""Measure the speed of reading activations: bare module, this library with one and three hooks, and SAELens.

    python scripts/benchmarks/capture.py --peer-python /path/to/venv-with-sae-lens/bin/python
    python scripts/benchmarks/capture.py --device cuda --dtype bfloat16 --rows 128

The model has the shape of GPT-2 small and random weights. Each contestant runs it on the same token rows up to block 8 and
returns the activations there; they take turns, and all must agree on the activations. The bare module is transformers' own,
with SDPA attention, stopped by an exception in a forward hook. SAELens's ActivationsStore runs in its own process (only with
--peer-python), on the two kinds of model it can load: "HookedTransformer", its default, and "AutoModelForCausalLM". Only its
forward passes are timed, not its dataset or its mixing buffer. On a GPU, tokens and activations stay there. Prints medians over
the rounds; each ratio is the median of the ratios of the rounds.
"""

import statistics
import sys
import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from shared import HOOK, N_CTX, Peer, hooked_transformer, now, parser, random_gpt2, source, write_report

import saelens_lite as sl

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

THREE_HOOKS = [HOOK, "blocks.6.hook_mlp_out", "blocks.4.hook_resid_pre"]

PEER = """
import sys, json, torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
folder, kind, threads, device, dtype = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], sys.argv[5]
torch.set_num_threads(threads)
tokens = load_file(folder + "/tokens.safetensors")["tokens"].to(device)
if kind == "HookedTransformer":
    hook = "blocks.8.hook_resid_pre"
    model = hooked_transformer(folder).to(device).to(getattr(torch, dtype))
else:
    from sae_lens.load_model import load_model
    hook = "transformer.h.7"
    model = load_model("AutoModelForCausalLM", folder, device=device, hook_names=[hook]).to(getattr(torch, dtype))
from sae_lens import ActivationsStore
store = ActivationsStore(
    model=model, dataset=Dataset.from_dict({"tokens": tokens[0].tolist()}), streaming=False, hook_name=hook,
    hook_head_index=None, context_size=tokens.shape[-1], d_in=768, n_batches_in_buffer=2, total_training_tokens=1,
    store_batch_size_prompts=tokens.shape[1], train_batch_size_tokens=128, prepend_bos=False, normalize_activations="none",
    device=torch.device(device), dtype=dtype)
print("ready", flush=True)
for line in sys.stdin:
    batch = tokens[int(line)]
    start = now(device)
    acts = store.get_activations(batch)
    seconds = now(device) - start
    save_file({"acts": acts.contiguous()}, folder + "/acts.safetensors")
    print(json.dumps({"seconds": seconds}), flush=True)
"""


class TimedPeer(Peer):
    """SAELens in its own process, asked like a contestant in this one."""

    def __init__(self, python: str, folder: str, kind: str, threads: int, device: str, dtype: str):
        super().__init__(python, source(now, hooked_transformer) + PEER, folder, kind, threads, device, dtype)
        self.folder, self.device = folder, device

    def __call__(self, batch: int) -> tuple[float, torch.Tensor]:
        seconds = self.ask(batch)["seconds"]
        return seconds, load_file(f"{self.folder}/acts.safetensors", device=self.device)["acts"]


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


def timed(
    run: Callable[[torch.Tensor], torch.Tensor], batches: torch.Tensor, device: str
) -> Callable[[int], tuple[float, torch.Tensor]]:
    """Return a contestant in this process: from the number of a batch to (seconds, activations)."""

    def contestant(batch: int) -> tuple[float, torch.Tensor]:
        start = now(device)
        acts = run(batches[batch])
        return now(device) - start, acts

    return contestant


def measure(contestants: dict[str, Callable], rounds: int, n_batches: int, is_exact: bool) -> dict[str, list[float]]:
    """Return the seconds of each contestant in each round, after two rounds to warm up; the order turns from round to round."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    order = list(contestants)
    for i in range(rounds + 2):
        answers = {name: contestants[name](i % n_batches) for name in order}
        order = [*order[1:], order[0]]
        wanted = answers["bare module"][1]
        for name, (_, acts) in answers.items():
            off = float((acts - wanted).abs().max())
            if off > (1e-3 if is_exact else 0.05 * float(wanted.abs().max())):
                raise SystemExit(f"{name}: activations differ from the bare module's by up to {off:.1e}")
        if i >= 2:
            for name, (value, _) in answers.items():
                seconds[name].append(value)
    return seconds


def ratio(seconds: dict[str, list[float]], above: str, below: str) -> float:
    """Return the median over the rounds of one contestant's time divided by another's."""
    return round(statistics.median(a / b for a, b in zip(seconds[above], seconds[below], strict=True)), 3)


def main() -> None:
    options = parser(__doc__, rounds=9, device=True)
    options.add_argument("--rows", type=int, default=8, help=f"token rows in a batch, of {N_CTX} tokens each")
    options.add_argument("--batches", type=int, default=3, help="different batches, used in turn")
    options.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the model")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    module, own = (random_gpt2().to(args.device, getattr(torch, args.dtype)) for _ in range(2))
    lm = sl.LanguageModel(own, sl.load_model("tiny").tokenizer, name="random GPT-2 small")
    generator = torch.Generator().manual_seed(0)
    batches = torch.randint(lm.d_vocab, (args.batches, args.rows, N_CTX), generator=generator).to(args.device)
    contestants = {
        "bare module": timed(lambda tokens: bare(module, tokens), batches, args.device),
        "ours, one hook": timed(lambda tokens: lm.run(tokens, HOOK)[HOOK], batches, args.device),
        "ours, three hooks": timed(lambda tokens: lm.run(tokens, THREE_HOOKS)[HOOK], batches, args.device),
    }
    with tempfile.TemporaryDirectory() as folder:
        peers = {}
        if args.peer_python:
            module.save_pretrained(folder)
            lm.tokenizer.save_pretrained(folder)
            save_file({"tokens": batches}, f"{folder}/tokens.safetensors")
            for kind in ("HookedTransformer", "AutoModelForCausalLM"):
                peers[f"SAELens, {kind}"] = TimedPeer(args.peer_python, folder, kind, args.threads, args.device, args.dtype)
        is_exact = args.device == "cpu" and args.dtype == "float32"  # a GPU may compute float32 products in TF32
        seconds = measure(contestants | peers, args.rounds, args.batches, is_exact)
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
