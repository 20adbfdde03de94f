"""Answers of a local causal language model: batches of prompts, greedy, with the log-probabilities of choices."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelens_lite.chat.contract import Answer, Question, TokenChoice
from saelens_lite.chat.kept import messages_of
from saelens_lite.devices import float32_products
from saelens_lite.errors import ConfigError
from saelens_lite.model.generation import end_ids
from saelens_lite.model.hooks import alone
from saelens_lite.tokens.template import has_template

if TYPE_CHECKING:
    from saelens_lite.model import LanguageModel

LINE = re.compile(r"\s*\S[^\n]*\n")  # the first line with text in it
N_TOP = 20  # tokens whose log-probabilities are kept, besides those of the choices


class Prompt(NamedTuple):
    """A question, its token ids, and the number of tokens that an answer may have."""

    question: Question
    ids: list[int]
    room: int


def prompt_of(lm: "LanguageModel", question: Question) -> Prompt:
    """Return a question as the tokenizer's chat template writes it; without a template, as text that ends with «Answer:»."""
    tokenizer, messages = lm.text_tokenizer, messages_of(question)
    if has_template(tokenizer):
        text, begin = _rendered(tokenizer, messages), []
    else:
        text = "\n\n".join([*(message["content"] for message in messages), "Answer:"])
        begin = [] if lm.bos_id is None else [lm.bos_id]
    ids = begin + tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return Prompt(question, ids, min(question.max_tokens, lm.n_ctx - len(ids)))


def batches(prompts: Mapping[str, Prompt], n_ctx: int, size: int) -> Iterator[list[str]]:
    """Yield the keys of prompts in batches of at most `size`, in which each answer has its room in a row of n_ctx tokens."""
    batch: list[str] = []
    for key in sorted(prompts, key=lambda key: (len(prompts[key].ids), key)):  # so that there is little padding
        most = max(prompts[other].room for other in (*batch, key))
        if batch and (len(batch) == size or len(prompts[key].ids) + most > n_ctx):
            yield batch
            batch = []
        batch.append(key)
    if batch:
        yield batch


def _rendered(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """Return messages as the chat template writes them. If it refuses a system message, that becomes part of the user's."""
    from jinja2 import TemplateError

    joined = [{"role": "user", "content": "\n\n".join(message["content"] for message in messages)}]
    for tried in (messages, joined):
        try:
            return tokenizer.apply_chat_template(tried, tokenize=False, add_generation_prompt=True)
        except (TemplateError, ValueError, TypeError, KeyError) as error:
            reason = str(error)
    raise ConfigError(f"the chat template of the model cannot be rendered: {reason}")


@torch.no_grad()
def answers_of(lm: "LanguageModel", prompts: Sequence[Prompt]) -> list[Answer]:
    """Return the model's own answers, without active splices: the likeliest tokens up to an end token or the question's limit.

    Without a chat template, an answer also ends with its line.
    """
    from transformers import GenerationConfig

    longest = max(len(prompt.ids) for prompt in prompts)
    tokens = torch.full((len(prompts), longest), lm.pad_id)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[longest - len(prompt.ids) :] = torch.tensor(prompt.ids)
    held = torch.arange(longest) >= longest - torch.tensor([len(prompt.ids) for prompt in prompts])[:, None]
    ends = sorted(end_ids(lm))
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        max_new_tokens=max(prompt.room for prompt in prompts),
        pad_token_id=lm.pad_id,
        eos_token_id=ends or None,
    )
    recorder = Recorder(lm, [prompt.question.choices for prompt in prompts])
    by_line = None if has_template(lm.tokenizer) else _ends_of_lines(lm, longest)
    with alone(), float32_products(lm.tf32):
        out = lm.module.generate(
            tokens.to(lm.device),
            attention_mask=held.long().to(lm.device),
            generation_config=settings,
            logits_processor=[recorder],
            stopping_criteria=[] if by_line is None else [by_line],
        )
    rows = out[:, longest:].tolist()
    return [
        _answer(lm, prompt, row[: prompt.room], set(ends), by_line is not None, seen)
        for prompt, row, seen in zip(prompts, rows, recorder.seen, strict=True)
    ]


