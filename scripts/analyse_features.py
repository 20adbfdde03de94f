"""Analyse the latents of a dictionary: write a feature store, tables, plots and the dashboard into one folder.

    python scripts/analyse_features.py runs/topk/dictionary --out analysis
    python scripts/analyse_features.py hf://user/repo/folder@revision --out analysis --text book.txt --control

The folder receives store/ (`sl.FeatureStore.load` reads it), dashboard.html and three plots: density.png (share of tokens on
which a latent fires), positions.png (number of latents that fire at each position of a row) and neighbours.png (cosine of each
decoder direction with its nearest neighbour).
"""

import argparse
import sys
from itertools import pairwise
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

import saelens_lite as sl
from saelens_lite.features.html import quoted, visible
from saelens_lite.features.weights import nearest
from saelens_lite.model import model_for
from saelens_lite.tokens import named_text

RARE = 0.01  # latents that fire on a smaller share of the tokens are shown as examples


def facts(store: sl.FeatureStore) -> Table:
    """Return the store in figures; beside it the control, if there is one."""
    stores = [store] if store.control is None else [store, store.control]
    grid = Table("", *("dictionary", "model shuffled")[: len(stores)], box=SIMPLE_HEAD)
    rows = {
        "latents that fire on a token": lambda s: f"{int(s.tensors.count.sum()) / s.info.n_tokens:.1f}",
        "latents that never fire": lambda s: f"{int(s.never_fires.sum()):,} of {s.info.d_sae:,}",
        "latents that fire on more than a tenth of the tokens": lambda s: f"{int((s.density > 0.1).sum()):,}",
        "median share of tokens of those that fire": median_density,
    }
    for title, figure in rows.items():
        grid.add_row(title, *(figure(s) for s in stores))
    return grid


def median_density(store: sl.FeatureStore) -> str:
    """Return the share of tokens that half of the latents that fire at all fire on."""
    fire = store.density[~store.never_fires]
    return f"{100 * float(fire.median()):.3g} %" if len(fire) else "none fires"


def examples(store: sl.FeatureStore, n: int) -> Table:
    """Rare latents whose effect on the logits is most concentrated on few tokens, else those that fire most strongly."""
    rare = (store.density < RARE) & ~store.never_fires
    score = store.weights.logit_kurtosis if len(store.weights.logit_kurtosis) else store.tensors.top_value[:, 0]
    order = torch.where(rare, score, -torch.inf).argsort(descending=True, stable=True)[: min(n, int(rare.sum()))]
    grid = Table("latent", "% of tokens", "largest", "promotes", "strongest context", box=SIMPLE_HEAD)
    for i in order.tolist():
        latent = store.latent(i)
        context, promoted = latent.examples[0], " ".join(quoted(token) for token, _ in latent.promoted[:4])
        ends = (max(0, context.peak - 6), context.peak, context.peak + 1, context.peak + 4)
        before, peak, after = (visible("".join(context.tokens[slice(*part)])) for part in pairwise(ends))
        shown = Text.assemble(before, (peak, "reverse"), after)
        grid.add_row(str(i), f"{100 * latent.density:.3g}", f"{latent.max:.3g}", Text(promoted), shown)
    return grid


def plots(store: sl.FeatureStore, dictionary: sl.Dictionary) -> dict[str, Figure]:
    """Return the figures, by name."""
    stores = {"dictionary": store} if store.control is None else {"dictionary": store, "model shuffled": store.control}
    named = {name: Figure(figsize=(6, 3.5), layout="constrained") for name in ("density", "positions", "neighbours")}
    density, positions, neighbours = (figure.subplots() for figure in named.values())

    for name, one in stores.items():
        density.hist(one.density[~one.never_fires].log10().tolist(), bins=40, histtype="step", label=name)
    density.set(xlabel="log10 of the share of tokens a latent fires on", ylabel="latents")

    for name, one in stores.items():
        t = one.tensors
        there = t.band_tokens > 0
        l0 = t.band_count.sum(0)[there] / t.band_tokens[there]
        positions.plot(t.band_low[there].tolist(), l0.tolist(), marker="o", label=name)
    positions.set_xscale("symlog", linthresh=1)  # position 0 counts where rows begin without a special token
    positions.set(xlabel="position in the row (first of a band)", ylabel="latents that fire on a token", ylim=(0, None))

    random = torch.randn(dictionary.W_dec.shape, generator=torch.Generator().manual_seed(0))
    _, chance = nearest(torch.nn.functional.normalize(random))
    for name, cosine in (("dictionary", store.weights.decoder_cosine), ("random directions", chance)):
        neighbours.hist(cosine[:, :1].flatten().tolist(), bins=40, histtype="step", label=name)
    neighbours.set(xlabel="cosine with the nearest other direction", ylabel="latents")

    for axes in (density, positions, neighbours):
        axes.legend(frameon=False)
    return named


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dictionary", help="a folder, or an address on the Hub")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--text", default="python-docs:held-out", help="as for `saelens-lite features`")
    parser.add_argument("--model", help="default: the one the dictionary was trained on")
    parser.add_argument("--n-tokens", type=int)
    parser.add_argument("--control", action="store_true", help="do the same on the model with its weights shuffled")
    parser.add_argument("--examples", type=int, default=10, help="latents in the table")
    args = parser.parse_args()
    console = Console(markup=False)  # names and paths may have brackets

    d = sl.load(args.dictionary)
    lm = model_for(d, name=args.model)
    store = sl.FeatureStore.build(
        d, lm, named_text(args.text), n_tokens=args.n_tokens, control=args.control, out=args.out / "store"
    )
    console.print(str(store), facts(store), examples(store, args.examples), sep="\n")
    for name, figure in plots(store, d).items():
        figure.savefig(args.out / f"{name}.png", dpi=120)
    console.print(f"{store.dashboard(args.out / 'dashboard.html')}: open it in a browser")


if __name__ == "__main__":
    try:
        main()
    except sl.SaelensLiteError as error:
        sys.exit(f"analyse_features.py: {error}")
