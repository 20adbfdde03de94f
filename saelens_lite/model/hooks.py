"""transformer-lens hook names, found on the plain transformers module.

transformer-lens knows, for every architecture it supports, which module of the transformers model a component is; so
its hook names can be served without its bridge, which would force eager attention and keep every activation.
This is the one place that imports transformer_lens.
"""

import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from torch import nn
from torch.utils.hooks import RemovableHandle

from saelens_lite.errors import HookError, ModelNotFoundError, near_matches

USUAL_HOOKS = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")


class HookPoint(NamedTuple):
    """A place in the model: the tensor that enters or leaves a module."""

    name: str
    module: nn.Module
    side: str  # "in" or "out"

    def on_value(self, visit: Callable[[Any], Any]) -> RemovableHandle:
        """Call `visit` with the value on each forward; what it returns, unless None, takes the value's place."""
        if self.side == "in":

            def before(_module, args, kwargs):
                if args:
                    new = visit(args[0])
                    return None if new is None else ((new, *args[1:]), kwargs)
                if "hidden_states" not in kwargs:
                    return None
                new = visit(kwargs["hidden_states"])
                return None if new is None else (args, {**kwargs, "hidden_states": new})

            return self.module.register_forward_pre_hook(before, with_kwargs=True)

        def after(_module, _args, output):
            if isinstance(output, tuple | list):
                new = visit(output[0])
                return None if new is None else (new, *output[1:])
            return visit(output)

        return self.module.register_forward_hook(after)


class Architecture(NamedTuple):
    """transformer-lens's description of a model: its components by name, and names that stand for other names."""

    components: dict[str, Any]
    aliases: dict[str, Any]


def architecture(module: nn.Module, name: str) -> Architecture:
    """What transformer-lens knows of a transformers model.

    Raises:
        ModelNotFoundError: transformer-lens does not know the architecture.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its import warns about optional parts we do not use
        from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
        from transformer_lens.model_bridge import TransformerBridge
        from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf

        known_as = type(module).__name__
        try:
            config = build_bridge_config_from_hf(module.config, known_as, name, module.dtype)
            components = ArchitectureAdapterFactory.select_architecture_adapter(config).component_mapping
        except ValueError as error:
            raise ModelNotFoundError(f"transformer-lens has no hooks for {known_as} ({name}): {error}") from None
    no_activations = {"rotary_emb"}  # its output is a pair of tables
    return Architecture(
        {key: component for key, component in components.items() if key not in no_activations}, TransformerBridge.hook_aliases
    )


def resolve(name: str, module: nn.Module, known: Architecture) -> HookPoint:
    """The place a hook name stands for.

    Raises:
        HookError: the model has no such hook; near matches are listed.
    """
    found = _walk(name.split("."), known.components, known.aliases, module)
    if found is None:
        hint = near_matches(name, _spelled_names(module, known)) or f"; for example {', '.join(usual_names(module, known)[:5])}"
        if _is_middle_of_parallel_block(name, known):
            hint = "; its attention and MLP read the same stream, so there is none between them" + hint
        raise HookError(f"no hook {name!r} in {type(module).__name__} with {_n_blocks(module, known)} blocks{hint}")
    return HookPoint(name, *found)


def usual_names(module: nn.Module, known: Architecture) -> list[str]:
    """The residual-stream and sublayer hooks of every block, in the order of the forward pass."""
    names = [f"blocks.{i}.{hook}" for i in range(_n_blocks(module, known)) for hook in USUAL_HOOKS]
    return [name for name in names if _walk(name.split("."), known.components, {}, module) is not None]


def _spelled_names(module: nn.Module, known: Architecture) -> list[str]:
    """Every name that `resolve` accepts."""

    def spelled(prefix: str, components: dict[str, Any], aliases: Iterable[str]) -> Iterator[str]:
        yield from (f"{prefix}{alias}" for alias in aliases)
        for key, component in components.items():
            numbers = [f".{i}" for i in range(_n_blocks(module, known))] if component.is_list_item else [""]
            for number in numbers:
                inner = f"{prefix}{key}{number}."
                names = ["hook_in", "hook_out", *(component.hook_aliases or {})]
                yield from spelled(inner, component.submodules or {}, names)

    names = spelled("", known.components, known.aliases)
    return [name for name in names if _walk(name.split("."), known.components, known.aliases, module) is not None]


def _is_middle_of_parallel_block(name: str, known: Architecture) -> bool:
    blocks = known.components.get("blocks")
    middle = "hook_resid_mid"
    return name.startswith("blocks.") and name.endswith(middle) and blocks is not None and middle not in blocks.hook_aliases


def _n_blocks(module: nn.Module, known: Architecture) -> int:
    blocks = known.components.get("blocks")
    return len(module.get_submodule(blocks.name)) if blocks is not None else 0


def _walk(
    parts: list[str], children: dict[str, Any], aliases: dict[str, Any], module: nn.Module
) -> tuple[nn.Module, str] | None:
    """Follow a dotted name through components, their aliases and list indices; None where it leads nowhere."""
    head, rest = parts[0], parts[1:]
    if head in children and rest:
        component = children[head]
        try:
            inner = module.get_submodule(component.name) if component.name else module
            if getattr(component, "is_list_item", False):
                if not re.fullmatch(r"\d+", rest[0]) or int(rest[0]) >= len(inner):  # type: ignore[arg-type]
                    return None
                inner, rest = inner[int(rest[0])], rest[1:]  # type: ignore[index]
        except AttributeError:
            return None
        inside = component.submodules or {}
        if rest in (["hook_in"], ["hook_out"]):
            side = rest[0].removeprefix("hook_")
            if component.name is None:  # parts without a module around them: what enters the first and leaves the last
                return _walk([side, *rest], inside, {}, inner)
            return inner, side
        return _walk(rest, inside, component.hook_aliases or {}, inner) if rest else None
    if head in aliases and not rest:
        targets = aliases[head] if isinstance(aliases[head], list) else [aliases[head]]
        for target in targets:
            if target in ("hook_in", "hook_out"):
                return module, target.removeprefix("hook_")
            found = _walk(target.split("."), children, {}, module)
            if found is not None:
                return found
    return None
