"""Comparisons of several reports: the noise floor of each metric, and the recipes whose differences exceed it."""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from saelens_lite.errors import ConfigError, near_matches
from saelens_lite.evaluation.floors import LEVEL, Noise, joint_df, noise_floors_of, t_quantile
from saelens_lite.evaluation.replicates import COLUMNS, LEAST, Recipe, Replicates, Units
from saelens_lite.evaluation.sums import Metric
from saelens_lite.tables import Result, grid

DIFFERS, SAME = "≠", "≈"
FLOOR = "noise floor"
SHARES = ("shared", "agree", "mutual")  # of latents, in comparisons with another dictionary
IN_PERCENT = ("frac_alive", *SHARES)
WHERE = ("text_sha256", "model", "hook", "read_hook")  # what reports of seeds have in common
Z = 1.959964
_SEED = re.compile(r"([\W_]+(seed|s))?[\W_]*$", re.IGNORECASE)  # the end of a name that is shared by several seeds


@runtime_checkable
class Measured(Protocol):
    """A report as far as comparisons read it."""

    metrics: dict[str, Metric]
    replicates: Replicates | None
    recipe: Recipe | None
    n_sequences: int


class ComparedScores(NamedTuple):
    """Scores that are no evaluation, such as those of a probe, as far as `noise_floors` reads them."""

    metrics: dict[str, Metric]
    replicates: Replicates | None
    recipe: Recipe | None
    n_sequences: int


@dataclass(frozen=True)
class NoiseFloors(Result):
    """Rows of a comparison, each one recipe, and the differences below which it says nothing.

    `recipes` names the reports of each row. If no recipe has several seeds, each report is a row. `values` are means over the
    seeds, with a 95 % interval over seeds if some recipe has several. `floors` has the floor of each metric; NaN if there is
    no estimate of the noise. At most a share `level` of tables of equal recipes has any difference above a floor. `notes` say
    what was counted.
    """

    recipes: dict[str, tuple[str, ...]]
    values: dict[str, dict[str, Metric]]
    floors: dict[str, float]
    has_seeds: bool
    level: float
    notes: tuple[str, ...]
    reference: str = "the first row"

    def differ(self, metric: str, a: str, b: str) -> bool:
        """Return whether two rows differ in a metric by more than its floor; False if a row lacks it.

        Raises:
            ConfigError: there is no such row or metric.
        """
        for name in (a, b):
            if name not in self.values:
                raise ConfigError(
                    f"no row {name!r}; the rows are {', '.join(self.values)}{near_matches(str(name), self.values)}"
                )
        if metric not in self.floors:
            _check_metrics([metric], {key for of in self.values.values() for key in of})
        pair = [self.values[name].get(metric) for name in (a, b)]
        if None in pair:
            return False
        return bool(abs(pair[0].value - pair[1].value) > self.floors.get(metric, math.nan))

    def differing(self, name: str) -> tuple[str, ...]:
        """Return the metrics in which a row differs from the first."""
        first = next(iter(self.recipes))
        return tuple(metric for metric in self.floors if name != first and self.differ(metric, name, first))

    @property
    def caption(self) -> str:
        """The notes as one text, with the meaning of the mark."""
        if not any(map(math.isfinite, self.floors.values())):
            return " ".join(self.notes)
        return (
            f"{DIFFERS}: differs from {self.reference} by more than the noise floor. Differences below it may be chance "
            f"({100 * self.level:g} % for the whole table). {' '.join(self.notes)}"
        )

    def cells(self, name: str, columns: Sequence[str] = COLUMNS) -> list[str]:
        """Return the cells of a row, with marks where it differs from the first."""
        differing = self.differing(name)
        return [
            "" if (m := self.values[name].get(metric)) is None else shown(metric, m) + DIFFERS * (metric in differing)
            for metric in columns
        ]

    def floor_cells(self, columns: Sequence[str] = COLUMNS) -> list[str]:
        """Return the cells of the last row."""
        return [floor_cell(metric, self.floors.get(metric, math.nan)) for metric in columns]

    def table(self) -> Any:
        """Return a rich table of the rows, with the floors below them."""
        columns = list(self.floors)
        rows: list[Any] = [(name, *self.cells(name, columns)) for name in self.recipes]
        return grid(
            ("recipe" if self.has_seeds else "dictionary", *columns),
            [*rows, None, (FLOOR, *self.floor_cells(columns))],
            caption=self.caption,
            column=lambda title: {"overflow": "fold"} if title in ("recipe", "dictionary") else {"no_wrap": True},
            collapse_padding=True,
            pad_edge=False,
        )

    def columns(self) -> dict[str, list[Any]]:
        """Return a row for each recipe and metric, column by column. `differs` is from the first recipe."""
        lines = [
            (name, metric, values[metric].value, len(self.recipes[name]), floor, metric in self.differing(name))
            for name, values in self.values.items()
            for metric, floor in self.floors.items()
            if metric in values
        ]
        titles = ("recipe", "metric", "value", "n_seeds", "floor", "differs")
        return {title: [line[i] for line in lines] for i, title in enumerate(titles)}


