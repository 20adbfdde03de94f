"""Count the launches of a training step and the places where the host waits for the GPU, on a computer without one.

    python scripts/benchmarks/waits.py
    python scripts/benchmarks/waits.py --rules topk l1 --dead 0.5

A step of each rule runs on a pretended CUDA device: its tensors are in the computer's memory, but say that they are on cuda:0,
so the code takes the path for a GPU, and Triton's interpreter runs the kernels. Every operation of torch counts as one launch,
unless it returns a view or only allocates. Some launch several kernels on a GPU, so the number is a lower bound. The host waits
when a result has a size that only the device knows, and when numbers are copied between the device and pageable memory
(`reason_to_wait` lists such operations). On a GPU, torch.cuda.set_sync_debug_mode finds the same waits.
"""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE, HOST = torch.device("cuda", 0), torch.device("cpu")
H100 = {"major": 9, "minor": 0, "multi_processor_count": 132, "total_memory": 80 << 30, "L2_cache_size": 50 << 20}
RULES = {
    "topk": {"k": 3},
    "batch_topk": {"k": 3},
    "matryoshka": {"k": 3, "prefixes": (0.25, 0.5)},
    "group_max": {"k": 4},
    "l1": {},
    "gated": {},
    "jumprelu": {"threshold": 0.4},
    "p_anneal": {"start": 0.0},
    "matching_pursuit": {"k": 3},
}
NO_LAUNCH = {
    "empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided", "resize_", "set_", "lift_fresh",
    "_unsafe_view", "_reshape_alias", "_local_scalar_dense", "_sparse_csr_tensor_unsafe", "_sparse_compressed_tensor_unsafe",
    "is_pinned", "_pin_memory", "record_stream", "is_same_size",
}  # fmt: skip
# Operations that copy the size of their result to the host
UNKNOWN_SIZE = {"nonzero", "masked_select", "argwhere", "_unique", "_unique2", "unique_dim", "unique_consecutive"}
BETWEEN_NUMBERS = ("mm", "addmm", "bmm", "baddbmm")  # products that on CUDA take bfloat16 numbers and return float32 ones


def reason_to_wait(name: str, given: dict[str, Any]) -> str | None:
    """Return the reason why an operation on CUDA tensors makes the host wait, or None if it does not."""
    if name == "_local_scalar_dense":
        return "item, int, float or bool of a tensor copies a number to the host"
    if name in UNKNOWN_SIZE:
        return f"{name}: the size of the result is copied to the host"
    if name in ("index", "index_put", "_index_put_impl", "_unsafe_index_put"):
        indices = [index for index in given["indices"] if index is not None]
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            return "indexing with a mask calls nonzero, the size of whose result is copied to the host"
    if name == "bincount":
        return "bincount copies the smallest and the largest number to the host"
    if name == "repeat_interleave" and given.get("output_size") is None:
        return "repeat_interleave without output_size copies the sum of the repeats to the host"
    if name == "equal":
        return "equal copies its answer to the host"
    if name == "histc" and given.get("min", 0) == given.get("max", 0):
        return "histc without limits copies the smallest and the largest number to the host"
    if name in ("searchsorted", "multinomial") and (name == "multinomial" or given.get("sorter") is not None):
        return f"{name} checks the range of its input on the host"
    return None


class Counts:
    """The launches and waits on a pretended CUDA device, by their place in the code. `on_host`: storages in host memory."""

    def __init__(self) -> None:
        self.launches: Counter[str] = Counter()  # by operation
        self.waits: Counter[tuple[str, str]] = Counter()  # by place and reason
        self.on_host: set[int] = set()
        self.paused = False

    def clear(self) -> None:
        """Begin to count again."""
        self.launches.clear()
        self.waits.clear()

    def wait(self, reason: str, n: int = 1) -> None:
        """Count waits at the line of the library that is running."""
        self.waits[place(), reason] += n

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Count nothing in a block, and show tensors where they really are."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before

    def is_on_host(self, x: Tensor) -> bool:
        """Return whether a tensor is in host memory on purpose."""
        with self.pause():
            return x.layout is torch.strided and x.untyped_storage().data_ptr() in self.on_host

    def put(self, x: Any, device: torch.device) -> None:
        """Note where the tensors in a result are."""
        with self.pause():
            for tensor in tree_leaves(x):
                if isinstance(tensor, Tensor) and tensor.layout is torch.strided and tensor.numel():
                    change = self.on_host.add if device.type == "cpu" else self.on_host.discard
                    change(tensor.untyped_storage().data_ptr())


def place() -> str:
    """Return the innermost line of the library that is running."""
    import saelens_lite
    import saelens_lite_plugins

    roots = {
        str(Path(package.__file__).parent): name for package, name in ((saelens_lite, ""), (saelens_lite_plugins, "plugins/"))
    }
    frame = sys._getframe(1)
    while frame is not None:
        for root, name in roots.items():
            if frame.f_code.co_filename.startswith(root + os.sep):
                return f"{name}{frame.f_code.co_filename[len(root) + 1 :]}:{frame.f_lineno}"
        frame = frame.f_back
    return "a backward pass"


