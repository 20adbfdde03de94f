"""Text out of files in Markdown, where it is text and nothing else: no HTML, link, image, section, row or column."""

from typing import Any


def one_line(value: Any) -> str:
    """Return a value as text in one line; characters that do not show are named."""
    return _shown(value).replace("<", "&lt;").replace("](", "]\\(").replace("`", "&#96;")


def cell(value: Any) -> str:
    """Return a value as a cell of a table."""
    return one_line(str(value).replace("\\", "\\\\")).replace("|", "\\|")


def code(value: Any) -> str:
    """Return a value between backticks."""
    return f"`{_shown(value).replace('`', chr(39)) or ' '}`"


def _shown(value: Any) -> str:
    text = " ".join(str(value).split())
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)
