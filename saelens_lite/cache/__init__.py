"""Activations as training data: captured once into a folder, read back as shuffled batches.

A cache folder holds manifest.json and shard-00000.safetensors …; each shard has one tensor [n d_in] a hook, and the
token ids [n] the activations belong to. The folder appears when it is complete.
"""

import hashlib
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from saelens_lite.config import Origin
from saelens_lite.errors import ConfigError, CorruptFileError, HookError, NonFiniteError, ShapeError, TextError, near_matches
from saelens_lite.files import DTYPES, new_folder, read_json, read_tensors, write_json
from saelens_lite.model import LanguageModel
from saelens_lite.progress import progress_bar
from saelens_lite.tokens import Text, TokenRows, text_hash, token_rows

FORMAT = 1
MANIFEST = "manifest.json"
log = logging.getLogger(__name__)


class Statistics(NamedTuple):
    """Mean activation and root mean square norm, over all activations of a hook."""

    mean: Float[Tensor, " d_in"]
    rms_norm: float


@runtime_checkable
class Source(Protocol):
    """Where training gets its activations."""

    @property
    def hooks(self) -> Sequence[str]: ...

    @property
    def n_tokens(self) -> int: ...

    def d_in(self, hook: str) -> int: ...

    def statistics(self, hook: str) -> Statistics: ...

    def origin(self, hook: str) -> Origin: ...

    def batches(self, hooks: Sequence[str], batch_size: int, seed: int) -> Iterator[dict[str, Float[Tensor, "batch d_in"]]]:
        """Shuffled batches, epoch after epoch without end."""
        ...


class _Moments:
    """Running Σx and Σ‖x‖² in float64."""

    def __init__(self, d_in: int):
        self.n, self.total, self.square = 0, torch.zeros(d_in, dtype=torch.float64), 0.0

    def add(self, x: Float[Tensor, "n d_in"]) -> None:
        x = x.double()
        self.n += len(x)
        self.total += x.sum(0).cpu()
        self.square += float(x.square().sum())

    def statistics(self) -> Statistics:
        return Statistics((self.total / self.n).float(), (self.square / self.n) ** 0.5)


class TensorSource:
    """Activations already in memory: x [n d_in]."""

    def __init__(self, x: Float[Tensor, "n d_in"], hook: str = "x", origin: Origin | None = None):
        if x.ndim != 2 or not len(x):
            raise ShapeError(f"x has shape {tuple(x.shape)}; expected [n d_in] with at least one row")
        if not x.is_floating_point():
            raise ShapeError(f"x holds {x.dtype}; expected floating-point numbers")
        self.x = x.detach()
        self.hooks: Sequence[str] = (hook,)
        self.n_tokens = len(x)
        self._origin = origin or Origin(excluded_positions=())

    def d_in(self, hook: str) -> int:
        """Width of the activations."""
        return self.x.shape[1]

    def statistics(self, hook: str) -> Statistics:
        """Mean and root mean square norm."""
        moments = _Moments(self.x.shape[1])
        for piece in self.x.split(65_536):
            moments.add(piece)
        return moments.statistics()

    def origin(self, hook: str) -> Origin:
        """Where they come from, as far as the caller said."""
        return self._origin

    def batches(self, hooks: Sequence[str], batch_size: int, seed: int) -> Iterator[dict[str, Float[Tensor, "batch d_in"]]]:
        """Shuffled batches, epoch after epoch without end."""
        return _batches([lambda: dict.fromkeys(hooks, self.x)], 1, batch_size, seed)


