"""Tables for terminals and notebooks, all in the same style."""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text


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
