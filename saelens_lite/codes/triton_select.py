"""The largest entries of each row as Triton kernels.

The k largest entries of a row lie in the k groups of neighbouring columns that have the largest maxima; of groups with equal
maxima, the first ones. So one pass over the entries writes the maxima, and everything else reads little. Entries are compared
by their keys, so a result is exact: of equal entries the first wins, −0 equals 0 and NaN beats infinity.
"""

import math
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from saelens_lite.errors import ShapeError

GROUP_SIZES = (64, 32, 16, 8, 4)  # columns of a group; of equally good sizes the first
FEWEST = 1024  # columns of a row from which groups are worth another launch
WIDEST = 8192  # most groups or candidates that a program keeps in registers
PIECE = 4096  # columns of a piece of a row, if groups do not pay
PER_THREAD = 16  # entries per thread, which stay in registers
TILE = 4096  # entries of which one program finds the maxima


# Kernels need `no_type_check`: their annotations are Triton's, not types. The offset of a row is an int64, because a
# [rows d_sae] tensor may have more than 2³¹ entries; the rows themselves are contiguous.


@triton.jit
@no_type_check
def keys(value, real, BITS: tl.constexpr):
    """Return uint32 keys in the order of the values: −0 equals 0, NaN is the largest, and 0 marks what is not real.

    BITS is 16 for bfloat16, whose keys need no more, and else 32.
    """
    value = value.to(tl.float32)
    bits = tl.where(value == 0, 0.0, value).to(tl.uint32, bitcast=True)
    bits = tl.where(value == value, bits, 0x7FFFFFFF)  # noqa: PLR0124
    key = bits ^ tl.where(bits >> 31 == 1, 0xFFFFFFFF, 0x80000000)
    return tl.where(real, key >> (32 - BITS), 0)


@triton.jit
@no_type_check
def load_keys(stored, mask, BITS: tl.constexpr):
    """Load keys that `group_maxima` stored as signed numbers of BITS bits; 0 where the mask is false."""
    return tl.load(stored, mask=mask, other=0).to(tl.uint32) & (0xFFFFFFFF >> (32 - BITS))


@triton.jit
@no_type_check
def _largest(key, k, BITS: tl.constexpr, N: tl.constexpr):
    """Return the mask of the k largest of N keys, of equal keys the first, and the place of each among them."""
    # The largest threshold that k keys reach, bit by bit, until exactly k do.
    threshold = tl.cast(0, tl.uint32)
    step = tl.cast(0x80000000 >> (32 - BITS), tl.uint32)
    n_reach = tl.cast(N, tl.int32)
    while (step > 0) & (n_reach != k):
        n = tl.sum((key >= (threshold | step)).to(tl.int32), 0)
        if n >= k:
            threshold |= step
            n_reach = n
        step >>= 1

    above, tie = (key > threshold).to(tl.int32), (key == threshold).to(tl.int32)
    n_ties = k - tl.sum(above, 0)
    ranks = tl.cumsum(above | (tie << 16), 0)  # both in one scan, since N < 2¹⁵
    rank, tie_rank = ranks & 0xFFFF, ranks >> 16
    take = (above > 0) | ((tie > 0) & (tie_rank <= n_ties))
    return take, rank + tl.minimum(tie_rank, n_ties) - 1


