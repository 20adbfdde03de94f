"""Probe dictionaries for concepts, beside random dictionaries of the same size, the whole activation, and chance.

    python scripts/comparisons/probe_table.py demo/runs/topk/dictionary … --datasets 12

Needs the extra `saeprobes`. The data sets are spread evenly over the 113 of sae-probes. Prints a table for each dictionary and
for its random counterpart (fresh directions, same rule and options; only with topk is its L0 sure to be the same), then the
mean areas under the curve.
"""

import argparse
from pathlib import Path

import sae_probes
import torch

import saelens_lite as sl
from saelens_lite.model import model_for
from saelens_lite_plugins.judges.saeprobes import CHANCE


def untrained(d: sl.Dictionary) -> sl.Dictionary:
    """Return a fresh dictionary of the same rule, size and hook, centred as the trained one is."""
    options = d.rule.config.model_dump()
    fresh = sl.Dictionary.create(d.rule.plugin_name, **d.ports, d_sae=d.d_sae, options=options, origin=d.origin)
    fresh.b_dec.data.copy_(d.b_dec)
    return fresh


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dictionaries", type=Path, nargs="+", help="dictionary folders, all of one hook of one model")
    parser.add_argument("--datasets", type=int, default=12, help="how many of the 113 data sets")
    parser.add_argument("--ks", type=int, nargs="+", default=[1, 4, 16], help="latents a probe sees")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    trained = {str(folder): sl.load(folder) for folder in args.dictionaries}
    judged = trained | {f"{name}, untrained": untrained(d) for name, d in trained.items()}
    lm = model_for(*trained.values())
    names = sae_probes.DATASETS
    chosen = [names[i * len(names) // args.datasets] for i in range(args.datasets)]
    judge = sl.judge("saeprobes", datasets=chosen, ks=args.ks)
    reports = dict(zip(judged, judge.evaluate(list(judged.values()), lm), strict=True))
    for name, report in reports.items():
        print(f"\n{name}\n{report}")
    print(f"\nmean area under the curve over {len(chosen)} data sets; chance {CHANCE}")
    for name, report in reports.items():
        print(f"{name}: " + ", ".join(f"k = {k}: {report.mean_auc(k):.3f}" for k in args.ks))
    print(f"the whole activation: {report.mean_auc(None):.3f}")


if __name__ == "__main__":
    main()
