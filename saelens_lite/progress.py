"""A progress bar with the remaining time, shown only on a terminal or in a notebook, and by the first of several processes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from saelens_lite.processes import rank
from saelens_lite.terminal import console, visible

LENGTH_OF_TIMES = 32  # of "/ 0:00:00 left: 0:00:00", the spaces between the parts, and a bar of 4


def shortened(text: str, length: int) -> str:
    """Cut a text that is longer than `length`."""
    return text if len(text) <= length else text[: max(length - 1, 0)] + "…" * (length > 0)


@contextmanager
def progress_bar(what: str, total: int | None, unit: str = "tokens") -> Iterator[Callable[[int, str], None]]:
    """Yield `advance(n, note)`, which moves the bar by n units and shows a short note. total None: unknown length."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.table import Column

    def whole() -> Column:
        return Column(no_wrap=True)  # a narrow terminal shortens the bar, not the numbers

    place = console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(table_column=whole()),
        TextColumn(unit),
        TimeElapsedColumn(table_column=whole()),
        *([] if total is None else [TextColumn("left:"), TimeRemainingColumn(table_column=whole())]),
        TextColumn("{task.fields[note]}", markup=False),
    )
    shown = (place.is_terminal or place.is_jupyter) and rank() == 0
    numbers = 2 * len(f"{total or 10**9}") + len(unit) + LENGTH_OF_TIMES
    what = shortened(visible(what), place.width - numbers)
    room = place.width - numbers - len(what)
    with Progress(*columns, console=place, disable=not shown, transient=True) as bar:
        task = bar.add_task(what, total=total, note="")

        def advance(n: int, note: str = "") -> None:
            bar.update(task, advance=n, note=shortened(visible(note), room))

        yield advance
