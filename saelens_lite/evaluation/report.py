"""The report of an evaluation: metrics with their intervals, what they were measured on, and how to show them."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from saelens_lite.arrays import plain
from saelens_lite.errors import CorruptFileError
from saelens_lite.evaluation.frequency import FrequencyBand
from saelens_lite.evaluation.metrics import Metric
from saelens_lite.evaluation.positions import PositionBand
from saelens_lite.files import read_json, write_json
from saelens_lite.markdown import cell, code, one_line
from saelens_lite.tables import grid

if TYPE_CHECKING:
    from rich.table import Table

FORMAT = 2
COLUMNS = {"l0": "L0", "fvu": "FVU", "ce_loss_score": "CE recovered", "kl_div_score": "KL recovered"}


@dataclass(frozen=True)
class EvalReport:
    """Metrics of one dictionary with 95 % confidence intervals, and the text they were measured on.

    `metrics` by name (saelens_lite.evaluation.metrics has the formulas), `density` [d_sae] = firing frequency of each latent,
    None in a report read from a file. `text` is the name of the text, if it has one; `disjoint` says whether it is other text
    than the dictionary was trained on, None where that cannot be told, and `disjoint_why` why. Where asked for: `by_frequency`
    = fvu by how often a token occurs in the text, `by_position` = fvu and loss by position in a row, `controls` = reports of
    a random dictionary, PCA, and a model with its weights re-drawn. `hook` is where the output belongs; `read_hook`, where the
    input is read, is another one for a transcoder, and None in reports of earlier versions.
    """

    metrics: dict[str, Metric]
    n_tokens: int
    n_sequences: int
    text: str | None
    text_sha256: str
    disjoint: bool | None
    disjoint_why: str
    model: str
    hook: str
    excluded: str
    density: Float[Tensor, " d_sae"] | None = field(default=None, compare=False, repr=False)
    by_frequency: tuple[FrequencyBand, ...] | None = None
    by_position: tuple[PositionBand, ...] | None = None
    controls: "dict[str, EvalReport] | None" = None
    read_hook: str | None = None

    def __getitem__(self, name: str) -> float:
        """The value of a metric."""
        return self.metrics[name].value

    @property
    def frac_alive(self) -> float:
        """Share of latents that fired at least once."""
        return self["frac_alive"]

    @property
    def frac_dense(self) -> float:
        """Share of latents that fired on more than 10 % of the tokens."""
        return self["frac_dense"]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the per-latent densities, as plain data; what was not asked for is left out."""
        content: dict[str, Any] = {"format": FORMAT, "metrics": {name: plain(m) for name, m in self.metrics.items()}}
        content |= {name: getattr(self, name) for name in _FACTS}
        if self.by_frequency is not None:
            content["by_frequency"] = [plain(band) for band in self.by_frequency]
        if self.by_position is not None:
            content["by_position"] = [plain(band) for band in self.by_position]
        if self.controls is not None:
            content["controls"] = {name: report.to_dict() for name, report in self.controls.items()}
        return content

    def to_json(self, path: str | Path | None = None) -> str:
        """The report as JSON, also written to `path` when given."""
        if path is not None:
            write_json(Path(path), self.to_dict())
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)

    @classmethod
    def from_json(cls, path: str | Path) -> "EvalReport":
        """The report in a file that `to_json` wrote; it has no densities.

        Raises:
            CorruptFileError: the file is missing, damaged, or of another format.
        """
        return cls.from_dict(read_json(Path(path), finite=True), str(path))

    @classmethod
    def from_dict(cls, content: Any, place: str = "the report") -> "EvalReport":
        """The report that `to_dict` made plain data of; CorruptFileError, which names `place`, when it is none."""
        if not isinstance(content, dict):
            raise CorruptFileError(f"{place} is no evaluation: a {type(content).__name__}, not an object")
        if content.get("format") != FORMAT:
            raise CorruptFileError(f"{place}: an evaluation of format {content.get('format')!r}, this version reads {FORMAT}")
        content = {"read_hook": None, **content}
        try:
            return cls(
                metrics={name: _metric(m) for name, m in content["metrics"].items()},
                **{name: _checked(content[name], kind, name) for name, kind in _FACTS.items()},
                by_frequency=_bands(FrequencyBand, content.get("by_frequency")),
                by_position=_bands(PositionBand, content.get("by_position")),
                controls={name: cls.from_dict(report, place) for name, report in content["controls"].items()}
                if "controls" in content
                else None,
            )
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError, OverflowError) as error:
            raise CorruptFileError(f"{place} is no evaluation: {type(error).__name__}: {error}") from None

    def lines(self) -> list[tuple[str, Metric]]:
        """Every metric and every band, with what it is called in tables."""
        found = list(self.metrics.items())
        found += [(f"fvu of tokens that occur {band.label} here", band.fvu) for band in self.by_frequency or ()]
        for band in self.by_position or ():
            found.append((f"fvu at position {band.label}", band.fvu))
            found.append((f"ce_sae − ce_clean at position {band.label}", band.ce_increase))
        return found

    @property
    def where(self) -> str:
        """What was measured, in a sentence."""
        return (
            f"{self.n_tokens:,} tokens in {self.n_sequences:,} sequences of {self.text or 'a text without a name'}, without "
            f"{self.excluded}; {self.model}, {self._hooks}"
        )

    @property
    def _hooks(self) -> str:
        return self.hook if self.read_hook in (None, self.hook) else f"{self.read_hook} → {self.hook}"

    @property
    def caution(self) -> str:
        """What a reader has to be told about the text, or nothing."""
        if self.disjoint:
            return ""
        start = "This text was trained on" if self.disjoint is False else "Not known to be new text"
        return f"{start}: {self.disjoint_why}."

    def to_markdown(self) -> str:
        """A Markdown table of the metrics, and of the controls where there are any."""
        how = f"95 % bootstrap confidence intervals over sequences. Token hash: {code(self.text_sha256)}."
        lines = [f"{one_line(self.where)}. {how}"]
        lines += [one_line(self.caution)] if self.caution else []
        lines += ["", "| metric | value | 95 % interval |", "| --- | --- | --- |"]
        lines += [f"| {cell(name)} | {m.value:.4g} | {m.low:.4g} … {m.high:.4g} |" for name, m in self.lines()]
        if self.controls:
            lines += ["", markdown({"this dictionary": self})]
        return "\n".join(lines)

    def __str__(self) -> str:
        lines = [f"{name:50} {metric}" for name, metric in self.lines()]
        if self.controls:
            lines += ["", *("".join(f"{part:20}" for part in row).rstrip() for row in _comparison({"this dictionary": self}))]
        return "\n".join([self.where, *([self.caution] if self.caution else []), *lines])

    def __rich__(self) -> Any:
        from rich.console import Group

        metrics = self._rich_table()
        return Group(metrics, table({"this dictionary": self})) if self.controls else metrics

    def _rich_table(self) -> "Table":
        rows = [(name, f"{m.value:.4g}", f"{m.low:.4g} … {m.high:.4g}") for name, m in self.lines()]
        titles = ("metric", "value", "95 % interval")
        return grid(titles, rows, title=self.where, caption=self.caution, column=lambda title: {"no_wrap": True})

    def _repr_html_(self) -> str:
        rows = [(name, f"{m.value:.4g}", f"{m.low:.4g} … {m.high:.4g}") for name, m in self.lines()]
        found = f"<p>{escape(self.where)}. {escape(self.caution)}</p>{_html_table(('metric', 'value', '95 % interval'), rows)}"
        if self.controls:
            head, *lines = _comparison({"this dictionary": self})
            found += _html_table(head, lines)
        return found


