"""Diff: find the latents that two models share, and those that one of them has alone.

(guide to be written)
"""

from collections.abc import Mapping
from typing import Any

import torch

from saelens_lite.config import TextConfig
from saelens_lite.dictionary import Dictionary
from saelens_lite.diffing.measure import measured
from saelens_lite.diffing.reads import opened
from saelens_lite.diffing.report import Control, DiffReport
from saelens_lite.diffing.sides import Sides, needed_keys
from saelens_lite.model import LanguageModel
from saelens_lite.model.models import as_model
from saelens_lite.tokens import Text, TokenRows

__all__ = ["Control", "DiffReport", "diff"]

N_TOKENS = 200_000


@torch.no_grad()
def diff(
    dictionary: Dictionary,
    cache_or_models: Any,
    text: Text | TokenRows | None = None,
    *,
    base: str | None = None,
    n_tokens: int | None = N_TOKENS,
    text_config: TextConfig | None = None,
    batch_tokens: int | None = None,
) -> DiffReport:
    """Return the numbers of each latent in two models, and its class: in one model only, shared, other or unknown."""
    sides = Sides.of(dictionary, base)
    dictionary.check_finite()
    keys = needed_keys(dictionary, sides)
    given = cache_or_models
    if isinstance(given, Mapping) and any(isinstance(lm, LanguageModel) for lm in given.values()):
        given = as_model(given)
    with opened(dictionary, given, text, keys, n_tokens=n_tokens, text_config=text_config, batch_tokens=batch_tokens) as reads:
        values = measured(dictionary, sides, reads)
    return DiffReport(
        base=sides.base,
        tuned=sides.tuned,
        values=values,
        place=dictionary.place,
        source=reads.source,
        n_tokens=reads.n_tokens,
        n_units=reads.n_units,
        units=reads.units,
    )
