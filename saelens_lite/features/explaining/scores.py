"""The score of an explanation: how well a judge who reads it tells where the latent fires, beside controls."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from saelens_lite.evaluation.sums import Metric
from saelens_lite.features.explaining.intervals import exceeds, mean_metric
from saelens_lite.features.html import visible
from saelens_lite.tables import Result, columns_of, grid, wrapped

if TYPE_CHECKING:
    from rich.table import Table

Kind = Literal["detection", "fuzzing"]
KINDS: tuple[Kind, ...] = get_args(Kind)
RESULTS = {  # fields of a score: their names for people
    "score": "the explanation",
    "hard": "… against the nearest latent",
    "by_tokens": "token baseline",
    "of_random_latent": "another latent's explanation",
    "shuffled": "its words in another order",
}
IN_TABLES = dict(zip(RESULTS.values(), ("label", "nearest", "tokens", "another's", "mixed"), strict=True))
LEGEND = (
    "Judged by the label; on contexts of the nearest latent (nearest); by the token baseline (tokens); by another latent's "
    "explanation (another's); by the label's words in another order (mixed)."
)
FLOORS = ("by_tokens", "of_random_latent")  # the controls that an explanation must exceed
SHOWN = 20  # latents in a table


class Judged(NamedTuple):
    """A judge's result on the contexts of a latent, with 95 % intervals over the contexts.

    `auroc` is the area under the ROC curve, and `balanced_accuracy` the mean of the accuracies on contexts in which the latent
    fires and in which not. `n_unusable` contexts got no answer, because it was missing, refused or not of the form asked for.
    They count as wrong, and in the AUROC as ranked last, behind the worst mistake. In a control, such a context counts as half
    right in both, so that a judge who fails there does not make the explanation look better.
    """

    auroc: Metric
    balanced_accuracy: Metric
    n_unusable: int = 0


class LabelScore(NamedTuple):
    """The score of one label of one latent, on contexts that its explainer did not see.

    Controls are on the same contexts. `by_tokens` is the token baseline, which says that the latent fires on the tokens at the
    peaks of the contexts shown. `of_random_latent` is the same judge, who reads another latent's explanation, drawn at random.
    These two are floors. For `shuffled` the judge reads the words of the explanation in another order. That is no floor: a good
    explanation in keywords scores as high. It says how much the sentence adds to its words. `hard` is the result with
    `n_hard` contexts in which the nearest latent fires in place of the silent ones. Each is None if it was not measured.

    `recall` is the share of firing contexts recognised, of the top ones first, then of each group, strongest first; None if no
    context is of it. `is_graded` is true if log-probabilities were offered, so that the AUROC is of graded answers.
    `made_elsewhere` is true if the label may come from the very contexts it is scored on: your own, an imported one, or one
    made from another store. `judge` is the name of the chat model, and `store` names the contexts (`StoreInfo.contexts`).
    """

    latent: int
    label: str
    kind: Kind
    judge: str
    n_firing: int
    n_silent: int
    score: Judged
    by_tokens: Judged | None = None
    of_random_latent: Judged | None = None
    shuffled: Judged | None = None
    hard: Judged | None = None
    n_hard: int = 0
    recall: tuple[float | None, ...] = ()
    is_graded: bool = False
    made_elsewhere: bool = False
    store: str = ""

    @property
    def floors(self) -> tuple[str, ...]:
        """The names of the floors that were measured."""
        return tuple(RESULTS[name] for name in FLOORS if getattr(self, name) is not None)

    @property
    def not_better_than(self) -> tuple[str, ...]:
        """The names of the floors that the AUROC does not exceed: the 95 % interval of the difference reaches zero."""
        floors = {RESULTS[name]: getattr(self, name) for name in FLOORS}
        return tuple(name for name, of in floors.items() if of is not None and not exceeds(self.score.auroc, of.auroc))


def by_floors(scores: Iterable[LabelScore]) -> dict[tuple[str, ...], list[LabelScore]]:
    """Return scores by the names of the floors that were measured beside them."""
    groups: dict[tuple[str, ...], list[LabelScore]] = {}
    for one in scores:
        groups.setdefault(one.floors, []).append(one)
    return groups


class Skipped(NamedTuple):
    """A latent that was not scored, and the reason. `kind` is None if that holds for all kinds."""

    latent: int
    kind: Kind | None
    reason: str


class Spread(NamedTuple):
    """One result over all latents: the mean with its 95 % interval, see `mean_metric`, and quantiles."""

    kind: Kind
    result: str
    n: int
    auroc: Metric
    lowest_tenth: float
    median: float
    highest_tenth: float
    balanced_accuracy: Metric
    n_unusable: int


@dataclass(frozen=True)
class Scores(Result):
    """The scores of labels in the order of latents, with those of the controls. `skipped` has the latents without, and why."""

    scores: tuple[LabelScore, ...]
    skipped: tuple[Skipped, ...]
    judge: str
    seed: int = 0

    def __iter__(self) -> Iterator[LabelScore]:
        return iter(self.scores)

    def __len__(self) -> int:
        return len(self.scores)

    def summary(self) -> list[Spread]:
        """Return the distribution of each result over the latents for which it was measured."""
        return [spread for kind in KINDS for name in RESULTS if (spread := self._spread(kind, name)) is not None]

    def _spread(self, kind: Kind, name: str) -> Spread | None:
        results = [of for one in self.scores if one.kind == kind and (of := getattr(one, name)) is not None]
        if not results:
            return None
        area = sorted(of.auroc.value for of in results)
        accuracy = [of.balanced_accuracy.value for of in results]
        return Spread(
            kind,
            RESULTS[name],
            len(results),
            mean_metric(area, self.seed),
            *(_quantile(area, share) for share in (0.1, 0.5, 0.9)),
            mean_metric(accuracy, self.seed),
            sum(of.n_unusable for of in results),
        )

    def columns(self) -> dict[str, list[Any]]:
        """Return the scores column by column; each metric has columns for its value and the ends of its interval."""
        plain = [name for name in LabelScore._fields if name not in RESULTS]
        columns = {name: values for name, values in columns_of(LabelScore, self.scores).items() if name in plain}
        for name in RESULTS:
            results = [getattr(one, name) for one in self.scores]
            for metric in ("auroc", "balanced_accuracy"):
                for end in Metric._fields:
                    values = [math.nan if of is None else getattr(getattr(of, metric), end) for of in results]
                    columns[f"{name}_{metric}" + f"_{end}" * (end != "value")] = values
            columns[f"{name}_n_unusable"] = [0 if of is None else of.n_unusable for of in results]
        return columns | {"not_better_than": [", ".join(one.not_better_than) for one in self.scores]}

    def table(self) -> Any:
        """Return the distributions beside those of the controls, then the first latents, then those that were not scored."""
        from rich.console import Group
        from rich.text import Text

        reasons = Counter((one.kind, one.reason) for one in self.skipped).most_common()
        lines = [f"{n:,} not scored{f' ({kind})' if kind else ''}: {visible(reason)}" for (kind, reason), n in reasons]
        parts = [self._distributions(), self._latents()] if self.scores else [f"no scores; judge: {visible(self.judge)}"]
        return Group(*parts, *map(Text, lines))

    def _distributions(self) -> "Table":
        spreads = self.summary()
        rows = [
            (
                of.kind if i == 0 or spreads[i - 1].kind != of.kind else "",
                IN_TABLES[of.result],
                f"{of.n:,}",
                _rounded(of.auroc),
                f"{of.lowest_tenth:.2f} {of.median:.2f} {of.highest_tenth:.2f}",
                _rounded(of.balanced_accuracy),
            )
            for i, of in enumerate(spreads)
        ]
        notes = [
            f"{sum(bool(one.not_better_than) for one in of):,} of {len(of):,} scores are not better than {' or '.join(floors)}."
            for floors, of in by_floors(self.scores).items()
            if floors
        ]
        if unusable := [f"{of.n_unusable:,} ({of.kind}, {of.result})" for of in spreads if of.n_unusable]:
            notes.append(f"Contexts without a usable answer: {', '.join(unusable)}.")
        if n := sum(one.made_elsewhere for one in self.scores):
            notes.append(f"{n:,} scores are of labels made elsewhere, which may have seen these contexts.")
        return grid(
            ("kind", "by", "n", "AUROC", "10 50 90 %", "accuracy"),
            rows,
            title=f"Scores of labels, means over n latents with 95 % intervals; judge: {visible(self.judge)}",
            caption="\n".join([wrapped(LEGEND), *notes]),
            column=lambda title: {"no_wrap": True},
            collapse_padding=True,
            pad_edge=False,
        )

    def _latents(self) -> "Table":
        rows = [
            (
                str(one.latent),
                one.kind,
                _rounded(one.score.auroc),
                *(
                    "–" if of is None else f"{of.auroc.value:.2f}" + "*" * (RESULTS[name] in one.not_better_than)
                    for name, of in ((name, getattr(one, name)) for name in FLOORS)
                ),
                visible(one.label),
            )
            for one in self.scores[:SHOWN]
        ]
        starred = any("*" in cell for row in rows for cell in row[3:5])
        notes = ["* the explanation is not better than this control"] if starred else []
        notes += [f"… and {len(self) - SHOWN:,} more"] if len(self) > SHOWN else []
        return grid(
            ("latent", "kind", "AUROC", "tokens", "another's", "label"),
            rows,
            caption="\n".join(notes),
            column=lambda title: {"overflow": "fold"} if title == "label" else {"no_wrap": True},
            collapse_padding=True,
        )

    def __repr__(self) -> str:
        return visible(f"Scores({len(self):,} by {self.judge}; {len(self.skipped):,} not scored)")


def _rounded(metric: Metric) -> str:
    """Return a metric to two decimals, with its interval."""
    return f"{metric.value:.2f}" + (f" [{metric.low:.2f}, {metric.high:.2f}]" if metric.has_interval else "")


def _quantile(ascending: Sequence[float], share: float) -> float:
    """Return a quantile of sorted values, between neighbours by interpolation."""
    place = share * (len(ascending) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ascending) - 1)
    return ascending[below] + (place - below) * (ascending[above] - ascending[below])
