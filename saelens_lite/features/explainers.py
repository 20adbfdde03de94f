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
            return Question("Explain in verse what the tokens in « » have in common:\\n" + block(contexts))

    store.explain(range(20), by="rhyme", model=sl.chat_model("gpt-4o-mini"))

A package names the class in the entry-point group `saelens_lite.explainers`. The text of a corpus may try to instruct the
reader, so it is data: `quoted` writes a context as a JSON string in one line, with the firing tokens in « », `quoted_text` any
other text, and `block` puts such lines into a fenced block, which no text in them can end. A `TemplateExplainer` has the words
of its question in a file beside its module.
"""

import sys
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from saelens_lite.chat import Answer, Question
from saelens_lite.config import FrozenConfig
from saelens_lite.features.explaining.answers import explanation_in
from saelens_lite.features.explaining.halves import Shown
from saelens_lite.features.explaining.quoting import block, quoted, quoted_text
from saelens_lite.features.explaining.template import Template
from saelens_lite.features.queries import StoreQueries

__all__ = [
    "Explainer",
    "ExplainerConfig",
    "Question",
    "Shown",
    "TemplateConfig",
    "TemplateExplainer",
    "block",
    "quoted",
    "quoted_text",
]
SCHEMA = {
    "type": "object",
    "properties": {"explanation": {"type": "string"}},
    "required": ["explanation"],
    "additionalProperties": False,
}


class ExplainerConfig(FrozenConfig):
    """Base of an explainer's options."""


class Explainer:
    """Base of all explainers, with the options in `config`. The same store and options give the same question."""

    plugin_kind: ClassVar[str] = "explainers"
    plugin_name: ClassVar[str]  # set by the registry
    Config: ClassVar[type[ExplainerConfig]] = ExplainerConfig
    needs_contexts: ClassVar[bool] = True  # no question is asked about a latent without contexts
    version: str  # of the question's words; it is written beside each explanation

    def __init__(self, config: ExplainerConfig):
        self.config = config

    @property
    def source(self) -> str:
        """The name and the version, the source of the labels: "max_act 1"."""
        return f"{self.plugin_name} {self.version}"

    def question(self, store: StoreQueries, latent: int, shown: Shown) -> Question:
        """Return the question about a latent. `shown` has the contexts that may be used; others are kept for scoring."""
        raise NotImplementedError(f"{type(self).__name__} must define question(store, latent, shown)")

    def read(self, answer: Answer) -> str | None:
        """Return the explanation in an answer, None if the answer holds none.

        By default, it is the value of "explanation" in a JSON object, or the whole answer if that is one paragraph of text.
        """
        return explanation_in(answer.text or "")


class TemplateConfig(ExplainerConfig):
    """Base of the options of an explainer with a template."""

    template: str | None = Field(
        None, description="Your own file for the words of the question; `--show-prompt` shows the result."
    )


class TemplateExplainer(Explainer):
    """Base of explainers whose question is in a file: NAME.j2 beside the module NAME.py, or a user's own.

    The file is a template of Jinja with the blocks `system` and `user`. Its first line says the version: {# version 1 #}. That
    of a user's own file is the hash of its content.
    """

    Config: ClassVar[type[ExplainerConfig]] = TemplateConfig
    config: TemplateConfig

    def __init__(self, config: TemplateConfig):
        super().__init__(config)
        usual = Path(sys.modules[type(self).__module__].__file__).with_suffix(".j2")
        self.template = Template.read(config.template or usual, own=config.template is not None)
        self.version = self.template.version

    def rendered(self, **values: Any) -> Question:
        """Return the template filled with values as a question, whose answer is {"explanation": text}."""
        system, user = self.template.render(**values)
        return Question(user, system, SCHEMA)
