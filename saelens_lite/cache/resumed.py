"""A check that a resumed run reads the same activations as before.

A source may have two more methods than `Source`. Training calls them if they exist:

    record() → the activations read so far, as plain data for a checkpoint
    expect(record) → refuse activations that differ from the record, now or during reading
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
from saelens_lite.fingerprints import like_recorded

HASHED_ROWS = 1 << 16
SAME_SOURCE = "give the source the run was trained on, or train anew"
log = logging.getLogger(__name__)


def record_of(source: Any) -> dict[str, Any] | None:
    """Return the record of the activations read from a source so far, or None if the source keeps none."""
    record: Callable[[], dict[str, Any]] | None = getattr(source, "record", None)
    return None if record is None else json.loads(json.dumps(record()))


def expect(source: Any, record: dict[str, Any] | None) -> None:
    """Make a source refuse activations that differ from the record of an earlier reading.

    Without a record, from an older version or from a source that keeps none, log a warning.

    Raises:
        SourceChangedError: the source differs from the record, as far as this is visible without reading.
    """
    check = getattr(source, "expect", None)
    if record is None or check is None:
        log.warning("the checkpoint has no record of the activations, so the source cannot be compared with that of the run")
        return
    check(record)


def refuse_others(record: dict[str, Any], current: dict[str, Any], what: str) -> None:
    """Raise SourceChangedError if entries of a record and of the current source differ.

    Args:
        what: beginning of the message, such as "this is not the stream".
    """
    if record.get("kind") != current["kind"]:
        raise SourceChangedError(f"the run was trained on {record.get('kind')}, not on {current['kind']}; {SAME_SOURCE}")
    current = like_recorded(current, record)
    if other := [key for key in current if record.get(key) != current[key]]:
        said = ", ".join(f"{key} = {_short(record.get(key))} (now {_short(current[key])})" for key in other)
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
