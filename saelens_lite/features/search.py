"""Search a feature store for latents by text: in their labels, the tokens they promote, and their strongest contexts.

The text of the store is searched once, and every latent looks up its contexts in the result.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from saelens_lite.errors import UserError
from saelens_lite.features.queries import StoreQueries
from saelens_lite.features.rows import ExampleRow
from saelens_lite.features.summary import About, Example, around_peak
from saelens_lite.features.tensors import NONE
from saelens_lite.tables import Result, columns_of, grid

LESS = 0.25  # weight of contexts with the text only near the firing token, and of promoted tokens
LABELLED = 2.0  # more than all the rest
WIDE, NARROW = (25, 26), (18, 18)  # columns for an example before its peak and from it on: alone, and beside a description


class Hit(NamedTuple):
    """A latent found by a search.

    The text is on the firing token in `on_token` of the latent's `n_contexts` strongest contexts, and only near it in `near`.
    `promoted` is the promoted token that contains the text, or None. `example` is the strongest context with the text, or else
    the strongest.
    """

    latent: int
    score: float
    label: str | None
    promoted: str | None
    on_token: int
    near: int
    n_contexts: int
    example: Example | ExampleRow | None


@dataclass(frozen=True)
class SearchResult(Result):
    """The latents found by a search, best first; the first of `n_found`. A loop over it yields the hits.

    `inside_words` is True if no latent has the text as whole words, so that it was looked for inside words.
    """

    text: str
    hits: tuple[Hit, ...]
    n_found: int
    inside_words: bool

    def __len__(self) -> int:
        return len(self.hits)

    def __iter__(self) -> Iterator[Hit]:
        return iter(self.hits)

    def __getitem__(self, place: int) -> Hit:
        return self.hits[place]

    @property
    def latents(self) -> list[int]:
        """The numbers of the latents, best first."""
        return [hit.latent for hit in self.hits]

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain data."""
        hits = [hit._asdict() | {"example": hit.example and hit.example._asdict()} for hit in self.hits]
        return {"text": self.text, "n_found": self.n_found, "inside_words": self.inside_words, "hits": hits}

    def columns(self) -> dict[str, list[Any]]:
        """Return the hits, column by column, each example as one text."""
        return columns_of(Hit, self.hits) | {"example": [_as_text(hit.example) for hit in self.hits]}

    def table(self) -> Any:
        """Return a rich table with a row for each hit."""
        from rich.text import Text

        if not self.hits:
            return Text(f"no latent has {self.text!r} in its label, promoted tokens or top contexts")
        about = [About(hit.label, hit.promoted, 0.0).words for hit in self.hits]
        widths = NARROW if any(about) else WIDE
        rows = []
        for hit, words in zip(self.hits, about, strict=True):
            share, near = (f"{n}/{hit.n_contexts}" if n else "" for n in (hit.on_token, hit.near))
            before, after = (Text(), Text()) if hit.example is None else around_peak(hit.example, *widths)
            example = Text(" " * (widths[0] - before.cell_len)) + before + after  # peaks stand below each other
            rows.append((str(hit.latent), share, near, *[words] * any(about), example))
        shown = f"the best {len(self)} of {self.n_found:,}" if len(self) < self.n_found else f"{self.n_found:,}"
        return grid(
            ("latent", "on it", "near it", *["about"] * any(about), "example"),
            rows,
            caption=f"{shown} latents with {self.text!r}{' inside words' if self.inside_words else ''}; on it: top contexts in "
            "which the firing token, in « », has the text; near it: only other tokens have it",
            column=lambda title: {
                "justify": "left" if title in ("about", "example") else "right",
                "no_wrap": title != "about",
                "overflow": "fold" if title == "about" else "ellipsis",
            },
            collapse_padding=True,
        )


def _as_text(example: Example | ExampleRow | None) -> str | None:
    if example is None:
        return None
    return example.name if isinstance(example, ExampleRow) else "".join(example.tokens)


class _Places(NamedTuple):
    """The places of a text: the labelled latents, the tokens of the vocabulary, the contexts with it on and near the peak."""

    labelled: list[int]
    token_ids: Int[Tensor, " n_ids"]
    on_token: Bool[Tensor, "d_sae top_n"]
    near: Bool[Tensor, "d_sae top_n"]


