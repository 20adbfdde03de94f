"""Reopening the activations of an interrupted run."""

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
    """Return the source of a description (see `Source.describe`).

    Args:
        device: device of a stream's model; default: the one in the description.
        text: name of a stream's text, if that has moved.

    Raises:
        ConfigError: there is no description, or `text` is given for a cache.
        SourceChangedError: the cache or the text has changed.
        CorruptFileError, ModelNotFoundError, TextError: the cache, model or text is missing or damaged.
    """
    if description is None:
        raise ConfigError("the run was trained on activations in memory, which cannot be reopened; give source=")
    if text is not None:
        if "cache" in description:
            raise ConfigError(f"the run was trained on the cache {description['cache']}, not on a text")
        description = description | {"text": name_of(named_text(text))}
    if "cache" in description:
        return ActivationCache.reopen(description)
    return ActivationStream.reopen(description, device)
