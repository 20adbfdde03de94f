"""A text as a sequence of blocks of token rows. Reading, tokenising, cutting and counting happen on demand."""

import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxtyping import Bool, Int
from torch import Tensor

from saelens_lite.config import TextConfig
from saelens_lite.errors import ConfigError, TextError
from saelens_lite.tokens.balance import TokenBalance
from saelens_lite.tokens.encoding import encode, without_leading
from saelens_lite.tokens.inputs import Ids, aligned, token_ids
from saelens_lite.tokens.places import Mark, Place, SourceHash
from saelens_lite.tokens.rows import Row, RowCutter, SpecialTokens, TextHash, TokenRows, countable, padded
from saelens_lite.tokens.sources import Piece, Text, check_file, read_pieces
from saelens_lite.tokens.template import in_template
from saelens_lite.tokens.tokenizer import Tokenizer

BLOCK_TOKENS = 1 << 18
DEFAULT_N_CTX = 1024  # default row length for models with a longer context
log = logging.getLogger(__name__)


class RowBlocks:
    """The rows of a text in blocks of up to `block_tokens` tokens, each padded to its longest row. Iterate once.

    Only the current block and its stretch of text are in memory. Token ids [n_seq n_ctx] and TokenRows are used unchanged: of
    `config`, only what is excluded (for plain ids) and `max_token_share` apply to them. Ids from `token_column` are
    documents and are cut like text; a BOS at their start is not doubled.

    start: begin at this place of an earlier reading of the same text. The text before it is hashed, but not tokenised.

    Raises:
        ConfigError: the settings do not fit the model or contradict each other.
        ShapeError: the model cannot read the rows.
        CorruptFileError: no reading with these settings can have come to `start`.
        TextError: a file does not exist; in iteration: a text cannot be read, or none of its positions count.
        SourceChangedError: in iteration: the text before `start` is not what it was.
    """

    def __init__(
        self,
        lm: Tokenizer,
        text: Text | TokenRows,
        config: TextConfig | None = None,
        *,
        n_tokens: int | None = None,
        block_tokens: int = BLOCK_TOKENS,
        start: Place | None = None,
    ):
        self.lm, self.text, self.config, self.n_tokens = lm, text, config or TextConfig(), n_tokens
        if n_tokens is not None and n_tokens < 1:
            raise ConfigError(f"n_tokens = {n_tokens}; expected at least 1")
        if isinstance(text, Path):
            check_file(text, self.config)
        self._given = token_ids(text)
        self.are_rows = self._given is not None
        if self.are_rows and not isinstance(text, TokenRows):
            lm.warn_of_leading_pads(self._given)
        if not self.are_rows:
            self.config = _with_default_n_ctx(lm, self.config)
        self.n_ctx = _text_n_ctx(lm, self.config) if self._given is None else _rows_n_ctx(lm, self._given, self.config)
        self.block_tokens, self.block_rows = block_tokens, max(1, block_tokens // self.n_ctx)
        self.special = SpecialTokens(None, None) if self.are_rows else _special_tokens(lm, self.config)
        self.special_ids = {*lm.special_ids, *self.config.exclude_token_ids, *(i for i in self.special if i is not None)}
        self.template = lm.template if self.config.exclude_template else []
        self.pad = lm.pad_id
        self.balance = TokenBalance(self.config.max_token_share, lm.d_vocab) if self.config.max_token_share else None
        self.n_blocks = self.n_rows = self.n_kept = self.width = 0
        self._start, self._cutter = start, None
        if start is not None:
            start.check(self.n_ctx, self.config.min_context, lm.d_vocab)
            self.n_blocks, self.n_rows, self.n_kept, self.width = start.n_blocks, start.n_rows, start.n_kept, start.width
        self.every_row_begins_with_bos = self._given is not None and lm.begin_with_bos(self._given)
        self.hash = TextHash()

    @property
    def place(self) -> Place | None:
        """The place behind the blocks read so far. None for token rows and for balanced text, which must be read again."""
        in_rows = None if self._cutter is None or self.balance else self._cutter.place
        if in_rows is None:
            return None
        return Place(n_blocks=self.n_blocks, n_rows=self.n_rows, n_kept=self.n_kept, width=self.width, **in_rows)

    @property
    def n_expected(self) -> int | None:
        """Largest possible number of counted positions; None if the text must be read to know it."""
        if isinstance(self.text, TokenRows):
            return min(self.text.n_kept, self.n_tokens or self.text.n_kept)
        return self.n_tokens

    def __iter__(self) -> Iterator[TokenRows]:
        for candidates in self._rows_as_they_stand() if self.are_rows else self._rows_of_text():
            if self.n_kept == self.n_tokens:  # begun behind the last row
                return
            yield self._chosen(candidates)
            if self.n_kept == self.n_tokens:
                return
        if not self.n_kept:
            rest = "nothing was left after tokenising that counts; special tokens and excluded positions, such as 0, do not"
            what = "none of the positions of the token rows counts" if self.are_rows else rest
            raise TextError(f"no text: {what}")

    def _chosen(self, candidates: TokenRows) -> TokenRows:
        """Return the rows with their final counted positions, and add them to the record."""
        rows = candidates._replace(keep=self.balance.thin(candidates.tokens, candidates.keep)) if self.balance else candidates
        if self.n_tokens is not None and self.n_kept + rows.n_kept >= self.n_tokens:
            rows, candidates = _cut_off(rows, candidates, self.n_tokens - self.n_kept)
        if self.balance:
            self.balance.count(candidates.tokens[candidates.keep], rows.tokens[rows.keep])
        self.n_blocks += 1
        self.n_rows += len(rows.tokens)
        self.n_kept += rows.n_kept
        self.width = max(self.width, rows.tokens.shape[1])
        self.hash.add(rows)
        return rows

    def record(self) -> dict[str, Any]:
        """Return a description of the rows read so far, as plain data."""
        return {
            "text_sha256": self.hash.hexdigest(),
            "n_rows": self.n_rows,
            "text_config": None if self.are_rows else self.config.model_dump(mode="json"),
            "balance": self.balance.record(self.lm.vocabulary) if self.balance else None,
        }

    def _rows_as_they_stand(self) -> Iterator[TokenRows]:
        """Yield blocks of the given rows, with the positions that may count."""
        whole = self._given
        for start in range(0, len(whole.tokens), self.block_rows):
            block = slice(start, start + self.block_rows)
            if isinstance(self.text, TokenRows):
                rows = self.text[block].to("cpu")
                yield rows._replace(tokens=rows.tokens.long())
            else:
                mask = None if whole.mask is None else whole.mask[block].cpu()
                tokens, length, _ = aligned(Ids(whole.tokens[block].cpu(), mask), self.pad)
                rows = TokenRows(tokens, self._countable(tokens), length, ends_text=False)
                yield rows if length is None else rows._replace(keep=rows.keep & rows.holds_token)

    def _rows_of_text(self) -> Iterator[TokenRows]:
        """Yield blocks of rows cut from documents, with the positions that may count."""
        self._cutter = RowCutter(self._documents(), self.config, self.n_ctx, self.special, self._start)
        rows = iter(self._cutter)
        while block := self._enough(rows):
            new = padded(block, self.pad)
            yield new._replace(keep=new.keep & self._countable(new.tokens))

    def _countable(self, tokens: Int[Tensor, "n_seq n_ctx"]) -> Bool[Tensor, "n_seq n_ctx"]:
        return countable(tokens, self.special_ids, self.config.exclude_positions) & ~in_template(tokens, self.template)

    def _enough(self, rows: Iterator[Row]) -> list[Row]:
        """Return the next block of rows. It has only the rows needed for n_tokens if all their new tokens count."""
        block: list[Row] = []
        n_new = 0
        for row in itertools.islice(rows, self.block_rows):
            block.append(row)
            n_new += len(row.ids) - row.start
            if self.n_tokens is not None and self.n_kept + n_new >= self.n_tokens:
                break
        return block

    def _documents(self) -> Iterator[Piece]:
        """Yield documents as token ids."""
        pieces = read_pieces(self.text, self.config)
        start = None if self._start is None else self._start.mark
        if self.config.token_column is not None:
            return without_leading(self.special.bos, self._checked(pieces, start))
        return without_leading(self.special.bos, encode(self.lm.text_tokenizer, pieces, start=start))

    def _checked(self, pieces: Iterator[Piece], start: Mark | None) -> Iterator[Piece]:
        """Yield the token ids of documents. Raise TextError for ids that the model does not have."""
        source = SourceHash()
        for ids, first, _ in pieces if start is None else source.skip(pieces, start):
            mark = source.begin()
            if ids and (min(ids) < 0 or max(ids) >= self.lm.d_vocab):
                raise TextError(
                    f"document {source.document} has token ids from {min(ids)} to {max(ids)}; {self.lm.name} has ids 0 to "
                    f"{self.lm.d_vocab - 1}; was it tokenised for another model?"
                )
            source.add(ids)
            yield Piece(ids, first, mark)


def _with_default_n_ctx(lm: Tokenizer, config: TextConfig) -> TextConfig:
    """Return the settings with n_ctx = DEFAULT_N_CTX if n_ctx is not set and the model's context is longer."""
    if config.n_ctx is not None or lm.n_ctx <= DEFAULT_N_CTX:
        return config
    log.info("rows have %s tokens; %s reads up to %s: set n_ctx= for more", f"{DEFAULT_N_CTX:,}", lm.name, f"{lm.n_ctx:,}")
    return config.replace(n_ctx=DEFAULT_N_CTX)


def _text_n_ctx(lm: Tokenizer, config: TextConfig) -> int:
    """Return the length of rows cut from text. Raise ConfigError if the model cannot read it or min_context fills it."""
    n_ctx = lm.n_ctx if config.n_ctx is None else config.n_ctx
    if not 2 <= n_ctx <= lm.n_ctx:
        raise ConfigError(f"n_ctx = {n_ctx}; {lm.name} reads rows of 2 to {lm.n_ctx} tokens")
    most = n_ctx - 1 - (config.bos != "none")
    if config.min_context > most:
        raise ConfigError(
            f"min_context = {config.min_context} leaves no room for new tokens; it may be at most {most} for n_ctx = {n_ctx}"
        )
    return n_ctx


def _rows_n_ctx(lm: Tokenizer, ids: Ids, config: TextConfig) -> int:
    """Return the length of given rows. Raise ShapeError if the model cannot read them, ConfigError if `config` cuts rows."""
    lm.check_ids(ids)
    n_ctx = ids.tokens.shape[1]
    if config.pack or config.min_context or config.truncate or (config.n_ctx is not None and config.n_ctx < n_ctx):
        raise ConfigError(
            f"token rows of {n_ctx} are used unchanged: pack, min_context, truncate and a smaller n_ctx apply only to text"
        )
    return n_ctx


def _special_tokens(lm: Tokenizer, config: TextConfig) -> SpecialTokens:
    """Return the special ids that `config` needs. Raise ConfigError if the tokenizer lacks one."""
    if config.bos != "none" and lm.bos_id is None:
        raise ConfigError(f"the tokenizer of {lm.name} has no BOS token; set bos='none'")
    separator = lm.bos_id if config.separator == "bos" else lm.eos_id
    if config.pack and separator is None:
        raise ConfigError(f"the tokenizer of {lm.name} has no {config.separator.upper()} token to put between packed documents")
    return SpecialTokens(lm.bos_id if config.bos != "none" else None, separator)


def _cut_off(rows: TokenRows, candidates: TokenRows, n_tokens: int) -> tuple[TokenRows, TokenRows]:
    """Cut the rows, and the candidates, after the n_tokens-th counted position."""
    running = rows.keep.flatten().cumsum(0).reshape(rows.keep.shape)
    keep = rows.keep & (running <= n_tokens)
    n_rows = int(keep.any(1).nonzero().max()) + 1
    considered = candidates.keep & (keep | (running < n_tokens))
    return rows._replace(keep=keep)[:n_rows], rows._replace(keep=considered)[:n_rows]
