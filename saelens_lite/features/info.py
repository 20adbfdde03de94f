"""The facts about a feature store: its inputs, its settings and the dictionary that it belongs to."""

import hashlib
import json
from typing import Any

import torch
from pydantic import Field, NonNegativeInt, model_serializer, model_validator

from saelens_lite.config import MOST, FrozenConfig, ModelFacts
from saelens_lite.dictionary import Dictionary
from saelens_lite.errors import ConfigError, UserError
from saelens_lite.features.explanations import neuronpedia_id

_NOT_OF_CONTEXTS = {"text", "neuronpedia", "partner_tokens", "raw_unembedding"}  # all other facts decide the contexts
_OF_OLDER_CONTEXTS = {
    *("dictionary_sha256", "text_sha256", "model", "reads", "n_tokens", "seed"),
    *("top_n", "n_groups", "group_size", "n_random", "n_silent", "window"),
}
_OF_CODES = ("rule", "d_sae", "options", "token_norm", "dictionary_sha256")  # the keys of `facts_of`
_UNKNOWN_TO_OLDER = ("neuronpedia", "models", "model_sha256", "precision", "processing")

LENGTH, OLDER_LENGTH = 16, 8  # characters of a hash of contexts


class StoreInfo(FrozenConfig):
    """The inputs and settings that a feature store was built from."""

    model: str | None = Field(description="Model name, Hub id or folder; None for a store of activations, without a model.")
    revision: str | None = Field(description="Commit of the model.")
    models: tuple[ModelFacts, ...] = Field(
        (), max_length=100, description="The models, if the dictionary reads or writes several; `revision` is unset then."
    )
    model_sha256: str | None = Field(None, description="Fingerprint of the weights of the model or models; None: unknown.")
    precision: str | None = Field(
        None, max_length=40, description="Number type of the forward passes; None: unknown, or several."
    )
    processing: tuple[str, ...] = Field((), max_length=100, description="Changes made to the weights of the model.")
    reads: tuple[str, ...] = Field(min_length=1, description="Hooks that the dictionary reads.")
    writes: tuple[str, ...] = Field(min_length=1, description="Hooks that the dictionary writes.")
    rule: str = Field(description="Sparsity rule of the dictionary.")
    d_sae: int = Field(gt=0, le=MOST, description="Number of latents.")
    n_tokens: int = Field(gt=0, le=MOST, description="Activations encoded.")
    partner_tokens: int | None = Field(
        None, gt=0, le=MOST, description="Tokens of the sample on which partners of latents are counted; None: all tokens."
    )
    top_n: int = Field(gt=0, le=MOST, description="Largest number of strongest contexts kept for a latent.")
    n_groups: int = Field(gt=0, le=MOST, description="Groups of a latent's activations by size, equally many in each.")
    group_size: int = Field(gt=0, le=MOST, description="Contexts drawn from each group.")
    n_random: int = Field(gt=0, le=MOST, description="Contexts drawn from all activations of a latent.")
    n_silent: int = Field(gt=0, le=MOST, description="Contexts drawn from those in which a latent does not fire.")
    window: tuple[NonNegativeInt, NonNegativeInt] = Field(description="Tokens shown before and after the peak.")
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of all random draws.")
    raw_unembedding: bool = Field(False, description="Compute effects on logits without the final norm's scale.")
    bos_id: int | None = Field(description="Token that begins a row.")
    text: str | None = Field(None, description="Name of the text.")
    text_sha256: str = Field(description="Hash of token ids and kept positions; without a model, of the activations.")
    dictionary_sha256: str = Field(description="Hash of the dictionary's weights, see `weights_hash`.")
    options: dict[str, Any] = Field(description="Options of the dictionary's rule.")
    token_norm: str | None = Field(description="Norm that the dictionary applies to each activation; None for our own.")
    neuronpedia: str | None = Field(None, description="Neuronpedia id of the dictionary, if it is known.")

    @model_serializer(mode="wrap")
    def _as_older_stores(self, handler: Any) -> dict[str, Any]:
        """Leave out facts that are unknown and that older stores lack, and models if there are not several."""
        return {name: value for name, value in handler(self).items() if name not in _UNKNOWN_TO_OLDER or value}

    @model_validator(mode="before")
    @classmethod
    def _of_older_stores(cls, values: Any) -> Any:
        """Convert the keys hook and target_hook of older stores to `reads` and `writes`."""
        if not isinstance(values, dict) or "hook" not in values:
            return values
        values = dict(values)
        hook, target = values.pop("hook"), values.pop("target_hook", None)
        return values | {"reads": (hook,), "writes": (hook if target is None else target,)}

    @property
    def place(self) -> str:
        """The hooks in words, such as "hook" or "read hook → written hook"."""
        reads, writes = (" + ".join(side) for side in (self.reads, self.writes))
        return reads if reads == writes else f"{reads} → {writes}"

    @property
    def names(self) -> tuple[str, ...]:
        """The names of several models; empty for one."""
        return tuple(facts.name for facts in self.models)

    @property
    def unit(self) -> str:
        """The word for what a latent fires on: token, or row of activations without a model."""
        return "row" if self.model is None else "token"

    @property
    def contexts(self) -> str:
        """A short hash of all that decides which contexts the store shows; stores with the same one show the same.

        That is the dictionary with its rule and options, the model with its precision, the text, and the settings.
        """
        return _hash_of(self.model_dump(mode="json", exclude=_NOT_OF_CONTEXTS))[:LENGTH]

    @property
    def older_contexts(self) -> str:
        """The hash that older versions wrote in place of `contexts`. Stores that differ in their rule's options share it."""
        return _hash_of(self.model_dump(mode="json", include=_OF_OLDER_CONTEXTS))[:OLDER_LENGTH]

    @property
    def codes_sha256(self) -> str:
        """The hash of all facts of the dictionary that its codes depend on, see `codes_hash`."""
        return _hash_of({name: getattr(self, name) for name in _OF_CODES})

    def check_text(self, what: str) -> None:
        """Raise UserError unless the store has the model and the text that a request needs."""
        if self.model is None:
            raise UserError(
                f"{what}: this needs a model and its text, but the store was built from activations "
                "(FeatureStore.from_activations); use FeatureStore.build with a model"
            )

    def check_one_model(self, what: str) -> None:
        """Raise UserError if the store is of a dictionary of several models."""
        if self.models:
            raise UserError(f"{what} takes a store of one model, but this one is of {', '.join(self.names)}")

    def check_dictionary(self, dictionary: Dictionary) -> None:
        """Raise ConfigError unless the store was built from this dictionary."""
        facts = facts_of(dictionary)
        if differs := [name for name, value in facts.items() if value != getattr(self, name)]:
            raise ConfigError(
                f"the store is of another dictionary ({self.rule}, {self.d_sae} latents, {self.place}); they differ in "
                f"{' and '.join(differs)}: build a store of this dictionary, or load the one that the store was built from"
            )


