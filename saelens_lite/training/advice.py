"""Advice in the log about settings that train, but seldom well."""

import logging
from collections.abc import Sequence

from saelens_lite.cache import Source
from saelens_lite.config import TrainConfig

MOST_PASSES = 20  # over the same activations

log = logging.getLogger(__name__)


def warn_of_many_passes(source: Source, configs: Sequence[TrainConfig]) -> None:
    """Log one warning if training passes over the activations of a source more than MOST_PASSES times."""
    held, wanted = source.n_tokens, max(config.n_tokens for config in configs)
    if held and wanted > MOST_PASSES * held:
        log.warning(
            "training on %s tokens passes %.0f times over the %s activations there are; capture more text, or train on fewer "
            "tokens: a dictionary that sees the same few activations so often fits them and not others",
            f"{wanted:,}",
            wanted / held,
            f"{held:,}",
        )
