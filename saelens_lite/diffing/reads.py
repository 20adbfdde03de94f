"""The activations of two models in order, in batches of whole units: rows of a text, or blocks of consecutive activations.

Units are what intervals are drawn over, because activations of one text are not independent. A cache holds the tokens of a row
in order, but not where a row ends. So its units are blocks of consecutive activations, as are those of activations
in memory.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelens_lite.arrays import described
from saelens_lite.cache import ActivationCache
from saelens_lite.cache.difference import with_differences
from saelens_lite.cache.source import Statistics, TensorSource
from saelens_lite.config import TextConfig
from saelens_lite.devices import wide
from saelens_lite.dictionary import Dictionary
from saelens_lite.errors import ConfigError, NonFiniteError, ShapeError, TextError
from saelens_lite.evaluation.held import held_batches
from saelens_lite.evaluation.text_rows import as_trained, row_blocks
from saelens_lite.model.models import Models
from saelens_lite.model.passes import default_batch_tokens, read
from saelens_lite.ports import split_key
from saelens_lite.processes import ALONE
from saelens_lite.progress import progress_bar
from saelens_lite.tokens import Text, TokenRows, source_name

BLOCK = 128  # consecutive activations in a unit where the length of a row is not known
MIN_BLOCKS = 64  # of them at least; blocks are shorter if there would be less
MIN_ROW_BLOCKS = 30  # blocks at least where the length of a row is known; else they are shorter than 2 rows
MIN_UNITS = 10  # units in which a latent must fire to get an interval
BATCH = 4096  # activations without a model that are read at a time
log = logging.getLogger(__name__)


class Some(NamedTuple):
    """Activations by key, in float32 at least, and the unit of each row, counted from 0 in this batch."""

    acts: dict[str, Float[Tensor, "n _"]]
    unit: Int[Tensor, " n"]


class Reads(NamedTuple):
    """Activations that can be read several times. `units` says of what there are `n_units`."""

    batches: Callable[[], Iterator[Some]]
    n_tokens: int
    n_units: int
    units: str
    source: str

    def __iter__(self) -> Iterator[Some]:  # type: ignore[override]
        return self.batches()

    def with_progress(self, what: str) -> Iterator[Some]:
        """Yield the batches under a progress bar."""
        with progress_bar(what, self.n_tokens) as advance:
            for some in self.batches():
                yield some
                advance(len(some.unit), "")


@contextmanager
def opened(
    dictionary: Dictionary,
    given: Any,
    text: Text | TokenRows | None,
    keys: Sequence[str],
    n_tokens: int | None,
    text_config: TextConfig | None,
    batch_tokens: int | None,
) -> Iterator[Reads]:
    """Yield the activations of some keys, from models and a text, a cache, a source in memory, or arrays by key."""
    is_models = isinstance(given, Models)
    if batch_tokens is not None and batch_tokens < 1:
        raise ConfigError(f"batch_tokens is {batch_tokens}; expected at least 1")
    if isinstance(given, Mapping) and any(isinstance(name, str | Path) for name in given.values()):
        raise ConfigError("diff takes models, not their names; load each with sl.load_model")
    if is_models != (text is not None):
        raise ConfigError(
            "diff(d, {name: model}, text) takes models by name together with a text; diff(d, cache) and diff(d, activations) "
            f"take no text. The second argument is {described(given)}, {'without' if is_models else 'with'} a text"
        )
    if is_models:
        with _of_text(dictionary, given, text, keys, n_tokens, text_config, batch_tokens) as reads:
            yield _checked(reads)
        return
    if text_config is not None:
        raise ConfigError("text_config belongs to a text; a cache or activations in memory already have their rows")
    source = TensorSource(dict(given)) if isinstance(given, Mapping) else given
    if not isinstance(source, ActivationCache | TensorSource):
        raise ConfigError(
            f"the second argument is {described(given)}; expected models by name, an ActivationCache, a TensorSource, or "
            "arrays by key"
        )
    for key in keys:
        source.d_in(key)
    _check_origins(dictionary, source, keys)
    for port in (*dictionary.reads, *dictionary.writes):
        if port.minus is not None:
            with_differences(source, [port.key]).statistics(port.key)  # warns of rounding, and refuses what is mostly that
    yield _checked(of_source(source, keys, n_tokens, batch_tokens or BATCH))


def _check_origins(dictionary: Dictionary, source: ActivationCache | TensorSource, keys: Sequence[str]) -> None:
    """Raise ConfigError if a model of the activations was processed otherwise than in training; warn of another model."""
    for key in keys:
        name = split_key(key).model
        own, theirs = dictionary.origin.of(name), source.origin(key).of(name)
        if own.model is None or theirs.model is None:
            continue
        if own.processing != theirs.processing:
            raise ConfigError(
                f"{key}: the activations are of a model with processing {list(theirs.processing)}, but the dictionary was "
                f"trained on one with {list(own.processing)}; capture again with that"
            )
        if (own.model, own.revision) != (theirs.model, theirs.revision):
            was, now = (f"{one.model}{f' at {one.revision}' if one.revision else ''}" for one in (own, theirs))
            log.warning("%s: the dictionary was trained on %s, and these activations are of %s", key, was, now)


def _checked(reads: Reads) -> Reads:
    """Raise ConfigError if there are too few units for any interval."""
    if reads.n_units < MIN_UNITS:
        raise ConfigError(
            f"{reads.n_units} {reads.units} are too few to tell models apart; give at least {MIN_UNITS}, better hundreds"
        )
    return reads


@contextmanager
def _of_text(
    dictionary: Dictionary,
    lm: Models,
    text: Text | TokenRows,
    keys: Sequence[str],
    n_tokens: int | None,
    text_config: TextConfig | None,
    batch_tokens: int | None,
) -> Iterator[Reads]:
    """Yield the activations of the tokens of a text that count; units are rows."""
    for key in keys:
        lm.split(key)
    lm.check_origin(dictionary.origin)
    lm.warn_of_precision(dictionary.origin)
    config = None if isinstance(text, TokenRows) else as_trained([dictionary], lm, text, text_config or TextConfig())
    size = batch_tokens or default_batch_tokens(lm)
    with held_batches(lm, row_blocks(lm, text, n_tokens, config), size, ALONE) as held:
        if not held.n_kept:
            raise TextError("there is no text to compare on: none of the positions of the token rows counts")

        def batches() -> Iterator[Some]:
            for batch in held:
                acts = read(lm, batch, keys)
                yield Some(_wide_enough(acts.acts), acts.row.unique(return_inverse=True)[1])

        name = source_name(text, text_config) or "a text without a name"
        yield Reads(batches, held.n_kept, held.n_sequences, "rows of tokens", name)


def of_source(source: ActivationCache | TensorSource, keys: Sequence[str], n_tokens: int | None, size: int = BATCH) -> Reads:
    """Return the first activations of a source in order; units are blocks."""
    n = min(source.n_tokens or 0, n_tokens or source.n_tokens or 0)
    block = _block_length(source.origin(keys[0]).n_ctx, n)

    def pieces() -> Iterator[dict[str, Tensor]]:
        if isinstance(source, TensorSource):
            yield {key: source.x[key] for key in keys}
        else:
            for number in range(len(source.manifest["shards"])):
                yield source.read_shard(number)

    def batches() -> Iterator[Some]:
        seen, step = 0, max(1, size // block) * block
        for piece in _whole_blocks(pieces(), keys, block):
            for first in range(0, min(len(piece[keys[0]]), n - seen), step):
                acts = {key: piece[key][first : min(first + step, n - seen)] for key in keys}
                yield Some(_wide_enough(acts), torch.arange(len(acts[keys[0]])) // block)
            seen += len(piece[keys[0]])
            if seen >= n:
                return

    name = str(source.path) if isinstance(source, ActivationCache) else "activations in memory"
    return Reads(batches, n, -(-n // block), f"blocks of {block} consecutive activations", name)


def _block_length(n_ctx: int | None, n: int) -> int:
    """Return the number of activations in a block: two rows of text, or BLOCK where the length of a row is not known."""
    if not n_ctx:
        return max(1, min(BLOCK, n // MIN_BLOCKS))
    block = max(1, min(2 * n_ctx, n // MIN_ROW_BLOCKS))
    if block < n_ctx:
        log.warning(
            "intervals may be too narrow: %s activations are less than %s rows of %s tokens, so blocks of %s are parts of rows "
            "and not independent; give more activations",
            f"{n:,}", MIN_ROW_BLOCKS, n_ctx, block,
        )  # fmt: skip
    return block


def _whole_blocks(pieces: Iterator[dict[str, Tensor]], keys: Sequence[str], block: int) -> Iterator[dict[str, Tensor]]:
    """Yield the rows in pieces of whole blocks; only the last piece may end with a part of one."""
    rest: dict[str, Tensor] | None = None
    for piece in chain(pieces, [None]):
        if piece is None:
            if rest is not None and len(rest[keys[0]]):
                yield rest
            return
        whole = {key: piece[key] if rest is None else torch.cat([rest[key], piece[key]]) for key in keys}
        cut = len(whole[keys[0]]) // block * block
        rest = {key: x[cut:] for key, x in whole.items()}
        if cut:
            yield {key: x[:cut] for key, x in whole.items()}


def _wide_enough(acts: Mapping[str, Tensor]) -> dict[str, Float[Tensor, "n _"]]:
    return {key: x if x.dtype == torch.float64 else x.float() for key, x in acts.items()}


def statistics_of(reads: Reads, keys: Sequence[str]) -> dict[str, Statistics]:
    """Return the mean and RMS norm of each key.

    Raises:
        NonFiniteError: activations hold NaN or infinity, or are all zero.
    """
    sums: dict[str, Tensor] = {}
    squares = dict.fromkeys(keys, 0.0)
    for some in reads.with_progress("scales"):
        for key in keys:
            x = wide(some.acts[key])
            sums[key] = sums.get(key, 0) + x.sum(0).cpu()
            squares[key] += float(x.square().sum())
    statistics = {key: Statistics(sums[key] / reads.n_tokens, (squares[key] / reads.n_tokens) ** 0.5) for key in keys}
    for key, one in statistics.items():
        if not bool(torch.isfinite(one.mean).all()) or not 0 < one.rms_norm < float("inf"):
            raise NonFiniteError(f"the activations of {key} {'are all zero' if one.rms_norm == 0 else 'hold NaN or infinity'}")
    return statistics


def check_widths(dictionary: Dictionary, widths: Mapping[str, int]) -> None:
    """Raise ShapeError unless the activations have the widths of the dictionary's ports."""
    for port in (*dictionary.reads, *dictionary.writes):
        for name in (port.model, port.minus):
            key = port.key if port.minus is None else f"{name}:{port.hook}"
            if key in widths and widths[key] != port.width:
                raise ShapeError(f"the activations of {key} have width {widths[key]}; the dictionary takes {port.width}")
