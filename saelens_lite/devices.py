"""The default device, modules on another device, TF32 products, and float64 for devices that lack it."""

import copy
import logging
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saelens_lite.errors import ConfigError
from saelens_lite.processes import is_launched, take_gpu

WITHOUT_FLOAT64 = frozenset({"mps"})  # types of devices without float64
CLOSE = 1e-4  # relative to the largest entry, for float32
MATMUL = torch.backends.cuda.matmul

Module = TypeVar("Module", bound=nn.Module)
log = logging.getLogger(__name__)


def natural_device() -> torch.device:
    """Return CUDA if available, else MPS if its results match the CPU's, else the CPU. The choice is logged.

    Processes that torchrun started do not use MPS, over which they could not exchange tensors.
    """
    take_gpu()
    has_mps = torch.backends.mps.is_available() and not is_launched()
    candidates = {"cuda": torch.cuda.is_available, "mps": lambda: has_mps and works("mps")}
    device = next((device for device, is_usable in candidates.items() if is_usable()), "cpu")
    _say(device)
    return torch.device(device)


def chosen_device(device: str | torch.device | None) -> torch.device:
    """Return the named device, or the natural one for None. In a process that torchrun started, any GPU means its own.

    Raises:
        ConfigError: the name is not a device, or this computer has no such device.
    """
    if device is None:
        return natural_device()
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device = {device!r}: {str(error).partition(chr(10))[0]}") from None
    if chosen.type == "cuda" and is_launched():
        take_gpu()
        chosen = torch.device("cuda")
    if not is_available(chosen):
        raise ConfigError(
            f"device = {str(device)!r}: torch finds no such device here; leave device out to use {natural_device()}"
        )
    return chosen


def is_available(device: str | torch.device) -> bool:
    """Return whether torch finds a device here."""
    device = torch.device(device)
    if device.type == "cuda":
        return (device.index or 0) < torch.cuda.device_count()
    return device.type != "mps" or torch.backends.mps.is_available()


def device_to_train_on(device: str | torch.device | None) -> torch.device:
    """Return the named device, or the natural one for None.

    Raises:
        ConfigError: as for `chosen_device`, or the device lacks operations that training needs.
    """
    chosen = chosen_device(device)
    if chosen.type == "mps" and not works("mps"):
        raise ConfigError(
            f"device = {str(device)!r}: torch {torch.__version__} lacks operations on it that training needs, or computes "
            "them wrongly; leave device out to train on the CPU"
        )
    return chosen


@cache
def _say(device: str) -> None:
    log.info("running on %s, because no device was named", device)


@cache
def works(device: str) -> bool:
    """Return whether the operations of training run on a device with the same results as on the CPU."""
    try:
        results = _sample(torch.device(device))
    except Exception as error:  # torch raises many kinds of errors for missing operations
        log.info("%s is not used: %s", device, str(error).partition("\n")[0][:200])
        return False
    wanted = _sample(torch.device("cpu"))
    same = [(a.cpu() - b).abs().max() <= CLOSE * b.abs().max() for a, b in zip(results, wanted, strict=True)]
    if not all(same):
        log.info("%s is not used: its results differ from those of the CPU", device)
    return all(same)


