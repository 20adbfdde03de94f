"""Ports: the places in a model whose activations a dictionary reads and writes.

    reads = (Port(hook="blocks.3.hook_resid_pre", width=768),), writes the same       an autoencoder
    reads one port, writes another                                                    a transcoder
    reads several ports, writes the same                                              a crosscoder

The input x of a dictionary is the concatenation of what its read ports hold, in their order; its output is that of what its
write ports get.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from saelens_lite.config import MOST, FrozenConfig
from saelens_lite.errors import ConfigError


class Port(FrozenConfig):
    """A place in a model whose activations a dictionary reads or writes."""

    hook: str | None = Field(None, description="transformer-lens hook name; none where it is not known.")
    width: int = Field(gt=0, le=MOST, description="Entries of an activation.")
    model: str | None = Field(None, description="Name of the model, where a dictionary is of two.")


Ports = Port | int | Sequence[Port]


class Hooks(NamedTuple):
    """The hooks that a dictionary reads and writes in a model, in the order of its ports."""

    reads: tuple[str, ...]
    writes: tuple[str, ...]

    @property
    def all(self) -> list[str]:
        """Each hook once."""
        return list(dict.fromkeys((*self.reads, *self.writes)))

    def __str__(self) -> str:
        read, written = " + ".join(self.reads), " + ".join(self.writes)
        return read if self.reads == self.writes else f"{read} → {written}"


def as_ports(given: Ports) -> tuple[Port, ...]:
    """Return ports as a tuple; a number is the width of a port whose hook is not known.

    Raises:
        ConfigError: there is no port, or the same one twice.
    """
    ports = (Port(width=given),) if isinstance(given, int) else (given,) if isinstance(given, Port) else tuple(given)
    named = [port for port in ports if port.hook is not None]
    if not ports or len({(port.model, port.hook) for port in named}) < len(named):
        raise ConfigError(f"ports are {names(ports) or 'missing'}; expected at least one, and each once")
    return ports


def width(ports: Sequence[Port]) -> int:
    """Return the length of what the ports hold together."""
    return sum(port.width for port in ports)


def names(ports: Sequence[Port]) -> str:
    """Return the hooks of some ports in words."""
    return " + ".join(port.hook or "an unnamed hook" for port in ports)


def together(
    acts: Mapping[str, Float[Tensor, "*shape _"]] | Sequence[Float[Tensor, "*shape _"]], hooks: Sequence[str] = ()
) -> Float[Tensor, "*shape d"]:
    """Return the activations of some hooks as one tensor: those of `hooks` in a mapping, or all of a sequence."""
    parts = [acts[hook] for hook in hooks] if isinstance(acts, Mapping) else list(acts)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def apart(x: Float[Tensor, "*shape d"], ports: Sequence[Port]) -> tuple[Float[Tensor, "*shape _"], ...]:
    """Return the part of a tensor that belongs to each port."""
    return (x,) if len(ports) == 1 else x.split([port.width for port in ports], dim=-1)
