"""Edits of a dictionary's codes, as small frozen values for `LanguageModel.splice`.

An edit changes the codes of some latents to gain · code + offset, at all counted positions or at named ones. With the error
term, the activation becomes x + Σ_i (new_i − old_i) W_dec[i]. The part of x that the dictionary does not reconstruct stays.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any

from saelens_lite.errors import ConfigError

Positions = int | Iterable[Any] | slice | None
END_OF_PROMPT = "; the last of a prompt is lm.to_tokens(prompt).tokens.shape[1] - 1"


@dataclass(frozen=True)
class Edit:
    """A change of the codes of one or several latents. A latent that is named twice counts once.

    `positions` is a number, several numbers or a slice, counted from the start of the row, also in generation. Position 0 is
    BOS; the last of a prompt is lm.to_tokens(prompt).tokens.shape[1] - 1. Named positions are always edited. By default, the
    positions that the dictionary was never trained on are left out.

    Raises:
        ConfigError: latents or positions are not whole numbers ≥ 0, or a value is not finite.
    """

    latents: int | Iterable[Any]
    positions: Positions = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        for name in (f.name for f in fields(self)):
            given, check = getattr(self, name), {"latents": _whole_numbers, "positions": _positions}.get(name, _finite)
            object.__setattr__(self, name, check(f"{type(self).__name__}: {name}", given))

    @property
    def gain(self) -> float:
        """Factor of the code."""
        return 0.0

    @property
    def offset(self) -> float:
        """Amount added to the code after `gain`."""
        return 0.0


@dataclass(frozen=True)
class Ablate(Edit):
    """The edit code ← 0."""


@dataclass(frozen=True)
class Clamp(Edit):
    """The edit code ← value, also where the latent does not fire.

    Source: Templeton et al. 2024, Scaling monosemanticity, section "Influence on behavior", with the error term.
    """

    value: float | int

    @property
    def offset(self) -> float:
        """Amount added to the code after `gain`."""
        return self.value


@dataclass(frozen=True)
class Scale(Edit):
    """The edit code ← factor · code. Nothing changes where the latent does not fire."""

    factor: float | int

    @property
    def gain(self) -> float:
        """Factor of the code."""
        return self.factor


@dataclass(frozen=True)
class Add(Edit):
    """The edit code ← code + amount. With the error term this is steering: it adds amount · W_dec[latent] to the activation.

    Source: Turner et al. 2023, Steering language models with activation engineering, arXiv:2308.10248.
    """

    amount: float | int

    @property
    def gain(self) -> float:
        """Factor of the code."""
        return 1.0

    @property
    def offset(self) -> float:
        """Amount added to the code after `gain`."""
        return self.amount


def _whole_numbers(what: str, given: Any, meaning: str = "") -> tuple[int, ...]:
    """Return the given numbers in order, without repeats. `meaning` ends the message of an error."""
    if hasattr(given, "tolist"):  # tensors and arrays
        given = given.tolist()
    numbers = list(given) if isinstance(given, Iterable) else [given]
    if not all(isinstance(i, Integral) and not isinstance(i, bool) and i >= 0 for i in numbers):
        raise ConfigError(f"{what} = {given!r}; expected whole numbers ≥ 0{meaning}")
    return tuple(dict.fromkeys(int(i) for i in numbers))


def _positions(what: str, given: Any) -> tuple[int, ...] | slice | None:
    if given is None or not isinstance(given, slice):
        return None if given is None else _whole_numbers(what, given, END_OF_PROMPT)
    _whole_numbers(what, [bound for bound in (given.start, given.stop, given.step) if bound is not None], END_OF_PROMPT)
    if given.step == 0:
        raise ConfigError(f"{what} = {given}; a slice cannot have a step of 0")
    return given


def _finite(what: str, given: Any) -> float:
    if not isinstance(given, Real) or isinstance(given, bool) or not math.isfinite(given):
        raise ConfigError(f"{what} = {given!r}; expected a finite number")
    return float(given)