def _answer(
    lm: "LanguageModel", prompt: Prompt, ids: list[int], ends: set[int], by_line: bool, seen: dict[int, TokenChoice]
) -> Answer:
    """Return the answer in the new tokens of a row, which has more tokens after its end."""

    def text_of(n: int) -> str:
        return lm.text_tokenizer.decode(ids[:n], skip_special_tokens=True)

    n = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    is_ended, text = n < len(ids), text_of(n)
    if by_line and (line := LINE.match(text)):
        text, is_ended = line[0], True
        n = next(i for i in range(1, n + 1) if LINE.match(text_of(i)))
        seen = {i: token for i, token in seen.items() if i < n and not LINE.match(text_of(i) + token.text.rstrip())}
    whole, text = text, text.strip()
    choices, sizes = prompt.question.choices, (len(prompt.ids), n)
    if not is_ended and text not in choices:
        return Answer(None, "cut", None, *sizes)
    if not text:
        return Answer(None, "empty", None, *sizes)
    tokens = tuple(token._replace(start=_start(text_of(i), token.text, whole)) for i, token in sorted(seen.items()) if i < n)
    return Answer(text, None, tokens if choices else None, *sizes)


def _start(before: str, token: str, whole: str) -> int | None:
    """Return where the word of a token begins in a text without blanks around it; None if the tokens before it do not tell."""
    at = whole.find(token.strip(), len(before)) if whole.startswith(before) else -1
    n_blanks = len(whole) - len(whole.lstrip())
    return at - n_blanks if at >= 0 and not whole[len(before) : at].strip() else None


def _ends_of_lines(lm: "LanguageModel", n_prompt: int) -> Callable[..., Bool[Tensor, " batch"]]:
    """Return a function that says which rows have finished a line with text in it."""

    def ended(ids: Int[Tensor, "batch pos"], scores: Any, **_: Any) -> Bool[Tensor, " batch"]:
        texts = [lm.text_tokenizer.decode(row) for row in ids[:, n_prompt:].tolist()]
        return torch.tensor([bool(LINE.match(text)) for text in texts], device=ids.device)

    return ended


class Recorder:
    """Keeps the log-probabilities in the places where a row takes one of its choices."""

    def __init__(self, lm: "LanguageModel", choices: Sequence[tuple[str, ...]]):
        self.lm, self.choices = lm, [{choice.strip() for choice in of_row} for of_row in choices]
        self.ids = [self._ids(of_row) for of_row in self.choices]
        self.seen: list[dict[int, TokenChoice]] = [{} for _ in choices]  # by number of the new token
        self.n = 0

    def __call__(self, ids: Int[Tensor, "batch pos"], scores: Float[Tensor, "batch d_vocab"]) -> Float[Tensor, "batch d_vocab"]:
        """Look at the logits of a step, and return them as they are."""
        for i, row in enumerate(scores if any(self.choices) else ()):
            text = self._text(int(row.argmax()))
            if text.strip() in self.choices[i]:
                log_p = row.float().log_softmax(-1)
                wanted = [*self.ids[i], *reversed(log_p.topk(min(N_TOP, len(log_p))).indices.tolist())]
                self.seen[i][self.n] = TokenChoice(text, {self._text(token): float(log_p[token]) for token in wanted})
        self.n += 1
        return scores

    def _text(self, token: int) -> str:
        return self.lm.text_tokenizer.decode([token])

    def _ids(self, choices: set[str]) -> list[int]:
        """Return the ids of choices that are single tokens, with and without a space before them."""
        read = (
            self.lm.text_tokenizer(space + choice, add_special_tokens=False)["input_ids"]
            for choice in sorted(choices)
            for space in ("", " ")
        )
        return [ids[0] for ids in read if len(ids) == 1]
