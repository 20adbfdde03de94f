"""Explanations from the contexts in which a latent fires: marked tokens, with their activations from 1 to 10."""

from collections.abc import Iterator

from pydantic import Field

from saelens_lite import FeatureStore
from saelens_lite.features import Example
from saelens_lite.features.explainers import Question, Shown, TemplateConfig, TemplateExplainer, quoted, quoted_text

SCALE = 10


class MaxActOptions(TemplateConfig):
    """The contexts of a question, and their form."""

    n_contexts: int = Field(
        20, ge=1, le=1000, description="Contexts to show, up to half of them the strongest, the others from groups by strength."
    )
    activations: bool = Field(True, description="Show how strongly the latent fires on each marked token, from 1 to 10.")


class MaxAct(TemplateExplainer):
    """Contexts of all strengths in which a latent fires, with the firing tokens marked.

    Activations are shares of the latent's largest one in the store, rounded to tenths, at least one tenth. Bills et al. 2023
    (Language models can explain neurons in language models) show the activation of every token of the strongest contexts;
    Paulo et al. show only those of marked tokens, and also draw weaker contexts, which make explanations less specific and more
    often right. We do the latter.
    """

    paper = "Paulo et al. 2024, Automatically interpreting millions of features in large language models, arXiv:2410.13928"
    Config = MaxActOptions
    config: MaxActOptions

    def question(self, store: FeatureStore, latent: int, shown: Shown) -> Question:
        largest = store.about(latent).max
        contexts = [
            context_line(example, largest if self.config.activations else None)
            for example in chosen(shown, self.config.n_contexts)
        ]
        return self.rendered(contexts=contexts, activations=self.config.activations)


def chosen(shown: Shown, n: int) -> list[Example]:
    """Return up to n different contexts, strongest first: up to half of them from the top, the others from groups in turn.

    Contexts that overlap with an earlier one are taken last.
    """
    longest = max(map(len, shown.groups), default=0)
    in_turn = [group[i] for i in range(longest) for group in shown.groups if i < len(group)]
    candidates = {(one.row, one.position): one for one in [*shown.top[: (n + 1) // 2], *in_turn, *shown.top]}
    apart: list[Example] = []
    for one in candidates.values():
        if not any(overlap(one, other) for other in apart):
            apart.append(one)
    others = [one for one in candidates.values() if one not in apart]
    return sorted([*apart, *others][:n], key=lambda one: (-one.value, one.row, one.position))


def overlap(a: Example, b: Example) -> bool:
    """Return whether two contexts have a token of the text in common."""
    first, second = (one.position - one.peak for one in (a, b))
    return a.row == b.row and first < second + len(b.tokens) and second < first + len(a.tokens)


def context_line(example: Example, largest: float | None) -> str:
    """Return a context as a line of JSON, with the activations of its firing tokens if the largest of the latent is given."""
    context = f'{{"context": {quoted(example)}'
    if largest is not None:
        firing = [f"[{quoted_text(token)}, {scaled(value, largest)}]" for token, value in firing_tokens(example)]
        context += f', "activations": [{", ".join(firing)}]'
    return context + "}"


def firing_tokens(example: Example) -> Iterator[tuple[str, float]]:
    """Yield the tokens on which the latent fires. One without text counts for the token that completes its character."""
    carried = 0.0
    for token, value in zip(example.tokens, example.values, strict=True):
        carried = max(carried, value)
        if token and carried > 0:
            yield token, carried
        carried = carried if not token else 0.0


def scaled(value: float, largest: float) -> int:
    """Return an activation above zero as a whole number from 1 to 10."""
    return min(SCALE, max(1, round(SCALE * value / largest)))