def shown(metric: str, m: Metric) -> str:
    """Return a metric as a cell of a table."""
    return f"{m.value:.1%}" if metric in IN_PERCENT else m.short


def floor_cell(metric: str, floor: float) -> str:
    """Return a floor as a cell of a table, rounded up to two digits."""
    if not math.isfinite(floor):
        return "–"
    if floor == 0:
        return "0"
    unit = 10.0 ** (math.floor(math.log10(floor)) - 1)
    up = math.ceil(floor / unit * (1 - 1e-9)) * unit
    if metric in IN_PERCENT:
        return f"{100 * up:.2g}%"
    return f"{up:.2g}" if up < 10 else f"{up:,.0f}"


def noise_floors(
    reports: Mapping[str, Measured],
    seeds: Mapping[str, Sequence[str]] | None = None,
    *,
    metrics: Sequence[str] = COLUMNS,
    level: float = LEVEL,
    resampled: str = "the text",
    reference: str = "the first row",
) -> NoiseFloors:
    """Return the differences between several reports below which their comparison says nothing.

    Reports of one text and one bootstrap seed are compared by paired replicates; others by the variances of their own, as if
    their texts were independent samples. Dictionaries that differ only in their seeds are seeds of one recipe, and recipes are
    compared by the means over their seeds.

    Args:
        reports: reports by name; two or more.
        seeds: the reports of each recipe, by its name, in place of the recipes that the reports record. Those that it does not
            name are recipes of their own.
        metrics: the columns of the table, which share the level.
        level: the share of tables of equal recipes that may have a difference above a floor.
        resampled, reference: words for the notes: the source of the replicates, and the first row.

    Raises:
        ConfigError: there are no reports; no report has a metric; `seeds` names a report that is missing or names one twice;
            or the level is not between 0 and 1.
    """
    if not isinstance(reports, Mapping) or not reports or not all(isinstance(one, Measured) for one in reports.values()):
        raise ConfigError(f'noise_floors compares reports by name, such as {{"a": report, "b": report}}; got {reports!r:.60}')
    if isinstance(level, bool) or not isinstance(level, int | float) or not 0 < level < 1:
        raise ConfigError(f"level = {level!r:.40}; expected a share between 0 and 1, such as 0.05")
    _check_metrics(metrics, {key for report in reports.values() for key in report.metrics})
    recipes = _named(reports, seeds) if seeds is not None else _recorded(reports)
    has_seeds = any(len(_distinct(reports, names)) > 1 for names in recipes.values())
    if not has_seeds and seeds is None:
        recipes = {name: (name,) for name in reports}
    members = {name: _distinct(reports, names) for name, names in recipes.items()}
    rows = [name for names in members.values() for name in names]
    columns, values = {}, {name: {} for name in recipes}
    for metric in metrics:
        if not all(metric in reports[name].metrics for name in rows):
            for recipe, names in members.items():
                if all(metric in reports[name].metrics for name in names):
                    values[recipe][metric] = _mean([reports[name].metrics[metric] for name in names])
            continue
        noise = _noise([reports[name] for name in rows], metric, [len(names) for names in members.values()])
        for i, (recipe, names) in enumerate(members.items()):
            mean = _mean([reports[name].metrics[metric] for name in names])
            values[recipe][metric] = mean if noise is None or not has_seeds else _over_seeds(mean.value, noise, i)
        columns[metric] = noise
    known = {metric: noise for metric, noise in columns.items() if noise is not None}
    floors = noise_floors_of(known, level)
    floors = {metric: floors.get(metric, math.nan) for metric in columns}
    notes = _notes([reports[name] for name in rows], members, floors, resampled)
    return NoiseFloors(recipes, values, floors, has_seeds, level, notes, reference)


