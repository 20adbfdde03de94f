"""Evaluation: how sparse a dictionary is, how much it reconstructs, and what the model loses when it reads the
reconstruction instead of its own activations."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch
from jaxtyping import Float
from torch import Tensor

from saelens_lite.config import TextConfig
from saelens_lite.dictionary import Dictionary
from saelens_lite.errors import ConfigError
from saelens_lite.evaluate import metrics
from saelens_lite.evaluate.frequency import Bands, FrequencyBand, frequency_bands, frequency_markdown, frequency_table
from saelens_lite.evaluate.metrics import Metric
from saelens_lite.files import write_json
from saelens_lite.model import LanguageModel
from saelens_lite.progress import progress_bar
from saelens_lite.tokens import Text, TokenRows, text_hash, token_rows

__all__ = ["EvalReport", "FrequencyBand", "Metric", "evaluate", "frequency_markdown", "frequency_table", "table"]

FORMAT = 1


@dataclass(frozen=True)
class EvalReport:
    """Metrics of one dictionary with 95 % confidence intervals, and the text they were measured on.

    `metrics` by name (saelens_lite.evaluate.metrics has the formulas), `density` [d_sae] = firing frequency of each latent,
    `by_frequency` = fvu by how often a token occurs in the text, if it was asked for.
    """

    metrics: dict[str, Metric]
    density: Float[Tensor, " d_sae"]
    n_tokens: int
    n_sequences: int
    text_sha256: str
    model: str
    hook: str
    excluded: str
    by_frequency: tuple[FrequencyBand, ...] | None = None

    def __getitem__(self, name: str) -> float:
        """The value of a metric."""
        return self.metrics[name].value

    @property
    def frac_alive(self) -> float:
        """Share of latents that fired at least once."""
        return float((self.density > 0).double().mean())

    @property
    def frac_dense(self) -> float:
        """Share of latents that fired on more than 10 % of the tokens."""
        return float((self.density > 0.1).double().mean())

    def to_dict(self) -> dict[str, Any]:
        """Everything but the per-latent densities, as plain data."""
        content = {
            "format": FORMAT,
            "metrics": {name: _finite(m._asdict()) for name, m in self.metrics.items()},
            "frac_alive": self.frac_alive,
            "frac_dense": self.frac_dense,
            **{key: getattr(self, key) for key in ("n_tokens", "n_sequences", "text_sha256", "model", "hook", "excluded")},
        }
        if self.by_frequency is not None:
            content["by_frequency"] = [band._asdict() | {"fvu": _finite(band.fvu._asdict())} for band in self.by_frequency]
        return content

    def to_json(self, path: str | Path | None = None) -> str:
        """The report as JSON, also written to `path` when given."""
        if path is not None:
            write_json(Path(path), self.to_dict())
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        lines = [f"{name:30} {metric}" for name, metric in self.metrics.items()]
        lines += [f"{'frac_alive':30} {self.frac_alive:.4g}", f"{'frac_dense':30} {self.frac_dense:.4g}"]
        lines += [f"{f'fvu of tokens seen {band.label}':50} {band.fvu}" for band in self.by_frequency or ()]
        where = (
            f"{self.n_tokens:,} tokens in {self.n_sequences:,} sequences, {self.model}, {self.hook}, without {self.excluded}"
        )
        return "\n".join([where, *lines])


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """The values, None where there is no number: JSON has no NaN."""
    return {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in values.items()}


@overload
def evaluate(dictionary: Dictionary, lm: LanguageModel, text: Text | TokenRows, **settings: Any) -> EvalReport: ...
@overload
def evaluate(
    dictionary: Sequence[Dictionary], lm: LanguageModel, text: Text | TokenRows, **settings: Any
) -> list[EvalReport]: ...
@torch.no_grad()
def evaluate(
    dictionary: Dictionary | Sequence[Dictionary],
    lm: LanguageModel,
    text: Text | TokenRows,
    *,
    hook: str | None = None,
    n_tokens: int | None = 100_000,
    text_config: TextConfig | None = None,
    by_frequency: bool = False,
    batch_tokens: int = 8192,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> EvalReport | list[EvalReport]:
    """The report of a dictionary; of several dictionaries of one hook in one pass, a list of reports.

    The model runs over the text as it is, with zeros at the hook everywhere, and with each reconstruction at the
    positions that count. Special tokens, padding and position 0 do not count and keep their activation. Text is cut into
    rows as the training text was, a document at a time; `text_config` says otherwise. `by_frequency` adds the fvu of tokens
    that occur 1 to 9, 10 to 99, … times among those that count.

    Raises:
        ConfigError: dictionaries of different hooks, none that names its hook, or of a model with other processing.
        HookError, ShapeError, TextError: a hook the model lacks, a width that does not fit, no text.
    """
    several = not isinstance(dictionary, Dictionary)
    dictionaries = list(dictionary) if several else [dictionary]
    hook = _common_hook(dictionaries, hook)
    for one in dictionaries:
        lm.check_origin(one.origin)
    rows = _rows(dictionaries[0], lm, text, n_tokens, text_config)
    bands = frequency_bands(rows) if by_frequency else None
    sums = metrics.PooledSums(n_bootstrap, seed)
    counts = [torch.zeros(d.d_sae, dtype=torch.long) for d in dictionaries]
    per_batch = max(1, batch_tokens // rows.tokens.shape[1])
    with progress_bar("evaluate", rows.n_kept) as advance:
        for start in range(0, len(rows.tokens), per_batch):
            chosen = slice(start, start + per_batch)
            batch = rows.take(chosen)
            in_batch = bands._replace(band=bands.band[chosen]) if bands else None
            _add_batch(sums, counts, dictionaries, lm, batch, hook, in_batch)
            advance(batch.n_kept, "")
    reports = [
        EvalReport(
            metrics=metrics.reconstruction_metrics(sums, str(i)) | metrics.cross_entropy_metrics(sums, str(i)),
            density=counts[i].float() / rows.n_kept,
            n_tokens=rows.n_kept,
            n_sequences=len(rows.tokens),
            text_sha256=text_hash(rows),
            model=lm.name,
            hook=hook,
            excluded=_excluded(text, text_config),
            by_frequency=tuple(bands.report(metrics.band_fvu(sums, str(i)))) if bands else None,
        )
        for i in range(len(dictionaries))
    ]
    return reports if several else reports[0]


def _add_batch(
    sums: metrics.PooledSums,
    counts: list[Tensor],
    dictionaries: list[Dictionary],
    lm: LanguageModel,
    batch: TokenRows,
    hook: str,
    bands: Bands | None,
) -> None:
    """Collect one batch: the clean pass, the zeroed pass, and a pass for each dictionary."""
    tokens, keep = batch.tokens.to(lm.device), batch.keep.to(lm.device)
    membership = metrics.membership(bands.band.to(lm.device), len(bands.exponent), keep) if bands else None
    clean: list[Tensor] = []

    def logits_with(new) -> Tensor:
        with lm.replace(hook, new):
            return lm.logits(tokens)

    sums.next_sequences(len(tokens))
    metrics.add_cross_entropy(sums, "clean", logits_with(clean.append), tokens, keep)
    x = clean[0]
    metrics.add_activations(sums, x, keep)
    if membership is not None:
        metrics.add_bands(sums, x, membership)
    metrics.add_cross_entropy(sums, "zero", logits_with(torch.zeros_like), tokens, keep)
    for i, dictionary in enumerate(dictionaries):
        codes = dictionary.encode(x)
        x_hat = dictionary.decode(codes).to(x.dtype)
        spliced = torch.where(keep[..., None], x_hat, x)
        metrics.add_reconstruction(sums, str(i), x, x_hat, codes, keep)
        if membership is not None:
            metrics.add_band_errors(sums, str(i), x, x_hat, membership)
        metrics.add_cross_entropy(sums, str(i), logits_with(lambda _, spliced=spliced: spliced), tokens, keep)
        kept = codes.latent[keep.flatten()[codes.row]]
        counts[i] += torch.bincount(kept, minlength=dictionary.d_sae).cpu()


def _rows(
    dictionary: Dictionary, lm: LanguageModel, text: Text | TokenRows, n_tokens: int | None, config: TextConfig | None
) -> TokenRows:
    """Token rows like those the dictionary was trained on, but for what `config` says."""
    if isinstance(text, TokenRows):
        return text
    config, origin = config or TextConfig(), dictionary.origin
    if "bos" not in config.model_fields_set and origin.prepend_bos is False:
        config = config.replace(bos="none")
    if config.n_ctx is None and not isinstance(text, Tensor):
        config = config.replace(n_ctx=min(origin.n_ctx or lm.n_ctx, lm.n_ctx))
    return token_rows(lm, text, n_tokens=n_tokens, text_config=config)


def _excluded(text: Text | TokenRows, config: TextConfig | None) -> str:
    """The positions that do not count, in words."""
    positions = (0,) if config is None or isinstance(text, TokenRows) else config.exclude_positions
    several = f" and position{'s' * (len(positions) > 1)} {', '.join(map(str, positions))}"
    return f"BOS, padding{several}" if positions else "BOS and padding"


def _common_hook(dictionaries: list[Dictionary], hook: str | None) -> str:
    """The hook all dictionaries belong to."""
    hooks = {hook} if hook else {d.origin.hook for d in dictionaries}
    if len(hooks) != 1 or None in hooks:
        found = sorted(str(h) for h in hooks)
        raise ConfigError(
            f"dictionaries evaluated together need one hook; found {', '.join(found) or 'no dictionary'}; give hook="
        )
    return hooks.pop()


def table(reports: dict[str, EvalReport]) -> Any:
    """A rich table of several reports, a row each."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    columns = {"l0": "L0", "fvu": "FVU", "ce_loss_score": "CE recovered"}
    grid = Table(box=SIMPLE_HEAD, caption="± half of the 95 % interval", caption_justify="left")
    for title in ("dictionary", *columns.values(), "alive", "dense"):
        grid.add_column(title, no_wrap=title != "dictionary")
    for name, report in reports.items():
        chosen = [report.metrics[key] for key in columns]
        cells = [f"{m.value:.4g} ±{(m.high - m.low) / 2:.1g}" for m in chosen]
        grid.add_row(name, *cells, f"{report.frac_alive:.1%}", f"{report.frac_dense:.1%}")
    return grid
