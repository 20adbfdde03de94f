"""Models larger than a device: spread over devices, memory and disk, or over processes. transformers does this.

| `device_map` | where the weights are | who does it |
| --- | --- | --- |
| "auto", "balanced", "balanced_low_0", "sequential" | on the GPUs, then in memory, then on the disk | accelerate |
| {"model.layers.0": 0, …, "lm_head": "disk"} | where it says | accelerate |
| "tp" | each process of the team has a part of each weight | tensor parallelism of transformers |

Code here hides the differences from hooks and from readers of weights.
"""

import copy
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from saelens_lite.errors import ConfigError, HookError
from saelens_lite.processes import team

DeviceMap = str | dict[str, int | str | torch.device]
STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
TP = "tp"


def spreads(device_map: "DeviceMap | None") -> bool:
    """Return whether a device map names more than one device, so that transformers must place the weights."""
    return isinstance(device_map, dict) or device_map in (*STRATEGIES, TP)


def check_device_map(device_map: "DeviceMap | None", device: Any, max_memory: Any) -> None:
    """Raise ConfigError if these arguments contradict each other, or if accelerate is needed and missing."""
    if device_map is not None and device is not None:
        raise ConfigError(f"device = {str(device)!r} and device_map = {device_map!r}: give one of them")
    if max_memory is not None and (device_map == TP or not spreads(device_map)):
        raise ConfigError(f"max_memory needs device_map = {' or '.join(map(repr, STRATEGIES))}; it is {device_map!r}")
    if spreads(device_map) and device_map != TP and find_spec("accelerate") is None:
        raise ConfigError(f"device_map = {device_map!r} needs accelerate: pip install 'saelens-lite[large]'")


def placement(device_map: "DeviceMap", max_memory: Any, offload_folder: Any, config: Any) -> dict[str, Any]:
    """Return the arguments with which transformers places the weights.

    Raises:
        ConfigError: transformers cannot cut this model, or is too old.
    """
    if device_map != TP:
        return {"device_map": device_map, "max_memory": max_memory, "offload_folder": offload_folder}
    world = team().world
    if world == 1:
        return {}
    if not getattr(config.get_text_config(), "base_model_tp_plan", None):
        raise ConfigError(
            f"device_map = 'tp': transformers has no plan for cutting a {config.model_type} into parts; use device_map='auto'"
        )
    import transformers

    try:
        from transformers.distributed import DistributedConfig

        return {"distributed_config": DistributedConfig(tp_plan="auto", tp_size=world)}
    except (ImportError, TypeError):
        raise ConfigError(
            f"device_map = 'tp' needs a newer transformers than {transformers.__version__}: pip install -U transformers"
        ) from None


def input_device(module: nn.Module) -> torch.device:
    """Return the device that token ids go to and logits come from."""
    places = dict.fromkeys((getattr(module, "hf_device_map", None) or {}).values())
    first = next((place for place in places if place not in ("cpu", "disk", torch.device("cpu"))), None)
    if first is not None:
        return torch.device("cuda", first) if isinstance(first, int) else torch.device(first)
    return torch.device("cpu") if places else module.device  # type: ignore[return-value]


def is_whole(module: nn.Module) -> bool:
    """Return whether every weight is here, and not on the disk, in accelerate's memory, or cut into parts."""
    parts = ((module.get_submodule(name.rpartition(".")[0]), weight) for name, weight in module.named_parameters())
    return not any(_is_elsewhere(part, weight) or _is_cut(weight) for part, weight in parts)


def _is_elsewhere(part: nn.Module, weight: Tensor) -> bool:
    """Return whether accelerate keeps a weight of a module in memory or on the disk between forward passes."""
    return weight.is_meta and hasattr(part, "_hf_hook")


def weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield each weight by its name, whole, one at a time. Shared weights are named once."""
    for name, part, last in weight_places(module):
        yield name, weight_of(part, last)


def weight_places(module: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield the name of each weight, the module that it belongs to, and its name there. Shared weights come once."""
    tied = getattr(module, "all_tied_weights_keys", None) or {}
    for name, weight in [*module.named_parameters()]:
        if not (weight.is_meta and name in tied):  # accelerate gives both a parameter of their own
            part, _, last = name.rpartition(".")
            yield name, module.get_submodule(part), last


