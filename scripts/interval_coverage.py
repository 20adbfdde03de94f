"""Measure how often the 95 % intervals of an evaluation contain the true value; it should be 95 % of the time.

    python scripts/interval_coverage.py --sequences 300

The population is the sequences of a text as the embedded model and a small dictionary see them, so the true value is known.
The script draws corpora of --sequences sequences from it with replacement and computes the metrics and intervals of each. The
model runs only once: a metric depends only on sums over the tokens of each sequence, and those are recorded. The exit code is 1
when a coverage is outside 92 to 98 %.
"""

import argparse
import json
import sys

import torch
from torch import Tensor

import saelens_lite as sl
from saelens_lite.evaluation import metrics
from saelens_lite.evaluation.held import held_batches
from saelens_lite.evaluation.measure import mean_activation, measure
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


def population(rows: TokenRows, lm: sl.LanguageModel, d: sl.Dictionary) -> dict[str, Tensor]:
    """Of every sequence, all that metrics are computed from."""
    recorder = Recorder()
    hooks, batch_tokens = Hooks((HOOK,), (HOOK,)), default_batch_tokens(lm, with_logits=True)
    with held_batches(lm, [rows], batch_tokens, ALONE) as batches:
        mean = mean_activation(lm, batches, hooks.writes)
        measure([d], lm, batches, hooks, sums=recorder, mean=mean, batch_tokens=batch_tokens)
    return {name: torch.cat(found) for name, found in recorder.recorded.items()}


def estimate(sequences: dict[str, Tensor], n_bootstrap: int, seed: int) -> dict[str, Metric]:
    """Return the metrics of some sequences."""
    sums = PooledSums(n_bootstrap, seed, len(sequences["n"]))
    sums.weigh(torch.arange(len(sequences["n"])))
    for name, values in sequences.items():
        sums.add(name, values)
    return metrics.reconstruction_metrics(sums, "0") | metrics.prediction_metrics(sums, "0")


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
        d = sl.fit(x, d_sae=768, n_tokens=100_000, batch_size=1024, lr=2e-3, options={"k": 16})
    everything = population(rows, lm, d)
    truth = estimate(everything, 0, 0)
    generator = torch.Generator().manual_seed(0)
    n = len(everything["n"])
    hits = dict.fromkeys(truth, 0)
    for seed in range(args.corpora):
        drawn = torch.randint(n, (args.sequences,), generator=generator)
        found = estimate({name: values[drawn] for name, values in everything.items()}, args.n_bootstrap, seed)
        for name in hits:
            hits[name] += found[name].low <= truth[name].value <= found[name].high
    coverage = {name: hit / args.corpora for name, hit in hits.items() if found[name].high > found[name].low}
    print(json.dumps({"population": n, **vars(args), "coverage": coverage}, indent=2))
    sys.exit(not all(0.92 <= share <= 0.98 for share in coverage.values()))


if __name__ == "__main__":
    main()
