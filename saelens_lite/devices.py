"""The device that work runs on unless another is named, and float64 where a device has none."""

import logging
import warnings
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from saelens_lite.errors import ConfigError

WITHOUT_FLOAT64 = frozenset({"mps"})  # types of devices
CLOSE = 1e-4  # relative to the largest entry, for float32

log = logging.getLogger(__name__)


def natural_device() -> torch.device:
    """Return CUDA where there is one, else MPS where it computes what the CPU computes, else the CPU. The log says which."""
    candidates = {"cuda": torch.cuda.is_available, "mps": lambda: torch.backends.mps.is_available() and works("mps")}
    found = next((device for device, is_usable in candidates.items() if is_usable()), "cpu")
    _say(found)
    return torch.device(found)


def chosen_device(device: str | torch.device | None) -> torch.device:
    """Return the device that was named, or the natural one for None.

    Raises:
        ConfigError: the name is not that of a device, or this computer has no such device.
    """
    if device is None:
        return natural_device()
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device = {device!r}: {str(error).partition(chr(10))[0]}") from None
    if not is_available(found):
        raise ConfigError(
            f"device = {str(device)!r}: torch finds no such device here; leave device out to use {natural_device()}"
        )
    return found


def is_available(device: str | torch.device) -> bool:
    """Return whether torch finds a device here."""
    device = torch.device(device)
    if device.type == "cuda":
        return (device.index or 0) < torch.cuda.device_count()
    return device.type != "mps" or torch.backends.mps.is_available()


def device_to_train_on(device: str | torch.device | None) -> torch.device:
    """Return the device that was named, or the natural one for None.

    Raises:
        ConfigError: as for `chosen_device`, or the device lacks operations that training needs.
    """
    found = chosen_device(device)
    if found.type == "mps" and not works("mps"):
        raise ConfigError(
            f"device = {str(device)!r}: torch {torch.__version__} lacks operations there that training needs, or computes "
            "them wrong; leave device out to train on the CPU"
        )
    return found


@cache
def _say(device: str) -> None:
    log.info("running on %s, as no device was named", device)


@cache
def works(device: str) -> bool:
    """Return whether the operations that training relies on run on a device, with the results of the CPU."""
    try:
        found = _sample(torch.device(device))
    except Exception as error:  # torch raises errors of many kinds for an operation that a device lacks
        log.info("%s is not used: %s", device, str(error).partition("\n")[0][:200])
        return False
    wanted = _sample(torch.device("cpu"))
    same = [(a.cpu() - b).abs().max() <= CLOSE * b.abs().max() for a, b in zip(found, wanted, strict=True)]
    if not all(same):
        log.info("%s is not used: its results differ from those of the CPU", device)
    return all(same)


def _sample(device: torch.device) -> list[Tensor]:
    """Return results of the operations in a training step, other than those that every device has."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(8, 16, generator=generator).to(device) for _ in range(2))
    latent, crow = torch.arange(8, device=device).int(), torch.arange(0, 9, 2, device=device).int()
    with warnings.catch_warnings():  # that compressed rows are in beta
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


def float64_device(device: torch.device) -> torch.device:
    """Return where sums in float64 of what is on a device are taken: there, or on the CPU where it has no float64."""
    return torch.device("cpu") if device.type in WITHOUT_FLOAT64 else device


def where_float64_is(x: Tensor) -> Tensor:
    """Return x on the device on which it can be summed in float64; a copy only where its own has no float64."""
    return x.to(float64_device(x.device))


def wide(x: Tensor) -> Tensor:
    """Return x in float64, on the CPU where its device has no float64."""
    return where_float64_is(x).double()
