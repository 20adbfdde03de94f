"""The two models of a dictionary: which ports belong to each, and the directions there in comparable units."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from saelens_lite.dictionary import Dictionary
from saelens_lite.errors import ConfigError
from saelens_lite.ports import Port, apart, key_of, names


class Moments(NamedTuple):
    """The mean of the activations of a key and the root mean square of their norms."""

    mean: Float[Tensor, " d"]
    rms: float

    @property
    def scale(self) -> float:
        """The factor that gives the activations the RMS norm √d, as in training."""
        return len(self.mean) ** 0.5 / self.rms


class Sides(NamedTuple):
    """The names of two models, and the hooks at which a dictionary writes both, or their difference."""

    base: str
    tuned: str
    hooks: tuple[str, ...]
    is_of_differences: bool

    @classmethod
    def of(cls, dictionary: Dictionary, base: str | None = None) -> "Sides":
        """Return the models of a dictionary's write ports. The base model is the first one, or the one that is subtracted.

        Raises:
            ConfigError: the ports are not those of two models at the same hooks, or `base` is not one of these models.
        """
        ports = dictionary.writes
        minus = {port.minus for port in ports}
        models = list(dict.fromkeys(name for port in ports for name in (port.minus, port.model) if name is not None))
        if len(models) != 2 or len(minus) != 1 or any(port.hook is None for port in ports):
            raise ConfigError(
                f"a diff needs a dictionary that writes the same hooks of two models, such as base:HOOK and chat:HOOK, or "
                f"their difference, chat-base:HOOK; this one writes {names(ports)}"
            )
        if base is not None and base not in models:
            raise ConfigError(f"base = {base!r} is none of the dictionary's models, {' and '.join(models)}")
        first = base or models[0]
        if None not in minus and first not in minus:
            raise ConfigError(
                f"base = {first!r}, but the dictionary is of {names(ports)}, from which {models[0]} is subtracted"
            )
        tuned = next(name for name in models if name != first)
        of_base, of_tuned = ({port.hook: port.width for port in ports if port.model == name} for name in (first, tuned))
        if None in minus and of_base != of_tuned:
            raise ConfigError(f"the dictionary writes other hooks, or widths, of {first} than of {tuned}: {names(ports)}")
        return cls(first, tuned, tuple(of_tuned), None not in minus)

    def keys(self, model: str) -> list[str]:
        """Return the keys of the activations of a model."""
        return [key_of(hook, model) for hook in self.hooks]

    @property
    def all_keys(self) -> list[str]:
        """The keys of the activations of both models."""
        return [*self.keys(self.base), *self.keys(self.tuned)]

    def directions(
        self, rows: Float[Tensor, "d_sae d"], ports: Sequence[Port], model: str, scales: Mapping[str, float]
    ) -> Float[Tensor, "d_sae _"]:
        """Return the part of the rows that belongs to a model, hook after hook, each multiplied by the scale of its key."""
        parts = dict(zip((port.key for port in ports), apart(rows, ports), strict=True))
        return torch.cat([parts[key] * scales[key] for key in self.keys(model)], dim=-1).contiguous()


def needed_keys(dictionary: Dictionary, sides: Sides) -> list[str]:
    """Return the keys of the activations that a diff reads: both models' at the write ports, and all of the read ports.

    A difference is computed from the activations of its two models.
    """
    keys = list(sides.all_keys)
    for port in dictionary.reads:
        if port.key is None:
            raise ConfigError(f"a read port of the dictionary names no hook: {names(dictionary.reads)}")
        keys += [key_of(port.hook, name) for name in dict.fromkeys((port.model, port.minus or port.model))]
    return list(dict.fromkeys(keys))


def input_of(dictionary: Dictionary, acts: Mapping[str, Float[Tensor, "n _"]]) -> Float[Tensor, "n d_in"]:
    """Return the input of a dictionary, given the activations of the models by key."""
    parts = []
    for port in dictionary.reads:
        x = acts[key_of(port.hook, port.model)]
        parts.append(x if port.minus is None else x - acts[key_of(port.hook, port.minus)])
    return torch.cat(parts, dim=-1)
