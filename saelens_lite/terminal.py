"""Safe text for a terminal. Names from files can hold characters that move the cursor, hide text or reorder it."""

import json
from io import StringIO
from typing import TYPE_CHECKING, Any
from unicodedata import category

if TYPE_CHECKING:
    from rich.console import Console

OBEYED = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}  # Unicode categories of characters without a visible shape


def visible(text: str) -> str:
    """Replace characters that control a terminal by \\u and their number.

    These are control characters except line feed and tab, direction marks such as U+202E, which reorders the text after it, and
    characters without width. JSON stays the same JSON.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(char if char in "\n\t" or category(char) not in OBEYED else _escaped(char) for char in text)


def _escaped(char: str) -> str:
    return f"\\u{ord(char):04x}" if ord(char) < 1 << 16 else json.dumps(char)[1:-1]


def console(file: StringIO | None = None, *, stderr: bool = False, width: int | None = None) -> "Console":
    """Return a rich console for tables and results. It shows markup and control characters as text.

    Args:
        file: Stream for plain text without colours; default: the terminal.
    """
    from rich.console import Console
    from rich.text import Text

    class Visible(Console):
        def render_str(self, text: str, **settings: Any) -> Any:
            return super().render_str(visible(text), **settings)  # before rich drops some control characters

        def render(self, renderable: Any, *args: Any, **settings: Any) -> Any:
            if isinstance(renderable, Text):
                renderable = renderable.copy()
                renderable.plain = visible(renderable.plain)
            for segment in super().render(renderable, *args, **settings):
                yield segment if segment.control else segment._replace(text=visible(segment.text))

    plain = {} if file is None else {"file": file, "color_system": None, "force_terminal": False}
    return Visible(stderr=stderr, width=width, highlight=False, soft_wrap=True, markup=False, emoji=False, **plain)
