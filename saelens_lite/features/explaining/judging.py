"""Put contexts to a judge, and read the answers."""

import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, NamedTuple

from saelens_lite.chat import Answer, ChatModel, Question, TokenChoice
from saelens_lite.errors import BudgetError, BudgetReachedError, UserError
from saelens_lite.features.detection import FIRES, DetectionTask, Scorer
from saelens_lite.features.explaining.answers import without_thoughts
from saelens_lite.features.explaining.quoting import quoted, quoted_text
from saelens_lite.features.explaining.scores import Kind
from saelens_lite.features.explaining.template import Template
from saelens_lite.features.explaining.trials import Posed
from saelens_lite.features.summary import Example

DIGITS = ("0", "1")


class Verdict(NamedTuple):
    """An answer about a context: whether the latent fires in it, and how likely that is, from 0 to 1."""

    fires: bool
    p: float
    is_graded: bool = False


class Sheet(NamedTuple):
    """A text that a judge reads about a latent, with the contexts to judge, a question at a time."""

    latent: int
    kind: Kind
    label: str
    shown: list[Example]
    questions: list[list[Posed]]

    @property
    def trials(self) -> list[Posed]:
        """The contexts of all questions."""
        return [trial for trials in self.questions for trial in trials]


Verdicts = list[Verdict | None]  # None: no usable answer


