"""The products of a support as Triton kernels.

Everything is summed in float32 and in an order that depends on the support alone: no atomics, same input, same bytes.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from saelens_lite.codes.support import Support
from saelens_lite.codes.triton_select import with_whole_rows
from saelens_lite.errors import ShapeError

CUT = 256  # most pairs of one latent that one program sums: some latents fire in every row
PAIRS = 8  # rows that a program has in flight at once
A_PART = 128  # pairs of a row, on average, from which several programs share the row


# Kernels need `no_type_check`: their annotations are Triton's, not types.


@triton.jit
@no_type_check
def _pair_sums(
    first, last, index, order, value, rows, row_stride, column, inside, PAIRS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Return PAIRS sums whose total is Σ weight · rows[index[i]] over first ≤ i < last.

    The weight of pair i is value[order[i]], or value[i] if there is no order.
    """
    total = tl.zeros((PAIRS, BLOCK), tl.float32)
    for begin in range(first, last, PAIRS):
        pair = begin + tl.arange(0, PAIRS)
        there = pair < last
        place = pair
        if order is not None:
            place = tl.load(order + pair, mask=there, other=0)
        weight = tl.load(value + place, mask=there, other=0.0).to(tl.float32)[:, None]
        source = tl.load(index + pair, mask=there, other=0).to(tl.int64)[:, None]
        tile = rows + source * row_stride + column[None, :]
        total += weight * tl.load(tile, mask=there[:, None] & inside[None, :], other=0.0).to(tl.float32)
    return total


@triton.jit
@no_type_check
def _sum_rows(crow, latent, value, rows, out, d, row_stride, PAIRS: tl.constexpr, BLOCK: tl.constexpr):
    """Write out[row] = Σ value · rows[latent] over the pairs of the row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first, last = tl.load(crow + row), tl.load(crow + row + 1)
    total = _pair_sums(first, last, latent, None, value, rows, row_stride, column, column < d, PAIRS, BLOCK)
    tl.store(out + row * d + column, tl.sum(total, 0), mask=column < d)


@triton.jit
@no_type_check
def _sum_cuts(
    offsets, latent, index, order, value, rows, cuts, d, row_stride,
    CUT: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write to cuts[c] the sum of the pairs from (c + 1) CUT to the next multiple of CUT, if the latent began before them."""
    cut = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = (cut + 1) * CUT
    of = tl.load(latent + tl.load(order + first))
    if tl.load(offsets + of) < first:
        last = tl.minimum(first + CUT, tl.load(offsets + of + 1).to(tl.int64))
        total = _pair_sums(first, last, index, order, value, rows, row_stride, column, column < d, PAIRS, BLOCK)
        tl.store(cuts + cut * d + column, tl.sum(total, 0), mask=column < d)


