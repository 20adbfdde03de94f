"""Comparison of two tokenizers: whether token ids of one mean the same to the other."""

import json
import logging
from functools import cache
from typing import Any

from saelens_lite.tokens.tokenizer import Tokenizer

RULES = ("normalizer", "pre_tokenizer", "model", "decoder")  # parts of a fast tokenizer that decide on the ids of plain text
SAMPLE = (  # of words, names, numbers, code, spaces, scripts and characters of several bytes, for tokenizers without such parts
    "The old man didn't look at Mr. O'Neill's 3 ships; in 1984 he paid $12,345.67 (about 20 %).",
    "def area(r):\n    return 3.14159 * r ** 2\n\n\n\tx\t= {'key': [1, 22, 333]}\r\n",
    "  Two spaces,   three. ÄÖÜ é e\u0301 \ufb01 №5 — “quotes” … naïve CAFÉ\u00a0x",
    "Привет, мир! 你好,世界。 こんにちは 안녕하세요 नमस्ते 🙂",
)
log = logging.getLogger(__name__)


def difference_of_ids(one: Tokenizer, other: Tokenizer) -> str | None:
    """Return in words how the token ids of two tokenizers differ; None if the same ids stand for the same text.

    Tokens that only one of them has, such as those that mark turns of a chat, do not count as a difference. Of models without
    tokenizers nothing is known but the number of token ids. A warning says if two models begin texts with different tokens.
    """
    if one.tokenizer is None and other.tokenizer is None:
        sizes = f"{one.name} has {one.d_vocab:,} and {other.name} {other.d_vocab:,}"
        return (
            None if one.d_vocab == other.d_vocab else f"{sizes}, and neither has a tokenizer; load them with their tokenizers"
        )
    if one.tokenizer is None or other.tokenizer is None:
        return f"{(one if one.tokenizer is None else other).name} has no tokenizer"
    # The hash of a tokenizer written in Python does not cover its rules.
    are_equal = _backend(one) is not None and one.tokenizer_hash == other.tokenizer_hash
    if not are_equal and (difference := _of_vocabulary(one, other) or _of_rules(one, other)):
        return difference
    if one.bos_id != other.bos_id:
        _warn_of_bos(one.name, _named(one), other.name, _named(other))
    return None


def _of_vocabulary(one: Tokenizer, other: Tokenizer) -> str | None:
    """Return in words which token has two ids, or which id stands for two tokens."""
    own, others = one.tokenizer.get_vocab(), other.tokenizer.get_vocab()
    moved = sorted(text for text in own.keys() & others.keys() if own[text] != others[text])
    if moved:
        text = moved[0]
        return f"{text!r} is token {own[text]} of {one.name}, but {others[text]} of {other.name}"
    texts = {i: text for text, i in own.items()}
    clashes = sorted((i, text) for text, i in others.items() if texts.get(i, text) != text)
    if clashes:
        i, text = clashes[0]
        return f"token {i} is {texts[i]!r} in {one.name}, but {text!r} in {other.name}"
    return None


def _of_rules(one: Tokenizer, other: Tokenizer) -> str | None:
    """Return in words how two tokenizers differ in cutting plain text into tokens."""
    if _backend(one) is not None and _backend(other) is not None:
        parts, of_other = (json.loads(_backend(tokenizer).to_str()) for tokenizer in (one, other))
        different = [name for name in RULES if parts.get(name) != of_other.get(name)]
        return f"their tokenizers differ in {', '.join(different)}" if different else None
    for text in SAMPLE:
        if _ids(one, text) != _ids(other, text):
            return f"their tokenizers give different ids for {text[:40]!r}"
    return None


def _backend(tokenizer: Tokenizer) -> Any:
    """Return the inner part of a fast tokenizer; None for one written in Python."""
    return getattr(tokenizer.tokenizer, "backend_tokenizer", None)


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.text_tokenizer(text, add_special_tokens=False)["input_ids"]


def _named(tokenizer: Tokenizer) -> str:
    i = tokenizer.bos_id
    return "no token" if i is None else repr(tokenizer.text_tokenizer.convert_ids_to_tokens(i))


@cache
def _warn_of_bos(name: str, bos: str, other: str, other_bos: str) -> None:
    """Log once that texts begin with the first model's BOS token, which is not the other's."""
    log.warning("texts begin with %s, as for %s; for %s they would begin with %s", bos, name, other, other_bos)
