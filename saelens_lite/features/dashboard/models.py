"""The part of the page about several models: columns about each, and the result of a diff (`saelens_lite.diffing`)."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saelens_lite.errors import ConfigError
from saelens_lite.features.queries import StoreQueries
from saelens_lite.ports import split_key

Columns = dict[str, np.ndarray]
RATIOS = ("nu_error", "nu_reconstruction", "nu_activation", "mirror_error", "mirror_reconstruction", "mirror_activation")
ONLY, SHARED = 0.1, (0.4, 0.6)  # limits of delta_norm, for classes without a diff


@runtime_checkable
class Diff(Protocol):
    """A report of `sl.diff`: numbers of each latent in a base and a tuned model, and its class."""

    base: str
    tuned: str
    dictionary_sha256: str
    values: dict[str, Float[Tensor, " d_sae"]]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The classes."""
        ...

    def classes(self) -> list[str]:
        """Return the class of each latent."""
        ...


class OfModels(NamedTuple):
    """Facts, columns of the list and columns of a latent's page; empty for one model."""

    facts: dict[str, Any]
    index: Columns
    details: Columns


def of_models(store: StoreQueries, diff: Diff | None, shown: Columns, ids: np.ndarray) -> OfModels:
    """Return the parts of the page about several models.

    Args:
        shown: The places of contexts among the shown tokens.
        ids: The ids of the words of the page, ascending.

    Raises:
        ConfigError: a diff is given for a store of one model, of other models, or of another dictionary.
    """
    _check(store, diff)
    if store.models is None:
        return OfModels({}, {}, {})
    m, names = store.models, store.info.names
    kinds, number = _classes(store, diff)
    known = {} if diff is None else diff.values
    index = {
        "delta_norm": known.get("delta_norm", m.delta_norm),
        "model_cosine": known.get("cosine", m.cosine),
        "class": number,
        **{name: x for name, x in known.items() if name in RATIOS},
    }
    details = {
        "norm": m.norm,
        "mean_part": m.mean_part,
        "part_bias": m.bias,
        "top_part": m.top_part,
        "group_part": m.group_part,
        "random_part": m.random_part,
        "best": shown["best"],
        "best_nearby": m.best_nearby,
        "best_part": m.best_part,
        "model_promoted": ids.searchsorted(m.promoted.numpy()),
        "model_promoted_effect": m.promoted_effect,
        "model_suppressed": ids.searchsorted(m.suppressed.numpy()),
        "model_suppressed_effect": m.suppressed_effect,
    }
    compared = [diff.base, diff.tuned] if diff is not None else _with_directions(store)
    facts = {
        "models": list(names),
        "classes": kinds,
        "compared": compared,
        "by_diff": diff is not None,
        "last": split_key(store.info.writes[-1]).model,
    }
    return OfModels(facts, index, details)


def _check(store: StoreQueries, diff: Diff | None) -> None:
    """Raise ConfigError unless a diff, if given, is of the store's models and dictionary."""
    if diff is None:
        return
    if store.models is None or {diff.base, diff.tuned} != set(store.info.names):
        models = ", ".join(store.info.names) or store.info.model or "no model"
        raise ConfigError(f"the diff is of {diff.base} and {diff.tuned}, but the store is of {models}")
    older = store.info.dictionary_sha256  # of the weights alone
    if diff.dictionary_sha256 not in (store.info.codes_sha256, older):
        raise ConfigError("the diff is of another dictionary than the store; give that of the dictionary of the store")


def _classes(store: StoreQueries, diff: Diff | None) -> tuple[list[str], np.ndarray]:
    """Return the names of classes, and the number of each latent's: by a diff, or by the norms of the directions alone."""
    if diff is not None:
        kinds = list(diff.kinds)
        return kinds, np.array([kinds.index(name) for name in diff.classes()])
    delta, own = store.models.delta_norm, _with_directions(store)
    if not len(delta) or len(own) != 2:
        return [], np.zeros(0, dtype=np.int64)
    first, second = own
    kinds = [f"{second} only", f"{first} only", "shared", "other", "unknown"]
    number = torch.full_like(delta, 3, dtype=torch.long)
    for i, mask in (
        (2, (delta >= SHARED[0]) & (delta <= SHARED[1])),
        (1, delta > 1 - ONLY),
        (0, delta < ONLY),
        (4, store.never_fires),
    ):
        number[mask] = i
    return kinds, number.numpy()


def _with_directions(store: StoreQueries) -> list[str]:
    """Return the names of the models with directions of their own."""
    own = {key.model for key in map(split_key, store.info.writes) if key.minus is None}
    return [name for name in store.info.names if name in own]
