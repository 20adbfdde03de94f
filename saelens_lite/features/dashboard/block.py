"""The page's data: columns of numbers, compressed in parts, so that a browser opens only what it shows.

The block is the base64 of several parts, one behind the other, each compressed by itself: the words, the tokens, the spans,
the columns of the list for all latents, and the other columns for CHUNK latents at a time. A part of columns is their
numbers one column behind the other, little-endian, in the order and of the types that the layout names.
"""

import json
import zlib
from base64 import b64encode
from typing import Any

import numpy as np

from saelens_lite.features.dashboard.content import Columns, Content

CHUNK = 64  # latents
LEVEL = 6
DROPPED_BITS = 12  # of a float32's 23 behind the leading one; the rest are three digits


def pack(content: Content) -> tuple[dict[str, Any], str]:
    """The layout, which is plain data, and the block that it describes."""
    columns = {name: _compact(getattr(content, name)) for name in ("tokens", "spans", "index", "details")}
    details = columns["details"]
    chunks = [
        {name: column[start : start + CHUNK] for name, column in details.items()}
        for start in range(0, content.facts["n_latents"], CHUNK)
    ]
    whole = [columns["tokens"], columns["spans"], columns["index"]]
    words = {"vocabulary": content.vocabulary, "labels": content.labels}
    parts = [
        _encoded(json.dumps(words, separators=(",", ":")).encode()),
        *(_encoded(b"".join(column.tobytes() for column in part.values())) for part in (*whole, *chunks)),
    ]
    layout = {
        **content.facts,
        "chunk": CHUNK,
        "columns": {name: _described(described) for name, described in columns.items()},
        "starts": np.cumsum([0, *map(len, parts)]).tolist(),
    }
    return layout, "".join(parts)


def _encoded(part: bytes) -> str:
    return b64encode(zlib.compress(part, LEVEL)).decode()


def _described(columns: Columns) -> list[tuple[str, str, int]]:
    """Name, type and numbers a row of each column."""
    return [(name, column.dtype.name, int(np.prod(column.shape[1:]))) for name, column in columns.items()]


def _compact(columns: Columns) -> Columns:
    return {name: _short(column) if column.dtype.kind == "f" else _small(column) for name, column in columns.items()}


def _short(column: np.ndarray) -> np.ndarray:
    """Numbers rounded to the three digits that are shown, as float32: the zero bits at their ends compress well."""
    bits = np.ascontiguousarray(column, dtype="<f4").view("<u4")
    return ((bits + (1 << DROPPED_BITS - 1)) >> DROPPED_BITS << DROPPED_BITS).view("<f4")


def _small(column: np.ndarray) -> np.ndarray:
    """Whole numbers from 0 on in the smallest type that a browser has for them, which beyond 32 bits is float64."""
    largest = int(column.max(initial=0))
    kind = next((kind for kind in ("<u1", "<u2", "<u4") if largest <= np.iinfo(kind).max), "<f8")
    return np.ascontiguousarray(column, dtype=kind)
