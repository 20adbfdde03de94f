"""The answers of a feature store: plain Python, one latent at a time."""

from collections.abc import Sequence
from typing import NamedTuple

from saelens_lite.features.html import render
from saelens_lite.features.rows import ExampleRow, GroupRate


class Example(NamedTuple):
    """A context and a latent's activation at each of its tokens; tokens[peak] is at position `position` of row `row`."""

    tokens: tuple[str, ...]
    values: tuple[float, ...]
    peak: int
    value: float
    row: int
    position: int


class ExampleGroup(NamedTuple):
    """Contexts drawn from the activations of a latent between `low` and `high`, which are `share` of all its activations."""

    low: float
    high: float
    share: float
    examples: list[Example] | list[ExampleRow]


class Partner(NamedTuple):
    """A latent that fires together with another on `count` tokens; `pmi` is their pointwise mutual information in nats."""

    latent: int
    count: int
    pmi: float


class PositionBin(NamedTuple):
    """The share of the tokens at positions `first` to `last` on which a latent fires, and its mean activation on these."""

    first: int
    last: int
    firing_rate: float
    mean_activation: float


class LatentSummary(NamedTuple):
    """Everything about one latent.

    Mean, standard deviation, skew and excess kurtosis are of the activations above zero. Bin j of the histogram counts
    activations in [j · bin_width, (j + 1) · bin_width); the last bin also counts the largest.
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
    rates: Sequence[GroupRate] = ()  # the groups of rows in which it fires

    def _repr_html_(self) -> str:
        """Return the figures, histogram, tokens and contexts as HTML, with all but the strongest contexts collapsed."""
        groups = [("strongest", self.examples)]
        groups += [
            (f"{group.low:.3g} to {group.high:.3g}, {group.share:.0%} of its activations", group.examples)
            for group in self.groups
        ]
        groups.append(("drawn from all", self.random))
        unit = "row" if any(isinstance(example, ExampleRow) for example in self.examples) else "token"
        groups = [group for group in groups if group[1]]
        return render("features", "latent.html.j2", latent=self, groups=groups, unit=unit)
