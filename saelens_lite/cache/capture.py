"""Captures that run a model over a text once, write the activations at its hooks, and resume after an interruption.

The text is cut into sections (`sections`), which the processes of a team capture side by side. In the folder of an unfinished
capture (`saelens_lite.resumable`), journal/ has a file for each section (`journal`), and shards/ becomes the cache. A resumed
capture, and one by several processes, has the same batches and writes the same bytes as one that was left alone.
"""

import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from saelens_lite import processes
from saelens_lite.cache.in_turn import capture_parts, joined
from saelens_lite.cache.journal import Journal, merged
from saelens_lite.cache.sections import JOURNALS, Section, Sections, Start, hash_again, journal_path
from saelens_lite.cache.shards import MANIFEST, SHARDS
from saelens_lite.cache.stored import FORMAT, ActivationCache
from saelens_lite.cache.writing import ShardWriter
from saelens_lite.config import Origin, TextConfig
from saelens_lite.errors import ConfigError, CorruptFileError, DiskFullError, OutputExistsError, SourceChangedError
from saelens_lite.files import MAX_LIST_BYTES, file_hash, write_json
from saelens_lite.kinds import CACHE, UNFINISHED_CAPTURE
from saelens_lite.locks import ENDING, locked
from saelens_lite.model import AnyModel, Loadable, Models, ModelsInTurn, as_model, facts_of, passes
from saelens_lite.model.passes import default_batch_tokens
from saelens_lite.outputs import SHARED_SECONDS, check_shared, followed, refuse_existing, replace_folder
from saelens_lite.prefetch import prefetched
from saelens_lite.processes import ALONE, Team
from saelens_lite.progress import progress_bar
from saelens_lite.resumable import PATIENCE, REQUEST, start_over, unfinished, unfinished_folder
from saelens_lite.tensor_files import DTYPES
from saelens_lite.tokens import RowBlocks, Text, Tokenizer, TokenRows, files_of, source_name, text_config_of, with_mask

JOURNAL_FORMAT = 2
log = logging.getLogger(__name__)


class _OtherTextError(OutputExistsError):
    """Raised if the shards of an unfinished capture are of another text."""


def _activations(
    lm: AnyModel,
    blocks: Iterable[tuple[int, TokenRows]],
    hooks: Sequence[str],
    batch_tokens: int,
    skip: int,
    others: Team,
) -> Iterator[dict[str, Tensor]]:
    """Yield the activations at the positions that count, and their "tokens", batch by batch.

    blocks: by number, which decides the order of their rows.
    skip: leave out this many positions. Batches that lie within them are not run.
    others: the processes that `_assist` and hold the model together with this one.
    """
    for number, rows in blocks:
        for batch in passes.batches(lm, rows, batch_tokens, "shuffled", seed=number):
            tokens = batch.rows.tokens[batch.rows.keep].to(torch.int32)
            n_skipped = min(skip, len(tokens))
            skip -= n_skipped
            if n_skipped < len(tokens):
                others.tell(batch)
                piece = {"tokens": tokens, **passes.read(lm, batch, hooks).acts}
                yield {key: x[n_skipped:] for key, x in piece.items()}


