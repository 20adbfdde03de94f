"""Token rows: documents cut or packed into rows of n_ctx tokens, and the positions that count."""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from saelens_lite.config import TextConfig
from saelens_lite.errors import SourceChangedError
from saelens_lite.tokens.places import Place
from saelens_lite.tokens.sources import Piece

PIECE = 1 << 18  # positions


class TokenRows(NamedTuple):
    """Token ids in rows, and the positions that count (no special tokens, padding or repeated context).

    `length` is the number of tokens in each row, before the padding; None: no padding. `ends_text`: each text ends with its
    row, so the model should predict EOS, the first padding token, there. `document` is the number of the document in which each
    row begins, from the place on where reading began; None: rows are documents of their own.
    """

    tokens: Int[Tensor, "n_seq n_ctx"]
    keep: Bool[Tensor, "n_seq n_ctx"]
    length: Int[Tensor, " n_seq"] | None = None
    ends_text: bool = True
    document: Int[Tensor, " n_seq"] | None = None

    @property
    def n_kept(self) -> int:
        """Number of positions that count."""
        return int(self.keep.count_nonzero())

    @property
    def kept_at(self) -> Int[Tensor, " n_ctx"]:
        """Number of rows in which each position counts."""
        return torch.stack([piece.keep.sum(0) for piece in self.pieces()]).sum(0)

    @property
    def holds_token(self) -> Bool[Tensor, "n_seq n_ctx"] | None:
        """Mask of the tokens, false at padding; None: no padding."""
        if self.length is None:
            return None
        return torch.arange(self.tokens.shape[1], device=self.tokens.device) < self.length[:, None].to(self.tokens.device)

    @property
    def lengths(self) -> Int[Tensor, " n_seq"]:
        """Number of tokens in each row, without its padding."""
        n_seq, n_ctx = self.tokens.shape
        return torch.full((n_seq,), n_ctx, device=self.tokens.device) if self.length is None else self.length

    @property
    def counted_lengths(self) -> Int[Tensor, " n_seq"]:
        """Number of positions in each row up to the last counted one."""
        position = torch.arange(1, self.keep.shape[1] + 1, device=self.keep.device)
        return torch.cat([(piece.keep * position).amax(1) for piece in self.pieces()])

    def __getitem__(self, rows: slice) -> "TokenRows":  # type: ignore[override]
        return self.take(rows) if isinstance(rows, slice) else tuple.__getitem__(self, rows)

    def pieces(self) -> Iterator["TokenRows"]:
        """Yield the rows in pieces, for code that needs much more memory than the rows do."""
        size = max(1, PIECE // max(1, self.tokens.shape[1]))
        for start in range(0, max(1, len(self.tokens)), size):
            yield self[start : start + size]

    def take(self, rows: Tensor | slice) -> "TokenRows":
        """Return some of the rows."""
        return self._replace(**{name: x[rows] for name, x in self._asdict().items() if isinstance(x, Tensor)})

    def narrowed(self, width: int) -> "TokenRows":
        """Return the first `width` positions of each row."""
        length = None if self.length is None else self.length.clamp(max=width)
        return self._replace(tokens=self.tokens[:, :width], keep=self.keep[:, :width], length=length)

    def to(self, device: torch.device | str) -> "TokenRows":
        """Move the rows to a device."""
        return self._replace(**{name: x.to(device) for name, x in self._asdict().items() if isinstance(x, Tensor)})


class Row(NamedTuple):
    """The token ids of one row, the index of its first new token, after BOS and repeated context, and its document's number."""

    ids: list[int]
    start: int
    document: int = 0


class SpecialTokens(NamedTuple):
    """The tokens at the start of rows, at the start of documents and between documents; None: no token."""

    bos: int | None
    separator: int | None


def cut_rows(pieces: Iterable[Piece], config: TextConfig, n_ctx: int, special: SpecialTokens) -> Iterator[Row]:
    """Yield rows of at most n_ctx tokens with the documents' tokens in order. Each token is new in exactly one row.

    A row that continues a document repeats its last `min_context` tokens, so every token sees at least that many before it, or
    the whole document before it. All packed rows but the last are full.
    """
    return iter(RowCutter(pieces, config, n_ctx, special))


class RowCutter:
    """The rows of `cut_rows`, and the current place among them. Iterate once.

    place: begin there; the pieces are those behind its mark.
    """

    def __init__(
        self, pieces: Iterable[Piece], config: TextConfig, n_ctx: int, special: SpecialTokens, place: Place | None = None
    ):
        self._pieces, self._cutter = pieces, _Cutter(config, n_ctx, special)
        self._limit = n_ctx - (special.bos is not None) if config.truncate else None
        self._n_document, self._begun = 0, False  # of the current document: tokens in rows, and whether there are any
        self._place = place
        self._before: dict[str, Any] = {}  # the state before the current piece
        self._mark: Any = None
        self._n_since, self._since = 0, hashlib.sha256()  # of the rows from the current piece on
        if place is not None:
            self._cutter.ids, self._cutter.start, self._cutter.tail = list(place.ids), place.start, list(place.tail)
            self._cutter.in_document, self._begun, self._n_document = place.in_document, place.begun, place.n_document

    @property
    def place(self) -> dict[str, Any] | None:
        """The place behind the rows that were yielded, as a part of `Place`. None: reading cannot start again there, or the
        text has ended.
        """
        if self._mark is None:
            return None
        since = {"n_since": self._n_since, "since_sha256": self._since.hexdigest()}
        return {**self._mark._asdict(), **self._before, **since}

    def __iter__(self) -> Iterator[Row]:
        place, n_seen = self._place, 0
        n_before = 0 if place is None else place.n_since
        for row in self._rows():
            n_seen += 1
            self._n_since += 1
            self._since.update(np.array([*row.ids, -row.start - 1], np.int64))
            if n_seen > n_before:
                yield row
            elif n_seen == n_before and self._since.hexdigest() != place.since_sha256:
                raise SourceChangedError(f"its token rows before number {place.n_rows:,} differ from those that had been read")
        if n_seen < n_before:
            raise SourceChangedError(f"it ends before token row {place.n_rows:,}, which had been read")

    def _rows(self) -> Iterator[Row]:
        cutter = self._cutter
        for piece in self._pieces:
            if piece.mark is not None or self._mark is None:
                self._mark, self._n_since, self._since = piece.mark, 0, hashlib.sha256()
                self._before = {
                    "ids": list(cutter.ids), "start": cutter.start, "tail": list(cutter.tail),
                    "in_document": cutter.in_document, "begun": self._begun, "n_document": self._n_document,
                }  # fmt: skip
            if piece.first:
                self._n_document, self._begun = 0, False
            ids = piece.content if self._limit is None else piece.content[: self._limit - self._n_document]
            if not ids:
                continue
            if not self._begun:
                yield from cutter.begin_document()
                self._begun = True
            self._n_document += len(ids)
            yield from cutter.add(ids)
        self._mark = None
        yield from cutter.flush()


class _Cutter:
    """The current row, and the end of the current document that the next row may repeat."""

    def __init__(self, config: TextConfig, n_ctx: int, special: SpecialTokens):
        self.config, self.n_ctx, self.special = config, n_ctx, special
        self.ids: list[int] = []
        self.start = 0
        self.tail: list[int] = []  # the last min_context tokens of the document that are in rows
        self.in_document = False
        self.n_documents = self.document = 0  # documents that have begun, and the number of that in which the row begins

    def begin_document(self) -> Iterator[Row]:
        """Start a new document: after a separator in packed rows, else in a new row. Yield the row that this fills or ends."""
        self.tail, self.in_document = [], False
        self.n_documents += 1
        if not self.config.pack:
            yield from self.flush()
        if self.ids:
            self.ids.append(self.special.separator)
            yield from self._flush_full()
        if self.ids and self.config.bos == "document" and self.special.bos != self.special.separator:
            self.ids.append(self.special.bos)
            yield from self._flush_full()

    def add(self, ids: list[int]) -> Iterator[Row]:
        """Add tokens of the current document and yield the rows that are full."""
        done = 0
        while done < len(ids):
            if not self.ids:
                self._open()
            new = ids[done : done + self.n_ctx - len(self.ids)]
            self.ids += new
            done += len(new)
            self.in_document = True
            if self.config.min_context:
                self.tail = (self.tail + new)[-self.config.min_context :]
            yield from self._flush_full()

    def _open(self) -> None:
        """Start a row with BOS, if configured, and with the end of the document that it continues."""
        wants_bos = self.config.bos == "row" or (self.config.bos == "document" and not self.in_document)
        self.ids = ([self.special.bos] if wants_bos else []) + self.tail
        self.start = len(self.ids)
        self.document = self.n_documents - 1

    def _flush_full(self) -> Iterator[Row]:
        if len(self.ids) == self.n_ctx:
            yield from self.flush()

    def flush(self) -> Iterator[Row]:
        """Yield the current row, even if it is not full."""
        if self.ids:
            yield Row(self.ids, self.start, self.document)
        self.ids = []


def padded(rows: list[Row], pad: int) -> TokenRows:
    """Stack rows into one tensor, padded on the right to the longest row. New tokens count."""
    width = max(len(row.ids) for row in rows)
    whole = [row.ids + [pad] * (width - len(row.ids)) for row in rows]
    tokens = torch.from_numpy(np.array(whole, np.int64))  # six times as fast as torch.tensor
    start, stop = (torch.tensor(ends)[:, None] for ends in zip(*((row.start, len(row.ids)) for row in rows), strict=True))
    position = torch.arange(width)
    document = torch.tensor([row.document for row in rows])
    return TokenRows(tokens, (position >= start) & (position < stop), stop.squeeze(1), document=document)


def countable(
    tokens: Int[Tensor, "n_seq n_ctx"], special_ids: Iterable[int], exclude_positions: Iterable[int]
) -> Bool[Tensor, "n_seq n_ctx"]:
    """Return a mask of the positions that hold an ordinary token and are not excluded."""
    position = torch.arange(tokens.shape[1], device=tokens.device)
    excluded = torch.isin(position, position.new_tensor(list(exclude_positions)))
    return ~torch.isin(tokens, tokens.new_tensor(sorted(special_ids))) & ~excluded


def joined(blocks: list[TokenRows], pad: int) -> TokenRows:
    """Concatenate blocks of rows, padded to the same width."""
    width = max(block.tokens.shape[1] for block in blocks)

    def widened(x: Tensor, value: int) -> Tensor:
        return torch.nn.functional.pad(x, (0, width - x.shape[1]), value=value)

    lengths = None
    if any(block.length is not None or block.tokens.shape[1] < width for block in blocks):
        lengths = torch.cat([block.lengths for block in blocks])
    documents = [block.document for block in blocks if block.document is not None]
    return TokenRows(
        torch.cat([widened(block.tokens, pad) for block in blocks]),
        torch.cat([widened(block.keep, 0) for block in blocks]),
        lengths,
        all(block.ends_text for block in blocks),
        torch.cat(documents) if len(documents) == len(blocks) else None,
    )


class TextHash:
    """A SHA-256 of the token ids and kept positions of rows, updated block by block. Padding and block size do not matter."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    @staticmethod
    def marked(rows: TokenRows) -> np.ndarray:
        """Return the numbers that stand for rows in the hash: for each row, the tokens up to the last counted one, a mark on
        the counted ones, and an end mark.
        """
        marked = torch.nn.functional.pad(rows.tokens.long() * 2 + rows.keep, (0, 1))
        position, length = torch.arange(marked.shape[1]), rows.counted_lengths[:, None]
        marked = marked.masked_fill(position == length, -1)
        return marked[position <= length].cpu().numpy()

    def add(self, rows: TokenRows) -> None:
        """Add rows to the hash."""
        self.add_marked(self.marked(rows))

    def add_marked(self, marked: np.ndarray) -> None:
        """Add the numbers that stand for rows."""
        self._digest.update(marked.astype(np.int64).tobytes())

    def hexdigest(self) -> str:
        """Return the hash of all rows so far."""
        return self._digest.hexdigest()


class RowRecord(NamedTuple):
    """The number of token rows read, of their counted positions, their hash, and whether the text ended there."""

    n_rows: int
    n_kept: int
    sha256: str
    ended: bool = False


class RowHash:
    """A SHA-256 of all token rows that a model has read so far, in order.

    Unlike TextHash it covers all positions: BOS, excluded positions and repeated context affect the activations of the counted
    ones. `expected` is the record of an earlier read of the same text. Once that many rows are read, a difference is an error.
    """

    def __init__(self, expected: RowRecord | None = None) -> None:
        self._digest = hashlib.sha256()
        self.n_rows = self.n_kept = 0
        self.ended = False
        self._expected = expected

    @property
    def is_as_expected(self) -> bool:
        """True if all rows of the earlier read have been read again."""
        return self._expected is None

    @property
    def record(self) -> RowRecord:
        """The record of the rows read so far."""
        return RowRecord(self.n_rows, self.n_kept, self._digest.hexdigest(), self.ended)

    def add(self, rows: TokenRows) -> None:
        """Add a batch to the hash: its shape, and the token ids, length and counted positions of each row.

        Raises:
            SourceChangedError: the rows differ from those of the earlier read.
        """
        self._digest.update(repr((tuple(rows.tokens.shape), rows.length is not None)).encode())
        for x in (rows.tokens.long(), rows.keep, rows.length):
            if x is not None:
                self._digest.update(x.cpu().contiguous().numpy())
        self.n_rows += len(rows.tokens)
        self.n_kept += rows.n_kept
        self._compare()

    def end(self) -> None:
        """Record the end of the text. Raise SourceChangedError if it ended elsewhere in the earlier read."""
        self.ended = True
        self._compare()

    def _compare(self) -> None:
        expected, record = self._expected, self.record
        if expected is None or (record.n_kept < expected.n_kept and not record.ended):
            return
        if record.n_kept == expected.n_kept and record.sha256 == expected.sha256 and expected.ended and not record.ended:
            return  # wait for the next row or the end of the text
        if record._replace(ended=expected.ended) == expected:
            self._expected = None
        elif record.n_kept < expected.n_kept:
            raise SourceChangedError(f"it ends after {record.n_rows:,} token rows, where {expected.n_rows:,} had been read")
        elif expected.ended:
            raise SourceChangedError(f"it differs from the {expected.n_rows:,} token rows that had been read, which were all")
        else:
            raise SourceChangedError(f"its first {expected.n_rows:,} token rows differ from those that had been read")


def text_hash(rows: TokenRows) -> str:
    """Return the SHA-256 of the token ids and kept positions."""
    digest = TextHash()
    for piece in rows.pieces():
        digest.add(piece)
    return digest.hexdigest()
