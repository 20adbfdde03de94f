"""Chat models that run on this computer: a causal language model of transformers answers, always with its likeliest tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from saelens_lite.chat.contract import Answer, Estimate, Question

if TYPE_CHECKING:
    from saelens_lite.model import LanguageModel


class LocalModel:
    """A causal language model that answers questions on this computer; `local_chat_model` makes one."""

    def __init__(self, lm: "LanguageModel", *, batch_size: int = 8, folder: Path | None = None, ask_again: bool = False):
        self.name = lm.name
        self.lm, self.batch_size = lm, batch_size

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Return an answer to each question, in their order."""
        raise NotImplementedError

    def estimate(self, questions: Sequence[Question]) -> Estimate:
        """Return the tokens of the questions that have no kept answer yet. They cost nothing."""
        raise NotImplementedError


def local_chat_model(
    model: "str | Path | LanguageModel", *, batch_size: int = 8, folder: Path | None = None, ask_again: bool = False
) -> LocalModel:
    """Return a causal language model of transformers as a chat model.

    Args:
        model: A loaded model, or a name as for `load_model`.
        batch_size: Questions that are answered at the same time.
        folder: Folder of kept answers; default: as in `ChatConfig`.
        ask_again: Ask again where the kept answer is cut or empty.
    """
    from saelens_lite.model import LanguageModel, load_model

    lm = model if isinstance(model, LanguageModel) else load_model(model)
    return LocalModel(lm, batch_size=batch_size, folder=folder, ask_again=ask_again)
