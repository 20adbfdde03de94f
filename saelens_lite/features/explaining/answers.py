"""Read explanations from the answers of chat models, some of which ignore the form that was asked for."""

import json
import re
from typing import Any

from saelens_lite.chat import Question
from saelens_lite.features.labels import MOST

KEY = "explanation"
LONG = 40  # characters from which a repeated line of the question is no coincidence
_THINK, _THOUGHT = re.compile(r"<think(?:ing)?>"), re.compile(r"</think(?:ing)?>")
_NAMED = re.compile(r"[\[*#\s]*(?:final )?explanation[\]*\s]*:[*\s]*(?P<text>.+)", re.IGNORECASE)
_I = r"\bi(?:['’](?:m|ve|d|ll))?"  # not the i of a list
_SORRY = (  # openings of a refusal, and of labels such as "sorry, and other apologies"
    r"(?:i(?: am|['’]m)(?: very| so| really| truly| deeply)? (?:sorry|afraid)|sorry|(?:my )?apologies|i apologi[sz]e|i regret"
    r"|unfortunately|regrettably)\b"
)
_NOT = (
    r"(?:cannot|can ?not|can['’]t|could ?n[o'’]?t|couldn['’]t|won['’]t|will not|would not|do not|don['’]t|did not|didn['’]t"
    r"|(?:am |was )?(?:not|unable)|(?:must |have to )?(?:decline|refuse)|have no|lack)\b"
)
_ACT = (
    r"(?:help|assist|provide|answer|explain|describe|determine|identify|give|do (?:that|this|so|it)|comply|fulfil|complete"
    r"|continue|discuss|generate|create|produce|write|offer|share|engage|process|access|view|see|interpret|infer|conclude|find"
    r"|summari[sz]e|analy[sz]e|tell|say|know|respond|participate|support)"
)
_AI = r"an? (?:ai\b|artificial intelligence|(?:large )?language model|(?:virtual |helpful )?assistant|chatbot)"
_REFUSAL = re.compile(
    rf"(?:{_SORRY}[^.!?]*?(?:[.!?,;:–—-]\s*(?:but |that )?)?[^.!?]*?{_I} {_NOT}"  # I am sorry, but I cannot
    rf"|{_SORRY}.*\b(?:can|able to|something i|allowed to|possible to) (?:can )?{_ACT}\b"
    rf"|i(?: am|['’]m) (?:very |so |really )?sorry\W*$"
    rf"|(?:as|being) {_AI}[^.]*?{_I} "  # As a language model, I
    rf"|{_I}(?: am| was)? ?(?:an? )?{_NOT} (?:able to |allowed to |permitted to |going to |be able to )?{_ACT}\b"
    rf"|i(?: am|['’]m) {_AI}"
    rf"|i(?: do not|['’]?\s?don['’]t) have (?:enough|sufficient|access|any|the )|i have (?:no|not enough|insufficient) "
    rf"|i (?:must|have to) (?:decline|refuse)\b|i(?: am|['’]m) (?:not able|unable)\b|i (?:decline|refuse) to\b"
    rf"|(?:there (?:is|are) )?(?:not enough|insufficient) \w+(?: \w+)? to {_ACT}\b|(?:unable|not able|impossible) to {_ACT}\b"
    rf"|it(?: is|['’]s) (?:not possible|impossible) to {_ACT}\b|cannot {_ACT}\b)",
    re.IGNORECASE | re.DOTALL,
)


def explanation_in(text: str) -> str | None:
    """Return the explanation in an answer, on one line; None if it holds no explanation.

    It is the value of "explanation" in the first JSON object that has one, also between other words. An answer without JSON is
    itself the explanation if it is one paragraph, or the line after "Explanation:".
    """
    text = without_thoughts(text)
    if text is None:
        return None
    text = text.strip()
    objects = [value for value in _objects(text) if isinstance(value.get(KEY), str)]
    if objects:
        return _one_line(objects[0][KEY])
    if re.search(r"[{}]|```|</?think", text):  # JSON without the key, or cut
        return None
    named = [match["text"] for line in text.splitlines() if (match := _NAMED.match(line))]
    if named:
        return _one_line(named[-1].strip("*"))
    return None if re.search(r"\n\s*\n", text) else _one_line(text)


def without_thoughts(text: str) -> str | None:
    """Return an answer from where its thoughts end, which some models write first: <think> … </think>. None if they do not end.

    Some models leave out the first tag. A tag inside of the JSON that was asked for is part of it.
    """
    began = _THINK.search(text)
    if began and not re.search(r"[\[{]", text[: began.start()]):
        ended = _THOUGHT.search(text, began.end())
        return None if ended is None else without_thoughts(text[ended.end() :])
    *_, last = [None, *_THOUGHT.finditer(text)]
    if last is not None:
        before, after = text[: last.start()], text[last.end() :]
        if re.search(r"[\[{]", after) or not re.search(r"[\[{]", before):
            return after
    return text


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
    parts += [sentence.rstrip(".!?") for line in question.system.splitlines() for sentence in re.split(r"(?<=[.!?])\s+", line)]
    if any(line in explanation or (len(explanation) >= LONG and explanation in line) for line in parts if len(line) >= LONG):
        return "a repetition of the question"
    return None
