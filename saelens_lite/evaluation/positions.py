"""Tokens in bands by their position in a row: 1, 2 to 3, 4 to 7, and so on."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from saelens_lite.errors import ConfigError
from saelens_lite.evaluation.metrics import Metric
from saelens_lite.tables import grid
from saelens_lite.tokens import TokenRows

if TYPE_CHECKING:
    from saelens_lite.evaluation.report import EvalReport


class PositionBand(NamedTuple):
    """The kept tokens at positions `low` to `high` of their rows: how many, their fvu, and what the reconstruction adds to the
    cross-entropy (nats) of what follows them."""

    low: int
    high: int
    n_tokens: int
    fvu: Metric
    ce_increase: Metric

    @property
    def label(self) -> str:
        """The range in words."""
        return f"{self.low:,} – {self.high:,}" if self.high > self.low else f"{self.low:,}"


class PositionBands(NamedTuple):
    """Band number of every position of some rows, and of each band its first and last position and its kept tokens."""

    band: Int[Tensor, "n_seq n_ctx"]
    low: list[int]
    high: list[int]
    n_tokens: list[int]

    def report(self, fvu: Sequence[Metric], ce_increase: Sequence[Metric]) -> list[PositionBand]:
        """The bands with their metrics; one that no token falls into is left out."""
        columns = zip(self.low, self.high, self.n_tokens, fvu, ce_increase, strict=True)
        return [PositionBand(*column) for column in columns if column[2]]


def position_bands(rows: TokenRows) -> PositionBands:
    """The bands of the rows: position p is in that of ⌊log₂ p⌋, and 0 by itself."""
    n_ctx = rows.tokens.shape[1]
    number = torch.tensor([position.bit_length() for position in range(n_ctx)])
    low = [0, *(1 << e for e in range(int(number.max())))]
    high = [0, *(min(2 * p, n_ctx) - 1 for p in low[1:])]
    band = number.expand(rows.tokens.shape)
    n_tokens = torch.bincount(band[rows.keep], minlength=len(low)).tolist()
    return PositionBands(band, low, high, n_tokens)


def position_table(reports: Mapping[str, "EvalReport"]) -> Any:
    """A rich table: the fvu of every dictionary, and what it adds to the loss, in each band of positions.

    Raises:
        ConfigError: a report has no bands, or they are of different texts.
    """
    bands = [report.by_position or () for report in reports.values()]
    if not bands or not bands[0] or any([b[:3] for b in other] != [b[:3] for b in bands[0]] for other in bands):
        raise ConfigError("no bands to show, or bands of different texts: evaluate together, with by_position=True")
    titles = ("position", "tokens", *(f"{what}, {name}" for name in reports for what in ("FVU", "CE added")))
    rows = [
        (band[0].label, f"{band[0].n_tokens:,}", *(m.short for b in band for m in (b.fvu, b.ce_increase)))
        for band in zip(*bands, strict=True)
    ]
    return grid(titles, rows, caption="FVU and added cross-entropy (nats) by position; ± half of the 95 % interval")
