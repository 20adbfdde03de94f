"""Compile every Triton kernel ahead of time and print its registers, spilled bytes and shared memory. This needs no GPU.

Spills are bytes of a thread's registers that do not fit and go through memory; there should be none.
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

os.environ["TRITON_INTERPRET"] = "0"  # compile; read when triton is imported

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from saelens_lite.codes import Support, support_of_indices
from saelens_lite.codes import triton_kernels as kernels
from saelens_lite.tables import grid
from saelens_lite.terminal import console

SHAPES = ((768, 24_576, 32), (2304, 65_536, 32))  # d_in, d_sae, k
DTYPES = (torch.bfloat16, torch.float32)
CAPABILITIES = (80, 90)  # A100, H100


class Compiled(NamedTuple):
    """A compiled kernel and the resources that a GPU needs to run it."""

    kernel: str
    sm: int
    shape: str
    dtype: str
    warps: int
    registers: int
    spilled: int  # bytes per thread
    shared: int  # bytes per program


class NoGPU:
    """A driver that names the GPU to compile for and launches nothing."""

    capability = CAPABILITIES[0]

    def get_current_target(self) -> GPUTarget:
        """Return the GPU to compile for."""
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        """Return another number for each capability, so that one's kernels are not taken for another's."""
        return self.capability

    def get_current_stream(self, device: int) -> int:
        """Return the default stream."""
        return 0


class Compiler:
    """Compiles what is launched instead of launching it."""

    def __init__(self) -> None:
        self.driver, self.found, self._seen = NoGPU(), [], set()
        self._label: tuple[str, str] = ("", "")
        driver.set_active(self.driver)
        launch = JITFunction.run

        def run(kernel: JITFunction, *args: Any, **options: Any) -> None:
            self._keep(kernel.__name__, launch(kernel, *args, **{**options, "warmup": True}))

        JITFunction.run = run
        torch.Tensor.new_empty = torch.Tensor.new_zeros  # no kernel writes what another function may read

    def _keep(self, name: str, binary: Any) -> None:
        key = (binary.hash, self.driver.capability)
        if key in self._seen:
            return
        self._seen.add(key)
        registers, spilled = resources(binary.asm["cubin"])
        sizes = (binary.metadata.num_warps, registers, spilled, binary.metadata.shared)
        self.found.append(Compiled(name, self.driver.capability, *self._label, *sizes))

    def compile_all(self, d_in: int, d_sae: int, k: int, dtype: torch.dtype) -> None:
        """Launch every kernel as a training step of this shape would."""
        self._label = (f"{d_in}→{d_sae}", "bf16" if dtype == torch.bfloat16 else "fp32")
        for capability in CAPABILITIES:
            self.driver.capability = capability
            for call in calls(d_in, d_sae, k, dtype):
                call()


def calls(d_in: int, d_sae: int, k: int, dtype: torch.dtype) -> Iterator[Any]:
    """Yield a call of each function for tensors of this shape, except that there are 16 rows."""
    n_rows = 16
    pre = torch.zeros(n_rows, d_sae, dtype=dtype)
    yield lambda: kernels.topk(pre, k)
    yield lambda: kernels.topk(pre[:, : d_sae // 2], d_in // 2)  # as for dead latents
    yield lambda: kernels.topk(pre[:, :6000], 2000)
    yield lambda: kernels.n_largest(pre, n_rows * k)
    yield lambda: kernels.above(pre, 0.0)
    yield lambda: kernels.above(pre, torch.zeros(d_sae))

    support: Support = support_of_indices(torch.arange(k).expand(n_rows, k))
    value = torch.zeros(n_rows * k)
    by_row, by_latent = (torch.empty(n, d_in, dtype=dtype, device="meta") for n in (n_rows, d_sae))
    yield lambda: kernels.decode(support, value, by_latent)
    yield lambda: kernels.pair_products(support, by_row, by_latent)
    yield lambda: kernels.transposed_product(support, value, by_row, d_sae)
    yield lambda: kernels.transposed_product(support, value, torch.ones(n_rows, 1), d_sae)

    if dtype == torch.float32:
        p, m, v, g = (torch.empty(d_sae, d_in, device="meta") for _ in "pmvg")
        half, number = torch.empty(d_sae, d_in, dtype=torch.bfloat16, device="meta"), torch.zeros(())
        step = {"scale": number, "step_size": number, "root": number, "skip": number.bool(), "betas": (0.9, 0.999), "eps": 1e-8}
        yield lambda: kernels.adam_rows_(p, m, v, g, half=None, unit=True, **step)
        yield lambda: kernels.adam_rows_(p, m, v, g, half=half, unit=False, **step)
        wide = [torch.empty(16, 5120, device="meta") for _ in "pmvg"]
        yield lambda: kernels.adam_rows_(*wide, half=None, unit=True, **step)


def resources(cubin: bytes) -> tuple[int, int]:
    """Return (registers, spilled bytes) per thread of a compiled kernel."""
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [cuobjdump, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


def main() -> None:
    """Compile for each shape and dtype, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write the results to")
    arguments = parser.parse_args()
    compiler = Compiler()
    for (d_in, d_sae, k), dtype in product(SHAPES, DTYPES):
        compiler.compile_all(d_in, d_sae, k, dtype)
    found = sorted(compiler.found)
    if arguments.json:
        arguments.json.write_text(json.dumps([one._asdict() for one in found], indent=1))
    titles = [name.replace("_", " ") for name in Compiled._fields]
    text = ("kernel", "shape", "dtype")
    rows = [[str(cell) for cell in one] for one in found]
    column = lambda title: {"no_wrap": True, "justify": "left" if title in text else "right"}  # noqa: E731
    console().print(grid(titles, rows, column=column, collapse_padding=True, pad_edge=False))


if __name__ == "__main__":
    main()
