"""Places in a text from which it can be read again, without tokenising the text before.

A place lies before a piece of text that is tokenised in one call. It knows a hash of the text before, the rows that have been
cut from it, and the state of the row that was not full. Then the rows behind the place are those of an uninterrupted reading.
"""

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from saelens_lite.errors import CorruptFileError, SourceChangedError
from saelens_lite.schemas import Checked, Count, Sha256
from saelens_lite.tokens.sources import Piece

NEW_DOCUMENT = b"\xff"  # not in UTF-8


class Mark(NamedTuple):
    """A place between two pieces of text: a document, the number of its characters before the place, and a hash of all before.

    `head` is the text just before it, with `n_head` tokens, with which the text behind it is tokenised.
    """

    document: int
    n_chars: int
    head: str
    n_head: int
    sha256: str


class Place(Checked):
    """A place in a text, as plain data: a mark, the row that was being filled there, and the rows that were cut up to now."""

    n_blocks: Count
    n_rows: Count
    n_kept: Count
    width: Count
    document: Count
    n_chars: Count
    head: str
    n_head: Count
    sha256: Sha256
    ids: list[int]
    start: Count
    tail: list[int]
    in_document: bool
    begun: bool
    n_document: Count
    n_since: Count  # rows that were cut from the text behind the mark
    since_sha256: Sha256  # of these rows

    @property
    def mark(self) -> Mark:
        """The place between two pieces of text."""
        return Mark(self.document, self.n_chars, self.head, self.n_head, self.sha256)

    def check(self, n_ctx: int, min_context: int, d_vocab: int) -> None:
        """Raise CorruptFileError if no reading with rows of n_ctx tokens can have come to this place."""
        ids = [*self.ids, *self.tail]
        if len(self.ids) >= n_ctx or len(self.tail) > min_context or (ids and not 0 <= min(ids) <= max(ids) < d_vocab):
            wrong = f"a row of {len(self.ids)} tokens, {len(self.tail)} repeated tokens, ids up to {max(ids, default=0)}"
        elif self.ids and self.start > len(self.ids):
            wrong = f"a row of {len(self.ids)} tokens whose new tokens begin at {self.start}"
        elif self.width > n_ctx or self.n_blocks > self.n_rows or self.n_kept > self.n_rows * n_ctx:
            wrong = f"{self.n_blocks} blocks, {self.n_rows} rows of up to {self.width} tokens, {self.n_kept} that count"
        else:
            return
        raise CorruptFileError(f"the place behind token row {self.n_rows:,} is damaged: it has {wrong}")


class SourceHash:
    """A SHA-256 of the documents of a text up to the current place."""

    def __init__(self) -> None:
        self.document, self.n_chars = -1, 0
        self._digest = hashlib.sha256()

    def begin(self) -> Mark:
        """Begin a new document, and return the mark before it."""
        mark = Mark(self.document + 1, 0, "", 0, self._digest.hexdigest())
        self.document, self.n_chars = mark.document, 0
        self._digest.update(NEW_DOCUMENT)
        return mark

    def add(self, content: str | list[int]) -> None:
        """Add text, or token ids, of the current document."""
        is_text = isinstance(content, str)
        self._digest.update(content.encode("utf-8", "surrogatepass") if is_text else np.array(content, np.int64).tobytes())
        self.n_chars += len(content)

    def mark(self, head: str, n_head: int) -> Mark:
        """Return a mark inside the current document."""
        return Mark(self.document, self.n_chars, head, n_head, self._digest.hexdigest())

    def skip(self, pieces: Iterator[Piece], mark: Mark) -> Iterator[Piece]:
        """Yield the pieces behind a mark.

        Raises:
            SourceChangedError: the text before the mark is not what it was.
        """
        for piece in pieces:
            if piece.first and self.document + 1 == mark.document and mark.n_chars == 0:
                self._check(mark)
                yield piece
                break
            if piece.first:
                self.begin()
            if self.document > mark.document:
                raise SourceChangedError(f"its document {mark.document} is shorter than it was")
            n = mark.n_chars - self.n_chars if self.document == mark.document else len(piece.content)
            self.add(piece.content[:n])
            if self.document == mark.document and self.n_chars == mark.n_chars:
                self._check(mark)
                yield Piece(piece.content[n:], False)
                break
        else:
            raise SourceChangedError(f"it ends in document {self.document + 1}, where {mark.document + 1} had been read")
        yield from pieces

    def _check(self, mark: Mark) -> None:
        if self._digest.hexdigest() != mark.sha256:
            raise SourceChangedError(
                f"its first {mark.document + (mark.n_chars > 0)} documents differ from those that had been read"
            )
