"""Compare dictionaries that differ only in their seed: measure how many latents another seed finds again.

    python scripts/comparisons/two_seeds.py --out two_seeds                        # two seeds, top-k, the embedded model
    python scripts/comparisons/two_seeds.py --out two_seeds --seeds 0 1 2 --rule l1

The settings are those of `saelens-lite demo`. All dictionaries are trained in one pass and see the same activations in the same
order. Writes OUT/two_seeds.json, and stability.safetensors beside the first dictionary.
"""

import argparse
from pathlib import Path

from rich.console import Console

import saelens_lite as sl
from saelens_lite.demo import RULES
from saelens_lite.features.compare import N_BINS, Comparison, Stability, comparison_table
from saelens_lite.files import write_json
from saelens_lite.tokens import PythonDocs


def trained(args: argparse.Namespace) -> list[sl.Dictionary]:
    """Return a dictionary for each seed."""
    lm = sl.load_model("tiny")
    hook = f"blocks.{lm.n_layers // 2}.hook_resid_pre"
    cache = sl.capture(lm, PythonDocs("python-docs:train"), hook, args.out / "cache", exists="overwrite")
    configs = [
        sl.TrainConfig(
            sparsity=args.rule, d_sae=args.d_sae, n_tokens=args.n_tokens, batch_size=1024, seed=seed, **RULES[args.rule]
        )
        for seed in args.seeds
    ]
    return [run.dictionary for run in sl.train(cache, configs, args.out / "runs", exists="overwrite")]


def histogram(comparison: Comparison) -> str:
    """Return the decoder cosines of partners and those at chance, a line for each bin that is not empty."""
    lines = [f"{'decoder cosine':16} latents  chance"]
    found, chance = comparison.summary.decoder.histogram, comparison.chance.decoder.histogram
    for number, (count, by_chance) in enumerate(zip(found, chance, strict=True)):
        if count or by_chance:
            low = -1 + 2 * number / N_BINS
            lines.append(f"{f'{low:.1f} to {low + 2 / N_BINS:.1f}':16} {count:7} {by_chance:7}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--rule", default="topk", choices=list(RULES))
    parser.add_argument("--d-sae", type=int, default=1536)
    parser.add_argument("--n-tokens", type=int, default=600_000, help="activations each dictionary is trained on")
    args = parser.parse_args()
    if len(args.seeds) < 2:
        parser.error("--seeds: give at least two, the first to be compared with the others")
    first, *others = trained(args)
    comparisons = {f"seed {seed}": sl.compare(first, other) for seed, other in zip(args.seeds[1:], others, strict=True)}
    console = Console(highlight=False)
    console.print(comparison_table(comparisons))
    for name, comparison in comparisons.items():
        console.print(f"seed {args.seeds[0]} against {name}: {comparison}\n{histogram(comparison)}\n")
    scores = Stability.of(list(comparisons.values()))
    path = scores.save(sorted(args.out.glob("runs/**/dictionary"))[0], exists="overwrite")
    console.print(f"shared with all: {scores.shared_in_all:.1%}, with none: {scores.shared_in_none:.1%}; {path}")
    write_json(args.out / "two_seeds.json", {name: comparison.to_dict() for name, comparison in comparisons.items()})


if __name__ == "__main__":
    main()
