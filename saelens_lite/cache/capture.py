"""Running a model over a text and keeping what its hooks see: once, and never again for work already done.

In the folder of an unfinished capture (`saelens_lite.resumable`), journal.jsonl has a line for each shard that is whole, and
shards/ becomes the cache. The same call continues it, batch for batch as if nothing had happened.
"""

import dataclasses
import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from saelens_lite.cache.shards import Facts, check_size, shard_name, write_shard
from saelens_lite.cache.source import Moments
from saelens_lite.cache.stored import FORMAT, MANIFEST, ActivationCache
from saelens_lite.config import Origin, TextConfig
from saelens_lite.errors import (
    ConfigError,
    CorruptFileError,
    DiskFullError,
    NonFiniteError,
    OutputExistsError,
    SourceChangedError,
)
from saelens_lite.files import (
    DTYPES,
    MAX_LIST_BYTES,
    append_line,
    parsed_json,
    write_json,
    write_text,
)
from saelens_lite.kinds import CACHE, UNFINISHED_CAPTURE
from saelens_lite.model import LanguageModel, passes
from saelens_lite.model.passes import default_batch_tokens
from saelens_lite.outputs import followed, replace_folder
from saelens_lite.prefetch import prefetched
from saelens_lite.progress import progress_bar
from saelens_lite.resumable import REQUEST, start_over, unfinished
from saelens_lite.schemas import Checked, Count, Sha256, checked
from saelens_lite.tokens import (
    RowBlocks,
    RowHash,
    RowRecord,
    Text,
    TokenRows,
    files_of,
    source_name,
    text_config_of,
    with_mask,
)

JOURNAL, SHARDS = "journal.jsonl", "shards"
log = logging.getLogger(__name__)


class _OtherTextError(OutputExistsError):
    """What is in the shards is of another text."""


