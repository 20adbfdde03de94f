"""Token strings as people can read them."""

from functools import cache

from saelens_lite.model import LanguageModel

SPACE = "\u2581"  # how SentencePiece writes it


@cache
def _byte_of() -> dict[str, int]:
    """GPT-2's alphabet of bytes: printable ones stand for themselves, the others for characters from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def vocabulary(lm: LanguageModel) -> list[str]:
    r"""The text of every token: bytes that make no whole character as \xe2, a token without text as <its number>."""

    def shown(i: int, text: str, name: str | None) -> str:
        if name and name.startswith(SPACE):  # the text of a token by itself may lack the first space
            n_spaces = len(name) - len(name.lstrip(SPACE))
            return " " * n_spaces + text.lstrip(" ")
        if "\ufffd" not in text:
            return text or f"<{i}>"
        if not all(char in _byte_of() for char in name):
            return name
        return "".join(chr(byte) if 32 <= byte < 127 else f"\\x{byte:02x}" for byte in (_byte_of()[char] for char in name))

    texts = lm.token_strings()
    names = lm.tokenizer.convert_ids_to_tokens(list(range(len(texts))))
    return [shown(i, *token) for i, token in enumerate(zip(texts, names, strict=True))]
