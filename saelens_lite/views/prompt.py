"""The prompt view: the latents that fire at each token of a text, in one of three orders.

activation     the code itself. Latents that are strong everywhere come first.
relative       code / largest code of the latent in a feature store. Unusual values come first.
attribution    effect on a metric of the model's output. Important latents come first.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelens_lite.dictionary import Dictionary
from saelens_lite.errors import ConfigError, NonFiniteError, near_matches
from saelens_lite.features import FeatureStore
from saelens_lite.features.html import quoted, render, short, visible
from saelens_lite.features.summary import About
from saelens_lite.interventions import attribute
from saelens_lite.interventions.attribution import WAYS
from saelens_lite.interventions.metrics import name_of
from saelens_lite.interventions.site import CountedRow, Site
from saelens_lite.model import AnyModel, LanguageModel, Models
from saelens_lite.ports import PortNames
from saelens_lite.tables import Result, columns_of, grid
from saelens_lite.tokens import Given, TokenRows

ORDERS = ("activation", "relative", "attribution")


class PromptRow(NamedTuple):
    """A latent that fires at a token.

    `relative` is activation / largest activation in the store. `promoted` is the token whose logit the latent raises most.
    These and `label` are None without a store or if the store lacks them. `attribution` is None unless it was requested.
    """

    position: int
    token: str
    latent: int
    activation: float
    relative: float | None
    attribution: float | None
    label: str | None
    promoted: str | None


@dataclass(frozen=True)
class PromptView(Result):
    """The latents that fire at each token: `rows` by position, best first, at most `top` per position.

    A notebook shows it as shaded tokens, `rich.print` as a table. `metric` names the metric of the attributions.
    """

    model: str
    hook: str
    by: str
    metric: str | None
    tokens: tuple[str, ...]
    rows: tuple[PromptRow, ...]

    def score(self, row: PromptRow) -> float:
        """Return the value that ranks a row; 0 if its latent never fired in the store."""
        return getattr(row, self.by) or 0.0

    def at(self, position: int) -> list[PromptRow]:
        """Return the rows of one token, best first."""
        return self._lines[position]

    @cached_property
    def _lines(self) -> list[list[PromptRow]]:
        """The rows of each token."""
        lines: list[list[PromptRow]] = [[] for _ in self.tokens]
        for row in self.rows:
            lines[row.position].append(row)
        return lines

    def strongest(self, n: int = 10) -> list[PromptRow]:
        """Return the n best rows of all tokens, best first."""
        return sorted(self.rows, key=lambda row: -abs(self.score(row)))[:n]

    @property
    def shades(self) -> list[float]:
        """The best score at each token as a share of the best of all tokens: −1 to 1, 0 if no latent fires."""
        best = [self.score(rows[0]) if rows else 0.0 for rows in self._lines]
        largest = max(map(abs, best), default=0.0) or 1.0
        return [score / largest for score in best]

    @property
    def title(self) -> str:
        """Title of the view."""
        ranked = {"relative": "activation / largest activation", "attribution": f"effect on {self.metric}"}
        return f"{self.model}, {self.hook}: latents by {ranked.get(self.by, self.by)}"

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain data."""
        facts = {"model": self.model, "hook": self.hook, "by": self.by, "metric": self.metric, "tokens": list(self.tokens)}
        return facts | {"rows": [row._asdict() for row in self.rows]}

    def _repr_html_(self) -> str:
        lines = list(zip(map(visible, self.tokens), self.shades, self._lines, strict=True))
        return render("views", "prompt.html.j2", view=self, lines=lines, words=words, about=about_row, shown=_shown)

    def columns(self) -> dict[str, list[Any]]:
        """Return the rows, column by column."""
        return columns_of(PromptRow, self.rows)

    def table(self) -> Any:
        """Return a rich table of the latents at each token."""
        shown = [name for name in ORDERS if any(getattr(row, name) is not None for row in self.rows)] or ["activation"]
        described = any(row.label or row.promoted for row in self.rows)
        lines: list[tuple[str, ...] | None] = []
        for rows in self._lines:
            for i, row in enumerate(rows):
                place = (str(row.position), quoted(row.token)) if i == 0 else ("", "")
                numbers = [_shown(name, getattr(row, name)) for name in shown]
                lines.append((*place, str(row.latent), *numbers, *[about_row(row)] * described))
            lines += [None] if rows else []
        return grid(
            ("position", "token", "latent", *shown, *["about"] * described),
            lines,
            caption=visible(self.title),
            column=lambda title: {"justify": "left" if title in ("token", "about") else "right", "no_wrap": title != "about"},
            collapse_padding=True,
        )