class ActivationCache:
    """A folder of captured activations."""

    SHARDS_MIXED = 8  # shards held in memory together, within which rows are shuffled

    def __init__(self, path: Path, manifest: dict):
        self.path, self.manifest = path, manifest
        self._checked: set[str] = set()

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
        self = cls(path, manifest)
        try:
            for shard in manifest["shards"]:
                file = path / Path(shard["file"]).name
                size = file.stat().st_size if file.is_file() else None
                if size != shard["bytes"]:
                    raise CorruptFileError(f"{file}: expected {shard['bytes']:,} bytes, found {size}; capture again")
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
        return sum(shard["n_tokens"] for shard in self.manifest["shards"])

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

    def read_shard(self, number: int) -> dict[str, Tensor]:
        """The tensors of one shard: a hook each, and "tokens"; its checksum is verified the first time.

        Raises:
            CorruptFileError: truncated, damaged, or other contents than the manifest says.
        """
        shard = self.manifest["shards"][number]
        file = self.path / Path(shard["file"]).name
        if shard["file"] not in self._checked:
            if not file.is_file() or _sha256(file) != shard["sha256"]:
                raise CorruptFileError(
                    f"{file} is missing or its contents do not match the checksum in {MANIFEST}; capture again"
                )
            self._checked.add(shard["file"])
        tensors = read_tensors(file)
        expected = {"tokens": (shard["n_tokens"],), **{h: (shard["n_tokens"], self.d_in(h)) for h in self.hooks}}
        found = {name: tuple(x.shape) for name, x in tensors.items()}
        if found != expected:
            raise CorruptFileError(f"{file} holds {found}; {MANIFEST} says {expected}")
        return tensors

    def batches(self, hooks: Sequence[str], batch_size: int, seed: int) -> Iterator[dict[str, Float[Tensor, "batch d_in"]]]:
        """Shuffled batches, epoch after epoch without end; the same seed gives the same batches.

        Each epoch draws a new order of the shards; SHARDS_MIXED of them at a time are held in memory and their rows
        shuffled together.
        """
        for hook in hooks:
            self._hook(hook)

        def reader(number: int):
            return lambda: {hook: self.read_shard(number)[hook] for hook in hooks}

        shards = [reader(i) for i in range(len(self.manifest["shards"]))]
        return _batches(shards, self.SHARDS_MIXED, batch_size, seed)

    def __repr__(self) -> str:
        hooks = ", ".join(f"{hook} [{self.d_in(hook)}]" for hook in self.hooks)
        return f"ActivationCache({str(self.path)!r}, {self.n_tokens:,} tokens, {hooks}, {self.manifest['dtype']})"


def _batches(
    shards: Sequence[Callable[[], dict[str, Tensor]]], mixed: int, batch_size: int, seed: int
) -> Iterator[dict[str, Float[Tensor, "batch d_in"]]]:
    """Batches of exactly `batch_size` rows: shards in random order, `mixed` of them shuffled together; a remainder goes
    to the front of the next group, across epochs too."""
    left: dict[str, Tensor] = {}
    for epoch in itertools.count():
        generator = torch.Generator().manual_seed(_mixed(seed, epoch))
        order = torch.randperm(len(shards), generator=generator).tolist()
        for start in range(0, len(order), mixed):
            group = [shards[i]() for i in order[start : start + mixed]]
            n = sum(len(next(iter(shard.values()))) for shard in group)
            permutation = torch.randperm(n, generator=generator)
            pool = {hook: torch.cat([shard[hook] for shard in group]) for hook in group[0]}
            n_left = len(next(iter(left.values()))) if left else 0
            fetched = 0
            while n_left + n - fetched >= batch_size:
                rows = permutation[fetched : fetched + batch_size - n_left]
                batch = {hook: x[rows] for hook, x in pool.items()}
                yield {hook: torch.cat([left[hook], x]) for hook, x in batch.items()} if n_left else batch
                fetched, left, n_left = fetched + len(rows), {}, 0
            rest = {hook: x[permutation[fetched:]] for hook, x in pool.items()}
            left = {hook: torch.cat([left[hook], x]) for hook, x in rest.items()} if left else rest


