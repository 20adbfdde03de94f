"""Sections of a text: the parts of a capture that processes do side by side.

A section is some consecutive blocks of token rows, with at least half of a block's tokens at positions that count. Its
activations are in shards of their own. The rows alone decide where a section ends and which numbers its shards have, so all
processes find the same sections without a message, and one process writes what several write.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from saelens_lite.cache.journal import Heading, Journal
from saelens_lite.cache.shards import SHARDS
from saelens_lite.errors import CorruptFileError, SourceChangedError
from saelens_lite.files import write_file
from saelens_lite.tokens import Place, RowBlocks, RowHash, TextHash, TokenRows

JOURNALS = "journal"
MOST_BLOCKS = 16  # of a section: limits its memory where few positions count


@dataclasses.dataclass(frozen=True)
class Start:
    """The state of a capture when its processes start.

    Attributes:
        complete: numbers of the sections whose shards are all on the disk.
        n_shards: shards of the text before `place`.
        marked: hashes of the files of rows of the sections before `place`.
        place: where the text is read on; None: from its beginning.
        n_done: activations in complete shards.
    """

    complete: frozenset[int] = frozenset()
    n_shards: int = 0
    marked: tuple[str, ...] = ()
    place: Place | None = None
    n_done: int = 0

    @property
    def n_sections(self) -> int:
        """Number of sections of the text before `place`."""
        return len(self.marked)

    @classmethod
    def of(cls, folder: Path) -> "Start":
        """Read the journals of an unfinished capture."""
        complete, marked, n_done, n_shards, place = set(), [], 0, 0, None
        is_contiguous = True
        for number in sorted(numbers(folder)):
            journal = Journal.read(journal_path(folder, number), folder / SHARDS)
            if journal is None:
                is_contiguous = False
                continue
            n_done += journal.n_done
            if journal.is_complete:
                complete.add(number)
            heading = journal.heading
            is_contiguous &= journal.is_complete and heading.after is not None and number == len(marked)
            if is_contiguous and heading.marked_sha256 is not None and rows_path(journal.path).exists():
                marked.append(heading.marked_sha256)
                n_shards, place = heading.first_shard + heading.n_shards, heading.after
            else:
                is_contiguous = False
        return cls(frozenset(complete), n_shards, tuple(marked), place, n_done)


@dataclasses.dataclass(frozen=True)
class Section:
    """A section that this process captures: its blocks of rows by number, and its journal.

    n_others: activations of sections between the one before and this one, which other processes capture.
    """

    blocks: list[tuple[int, TokenRows]]
    journal: Journal
    n_others: int


class Sections:
    """The sections that one of several processes captures. Iterate once; then `n` is the number of all sections.

    Sections that are not complete go to the processes in turn. The hash of each section that was begun before is compared
    with its rows by one of the processes.

    Raises:
        SourceChangedError: in iteration: the rows are not those that the journals describe.
    """

    def __init__(self, folder: Path, blocks: RowBlocks, shard_tokens: int, start: Start, rank: int, world: int):
        self.folder, self.blocks, self.shard_tokens = folder, blocks, shard_tokens
        self.start, self.rank, self.world = start, rank, world
        self.n, self._n_shards, self._n_begun, self._n_others = start.n_sections, start.n_shards, 0, 0

    def __iter__(self) -> Iterator[Section]:
        for blocks in self._grouped():
            is_complete = self.n in self.start.complete
            turn = self.n if is_complete else self._n_begun
            n_kept = sum(rows.n_kept for _, rows in blocks)
            if turn % self.world == self.rank:
                journal = self._journal(blocks, n_kept)
                if not is_complete:
                    yield Section(blocks, journal, self._n_others)
                    self._n_others = 0
            elif not is_complete:
                self._n_others += n_kept
            self.n += 1
            self._n_shards += -(-n_kept // self.shard_tokens)
            self._n_begun += not is_complete

    def refuse_surplus(self) -> None:
        """Raise SourceChangedError if there are journals of sections behind the end of the text."""
        if surplus := [number for number in numbers(self.folder) if number >= self.n]:
            raise SourceChangedError(f"it ends after {self.n:,} sections, where {max(surplus) + 1:,} had been read")

    def _grouped(self) -> Iterator[list[tuple[int, TokenRows]]]:
        group: list[tuple[int, TokenRows]] = []
        n_kept = 0
        for rows in self.blocks:
            group.append((self.blocks.n_blocks - 1, rows))
            n_kept += rows.n_kept
            if 2 * n_kept >= self.blocks.block_tokens or len(group) == MOST_BLOCKS:
                yield group
                group, n_kept = [], 0
        if group:
            yield group

    def _journal(self, blocks: list[tuple[int, TokenRows]], n_kept: int) -> Journal:
        """Return the journal of the section that was just read, which may hold complete shards."""
        digest = RowHash()
        for _, rows in blocks:
            digest.add(rows)
        heading = Heading(
            n_rows=digest.n_rows,
            n_kept=n_kept,
            rows_sha256=digest.record.sha256,
            first_shard=self._n_shards,
            shard_tokens=self.shard_tokens,
            after=self.blocks.place,
        )
        path = journal_path(self.folder, self.n)
        journal = Journal.read(path, self.folder / SHARDS)
        if journal is None:
            if heading.after is not None:
                marked = np.concatenate([TextHash.marked(rows) for _, rows in blocks]).astype("<i4")
                write_file(rows_path(path), marked.tofile)
                heading = heading.model_copy(update={"marked_sha256": hashlib.sha256(marked).hexdigest()})
            return Journal(path, heading)
        if journal.heading.model_copy(update={"after": heading.after, "marked_sha256": None}) != heading:
            first, last = self.blocks.n_rows - heading.n_rows, self.blocks.n_rows - 1
            raise SourceChangedError(f"its token rows {first:,} to {last:,} differ from those that had been read")
        return journal


def journal_path(folder: Path, number: int) -> Path:
    """Return the path of the journal of a section."""
    return folder / JOURNALS / f"{number:06d}.jsonl"


def rows_path(journal: Path) -> Path:
    """Return the path of the rows of a section, in the form that `TextHash` takes, for a capture that is resumed behind it."""
    return journal.with_suffix(".rows")


def numbers(folder: Path) -> list[int]:
    """Return the numbers of the sections that have a journal."""
    return [int(path.stem) for path in (folder / JOURNALS).glob("[0-9]*.jsonl")]


def hash_again(blocks: RowBlocks, folder: Path, marked: Sequence[str]) -> None:
    """Bring the hash of the rows to where it was after the first sections, which are not read again.

    marked: hashes of their files of rows. Raise CorruptFileError if a file does not match.
    """
    for number, sha256 in enumerate(marked):
        path = rows_path(journal_path(folder, number))
        content = path.read_bytes() if path.exists() else b""
        if hashlib.sha256(content).hexdigest() != sha256:
            raise CorruptFileError(f"{path} is missing or damaged; delete {path.with_suffix('.jsonl')} and repeat the call")
        blocks.hash.add_marked(np.frombuffer(content, "<i4"))
