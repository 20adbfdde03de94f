"""The report of an evaluation: metrics with their intervals, the text they were measured on, and tables of them."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from saelens_lite.arrays import plain
from saelens_lite.errors import CorruptFileError
from saelens_lite.evaluation.compared_rows import compared_rows
from saelens_lite.evaluation.comparison import not_told
from saelens_lite.evaluation.frequency import FrequencyBand
from saelens_lite.evaluation.metrics import Metric
from saelens_lite.evaluation.positions import PositionBand
from saelens_lite.evaluation.replicates import Recipe, Replicates
from saelens_lite.evaluation.splices import ByPart
from saelens_lite.files import read_json, write_json
from saelens_lite.markdown import cell, code, one_line
from saelens_lite.ports import split_key
from saelens_lite.tables import Result, broken, grid, short_names, terminal_width, wrapped

if TYPE_CHECKING:
    from rich.table import Table

FORMAT = 2
WIDTH_OF_NUMBERS = 68  # of the columns beside the names in `table`


@dataclass(frozen=True)
class EvalReport(Result):
    """Metrics of one dictionary with 95 % confidence intervals, and the text they were measured on.

    saelens_lite.evaluation.metrics has the formulas of `metrics`. `density` [d_sae] is the firing frequency of each latent, and
    None in a report that was read from a file. `text` is the name of the text, if it has one. `disjoint` is True if it is
    other text than the training text, False if not, and None if this is not known; `disjoint_why` is the reason.

    On request, `by_frequency` has the fvu by the number of times a token occurs in the text, `by_position` the fvu and loss
    by position in a row, and `controls` the reports of a random dictionary, of PCA, and of a model with its weights shuffled.

    A dictionary that writes several ports has `by_port`: by the key of each port, its mse, fvu and explained_variance, and the
    losses with that port alone replaced. If these belong to several models, `by_model` has the same by the name of each model,
    with all its ports replaced, and `metrics` has no losses. The metrics of all ports together are of the concatenated
    activations, so a port with large norms decides them. Zeros at a port that is the difference chat − base put the activation
    of base into chat.

    `replicates` are kept for comparisons with other reports (`noise_floors`), and `recipe` says which dictionaries differ only
    in their seeds. Both are None in reports of earlier versions, and `recipe` for dictionaries of other tools.

    `hook` is the hook that the dictionary writes, and `read_hook` the one it reads; None in reports of earlier versions.

    A report on activations without a model has `model` None, empty hooks if they are not known, the number of rows as
    `n_tokens` and that of groups as `n_sequences`.
    """

    metrics: dict[str, Metric]
    n_tokens: int
    n_sequences: int
    text: str | None
    text_sha256: str
    disjoint: bool | None
    disjoint_why: str
    model: str | None
    hook: str
    excluded: str
    density: Float[Tensor, " d_sae"] | None = field(default=None, compare=False, repr=False)
    by_frequency: tuple[FrequencyBand, ...] | None = None
    by_position: tuple[PositionBand, ...] | None = None
    controls: "dict[str, EvalReport] | None" = None
    read_hook: str | None = None
    by_port: ByPart | None = None
    by_model: ByPart | None = None
    replicates: Replicates | None = field(default=None, compare=False, repr=False)
    recipe: Recipe | None = None

    def __getitem__(self, name: str) -> float:
        """Return the value of a metric."""
        return self.metrics[name].value

    @property
    def frac_alive(self) -> float:
        """The share of latents that fired at least once."""
        return self["frac_alive"]

    @property
    def frac_dense(self) -> float:
        """The share of latents that fired on more than 10 % of the tokens."""
        return self["frac_dense"]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data, without the densities of the latents."""
        content: dict[str, Any] = {"format": FORMAT, "metrics": {name: plain(m) for name, m in self.metrics.items()}}
        content |= {name: getattr(self, name) for name in _FACTS}
        if self.by_frequency is not None:
            content["by_frequency"] = [plain(band) for band in self.by_frequency]
        if self.by_position is not None:
            content["by_position"] = [plain(band) for band in self.by_position]
        for name in ("by_port", "by_model"):
            if (parts := getattr(self, name)) is not None:
                content[name] = {part: {metric: plain(m) for metric, m in fit.items()} for part, fit in parts.items()}
        if self.controls is not None:
            content["controls"] = {name: report.to_dict() for name, report in self.controls.items()}
        if self.recipe is not None:
            content["recipe"] = self.recipe._asdict()
        if self.replicates is not None:
            content["replicates"] = self.replicates.to_dict()
        return content

    def to_json(self, path: str | Path | None = None) -> str:
        """Return the report as JSON, and write it to `path` if that is given."""
        if path is not None:
            write_json(Path(path), self.to_dict())
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)

    @classmethod
    def from_json(cls, path: str | Path) -> "EvalReport":
        """Return the report in a file that `to_json` wrote. It has no densities.

        Raises:
            CorruptFileError: the file is missing, damaged, or of another format.
        """
        return cls.from_dict(read_json(Path(path), finite=True), str(path))

    @classmethod
    def from_dict(cls, content: Any, place: str = "the report") -> "EvalReport":
        """Return the report in plain data from `to_dict`.

        Args:
            place: the origin of the data, for messages.

        Raises:
            CorruptFileError: the data are not a report, or of another format.
        """
        if not isinstance(content, dict):
            raise CorruptFileError(f"{place} is not an evaluation: expected an object, found a {type(content).__name__}")
        if content.get("format") != FORMAT:
            raise CorruptFileError(f"{place}: an evaluation of format {content.get('format')!r}; this version reads {FORMAT}")
        content = {"read_hook": None, **content}
        try:
            return cls(
                metrics=_metrics(content["metrics"]),
                **{name: _checked(content[name], kind, name) for name, kind in _FACTS.items()},
                by_frequency=_bands(FrequencyBand, content.get("by_frequency")),
                by_position=_bands(PositionBand, content.get("by_position")),
                by_port=_by_part(content.get("by_port")),
                by_model=_by_part(content.get("by_model")),
                controls={name: cls.from_dict(report, place) for name, report in content["controls"].items()}
                if "controls" in content
                else None,
                recipe=Recipe.from_dict(content["recipe"]) if "recipe" in content else None,
                replicates=Replicates.from_dict(content["replicates"]) if "replicates" in content else None,
            )
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError, OverflowError) as error:
            raise CorruptFileError(f"{place} is not an evaluation: {type(error).__name__}: {error}") from None

    def lines(self) -> list[tuple[str, Metric]]:
        """Return every metric, also of bands, ports and models, with its name in tables."""
        parts = [(f"{name} of {part}", m) for part, fit in self.parts.items() for name, m in fit.items()]
        return [*self._main_lines(), *parts]

    @property
    def parts(self) -> ByPart:
        """The metrics of each port, and of each model that has several of them."""
        ports = self.by_port or {}
        n_ports = Counter(split_key(port).model for port in ports)
        return ports | {model: fit for model, fit in (self.by_model or {}).items() if n_ports[model] > 1}

    @property
    def not_told(self) -> dict[str, tuple[str, ...]]:
        """The metrics that cannot tell each control from the dictionary: their difference is within its paired noise floor."""
        return {name: not_told(self, control) for name, control in (self.controls or {}).items()}

    def _main_lines(self) -> list[tuple[str, Metric]]:
        lines = list(self.metrics.items())
        lines += [(f"fvu of tokens that occur {band.label} here", band.fvu) for band in self.by_frequency or ()]
        for band in self.by_position or ():
            lines.append((f"fvu at position {band.label}", band.fvu))
            lines.append((f"ce_increase at position {band.label}", band.ce_increase))
        return lines

    @property
    def where(self) -> str:
        """A sentence on the text, the model and the hook."""
        if self.model is None:
            groups = f" in {self.n_sequences:,} groups" if self.n_sequences != self.n_tokens else ""
            hooks = f"; {self._hooks}" if self._hooks else ""
            return f"{self.n_tokens:,} rows{groups} of {self.text or 'activations without a name'}{hooks}"
        rows = "sequence" if self.n_sequences == 1 else "sequences"
        return (
            f"{self.n_tokens:,} tokens in {self.n_sequences:,} {rows} of {self.text or 'a text without a name'}, without "
            f"{self.excluded}; {self.model}, {self._hooks}"
        )

    @property
    def _hooks(self) -> str:
        return self.hook if self.read_hook in (None, self.hook) else f"{self.read_hook} → {self.hook}"

    @property
    def caution(self) -> str:
        """A warning about the text for readers of the report; empty if it is known to be new text."""
        if self.disjoint:
            return ""
        what = "activations" if self.model is None else "text"
        start = f"Overlaps the training {what}" if self.disjoint is False else f"May overlap the training {what}"
        return f"{start}: {self.disjoint_why}."

    @property
    def intervals(self) -> str:
        """A sentence on the confidence intervals: the method, or the reason why they are missing."""
        if any(metric.has_interval for metric in self.metrics.values()):
            units = self.replicates and self.replicates.units
            if units:
                alike = " Sequences of one document are alike, so they may be too narrow." if " of " in units.name else ""
                return f"95 % bootstrap confidence intervals over {units}.{alike}"
            rows = "rows" if self.n_sequences == self.n_tokens else "groups of rows"
            return f"95 % bootstrap confidence intervals over {'sequences' if self.model is not None else rows}."
        if self.model is None and self.n_sequences == 1:
            return "No confidence intervals: they need several groups of rows, and there is one."
        return _NO_INTERVALS if self.n_sequences == 1 else "No confidence intervals."

    def to_markdown(self) -> str:
        """Return a Markdown table of the metrics, and one of the ports and the controls if the report has them."""
        how = f"{self.intervals} {'Data' if self.model is None else 'Token'} hash: {code(self.text_sha256)}."
        lines = [f"{one_line(self.where)}. {how}"]
        lines += [one_line(self.caution)] if self.caution else []
        lines += ["", "| metric | value | 95 % interval |", "| --- | --- | --- |"]
        lines += [f"| {cell(name)} | {m.value:.4g} | {m.interval} |" for name, m in self._main_lines()]
        if self._has_comparison:
            lines += ["", markdown({"this dictionary": self})]
        return "\n".join(lines)

    def __str__(self) -> str:
        lines = [f"{name:50} {metric}" for name, metric in self._main_lines()]
        if self._has_comparison:
            compared = compared_rows({"this dictionary": self})
            rows = [compared.head, *compared.rows]
            first = max(20, *(len(row[0]) + 2 for row in rows))
            lines += ["", *(f"{row[0]:{first}}{''.join(f'{part:20}' for part in row[1:])}".rstrip() for row in rows)]
            lines += [compared.notes] if compared.notes else []
        notes = [*([self.caution] if self.caution else []), *([self.intervals] if self.n_sequences == 1 else [])]
        return "\n".join([self.where, *notes, *lines])

    def columns(self) -> dict[str, list[Any]]:
        """Return a row for each metric, column by column; with controls, `of` names the dictionary that a row is of."""
        reports = {"this dictionary": self} | (self.controls or {})
        lines = [(of, name, *metric) for of, report in reports.items() for name, metric in report.lines()]
        titles = ("of", "metric", *Metric._fields)
        columns = {title: [line[i] for line in lines] for i, title in enumerate(titles)}
        return columns if self.controls else {title: column for title, column in columns.items() if title != "of"}

    def table(self) -> Any:
        """Return a rich table of the metrics, and one of the ports and the controls if the report has them."""
        from rich.console import Group

        metrics = self._rich_table()
        return Group(metrics, table({"this dictionary": self})) if self._has_comparison else metrics

    @property
    def _has_comparison(self) -> bool:
        return bool(self.controls or self.by_port)

    def _rich_table(self) -> "Table":
        rows = [(name, f"{m.value:.4g}", m.interval) for name, m in self._main_lines()]
        titles = ("metric", "value", "95 % interval")
        notes = [self.caution, *([self.intervals] if self.n_sequences == 1 else [])]
        caption = "\n".join(wrapped(note) for note in notes if note)
        return grid(titles, rows, title=wrapped(self.where), caption=caption, column=lambda title: {"no_wrap": True})

    def _repr_html_(self) -> str:
        rows = [(name, f"{m.value:.4g}", m.interval) for name, m in self._main_lines()]
        html = f"<p>{escape(self.where)}. {escape(self.caution)}</p>{_html_table(('metric', 'value', '95 % interval'), rows)}"
        if self._has_comparison:
            compared = compared_rows({"this dictionary": self})
            html += _html_table(compared.head, compared.rows)
            html += f"<p>{escape(compared.notes)}</p>" if compared.notes else ""
        return html


