"""The page's data: columns of numbers, compressed in parts, so that a browser unpacks only what it shows.

A block is the base64 of several parts in a row, each compressed separately. The page's first block holds the data of the list:
the words, the tokens, the spans and the columns of the list. The second block holds the columns of the latents' own pages,
CHUNK latents a part; the list is shown before the browser has read it. A part of columns holds one column after another,
little-endian, in the order and types given by the layout.
"""

import json
import zlib
from base64 import b64encode
from typing import Any, NamedTuple

import numpy as np

from saelens_lite.features.dashboard.content import Columns, Content

CHUNK = 64  # latents in a part
LEVEL = 6
DROPPED_BITS = 12  # of the 23 fraction bits of a float32; the rest keep three decimal digits
FINE_BITS = 8  # for the columns in FINE, which the page computes with, or shows with two decimals
FINE = {"bin_width", "logit_low", "logit_width", "logit_skew", "logit_kurtosis"}
FINE |= {"cosine", "stability", "decoder_cosine", "encoder_cosine", "delta_norm", "model_cosine"}


class Packed(NamedTuple):
    """The data of a page; `layout` is plain data with the position of each part in the blocks."""

    layout: dict[str, Any]
    list_block: str
    details_block: str


def pack(content: Content) -> Packed:
    """Return the content packed into blocks."""
    columns = {name: _compact(getattr(content, name)) for name in ("tokens", "spans", "index", "details")}
    words = {name: getattr(content, name) for name in ("vocabulary", "labels", "origins", "scores", "judges", "spreads")}
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
    """Return the name, the type and the numbers a row of each column."""
    return [(name, column.dtype.name, int(np.prod(column.shape[1:]))) for name, column in columns.items()]


def _compact(columns: Columns) -> Columns:
    return {name: _float(name, column) if column.dtype.kind == "f" else _small(column) for name, column in columns.items()}


def _float(name: str, column: np.ndarray) -> np.ndarray:
    return _short(column, FINE_BITS) if name in FINE else _short(_three_digits(column), DROPPED_BITS)


def _three_digits(column: np.ndarray) -> np.ndarray:
    """Return numbers rounded to three significant digits, so that the page shows the digits of the exact number."""
    rounded = column.astype("<f4")
    there = np.isfinite(rounded) & (rounded != 0)
    exact = rounded[there].astype("<f8")
    unit = 10 ** (np.floor(np.log10(np.abs(exact))) - 2)
    rounded[there] = np.round(exact / unit) * unit
    return rounded


def _short(column: np.ndarray, dropped: int) -> np.ndarray:
    """Return numbers as float32, rounded to zero in their last `dropped` bits, because zeros compress well."""
    bits = np.ascontiguousarray(column, dtype="<f4").view("<u4")
    return ((bits + (1 << dropped - 1)) >> dropped << dropped).view("<f4")


def _small(column: np.ndarray) -> np.ndarray:
    """Return non-negative integers in the smallest type that a browser has for them: float64 beyond 32 bits."""
    largest = int(column.max(initial=0))
    kind = next((kind for kind in ("<u1", "<u2", "<u4") if largest <= np.iinfo(kind).max), "<f8")
    return np.ascontiguousarray(column, dtype=kind)
