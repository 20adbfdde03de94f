"""Several language models of which one is in memory at a time, for models that do not fit together."""

import gc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from saelens_lite.config import ModelFacts
from saelens_lite.errors import ConfigError
from saelens_lite.fingerprints import Fingerprint
from saelens_lite.model.language_model import LanguageModel
from saelens_lite.model.loading import load_model
from saelens_lite.model.models import Models, facts_of
from saelens_lite.ports import Key, split_key
from saelens_lite.tokens.tokenizer import Tokenizer

Loadable = LanguageModel | str | Path | Callable[[], LanguageModel]


class _Seen(Tokenizer):
    """The part of a model that stays in memory: its tokenizer and the facts about it."""

    def __init__(self, lm: LanguageModel, name: str):
        super().__init__(lm.tokenizer, name=lm.name, n_ctx=lm.n_ctx, d_vocab=lm.d_vocab)
        self.facts, self.weights = facts_of(lm, name), lm.fingerprint()
        self.device, self.is_causal, self.is_shared = lm.device, lm.is_causal, False

    def fingerprint(self) -> Fingerprint:
        """Return the fingerprint of the model."""
        return self.weights


class ModelsInTurn(Models):
    """Language models by name, each given as a name for `load_model` or as a function that loads it.

    All are loaded in turn to compare their tokenizers and to look for the hooks. `run_with` loads one again.

    hooks: those that will be read, or keys of ports.
    """

    def __init__(self, models: Mapping[str, Loadable], hooks: Sequence[str]):
        self._given, self._last = dict(models), None
        for name, given in models.items():
            if not (isinstance(given, str | Path | LanguageModel) or callable(given)):
                raise ConfigError(
                    f"{name} = {given!r:.100}; expected a model, the name or folder of one, or a function that loads it"
                )
        seen: dict[str, _Seen] = {}
        for name in models:
            lm = self._load(name)
            for hook in map(split_key, hooks):
                if hook.model in (None, name):
                    lm.hook_point(hook.hook)
            seen[name] = _Seen(lm, name)
            Models(seen)  # compares the tokenizers before the next one is loaded
            self._last: tuple[str, LanguageModel] | None = (name, lm)
            del lm
        super().__init__(seen)

    def _load(self, name: str) -> LanguageModel:
        """Return a model, after the last one has left the memory unless it is the same."""
        last, self._last = self._last, None
        if last is not None and last[0] == name:
            return last[1]
        del last
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        given = self._given[name]
        if isinstance(given, LanguageModel):
            return given
        lm = load_model(given) if isinstance(given, str | Path) else given()
        if not isinstance(lm, LanguageModel):
            raise ConfigError(f"the function that loads {name!r} returned a {type(lm).__name__}; expected a LanguageModel")
        return lm

    def run_with(self, name: str, work: Callable[[Models], Any]) -> None:
        """Load a model, call a function with it, and free its memory. The model reads the rows that all models read.

        Raises:
            ConfigError: the model is not the one that was loaded before.
        """
        lm, seen = self._load(name), self.models[name]
        if (facts_of(lm, name), lm.fingerprint()) != (seen.facts, seen.fingerprint()):
            raise ConfigError(f"loading {name!r} twice gave two different models; load the same weights each time")
        work(_OneOfSeveral(name, lm, self))

    @property
    def facts(self) -> tuple[ModelFacts, ...]:
        """The facts about each model that origins record."""
        return tuple(seen.facts for seen in self.models.values())

    def split(self, key: str) -> Key:
        """Return the parts of a port key. Raise ConfigError if it names no model here, or the difference of two."""
        parts = split_key(key)
        if parts.minus is not None:
            raise ConfigError(f"{key!r} needs two models at once; give loaded models, or read {parts.model} and {parts.minus}")
        self.check_name(parts.model)
        return parts


class _OneOfSeveral(Models):
    """A model of several in turn, which reads token ids as all of them do together."""

    def __init__(self, name: str, lm: LanguageModel, reader: ModelsInTurn):
        super().__init__({name: lm})
        Tokenizer.__init__(self, reader.tokenizer, name=self.name, n_ctx=reader.n_ctx, d_vocab=reader.d_vocab)
        self._reader = reader

    @property
    def special_ids(self) -> frozenset[int]:
        """Token ids that stand for no text in any of the models."""
        return self._reader.special_ids

    @property
    def template(self) -> list[tuple[int, ...]]:
        """The sequences of token ids of the chat template that all of them leave out."""
        return self._reader.template

    @property
    def is_causal(self) -> bool:
        """True if no position reads a later one in any of the models."""
        return self._reader.is_causal