_PARTS = ("metrics", "density", "by_frequency", "by_position", "controls")
_FACTS = {f.name: f.type for f in fields(EvalReport) if f.name not in _PARTS}


def _checked(value: Any, kind: Any, name: str) -> Any:
    """A value from a file, if it is of its kind."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} is {value!r:.40}")
    return value


def _metric(content: Any) -> Metric:
    return Metric(**{key: math.nan if x is None else float(_checked(x, int | float, key)) for key, x in content.items()})


def _bands(kind: Any, content: Any) -> tuple[Any, ...] | None:
    if content is None:
        return None
    return tuple(
        kind(**{key: _metric(x) if isinstance(x, dict) else _checked(x, int, key) for key, x in band.items()})
        for band in content
    )


def _comparison(reports: Mapping[str, EvalReport]) -> list[tuple[str, ...]]:
    """The head, and a line for each report and each of its controls: value ± half the interval of the chief metrics."""
    found = [("dictionary", *COLUMNS.values(), "alive")]
    for name, report in reports.items():
        named = {name: report} | {f"– {control}": measured for control, measured in (report.controls or {}).items()}
        for title, one in named.items():
            found.append((title, *(one.metrics[key].short for key in COLUMNS), f"{one.frac_alive:.1%}"))
    return found


def table(reports: Mapping[str, EvalReport]) -> "Table":
    """A rich table of several reports: a row each, and one for each of its controls."""

    def column(title: str) -> dict[str, Any]:
        return {"min_width": 12, "overflow": "fold"} if title == "dictionary" else {"no_wrap": True}

    head, *lines = _comparison(reports)
    return grid(head, lines, caption="± half of the 95 % interval", column=column)


def markdown(reports: Mapping[str, EvalReport]) -> str:
    """The same table in Markdown; ± is half of the 95 % interval."""
    head, *rows = (tuple(map(cell, row)) for row in _comparison(reports))
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ("---",) * len(head), *rows])


def _html_table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    def line(cells: tuple[str, ...], kind: str) -> str:
        return f"<tr>{''.join(f'<{kind}>{escape(cell)}</{kind}>' for cell in cells)}</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"
