"""Activations on disk: a folder with manifest.json and shards, read back in shuffled order with bounded memory."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from saelens_lite.cache.order import shuffled_batches
from saelens_lite.cache.shards import CHUNK, Shard, sha256
from saelens_lite.cache.source import Batch, Statistics, TensorSource
from saelens_lite.config import Origin
from saelens_lite.errors import ConfigError, CorruptFileError, HookError, near_matches
from saelens_lite.files import read_json

FORMAT = 2
MANIFEST = "manifest.json"


class ActivationCache:
    """A folder of captured activations.

    Batches are drawn from pools of about POOL_TOKENS activations from all over the cache; one pool is in memory and the next
    is being read.
    """

    POOL_TOKENS = 131_072

    def __init__(self, path: Path, manifest: dict, n_held_out: int = 0):
        self.path, self.manifest = path, manifest
        self._n_held_out = n_held_out  # chunks at the end that are not trained on
        self._shards = [
            Shard(path / Path(entry["file"]).name, entry["bytes"], self._shapes(entry["n_tokens"]))
            for entry in manifest["shards"]
        ]
        self._chunks = [(number, chunk) for number, shard in enumerate(self._shards) for chunk in range(shard.n_chunks)]

    def _shapes(self, n_tokens: int) -> dict[str, tuple[int, ...]]:
        return {"tokens": (n_tokens,), **{hook: (n_tokens, entry["d_in"]) for hook, entry in self.manifest["hooks"].items()}}

    @classmethod
    def open(cls, path: str | Path) -> "ActivationCache":
        """The cache in a folder.

        Raises:
            CorruptFileError: the manifest is missing or damaged, or a shard is missing or has another size than it says.
        """
        path = Path(path)
        manifest = read_json(path / MANIFEST)
        if manifest.get("format") != FORMAT:
            raise CorruptFileError(f"{path / MANIFEST}: format {manifest.get('format')!r}, this version reads {FORMAT}")
        try:
            self = cls(path, manifest)
            for shard in self._shards:
                shard.check_size()
            if not self.n_tokens or not self.hooks:
                raise CorruptFileError(f"{path / MANIFEST}: no shards or no hooks; there are no activations to read")
            _ = [self.statistics(h) for h in self.hooks], [self.origin(h) for h in self.hooks]
        except (KeyError, TypeError, ValueError, ConfigError) as error:
            raise CorruptFileError(f"{path / MANIFEST} is damaged: {type(error).__name__}: {error}") from None
        return self

    @property
    def hooks(self) -> Sequence[str]:
        """Hook names."""
        return tuple(self.manifest["hooks"])

    @property
    def n_tokens(self) -> int:
        """Number of activations of each hook."""
        return sum(self._length(chunk) for chunk in self._training_chunks())

    def d_in(self, hook: str) -> int:
        """Width of the activations at a hook; HookError when it was not captured."""
        return self._hook(hook)["d_in"]

    def statistics(self, hook: str) -> Statistics:
        """Mean and root mean square norm of the activations at a hook."""
        entry = self._hook(hook)
        return Statistics(torch.tensor(entry["mean"], dtype=torch.float32), float(entry["rms_norm"]))

    def origin(self, hook: str) -> Origin:
        """Model, hook and text the activations come from."""
        self._hook(hook)
        return Origin(**{**self.manifest["origin"], "hook": hook})

    def _hook(self, hook: str) -> dict:
        if hook not in self.manifest["hooks"]:
            known = list(self.manifest["hooks"])
            raise HookError(
                f"{self.path} has no activations of {hook!r}{near_matches(hook, known) or '; it has ' + ', '.join(known)}"
            )
        return self.manifest["hooks"][hook]

    def _training_chunks(self) -> list[tuple[int, int]]:
        return self._chunks[: len(self._chunks) - self._n_held_out]

    def _length(self, chunk: tuple[int, int]) -> int:
        shard, number = chunk
        return min(CHUNK, self._shards[shard].shapes["tokens"][0] - number * CHUNK)

    def _read(self, chunks: Sequence[tuple[int, int]], keys: Sequence[str]) -> dict[str, Tensor]:
        """The rows of some chunks, one after the other."""
        return {key: self._read_one(chunks, key) for key in keys}

    def _read_one(self, chunks: Sequence[tuple[int, int]], key: str) -> Tensor:
        sizes = [self._shards[shard].n_bytes_of(key, number) for shard, number in chunks]
        content = np.empty(sum(sizes), np.uint8)
        stop = 0
        for (shard, number), size in zip(chunks, sizes, strict=True):
            start, stop = stop, stop + size
            self._shards[shard].read(key, number, content[start:stop])
        shard = self._shards[chunks[0][0]]
        return torch.from_numpy(content).view(shard.dtype(key)).reshape(-1, *shard.shapes[key][1:])

    def read_shard(self, number: int) -> dict[str, Tensor]:
        """The tensors of one shard: a hook each, and "tokens".

        Raises:
            CorruptFileError: truncated, damaged, or other contents than the manifest says.
        """
        chunks = [(number, chunk) for chunk in range(self._shards[number].n_chunks)]
        return self._read(chunks, ["tokens", *self.hooks])

    def verify(self) -> None:
        """Raise CorruptFileError unless every shard is what was written, to the byte."""
        for entry, shard in zip(self.manifest["shards"], self._shards, strict=True):
            shard.check_size()
            if sha256(shard.path) != entry["sha256"]:
                raise CorruptFileError(f"{shard.path} does not match the checksum in {MANIFEST}; capture again")

    def batches(self, hooks: Sequence[str], batch_size: int, seed: int, start: int = 0) -> Iterator[Batch]:
        """Shuffled batches, epoch after epoch without end, from number `start` on; the same seed gives the same batches.

        Raises:
            HookError: a hook that was not captured.
            CorruptFileError: while iterating: activations that do not match their checksum.
        """
        for hook in hooks:
            self._hook(hook)
        chunks = self._training_chunks()
        lengths = [self._length(chunk) for chunk in chunks]

        def load(numbers: list[int]) -> dict[str, Tensor]:
            return self._read([chunks[i] for i in numbers], hooks)

        return shuffled_batches(lengths, self.POOL_TOKENS, load, batch_size, seed, start)

    def hold_out(self, n_tokens: int) -> tuple[TensorSource, "ActivationCache"]:
        """At least n_tokens activations from the end of the text, and the cache without them."""
        from_end = torch.tensor([self._length(chunk) for chunk in reversed(self._chunks)]).cumsum(0)
        n_chunks = int((from_end < n_tokens).sum()) + 1
        if n_tokens < 1 or n_chunks >= len(self._chunks):
            raise ConfigError(
                f"{n_tokens:,} activations to validate on; {self.path} has {self.n_tokens:,}, and some must be left"
            )
        held = self._read(self._chunks[-n_chunks:], self.hooks)
        rest = type(self)(self.path, self.manifest, n_chunks)
        return TensorSource({hook: x.float() for hook, x in held.items()}, origin=Origin(**self.manifest["origin"])), rest

    def describe(self) -> dict:
        """How to open the cache again."""
        return {"cache": str(self.path.resolve()), "manifest_sha256": sha256(self.path / MANIFEST)}

    def __repr__(self) -> str:
        hooks = ", ".join(f"{hook} [{self.d_in(hook)}]" for hook in self.hooks)
        return f"ActivationCache({str(self.path)!r}, {self.n_tokens:,} tokens, {hooks}, {self.manifest['dtype']})"
