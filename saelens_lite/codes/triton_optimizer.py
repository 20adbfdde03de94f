"""Adam on rows as a Triton kernel: clipping, the update, unit rows and a rounded copy in one pass."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from saelens_lite.errors import ShapeError

WIDEST = 4096  # columns of a row that stay in registers until its norm is known
BLOCK = 1024  # entries of a program, if rows keep their norms
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)  # least norm to divide by


@triton.jit
@no_type_check
def _updated(p, m, v, g, at, inside, scale, step_size, root, b1, c1, b2, c2, eps):
    """Store new moments and return the new parameters, which the caller stores."""
    gradient = tl.load(g + at, mask=inside, other=0.0).to(tl.float32) * scale
    first = b1 * tl.load(m + at, mask=inside, other=0.0).to(tl.float32) + c1 * gradient
    second = b2 * tl.load(v + at, mask=inside, other=0.0).to(tl.float32) + c2 * gradient * gradient
    tl.store(m + at, first, mask=inside)
    tl.store(v + at, second, mask=inside)
    new = tl.load(p + at, mask=inside, other=0.0).to(tl.float32) - step_size * first / (tl.sqrt(second) * root + eps)
    return tl.where(inside, new, 0.0)


@triton.jit
@no_type_check
def _store(p, half, at, inside, new):
    tl.store(p + at, new, mask=inside)
    if half is not None:
        tl.store(half + at, new.to(half.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def _adam_rows(
    p, m, v, g, half, scale, step_size, root, skip, size, d, b1, c1, b2, c2, eps,
    UNIT: tl.constexpr, ONE_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update row i, which is the entries from i d to (i + 1) d of `size`, unless `skip` says to leave all as it is."""
    if tl.load(skip) == 0:
        by, step = tl.load(scale).to(tl.float32), tl.load(step_size).to(tl.float32)
        of_root = tl.load(root).to(tl.float32)
        begin, column = tl.program_id(0).to(tl.int64) * d, tl.arange(0, BLOCK)
        if ONE_BLOCK:
            at = begin + column
            inside = (column < d) & (at < size)
            new = _updated(p, m, v, g, at, inside, by, step, of_root, b1, c1, b2, c2, eps)
            if UNIT:
                new = new / tl.maximum(tl.sqrt(tl.sum(new * new, 0)), TINY)
            _store(p, half, at, inside, new)
        else:  # UNIT: the row is read again when its norm is known
            squares = tl.zeros((BLOCK,), tl.float32)
            for left_of in range(0, d, BLOCK):
                at = begin + left_of + column
                inside = left_of + column < d
                new = _updated(p, m, v, g, at, inside, by, step, of_root, b1, c1, b2, c2, eps)
                tl.store(p + at, new, mask=inside)
                squares += new * new
            norm = tl.maximum(tl.sqrt(tl.sum(squares, 0)), TINY)
            tl.debug_barrier()
            for left_of in range(0, d, BLOCK):
                at = begin + left_of + column
                inside = left_of + column < d
                _store(p, half, at, inside, tl.load(p + at, mask=inside, other=0.0).to(tl.float32) / norm)


def adam_rows_(
    p: Float[Tensor, "n d"],
    m: Float[Tensor, "n d"],
    v: Float[Tensor, "n d"],
    g: Float[Tensor, "n d"],
    *,
    half: Float[Tensor, "n d"] | None,
    unit: bool,
    scale: Float[Tensor, ""],
    step_size: Float[Tensor, ""],
    root: Float[Tensor, ""],
    skip: Tensor,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Update parameters and their moments in place, as torch.optim.Adam does, in one pass over them.

        g' = scale g    m = β₁ m + (1 − β₁) g'    v = β₂ v + (1 − β₂) g'²    p = p − step_size m / (√v root + eps)

    Args:
        p: Parameters. All four tensors are contiguous.
        m: First moments.
        v: Second moments.
        g: Gradients.
        half: Copy of the new parameters in another dtype, to write.
        unit: Whether to divide each new row of p by its norm.
        scale: Factor of the gradients, such as 1 / max(1, norm / largest norm).
        step_size: lr / (1 − β₁ᵗ) in step t.
        root: 1 / √(1 − β₂ᵗ) in step t.
        skip: If this is not zero, nothing changes.
        betas: β₁ and β₂.
        eps: Added to the denominator.

    Raises:
        ShapeError: The tensors differ in shape, or one is not contiguous.
    """
    for name, tensor in {"moments m": m, "moments v": v, "gradients": g, "copy": half, "parameters": p}.items():
        if tensor is not None and (tensor.shape != p.shape or not tensor.is_contiguous()):
            raise ShapeError(
                f"the {name} of a parameter of shape {tuple(p.shape)} must have this shape and be contiguous; "
                f"the shape is {tuple(tensor.shape)}, the strides are {tensor.stride()}"
            )
    d = p.shape[1] if unit else BLOCK  # without norms, rows do not matter
    block = min(triton.next_power_of_2(d), WIDEST)
    skip = skip.view(torch.uint8) if skip.dtype == torch.bool else skip
    b1, b2 = betas
    numbers = (b1, 1 - b1, b2, 1 - b2, eps)
    with torch.cuda.device_of(p):
        _adam_rows[(triton.cdiv(p.numel(), d),)](
            p, m, v, g, half, scale, step_size, root, skip, p.numel(), d, *numbers,
            UNIT=unit, ONE_BLOCK=d <= block, BLOCK=block, num_warps=4 if block <= 1024 else 8,
        )  # fmt: skip
