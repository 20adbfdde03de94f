"""Several language models that read the same token ids, such as a base model and a fine-tuned one.

Their activations are named by port keys (`saelens_lite.ports`): "base:blocks.3.hook_resid_pre" are those of the model "base",
and "chat-base:blocks.3.hook_resid_pre" are the difference chat − base.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelens_lite.config import ModelFacts, Origin
from saelens_lite.errors import ConfigError, HookError
from saelens_lite.fingerprints import Fingerprint
from saelens_lite.keys import MODEL_NAME
from saelens_lite.model.language_model import LanguageModel
from saelens_lite.model.port_places import PortPlace
from saelens_lite.model.splice import PositionedEdit, Reconstructor, Splice
from saelens_lite.ports import Hooks, Key, PortNames, difference, key_of, split_key
from saelens_lite.tokens import Given, TokenRows
from saelens_lite.tokens.inputs import Ids, token_ids
from saelens_lite.tokens.same_ids import difference_of_ids
from saelens_lite.tokens.template import has_template
from saelens_lite.tokens.tokenizer import Tokenizer


class Models(Tokenizer):
    """Language models by name, which read the same token ids. The first one's tokenizer reads text.

    `{"base": lm, "chat": lm2}` stands for one wherever a model is taken.

    Raises:
        ConfigError: no model is given, a name has other characters than letters, digits, _ and dots, or the same token ids
            do not stand for the same text in all models.
    """

    def __init__(self, models: Mapping[str, Tokenizer]):
        self.models: dict[str, Any] = dict(models)
        if not self.models:
            raise ConfigError('give models by name, such as {"base": lm, "chat": lm2}')
        for name, lm in self.models.items():
            if not isinstance(lm, Tokenizer):
                raise ConfigError(f"{name} = {lm!r:.100} is not a model; load it with sl.load_model")
            if not re.fullmatch(MODEL_NAME, name):
                raise ConfigError(f"{name!r} cannot name a model; use letters, digits, _ and dots, such as base or chat")
        self.first, *others = self.models.values()
        for other in others:
            if difference := difference_of_ids(self.first, other):
                raise ConfigError(f"the models do not read the same token ids: {difference}")
        super().__init__(
            self.first.tokenizer,
            name=", ".join(f"{name} = {lm.name}" for name, lm in self.models.items()),
            n_ctx=min(lm.n_ctx for lm in self.models.values()),
            d_vocab=min(lm.d_vocab for lm in self.models.values()),
        )

    def __getitem__(self, name: str) -> LanguageModel:
        """Return the model with that name."""
        self.check_name(name)
        return self.models[name]

    def check_name(self, name: str | None) -> None:
        """Raise ConfigError unless a model has that name."""
        if name not in self.models:
            raise ConfigError(f"there is no model {name!r}; the models are {', '.join(self.models)}")

    @property
    def special_ids(self) -> frozenset[int]:
        """Token ids that stand for no text in any of the models, such as the turn markers that only a chat model has."""
        return frozenset().union(*(lm.special_ids for lm in self.models.values()))

    @cached_property
    def template(self) -> list[tuple[int, ...]]:
        """The sequences of token ids that the chat template of the last model that has one puts around messages."""
        chat = [lm for lm in self.models.values() if has_template(lm.tokenizer)]
        return chat[-1].template if chat else super().template

    @property
    def device(self) -> torch.device:
        """Device of the first model, to which activations of the others are moved."""
        return self.first.device

    @property
    def is_shared(self) -> bool:
        """True if all processes of the team hold a model together; see `LanguageModel.is_shared`."""
        return any(lm.is_shared for lm in self.models.values())

    @property
    def is_causal(self) -> bool:
        """True if no position reads a later one in any model."""
        return all(lm.is_causal for lm in self.models.values())

    @property
    def facts(self) -> tuple[ModelFacts, ...]:
        """The facts about each model that origins record."""
        return tuple(facts_of(lm, name) for name, lm in self.models.items())

    def fingerprint(self) -> Fingerprint:
        """Return a hash of the names and fingerprints of the models."""
        whole, sampled = hashlib.sha256(), hashlib.sha256()
        for name, lm in self.models.items():
            own = lm.fingerprint()
            whole.update(f"{name} {own}\n".encode())
            sampled.update(f"{name} {own.like('')}\n".encode())
        return Fingerprint(whole.hexdigest(), sampled.hexdigest())

    @contextmanager
    def redrawn(self, seed: int = 0) -> Iterator["Models"]:
        """Put the entries of each weight tensor of every model in random order; see `LanguageModel.redrawn`.

        Tensors of one shape get the same order in all models, so that their differences are shuffled alike.
        """
        with ExitStack() as stack:
            distinct = {id(lm.module): lm for lm in self.models.values()}
            redrawn = {key: stack.enter_context(lm.redrawn(seed)) for key, lm in distinct.items()}
            yield Models({name: redrawn[id(lm.module)] for name, lm in self.models.items()})

    def split(self, key: str) -> Key:
        """Return the parts of a port key, after checking that the models have that hook.

        Raises:
            ConfigError: the key names no model, or one that is not here.
            HookError: a model lacks the hook.
        """
        parts = split_key(key)
        if parts.model is None:
            raise ConfigError(f"{key!r} names no model; write {key_of(key, next(iter(self.models)))!r}, for example")
        for name in (parts.model, parts.minus):
            if name is not None:
                self[name].hook_point(parts.hook)
        return parts

    def place(self, key: str) -> PortPlace:
        """Return the models and the hook of a port key; see `split` for errors."""
        model, minus, hook = self.split(key)
        return PortPlace(self[model], hook, None if minus is None else self[minus])

    def has_hook(self, key: str) -> bool:
        """Return whether the models have the hook that a port key names."""
        try:
            self.split(key)
        except (ConfigError, HookError):
            return False
        return True

    def keys_of(self, hooks: Sequence[str]) -> list[str]:
        """Return port keys. A hook without a model stands for that hook in every model."""
        keys = [hook if split_key(hook).model else key_of(hook, name) for hook in hooks for name in self.models]
        keys = list(dict.fromkeys(keys))
        for key in keys:
            self.split(key)
        return keys

    def hooks_of(self, dictionary: Any, hook: str | None = None) -> Hooks:
        """Return the keys of the ports that a dictionary reads and writes; see `LanguageModel.hooks_of`."""
        if hook is not None:
            raise ConfigError(f"hook = {hook!r} names a hook of one model; a dictionary of several models names its own")
        self.check_origin(dictionary.origin)
        for port in (*dictionary.reads, *dictionary.writes):
            if port.key is None or port.model is None:
                raise ConfigError(
                    f"a port of the dictionary names {'no hook' if port.key is None else f'{port.key} without a model'}; make "
                    "it with Port(hook=…, width=…, model=…)"
                )
            self.split(port.key)
        return Hooks(*(tuple(port.key for port in side) for side in (dictionary.reads, dictionary.writes)))

    def check_origin(self, origin: Origin) -> None:
        """Raise ConfigError if a model is processed otherwise than in training; see `LanguageModel.check_origin`."""
        for facts in origin.models:
            self[facts.name].check_origin(origin.of(facts.name))

    def warn_of_precision(self, origin: Origin) -> None:
        """Log once for each model that computes in another number type than in training."""
        for facts in origin.models:
            self[facts.name].warn_of_precision(origin.of(facts.name))

    def to_tokens(self, texts: Given, *, attention_mask: Any = None, prepend_bos: bool | None = None) -> TokenRows:
        """Return one row for each text, or token ids as rows, as the first model reads them; see `LanguageModel.to_tokens`."""
        return self.first.to_tokens(texts, attention_mask=attention_mask, prepend_bos=prepend_bos)

    def run(
        self, texts: Given, keys: Sequence[str] | str, *, attention_mask: Any = None, prepend_bos: bool | None = None
    ) -> dict[str, Float[Tensor, "batch pos d"]]:
        """Return the activations at ports by key, from one forward pass of each model; see `LanguageModel.run`.

        Differences are computed in float32 at least.
        """
        keys = [keys] if isinstance(keys, str) else list(dict.fromkeys(keys))
        parts = {key: self.split(key) for key in keys}
        if not parts:
            raise ConfigError("name at least one port")
        settings: dict[str, Any] = {"attention_mask": attention_mask}
        if not isinstance(texts, Ids) and token_ids(texts, attention_mask) is None:
            texts, settings = self.first.to_tokens(texts, prepend_bos=prepend_bos), {}
        acts: dict[tuple[str, str], Tensor] = {}
        for name, lm in self.models.items():
            if hooks := [part.hook for part in parts.values() if name in (part.model, part.minus)]:
                own = lm.run(texts, hooks, **settings)
                acts |= {(name, hook): x.to(self.device) for hook, x in own.items()}
        return {key: _value(acts, part) for key, part in parts.items()}

    @contextmanager
    def splice(
        self,
        dictionary: Reconstructor,
        edits: PositionedEdit | Sequence[PositionedEdit] = (),
        *,
        ports: PortNames = None,
        error_term: bool | None = None,
        keep: Bool[Tensor, "batch pos"] | None = None,
    ) -> Iterator[None]:
        """Replace activations by the dictionary's reconstruction, or edit some of their codes, in each model's forward passes.

        See `LanguageModel.splice`. Passes of each model whose ports are changed read the other models on the same tokens, in
        passes of their own in which nothing is replaced. At a port that is a difference chat − base, the activation of chat
        becomes that of base plus the reconstruction, or gets the change by the edits; that of base stays.

        Args:
            ports: Keys or hooks of the write ports to change; default: all.

        Raises:
            ConfigError: as for `LanguageModel.splice`; or a pass of a model has no token ids, which the other models need.
        """
        with Splice(self, dictionary, edits, ports=ports, error_term=error_term, keep=keep).in_force():
            yield

    def __repr__(self) -> str:
        return f"Models({', '.join(f'{name}={lm!r}' for name, lm in self.models.items())})"


def facts_of(lm: LanguageModel, name: str = "") -> ModelFacts:
    """Return the facts about a model that origins record."""
    return ModelFacts(
        name=name,
        model=lm.name,
        revision=lm.revision,
        model_class=type(lm.module).__name__,
        processing=lm.processing,
        precision=None if lm.precision == "float32" else lm.precision,
    )


def _value(acts: dict[tuple[str, str], Tensor], part: Key) -> Float[Tensor, "batch pos d"]:
    x = acts[part.model, part.hook]
    return x if part.minus is None else difference(x, acts[part.minus, part.hook])


AnyModel = LanguageModel | Models


def as_model(given: AnyModel | Mapping[str, LanguageModel]) -> AnyModel:
    """Return a model as it is, and a mapping of models by name as `Models`."""
    return Models(given) if isinstance(given, Mapping) else given
