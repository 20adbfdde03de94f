"""Activations on disk: a folder with manifest.json and shards, read in shuffled order with bounded memory."""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from jaxtyping import Int
from pydantic import Field, model_validator
from torch import Tensor

from saelens_lite.cache.order import MAX_UPLOAD, part_of, shuffled_batches
from saelens_lite.cache.resumed import refuse_others
from saelens_lite.cache.shards import CHUNK, MANIFEST, Facts, Shard, check_size, checksums_hash, read_chunks
from saelens_lite.cache.source import Batch, Statistics, TensorSource
from saelens_lite.config import Origin
from saelens_lite.errors import ConfigError, CorruptFileError, HookError, SourceChangedError, near_matches
from saelens_lite.files import MAX_LIST_BYTES, file_hash, read_json
from saelens_lite.locks import locked
from saelens_lite.outputs import restore
from saelens_lite.ports import split_key
from saelens_lite.resumable import unfinished_folder
from saelens_lite.schemas import Checked, Count, Number, Positive, Sha256, String, checked
from saelens_lite.tensor_files import DTYPES

FORMAT = 2
READERS = 8  # threads that read for a GPU
MAX_TOKENS = 2**33  # per cache: the list of its chunks then takes a gigabyte


class _Hook(Checked):
    """The entry of a hook in a manifest."""

    d_in: Positive
    rms_norm: Annotated[Number, Field(ge=0)]
    mean: list[Number]


class Manifest(Checked):
    """The content of manifest.json."""

    format: Literal[2]
    origin: Origin
    tokenizer_sha256: String | None
    dtype: Literal["float16", "bfloat16", "float32"]
    text_sha256: Sha256
    n_rows: Count
    text_config: dict[str, Any] | None = None
    balance: dict[str, Any] | None = None
    hooks: Annotated[dict[String, _Hook], Field(min_length=1, max_length=10_000)]
    shards: Annotated[list[Facts], Field(min_length=1)]

    @model_validator(mode="after")
    def _agrees(self) -> "Manifest":
        models = {facts.name for facts in self.origin.models}
        for name, hook in self.hooks.items():
            model, minus, _ = split_key(name)
            if models and (model not in models or minus not in (*models, None)):
                raise ValueError(f"{name!r} names no model, or another than {', '.join(sorted(models))}")
            if name in ("tokens", "checksums"):
                raise ValueError(f"{name!r} cannot be the name of a hook")
            if len(hook.mean) != hook.d_in:
                raise ValueError(f"the mean of {name!r} has {len(hook.mean)} entries, expected d_in = {hook.d_in}")
        if (n_tokens := sum(shard.n_tokens for shard in self.shards)) > MAX_TOKENS:
            raise ValueError(f"{n_tokens:,} tokens; a cache has at most {MAX_TOKENS:,}")
        return self


class _Description(Checked):
    """The description of a cache in a checkpoint."""

    cache: String
    manifest_sha256: Sha256
    held_out_chunks: Count


def _refuse_unfinished(path: Path) -> None:
    """Raise an error that says so if there is no cache yet, but an unfinished one."""
    if os.path.lexists(path) or not path.name or not unfinished_folder(path).is_dir():
        return
    with suppress(OSError), locked(path, "cache"):  # in a folder that is only readable, nothing shows whether a job is at work
        pass
    raise CorruptFileError(f"{path} is not complete: its capture was interrupted; repeat the call, which then resumes")


