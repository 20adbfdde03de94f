"""What the views in notebooks share: templates that escape everything, visible whitespace, shades that suit light and dark."""

from functools import partial
from typing import Any
from unicodedata import category

from saelens_lite.tokens.display import PART

MARKS = {"\n": "⏎", "\t": "⇥", "\r": "␍", "\u00a0": "␣"}  # as in the dashboard
WARM, COLD = "240, 130, 0", "40, 120, 255"  # what adds, what takes away
MOST = 0.65  # opacity of the strongest shade: text in the notebook's own colour stays readable on it


def render(part: str, template: str, **values: Any) -> str:
    """A template of a part of the package ("features", "views"), filled in; all text in it is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("saelens_lite", part)
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.globals["zip"] = partial(zip, strict=True)
    environment.filters |= {"visible": visible, "shade": shade, "short": short}
    return environment.get_template(template).render(values)


def visible(token: str) -> str:
    """Write a token so that all of it can be seen.

    Characters that do not show, or that change how others show, are named. Spaces of a token of nothing else are dots. A mark
    that would sit on the character before it gets a ring of its own. A token without text, whose character a later token
    completes, is two dots.
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
    """Write a token in visible form and in quotation marks, which show where it begins and ends."""
    return f"'{visible(token)}'" if token else PART


def shade(share: float) -> str:
    """A CSS background: the stronger the closer `share` is to 1 or, in the other colour, to −1."""
    strength = min(abs(share), 1.0) * MOST
    return f"background: rgba({COLD if share < 0 else WARM}, {strength:.2f})"


def short(value: float) -> str:
    """Three significant digits."""
    return f"{value:.3g}"
