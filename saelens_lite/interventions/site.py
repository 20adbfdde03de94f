"""A dictionary at its hooks in a model: its codes there, and the logits after a change to the activations it writes."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelens_lite.codes import SparseCodes
from saelens_lite.devices import on_device
from saelens_lite.dictionary import Dictionary
from saelens_lite.errors import ShapeError, TextError
from saelens_lite.model import LanguageModel
from saelens_lite.model.passes import read_lengths
from saelens_lite.ports import apart, together
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
    """A dictionary at the hooks of a model that it reads and writes; a copy of it if it is on another device.

    Raises:
        ConfigError: a port names no hook, or the model is processed in another way.
        HookError: the model lacks a hook.
    """

    def __init__(self, dictionary: Dictionary, lm: LanguageModel, hook: str | None = None):
        self.lm, self.dictionary, self.hooks = lm, on_device(dictionary, lm.device), lm.hooks_of(dictionary, hook)
        self.reads, self.writes = (" + ".join(side) for side in self.hooks)

    def rows(self, text: Given, attention_mask: Any = None) -> list[CountedRow]:
        """Return each text or row of token ids without padding. TokenRows keep their own counted positions.

        Raises:
            TextError: the text is empty, or a row has no counted position.
            ShapeError: token ids or a mask do not fit the model.
        """
        given = self.lm.to_tokens(text, attention_mask=attention_mask, prepend_bos=self.lm.wants_bos(self.dictionary.origin))
        if not isinstance(text, TokenRows):
            counted = self.lm.countable(given.tokens, self.dictionary.origin)
            given = given._replace(keep=counted if given.holds_token is None else counted & given.holds_token)
        elif given.length is None:
            given = given._replace(length=read_lengths(self.lm, given))
        each = zip(given.tokens, given.keep, given.lengths.tolist(), strict=True)
        rows = [CountedRow(*(x[:n].to(self.lm.device) for x in row)) for *row, n in each]
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
        acts = {name: x[0] for name, x in self.lm.run(_as_given(row.tokens), [*self.hooks.all, *more_hooks]).items()}
        x, y = (together(acts, side) for side in self.hooks)
        codes = self.dictionary.encode(x)
        y_hat = self.dictionary.decode(codes, x)
        if y_hat.shape != y.shape:
            raise ShapeError(f"the dictionary gives {list(y_hat.shape)}; {self.writes} of this model is {list(y.shape)}")
        scale = self.dictionary.output_scale(x).expand(len(x), 1)
        return Reading(*row, codes, y.to(y_hat.dtype) - y_hat, scale, x, acts)

    def logits(
        self, tokens: Int[Tensor, " pos"], added: Float[Tensor, "n pos d_out"], *, differentiable: bool = False
    ) -> Float[Tensor, "n pos d_vocab"]:
        """Return the logits of n variants of one row. Variant i adds added[i] to the activations at the written hooks."""
        with ExitStack() as stack:
            for hook, part in zip(self.hooks.writes, apart(added, self.dictionary.writes), strict=True):
                stack.enter_context(self.lm.replace(hook, lambda y, part=part: y + part.to(y.dtype)))
            return self.lm.logits(_as_given(tokens, len(added)), differentiable=differentiable)

    def clean_logits(self, tokens: Int[Tensor, " pos"]) -> Float[Tensor, "1 pos d_vocab"]:
        """Return the model's own logits of one row. An active splice affects them."""
        return self.lm.logits(_as_given(tokens))


def _as_given(tokens: Int[Tensor, " pos"], n: int = 1) -> Ids:
    """Return n copies of a checked row."""
    return Ids(tokens.expand(n, -1), None)


def pieces(n: int, tokens: Int[Tensor, " pos"], batch_tokens: int) -> Iterator[slice]:
    """Yield slices of n variants of one row, of about `batch_tokens` tokens each."""
    size = max(1, batch_tokens // len(tokens))
    return (slice(start, min(start + size, n)) for start in range(0, n, size))
