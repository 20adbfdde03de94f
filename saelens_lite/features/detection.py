"""Detection scores: how well a label predicts in which held-out contexts a latent fires.

A scorer sees half of the strongest contexts, and half of those drawn from each group of activations. It must tell the other
half from contexts in which the latent is silent. A score means little unless it beats the tokens alone, so the token baseline
is always reported beside it.
Source: Paulo, Mallen, Juang and Belrose 2024, Automatically interpreting millions of features in large language models,
arXiv:2410.13928, detection scoring.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

from saelens_lite.errors import UserError
from saelens_lite.features.explaining.halves import TOP, HeldOut, held_out_contexts, shown_contexts
from saelens_lite.features.html import visible
from saelens_lite.features.queries import StoreQueries
from saelens_lite.features.summary import Example
from saelens_lite.tables import Result, columns_of, grid

FIRES = 0.5  # a scorer predicts that the latent fires from this value on


class DetectionTask(NamedTuple):
    """The input of a scorer: a label, contexts in which the latent fires, and the tokens of the contexts to judge."""

    label: str | None
    shown: list[Example]
    contexts: list[tuple[str, ...]]


@runtime_checkable
class Scorer(Protocol):
    """A judge of contexts: any function of this form, such as a client of a language model."""

    def __call__(self, task: DetectionTask) -> Sequence[float]:
        """Return a number for each context, from 0 (the latent is silent) to 1 (it fires); 0.5 or more means that it fires."""


class Score(NamedTuple):
    """A scorer's result on the contexts of a latent.

    `auroc` is the area under the ROC curve. `balanced_accuracy` is the mean of the accuracies on firing and on silent contexts.
    `recall_by_group` is the share of firing contexts recognised in each group of activations, strongest group first;
    `recall_of_top` is that share of the top contexts. A recall is None where there are no such contexts.
    """

    auroc: float
    balanced_accuracy: float
    recall_by_group: tuple[float | None, ...]
    recall_of_top: float | None


@dataclass(frozen=True)
class Detection(Result):
    """The scores of a label and of the token baseline on the same contexts; `score` is None without a label or scorer."""

    latent: int
    label: str | None
    n_firing: int
    n_silent: int
    score: Score | None
    baseline: Score

    @property
    def _scores(self) -> dict[str, Score]:
        return {"label": self.score, "token baseline": self.baseline} if self.score else {"token baseline": self.baseline}

    def columns(self) -> dict[str, list[Any]]:
        """Return the scores of the label and of the baseline, column by column."""
        return {"scorer": list(self._scores)} | columns_of(Score, list(self._scores.values()))

    def table(self) -> Any:
        """Return a rich table of the scores."""
        rows = [
            (
                scorer,
                *(f"{x:.3f}" for x in score[:2]),
                " ".join(f"{x:.0%}" for x in (score.recall_of_top, *score.recall_by_group) if x is not None),
            )
            for scorer, score in self._scores.items()
        ]
        label = f" {visible(self.label)}" if self.label else ", no label"
        return grid(
            ("scorer", "AUROC", "accuracy", "recall"),
            rows,
            title=f"latent {self.latent}{label}: {self.n_firing} contexts in which it fires, {self.n_silent} in which not",
            caption="accuracy: mean over firing and silent contexts; recall: of top contexts, then by activation, from the top",
        )


def token_baseline(task: DetectionTask) -> list[float]:
    """Return 1 − 2⁻ⁿ for each context.

    The count of a token is the number of shown contexts with that token at their peak. n is the largest count among the tokens
    of the context.
    """
    at_peaks = Counter(example.tokens[example.peak] for example in task.shown)
    return [1 - 0.5 ** max(at_peaks[token] for token in tokens) for tokens in task.contexts]


def words_of_label(task: DetectionTask) -> list[float]:
    """Return 1 for each context that contains a word of the label, else 0.

    The words are the parts of the label in quotation marks, or without any, its words of four letters or more.
    """
    label = task.label or ""
    quoted = re.findall(r"[\"'“‘«](.+?)[\"'”’»](?!\w)", label)
    words = [word.lower() for word in quoted or re.findall(r"\w{4,}", label)]
    return [float(any(word in "".join(tokens).lower() for word in words)) for tokens in task.contexts]


def detection(store: StoreQueries, latent: int, scorer: Scorer | None = None) -> Detection:
    """Score how well the label of a latent, read by a scorer (default: `words_of_label`), predicts where it fires.

    Raises:
        UserError: there is no such latent; too few contexts in which it fires or is silent; the scorer does not return a finite
            number for each context.
    """
    shown, held_out = shown_contexts(store, latent).all, held_out_contexts(store, latent)
    n_firing = sum(one.group is not None for one in held_out)
    if not shown or not 0 < n_firing < len(held_out):
        raise UserError(
            f"latent {latent} has {len(shown)} contexts to show, {n_firing} held-out ones in which it fires and "
            f"{len(held_out) - n_firing} in which it is silent; detection needs some of each, so give the store more text"
        )
    label = store.labels.get(latent)
    task = DetectionTask(label, shown, [one.example.tokens for one in held_out])
    by_token = DetectionTask(
        label, [_by_token(store, one) for one in shown], [_by_token(store, one.example).tokens for one in held_out]
    )
    scorer = scorer or (words_of_label if label else None)
    return Detection(
        latent,
        label,
        n_firing,
        len(held_out) - n_firing,
        None if scorer is None else _score(scorer, task, held_out, store.info.n_groups),
        _score(token_baseline, by_token, held_out, store.info.n_groups),
    )


def _by_token(store: StoreQueries, example: Example) -> Example:
    """Return a context whose tokens have the texts of single tokens, which distinguish parts of characters."""
    start = example.position - example.peak
    ids = store.tensors.tokens[example.row, start : start + len(example.tokens)].tolist()
    return example._replace(tokens=tuple(store.vocabulary[i] for i in ids))


def _score(scorer: Scorer, task: DetectionTask, held_out: Sequence[HeldOut], n_groups: int) -> Score:
    """Return the score of a scorer."""
    given = [float(value) for value in scorer(task)]
    if len(given) != len(held_out) or not all(map(math.isfinite, given)):
        raise UserError(f"a scorer must return {len(held_out)} finite numbers, one for each context; this one returned {given}")
    firing = [value for value, one in zip(given, held_out, strict=True) if one.group is not None]
    silent = [value for value, one in zip(given, held_out, strict=True) if one.group is None]
    pairs = [(high > low) + 0.5 * (high == low) for high in firing for low in silent]
    loud, quiet = [value >= FIRES for value in firing], [value < FIRES for value in silent]

    def recall(group: int) -> float | None:
        chosen = [value >= FIRES for value, one in zip(given, held_out, strict=True) if one.group == group]
        return _mean(chosen) if chosen else None

    return Score(
        auroc=_mean(pairs),
        balanced_accuracy=(_mean(loud) + _mean(quiet)) / 2,
        recall_by_group=tuple(map(recall, range(n_groups))),
        recall_of_top=recall(TOP),
    )


def _mean(values: Sequence[float | int]) -> float:
    return sum(values) / len(values)