def facts_of(dictionary: Dictionary) -> dict[str, Any]:
    """Return the facts of a dictionary that its codes depend on, as fields of a StoreInfo."""
    return {
        "rule": dictionary.rule.plugin_name,
        "d_sae": dictionary.d_sae,
        "options": dictionary.rule.config.model_dump(mode="json"),
        "token_norm": dictionary.token_norm,
        "dictionary_sha256": weights_hash(dictionary),
    }


def codes_hash(dictionary: Dictionary) -> str:
    """Return the SHA-256 of all facts of a dictionary that its codes depend on: weights, rule, options and token norm."""
    return _hash_of(facts_of(dictionary))


def _hash_of(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def is_of_older(contexts: str) -> bool:
    """Return whether a hash of contexts is of an older version, see `StoreInfo.older_contexts`."""
    return len(contexts) == OLDER_LENGTH


def own_id(dictionary: Dictionary) -> str | None:
    """Return the Neuronpedia id that came with a dictionary; None if it has none that is valid."""
    read_from = dictionary.training_record.get("read_from")  # may be a stranger's
    own = read_from.get("neuronpedia") if isinstance(read_from, dict) else None
    return neuronpedia_id(own) if isinstance(own, str) else None


def weights_hash(dictionary: Dictionary) -> str:
    """Return the SHA-256 of the names, types, shapes and values of a dictionary's parameters and buffers.

    Dictionaries that differ in the options of their rule alone, such as k, have the same one: see `codes_hash`.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(dictionary.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().flatten().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
