"""Measure how well each sparsity rule recovers planted features, at three levels of sparsity, with controls beside.

    python scripts/comparisons/synthetic_table.py --out table
    python scripts/comparisons/synthetic_table.py --out table --saelens /path/to/venv-with-sae-lens/bin/python
    python scripts/comparisons/synthetic_table.py --out table --benchmark --rules batch_topk --l0 25 --n-tokens 5_000_000

The activations are those of `saelens_lite.synthetic`: Zipf frequencies, trees with exclusive children, common causes and
superposition. For each L0, all rules are trained in one pass. Rules with a k get it, the others reach L0 as a target. oracle,
linear and random are the controls of `saelens_lite.synthesis.controls`. Writes OUT/synthetic.json, .md and .png.

With --saelens, both tools train on the same batches from the same start (train_both.py says what else is equal). For a rule
with a penalty, SAELens is given up to --tries coefficients until about as many latents fire.

--benchmark takes the sizes and settings of SynthSAEBench-16k for those that are not given, and prints the published figures
beside: SAELens on 200 million activations, mean of several seeds, https://decoderesearch.github.io/SAELens (Benchmark Results;
arXiv:2602.14687). Directions and other random parts differ from those of the published model, which are not part of any
package.
"""

import argparse
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from streams import Stored
from train_both import SAELENS, InOrder, Outcome, train_saelens

import saelens_lite as sl
from saelens_lite.registry import names
from saelens_lite.synthesis import SyntheticReport
from saelens_lite.synthesis.controls import control_reports
from saelens_lite.synthesis.measure import Decoded, score

TARGETS = ("l1", "gated", "p_anneal", "jumprelu")  # the other rules have k
COEFFICIENTS = {"l1": 1.0, "gated": 1.0, "jumprelu": 1.0}  # that SAELens is given first
SHOWN = ("l0", "explained_variance", "mcc", "uniqueness", "precision", "recall", "f1", "dead", "shrinkage")
CLOSE = 0.1  # relative: an L0 near enough to the wanted one
INITIAL = 1000  # added to --seed for the initial parameters
BENCHMARK = {
    "features": 16_384,
    "d_in": 768,
    "d_sae": 4096,
    "batch": 1024,
    "lr": 3e-4,
    "p_max": 0.4,
    "p_min": 5e-4,
    "active": None,
}
PUBLISHED = {  # F1, MCC, uniqueness, explained variance by L0 and rule
    25: {
        "batch_topk": (0.7316, 0.7574, 0.9837, 0.7923),
        "matryoshka": (0.8793, 0.7927, 0.9987, 0.7792),
        "matching_pursuit": (0.4464, 0.6930, 0.8281, 0.8351),
        "l1": (0.5562, 0.6039, 0.8976, 0.7654),
        "jumprelu": (0.7317, 0.7527, 0.9885, 0.7951),
    },
    20: {
        "batch_topk": (0.8183, 0.7526, 0.9760, 0.7889),
        "matryoshka": (0.8601, 0.7455, 0.9874, 0.7699),
        "matching_pursuit": (0.4439, 0.6748, 0.7552, 0.8267),
        "l1": (0.5777, 0.5834, 0.8528, 0.7501),
        "jumprelu": (0.8241, 0.7434, 0.9781, 0.7906),
    },
}


class Row(NamedTuple):
    """A line of the table: the aim, the rule or control, the tool, and the measures by name."""

    aim: int
    rule: str
    tool: str
    measures: dict[str, float]
    seconds: float | None = None


class Bench(NamedTuple):
    """The activations, and the settings that all dictionaries share."""

    source: sl.Synthetic
    args: argparse.Namespace

    @property
    def scale(self) -> float:
        """The number that gives the activations a root mean square norm of sqrt(d_in)."""
        return self.args.d_in**0.5 / self.source.statistics("x").rms_norm

    def config(self, rule: str, options: dict[str, Any], alike: bool) -> sl.TrainConfig:
        """Return the settings of a dictionary. `alike`: on stored activations that are scaled already."""
        a = self.args
        return sl.TrainConfig(
            sparsity=rule, options=options, d_sae=a.d_sae, batch_size=a.batch, n_tokens=a.n_tokens // a.batch * a.batch,
            lr=a.lr, seed=a.seed + INITIAL, normalize="none" if alike else "sqrt_d",
        )  # fmt: skip

    def stored(self, folder: Path) -> Stored:
        """Return the scaled training batches in a file, written unless one of the same settings exists."""
        a, settings = self.args, self.source.config.model_dump_json()
        n = a.n_tokens // a.batch * a.batch
        file = folder / f"batches-{hashlib.sha256(repr((settings, a.batch, n)).encode()).hexdigest()[:16]}.npy"
        if not file.exists():
            part = file.with_suffix(".part")
            rows = np.lib.format.open_memmap(part, mode="w+", dtype=np.float32, shape=(n, a.d_in))
            batches = self.source.batches(["x"], a.batch, seed=0)
            for start in range(0, n, a.batch):
                rows[start : start + a.batch] = next(batches)["x"].numpy() * self.scale
            rows.flush()
            batches.close()
            part.rename(file)
        return Stored(str(file))

    def report(self, outcome: Outcome) -> SyntheticReport:
        """Measure a dictionary of scaled activations."""

        def pieces() -> Iterator[Decoded]:
            begin = 0
            for truth in self.source.pieces(self.args.held_out, self.args.seed):
                part = slice(begin, begin := begin + len(truth.x))
                yield Decoded(truth, outcome.codes.rows(part.start, part.stop), outcome.x_hat[part] / self.scale)

        return score(self.source, outcome.W_dec, pieces(), self.args.seed)


