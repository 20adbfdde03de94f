"""Decide whether an input is text, or token ids in one of their usual forms.

| given | read as |
| --- | --- |
| str, Path, list of str, records, datasets, … | text: `token_ids` returns None, and `sources` reads it |
| tensor, array, list of integers [batch pos] or [pos]; list of rows of different lengths | token ids |
| a tokenizer's output (BatchEncoding), or a mapping with "input_ids" | its ids, with its attention mask |
| TokenRows | its ids and lengths, unchanged |

A mask says which positions hold a token. The tokens of each row are moved to its start, so that a row with padding on the
left or in the middle is read as the same row without padding. `Aligned.restored` moves the model's outputs back.
"""

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int, Integer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from saelens_lite.arrays import described
from saelens_lite.errors import ShapeError
from saelens_lite.tokens.rows import TokenRows

EXPECTED = "expected integer token ids [batch pos] or [pos]"
Given = Any  # text or token ids, in any of the forms above


class Ids(NamedTuple):
    """The given token ids, of any integer dtype. `mask` is true where a position holds a token (None: everywhere)."""

    tokens: Integer[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"] | None


class Aligned(NamedTuple):
    """Token ids that start at position 0 of each row, with padding on the right.

    `length` is the number of tokens of each row (None: no padding). `order[i, j]` is the position in the given row i that
    position j came from (None: nothing moved).
    """

    tokens: Int[Tensor, "batch pos"]
    length: Int[Tensor, " batch"] | None
    order: Int[Tensor, "batch pos"] | None

    def moved(self, x: Tensor) -> Tensor:
        """Move values [batch pos …] at the given positions to where their tokens are now."""
        return x if self.order is None else x[torch.arange(len(x), device=x.device)[:, None], self.order.to(x.device)]

    def restored(self, x: Tensor) -> Tensor:
        """Move values [batch pos …] back to the given positions."""
        if self.order is None:
            return x
        back = self.order.argsort(1).to(x.device)
        return x[torch.arange(len(x), device=x.device)[:, None], back]


def token_ids(given: Given, attention_mask: Any = None) -> Ids | None:
    """Return the given token ids, or None for text and for anything that `sources` must judge.

    Raises:
        ShapeError: ids or mask have a wrong shape or dtype, text has a mask, or the mask leaves a row without tokens.
    """
    if isinstance(given, TokenRows):
        if attention_mask is not None:
            raise ShapeError("TokenRows already know their tokens; leave out attention_mask")
        return Ids(given.tokens, given.holds_token)
    if isinstance(given, Mapping) and "input_ids" in given:
        mask = given.get("attention_mask") if attention_mask is None else attention_mask
        return token_ids(given["input_ids"], mask)
    ids = _ids(given)
    if ids is None:
        if attention_mask is not None:
            raise ShapeError(f"attention_mask is only for token ids; {described(given)} is text")
        return None
    if attention_mask is None:
        return ids
    return Ids(ids.tokens, _mask(attention_mask, ids))


def aligned(ids: Ids, pad: int) -> Aligned:
    """Move the tokens of each row to its start and fill the rest with `pad`."""
    tokens = ids.tokens.long()
    if ids.mask is None or bool(ids.mask.all()):
        return Aligned(tokens, None, None)
    mask = ids.mask.to(tokens.device)
    length = mask.sum(1)
    holds = torch.arange(tokens.shape[1], device=tokens.device) < length[:, None]
    if bool((mask == holds).all()):
        return Aligned(tokens.masked_fill(~holds, pad), length, None)
    order = (~mask).byte().argsort(dim=1, stable=True)
    return Aligned(tokens.gather(1, order).masked_fill(~holds, pad), length, order)


def n_leading_pads(tokens: Integer[Tensor, "batch pos"], pads: Sequence[int]) -> tuple[int, int] | None:
    """Return the first row that seems to be padded on the left and its number of padding tokens, or None.

    A row seems padded if it begins with a token of `pads` that is repeated. A single one may be the BOS token.
    """
    if not len(pads) or tokens.shape[1] < 2:
        return None
    first = tokens[:, :1].long()
    repeats = torch.isin(first, torch.tensor(sorted(pads), device=tokens.device)) & (tokens[:, 1:2].long() == first)
    rows = repeats.squeeze(1).nonzero().squeeze(1)
    if not len(rows):
        return None
    row = int(rows[0])
    return row, int((tokens[row] == tokens[row, 0]).long().cumprod(0).sum()) - 1


def _ids(given: Any) -> Ids | None:
    """Return ids without their mask, or None if the input is not ids."""
    if isinstance(given, Tensor | np.ndarray):
        return None if isinstance(given, np.ndarray) and given.dtype.kind in "UO" else _rectangular(given)
    if not isinstance(given, list | tuple) or not given or isinstance(given[0], str):
        return None
    if all(isinstance(i, Integral) and not isinstance(i, bool) for i in given):
        return _rectangular(_tensor(given, given))
    rows = [row for row in given if isinstance(row, Tensor | np.ndarray | list | tuple) and not isinstance(row, TokenRows)]
    if not rows or hasattr(given, "_fields") or any(hasattr(row, "_fields") for row in rows):
        return None  # NamedTuples such as Document are text
    if len(rows) < len(given):
        raise ShapeError(f"{EXPECTED}; found a row of type {type(given[0]).__name__}")
    flat = [_tensor(row, given) for row in rows]
    flat = [row[0] if row.ndim == 2 and len(row) == 1 else row for row in flat]
    for number, row in enumerate(flat):
        if row.ndim != 1 or not len(row) or not _is_integer(row):
            raise ShapeError(f"{EXPECTED}; row {number} of the list is {described(row)}")
    lengths = torch.tensor([len(row) for row in flat])
    tokens = pad_sequence([row.long().cpu() for row in flat], batch_first=True)
    if int(lengths.min()) == tokens.shape[1]:
        return Ids(tokens, None)
    return Ids(tokens, torch.arange(tokens.shape[1]) < lengths[:, None])


def _tensor(row: Any, given: Any) -> Tensor:
    """Return one row of numbers as a tensor."""
    try:
        return row if isinstance(row, Tensor) else torch.as_tensor(_signed(np.asarray(row)))
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ShapeError(f"{EXPECTED}; found {described(given)} that holds {row!r:.60}") from None


def _rectangular(given: Tensor | np.ndarray) -> Ids:
    tokens = given if isinstance(given, Tensor) else _tensor(given, given)
    if not _is_integer(tokens) or tokens.ndim not in (1, 2) or not tokens.numel():
        raise ShapeError(f"{EXPECTED}, at least one; found {described(given)}")
    if tokens.dtype in (torch.uint16, torch.uint32, torch.uint64):  # torch compares only the other dtypes
        tokens = tokens.long()
    return Ids(tokens[None] if tokens.ndim == 1 else tokens, None)


def _signed(array: np.ndarray) -> np.ndarray:
    """Return the array in a form that torch reads without a warning."""
    return array.copy() if not array.flags.writeable else array


def _is_integer(x: Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


def _mask(given: Any, ids: Ids) -> Bool[Tensor, "batch pos"]:
    """Return the attention mask of these ids."""
    wanted = list(ids.tokens.shape)
    if isinstance(given, list | tuple) and given and not isinstance(given[0], Integral):
        if ids.mask is not None:  # rows of different lengths
            rows = [torch.as_tensor(row) for row in given]
            if [len(row) for row in rows] != ids.mask.sum(1).tolist():
                raise ShapeError("attention_mask and token ids have rows of different lengths")
            given = pad_sequence([row.cpu() for row in rows], batch_first=True)
        else:
            given = torch.stack([torch.as_tensor(row) for row in given]) if len({len(row) for row in given}) == 1 else None
    mask = None if given is None else torch.as_tensor(given)
    if mask is not None and mask.ndim == 1 and wanted[0] == 1:
        mask = mask[None]
    if mask is None or list(mask.shape) != wanted:
        shape = "rows of different lengths" if mask is None else list(mask.shape)
        raise ShapeError(f"attention_mask is {shape}, but the token ids are {wanted}")
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ShapeError("attention_mask must be 1 at tokens and 0 at padding")
    mask = mask.bool()
    empty = (~mask.any(1)).nonzero().squeeze(1).tolist()
    if empty:
        raise ShapeError(f"attention_mask leaves no token in row {empty[0]}")
    return mask
