"""The batches of a text that a process evaluates. An evaluation reads them several times, so they are held in a file.

The text is read and tokenised once, as a stream. Rows of similar length are batched within stretches of STRETCH positions, and
process r of W takes the batches r, r + W, r + 2W, …. So a batch is the same for any number of processes. It is written to a
temporary file (in $TMPDIR, 4 bytes a token; small texts stay in memory) and read back batch by batch. What else is kept does
not grow with the text.
"""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from tempfile import SpooledTemporaryFile, gettempdir
from typing import IO

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from saelens_lite.errors import DiskFullError
from saelens_lite.evaluation.replicates import Units
from saelens_lite.model.models import AnyModel
from saelens_lite.model.passes import RowBatch, batches
from saelens_lite.paths import NO_ROOM
from saelens_lite.processes import Team
from saelens_lite.tokens import TokenRows, joined
from saelens_lite.tokens.rows import TextHash

STRETCH = 1 << 20  # positions, with padding
IN_MEMORY = 1 << 26  # bytes of a text that are not written to a disk
FEWEST_DOCUMENTS = 5  # of equal size, from which a bootstrap over documents is good enough


@contextmanager
def held_batches(lm: AnyModel, blocks: Iterable[TokenRows], batch_tokens: int, team: Team) -> Iterator["Held"]:
    """Yield the batches of a text, and remove their file at the end of the block."""
    with SpooledTemporaryFile(max_size=IN_MEMORY) as file:
        with team.failing_together():
            batches = Held(file, lm, blocks, batch_tokens, team)
        yield batches


class Held:
    """The batches of this process, which may be iterated many times, and facts about the whole text.

    `n_rows` rows have `n_kept` tokens that count; `n_sequences` of them have one or more, and `width` tokens are read of the
    longest. `per_token` and `per_position` are the numbers of kept tokens by id and by position, and `sha256` is the hash of
    all. `n_own` of the kept tokens are in the batches of this process. `probe` is the first row.

    `units` are what a bootstrap draws. Sequences of one document are not independent, so these are documents if the text has
    enough of them, and otherwise sequences. `units_sha256` is the hash of the documents' borders.
    """

    def __init__(self, file: IO[bytes], lm: AnyModel, blocks: Iterable[TokenRows], batch_tokens: int, team: Team):
        self._file, self._team, self._n_batches = file, team, 0
        self.n_rows = self.n_sequences = self.n_kept = self.n_own = self.width = 0
        self.per_token = torch.zeros(lm.d_vocab, dtype=torch.long)
        self.per_position = torch.zeros(0, dtype=torch.long)
        self.probe: TokenRows | None = None
        digest, borders, pad = TextHash(), hashlib.sha256(), lm.pad_id
        rows, documents = _Sizes("sequences"), _Sizes("documents")
        for stretch in _stretches(blocks, pad):
            digest.add(stretch)
            number = torch.arange(self.n_rows, self.n_rows + len(stretch.tokens))
            document = number if stretch.document is None else stretch.document
            borders.update(document.numpy().tobytes())
            for sizes, label in ((rows, number), (documents, document)):
                sizes.add(label, stretch.keep.sum(1))
            self._note(stretch)
            self._hold(batches(lm, stretch, batch_tokens), self.n_rows)
            self.n_rows += len(stretch.tokens)
        self.sha256, self.units_sha256 = digest.hexdigest(), borders.hexdigest()
        self.units, self._by_document = documents.units, documents.units.n_effective >= FEWEST_DOCUMENTS
        if not self._by_document:
            of = f" of {documents.units}" if documents.units.n < rows.units.n else ""
            self.units = rows.units._replace(name=f"sequences{of}")

    def _note(self, rows: TokenRows) -> None:
        """Add rows to the facts about the text."""
        if self.probe is None:
            self.probe = rows[:1]
        lengths, n_ctx = rows.counted_lengths, rows.tokens.shape[1]
        self.width = max(self.width, min(int(lengths.max()) + 1, n_ctx))
        self.n_sequences += int((lengths > 0).sum())
        self.n_kept += rows.n_kept
        self.per_token = _plus(self.per_token, torch.bincount(rows.tokens[rows.keep]))
        self.per_position = _plus(self.per_position, rows.keep.sum(0))

    def _hold(self, batches: Iterator[RowBatch], n_before: int) -> None:
        """Write the batches of this process. Each is a head, the numbers and lengths of its rows, and its marked tokens."""
        for batch in batches:
            if self._n_batches % self._team.world == self._team.rank:
                rows = batch.rows
                head = [*rows.tokens.shape, rows.length is not None, rows.ends_text]
                marked = rows.tokens.int() * 2 + rows.keep
                try:
                    number = batch.number + n_before
                    document = number if rows.document is None else rows.document
                    for x in (torch.tensor(head), number, document, rows.lengths.long(), marked.int()):
                        self._file.write(x.numpy().tobytes())
                except OSError as error:
                    if error.errno not in NO_ROOM:
                        raise
                    raise DiskFullError(
                        f"the tokens of the text do not fit into {gettempdir()}; free some space, or set TMPDIR"
                    ) from error
                self.n_own += rows.n_kept
            self._n_batches += 1

    def __iter__(self) -> Iterator[RowBatch]:
        place = 0
        while True:
            self._file.seek(place)
            head = self._file.read(4 * 8)
            if not head:
                return
            n, width, has_length, ends_text = np.frombuffer(head, np.int64).tolist()
            number, document, length = torch.from_numpy(np.frombuffer(self._file.read(24 * n), np.int64).copy()).split(n)
            marked = np.frombuffer(self._file.read(4 * n * width), np.int32).reshape(n, width)
            place = self._file.tell()
            tokens = torch.from_numpy(marked >> 1).long()
            keep = torch.from_numpy((marked & 1).astype(bool))
            yield RowBatch(TokenRows(tokens, keep, length if has_length else None, bool(ends_text), document), number)

    def unit(self, batch: RowBatch) -> Int[Tensor, " n"]:
        """Return the number of the unit to which each row belongs."""
        return batch.rows.document if self._by_document else batch.number