def options_of(rule: str, l0: int) -> dict[str, Any]:
    """Return the options with which a rule aims at an L0."""
    return {"target_l0": l0} if rule in TARGETS else {"k": l0}


def ours(bench: Bench, l0: int, rules: list[str], stored: Stored | None) -> list[Row]:
    """Train all rules in one pass, and measure them."""
    start = time.perf_counter()
    source = bench.source if stored is None else InOrder(stored)
    configs = [bench.config(rule, options_of(rule, l0), alike=stored is not None) for rule in rules]
    runs = sl.train(source, configs)
    seconds = (time.perf_counter() - start) / len(runs)
    rows = []
    for run in runs:
        if stored is None:
            report = bench.source.measure(run.dictionary, bench.args.held_out, seed=bench.args.seed)
        else:
            x = bench.source.sample(bench.args.held_out, bench.args.seed).x * bench.scale
            with torch.no_grad():
                codes = run.dictionary.encode(x)
                outcome = Outcome(seconds, codes, run.dictionary.decode(codes), run.dictionary.W_dec.detach())
            report = bench.report(outcome)
        rows.append(Row(l0, run.config.sparsity, "ours", measures(report), seconds))
        show(rows[-1])
    return rows


def theirs(bench: Bench, l0: int, rules: list[str], stored: Stored) -> list[Row]:
    """Train the rules that SAELens has too with SAELens, and measure them."""
    x = bench.source.sample(bench.args.held_out, bench.args.seed).x * bench.scale
    rows = []
    for rule in (rule for rule in rules if rule in SAELENS):

        def train(options: dict[str, Any], rule: str = rule) -> Outcome:
            configs = [bench.config(rule, options, alike=True)]
            return train_saelens(bench.args.saelens, configs, stored, x, bench.args.threads)[0]

        outcome = near_l0(train, rule, l0, bench.args.tries)
        rows.append(Row(l0, rule, "SAELens", measures(bench.report(outcome)), outcome.seconds))
        show(rows[-1])
    return rows


def near_l0(train: Callable[[dict], Outcome], rule: str, l0: int, tries: int) -> Outcome:
    """Return a trained outcome with about l0 firing latents."""
    if rule not in COEFFICIENTS:
        return train({"k": l0})
    seen: dict[float, Outcome] = {}
    coefficient = COEFFICIENTS[rule]
    for _ in range(tries):
        seen[coefficient] = train({"coefficient": coefficient})
        if abs(seen[coefficient].l0 / l0 - 1) < CLOSE:
            break
        coefficient = round(_next({c: outcome.l0 for c, outcome in seen.items()}, l0), 4)
    return min(seen.values(), key=lambda outcome: abs(outcome.l0 - l0))


def _next(l0: dict[float, float], wanted: float) -> float:
    """Return the coefficient to try next: between the nearest on both sides by ln L0, or three times or a third."""
    many, few = [c for c in l0 if l0[c] > wanted], [c for c in l0 if l0[c] <= wanted]
    if not many or not few:
        return 3 * max(many) if many else min(few) / 3
    low, high = max(many), min(few)
    drop = math.log(l0[low] / max(l0[high], wanted / 10))  # a dictionary that went silent says little
    share = min(max(math.log(l0[low] / wanted) / drop, 0.2), 0.8)
    return low ** (1 - share) * high**share


def measures(report: SyntheticReport) -> dict[str, float]:
    """Return the values of a report, and half the widths of their intervals."""
    values = {name: metric.value for name, metric in report.metrics.items()}
    halves = {f"{name} ±": (m.high - m.low) / 2 for name, m in report.metrics.items() if m.has_interval}
    return values | halves


def published(l0: int, rules: list[str]) -> list[Row]:
    """Return the published figures at an L0."""
    figures = {rule: values for rule, values in PUBLISHED.get(l0, {}).items() if rule in rules}
    named = ("f1", "mcc", "uniqueness", "explained_variance")
    return [Row(l0, rule, "published", dict(zip(named, values, strict=True))) for rule, values in figures.items()]


