"""Metrics of interventions: one number for each of several variants of one row of logits."""

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelens_lite.errors import ConfigError, NonFiniteError, ShapeError
from saelens_lite.features.html import quoted
from saelens_lite.model import LanguageModel

Metric = Callable[[Float[Tensor, "n pos d_vocab"]], Float[Tensor, " n"]]
MOST_NAMED = 3  # most tokens in the name of a metric


@dataclass(frozen=True)
class Loss:
    """The cross-entropy of the next token, nats: the mean over the row, or the loss after one position."""

    tokens: Int[Tensor, " pos"]
    position: int | None = None

    def __call__(self, logits: Float[Tensor, "n pos d_vocab"]) -> Float[Tensor, " n"]:
        """Return the loss of each variant."""
        wanted = self.tokens[1:].expand(len(logits), -1)
        losses = F.cross_entropy(rearrange(_precise(logits[:, :-1]), "n pos vocab -> n vocab pos"), wanted, reduction="none")
        return losses.mean(1) if self.position is None else losses[:, self.position]


@dataclass(frozen=True)
class LogitDifference:
    """The logit of token a minus the logit of token b at a position."""

    a: int
    b: int
    position: int = -1

    def __call__(self, logits: Float[Tensor, "n pos d_vocab"]) -> Float[Tensor, " n"]:
        """Return the difference for each variant."""
        return _precise(logits[:, self.position, self.a]) - _precise(logits[:, self.position, self.b])


@dataclass(frozen=True)
class LogProb:
    """The log-probability, nats, that the next token is one of `tokens`: at a position, or as a mean over several.

    `tokens` are ids. `attribute` and `dose_response` also accept texts, because they have a model to look them up. Without a
    position, these two take the mean over the counted positions; a direct call takes it over all positions but the first.
    """

    tokens: tuple[int | str, ...] | int | str
    position: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.tokens, int | str):
            object.__setattr__(self, "tokens", (self.tokens,))

    def __call__(self, logits: Float[Tensor, "n pos d_vocab"]) -> Float[Tensor, " n"]:
        """Return the log-probability for each variant."""
        places = [self.position] if isinstance(self.position, int) else self.position
        chosen = logits[:, 1:] if places is None else logits[:, list(places)]
        return _precise(chosen).log_softmax(-1)[..., list(self.tokens)].logsumexp(-1).mean(1)


def metric_of(
    asked: Any,
    lm: LanguageModel,
    tokens: Int[Tensor, " pos"],
    position: int | None = None,
    counted: Bool[Tensor, " pos"] | None = None,
) -> Metric:
    """Return the metric asked for, on one row of tokens: "loss", two tokens to compare, LogProb, or a function of logits.

    position: position of the metric; a negative one counts from the end. Default: all for the loss, the last for a
    difference of logits; for LogProb its own, else the `counted` positions.

    Raises:
        ConfigError: the metric is unknown, a text is not one token, or a position is not in the row.
    """
    if isinstance(asked, LogProb):
        place = asked.position if position is None else position
        ids = tuple(token_id(lm, token) for token in asked.tokens)
        if place is None:
            return LogProb(ids, None if counted is None else tuple(counted.nonzero().squeeze(1).tolist()))
        places = tuple(_place(i, len(tokens)) for i in (place if isinstance(place, tuple) else (place,)))
        return LogProb(ids, places)
    if callable(asked):
        if position is not None:
            raise ConfigError("a metric that is a function of logits chooses its own positions; leave out position=")
        return asked
    if isinstance(asked, str) and asked == "loss":
        lm.check_causal("the loss of the next token")
        if len(tokens) < 2:
            raise ConfigError("the loss needs a row of at least two tokens; this row has one")
        return Loss(tokens, None if position is None else _place(position, len(tokens), last=len(tokens) - 2))
    if isinstance(asked, tuple | list) and len(asked) == 2:
        a, b = (token_id(lm, token) for token in asked)
        return LogitDifference(a, b, _place(-1 if position is None else position, len(tokens)))
    raise ConfigError(
        f"metric = {asked!r}; expected 'loss', a pair of tokens (a, b), saelens_lite.interventions.LogProb(token), or a "
        "function of logits [n pos d_vocab]"
    )


