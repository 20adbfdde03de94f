"""Measure how well a diff of two models finds the directions that one of them has alone, where the truth is known.

    python scripts/comparisons/planted_diff.py --json planted_diff.json

Two models share 512 random directions and have 64 of their own each, in 256 dimensions. A token's activation is the sum of
those that are active: each with its own frequency, log-uniform from 0.4 % to 4 %, and a size 0.5 + Exp(0.5), which is the same
in both models. With --weakest 0.3, shared directions are weaker in the base model, by factors from 0.3 to 1.
Crosscoders with batch top-k and L1, and a dictionary of differences, are trained on the same tokens.

A latent that is called specific to a model is right if the direction nearest to it there (cosine above 0.8) is one that the
model has alone. Precision is the share of right ones among the latents called specific. Recall is the share of the 128
directions with such a latent. "same twice" is a crosscoder of one model twice: any specific latent is a false alarm.
"""

import argparse
import json
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import saelens_lite as sl
from saelens_lite.cache.source import TensorSource

WIDTH, SHARED, OWN = 256, 512, 64
FREQUENCY = (0.004, 0.04)
NEAR = 0.8  # cosine
CHUNK = 8192
MODELS = ("base", "chat")
KEYS = tuple(f"{model}:h" for model in MODELS)
RULES = {"batch_topk": {"k": 10}, "l1": {"coefficient": 3.0}, "differences": {"k": 2}}


class Truth(NamedTuple):
    """Activations of both models, all directions, and a mask of those that a model has alone."""

    acts: dict[str, Tensor]
    directions: Tensor
    own: dict[str, Tensor]


def two_models(n: int, seed: int, weakest: float = 1.0) -> Truth:
    """Return the activations of two models, and which directions each of them has alone."""
    random = torch.Generator().manual_seed(seed)
    n_all = SHARED + 2 * OWN
    directions = F.normalize(torch.randn(n_all, WIDTH, generator=random), dim=1)
    low, high = torch.tensor(FREQUENCY).log().tolist()
    frequency = torch.empty(n_all).uniform_(low, high, generator=random).exp()
    place = torch.arange(n_all)
    own = {"base": (place >= SHARED) & (place < SHARED + OWN), "chat": place >= SHARED + OWN}
    strength = {model: (~own[other]).float() for model, other in zip(MODELS, reversed(MODELS), strict=True)}
    strength["base"][:SHARED].uniform_(weakest, 1, generator=random)
    acts: dict[str, list[Tensor]] = {key: [] for key in KEYS}
    for first in range(0, n, CHUNK):
        shape = (min(CHUNK, n - first), n_all)
        codes = torch.empty(shape).exponential_(2, generator=random).add_(0.5)
        codes *= torch.rand(shape, generator=random) < frequency
        for key, model in zip(KEYS, MODELS, strict=True):
            acts[key].append((codes * strength[model]) @ directions)
    return Truth({key: torch.cat(x) for key, x in acts.items()}, directions, own)


def trained(name: str, acts: dict[str, Tensor], args: argparse.Namespace) -> sl.Dictionary:
    """Return a dictionary that was trained with one of RULES."""
    is_difference = name == "differences"
    given = {"chat-base:h": acts[KEYS[1]] - acts[KEYS[0]]} if is_difference else acts
    config = sl.TrainConfig(
        reads=tuple(given), sparsity="l1" if name == "l1" else "batch_topk", options=RULES[name],
        d_sae=2 * WIDTH if is_difference else args.d_sae, n_tokens=args.n_tokens, batch_size=args.batch,
        dead_after=args.n_tokens // 10, seed=args.seed + 1,
    )  # fmt: skip
    return sl.train(TensorSource(given), config)[0].dictionary


def scores(d: sl.Dictionary, report: sl.DiffReport, truth: Truth, by: str) -> dict[str, float]:
    """Return precision and recall of the latents that are called specific."""
    parts = d.W_dec.detach().split(WIDTH, dim=1)
    halves = dict(zip(MODELS, parts, strict=True)) if len(parts) == 2 else {"base": -parts[0], "chat": parts[0]}
    called = right = 0
    seen: set[int] = set()
    for model in MODELS:
        chosen = report.only(model, by=by)
        other = truth.own[MODELS[1 - MODELS.index(model)]]
        cosine = F.normalize(halves[model][chosen], dim=1) @ truth.directions.T
        best, nearest = cosine.masked_fill(other, -1).max(1)
        good = (best > NEAR) & truth.own[model][nearest]
        called, right = called + len(chosen), right + int(good.sum())
        seen |= set(nearest[good].tolist())
    return {"called": called, **({"precision": right / called} if called else {}), "recall": len(seen) / (2 * OWN)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--d-sae", type=int, default=1024, help="of crosscoders")
    parser.add_argument(
        "--rows", type=int, default=100_000, help="tokens to train on, several times; the diff reads as many other ones"
    )
    parser.add_argument("--n-tokens", type=int, default=1_024_000)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--weakest", type=float, default=1.0, help="least strength of shared directions in the base model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=[*RULES, "same twice"], help="default: all")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    truth = two_models(2 * args.rows, args.seed, args.weakest)
    train_on, measure_on = ({key: x[i::2] for key, x in truth.acts.items()} for i in (0, 1))
    rows = []
    print("| dictionary | by | called specific | precision | recall | unknown | s |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in args.only or (*RULES, "same twice"):
        begin, is_twice = time.perf_counter(), name == "same twice"
        data = [{key: acts[KEYS[0]] for key in KEYS} if is_twice else acts for acts in (train_on, measure_on)]
        d = trained("batch_topk" if is_twice else name, data[0], args)
        report = sl.diff(d, data[1])
        seconds = time.perf_counter() - begin
        for by in ("nu",) if report.is_of_differences else ("norm", "nu"):
            numbers = (
                {"called": report.share_specific(by) * (d.d_sae - report.counts(by)["unknown"])}
                if is_twice
                else scores(d, report, truth, by)
            )
            rows.append({"dictionary": name, "by": by, **numbers, **report.counts(by), "seconds": seconds})
            show(rows[-1])
    if args.json:
        settings = {name: str(value) for name, value in vars(args).items()}
        args.json.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1))


def show(row: dict) -> None:
    """Print a line of the table."""
    shares = [f"{row[name]:.3f}" if name in row else "–" for name in ("precision", "recall")]
    print(
        f"| {row['dictionary']} | {row['by']} | {row['called']:.0f} | {' | '.join(shares)} | {row['unknown']} "
        f"| {row['seconds']:.0f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
