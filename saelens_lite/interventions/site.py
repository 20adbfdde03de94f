"""Where a dictionary stands in a model: what it reads there, and logits with something added to what it writes."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelens_lite.codes import SparseCodes
from saelens_lite.dictionary import Dictionary
from saelens_lite.errors import ShapeError, TextError
from saelens_lite.model import LanguageModel
from saelens_lite.ports import apart, together
from saelens_lite.tokens import Given, TokenRows
from saelens_lite.tokens.inputs import Ids


class Row(NamedTuple):
    """Token ids without padding, and the positions that count: those at which the dictionary was trained."""

    tokens: Int[Tensor, " pos"]
    counted: Bool[Tensor, " pos"]


class Reading(NamedTuple):
    """A row's codes, and the difference between the activations that the dictionary writes and its output."""

    tokens: Int[Tensor, " pos"]
    counted: Bool[Tensor, " pos"]
    codes: SparseCodes
    error: Float[Tensor, "pos d_out"]
    scale: Float[Tensor, "pos 1"]  # what the codes' sum of directions is multiplied by
    x: Float[Tensor, "pos d_in"]
    acts: dict[str, Float[Tensor, "pos _"]]


class Site:
    """A dictionary at the hooks of a model that it reads and writes.

    Raises:
        ConfigError: a port names no hook; a model with other processing.
        HookError: a hook the model lacks.
    """

    def __init__(self, dictionary: Dictionary, lm: LanguageModel, hook: str | None = None):
        self.lm, self.dictionary, self.hooks = lm, dictionary, lm.hooks_of(dictionary, hook)
        self.reads, self.writes = (" + ".join(side) for side in self.hooks)

    def rows(self, text: Given, attention_mask: Any = None) -> list[Row]:
        """Return each text or row of token ids without padding; the positions of TokenRows that count are their own.

        Raises:
            TextError: no text, or a row in which no position counts.
            ShapeError: token ids or a mask that do not fit the model.
        """
        found = self.lm.to_tokens(text, attention_mask=attention_mask, prepend_bos=self.lm.wants_bos(self.dictionary.origin))
        if not isinstance(text, TokenRows):
            counted = self.lm.countable(found.tokens, self.dictionary.origin)
            found = found._replace(keep=counted if found.holds_token is None else counted & found.holds_token)
        elif found.length is None:
            found = found._replace(length=self.lm.read_lengths(found))
        widths = [found.tokens.shape[1]] * len(found.tokens) if found.length is None else found.length.tolist()
        rows = [Row(*(x[:n].to(self.lm.device) for x in row)) for *row, n in zip(found.tokens, found.keep, widths, strict=True)]
        nothing = [number for number, row in enumerate(rows) if not row.counted.any()]
        if nothing or not rows:
            raise TextError(
                f"row {nothing[0] if nothing else 0} has no position that counts: special tokens and positions that the "
                "dictionary was never trained on are left out"
            )
        return rows

    @torch.no_grad()
    def read(self, row: Row, *more_hooks: str) -> Reading:
        """Return what the dictionary makes of one row, and activations at more hooks.

        Raises:
            ShapeError: the dictionary has another width than the hook.
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
        """Return logits of n variants of one row, each with something added to the activations at the hooks that are written."""
        with ExitStack() as stack:
            for hook, part in zip(self.hooks.writes, apart(added, self.dictionary.writes), strict=True):
                stack.enter_context(self.lm.replace(hook, lambda y, part=part: y + part.to(y.dtype)))
            return self.lm.logits(_as_given(tokens, len(added)), differentiable=differentiable)

    def clean_logits(self, tokens: Int[Tensor, " pos"]) -> Float[Tensor, "1 pos d_vocab"]:
        """Return logits of one row as the model gives them; a splice in force is seen by them."""
        return self.lm.logits(_as_given(tokens))


def _as_given(tokens: Int[Tensor, " pos"], n: int = 1) -> Ids:
    """Return n copies of a row, which has been checked before."""
    return Ids(tokens.expand(n, -1), None)


def pieces(n: int, tokens: Int[Tensor, " pos"], batch_tokens: int) -> Iterator[slice]:
    """Return slices of n variants of one row, of about `batch_tokens` tokens each."""
    size = max(1, batch_tokens // len(tokens))
    return (slice(start, min(start + size, n)) for start in range(0, n, size))
