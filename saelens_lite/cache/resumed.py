"""Telling whether a run that is resumed reads the activations it was trained on.

A source may have two methods beside those of `Source`, which training calls where they are there:

    record() → what was read so far, as plain data for a checkpoint
    expect(record) → refuse, now or while reading, whatever differs from what was read then
"""

import hashlib
import json
import logging
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from saelens_lite.errors import SourceChangedError

HASHED_ROWS = 1 << 16
SAME_SOURCE = "give the source the run was trained on, or train anew"
log = logging.getLogger(__name__)


def record_of(source: Any) -> dict[str, Any] | None:
    """Return what was read from a source so far; None for a source that cannot say."""
    record: Callable[[], dict[str, Any]] | None = getattr(source, "record", None)
    return None if record is None else json.loads(json.dumps(record()))


def expect(source: Any, record: dict[str, Any] | None) -> None:
    """Have a source refuse what differs from the record of an earlier reading.

    Without a record, from an older version or from a source that keeps none, a warning says that nothing can be compared.

    Raises:
        SourceChangedError: it is not the source of the record, as far as can be told without reading.
    """
    check = getattr(source, "expect", None)
    if record is None or check is None:
        log.warning("the checkpoint does not say what was read, so the source cannot be compared with that of the run")
        return
    check(record)


def refuse_others(record: dict[str, Any], found: dict[str, Any], what: str) -> None:
    """Raise SourceChangedError, which says `what` is not as it was, where entries of a record that were found anew differ."""
    if record.get("kind") != found["kind"]:
        raise SourceChangedError(f"the run was trained on {record.get('kind')}, not on {found['kind']}; {SAME_SOURCE}")
    if other := [key for key in found if record.get(key) != found[key]]:
        said = ", ".join(f"{key} = {_short(record.get(key))} (now {_short(found[key])})" for key in other)
        raise SourceChangedError(f"{what} the run was trained on, which had {said}; {SAME_SOURCE}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:20]}…"


def tensor_hash(x: Shaped[Tensor, "n ..."]) -> str:
    """Return the SHA-256 of a tensor's shape, dtype and values."""
    digest = hashlib.sha256(f"{tuple(x.shape)} {x.dtype}".encode())
    for piece in x.split(HASHED_ROWS):
        digest.update(piece.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