class _Sizes:
    """The sizes of documents, or of sequences, whose rows come one after another. No memory grows with their number."""

    def __init__(self, name: str):
        self.name = name
        self.n = self._total = self._squares = self._last = 0
        self._label: int | None = None  # of the last one, which may go on

    def add(self, label: Int[Tensor, " n"], n_kept: Int[Tensor, " n"]) -> None:
        """Add rows, each with the number of its document and its number of tokens that count."""
        labels, n_rows = label.unique_consecutive(return_counts=True)
        sizes = [int(part.sum()) for part in n_kept.split(n_rows.tolist())]
        for one, size in zip(labels.tolist(), sizes, strict=True):
            if one != self._label:
                self._label, self._last = one, 0
            self.n += self._last == 0 < size
            self._total += size
            self._squares += (self._last + size) ** 2 - self._last**2
            self._last += size

    @property
    def units(self) -> Units:
        """Those with tokens that count."""
        return Units(self.name, self.n, self._total**2 / self._squares if self._squares else 0.0)


def _stretches(blocks: Iterable[TokenRows], pad: int) -> Iterator[TokenRows]:
    """Yield the rows in stretches of up to STRETCH positions, or of one block."""
    waiting: list[TokenRows] = []
    for block in blocks:
        n, width = (sum(len(b.tokens) for b in [*waiting, block]), max(b.tokens.shape[1] for b in [*waiting, block]))
        if waiting and n * width > STRETCH:
            yield joined(waiting, pad)
            waiting = []
        waiting.append(block)
    if waiting:
        yield joined(waiting, pad)


def _plus(total: Int[Tensor, " n"], x: Int[Tensor, " m"]) -> Int[Tensor, " _"]:
    """Return the sum of two tensors, of which the shorter one ends with zeros."""
    longer, shorter = (total, x) if len(total) >= len(x) else (x, total)
    return longer + torch.nn.functional.pad(shorter, (0, len(longer) - len(shorter)))
