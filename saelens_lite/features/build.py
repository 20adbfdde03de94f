"""The numbers of feature stores, computed from dictionaries, a model and a text."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from saelens_lite.config import StoreConfig, TextConfig
from saelens_lite.devices import on_device
from saelens_lite.dictionary import Dictionary
from saelens_lite.errors import ConfigError, CorruptFileError, TextError, UserError
from saelens_lite.evaluation import as_trained
from saelens_lite.features.code_log import CodeLog
from saelens_lite.features.codes import codes_file
from saelens_lite.features.collect import Hooked, collect
from saelens_lite.features.cooccurrence import partners
from saelens_lite.features.info import StoreInfo, facts_of
from saelens_lite.features.reduce import Block, TextFacts
from saelens_lite.features.tensors import FeatureTensors
from saelens_lite.model import LanguageModel
from saelens_lite.progress import progress_bar
from saelens_lite.tokens import RowHash, Text, TokenRows, source_name, text_hash, token_rows

SHOWN = {"top_n", "n_groups", "group_size", "n_random", "n_silent", "window", "seed", "raw_unembedding"}  # as in StoreInfo


class StorePlan(NamedTuple):
    """The inputs of a pass: dictionaries with their hooks, token rows, the facts that each store records, and settings."""

    hooked: list[Hooked]
    rows: TokenRows
    infos: list[StoreInfo]
    config: StoreConfig

    @classmethod
    def of(
        cls,
        dictionaries: Sequence[Dictionary],
        lm: LanguageModel,
        text: Text | TokenRows,
        config: StoreConfig,
        *,
        hook: str | None,
        text_config: TextConfig | None,
    ) -> "StorePlan":
        """Return the job, after all checks that do not need to run the model."""
        if not dictionaries:
            raise ConfigError("there is no dictionary to collect features of; give at least one")
        hooked = [_hooked(d, lm, hook) for d in dictionaries]
        rows = _rows(dictionaries, lm, text, config.n_tokens, text_config)
        common = {
            "model": lm.name,
            "revision": lm.revision,
            "n_tokens": rows.n_kept,
            "bos_id": lm.bos_id,
            "text": source_name(text, text_config),
            "text_sha256": text_hash(rows),
            **config.model_dump(include=SHOWN),
        }
        infos = [
            StoreInfo(
                reads=one.hooks.reads,
                writes=one.hooks.writes,
                **facts_of(one.dictionary),
                **common,
            )
            for one in hooked
        ]
        return cls(hooked, rows, infos, config)

    def request(self, lm: LanguageModel) -> dict[str, Any]:
        """Return the facts that must be equal for an unfinished pass to be resumed."""
        read = RowHash()
        read.add(self.rows)
        of_each = {f"{i}: {key}": x for i, info in enumerate(self.infos) for key, x in info.model_dump(mode="json").items()}
        return {
            "processing": lm.processing,
            "weights": lm.fingerprint(),
            "tokenizer": lm.tokenizer_hash,
            "model_dtype": f"torch.{lm.precision}",
            "batch_tokens": self.config.batch_tokens,
            "control": self.config.control,
            "n_dictionaries": len(self.infos),
            "rows_sha256": read.record.sha256,
            **of_each,
        }

    def collected(self, lm: LanguageModel, folder: Path, what: str) -> list[CodeLog]:
        """Run the model once and return the codes of each dictionary, which are on disk below `folder`."""
        return collect(self.hooked, lm, self.rows, self.config.batch_tokens, folder, what)


def _hooked(dictionary: Dictionary, lm: LanguageModel, hook: str | None) -> Hooked:
    """Return a dictionary on the model's device, with its hooks. Raise NonFiniteError if a weight is NaN or infinite."""
    dictionary.check_finite()
    lm.warn_of_precision(dictionary.origin)
    return Hooked(on_device(dictionary, lm.device), lm.hooks_of(dictionary, hook))


def _rows(
    dictionaries: Sequence[Dictionary],
    lm: LanguageModel,
    text: Text | TokenRows,
    n_tokens: int | None,
    text_config: TextConfig | None,
) -> TokenRows:
    """Return token rows on the CPU. Text is cut into rows as the dictionaries' training text was."""
    if not isinstance(text, TokenRows):
        config = as_trained(dictionaries, lm, text, text_config or TextConfig())
        return token_rows(lm, text, n_tokens=n_tokens, text_config=config)
    if n_tokens is not None or text_config is not None:
        raise ConfigError("n_tokens and text_config apply only to text, but token rows were given; give fewer rows instead")
    if not text.n_kept:
        raise TextError("no position of the token rows is kept; give rows with at least one kept token")
    return text.to("cpu")


def reduced(
    code_log: CodeLog,
    rows: TokenRows,
    info: StoreInfo,
    codes: Path | None = None,
    must_fire: bool = True,
    also: Callable[[Block], None] = lambda block: None,
) -> FeatureTensors:
    """Return the numbers of a store, computed from the codes on disk. With `codes`, also write them to that file, sorted.

    Args:
        also: Function to call with each block of latents.

    Raises:
        TextError, UserError: no latent fires on the text or the activations, and `must_fire` is set.
        CorruptFileError: the codes on disk do not cover all tokens.
    """
    text = TextFacts.of(rows)
    lists = code_log.lists(text.n_places)
    n_listed = len(lists.crow) - 1
    if n_listed != info.n_tokens:
        raise CorruptFileError(
            f"{code_log.folder} has codes of {n_listed:,} tokens, expected {info.n_tokens:,}; delete {code_log.folder.parent}"
        )
    count = lists.count(info.d_sae)
    if must_fire and not count.any():
        cause = "the text" if info.model else "x"
        hint = "is it the right hook?" if info.model else "was it scaled as the data that the dictionary was trained on?"
        error = TextError if info.model else UserError
        raise error(f"none of the {info.d_sae} latents fires on {cause} ({info.n_tokens:,} {info.unit}s); {hint}")
    parts = []
    with codes_file(codes, rows.tokens) as write, progress_bar("latents", info.d_sae, "latents") as advance:
        for piece in code_log.pieces(count):
            block = Block(piece.entries, piece.first, piece.n, text, info)
            write(block)
            also(block)
            parts.append(block.reduced() | partners(block, lists, count)._asdict())
            advance(piece.n, "")
    of_text = {
        "tokens": rows.tokens.int(),
        "length": text.length.int(),
        "band_low": torch.tensor(text.bands.low),
        "band_high": torch.tensor(text.bands.high),
        "band_tokens": torch.tensor(text.bands.n_tokens),
    }
    return FeatureTensors(**of_text, **{name: torch.cat([part[name] for part in parts]) for name in parts[0]})
