"""transformer-lens hook names, found on the plain transformers module.

transformer-lens knows, for every architecture it supports, which module of the transformers model a component is; so
its hook names can be served without its bridge, which would force eager attention and keep every activation.
This is the one place that imports transformer_lens.
"""

import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from saelens_lite.errors import HookError, ModelNotFoundError, near_matches

USUAL_HOOKS = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")


class HookPoint(NamedTuple):
    """A place in the model: the tensor that enters or leaves a module."""

    name: str
    module: nn.Module
    side: str  # "in" or "out"

    def on_value(self, visit: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
        """Call `visit` with the tensor on each forward; what it returns, unless None, takes the tensor's place."""
        if self.side == "in":

            def before(_module, args, kwargs):
                if args:
                    new = visit(args[0])
                    return None if new is None else ((new, *args[1:]), kwargs)
                new = visit(kwargs["hidden_states"])
                return None if new is None else (args, {**kwargs, "hidden_states": new})

            return self.module.register_forward_pre_hook(before, with_kwargs=True)

        def after(_module, _args, output):
            if isinstance(output, tuple):
                new = visit(output[0])
                return None if new is None else (new, *output[1:])
            return visit(output)

        return self.module.register_forward_hook(after)


def component_mapping(module: nn.Module, name: str) -> dict[str, Any]:
    """transformer-lens's description of the architecture: component name → where it sits in the module.

    Raises:
        ModelNotFoundError: transformer-lens does not know the architecture.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its import warns about optional parts we do not use
        from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
        from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf

        architecture = type(module).__name__
        try:
            config = build_bridge_config_from_hf(module.config, architecture, name, module.dtype)
            return ArchitectureAdapterFactory.select_architecture_adapter(config).component_mapping
        except ValueError as error:
            raise ModelNotFoundError(f"transformer-lens has no hooks for {architecture} ({name}): {error}") from None


def resolve(name: str, module: nn.Module, mapping: dict[str, Any]) -> HookPoint:
    """The place a hook name stands for.

    Raises:
        HookError: the model has no such hook; near matches are listed.
    """
    found = _walk(name.split("."), mapping, {}, module)
    if found is None:
        known = all_names(module, mapping)
        hint = near_matches(name, known) or f"; for example {', '.join(known[:5])}"
        raise HookError(f"no hook {name!r} in {type(module).__name__} with {_n_blocks(module, mapping)} blocks{hint}")
    return HookPoint(name, *found)


def all_names(module: nn.Module, mapping: dict[str, Any]) -> list[str]:
    """The residual-stream and sublayer hooks of every block, in the order of the forward pass."""
    names = [f"blocks.{i}.{hook}" for i in range(_n_blocks(module, mapping)) for hook in USUAL_HOOKS]
    return [name for name in names if _walk(name.split("."), mapping, {}, module) is not None]


def _n_blocks(module: nn.Module, mapping: dict[str, Any]) -> int:
    blocks = mapping.get("blocks")
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
        if rest in (["hook_in"], ["hook_out"]):
            return inner, rest[0].removeprefix("hook_")
        return _walk(rest, component.submodules or {}, component.hook_aliases or {}, inner) if rest else None
    if head in aliases and not rest:
        targets = aliases[head] if isinstance(aliases[head], list) else [aliases[head]]
        for target in targets:
            if target in ("hook_in", "hook_out"):
                return module, target.removeprefix("hook_")
            found = _walk(target.split("."), children, {}, module)
            if found is not None:
                return found
    return None
