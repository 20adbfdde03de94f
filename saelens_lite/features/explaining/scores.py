"""The score of an explanation: how well a judge who reads it tells where the latent fires, beside controls."""

from typing import Literal, NamedTuple

from saelens_lite.evaluation.metrics import Metric

Kind = Literal["detection", "fuzzing"]


class Judged(NamedTuple):
    """A judge's result on the contexts of a latent, with 95 % intervals over the contexts.

    `auroc` is the area under the ROC curve, and `balanced_accuracy` the mean of the accuracies on contexts in which the latent
    fires and in which not. Answers that were no answers count as wrong; `n_unusable` is their number.
    """

    auroc: Metric
    balanced_accuracy: Metric
    n_unusable: int = 0


class LabelScore(NamedTuple):
    """The score of one label of one latent.

    `by_tokens` is that of the token baseline, `of_random_latent` that of another latent's explanation, and `shuffled` that of
    the explanation with the answers assigned to contexts at random. `hard` is the result with contexts of the nearest latent as
    the silent ones. Each is None if it was not measured. `judge` is the name of the chat model.
    """

    latent: int
    label: str
    kind: Kind
    judge: str
    n_firing: int
    n_silent: int
    score: Judged
    by_tokens: Judged | None = None
    of_random_latent: Judged | None = None
    shuffled: Judged | None = None
    hard: Judged | None = None