def _sample(device: torch.device) -> list[Tensor]:
    """Return the results of the operations in a training step that some devices lack."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(8, 16, generator=generator).to(device) for _ in range(2))
    latent, crow = torch.arange(8, device=device).int(), torch.arange(0, 9, 2, device=device).int()
    with warnings.catch_warnings():  # about the beta state of compressed rows
        warnings.simplefilter("ignore")
        pattern = torch.sparse_csr_tensor(crow, latent, torch.zeros(8, device=device), (4, 8), check_invariants=False)
    parameter = weight.clone().requires_grad_()
    optimizer = torch.optim.Adam([parameter], lr=0.1, fused=True)
    parameter.grad, optimizer.grad_scale = x, torch.full((), 2.0, device=device)
    optimizer.step()
    return [
        x @ weight.T,
        F.embedding_bag(latent, weight, crow, mode="sum", per_sample_weights=x[:, 0], include_last_offset=True),
        torch.sparse.sampled_addmm(pattern, x[:4], weight.T, beta=0.0).values(),
        torch.bincount(latent, minlength=9).float(),
        x.topk(3, dim=1).values,
        parameter.detach(),
    ]


def asynchronous(tensor: Tensor) -> bool:
    """Return whether reading a tensor makes the host wait for the device.

    That is so on an NVIDIA GPU, and on a CPU if TRITON_INTERPRET=1 makes it stand in for one.
    """
    return tensor.is_cuda or (tensor.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")


@torch.no_grad()
def on_device(module: Module, device: torch.device) -> Module:
    """Return a module on a device: itself if it is there, else a frozen copy. The module stays as it is.

    A module of float64 stays where it is if the device lacks float64.
    """
    tensors = [*module.parameters(), *module.buffers()]
    lacks = device.type in WITHOUT_FLOAT64 and any(x.dtype == torch.float64 for x in tensors)
    if lacks or all(x.device == device for x in tensors):
        return module
    moved: dict[int, Tensor] = {}  # deepcopy takes these in place of copies of the tensors
    for x in tensors:
        there = x.detach().to(device)
        moved[id(x)] = nn.Parameter(there, requires_grad=False) if isinstance(x, nn.Parameter) else there
    return copy.deepcopy(module, moved)


class _Flags(NamedTuple):
    """The settings of torch for float32 products on CUDA. Their old and their new name can contradict each other."""

    allow_tf32: bool
    precision: str  # of torch.set_float32_matmul_precision; "" if torch cannot say
    name: str | None  # fp32_precision, which exists from torch 2.9 on

    @classmethod
    def now(cls) -> "_Flags":
        name = getattr(MATMUL, "fp32_precision", None)
        try:
            precision = torch.get_float32_matmul_precision()
        except RuntimeError:  # some settings were made by their old names, some by their new ones
            precision = ""
        try:
            return cls(MATMUL.allow_tf32, precision, name)
        except RuntimeError:
            return cls(name != "tf32", precision, name)

    @property
    def tf32(self) -> bool:
        return self.allow_tf32 if self.name is None else self.name == "tf32"

    def put_back(self) -> None:
        MATMUL.allow_tf32 = self.allow_tf32
        if self.precision == "medium":
            torch.set_float32_matmul_precision("medium")
        if self.name is not None:
            MATMUL.fp32_precision = "none" if self.name == torch.backends.fp32_precision else self.name  # none: as for all


# torch has one flag for all threads, and a thread may train while another runs a model. So the thread that changes the flag
# holds a lock until it has put it back, and training waits for that lock before it computes products of its own.
_changing_flags = threading.RLock()
_outside: list[_Flags] = []  # the flags outside of the blocks that are active now
_models_change_flags = threading.Event()


def tf32_is_on() -> bool:
    """Return whether torch computes float32 products on CUDA in TF32."""
    return _Flags.now().tf32


@contextmanager
def float32_products(tf32: bool | None) -> Iterator[None]:
    """Compute float32 products on CUDA in TF32 within the block (True), not in TF32 (False), or as torch is set (None).

    For forward passes of language models. Code that they call should run in `outside_models`.
    """
    if tf32 is None:
        yield
        return
    _models_change_flags.set()
    with _changing_flags:
        before = _Flags.now()
        _outside.append(before)
        try:
            if tf32 != before.tf32:
                MATMUL.allow_tf32 = tf32  # also sets the new name; products fail if the two contradict each other
            yield
        finally:
            _outside.pop()
            if tf32 != before.tf32:
                before.put_back()


@contextmanager
def outside_models() -> Iterator[None]:
    """Compute float32 products within the block as outside of all forward passes, in this thread and in others."""
    if not _models_change_flags.is_set():
        yield
        return
    with _changing_flags:
        inside = _Flags.now()
        if not _outside or inside.tf32 == _outside[0].tf32:
            yield
            return
        _outside[0].put_back()
        try:
            yield
        finally:
            inside.put_back()


def float64_device(device: torch.device) -> torch.device:
    """Return the device for float64 sums: the given one, or the CPU if the device lacks float64."""
    return torch.device("cpu") if device.type in WITHOUT_FLOAT64 else device


def where_float64_is(x: Tensor) -> Tensor:
    """Return x on a device that has float64. x is copied only if its own device lacks it."""
    return x.to(float64_device(x.device))


def wide(x: Tensor) -> Tensor:
    """Return x in float64, on the CPU if its device lacks float64."""
    return where_float64_is(x).double()
