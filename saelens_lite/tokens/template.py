"""Tokens that a chat template puts around messages: turn markers, role names and the newlines after them.

The template is rendered with messages that are known, so that its tokens are those between them. They are found again in other
rows as the same sequences of ids. A sequence is used only if it has a special token or two tokens that are not whitespace: a
newline or a single word would match ordinary text too. A sequence that the border of a row cuts is not recognised unless the
part in the row begins with a special token and ends before the next one.
"""

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from saelens_lite.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WORDS = ("qzAone", "qzBtwo", "qzCthree", "qzDfour", "qzEfive")
EDGES = ("", " ", "\n", ".", "(")  # characters of a message that may share a token with the template


def has_template(tokenizer: "PreTrainedTokenizerBase | None") -> bool:
    """Return whether a tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def template_sequences(tokenizer: "PreTrainedTokenizerBase") -> list[tuple[int, ...]]:
    """Return the sequences of token ids that the chat template puts before, between and after messages, longest first.

    Raises:
        ConfigError: the template cannot be rendered, or no sequence can be told from ordinary text; a slow tokenizer.
    """
    if not tokenizer.is_fast:
        raise ConfigError("exclude_template needs a fast tokenizer, which gives the position of each token")
    markers = set(tokenizer.all_special_ids) | {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    whole = set()
    for roles, prompts in (
        (("user", "assistant") * 2, False),
        (("user",), True),
        (("system", "user", "assistant", "user"), True),
    ):
        try:
            bare = _pieces(_rendered(tokenizer, roles, WORDS, prompts), WORDS[: len(roles)])
        except ConfigError:
            if roles[0] == "system":
                continue  # some templates refuse system messages
            raise
        for before, after in itertools.product(EDGES, EDGES):
            contents = [before + word + after for word in WORDS[: len(roles)]]
            text = _rendered(tokenizer, roles, contents, prompts)
            for shown in (contents, [content.strip() for content in contents]):
                if text == _joined(bare, shown):
                    whole.update(_between(tokenizer, text, bare, shown))
                    break
    parts = {part for ids in whole for part in _parts(ids, markers)}
    used = [ids for ids in whole | parts if markers & set(ids) or sum(bool(tokenizer.decode([i]).strip()) for i in ids) > 1]
    if not used:
        raise ConfigError("the chat template puts no tokens around messages that can be told from ordinary text")
    return sorted(used, key=lambda ids: (-len(ids), ids))


def in_template(tokens: Int[Tensor, "n_seq n_ctx"], sequences: list[tuple[int, ...]]) -> Bool[Tensor, "n_seq n_ctx"]:
    """Return a mask of the positions that are part of one of the sequences."""
    inside = torch.zeros_like(tokens, dtype=torch.bool)
    for ids in sequences:
        n = max(0, tokens.shape[1] - len(ids) + 1)
        begins = torch.ones_like(tokens[:, :n], dtype=torch.bool)
        for offset, token in enumerate(ids):
            begins &= tokens[:, offset : offset + n] == token
        for offset in range(len(ids) if begins.any() else 0):
            inside[:, offset : offset + n] |= begins
    return inside


def _rendered(tokenizer: Any, roles: tuple[str, ...], contents: Any, prompts: bool) -> str:
    """Return a conversation as the template writes it; with `prompts`, the beginning of the next answer too."""
    from jinja2 import TemplateError

    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompts)
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"the chat template cannot be rendered: {error}") from None


def _pieces(text: str, words: tuple[str, ...]) -> list[str]:
    """Return the text around the words. Raise ConfigError unless each occurs once, in order."""
    pieces = []
    for word in words:
        before, at, text = text.partition(word)
        if not at or word in text:
            raise ConfigError("the chat template does not write each message once, in order; leave out exclude_template")
        pieces.append(before)
    return [*pieces, text]


def _joined(pieces: list[str], contents: list[str]) -> str:
    return "".join(part for pair in itertools.zip_longest(pieces, contents, fillvalue="") for part in pair)


def _between(tokenizer: Any, text: str, pieces: list[str], contents: list[str]) -> Iterator[tuple[int, ...]]:
    """Yield the token ids of each piece around messages. A token that a piece shares with a message belongs to the message."""
    read = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    begin = 0
    for piece, content in itertools.zip_longest(pieces, contents, fillvalue=""):
        end = begin + len(piece)
        spans = zip(read["input_ids"], read["offset_mapping"], strict=True)
        if ids := tuple(i for i, (start, stop) in spans if start >= begin and begin < stop <= end):
            yield ids
        begin = end + len(content)


def _parts(ids: tuple[int, ...], markers: set[int]) -> Iterator[tuple[int, ...]]:
    """Yield the parts of a sequence that begin with a marker and end before the next one."""
    starts = [n for n, i in enumerate(ids) if i in markers]
    yield from (ids[start:stop] for start, stop in itertools.pairwise([*starts, len(ids)]))
