r"""Quote text of a corpus as data in a question, so that no text can end the quotation, look like a mark, or begin a line.

A context is a JSON string in one line. The tokens on which a latent fires are between « and ». Where these characters, a run of
three backticks or an invisible character are part of the text itself, they are JSON escapes, such as \u00ab.
"""

import json
import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from saelens_lite.errors import PluginError
from saelens_lite.features.summary import Example
from saelens_lite.terminal import visible

OPEN, CLOSE, FENCE = "«", "»", "```"


def as_json(value: Any) -> str:
    """Return plain data as JSON in one line, in which marks, fences and invisible characters are escaped."""
    text = visible(json.dumps(value, ensure_ascii=False))
    text = re.sub(f"[{OPEN}{CLOSE}]", lambda match: f"\\u{ord(match[0]):04x}", text)
    return re.sub("`{3,}", lambda match: "\\u0060" * len(match[0]), text)


def quoted(example: Example, marked: Sequence[bool] | None = None) -> str:
    """Return a context as a JSON string with its firing tokens in « », or other tokens that are `marked`."""
    marked = [value > 0 for value in example.values] if marked is None else marked
    text = ""
    for is_marked, run in groupby(zip(example.tokens, marked, strict=True), key=lambda pair: pair[1]):
        piece = as_json("".join(token for token, _ in run))[1:-1]
        text += f"{OPEN}{piece}{CLOSE}" if is_marked else piece
    return f'"{text}"'


def unquoted(text: str) -> list[tuple[str, bool]]:
    """Return the pieces of a context that `quoted` wrote, each with whether it was marked."""
    pieces = [json.loads(f'"{piece}"') for piece in re.split(f"[{OPEN}{CLOSE}]", text[1:-1])]
    return [(piece, bool(number % 2)) for number, piece in enumerate(pieces) if piece or number % 2]


def block(lines: Iterable[str]) -> str:
    """Return lines of JSON as a fenced block.

    Raises:
        PluginError: a line could end the block, because it was not written by `as_json` or `quoted`.
    """
    lines = list(lines)
    for line in lines:
        if FENCE in line or len(line.splitlines()) > 1:
            raise PluginError(f"{line[:60]!r} is not quoted, so it could end the block of data; write it by as_json or quoted")
    return "\n".join([f"{FENCE}jsonl", *lines, FENCE])
