"""The entries of a matrix above a threshold as Triton kernels; the threshold is given, or such that n entries reach it."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from saelens_lite.codes.triton_select import group_maxima, key_bits, keys, load_keys, with_whole_rows
from saelens_lite.errors import ShapeError

GROUP_SIZE = 32  # columns of a group
BLOCK = 512  # entries that a program looks at in one go
CHUNK = 2048  # columns of a row that one program compares with the threshold


# Kernels need `no_type_check`: their annotations are Triton's, not types.


@triton.jit
@no_type_check
def _reached(counts, n, n_levels):
    """Return the leading digits of the n-th largest key, and how many of the keys with these digits are among the n.

    counts[level, digit] is the number of keys that begin with the digits already known, followed by this one. A digit has 8
    bits. If there are fewer than n keys, every digit is 0.
    """
    digit = tl.arange(0, 256)
    known = tl.cast(0, tl.uint32)
    left = tl.cast(n, tl.int64)
    for level in range(n_levels):
        count = tl.load(counts + level * 256 + digit)
        upwards = tl.sum(count, 0) - tl.cumsum(count, 0) + count  # keys with this digit or a larger one
        next_digit = tl.maximum(tl.sum((upwards >= left).to(tl.int32), 0) - 1, 0)
        left -= tl.sum(tl.where(digit > next_digit, count, 0), 0)
        known = (known << 8) | next_digit.to(tl.uint32)
    return known, left


@triton.jit
@no_type_check
def _count_digits(key, real, known, level, BITS: tl.constexpr):
    """Return how often each digit follows the digits already known in the keys that are real."""
    key = key >> (BITS - 8 - 8 * level).to(tl.uint32)
    real &= (key >> 8) == known
    digit = (key & 255).to(tl.int32)
    count = tl.histogram(tl.where(real, digit, 0), 256)
    others = tl.sum((~real).to(tl.int32), 0)  # counted as 0
    return count - tl.where(tl.arange(0, 256) == 0, others, 0)


@triton.jit
@no_type_check
def _add(counts, count, level):
    """Add to counts[level]. Sums of whole numbers do not depend on their order."""
    at = counts + level * 256 + tl.arange(0, 256)
    tl.atomic_add(at, count.to(tl.int64), mask=count > 0, sem="relaxed")


@triton.jit(do_not_specialize=["level"])
@no_type_check
def _count_maxima(maxima, counts, n_maxima, n, level, BLOCK: tl.constexpr, BITS: tl.constexpr):
    """Add the digits of all maxima to counts[level]."""
    known, _ = _reached(counts, n, level)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = at < n_maxima
    key = load_keys(maxima + at, real, BITS)
    _add(counts, _count_digits(key, real, known, level, BITS), level)


@triton.jit
@no_type_check
def _list_groups(maxima, counts, groups, n_groups_of, n_groups, n, BLOCK: tl.constexpr, BITS: tl.constexpr):
    """Write to groups[row] the groups whose maximum reaches the first two digits that n maxima reach, and their number."""
    bound, _ = _reached(counts, n, 2)
    bound = bound << (BITS - 16)
    row = tl.program_id(0).to(tl.int64)
    n_listed = tl.cast(0, tl.int32)
    for begin in range(0, n_groups, BLOCK):
        group = begin + tl.arange(0, BLOCK)
        key = load_keys(maxima + row * n_groups + group, group < n_groups, BITS)
        reaches = ((key >= bound) & (group < n_groups)).to(tl.int32)
        place = n_listed + tl.cumsum(reaches, 0) - 1
        tl.store(groups + row * n_groups + place, group.to(groups.dtype.element_ty), mask=reaches > 0)
        n_listed += tl.sum(reaches, 0)
    tl.store(n_groups_of + row, n_listed)


@triton.jit
@no_type_check
def _candidates(row_of_pre, groups, begin, end, width, SIZE: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr):
    """Return (keys, columns) of the next entries in the listed groups of a row. The key of what is not real is 0."""
    candidate = begin + tl.arange(0, BLOCK)
    group = tl.load(groups + candidate // SIZE, mask=candidate < end, other=0).to(tl.int32)
    column = group * SIZE + candidate % SIZE
    real = (candidate < end) & (column < width)
    return keys(tl.load(row_of_pre + column, mask=real, other=0.0), real, BITS), column


@triton.jit(do_not_specialize=["level"])
@no_type_check
def _count_entries(
    pre, groups, n_groups_of, counts, row_stride, width, n_groups, n, level,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Add the digits of the entries in the listed groups of a row to counts[level]."""
    known, _ = _reached(counts, n, level)
    row = tl.program_id(0).to(tl.int64)
    end = tl.load(n_groups_of + row) * SIZE
    count = tl.zeros((256,), tl.int32)
    for begin in range(0, end, BLOCK):
        key = _candidates(pre + row * row_stride, groups + row * n_groups, begin, end, width, SIZE, BLOCK, BITS)[0]
        count += _count_digits(key, key > 0, known, level, BITS)
    _add(counts, count, level)


