"""From text to token rows: what the model reads, and which positions count.

inputs.py decides whether an input is text or token ids. sources.py reads documents piece by piece, encoding.py makes token
ids of them, rows.py cuts or packs these into rows, balance.py thins out what is too frequent, and blocks.py strings all of it
together.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saelens_lite.arrays import described
from saelens_lite.config import TextConfig
from saelens_lite.errors import ConfigError, TextError
from saelens_lite.tokens.blocks import DEFAULT_N_CTX, RowBlocks
from saelens_lite.tokens.encoding import after_bos, encode
from saelens_lite.tokens.inputs import Given, token_ids
from saelens_lite.tokens.python_docs import Document, PythonDocs, is_held_out, python_docs
from saelens_lite.tokens.rows import Row, RowHash, RowRecord, TokenRows, joined, padded, text_hash
from saelens_lite.tokens.sources import (
    Piece,
    Text,
    check_file,
    files_of,
    hub_name,
    name_of,
    named_text,
    read_pieces,
    source_name,
)

if TYPE_CHECKING:
    from saelens_lite.model import LanguageModel

__all__ = [
    "DEFAULT_N_CTX",
    "Document",
    "Given",
    "PythonDocs",
    "RowBlocks",
    "RowHash",
    "RowRecord",
    "Text",
    "TokenRows",
    "check_file",
    "files_of",
    "hub_name",
    "is_held_out",
    "name_of",
    "named_text",
    "prompt_rows",
    "python_docs",
    "source_name",
    "text_config_of",
    "text_hash",
    "token_ids",
    "token_rows",
    "with_mask",
]


def prompt_rows(lm: "LanguageModel", text: Any, *, n_ctx: int | None = None, prepend_bos: bool | None = None) -> TokenRows:
    """Return one row for each text, with padding on the right, cut at n_ctx.

    n_ctx: Length of the longest row; default: the model's context.
    prepend_bos: Whether texts get a BOS token in front, of which none gets a second one; default: where the tokenizer has one.

    Raises:
        TextError: no text; a text is empty or has no tokens; the model has no tokenizer.
        ConfigError: prepend_bos is true and the tokenizer has no BOS token.
    """
    tokenizer = lm.text_tokenizer
    if isinstance(text, str | Path | Document):
        text = [text]
    if isinstance(text, Mapping | bytes | set | frozenset) or not isinstance(text, Iterable):
        raise TextError(f"expected text or token ids; found {described(text)}")
    if prepend_bos and lm.bos_id is None:
        raise ConfigError(f"the tokenizer of {lm.name} has no BOS token; leave out prepend_bos, or say False")
    bos = lm.bos_id if prepend_bos in (None, True) else None
    head = [] if bos is None else [bos]
    rows, n_read = [], []
    for ids, first in encode(tokenizer, _not_empty(list(text))):
        if first:
            rows.append(Row([*head], len(head)))
            n_read.append(0)
        n_read[-1] += len(ids)
        new = after_bos(bos, ids) if len(rows[-1].ids) == len(head) else ids
        rows[-1].ids.extend(new[: (n_ctx or lm.n_ctx) - len(rows[-1].ids)])
    if not rows:
        raise TextError("empty text: give at least one text that has a character")
    if 0 in n_read:
        raise TextError(f"text {n_read.index(0)} of {len(rows)} has no tokens: the tokenizer of {lm.name} makes nothing of it")
    found = padded(rows, lm.pad_id)
    return found._replace(keep=found.keep & lm.countable(found.tokens))


def _not_empty(texts: list[Any]) -> Iterator[Piece]:
    """Pass on the pieces of texts, each of which has to have a character."""
    number = -1
    for piece in read_pieces(texts, TextConfig()):
        number += piece.first
        if piece.first and not piece.content:
            raise TextError(f"empty text: text {number} has no characters")
        yield piece


def with_mask(text: Any, attention_mask: Any = None) -> Any:
    """Return token ids together with their attention mask, as a tokenizer gives them; text as it is.

    Raises:
        ShapeError: the mask does not fit the token ids, or there are none.
    """
    if attention_mask is None:
        return text
    found = token_ids(text, attention_mask)
    return {"input_ids": found.tokens, "attention_mask": found.mask}


def token_rows(
    lm: "LanguageModel",
    text: Text,
    *,
    n_ctx: int | None = None,
    n_tokens: int | None = None,
    prepend_bos: bool | None = None,
    text_config: TextConfig | None = None,
) -> TokenRows:
    """Return token rows of documents, all at once; RowBlocks gives the same rows block by block.

    By default each document is cut into rows of n_ctx tokens, every row beginning with BOS, its last one padded on the
    right; n_ctx is the model's context, but no more than 1,024. A position counts (`keep`) when it holds neither a special
    token nor padding and is not position 0, whose activation is an outlier in GPT-2 and its kin. Reading stops once
    `n_tokens` positions count. `text_config` has more settings, of which `n_ctx` and `prepend_bos` are the most used.

    Raises:
        TextError: nothing is left to read, or a source cannot be read.
        ConfigError: settings that do not fit the model, n_ctx larger than its context for one.
    """
    blocks = RowBlocks(lm, text, text_config_of(text_config, n_ctx, prepend_bos), n_tokens=n_tokens)
    return joined(list(blocks), blocks.pad)


def text_config_of(text_config: TextConfig | None, n_ctx: int | None, prepend_bos: bool | None) -> TextConfig:
    """Return the settings with n_ctx and bos as the two shorthands say, where they say anything."""
    changes = {} if n_ctx is None else {"n_ctx": n_ctx}
    if prepend_bos is not None:
        changes["bos"] = "row" if prepend_bos else "none"
    return (text_config or TextConfig()).replace(**changes)
