"""Read explanations from the answers of chat models, some of which ignore the form that was asked for."""

import json
import re
from typing import Any

from saelens_lite.chat import Question
from saelens_lite.features.labels import MOST

KEY = "explanation"
LONG = 40  # characters from which a repeated line of the question is no coincidence
_THOUGHTS = re.compile(r"<think(?:ing)?>.*?</think(?:ing)?>", re.DOTALL)
_NAMED = re.compile(r"[\[*#\s]*(?:final )?explanation[\]*\s]*:[*\s]*(?P<text>.+)", re.IGNORECASE)
_REFUSAL = re.compile(
    r"i['’]?m sorry|sorry[,.]|i (?:can(?:no|['’])t|am not able|am unable|won['’]t|will not|must decline)\b"
    r"|i['’]m (?:not able|unable)\b|as an ai\b|unable to ",
    re.IGNORECASE,
)


def explanation_in(text: str) -> str | None:
    """Return the explanation in an answer, on one line; None if it holds no explanation.

    It is the value of "explanation" in the first JSON object that has one, also between other words. An answer without JSON is
    itself the explanation if it is one paragraph, or the line after "Explanation:".
    """
    text = _THOUGHTS.sub("", text).strip()
    objects = [value for value in _objects(text) if isinstance(value.get(KEY), str)]
    if objects:
        return _one_line(objects[0][KEY])
    if re.search(r"[{}]|```|</?think", text):  # JSON without the key, or cut
        return None
    named = [match["text"] for line in text.splitlines() if (match := _NAMED.match(line))]
    if named:
        return _one_line(named[-1].strip("*"))
    return None if re.search(r"\n\s*\n", text) else _one_line(text)


def _objects(text: str) -> list[dict[str, Any]]:
    """Return the JSON objects in a text that are not part of another one."""
    objects, place, decoder = [], 0, json.JSONDecoder()
    while (place := text.find("{", place)) >= 0:
        try:
            value, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            place += 1
            continue
        objects.append(value)
    return objects


def _one_line(text: str) -> str | None:
    return " ".join(text.split()) or None


def fault_in(explanation: str | None, question: Question) -> str | None:
    """Return the reason why an explanation is not usable, None if it is."""
    if not explanation:
        return "no explanation in the answer"
    if not any(char.isalnum() for char in explanation):
        return "an explanation without words"
    if len(explanation) > MOST:
        return f"an explanation of {len(explanation):,} characters; labels have at most {MOST:,}"
    if explanation != explanation.encode("utf-8", "replace").decode():
        return "an explanation that is not text"
    if _REFUSAL.match(explanation):
        return f"a refusal: {explanation[:60]}"
    parts = [" ".join(line.split()) for text in (question.system, question.user) for line in text.splitlines()]
    if any(line in explanation or (len(explanation) >= LONG and explanation in line) for line in parts if len(line) >= LONG):
        return "a repetition of the question"
    return None
