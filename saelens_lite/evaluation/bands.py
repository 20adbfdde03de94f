"""Tables of several reports by token frequency and by position."""

from collections.abc import Mapping
from typing import Any

from saelens_lite.errors import ConfigError
from saelens_lite.evaluation.report import EvalReport
from saelens_lite.markdown import cell
from saelens_lite.tables import grid, short_names, wrapped

NARROW = {"collapse_padding": True, "pad_edge": False}


def frequency_table(reports: Mapping[str, EvalReport]) -> Any:
    """Return a rich table of the fvu of every dictionary in each band of token frequency.

    Raises:
        ConfigError: a report has no bands, or the reports are of different texts.
    """
    titles = ("occurs", "ids", "tokens", *(f"fvu, {name}" for name in short_names(list(reports))))
    return grid(titles, _cells(reports), caption="fvu by how often a token occurs; ± half of the 95 % interval", **NARROW)


def frequency_markdown(reports: Mapping[str, EvalReport]) -> str:
    """Return the table of `frequency_table` in Markdown.

    Raises:
        ConfigError: as in `frequency_table`.
    """
    lines = [
        ["occurs", "ids", "tokens", *(f"fvu, {cell(name)}" for name in reports)],
        ["---"] * (3 + len(reports)),
        *_cells(reports),
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def position_table(reports: Mapping[str, EvalReport]) -> Any:
    """Return a rich table of the fvu and the added cross-entropy of every dictionary in each band of positions.

    Raises:
        ConfigError: a report has no bands, or the reports are of different texts.
    """
    bands = [report.by_position or () for report in reports.values()]
    if not bands or not bands[0] or any([b[:3] for b in other] != [b[:3] for b in bands[0]] for other in bands):
        raise ConfigError("the reports lack bands, or are of different texts; evaluate together with by_position=True")
    names = short_names(list(reports))
    titles = ("position", "tokens", *(f"{what}, {name}" for name in names for what in ("fvu", "ce_increase")))
    rows = [
        (same[0].label, f"{same[0].n_tokens:,}", *(m.short for band in same for m in (band.fvu, band.ce_increase)))
        for same in zip(*bands, strict=True)
    ]
    caption = "fvu and ce_increase (ce_sae − ce_clean, in nats) by position; ± half of the 95 % interval"
    return grid(titles, rows, caption=wrapped(caption), **NARROW)


def _cells(reports: Mapping[str, EvalReport]) -> list[list[str]]:
    """Return a line for each band: range, number of ids, share of the tokens, and the fvu of each report."""
    bands = [report.by_frequency or () for report in reports.values()]
    if not bands or not bands[0] or any([b[:4] for b in other] != [b[:4] for b in bands[0]] for other in bands):
        raise ConfigError("the reports lack bands, or are of different texts; evaluate together with by_frequency=True")
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
