"""Chat models that run on this computer: a causal language model of transformers answers, always with its likeliest tokens."""

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from saelens_lite.chat.contract import Answer, Estimate, Question
from saelens_lite.chat.kept import Asked, KeptAnswers, in_order
from saelens_lite.errors import ConfigError, Stopped
from saelens_lite.progress import progress_bar

if TYPE_CHECKING:
    from saelens_lite.model import LanguageModel


class LocalModel:
    """A causal language model that answers questions on this computer; `local_chat_model` makes one."""

    def __init__(self, lm: "LanguageModel", *, batch_size: int = 8, folder: str | Path | None = None, ask_again: bool = False):
        from saelens_lite.model.generation import end_ids

        if batch_size < 1:
            raise ConfigError(f"batch_size = {batch_size}; expected 1 or more")
        lm.check_causal("answering questions")
        _ = lm.text_tokenizer  # TextError without one
        self.name, self.lm, self.batch_size = lm.name, lm, batch_size
        self._kept = KeptAnswers(folder, ask_again)
        self._facts = {
            "endpoint": "local",
            "model": lm.name,
            "weights": lm.fingerprint(),
            "precision": lm.precision,
            "tokenizer": lm.tokenizer_hash,
            "template": getattr(lm.tokenizer, "chat_template", None),
            "ends": sorted(end_ids(lm)),
        }

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Return an answer to each question, in their order. A question that is kept, or asked twice, is not asked again.

        A question that leaves no room for an answer in the model's context fails as «too long». Schemas are ignored.

        Raises:
            ConfigError: the folder of kept answers cannot be written, or the model's chat template cannot be rendered.
            Stopped: after Ctrl-C.
        """
        from saelens_lite.chat.generating import answers_of, batches, prompt_of

        asked = [self._asked(question) for question in questions]
        keys = [one.key for one in asked]
        answers = {key: answer for key in dict.fromkeys(keys) if (answer := self._kept.get(key))}
        waiting = {key: (a, q) for key, a, q in zip(keys, asked, questions, strict=True) if key not in answers}
        prompts = {key: prompt_of(self.lm, question) for key, (_, question) in waiting.items()}
        answers |= {key: Answer(None, "too long") for key, prompt in prompts.items() if prompt.room < 1}
        prompts = {key: prompt for key, prompt in prompts.items() if prompt.room >= 1}
        if prompts:
            self._kept.check()
        n_done = 0
        with progress_bar(f"asking {self.name}", len(prompts), "questions") as advance:
            try:
                for batch in batches(prompts, self.lm.n_ctx, self.batch_size):
                    for key, answer in zip(batch, answers_of(self.lm, [prompts[key] for key in batch]), strict=True):
                        self._kept.put(waiting[key][0], answer)
                        answers[key] = answer
                    n_done += len(batch)
                    advance(len(batch), "")
            except KeyboardInterrupt:
                kept = f"{n_done:,} of {len(prompts):,} questions are answered and kept in {self._kept.folder}"
                raise Stopped(f"stopped; {kept}. Repeat the call to ask the others", signal.SIGINT) from None
        return in_order(keys, answers)

    def estimate(self, questions: Sequence[Question]) -> Estimate:
        """Return the tokens of the questions that have no kept answer yet: at most, for the output. They cost nothing."""
        from saelens_lite.chat.generating import prompt_of

        by_key = {self._asked(question).key: question for question in questions}
        waiting = [question for key, question in by_key.items() if self._kept.get(key) is None]
        n_input = sum(len(prompt_of(self.lm, question).ids) for question in waiting)
        return Estimate(len(waiting), n_input, sum(question.max_tokens for question in waiting), 0.0)

    def _asked(self, question: Question) -> Asked:
        return Asked.of(question._replace(schema=None), **self._facts)


def local_chat_model(
    model: "str | Path | LanguageModel",
    *,
    batch_size: int = 8,
    folder: str | Path | None = None,
    ask_again: bool = False,
) -> LocalModel:
    """Return a causal language model of transformers as a chat model.

    Its tokenizer's chat template writes the questions. Without a template they are plain text that ends with «Answer:», and an
    answer ends with its line; models that were not trained on instructions seldom answer well.

    Args:
        model: A loaded model, or a name as for `load_model`.
        batch_size: Questions that are answered at the same time.
        folder: Folder of kept answers; default: as in `ChatConfig`.
        ask_again: Ask again where the kept answer is cut or empty.

    Raises:
        ModelNotFoundError: there is no such model.
        ConfigError: the batch size is below 1, or the model is not causal.
        TextError: the model has no tokenizer.
    """
    from saelens_lite.model import LanguageModel, load_model

    lm = model if isinstance(model, LanguageModel) else load_model(model)
    return LocalModel(lm, batch_size=batch_size, folder=folder, ask_again=ask_again)
