"""How well a label tells where a latent fires: contexts it has not been made from, some of which the latent fires in.

Half of the strongest contexts and of those drawn from each group of activations may be looked at; the other half is to be told
from contexts in which the latent is silent. Whatever a label scores means little unless it beats the tokens alone, so the token
baseline is always beside it.
Source: Paulo, Mallen, Juang and Belrose 2024, Automatically interpreting millions of features in large language models,
arXiv:2410.13928, detection scoring.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from saelens_lite.errors import UserError
from saelens_lite.features.queries import StoreQueries
from saelens_lite.features.summary import Example

FIRES = 0.5  # from which score on a scorer says that the latent fires


class DetectionTask(NamedTuple):
    """What a scorer gets: a label, contexts in which the latent fires, and the contexts to be judged, as tokens."""

    label: str | None
    shown: list[Example]
    contexts: list[tuple[str, ...]]


@runtime_checkable
class Scorer(Protocol):
    """Judges contexts; a client of a language model is one, and so is any function of this form."""

    def __call__(self, task: DetectionTask) -> Sequence[float]:
        """For each context from 0 (the latent is silent) to 1 (it fires somewhere in it); from 0.5 on it says that it fires."""


class Score(NamedTuple):
    """How well contexts were told apart: area under the ROC curve, mean of the accuracies on firing and silent contexts, and
    the share found of the firing contexts of each group of activations, the strongest first, then of the top ones."""

    auroc: float
    balanced_accuracy: float
    recall_by_group: tuple[float | None, ...]
    recall_of_top: float | None


class Detection(NamedTuple):
    """A label's score and that of the token baseline on the same contexts; without label or scorer only the latter."""

    latent: int
    label: str | None
    n_firing: int
    n_silent: int
    score: Score | None
    baseline: Score


class _HeldOut(NamedTuple):
    """A context to be judged; `group` counts from the strongest, -1: of the top ones, None: the latent is silent."""

    example: Example
    group: int | None


TOP = -1


def token_baseline(task: DetectionTask) -> list[float]:
    """1 − 2⁻ⁿ for each context, n being the largest number of shown contexts at whose peak one of its tokens stands."""
    at_peaks = Counter(example.tokens[example.peak] for example in task.shown)
    return [1 - 0.5 ** max(at_peaks[token] for token in tokens) for tokens in task.contexts]


def words_of_label(task: DetectionTask) -> list[float]:
    """1 where a context contains a word of the label, else 0: what it has in quotation marks, or else any of its words of four
    letters or more."""
    label = task.label or ""
    quoted = re.findall(r"[\"'“‘«](.+?)[\"'”’»](?!\w)", label)
    words = [word.lower() for word in quoted or re.findall(r"\w{4,}", label)]
    return [float(any(word in "".join(tokens).lower() for word in words)) for tokens in task.contexts]


def detection(store: StoreQueries, latent: int, scorer: Scorer | None = None) -> Detection:
    """How well the label of a latent, read by a scorer (default: `words_of_label`), tells where it fires.

    Raises:
        UserError: no such latent; too few contexts in which it fires or is silent; a scorer that gives something else than a
            finite number a context.
    """
    shown, held_out = _split(store, latent)
    n_firing = sum(one.group is not None for one in held_out)
    if not shown or not 0 < n_firing < len(held_out):
        raise UserError(
            f"latent {latent} has {len(shown)} contexts to look at, {n_firing} more in which it fires and "
            f"{len(held_out) - n_firing} in which it is silent; detection needs some of each"
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
    """Return a context with the texts that its tokens have by themselves, which tell parts of characters apart."""
    start = example.position - example.peak
    ids = store.tensors.tokens[example.row, start : start + len(example.tokens)].tolist()
    return example._replace(tokens=tuple(store.vocabulary[i] for i in ids))


def _split(store: StoreQueries, latent: int) -> tuple[list[Example], list[_HeldOut]]:
    """Contexts to look at, and others to be judged in the order of the text, none of which overlaps with the former."""
    kinds = {TOP: store.top_examples(latent)}
    kinds |= {number: group.examples for number, group in enumerate(store.quantile_examples(latent))}
    shown = [example for examples in kinds.values() for example in examples[::2]]
    held_out = [_HeldOut(example, kind) for kind, examples in kinds.items() for example in examples[1::2]]
    held_out += [_HeldOut(example, None) for example in store.silent_examples(latent)]
    reach = sum(store.info.window)
    apart: dict[tuple[int, int], _HeldOut] = {}
    for one in held_out:
        row, position = one.example.row, one.example.position
        if not any(other.row == row and abs(other.position - position) <= reach for other in shown):
            apart.setdefault((row, position), one)
    return shown, [apart[place] for place in sorted(apart)]


def _score(scorer: Scorer, task: DetectionTask, held_out: Sequence[_HeldOut], n_groups: int) -> Score:
    """What a scorer achieves."""
    given = [float(value) for value in scorer(task)]
    if len(given) != len(held_out) or not all(map(math.isfinite, given)):
        raise UserError(f"a scorer gives a finite number for each of the {len(held_out)} contexts; this one gave {given}")
    firing = [value for value, one in zip(given, held_out, strict=True) if one.group is not None]
    silent = [value for value, one in zip(given, held_out, strict=True) if one.group is None]
    pairs = [(high > low) + 0.5 * (high == low) for high in firing for low in silent]
    found, quiet = [value >= FIRES for value in firing], [value < FIRES for value in silent]

    def recall(group: int) -> float | None:
        chosen = [value >= FIRES for value, one in zip(given, held_out, strict=True) if one.group == group]
        return _mean(chosen) if chosen else None

    return Score(
        auroc=_mean(pairs),
        balanced_accuracy=(_mean(found) + _mean(quiet)) / 2,
        recall_by_group=tuple(map(recall, range(n_groups))),
        recall_of_top=recall(TOP),
    )


def _mean(values: Sequence[float | int]) -> float:
    return sum(values) / len(values)
