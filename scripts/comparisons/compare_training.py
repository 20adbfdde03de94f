"""Train dictionaries with this library and with SAELens on the same batches; compare L0, FVU on held-out activations, time.

    python scripts/comparisons/compare_training.py --out compared --saelens /path/to/venv-with-sae-lens/bin/python
    python scripts/comparisons/compare_training.py --out compared --saelens … --cache activations --rules topk gated

Activations come from --cache, or are captured from the embedded model on Python's documentation. They are scaled once to a root
mean square norm of sqrt(d_in) and written in the order in which this library reads them, so that neither tool scales or
shuffles. train_both.py says what else is equal.

Each rule is trained at several levels of sparsity by both tools. Equal options need not give equal L0, so FVU is compared at
equal L0: each tool's ln FVU is interpolated linearly over ln L0 between its own levels, and `ratio` is the geometric mean of
FVU of this library / FVU of SAELens over all levels of either tool that lie in the range of the other. Writes
OUT/compare_training.json.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from streams import Stored
from torch import Tensor
from train_both import Outcome, train_ours, train_saelens

import saelens_lite as sl
from saelens_lite.tokens import is_held_out

LEVELS = {  # options of each rule, from many latents to few
    "l1": [{"coefficient": c} for c in (0.2, 0.8, 3.2)],
    "topk": [{"k": 32}],
    "gated": [{"coefficient": c} for c in (0.7, 1.2, 2.2)],
    "batch_topk": [{"k": k} for k in (40, 32, 26)],
    "jumprelu": [{"coefficient": c} for c in (0.1, 0.25, 0.6)],
    "matryoshka": [{"k": k} for k in (40, 32, 26)],
}
SAME_L0 = 0.002  # relative; closer than this, FVU is compared as it is


def activations(args: argparse.Namespace) -> tuple[Stored, Tensor]:
    """Return the training batches in our order and the held-out activations, both scaled."""
    if args.cache:
        cache = sl.ActivationCache.open(args.cache)
    else:
        pages = [page.text for page in sl.python_docs() if not is_held_out(page.name)]
        lm = sl.load_model("tiny")
        n = args.n_tokens + args.held_out
        cache = sl.capture(lm, pages, args.hook, args.out / "cache", n_tokens=n, n_ctx=128, exists="overwrite")
    held, rest = cache.hold_out(args.held_out)
    d_in = rest.d_in(args.hook)
    scale = d_in**0.5 / rest.statistics(args.hook).rms_norm
    file = args.out / "batches.npy"
    rows = np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=(args.n_tokens, d_in))
    batches = rest.batches([args.hook], args.batch, args.data_seed)
    for start in range(0, args.n_tokens, args.batch):
        rows[start : start + args.batch] = next(batches)[args.hook].float().numpy() * scale
    rows.flush()
    batches.close()
    return Stored(str(file)), held.x[args.hook].float() * scale


def at_equal_l0(ours: list[tuple[float, float]], theirs: list[tuple[float, float]]) -> tuple[float | None, int]:
    """Return the geometric mean of our FVU / theirs and its number of levels, from (L0, FVU) of each level."""
    logs = [math.log(fvu / other) for l0, fvu in ours if (other := _fvu_at(theirs, l0))]
    logs += [math.log(other / fvu) for l0, fvu in theirs if (other := _fvu_at(ours, l0))]
    return (math.exp(sum(logs) / len(logs)) if logs else None), len(logs)


def _fvu_at(levels: list[tuple[float, float]], l0: float) -> float | None:
    """FVU at an L0, interpolated; None outside the range of the levels."""
    nearest = min(levels, key=lambda level: abs(level[0] - l0))
    if abs(nearest[0] - l0) <= SAME_L0 * l0:
        return nearest[1]
    x, y = np.log(sorted(levels)).T
    return float(np.exp(np.interp(np.log(l0), x, y))) if x[0] <= np.log(l0) <= x[-1] else None


def point(options: dict, outcome: Outcome, x: Tensor) -> dict:
    """Return one trained dictionary in figures."""
    alive = torch.bincount(outcome.codes.latent, minlength=outcome.codes.d_sae) > 0
    return {
        "options": options,
        "l0": outcome.l0,
        "fvu": outcome.fvu(x),
        "fire on held-out": float(alive.double().mean()),
        "seconds": outcome.seconds,
    }


def compare(rule: str, args: argparse.Namespace, stream: Stored, x: Tensor) -> dict:
    """Return both tools' points of a rule, and the ratio at equal L0."""
    configs = [
        sl.TrainConfig(
            sparsity=rule, options=options, d_sae=args.d_sae, n_tokens=args.n_tokens, batch_size=args.batch,
            lr=args.lr, normalize="none", seed=args.seed,
        )
        for options in LEVELS[rule]
    ]  # fmt: skip
    trained = {
        "ours": [train_ours(config, stream, x) for config in configs],
        "SAELens": train_saelens(args.saelens, configs, stream, x, args.threads),
    }
    points = {
        tool: [point(config.options, outcome, x) for config, outcome in zip(configs, outcomes, strict=True)]
        for tool, outcomes in trained.items()
    }
    ratio, n = at_equal_l0(*([(p["l0"], p["fvu"]) for p in points[tool]] for tool in ("ours", "SAELens")))
    return {"rule": rule, **points, "ratio": ratio, "levels compared": n}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--saelens", required=True, help="Python of an environment with sae-lens")
    parser.add_argument("--rules", nargs="+", default=list(LEVELS), choices=list(LEVELS))
    parser.add_argument("--cache", type=Path, help="activations captured before")
    parser.add_argument("--hook", default="blocks.2.hook_resid_pre")
    parser.add_argument("--d-sae", type=int, default=2048)
    parser.add_argument("--n-tokens", type=int, default=1_000_000, help="activations each dictionary is trained on")
    parser.add_argument("--held-out", type=int, default=32_768)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0, help="of the initial parameters")
    parser.add_argument("--data-seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    args.n_tokens = math.ceil(args.n_tokens / args.batch) * args.batch
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    stream, x = activations(args)
    rows = []
    print("| rule | options | L0 ours | L0 SAELens | FVU ours | FVU SAELens | s ours | s SAELens | FVU ratio at equal L0 |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for rule in args.rules:
        rows.append(compare(rule, args, stream, x))
        show(rows[-1])
        settings = {name: str(value) for name, value in vars(args).items()}
        (args.out / "compare_training.json").write_text(json.dumps({"settings": settings, "rows": rows}, indent=1))
    Path(stream.description["file"]).unlink()


def show(row: dict) -> None:
    """Print a rule's lines of the table."""
    for a, b in zip(row["ours"], row["SAELens"], strict=True):
        options = ", ".join(f"{name} {value}" for name, value in a["options"].items())
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.4f}"
        print(
            f"| {row['rule']} | {options} | {a['l0']:.2f} | {b['l0']:.2f} | {a['fvu']:.5f} | {b['fvu']:.5f} "
            f"| {a['seconds']:.1f} | {b['seconds']:.1f} | {ratio} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
