"""transformer-lens hook names as places in the plain transformers module.

transformer-lens knows which module of the transformers model each component is, for every architecture that it supports. So
its hook names work here without its bridge, which would force eager attention and keep every activation.
Apart from this file, only `LanguageModel.bridge` and nicknames.py import transformer_lens.
"""

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from saelens_lite.errors import HookError, ModelNotFoundError, near_matches
from saelens_lite.model.heads import HEADED, Heads, heads_at
from saelens_lite.model.norms import scale_and_bias
from saelens_lite.model.spread import on_whole
from saelens_lite.ports import split_head

USUAL_HOOKS = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")


STREAM = "the residual stream that the norm before attention reads"
RELATED = {  # names that are not the input or output of a module: the relation of each to other hooks
    "hook_mlp_in": {
        "the residual stream that the MLP's norm reads": ("hook_resid_mid",),
        "the residual stream before the norm whose output the MLP reads": ("mlp.hook_in", "mlp.in.hook_in"),
    },
    **{f"hook_{part}": {STREAM: ("hook_resid_pre",)} for part in ("attn_in", "q_input", "k_input", "v_input")},
    "attn.hook_attn_in": {"what the attention reads": ("attn.hook_in",)},
    "attn.hook_hidden_states": {"the attention's output": ("attn.hook_out",)},
    "attn.hook_result": {"each head's part of hook_attn_out": ("attn.hook_z",)},
}
_in_force: ContextVar[object] = ContextVar("in_force", default=None)


@contextmanager
def alone() -> Iterator[None]:
    """Silence the hooks from outside the block; within it, only hooks that are added there act."""
    token = _in_force.set(object())
    try:
        yield
    finally:
        _in_force.reset(token)


class Handles(list[RemovableHandle]):
    """Hooks that are removed together."""

    def remove(self) -> None:
        """Take the hooks off their modules."""
        for handle in self:
            handle.remove()


