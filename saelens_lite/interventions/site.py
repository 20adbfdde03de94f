"""A dictionary at its ports in models: its codes there, and the logits of a model after a change of what it writes."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelens_lite.codes import SparseCodes
from saelens_lite.devices import on_device
from saelens_lite.dictionary import Dictionary
from saelens_lite.errors import ConfigError, ShapeError, TextError
from saelens_lite.interventions.edits import Edit
from saelens_lite.model import AnyModel, LanguageModel, Models, as_model
from saelens_lite.model.passes import read_lengths
from saelens_lite.model.port_places import PortPlace, check_is_complete, splice_places
from saelens_lite.ports import PortNames, apart, chosen, key_of, together
from saelens_lite.tokens import Given, TokenRows
from saelens_lite.tokens.inputs import Ids


class CountedRow(NamedTuple):
    """Token ids without padding, and the counted positions: those that the dictionary was trained on."""

    tokens: Int[Tensor, " pos"]
    counted: Bool[Tensor, " pos"]


class Reading(NamedTuple):
    """The codes of a row, and the difference between the activations at the written hooks and the dictionary's output."""

    tokens: Int[Tensor, " pos"]
    counted: Bool[Tensor, " pos"]
    codes: SparseCodes
    error: Float[Tensor, "pos d_out"]
    scale: Float[Tensor, "pos 1"]  # factor of Σ code · direction
    x: Float[Tensor, "pos d_in"]
    acts: dict[str, Float[Tensor, "pos _"]]