def weight_of(part: nn.Module, name: str = "weight") -> Any:
    """Return a weight of a module, whole. Every process that has a part of it must call this."""
    weight = getattr(part, name, None)
    if not isinstance(weight, Tensor):
        return weight
    if _is_cut(weight):
        return weight.full_tensor()  # type: ignore[attr-defined]
    return _offloaded(part, name).to(weight.dtype) if _is_elsewhere(part, weight) else weight


def _offloaded(part: nn.Module, name: str) -> Tensor:
    """Return a weight that accelerate keeps in memory or on the disk between forward passes."""
    return part._hf_hook.weights_map[name]  # type: ignore[union-attr, index]


def entries_of(part: nn.Module, name: str) -> tuple[Tensor, bool]:
    """Return the memory of a weight as one row of entries, and whether it is only the part that this process has.

    Raises:
        ConfigError: the weight is on the disk.
    """
    weight = part.get_parameter(name)
    here = weight.to_local() if _is_cut(weight) else weight  # type: ignore[operator]
    if _is_elsewhere(part, weight):
        here = _offloaded(part, name)
        if _offloaded(part, name) is not here:
            raise ConfigError(
                "a control with shuffled weights changes them in memory, but some are on the disk: leave the control out, or "
                "load the model with a device_map without 'disk'"
            )
    in_memory = here.detach().permute(sorted(range(here.ndim), key=here.stride, reverse=True))
    return in_memory.view(-1), _is_cut(weight)


def whole_copy(part: nn.Module) -> nn.Module:
    """Return a copy of a small module, with its weights whole and without hooks of accelerate."""
    instead: dict[int, Any] = {}  # deepcopy takes these in place of copies
    for inner in part.modules():
        for name, weight in inner.named_parameters(recurse=False):
            instead[id(weight)] = nn.Parameter(weight_of(inner, name).detach().clone(), requires_grad=False)
        for name in ("_hf_hook", "forward", "_old_forward"):
            if name in inner.__dict__:
                instead[id(inner.__dict__[name])] = None
    copied = copy.deepcopy(part, instead)
    for inner in copied.modules():
        for name in ("_hf_hook", "forward", "_old_forward"):
            inner.__dict__.pop(name, None)
    return copied


def on_whole(part: nn.Module, side: str, visit: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a `visit` for a hook on a module of which each process may have a part.

    It gets the activation whole, and its result is cut again. All processes must call it.
    """
    weight = getattr(part, "weight", None)
    if not (isinstance(weight, Tensor) and _is_cut(weight) and isinstance(part, nn.Linear)):
        return visit
    width = part.in_features if side == "in" else part.out_features
    mesh, (cut,) = weight.device_mesh, weight.placements  # type: ignore[attr-defined]

    def visit_whole(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.shape[-1] == width:
            return visit(value)
        if type(cut).__name__ != "Shard":
            raise HookError(
                "the parts of this tensor are interleaved over the processes; load the model without device_map='tp'"
            )
        from torch.distributed.tensor import DTensor, Replicate, Shard

        shape = torch.empty(*value.shape[:-1], width, device="meta")
        parts = DTensor.from_local(
            value.contiguous(), mesh, [Shard(value.ndim - 1)], run_check=False, shape=shape.shape, stride=shape.stride()
        )
        whole = parts.full_tensor()
        new = visit(whole)
        if new is None or new is whole:
            return None
        there = DTensor.from_local(new.to(value.device, value.dtype), mesh, [Replicate()], run_check=False)
        return there.redistribute(placements=[Shard(value.ndim - 1)]).to_local()

    return visit_whole


def _is_cut(weight: Tensor) -> bool:
    """Return whether a weight is a DTensor, of which each process has a part."""
    return hasattr(weight, "full_tensor")
