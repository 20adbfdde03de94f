"""The part of a language model that decides on token ids: its tokenizer, vocabulary, special tokens and longest row."""

import hashlib
import json
import logging
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from jaxtyping import Bool, Int
from torch import Tensor

from saelens_lite.config import Origin
from saelens_lite.errors import ConfigError, ShapeError, TextError
from saelens_lite.tokens.display import Vocabulary
from saelens_lite.tokens.inputs import Ids, aligned, n_leading_pads
from saelens_lite.tokens.rows import countable
from saelens_lite.tokens.template import has_template, in_template, template_sequences

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


class Tokenizer:
    """The tokenizer of a model with the model's name, longest row `n_ctx` and number of token ids `d_vocab`.

    With tokenizer=None it takes token ids only. Text is cut into rows by this alone; a `LanguageModel` is one.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase | None", *, name: str, n_ctx: int, d_vocab: int):
        self.tokenizer, self.name, self.n_ctx, self.d_vocab = tokenizer, name, n_ctx, d_vocab
        bos_id = None if tokenizer is None else tokenizer.bos_token_id
        self.bos_id: int | None = self.eos_id if bos_id is None else bos_id  # GPT-2 has <|endoftext|> for both

    @property
    def text_tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer; TextError when the model has none."""
        if self.tokenizer is None:
            raise TextError(f"{self.name} has no tokenizer, so it cannot read text; give token ids")
        return self.tokenizer

    @property
    def eos_id(self) -> int | None:
        """The token id that ends a text; None where the tokenizer has none."""
        return None if self.tokenizer is None else self.tokenizer.eos_token_id

    @property
    def special_ids(self) -> frozenset[int]:
        """Token ids that stand for no text, such as BOS, EOS and padding; none without a tokenizer."""
        special = [] if self.tokenizer is None else self.tokenizer.all_special_ids
        return frozenset(special) | ({self.bos_id} if self.bos_id is not None else set())

    @property
    def pad_id(self) -> int:
        """The token id that rows are padded with: EOS, else BOS, else 0."""
        return next(i for i in (self.eos_id, self.bos_id, 0) if i is not None)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The texts of all token ids as people can read them; `vocabulary.row(ids)` is what the tokens of a row show."""
        return Vocabulary.of(self.tokenizer, self.d_vocab)

    @cached_property
    def template(self) -> list[tuple[int, ...]]:
        """The sequences of token ids that the chat template puts around messages; ConfigError without a template."""
        if self.tokenizer is None or not has_template(self.tokenizer):
            raise ConfigError(f"exclude_template is set, but the tokenizer of {self.name} has no chat template; leave it out")
        return template_sequences(self.tokenizer)

    @property
    def tokenizer_hash(self) -> str:
        """sha256 of the tokenizer: vocabulary, merges and rules; the same text gives the same ids where it is the same."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if self.tokenizer is None:
            content = {"class": None}
        elif backend is None:  # written in Python: its vocabulary has to do
            content = {"class": type(self.tokenizer).__name__, "vocabulary": self.tokenizer.get_vocab()}
        else:
            content = json.loads(backend.to_str()) | {"padding": None, "truncation": None}  # those change from call to call
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids; without a tokenizer, the ids with spaces between them."""
        return " ".join(map(str, ids)) if self.tokenizer is None else self.tokenizer.decode(list(ids))

    def token_strings(self) -> list[str]:
        """Decode every token id by itself; without a tokenizer, the ids. `vocabulary` has texts to show."""
        if self.tokenizer is None:
            return [str(i) for i in range(self.d_vocab)]
        return self.tokenizer.batch_decode([[i] for i in range(self.d_vocab)], clean_up_tokenization_spaces=False)

    def begin_with_bos(self, ids: Ids) -> bool:
        """Return whether every row begins with the BOS token."""
        first = aligned(Ids(ids.tokens, ids.mask), self.pad_id).tokens[:, 0] if ids.mask is not None else ids.tokens[:, 0]
        return self.bos_id is not None and bool((first == self.bos_id).all())

    def wants_bos(self, origin: Origin) -> bool:
        """Return whether texts for a dictionary of this origin begin with BOS: unless it says no or the tokenizer has none."""
        return origin.prepend_bos is not False and self.bos_id is not None

    def countable(self, tokens: Int[Tensor, "batch pos"], origin: Origin | None = None) -> Bool[Tensor, "batch pos"]:
        """Return the positions that a dictionary of this origin was trained on, by default all but position 0.

        Special tokens are left out everywhere, which includes padding with one of them.
        """
        origin = origin or Origin()
        kept = countable(tokens, self.special_ids | set(origin.excluded_token_ids), origin.excluded_positions)
        return kept & ~in_template(tokens, self.template) if origin.excluded_template else kept

    def check_ids(self, ids: Ids) -> None:
        """Raise ShapeError unless the model can take these token ids."""
        tokens = ids.tokens
        if tokens.shape[1] > self.n_ctx:
            raise ShapeError(f"rows of {tokens.shape[1]} tokens; {self.name} takes at most {self.n_ctx}")
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.d_vocab:
            raise ShapeError(
                f"token ids must be integers from 0 to {self.d_vocab - 1}; found {low} … {high}, which {self.name} lacks"
            )

    def warn_of_leading_pads(self, ids: Ids) -> None:
        """Log a warning when token ids that came without a mask look padded on the left."""
        pad = None if self.tokenizer is None else self.tokenizer.pad_token_id
        pads = [i for i in {pad, self.bos_id, self.eos_id} if i is not None]
        if ids.mask is None and (leading := n_leading_pads(ids.tokens, pads)):
            row, n = leading
            log.warning(
                "row %d of the token ids begins with token %d %d times, which looks like padding and is read as text; give "
                "attention_mask= to leave it out",
                row, int(ids.tokens[row, 0]), n + 1,
            )  # fmt: skip
