"""The content of the page, as columns of numbers: one row for each latent, or for each token of the shown text."""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from saelens_lite.evaluation.sums import Metric
from saelens_lite.features.dashboard.models import Diff, of_models
from saelens_lite.features.explaining.scores import RESULTS, LabelScore
from saelens_lite.features.label import origin_of
from saelens_lite.features.label_scores import exceeds_controls, kinds_of
from saelens_lite.features.queries import StoreQueries

QUARTILES = (0.25, 0.5, 0.75)
N_CONTROL = 5  # contexts of a latent on the model with shuffled weights

Columns = dict[str, np.ndarray]


class Content(NamedTuple):
    """Everything that the page shows. `facts` is plain data; the comments say what a row of each group of columns is.

    A context is the place of its peak among the shown tokens, and the latent's activations around it (columns whose names end
    in _nearby). The activations are 0 in entries without a context.
    """

    facts: dict[str, Any]
    vocabulary: list[str]  # texts of the tokens that appear, then of parts of characters in their contexts, then of groups
    labels: dict[int, str]
    origins: list[str]  # authors and sources of labels; a latent's column `origin` has the number of its label's
    scores: dict[int, dict[str, Any]]  # of the labels that have a score, by kind
    judges: list[str]  # the names of the judges; a score has the number of its judge
    spreads: dict[str, dict[str, list[float]]]  # by kind and result: the quartiles over latents of the AUROC
    tokens: Columns  # a token that is in a context
    spans: Columns  # a span of the text: its first place among the shown tokens, its row, its position
    index: Columns  # a latent: the data that the list shows and searches
    details: Columns  # a latent: the data that only its own page shows


class ShownText(NamedTuple):
    """The parts of a text that are in contexts, joined. Span j begins at `start[j]` in the flattened text, at `at[j]` here."""

    tokens: Int[np.ndarray, " n_shown"]
    start: Int[np.ndarray, " n_spans"]
    at: Int[np.ndarray, " n_spans"]

    @classmethod
    def of(
        cls,
        tokens: Int[np.ndarray, "n_seq n_ctx"],
        length: Int[np.ndarray, " n_seq"],
        places: Int[np.ndarray, " n"],
        window: tuple[int, int],
    ) -> "ShownText":
        """Return the union of the windows around places. A window never leaves its row."""
        places = np.unique(places)
        row, position = np.divmod(places, tokens.shape[1])
        start = places - np.minimum(position, window[0])
        stop = places + np.minimum(length[row] - position, window[1] + 1)
        opens = np.ones(len(places), dtype=bool)
        opens[1:] = start[1:] >= stop[:-1]  # windows that only touch stay separate: they may be in two rows
        size = stop[np.roll(opens, -1)] - start[opens]
        at = size.cumsum() - size
        flat = np.arange(size.sum()) + np.repeat(start[opens] - at, size)
        return cls(tokens.reshape(-1)[flat], start[opens], at)

    def index(self, places: Int[np.ndarray, "*shape"]) -> Int[np.ndarray, "*shape"]:
        """Return the indices of places among the shown tokens; 0 for negative places."""
        if not len(self.start):
            return np.zeros_like(places)
        span = self.start.searchsorted(places, side="right") - 1
        return np.where(places < 0, 0, places - self.start[span] + self.at[span])


