"""Ports: the places in a model whose activations a dictionary reads and writes.

    reads = (Port(hook="blocks.3.hook_resid_pre", width=768),), writes the same       an autoencoder
    reads one port, writes another                                                    a transcoder
    reads several ports, writes the same                                              a crosscoder

The input x of a dictionary is the concatenation of the activations at its read ports, in order. Its output is the concatenation
of the activations at its write ports.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from pydantic import Field, model_serializer, model_validator
from torch import Tensor

from saelens_lite.config import MOST, FrozenConfig
from saelens_lite.errors import ConfigError, near_matches
from saelens_lite.keys import MODEL_NAME, Key, key_of, parts_of, split_key

__all__ = [
    "Hooks", "Key", "Port", "PortNames", "Ports", "apart", "as_ports", "chosen", "difference", "key_of", "names", "parts_of",
    "spans", "split_head", "split_key", "together", "width",
]  # fmt: skip


class Port(FrozenConfig):
    """A place in a model whose activations a dictionary reads or writes."""

    hook: str | None = Field(None, description="transformer-lens hook name; null if unknown.")
    width: int = Field(gt=0, le=MOST, description="Width of the activations.")
    model: str | None = Field(None, description="Name of the model, if the dictionary reads two models.")
    minus: str | None = Field(None, description="Name of the model whose activations are subtracted.")

    @model_validator(mode="after")
    def _names_models(self) -> "Port":
        for name in (self.model, self.minus):
            if name is not None and not re.fullmatch(MODEL_NAME, name):
                raise ValueError(f"{name!r} cannot name a model; use letters, digits, _ and dots, such as base or chat")
        if self.minus is not None and (self.model in (None, self.minus) or self.hook is None):
            raise ValueError(f"minus = {self.minus!r} needs a hook and another model to subtract from")
        return self

    @model_serializer(mode="wrap")
    def _without_unset(self, serialize: Any) -> dict[str, Any]:
        """Leave out an unset `minus`, as older versions do, which refuse unknown keys."""
        return {name: value for name, value in serialize(self).items() if name != "minus" or value is not None}

    @property
    def key(self) -> str | None:
        """The name of the port in sources of activations; None if its hook is not known."""
        return None if self.hook is None else key_of(self.hook, self.model, self.minus)

    @classmethod
    def of(cls, key: str, width: int) -> "Port":
        """Return the port that a key names."""
        model, minus, hook = split_key(key)
        return cls(hook=hook, width=width, model=model, minus=minus)


Ports = Port | int | Sequence[Port]
PortNames = str | Sequence[str] | None


class Hooks(NamedTuple):
    """The hooks that a dictionary reads and writes in a model, in the order of its ports; of several models, the keys."""

    reads: tuple[str, ...]
    writes: tuple[str, ...]

    @property
    def all(self) -> list[str]:
        """Each hook once."""
        return list(dict.fromkeys((*self.reads, *self.writes)))

    def __str__(self) -> str:
        read, written = " + ".join(self.reads), " + ".join(self.writes)
        return read if self.reads == self.writes else f"{read} → {written}"


def split_head(name: str) -> tuple[str, int | None]:
    """Return the name of the whole tensor, and the number of the head if the name ends with one."""
    match = re.fullmatch(r"(.+)\.head_(\d{1,9})", name)
    return (match[1], int(match[2])) if match else (name, None)


def as_ports(given: Ports) -> tuple[Port, ...]:
    """Return ports as a tuple. A number is the width of a port without a known hook.

    Raises:
        ConfigError: no port is given, or the same port twice.
    """
    ports = (Port(width=given),) if isinstance(given, int) else (given,) if isinstance(given, Port) else tuple(given)
    named = [port for port in ports if port.hook is not None]
    if not ports or len({port.key for port in named}) < len(named):
        raise ConfigError(f"ports are {names(ports) or 'missing'}; expected at least one port, without repeats")
    return ports


def chosen(ports: Sequence[Port], asked: PortNames) -> list[int]:
    """Return the numbers of the ports with these keys or hooks, in order; of all by default.

    A hook stands for that hook in every model.

    Raises:
        ConfigError: no port is asked for, or one is missing.
    """
    if asked is None:
        return list(range(len(ports)))
    wanted = [asked] if isinstance(asked, str) else list(asked)
    for name in wanted:
        if not any(name in (port.key, port.hook) for port in ports):
            raise ConfigError(
                f"no port {name!r}{near_matches(name, _keys(ports)) or '; the dictionary writes ' + names(ports)}"
            )
    if not wanted:
        raise ConfigError(f"no port is named; the dictionary writes {names(ports)}")
    return [i for i, port in enumerate(ports) if port.hook is not None and not {port.key, port.hook}.isdisjoint(wanted)]


def _keys(ports: Sequence[Port]) -> list[str]:
    return [port.key for port in ports if port.key is not None]


def width(ports: Sequence[Port]) -> int:
    """Return the total width of ports."""
    return sum(port.width for port in ports)


def spans(ports: Sequence[Port]) -> list[slice]:
    """Return the columns of each port among those of all."""
    ends = [0, *accumulate(port.width for port in ports)]
    return [slice(*pair) for pair in pairwise(ends)]


def names(ports: Sequence[Port]) -> str:
    """Return the hooks of ports in words."""
    return " + ".join(port.key or "an unnamed hook" for port in ports)


def together(
    acts: Mapping[str, Float[Tensor, "*shape _"]] | Sequence[Float[Tensor, "*shape _"]], hooks: Sequence[str] = ()
) -> Float[Tensor, "*shape d"]:
    """Concatenate the activations of several hooks: those of `hooks` in a mapping, or all in a sequence."""
    parts = [acts[hook] for hook in hooks] if isinstance(acts, Mapping) else list(acts)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def difference(x: Float[Tensor, "*shape d"], less: Float[Tensor, "*shape d"]) -> Float[Tensor, "*shape d"]:
    """Return x − less, computed in float32 at least."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, less.dtype), torch.float32)
    return x.to(dtype) - less.to(dtype)


def apart(x: Float[Tensor, "*shape d"], ports: Sequence[Port]) -> tuple[Float[Tensor, "*shape _"], ...]:
    """Split a tensor into the parts of its ports."""
    return (x,) if len(ports) == 1 else x.split([port.width for port in ports], dim=-1)
