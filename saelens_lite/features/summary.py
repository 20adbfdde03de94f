"""The answers of a feature store: plain Python, one latent at a time."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from saelens_lite.features.explaining.scores import LabelScore
from saelens_lite.features.html import quoted, render, short, visible
from saelens_lite.features.label import origin_of
from saelens_lite.features.label_scores import in_words
from saelens_lite.features.rows import ExampleRow, GroupRate
from saelens_lite.tables import Result, columns_of, facts

if TYPE_CHECKING:
    from rich.text import Text

LINE = 68  # columns of a line of tokens
BEFORE, AFTER = 38, 29  # columns of a terminal for a context before its peak, and from the peak on


class Example(NamedTuple):
    """A context and a latent's activation at each of its tokens; tokens[peak] is at position `position` of row `row`.

    Of several models, `parts` says how much each model's activation contributes to the latent's pre-activation at the peak.
    """

    tokens: tuple[str, ...]
    values: tuple[float, ...]
    peak: int
    value: float
    row: int
    position: int
    parts: dict[str, float] | None = None


class ExampleGroup(NamedTuple):
    """Contexts drawn from the activations of a latent between `low` and `high`, which are `share` of all its activations."""

    low: float
    high: float
    share: float
    examples: list[Example] | list[ExampleRow]


class Partner(NamedTuple):
    """A latent that fires together with another on `count` tokens; `pmi` is their pointwise mutual information in nats.

    In a store of very many tokens, `count` is of a sample of them: `StoreInfo.partner_tokens`.
    """

    latent: int
    count: int
    pmi: float


class PositionBin(NamedTuple):
    """The share of the tokens at positions `first` to `last` on which a latent fires, and its mean activation on these."""

    first: int
    last: int
    firing_rate: float
    mean_activation: float


class ModelSummary(NamedTuple):
    """One of several models in a latent: the norm of its own direction (0 if it has none), its mean part in the pre-activation
    where the latent fires, the tokens that the direction promotes and suppresses, and the contexts with the largest parts.
    """

    model: str
    norm: float
    mean_part: float
    promoted: list[tuple[str, float]]
    suppressed: list[tuple[str, float]]
    examples: list[Example]

    @property
    def words(self) -> str:
        """The numbers and the promoted tokens in words."""
        promotes = ", ".join(quoted(token) for token, _ in self.promoted[:3])
        return f"norm {short(self.norm)}; adds {short(self.mean_part)} on average" + f"; promotes {promotes}" * bool(promotes)


class About(NamedTuple):
    """The meaning and the scale of a latent: its label, the token it promotes most, and its largest activation in the store."""

    label: str | None
    promoted: str | None
    max: float

    @property
    def words(self) -> str:
        """The label and the promoted token in one line; empty without both."""
        promotes = None if self.promoted is None else f"promotes {quoted(self.promoted)}"
        return "; ".join(visible(known) for known in (self.label, promotes) if known)


@dataclass(frozen=True)
class LatentSummary(Result):
    """Everything about one latent. `print` shows it, and `to_frame` returns its strongest contexts.

    Mean, standard deviation, skew and excess kurtosis are of the activations above zero. Bin j of the histogram counts
    activations in [j · bin_width, (j + 1) · bin_width); the last bin also counts the largest. `similar` has the latents with
    the nearest directions and their cosines. `models` describes each of several models. Of two with directions of their own,
    delta_norm is 0 if only the second has one, 1 if only the first, and `cosine` is between the two. `scores` are those of the
    label.
    """

    latent: int
    label: str | None
    count: int
    density: float
    max: float
    mean: float
    std: float
    skew: float
    kurtosis: float
    histogram: list[int]
    bin_width: float
    promoted: list[tuple[str, float]]
    suppressed: list[tuple[str, float]]
    examples: list[Example] | list[ExampleRow]
    groups: list[ExampleGroup]
    random: list[Example] | list[ExampleRow]
    positions: list[PositionBin]
    partners: list[Partner]
    stability: float | None
    similar: list[tuple[int, float]]
    rates: Sequence[GroupRate] = ()  # the groups of rows in which it fires
    models: Sequence[ModelSummary] = ()
    delta_norm: float | None = None
    cosine: float | None = None
    scores: Sequence[LabelScore] = ()

    @property
    def label_origin(self) -> str:
        """The author and the source of the label; empty for your own label."""
        return origin_of(self.label)

    @property
    def score_lines(self) -> dict[str, str]:
        """The scores of the label in words, by kind, beside their controls."""
        return {one.kind: in_words(one) for one in self.scores}

    @property
    def unit(self) -> str:
        """The word for what the latent fires on: token, or row of activations without a text."""
        return "row" if any(isinstance(example, ExampleRow) for example in self.examples) else "token"

    def columns(self) -> dict[str, list[Any]]:
        """Return the strongest contexts or rows, column by column."""
        if self.unit == "row":
            return columns_of(ExampleRow, self.examples)
        return {
            "activation": [example.value for example in self.examples],
            "row": [example.row for example in self.examples],
            "position": [example.position for example in self.examples],
            "token": [example.tokens[example.peak] for example in self.examples],
            "context": ["".join(example.tokens) for example in self.examples],
        }

    def table(self) -> Any:
        """Return the figures, the tokens and the strongest contexts for a terminal, with the firing token (or row) in « »."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        contexts = Table.grid(padding=(0, 1))
        for justify in ("right", "left"):
            contexts.add_column(justify=justify, no_wrap=True)
        for example in self.examples:
            before, after = around_peak(example, BEFORE, AFTER)
            padded = Text(" " * (BEFORE - before.cell_len)) + before + after  # one column, so that no space is lost or added
            contexts.add_row(Text(f"  {short(example.value)} "), padded)
        rows = [(f"latent {self.latent}", Text(visible(self.label or "no label"), style="bold" if self.label else "dim"))]
        return Group(facts(rows + self._facts()), *([Text(""), contexts] if self.examples else []))

    def _facts(self) -> "list[tuple[str, Text]]":
        """Return the names and values of the lines above the contexts."""
        from rich.text import Text

        fires = f"{self.count:,} {self.unit}s ({100 * self.density:.3g} %); largest {short(self.max)}, mean {short(self.mean)}"
        if self.stability is not None:
            fires += f"; stability {self.stability:.2f}"
        compared = {"Δ norm": self.delta_norm, "cosine": self.cosine}
        lists = {
            "in two models": "; ".join(f"{name} {x:.2f}" for name, x in compared.items() if x is not None),
            **{f"{visible(one.model)}": one.words if self.count else "" for one in self.models},
            "label by": self.label_origin and visible(self.label_origin),
            **(self.score_lines or {"score": "not scored" if self.label else ""}),
            "fires on": fires if self.count else "nothing in the store",
            "promotes": _in_lines(quoted(token) for token, _ in self.promoted),
            "suppresses": _in_lines(quoted(token) for token, _ in self.suppressed),
            "similar": ", ".join(f"{latent} ({cosine:.2f})" for latent, cosine in self.similar),
            "fires with": ", ".join(str(partner.latent) for partner in self.partners),
            "in groups": ", ".join(f"{visible(rate.group)} ({100 * rate.firing_rate:.3g} %)" for rate in self.rates),
        }
        return [(name, Text(text)) for name, text in lists.items() if text]

    def _repr_html_(self) -> str:
        """Return the figures, histogram, tokens and contexts as HTML, with all but the strongest contexts collapsed."""
        groups = [("strongest", self.examples)]
        groups += [
            (f"{group.low:.3g} to {group.high:.3g}, {group.share:.0%} of its activations", group.examples)
            for group in self.groups
        ]
        groups.append(("drawn from all", self.random))
        groups = [group for group in groups if group[1]]
        groups += [(f"{one.model} adds most", one.examples) for one in self.models if one.examples]
        return render("features", "latent.html.j2", latent=self, groups=groups, unit=self.unit)