def content(store: StoreQueries, images: dict[int, str] | None = None, diff: Diff | None = None) -> Content:
    """Return the content of a store's page. `images` has data URIs of rows, and `diff` is a report of `sl.diff`."""
    t, weights, control = store.tensors, store.weights, store.control
    places = {"top": t.top_place, "group": t.group_place.flatten(1), "random": t.random_place}
    if control is not None:
        places["control"] = control.tensors.top_place[:, :N_CONTROL]
    if store.rows is not None and store.rows.labels:
        places["distinct"] = store.rows.tensors.distinct_place
    if store.models is not None:
        places["best"] = store.models.best_place.flatten(1)
    places = {name: _array(x) for name, x in places.items()}
    wanted = np.concatenate([x[x >= 0] for x in places.values()])
    text = ShownText.of(_array(t.tokens), _array(t.length), wanted, store.info.window)
    shown = {name: text.index(x) for name, x in places.items()}

    promoted, suppressed = _array(weights.promoted), _array(weights.suppressed)
    bos = [] if store.info.bos_id is None else [store.info.bos_id]
    appears = np.zeros(len(store.vocabulary), dtype=bool)
    of_each = [] if store.models is None else [_array(store.models.promoted), _array(store.models.suppressed)]
    for some in (text.tokens, promoted, suppressed, bos, *of_each):
        appears[some] = True
    ids = np.flatnonzero(appears)
    row, position = np.divmod(text.start, t.tokens.shape[1])
    words, word = _words(store, text, ids)
    models = of_models(store, diff, shown, ids)
    of_groups, origins = _groups(store, text, shown, len(words)), _origins(store)
    scores, judges = _scores(store)
    bands = zip(t.band_low.tolist(), t.band_high.tolist(), strict=True)
    return Content(
        facts={
            "unit": store.info.unit,
            "images": {int(ids.searchsorted(row)): uri for row, uri in (images or {}).items()},
            "n_latents": store.info.d_sae,
            "n_tokens": store.info.n_tokens,
            "partner_tokens": store.info.partner_tokens or store.info.n_tokens,
            "before": store.info.window[0],
            "after": store.info.window[1],
            "bos": int(ids.searchsorted(bos[0])) if bos else None,
            "bands": [band for band, n in zip(bands, t.band_tokens.tolist(), strict=True) if n],
            "control_tokens": None if control is None else control.info.n_tokens,
            **models.facts,
        },
        vocabulary=words + of_groups.labels,
        labels=store.labels,
        origins=origins.names,
        scores=scores,
        judges=judges,
        spreads=_spreads(store),
        tokens={"token": word} | of_groups.tokens,
        spans={"at": text.at, "row": row, "position": position},
        index=_index(store, shown["top"], ids.searchsorted(promoted)) | of_groups.index | origins.index | _there(models.index),
        details=_details(store, shown, ids.searchsorted(suppressed)) | of_groups.details | _there(models.details),
    )


class _Groups(NamedTuple):
    """The columns about groups of rows; a group is the number of its label among all words of the page."""

    labels: list[str]
    tokens: Columns
    index: Columns
    details: Columns


def _groups(store: StoreQueries, text: ShownText, shown: Columns, n_words: int) -> _Groups:
    """Return the parts about groups. Without groups they are empty."""
    if store.rows is None or not store.rows.labels:
        return _Groups([], {}, {}, {})
    t = store.rows.tensors
    of_shown, group = _array(t.group_of_row)[text.start], _array(t.rate_group)  # a span is a row, because a row is one place
    used = np.unique(np.concatenate([of_shown, group[group >= 0]]))
    number = n_words + np.where(group < 0, 0, used.searchsorted(group))
    count, size = _array(t.rate_count), _array(store.rows.sizes)[group.clip(min=0)]
    return _Groups(
        [store.rows.labels[i] for i in used.tolist()],
        {"group": n_words + used.searchsorted(of_shown)},
        {"group": number[:, 0], "group_rate": (count / size)[:, 0]},
        {
            "rate_group": number, "rate_count": count, "rate_rows": size, "rate_mean": _array(t.rate_mean),
            "distinct": shown["distinct"], "distinct_nearby": _array(t.distinct_value),
        },
    )  # fmt: skip


class _Origins(NamedTuple):
    """The authors and sources of labels, and the column of their numbers."""

    names: list[str]
    index: Columns


def _origins(store: StoreQueries) -> _Origins:
    """Return the parts about the origin of labels; empty if all labels are your own. Number 0 stands for these."""
    of_latent = {latent: origin_of(label) for latent, label in store.labels.items()}
    names = ["", *sorted(set(of_latent.values()) - {""})]
    if len(names) == 1:
        return _Origins([], {})
    numbers = {name: number for number, name in enumerate(names)}
    return _Origins(names, {"origin": np.array([numbers[of_latent.get(i, "")] for i in range(store.info.d_sae)])})


def _scores(store: StoreQueries) -> tuple[dict[int, dict[str, Any]], list[str]]:
    """Return the scores of the labels as plain data, and the names of the judges."""
    of_latents = store.label_scores
    judges = sorted({one.judge for kinds in of_latents.values() for one in kinds.values()})
    return {latent: {kind: _score(one, judges) for kind, one in kinds.items()} for latent, kinds in of_latents.items()}, judges


def _spreads(store: StoreQueries) -> dict[str, dict[str, list[float]]]:
    """Return the quartiles over latents of the AUROC of each result, by kind: lower quartile, median, upper quartile."""
    spreads: dict[str, dict[str, list[float]]] = {}
    for kind in kinds_of(store.label_scores):
        ones = [kinds[kind] for kinds in store.label_scores.values() if kind in kinds]
        for name in RESULTS:
            areas = [of.auroc.value for one in ones if (of := getattr(one, name)) is not None]
            if areas:
                spreads.setdefault(kind, {})[name] = np.quantile(areas, QUARTILES).round(4).tolist()
    return spreads


