"""Chat models behind an endpoint that speaks OpenAI's chat/completions."""

from collections.abc import Sequence
from typing import Any

from saelens_lite.chat.contract import Answer, Estimate, Question
from saelens_lite.chat.settings import ChatConfig


class EndpointModel:
    """A chat model behind an endpoint; `chat_model` makes one."""

    def __init__(self, config: ChatConfig):
        self.config = config.resolved()
        self.name = config.model

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Return an answer to each question, in their order."""
        raise NotImplementedError

    def estimate(self, questions: Sequence[Question]) -> Estimate:
        """Return the size and cost of the questions that have no kept answer yet."""
        raise NotImplementedError


def chat_model(name: str, **settings: Any) -> EndpointModel:
    """Return a model behind an endpoint that speaks OpenAI's chat/completions.

    Args:
        name: The name of the model at the endpoint.
        settings: Fields of `ChatConfig`, such as base_url, concurrency, max_dollars.

    Raises:
        ConfigError: a setting is unknown or has a bad value.
    """
    return EndpointModel(ChatConfig(model=name, **settings))
