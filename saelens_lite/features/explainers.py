"""Explain latents in words: the contract of an explainer, which puts a question about a latent to a chat model.

    class RhymeOptions(ExplainerConfig):
        n_contexts: int = Field(10, description="Contexts to show.")

    @register("rhyme")
    class Rhyme(Explainer):
        "An explanation in verse."

        Config = RhymeOptions
        version = "1"                                                      # change it with the words of the question

        def question(self, store, latent, shown):
            contexts = [quoted(example) for example in shown.top[: self.config.n_contexts]]
            return Question("Explain in verse what these have in common:\\n" + "\\n".join(contexts))

    store.explain(range(20), by="rhyme", model=sl.chat_model("gpt-4o-mini"))

A package names the class in the entry-point group `saelens_lite.explainers`. The text of a corpus may try to instruct the
reader: quote it as data.
"""

from typing import ClassVar

from saelens_lite.chat import Answer, Question
from saelens_lite.config import FrozenConfig
from saelens_lite.features.explaining.halves import Shown
from saelens_lite.features.queries import StoreQueries

__all__ = ["Explainer", "ExplainerConfig", "Question", "Shown"]


class ExplainerConfig(FrozenConfig):
    """Base of an explainer's options."""


class Explainer:
    """Base of all explainers, with the options in `config`."""

    plugin_kind: ClassVar[str] = "explainers"
    plugin_name: ClassVar[str]  # set by the registry
    Config: ClassVar[type[ExplainerConfig]] = ExplainerConfig
    version: ClassVar[str]  # of the question's words; it is written beside each explanation

    def __init__(self, config: ExplainerConfig):
        self.config = config

    def question(self, store: StoreQueries, latent: int, shown: Shown) -> Question:
        """Return the question about a latent. `shown` has the contexts that may be used; others are kept for scoring."""
        raise NotImplementedError(f"{type(self).__name__} must define question(store, latent, shown)")

    def read(self, answer: Answer) -> str | None:
        """Return the explanation in an answer, None if the answer holds none. By default it is the whole text."""
        return " ".join((answer.text or "").split()) or None