def capture(
    lm: LanguageModel,
    text: Text | TokenRows,
    hooks: Sequence[str] | str,
    out: str | Path,
    *,
    n_tokens: int | None = None,
    n_ctx: int | None = None,
    prepend_bos: bool = True,
    dtype: Literal["float16", "bfloat16", "float32"] = "float16",
    batch_tokens: int = 8192,
    shard_tokens: int = 65_536,
    text_name: str | None = None,
    exists: Literal["error", "overwrite"] = "error",
) -> ActivationCache:
    """Activations of a text at hooks, written to a cache folder, which appears when it is complete.

    The model runs once over the text, up to the deepest hook, `batch_tokens` tokens at a time. BOS and padding are not
    stored, nor position 0. Activations are stored as `dtype` and computed in the model's.

    Raises:
        HookError, TextError, ConfigError: an unknown hook, no text, settings that do not fit the model.
        OutputExistsError: `out` holds something and `exists` is "error".
        NonFiniteError: the model produced NaN or infinity, or numbers too large for `dtype`.
    """
    names = [hooks] if isinstance(hooks, str) else list(dict.fromkeys(hooks))
    for name in names:
        lm.hook_point(name)
    if dtype not in ("float16", "bfloat16", "float32"):
        raise ConfigError(f"dtype = {dtype!r}; expected float16, bfloat16 or float32")
    if min(batch_tokens, shard_tokens) < 1:
        raise ConfigError(f"batch_tokens = {batch_tokens}, shard_tokens = {shard_tokens}; expected at least 1")
    if isinstance(text, TokenRows):
        rows = text
    else:
        rows = token_rows(lm, text, n_ctx=n_ctx, n_tokens=n_tokens, prepend_bos=prepend_bos)
    if not rows.n_kept:
        raise TextError("none of the positions of the token rows counts; there is nothing to capture")
    origin = Origin(
        model=lm.name,
        revision=lm.revision,
        model_class=type(lm.module).__name__,
        processing=lm.processing,
        n_ctx=rows.tokens.shape[1],
        prepend_bos=lm.bos_id is not None and bool((rows.tokens[:, 0] == lm.bos_id).all()),
        text=text_name or (text.name if isinstance(text, Path) else None),
    )
    order = torch.randperm(len(rows.tokens), generator=torch.Generator().manual_seed(0))  # so that neighbours differ
    with new_folder(Path(out), exists) as folder, progress_bar("capture", rows.n_kept) as advance:
        writer = _ShardWriter(folder, shard_tokens)
        moments: dict[str, _Moments] = {}
        for batch_order in order.split(max(1, batch_tokens // rows.tokens.shape[1])):
            batch = rows.take(batch_order)
            acts = lm.run(batch.tokens, names)
            piece = {"tokens": batch.tokens[batch.keep].to(torch.int32)}
            for name in names:
                x = acts[name][batch.keep.to(lm.device)]
                moments.setdefault(name, _Moments(x.shape[1])).add(x)
                piece[name] = _stored(x, DTYPES[dtype], name)
            writer.add(piece)
            advance(len(piece["tokens"]), "")
        writer.close()
        statistics = {name: moments[name].statistics() for name in names}
        manifest = {
            "format": FORMAT,
            "origin": origin.model_dump(exclude={"hook"}),
            "dtype": dtype,
            "text_sha256": text_hash(rows),
            "n_rows": len(rows.tokens),
            "hooks": {n: {"d_in": len(s.mean), "rms_norm": s.rms_norm, "mean": s.mean.tolist()} for n, s in statistics.items()},
            "shards": writer.shards,
        }
        write_json(folder / MANIFEST, manifest)
    cache = ActivationCache.open(out)
    log.info("captured %s", cache)
    return cache


class _ShardWriter:
    """Collects pieces of activations and writes a shard whenever there is enough for one."""

    def __init__(self, folder: Path, shard_tokens: int):
        self.folder, self.shard_tokens = folder, shard_tokens
        self.shards: list[dict] = []  # as in the manifest
        self._pieces: list[dict[str, Tensor]] = []
        self._n = 0

    def add(self, piece: dict[str, Tensor]) -> None:
        """Take in a piece: a tensor [n …] for each key, the same keys each time."""
        self._pieces.append(piece)
        self._n += len(piece["tokens"])
        if self._n >= self.shard_tokens:
            whole = self._joined()
            stop = self._n - self._n % self.shard_tokens
            for start in range(0, stop, self.shard_tokens):
                self._write({key: x[start : start + self.shard_tokens] for key, x in whole.items()})
            self._pieces, self._n = [{key: x[stop:] for key, x in whole.items()}], self._n - stop

    def close(self) -> None:
        """Write what is left."""
        if self._n:
            self._write(self._joined())

    def _joined(self) -> dict[str, Tensor]:
        return {key: torch.cat([piece[key] for piece in self._pieces]) for key in self._pieces[0]}

    def _write(self, tensors: dict[str, Tensor]) -> None:
        from safetensors.torch import save_file

        file = self.folder / f"shard-{len(self.shards):05d}.safetensors"
        save_file({key: x.contiguous() for key, x in tensors.items()}, file)
        facts = {"file": file.name, "n_tokens": len(tensors["tokens"]), "bytes": file.stat().st_size, "sha256": _sha256(file)}
        self.shards.append(facts)


def _stored(x: Float[Tensor, "n d_in"], dtype: torch.dtype, hook: str) -> Float[Tensor, "n d_in"]:
    """Activations as they are stored; NonFiniteError when they are not finite, or not any more."""
    stored = x.to(dtype).cpu()
    if not torch.isfinite(stored).all():
        largest = x.abs().max()
        raise NonFiniteError(f"{hook}: NaN, infinity or a number too large for {dtype} (largest {largest:.3g}); store float32")
    return stored


def _mixed(*numbers: int) -> int:
    """A seed for each tuple of numbers; torch's CPU generator looks at the lower 32 bits only."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:4], "big")


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