def cells(row: Row) -> list[str]:
    """Return the cells of a line."""
    shown = [f"{row.measures[name]:.3f}" if name in row.measures else "" for name in SHOWN]
    return [str(row.aim), row.rule, row.tool, *shown, "" if row.seconds is None else f"{row.seconds:.0f}"]


HEAD = ["aim", "rule", "tool", "L0", "EV", "MCC", "uniqueness", "precision", "recall", "F1", "dead", "shrinkage", "s"]


def show(row: Row) -> None:
    """Print a line of the table."""
    print(f"| {' | '.join(cells(row))} |", flush=True)


def plot(rows: list[Row], file: Path) -> None:
    """Plot explained variance, MCC and F1 over L0, with one line per rule and dashed lines for controls and SAELens."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(14, 4.5), layout="constrained")
    series = dict.fromkeys((row.rule, row.tool) for row in rows)
    colours = {rule: f"C{i}" for i, rule in enumerate(dict.fromkeys(rule for rule, tool in series if tool != "control"))}
    for rule, tool in series:
        points = [row for row in rows if (row.rule, row.tool) == (rule, tool)]
        style = {"ours": "o-", "control": "k:", "SAELens": "x--", "published": "*"}[tool]
        for axis, name in zip(axes, ("explained_variance", "mcc", "f1"), strict=True):
            at = [row.aim if tool in ("control", "published") else row.measures["l0"] for row in points]
            colour = {} if tool == "control" else {"color": colours[rule]}
            label = rule if tool == "ours" else f"{rule} ({tool})"
            axis.plot(at, [row.measures[name] for row in points], style, label=label, markersize=5, **colour)
            if tool == "control":
                axis.annotate(rule, (at[-1], points[-1].measures[name]), fontsize="x-small")
            axis.set(xlabel="L0", title=name)
    axes[2].legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(file, dpi=130)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--saelens", help="Python of an environment with sae-lens")
    parser.add_argument("--benchmark", action="store_true", help="sizes and settings of SynthSAEBench-16k")
    parser.add_argument("--rules", nargs="+", default=None, help="default: all that are installed")
    parser.add_argument("--l0", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--features", type=int, default=2048)
    parser.add_argument("--d-in", type=int, default=128)
    parser.add_argument("--d-sae", type=int, default=512)
    parser.add_argument("--active", type=float, default=None, help="sum of the probabilities that are aimed at; see l0")
    parser.add_argument("--p-max", type=float, default=0.4)
    parser.add_argument("--p-min", type=float, default=5e-4)
    parser.add_argument("--n-tokens", type=int, default=1_000_000)
    parser.add_argument("--held-out", type=int, default=32_768)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=None, help="default: that of TrainConfig")
    parser.add_argument("--tries", type=int, default=4, help="coefficients of a penalty that SAELens is given")
    parser.add_argument("--seed", type=int, default=0, help="of features, activations and initial parameters")
    parser.add_argument("--threads", type=int, default=2)
    if parser.parse_args().benchmark:
        parser.set_defaults(**BENCHMARK)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    source = sl.synthetic(args.features, args.d_in, p_max=args.p_max, p_min=args.p_min, l0=args.active, seed=args.seed)
    bench, rules, start = Bench(source, args), args.rules or names("sparsity"), time.perf_counter()
    stored = bench.stored(args.out) if args.saelens else None
    print(f"| {' | '.join(HEAD)} |\n|{' --- |' * len(HEAD)}", flush=True)
    rows: list[Row] = []
    for l0 in args.l0:
        for name, report in control_reports(source, args.d_sae, l0, args.held_out, args.seed).items():
            rows.append(Row(l0, name, "control", measures(report)))
            show(rows[-1])
        rows += ours(bench, l0, rules, stored)
        if stored is not None:
            rows += theirs(bench, l0, rules, stored)
        if args.benchmark:
            rows += published(l0, rules)
            for row in published(l0, rules):
                show(row)
    seconds = time.perf_counter() - start
    settings = {name: str(value) for name, value in vars(args).items()} | {"synthetic": source.config.model_dump(mode="json")}
    content = {"settings": settings, "seconds": seconds, "rows": [row._asdict() for row in rows]}
    (args.out / "synthetic.json").write_text(json.dumps(content, indent=1))
    lines = [f"| {' | '.join(line)} |" for line in (HEAD, ["---"] * len(HEAD), *map(cells, rows))]
    (args.out / "synthetic.md").write_text("\n".join(lines) + "\n")
    plot(rows, args.out / "synthetic.png")
    print(f"{seconds:.0f} s; the table is in {args.out}")


if __name__ == "__main__":
    main()
