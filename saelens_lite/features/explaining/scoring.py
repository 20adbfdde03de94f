"""Score labels: let a judge tell, from a label alone, in which held-out contexts the latent fires, and on which tokens.

Source: Paulo, Mallen, Juang and Belrose 2024, Automatically interpreting millions of features in large language models,
arXiv:2410.13928, detection and fuzzing. Here, contexts that the explainer saw are left out, hard contexts are scored apart, and
the contexts of fuzzing are the same with the right and with other tokens marked, never both in one question.
"""

import logging
import math
from bisect import bisect
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from pydantic import Field

from saelens_lite import registry
from saelens_lite.chat import ChatModel, Question
from saelens_lite.config import FrozenConfig
from saelens_lite.errors import ConfigError
from saelens_lite.features.detection import Scorer, token_baseline
from saelens_lite.features.explaining.explain import in_words
from saelens_lite.features.explaining.halves import TOP, shown_contexts
from saelens_lite.features.explaining.intervals import auroc_metric, balanced_accuracy_metric
from saelens_lite.features.explaining.judging import ChatJudge, FunctionJudge, Sheet, Verdicts, in_questions, questions_on
from saelens_lite.features.explaining.scores import KINDS, Judged, Kind, LabelScore, Scores, Skipped
from saelens_lite.features.explaining.trials import Posed, trials_of
from saelens_lite.features.label import Label
from saelens_lite.features.labels import check_latent
from saelens_lite.features.queries import StoreQueries
from saelens_lite.features.summary import Example
from saelens_lite.seeds import mixed_seed, permutation

logger = logging.getLogger(__name__)


