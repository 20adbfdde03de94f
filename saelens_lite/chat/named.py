"""Chat models by name, for commands: `local:tiny` is a model of this computer, any other name one behind an endpoint."""

from typing import Any

from saelens_lite.chat.contract import ChatModel
from saelens_lite.chat.endpoint import chat_model
from saelens_lite.chat.local import local_chat_model
from saelens_lite.chat.settings import ChatConfig
from saelens_lite.errors import ConfigError

LOCAL = "local:"
OF_LOCAL = ("folder", "ask_again")  # the settings that local models have too


def named_chat_model(name: str, **settings: Any) -> ChatModel:
    """Return the chat model of a name: `local:` and the name of a transformers model, or the name of a model at an endpoint.

    Args:
        settings: fields of `ChatConfig` except `model`. Local models know only some: `folder`, `ask_again`. None counts as not
            given.

    Raises:
        ConfigError: a setting is unknown, has a bad value, or does not apply to a local model.
    """
    given = {key: value for key, value in settings.items() if value is not None}
    if not name.startswith(LOCAL):
        return chat_model(name, **given)
    ChatConfig(model=name, **given)
    if useless := sorted(given.keys() - set(OF_LOCAL)):
        raise ConfigError(f"{useless[0]} = {given[useless[0]]!r} applies only to models behind an endpoint, not to {name}")
    return local_chat_model(name.removeprefix(LOCAL), **given)
