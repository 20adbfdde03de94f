"""Edits of a dictionary's codes: small frozen values for `LanguageModel.splice`.

Each changes the codes of some latents to gain · code + offset, at all positions that count or at those named. With the error
term, the activation becomes x + Σ_i (new_i − old_i) W_dec[i], so what the dictionary does not reconstruct stays in it, and
the model cannot take an edit back.
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
    """A change of the codes of `latents`: one, or several, of which each counts once.

    `positions` are counted from the beginning of the row, in generation too: one, several, or a slice, whose stop may be
    open. Position 0 is BOS, and the last of a prompt is lm.to_tokens(prompt).tokens.shape[1] - 1. Named ones are edited even
    where the dictionary was never trained; by default those are left out.

    Raises:
        ConfigError: latents or positions that are no whole numbers from 0 on, or a value that is no finite number.
    """

    latents: int | Iterable[Any]
    positions: Positions = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        for name in (f.name for f in fields(self)):
            given, check = getattr(self, name), {"latents": _whole_numbers, "positions": _positions}.get(name, _finite)
            object.__setattr__(self, name, check(f"{type(self).__name__}: {name}", given))

    @property
    def gain(self) -> float:
        """What the code is multiplied with."""
        return 0.0

    @property
    def offset(self) -> float:
        """What is then added to it."""
        return 0.0


@dataclass(frozen=True)
class Ablate(Edit):
    """code ← 0."""


@dataclass(frozen=True)
class Clamp(Edit):
    """code ← value, whether the latent fires or not.

    Source: Templeton et al. 2024, Scaling monosemanticity, section "Influence on behavior", with the error term.
    """

    value: float | int

    @property
    def offset(self) -> float:
        """What is then added to it."""
        return self.value


@dataclass(frozen=True)
class Scale(Edit):
    """code ← factor · code: nothing changes where the latent does not fire."""

    factor: float | int

    @property
    def gain(self) -> float:
        """What the code is multiplied with."""
        return self.factor


@dataclass(frozen=True)
class Add(Edit):
    """code ← code + amount, which with the error term is steering: amount · W_dec[latent] is added to the activation.

    Source: Turner et al. 2023, Steering language models with activation engineering, arXiv:2308.10248.
    """

    amount: float | int

    @property
    def gain(self) -> float:
        """What the code is multiplied with."""
        return 1.0

    @property
    def offset(self) -> float:
        """What is then added to it."""
        return self.amount


def _whole_numbers(what: str, given: Any, meaning: str = "") -> tuple[int, ...]:
    """Return the numbers given, each once, in their order; `meaning` ends the message of an error."""
    if hasattr(given, "tolist"):  # tensors and arrays
        given = given.tolist()
    numbers = list(given) if isinstance(given, Iterable) else [given]
    if not all(isinstance(i, Integral) and not isinstance(i, bool) and i >= 0 for i in numbers):
        raise ConfigError(f"{what} = {given!r}; expected whole numbers from 0 on{meaning}")
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
