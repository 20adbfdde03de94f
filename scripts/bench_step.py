"""Time of one training step: ours, our dense definition of it, and (with --peer-python) SAELens, in alternation.

    python scripts/bench_step.py --peer-python /path/to/venv-with-sae-lens/bin/python

Every contestant starts from the same weights and sees the same batches: sums of 32 planted directions, with encoder biases
that make about that many latents fire (so that ReLU rules are timed at trained sparsity). A step is everything a trainer
does for a batch: forward, backward, clipping, Adam, dead-latent counters. Prints medians; ratios are of medians.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

import saelens_lite as sl
from saelens_lite.cache import TensorSource
from saelens_lite.train import Trainer
from saelens_lite.train.step import DenseStep, SparseStep

PEER = """
import sys, time, json, torch
from safetensors.torch import load_file
from sae_lens.saes.sae import TrainStepInput
from sae_lens import (StandardTrainingSAE, StandardTrainingSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig,
                      GatedTrainingSAE, GatedTrainingSAEConfig)
folder, rule, k, threads = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(threads)
data = load_file(folder + "/data.safetensors")
d_in, d_sae = data["W_enc"].shape
common = dict(d_in=d_in, d_sae=d_sae, device="cpu", normalize_activations="none")
sae = {
    "l1": lambda: StandardTrainingSAE(StandardTrainingSAEConfig(l1_coefficient=5.0, **common)),
    "topk": lambda: TopKTrainingSAE(TopKTrainingSAEConfig(k=k, **common)),
    "gated": lambda: GatedTrainingSAE(GatedTrainingSAEConfig(l1_coefficient=5.0, **common)),
}[rule]()
with torch.no_grad():
    sae.W_enc.copy_(data["W_enc"]); sae.W_dec.copy_(data["W_dec"]); sae.b_dec.copy_(data["b_dec"])
    (sae.b_gate if rule == "gated" else sae.b_enc).copy_(data["b_enc"])
optimizer = torch.optim.Adam(sae.parameters(), lr=1e-5)
since = torch.zeros(d_sae); frequency = torch.zeros(d_sae)
dead = torch.zeros(d_sae, dtype=torch.bool)
sae.train()
print("ready", flush=True)
for line in sys.stdin:
    x = data["x"][int(line)]
    start = time.perf_counter()
    out = sae.training_forward_pass(TrainStepInput(sae_in=x, coefficients={"l1": 5.0}, dead_neuron_mask=dead,
                                                   n_training_steps=1, is_logging_step=False))
    with torch.no_grad():
        fired = out.feature_acts.bool().float()
        did = fired.sum(-2).bool()
        since += 1
        since[did] = 0
        frequency += fired.sum(0)
    out.loss.backward()
    torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    print(json.dumps({"seconds": time.perf_counter() - start, "l0": fired.sum(1).mean().item()}), flush=True)
"""


class Peer:
    """SAELens in its own process, which waits while others are timed."""

    def __init__(self, python: str, folder: str, rule: str, k: int, threads: int):
        command = [python, "-c", PEER, folder, rule, str(k), str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        while (line := self.process.stdout.readline()).strip() != "ready":
            if not line:
                raise SystemExit(f"{python} cannot run SAELens; its error stands above")

    def step(self, i: int) -> dict[str, float]:
        self.process.stdin.write(f"{i}\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def planted(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(batches [n batch d_in], directions [d_sae d_in], encoder bias [d_sae])."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(args.d_sae, args.d_in, generator=generator), dim=1)
    batches = []
    for _ in range(args.batches):
        latent = torch.randint(args.d_sae, (args.batch, args.k), generator=generator)
        strength = torch.rand(args.batch, args.k, generator=generator) + 0.5
        batches.append(torch.nn.functional.embedding_bag(latent, directions, per_sample_weights=strength, mode="sum"))
    x = torch.stack(batches)
    x *= args.d_in**0.5 / x.square().sum(-1).mean().sqrt()
    h = x[0] @ directions.T
    bias = -h.flatten()[:: max(1, h.numel() // 1_000_000)].quantile(1 - 1.5 * args.k / args.d_sae)
    return x, directions, torch.full((args.d_sae,), float(bias))


def trainer(rule: str, step: type, x: torch.Tensor, directions: torch.Tensor, bias: torch.Tensor, args) -> Trainer:
    """Our trainer at the planted weights, computing its steps by `step`."""
    config = sl.TrainConfig(
        sparsity=rule, options={"k": args.k} if rule == "topk" else {}, d_sae=args.d_sae, batch_size=args.batch,
        n_tokens=10**9, lr=1e-5, normalize="none",
    )  # fmt: skip
    made = Trainer(config, TensorSource(x[0]))
    d = made.dictionary
    d.W_dec.data.copy_(directions)
    d.W_enc.data.copy_(directions.T)
    d.b_dec.data.zero_()
    if rule != "topk":
        (d.rule.b_gate if rule == "gated" else d.b_enc).data.copy_(bias)
    made.step_class = step
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", nargs="+", default=["topk", "l1", "gated"])
    parser.add_argument("--d-in", type=int, default=768)
    parser.add_argument("--d-sae", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, default=3, help="different batches, used in turn")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-dense", action="store_true", help="leave the dense definition out")
    parser.add_argument("--peer-python", help="Python of an environment with sae-lens")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    x, directions, bias = planted(args)
    rows = []
    for rule in args.rules:
        ours = {"ours": trainer(rule, SparseStep, x, directions, bias, args)}
        if not args.no_dense:
            ours["dense"] = trainer(rule, DenseStep, x, directions, bias, args)
        with tempfile.TemporaryDirectory() as folder:
            peer = None
            if args.peer_python:
                start = bias if rule != "topk" else torch.zeros_like(bias)
                tensors = {"x": x, "W_enc": directions.T.contiguous(), "W_dec": directions, "b_enc": start}
                save_file({**tensors, "b_dec": torch.zeros(args.d_in)}, f"{folder}/data.safetensors")
                peer = Peer(args.peer_python, folder, rule, args.k, args.threads)
            seconds: dict[str, list[float]] = {"encoder product": [], **{name: [] for name in ours}}
            for i in range(args.rounds + 2):
                batch = i % args.batches
                times = {}
                start_time = time.perf_counter()
                x[batch] @ ours["ours"].dictionary.W_enc.detach()
                times["encoder product"] = time.perf_counter() - start_time
                for name, made in ours.items():
                    start_time = time.perf_counter()
                    made.step(x[batch])
                    times[name] = time.perf_counter() - start_time
                if peer:
                    answer = peer.step(batch)
                    times["SAELens"] = answer["seconds"]
                    peer_l0 = answer["l0"]
                if i >= 2:  # two rounds to warm up
                    for name, value in times.items():
                        seconds.setdefault(name, []).append(value)
            if peer:
                peer.close()
        median = {name: statistics.median(values) for name, values in seconds.items()}
        line = ours["ours"].log_line()
        row = {
            "rule": rule, "l0": line["l0"], "ms": {name: round(1000 * value, 1) for name, value in median.items()},
            "ours / encoder product": round(median["ours"] / median["encoder product"], 2),
            **{f"{name} / ours": round(median[name] / median["ours"], 2) for name in ("dense", "SAELens") if name in median},
            "peak MiB of this process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        }  # fmt: skip
        if peer:
            row["SAELens l0"] = peer_l0
        rows.append(row)
        print(json.dumps(row), flush=True)
    if args.json:
        args.json.write_text(json.dumps({"settings": {k: str(v) for k, v in vars(args).items()}, "rows": rows}, indent=1))


if __name__ == "__main__":
    sys.exit(main())
