"""The ports of a dictionary as hooks of the models at hand."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from saelens_lite.errors import ConfigError
from saelens_lite.ports import Port, PortNames, chosen, difference, names, split_key


class PortPlace(NamedTuple):
    """The activation at a hook of a model, less that of the model `minus` if the port is a difference."""

    lm: Any
    hook: str
    minus: Any = None

    @property
    def parts(self) -> list[tuple[Any, str]]:
        """The models whose activations make up this one, each with the hook."""
        return [(lm, self.hook) for lm in (self.lm, self.minus) if lm is not None]

    def value(self, acts: Mapping[tuple[Any, str], Tensor], device: torch.device) -> Float[Tensor, "batch pos d"]:
        """Return the activation, given those of its parts."""
        x, *less = (acts[part].to(device) for part in self.parts)
        return difference(x, less[0]) if less else x


class SplicePlaces(NamedTuple):
    """The places that a dictionary reads, in the order of its ports, and those that it changes, by number of write port."""

    reads: tuple[PortPlace, ...]
    writes: dict[int, PortPlace]


def splice_places(
    model: Any, dictionary: Any, *, hook: str | None = None, ports: PortNames = None, reads: bool = True
) -> SplicePlaces:
    """Return the places of a dictionary in a model or in several. With `reads` false, it reads none.

    Args:
        hook: see `LanguageModel.hooks_of`.
        ports: keys or hooks of the write ports to change; default: all.

    Raises:
        ConfigError: the dictionary has no such port; it reads a model that is missing; the ports to change belong to several
            models, but one was given, or two of these models are one object; as for `hooks_of`.
        HookError: a model lacks a hook.
    """
    if hook is not None and ports is not None:
        raise ConfigError("give hook= for a dictionary that names no hook, or ports= for one that does, not both")
    numbers = chosen(dictionary.writes, ports)
    if reads or ports is None:
        check_is_complete(model, dictionary)
        hooks = model.hooks_of(dictionary, hook)
        places = SplicePlaces(
            tuple(map(model.place, hooks.reads)) if reads else (), {i: model.place(hooks.writes[i]) for i in numbers}
        )
    else:
        _check_is_one_model(model, [dictionary.writes[i] for i in numbers])
        places = SplicePlaces((), {i: _place_alone(model, dictionary, dictionary.writes[i]) for i in numbers})
    changed = [(place.lm, place.hook) for place in places.writes.values()]
    if len(set(changed)) < len(changed):
        raise ConfigError(
            f"{names([dictionary.writes[i] for i in numbers])} are one hook of one model: choose one of them with ports=; if "
            "two names stand for one model, load it twice"
        )
    return places


def _models_of(ports: Any) -> set[str]:
    """Return the names of the models at ports."""
    return {name for port in ports for name in (port.model, port.minus) if name is not None}


def check_is_complete(model: Any, dictionary: Any) -> None:
    """Raise ConfigError if the dictionary is one of several models, and one is missing."""
    needed = _models_of((*dictionary.reads, *dictionary.writes))
    if len(needed) < 2 or needed <= set(getattr(model, "models", ())):
        return
    given = ", ".join(getattr(model, "models", [model.name]))
    raise ConfigError(
        f"the dictionary belongs to several models, and its codes need the activations of them all; given: {given}. Give "
        f"{{{', '.join(f'{name!r}: …' for name in sorted(needed))}}}. Only sl.Add at ports= of one model needs no codes"
    )


def _check_is_one_model(model: Any, ports: list[Port]) -> None:
    """Raise ConfigError if ports of several models are to be changed in one."""
    if not hasattr(model, "models") and len(models := {port.model for port in ports}) > 1:
        raise ConfigError(
            f"{names(ports)} belong to the models {' and '.join(sorted(map(str, models)))}; {model.name} is one of them: "
            "choose its ports with ports=, or give all models by name"
        )


def _place_alone(model: Any, dictionary: Any, port: Port) -> PortPlace:
    """Return the place of a write port whose activation is not read, so that only its own model is needed."""
    if port.hook is None:
        raise ConfigError("a port of the dictionary names no hook; make it with Port(hook=…, width=…)")
    lm = model[port.model] if hasattr(model, "models") and port.model is not None else model
    lm.check_origin(dictionary.origin.of(port.model))
    return lm.place(split_key(port.key).hook)
