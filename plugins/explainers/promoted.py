"""Explanations from the output of a latent: the tokens that its direction makes likelier and less likely."""

from pydantic import Field

from saelens_lite import FeatureStore
from saelens_lite.features.explainers import Question, Shown, TemplateConfig, TemplateExplainer, quoted, quoted_text


class PromotedOptions(TemplateConfig):
    """The tokens and contexts of a question."""

    n_tokens: int = Field(10, ge=1, le=1000, description="Tokens to show on each side, at most those that the store has.")
    n_contexts: int = Field(0, ge=0, le=1000, description="Contexts to show in which the latent fires most.")
    of_model: str | None = Field(None, description="Of several models, the one whose own direction and tokens are shown.")


class Promoted(TemplateExplainer):
    """Tokens that a latent makes likelier and less likely, with its strongest contexts if they are asked for.

    This is the vocabulary projection of Gur-Arieh et al., as text alone; the effects in numbers are not shown. With contexts,
    the question has the input and the output of the latent, as their combined method does. It ignores the layers between the
    dictionary and the output, so explanations are better in late layers.
    """

    paper = "Gur-Arieh et al. 2025, Enhancing automated interpretability with output-centric descriptions, arXiv:2501.08319"
    Config = PromotedOptions
    config: PromotedOptions
    needs_contexts = False

    def question(self, store: FeatureStore, latent: int, shown: Shown) -> Question:
        n, model = self.config.n_tokens, self.config.of_model
        return self.rendered(
            promoted=[quoted_text(token) for token, _ in store.promoted(latent, model)[:n]],
            suppressed=[quoted_text(token) for token, _ in store.suppressed(latent, model)[:n]],
            contexts=[quoted(example) for example in shown.top[: self.config.n_contexts]],
        )