def _place(position: int, n: int, last: int | None = None) -> int:
    """Return a position counted from the start of a row of n tokens. Raise ConfigError if the metric is undefined there."""
    last = n - 1 if last is None else last
    if not -n <= position < n or position % n > last:
        raise ConfigError(f"position = {position}; the row has {n} tokens, and this metric exists at positions 0 to {last}")
    return position % n


def token_id(lm: LanguageModel, token: str | int) -> int:
    """Return the id of a token, given its id or its text inside a sentence, such as " he" with the space.

    Some tokenizers put a space in front of every text, or split " he" into a space and "he". So the token is looked up by its
    text in the vocabulary. If no token has that text, the tokenizer encodes it.

    Raises:
        ConfigError: the id does not exist, or the text is not exactly one token.
        TextError: a text was given, but the model has no tokenizer.
    """
    if not isinstance(token, str):
        if not isinstance(token, Integral) or not 0 <= token < lm.d_vocab:
            raise ConfigError(f"{token!r} is not a token id of {lm.name}: ids go from 0 to {lm.d_vocab - 1}")
        return int(token)
    texts, ids = lm.vocabulary, _tokenised(lm, token)
    unknown = lm.tokenizer.unk_token_id if token != lm.tokenizer.unk_token else None
    alone = ids[0] if len(ids) == 1 and ids[0] != unknown and ids[0] < lm.d_vocab else None
    same_text = texts.ids_of(token)
    if len(same_text) > 1:  # such as "A" and a token for the byte 0x41: take the one that the tokenizer uses
        used = {i for start in ("a", ".", "\n") for i in _tokenised(lm, start + token)[-1:]}
        same_text = [i for i in same_text if i == alone] or [i for i in same_text if i in used] or same_text
    candidates = list(dict.fromkeys([*same_text, *([] if alone is None else [alone])]))
    if len(candidates) > 1:
        listed = " or ".join(f"{i} ({texts[i]!r})" for i in candidates)
        raise ConfigError(f"{token!r} matches several tokens of {lm.name}: {listed}; give the id, or the text with its space")
    if not candidates:
        pieces = texts.row(i for i in ids if i < lm.d_vocab)
        raise ConfigError(f"{token!r} is not one token of {lm.name}: {pieces}{texts.hint(token)}")
    return int(candidates[0])


def _tokenised(lm: LanguageModel, text: str) -> list[int]:
    return lm.text_tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def name_of(metric: Any, lm: LanguageModel) -> str:
    """Return the name of a metric in words."""
    if isinstance(metric, LogProb):
        named, n_others = metric.tokens[:MOST_NAMED], len(metric.tokens) - MOST_NAMED
        others = f" or {n_others} others" if n_others > 0 else ""
        return f"log-probability of {', '.join(_shown(lm, token) for token in named)}{others}"
    if isinstance(metric, tuple | list):
        return " − ".join(f"logit of {_shown(lm, token)}" for token in metric)
    return metric if isinstance(metric, str) else getattr(metric, "__name__", repr(metric))


def _shown(lm: LanguageModel, token: str | int) -> str:
    return quoted(lm.vocabulary[token_id(lm, token)])


def values_of(metric: Metric, logits: Float[Tensor, "n pos d_vocab"]) -> Float[Tensor, " n"]:
    """Return the metric of each variant.

    Raises:
        ShapeError: the metric does not give one number for each variant.
        NonFiniteError: the metric is NaN or infinite.
    """
    values = metric(logits)
    if not isinstance(values, Tensor) or values.shape != logits.shape[:1]:
        shape = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ShapeError(f"the metric of logits {list(logits.shape)} is {shape}; expected a number for each: [{len(logits)}]")
    if not torch.isfinite(values).all():
        raise NonFiniteError(f"the metric {metric} is NaN or infinite")
    return values


def kl_divergence(
    clean: Float[Tensor, "pos d_vocab"], logits: Float[Tensor, "n pos d_vocab"], counted: Bool[Tensor, " pos"]
) -> Float[Tensor, " n"]:
    """Return KL(clean ‖ variant), nats per token, as a mean over the counted positions."""
    log_p, log_q = (_precise(x).log_softmax(-1) for x in (clean[counted], logits[:, counted]))
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean(1)


def _precise(logits: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return the logits in float32, or unchanged if their type is more precise."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
