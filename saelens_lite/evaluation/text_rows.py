"""The token rows of a text that dictionaries are measured on: cut as in their training."""

from collections.abc import Iterator, Sequence

from saelens_lite.config import TextConfig
from saelens_lite.dictionary import Dictionary
from saelens_lite.errors import ConfigError
from saelens_lite.evaluation.held import STRETCH
from saelens_lite.model.models import AnyModel
from saelens_lite.tokens import DEFAULT_N_CTX, RowBlocks, Text, TokenRows, token_ids


def row_blocks(lm: AnyModel, text: Text | TokenRows, n_tokens: int | None, config: TextConfig | None) -> Iterator[TokenRows]:
    """Yield the rows of a text in blocks, cut one token after the last position that counts. Token rows stay as they are."""
    if isinstance(text, TokenRows):
        n_rows = max(1, STRETCH // max(1, text.tokens.shape[1]))
        yield from (text[first : first + n_rows].to("cpu") for first in range(0, len(text.tokens), n_rows))
    else:
        for rows in RowBlocks(lm, text, config, n_tokens=n_tokens):
            yield rows.narrowed(int(rows.counted_lengths.max()) + 1)


def as_trained(dictionaries: Sequence[Dictionary], lm: AnyModel, text: Text, config: TextConfig) -> TextConfig:
    """Return the settings. Those that are not set are taken from the rows that the dictionaries were trained on.

    Raises:
        ConfigError: the dictionaries were trained with different values of one that is not set.
    """
    recorded = {
        "n_ctx": [min(d.origin.n_ctx or DEFAULT_N_CTX, lm.n_ctx) for d in dictionaries],
        "bos": ["row" if lm.wants_bos(d.origin) else "none" for d in dictionaries],
        "exclude_positions": [tuple(sorted(d.origin.excluded_positions)) for d in dictionaries],
        "exclude_token_ids": [tuple(sorted(d.origin.excluded_token_ids)) for d in dictionaries],
        "exclude_template": [d.origin.excluded_template for d in dictionaries],
    }
    given = config.model_fields_set - ({"n_ctx"} if config.n_ctx is None else set())
    if token_ids(text) is not None or not any(d.origin.n_ctx for d in dictionaries):
        given = given | {"n_ctx"}  # token ids keep their rows; else the default length
    unsaid = {name: values for name, values in recorded.items() if name not in given}
    if differ := [f"{name} = {', '.join(map(str, values))}" for name, values in unsaid.items() if len(set(values)) > 1]:
        raise ConfigError(
            f"the dictionaries were trained on rows of different kinds, {'; '.join(differ)}; evaluate them one by one, or "
            "choose one in text_config"
        )
    return config.replace(**{name: values[0] for name, values in unsaid.items()})
