"""A whole store as HTML for notebooks, without scripts: only inline style, and all text is escaped."""

import torch
from jaxtyping import Float
from torch import Tensor

from saelens_lite.features.html import quoted, render
from saelens_lite.features.queries import StoreQueries

N_LISTED = 5  # latents in each list of the overview
BINS_PER_DECADE = 4


def store_card(store: StoreQueries) -> str:
    """Return the HTML overview of a store: the densities of its latents, and lists of notable latents."""
    density, fires = store.density, ~store.never_fires
    lists = [("most frequent", _largest(store, density, fires, "{:.1%}"))]
    if len(store.weights.logit_kurtosis):
        lists.append(("act on few tokens (kurtosis)", _largest(store, store.weights.logit_kurtosis, fires, "{:.0f}")))
    if store.stability is not None:
        lists.append(("most stable", _largest(store, store.stability, fires, "{:.2f}")))
    decades, histogram = _by_decade(density[fires])
    return render(
        "features",
        "store.html.j2",
        info=store.info,
        l0=float(store.tensors.count.sum()) / store.info.n_tokens,
        n_silent=int(store.never_fires.sum()),
        n_labels=len(store.labels),
        n_scored=len(store.label_scores),
        histogram=histogram,
        low=f"{100 * 10.0**-decades:g} %",
        lists=lists,
    )


def _largest(store: StoreQueries, score: Float[Tensor, " d_sae"], among: Tensor, form: str) -> list[tuple[int, str, str]]:
    """Return the latents with the largest scores: number, score, and the label or else its own words."""
    order = torch.where(among, score, -torch.inf).argsort(descending=True, stable=True)
    return [
        (i, form.format(float(score[i])), store.labels.get(i) or _words(store, i))
        for i in order[: min(N_LISTED, int(among.sum()))].tolist()
    ]


def _words(store: StoreQueries, latent: int) -> str:
    """Return the token that a latent promotes most, or without a model, the row on which it fires most."""
    if store.rows is not None:
        return next((row.name for row in store.top_examples(latent)), "")
    return next((quoted(token) for token, _ in store.promoted(latent)), "")


def _by_decade(density: Float[Tensor, " n"]) -> tuple[int, list[int]]:
    """Return how many decades below 1 the smallest density is, and the histogram of log densities from there to 1."""
    exponent = -density.double().log10()
    decades = max(1, int(exponent.max().ceil())) if len(density) else 1
    counts = torch.histc(-exponent, decades * BINS_PER_DECADE, -decades, 0)
    return decades, counts.int().tolist()
