"""Comparison of two tokenizers: whether token ids of one mean the same to the other."""

import json
from typing import Any

from saelens_lite.tokens.tokenizer import Tokenizer

IN_FRONT = ("normalizer", "pre_tokenizer", "model", "decoder")  # parts of a tokenizer that decide on the ids of plain text


def difference_of_ids(one: Tokenizer, other: Tokenizer) -> str | None:
    """Return in words how the token ids of two tokenizers differ; None if the same ids stand for the same text.

    Tokens that only one of them has, such as those that mark turns of a chat, do not count as a difference.
    """
    if one.tokenizer_hash == other.tokenizer_hash:
        return None
    if one.tokenizer is None or other.tokenizer is None:
        return f"{(one if one.tokenizer is None else other).name} has no tokenizer"
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
    parts, of_other = _parts(one), _parts(other)
    different = [name for name in IN_FRONT if parts.get(name) != of_other.get(name)]
    return f"their tokenizers differ in {', '.join(different)}" if different else None


def _parts(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the parts of a fast tokenizer that decide on ids; the class of one written in Python."""
    backend = getattr(tokenizer.tokenizer, "backend_tokenizer", None)
    if backend is None:
        return {"model": type(tokenizer.tokenizer).__name__}
    return json.loads(backend.to_str())