def capture(
    lm: AnyModel | Mapping[str, Loadable],
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
    shard, and reads the text before without tokenising it again.

    Several processes that torchrun started, on one machine or on several that share a file system, write one cache together.
    It has the same bytes as the cache of one process. Each process runs the model over every W-th section of 262,144 tokens;
    a section ends with a shorter shard. After each section a process waits for the others, at most SAELENS_LITE_TIMEOUT
    seconds (1,800 by default), so the slowest one must write a section in that time.

    Several models, as {"base": lm, "chat": lm2}, read the same token ids, those of the first one's tokenizer. Their cache holds
    the activations at ports, such as "base:blocks.3.hook_resid_pre". A hook without a model stands for it in every model.
    If any is given as a name or folder for `load_model`, or as a function that returns the loaded model, one at a time is in
    memory, and the cache has the same bytes. Each is loaded twice: the first time to compare the tokenizers and the hooks. On
    the disk the activations of each model wait until all are complete.

    Args:
        text: Text, or token ids in any form that `LanguageModel.to_tokens` takes.
        n_tokens: Number of activations to capture of each hook; default: all.
        n_ctx, prepend_bos: Shorthands for settings of `text_config`. Rows have at most 1,024 tokens by default.
        text_config: Settings for reading the text and cutting it into rows.
        attention_mask: For token ids: 1 at tokens, 0 at padding.
        dtype: Dtype of the stored activations. They are computed in the model's dtype.
        batch_tokens: Tokens of a forward pass; default: 2,048 on a CPU, 16,384 on a GPU.
        shard_tokens: Largest number of activations of each hook in a shard.
        text_name: Name of the text in the cache's origin.

    Raises:
        HookError, TextError, ConfigError: the hook is unknown, there is no text, or settings do not fit the model.
        OutputExistsError: `exists` is "error", and `out` is not empty or holds an unfinished capture with other settings.
        NonFiniteError: activations are NaN or infinite, or too large for `dtype`.
        LockedError: another job is writing the same cache.
        DiskFullError: the cache does not fit on the disk; complete shards stay.
        ProcessLostError: another process of this job ended or does not answer; complete shards stay.
    """
    if dtype not in ("float16", "bfloat16", "float32"):
        raise ConfigError(f"dtype = {dtype!r}; expected float16, bfloat16 or float32")
    hooks = [hooks] if isinstance(hooks, str) else list(dict.fromkeys(hooks))
    lm = _models(lm, text, hooks, Path(out), exists)
    names = keys_of(lm, hooks)
    batch_tokens = default_batch_tokens(lm) if batch_tokens is None else batch_tokens
    if min(batch_tokens, shard_tokens) < 1:
        raise ConfigError(f"batch_tokens = {batch_tokens}, shard_tokens = {shard_tokens}; expected at least 1")
    config, text = text_config_of(text_config, n_ctx, prepend_bos), with_mask(text, attention_mask)
    blocks = RowBlocks(lm, text, config, n_tokens=n_tokens)
    config = blocks.config
    out, members = followed(Path(out)), processes.team()
    request = {
        **_facts(lm), "weights": lm.fingerprint(), "tokenizer": lm.tokenizer_hash, "hooks": names, "n_tokens": n_tokens,
        "text_config": config.model_dump(mode="json"), "dtype": dtype, "batch_tokens": batch_tokens,
        "shard_tokens": shard_tokens, "journal_format": JOURNAL_FORMAT,
        **({"one_at_a_time": True} if isinstance(lm, ModelsInTurn) else {}),
    }  # fmt: skip
    processes.check_same(request, device=lm.device)
    check_shared(out, members)
    if lm.is_shared and not members.is_first:
        with members.failing_together():
            _assist(lm, names, members)
        return _opened(out, members)
    folder, team = unfinished_folder(out), ALONE if lm.is_shared else members
    with ExitStack() as stack:
        if lm.is_shared:
            stack.enter_context(members.failing_together())
            stack.callback(members.tell, None)  # ends `_assist`
        with team.failing_together():
            if team.is_first:
                with locked(out, CACHE.name, PATIENCE):
                    _refuse_left_workers(folder)
                files = files_of(text)
                stack.enter_context(unfinished(out, CACHE, request, UNFINISHED_CAPTURE, _has_shards, exists, files))
        if isinstance(lm, ModelsInTurn):

            def capture_part(part: Models, keys: list[str], place: Path) -> None:
                capture(
                    part, text, keys, place, n_tokens=n_tokens, text_config=config, dtype=dtype, batch_tokens=batch_tokens,
                    shard_tokens=shard_tokens, text_name=text_name, exists=exists,
                )  # fmt: skip

            any_is_new = capture_parts(lm, names, folder, team, capture_part)
            result = partial(joined, lm, names, folder, None if any_is_new else partial(_text_hash, blocks))
        else:
            others = members if lm.is_shared else ALONE
            job = _Job(team, others, folder, lm, config, names, batch_tokens, shard_tokens, DTYPES[dtype])
            result = partial(job.manifest, job.run_again(text, n_tokens, exists, request), text_name)
        with team.failing_together():
            if team.is_first:
                write_json(folder / SHARDS / MANIFEST, result(), MAX_LIST_BYTES)
                replace_folder(folder / SHARDS, out, CACHE)
    cache = _opened(out, members)
    log.info("captured %s", cache)
    return cache


def _models(
    given: AnyModel | Mapping[str, Loadable], text: Text | TokenRows, hooks: Sequence[str], out: Path, exists: str
) -> AnyModel:
    """Return the model or models to run. Models that must be loaded are in memory one at a time."""
    if not isinstance(given, Mapping) or all(isinstance(lm, Tokenizer) for lm in given.values()):
        return as_model(given)
    refuse_existing(out, exists, CACHE)
    if isinstance(text, Iterator):
        raise ConfigError("each model that is loaded in turn reads the text: give a string, list or file, not an iterator")
    return ModelsInTurn(given, hooks)


def _text_hash(blocks: RowBlocks) -> str:
    """Read the rows of a text, and return their hash."""
    for _ in blocks:
        pass
    return blocks.hash.hexdigest()


def _assist(lm: AnyModel, hooks: list[str], members: Team) -> None:
    """Run the model over the batches of the first process, which needs all processes that hold the model together."""
    while (batch := members.tell(None)) is not None:
        passes.read(lm, batch, hooks)


class _Job(NamedTuple):
    """A capture by a team of processes into the folder of an unfinished capture."""

    team: Team
    others: Team  # those that hold the model together with this process
    folder: Path
    lm: AnyModel
    config: TextConfig
    hooks: list[str]
    batch_tokens: int
    shard_tokens: int
    dtype: torch.dtype

    def run_again(self, text: Text | TokenRows, n_tokens: int | None, exists: str, request: dict[str, Any]) -> Sections:
        """Do the same as `run`, after deleting shards of another text if `exists` is "overwrite"."""
        try:
            return self.run(text, n_tokens)
        except _OtherTextError:
            if exists == "error" or isinstance(text, Iterator):
                raise
            with self.team.failing_together():
                if self.team.is_first:
                    log.warning("%s holds an unfinished capture of another text; starting over", self.folder)
                    start_over(self.folder, request)
            return self.run(text, n_tokens)

    def run(self, text: Text | TokenRows, n_tokens: int | None) -> Sections:
        """Write the missing shards of the sections of this process, and return when those of all processes are complete.

        Raises:
            _OtherTextError: the existing shards are of another text.
        """
        team, folder = self.team, self.folder
        with team.failing_together():
            start = _started(folder) if team.is_first else None
        start = team.tell(start)
        with team.failing_together():
            try:
                blocks = RowBlocks(self.lm, text, self.config, n_tokens=n_tokens, start=start.place)
            except CorruptFileError as error:
                raise CorruptFileError(f"{journal_path(folder, start.n_sections - 1)}: {error}; delete it") from None
        sections = Sections(folder, blocks, self.shard_tokens, start, team.rank, team.world)
        try:
            self._write(sections)
            team.agree({"SHA-256 of the text": blocks.hash.hexdigest(), "sections": sections.n}, "texts")
            with team.failing_together():
                if team.is_first:
                    sections.refuse_surplus()
        except SourceChangedError as error:
            raise _OtherTextError(
                f"{folder} holds an unfinished capture of another text: {error}; give the same text or delete it"
            ) from None
        return sections

    def _write(self, sections: Sections) -> None:
        """Write the sections of this process. After each, it waits until every other process has written one too."""
        start, folder, team = sections.start, self.folder, self.team
        if start.n_done:
            log.info("resuming the capture in %s after %d tokens", folder, start.n_done)
        with ExitStack() as stack:
            with team.failing_together():
                hash_again(sections.blocks, folder, start.marked)
                stack.enter_context(locked(folder / f"worker-{team.rank}", CACHE.name))
                ready = iter(stack.enter_context(prefetched(sections)))
                advance = stack.enter_context(progress_bar("capture", sections.blocks.n_expected))
                writer = stack.enter_context(ShardWriter(folder / SHARDS, self.shard_tokens, self.dtype))
                advance(start.n_done, "")
            are_left = True
            while are_left:
                with team.failing_together():
                    if section := next(ready, None):
                        self._write_section(section, sections, writer, advance)
                are_left = team.any(section is not None)
            with team.failing_together():
                stack.close()

    def _write_section(
        self, section: Section, sections: Sections, writer: ShardWriter, advance: Callable[[int, str], None]
    ) -> None:
        n_expected, n_before = sections.blocks.n_expected, sections.start.n_done
        advance(section.n_others, "")
        writer.begin(section.journal)
        n_done = section.journal.n_done
        for piece in _activations(self.lm, section.blocks, self.hooks, self.batch_tokens, n_done, self.others):
            if not writer.n_added:
                _check_space(self.folder, piece, n_expected, n_before, self.dtype)
            writer.add(piece)
            advance(len(piece["tokens"]), "")

    def manifest(self, sections: Sections, text_name: str | None) -> dict[str, Any]:
        """Return the manifest of the cache."""
        shards, of_hooks = self.merge(sections)
        return {
            "format": FORMAT,
            "origin": origin_of(self.lm, sections.blocks, text_name).model_dump(),
            "tokenizer_sha256": self.lm.tokenizer_hash,
            "dtype": str(self.dtype).removeprefix("torch."),
            **sections.blocks.record(),
            "hooks": of_hooks,
            "shards": shards,
        }

    def merge(self, sections: Sections) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Return the manifest entries of all shards and hooks. Raise CorruptFileError if a shard is missing."""
        folder = self.folder

        def journals() -> Iterator[Journal]:
            for number in range(sections.n):
                path = journal_path(folder, number)
                journal = Journal.read(path, folder / SHARDS)
                if journal is None or not journal.is_complete:
                    raise CorruptFileError(f"{path} or one of its shards has been removed or damaged; repeat the call")
                yield journal

        shards, of_hooks = merged(journals(), self.hooks)
        wanted = {shard["file"] for shard in shards}
        for path in (folder / SHARDS).iterdir():
            if path.name not in wanted:
                path.unlink()
        return shards, of_hooks


def _started(folder: Path) -> Start:
    """Prepare the folder of an unfinished capture for its processes, and return its state."""
    for name in (SHARDS, JOURNALS):
        (folder / name).mkdir(exist_ok=True)
        for path in (folder / name).glob(".*"):  # left by killed processes
            path.unlink()
    return Start.of(folder)


def _refuse_left_workers(folder: Path) -> None:
    """Raise LockedError if a process of an earlier job, whose first process has ended, still writes shards."""
    if folder.is_dir():
        for lock in folder.glob(f".worker-*{ENDING}"):
            with locked(folder / lock.name[1 : -len(ENDING)], CACHE.name):
                pass


def _opened(out: Path, team: Team) -> ActivationCache:
    """Open the new cache, once this machine sees it."""
    wanted = team.tell(file_hash(out / MANIFEST) if team.is_first else None)
    deadline = time.monotonic() + SHARED_SECONDS
    while not team.is_first and time.monotonic() < deadline:
        with suppress(CorruptFileError):
            if file_hash(out / MANIFEST) == wanted:
                break
        time.sleep(0.1)
    return ActivationCache.open(out)


def keys_of(lm: AnyModel, hooks: Sequence[str] | str) -> list[str]:
    """Return the hooks to read, each once; of several models, the keys of their ports. Raise HookError if a model lacks one."""
    names = [hooks] if isinstance(hooks, str) else list(dict.fromkeys(hooks))
    if isinstance(lm, Models):
        return lm.keys_of(names)
    for name in names:
        lm.hook_point(name)
    return names


def _facts(lm: AnyModel) -> dict[str, Any]:
    """Return what a resumed capture must have in common with the first, as to the models."""
    if isinstance(lm, Models):
        return {"models": [facts.model_dump() for facts in lm.facts]}
    return {
        "model": lm.name, "revision": lm.revision, "processing": lm.processing, "model_dtype": f"torch.{lm.precision}",
    }  # fmt: skip


def origin_of(lm: AnyModel, blocks: RowBlocks, text_name: str | None) -> Origin:
    """Return the origin of activations of these rows, which later evaluations need."""
    config = blocks.config
    if isinstance(lm, Models):
        about_models: dict[str, Any] = {"models": lm.facts}
    else:
        about_models = facts_of(lm).model_dump(exclude={"name"})
    return Origin(
        **about_models,
        n_ctx=blocks.width or blocks.n_ctx,
        prepend_bos=blocks.every_row_begins_with_bos if blocks.are_rows else config.bos != "none",
        text=text_name or source_name(blocks.text, config),
        text_sha256=blocks.record()["text_sha256"] if blocks.n_rows else None,
        excluded_positions=config.exclude_positions,
        excluded_token_ids=config.exclude_token_ids,
        excluded_template=config.exclude_template,
    )


def _has_shards(folder: Path) -> bool:
    return (folder / REQUEST).exists() and any(folder.rglob("shard-*"))


def _check_space(folder: Path, piece: dict[str, Tensor], n_expected: int | None, n_done: int, dtype: torch.dtype) -> None:
    """Raise DiskFullError before the work begins if the cache cannot fit on the disk."""
    width = sum(x.shape[1] for key, x in piece.items() if key != "tokens")
    a_token = width * dtype.itemsize + 4
    if n_expected is None:
        log.info("the cache takes %.2f GB per million tokens", a_token / 1000)
        return
    need, free = (n_expected - n_done) * a_token, shutil.disk_usage(folder).free
    log.info("the cache will take %.2f GB; %.2f GB are free", need / 1e9, free / 1e9)
    if need > free:
        raise DiskFullError(
            f"{n_expected:,} tokens take {need / 1e9:.2f} GB more; {folder.parent} has {free / 1e9:.2f} GB free; capture "
            "fewer tokens or hooks, or choose another disk"
        )
