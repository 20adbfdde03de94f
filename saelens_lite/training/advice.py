"""Advice in the log about settings that train, but seldom well."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from saelens_lite.cache import Source
from saelens_lite.config import TrainConfig
from saelens_lite.dictionary import Dictionary

MOST_PASSES = 20  # over the same activations
MOST_L0, FEW = 0.1, 512  # share of the latents; of fewer latents, more may well fire
OFF_TARGET = 0.1  # relative difference of L0 from a target

log = logging.getLogger(__name__)


def warn_of_many_passes(source: Source, configs: Sequence[TrainConfig]) -> None:
    """Log one warning if training passes over the activations of a source more than MOST_PASSES times."""
    held, wanted = source.n_tokens, max(config.n_tokens for config in configs)
    if held and wanted > MOST_PASSES * held:
        log.warning(
            "training on %s tokens passes %.0f times over the %s activations there are; capture more text, or train on fewer "
            "tokens: a dictionary that sees the same few activations so often overfits them",
            f"{wanted:,}",
            wanted / held,
            f"{held:,}",
        )


def warn_of_l0(name: str, dictionary: Dictionary, line: Mapping[str, Any]) -> None:
    """Log a warning if a trained dictionary is not sparse, or if its L0 is not the target, by the last line of its log."""
    l0, target = line.get("val_l0", line["l0"]), dictionary.rule.target_l0
    if target is not None and abs(l0 / target - 1) > OFF_TARGET:
        log.warning(
            "%s: L0 is %.1f, but target_l0 is %g; train on more tokens, or with another learning rate", name, l0, target
        )
    if l0 > MOST_L0 * dictionary.d_sae and dictionary.d_sae >= FEW:
        log.warning(
            "%s: L0 is %.1f, more than a tenth of the %d latents, so the dictionary is not sparse; set a lower target_l0 or "
            "k, a higher coefficient, or train on more tokens",
            *(name, l0, dictionary.d_sae),
        )
