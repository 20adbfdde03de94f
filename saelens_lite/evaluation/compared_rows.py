"""The rows of a table of several reports: numbers, marks, noise floors and notes."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from saelens_lite.evaluation.comparison import DIFFERS, FLOOR, SAME, Measured, NoiseFloors, noise_floors, not_told, shown
from saelens_lite.evaluation.replicates import COLUMNS
from saelens_lite.evaluation.splices import ByPart
from saelens_lite.evaluation.sums import Metric
from saelens_lite.ports import split_key

Row = tuple[str, ...]


@runtime_checkable
class Tabled(Measured, Protocol):
    """A report as far as tables read it."""

    controls: "dict[str, Tabled] | None"

    @property
    def parts(self) -> ByPart:
        """The metrics of each port, and of each model that has several of them."""


class ComparedRows(NamedTuple):
    """The head of a table, its rows, the rows below a line, and notes on the marks."""

    head: Row
    rows: list[Row]
    summary: list[Row]
    notes: str

    @property
    def all_rows(self) -> list[Row | None]:
        """All rows, with None for the line."""
        return [*self.rows, None, *self.summary] if self.summary else list(self.rows)


def compared_rows(reports: Mapping[str, Tabled], seeds: Mapping[str, Sequence[str]] | None = None) -> ComparedRows:
    """Return a row for each report, each of its controls, and each port of these, and the noise floors below them.

    A cell is the value ± half the interval of one of the main metrics. `seeds` is that of `noise_floors`.
    """
    known = {key for report in reports.values() for fit in (report.metrics, *report.parts.values()) for key in fit}
    columns = [key for key in COLUMNS if key in known or key == "frac_alive"]
    floors = noise_floors(reports, seeds) if len(reports) > 1 else None
    is_first_marked = floors is not None and not floors.has_seeds
    rows: list[Row] = []
    for name, report in reports.items():
        rows.append(_row(name, report.metrics, columns, floors.differing(name) if is_first_marked else (), DIFFERS))
        rows += _ports(report, columns)
        for control, measured in (report.controls or {}).items():
            rows.append(_row(f"– {control}", measured.metrics, columns, not_told(report, measured), SAME))
            rows += _ports(measured, columns)
    summary = [] if floors is None else _summary(floors, columns)
    notes = [] if floors is None else [floors.caption]
    if any(report.controls for report in reports.values()):
        notes.append(
            f"{SAME}: cannot tell the control from its dictionary; their difference is below their paired noise floor."
        )
    return ComparedRows(("dictionary", *columns), rows, summary, " ".join(notes))


def _summary(floors: NoiseFloors, columns: Sequence[str]) -> list[Row]:
    """Return a row for each recipe, if some have several seeds, and one for the floors, if there are any."""
    rows: list[Row] = []
    if floors.has_seeds:
        for name, members in floors.recipes.items():
            rows.append((f"{name}, {len(members)} seed{'s' * (len(members) > 1)}", *floors.cells(name, columns)))
    cells = floors.floor_cells(columns)
    return [*rows, (FLOOR, *cells)] if set(cells) != {"–"} else rows


def _row(name: str, fit: Mapping[str, Metric], columns: Sequence[str], marked: Sequence[str], mark: str) -> Row:
    return (name, *(shown(key, fit[key]) + mark * (key in marked) if key in fit else "" for key in columns))


def _ports(report: Tabled, columns: Sequence[str]) -> list[Row]:
    return [_row(f"at {part}", fit, columns, (), "") for part, fit in _without_hook(report.parts).items()]


def _without_hook(parts: ByPart) -> ByPart:
    """Return the parts with the names of their models alone, if all are ports at one hook."""
    keys = [split_key(part) for part in parts]
    if None in {key.model for key in keys} or len({key.hook for key in keys}) != 1:
        return parts
    return {part.removesuffix(f":{keys[0].hook}"): fit for part, fit in parts.items()}
