"""Language models on the Hub: the commit of a name, and the use of the cache if the Hub cannot be reached."""

from pathlib import Path
from typing import NamedTuple

from huggingface_hub import try_to_load_from_cache

from saelens_lite.errors import HubUnreachableError
from saelens_lite.hub_client.listing import find_commit


class HubModel(NamedTuple):
    """A model on the Hub or in the cache."""

    commit: str
    only_cached: bool


def find_model(name: str, revision: str | None = None) -> HubModel:
    """Look up a model on the Hub, with one request. If the Hub cannot be reached, look in the cache.

    Raises:
        HubUnreachableError: the Hub cannot be reached, and the model is not in the cache.
        HubError: the model does not exist, or needs a token.
    """
    try:
        return HubModel(find_commit(name, revision)[0], only_cached=False)
    except HubUnreachableError:
        config = try_to_load_from_cache(name, "config.json", revision=revision)
        if not isinstance(config, str):
            raise
        return HubModel(Path(config).parent.name, only_cached=True)
