"""Ask a chat model for explanations of latents, which become labels."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from saelens_lite import registry
from saelens_lite.chat import Answer, ChatModel, Estimate, Question
from saelens_lite.errors import ConfigError, SaelensLiteError
from saelens_lite.features.explainers import Explainer
from saelens_lite.features.explaining.answers import fault_in
from saelens_lite.features.explaining.halves import shown_contexts
from saelens_lite.features.html import visible
from saelens_lite.features.label import Label
from saelens_lite.features.labels import check_latent
from saelens_lite.features.queries import StoreQueries
from saelens_lite.tables import Result, grid

SHOWN = 20  # explanations in a table
NO_CONTEXTS = "no contexts: it does not fire on the text of the store"
logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Explanations(Mapping[int, Label], Result):
    """The explanations of latents that a chat model wrote: `explanations[7]` is a label.

    `failures` has the reason for each latent without one. `n_input` and `n_output` are the tokens of new answers, and `dollars`
    is their price, if the chat model knows it. `n_kept` answers were kept from earlier and cost nothing. Nothing was asked
    about the latents in `own`, which have a label of your own. `n_replaced` labels from elsewhere, such as those of
    Neuronpedia or of another chat model, were replaced.
    """

    labels: dict[int, Label]
    failures: dict[int, str]
    source: str
    author: str
    n_input: int = 0
    n_output: int = 0
    n_kept: int = 0
    dollars: float | None = None
    own: tuple[int, ...] = ()
    n_replaced: int = 0

    def __getitem__(self, latent: int) -> Label:
        return self.labels[latent]

    def __iter__(self) -> Iterator[int]:
        return iter(self.labels)

    def __len__(self) -> int:
        return len(self.labels)

    def columns(self) -> dict[str, list[Any]]:
        """Return the explanations and the failures, column by column."""
        latents = sorted((*self.labels, *self.failures))
        return {
            "latent": latents,
            "label": [None if i in self.failures else str(self.labels[i]) for i in latents],
            "failure": [self.failures.get(i) for i in latents],
            "source": [self.source] * len(latents),
            "author": [self.author] * len(latents),
        }

    def table(self) -> Any:
        """Return the first explanations as a table, with the reasons of failures below."""
        from rich.console import Group
        from rich.text import Text

        rows = [(str(latent), visible(label)) for latent, label in list(self.labels.items())[:SHOWN]]
        more = [f"… and {len(self) - SHOWN:,} more"] if len(self) > SHOWN else []
        by_reason = Counter(self.failures.values()).most_common()
        more += [f"{n:,} without an explanation: {visible(reason)}" for reason, n in by_reason]
        more += [f"{len(self.own):,} not asked about, because they have a label of your own: {_listed(self.own)}"] * bool(
            self.own
        )
        more += [f"{self.n_replaced:,} labels from elsewhere were replaced"] * bool(self.n_replaced)
        spent = "" if self.dollars is None else f" for ${self.dollars:.2f}"
        more.append(
            f"{self.n_input:,} tokens read, {self.n_output:,} written{spent}; {self.n_kept:,} answers kept from earlier"
        )
        return Group(Text(repr(self)), grid(("latent", "explanation"), rows), *map(Text, more))

    def __repr__(self) -> str:
        n = len(self.labels) + len(self.failures)
        return visible(f"Explanations({len(self):,} of {n:,} latents by {self.author}, {self.source})")


def _listed(latents: Sequence[int]) -> str:
    return ", ".join(map(str, latents[:SHOWN])) + f" and {len(latents) - SHOWN:,} more" * (len(latents) > SHOWN)


def explainer(by: str, options: Mapping[str, Any]) -> Explainer:
    """Return the explainer of that name, with its options.

    Raises:
        PluginError: there is no such explainer.
        ConfigError: an option is unknown or has a bad value.
    """
    explainer_class = registry.load(by, "explainers")
    return explainer_class(explainer_class.Config(**options))


def question_about(store: StoreQueries, latent: int, by: Explainer) -> Question | None:
    """Return the question about a latent; None if it has no contexts, and the explainer needs some."""
    check_latent(latent, store.info)
    shown = shown_contexts(store, latent)
    return by.question(store, latent, shown) if shown.all or not by.needs_contexts else None


def explain(
    store: StoreQueries,
    latents: Iterable[int],
    by: Explainer,
    model: ChatModel,
    keep: Callable[[Explanations], object],
    replace_own: bool,
) -> Explanations:
    """Return the explanations of latents, and give them to `keep`. See `FeatureStore.explain`.

    Nothing is asked about latents with a label of your own unless `replace_own` is true.

    If the work ends early, by Ctrl-C or a limit of the chat model, `keep` gets the explanations in the answers until then.
    """
    if not isinstance(model, ChatModel):
        raise ConfigError(f"model = {model!r:.100}; expected a chat model, such as sl.chat_model('gpt-4o-mini')")
    given, before_labels = list(dict.fromkeys(map(int, latents))), dict(store.labels)
    own = {} if replace_own else {latent: None for latent in given if _is_own(before_labels.get(latent))}
    questions = {latent: question_about(store, latent, by) for latent in given if latent not in own}
    asked = {latent: question for latent, question in questions.items() if question is not None}
    logger.info("%s, %s: %s", model.name, by.source, in_words(model.estimate(list(asked.values()))))
    before = _dollars(model)
    try:
        answers = model.ask(list(asked.values()))
    except (SaelensLiteError, KeyboardInterrupt):
        kept = {latent: question for latent, question in asked.items() if not model.estimate([question]).n_questions}
        if kept:
            keep(_explanations(kept, model.ask(list(kept.values())), by, model.name, store.info.contexts))
        raise
    explanations = _explanations(questions, answers, by, model.name, store.info.contexts)
    n_replaced = sum(_is_elsewhere(before_labels.get(latent), label) for latent, label in explanations.items())
    explanations = replace(explanations, own=tuple(own), n_replaced=n_replaced)
    if before is not None:
        explanations = replace(explanations, dollars=_dollars(model) - before)
    keep(explanations)
    return explanations


def _explanations(
    questions: Mapping[int, Question | None], answers: Sequence[Answer], by: Explainer, author: str, contexts: str
) -> Explanations:
    """Return the explanations in the answers to the questions. A latent without a question is a failure."""
    labels, failures = {}, {latent: NO_CONTEXTS for latent, question in questions.items() if question is None}
    asked = {latent: question for latent, question in questions.items() if question is not None}
    for (latent, question), answer in zip(asked.items(), answers, strict=True):
        text = None if answer.text is None else by.read(answer)
        fault = (answer.failure or "no answer") if answer.text is None else fault_in(text, question)
        if fault:
            failures[latent] = fault
        else:
            labels[latent] = Label(text, by.source, author, contexts)
    new = [answer for answer in answers if not answer.was_kept]
    return Explanations(
        dict(sorted(labels.items())),
        dict(sorted(failures.items())),
        by.source,
        author,
        n_input=sum(answer.n_input for answer in new),
        n_output=sum(answer.n_output for answer in new),
        n_kept=len(answers) - len(new),
    )


def _is_own(label: str | None) -> bool:
    """Return whether a label is your own; no label is not."""
    return label is not None and not isinstance(label, Label)


def _is_elsewhere(old: str | None, new: Label) -> bool:
    """Return whether a label is by somebody else than the author of a new one, or from another source."""
    return isinstance(old, Label) and (old.source, old.author) != (new.source, new.author)


def _dollars(model: ChatModel) -> float | None:
    """Return the US dollars that a chat model has spent until now, None if it does not know."""
    return getattr(getattr(model, "spent", None), "dollars", None)


def in_words(estimate: Estimate) -> str:
    """Return an estimate in words."""
    n, read, write, dollars = estimate
    return f"{n:,} new question{'s' * (n != 1)}, {read:,} tokens to read, {write:,} to write" + (
        f", about ${dollars:.2f}" if dollars else ""
    )