def _is(func: Any, name: str) -> bool:
    """Return whether a function is the getter of a tensor's attribute."""
    return func == getattr(Tensor, name).__get__


def _named_device(args: tuple, kwargs: dict[str, Any]) -> torch.device | None:
    """Return the device that the arguments of a call name."""
    for x in (kwargs.get("device"), *args):
        if isinstance(x, torch.device):
            return x
        if isinstance(x, str) and x.partition(":")[0] in ("cpu", "cuda"):
            return torch.device(x)
    return None


def _without_cuda(x: Any) -> Any:
    """Return an argument with the CPU in place of a CUDA device."""
    if isinstance(x, torch.device):
        return HOST
    return "cpu" if isinstance(x, str) and x.partition(":")[0] == "cuda" else x


class _Pretend(TorchFunctionMode):
    """A block in which tensors say that they are on the pretended device, and can be made there."""

    def __init__(self, counts: Counts):
        self.counts = counts

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        counts, kwargs = self.counts, dict(kwargs or {})
        if counts.paused or func in (torch.device, torch._C._nn._parse_to):  # these only name a device
            return func(*args, **kwargs)
        if _is(func, "device"):
            return HOST if counts.is_on_host(args[0]) else DEVICE
        if _is(func, "is_cuda") or _is(func, "is_cpu"):
            return counts.is_on_host(args[0]) == _is(func, "is_cpu")
        if func is Tensor.backward:  # with the mode in force, which torch takes off for this call
            with self:
                return torch.autograd.backward(args, kwargs.pop("gradient", None), **kwargs)
        if func is Tensor.pin_memory:
            return args[0]
        if func is Tensor.is_pinned:
            return counts.is_on_host(args[0])
        if func is Tensor.tolist and not counts.is_on_host(args[0]):
            counts.wait("tolist copies the tensor to the host")
        if func in (Tensor.numpy, Tensor.__array__) and not counts.is_on_host(args[0]):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")
        asked = _named_device(args, kwargs)
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return self._move(func, args, kwargs, asked)
        kwargs.pop("pin_memory", None)
        made_here = not any(isinstance(x, Tensor) for x in tree_leaves((args, kwargs)))
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and made_here and asked and asked.type == "cuda":
            counts.wait(f"{func.__name__} copies numbers from pageable memory to the device")
        result = func(*tree_map(_without_cuda, args), **tree_map(_without_cuda, kwargs))
        if made_here or asked is not None:
            counts.put(result, asked or HOST)
        return result

    def _move(self, func: Any, args: tuple, kwargs: dict[str, Any], asked: torch.device | None) -> Tensor:
        """Return a tensor on another device, or in another dtype."""
        counts, x = self.counts, args[0]
        now = HOST if counts.is_on_host(x) else DEVICE
        others = [other for other in args[1:] if isinstance(other, Tensor)]
        like = (HOST if counts.is_on_host(others[0]) else DEVICE) if others else now
        target = {Tensor.cpu: HOST, Tensor.cuda: DEVICE}.get(func, asked or like)
        is_waited_for = not (kwargs.get("non_blocking") or (len(args) > 3 and args[3] is True))
        result = x if func is Tensor.cuda else func(*map(_without_cuda, args), **tree_map(_without_cuda, kwargs))
        if target.type != now.type:
            if is_waited_for:
                counts.wait(f"a tensor is copied {'to' if target == HOST else 'from'} the host without non_blocking=True")
            with counts.pause():
                result = result.clone()
            counts.put(result, target)
        return result


class _Count(TorchDispatchMode):
    """A block in which operations on the pretended device are counted."""

    def __init__(self, counts: Counts):
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        counts, kwargs = self.counts, kwargs or {}
        if counts.paused:
            return func(*args, **kwargs)
        given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        is_host_work = bool(tensors) and all(map(counts.is_on_host, tensors))
        with counts.pause():
            result = _run(func, given, args, kwargs)
            before = {x.untyped_storage().data_ptr() for x in tensors if x.layout is torch.strided}
            new = [x for x in tree_leaves(result) if isinstance(x, Tensor) and x.layout is torch.strided]
            new = [x for x in new if x.untyped_storage().data_ptr() not in before]
        counts.put(new, HOST if is_host_work else DEVICE)
        if not is_host_work and (tensors or new) and func.namespace == "aten":
            self._note(func, given, tensors)
        return result

    def _note(self, func: Any, given: dict[str, Any], tensors: list[Tensor]) -> None:
        name = func._schema.name.removeprefix("aten::")
        if not (func.is_view or name in NO_LAUNCH):
            self.counts.launches[name] += 1
        reason = reason_to_wait(name.rstrip("_"), given)
        if name == "copy_" and not given.get("non_blocking") and any(map(self.counts.is_on_host, tensors)):
            reason = "copy_ between the host and the device without non_blocking=True"
        if name in ("index", "index_put_") and any(map(self.counts.is_on_host, tree_leaves(given["indices"]))):
            reason = "an index in host memory is copied to the device"
        if reason:
            self.counts.wait(reason, 2 if name == "bincount" else 1)


