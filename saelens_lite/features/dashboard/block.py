"""The page's data: columns of numbers, compressed in parts, so that a browser opens only what it shows.

A block is the base64 of several parts, one behind the other, each compressed by itself. The first block of the page holds
what the list needs: the words, the tokens, the spans and the columns of the list. The second holds the columns of the
latents' own pages, CHUNK latents a part; a browser need not have read it to show the list. A part of columns is their
numbers, one column behind the other, little-endian, in the order and of the types that the layout names.
"""

import json
import zlib
from base64 import b64encode
from typing import Any, NamedTuple

import numpy as np

from saelens_lite.features.dashboard.content import Columns, Content

CHUNK = 64  # latents
LEVEL = 6
DROPPED_BITS = 12  # of a float32's 23 behind the leading one; the rest are three decimal digits
FINE_BITS = 8  # dropped of the columns in FINE, which are computed with before they are shown, or shown with two decimals
FINE = {"bin_width", "logit_low", "logit_width", "logit_skew", "logit_kurtosis"}
FINE |= {"cosine", "stability", "decoder_cosine", "encoder_cosine"}


class Packed(NamedTuple):
    """The data of a page; `layout` is plain data that says where in the blocks what is."""

    layout: dict[str, Any]
    list_block: str
    details_block: str


def pack(content: Content) -> Packed:
    """The content as blocks."""
    columns = {name: _compact(getattr(content, name)) for name in ("tokens", "spans", "index", "details")}
    words = {"vocabulary": content.vocabulary, "labels": content.labels}
    whole = [
        json.dumps(words, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "backslashreplace"),  # lone surrogates
        *(_bytes(columns[name]) for name in ("tokens", "spans", "index")),
    ]
    chunks = (
        _bytes({name: column[start : start + CHUNK] for name, column in columns["details"].items()})
        for start in range(0, content.facts["n_latents"], CHUNK)
    )
    parts, chunk_parts = (list(map(_encoded, several)) for several in (whole, chunks))
    layout = {
        **content.facts,
        "chunk": CHUNK,
        "columns": {name: _described(described) for name, described in columns.items()},
        "list_starts": np.cumsum([0, *map(len, parts)]).tolist(),
        "details_starts": np.cumsum([0, *map(len, chunk_parts)]).tolist(),
    }
    return Packed(layout, "".join(parts), "".join(chunk_parts))


def _bytes(columns: Columns) -> bytes:
    return b"".join(column.tobytes() for column in columns.values())


def _encoded(part: bytes) -> str:
    return b64encode(zlib.compress(part, LEVEL)).decode()


def _described(columns: Columns) -> list[tuple[str, str, int]]:
    """Name, type and numbers a row of each column."""
    return [(name, column.dtype.name, int(np.prod(column.shape[1:]))) for name, column in columns.items()]


def _compact(columns: Columns) -> Columns:
    return {name: _float(name, column) if column.dtype.kind == "f" else _small(column) for name, column in columns.items()}


def _float(name: str, column: np.ndarray) -> np.ndarray:
    return _short(column, FINE_BITS) if name in FINE else _short(_three_digits(column), DROPPED_BITS)


def _three_digits(column: np.ndarray) -> np.ndarray:
    """Numbers rounded to three decimal digits, so that the page shows those of the exact number."""
    rounded = column.astype("<f4")
    there = np.isfinite(rounded) & (rounded != 0)
    exact = rounded[there].astype("<f8")
    unit = 10 ** (np.floor(np.log10(np.abs(exact))) - 2)
    rounded[there] = np.round(exact / unit) * unit
    return rounded


def _short(column: np.ndarray, dropped: int) -> np.ndarray:
    """Numbers without so many of their last bits, as float32: the zeros at their ends compress well."""
    bits = np.ascontiguousarray(column, dtype="<f4").view("<u4")
    return ((bits + (1 << dropped - 1)) >> dropped << dropped).view("<f4")


def _small(column: np.ndarray) -> np.ndarray:
    """Whole numbers from 0 on in the smallest type that a browser has for them, which beyond 32 bits is float64."""
    largest = int(column.max(initial=0))
    kind = next((kind for kind in ("<u1", "<u2", "<u4") if largest <= np.iinfo(kind).max), "<f8")
    return np.ascontiguousarray(column, dtype=kind)
