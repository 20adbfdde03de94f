"""Finding the activations of an interrupted run again."""

from typing import Any

import torch

from saelens_lite.cache.live import ActivationStream
from saelens_lite.cache.source import Source
from saelens_lite.cache.stored import ActivationCache
from saelens_lite.errors import ConfigError
from saelens_lite.tokens import name_of, named_text


def open_source(
    description: dict[str, Any] | None, device: str | torch.device | None = None, text: str | None = None
) -> Source:
    """The source that described itself so (see `Source.describe`); the model of a stream on another device if one is given.

    text: the name of the text of a stream, where that has moved.

    Raises:
        ConfigError: it did not, or what is there now is something else.
        CorruptFileError, ModelNotFoundError, TextError: it is not there any more.
    """
    if description is None:
        raise ConfigError("the run was trained on activations that cannot be found again by themselves: give source=")
    if text is not None:
        if "cache" in description:
            raise ConfigError(f"the run was trained on the cache {description['cache']}, not on a text")
        description = description | {"text": name_of(named_text(text))}
    if "cache" in description:
        return ActivationCache.reopen(description)
    return ActivationStream.reopen(description, device)
