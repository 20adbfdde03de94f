"""Measure the time of one training step: this library, its dense definition of the step, SAELens and sparsify, in turn.

    python scripts/benchmarks/step.py --peer-python /path/to/venv-with-sae-lens/bin/python

--d-sae and --k take several values; SAELens and sparsify take part only with --peer-python. Every contestant starts from the
same weights and sees the same batches: sums of 32 planted directions, with encoder biases that make about that many latents
fire, so that ReLU rules are timed at the sparsity of a trained dictionary. A step is everything a trainer does for a batch:
forward, backward, clipping, Adam, counters of dead latents. Prints medians; ratios are ratios of medians. --memory prints the
peak memory of a step above parameters, gradients and moments instead; freed memory is then returned to the system at once,
which makes every step slower.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time

import torch
from safetensors.torch import save_file
from shared import FREE_AT_ONCE, Peer, forget_peak, high_water, parser, write_report
from step_peers import PEERS

import saelens_lite as sl
from saelens_lite.cache import TensorSource
from saelens_lite.codes.encoder import Spare
from saelens_lite.training import Trainer
from saelens_lite.training.step import DenseStep, SparseStep

COUNTING = ("topk", "batch_topk", "matryoshka", "group_max", "matching_pursuit")  # the others need biases to be as sparse


def planted(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return batches [n batch d_in], directions [d_sae d_in] and the encoder bias [d_sae]."""
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
    """Return our trainer at the planted weights, with steps of class `step`."""
    options = {"jumprelu": {"threshold": 0.01 / args.d_in**0.5}}.get(rule, {"k": args.k} if rule in COUNTING else {})
    config = sl.TrainConfig(
        sparsity=rule, options=options, d_sae=args.d_sae, batch_size=args.batch,
        n_tokens=10**9, lr=1e-5, normalize="none",
    )  # fmt: skip
    made = Trainer(config, TensorSource(x[0]))
    d = made.dictionary
    d.W_dec.data.copy_(directions)
    d.W_enc.data.copy_(directions.T)
    d.b_dec.data.zero_()
    if rule not in COUNTING:
        (d.rule.b_gate if rule == "gated" else d.b_enc).data.copy_(bias)
    made.step_class = step
    return made


class Ours:
    """One of our trainers, asked like a peer."""

    def __init__(self, trainer: Trainer, x: torch.Tensor, spare: Spare | None):
        self.trainer, self.x, self.spare = trainer, x, spare

    def ask(self, i: int) -> dict:
        forget_peak()
        before = high_water()[1]
        start = time.perf_counter()
        self.trainer.step(self.x[i], self.spare)
        return {"seconds": time.perf_counter() - start, "extra_bytes": high_water()[0] - before}

    def close(self) -> None:
        """Do nothing at the end."""


def measure(rule: str, args: argparse.Namespace, x: torch.Tensor, directions: torch.Tensor, bias: torch.Tensor) -> dict:
    """Return one row of the table: all contestants in alternation, medians in milliseconds."""
    ours = trainer(rule, SparseStep, x, directions, bias, args)
    spare = None if args.memory else Spare()  # as in training, where it is held between steps
    contestants: dict[str, Ours | Peer] = {"ours": Ours(ours, x, spare)}
    if not args.no_dense:
        contestants["dense"] = Ours(trainer(rule, DenseStep, x, directions, bias, args), x, spare)
    with tempfile.TemporaryDirectory() as folder:
        if args.peer_python:
            start = torch.zeros_like(bias) if rule in COUNTING else bias
            tensors = {"x": x, "W_enc": directions.T.contiguous(), "W_dec": directions, "b_enc": start}
            save_file({**tensors, "b_dec": torch.zeros(args.d_in)}, f"{folder}/data.safetensors")
            for name in ("SAELens", "sparsify") if rule == "topk" else ("SAELens",):
                contestants[name] = Peer(args.peer_python, PEERS[name], folder, rule, args.k, args.threads)
        answers: dict[str, list[dict]] = {name: [] for name in contestants}
        products = []
        for i in range(args.rounds + 2):
            start_time = time.perf_counter()
            x[i % args.batches] @ ours.dictionary.W_enc.detach()
            products.append(time.perf_counter() - start_time)
            for name, contestant in contestants.items():
                answers[name].append(contestant.ask(i % args.batches))
        for contestant in contestants.values():
            contestant.close()
    warm = {name: found[2:] for name, found in answers.items()}  # two rounds to warm up
    seconds = {name: statistics.median(a["seconds"] for a in found) for name, found in warm.items()}
    product = statistics.median(products[2:])
    row = {
        "rule": rule,
        "k": args.k,
        "d_sae": args.d_sae,
        "batch": args.batch,
        "l0": ours.log_line()["l0"],
        **{f"l0 of {name}": round(found[-1]["l0"], 1) for name, found in warm.items() if "l0" in found[-1]},
    }
    if args.memory:
        return row | {"extra MiB": {name: round(max(a["extra_bytes"] for a in found) / 2**20) for name, found in warm.items()}}
    return row | {
        "ms": {"encoder product": round(1000 * product, 1), **{n: round(1000 * t, 1) for n, t in seconds.items()}},
        "ours / encoder product": round(seconds["ours"] / product, 2),
        **{f"{name} / ours": round(t / seconds["ours"], 2) for name, t in seconds.items() if name != "ours"},
    }


def main() -> None:
    options = parser(__doc__, rounds=7, peers="sae-lens and eai-sparsify")
    options.add_argument("--rules", nargs="+", default=["topk", "l1", "gated"])
    options.add_argument("--d-in", type=int, default=768)
    options.add_argument("--d-sae", type=int, nargs="+", default=[8192])
    options.add_argument("--batch", type=int, default=2048)
    options.add_argument("--k", type=int, nargs="+", default=[32])
    options.add_argument("--batches", type=int, default=3, help="different batches, used in turn")
    options.add_argument("--no-dense", action="store_true", help="leave the dense definition out")
    options.add_argument("--memory", action="store_true", help="peak memory instead of times")
    args = options.parse_args()
    if args.memory and not FREE_AT_ONCE.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | FREE_AT_ONCE)
    torch.set_num_threads(args.threads)
    rows = []
    for d_sae, k in itertools.product(args.d_sae, args.k):
        one = argparse.Namespace(**{**vars(args), "d_sae": d_sae, "k": k})
        data = planted(one)
        for rule in args.rules:
            rows.append(measure(rule, one, *data))
            print(json.dumps(rows[-1]), flush=True)
    write_report(args, {"rows": rows})


if __name__ == "__main__":
    main()
