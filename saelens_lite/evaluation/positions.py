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
    """The band of every position in a row, and for each band its first and last position and its kept tokens."""

    band: Int[Tensor, "1 n_ctx"]
    low: list[int]
    high: list[int]
    n_tokens: list[int]

    def of(self, tokens: Int[Tensor, "n pos"]) -> Int[Tensor, "n pos"]:
        """Return the band of each position of some rows."""
        return self.band[:, : tokens.shape[1]].to(tokens.device).expand(tokens.shape)

    def report(self, fvu: Sequence[Metric], ce_increase: Sequence[Metric]) -> list[PositionBand]:
        """Return the bands with their metrics, without empty bands."""
        columns = zip(self.low, self.high, self.n_tokens, fvu, ce_increase, strict=True)
        return [PositionBand(*column) for column in columns if column[2]]


def position_bands(rows: TokenRows) -> PositionBands:
    """Return the bands of token rows; see `bands_of_positions`."""
    return bands_of_positions(rows.kept_at.cpu())


def bands_of_positions(counts: Int[Tensor, " n_ctx"]) -> PositionBands:
    """Return the bands of rows, given the number of kept tokens at each position.

    Position p is in the band of ⌊log₂ p⌋; position 0 has its own band.
    """
    n_ctx = len(counts)
    band = torch.tensor([position.bit_length() for position in range(n_ctx)])
    low = [0, *(1 << e for e in range(int(band.max())))]
    high = [0, *(min(2 * p, n_ctx) - 1 for p in low[1:])]
    n_tokens = torch.zeros(len(low), dtype=torch.long).index_add(0, band, counts)
    return PositionBands(band[None], low, high, n_tokens.tolist())