class ScoreConfig(FrozenConfig):
    """Settings of the scores of labels."""

    kinds: tuple[Kind, ...] = Field(
        KINDS, min_length=1, description="detection: in which contexts the latent fires; fuzzing: on which tokens of them."
    )
    n_contexts: int = Field(
        20, ge=4, le=1000, description="Most contexts of each sort for a latent: firing, silent, and of the nearest latent."
    )
    per_question: int = Field(5, ge=1, le=100, description="Most contexts in a question.")
    max_tokens: int = Field(
        256,
        ge=16,
        description="Most tokens of an answer, or 32 + 4 per context if that is more. Models that think first need more.",
    )
    controls: bool = Field(
        True,
        description="Let the judge also read another latent's explanation, and the words in another order: 3 times the cost.",
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of the contexts drawn, their order, and the controls.")


class _Task(NamedTuple):
    """The sheets of one latent and kind, by the results that they are for."""

    latent: int
    kind: Kind
    sheets: dict[str, Sheet]


def score(store: StoreQueries, latents: Iterable[int] | None, model: ChatModel | Scorer, config: ScoreConfig) -> Scores:
    """Return the scores of labels; see `FeatureStore.score`."""
    if not isinstance(model, ChatModel) and not callable(model):
        raise ConfigError(f"model = {model!r:.100}; expected a chat model, such as sl.chat_model('gpt-4o-mini'), or a function")
    judge = ChatJudge(model, config.max_tokens) if isinstance(model, ChatModel) else FunctionJudge(model)
    by_latent, skipped = _tasks(store, latents, config)
    sheets = {latent: [sheet for task in tasks for sheet in task.sheets.values()] for latent, tasks in by_latent.items()}
    if isinstance(judge, ChatJudge):
        store.check_room((task.latent, task.kind) for tasks in by_latent.values() for task in tasks)
        questions = judge.questions(sheet for of in sheets.values() for sheet in of)
        logger.info("scores by %s: %s", judge.name, in_words(model.estimate(questions)))
    scores = []
    for (latent, tasks), verdicts in zip(by_latent.items(), judge.judge(list(sheets.values())), strict=True):
        if isinstance(verdicts, str):
            skipped.append(Skipped(latent, None, verdicts))
            continue
        left = iter(verdicts)
        for task in tasks:
            scores.append(_label_score(store, task, {name: next(left) for name in task.sheets}, judge.name))
    return Scores(tuple(scores), tuple(sorted(skipped, key=lambda one: (one.latent, one.kind or ""))), judge.name, config.seed)


def questions_of(store: StoreQueries, latents: Iterable[int] | None, config: ScoreConfig) -> list[Question]:
    """Return all questions that `score` would ask; see `FeatureStore.score_questions`."""
    by_latent, _ = _tasks(store, latents, config)
    sheets = (sheet for tasks in by_latent.values() for task in tasks for sheet in task.sheets.values())
    return questions_on(sheets, config.max_tokens)


def _tasks(
    store: StoreQueries, latents: Iterable[int] | None, config: ScoreConfig
) -> tuple[dict[int, list[_Task]], list[Skipped]]:
    """Return what to ask about each latent, and the latents that cannot be scored."""
    store.info.check_text("scores of labels")
    by_latent: dict[int, list[_Task]] = {}
    skipped: list[Skipped] = []
    ring = sorted((mixed_seed("another", config.seed, other), other) for other, text in store.labels.items() if text)
    for latent in sorted(store.labels) if latents is None else dict.fromkeys(map(int, latents)):
        check_latent(latent, store.info)
        if not store.labels.get(latent):
            skipped.append(Skipped(latent, None, "it has no label"))
            continue
        for kind in dict.fromkeys(config.kinds):
            blocks = trials_of(store, latent, kind, config.n_contexts, config.seed)
            if isinstance(blocks, str):
                skipped.append(Skipped(latent, kind, blocks))
                continue
            questions = in_questions(blocks, config.per_question)
            texts = {"score": store.labels[latent]}
            texts |= _controls(store.labels, latent, ring, config.seed) if config.controls else {}
            shown = shown_contexts(store, latent).all
            sheets = {name: Sheet(latent, kind, str(text), shown, questions) for name, text in texts.items()}
            by_latent.setdefault(latent, []).append(_Task(latent, kind, sheets))
    return by_latent, skipped


def _controls(labels: Mapping[int, str], latent: int, ring: Sequence[tuple[int, int]], seed: int) -> dict[str, str]:
    """Return the texts that the judge reads in place of a label: that of another latent, and its words in another order.

    Args:
        ring: Hashes of the latents with a label, ascending. The other latent is the first one behind the hash of this one, so
            that a new label changes the controls of few latents.
    """
    own, start = labels[latent], bisect(ring, (mixed_seed("other than", seed, latent), -1))
    others = (labels[other] for _, other in (*ring[start:], *ring[:start]) if labels[other].casefold() != own.casefold())
    texts = {"of_random_latent": other} if (other := next(others, None)) else {}
    words = own.split()
    for n in range(20):  # a random order may be that of the label
        mixed = " ".join(words[i] for i in permutation(len(words), "words", seed, latent, n).tolist())
        if mixed.casefold() != " ".join(words).casefold():
            return texts | {"shuffled": mixed}
    return texts


def _label_score(store: StoreQueries, task: _Task, verdicts: Mapping[str, Verdicts], judge: str) -> LabelScore:
    """Return the score of a label from the verdicts of the judge who reads it, and of the one who reads the controls."""
    label, trials = store.labels[task.latent], task.sheets["score"].trials
    easy = [i for i, trial in enumerate(trials) if not trial.is_hard]
    hard = [i for i, trial in enumerate(trials) if trial.is_hard or trial.fires]
    own, n_hard = verdicts["score"], sum(trial.is_hard for trial in trials)

    def judged(given: Verdicts, of: Sequence[int], is_control: bool) -> Judged:
        return judged_of([trials[i] for i in of], [given[i] for i in of], is_control)

    return LabelScore(
        task.latent,
        str(label),
        task.kind,
        judge,
        sum(trial.fires for trial in trials),
        len(easy) - sum(trial.fires for trial in trials),
        judged(own, easy, False),
        by_tokens=judged(by_tokens(store, task.sheets["score"]), easy, True),
        **{name: judged(given, easy, True) for name, given in verdicts.items() if name != "score"},
        hard=judged(own, hard, False) if n_hard else None,
        n_hard=n_hard,
        recall=tuple(_recall(trials, own, group) for group in range(TOP, store.info.n_groups)),
        is_graded=any(one is not None and one.is_graded for one in own),
        made_elsewhere=not made_from_shown(label, store.info.contexts),
        store=store.info.contexts,
    )


def made_from_shown(label: str, contexts: str) -> bool:
    """Return whether a label is by an explainer that saw the shown half of these contexts; see `StoreInfo.contexts`."""
    is_by_explainer = isinstance(label, Label) and label.source.split(" ")[0] in registry.names("explainers")
    return is_by_explainer and label.store == contexts


def judged_of(trials: Sequence[Posed], verdicts: Verdicts, is_control: bool = False) -> Judged:
    """Return a result from the verdicts on contexts.

    A context without a verdict counts as wrong and as ranked behind the worst mistake, or in a control, as half right in both.
    """
    right = {True: 0.0, False: 0.0}
    values: dict[bool, list[float]] = {True: [], False: []}
    for trial, one in zip(trials, verdicts, strict=True):
        if one is None:
            right[trial.fires] += 0.5 * is_control
            values[trial.fires].append(math.nan if is_control else -math.inf if trial.fires else math.inf)
        else:
            right[trial.fires] += one.fires == trial.fires
            values[trial.fires].append(one.p)
    n_firing, n_silent = len(values[True]), len(values[False])
    high, low = np.asarray(values[True])[:, None], np.asarray(values[False])
    is_half = (high == low) | np.isnan(high) | np.isnan(low)
    area = float(((high > low) + 0.5 * is_half).mean())
    accuracy = balanced_accuracy_metric((right[True], n_firing), (right[False], n_silent))
    return Judged(auroc_metric(area, n_firing, n_silent), accuracy, sum(one is None for one in verdicts))


def _recall(trials: Sequence[Posed], verdicts: Verdicts, group: int) -> float | None:
    """Return the share of the firing contexts of a group that the judge recognised; None if the group has no context."""
    recognised = [
        one is not None and one.fires
        for trial, one in zip(trials, verdicts, strict=True)
        if trial.fires and trial.group == group
    ]
    return sum(recognised) / len(recognised) if recognised else None


def by_tokens(store: StoreQueries, sheet: Sheet) -> Verdicts:
    """Return the verdicts of the token baseline, which tells tokens apart by the texts of single tokens."""

    def single(example: Example) -> Example:
        start = example.position - example.peak
        ids = store.tensors.tokens[example.row, start : start + len(example.tokens)].tolist()
        return example._replace(tokens=tuple(store.vocabulary[i] for i in ids))

    questions = [[trial._replace(example=single(trial.example)) for trial in trials] for trials in sheet.questions]
    by_token = sheet._replace(shown=[single(example) for example in sheet.shown], questions=questions)
    return next(FunctionJudge(token_baseline).judge([[by_token]]))[0]
