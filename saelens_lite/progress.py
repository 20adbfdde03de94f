"""A progress bar with the remaining time, shown only on a terminal or in a notebook."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from saelens_lite.terminal import console, visible


@contextmanager
def progress_bar(what: str, total: int | None, unit: str = "tokens") -> Iterator[Callable[[int, str], None]]:
    """Yield `advance(n, note)`, which moves the bar by n units and shows a short note. total None: unknown length."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    place = console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        *([] if total is None else [TextColumn("left:"), TimeRemainingColumn()]),
        TextColumn("{task.fields[note]}", markup=False),
    )
    shown = place.is_terminal or place.is_jupyter
    with Progress(*columns, console=place, disable=not shown, transient=True) as bar:
        task = bar.add_task(visible(what), total=total, note="")

        def advance(n: int, note: str = "") -> None:
            bar.update(task, advance=n, note=visible(note))

        yield advance
