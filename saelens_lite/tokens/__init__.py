"""Read text: turn documents into token rows, and choose the positions that count.

A text is a list of strings, a `Path` to a .txt, .md, .csv, .jsonl or .parquet file, "hf:org/name" (a dataset on the Hugging
Face Hub), token ids, or one of the two parts of the documentation that comes with every Python: "python-docs:train" and
"python-docs:held-out". The text is read as a stream, and each row holds a stretch of one document.

`sl.TextConfig` changes this. Its settings include the columns of a dataset, `pack` (one row holds several documents),
`min_context` (rows overlap) and `max_token_share` (some of the most frequent tokens are left out). `saelens-lite capture
--help` explains every setting.

```python
text_config = sl.TextConfig(n_ctx=128, max_token_share=0.01)
```

Position 0, BOS, the other special tokens and padding do not count: they are not captured, trained on or evaluated. In GPT-2
the norm at position 0 is so large that it would dominate every variance. `exclude_template` also leaves out the ordinary tokens
that a chat template puts around messages, such as role names: many latents that look specific to a chat model fire only there.
A cache records it, and later evaluations and edits leave out the same positions.

inputs.py tells text from token ids. sources.py reads documents piece by piece, encoding.py turns them into token ids, rows.py
cuts or packs these into rows, template.py recognises a chat template in them, balance.py leaves out surplus tokens, and
blocks.py combines all five. places.py describes where
an interrupted reading can start again.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from saelens_lite.arrays import described
from saelens_lite.config import TextConfig
from saelens_lite.errors import ConfigError, TextError
from saelens_lite.tokens.blocks import DEFAULT_N_CTX, RowBlocks
from saelens_lite.tokens.encoding import after_bos, encode
from saelens_lite.tokens.inputs import Given, token_ids
from saelens_lite.tokens.places import Place
from saelens_lite.tokens.python_docs import Document, PythonDocs, is_held_out, python_docs
from saelens_lite.tokens.rows import Row, RowHash, RowRecord, TextHash, TokenRows, joined, padded, text_hash
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
from saelens_lite.tokens.tokenizer import Tokenizer

__all__ = [
    "DEFAULT_N_CTX",
    "Document",
    "Given",
    "Place",
    "PythonDocs",
    "RowBlocks",
    "RowHash",
    "RowRecord",
    "Text",
    "TextHash",
    "TokenRows",
    "Tokenizer",
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


def prompt_rows(lm: Tokenizer, text: Any, *, n_ctx: int | None = None, prepend_bos: bool | None = None) -> TokenRows:
    """Return one row per text, padded on the right and cut at n_ctx.

    n_ctx: length of the longest row; default: the model's context.
    prepend_bos: put BOS in front of texts that do not begin with it; default: true if the tokenizer has a BOS token.

    Raises:
        TextError: there is no text, a text is empty or has no tokens, or the model has no tokenizer.
        ConfigError: prepend_bos is true and the tokenizer has no BOS token.
    """
    tokenizer = lm.text_tokenizer
    if isinstance(text, str | Path | Document):
        text = [text]
    if isinstance(text, Mapping | bytes | set | frozenset) or not isinstance(text, Iterable):
        raise TextError(f"expected text or token ids; found {described(text)}")
    if prepend_bos and lm.bos_id is None:
        raise ConfigError(f"the tokenizer of {lm.name} has no BOS token; leave out prepend_bos, or set it to False")
    bos = lm.bos_id if prepend_bos in (None, True) else None
    head = [] if bos is None else [bos]
    rows, n_read = [], []
    for ids, first, _ in encode(tokenizer, _not_empty(list(text))):
        if first:
            rows.append(Row([*head], len(head), len(rows)))
            n_read.append(0)
        n_read[-1] += len(ids)
        new = after_bos(bos, ids) if len(rows[-1].ids) == len(head) else ids
        rows[-1].ids.extend(new[: (n_ctx or lm.n_ctx) - len(rows[-1].ids)])
    if not rows:
        raise TextError("empty text: give at least one text with a character")
    if 0 in n_read:
        raise TextError(f"text {n_read.index(0)} of {len(rows)} has no tokens: the tokenizer of {lm.name} returns none for it")
    padded_rows = padded(rows, lm.pad_id)
    return padded_rows._replace(keep=padded_rows.keep & lm.countable(padded_rows.tokens))


def _not_empty(texts: list[Any]) -> Iterator[Piece]:
    """Yield the pieces of texts. Raise TextError for an empty text."""
    number = -1
    for piece in read_pieces(texts, TextConfig()):
        number += piece.first
        if piece.first and not piece.content:
            raise TextError(f"empty text: text {number} has no characters")
        yield piece


def with_mask(text: Any, attention_mask: Any = None) -> Any:
    """Return token ids with their attention mask, in the form of a tokenizer's output. Return text unchanged.

    Raises:
        ShapeError: the mask does not fit the token ids, or was given with text.
    """
    if attention_mask is None:
        return text
    ids = token_ids(text, attention_mask)
    return {"input_ids": ids.tokens, "attention_mask": ids.mask}


def token_rows(
    lm: Tokenizer,
    text: Text,
    *,
    n_ctx: int | None = None,
    n_tokens: int | None = None,
    prepend_bos: bool | None = None,
    text_config: TextConfig | None = None,
) -> TokenRows:
    """Return the token rows of documents, all at once. RowBlocks gives the same rows block by block.

    By default each document is cut into rows of n_ctx tokens. Every row begins with BOS, and the last row of a document is
    padded on the right. n_ctx defaults to the model's context, at most 1,024. A position counts (`keep`) unless it holds a
    special token or padding, or is position 0, whose activation is an outlier in GPT-2 and similar models. Reading stops when
    `n_tokens` positions count. `n_ctx` and `prepend_bos` are shorthands for settings of `text_config`.

    Raises:
        TextError: no position counts, or a source cannot be read.
        ConfigError: the settings do not fit the model, such as an n_ctx larger than its context.
    """
    blocks = RowBlocks(lm, text, text_config_of(text_config, n_ctx, prepend_bos), n_tokens=n_tokens)
    return joined(list(blocks), blocks.pad)


def text_config_of(text_config: TextConfig | None, n_ctx: int | None, prepend_bos: bool | None) -> TextConfig:
    """Return the settings with the two shorthands applied, if given."""
    changes = {} if n_ctx is None else {"n_ctx": n_ctx}
    if prepend_bos is not None:
        changes["bos"] = "row" if prepend_bos else "none"
    return (text_config or TextConfig()).replace(**changes)