def _in_lines(words: Iterable[str]) -> str:
    """Join words that may hold spaces, and break lines only between them."""
    lines = [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + len(word) >= LINE:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return "\n".join(lines)


def around_peak(example: Example | ExampleRow, before: int, after: int) -> "tuple[Text, Text]":
    """Return the parts of a context before its peak and from its peak on, in one line and cut to widths in columns.

    The peak, or the name of a row, is in « ». Tokens on which the latent fires are coloured.
    """
    from rich.text import Text

    if isinstance(example, ExampleRow):
        name = Text(f"«{visible(example.name)}»", style="bold yellow")
        name.truncate(before + after, overflow="ellipsis")
        return Text(), name + Text("" if example.group is None else f"  {visible(example.group)}")
    left, right = Text(), Text()
    for place, (token, value) in enumerate(zip(example.tokens, example.values, strict=True)):
        shown = visible(token)
        if place == example.peak:
            spaces = len(shown) - len(shown.lstrip(" "))
            left.append(shown[:spaces])
            right.append(f"«{shown[spaces:]}»", style="bold yellow")
        else:
            (left if place < example.peak else right).append(shown, style="yellow" if value else "")
    if left.cell_len > before:
        left = left[-before:]
        while left.cell_len > before - 1:  # characters of two columns
            left = left[1:]
        left = Text("…") + left
    right.truncate(after, overflow="ellipsis")
    return left, right