def not_told(report: Measured, control: Measured, metrics: Sequence[str] = COLUMNS) -> tuple[str, ...]:
    """Return the metrics that cannot tell a control from its dictionary, by the paired floor of these two."""
    pair = {"dictionary": report, "control": control}
    alone = {name: (name,) for name in pair}
    floors = noise_floors(pair, alone, metrics=metrics)
    return tuple(
        metric
        for metric, floor in floors.floors.items()
        if math.isfinite(floor) and not floors.differ(metric, "dictionary", "control")
    )


def _check_metrics(metrics: Any, known: Collection[str]) -> None:
    """Raise ConfigError unless metrics are a list of names, each that of a known one or of a usual column."""
    if isinstance(metrics, str) or not isinstance(metrics, Sequence):
        raise ConfigError(f"metrics = {metrics!r}; expected a list of names, such as ['fvu']")
    for metric in metrics:
        if metric not in known and metric not in COLUMNS:
            raise ConfigError(f"no report has the metric {metric!r:.60}{near_matches(str(metric), sorted({*known, *COLUMNS}))}")


def _named(reports: Mapping[str, Measured], seeds: Any) -> dict[str, tuple[str, ...]]:
    """Return the recipes that a caller names, and one for each other report."""
    if not isinstance(seeds, Mapping):
        raise ConfigError(f"seeds = {seeds!r:.60}; expected the names of the reports of each recipe, by its name")
    taken: list[str] = []
    for recipe, names in seeds.items():
        if not isinstance(names, Sequence) or isinstance(names, str) or not names:
            raise ConfigError(f"seeds[{recipe!r}] = {names!r}; expected a list of names of reports")
        for name in names:
            if name not in reports:
                raise ConfigError(f"seeds[{recipe!r}] names {name!r}, which is no report{near_matches(str(name), reports)}")
            if name in taken:
                raise ConfigError(f"seeds names the report {name!r} twice; a report belongs to one recipe")
            taken.append(name)
    if other := [recipe for recipe in seeds if recipe in reports and recipe not in taken]:
        raise ConfigError(f"seeds calls a recipe {other[0]!r}, but a report of that name is of no recipe; choose another name")
    of = {name: recipe for recipe, names in seeds.items() for name in names}
    grouped: dict[str, list[str]] = {}
    for name in reports:
        grouped.setdefault(of.get(name, name), []).append(name)
    return {recipe: tuple(names) for recipe, names in grouped.items()}


def _recorded(reports: Mapping[str, Measured]) -> dict[str, tuple[str, ...]]:
    """Return the reports of each recipe that they record, in the order of the first of each.

    A recipe has the beginning that the names share as its name. Reports are of one recipe only if they are of distinct seeds on
    the same text.
    """
    grouped: dict[Any, list[str]] = {}
    for name, report in reports.items():
        key = (name,) if report.recipe is None else report.recipe.sha256
        grouped.setdefault(key, []).append(name)
    groups = [[group] if _are_seeds(reports, group) else [[name] for name in group] for group in grouped.values()]
    split = sorted((names for some in groups for names in some), key=lambda names: list(reports).index(names[0]))
    named: dict[str, tuple[str, ...]] = {}
    for names in split:
        title = names[0]
        if len(names) > 1:
            n_shared = sum(1 for _ in takewhile(lambda chars: len(set(chars)) == 1, zip(*names, strict=False)))
            ends_in_number = any(name[n_shared : n_shared + 1].isdigit() for name in names)
            title = names[0][:n_shared].rstrip("0123456789" * ends_in_number or None)
            title = _SEED.sub("", title)
            taken = {*reports, *named} - {*names}
            title = title if title and title not in taken else str(reports[names[0]].recipe)
            title = title if title not in taken else f"{names[0]} …"
        named[title] = tuple(names)
    return named


