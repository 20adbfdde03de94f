"""Measure how often noise floors call equal recipes different, and how small a difference they see.

    python scripts/noise_floors.py --out noise_floors.json

The script trains many small dictionaries of one recipe with different seeds, and some of slightly different recipes, on
activations of the embedded model. All are evaluated once. Then it draws tables from the reports, and counts how often
`noise_floors`, which the tables of `saelens-lite eval` use, finds a difference. The exit code is 1 if more than --most of the
tables of equal recipes have one, or if the recipes that the reports record are not those that were trained. Run it with
another --seed, such as 5000, to check the same with other dictionaries.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

import saelens_lite as sl
from saelens_lite.evaluation import NoiseFloors, noise_floors
from saelens_lite.evaluation.controls import permuted_dictionary
from saelens_lite.evaluation.replicates import COLUMNS
from saelens_lite.tokens import PythonDocs, token_rows

HOOK = "blocks.2.hook_resid_pre"
K = 16
OTHERS = (17, 18, 20)
SHARES = (0.01, 0.03, 0.1)
AT_ONCE = 16  # dictionaries evaluated in one pass; each holds bootstrap sums of its latents
N_CTX = 64
Group = Mapping[str, Sequence[sl.EvalReport]]


def activations(lm: sl.LanguageModel, n_tokens: int) -> torch.Tensor:
    """Return the activations of some tokens of the training text."""
    rows = token_rows(lm, PythonDocs("python-docs:train"), n_ctx=N_CTX, n_tokens=n_tokens)
    parts = [rows[i : i + 64] for i in range(0, len(rows.tokens), 64)]
    return torch.cat([lm.run(part, HOOK)[HOOK][part.keep] for part in parts])


def trained(x: torch.Tensor, k: int, seed: int, args: argparse.Namespace) -> sl.Dictionary:
    """Return a dictionary; the seed decides on its initial parameters and on the order of the data."""
    settings = {"d_sae": args.d_sae, "n_tokens": args.train_tokens, "batch_size": 1024}
    return sl.fit(x, k=k, seed=seed, **settings)


def evaluated(dictionaries: Sequence[sl.Dictionary], lm: sl.LanguageModel, n_tokens: int) -> list[sl.EvalReport]:
    """Return the reports of all dictionaries."""
    settings = {"hook": HOOK, "n_tokens": n_tokens, "text_config": sl.TextConfig(n_ctx=N_CTX)}
    groups = [list(dictionaries[i : i + AT_ONCE]) for i in range(0, len(dictionaries), AT_ONCE)]
    return [report for group in groups for report in sl.evaluate(group, lm, "python-docs:held-out", **settings)]


def table_of(groups: Group) -> NoiseFloors:
    """Return the floors of a table of some recipes, given the reports of each."""
    reports = {f"{name} {i}": report for name, several in groups.items() for i, report in enumerate(several)}
    seeds = {name: [f"{name} {i}" for i in range(len(several))] for name, several in groups.items()}
    return noise_floors(reports, seeds)


def are_recorded(measured: Group) -> bool:
    """Return whether the recipes that the reports record are those that were trained; permuted dictionaries have none."""
    reports = {f"{name} {i}": report for name, several in measured.items() for i, report in enumerate(several)}
    wanted = {tuple(f"{name} {i}" for i in range(len(measured[name]))) for name in ("equal", *(f"k = {k}" for k in OTHERS))}
    wanted |= {(f"{share:.0%} permuted {i}",) for share in SHARES for i in range(len(measured[f"{share:.0%} permuted"]))}
    return set(noise_floors(reports, metrics=["l0"]).recipes.values()) == wanted


def shares(draw: Callable[[], Group], n: int) -> dict[str, float]:
    """Return the share of n drawn tables in which the first two recipes differ, by metric, or any two in anything."""
    counts = dict.fromkeys([*COLUMNS, "whole table"], 0)
    for _ in range(n):
        groups = draw()
        floors = table_of(groups)
        names = list(groups)
        pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
        for metric in COLUMNS:
            counts[metric] += floors.differ(metric, *names[:2])
        counts["whole table"] += any(floors.differ(metric, *pair) for metric in COLUMNS for pair in pairs)
    return {name: count / n for name, count in counts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dictionaries", type=int, default=60, help="of the recipe that all are compared with")
    parser.add_argument("--others", type=int, default=12, help="of each slightly different recipe")
    parser.add_argument("--seed", type=int, default=0, help="first seed of the dictionaries of each recipe")
    parser.add_argument("--pairs", type=int, default=200, help="tables of each kind")
    parser.add_argument("--tokens", type=int, default=6000, help="of the evaluation")
    parser.add_argument("--train-tokens", type=int, default=60_000)
    parser.add_argument("--d-sae", type=int, default=384)
    parser.add_argument("--most", type=float, default=0.06, help="false alarms that are allowed")
    parser.add_argument("--out", type=Path, help="JSON file for the shares")
    parser.add_argument("--reports", type=Path, help="JSON file for the reports; if it exists, nothing is trained")
    args = parser.parse_args()
    if args.reports and args.reports.exists():
        content = json.loads(args.reports.read_text())
        measured = {name: [sl.EvalReport.from_dict(one) for one in several] for name, several in content.items()}
    else:
        measured = measured_anew(args)
    if args.reports:
        content = {name: [report.to_dict() for report in several] for name, several in measured.items()}
        args.reports.write_text(json.dumps(content))
    results = {"false alarms": alarms(measured["equal"], args.pairs), "power": power(measured, args)}
    show(results)
    grouped = are_recorded(measured)
    print(f"\nrecipes that the reports record: {'those that were trained' if grouped else 'WRONG'}")
    if args.out:
        args.out.write_text(json.dumps(results | {"recorded": grouped}, indent=2))
    sys.exit(not grouped or any(row["whole table"] > args.most for row in results["false alarms"].values()))


def measured_anew(args: argparse.Namespace) -> dict[str, list[sl.EvalReport]]:
    """Train and evaluate all dictionaries. Return the reports by recipe."""
    lm = sl.load_model("tiny", device="cpu")
    x = activations(lm, 30_000)
    equal = [trained(x, K, args.seed + i, args) for i in range(args.dictionaries)]
    others = {k: [trained(x, k, args.seed + 1000 * k + i, args) for i in range(args.others)] for k in OTHERS}
    damaged = {share: [permuted_dictionary(d, d.density, 0, share) for d in equal[:10]] for share in SHARES}
    named = {"equal": equal} | {f"k = {k}": several for k, several in others.items()}
    named |= {f"{share:.0%} permuted": several for share, several in damaged.items()}
    reports = iter(evaluated([d for several in named.values() for d in several], lm, args.tokens))
    return {name: [next(reports) for _ in several] for name, several in named.items()}


def alarms(pool: Sequence[sl.EvalReport], n: int) -> dict[str, dict[str, float]]:
    """Return the shares of tables with a difference, all of one recipe."""
    random = np.random.default_rng(0)

    def draw(sizes: Sequence[int]) -> Callable[[], Group]:
        def one() -> Group:
            order = iter(random.permutation(len(pool)))
            return {f"recipe {i}": [pool[next(order)] for _ in range(size)] for i, size in enumerate(sizes)}

        return one

    kinds = {
        "2 seeds against 2": (2, 2),
        "3 seeds against 3": (3, 3),
        "5 seeds against 5": (5, 5),
        "1 against 1, spread of 3 others": (1, 1, 3),
        "4 recipes of 3 seeds": (3, 3, 3, 3),
    }
    return {name: shares(draw(sizes), n) for name, sizes in kinds.items()}


def power(measured: Mapping[str, Sequence[sl.EvalReport]], args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return the shares of tables that see a planted difference in each metric, and its size in fvu in units of the floor."""
    random = np.random.default_rng(1)
    results = {}
    for k in OTHERS:
        for n_seeds in (1, 3, 5):
            sizes = (n_seeds, n_seeds, *(() if n_seeds > 1 else (3,)))
            pools = [measured["equal"], measured[f"k = {k}"], measured["equal"]]

            def draw(sizes: Sequence[int] = sizes, pools: list[Sequence[sl.EvalReport]] = pools) -> Group:
                orders = [random.permutation(len(pool)) for pool in pools]
                orders[2:] = [orders[0][sizes[0] :]]  # the third group is of the first recipe, without its first dictionaries
                return {f"recipe {i}": [pools[i][j] for j in orders[i][:size]] for i, size in enumerate(sizes)}

            name = f"k = {K} against {k}, " + (f"{n_seeds} seeds" if n_seeds > 1 else "1 seed")
            results[name] = seen(draw, args.pairs) | {"difference / floor": in_floors(draw)}
    for share in SHARES:
        pairs = zip(measured["equal"], measured[f"{share:.0%} permuted"], strict=False)
        tables = [{"whole": [one], "permuted": [other]} for one, other in pairs]
        drawn = iter(tables)
        row = seen(lambda drawn=drawn: next(drawn), len(tables))
        drawn = iter(tables)
        results[f"{share:.0%} permuted, paired"] = row | {"difference / floor": in_floors(lambda d=drawn: next(d), len(tables))}
    return results


def seen(draw: Callable[[], Group], n: int) -> dict[str, float]:
    """Return the share of n drawn tables in which the first two recipes differ, by metric."""
    return {name: share for name, share in shares(draw, n).items() if name in COLUMNS}


def in_floors(draw: Callable[[], Group], n: int = 20) -> float:
    """Return the median difference in fvu of the first two recipes, in units of its floor."""
    sizes = []
    for _ in range(n):
        floors = table_of(draw())
        a, b, *_ = (values["fvu"].value for values in floors.values.values())
        sizes.append(abs(a - b) / floors.floors["fvu"])
    return statistics.median(sizes)


def show(results: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    """Print the shares as tables."""
    for title, rows in results.items():
        titles = list(next(iter(rows.values())))
        print(f"\n{title:32}" + "".join(f"{name:>20}" for name in titles))
        for name, row in rows.items():
            print(f"{name:32}" + "".join(f"{row[key]:20.3f}" for key in titles))


if __name__ == "__main__":
    main()
