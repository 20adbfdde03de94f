"""Captures that run a model over a text once, write the activations at its hooks, and resume after an interruption.

In the folder of an unfinished capture (`saelens_lite.resumable`), journal.jsonl has a line for each complete shard, and
shards/ becomes the cache. A resumed capture has the same batches, and writes the same bytes, as an uninterrupted one.
"""

import logging
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from saelens_lite.cache.stored import FORMAT, MANIFEST, ActivationCache
from saelens_lite.cache.writing import ShardWriter
from saelens_lite.config import Origin, TextConfig
from saelens_lite.errors import ConfigError, DiskFullError, OutputExistsError, SourceChangedError
from saelens_lite.files import MAX_LIST_BYTES, write_json
from saelens_lite.kinds import CACHE, UNFINISHED_CAPTURE
from saelens_lite.model import LanguageModel, passes
from saelens_lite.model.passes import default_batch_tokens
from saelens_lite.outputs import followed, replace_folder
from saelens_lite.prefetch import prefetched
from saelens_lite.progress import progress_bar
from saelens_lite.resumable import REQUEST, start_over, unfinished
from saelens_lite.tensor_files import DTYPES
from saelens_lite.tokens import RowBlocks, RowHash, Text, TokenRows, files_of, source_name, text_config_of, with_mask

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
    a time; others write complete shards. Special tokens and padding are not stored, nor the positions that `text_config`
    excludes, by default position 0. To resume an interrupted capture, repeat the call: it continues after the last complete
    shard.

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
) -> ShardWriter:
    """Write the missing shards.

    Raises:
        _OtherTextError: the existing shards are of another text.
    """
    try:
        with ShardWriter(folder / SHARDS, folder / JOURNAL, shard_tokens, dtype) as writer:
            if writer.n_done:
                log.info("resuming the capture in %s after %d tokens", folder, writer.n_done)
            pieces = activations(lm, blocks, hooks, batch_tokens, writer.n_done, writer.read)
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


def _check_space(folder: Path, piece: dict[str, Tensor], n_expected: int | None, writer: ShardWriter) -> None:
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
