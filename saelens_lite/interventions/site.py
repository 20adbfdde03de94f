"""Where a dictionary stands in a model: what it reads there, and logits with something added to what it writes."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelens_lite.codes import SparseCodes
from saelens_lite.dictionary import Dictionary
from saelens_lite.errors import ConfigError, ShapeError, TextError
from saelens_lite.model import LanguageModel
from saelens_lite.tokens import TokenRows


class Reading(NamedTuple):
    """One row without padding: its codes, and what they leave over of the activation the dictionary predicts."""

    tokens: Int[Tensor, " pos"]
    codes: SparseCodes
    error: Float[Tensor, "pos d_out"]
    scale: Float[Tensor, "pos 1"]  # what the codes' sum of directions is multiplied by
    acts: dict[str, Float[Tensor, "pos _"]]


class Site:
    """A dictionary at its hook of a model. `target` is where its output stands: the hook itself, or a transcoder's target.

    Raises:
        ConfigError: no hook is named; a transcoder that names no target; a model with other processing.
        HookError: a hook the model lacks.
    """

    def __init__(self, dictionary: Dictionary, lm: LanguageModel, hook: str | None = None):
        self.lm, self.dictionary, self.hook = lm, dictionary, lm.hook_of(dictionary.origin, hook)
        if dictionary.is_transcoder and dictionary.origin.target_hook is None:
            raise ConfigError("the transcoder does not say which hook it predicts; set origin.target_hook")
        self.target = dictionary.origin.target_hook or self.hook
        lm.hook_point(self.target)

    def rows(self, text: str | Sequence[str] | Tensor | TokenRows) -> list[Int[Tensor, " pos"]]:
        """Token ids of each text or row, without padding.

        Raises:
            TextError: no text, or a row in which no position counts.
        """
        if isinstance(text, Tensor):
            rows = list(text if text.ndim == 2 else text[None])
        else:
            if not isinstance(text, TokenRows):
                text = self.lm.to_tokens(text, prepend_bos=self.dictionary.origin.prepend_bos is not False)
            position = torch.arange(text.keep.shape[1], device=text.keep.device)
            length = (text.keep * (position + 1)).amax(1)  # as far as the last position that counts
            rows = [tokens[:n] for tokens, n in zip(text.tokens, length.tolist(), strict=True)]
        if not rows or not all(self.counted(len(row)).any() for row in rows):
            raise TextError("no text, or a row without any position that the dictionary was trained on")
        return rows

    def counted(self, n: int) -> Bool[Tensor, " n"]:
        """Which of n positions the dictionary was trained on."""
        position = torch.arange(n, device=self.lm.device)
        return ~torch.isin(position, position.new_tensor(self.dictionary.origin.excluded_positions))

    @torch.no_grad()
    def read(self, tokens: Int[Tensor, " pos"], *more_hooks: str) -> Reading:
        """What the dictionary makes of one row, and activations at more hooks.

        Raises:
            ShapeError: the dictionary has another width than the hook.
        """
        acts = {name: x[0] for name, x in self.lm.run(tokens[None], [self.hook, self.target, *more_hooks]).items()}
        x, y = acts[self.hook], acts[self.target]
        codes = self.dictionary.encode(x)
        y_hat = self.dictionary.decode(codes, x)
        if y_hat.shape != y.shape:
            raise ShapeError(f"the dictionary gives {list(y_hat.shape)}; {self.target} of this model is {list(y.shape)}")
        scale = self.dictionary.output_scale(x).expand(len(x), 1)
        return Reading(tokens.to(self.lm.device), codes, y.to(y_hat.dtype) - y_hat, scale, acts)

    def logits(
        self, tokens: Int[Tensor, " pos"], added: Float[Tensor, "n pos d_out"], *, differentiable: bool = False
    ) -> Float[Tensor, "n pos d_vocab"]:
        """Logits of n variants of one row, each with something added to the activation at the target."""
        with self.lm.replace(self.target, lambda y: y + added.to(y.dtype)):
            return self.lm.logits(tokens.expand(len(added), -1), differentiable=differentiable)


def pieces(n: int, tokens: Int[Tensor, " pos"], batch_tokens: int) -> Iterator[slice]:
    """Slices of n variants of one row, of about `batch_tokens` tokens each."""
    size = max(1, batch_tokens // len(tokens))
    return (slice(start, min(start + size, n)) for start in range(0, n, size))
