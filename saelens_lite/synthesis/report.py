"""The report of a dictionary measured against planted features."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from saelens_lite.arrays import plain
from saelens_lite.evaluation.sums import Metric
from saelens_lite.files import write_json
from saelens_lite.tables import Result, grid

FORMAT = 1


@dataclass(frozen=True)
class SyntheticReport(Result):
    """Measures of a dictionary against the planted features, with 95 % confidence intervals over activations.

    `saelens_lite.synthesis.measure` has the formulas of `metrics`. `controls` are the reports of dictionaries whose quality is
    known. `feature` [d_sae] is the feature whose direction is nearest to that of each latent, `cosine` their absolute cosine,
    and `f1` the F1 of each latent as a detector of that feature.
    """

    metrics: dict[str, Metric]
    n: int
    settings: dict[str, Any]
    controls: "dict[str, SyntheticReport] | None" = None
    feature: Int[Tensor, " d_sae"] | None = field(default=None, compare=False, repr=False)
    cosine: Float[Tensor, " d_sae"] | None = field(default=None, compare=False, repr=False)
    f1: Float[Tensor, " d_sae"] | None = field(default=None, compare=False, repr=False)

    def __getitem__(self, name: str) -> float:
        """Return the value of a measure."""
        return self.metrics[name].value

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data, without the tensors."""
        content: dict[str, Any] = {"format": FORMAT, "n": self.n, "settings": self.settings}
        content["metrics"] = {name: plain(metric) for name, metric in self.metrics.items()}
        if self.controls is not None:
            content["controls"] = {name: report.to_dict()["metrics"] for name, report in self.controls.items()}
        return content

    def to_json(self, path: str | Path | None = None) -> str:
        """Return the report as JSON, and write it to `path` if that is given."""
        if path is not None:
            write_json(Path(path), self.to_dict())
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)

    def columns(self) -> dict[str, list[Any]]:
        """Return the measures of the dictionary and of its controls, a row for each dictionary."""
        reports = self._reports()
        return {"dictionary": list(reports)} | {name: [report[name] for report in reports.values()] for name in self.metrics}

    def _reports(self) -> "dict[str, SyntheticReport]":
        return {"dictionary": self, **(self.controls or {})}

    def table(self) -> Any:
        """Return the measures as a rich table, with the controls beside them."""
        return comparison(self._reports(), f"{self.n:,} synthetic activations of {self.settings['n_features']:,} features")


def comparison(reports: Mapping[str, SyntheticReport], title: str = "") -> Any:
    """Return a rich table of several reports: a line for each measure, a column for each dictionary."""
    names = list(next(iter(reports.values())).metrics)
    rows = [(name, *(_cell(report.metrics[name]) for report in reports.values())) for name in names]
    return grid(
        ("", *reports),
        rows,
        title=title,
        column=lambda name: {"justify": "right" if name else "left", "overflow": "fold"},
        collapse_padding=True,
    )


def _cell(metric: Metric) -> str:
    return "–" if math.isnan(metric.value) else metric.short
