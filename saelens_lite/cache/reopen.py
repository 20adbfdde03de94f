"""Finding the activations of an interrupted run again."""

from typing import Any

import torch

from saelens_lite.cache.live import ActivationStream
from saelens_lite.cache.source import Source
from saelens_lite.cache.stored import ActivationCache
from saelens_lite.errors import ConfigError


def open_source(description: dict[str, Any] | None, device: str | torch.device | None = None) -> Source:
    """The source that described itself so (see `Source.describe`); the model of a stream on another device if one is given.

    Raises:
        ConfigError: it did not, or what is there now is something else.
        CorruptFileError, ModelNotFoundError, TextError: it is not there any more.
    """
    if description is None:
        raise ConfigError("the run was trained on activations that cannot be found again by themselves: give source=")
    if "cache" in description:
        return ActivationCache.reopen(description)
    return ActivationStream.reopen(description, device)
