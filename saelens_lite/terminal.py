"""Text on a terminal. Names out of files can hold characters that move the cursor, hide text or put it in another order."""

import json
from typing import TYPE_CHECKING, Any
from unicodedata import category

if TYPE_CHECKING:
    from rich.console import Console

OBEYED = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}  # Unicode categories of characters that have no shape of their own


def visible(text: str) -> str:
    """Replace characters that a terminal obeys instead of showing them by \\u and their number.

    These are control characters except line feed and tab, marks of direction such as U+202E, which reorders what it stands
    before, and characters without width. JSON that goes through here is still the same JSON.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(char if char in "\n\t" or category(char) not in OBEYED else _escaped(char) for char in text)


def _escaped(char: str) -> str:
    return f"\\u{ord(char):04x}" if ord(char) < 1 << 16 else json.dumps(char)[1:-1]


def console(*, stderr: bool = False) -> "Console":
    """Return where tables and results go: nothing in them is markup, and what would steer the terminal is shown instead."""
    from rich.console import Console
    from rich.text import Text

    class Visible(Console):
        def render_str(self, text: str, **settings: Any) -> Any:
            return super().render_str(visible(text), **settings)  # before rich leaves out some control characters

        def render(self, renderable: Any, *args: Any, **settings: Any) -> Any:
            if isinstance(renderable, Text):
                renderable = renderable.copy()
                renderable.plain = visible(renderable.plain)
            for segment in super().render(renderable, *args, **settings):
                yield segment if segment.control else segment._replace(text=visible(segment.text))

    return Visible(stderr=stderr, highlight=False, soft_wrap=True, markup=False, emoji=False)