def _run(func: Any, given: dict[str, Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    """Return the result of an operation, also of a bfloat16 product with a float32 result, which only CUDA has."""
    name, overload = func._schema.name.removeprefix("aten::"), func._overloadname
    if name not in BETWEEN_NUMBERS or not overload.startswith("dtype"):
        return func(*args, **kwargs)
    dtype = given["out_dtype"]
    wide = [x.to(dtype) for x in args if isinstance(x, Tensor)]
    plain = getattr(getattr(torch.ops.aten, name), "out" if overload.endswith("out") else "default")
    return plain(*wide, **{key: x for key, x in kwargs.items() if key != "out_dtype"})


def _of_device(grouped: Any) -> Any:
    """Return a grouping of tensors by device and dtype, with the pretended device for the real one."""
    return lambda *args: {(DEVICE, dtype): group for (_, dtype), group in grouped(*args).items()}


@contextmanager
def pretended_cuda() -> Iterator[Counts]:
    """Pretend in a block that there is a CUDA device, and yield the counts of its launches and waits."""
    with patch.dict(os.environ, TRITON_INTERPRET="1"):  # triton reads it when it is imported
        from triton.runtime.interpreter import InterpretedFunction

    counts, launch, generator = Counts(), InterpretedFunction.run, torch.Generator

    class GeneratorOnHost:
        """torch.Generator, on the CPU wherever it is asked for."""

        def __new__(cls, device: Any = "cpu") -> torch.Generator:
            return generator("cpu")

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        counts.launches[self.__name__] += 1
        with counts.pause():
            return launch(self, *args, **kwargs)

    cuda = {
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: SimpleNamespace(name="pretended", **H100),
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "get_rng_state": lambda device=None: generator("cpu").get_state(),
        "set_rng_state": lambda state, device=None: None,
        "synchronize": lambda device=None: counts.wait("torch.cuda.synchronize"),
        "current_stream": MagicMock(), "Stream": MagicMock(), "Event": MagicMock(), "stream": lambda stream: nullcontext(),
    }  # fmt: skip
    with ExitStack() as stack:
        for name, pretended in cuda.items():
            stack.enter_context(patch.object(torch.cuda, name, pretended))
        for module in map(import_module, ("torch.optim.optimizer", "torch.nn.utils.clip_grad")):
            name = "_group_tensors_by_device_and_dtype"
            stack.enter_context(patch.object(module, name, _of_device(getattr(module, name))))
        stack.enter_context(patch.object(torch, "Generator", GeneratorOnHost))
        stack.enter_context(patch.object(InterpretedFunction, "run", run))
        stack.enter_context(patch.dict(os.environ, TRITON_INTERPRET="1"))
        stack.enter_context(_Count(counts))
        stack.enter_context(_Pretend(counts))
        yield counts


def count_step(rule: str, *, dead: float = 0.0, warm_up: int = 1, d_in: int = 16, d_sae: int = 64, batch: int = 8) -> Counts:
    """Return the launches and waits of one training step of a rule, after a few others. Other steps may do more.

    dead: Share of the latents that do not fire and count as dead.
    """
    import saelens_lite as sl
    from saelens_lite.cache import TensorSource
    from saelens_lite.training import Trainer

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, d_in, generator=generator)
    is_dead = torch.randperm(d_sae, generator=generator)[: round(dead * d_sae)]
    config = sl.TrainConfig(
        sparsity=rule, options=RULES[rule], d_sae=d_sae, batch_size=batch, n_tokens=10**9, decay=0.0, dead_after=10**6
    )
    with pretended_cuda() as counts:
        trainer = Trainer(config, TensorSource(x), "cuda")
        with torch.no_grad():
            for name, bias in trainer.dictionary.named_parameters():
                if name.endswith(("b_enc", "b_gate")):  # so that about as few latents fire as in a trained dictionary
                    bias.fill_(-1.5 if rule in ("l1", "gated", "p_anneal") else 0.0)
                    bias[is_dead] = -1000.0
        for _ in range(1 + warm_up):  # the first step also scales the untrained encoder
            trainer.since_fired[is_dead] = 10**7
            trainer.find_dead(now=True)
            trainer.step(x)
        counts.clear()
        trainer.step(x)
    return counts


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rules", nargs="+", default=list(RULES), choices=list(RULES))
    options.add_argument("--dead", type=float, nargs="+", default=[0.0, 0.5], help="shares of the latents that are dead")
    options.add_argument("--launches", action="store_true", help="also list the launches by operation")
    args = options.parse_args()
    print(f"{'rule':18}{'dead':>6}{'launches':>10}{'waits':>7}")
    for rule in args.rules:
        for dead in args.dead:
            counts = count_step(rule, dead=dead)
            print(f"{rule:18}{dead:>6.0%}{counts.launches.total():>10}{counts.waits.total():>7}", flush=True)
            for (where, reason), n in counts.waits.items():
                print(f"    {n} × {where}: {reason}")
            if args.launches:
                print("    " + ", ".join(f"{name} {n}" for name, n in counts.launches.most_common()))


if __name__ == "__main__":
    main()
