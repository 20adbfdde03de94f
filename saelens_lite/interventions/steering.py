"""Generated text with and without edits, side by side, and the cost of the edits."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from saelens_lite.dictionary import Dictionary
from saelens_lite.errors import ConfigError
from saelens_lite.interventions.edits import Edit
from saelens_lite.interventions.metrics import kl_divergence
from saelens_lite.interventions.site import Site
from saelens_lite.model import LanguageModel
from saelens_lite.tables import grid
from saelens_lite.tokens import Given


class Steered(NamedTuple):
    """The continuations of a prompt without and with edits. `kl` is the `kl_cost` of the plain text."""

    plain: str
    edited: str
    kl: float


def steer(
    dictionary: Dictionary,
    lm: LanguageModel,
    prompt: str,
    edits: Edit | Sequence[Edit],
    *,
    max_new_tokens: int = 50,
    temperature: float | int = 0.8,
    seed: int = 0,
    hook: str | None = None,
) -> Steered:
    """Generate text with edits and, from the same seed, without them. Return both and the cost of the edits.

    Raises:
        ConfigError: no edits, an edit of a latent that does not exist, or a negative temperature.
        TextError, ShapeError: an empty prompt, or one that fills the model's context.
    """
    if not edits:
        raise ConfigError("nothing to steer with: give at least one edit")
    settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    settings["prepend_bos"] = lm.wants_bos(dictionary.origin)
    with lm.splice(dictionary, edits, hook=hook):
        edited = lm.generate(prompt, **settings)
    plain = lm.generate(prompt, **settings)
    return Steered(plain, edited, kl_cost(dictionary, lm, edits, plain, hook=hook))


@torch.no_grad()
def kl_cost(
    dictionary: Dictionary,
    lm: LanguageModel,
    edits: Edit | Sequence[Edit],
    text: Given,
    *,
    attention_mask: Any = None,
    hook: str | None = None,
) -> float:
    """Return KL(clean ‖ edited) of the model's predictions, nats per token, as a mean over the counted positions.

    `text`, `attention_mask`: text or token ids, as `LanguageModel.to_tokens` takes them.

    Raises:
        ConfigError, HookError, ShapeError, TextError: as for `LanguageModel.splice`, or the text is empty.
    """
    site = Site(dictionary, lm, hook)
    total, n = 0.0, 0
    for tokens, counted in site.rows(text, attention_mask):
        clean = site.clean_logits(tokens)[0]
        with lm.splice(dictionary, edits, hook=hook):
            edited = site.clean_logits(tokens)
        n_counted = int(counted.sum())
        total, n = total + n_counted * float(kl_divergence(clean, edited, counted)), n + n_counted
    return total / n


def table(steered: Steered) -> Any:
    """Return a rich table of the two texts side by side, with the cost below."""
    caption = f"KL(plain ‖ edited) on the plain text: {steered.kl:.4f} nats per token"
    wide = {"overflow": "fold", "ratio": 1}
    return grid(("plain", "edited"), [(steered.plain, steered.edited)], caption=caption, column=lambda title: wide, expand=True)