@triton.jit
@no_type_check
def _count_rows(
    pre, groups, n_groups_of, counts, in_row, row_stride, width, n_groups, n,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Write to in_row[0, row] the number of entries above the n-th largest, and to in_row[1, row] of those equal to it."""
    threshold, _ = _reached(counts, n, BITS // 8)
    row = tl.program_id(0).to(tl.int64)
    end = tl.load(n_groups_of + row) * SIZE
    above, tie = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.int32)
    for begin in range(0, end, BLOCK):
        key = _candidates(pre + row * row_stride, groups + row * n_groups, begin, end, width, SIZE, BLOCK, BITS)[0]
        above += (key > threshold).to(tl.int32)
        tie += (key == threshold).to(tl.int32)
    tl.store(in_row + row, tl.sum(above, 0))
    tl.store(in_row + tl.num_programs(0) + row, tl.sum(tie, 0))


@triton.jit
@no_type_check
def _write_largest(
    pre, groups, n_groups_of, counts, in_row, up_to_row, crow, latent, row_stride, width, n_groups, n,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Write the n largest entries of a row, latents ascending, and where the row begins; of equal entries the first ones."""
    threshold, n_ties = _reached(counts, n, BITS // 8)
    row, n_rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    before = tl.load(up_to_row + row) - tl.load(in_row + row)
    ties_before = tl.load(up_to_row + n_rows + row) - tl.load(in_row + n_rows + row)
    place = before + tl.minimum(ties_before, n_ties)
    n_ties -= ties_before  # those left for this row; none if negative
    tl.store(crow + row, place)
    end = tl.load(n_groups_of + row) * SIZE
    for begin in range(0, end, BLOCK):
        key, column = _candidates(pre + row * row_stride, groups + row * n_groups, begin, end, width, SIZE, BLOCK, BITS)
        tie = (key == threshold).to(tl.int32)
        take = (key > threshold) | ((tie > 0) & (tl.cumsum(tie, 0) <= n_ties))
        taken = take.to(tl.int32)
        tl.store(latent + place + tl.cumsum(taken, 0) - 1, column.to(tl.int64), mask=take)
        place += tl.sum(taken, 0)
        n_ties -= tl.sum(tie, 0)
    if row == n_rows - 1:
        tl.store(crow + n_rows, place)


@triton.jit
@no_type_check
def _mark_above(
    pre, threshold, words, n_above, row_stride, width, n_words,
    WORDS: tl.constexpr, PER_LATENT: tl.constexpr,
):  # fmt: skip
    """Set bit i % 32 of words[row, i // 32] if entry i is above the threshold, and count those of each chunk."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    word, bit = chunk * WORDS + tl.arange(0, WORDS), tl.arange(0, 32)
    column = word[:, None] * 32 + bit[None, :]
    real = column < width
    value = tl.load(pre + row * row_stride + column, mask=real, other=0.0).to(tl.float32)
    bound = threshold
    if PER_LATENT:
        bound = tl.load(threshold + column, mask=real, other=0.0).to(tl.float32)
    above = (real & (value > bound)).to(tl.int32)
    tl.store(words + row * n_words + word, tl.sum(above << bit[None, :], 1), mask=word < n_words)
    tl.store(n_above + row * tl.num_programs(1) + chunk, tl.sum(tl.sum(above, 1), 0))


@triton.jit
@no_type_check
def _write_marked(words, up_to_chunk, n_above, latent, n_words, WORDS: tl.constexpr):
    """Write the columns whose bits are set, ascending."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = row * tl.num_programs(1) + chunk
    word, bit = chunk * WORDS + tl.arange(0, WORDS), tl.arange(0, 32)
    marks = tl.load(words + row * n_words + word, mask=word < n_words, other=0)
    above = (marks[:, None] >> bit[None, :]) & 1
    in_word = tl.sum(above, 1)
    before = tl.cumsum(in_word, 0) - in_word + tl.load(up_to_chunk + at) - tl.load(n_above + at)
    place = before[:, None] + tl.cumsum(above, 1) - 1
    tl.store(latent + place, (word[:, None] * 32 + bit[None, :]).to(tl.int64), mask=above > 0)


def n_largest(pre: Float[Tensor, "rows d_sae"], n: int) -> tuple[Int[Tensor, " rows_plus_1"], Int[Tensor, " n"]]:
    """Return the n largest entries of a matrix in compressed rows: the offset of each row, and the latents, ascending in a row.

    Of equal entries the first in row-major order wins; NaN beats infinity.

    The n-th largest group maximum, or a little less, is a lower bound of the n-th largest entry. Only entries of groups that
    reach it are looked at again. Both are found digit by digit from counts.

    Raises:
        ShapeError: n is negative or larger than the number of entries.
    """
    n_rows, width = pre.shape
    if not 0 <= n <= n_rows * width:
        raise ShapeError(f"the {n} largest of {n_rows * width} entries were asked for; n must lie between 0 and their number")
    latent = pre.new_empty(n, dtype=torch.long)
    if not n:
        return latent.new_zeros(n_rows + 1), latent
    pre, bits = with_whole_rows(pre), key_bits(pre)
    maxima = group_maxima(pre, GROUP_SIZE)
    n_groups = maxima.shape[1]
    groups = maxima.new_empty(maxima.shape, dtype=torch.int16 if n_groups < 2**15 else torch.int32)
    n_groups_of = maxima.new_empty(n_rows, dtype=torch.int32)
    counts = maxima.new_zeros((2 + bits // 8, 256), dtype=torch.long)
    of_maxima, of_entries = counts[:2], counts[2:]
    in_row = maxima.new_empty((2, n_rows), dtype=torch.int32)
    crow = latent.new_empty(n_rows + 1)
    shape = (pre.stride(0), width, n_groups, n)
    sizes = {"SIZE": GROUP_SIZE, "BLOCK": BLOCK, "BITS": bits}
    with torch.cuda.device_of(pre):
        if maxima.numel() >= n:  # else there is no bound, and every group is listed
            for level in range(2):
                grid = (triton.cdiv(maxima.numel(), 8 * BLOCK),)
                _count_maxima[grid](maxima, of_maxima, maxima.numel(), n, level, BLOCK=8 * BLOCK, BITS=bits)
        _list_groups[(n_rows,)](maxima, of_maxima, groups, n_groups_of, n_groups, n, BLOCK=BLOCK, BITS=bits)
        for level in range(bits // 8):
            _count_entries[(n_rows,)](pre, groups, n_groups_of, of_entries, *shape, level, **sizes)
        _count_rows[(n_rows,)](pre, groups, n_groups_of, of_entries, in_row, *shape, **sizes)
        up_to_row = in_row.cumsum(1)
        _write_largest[(n_rows,)](pre, groups, n_groups_of, of_entries, in_row, up_to_row, crow, latent, *shape, **sizes)
    return crow, latent


def above(
    pre: Float[Tensor, "rows d_sae"], threshold: Float[Tensor, " d_sae"] | float
) -> tuple[Int[Tensor, " rows_plus_1"], Int[Tensor, " nnz"]]:
    """Return the entries above a threshold in compressed rows: the offset of each row, and the latents, ascending in a row.

    The comparison is in float32. NaN is not above anything. Waits for the GPU once, to learn the number of entries.

    Args:
        pre: The entries.
        threshold: One for each latent, or one for all.
    """
    n_rows, width = pre.shape
    if isinstance(threshold, Tensor):
        if threshold.shape != (width,):
            raise ShapeError(f"{width} latents need as many thresholds, not a tensor of shape {tuple(threshold.shape)}")
        threshold = threshold.contiguous()
    pre, n_words, n_chunks = with_whole_rows(pre), triton.cdiv(width, 32), max(triton.cdiv(width, CHUNK), 1)
    words = pre.new_empty((n_rows, n_words), dtype=torch.int32)
    n_above = pre.new_empty((n_rows, n_chunks), dtype=torch.int32)
    per_latent, grid = isinstance(threshold, Tensor), (n_rows, n_chunks)
    with torch.cuda.device_of(pre):
        _mark_above[grid](
            pre, threshold, words, n_above, pre.stride(0), width, n_words, WORDS=CHUNK // 32, PER_LATENT=per_latent
        )
        up_to_chunk = n_above.flatten().cumsum(0)
        crow = torch.nn.functional.pad(up_to_chunk[n_chunks - 1 :: n_chunks], (1, 0))
        latent = crow.new_empty(int(crow[-1]))
        _write_marked[grid](words, up_to_chunk, n_above, latent, n_words, WORDS=CHUNK // 32)
    return crow, latent
