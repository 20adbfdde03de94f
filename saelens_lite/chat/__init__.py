"""Ask a language model questions in words: an endpoint that speaks the OpenAI protocol, or a local model.

A chat model answers many questions at once. An answer that could not be had is an `Answer` whose `text` is None and whose
`failure` says why, so that one bad reply does not lose the others.
"""

from saelens_lite.chat.contract import Answer, ChatModel, Estimate, Question, TokenChoice
from saelens_lite.chat.endpoint import EndpointModel, chat_model
from saelens_lite.chat.local import LocalModel, local_chat_model
from saelens_lite.chat.named import named_chat_model
from saelens_lite.chat.settings import ChatConfig

__all__ = [
    "Answer",
    "ChatConfig",
    "ChatModel",
    "EndpointModel",
    "Estimate",
    "LocalModel",
    "Question",
    "TokenChoice",
    "chat_model",
    "local_chat_model",
    "named_chat_model",
]
