"""Checks for the Triton kernels. This module does not import Triton, which exists only on Linux."""

import os
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

KERNEL_DTYPES = (torch.float32, torch.bfloat16)  # all sums are float32
OLDEST = (8, 0)  # compute capability from which a GPU has bfloat16


@cache
def _triton_is_installed() -> bool:
    return find_spec("triton") is not None


def available(tensor: Tensor) -> bool:
    """Return whether `saelens_lite.codes.triton_kernels` can be imported and run on a tensor of this device and dtype.

    TRITON_INTERPRET=1 also runs the kernels on a CPU, slowly, for tests.
    """
    if tensor.dtype not in KERNEL_DTYPES or not _triton_is_installed():
        return False
    if tensor.is_cuda:
        return has_bfloat16(tensor.device)
    return tensor.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"


def has_bfloat16(device: torch.device) -> bool:
    """Return whether bfloat16 products are fast on a device."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= OLDEST


def kernels(tensor: Tensor) -> ModuleType | None:
    """Return `saelens_lite.codes.triton_kernels` if it can run on a tensor, else None."""
    if not available(tensor):
        return None
    from saelens_lite.codes import triton_kernels

    return triton_kernels
