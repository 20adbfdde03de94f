"""Differences between the activations of two models, made from a source that has those of both.

A difference is small beside its parts, and the rounding of stored parts stays in it. A number x in a format with the unit
roundoff u has an error that is uniform in ±u 2^⌊log₂|x|⌋, with the variance (u 2^⌊log₂|x|⌋)² / 3. The errors of both parts add
up. Their share of the variance of the difference is estimated from the stored numbers. Training warns of it, and refuses a
difference that is mostly rounding.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saelens_lite.cache.source import Batch, Moments, Source, Statistics, TensorSource
from saelens_lite.config import Origin
from saelens_lite.devices import wide
from saelens_lite.errors import ConfigError, HookError
from saelens_lite.keys import captured, parts_of, split_key
from saelens_lite.tensor_files import DTYPES

SAMPLE = 1 << 18  # activations that statistics are of, at most
SAMPLE_BATCH = 4096
NOISY, MOSTLY_NOISE = 0.01, 0.5  # shares of rounding in the variance: of a warning, and of a refusal
log = logging.getLogger(__name__)


def with_differences(source: Source, hooks: Sequence[str]) -> Source:
    """Return a source that also has the differences among some hooks, such as "chat-base:blocks.3.hook_resid_pre".

    The same source is returned if it has them all, or if none is a difference.
    """
    return source if captured(hooks, source.hooks) == list(dict.fromkeys(hooks)) else DifferenceSource(source, hooks)


class DifferenceSource:
    """A source with the differences between the activations of its models. `hooks` are those of the source alone.

    Differences are float32, or float64 if a part is. Their statistics are of all activations, or of a fixed random sample of
    SAMPLE of them; for a stream, of its first half buffer.
    """

    def __init__(self, whole: Source, wanted: Sequence[str] = ()):
        self.whole, self.wanted = whole, wanted
        self._known: dict[str, Statistics] = {}

    def __getattr__(self, name: str) -> Any:
        if name in ("record", "expect", "lm"):  # those that a source need not have
            return getattr(self.whole, name)
        raise AttributeError(name)

    @property
    def hooks(self) -> Sequence[str]:
        """The hooks of the source, without differences."""
        return self.whole.hooks

    @property
    def n_tokens(self) -> int | None:
        """Number of activations of each hook in one pass; None if it is not known before reading."""
        return self.whole.n_tokens

    def _parts(self, hook: str) -> tuple[str, str] | None:
        """Return the keys whose difference a key is; None for a hook of the source, and for other names."""
        return None if hook in self.whole.hooks else parts_of(hook)

    def d_in(self, hook: str) -> int:
        """Return the width of the activations at a hook.

        Raises:
            HookError: the source has neither the hook nor both parts of the difference, or the parts differ in width.
        """
        parts = self._parts(hook)
        if parts is None:
            return self.whole.d_in(hook)
        width, other = map(self.whole.d_in, parts)
        if width != other:
            raise HookError(f"{hook!r} cannot be made: {parts[0]!r} has the width {width}, and {parts[1]!r} {other}")
        return width

    def origin(self, hook: str) -> Origin:
        """Return the models and text that the activations come from."""
        parts = self._parts(hook)
        return self.whole.origin(hook if parts is None else parts[0])

    def statistics(self, hook: str) -> Statistics:
        """Return the mean and root mean square norm of the activations, and warn if a difference is partly rounding.

        Raises:
            ConfigError: a difference is mostly rounding.
        """
        if (parts := self._parts(hook)) is None:
            return self.whole.statistics(hook)
        if hook not in self._known:
            self._known[hook] = self._measured(hook, parts)
        return self._known[hook]

    def _measured(self, hook: str, parts: tuple[str, str]) -> Statistics:
        """Return the statistics of a difference, judged by the share of rounding in them."""
        moments, noise = Moments(self.d_in(hook)), 0.0
        computed_in = [self._precision(part) for part in parts]
        for batch in self._sample(parts):
            moments.add(_difference(batch, parts))
            noise += sum(rounding_variance(batch[part], dtype) for part, dtype in zip(parts, computed_in, strict=True))
        if self.n_tokens is not None and moments.n < self.n_tokens:
            log.info("statistics of %s are of %s of %s activations", hook, f"{moments.n:,}", f"{self.n_tokens:,}")
        statistics = moments.statistics()
        variance = statistics.rms_norm**2 - float(wide(statistics.mean).square().sum())
        if variance > 0:
            _judge(hook, noise / moments.n / variance)
        return statistics

    def _precision(self, part: str) -> torch.dtype | None:
        """Return the number type in which the model of a part has run, if that is known."""
        return DTYPES.get(self.whole.origin(part).of(split_key(part).model).precision or "")

    def _sample(self, parts: Sequence[str]) -> Iterator[Batch]:
        """Yield the activations that statistics are of: all, or a fixed random sample."""
        if (first := getattr(self.whole, "sample", None)) is not None:
            yield first()
            return
        left = SAMPLE if self.n_tokens is None else min(SAMPLE, self.n_tokens)
        with _closing(self.whole.batches(parts, min(SAMPLE_BATCH, left), seed=0)) as batches:
            while left > 0:
                batch = next(batches)
                yield {part: batch[part][:left] for part in parts}  # the last batch may begin another epoch
                left -= len(batch[parts[0]])

    def batches(self, hooks: Sequence[str], batch_size: int, seed: int, start: int = 0, **where: Any) -> Iterator[Batch]:
        """Return the batches of the source with differences between them; see `Source.batches`."""
        needed = captured(hooks, self.hooks)
        return self._completed(self.whole.batches(needed, batch_size, seed, start, **where), hooks)

    def _completed(self, batches: Iterator[Batch], hooks: Sequence[str]) -> Iterator[Batch]:
        with _closing(batches):
            for batch in batches:
                yield self._complete(batch, hooks)

    def _complete(self, batch: Batch, hooks: Sequence[str]) -> Batch:
        made = {hook: self._parts(hook) for hook in hooks}
        return {hook: batch[hook] if parts is None else _difference(batch, parts) for hook, parts in made.items()}

    def hold_out(self, n_tokens: int) -> tuple[TensorSource, "DifferenceSource"]:
        """Return activations to validate on, with the differences that were asked for, and a source of the others."""
        held, rest = self.whole.hold_out(n_tokens)
        made = self._complete(held.x, list(dict.fromkeys([*self.hooks, *self.wanted])))
        return TensorSource(made, origin=held.origin(held.hooks[0])), type(self)(rest, self.wanted)

    def describe(self) -> dict | None:
        """Return the description of the source: training makes the differences again."""
        return self.whole.describe()


@contextmanager
def _closing(batches: Iterator[Batch]) -> Iterator[Iterator[Batch]]:
    """Close an iterator at the end of a block if it can be closed, which ends the thread that reads ahead."""
    try:
        yield batches
    finally:
        getattr(batches, "close", lambda: None)()


def _difference(batch: Mapping[str, Tensor], parts: tuple[str, str]) -> Float[Tensor, "n d_in"]:
    """Return the difference of two parts in float32, or in float64 if one of them is."""
    one, other = (batch[part] for part in parts)
    dtype = torch.promote_types(torch.promote_types(one.dtype, other.dtype), torch.float32)
    return one.to(dtype) - other.to(one.device, dtype)


def rounding_variance(x: Float[Tensor, "n d_in"], computed_in: torch.dtype | None = None) -> float:
    """Return the expected sum of squares of the errors that rounding has left in x.

    computed_in: the number type in which x was computed, if it may be coarser than that of x.
    """
    info = max((torch.finfo(dtype) for dtype in (x.dtype, computed_in or x.dtype)), key=lambda info: info.eps)
    exact = wide(x)
    below = torch.exp2(torch.frexp(exact).exponent.to(exact.dtype) - 1)  # the power of 2 below |x|
    spacing = info.eps * below.clamp_min(info.smallest_normal) * (exact != 0)
    return float(spacing.square().sum()) / 12


def _judge(hook: str, share: float) -> None:
    """Warn if a difference is partly rounding. Raise ConfigError if it is mostly that."""
    remedy = "run the models in float32 and capture with dtype='float32'"
    if share > MOSTLY_NOISE:
        raise ConfigError(
            f"{hook} is mostly rounding: its parts are stored or computed in so few digits that rounding makes about "
            f"{min(share, 1):.0%} of its variance; {remedy}"
        )
    if share > NOISY:
        log.warning("rounding of the two parts makes about %.1f %% of the variance of %s; %s", 100 * share, hook, remedy)