def search(store: StoreQueries, text: str, n: int = 20) -> SearchResult:
    """Return the latents whose label, promoted tokens or strongest contexts contain a text; see `FeatureStore.search`."""
    words = text.split()
    if not words:
        raise UserError("nothing to search for: the text is empty")
    if n < 1:
        raise UserError(f"n = {n}; expected 1 latent or more")
    pattern = r"\s+".join(map(re.escape, words))
    start, stop = (r"(?<![^\W_])" if words[0][0].isalnum() else "", r"(?![^\W_])" if words[-1][-1].isalnum() else "")
    result = _result(store, text, n, re.compile(start + pattern + stop, re.IGNORECASE), inside_words=False)
    return result if len(result) else _result(store, text, n, re.compile(pattern, re.IGNORECASE), inside_words=True)


def _result(store: StoreQueries, text: str, n: int, pattern: re.Pattern[str], *, inside_words: bool) -> SearchResult:
    """Return the latents with a pattern, best first."""
    places = _Places(
        [latent for latent, label in store.labels.items() if pattern.search(label)],
        torch.tensor([i for i, token in enumerate(store.vocabulary) if pattern.search(token)], dtype=torch.long),
        *_in_contexts(store, pattern),
    )
    promotes = torch.isin(store.weights.promoted, places.token_ids)
    n_contexts = (store.tensors.top_place != NONE).sum(1)
    shares = [contexts.sum(1) / n_contexts.clamp(min=1) for contexts in (places.on_token, places.near)]
    score = (shares[0] + LESS * shares[1]).double()
    if promotes.shape[1]:
        score += LESS * promotes.any(1)
    score[places.labelled] += LABELLED
    order = score.argsort(descending=True, stable=True)
    n_found = int((score > 0).sum())
    hits = tuple(_hit(store, places, promotes, latent, float(score[latent])) for latent in order[: min(n, n_found)].tolist())
    return SearchResult(text, hits, n_found, inside_words and n_found > 0)


def _hit(store: StoreQueries, places: _Places, promotes: Bool[Tensor, "d_sae n"], latent: int, score: float) -> Hit:
    """Return the hit of one latent."""
    examples = store.top_examples(latent)
    at, near = (contexts[latent].nonzero().flatten().tolist() for contexts in (places.on_token, places.near))
    promoted = store.weights.promoted[latent][promotes[latent]].tolist()
    return Hit(
        latent=latent,
        score=score,
        label=store.labels.get(latent),
        promoted=store.vocabulary[promoted[0]] if promoted else None,
        on_token=len(at),
        near=len(near),
        n_contexts=len(examples),
        example=examples[(at + near + [0])[0]] if examples else None,
    )


def _in_contexts(
    store: StoreQueries, pattern: re.Pattern[str]
) -> tuple[Bool[Tensor, "d_sae top_n"], Bool[Tensor, "d_sae top_n"]]:
    """Return masks of the top contexts with a pattern on their peak, and with it only elsewhere in their window."""
    t, (before, after) = store.tensors, store.info.window
    n_ctx = t.tokens.shape[1]
    there = t.top_place != NONE
    place = t.top_place.clamp(min=0)
    row, position = place // n_ctx, place % n_ctx
    hit = torch.from_numpy(_on_tokens(store, pattern, row[there].unique().tolist()))
    on_token = hit[place] & there
    n_before = torch.cat([torch.zeros(1, dtype=torch.long), hit.cumsum(0)])
    start, stop = place - position.clamp(max=before), place + (t.length[row] - position).clamp(max=after + 1)
    return on_token, (n_before[stop] > n_before[start]) & there & ~on_token


def _on_tokens(store: StoreQueries, pattern: re.Pattern[str], rows: list[int]) -> Bool[np.ndarray, " n"]:
    """Return a mask of all places of the store's text: the tokens of some rows that a pattern covers, wholly or in part."""
    tokens, length = store.tensors.tokens.numpy(), store.tensors.length.tolist()
    hit = np.zeros(tokens.shape, dtype=bool)
    for row in rows:
        texts = store.vocabulary.row(tokens[row, : length[row]].tolist())
        spans = [match.span() for match in pattern.finditer("".join(texts))]
        if spans:
            ends = np.cumsum([len(text) for text in texts])
            for start, stop in spans:
                hit[row, ends.searchsorted(start, "right") : ends.searchsorted(stop, "left") + 1] = True
    return hit.reshape(-1)
