"""Token ids as readable text.

The text of a token is the string that it adds inside a text: " he" with its space, "ing" for WordPiece's "##ing". Many tokens
of byte-level tokenizers, and the byte tokens of SentencePiece, are parts of a character. In a row, the token that completes a
character shows it, and the tokens before it show nothing. Alone, such a token shows its bytes, ‹e8›.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import groupby
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PART = "‥"  # views show this for a token whose character is completed by a later token
REACH = 3  # a character has up to four bytes, so up to three tokens on each side affect the text of a token
END_OF_WORD = "</w>"  # OpenAI-GPT's tokenizer marks where words end, not where they begin
UNKNOWN_BYTE = "\ufffd"
BYTE_NAME = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # of SentencePiece's tokens for single bytes
OLD_BYTES = re.compile(r"(?:\\x[0-9a-f]{2})+")


class Vocabulary(list[str]):
    """The text of every token id alone. `parts` has the bytes of the tokens that are parts of characters."""

    def __init__(self, texts: Iterable[str] = (), parts: Mapping[int, bytes] | None = None):
        super().__init__(texts)
        self.parts = dict(parts or {})

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerBase | None", d_vocab: int) -> "Vocabulary":
        """Read the vocabulary of a model. A token without text, or unknown to the tokenizer, reads <its number>."""
        if tokenizer is None:
            return cls(f"<{i}>" for i in range(d_vocab))
        names = {i: name for name, i in tokenizer.get_vocab().items() if i < d_vocab}
        texts = _texts_inside(tokenizer, names)
        parts = {}
        for i, name in names.items():
            raw = _bytes_of(name) if UNKNOWN_BYTE in texts[i] or not texts[i] else None
            if raw is not None and not _is_text(raw):
                parts[i], texts[i] = raw, "".join(_texts_of([raw]))
            elif raw is None and UNKNOWN_BYTE in texts[i]:
                texts[i] = str(name)
        return cls((texts.get(i) or f"<{i}>" for i in range(d_vocab)), parts)

    @classmethod
    def from_json(cls, texts: Sequence[str], parts: Mapping[str, str] | None) -> "Vocabulary":
        r"""Return the vocabulary that `to_json` wrote. Without `parts`, it is that of an older store, with bytes as \xe8."""
        if parts is not None:
            return cls(texts, {int(i): bytes.fromhex(raw) for i, raw in parts.items()})
        old_parts = {i: _old_bytes(text) for i, text in enumerate(texts) if text.isascii() and OLD_BYTES.search(text)}
        old_parts = {i: raw for i, raw in old_parts.items() if not _is_text(raw)}
        return cls(("".join(_texts_of([old_parts[i]])) if i in old_parts else text for i, text in enumerate(texts)), old_parts)

    def to_json(self) -> dict[str, Any]:
        """Return the arguments of `from_json` as plain data."""
        return {"texts": list(self), "parts": {str(i): raw.hex() for i, raw in sorted(self.parts.items())}}

    def row(self, ids: Iterable[int]) -> list[str]:
        """Return the text of each token of a row. Joined, they give the text, except for bytes that form no character."""
        ids = list(ids)
        texts = [self[i] for i in ids]
        if self.parts.keys().isdisjoint(ids):
            return texts
        for is_part, places in groupby(range(len(ids)), lambda place: ids[place] in self.parts):
            if is_part:
                run = list(places)
                texts[run[0] : run[-1] + 1] = _texts_of([self.parts[ids[place]] for place in run])
        return texts

    def window(self, ids: Any, start: int, stop: int) -> list[str]:
        """Return the texts of the tokens [start, stop) of a row (tensor or array of ids). Both may be inside a character."""
        first = max(0, start - REACH)
        return self.row(ids[first : stop + REACH].tolist())[start - first : stop - first]

    def ids_of(self, text: str) -> list[int]:
        """Return the ids of the tokens with exactly this text, spaces included."""
        return [i for i, own in enumerate(self) if own == text]

    def hint(self, text: str) -> str:
        """Suggest, for an error message, tokens that differ from a text only in the leading space or in capitals."""
        word = text.strip()
        forms = dict.fromkeys((f" {word}", word, f" {word.lower()}", word.lower(), f" {word.capitalize()}", word.capitalize()))
        near = set(forms).intersection(self) - {text, ""}
        return f"; did you mean {' or '.join(repr(form) for form in forms if form in near)}?" if near else ""


def _texts_inside(tokenizer: "PreTrainedTokenizerBase", names: Mapping[int, str | bytes]) -> dict[int, str]:
    """Return the string that each token adds after another one. Alone, it may lose a space or keep marks of its name."""
    ids = list(names)
    alone = dict(zip(ids, _decoded(tokenizer, [[i] for i in ids]), strict=True))
    texts, special = alone, set(tokenizer.all_special_ids)
    before = _plain_token(tokenizer, alone, special)
    if before is not None:
        start = alone[before]
        pairs = zip(ids, _decoded(tokenizer, [[before, i] for i in ids]), strict=True)
        texts = {i: pair[len(start) :] if pair.startswith(start) else alone[i] for i, pair in pairs}
    for i, name in names.items():
        if i in special:
            texts[i] = str(name)
        elif isinstance(name, str) and name.endswith(END_OF_WORD) and END_OF_WORD not in texts[i]:
            texts[i] += " "
    return texts


def _plain_token(tokenizer: "PreTrainedTokenizerBase", alone: Mapping[int, str], special: set[int]) -> int | None:
    """Choose a token with a short text, if possible one that no space separates from the next."""
    plain = [i for i, text in alone.items() if text.isascii() and text.isalnum() and i not in special]
    plain = sorted(plain, key=lambda i: len(alone[i]))[:100]
    twice = _decoded(tokenizer, [[i, i] for i in plain])
    joined = [i for i, text in zip(plain, twice, strict=True) if text == 2 * alone[i]]
    return next(iter(joined + plain), None)


def _decoded(tokenizer: "PreTrainedTokenizerBase", rows: list[list[int]]) -> list[str]:
    return tokenizer.batch_decode(rows, clean_up_tokenization_spaces=False) if rows else []


@cache
def _alphabet() -> dict[str, int]:
    """Return the byte that each character stands for in the names of byte-level tokens.

    GPT-2 writes printable bytes as the characters of the same number and the others as characters from U+0100 on. ByT5 writes
    every byte as the character of the same number.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in range(256)} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _bytes_of(name: str | bytes) -> bytes | None:
    """Return the bytes that the name of a token stands for, or None."""
    if isinstance(name, bytes):
        return name
    if match := BYTE_NAME.fullmatch(name):
        return bytes.fromhex(match[1])
    return bytes(map(_alphabet().get, name)) if name and _alphabet().keys() >= set(name) else None


def _old_bytes(text: str) -> bytes:
    r"""Return the bytes of a text with escapes such as \xe8."""
    return OLD_BYTES.sub(lambda match: bytes.fromhex(match[0].replace("\\x", "")).decode("latin-1"), text).encode("latin-1")


def _is_text(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def _texts_of(pieces: Sequence[bytes]) -> list[str]:
    """Return the text of each piece of a run of bytes: the characters that end in it, and stray bytes as ‹e8›."""
    run = b"".join(pieces)
    owner = [number for number, piece in enumerate(pieces) for _ in piece]
    texts = [""] * len(pieces)
    done = 0
    while done < len(run):
        try:
            characters, bad = run[done:].decode(), range(0)
        except UnicodeDecodeError as error:
            characters, bad = run[done : done + error.start].decode(), range(done + error.start, done + error.end)
        for character in characters:
            done += len(character.encode())
            texts[owner[done - 1]] += character
        for number, places in groupby(bad, owner.__getitem__):
            texts[number] += f"‹{bytes(run[place] for place in places).hex()}›"
        done += len(bad)
    return texts
