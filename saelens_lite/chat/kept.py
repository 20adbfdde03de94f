"""Kept answers: one JSON file for each question, so that no answer is paid twice.

The name of a file is the SHA-256 of everything that decides the answer: endpoint, model, messages, schema, temperature, seed,
most tokens and choices. Files appear whole or not at all, so several threads and processes may use a folder at once. Every
whole reply is kept, also one that is refused, cut or empty: it was paid, and the model would most likely say the same again.
"""

import hashlib
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from saelens_lite.chat.contract import Answer, Question, TokenChoice
from saelens_lite.errors import ConfigError, CorruptFileError, DiskFullError
from saelens_lite.files import read_json, write_json
from saelens_lite.paths import NO_ROOM, check_output

VARIABLE = "SAELENS_LITE_ANSWERS"
VERSION = 1
LEAST_LOG_P, MOST_LOG_P = -1e4, 1e-3
MOST_COUNT = 10**9  # tokens
log = logging.getLogger(__name__)


def usual_folder() -> Path:
    """Return the folder of kept answers: that of the environment variable, or one in the folder of the system for caches."""
    if named := os.environ.get(VARIABLE):
        return Path(named).expanduser()
    if sys.platform == "win32":
        caches = Path(os.environ.get("LOCALAPPDATA") or "~/AppData/Local")
    elif sys.platform == "darwin":
        caches = Path("~/Library/Caches")
    else:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return caches.expanduser() / "saelens_lite" / "answers"


def whole_characters(text: str) -> str:
    """Replace halves of characters (lone surrogates), which cannot be sent or written."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def messages_of(question: Question) -> list[dict[str, str]]:
    """Return a question as the messages of a conversation."""
    parts = (("system", question.system), ("user", question.user))
    return [{"role": role, "content": whole_characters(text)} for role, text in parts if text or role == "user"]


def log_probability(value: Any) -> float | None:
    """Return a number as the logarithm of a probability, None if it cannot be one. Rounding may lift it a little above 0."""
    is_one = type(value) in (int, float) and LEAST_LOG_P < value <= MOST_LOG_P
    return min(float(value), 0.0) if is_one else None


def is_count(value: Any) -> bool:
    """Return whether a value can be the number of tokens of a question or an answer."""
    return type(value) is int and 0 <= value < MOST_COUNT


class Asked(dict[str, Any]):
    """Everything that decides an answer, as JSON. `key` is its hash."""

    @classmethod
    def of(cls, question: Question, **others: Any) -> "Asked":
        """Return what decides the answer to a question; `others` says who answers, and how."""
        return cls(
            version=VERSION,
            messages=messages_of(question),
            schema=None if question.schema is None else dict(question.schema),
            choices=list(question.choices),
            max_tokens=question.max_tokens,
            **others,
        )

    @property
    def key(self) -> str:
        """The SHA-256 in hexadecimal."""
        return hashlib.sha256(json.dumps(self, sort_keys=True).encode()).hexdigest()


def in_order(keys: Sequence[str], answers: Mapping[str, Answer]) -> list[Answer]:
    """Return the answers of keys, in their order. Where a key occurs again, nothing more was paid."""
    seen: set[str] = set()
    again = [key in seen or bool(seen.add(key)) for key in keys]
    return [
        answers[key]._replace(was_kept=answers[key].was_kept or repeated) for key, repeated in zip(keys, again, strict=True)
    ]


class KeptAnswers:
    """A folder of answers to questions."""

    def __init__(self, folder: str | Path | None, ask_again: bool = False):
        self.folder = usual_folder() if folder is None else Path(folder).expanduser()
        self.ask_again = ask_again
        self._own: set[str] = set()  # keys of the answers that this object kept, which are not asked again

    def check(self) -> None:
        """Raise ConfigError, OutputExistsError or DiskFullError if the folder cannot be written."""
        check_output(self.folder / "00")

    def get(self, key: str) -> Answer | None:
        """Return the answer of that key; None if it is not kept, is to be asked again, or its file is damaged.

        Raises:
            ConfigError: the folder may not be read.
        """
        path = self._path(key)
        try:
            if not path.exists():
                return None
        except OSError as error:
            raise ConfigError(
                f"kept answers cannot be read in {self.folder}: {error.strerror}; choose another folder"
            ) from None
        try:
            value = read_json(path)
            if Asked(value["asked"]).key != key:
                raise ValueError("it belongs to another question")
            answer = _answer(value["answer"])
        except (CorruptFileError, ValueError, TypeError, KeyError, AttributeError) as error:
            log.warning("the kept answer %s is damaged, so its question is asked again: %s", path, error)
            return None
        return None if self.ask_again and answer.failure is not None and key not in self._own else answer

    def put(self, asked: Asked, answer: Answer) -> None:
        """Keep an answer. Raise DiskFullError or ConfigError if the file cannot be written."""
        path = self._path(asked.key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            why = DiskFullError if error.errno in NO_ROOM else ConfigError
            raise why(f"the folder {path.parent} cannot be made: {error.strerror}; choose another folder of answers") from None
        tokens = None if answer.tokens is None else [list(token) for token in answer.tokens]
        write_json(path, {"asked": asked, "answer": answer._replace(tokens=tokens, was_kept=True)._asdict()})
        self._own.add(asked.key)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"


def _answer(value: Mapping[str, Any]) -> Answer:
    """Return an answer that was kept. Raise ValueError, TypeError or KeyError if it is damaged."""
    text, failure, tokens, n_input, n_output = (value[name] for name in ("text", "failure", "tokens", "n_input", "n_output"))
    good = isinstance(text, str | None) and isinstance(failure, str | None) and (text is None) == (failure is not None)
    if not good or not is_count(n_input) or not is_count(n_output):
        raise ValueError("its values are not those of an answer")
    read = None if tokens is None else tuple(_token(*token) for token in tokens)
    return Answer(text, failure, read, n_input, n_output, was_kept=True)


def _token(text: str, top: Mapping[str, Any], start: Any = None) -> TokenChoice:
    """Return a token that was kept, with those log-probabilities that can be some. Earlier versions kept no `start`."""
    log_p = {str(t): p for t, value in top.items() if (p := log_probability(value)) is not None}
    return TokenChoice(str(text), log_p, start if is_count(start) else None)
