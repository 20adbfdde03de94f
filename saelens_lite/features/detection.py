"""Functions that judge in which contexts a latent fires, in place of a chat model: the token baseline, and words of a label.

A scorer sees half of the strongest contexts, and half of those drawn from each group of activations. It must tell contexts in
which the latent fires from others: `store.score(model=words_of_label)`.
Source: Paulo, Mallen, Juang and Belrose 2024, Automatically interpreting millions of features in large language models,
arXiv:2410.13928, detection scoring.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from saelens_lite.features.summary import Example

FIRES = 0.5  # a scorer predicts that the latent fires from this value on


class DetectionTask(NamedTuple):
    """The input of a scorer: a label, contexts in which the latent fires, and the tokens of the contexts to judge.

    For fuzzing, these are only the marked tokens.
    """

    label: str | None
    shown: list[Example]
    contexts: list[tuple[str, ...]]


@runtime_checkable
class Scorer(Protocol):
    """A judge of contexts: any function of this form, such as a client of a language model."""

    def __call__(self, task: DetectionTask) -> Sequence[float]:
        """Return a number for each context, from 0 (the latent is silent) to 1 (it fires); 0.5 or more means that it fires."""


def token_baseline(task: DetectionTask) -> list[float]:
    """Return 1 − 2⁻ⁿ for each context.

    The count of a token is the number of shown contexts with that token at their peak. n is the largest count among the tokens
    of the context.
    """
    at_peaks = Counter(example.tokens[example.peak] for example in task.shown)
    return [1 - 0.5 ** max(at_peaks[token] for token in tokens) for tokens in task.contexts]


def words_of_label(task: DetectionTask) -> list[float]:
    """Return 1 for each context that contains a word of the label, else 0.

    The words are the parts of the label in quotation marks, or without any, its words of four letters or more.
    """
    label = task.label or ""
    quoted = re.findall(r"[\"'“‘«](.+?)[\"'”’»](?!\w)", label)
    words = [word.lower() for word in quoted or re.findall(r"\w{4,}", label)]
    return [float(any(word in "".join(tokens).lower() for word in words)) for tokens in task.contexts]
