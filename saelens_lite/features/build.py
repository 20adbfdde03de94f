"""The numbers of feature stores, computed from dictionaries, a model and a text."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saelens_lite.config import StoreConfig, TextConfig
from saelens_lite.devices import on_device
from saelens_lite.dictionary import Dictionary
from saelens_lite.errors import ConfigError, CorruptFileError, TextError, UserError
from saelens_lite.evaluation import as_trained
from saelens_lite.evaluation.positions import position_bands
from saelens_lite.features.code_log import Codes
from saelens_lite.features.codes import CODES_FILE, CodesTable, codes_file, join_codes
from saelens_lite.features.collect import Hooked, collect
from saelens_lite.features.cooccurrence import partners
from saelens_lite.features.info import StoreInfo, facts_of, own_id
from saelens_lite.features.per_model import OF_CODES, models_of
from saelens_lite.features.reduce import Block, TextFacts
from saelens_lite.features.tensors import FeatureTensors
from saelens_lite.features.text_rows import rows_of
from saelens_lite.fingerprints import Fingerprint
from saelens_lite.model.models import AnyModel, Models
from saelens_lite.processes import Team
from saelens_lite.progress import progress_bar
from saelens_lite.tensor_files import read_tensors, write_tensors
from saelens_lite.tokens import RowBlocks, RowHash, Text, TokenRows, source_name, text_hash

SHOWN = {"top_n", "n_groups", "group_size", "n_random", "n_silent", "window", "seed", "raw_unembedding"}  # as in StoreInfo
LOG_FORMAT = 2  # of an unfinished pass


class StorePlan(NamedTuple):
    """The inputs of a pass: dictionaries with their hooks, token rows, the facts that each store records, settings, weights."""

    hooked: list[Hooked]
    rows: TokenRows
    infos: list[StoreInfo]
    config: StoreConfig
    weights: Fingerprint

    @classmethod
    def of(
        cls,
        dictionaries: Sequence[Dictionary],
        lm: AnyModel,
        text: Text | TokenRows,
        config: StoreConfig,
        *,
        hook: str | None,
        text_config: TextConfig | None,
        folder: Path | None = None,
    ) -> "StorePlan":
        """Return the job, after all checks that do not need to run the model. Rows of long texts are in files in `folder`."""
        if not dictionaries:
            raise ConfigError("there is no dictionary to collect features of; give at least one")
        hooked = [_hooked(d, lm, hook) for d in dictionaries]
        rows, weights = _rows(dictionaries, lm, text, config.n_tokens, text_config, folder), lm.fingerprint()
        common = {
            "n_tokens": rows.n_kept,
            "bos_id": lm.bos_id,
            "text": source_name(text, text_config),
            "text_sha256": text_hash(rows),
            "model_sha256": weights,
            **config.model_dump(include=SHOWN),
        }
        infos = [
            StoreInfo(
                reads=one.hooks.reads,
                writes=one.hooks.writes,
                neuronpedia=own_id(one.dictionary),
                **_named(lm, one.dictionary),
                **facts_of(one.dictionary),
                **common,
            )
            for one in hooked
        ]
        return cls(hooked, rows, infos, config, weights)

    def request(self, lm: AnyModel) -> dict[str, Any]:
        """Return the facts that must be equal for an unfinished pass to be resumed."""
        read = RowHash()
        for piece in self.rows.pieces():
            read.add(piece)
        each = [info.model_dump(mode="json", exclude={"model_sha256", "precision", "processing"}) for info in self.infos]
        of_each = {f"{i}: {key}": x for i, facts in enumerate(each) for key, x in facts.items()}
        of_model = {} if isinstance(lm, Models) else {"processing": lm.processing, "model_dtype": f"torch.{lm.precision}"}
        return {
            **of_model,  # of several models, infos have these
            "weights": self.weights,
            "tokenizer": lm.tokenizer_hash,
            "batch_tokens": self.config.batch_tokens,
            "control": self.config.control,
            "n_dictionaries": len(self.infos),
            "log_format": LOG_FORMAT,
            "rows_sha256": read.record.sha256,
            **of_each,
        }

    def numbers(self, lm: AnyModel, folder: Path, team: Team) -> "list[tuple[Numbers | None, Numbers | None]]":
        """Run the model and return the numbers of each dictionary and of its control. Codes go to disk, below `folder`.

        In processes other than the first of a team, both are None.
        """
        own, control = self._codes(lm, folder, "features", team), [None] * len(self.infos)
        if self.config.control:
            with lm.redrawn(self.config.seed) as redrawn:
                plain = self._replace(hooked=[one._replace(models=()) for one in self.hooked])  # parts are of the own models
                control = plain._codes(redrawn, folder / "control", "features of the control", team)
        return [
            (
                reduced(one, self.rows, info, self.config.codes),
                None if other is None else reduced(other, self.rows, self.control_info(i), must_fire=False),
            )
            for i, (info, one, other) in enumerate(zip(self.infos, own, control, strict=True))
        ]

    def _codes(self, lm: AnyModel, folder: Path, what: str, team: Team) -> list[Codes]:
        return collect(self.hooked, lm, self.rows, self.config.batch_tokens, folder, what, self.config.seed, team)

    def control_info(self, i: int) -> StoreInfo:
        """Return the facts about the control of a dictionary."""
        return self.infos[i].replace(model=f"{self.infos[i].model}, weights shuffled", revision=None, models=())


def _named(lm: AnyModel, dictionary: Dictionary) -> dict[str, Any]:
    """Return the facts about the models of a dictionary, as fields of a StoreInfo."""
    models = models_of(dictionary, lm)
    if not isinstance(lm, Models):
        return {"model": lm.name, "revision": lm.revision, "precision": lm.precision, "processing": lm.processing}
    if len(models) == 1:
        one = models[0]
        facts = {"precision": one.precision or "float32", "processing": one.processing}
        return {"model": one.model, "revision": one.revision, **facts}
    named = ", ".join(f"{facts.name} = {facts.model}" for facts in models)
    return {"model": named, "revision": None, "models": models}


def _hooked(dictionary: Dictionary, lm: AnyModel, hook: str | None) -> Hooked:
    """Return a dictionary on the model's device, with its hooks. Raise NonFiniteError if a weight is NaN or infinite."""
    dictionary.check_finite()
    lm.warn_of_precision(dictionary.origin)
    models = tuple(facts.name for facts in models_of(dictionary, lm))
    return Hooked(on_device(dictionary, lm.device), lm.hooks_of(dictionary, hook), models if len(models) > 1 else ())


