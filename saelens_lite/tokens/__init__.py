"""From text to token rows: what the model reads, and which positions count.

sources.py reads documents piece by piece, encoding.py makes token ids of them, rows.py cuts or packs these into rows,
balance.py thins out what is too frequent, and blocks.py strings all of it together.
"""

from typing import TYPE_CHECKING

from saelens_lite.config import TextConfig
from saelens_lite.tokens.blocks import RowBlocks
from saelens_lite.tokens.python_docs import Document, PythonDocs, is_held_out, python_docs
from saelens_lite.tokens.rows import TokenRows, joined, text_hash
from saelens_lite.tokens.sources import Text, check_file, hub_name, name_of, named_text, source_name

if TYPE_CHECKING:
    from saelens_lite.model import LanguageModel

__all__ = [
    "Document",
    "PythonDocs",
    "RowBlocks",
    "Text",
    "TokenRows",
    "check_file",
    "hub_name",
    "is_held_out",
    "name_of",
    "named_text",
    "python_docs",
    "source_name",
    "text_config_of",
    "text_hash",
    "token_rows",
]


def token_rows(
    lm: "LanguageModel",
    text: Text,
    *,
    n_ctx: int | None = None,
    n_tokens: int | None = None,
    prepend_bos: bool | None = None,
    text_config: TextConfig | None = None,
) -> TokenRows:
    """Token rows of documents, all at once; RowBlocks gives the same rows block by block.

    By default each document is cut into rows of n_ctx tokens, every row beginning with BOS, its last one padded on the
    right. A position counts (`keep`) when it holds neither a special token nor padding and is not position 0, whose
    activation is an outlier in GPT-2 and its kin. Reading stops once `n_tokens` positions count. `text_config` has more
    settings, of which `n_ctx` and `prepend_bos` are the most used.

    Raises:
        TextError: nothing is left to read, or a source cannot be read.
        ConfigError: settings that do not fit the model, n_ctx larger than its context for one.
    """
    blocks = RowBlocks(lm, text, text_config_of(text_config, n_ctx, prepend_bos), n_tokens=n_tokens)
    return joined(list(blocks), blocks.pad)


def text_config_of(text_config: TextConfig | None, n_ctx: int | None, prepend_bos: bool | None) -> TextConfig:
    """The settings with n_ctx and bos as the two shorthands say, where they say anything."""
    changes = {} if n_ctx is None else {"n_ctx": n_ctx}
    if prepend_bos is not None:
        changes["bos"] = "row" if prepend_bos else "none"
    return (text_config or TextConfig()).replace(**changes)
