"""Generated text with and without edits, side by side, and the cost of the edits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from saelens_lite.dictionary import Dictionary
from saelens_lite.errors import ConfigError
from saelens_lite.features import FeatureStore
from saelens_lite.features.html import short
from saelens_lite.features.summary import About
from saelens_lite.interventions.edits import Edit
from saelens_lite.interventions.metrics import kl_divergence
from saelens_lite.interventions.site import Site
from saelens_lite.model import AnyModel, LanguageModel
from saelens_lite.ports import PortNames
from saelens_lite.tables import Result, grid
from saelens_lite.tokens import Given


@dataclass(frozen=True)
class Steered(Result):
    """The continuations of a prompt without and with edits. `kl` is the `kl_cost` of the plain text.

    `about` has the meaning and scale of each edited latent; None without a store.
    """

    plain: str
    edited: str
    kl: float
    edits: tuple[Edit, ...] = ()
    about: dict[int, About] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the texts, the cost, and the edits in words."""
        return {"plain": self.plain, "edited": self.edited, "kl": self.kl, "edits": self._edits_in_words()}

    def columns(self) -> dict[str, list[Any]]:
        """Return the result as one row."""
        return {name: [value] for name, value in (self.to_dict() | {"edits": "; ".join(self._edits_in_words())}).items()}

    def table(self) -> Any:
        """Return a rich table of the two texts side by side, with the edits and the cost below."""
        lines = [*self._edits_in_words(), f"KL(plain ‖ edited) on the plain text: {self.kl:.4f} nats per token"]
        return grid(
            ("plain", "edited"),
            [(self.plain, self.edited)],
            caption="\n".join(lines),
            column=lambda title: {"overflow": "fold", "ratio": 1},
            expand=True,
        )

    def _edits_in_words(self) -> list[str]:
        return [self._in_words(edit, latent) for edit in self.edits for latent in edit.latents]

    def _in_words(self, edit: Edit, latent: int) -> str:
        """Return one change, such as "latent 7: code ← 8 (2 × its maximum of 4)", and the meaning of the latent."""
        about = self.about[latent] if self.about else About(None, None, 0.0)
        amount = f"{edit.offset if edit.gain == 0 else abs(edit.offset):.4g}"
        if about.max and edit.offset:
            amount += f" ({edit.offset / about.max:.3g} × its maximum of {short(about.max)})"
        new = f"{short(edit.gain)} · code" if edit.gain not in (0, 1) else "code"
        sign = "−" if edit.offset < 0 else "+"
        change = amount if edit.gain == 0 else new + (f" {sign} {amount}" if edit.offset or edit.gain == 1 else "")
        return f"latent {latent}: code ← {change}{f'; {about.words}' if about.words else ''}"


def steer(
    dictionary: Dictionary,
    lm: AnyModel | Mapping[str, LanguageModel],
    prompt: str,
    edits: Edit | Sequence[Edit],
    *,
    max_new_tokens: int = 50,
    temperature: float | int = 0.8,
    seed: int = 0,
    store: FeatureStore | None = None,
    hook: str | None = None,
    ports: PortNames = None,
    in_model: str | None = None,
) -> Steered:
    """Generate text with edits and, from the same seed, without them. Return both and the cost of the edits.

    Args:
        store: feature store of this dictionary, for the labels and largest activations of the edited latents.
            `store.strength(138, 2)` is twice the largest of latent 138.
        ports: keys or hooks of the write ports to change; default: all of the model that generates.
        in_model: name of the model that generates, if the dictionary writes several. With `Add` and `ports`, that model alone
            may be given.

    Raises:
        ConfigError: no edits, an edit of a latent that does not exist, a negative temperature, a store of another dictionary,
            or several models to choose from.
        TextError, ShapeError: an empty prompt, or one that fills the model's context.
    """
    if not edits:
        raise ConfigError("nothing to steer with: give at least one edit")
    if store is not None:
        store.info.check_dictionary(dictionary)
    edits = (edits,) if isinstance(edits, Edit) else tuple(edits)
    chosen = {"hook": hook, "ports": ports, "in_model": in_model}
    site = Site(dictionary, lm, has_codes=dictionary.needs_input(edits), **chosen)
    settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    settings["prepend_bos"] = site.lm.wants_bos(dictionary.origin)
    with site.splice(edits):
        edited = site.lm.generate(prompt, **settings)
    plain = site.lm.generate(prompt, **settings)
    about = None if store is None else {latent: store.about(latent) for edit in edits for latent in edit.latents}
    return Steered(plain, edited, kl_cost(dictionary, lm, edits, plain, **chosen), edits, about)


@torch.no_grad()
def kl_cost(
    dictionary: Dictionary,
    lm: AnyModel | Mapping[str, LanguageModel],
    edits: Edit | Sequence[Edit],
    text: Given,
    *,
    attention_mask: Any = None,
    hook: str | None = None,
    ports: PortNames = None,
    in_model: str | None = None,
) -> float:
    """Return KL(clean ‖ edited) of the model's predictions, nats per token, as a mean over the counted positions.

    `text`, `attention_mask`: text or token ids, as `LanguageModel.to_tokens` takes them. `ports`, `in_model`: see `steer`.

    Raises:
        ConfigError, HookError, ShapeError, TextError: as for `LanguageModel.splice`, or the text is empty.
    """
    edits = (edits,) if isinstance(edits, Edit) else tuple(edits)
    has_codes = not edits or dictionary.needs_input(edits)
    site = Site(dictionary, lm, hook, ports=ports, in_model=in_model, has_codes=has_codes)
    total, n = 0.0, 0
    for tokens, counted in site.rows(text, attention_mask):
        clean = site.clean_logits(tokens)[0]
        with site.splice(edits):
            edited = site.clean_logits(tokens)
        n_counted = int(counted.sum())
        total, n = total + n_counted * float(kl_divergence(clean, edited, counted)), n + n_counted
    return total / n