def _are_seeds(reports: Mapping[str, Measured], names: Sequence[str]) -> bool:
    """Return whether reports of one recipe are of distinct seeds, and of the same text, model and hook."""
    distinct = [reports[name] for name in _distinct(reports, names)]
    seeds = {report.recipe and report.recipe.seed for report in distinct}
    places = {
        (report.replicates and report.replicates.weights, *(getattr(report, key, None) for key in WHERE)) for report in distinct
    }
    return len(seeds) == len(distinct) and len(places) == 1


def _distinct(reports: Mapping[str, Measured], names: Sequence[str]) -> tuple[str, ...]:
    """Return the reports without repetitions of the same dictionary, which would pass for seeds without any spread."""
    kept: dict[Any, str] = {}
    for name in names:
        report = reports[name]
        seed = None if report.recipe is None else report.recipe.seed
        kept.setdefault((seed, tuple((key, m.value) for key, m in report.metrics.items())), name)
    return tuple(kept.values())


def _mean(values: Sequence[Metric]) -> Metric:
    if len(values) == 1:
        return values[0]
    return Metric(sum(m.value for m in values) / len(values), math.nan, math.nan)


def _over_seeds(value: float, noise: Noise, row: int) -> Metric:
    """Return a mean over seeds with its 95 % interval over seeds and texts."""
    half = t_quantile(0.975, noise.spread_df) * max(0.0, noise.spread / noise.n_seeds[row] + noise.covariance[row, row]) ** 0.5
    return Metric(value, value - half, value + half)


def _noise(reports: Sequence[Measured], metric: str, sizes: Sequence[int]) -> Noise | None:
    """Return the noise of the means of a metric over seeds; None if a report does not show it.

    sizes: the number of reports in each row, which come in this order.
    """
    value = np.array([report.metrics[metric].value for report in reports])
    over_texts = _over_texts(reports, metric)
    if over_texts is None or not np.isfinite(value).all():
        return None
    paired, alone, df = over_texts
    row = np.repeat(np.arange(len(sizes)), sizes)
    mean = (row == np.arange(len(sizes))[:, None]) / np.asarray(sizes)[:, None]
    spread_df = float(len(reports) - len(sizes))
    spread, of_text, of_rows = 0.0, 0.0, mean @ (paired + alone) @ mean.T
    if spread_df:
        apart = np.eye(len(reports)) - mean[row]  # the difference of each report from the mean of its row
        spread = float(np.square(apart @ value).sum() / spread_df)
        of_text = float(np.trace(apart @ paired @ apart.T) / spread_df)
        of_rows -= np.diag(of_text / np.asarray(sizes))  # the spread has this part too
    steps = [report.replicates.steps.get(metric, 0.0) for report in reports if report.replicates is not None]
    if spread_df and (step := max(steps, default=0.0)):
        rarer = float(np.minimum(value, 1 - value).mean()) / step  # such as the mean number of dead latents
        spread = max(spread, (rarer + 1) * step**2)
    return Noise(of_rows, df, tuple(sizes), max(spread, of_text), spread_df)


