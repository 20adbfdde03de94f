"""The contract of a chat model: questions in words, their answers, and what they are expected to cost."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

__all__ = ["Answer", "ChatModel", "Estimate", "Question", "TokenChoice"]


class Question(NamedTuple):
    """A question to a language model.

    `schema` is the JSON schema of the answer, which is sent if the server offers structured output. `choices` are the texts of
    single tokens whose log-probabilities are wanted wherever the answer has one of them.
    """

    user: str
    system: str = ""
    schema: Mapping[str, Any] | None = None
    choices: tuple[str, ...] = ()
    max_tokens: int = 512


class TokenChoice(NamedTuple):
    """A token of an answer, and the natural logarithms of the probabilities of the most probable tokens in its place.

    `start` is the character of the answer's text at which the token begins, not counting blanks; None if that is not known.
    """

    text: str
    log_p: dict[str, float]
    start: int | None = None


class Answer(NamedTuple):
    """The answer to a question; `text` is None if there is no usable one, and `failure` is then the reason in a few words.

    `tokens` has the log-probabilities, if they were asked for and the server offers them. `was_kept` is true if the answer came
    from the folder of earlier answers, so that nothing was paid.
    """

    text: str | None
    failure: str | None = None
    tokens: tuple[TokenChoice, ...] | None = None
    n_input: int = 0
    n_output: int = 0
    was_kept: bool = False


class Estimate(NamedTuple):
    """The expected size of questions that are not answered yet: tokens, and US dollars if the prices are known."""

    n_questions: int
    n_input: int
    n_output: int
    dollars: float | None


@runtime_checkable
class ChatModel(Protocol):
    """A language model that answers questions. `name` is written beside everything that it says."""

    name: str

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Return an answer to each question, in their order."""

    def estimate(self, questions: Sequence[Question]) -> Estimate:
        """Return the expected size and cost of the questions that have no kept answer yet."""
