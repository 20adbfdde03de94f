"""Tokens in bands by how often they occur in a text: once to nine times, ten to ninety-nine times, and so on."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from saelens_lite.errors import ConfigError
from saelens_lite.evaluation.metrics import Metric
from saelens_lite.markdown import cell
from saelens_lite.tables import grid
from saelens_lite.tokens import TokenRows

if TYPE_CHECKING:
    from saelens_lite.evaluation.report import EvalReport


class FrequencyBand(NamedTuple):
    """The tokens whose ids occur `low` to `high` times in the text: how many ids and positions that is, and their fvu."""

    low: int
    high: int
    n_ids: int
    n_tokens: int
    fvu: Metric

    @property
    def label(self) -> str:
        """The range in words."""
        return f"{self.low:,} – {self.high:,} times"


class Bands(NamedTuple):
    """Band number of every position of some rows, and of each band its exponent of ten, ids and positions."""

    band: Int[Tensor, "n_seq n_ctx"]
    exponent: list[int]
    n_ids: list[int]
    n_tokens: list[int]

    def report(self, fvu: Sequence[Metric]) -> list[FrequencyBand]:
        """The bands with their fvu."""
        columns = zip(self.exponent, self.n_ids, self.n_tokens, fvu, strict=True)
        return [FrequencyBand(10**e, 10 ** (e + 1) - 1, n_ids, n_tokens, m) for e, n_ids, n_tokens, m in columns]


def frequency_bands(rows: TokenRows) -> Bands:
    """The bands of the kept tokens; a band that no token falls into is left out.

    A token id that occurs c times among the kept positions is in the band of ⌊log₁₀ c⌋.
    """
    counts = torch.bincount(rows.tokens[rows.keep], minlength=int(rows.tokens.max()) + 1)
    exponent = torch.tensor([len(str(c)) - 1 for c in counts.tolist()])
    occurs = counts > 0
    found, number = exponent[occurs].unique(return_inverse=True)
    band_of_id = torch.zeros_like(counts)
    band_of_id[occurs] = number
    n_tokens = torch.zeros_like(found).index_add(0, number, counts[occurs])
    return Bands(band_of_id[rows.tokens], found.tolist(), number.bincount().tolist(), n_tokens.tolist())


def frequency_table(reports: Mapping[str, "EvalReport"]) -> Any:
    """A rich table: the fvu of every dictionary in each band of token frequency.

    Raises:
        ConfigError: a report has no bands, or they are of different texts.
    """
    titles = ("occurs", "ids", "tokens", *reports)
    return grid(titles, _cells(reports), caption="FVU by how often a token occurs; ± half of the 95 % interval")


def frequency_markdown(reports: Mapping[str, "EvalReport"]) -> str:
    """The same table in Markdown; ConfigError as there."""
    lines = [
        ["occurs", "ids", "tokens", *(f"FVU, {cell(name)}" for name in reports)],
        ["---"] * (3 + len(reports)),
        *_cells(reports),
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cells(reports: Mapping[str, "EvalReport"]) -> list[list[str]]:
    """A line for each band: range, ids, share of the tokens, and the fvu of each report."""
    bands = [report.by_frequency or () for report in reports.values()]
    if not bands or not bands[0] or any([b[:4] for b in other] != [b[:4] for b in bands[0]] for other in bands):
        raise ConfigError("no bands to show, or bands of different texts: evaluate together, with by_frequency=True")
    total = sum(band.n_tokens for band in bands[0])
    return [
        [
            same[0].label,
            f"{same[0].n_ids:,}",
            f"{same[0].n_tokens / total:.1%}",
            *(b.fvu.short for b in same),
        ]
        for same in zip(*bands, strict=True)
    ]
