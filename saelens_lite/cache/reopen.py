"""Finding the activations of an interrupted run again."""

from pathlib import Path
from typing import Any

from saelens_lite.cache.live import ActivationStream
from saelens_lite.cache.source import Source
from saelens_lite.cache.stored import ActivationCache
from saelens_lite.config import TextConfig
from saelens_lite.errors import ConfigError
from saelens_lite.model import load_model


def open_source(description: dict[str, Any] | None) -> Source:
    """The source that described itself so (see `Source.describe`).

    Raises:
        ConfigError: it did not, or what is there now is something else.
    """
    if description is None:
        raise ConfigError("the run was trained on activations that cannot be found again by themselves: give source=")
    if "cache" in description:
        cache = ActivationCache.open(description["cache"])
        if cache.describe() != description:
            raise ConfigError(f"{cache.path} is not the cache the run was trained on: its manifest has changed")
        return cache
    stream = dict(description["stream"])
    lm = load_model(**stream.pop("model"))
    text, is_file = stream.pop("text")
    config = TextConfig(**stream.pop("text_config"))
    return ActivationStream(lm, Path(text) if is_file else text, text_config=config, **stream)
