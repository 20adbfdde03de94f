"""The expected number of tokens of a text, without the tokenizer of the model that reads it."""

import re

_PARTS = re.compile(r"[A-Za-z]+|[0-9]+|[^\sA-Za-z0-9]|\n")
LETTERS, DIGITS, MARKS, BYTES = 6, 2, 0.75, 3  # letters or digits of a token, tokens of a mark, bytes of other characters


def expected_tokens(text: str) -> int:
    """Return about as many tokens as the usual tokenizers of language models make of a text.

    A word of n letters is ⌈n / 6⌉ tokens, a number of n digits ⌈n / 2⌉, and four marks or line ends are three. Other characters
    are a third of a token for each byte; tokenizers differ by a factor of three there. Contexts in questions about latents have
    many marks: a quarter of the bytes, a usual guess, is a third too low for them.
    """
    n = 0.0
    for part in _PARTS.findall(text):
        if not part.isascii():
            n += len(part.encode("utf-8", "replace")) / BYTES
        elif part.isalnum():
            n += -(-len(part) // (DIGITS if part.isdigit() else LETTERS))
        else:
            n += MARKS
    return -int(-n // 1)
