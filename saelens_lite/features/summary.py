"""What a feature store answers with: plain Python, one latent at a time."""

from typing import NamedTuple

from saelens_lite.features.html import render


class Example(NamedTuple):
    """A context, and a latent's activation at each of its tokens; tokens[peak] stands at `position` of row `row`."""

    tokens: tuple[str, ...]
    values: tuple[float, ...]
    peak: int
    value: float
    row: int
    position: int


class ExampleGroup(NamedTuple):
    """Contexts drawn from the activations of a latent from `low` to `high`, which are this share of all of them."""

    low: float
    high: float
    share: float
    examples: list[Example]


class Partner(NamedTuple):
    """A latent that fires together with another one on `count` tokens; `pmi` says how much more often than by chance (nats)."""

    latent: int
    count: int
    pmi: float


class PositionBin(NamedTuple):
    """On what share of the tokens at positions `first` to `last` a latent fires, and how strongly in the mean where it does."""

    first: int
    last: int
    firing_rate: float
    mean_activation: float


class LatentSummary(NamedTuple):
    """One latent. Bin j of the histogram counts activations in [j · bin_width, (j + 1) · bin_width), the last also the largest;
    mean, standard deviation, skew and excess kurtosis are those of the activations above zero."""

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
    examples: list[Example]
    groups: list[ExampleGroup]
    random: list[Example]
    positions: list[PositionBin]
    partners: list[Partner]
    stability: float | None

    def _repr_html_(self) -> str:
        """Return the figures, histogram, tokens and contexts as HTML, with the groups folded below the strongest."""
        groups = [("strongest", self.examples)]
        groups += [
            (f"{group.low:.3g} to {group.high:.3g}, {group.share:.0%} of its activations", group.examples)
            for group in self.groups
        ]
        groups.append(("drawn from all", self.random))
        return render("features", "latent.html.j2", latent=self, groups=[(title, found) for title, found in groups if found])