def prompt_view(
    dictionary: Dictionary,
    lm: AnyModel | Mapping[str, LanguageModel],
    text: Given,
    by: str = "activation",
    *,
    attention_mask: Any = None,
    store: FeatureStore | None = None,
    metric: Any = None,
    way: str = "gradient",
    hook: str | None = None,
    ports: PortNames = None,
    in_model: str | None = None,
    top: int = 5,
) -> PromptView:
    """Return the latents that fire at each token of a text, at most `top` per token, best first.

    Only positions that the dictionary was trained on have latents.

    Args:
        text, attention_mask: one text or row of token ids, as `LanguageModel.to_tokens` takes them.
        by: order of the latents: "activation", "relative" or "attribution".
        store: feature store of this dictionary, for the largest activations, labels and promoted tokens.
        metric: metric of the attributions, as for `attribute`; default: "loss" if by="attribution", else no attributions.
        way: "gradient", "ablation" or "direct".
        ports, in_model: the ports and the model of the attributions, as for `attribute`.

    Raises:
        ConfigError: an unknown order or way, by="relative" without a store, a store of another dictionary, `top` below 1, or as
            for `attribute`.
        HookError, ShapeError, TextError: the model lacks the hook, a width does not fit, or the text is empty.
        NonFiniteError: codes or the metric are NaN or infinite.
    """
    for name, given, choices in (("by", by, ORDERS), ("way", way, WAYS)):
        if given not in choices:
            raise ConfigError(f"{name} = {given!r}; expected one of {', '.join(choices)}{near_matches(str(given), choices)}")
    if top < 1:
        raise ConfigError(f"top = {top}; expected 1 or more latents for each token")
    if by == "relative" and store is None:
        raise ConfigError("by='relative' needs the largest activation of each latent: give store=, a FeatureStore")
    if store is not None:
        store.info.check_text("a prompt view")
        store.info.check_dictionary(dictionary)
    site = Site(dictionary, lm, hook, ports=ports, in_model=in_model)
    rows = site.rows(text, attention_mask)
    if len(rows) != 1:
        raise ConfigError(f"a prompt view shows one row of text; {len(rows)} were given")
    metric = "loss" if by == "attribution" and metric is None else metric
    firing = _firing(site, rows[0], metric, way)
    relative = None
    if store is not None:
        relative = firing.activation / store.tensors.top_value[:, 0].index_select(0, firing.latent)  # infinite where it is 0
    score = {"activation": firing.activation, "relative": relative, "attribution": firing.attribution}[by]
    best = _best(firing.position, torch.where(score.isfinite(), score.abs(), -1), top)
    tokens = tuple((site.models if store is None else store).vocabulary.row(rows[0].tokens.tolist()))
    position, latent, activation = (x[best].tolist() for x in firing[:3])
    about = [None if store is None else store.about(i) for i in latent]
    return PromptView(
        model=site.models.name,
        hook=site.reads,
        by=by,
        metric=None if metric is None else name_of(metric, site.lm) + _measured_at(site),
        tokens=tokens,
        rows=tuple(
            PromptRow(*cells)
            for cells in zip(
                position,
                [tokens[i] for i in position],
                latent,
                activation,
                _numbers(relative, best),
                _numbers(firing.attribution, best),
                [one and one.label for one in about],
                [one and one.promoted for one in about],
                strict=True,
            )
        ),
    )


class _Firing(NamedTuple):
    """The codes above zero of one row of text, on the CPU, positions ascending."""

    position: Int[Tensor, " n"]
    latent: Int[Tensor, " n"]
    activation: Float[Tensor, " n"]
    attribution: Float[Tensor, " n"] | None


def _measured_at(site: Site) -> str:
    """Return the ports at which effects were measured in one of several models, for the name of the metric."""
    return f" at {site.writes}" if isinstance(site.models, Models) else ""


def _firing(site: Site, row: CountedRow, metric: Any, way: str) -> _Firing:
    """Return the latents that fire at the counted positions and, with a metric, their effects."""
    reading = site.read(row)
    codes = reading.codes
    if not (torch.isfinite(reading.x).all() and torch.isfinite(codes.value).all()):
        raise NonFiniteError(f"{site.reads}: NaN or infinity among the activations or codes of the prompt")
    if metric is None:
        numbers, effect = (codes.row, codes.latent, codes.value.detach()), None
        keep = row.counted[codes.row] & codes.fires
    else:
        attribution = attribute(
            site.dictionary, site.models, TokenRows(row.tokens[None], row.counted[None]), metric,
            ablation=way == "ablation", hook=site.hook, ports=site.ports, in_model=site.in_model,
        )  # fmt: skip
        if way not in attribution.effects:
            raise ConfigError(f"way = {way!r}: direct effects need a hook on the residual stream, and {site.writes} is not")
        numbers, effect = (attribution.position, attribution.latent, attribution.activation), attribution.effects[way]
        keep = attribution.activation != 0
    return _Firing(*(x[keep].cpu() for x in numbers), None if effect is None else effect[keep].cpu())


def _best(position: Int[Tensor, " n"], score: Float[Tensor, " n"], top: int) -> Int[Tensor, " chosen"]:
    """Return the entries with the `top` largest scores of each position, by position, best first; ties by order."""
    order = score.argsort(descending=True, stable=True)
    order = order[position[order].argsort(stable=True)]
    place = position[order]
    rank = torch.arange(len(place)) - torch.searchsorted(place, place)
    return order[rank < top]


def _numbers(values: Float[Tensor, " n"] | None, chosen: Int[Tensor, " chosen"]) -> list[float | None]:
    """Return the chosen values, None for values that are missing or not finite."""
    if values is None:
        return [None] * len(chosen)
    return [x if math.isfinite(x) else None for x in values[chosen].tolist()]


def words(row: PromptRow) -> str:
    """Return the contents of a row in one line."""
    known = [f"latent {row.latent}", f"activation {short(row.activation)}"]
    if row.relative is not None:
        known.append(f"{row.relative:.0%} of its largest")
    if row.attribution is not None:
        known.append(f"attribution {row.attribution:+.3g}")
    return "; ".join([", ".join(known), *[about_row(row)] * bool(about_row(row))])


def about_row(row: PromptRow) -> str:
    """Return the label of a row's latent and its promoted token, if known."""
    return About(row.label, row.promoted, 0.0).words


def _shown(order: str, value: float | None) -> str:
    """Format a number of a row for a table."""
    form = {"activation": ".3g", "relative": ".0%", "attribution": "+.3g"}[order]
    return "" if value is None else format(value, form)
