"""Captures that run a model over a text once, write the activations at its hooks, and resume after an interruption.

In the folder of an unfinished capture (`saelens_lite.resumable`), journal.jsonl has a line for each complete shard, and
shards/ becomes the cache. A resumed capture has the same batches, and writes the same bytes, as an uninterrupted one.
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
    """Raised if the shards of an unfinished capture are of another text."""


def activations(
    lm: LanguageModel,
    blocks: Iterable[TokenRows],
    hooks: Sequence[str],
    batch_tokens: int,
    skip: int = 0,
    read: RowHash | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Yield the activations at the positions that count, and their "tokens", batch by batch. Rows are shuffled in each block.

    Args:
        skip: Leave out this many positions. Batches that lie within them are not run.
        read: Takes in the rows of each batch, before its activations are yielded, also of batches that are not run.
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
    """Write the activations of a text at hooks to a cache folder, which appears when it is complete, and return the cache.

    The model runs once over the text, up to the deepest hook. A thread reads and tokenises the text in advance, one block at
    a time. Special tokens and padding are not stored, nor the positions that `text_config` excludes, by default position 0. To
    resume an interrupted capture, repeat the call: it continues after the last complete shard.

    Args:
        text: Text, or token ids in any form that `LanguageModel.to_tokens` takes.
        n_tokens: Number of activations to capture of each hook; default: all.
        n_ctx, prepend_bos: Shorthands for settings of `text_config`. Rows have at most 1,024 tokens by default.
        text_config: Settings for reading the text and cutting it into rows.
        attention_mask: For token ids: 1 at tokens, 0 at padding.
        dtype: Dtype of the stored activations. They are computed in the model's dtype.
        batch_tokens: Tokens of a forward pass; default: 2,048 on a CPU, 16,384 on a GPU.
        shard_tokens: Activations of each hook in a shard.
        text_name: Name of the text in the cache's origin.

    Raises:
        HookError, TextError, ConfigError: the hook is unknown, there is no text, or settings do not fit the model.
        OutputExistsError: `exists` is "error", and `out` is not empty or holds an unfinished capture with other settings.
        NonFiniteError: activations are NaN or infinite, or too large for `dtype`.
        LockedError: another process is writing the same cache.
        DiskFullError: the cache does not fit on the disk; complete shards stay.
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
        "model_dtype": f"torch.{lm.precision}", "n_tokens": n_tokens, "text_config": config.model_dump(mode="json"),
        "dtype": dtype, "batch_tokens": batch_tokens, "shard_tokens": shard_tokens, "weights": lm.fingerprint(),
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
    """Write the missing shards.

    Raises:
        _OtherTextError: the existing shards are of another text.
    """
    writer = _ShardWriter(folder / SHARDS, folder / JOURNAL, shard_tokens, dtype)
    if writer.n_done:
        log.info("resuming the capture in %s after %d tokens", folder, writer.n_done)
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
    """Return the origin of activations of these rows, which later evaluations need."""
    config = blocks.config
    return Origin(
        model=lm.name,
        revision=lm.revision,
        model_class=type(lm.module).__name__,
        processing=lm.processing,
        precision=None if lm.precision == "float32" else lm.precision,
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
    """Raise DiskFullError before the work begins if the cache cannot fit on the disk."""
    width = sum(x.shape[1] for key, x in piece.items() if key != "tokens")
    a_token = width * writer.dtype.itemsize + 4
    if n_expected is None:
        log.info("the cache takes %.2f GB per million tokens", a_token / 1000)
        return
    need, free = (n_expected - writer.n_done) * a_token, shutil.disk_usage(folder).free
    log.info("the cache will take %.2f GB; %.2f GB are free", need / 1e9, free / 1e9)
    if need > free:
        raise DiskFullError(
            f"{n_expected:,} tokens take {need / 1e9:.2f} GB more; {folder.parent} has {free / 1e9:.2f} GB free; capture "
            "fewer tokens or hooks, or choose another disk"
        )


@dataclass(frozen=True)
class _Written:
    """A complete shard: its manifest entry, the rows read up to its end, and Σx and Σ‖x‖² of each hook."""

    facts: dict[str, Any]
    read: RowRecord
    moments: dict[str, Sequence[Any]] = field(default_factory=dict)


class _Line(Checked):
    """The content of a line of the journal."""

    facts: Facts
    read: Annotated[tuple[Count, Count, Sha256, bool], Field(strict=False)]  # a RowRecord
    moments: dict[str, Annotated[list[list[float] | float], Field(min_length=2, max_length=2)]]


class _ShardWriter:
    """A writer that collects pieces of activations and writes each shard as soon as it is full.

    It adds a line to the journal when a shard is complete on the disk, so that a restart knows where to continue.
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
        """Return the shards in the journal up to the first missing or damaged one, and delete all other files."""
        lines = self.journal.read_text(encoding="utf-8").splitlines(keepends=True) if self.journal.exists() else []
        shards = []
        for line in lines:
            try:
                entry = checked(self.journal, parsed_json(line, finite=True), _Line)
                shard = _Written(entry.facts.model_dump(), RowRecord(*entry.read), entry.moments)
                entry.facts.check_name(len(shards))
                check_size(self.folder / shard.facts["file"], shard.facts["bytes"])
            except (ValueError, RecursionError, CorruptFileError):  # the line or its shard is incomplete
                break
            if shard.facts["n_tokens"] != self.shard_tokens:  # a shorter one ended an older text
                break
            shards.append(shard)
        if len(shards) < len(lines):
            write_text(self.journal, "".join(lines[: len(shards)]))
        for path in self.folder.iterdir():
            if path.name not in {shard.facts["file"] for shard in shards}:
                path.unlink()
        return shards

    def add(self, piece: dict[str, Tensor]) -> None:
        """Add a piece: a tensor [n …] for each key, with the same keys in each call."""
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
        """Write the remaining activations."""
        if self._n:
            self._write(self._joined())

    def statistics(self, hook: str) -> dict[str, Any]:
        """Return the width, mean and root mean square norm of the activations at a hook."""
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
    """Return activations in the stored dtype. Raise NonFiniteError if they are not finite in it."""
    stored = x.to(dtype).cpu()
    if not torch.isfinite(stored).all():
        largest = x.abs().max()
        raise NonFiniteError(
            f"{hook}: NaN, infinity or a number too large for {dtype} (largest {largest:.3g}); if it is finite, store float32"
        )
    return stored