@triton.jit
@no_type_check
def _sum_latents(
    offsets, index, order, value, rows, cuts, out, d, row_stride,
    CUT: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write out[latent] = Σ value · rows[index] over the pairs of the latent.

    This sums the pairs before the next multiple of CUT; cuts[c] holds the sum of the pairs of the same latent in
    (c + 1) CUT … (c + 2) CUT − 1.
    """
    latent = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < d
    first, last = tl.load(offsets + latent), tl.load(offsets + latent + 1)
    end = tl.minimum(last, (first // CUT + 1) * CUT)
    total = _pair_sums(first, end, index, order, value, rows, row_stride, column, inside, PAIRS, BLOCK)
    n_cuts = (last - 1) // CUT
    for begin in range(first // CUT, n_cuts, PAIRS):
        cut = (begin + tl.arange(0, PAIRS)).to(tl.int64)[:, None]
        total += tl.load(cuts + cut * d + column[None, :], mask=(cut < n_cuts) & inside[None, :], other=0.0)
    tl.store(out + latent * d + column, tl.sum(total, 0), mask=inside)


@triton.jit
@no_type_check
def _dot_rows(
    crow, latent, left, right, out, d, left_row_stride, right_row_stride,
    ONE_BLOCK: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write out[i] = ⟨left[row], right[latent[i]]⟩ for the pairs of a row; several programs take turns in a long row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    left += row * left_row_stride
    if ONE_BLOCK:  # the row stays in registers
        a = tl.load(left + column, mask=column < d, other=0.0).to(tl.float32)
    first, last = tl.load(crow + row) + tl.program_id(1) * PAIRS, tl.load(crow + row + 1)
    for begin in range(first, last, tl.num_programs(1) * PAIRS):
        pair = begin + tl.arange(0, PAIRS)
        there = pair < last
        b = right + tl.load(latent + pair, mask=there, other=0).to(tl.int64)[:, None] * right_row_stride
        if ONE_BLOCK:
            inside = there[:, None] & (column < d)[None, :]
            total = a[None, :] * tl.load(b + column[None, :], mask=inside, other=0.0).to(tl.float32)
        else:
            total = tl.zeros((PAIRS, BLOCK), tl.float32)
            for left_of in range(0, d, BLOCK):
                at = left_of + column
                part = tl.load(left + at, mask=at < d, other=0.0).to(tl.float32)
                inside = there[:, None] & (at < d)[None, :]
                total += part[None, :] * tl.load(b + at[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(out + pair, tl.sum(total, 1), mask=there)


def decode(support: Support, value: Float[Tensor, " nnz"], W_dec: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, "rows d_in"]:
    """Return Σ value · W_dec[latent] for each row."""
    _check("values", len(value), len(support.latent))
    d, W_dec, value = W_dec.shape[1], with_whole_rows(W_dec), value.contiguous()
    out = W_dec.new_empty((support.n_rows, d), dtype=torch.promote_types(value.dtype, W_dec.dtype))
    block = _block(d)
    with torch.cuda.device_of(W_dec):
        _sum_rows[(support.n_rows, triton.cdiv(d, block))](
            support.crow, support.latent, value, W_dec, out, d, W_dec.stride(0), PAIRS=PAIRS, BLOCK=block
        )
    return out


def pair_products(support: Support, left: Float[Tensor, "rows d"], right: Float[Tensor, "d_sae d"]) -> Float[Tensor, " nnz"]:
    """Return ⟨left[row], right[latent]⟩ at each pair. A row on the left is read once for all its pairs."""
    _check("rows on the left", len(left), support.n_rows)
    _check("columns on the right", right.shape[1], left.shape[1])
    nnz, d = len(support.latent), left.shape[1]
    left, right = with_whole_rows(left), with_whole_rows(right)
    out = left.new_empty(nnz, dtype=torch.promote_types(left.dtype, right.dtype))
    n_parts = min(max(nnz // (A_PART * max(support.n_rows, 1)), 1), 65535)  # the most that a GPU launches on this axis
    block = min(max(triton.next_power_of_2(d), 64), 1024)
    pairs = 4096 // block
    if d > block:  # loads of 256 columns waste little of the last one
        block, pairs = 256, PAIRS
    with torch.cuda.device_of(left):
        _dot_rows[(support.n_rows, n_parts)](
            support.crow, support.latent, left, right, out, d, left.stride(0), right.stride(0),
            ONE_BLOCK=d <= block, PAIRS=pairs, BLOCK=block,
        )  # fmt: skip
    return out


def transposed_product(
    support: Support, value: Float[Tensor, " nnz"], right: Float[Tensor, "rows d"], d_sae: int
) -> Float[Tensor, "d_sae d"]:
    """Return Sᵀ right, where S holds the values at their pairs. Latents without pairs get zeros.

    The pairs sorted by latent are cut at every multiple of CUT. Pieces behind a cut are summed first and then added.
    """
    _check("values", len(value), len(support.latent))
    _check("rows on the right", len(right), support.n_rows)
    d, right, value = right.shape[1], with_whole_rows(right), value.contiguous()
    offsets, n_cuts = support.by_latent(d_sae), max(len(value) - 1, 0) // CUT
    pairs = (support.row_by_latent, support.order, value, right)
    cuts = right.new_empty((n_cuts, d), dtype=torch.float32)
    out = right.new_empty((d_sae, d), dtype=torch.promote_types(value.dtype, right.dtype))
    block = _block(d)
    n_blocks, sizes = triton.cdiv(d, block), {"CUT": CUT, "PAIRS": PAIRS, "BLOCK": block}
    with torch.cuda.device_of(right):
        if n_cuts:
            _sum_cuts[(n_cuts, n_blocks)](offsets, support.latent, *pairs, cuts, d, right.stride(0), **sizes)
        _sum_latents[(d_sae, n_blocks)](offsets, *pairs, cuts, out, d, right.stride(0), **sizes)
    return out


def _block(d: int) -> int:
    """Return the number of columns of a row that a program processes at once."""
    return min(max(triton.next_power_of_2(d), 16), 256)


def _check(what: str, given: int, wanted: int) -> None:
    """Raise unless a tensor has the expected size: a kernel reads beyond the end of a shorter one."""
    if given != wanted:
        raise ShapeError(f"a product with this support needs {wanted} {what}, not {given}")
