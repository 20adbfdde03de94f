"""From text to token rows: what the model reads, and which positions count."""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from saelens_lite.errors import ConfigError, TextError
from saelens_lite.tokens.python_docs import Document, is_held_out, python_docs

if TYPE_CHECKING:
    from saelens_lite.model import LanguageModel

__all__ = ["Document", "TokenRows", "is_held_out", "python_docs", "read_texts", "text_hash", "token_rows"]

Text = str | Path | Iterable[str | Document]


class TokenRows(NamedTuple):
    """Token ids, one row a stretch of one document, and the positions that count (neither BOS nor padding)."""

    tokens: Int[Tensor, "n_seq n_ctx"]
    keep: Bool[Tensor, "n_seq n_ctx"]

    @property
    def n_kept(self) -> int:
        """Number of positions that count."""
        return int(self.keep.sum())

    def __getitem__(self, rows: slice) -> "TokenRows":  # type: ignore[override]
        return type(self)(self.tokens[rows], self.keep[rows]) if isinstance(rows, slice) else tuple.__getitem__(self, rows)

    def take(self, rows: Tensor | slice) -> "TokenRows":
        """Some of the rows."""
        return type(self)(self.tokens[rows], self.keep[rows])


def read_texts(text: Text) -> Iterator[str]:
    """Documents from a string, a list of strings, or a file (.txt: the whole file; .jsonl: the key "text" of each line).

    Raises:
        TextError: the file is missing or empty, or a line has no text.
        ConfigError: a kind of file that is not read.
    """
    if isinstance(text, str | Document):
        yield text if isinstance(text, str) else text.text
    elif isinstance(text, Path):
        yield from _read_file(text)
    else:
        for item in text:
            yield item.text if isinstance(item, Document) else item


def _read_file(path: Path) -> Iterator[str]:
    if not path.is_file():
        raise TextError(f"no text file at {path}")
    if path.suffix == ".jsonl":
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    text = json.loads(line)["text"]
                except (ValueError, KeyError, TypeError):
                    text = None
                if not isinstance(text, str):
                    raise TextError(f"{path}, line {number}: expected a JSON object with a key 'text'")
                yield text
    elif path.suffix in (".txt", ".md", ""):
        try:
            yield path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise TextError(f"{path} is not UTF-8 text: {error}") from None
    else:
        raise ConfigError(f"{path}: cannot read {path.suffix} files; give .txt or .jsonl")


def token_rows(
    lm: "LanguageModel",
    text: Text,
    *,
    n_ctx: int | None = None,
    n_tokens: int | None = None,
    prepend_bos: bool = True,
    one_row_each: bool = False,
) -> TokenRows:
    """Token rows of documents: each document is cut into rows of n_ctx tokens, every row beginning with BOS.

    The last row of a document is padded on the right. A position counts (`keep`) when it holds neither BOS nor padding;
    without `prepend_bos`, position 0 does not count either, for its activation is an outlier in GPT-2 and its kin.
    Reading stops once `n_tokens` positions count; `one_row_each` keeps only the first row of each document.

    Raises:
        TextError: nothing is left to read.
        ConfigError: n_ctx is larger than the model's context or leaves no room for text.
    """
    n_ctx = lm.n_ctx if n_ctx is None else n_ctx
    if not 2 <= n_ctx <= lm.n_ctx:
        raise ConfigError(f"n_ctx = {n_ctx}; {lm.name} takes rows of 2 to {lm.n_ctx} tokens")
    if n_tokens is not None and n_tokens < 1:
        raise ConfigError(f"n_tokens = {n_tokens}; expected at least 1")
    if prepend_bos and lm.bos_id is None:
        raise ConfigError(f"the tokenizer of {lm.name} has no BOS token; say prepend_bos=False")
    body = n_ctx - 1 if prepend_bos else n_ctx
    pad = lm.bos_id if lm.bos_id is not None else 0
    rows: list[list[int]] = []
    n_kept = 0
    documents = (document for document in read_texts(text) if document)
    while batch := list(itertools.islice(documents, 64)):
        encoded = lm.tokenizer(batch, add_special_tokens=False, verbose=False, return_attention_mask=False)["input_ids"]
        for ids in encoded:
            for start in range(0, body if one_row_each else len(ids), body):
                row = ids[start : start + body]
                if row:
                    rows.append(row)
                    n_kept += len(row) - (not prepend_bos)
        if n_tokens is not None and n_kept >= n_tokens:
            break
    if not rows:
        raise TextError("no text: nothing was left after tokenising")
    length = max(len(row) for row in rows)
    tokens = torch.full((len(rows), length), pad)
    keep = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
        keep[i, : len(row)] = True
    if prepend_bos:
        tokens = torch.nn.functional.pad(tokens, (1, 0), value=lm.bos_id)
        keep = torch.nn.functional.pad(keep, (1, 0), value=False)
    else:
        keep[:, 0] = False
    if lm.bos_id is not None:
        keep &= tokens != lm.bos_id  # a separator written out in the text
    if not keep.any():
        raise TextError("no text: nothing was left after tokenising")
    if n_tokens is not None:  # stop inside the row where the count is reached
        keep &= (keep.flatten().cumsum(0) <= n_tokens).reshape(keep.shape)
        last = int(keep.any(1).nonzero().max()) + 1
        tokens, keep = tokens[:last], keep[:last]
    return TokenRows(tokens, keep)


def text_hash(rows: TokenRows) -> str:
    """SHA-256 over token ids and kept positions: what exactly was read."""
    digest = hashlib.sha256(str(tuple(rows.tokens.shape)).encode())
    digest.update(rows.tokens.to(torch.int32).numpy().tobytes())
    digest.update(rows.keep.numpy().tobytes())
    return digest.hexdigest()