_PARTS = ("metrics", "density", "by_frequency", "by_position", "controls", "by_port", "by_model", "replicates", "recipe")
_FACTS = {f.name: f.type for f in fields(EvalReport) if f.name not in _PARTS}


def _checked(value: Any, kind: Any, name: str) -> Any:
    """Return a value from a file; TypeError if it is not of its kind."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} is {value!r:.40}")
    return value


def _metric(content: Any) -> Metric:
    return Metric(**{key: math.nan if x is None else float(_checked(x, int | float, key)) for key, x in content.items()})


def _metrics(content: dict[str, Any]) -> dict[str, Metric]:
    return {name: _metric(m) for name, m in content.items()}


def _by_part(content: dict[str, Any] | None) -> ByPart | None:
    return None if content is None else {part: _metrics(fit) for part, fit in content.items()}


def _bands(kind: Any, content: Any) -> tuple[Any, ...] | None:
    if content is None:
        return None
    return tuple(
        kind(**{key: _metric(x) if isinstance(x, dict) else _checked(x, int, key) for key, x in band.items()})
        for band in content
    )


_NO_INTERVALS = "No confidence intervals: they need several sequences, and this text has one."


def table(reports: Mapping[str, EvalReport], seeds: Mapping[str, Sequence[str]] | None = None) -> "Table":
    """Return a rich table of several reports, with a row for each and for each of its ports and controls.

    Below them is the noise floor of each column, see `noise_floors`, and, if several dictionaries differ only in their seeds, a
    row for each recipe. Folders that all names share are left out.
    """

    def column(title: str) -> dict[str, Any]:
        return {"min_width": 12, "overflow": "fold"} if title == "dictionary" else {"no_wrap": True}

    names = dict(zip(reports, short_names(list(reports)), strict=True))
    if len(set(names.values())) < len(names):
        names = {name: name for name in reports}
    if seeds is not None:
        seeds = {recipe: [names.get(name, name) for name in several] for recipe, several in seeds.items()}
    compared = compared_rows({names[name]: report for name, report in reports.items()}, seeds)
    width = max(12, terminal_width() - WIDTH_OF_NUMBERS)
    rows = [None if row is None else (broken(row[0], width), *row[1:]) for row in compared.all_rows]
    caption = "± half of the 95 % interval"
    if all(report.n_sequences == 1 for report in reports.values()):
        caption = next(iter(reports.values())).intervals
    caption = "\n".join(note for note in (wrapped(caption), compared.notes) if note)
    return grid(compared.head, rows, caption=caption, column=column, collapse_padding=True, pad_edge=False)


def markdown(reports: Mapping[str, EvalReport], seeds: Mapping[str, Sequence[str]] | None = None) -> str:
    """Return the table of `table` in Markdown, with its notes. ± is half of the 95 % interval."""
    compared = compared_rows(reports, seeds)
    head, *rows = (tuple(map(cell, row)) for row in (compared.head, *compared.rows, *compared.summary))
    lines = [f"| {' | '.join(row)} |" for row in [head, ("---",) * len(head), *rows]]
    return "\n".join([*lines, *(["", one_line(compared.notes)] if compared.notes else [])])


def _html_table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    def line(cells: tuple[str, ...], kind: str) -> str:
        return f"<tr>{''.join(f'<{kind}>{escape(cell)}</{kind}>' for cell in cells)}</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"
