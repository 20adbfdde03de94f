"""Results and their tables: one look in terminals, notebooks and data frames."""

import re
import shutil
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from io import StringIO
from typing import TYPE_CHECKING, Any

from saelens_lite.errors import ConfigError
from saelens_lite.terminal import console, visible

if TYPE_CHECKING:
    from pandas import DataFrame
    from rich.table import Table
    from rich.text import Text

WIDTH = 80  # columns of a result as plain text


class Result:
    """Base of results: `print`, `rich.print` and notebooks show the table, and `to_frame` returns the rows.

    A result supplies `table`, its form for people, and `columns`, its numbers in full.
    """

    def table(self) -> Any:
        """Return the result as a rich table, or as a rich group of texts and tables."""
        raise NotImplementedError(f"{type(self).__name__} must define table()")

    def columns(self) -> dict[str, list[Any]]:
        """Return the rows of the result, column by column."""
        raise NotImplementedError(f"{type(self).__name__} must define columns()")

    def to_frame(self) -> "DataFrame":
        """Return the rows of the result as a pandas DataFrame.

        Raises:
            ConfigError: pandas is not installed.
        """
        try:
            from pandas import DataFrame
        except ImportError:
            raise ConfigError("to_frame needs pandas: pip install pandas") from None
        return DataFrame(self.columns())

    def __str__(self) -> str:
        return as_text(self.table())

    def __rich__(self) -> Any:
        return self.table()

    def _repr_html_(self) -> str:
        return as_html(self.table())


def columns_of(kind: type, rows: Sequence[Any]) -> dict[str, list[Any]]:
    """Return the fields of named tuples of one kind, column by column."""
    return {name: [getattr(row, name) for row in rows] for name in kind._fields}


def as_text(shown: Any) -> str:
    """Return a rich renderable as plain text of 80 columns."""
    stream = StringIO()
    console(stream, width=WIDTH).print(shown)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()).strip("\n")


def as_html(shown: Any) -> str:
    """Return a table of `grid`, a text, or a group of these as HTML. All text is escaped."""
    from rich.console import Group
    from rich.table import Table

    if isinstance(shown, Group):
        return "".join(map(as_html, shown.renderables))
    if not isinstance(shown, Table):
        lines = [escape(visible(line)) for line in str(shown).splitlines()]
        return f"<p>{'<br>'.join(lines)}</p>" if lines else ""

    def line(kind: str, cells: Iterable[Any]) -> str:
        return f"<tr>{''.join(f'<{kind}>{escape(visible(str(cell)))}</{kind}>' for cell in cells)}</tr>"

    titles = [column.header for column in shown.columns]
    head = line("th", titles) if any(map(str, titles)) else ""
    rows = "".join(line("td", cells) for cells in zip(*(column.cells for column in shown.columns), strict=True))
    return f"{as_html(shown.title or '')}<table>{head}{rows}</table>{as_html(shown.caption or '')}"


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
    return names if width is None else [broken(name, width) for name in names]


def broken(name: str, width: int) -> str:
    """Break a name into lines of at most `width` characters where a word of it ends. A longer word stays whole."""
    lines = [""]
    for word in re.findall(r"[^/_.\-]*[/_.\-]*", name):
        if word and lines[-1] and len(lines[-1] + word) > width:
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
    around = {name: Text(text, no_wrap=False, overflow="fold") for name, text in (("title", title), ("caption", caption))}
    table = Table(box=SIMPLE_HEAD, **around, **left, **settings)
    for name in titles:
        table.add_column(Text(name), **column(name))
    for row in rows:
        if row is None:
            table.add_section()
        else:
            table.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in row))
    return table


def legend(about: Mapping[int, Any]) -> "Table":
    """Return a rich table of latents with what a feature store has about them: largest activation, label, promoted token."""
    return grid(
        ("latent", "max", "about"),
        [(str(latent), f"{one.max:.3g}", one.words) for latent, one in about.items()],
        column=lambda title: {"justify": "left" if title == "about" else "right", "overflow": "fold"},
        collapse_padding=True,
    )


def facts(rows: "Iterable[tuple[str, Text]]") -> "Table":
    """Return a rich table of names and values, without a head."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(name, style="dim"), value)
    return table
