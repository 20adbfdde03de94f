"""Language models on the Hub: which commit a name stands for, and whether the Hub can be asked for its files."""

from pathlib import Path
from typing import NamedTuple

from huggingface_hub import try_to_load_from_cache

from saelens_lite.errors import HubUnreachableError
from saelens_lite.hub_client.listing import find_commit


class HubModel(NamedTuple):
    """A model that is on the Hub or in the cache."""

    commit: str
    only_cached: bool


def find_model(name: str, revision: str | None = None) -> HubModel:
    """What the Hub says of a model; it is asked once, and where it cannot be reached the cache is.

    Raises:
        HubUnreachableError: it cannot be reached, and the cache does not have the model.
        HubError: it has no such model, or shows it to nobody without a token.
    """
    try:
        return HubModel(find_commit(name, revision)[0], only_cached=False)
    except HubUnreachableError:
        config = try_to_load_from_cache(name, "config.json", revision=revision)
        if not isinstance(config, str):
            raise
        return HubModel(Path(config).parent.name, only_cached=True)
