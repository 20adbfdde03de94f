"""Measure the time of one training step: this library, its dense definition of the step, SAELens and sparsify, in turn.

    python scripts/benchmarks/step.py --peer-python /path/to/venv-with-sae-lens/bin/python
    python scripts/benchmarks/step.py --device cuda --batch 8192 --sizes 768x24576 2304x65536 --no-dense --rules all
    python scripts/benchmarks/step.py --device cuda --batch 8192 --sizes 768x24576 --no-dense --dead 0.5
    python scripts/benchmarks/step.py --ports 2 --sizes 1536x8192 --no-dense --rules topk batch_topk l1

--d-sae and --k take several values; SAELens and sparsify take part only with --peer-python. Every contestant starts from the
same weights and sees the same batches: sums of 32 planted directions, with encoder biases that make about that many latents
fire, so that ReLU rules are timed at the sparsity of a trained dictionary. --first-steps leaves these biases at zero: about
half of the latents then fire for rules without a k, as at the start of a training with a given coefficient. --dead makes a
share of the latents dead throughout. --ports adds a crosscoder whose ports, of as many models, have the width d_in together;
the others are autoencoders of d_in. A step is everything a trainer does for a batch: forward, backward, clipping, Adam,
counters of dead latents. On a GPU, a time is that of several steps one after another, until the last is done; the peers also
run compiled, in bfloat16. Prints medians; ratios are ratios of medians. --memory prints the peak memory of a step above
parameters, gradients and moments instead; on a CPU, freed memory is then returned to the system at once, which makes every step
slower.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile

import torch
from safetensors.torch import save_file
from shared import FREE_AT_ONCE, Peer, forget_peak, high_water, now, parser, write_report
from step_peers import PEERS
from step_peers import RULES as PEER_RULES

import saelens_lite as sl
from saelens_lite.cache import TensorSource
from saelens_lite.codes.encoder import Spare
from saelens_lite.training import Trainer
from saelens_lite.training.step import DenseStep, SparseStep

COUNTING = ("topk", "batch_topk", "matryoshka", "group_max", "matching_pursuit")  # the others need biases to be as sparse
ALL = (*COUNTING, "l1", "gated", "jumprelu", "p_anneal")
NEVER = -1000.0  # bias of a latent that does not fire


def planted(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return batches [n batch d_in], directions [d_sae d_in] and the encoder bias [d_sae], on the device."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(args.d_sae, args.d_in, generator=generator), dim=1)
    batches = []
    for _ in range(args.batches):
        latent = torch.randint(args.d_sae, (args.batch, args.k), generator=generator)
        strength = torch.rand(args.batch, args.k, generator=generator) + 0.5
        batches.append(torch.nn.functional.embedding_bag(latent, directions, per_sample_weights=strength, mode="sum"))
    x, directions = torch.stack(batches).to(args.device), directions.to(args.device)
    x *= args.d_in**0.5 / x.square().sum(-1).mean().sqrt()
    h = x[0] @ directions.T
    bias = -h.flatten()[:: max(1, h.numel() // 1_000_000)].quantile(1 - 1.5 * args.k / args.d_sae)
    return x, directions, x.new_full((args.d_sae,), 0.0 if args.first_steps else float(bias))


def dead_latents(args: argparse.Namespace) -> torch.Tensor:
    """Return a mask [d_sae] of the latents that are dead throughout."""
    order = torch.randperm(args.d_sae, generator=torch.Generator().manual_seed(1))
    return (order < round(args.dead * args.d_sae)).to(args.device)


def at_ports(x: torch.Tensor, n: int) -> torch.Tensor | dict[str, torch.Tensor]:
    """Return activations as those of one hook in n models, each with its part of the width."""
    return x if n == 1 else {f"model_{i}:hook": part.contiguous() for i, part in enumerate(x.chunk(n, dim=-1))}


def trainer(
    rule: str,
    step: type,
    x: torch.Tensor,
    directions: torch.Tensor,
    bias: torch.Tensor,
    args: argparse.Namespace,
    n_ports: int = 1,
) -> Trainer:
    """Return our trainer at the planted weights, with steps of class `step`."""
    fixed = {"k": args.k} if rule in COUNTING else {"coefficient": 1.0}  # a target L0 would replace the biases
    options = {"jumprelu": {"threshold": 0.01 / args.d_in**0.5}}.get(rule, fixed)
    config = sl.TrainConfig(
        sparsity=rule, options=options, d_sae=args.d_sae, batch_size=args.batch,
        n_tokens=10**9, lr=1e-5, normalize="none",
    )  # fmt: skip
    made = Trainer(config, TensorSource(at_ports(x[0], n_ports)), args.device)
    d = made.dictionary
    d.W_dec.data.copy_(directions)
    d.W_enc.data.copy_(directions.T)
    d.b_dec.data.zero_()
    own = d.rule.b_gate if rule == "gated" else d.b_enc
    if rule not in COUNTING:
        own.data.copy_(bias)
    if own is not None:
        own.data[dead_latents(args)] = NEVER
    made.step_class = step
    return made


class Ours:
    """One of our trainers, asked like a peer."""

    def __init__(self, trainer: Trainer, x: torch.Tensor, spare: Spare | None, args: argparse.Namespace):
        self.trainer, self.spare = trainer, spare
        self.x = [at_ports(batch, len(trainer.hooks.reads)) for batch in x]
        self.device, self.n_steps, self.dead = args.device, args.steps, dead_latents(args)

    def ask(self, number: int) -> dict:
        self.trainer.since_fired[self.dead] = self.trainer.config.dead_after
        self.trainer.find_dead(now=True)
        forget_peak(self.device)
        before = high_water(self.device)[1]
        start = now(self.device)
        for i in range(number, number + self.n_steps):
            self.trainer.step(self.x[i % len(self.x)], self.spare)
        return {"seconds": (now(self.device) - start) / self.n_steps, "extra_bytes": high_water(self.device)[0] - before}

    def close(self) -> None:
        """Do nothing at the end."""


def peers(rule: str, args: argparse.Namespace, folder: str) -> dict[str, Peer]:
    """Start the other tools that have the rule, and return them by name. On a GPU they are compiled; sparsify also is not."""
    ways = {"SAELens": ("compiled",), "sparsify": ("eager", "compiled")} if args.device == "cuda" else {}
    started = {}
    for name, rules in PEER_RULES.items():
        for how in ways.get(name, ("eager",)) if rule in rules else ():
            settings = (folder, rule, args.k, args.threads, args.device, how, args.steps)
            started[f"{name}, {how}" if ways else name] = Peer(args.peer_python, PEERS[name], *settings)
    return started


def measure(rule: str, args: argparse.Namespace, x: torch.Tensor, directions: torch.Tensor, bias: torch.Tensor) -> dict:
    """Return one row of the table: all contestants in alternation, medians in milliseconds."""
    ours = trainer(rule, SparseStep, x, directions, bias, args)
    spare = None if args.memory else Spare()  # as in training, where it is held between steps
    contestants: dict[str, Ours | Peer] = {"ours": Ours(ours, x, spare, args)}
    if not args.no_dense:
        contestants["dense"] = Ours(trainer(rule, DenseStep, x, directions, bias, args), x, spare, args)
    if args.ports > 1:
        crosscoder = trainer(rule, SparseStep, x, directions, bias, args, args.ports)
        contestants[f"{args.ports} ports"] = Ours(crosscoder, x, spare, args)
    with tempfile.TemporaryDirectory() as folder:
        if args.peer_python:
            dead, b_dec = dead_latents(args), torch.zeros(args.d_in)
            b_enc = (torch.zeros_like(bias) if rule in COUNTING else bias).masked_fill(dead, NEVER)
            tensors = {"x": x, "W_enc": directions.T.contiguous(), "W_dec": directions, "b_enc": b_enc, "b_dec": b_dec}
            save_file({**tensors, "dead": dead}, f"{folder}/data.safetensors")
            contestants |= peers(rule, args, folder)
        answers: dict[str, list[dict]] = {name: [] for name in contestants}
        products, precision = [], torch.bfloat16 if args.device == "cuda" else torch.float32
        for i in range(args.rounds + 2):
            left, right = x[i % args.batches].to(precision), ours.dictionary.W_enc.detach().to(precision)
            start_time = now(args.device)
            left @ right
            products.append(now(args.device) - start_time)
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
    options = parser(__doc__, rounds=7, peers="sae-lens and eai-sparsify", device=True)
    options.add_argument("--rules", nargs="+", default=["topk", "l1", "gated"], choices=("all", *ALL))
    options.add_argument("--d-in", type=int, default=768)
    options.add_argument("--d-sae", type=int, nargs="+", default=[8192])
    options.add_argument("--sizes", nargs="+", help="such as 768x24576, in place of --d-in and --d-sae")
    options.add_argument("--batch", type=int, default=2048)
    options.add_argument("--k", type=int, nargs="+", default=[32])
    options.add_argument("--batches", type=int, default=3, help="different batches, used in turn")
    options.add_argument("--steps", type=int, help="steps of a timing; default: 1 on a CPU, 10 on a GPU")
    options.add_argument("--dead", type=float, default=0.0, help="share of the latents that are dead throughout")
    options.add_argument("--ports", type=int, default=1, help="also time a crosscoder with so many ports")
    options.add_argument("--first-steps", action="store_true", help="untrained biases: half of the latents fire")
    options.add_argument("--no-dense", action="store_true", help="leave the dense definition out")
    options.add_argument("--memory", action="store_true", help="peak memory instead of times")
    args = options.parse_args()
    args.steps = args.steps or (1 if args.device == "cpu" or args.memory else 10)
    if args.memory and args.device == "cpu" and not FREE_AT_ONCE.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | FREE_AT_ONCE)
    torch.set_num_threads(args.threads)
    rows = []
    sizes = [tuple(map(int, size.split("x"))) for size in args.sizes or ()] or [(args.d_in, d_sae) for d_sae in args.d_sae]
    for (d_in, d_sae), k in itertools.product(sizes, args.k):
        one = argparse.Namespace(**{**vars(args), "d_in": d_in, "d_sae": d_sae, "k": k})
        data = planted(one)
        for rule in ALL if "all" in args.rules else args.rules:
            rows.append(measure(rule, one, *data))
            print(json.dumps(rows[-1]), flush=True)
    write_report(args, {"rows": rows})


if __name__ == "__main__":
    main()
