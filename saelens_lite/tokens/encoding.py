"""From text to token ids; a long document a stretch at a time, with the tokens it would have as a whole.

A stretch may end only where the tokens before it do not depend on the text behind it. That is tried out: the characters
around a place are tokenised with and without those that follow, and a place will do when the first tokens agree. The next
stretch is then tokenised behind the end of the last one, whose tokens are dropped again; so nothing is assumed about the
tokenizer but that it looks no further than CONTEXT characters.
"""

import itertools
import logging
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from saelens_lite.tokens.sources import Piece

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STRETCH = 1 << 16  # characters tokenised as one text
CONTEXT = 256  # characters on each side that decide how a place is tokenised
BATCH = 8  # stretches, or as much text in shorter documents, that are tokenised in one call
log = logging.getLogger(__name__)


class _Span(NamedTuple):
    """Text to tokenise; its first `n_context` tokens belong to the stretch before it."""

    text: str
    n_context: int
    first: bool


def encode(
    tokenizer: "PreTrainedTokenizerBase", pieces: Iterable[Piece], *, stretch: int = STRETCH, context: int = CONTEXT
) -> Iterator[Piece]:
    """Yield pieces of token ids for pieces of text; the documents are the same, their stretches are cut anew."""
    for batch in _batches(_spans(tokenizer, pieces, stretch, context), BATCH * stretch):
        for span, ids in zip(batch, _ids(tokenizer, [span.text for span in batch]), strict=True):
            yield Piece(ids[span.n_context :], span.first)


def without_leading(bos: int | None, pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Leave out the BOS tokens at the head of each document, which rows add themselves where they are asked for."""
    at_head = True
    for ids, first in pieces:
        at_head = at_head or first
        rest = after_bos(bos, ids) if at_head else ids
        at_head = at_head and not rest
        yield Piece(rest, first)


def after_bos(bos: int | None, ids: list[int]) -> list[int]:
    """Return what follows the BOS tokens at the head of some ids."""
    return ids[next((n for n, i in enumerate(ids) if i != bos), len(ids)) :]


def _ids(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, verbose=False, return_attention_mask=False)["input_ids"]


def _batches(spans: Iterable[_Span], n_chars: int, n_spans: int = 64) -> Iterator[list[_Span]]:
    """Yield lists of spans that hold about n_chars characters, and never more than n_spans of them."""
    batch: list[_Span] = []
    size = 0
    for span in spans:
        batch.append(span)
        size += len(span.text)
        if size >= n_chars or len(batch) == n_spans:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _spans(tokenizer: "PreTrainedTokenizerBase", pieces: Iterable[Piece], stretch: int, context: int) -> Iterator[_Span]:
    """Yield documents as spans of at most about `stretch` characters."""
    text = ""  # of the current document, not yet in a span
    head, n_head, first = "", 0, True  # the end of its last span, and how many tokens that is
    for piece in pieces:
        if piece.first:
            if text:
                yield _Span(head + text, n_head, first)
            text, head, n_head, first = "", "", 0, True
        for start in range(0, len(piece.content), stretch):
            text += piece.content[start : start + stretch]
            while len(text) >= stretch + context:
                cut, n_next = _border(tokenizer, text, stretch, context)
                yield _Span(head + text[:cut], n_head, first)
                head, n_head, first = text[cut - context : cut] if n_next else "", n_next, False
                text = text[cut:]
    if text:
        yield _Span(head + text, n_head, first)


def _border(tokenizer: "PreTrainedTokenizerBase", text: str, stretch: int, context: int) -> tuple[int, int]:
    """Return a place at or before `stretch` where the text may be cut, and the number of tokens in the `context` before it."""
    for cut in _candidates(text, stretch // 2, stretch):
        before = text[cut - context : cut]
        alone, both = _ids(tokenizer, [before, before + text[cut : cut + context]])
        if both[: len(alone)] == alone:
            return cut, len(alone)
    log.warning("%d characters without a sure border between tokens; they are cut behind %r", stretch, text[:stretch][-20:])
    return stretch, 0


def _candidates(text: str, low: int, high: int) -> Iterator[int]:
    """Return places between low and high to try, the last first: ends of lines, then ends of words, then any."""
    places = range(high, low, -1)
    word_ends = (i for i in places if text[i].isspace() and not text[i - 1].isspace())
    line_ends = (i for i in places if text[i] == "\n" and not text[i - 1].isspace())
    return itertools.chain(itertools.islice(line_ends, 16), itertools.islice(word_ends, 16), places[:64])
