"""Chat models behind an endpoint that speaks OpenAI's chat/completions."""

import json
import logging
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from saelens_lite.chat.budget import Budget, Size, Spent
from saelens_lite.chat.connection import Connection, Dialect
from saelens_lite.chat.contract import Answer, Estimate, Question
from saelens_lite.chat.counting import expected_tokens
from saelens_lite.chat.kept import Asked, KeptAnswers, in_order, messages_of
from saelens_lite.chat.sending import Call, Waiting
from saelens_lite.chat.settings import ChatConfig, key_of
from saelens_lite.errors import SaelensLiteError, Stopped
from saelens_lite.progress import progress_bar

PER_MESSAGE = 8  # tokens around a message, at most
log = logging.getLogger(__name__)


class EndpointModel:
    """A chat model behind an endpoint; `chat_model` makes one."""

    def __init__(self, config: ChatConfig, count_tokens: Callable[[str], int] | None = None):
        self.config = config.resolved()
        self.name = config.model
        self._count = count_tokens or expected_tokens
        self._kept = KeptAnswers(self.config.folder, self.config.ask_again)
        self._budget = Budget(self.config)
        self._dialect = Dialect(self.config.structured)

    @property
    def spent(self) -> Spent:
        """Tokens and dollars that this object has spent. The limits hold for all its calls together."""
        return self._budget.spent

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Return an answer to each question, in their order. A question that is kept, or asked twice, is not sent again.

        After Ctrl-C, no more questions are sent, and those in progress have two seconds to be answered.

        Raises:
            BudgetError: the estimate passes a limit. Nothing was sent.
            BudgetReachedError: a limit was reached in the middle.
            ChatAccessError: there is no key, or the endpoint refuses it.
            ChatError: the endpoint has no such model, or refuses such requests.
            ChatUnreachableError: the endpoint cannot be reached or keeps failing.
            ConfigError: the openai client is not installed, or the folder of kept answers cannot be written.
            Stopped: after Ctrl-C.
        """
        asked = [self._asked(question) for question in questions]
        keys = [one.key for one in asked]
        answers = {key: answer for key in dict.fromkeys(keys) if (answer := self._kept.get(key))}
        waiting = Waiting(
            {k: (a, q, self._size(q)) for k, a, q in zip(keys, asked, questions, strict=True) if k not in answers}
        )
        if waiting:
            answers |= self._send(waiting, has_replied=bool(answers) or self.spent.n_output > 0)
            _summarise(self.name, [answers[key] for key in waiting], self.spent)
        return in_order(keys, answers)

    def estimate(self, questions: Sequence[Question]) -> Estimate:
        """Return the size and cost of the questions that have no kept answer yet.

        Input tokens are a guess by words and marks, unless `chat_model` was given a way to count them; text that is not
        English may take twice as many. Output tokens are the most that the questions allow.
        """
        by_key = {self._asked(question).key: question for question in questions}
        return self._estimate([self._size(question) for key, question in by_key.items() if self._kept.get(key) is None])

    def _estimate(self, sizes: Sequence[Size]) -> Estimate:
        whole = Size(sum(size.n_input for size in sizes), sum(size.n_output for size in sizes))
        return Estimate(len(sizes), *whole, self._budget.dollars(whole))

    def _asked(self, question: Question) -> Asked:
        config = self.config
        if config.structured == "off":
            question = question._replace(schema=None)
        return Asked.of(
            question, endpoint=config.base_url, model=config.model, temperature=config.temperature, seed=config.seed
        )

    def _size(self, question: Question) -> Size:
        texts = [message["content"] for message in messages_of(question)]
        if question.schema is not None and self.config.structured != "off":
            texts.append(json.dumps(dict(question.schema)))
        return Size(sum(self._count(text) + PER_MESSAGE for text in texts), question.max_tokens)

    def _send(self, waiting: Waiting, has_replied: bool) -> dict[str, Answer]:
        key = key_of(self.config)
        self._budget.check(self._estimate([size for _, _, size in waiting.values()]))
        self._kept.check()
        connection = Connection(self.config, self._dialect, key)
        with progress_bar(f"asking {self.name}", len(waiting), "questions") as advance:
            call = Call(connection, self._budget, self._kept, waiting, lambda n: advance(n, ""), has_replied)
            try:
                return dict(call.run())
            except (SaelensLiteError, KeyboardInterrupt) as error:
                kept = f"{len(call.answers):,} of {len(waiting):,} questions are answered and kept in {self._kept.folder}"
                if isinstance(error, KeyboardInterrupt):
                    raise Stopped(f"stopped; {kept}. Repeat the call to ask the others", signal.SIGINT) from None
                raise type(error)(f"{error}. {kept}; these cost nothing when the call is repeated") from None


def chat_model(name: str, *, count_tokens: Callable[[str], int] | None = None, **settings: Any) -> EndpointModel:
    """Return a model behind an endpoint that speaks OpenAI's chat/completions.

    Args:
        name: The name of the model at the endpoint.
        count_tokens: Returns the number of tokens of a text, for estimates; default: a guess by words and marks.
        settings: Fields of `ChatConfig`, such as base_url, concurrency, dollar_limit.

    Raises:
        ConfigError: a setting is unknown or has a bad value.
    """
    return EndpointModel(ChatConfig(model=name, **settings), count_tokens)


def _summarise(name: str, answers: Sequence[Answer], spent: Spent) -> None:
    failures = Counter(answer.failure for answer in answers if answer.failure)
    log.info("%s answered %d questions; %s", name, len(answers), spent)
    if failures:
        listed = ", ".join(f"{failure}: {n}" for failure, n in failures.most_common(5))
        log.warning("%d of %d questions to %s have no usable answer (%s)", failures.total(), len(answers), name, listed)