def activations(
    lm: LanguageModel,
    blocks: Iterable[TokenRows],
    hooks: Sequence[str],
    batch_tokens: int,
    skip: int = 0,
    read: RowHash | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Yield activations at the positions that count, and their "tokens", batch after batch, the rows of each block shuffled.

    The first `skip` positions are left out, and batches they fill are not run. `read` takes in the rows of each batch before
    its activations come: those of batches that are not run too.
    """
    read = RowHash() if read is None else read
    with prefetched(blocks) as ready:
        for number, rows in enumerate(ready):
            for batch in passes.batches(lm, rows, batch_tokens, "shuffled", seed=number):
                read.add(batch.rows)
                tokens = batch.rows.tokens[batch.rows.keep].to(torch.int32)
                n_skipped = min(skip, len(tokens))
                skip -= n_skipped
                if n_skipped < len(tokens):
                    piece = {"tokens": tokens, **passes.read(lm, batch, hooks).acts}
                    yield {key: x[n_skipped:] for key, x in piece.items()}
    read.end()


def capture(
    lm: LanguageModel,
    text: Text | TokenRows,
    hooks: Sequence[str] | str,
    out: str | Path,
    *,
    n_tokens: int | None = None,
    n_ctx: int | None = None,
    prepend_bos: bool | None = None,
    text_config: TextConfig | None = None,
    attention_mask: Any = None,
    dtype: Literal["float16", "bfloat16", "float32"] = "float16",
    batch_tokens: int | None = None,
    shard_tokens: int = 65_536,
    text_name: str | None = None,
    exists: Literal["error", "overwrite"] = "error",
) -> ActivationCache:
    """Activations of a text at hooks, written to a cache folder, which appears when it is complete.

    The model runs once over the text, up to the deepest hook, `batch_tokens` tokens at a time (2,048 on a CPU, 16,384 on a
    GPU), while a thread reads and tokenises the text in advance; only a block of it is in memory. Special tokens and padding
    are not stored, nor position 0. `text` may be token ids in any form that `LanguageModel.to_tokens` takes, with their
    `attention_mask`. `text_config` has the settings of how text is read and cut, for which `n_ctx` and `prepend_bos` are
    shorthands; rows have at most 1,024 tokens unless n_ctx says otherwise. Activations are stored as `dtype` and computed in
    the model's. Shards are written one by one: after an interruption the same call goes on behind the last one.

    Raises:
        HookError, TextError, ConfigError: an unknown hook, no text, settings that do not fit the model.
        OutputExistsError: `out` holds something, or an unfinished capture of something else, and `exists` is "error".
        NonFiniteError: the model produced NaN or infinity, or numbers too large for `dtype`.
        LockedError: another process is writing the same cache.
        DiskFullError: the cache does not fit on the disk; what is written stays.
    """
    names = [hooks] if isinstance(hooks, str) else list(dict.fromkeys(hooks))
    for name in names:
        lm.hook_point(name)
    if dtype not in ("float16", "bfloat16", "float32"):
        raise ConfigError(f"dtype = {dtype!r}; expected float16, bfloat16 or float32")
    batch_tokens = default_batch_tokens(lm) if batch_tokens is None else batch_tokens
    if min(batch_tokens, shard_tokens) < 1:
        raise ConfigError(f"batch_tokens = {batch_tokens}, shard_tokens = {shard_tokens}; expected at least 1")
    config, text = text_config_of(text_config, n_ctx, prepend_bos), with_mask(text, attention_mask)
    blocks = RowBlocks(lm, text, config, n_tokens=n_tokens)
    config = blocks.config
    out = followed(Path(out))
    request = {
        "model": lm.name, "revision": lm.revision, "processing": lm.processing, "tokenizer": lm.tokenizer_hash, "hooks": names,
        "model_dtype": str(lm.dtype), "n_tokens": n_tokens, "text_config": config.model_dump(mode="json"), "dtype": dtype,
        "batch_tokens": batch_tokens, "shard_tokens": shard_tokens, "weights": lm.fingerprint(),
    }  # fmt: skip
    with unfinished(out, CACHE, request, UNFINISHED_CAPTURE, _has_shards, exists, files_of(text)) as folder:
        try:
            writer = _write_shards(folder, lm, blocks, names, batch_tokens, shard_tokens, DTYPES[dtype])
        except _OtherTextError:
            if exists == "error" or isinstance(text, Iterator):
                raise
            log.warning("%s holds an unfinished capture of another text; starting over", folder)
            start_over(folder, request)
            blocks = RowBlocks(lm, text, config, n_tokens=n_tokens)
            writer = _write_shards(folder, lm, blocks, names, batch_tokens, shard_tokens, DTYPES[dtype])
        manifest = {
            "format": FORMAT,
            "origin": origin_of(lm, blocks, text_name).model_dump(),
            "tokenizer_sha256": lm.tokenizer_hash,
            "dtype": dtype,
            **blocks.record(),
            "hooks": {name: writer.statistics(name) for name in names},
            "shards": [shard.facts for shard in writer.shards],
        }
        write_json(folder / SHARDS / MANIFEST, manifest, MAX_LIST_BYTES)
        replace_folder(folder / SHARDS, out, CACHE)
    cache = ActivationCache.open(out)
    log.info("captured %s", cache)
    return cache


def _write_shards(
    folder: Path,
    lm: LanguageModel,
    blocks: RowBlocks,
    hooks: list[str],
    batch_tokens: int,
    shard_tokens: int,
    dtype: torch.dtype,
) -> "_ShardWriter":
    """Write the shards that are not there yet.

    Raises:
        _OtherTextError: those that are there are of another text.
    """
    writer = _ShardWriter(folder / SHARDS, folder / JOURNAL, shard_tokens, dtype)
    if writer.n_done:
        log.info("continuing in %s behind %d tokens", folder, writer.n_done)
    pieces = activations(lm, blocks, hooks, batch_tokens, writer.n_done, writer.read)
    try:
        with progress_bar("capture", blocks.n_expected) as advance, closing(pieces):
            advance(writer.n_done, "")
            for piece in pieces:
                if not writer.n_added:
                    _check_space(folder, piece, blocks.n_expected, writer)
                writer.add(piece)
                advance(len(piece["tokens"]), "")
    except SourceChangedError as error:
        raise _OtherTextError(
            f"{folder} holds an unfinished capture of another text: {error}; give the same text or delete it"
        ) from None
    writer.close()
    return writer


def origin_of(lm: LanguageModel, blocks: RowBlocks, text_name: str | None) -> Origin:
    """What later evaluations need to know of rows that have been read."""
    config = blocks.config
    return Origin(
        model=lm.name,
        revision=lm.revision,
        model_class=type(lm.module).__name__,
        processing=lm.processing,
        n_ctx=blocks.width or blocks.n_ctx,
        prepend_bos=blocks.every_row_begins_with_bos if blocks.are_rows else config.bos != "none",
        text=text_name or source_name(blocks.text, config),
        text_sha256=blocks.record()["text_sha256"] if blocks.n_rows else None,
        excluded_positions=config.exclude_positions,
        excluded_token_ids=config.exclude_token_ids,
    )


def _has_shards(folder: Path) -> bool:
    return (folder / REQUEST).exists() and any((folder / SHARDS).glob("shard-*"))


def _check_space(folder: Path, piece: dict[str, Tensor], n_expected: int | None, writer: "_ShardWriter") -> None:
    """Raise DiskFullError before the work when its result cannot fit."""
    width = sum(x.shape[1] for key, x in piece.items() if key != "tokens")
    a_token = width * writer.dtype.itemsize + 4
    if n_expected is None:
        log.info("the cache takes %.2f GB for a million tokens", a_token / 1000)
        return
    need, free = (n_expected - writer.n_done) * a_token, shutil.disk_usage(folder).free
    log.info("the cache will take %.2f GB; %.2f GB are free", need / 1e9, free / 1e9)
    if need > free:
        raise DiskFullError(
            f"{n_expected:,} tokens take {need / 1e9:.2f} GB more, {folder.parent} has {free / 1e9:.2f} GB free; ask for fewer "
            "tokens or hooks, or another place"
        )


@dataclass(frozen=True)
class _Written:
    """A shard that is whole: its facts for the manifest, the rows read until it was, and Σx and Σ‖x‖² of each hook."""

    facts: dict[str, Any]
    read: RowRecord
    moments: dict[str, Sequence[Any]] = field(default_factory=dict)


class _Line(Checked):
    """The content of a line of the journal."""

    facts: Facts
    read: Annotated[tuple[Count, Count, Sha256, bool], Field(strict=False)]  # a RowRecord
    moments: dict[str, Annotated[list[list[float] | float], Field(min_length=2, max_length=2)]]


class _ShardWriter:
    """Collects pieces of activations and writes a shard whenever there is enough for one.

    A line of the journal is written when its shard is whole on the disk, so that a restart knows where to go on.
    """

    def __init__(self, folder: Path, journal: Path, shard_tokens: int, dtype: torch.dtype):
        self.folder, self.journal, self.shard_tokens, self.dtype = folder, journal, shard_tokens, dtype
        folder.mkdir(exist_ok=True)
        self.shards = self._written_before()
        self.n_done = sum(shard.facts["n_tokens"] for shard in self.shards)
        self.n_added = 0
        self.read = RowHash(self.shards[-1].read if self.shards else None)
        self._pieces: list[dict[str, Tensor]] = []
        self._n = 0

    def _written_before(self) -> list[_Written]:
        """The shards of the journal that are there, up to the first that is not; whatever else is there goes."""
        lines = self.journal.read_text(encoding="utf-8").splitlines(keepends=True) if self.journal.exists() else []
        shards = []
        for line in lines:
            try:
                found = checked(self.journal, parsed_json(line, finite=True), _Line)
                shard = _Written(found.facts.model_dump(), RowRecord(*found.read), found.moments)
                found.facts.check_name(len(shards))
                check_size(self.folder / shard.facts["file"], shard.facts["bytes"])
            except (ValueError, RecursionError, CorruptFileError):  # the line or its shard never became whole
                break
            if shard.facts["n_tokens"] != self.shard_tokens:  # a shorter one was the last of an older text
                break
            shards.append(shard)
        if len(shards) < len(lines):
            write_text(self.journal, "".join(lines[: len(shards)]))
        for path in self.folder.iterdir():
            if path.name not in {shard.facts["file"] for shard in shards}:
                path.unlink()
        return shards

    def add(self, piece: dict[str, Tensor]) -> None:
        """Take in a piece: a tensor [n …] for each key, the same keys each time."""
        n = len(piece["tokens"])
        self._pieces.append({key: x if key == "tokens" else _stored(x, self.dtype, key) for key, x in piece.items()})
        self._n += n
        self.n_added += n
        if self._n >= self.shard_tokens:
            whole = self._joined()
            stop = self._n - self._n % self.shard_tokens
            for start in range(0, stop, self.shard_tokens):
                self._write({key: x[start : start + self.shard_tokens] for key, x in whole.items()})
            self._pieces, self._n = [{key: x[stop:].clone() for key, x in whole.items()}], self._n - stop

    def close(self) -> None:
        """Write what is left."""
        if self._n:
            self._write(self._joined())

    def statistics(self, hook: str) -> dict[str, Any]:
        """Width, mean and root mean square norm of what was written."""
        n = sum(shard.facts["n_tokens"] for shard in self.shards)
        total = torch.zeros(len(self.shards[0].moments[hook][0]), dtype=torch.float64)
        square = 0.0
        for shard in self.shards:
            total += torch.tensor(shard.moments[hook][0], dtype=torch.float64)
            square += shard.moments[hook][1]
        mean = (total / n).float().tolist()
        return {"d_in": len(mean), "rms_norm": (square / n) ** 0.5, "mean": mean}

    def _joined(self) -> dict[str, Tensor]:
        return {key: torch.cat([piece[key] for piece in self._pieces]) for key in self._pieces[0]}

    def _write(self, tensors: dict[str, Tensor]) -> None:
        facts = write_shard(self.folder / shard_name(len(self.shards)), tensors)
        moments = {}
        for hook in tensors.keys() - {"tokens"}:
            sums = Moments(tensors[hook].shape[1])
            sums.add(tensors[hook])
            moments[hook] = (sums.total.tolist(), sums.square)
        self.shards.append(_Written(facts, self.read.record, moments))
        append_line(self.journal, json.dumps(dataclasses.asdict(self.shards[-1])))


def _stored(x: Float[Tensor, "n d_in"], dtype: torch.dtype, hook: str) -> Float[Tensor, "n d_in"]:
    """Activations as they are stored; NonFiniteError when they are not finite, or not any more."""
    stored = x.to(dtype).cpu()
    if not torch.isfinite(stored).all():
        largest = x.abs().max()
        raise NonFiniteError(f"{hook}: NaN, infinity or a number too large for {dtype} (largest {largest:.3g}); store float32")
    return stored