def _score(one: LabelScore, judges: list[str]) -> dict[str, Any]:
    """Return a score as plain data: of each result the AUROC and the balanced accuracy with the ends of their intervals."""
    results = {name: of for name in RESULTS if (of := getattr(one, name)) is not None}
    facts = {
        "judge": judges.index(one.judge),
        "n": [one.n_firing, one.n_silent],
        "above": exceeds_controls(one),
        "elsewhere": one.made_elsewhere,
    }
    return facts | {
        name: [*_rounded(judged.auroc), *_rounded(judged.balanced_accuracy), judged.n_unusable]
        for name, judged in results.items()
    }


def _rounded(metric: Metric) -> list[float | None]:
    return [round(x, 4) if math.isfinite(x) else None for x in metric]


def _words(
    store: StoreQueries, text: ShownText, ids: Int[np.ndarray, " n_ids"]
) -> tuple[list[str], Int[np.ndarray, " n_shown"]]:
    """Return the texts of ids and of parts of characters in their contexts, and the number of each shown token's text."""
    words, word = [store.vocabulary[i] for i in ids.tolist()], ids.searchsorted(text.tokens)
    parts = np.isin(text.tokens, list(store.vocabulary.parts))
    if not parts.any():
        return words, word
    tokens, length = _array(store.tensors.tokens), _array(store.tensors.length)
    numbers: dict[str, int] = {}
    stops = np.append(text.at[1:], len(text.tokens))
    for start, at, stop in zip(text.start.tolist(), text.at.tolist(), stops.tolist(), strict=True):
        if parts[at:stop].any():
            row, position = divmod(start, tokens.shape[1])
            shown = store.vocabulary.window(tokens[row, : length[row]], position, position + stop - at)
            for place in np.flatnonzero(parts[at:stop]).tolist():
                word[at + place] = numbers.setdefault(shown[place], len(words) + len(numbers))
    return words + list(numbers), word


def _index(store: StoreQueries, top: np.ndarray, promoted: np.ndarray) -> Columns:
    """Return the columns of the list."""
    t = store.tensors
    columns = {
        "count": t.count,
        "max": t.top_value[:, 0],
        "mean": t.mean,
        "top": top,
        "n_top": (t.top_place >= 0).sum(1),
        "first_nearby": t.top_nearby[:, 0],
        "promoted": promoted,
        "cosine": store.weights.encoder_decoder_cosine,
    }
    if store.scores is not None:
        columns["stability"] = store.scores.score.masked_fill(~store.scores.live, torch.nan)  # dead latents have no score
    return _there(columns)


def _details(store: StoreQueries, shown: Columns, suppressed: np.ndarray) -> Columns:
    """Return the columns of a latent's own page."""
    t, w = store.tensors, store.weights
    read = t.band_tokens > 0
    columns = {
        "histogram": t.histogram,
        "bin_width": t.bin_width,
        "band_rate": t.band_count[:, read] / t.band_tokens[read],
        "band_mean": t.band_mean[:, read],
        "top_nearby": t.top_nearby,
        "group": shown["group"],
        "group_nearby": t.group_nearby,
        "group_count": t.group_count,
        "group_low": t.group_low,
        "group_high": t.group_high,
        "random": shown["random"],
        "random_nearby": t.random_nearby,
        "frequent": t.frequent_partner.clamp(min=0),
        "frequent_count": t.frequent_count,
        "specific": t.specific_partner.clamp(min=0),
        "specific_count": t.specific_count,
        "promoted_effect": w.promoted_effect,
        "suppressed": suppressed,
        "suppressed_effect": w.suppressed_effect,
        "logit_histogram": w.logit_histogram,
        "logit_low": w.logit_low,
        "logit_width": w.logit_width,
        "logit_skew": w.logit_skew,
        "logit_kurtosis": w.logit_kurtosis,
        "decoder_neighbours": w.decoder_neighbours,
        "decoder_cosine": w.decoder_cosine,
        "encoder_neighbours": w.encoder_neighbours,
        "encoder_cosine": w.encoder_cosine,
    }
    if store.control is not None:
        c = store.control.tensors
        columns |= {
            "control": shown["control"],
            "control_nearby": c.top_nearby[:, :N_CONTROL],
            "control_count": c.count,
            "control_max": c.top_value[:, 0],
            "control_mean": c.mean,
        }
    return _there(columns)


def _there(columns: dict[str, Tensor | np.ndarray]) -> Columns:
    """Return the columns as arrays, without the empty ones."""
    arrays = {name: _array(column) for name, column in columns.items()}
    return {name: array for name, array in arrays.items() if array.size}


def _array(x: Tensor | np.ndarray) -> np.ndarray:
    return x if isinstance(x, np.ndarray) else x.cpu().numpy()