def _over_texts(reports: Sequence[Measured], metric: str) -> tuple[np.ndarray, np.ndarray, float] | None:
    """Return the covariance of a metric over texts, and its degrees of freedom; None if a report does not show it.

    The first matrix is of reports with replicates, the second of those that have only their own interval.
    """
    if any(_has_too_few(report, metric) for report in reports):
        return None
    paired, alone = np.zeros((2, len(reports), len(reports)))
    dfs, blocks = [], {}
    for i, report in enumerate(reports):
        if _is_replicated(report, metric):
            blocks.setdefault(report.replicates.weights, []).append(i)
            continue
        m, n = report.metrics[metric], _n_effective(report)
        if n < 2 or not m.has_interval:
            return None
        long = max(m.high - m.value, m.value - m.low)  # the other side of a share may end at 0 or 1
        alone[i, i] = (long / _half_width(report, n)) ** 2
        dfs.append(n - 1.0)
    for rows in blocks.values():
        n = min(_n_effective(reports[i]) for i in rows)
        several = [reports[i].replicates.of[metric] for i in rows]
        drawn = np.stack([x[: min(map(len, several))] for x in several]).astype(np.float64)
        drawn = drawn[:, np.isfinite(drawn).all(0)]
        if n < 2 or drawn.shape[1] < LEAST:
            return None
        one = [reports[i].replicates.steps.get(metric, 0.0) for i in rows]  # an estimate of 0 proves nothing
        paired[np.ix_(rows, rows)] = np.cov(drawn) * n / (n - 1) + np.diag(np.square(one))
        dfs.append(joint_df(n - 1.0, drawn.shape[1] - 1.0))
    return paired, alone, min(dfs)


def _units(report: Measured) -> Units | None:
    """Return what the bootstrap of a report has drawn; None if it does not say, as reports of earlier versions."""
    return None if report.replicates is None else report.replicates.units


def _n_effective(report: Measured) -> int | float:
    """Return the number of sequences, or of units of equal size that are as informative as those of the bootstrap."""
    units = _units(report)
    return units.n_effective if units else report.n_sequences


def _half_width(report: Measured, n: int | float) -> float:
    """Return half the length of a report's intervals in standard deviations. Earlier versions did not widen those of few."""
    return t_quantile(0.975, n - 1) if _units(report) else Z * ((n - 1) / n) ** 0.5


def _is_replicated(report: Measured, metric: str) -> bool:
    return report.replicates is not None and metric in report.replicates.of


def _has_too_few(report: Measured, metric: str) -> bool:
    """Return whether a report holds so few replicates of a metric that neither they nor its interval tell of its noise."""
    return _is_replicated(report, metric) and len(report.replicates.of[metric]) < LEAST


def _notes(
    reports: Sequence[Measured], members: Mapping[str, Sequence[str]], floors: Mapping[str, float], resampled: str
) -> tuple[str, ...]:
    """Return sentences on what the floors count."""
    if len(members) < 2:
        return ("All dictionaries are of one recipe, so no recipes are compared.",)
    if not any(map(math.isfinite, floors.values())):
        if any(_has_too_few(report, metric) for report in reports for metric in floors):
            return (f"No noise floor: it needs at least {LEAST} bootstrap replicates; raise n_bootstrap.",)
        return ("No noise floor: reports without intervals say nothing about their noise.",)
    how: dict[str, list[str]] = {}
    for metric in (metric for metric, floor in floors.items() if math.isfinite(floor)):
        how.setdefault(_method(reports, metric, resampled), []).append(metric)
    notes = list(how) if len(how) == 1 else [f"{', '.join(names)}: {said}" for said, names in how.items()]
    counts = [len(names) for names in members.values()]
    if sum(counts) == len(counts):
        notes.append("One seed each: differences between seeds are not included.")
    else:
        df = sum(counts) - len(counts)
        notes.append(f"Includes the spread over seeds, pooled over recipes ({df} degree{'s' * (df > 1)} of freedom)")
        notes[-1] += "; recipes with one seed borrow it." if 1 in counts else "."
    return tuple(notes)


def _method(reports: Sequence[Measured], metric: str, resampled: str) -> str:
    """Return a sentence on the source of a metric's noise."""
    replicated = [report for report in reports if _is_replicated(report, metric)]
    if len(replicated) == len(reports) and len({report.replicates.weights for report in replicated}) == 1:
        units = {str(units) for report in replicated if (units := _units(report))}
        return f"Paired bootstrap over {units.pop() if len(units) == 1 else resampled}."
    if replicated:
        return "Partly unpaired: the reports are of different texts or bootstrap seeds, or some hold no replicates."
    if all(report.replicates is None for report in reports):
        return "From the intervals, unpaired: the reports hold no replicates, as those of earlier versions."
    return "From the intervals, unpaired: the reports hold no replicates of it."