class HookPoint(NamedTuple):
    """A place in the model: the tensor that enters or leaves a module, times `scale`.

    The scale is not 1 if the model multiplies a module's output before it adds it to the residual stream. `block`: the block
    whose output is this tensor plus the output of the modules that read it; a change of the tensor is also added there.
    `read_only`: the reason why the tensor cannot be replaced, if any. `head`: the part of the last axis that belongs to one
    attention head. `before_weight`: the tensor is the output of a norm before its weight and bias.
    """

    name: str
    module: nn.Module
    side: str  # "in" or "out"
    scale: float = 1.0
    block: nn.Module | None = None
    read_only: str = ""
    head: slice | None = None
    before_weight: bool = False

    def on_value(self, visit: Callable[[Any], Any]) -> RemovableHandle | Handles:
        """Call `visit` with the value on each forward pass; its result, unless None, replaces the value."""
        if self.read_only:
            visit = self._refusing(visit)
        if self.block is None:
            return self._on_value(visit)
        changes: list[Tensor] = []  # of the current forward pass
        own = _in_force.get()

        def note_change(value: Any) -> Any:
            new = visit(value)
            changes[:] = [] if new is None or new is value else [new - value]
            return new

        def carry(_module: nn.Module, _args: tuple, output: Any) -> Any:
            if _in_force.get() is not own or not changes:
                return None
            stream = output[0] if isinstance(output, tuple | list) else output
            changed = stream + changes.pop().reshape(stream.shape).to(stream.device)
            return (changed, *output[1:]) if isinstance(output, tuple | list) else changed

        return Handles([self._on_value(note_change), self.block.register_forward_hook(carry, prepend=True)])

    def _refusing(self, visit: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Return a `visit` that raises HookError if it returns another tensor."""

        def look(value: Any) -> None:
            new = visit(value)
            if new is not None and new is not value:
                raise HookError(f"{self.name} can be read but not replaced: {self.read_only}")

        return look

    def _on_value(self, visit: Callable[[Any], Any]) -> RemovableHandle:
        visit = self._scaled(self._of_head(self._without_weight(visit) if self.before_weight else visit))
        visit, own = on_whole(self.module, self.side, visit), _in_force.get()
        if self.side == "in":

            def before(_module, args, kwargs):
                if _in_force.get() is not own:
                    return None
                if args:
                    new = visit(args[0])
                    return None if new is None else ((new, *args[1:]), kwargs)
                if "hidden_states" not in kwargs:
                    return None
                new = visit(kwargs["hidden_states"])
                return None if new is None else (args, {**kwargs, "hidden_states": new})

            return self.module.register_forward_pre_hook(before, with_kwargs=True)

        def after(_module, _args, output):
            if _in_force.get() is not own:
                return None
            if isinstance(output, tuple | list):
                new = visit(output[0])
                return None if new is None else (new, *output[1:])
            return visit(output)

        return self.module.register_forward_hook(after)

    def _without_weight(self, visit: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Return a `visit` that gets a norm's output before its weight and bias, and whose result gets them."""
        measured: list[Tensor] = []

        def without(value: Any) -> Any:
            if not measured:
                measured.extend(self._weight_and_bias(value.shape[-1]))
            exact = torch.promote_types(value.dtype, torch.float32)
            weight, bias = (x.to(value.device, exact) for x in measured)
            plain = ((value - bias) / weight).to(value.dtype)
            new = visit(plain)
            return None if new is None or new is plain else (new * weight + bias).to(value.dtype)

        return without

    def _weight_and_bias(self, d: int) -> tuple[Tensor, Tensor]:
        """Return the weight and the bias of the norm. Raise HookError if the value before them cannot be told."""
        measured = scale_and_bias(self.module, d)
        if measured is None:
            raise HookError(
                f"{self.name} is not available: {type(self.module).__name__} is not a norm with a weight and a bias"
            )
        if n_zero := int((measured[0] == 0).sum()):
            raise HookError(f"{self.name} is not available: the weight of its norm is 0 at {n_zero:,} of {d:,} entries")
        return measured

    def _of_head(self, visit: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Return a `visit` that gets the part of one head, and whose result replaces that part."""
        if self.head is None:
            return visit
        here = self.head

        def of_head(value: Any) -> Any:
            part = value[..., here]
            new = visit(part)
            if new is None or new is part:
                return None
            return torch.cat([value[..., : here.start], new, value[..., here.stop :]], dim=-1)

        return of_head

    def _scaled(self, visit: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Return a `visit` that gets the value times the scale, and whose result is divided by the scale."""
        if self.scale == 1:
            return visit

        def scaled(value: Any) -> Any:
            new = visit(value * self.scale)
            return None if new is None else new / self.scale

        return scaled


class Architecture(NamedTuple):
    """transformer-lens's description of a model: its components by name, and names that stand for other names."""

    components: dict[str, Any]
    aliases: dict[str, Any]


def architecture(module: nn.Module, name: str) -> Architecture:
    """Return transformer-lens's description of a transformers model.

    Raises:
        ModelNotFoundError: transformer-lens does not know the architecture.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its import warns about optional parts that we do not use
        from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
        from transformer_lens.model_bridge import TransformerBridge
        from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf

        known_as = type(module).__name__
        try:
            config = build_bridge_config_from_hf(module.config, known_as, name, module.dtype)
            components = ArchitectureAdapterFactory.select_architecture_adapter(config).component_mapping
        except (ValueError, ImportError) as error:  # vision models may need torchvision
            raise ModelNotFoundError(f"transformer-lens has no hooks for {known_as} ({name}): {error}") from None
    if "blocks" in components and _enter(components["blocks"], module) is None:
        raise ModelNotFoundError(
            f"{known_as} ({name}) has no module {components['blocks'].name}, in which transformer-lens expects its blocks"
        )
    no_activations = {"rotary_emb"}  # its output is a pair of tables
    return Architecture(
        {key: component for key, component in components.items() if key not in no_activations}, TransformerBridge.hook_aliases
    )


def resolve(name: str, module: nn.Module, known: Architecture) -> HookPoint:
    """Return the place that a hook name stands for, as transformer-lens describes the model.

    Raises:
        HookError: the model has no such hook; near matches are listed.
    """
    point = find(name, module, known)
    if point is None:
        raise no_such_hook(name, module, known, lambda other: find(other, module, known) is not None)
    return point


def find(name: str, module: nn.Module, known: Architecture) -> HookPoint | None:
    """Return the place that a hook name stands for, or None if the model has no such hook."""
    if norm := re.fullmatch(r"((?:.+\.)?ln\w*)\.hook_normalized", name):
        point = find(f"{norm[1]}.hook_out", module, known)
        return point and point._replace(name=name, before_weight=True)
    whole, of_head = split_head(name)
    place = _walk(whole.split("."), known.components, known.aliases, module)
    if place is None:
        return None
    point = HookPoint(name, *place)
    if of_head is None:
        return point
    heads = _heads(whole, point, module, known)
    part = None if heads is None else heads.part(of_head)
    return None if part is None else point._replace(head=part)


def _heads(name: str, point: HookPoint, module: nn.Module, known: Architecture) -> Heads | None:
    """Return the heads in the tensor at a hook, or None if it is not one of whole heads."""
    parent, _, last = name.rpartition(".")
    attention = find(f"{parent}.hook_out", module, known) if last in HEADED else None
    return heads_at(last, point.module, point.side, attention and attention.module, module.config.get_text_config())


def _no_such_head(whole: str, of_head: int, module: nn.Module, known: Architecture) -> HookError:
    """Return the error for a head that a hook of the model lacks."""
    point = find(whole, module, known)
    heads = None if point is None else _heads(whole, point, module, known)
    here = f"no head {of_head} at {whole} of {type(module).__name__}"
    if heads is not None:
        return HookError(f"{here}: it has {heads.number} heads of width {heads.width}, head_0 to head_{heads.number - 1}")
    block = ".".join(whole.split(".")[:2])
    headed = [f"{block}.attn.{hook}" for hook in HEADED]
    headed = [name for name in headed if find(f"{name}.head_0", module, known) is not None]
    return HookError(f"{here}: its values do not lie head by head{'; those at ' + ', '.join(headed) + ' do' if headed else ''}")


def no_such_hook(name: str, module: nn.Module, known: Architecture, exists: Callable[[str], bool]) -> HookError:
    """Return the error for a hook that the model lacks; its message names hooks to use instead."""
    whole, of_head = split_head(name)
    if of_head is not None:
        if exists(whole):
            return _no_such_head(whole, of_head, module, known)
        name = whole
    if not (hint := _related(name, module, known, exists)):
        spelled = [other for other in spelled_names(module, known) if exists(other)]
        usual = [other for other in usual_names(module, known) if exists(other)]
        hint = near_matches(name, spelled) or f"; for example {', '.join(usual[:5])}"
        if _is_middle_of_parallel_block(name, known):
            hint = "; its attention and MLP read the same stream, so no such hook lies between them" + hint
    return HookError(f"no hook {name!r} in {type(module).__name__} with {_n_blocks(module, known)} blocks{hint}")


def usual_names(module: nn.Module, known: Architecture) -> list[str]:
    """Return the residual-stream and sublayer hooks of every block, in the order of the forward pass."""
    names = [f"blocks.{i}.{hook}" for i in range(_n_blocks(module, known)) for hook in USUAL_HOOKS]
    return [name for name in names if find(name, module, known) is not None]


def parts(module: nn.Module, components: dict[str, Any]) -> Iterator[nn.Module]:
    """Yield the modules that transformer-lens names inside another, at any depth."""
    for component in components.values():
        try:
            inner = module.get_submodule(component.name) if component.name else module
        except AttributeError:
            continue
        if getattr(component, "is_list_item", False):
            continue
        if inner is not module:
            yield inner
        yield from parts(inner, component.submodules or {})


def spelled_names(module: nn.Module, known: Architecture) -> list[str]:
    """Return every name that `resolve` accepts."""

    def spelled(prefix: str, components: dict[str, Any], inner: nn.Module) -> Iterator[str]:
        for key, component in components.items():
            entered = _enter(component, inner)
            numbered = {"": entered}
            if component.is_list_item and entered is not None:
                numbered = {f".{i}": item for i, item in enumerate(entered)}  # type: ignore[arg-type]
            for number, item in numbered.items():
                if item is not None:
                    start = f"{prefix}{key}{number}."
                    inside = component.submodules or {}
                    aliases = _aliases(component, component.hook_aliases or {}, inside, item)
                    yield from (f"{start}{hook}" for hook in ("hook_in", "hook_out", *aliases))
                    yield from spelled(start, inside, item)

    names = [*known.aliases, *spelled("", known.components, module)]
    return [name for name in names if find(name, module, known) is not None]


def _related(name: str, module: nn.Module, known: Architecture, exists: Callable[[str], bool]) -> str:
    """Return a hint that names a hook with a related tensor and their relation; "" if there is no such hook."""
    parent, _, last = name.rpartition(".")
    if last in DENSE and parent.endswith("mlp") and exists(f"{parent}.hook_out"):
        return (
            f"; its MLP is a mixture of experts, and each expert has its own tensors: use {parent}.hook_in or {parent}.hook_out"
        )
    for suffix, relations in RELATED.items():
        if name != suffix and not name.endswith("." + suffix):
            continue
        for relation, others in relations.items():
            for other in others:
                instead = name.removesuffix(suffix) + other
                if exists(instead):
                    return f"; {name} is {relation}: use {instead}{', what W_O multiplies' if other == 'attn.hook_z' else ''}"
    return ""


def _is_middle_of_parallel_block(name: str, known: Architecture) -> bool:
    blocks = known.components.get("blocks")
    middle = "hook_resid_mid"
    return name.startswith("blocks.") and name.endswith(middle) and blocks is not None and middle not in blocks.hook_aliases


def _n_blocks(module: nn.Module, known: Architecture) -> int:
    blocks = known.components.get("blocks")
    return len(module.get_submodule(blocks.name)) if blocks is not None else 0


def _enter(component: Any, module: nn.Module) -> nn.Module | None:
    """Return the module that a component stands for inside `module`, or None if there is no such module."""
    try:
        return module.get_submodule(component.name) if component.name else module
    except AttributeError:
        return None


Place = tuple[nn.Module, str, float]  # module, side, scale
Alias = str | list[str] | tuple[str, float]  # another name, names of which the first that exists counts, or a name and a scale
DENSE = {  # hooks of a dense MLP in a mixture-of-experts model
    "hook_pre": ["dense_gate.hook_out", "dense_in.hook_out"],
    "hook_pre_linear": ["dense_in.hook_out"],
    "hook_post": ["dense_out.hook_in"],
}


def _aliases(component: Any, aliases: dict[str, Any], inside: dict[str, Any], module: nn.Module) -> dict[str, Alias]:
    """Return the names that stand for other names in a component, as they apply to this module."""
    aliases = dict(aliases)
    if hasattr(component, "DENSE_SUBMODULE_KEYS"):  # a mixture of experts; some of its layers have one plain MLP instead
        is_dense = "dense_out" in inside and _enter(inside["dense_out"], module) is not None
        for name, targets in DENSE.items():
            aliases.pop(name, None)
            if is_dense:
                aliases[name] = targets
        if is_dense and not ("dense_gate" in inside and _enter(inside["dense_gate"], module) is not None):
            del aliases["hook_pre_linear"]
    scale = getattr(component, "residual_contribution_scale", None)
    if scale is not None:
        for name, part in (
            ("hook_attn_out", component.scaled_attn_submodule),
            ("hook_mlp_out", component.scaled_mlp_submodule),
        ):
            if part is not None:
                aliases[name] = (f"{part}.hook_out", scale)
    return aliases


def _walk(path: list[str], children: dict[str, Any], aliases: dict[str, Alias], module: nn.Module) -> Place | None:
    """Return the place that a dotted name leads to through components, aliases and list indices, or None."""
    head, rest = path[0], path[1:]
    if head in children and rest:
        component = children[head]
        inner = _enter(component, module)
        if inner is None:
            return None
        if getattr(component, "is_list_item", False):
            if not re.fullmatch(r"\d+", rest[0]) or int(rest[0]) >= len(inner):  # type: ignore[arg-type]
                return None
            inner, rest = inner[int(rest[0])], rest[1:]  # type: ignore[index]
        inside = component.submodules or {}
        if rest in (["hook_in"], ["hook_out"]):
            side = rest[0].removeprefix("hook_")
            if component.name is None:  # no module holds the parts: take the input of the first or the output of the last
                return _walk([side, *rest], inside, {}, inner)
            return inner, side, getattr(component, "_output_contribution_scale", 1.0) if side == "out" else 1.0
        return _walk(rest, inside, _aliases(component, component.hook_aliases or {}, inside, inner), inner) if rest else None
    if head in aliases and not rest:
        target, scale = aliases[head], 1.0
        if isinstance(target, tuple):
            target, scale = target
        for name in target if isinstance(target, list) else [target]:
            if name in ("hook_in", "hook_out"):
                return module, name.removeprefix("hook_"), scale
            place = _walk(name.split("."), children, {}, module)
            if place is not None:
                return place[0], place[1], place[2] * scale
    return None