def in_questions(blocks: Iterable[Sequence[Posed]], n: int) -> list[list[Posed]]:
    """Divide blocks of contexts into questions of at most n, all of about the same length."""
    questions = []
    for block in blocks:
        n_questions, left = -(-len(block) // n), iter(block)
        for i in range(n_questions):
            questions.append(list(islice(left, len(block) * (i + 1) // n_questions - len(block) * i // n_questions)))
    return questions


@cache
def template(kind: Kind) -> Template:
    """Return the words of the questions of a kind."""
    return Template.read(Path(__file__).with_name(f"{kind}.j2"))


def question(kind: Kind, label: str, trials: Sequence[Posed], max_tokens: int) -> Question:
    """Return the question whether a label fits contexts. Label and contexts are quoted as data."""
    contexts = [quoted(trial.example, trial.marked) for trial in trials]
    system, user = template(kind).render(explanation=quoted_text(label), contexts=contexts, n=len(trials))
    return Question(user, system, _schema(len(trials)), DIGITS, max(max_tokens, 32 + 4 * len(trials)))


def questions_on(sheets: Iterable[Sheet], max_tokens: int) -> list[Question]:
    """Return all questions of sheets."""
    return [question(sheet.kind, sheet.label, trials, max_tokens) for sheet in sheets for trials in sheet.questions]


def _schema(n: int) -> dict[str, Any]:
    """Return the JSON schema of {"answers": [0, 1, …]}."""
    answers = {"type": "array", "items": {"type": "integer", "enum": [0, 1]}, "minItems": n, "maxItems": n}
    return {"type": "object", "properties": {"answers": answers}, "required": ["answers"], "additionalProperties": False}


def verdicts_in(answer: Answer, n: int) -> Verdicts:
    """Return the answers about n contexts in an answer; n times None unless it has exactly n, each of them 0 or 1.

    An answer counts with words around it if there is one JSON array in it, behind thoughts between <think> and </think>. Where
    the server says how likely 0 and 1 were at each place, p = P(1) / (P(0) + P(1)), else it is the answer itself.
    """
    text = without_thoughts(answer.text or "")
    array = None if text is None else _array(text)
    digits = None if array is None else _digits(array[0])
    if digits is None or len(digits) != n:
        return [None] * n
    n_before = len(answer.text) - len(text)
    shares = _shares(_between(answer.tokens or (), n_before + array.start(), n_before + array.end(), n_before), digits)
    return [Verdict(bool(digit), p, bool(shares)) for digit, p in zip(digits, shares or map(float, digits), strict=True)]


def _array(text: str) -> re.Match[str] | None:
    """Return the array in a text, None unless there is one."""
    arrays = list(re.finditer(r"\[[^\[\]]*\]", text))
    return arrays[0] if len(arrays) == 1 else None


def _digits(array: str) -> list[int] | None:
    """Return the numbers of an array, None unless they are 0 and 1 only."""
    try:
        digits = json.loads(array)
    except ValueError:
        return None
    return digits if all(type(digit) is int and digit in (0, 1) for digit in digits) else None


def _between(tokens: Sequence[TokenChoice], first: int, last: int, n_before: int) -> list[TokenChoice]:
    """Return the tokens of an answer that begin at its characters from `first` to before `last`.

    If no token says where it begins, they count as all tokens of the answer: those behind n_before characters are returned.
    """
    if any(token.start is not None for token in tokens):
        return [token for token in tokens if token.start is not None and first <= token.start < last]
    starts = accumulate((len(token.text) for token in tokens), initial=0)
    return [token for token, start in zip(tokens, starts, strict=False) if start >= n_before]


def _shares(tokens: Sequence[TokenChoice], digits: Sequence[int]) -> list[float] | None:
    """Return P(1) / (P(0) + P(1)) at each digit of an answer; None if its tokens are not known or do not match the digits."""
    places = [token for token in tokens if token.text.strip() in DIGITS]
    if [token.text.strip() for token in places] != [str(digit) for digit in digits]:
        return None
    shares = []
    for token in places:
        zero, one = (sum(math.exp(log_p) for text, log_p in token.log_p.items() if text.strip() == digit) for digit in DIGITS)
        if not zero + one > 0:
            return None
        shares.append(one / (zero + one))
    return shares


class ChatJudge:
    """A chat model that reads labels."""

    def __init__(self, model: ChatModel, max_tokens: int):
        self.model, self.name, self.max_tokens = model, model.name, max_tokens

    def questions(self, sheets: Iterable[Sheet]) -> list[Question]:
        """Return all questions."""
        return questions_on(sheets, self.max_tokens)

    def judge(self, latents: Sequence[Sequence[Sheet]]) -> Iterator[list[Verdicts] | str]:
        """Yield the verdicts on the sheets of each latent, or the reason why it has no verdicts.

        If a limit is reached in the middle, the latents whose questions are all answered have verdicts.
        """
        try:
            answers = iter(self.model.ask(self.questions(sheet for sheets in latents for sheet in sheets)))
            yield from ([_verdicts(sheet, answers) for sheet in sheets] for sheets in latents)
        except BudgetReachedError:
            for sheets in latents:
                try:
                    answers = iter(self.model.ask(self.questions(sheets)))  # kept answers cost nothing
                    yield [_verdicts(sheet, answers) for sheet in sheets]
                except BudgetError:
                    yield "the limit was reached before its questions were answered; repeat the call with a higher one"


def _verdicts(sheet: Sheet, answers: Iterator[Answer]) -> Verdicts:
    return [verdict for trials in sheet.questions for verdict in verdicts_in(next(answers), len(trials))]


class FunctionJudge:
    """A function that reads labels; see `Scorer`."""

    def __init__(self, scorer: Scorer):
        self.scorer, self.name = scorer, getattr(scorer, "__name__", type(scorer).__name__)

    def judge(self, latents: Sequence[Sequence[Sheet]]) -> Iterator[list[Verdicts]]:
        """Yield the verdicts on the sheets of each latent.

        Raises:
            UserError: the function does not return a finite number for each context.
        """
        yield from ([self._verdicts(sheet) for sheet in sheets] for sheets in latents)

    def _verdicts(self, sheet: Sheet) -> Verdicts:
        contexts = [
            tuple(one.example.tokens[i] for i in one.marked) if sheet.kind == "fuzzing" else one.example.tokens
            for one in sheet.trials
        ]
        given = [float(value) for value in self.scorer(DetectionTask(sheet.label, sheet.shown, contexts))]
        if len(given) != len(contexts) or not all(map(math.isfinite, given)):
            raise UserError(
                f"a scorer must return {len(contexts)} finite numbers, one for each context; this one returned {given}"
            )
        return [Verdict(value >= FIRES, value, True) for value in given]
