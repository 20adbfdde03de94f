"""Tables for terminals and notebooks, all in the same style."""

import re
import shutil
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text


def terminal_width() -> int:
    """Return the number of columns of the terminal, or 80."""
    return shutil.get_terminal_size().columns


def wrapped(text: str) -> str:
    """Break a text into lines that fit the terminal."""
    return textwrap.fill(text, max(terminal_width() - 1, 20), break_long_words=False, break_on_hyphens=False)


def short_names(paths: Sequence[str], width: int | None = None) -> list[str]:
    """Return names that tell paths apart: without the folders that all of them share, and without a last folder "dictionary".

    A single path keeps its last folder. With `width`, longer names are broken into lines after "/", "_", "-" or ".".
    """
    parts = [re.split(r"[/\\]+", path.rstrip("/\\")) for path in paths]
    if all(len(one) > 1 and one[-1] == "dictionary" for one in parts):
        parts = [one[:-1] for one in parts]
    if len(parts) == 1:
        parts = [parts[0][-1:]]
    while parts and min(map(len, parts)) > 1 and len({one[0] for one in parts}) == 1:
        parts = [one[1:] for one in parts]
    names = ["/".join(one) for one in parts]
    return names if width is None else [_broken(name, width) for name in names]


def _broken(name: str, width: int) -> str:
    """Break a name into lines of at most `width` characters where a word of it ends. A longer word stays whole."""
    lines = [""]
    for word in re.findall(r"[^/_.\-]*[/_.\-]*", name):
        if lines[-1] and len(lines[-1] + word) > width:
            lines.append("")
        lines[-1] += word
    return "\n".join(lines)


def grid(
    titles: Iterable[str],
    rows: "Iterable[Sequence[str | Text] | None]",
    *,
    title: str = "",
    caption: str = "",
    column: Callable[[str], dict[str, Any]] = lambda title: {},
    **settings: Any,
) -> "Table":
    """Return a rich table. Text in it is not parsed as markup.

    Args:
        rows: the cells of each row; None draws a line below the row before it.
        column: returns the options of `rich.table.Table.add_column` for the column of a title.
        settings: options of `rich.table.Table`.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    left = {"title_justify": "left", "caption_justify": "left"}
    table = Table(box=SIMPLE_HEAD, title=Text(title), caption=Text(caption), **left, **settings)
    for name in titles:
        table.add_column(Text(name), **column(name))
    for row in rows:
        if row is None:
            table.add_section()
        else:
            table.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in row))
    return table