class Site:
    """A dictionary at the hooks of models that it reads and writes; a copy of it if it is on another device.

    `ports` are those to change (keys or hooks; default: all), and `in_model` names the model whose logits are read, if the
    dictionary writes several. Only ports of that model have an effect there. `has_codes` is False if only directions of the
    dictionary are used; other models may then be missing.

    Raises:
        ConfigError: a port names no hook or does not exist; a model is missing, or processed in another way.
        HookError: a model lacks a hook.
    """

    def __init__(
        self,
        dictionary: Dictionary,
        lm: AnyModel | Mapping[str, LanguageModel],
        hook: str | None = None,
        *,
        ports: PortNames = None,
        in_model: str | None = None,
        has_codes: bool = True,
    ):
        self.models: AnyModel = as_model(lm)
        self.dictionary, self.hook, self.has_codes = on_device(dictionary, self.models.device), hook, has_codes
        if has_codes:
            check_is_complete(self.models, dictionary)
            self.hooks = self.models.hooks_of(dictionary, hook)
            self.reads = " + ".join(self.hooks.reads)
        self._numbers = chosen(dictionary.writes, ports)
        self.ports, self.in_model = ports, in_model
        if in_model is not None:
            self._choose(in_model)

    def _choose(self, in_model: str) -> None:
        """Leave the ports of one model only. Raise ConfigError if it has no such port."""
        written = self.dictionary.writes
        if not isinstance(self.models, Models):
            raise ConfigError(f"in_model = {in_model!r} names one of several models, but one was given: leave it out")
        _ = self.models[in_model]
        self._numbers = [i for i in self._numbers if written[i].model == in_model]
        if not self._numbers:
            asked = "writes no port of" if self.ports is None else f"has no port of {self.ports} in"
            raise ConfigError(f"in_model = {in_model!r}: the dictionary {asked} that model, so nothing changes there")
        self.ports = [port.key for port in (written[i] for i in self._numbers) if port.key is not None]

    @cached_property
    def name(self) -> str | None:
        """The name of the model whose logits are read; None if one was given without a name.

        Raises:
            ConfigError: the ports belong to several models, and none was chosen.
        """
        if not isinstance(self.models, Models):
            return None
        names = list(dict.fromkeys(self.dictionary.writes[i].model for i in self._numbers))
        if len(names) > 1:
            listed = " or ".join(f"in_model={name!r}" for name in names)
            raise ConfigError(f"effects are measured in one model at a time: give {listed}, or ports= of one model")
        return names[0]

    @property
    def lm(self) -> LanguageModel:
        """The model whose logits are read."""
        return self.models[self.name] if isinstance(self.models, Models) else self.models

    @cached_property
    def places(self) -> dict[int, PortPlace]:
        """The places that are changed, by number of write port."""
        _ = self.name
        settings = {"hook": self.hook, "ports": self.ports, "reads": self.has_codes}
        return splice_places(self.models, self.dictionary, **settings).writes

    @property
    def writes(self) -> str:
        """The hooks that are changed in words; those of several models with their names."""
        ports = self.dictionary.writes
        return " + ".join(key_of(place.hook, self.name, self.name and ports[i].minus) for i, place in self.places.items())

    def key(self, hook: str) -> str:
        """Return the name of the activations at a hook of the model whose logits are read."""
        return key_of(hook, self.name)

    def parts(self, x: Float[Tensor, "*shape d_out"]) -> Float[Tensor, "*shape d"]:
        """Return the entries of the changed ports."""
        parts = apart(x, self.dictionary.writes)
        return together([parts[i] for i in self.places])

    def whole(self, x: Float[Tensor, "*shape d"]) -> Float[Tensor, "*shape d_out"]:
        """Return a vector of all write ports that is zero except at the changed ones, of which x has the entries."""
        ports, widths = self.dictionary.writes, [self.dictionary.writes[i].width for i in self.places]
        given = dict(zip(self.places, x.split(widths, dim=-1), strict=True))
        return together([given.get(i, x.new_zeros(*x.shape[:-1], port.width)) for i, port in enumerate(ports)])

    def splice(self, edits: Edit | Sequence[Edit]) -> AbstractContextManager[None]:
        """Edit codes at the changed ports within the block."""
        _ = self.places
        settings = {} if self.hook is None else {"hook": self.hook}
        return self.models.splice(self.dictionary, edits, ports=self.ports, **settings)

    def rows(self, text: Given, attention_mask: Any = None) -> list[CountedRow]:
        """Return each text or row of token ids without padding. TokenRows keep their own counted positions.

        Raises:
            TextError: the text is empty, or a row has no counted position.
            ShapeError: token ids or a mask do not fit the model.
        """
        lm, origin = self.models, self.dictionary.origin
        given = lm.to_tokens(text, attention_mask=attention_mask, prepend_bos=lm.wants_bos(origin))
        if not isinstance(text, TokenRows):
            counted = lm.countable(given.tokens, origin)
            given = given._replace(keep=counted if given.holds_token is None else counted & given.holds_token)
        elif given.length is None:
            given = given._replace(length=read_lengths(lm, given))
        each = zip(given.tokens, given.keep, given.lengths.tolist(), strict=True)
        rows = [CountedRow(*(x[:n].to(lm.device) for x in row)) for *row, n in each]
        nothing = [number for number, row in enumerate(rows) if not row.counted.any()]
        if nothing or not rows:
            raise TextError(
                f"row {nothing[0] if nothing else 0} has no position that counts: special tokens and positions that the "
                "dictionary was never trained on are left out; give a longer text"
            )
        return rows

    @torch.no_grad()
    def read(self, row: CountedRow, *more_hooks: str) -> Reading:
        """Return the dictionary's reading of one row, and the activations at more hooks.

        Raises:
            ShapeError: the dictionary and the hook differ in width.
        """
        names = [*self.hooks.all, *more_hooks]
        acts = {name: x[0] for name, x in self.models.run(_as_given(row.tokens), names).items()}
        x, y = (together(acts, side) for side in self.hooks)
        codes = self.dictionary.encode(x)
        y_hat = self.dictionary.decode(codes, x)
        if y_hat.shape != y.shape:
            writes = " + ".join(self.hooks.writes)
            raise ShapeError(f"the dictionary gives {list(y_hat.shape)}; {writes} of this model is {list(y.shape)}")
        scale = self.dictionary.output_scale(x).expand(len(x), 1)
        return Reading(*row, codes, y.to(y_hat.dtype) - y_hat, scale, x, acts)

    def logits(
        self, tokens: Int[Tensor, " pos"], added: Float[Tensor, "n pos d_out"], *, differentiable: bool = False
    ) -> Float[Tensor, "n pos d_vocab"]:
        """Return the logits of n variants of one row. Variant i adds added[i] to the activations at the changed ports."""
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(differentiable))
            parts = apart(added, self.dictionary.writes)
            for i, place in self.places.items():
                stack.enter_context(self.lm.replace(place.hook, lambda y, part=parts[i]: y + part.to(y)))
            return self.lm.logits(_as_given(tokens, len(added)), differentiable=differentiable).to(added.device)

    def clean_logits(self, tokens: Int[Tensor, " pos"]) -> Float[Tensor, "1 pos d_vocab"]:
        """Return the model's own logits of one row. An active splice affects them."""
        return self.lm.logits(_as_given(tokens)).to(tokens.device)


def _as_given(tokens: Int[Tensor, " pos"], n: int = 1) -> Ids:
    """Return n copies of a checked row."""
    return Ids(tokens.expand(n, -1), None)


def pieces(n: int, tokens: Int[Tensor, " pos"], batch_tokens: int) -> Iterator[slice]:
    """Yield slices of n variants of one row, of about `batch_tokens` tokens each."""
    size = max(1, batch_tokens // len(tokens))
    return (slice(start, min(start + size, n)) for start in range(0, n, size))
