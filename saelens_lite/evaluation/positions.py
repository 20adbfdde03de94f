"""Bands of positions in a row: 1, 2 to 3, 4 to 7, and so on."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from saelens_lite.evaluation.metrics import Metric
from saelens_lite.tokens import TokenRows


class PositionBand(NamedTuple):
    """The kept tokens at positions `low` to `high` of their rows: their number, fvu and added cross-entropy.

    `ce_increase` is the amount (nats) by which the reconstruction raises the loss of the tokens that follow them.
    """

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
    """The band number of every position of some rows, and for each band its first and last position and its kept tokens."""

    band: Int[Tensor, "n_seq n_ctx"]
    low: list[int]
    high: list[int]
    n_tokens: list[int]

    def report(self, fvu: Sequence[Metric], ce_increase: Sequence[Metric]) -> list[PositionBand]:
        """Return the bands with their metrics, without empty bands."""
        columns = zip(self.low, self.high, self.n_tokens, fvu, ce_increase, strict=True)
        return [PositionBand(*column) for column in columns if column[2]]


def position_bands(rows: TokenRows) -> PositionBands:
    """Return the bands of the rows. Position p is in the band of ⌊log₂ p⌋; position 0 has its own band."""
    n_ctx = rows.tokens.shape[1]
    number = torch.tensor([position.bit_length() for position in range(n_ctx)])
    low = [0, *(1 << e for e in range(int(number.max())))]
    high = [0, *(min(2 * p, n_ctx) - 1 for p in low[1:])]
    band = number.expand(rows.tokens.shape)
    n_tokens = torch.zeros(len(low), dtype=torch.long).index_add_(0, number, rows.kept_at.cpu()).tolist()
    return PositionBands(band, low, high, n_tokens)
