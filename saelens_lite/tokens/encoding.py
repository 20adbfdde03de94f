"""Tokenise text. A long document is tokenised in stretches and gets the same tokens as in one call.

A stretch may end only where the tokens before the end do not depend on the text after it. A test finds such places: tokenise
the characters around a place with and without the following text; the place is good if the first tokens agree. The next
stretch is tokenised together with the end of the last one, whose tokens are then dropped. The only assumption about the
tokenizer is that it looks at most CONTEXT characters ahead or back.
"""

import itertools
import logging
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from saelens_lite.tokens.places import Mark, SourceHash
from saelens_lite.tokens.sources import Piece

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STRETCH = 1 << 16  # characters per tokenised text
CONTEXT = 256  # characters on each side that may affect the tokens at a place
BATCH = 8  # stretches (or as much text in short documents) per call of the tokenizer
log = logging.getLogger(__name__)


class _Span(NamedTuple):
    """A text to tokenise. Its first `n_context` tokens belong to the stretch before it."""

    text: str
    n_context: int
    first: bool
    mark: Mark


def encode(
    tokenizer: "PreTrainedTokenizerBase",
    pieces: Iterable[Piece],
    *,
    stretch: int = STRETCH,
    context: int = CONTEXT,
    start: Mark | None = None,
) -> Iterator[Piece]:
    """Yield pieces of token ids for pieces of text. Documents stay the same; their pieces are cut anew.

    start: begin at this mark of an earlier piece. The text before it is not tokenised.

    Raises:
        SourceChangedError: the text before `start` is not what it was.
    """
    for batch in _batches(_spans(tokenizer, pieces, stretch, context, start), BATCH * stretch):
        for span, ids in zip(batch, _ids(tokenizer, [span.text for span in batch]), strict=True):
            yield Piece(ids[span.n_context :], span.first, span.mark)


def without_leading(bos: int | None, pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Drop the BOS tokens at the start of each document. Rows add BOS themselves if needed."""
    at_head = False
    for ids, first, mark in pieces:
        goes_on = at_head and not first  # nothing but BOS so far: reading cannot start here
        at_head = at_head or first
        rest = after_bos(bos, ids) if at_head else ids
        at_head = at_head and not rest
        yield Piece(rest, first, None if goes_on else mark)


def after_bos(bos: int | None, ids: list[int]) -> list[int]:
    """Return the ids after any leading BOS tokens."""
    return ids[next((n for n, i in enumerate(ids) if i != bos), len(ids)) :]


def _ids(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, verbose=False, return_attention_mask=False)["input_ids"]


def _batches(spans: Iterable[_Span], n_chars: int, n_spans: int = 64) -> Iterator[list[_Span]]:
    """Yield lists of at most n_spans spans with about n_chars characters."""
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


def _spans(
    tokenizer: "PreTrainedTokenizerBase", pieces: Iterable[Piece], stretch: int, context: int, start: Mark | None = None
) -> Iterator[_Span]:
    """Yield documents as spans of about `stretch` characters at most."""
    source = SourceHash()
    text = ""  # part of the current document that is not in a span yet
    head, n_head, first = "", 0, True  # the end of its last span, and its number of tokens
    mark = start
    if start is not None:
        pieces, head, n_head, first = source.skip(iter(pieces), start), start.head, start.n_head, False
    for piece in pieces:
        if piece.first:
            if text:
                yield _Span(head + text, n_head, first, mark)
                source.add(text)
            text, head, n_head, first, mark = "", "", 0, True, source.begin()
        for begin in range(0, len(piece.content), stretch):
            text += piece.content[begin : begin + stretch]
            while len(text) >= stretch + context:
                cut, n_next = _border(tokenizer, text, stretch, context)
                yield _Span(head + text[:cut], n_head, first, mark)
                source.add(text[:cut])
                head, n_head, first = text[cut - context : cut] if n_next else "", n_next, False
                text, mark = text[cut:], source.mark(head, n_head)
    if text:
        yield _Span(head + text, n_head, first, mark)


def _border(tokenizer: "PreTrainedTokenizerBase", text: str, stretch: int, context: int) -> tuple[int, int]:
    """Return a place up to `stretch` where the text may be cut, and the number of tokens in the `context` before it."""
    for cut in _candidates(text, stretch // 2, stretch):
        before = text[cut - context : cut]
        alone, both = _ids(tokenizer, [before, before + text[cut : cut + context]])
        if both[: len(alone)] == alone:
            return cut, len(alone)
    log.warning("%d characters have no safe border between tokens; the text is cut after %r", stretch, text[:stretch][-20:])
    return stretch, 0


def _candidates(text: str, low: int, high: int) -> Iterator[int]:
    """Yield the places between low and high to try, last first: ends of lines, then ends of words, then any place."""
    places = range(high, low, -1)
    word_ends = (i for i in places if text[i].isspace() and not text[i - 1].isspace())
    line_ends = (i for i in places if text[i] == "\n" and not text[i - 1].isspace())
    return itertools.chain(itertools.islice(line_ends, 16), itertools.islice(word_ends, 16), places[:64])
