"""Measure how much of a planted dictionary each sparsity rule recovers, in this library and (with --saelens) in SAELens.

    python scripts/comparisons/planted_truth.py --json planted.json --saelens /path/to/venv-with-sae-lens/bin/python

Activations are sums of random directions that fire with Zipf frequencies (see streams.py). Every batch is new, and the batches
are the same for all rules and both tools; train_both.py says what else is equal. Latents are matched with directions one to one
so that the sum of cosines is largest (Hungarian method). On held-out activations, a matched latent should fire where its
direction is active. Two scores say how well it does: F1 of all pairs together, in which the activity of unmatched latents and
directions counts as wrong, and the mean F1 of the matched pairs.

Rules that count latents are given the number of active directions. For the others, up to --tries coefficients are tried, for
each tool, until about as many latents fire.
"""

import argparse
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from streams import Planted, Sample
from train_both import SAELENS, Outcome, train_ours, train_saelens

import saelens_lite as sl
from saelens_lite.registry import names

COEFFICIENTS = {"l1": 6.0, "gated": 4.0, "jumprelu": 2.0, "p_anneal": 3.0}  # tried first; the other rules have k
INITIAL = 1000  # added to --seed for the initial parameters, which would else be the planted directions
CLOSE = 0.1  # relative: an L0 near enough to the number of active directions
FOUND = 0.9  # cosine from which a direction counts as found


def near_l0(train: Callable[[dict], Outcome], rule: str, active: float, tries: int) -> tuple[dict, Outcome, dict[float, float]]:
    """Return options for about `active` firing latents, the trained outcome, and the L0 of each coefficient tried."""
    if rule not in COEFFICIENTS:
        options = {"k": round(active)}
        return options, train(options), {}
    seen: dict[float, Outcome] = {}
    coefficient = COEFFICIENTS[rule]
    for _ in range(tries):
        seen[coefficient] = train({"coefficient": coefficient})
        if abs(seen[coefficient].l0 / active - 1) < CLOSE:
            break
        coefficient = round(_next({c: outcome.l0 for c, outcome in seen.items()}, active), 4)
    best = min(seen, key=lambda c: abs(seen[c].l0 - active))
    return {"coefficient": best}, seen[best], {c: outcome.l0 for c, outcome in seen.items()}


def _next(l0: dict[float, float], active: float) -> float:
    """Return the coefficient to try next: between the nearest on both sides by ln L0, or twice or half of what was tried."""
    many, few = [c for c in l0 if l0[c] > active], [c for c in l0 if l0[c] <= active]
    if not many or not few:
        return 2 * max(many) if many else min(few) / 2
    low, high = max(many), min(few)
    drop = math.log(l0[low] / max(l0[high], active / 10))  # a dictionary that went silent says little
    share = min(max(math.log(l0[low] / active) / drop, 0.2), 0.8)
    return low ** (1 - share) * high**share


def figures(outcome: Outcome, truth: Sample, stream: Planted) -> dict[str, float]:
    """Measure how well a dictionary matches the planted one."""
    cosine = stream.directions @ F.normalize(outcome.W_dec, dim=1).T
    direction, latent = map(torch.from_numpy, linear_sum_assignment(cosine.numpy(), maximize=True))
    matched = torch.zeros(len(cosine), dtype=cosine.dtype).index_copy(0, direction, cosine[direction, latent])
    true = truth.active[:, direction]
    fires = outcome.codes.to_dense()[:, latent] != 0
    both, either = (true & fires).sum(0).double(), true.sum(0) + fires.sum(0)
    everything = len(outcome.codes.value) + int(truth.active.sum())
    weight = stream.p / stream.p.sum()
    return {
        "l0": outcome.l0,
        "fvu": outcome.fvu(truth.x),
        "cosine": float(matched.mean()),
        "cosine by frequency": float((weight * matched).sum()),
        "found": int((matched > FOUND).sum()),
        "f1": float(2 * both.sum() / everything),
        "f1 of latents": float((2 * both / either.clamp(min=1)).mean()),
        "seconds": outcome.seconds,
    }


def train_one(rule: str, tool: str, args: argparse.Namespace, stream: Planted, x: torch.Tensor, options: dict) -> Outcome:
    """Return a rule with some options, trained by a tool."""
    config = sl.TrainConfig(
        sparsity=rule, options=options, d_sae=args.d_sae, seed=args.seed + INITIAL, batch_size=args.batch,
        n_tokens=args.n_tokens // args.batch * args.batch, lr=args.lr, normalize="none",
    )  # fmt: skip
    if tool == "ours":
        return train_ours(config, stream, x)
    return train_saelens(args.saelens, [config], stream, x, args.threads)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--saelens", help="Python of an environment with sae-lens")
    parser.add_argument("--rules", nargs="+", default=None, help="default: all that are installed")
    parser.add_argument("--d-in", type=int, default=256)
    parser.add_argument("--directions", type=int, default=1024)
    parser.add_argument("--active", type=float, default=8.0, help="directions in an activation, on average")
    parser.add_argument("--exponent", type=float, default=1.0, help="frequencies fall as rank^−exponent")
    parser.add_argument("--noise", type=float, default=0.0, help="standard deviation, each coordinate; directions are unit")
    parser.add_argument("--d-sae", type=int, default=1024)
    parser.add_argument("--n-tokens", type=int, default=4_000_000)
    parser.add_argument("--tries", type=int, default=6, help="coefficients of a penalty")
    parser.add_argument("--held-out", type=int, default=32_768)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0, help="of directions, data and initial parameters")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    stream = Planted(args.d_in, args.directions, args.active, args.exponent, noise=args.noise, seed=args.seed)
    truth = stream.held_out(args.held_out)
    rows = []
    print("| rule | tool | options | L0 | FVU | cosine | by frequency | > .9 | F1 | mean F1 | s |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for rule in args.rules or names("sparsity"):
        for tool in ("ours", "SAELens"):
            if tool == "SAELens" and not (args.saelens and rule in SAELENS):
                continue
            train = partial(train_one, rule, tool, args, stream, truth.x)
            options, outcome, tried = near_l0(train, rule, args.active, args.tries)
            rows.append({"rule": rule, "tool": tool, "options": options, **figures(outcome, truth, stream), "tried": tried})
            show(rows[-1])
    if args.json:
        settings = {name: str(value) for name, value in vars(args).items()}
        args.json.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1))


def show(r: dict) -> None:
    """Print a line of the table."""
    options = ", ".join(f"{name} {value}" for name, value in r["options"].items())
    print(
        f"| {r['rule']} | {r['tool']} | {options} | {r['l0']:.2f} | {r['fvu']:.4f} | {r['cosine']:.3f} "
        f"| {r['cosine by frequency']:.3f} | {r['found']} | {r['f1']:.3f} | {r['f1 of latents']:.3f} | {r['seconds']:.1f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
