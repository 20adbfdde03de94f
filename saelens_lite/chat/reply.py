"""Read the reply of a server. Every value in it is checked, because servers differ, and networks cut."""

import json
from typing import Any

from saelens_lite.chat.contract import Answer, Question, TokenChoice
from saelens_lite.chat.counting import expected_tokens
from saelens_lite.chat.kept import is_count, log_probability, whole_characters


class MalformedReply(Exception):
    """A reply with status 200 that is not one of chat/completions."""


def read_reply(content: bytes, question: Question, expected_input: int) -> Answer:
    """Return the answer in the body of a reply.

    A reply that ends at the limit of tokens is a failure, unless it is as a whole one of the question's choices.

    Args:
        expected_input: Tokens of the question, if the server does not say their number.

    Raises:
        MalformedReply: the body is cut, or has values of other types than it should.
    """
    try:
        value = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise MalformedReply(f"not JSON: {str(error)[:80]}") from None
    choice = _typed(_first(_typed(value, "reply", dict).get("choices")), "choice", dict)
    message = _typed(choice.get("message"), "message", dict)
    text, refusal = _typed(message.get("content"), "content", str, None), _typed(message.get("refusal"), "refusal", str, None)
    finish = _typed(choice.get("finish_reason"), "finish_reason", str, None)
    text = None if text is None else whole_characters(text)
    n_input, n_output = _usage(value.get("usage"), expected_input, text or "")
    failure = None
    if refusal or finish == "content_filter":
        failure = "refused"
    elif finish == "length" and (text or "").strip() not in question.choices:
        failure = "cut"
    elif not (text or "").strip():
        failure = "empty"
    if failure:
        return Answer(None, failure, None, n_input, n_output)
    tokens = _tokens(choice.get("logprobs"), question.choices) if question.choices else None
    return Answer(text, None, tokens, n_input, n_output)


def _typed(value: Any, name: str, *types: type | None) -> Any:
    if not any(value is None if kind is None else isinstance(value, kind) for kind in types):
        raise MalformedReply(f"{name} is a {type(value).__name__}")
    return value


def _first(choices: Any) -> Any:
    if not isinstance(choices, list) or not choices:
        raise MalformedReply("no choices")
    return choices[0]


def _usage(usage: Any, expected_input: int, text: str) -> tuple[int, int]:
    """Return the tokens of question and answer. Where the server does not say, they are guessed."""
    given = usage if isinstance(usage, dict) else {}
    numbers = [given.get(name) for name in ("prompt_tokens", "completion_tokens")]
    expected = (expected_input, expected_tokens(text))
    return tuple(n if is_count(n) else other for n, other in zip(numbers, expected, strict=True))  # type: ignore


def _tokens(logprobs: Any, choices: tuple[str, ...]) -> tuple[TokenChoice, ...] | None:
    """Return the tokens of the answer that are one of the choices, with log-probabilities; None if the server offers none."""
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    if not isinstance(content, list):
        return None
    wanted = {choice.strip() for choice in choices}
    return tuple(one for item in content if (one := _token(item)) and one.text.strip() in wanted)


def _token(item: Any) -> TokenChoice | None:
    """Return a token with the log-probabilities in its place; None if the server wrote nothing there that can be one."""
    if not isinstance(item, dict) or not isinstance(item.get("token"), str):
        return None
    top = item.get("top_logprobs")
    pairs = [
        (one.get("token"), one.get("logprob"))
        for one in (*(top if isinstance(top, list) else ()), item)
        if isinstance(one, dict)
    ]
    log_p = {whole_characters(t): p for t, value in pairs if isinstance(t, str) and (p := log_probability(value)) is not None}
    return TokenChoice(whole_characters(item["token"]), log_p) if log_p else None