class ActivationCache:
    """A folder of captured activations.

    Batches are drawn from pools of about POOL_TOKENS activations from the whole cache. One pool is in memory while a thread
    reads the next.
    """

    POOL_TOKENS = 131_072

    def __init__(self, path: Path, manifest: dict, n_held_out: int = 0):
        self.path, self.manifest = path, manifest
        widths = {hook: entry["d_in"] for hook, entry in manifest["hooks"].items()}
        self._shards = [
            Shard(path / entry["file"], entry["bytes"], entry["n_tokens"], widths, DTYPES[manifest["dtype"]])
            for entry in manifest["shards"]
        ]
        places = [np.stack([np.full(shard.n_chunks, i), np.arange(shard.n_chunks)], 1) for i, shard in enumerate(self._shards)]
        self._chunks: Int[np.ndarray, "n_chunks 2"] = np.concatenate(places or [np.empty((0, 2), int)])  # (shard, chunk in it)
        self._n_held_out = n_held_out  # chunks at the end, not for training

    @classmethod
    def open(cls, path: str | Path) -> "ActivationCache":
        """Open the cache in a folder.

        Raises:
            CorruptFileError: the manifest is missing or damaged, or a shard is missing or has another size than the manifest
                says; or the capture is not complete.
            LockedError: the cache is being written.
        """
        path = Path(path)
        restore(path)
        _refuse_unfinished(path)
        manifest = read_json(path / MANIFEST, MAX_LIST_BYTES, finite=True)
        for number, shard in enumerate(checked(path / MANIFEST, manifest, Manifest).shards):
            shard.check_name(number)
            check_size(path / shard.file, shard.bytes)
        return cls(path, manifest)

    @property
    def hooks(self) -> Sequence[str]:
        """Names of the captured hooks."""
        return tuple(self.manifest["hooks"])

    @property
    def n_tokens(self) -> int:
        """Number of activations of each hook."""
        return int(self._lengths.sum())

    def d_in(self, hook: str) -> int:
        """Return the width of the activations at a hook. Raise HookError if the hook was not captured."""
        return self._hook(hook)["d_in"]

    def statistics(self, hook: str) -> Statistics:
        """Return the mean and root mean square norm of the activations at a hook."""
        entry = self._hook(hook)
        return Statistics(torch.tensor(entry["mean"], dtype=torch.float32), float(entry["rms_norm"]))

    def origin(self, hook: str) -> Origin:
        """Return the model and text that the activations come from."""
        self._hook(hook)
        return Origin(**self.manifest["origin"])

    def _hook(self, hook: str) -> dict:
        if hook not in self.manifest["hooks"]:
            known = list(self.manifest["hooks"])
            raise HookError(
                f"{self.path} has no activations of {hook!r}{near_matches(hook, known) or '; it has ' + ', '.join(known)}"
            )
        return self.manifest["hooks"][hook]

    @property
    def _training_chunks(self) -> Int[np.ndarray, "n_chunks 2"]:
        return self._chunks[: len(self._chunks) - self._n_held_out]

    @property
    def _lengths(self) -> Int[np.ndarray, " n_chunks"]:
        """Number of rows of each training chunk."""
        shard, number = self._training_chunks.T
        n_tokens = np.array([shard.n_tokens for shard in self._shards], np.int64)
        return np.minimum(CHUNK, n_tokens[shard] - number * CHUNK)

    def _read(self, chunks: Int[np.ndarray, "n_chunks 2"], keys: Sequence[str], **how: Any) -> dict[str, Tensor]:
        """Return the rows of some chunks, in order; see `read_chunks`."""
        return {key: read_chunks(self._shards, chunks.tolist(), key, **how) for key in keys}

    def read_shard(self, number: int) -> dict[str, Tensor]:
        """Return the tensors of one shard: one for each hook, and "tokens".

        Raises:
            CorruptFileError: the shard is truncated or damaged, or its contents do not match the manifest.
        """
        return self._read(self._chunks[self._chunks[:, 0] == number], ["tokens", *self.hooks])

    def verify(self) -> None:
        """Raise CorruptFileError unless every byte of every shard is as it was written."""
        for entry, shard in zip(self.manifest["shards"], self._shards, strict=True):
            check_size(shard.path, shard.n_bytes)
            shard.check_header()
            if file_hash(shard.path) != entry["sha256"]:
                raise CorruptFileError(f"{shard.path} does not match the checksum in {MANIFEST}; capture again")

    def batches(
        self,
        hooks: Sequence[str],
        batch_size: int,
        seed: int,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
        device: str | torch.device | None = None,
    ) -> Iterator[Batch]:
        """Return shuffled batches, epoch after epoch without end, from number `start` on; see `Source.batches`.

        Args:
            device: Where the batches are gathered, from pools that are uploaded in advance; default: the CPU. Pools of more
                than MAX_UPLOAD bytes stay on the CPU.

        Raises:
            HookError: a hook was not captured.
            ConfigError: the batch cannot be divided equally among the processes.
            CorruptFileError: during iteration: activations do not match their checksum.
        """
        for hook in hooks:
            self._hook(hook)
        chunks, part = self._training_chunks, part_of(batch_size, rank, world)
        row_bytes = DTYPES[self.manifest["dtype"]].itemsize * sum(map(self.d_in, hooks))
        place = None if device is None or self.POOL_TOKENS * row_bytes > MAX_UPLOAD else torch.device(device)
        how = {"readers": READERS, "pinned": True} if place is not None and place.type == "cuda" else {}

        def load(numbers: list[int]) -> dict[str, Tensor]:
            return self._read(chunks[numbers], hooks, **how)

        return shuffled_batches(self._lengths, self.POOL_TOKENS, load, batch_size, seed, start, part, place)

    def hold_out(self, n_tokens: int) -> tuple[TensorSource, "ActivationCache"]:
        """Return the last chunks, with at least n_tokens activations, and the cache without them.

        Raises:
            ConfigError: no chunk would be left to train on.
        """
        n_chunks = int((self._lengths[::-1].cumsum() < n_tokens).sum()) + 1
        if n_tokens < 1 or n_chunks >= len(self._training_chunks):
            raise ConfigError(
                f"{n_tokens:,} activations to validate on: {self.path} has {self.n_tokens:,}, and some must be left to train on"
            )
        held = self._read(self._training_chunks[-n_chunks:], self.hooks)
        rest = type(self)(self.path, self.manifest, self._n_held_out + n_chunks)
        return TensorSource({hook: x.float() for hook, x in held.items()}, origin=Origin(**self.manifest["origin"])), rest

    def describe(self) -> dict[str, Any]:
        """Return a description that `reopen` takes."""
        return {
            "cache": str(self.path.resolve()),
            "manifest_sha256": file_hash(self.path / MANIFEST),
            "held_out_chunks": self._n_held_out,
        }

    def record(self) -> dict[str, Any]:
        """Return the hashes of the manifest and of the checksums in the shards, for a resumed run.

        Reading alone does not notice a shard in which both the activations and their checksums have changed.
        """
        return {
            "kind": "a cache",
            "manifest_sha256": file_hash(self.path / MANIFEST),
            "held_out_chunks": self._n_held_out,
            "checksums_sha256": checksums_hash(self._shards),
        }

    def expect(self, record: dict[str, Any]) -> None:
        """Raise SourceChangedError unless the cache matches a record. Its folder may have moved."""
        refuse_others(record, self.record(), f"{self.path} is not the cache")

    @classmethod
    def reopen(cls, description: dict[str, Any]) -> "ActivationCache":
        """Return the cache of a description; see `describe`.

        Raises:
            CorruptFileError: the cache is missing or damaged.
            SourceChangedError: the folder holds another cache now.
        """
        wanted = checked("the activations of the run", description, _Description)
        whole = cls.open(wanted.cache)
        cache = cls(whole.path, whole.manifest, min(wanted.held_out_chunks, len(whole._chunks)))
        if cache.describe() != description:
            raise SourceChangedError(f"{cache.path} is not the cache the run was trained on: its manifest has changed")
        return cache

    def __repr__(self) -> str:
        hooks = ", ".join(f"{hook} [{self.d_in(hook)}]" for hook in self.hooks)
        return f"ActivationCache({str(self.path)!r}, {self.n_tokens:,} tokens, {hooks}, {self.manifest['dtype']})"
