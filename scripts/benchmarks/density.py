"""Measure the density of a support from which dense products are faster than sparse ones: the table of codes/products.py.

    python scripts/benchmarks/density.py
    python scripts/benchmarks/density.py --device cuda --batch 8192 --d-sae 12288

For each density, a random support takes its part in the four products of a training step: decoding, the gradient of the codes,
and both weight gradients. Each is timed in both ways. On a CPU, half of the latents fire, so the density is that among them.
"""

import argparse
import itertools
import json
import math
import statistics

import torch
from shared import now, parser, write_report

from saelens_lite.codes import Support, products, support_of_mask

DENSITIES = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)


def support_of_density(args: argparse.Namespace, density: float) -> Support:
    """Return a random support of a share of all pairs, of half of the latents on a CPU."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(args.batch, args.d_sae, generator=generator) < density
    if args.device == "cpu":
        mask[:, ::2] = False
    return support_of_mask(mask.to(args.device))


def milliseconds(args: argparse.Namespace, density: float, halves: bool, dense: bool) -> float:
    """Return the median time of the products of a step, with a new support each time."""
    generator = torch.Generator().manual_seed(1)
    sizes = (args.batch, args.batch, args.d_sae)
    x, error, weight = (torch.randn(n, args.d_in, generator=generator).to(args.device) for n in sizes)
    usual, times = dict(products.DENSE_ABOVE), []
    products.DENSE_ABOVE.update(dict.fromkeys(usual, -1.0 if dense else math.inf))
    try:
        for _ in range(args.rounds + 1):
            support = support_of_density(args, density)
            value = torch.ones(len(support.latent), device=args.device)
            start = now(args.device)
            products.sparse_product(support, value, weight, halves)
            products.pair_products(support, error, weight, halves)
            products.transposed_product(support, value, error, args.d_sae, halves)
            products.transposed_product(support, value, x, args.d_sae, halves)
            times.append(now(args.device) - start)
    finally:
        products.DENSE_ABOVE.update(usual)
    return 1000 * statistics.median(times[1:])


def crossing(found: list[dict]) -> float:
    """Return the density at which both ways take the same time, between the measured ones; nan if they never do."""
    for low, high in itertools.pairwise(found):
        a, b = (math.log(row["sparse ms"] / row["dense ms"]) for row in (low, high))
        if a < 0 <= b:
            return math.exp(math.log(low["density"]) - a / (b - a) * math.log(high["density"] / low["density"]))
    return math.nan


def main() -> None:
    options = parser(__doc__, rounds=5, peers=None, device=True)
    options.add_argument("--d-in", type=int, default=768)
    options.add_argument("--d-sae", type=int, default=8192)
    options.add_argument("--batch", type=int, default=2048)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for halves in (False, True) if args.device == "cuda" else (False,):
        found = []
        for density in DENSITIES:
            times = {f"{way} ms": round(milliseconds(args, density, halves, way == "dense"), 2) for way in ("sparse", "dense")}
            found.append({"density": density, "halves": halves, **times})
            print(json.dumps(found[-1]), flush=True)
        rows += [*found, {"halves": halves, "equal at": crossing(found)}]
        print(json.dumps(rows[-1]), flush=True)
    write_report(args, {"densities": rows})


if __name__ == "__main__":
    main()
