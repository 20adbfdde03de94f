"""The GPU path of the sparse core: top-k and the products of a support as Triton kernels.

Everything is summed in float32 and in an order that depends on the support alone: no atomics, same input, same bytes.
Import this module only if `saelens_lite.codes.gpu.available` returns true: it imports Triton.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from saelens_lite.codes.support import Support
from saelens_lite.errors import ShapeError

PIECE = 4096  # columns per program, which keeps them in registers and selects the largest
PER_THREAD = 16  # columns per thread; at 64 registers a thread, four programs share a multiprocessor
CUT = 256  # most pairs of one latent that one program sums: some latents fire in every row
PAIRS = 8  # rows that a program has in flight at once


# Kernels need `no_type_check`: their annotations are Triton's, not types. The offset of a row is an int64, because a
# [rows d_sae] tensor may have more than 2³¹ entries; the rows themselves are contiguous.


@triton.jit
@no_type_check
def _select(pre, among, chosen, row_stride, width, piece_width, k, BLOCK: tl.constexpr):
    """Write to chosen[row, piece] the latents of the k largest entries in a piece of a row, ascending, padded with −1.

    A row is the columns of `pre` themselves, or those that `among` [rows width] lists (−1: none).
    """
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    within = tl.arange(0, BLOCK)
    column = piece * piece_width + within
    real = (within < piece_width) & (column < width)
    latent = column
    if among is not None:
        latent = tl.load(among + row * width + column, mask=real, other=-1)
        real = latent >= 0
    value = tl.load(pre + row * row_stride + latent, mask=real, other=0.0).to(tl.float32)

    # Unsigned keys in the order of the values: −0 equals 0, NaN is the largest, and 0 marks padding.
    bits = tl.where(value == 0, 0.0, value).to(tl.uint32, bitcast=True)
    bits = tl.where(value == value, bits, 0x7FFFFFFF)  # noqa: PLR0124
    key = tl.where(real, bits ^ tl.where(bits >> 31 == 1, 0xFFFFFFFF, 0x80000000), 0)

    # The largest threshold that k keys reach, bit by bit, until exactly k do.
    threshold = tl.cast(0, tl.uint32)
    step = tl.cast(0x80000000, tl.uint32)
    n_reach = tl.cast(BLOCK, tl.int32)
    while (step > 0) & (n_reach != k):
        n = tl.sum((key >= (threshold | step)).to(tl.int32), 0)
        if n >= k:
            threshold |= step
            n_reach = n
        step >>= 1

    above, tie = key > threshold, key == threshold
    n_ties = k - tl.sum(above.to(tl.int32), 0)
    take = above | (tie & (tl.cumsum(tie.to(tl.int32), 0) <= n_ties))
    slot = tl.cumsum(take.to(tl.int32), 0) - 1
    begin = (row * tl.num_programs(1) + piece) * k
    tl.store(chosen + begin + slot, tl.where(real, latent, -1), mask=take)


@triton.jit
@no_type_check
def _sum_rows(
    first, last, index, value, rows, cuts, out, d, row_stride,
    CUT: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write out[s] = Σ value[i] · rows[index[i]] over first[s] ≤ i < last[s].

    With `cuts`, this sums only the pairs before the next multiple of CUT; cuts[c] holds the sum of the pairs of the same
    segment in (c + 1) CUT … (c + 2) CUT − 1.
    """
    segment = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (column < d)[None, :]
    start, stop = tl.load(first + segment), tl.load(last + segment)
    end = stop
    if cuts is not None:
        end = tl.minimum(stop, (start // CUT + 1) * CUT)

    total = tl.zeros((PAIRS, BLOCK), tl.float32)
    for begin in range(start, end, PAIRS):
        pair = begin + tl.arange(0, PAIRS)
        source = tl.load(index + pair, mask=pair < end, other=0).to(tl.int64)[:, None]
        weight = tl.load(value + pair, mask=pair < end, other=0.0).to(tl.float32)[:, None]
        tile = rows + source * row_stride + column[None, :]
        total += weight * tl.load(tile, mask=(pair < end)[:, None] & inside, other=0.0).to(tl.float32)
    if cuts is not None:
        n_cuts = (stop - 1) // CUT
        for begin in range(start // CUT, n_cuts, PAIRS):
            cut = (begin + tl.arange(0, PAIRS)).to(tl.int64)[:, None]
            total += tl.load(cuts + cut * d + column[None, :], mask=(cut < n_cuts) & inside, other=0.0)
    tl.store(out + segment * d + column, tl.sum(total, 0), mask=column < d)


@triton.jit
@no_type_check
def _dot_rows(
    row, latent, left, right, out, nnz, d, left_row_stride, right_row_stride,
    PAIRS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write out[i] = ⟨left[row[i]], right[latent[i]]⟩."""
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    there = pair < nnz
    a = tl.load(row + pair, mask=there, other=0).to(tl.int64)[:, None] * left_row_stride
    b = tl.load(latent + pair, mask=there, other=0).to(tl.int64)[:, None] * right_row_stride
    total = tl.zeros((PAIRS, BLOCK), tl.float32)
    for begin in range(0, d, BLOCK):
        column = (begin + tl.arange(0, BLOCK))[None, :]
        inside = there[:, None] & (column < d)
        l_part = tl.load(left + a + column, mask=inside, other=0.0).to(tl.float32)
        r_part = tl.load(right + b + column, mask=inside, other=0.0).to(tl.float32)
        total += l_part * r_part
    tl.store(out + pair, tl.sum(total, 1), mask=there)


def topk(pre: Float[Tensor, "rows d_sae"], k: int) -> Int[Tensor, "rows k"]:
    """Return the latents of the k largest entries of each row, ascending. Of equal entries the first wins; NaN beats infinity.

    Each row is read once: every piece gives its k largest entries, which form the next, shorter row.

    Raises:
        ShapeError: k is negative or larger than the number of latents.
    """
    n_rows, width = pre.shape
    if not 0 <= k <= width:
        raise ShapeError(f"top-k was asked for {k} of {width} latents; k must lie between 0 and their number")
    if not n_rows or not k:
        return pre.new_empty((n_rows, k), dtype=torch.long)
    pre, among = _with_whole_rows(pre), None
    widest = max(PIECE, 2 * triton.next_power_of_2(k))  # so that each round leaves fewer
    while True:
        n_pieces = triton.cdiv(width, widest)
        piece_width = 16 * triton.cdiv(width, 16 * n_pieces)  # every piece aligned, for wide loads
        block = triton.next_power_of_2(piece_width)
        n_warps = min(max(block // (32 * PER_THREAD), 1), 32)
        chosen = pre.new_empty((n_rows, n_pieces * k), dtype=torch.long)
        with torch.cuda.device_of(pre):
            _select[(n_rows, n_pieces)](
                pre, among, chosen, pre.stride(0), width, piece_width, k, BLOCK=block, num_warps=n_warps, maxnreg=64
            )
        if n_pieces == 1:
            return chosen
        among, width = chosen, n_pieces * k


def decode(support: Support, value: Float[Tensor, " nnz"], W_dec: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, "rows d_in"]:
    """Return Σ value · W_dec[latent] for each row."""
    _check("values", len(value), len(support.latent))
    return _segment_sums(support.crow[:-1], support.crow[1:], support.latent, value, W_dec)


def pair_products(support: Support, left: Float[Tensor, "rows d"], right: Float[Tensor, "d_sae d"]) -> Float[Tensor, " nnz"]:
    """Return ⟨left[row], right[latent]⟩ at each pair."""
    _check("rows on the left", len(left), support.n_rows)
    _check("columns on the right", right.shape[1], left.shape[1])
    nnz, d = len(support.latent), left.shape[1]
    left, right = _with_whole_rows(left), _with_whole_rows(right)
    out = left.new_empty(nnz, dtype=torch.promote_types(left.dtype, right.dtype))
    strides = (left.stride(0), right.stride(0))
    with torch.cuda.device_of(left):
        _dot_rows[(triton.cdiv(nnz, PAIRS),)](
            support.row, support.latent, left, right, out, nnz, d, *strides, PAIRS=PAIRS, BLOCK=_block(d)
        )
    return out


def transposed_product(
    support: Support, value: Float[Tensor, " nnz"], right: Float[Tensor, "rows d"], d_sae: int
) -> Float[Tensor, "d_sae d"]:
    """Return Sᵀ right, where S holds the values at their pairs. Latents without pairs get zeros.

    The pairs sorted by latent are cut at every multiple of CUT. Pieces behind a cut are summed first and then added.
    """
    _check("values", len(value), len(support.latent))
    _check("rows on the right", len(right), support.n_rows)
    pointers = support.by_latent(d_sae)
    first, last = pointers[:-1], pointers[1:]
    pairs = (support.row_by_latent, value[support.order], right)
    cut = torch.arange(CUT, max(CUT, len(value)), CUT, device=right.device)
    end_of_latent = last[support.latent[support.order[cut]]]
    parted = _segment_sums(cut, torch.minimum(cut + CUT, end_of_latent), *pairs, dtype=torch.float32)
    return _segment_sums(first, last, *pairs, cuts=parted)


def _segment_sums(
    first: Int[Tensor, " segments"],
    last: Int[Tensor, " segments"],
    index: Int[Tensor, " nnz"],
    value: Float[Tensor, " nnz"],
    rows: Float[Tensor, "n d"],
    cuts: Float[Tensor, "n_cuts d"] | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "segments d"]:
    """Return Σ value[i] · rows[index[i]] over first ≤ i < last for each segment; `cuts` as in `_sum_rows`."""
    d, rows, value = rows.shape[1], _with_whole_rows(rows), value.contiguous()
    out = rows.new_empty((len(first), d), dtype=dtype or torch.promote_types(value.dtype, rows.dtype))
    block = _block(d)
    with torch.cuda.device_of(rows):
        _sum_rows[(len(first), triton.cdiv(d, block))](
            first, last, index, value, rows, cuts, out, d, rows.stride(0), CUT=CUT, PAIRS=PAIRS, BLOCK=block
        )
    return out


def _block(d: int) -> int:
    """Return the number of columns of a row that a program processes at once."""
    return min(max(triton.next_power_of_2(d), 16), 256)


def _with_whole_rows(matrix: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Return the matrix with contiguous rows. It is copied only if they are not, because strided reads cost more."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _check(what: str, given: int, wanted: int) -> None:
    """Raise unless a tensor has the expected size: a kernel reads beyond the end of a shorter one."""
    if given != wanted:
        raise ShapeError(f"a product with this support needs {wanted} {what}, not {given}")
