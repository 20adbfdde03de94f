"""Measure how often the 95 % intervals of an evaluation contain the true value; it should be 95 % of the time.

    python scripts/interval_coverage.py --sequences 300

The population is the sequences of a text as the embedded model and two small dictionaries see them, so the true values are
known. The script draws corpora of --sequences sequences from it with replacement, and computes the metrics and intervals of
each. For the difference between the dictionaries, the interval is the measured difference ± the noise floor of the two. The
model runs only once: a metric depends only on sums over the tokens of each sequence, and those are recorded. The exit code is 1
when a coverage is outside 92 to 98 %.
"""

import argparse
import json
import sys
from typing import NamedTuple

import torch
from torch import Tensor

import saelens_lite as sl
from saelens_lite.evaluation import metrics, noise_floors
from saelens_lite.evaluation.held import held_batches
from saelens_lite.evaluation.measure import mean_activation, measure
from saelens_lite.evaluation.replicates import Recipe, Replicates
from saelens_lite.evaluation.splices import SplicedModels
from saelens_lite.evaluation.sums import Metric, PooledSums
from saelens_lite.model.passes import default_batch_tokens
from saelens_lite.ports import Hooks
from saelens_lite.processes import ALONE
from saelens_lite.tokens import PythonDocs, TokenRows, token_rows

HOOK = "blocks.2.hook_resid_pre"


class Recorder(PooledSums):
    """Keeps the sums of every sequence."""

    def __init__(self) -> None:
        super().__init__(0, 0, 0)
        self.recorded: dict[str, list[Tensor]] = {}

    def add(self, name: str, per_sequence: Tensor) -> None:
        self.recorded.setdefault(name, []).append(per_sequence.double())

    def add_fired(self, name: str, sequence: Tensor, latent: Tensor, d_sae: int) -> None:
        pass


class Estimate(NamedTuple):
    """The metrics of some sequences, as `noise_floors` reads them."""

    metrics: dict[str, Metric]
    replicates: Replicates | None
    recipe: Recipe | None
    n_sequences: int


def population(rows: TokenRows, lm: sl.LanguageModel, dictionaries: list[sl.Dictionary]) -> dict[str, Tensor]:
    """Return, for each sequence, the sums that all metrics are computed from."""
    recorder = Recorder()
    hooks, batch_tokens = Hooks((HOOK,), (HOOK,)), default_batch_tokens(lm, with_logits=True)
    with held_batches(lm, [rows], batch_tokens, ALONE) as batches:
        mean = mean_activation(lm, batches, hooks.writes)
        models = SplicedModels(lm, hooks, batches.probe)
        for _ in measure(dictionaries, models, batches, sums=recorder, mean=mean, batch_tokens=batch_tokens):
            pass
    return {name: torch.cat(parts) for name, parts in recorder.recorded.items()}


def estimates(sequences: dict[str, Tensor], n_bootstrap: int, seed: int) -> list[Estimate]:
    """Return the metrics of both dictionaries on some sequences."""
    n = len(sequences["n"])
    sums = PooledSums(n_bootstrap, seed, n)
    sums.weigh(torch.arange(n))
    for name, values in sequences.items():
        sums.add(name, values)
    both = []
    for name in ("0", "1"):
        values = metrics.reconstruction_values(sums, name) | metrics.prediction_values(sums, name)
        replicates = Replicates.of_values("", values) if n_bootstrap else None
        both.append(Estimate({key: sums.metric(value) for key, value in values.items()}, replicates, None, n))
    return both


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpora", type=int, default=1000, help="200 tell a coverage to 1.5 %%, 1000 to 0.7 %%")
    parser.add_argument("--sequences", type=int, default=300, help="in each corpus")
    parser.add_argument("--tokens", type=int, default=120_000, help="in the population")
    parser.add_argument("--n-ctx", type=int, default=64)
    parser.add_argument("--n-bootstrap", type=int, default=1000)
    args = parser.parse_args()
    lm = sl.load_model("tiny", device="cpu")
    rows = token_rows(lm, PythonDocs("python-docs:train"), n_ctx=args.n_ctx, n_tokens=args.tokens)
    x = lm.run(rows[:200], HOOK)[HOOK][rows.keep[:200]]
    with torch.enable_grad():
        both = [sl.fit(x, d_sae=768, n_tokens=100_000, batch_size=1024, lr=2e-3, k=k, seed=k) for k in (16, 18)]
    everything = population(rows, lm, both)
    truth = [one.metrics for one in estimates(everything, 0, 0)]
    generator = torch.Generator().manual_seed(0)
    n = len(everything["n"])
    hits = {what: dict.fromkeys(truth[0], 0) for what in ("value", "difference")}
    exact = {what: set() for what in hits}
    for seed in range(args.corpora):
        drawn = torch.randint(n, (args.sequences,), generator=generator)
        measured = estimates({name: values[drawn] for name, values in everything.items()}, args.n_bootstrap, seed)
        for name in truth[0]:
            one, other = (of.metrics[name] for of in measured)
            floor = noise_floors(dict(zip("ab", measured, strict=True)), metrics=[name]).floors[name]
            error = one.value - other.value - (truth[0][name].value - truth[1][name].value)
            hits["value"][name] += one.low <= truth[0][name].value <= one.high
            hits["difference"][name] += abs(error) <= floor
            exact["value"] |= {name} if one.high == one.low else set()
            exact["difference"] |= {name} if floor == 0 else set()
    coverage = {
        what: {name: hit / args.corpora for name, hit in of.items() if name not in exact[what]} for what, of in hits.items()
    }
    print(json.dumps({"population": n, **vars(args), "coverage": coverage}, indent=2))
    sys.exit(not all(0.92 <= share <= 0.98 for of in coverage.values() for share in of.values()))


if __name__ == "__main__":
    main()
