"""Bands of token frequency: tokens that occur 1 to 9 times in a text, 10 to 99 times, and so on."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from saelens_lite.evaluation.metrics import Metric


class FrequencyBand(NamedTuple):
    """The tokens whose ids occur `low` to `high` times in the text: the number of ids, the number of positions, and the fvu."""

    low: int
    high: int
    n_ids: int
    n_tokens: int
    fvu: Metric

    @property
    def label(self) -> str:
        """The range in words."""
        return f"{self.low:,} – {self.high:,} times"


class FrequencyBands(NamedTuple):
    """The band of every token id, and for each band its exponent of ten, ids and positions."""

    band: Int[Tensor, " d_vocab"]
    exponent: list[int]
    n_ids: list[int]
    n_tokens: list[int]

    def of(self, tokens: Int[Tensor, "n pos"]) -> Int[Tensor, "n pos"]:
        """Return the band of each token."""
        return self.band.to(tokens.device)[tokens]

    def report(self, fvu: Sequence[Metric]) -> list[FrequencyBand]:
        """Return the bands with their fvu."""
        columns = zip(self.exponent, self.n_ids, self.n_tokens, fvu, strict=True)
        return [FrequencyBand(10**e, 10 ** (e + 1) - 1, n_ids, n_tokens, m) for e, n_ids, n_tokens, m in columns]


def frequency_bands(counts: Int[Tensor, " d_vocab"]) -> FrequencyBands:
    """Return the bands of the kept tokens, without empty bands, given the number of kept tokens with each id.

    A token id that occurs c times among the kept positions is in the band of ⌊log₁₀ c⌋.
    """
    exponent = torch.tensor([len(str(c)) - 1 for c in counts.tolist()])
    occurs = counts > 0
    exponents, number = exponent[occurs].unique(return_inverse=True)
    band_of_id = torch.zeros_like(counts)
    band_of_id[occurs] = number
    n_tokens = torch.zeros_like(exponents).index_add(0, number, counts[occurs])
    return FrequencyBands(band_of_id, exponents.tolist(), number.bincount().tolist(), n_tokens.tolist())