def _rows(
    dictionaries: Sequence[Dictionary],
    lm: AnyModel,
    text: Text | TokenRows,
    n_tokens: int | None,
    text_config: TextConfig | None,
    folder: Path | None,
) -> TokenRows:
    """Return token rows on the CPU. Text is cut into rows as the dictionaries' training text was."""
    if not isinstance(text, TokenRows):
        config = as_trained(dictionaries, lm, text, text_config or TextConfig())
        return rows_of(RowBlocks(lm, text, config, n_tokens=n_tokens), folder)
    if n_tokens is not None or text_config is not None:
        raise ConfigError("n_tokens and text_config apply only to text, but token rows were given; give fewer rows instead")
    if not text.n_kept:
        raise TextError("no position of the token rows is kept; give rows with at least one kept token")
    return text.to("cpu")


class Numbers:
    """The numbers of all latents, and the table with their codes, if any."""

    def __init__(self, rows: TokenRows, codes: Codes, of_latents: dict[str, Tensor], table: Path | None):
        self._rows, self.of_latents = rows, of_latents
        self.codes = None if table is None else CodesTable.of(table)
        self.partner_tokens = None if codes.n_listed == codes.n_tokens else codes.n_listed

    @property
    def tensors(self) -> FeatureTensors:
        """The numbers as the tensors of a store."""
        bands = position_bands(self._rows)
        of_text = {
            "tokens": self._rows.tokens.int(),
            "length": self._rows.counted_lengths.int(),
            "band_low": torch.tensor(bands.low),
            "band_high": torch.tensor(bands.high),
            "band_tokens": torch.tensor(bands.n_tokens),
        }
        own = {name: x for name, x in self.of_latents.items() if name in FeatureTensors._fields}
        return FeatureTensors(**of_text, **own)

    @property
    def of_models(self) -> dict[str, Tensor]:
        """The numbers about several models, if there are several: fields of ModelTensors."""
        return {name: x for name, x in self.of_latents.items() if name in OF_CODES}


def reduced(
    codes: Codes,
    rows: TokenRows,
    info: StoreInfo,
    table: bool = False,
    must_fire: bool = True,
    also: Callable[[Block], dict[str, Tensor]] = lambda block: {},
) -> Numbers | None:
    """Return the numbers of a store, computed from the codes on disk, in the first process of a team; None in the others.

    Each process reduces some blocks of latents and leaves the numbers in files, which the first one joins.

    Args:
        table: Also write the codes to a file, sorted.
        also: Function that returns more numbers for a block of latents.

    Raises:
        TextError, UserError: no latent fires on the text or the activations, and `must_fire` is set.
        CorruptFileError: the codes on disk do not cover all tokens.
    """
    team = codes.team
    with team.failing_together():
        if codes.n_tokens != info.n_tokens:
            raise CorruptFileError(
                f"{codes.folder} has codes of {codes.n_tokens:,} tokens, expected {info.n_tokens:,}; delete {codes.folder}"
            )
    count = codes.count()
    if must_fire and not count.any():
        cause = "the text" if info.model else "x"
        hint = "is it the right hook?" if info.model else "was it scaled as the data that the dictionary was trained on?"
        error = TextError if info.model else UserError
        raise error(f"none of the {info.d_sae} latents fires on {cause} ({info.n_tokens:,} {info.unit}s); {hint}")
    folder, text = codes.reduced_folder, TextFacts.of(rows)
    with team.failing_together():
        lists = codes.lists(rows.tokens.numel())
        folder.mkdir(parents=True, exist_ok=True)

    def of_block(number: int, write: Callable[[Block], None]) -> dict[str, Tensor]:
        parts = []
        for piece in codes.pieces(number, count):
            block = Block(piece.entries, piece.first, piece.n, text, info)
            write(block)
            parts.append(block.reduced() | partners(block, lists, count)._asdict() | also(block))
            advance(piece.n, "")
        return _joined(parts)

    path = folder / CODES_FILE if table else None
    with progress_bar("latents", info.d_sae, "latents") as advance:
        if team.world == 1:
            with codes_file(path, rows.tokens) as write:
                parts = [of_block(number, write) for number in range(codes.n_blocks)]
            return Numbers(rows, codes, _joined(parts), path)
        with team.failing_together():
            for number in codes.own_blocks():
                with codes_file(folder / f"{number}.parquet" if table else None, rows.tokens) as write:
                    write_tensors(folder / f"{number}.safetensors", of_block(number, write))
    if not team.is_first:
        return None
    numbers = range(codes.n_blocks)
    if path is not None:
        join_codes(path, [folder / f"{number}.parquet" for number in numbers])
    return Numbers(rows, codes, _joined([read_tensors(folder / f"{number}.safetensors") for number in numbers]), path)


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the numbers of consecutive latents, joined."""
    return parts[0] if len(parts) == 1 else {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
