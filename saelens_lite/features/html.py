"""Shared parts of the notebook views: templates that escape all text, visible whitespace, shades for light and dark."""

from functools import partial
from typing import Any
from unicodedata import category

from saelens_lite.tokens.display import PART

MARKS = {"\n": "⏎", "\t": "⇥", "\r": "␍", "\u00a0": "␣"}  # as in the dashboard
WARM, COLD = "240, 130, 0", "40, 120, 255"  # positive, negative
MOST = 0.65  # opacity of the strongest shade, on which the notebook's own text colour stays readable


def render(part: str, template: str, **values: Any) -> str:
    """Return a template of a part of the package ("features", "views") filled with values, all text escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("saelens_lite", part)
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.globals["zip"] = partial(zip, strict=True)
    environment.filters |= {"visible": visible, "shade": shade, "short": short}
    return environment.get_template(template).render(values)


def visible(token: str) -> str:
    """Return a token with all characters visible.

    Characters that are invisible, or that change how others look, are named. In a token of spaces only, each space is a dot. A
    combining mark at the beginning gets a dotted circle. A token without text, whose character a later token completes, is two
    dots.
    """
    if not token:
        return PART
    shown = "".join(
        char if char.isprintable() else MARKS.get(char) or char.encode("unicode_escape").decode("ascii") for char in token
    )
    if token.isspace():
        return shown.replace(" ", "·")
    return "◌" + shown if category(shown[:1] or " ").startswith("M") else shown


def quoted(token: str) -> str:
    """Return a token in visible form and in quotation marks, which show where it begins and ends."""
    return f"'{visible(token)}'" if token else PART


def shade(share: float) -> str:
    """Return a CSS background: warm for positive shares, cold for negative ones, strongest at 1 and −1."""
    strength = min(abs(share), 1.0) * MOST
    return f"background: rgba({COLD if share < 0 else WARM}, {strength:.2f})"


def short(value: float) -> str:
    """Return a number in three significant digits."""
    return f"{value:.3g}"