@triton.jit
@no_type_check
def _group_maxima(
    pre, maxima, row_stride, width, n_groups, SIZE: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr
):  # fmt: skip
    """Write to maxima[row, group] the largest key among SIZE neighbouring columns."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = group[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    real = column < width
    key = keys(tl.load(pre + row * row_stride + column, mask=real, other=0.0), real, BITS)
    tl.store(maxima + row * n_groups + group, tl.max(key, 1).to(maxima.dtype.element_ty), mask=group < n_groups)


@triton.jit
@no_type_check
def _select_by_groups(
    pre, maxima, groups, chosen, row_stride, width, n_groups, k,
    SIZE: tl.constexpr, MAXIMA: tl.constexpr, CANDIDATES: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Write to chosen[row] the latents of the k largest entries of a row, ascending."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, MAXIMA)
    take, place = _largest(load_keys(maxima + row * n_groups + group, group < n_groups, BITS), k, BITS, MAXIMA)
    tl.store(groups + row * k + place, group, mask=take)
    tl.debug_barrier()  # other threads of this program load what these have stored

    candidate = tl.arange(0, CANDIDATES)
    real = candidate < k * SIZE
    column = tl.load(groups + row * k + candidate // SIZE, mask=real, other=0) * SIZE + candidate % SIZE
    real &= column < width
    key = keys(tl.load(pre + row * row_stride + column, mask=real, other=0.0), real, BITS)
    take, place = _largest(key, k, BITS, CANDIDATES)
    tl.debug_barrier()  # read the columns again: to keep them until here takes too many registers
    column = tl.load(groups + row * k + candidate // SIZE, mask=take, other=0) * SIZE + candidate % SIZE
    tl.store(chosen + row * k + place, column.to(tl.int64), mask=take)


@triton.jit
@no_type_check
def _select(pre, among, chosen, row_stride, width, piece_width, k, BLOCK: tl.constexpr, BITS: tl.constexpr):
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
    key = keys(tl.load(pre + row * row_stride + latent, mask=real, other=0.0), real, BITS)
    take, place = _largest(key, k, BITS, BLOCK)
    begin = (row * tl.num_programs(1) + piece) * k
    tl.store(chosen + begin + place, tl.where(real, latent, -1), mask=take)


def topk(pre: Float[Tensor, "rows d_sae"], k: int) -> Int[Tensor, "rows k"]:
    """Return the latents of the k largest entries of each row, ascending. Of equal entries the first wins; NaN beats infinity.

    Raises:
        ShapeError: k is negative or larger than the number of latents.
    """
    n_rows, width = pre.shape
    if not 0 <= k <= width:
        raise ShapeError(f"top-k was asked for {k} of {width} latents; k must lie between 0 and their number")
    if not n_rows or not k:
        return pre.new_empty((n_rows, k), dtype=torch.long)
    pre = with_whole_rows(pre)
    if size := _best_group_size(width, k):
        return _topk_by_groups(pre, k, size)
    return _topk_by_pieces(pre, k) if k <= WIDEST // 2 else _topk_by_sorting(pre, k)


def with_whole_rows(matrix: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Return the matrix with contiguous rows. It is copied only if they are not, because strided reads cost more."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def key_bits(pre: Float[Tensor, "rows d_sae"]) -> int:
    """Return the number of bits of a key."""
    return 16 if pre.dtype == torch.bfloat16 else 32


def group_maxima(pre: Float[Tensor, "rows d_sae"], size: int) -> Int[Tensor, "rows n_groups"]:
    """Return the largest key in each group of `size` neighbouring columns, stored as a signed number of as many bits."""
    n_rows, width = pre.shape
    n_groups, per_program = triton.cdiv(width, size), TILE // size
    bits = key_bits(pre)
    maxima = pre.new_empty((n_rows, n_groups), dtype=torch.int16 if bits == 16 else torch.int32)
    with torch.cuda.device_of(pre):
        _group_maxima[(n_rows, triton.cdiv(n_groups, per_program))](
            pre, maxima, pre.stride(0), width, n_groups, SIZE=size, GROUPS=per_program, BITS=bits
        )
    return maxima


def _best_group_size(width: int, k: int) -> int | None:
    """Return the size of groups that leaves the fewest maxima and candidates; None if that is hardly fewer than the columns."""
    costs = {}
    for size in GROUP_SIZES:
        n_groups = triton.cdiv(width, size)
        blocks = triton.next_power_of_2(n_groups), triton.next_power_of_2(k * size)
        if n_groups >= k and max(blocks) <= WIDEST:
            costs[size] = sum(blocks)
    best = min(costs, key=costs.get, default=None)
    return None if best is None or width < FEWEST or costs[best] > 0.75 * width else best


def _topk_by_groups(pre: Float[Tensor, "rows d_sae"], k: int, size: int) -> Int[Tensor, "rows k"]:
    """Return the latents of the k largest entries of each row, found in the k groups with the largest maxima."""
    n_rows, width = pre.shape
    maxima = group_maxima(pre, size)
    n_groups = maxima.shape[1]
    blocks = triton.next_power_of_2(n_groups), triton.next_power_of_2(k * size)
    groups, chosen = (pre.new_empty((n_rows, k), dtype=dtype) for dtype in (torch.int32, torch.long))
    with torch.cuda.device_of(pre):
        _select_by_groups[(n_rows,)](
            pre, maxima, groups, chosen, pre.stride(0), width, n_groups, k,
            SIZE=size, MAXIMA=blocks[0], CANDIDATES=blocks[1], BITS=key_bits(pre), num_warps=_warps(max(blocks)),
        )  # fmt: skip
    return chosen


def _topk_by_pieces(pre: Float[Tensor, "rows d_sae"], k: int) -> Int[Tensor, "rows k"]:
    """Return the latents of the k largest entries of each row.

    Each row is read once: every piece gives its k largest entries, which form the next, shorter row.
    """
    n_rows, width = pre.shape
    among = None
    widest = max(PIECE, 2 * triton.next_power_of_2(k))  # so that each round leaves fewer
    while True:
        n_pieces = triton.cdiv(width, widest)
        piece_width = 16 * triton.cdiv(width, 16 * n_pieces)  # every piece aligned, for wide loads
        block = triton.next_power_of_2(piece_width)
        chosen = pre.new_empty((n_rows, n_pieces * k), dtype=torch.long)
        sizes = {"BLOCK": block, "BITS": key_bits(pre), "num_warps": _warps(block)}
        with torch.cuda.device_of(pre):
            _select[(n_rows, n_pieces)](pre, among, chosen, pre.stride(0), width, piece_width, k, **sizes)
        if n_pieces == 1:
            return chosen
        among, width = chosen, n_pieces * k


def _topk_by_sorting(pre: Float[Tensor, "rows d_sae"], k: int) -> Int[Tensor, "rows k"]:
    """Return the latents of the k largest entries of each row, if k is more than a program can hold."""
    comparable = (pre + 0.0).masked_fill(pre.isnan(), math.nan)  # −0 becomes 0, and every NaN the same
    return comparable.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values


def _warps(block: int) -> int:
    return min(max(block // (32 * PER_THREAD), 1), 32)
