"""Sources of activations for training: the protocol, and a source of activations in memory."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saelens_lite.arrays import ArrayLike, as_tensor
from saelens_lite.cache.order import MAX_UPLOAD, part_of, shuffled_batches
from saelens_lite.cache.resumed import refuse_others, tensor_hash
from saelens_lite.config import Origin
from saelens_lite.devices import wide
from saelens_lite.errors import ConfigError, HookError, ShapeError, near_matches


class Statistics(NamedTuple):
    """Mean activation and root mean square norm of the activations at a hook."""

    mean: Float[Tensor, " d_in"]
    rms_norm: float


BLOCK = 8192  # activations whose sums are added at once
SERIAL = 1 << 15  # numbers on which torch starts no threads, which would go on spinning beside those that hash and write
UNNAMED = "x"  # name for activations in memory without a hook
Batch = dict[str, Float[Tensor, "batch _"]]


@runtime_checkable
class Source(Protocol):
    """The activations to train on. `saelens_lite.cache.resumed` describes two more methods, for resumed runs."""

    @property
    def hooks(self) -> Sequence[str]: ...

    @property
    def n_tokens(self) -> int | None:
        """Number of activations of each hook in one pass; None if it is not known before reading."""
        ...

    def d_in(self, hook: str) -> int: ...

    def statistics(self, hook: str) -> Statistics: ...

    def origin(self, hook: str) -> Origin: ...

    def batches(
        self, hooks: Sequence[str], batch_size: int, seed: int, start: int = 0, rank: int = 0, world: int = 1
    ) -> Iterator[Batch]:
        """Yield shuffled batches, epoch after epoch without end, from number `start` on; the same seed gives the same ones.

        The caller may still read a batch when it asks for the next one, so no batch may overwrite the memory of another.

        Process number `rank` of `world` gets its equal part of each batch. All parts in order are the batch of a single
        process.
        """
        ...

    def hold_out(self, n_tokens: int) -> tuple["TensorSource", "Source"]:
        """Return activations to validate on, and a source of the others. Raise ConfigError if there are too few."""
        ...

    def describe(self) -> dict | None:
        """Return plain data with which `open_source` can reopen the source, or None if it cannot be reopened."""
        ...


def serial_rows(x: Tensor) -> int:
    """Return the number of rows that torch works on without threads."""
    return max(1, SERIAL // max(1, x[:1].numel()))


def exact_sums(x: Float[Tensor, "n d_in"]) -> tuple[Float[Tensor, " d_in"], Float[Tensor, ""]]:
    """Return Σx and Σ‖x‖² in float64, on the device of x if that has float64.

    On a CPU, a few rows are widened at a time, so that they stay in its cache; halves by way of float32, which is faster.
    """
    if x.device.type != "cpu":
        exact = wide(x)
        return exact.sum(0), torch.linalg.vector_norm(exact).square()
    total, square = torch.zeros(x.shape[1], dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for rows in x.split(serial_rows(x)):
        exact = (rows.float() if x.element_size() < 4 else rows).double()
        total += exact.sum(0)
        square += torch.linalg.vector_norm(exact).square()
    return total, square


class Moments:
    """Running sums Σx and Σ‖x‖² in float64."""

    def __init__(self, d_in: int):
        self.n, self.total, self.square = 0, torch.zeros(d_in, dtype=torch.float64), 0.0

    def add(self, x: Float[Tensor, "n d_in"]) -> None:
        """Add activations."""
        for piece in x.split(BLOCK):
            self.add_sums(len(piece), *exact_sums(piece))

    def add_sums(self, n: int, total: Float[Tensor, " d_in"], square: Float[Tensor, ""] | float) -> None:
        """Add the sums of n activations."""
        self.n += n
        self.total += total.cpu()
        self.square += float(square)

    def statistics(self) -> Statistics:
        """Return the mean and root mean square norm of the added activations."""
        return Statistics((self.total / self.n).float(), (self.square / self.n) ** 0.5)


class TensorSource:
    """Activations in memory: x [n d_in] of one hook, or of several hooks with the same n.

    x: a tensor, or any array that `arrays.as_tensor` takes.
    """

    def __init__(
        self,
        x: Float[Tensor, "n d_in"] | dict[str, Float[Tensor, "n _"]] | ArrayLike,
        hook: str = UNNAMED,
        origin: Origin | None = None,
    ):
        self.x = {name: as_tensor(t).detach() for name, t in (x if isinstance(x, dict) else {hook: x}).items()}
        for t in self.x.values():
            if t.ndim != 2 or not len(t):
                raise ShapeError(f"x has shape {tuple(t.shape)}; expected [n d_in] with at least one row")
            if not t.is_floating_point():
                raise ShapeError(f"x holds {t.dtype}; expected floating-point numbers")
        if len({len(t) for t in self.x.values()}) != 1:
            raise ShapeError(
                f"x has {[len(t) for t in self.x.values()]} rows at its hooks; expected the same number, and a hook"
            )
        self.hooks: Sequence[str] = tuple(self.x)
        self.n_tokens: int | None = len(next(iter(self.x.values())))
        self._origin = origin or Origin(excluded_positions=())

    def d_in(self, hook: str) -> int:
        """Return the width of the activations at a hook. Raise HookError if the hook is missing."""
        return self._of(hook).shape[1]

    def _of(self, hook: str) -> Float[Tensor, "n _"]:
        if hook not in self.x:
            raise HookError(f"there are activations of {', '.join(self.x)}, not of {hook!r}{near_matches(hook, self.x)}")
        return self.x[hook]

    def statistics(self, hook: str) -> Statistics:
        """Return the mean and root mean square norm of the activations."""
        moments = Moments(self.d_in(hook))
        moments.add(self.x[hook])
        return moments.statistics()

    def origin(self, hook: str) -> Origin:
        """Return the origin that the caller gave, or an empty one."""
        return self._origin

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
            device: Where the batches are gathered; default: where the activations are. They are not moved if they
                have more than MAX_UPLOAD bytes.
        """
        chosen, part = {hook: self._of(hook) for hook in hooks}, part_of(batch_size, rank, world)
        if device is not None and sum(x.nbytes for x in chosen.values()) <= MAX_UPLOAD:
            chosen = {hook: x.to(device) for hook, x in chosen.items()}
        place, *others = {x.device for x in chosen.values()}
        where = place if place.type == "cuda" and not others else None
        return shuffled_batches(np.array([self.n_tokens]), 1, lambda _: chosen, batch_size, seed, start, part, where)

    def hold_out(self, n_tokens: int) -> tuple["TensorSource", "TensorSource"]:
        """Return the last rows, and the others. Raise ConfigError if none would be left."""
        if not 0 < n_tokens < self.n_tokens:
            raise ConfigError(
                f"{n_tokens:,} activations to validate on: there are {self.n_tokens:,}, and some must be left to train on"
            )
        cut = self.n_tokens - n_tokens
        held, rest = ({name: t[part] for name, t in self.x.items()} for part in (slice(cut, None), slice(cut)))
        return TensorSource(held, origin=self._origin), TensorSource(rest, origin=self._origin)

    def describe(self) -> None:
        """Return None: tensors in memory cannot be reopened."""

    @cached_property
    def _hashes(self) -> dict[str, str]:
        return {hook: tensor_hash(x) for hook, x in self.x.items()}

    def record(self) -> dict[str, Any]:
        """Return the hashes of the tensors, for a resumed run."""
        return {"kind": "tensors", "sha256": self._hashes}

    def expect(self, record: dict[str, Any]) -> None:
        """Raise SourceChangedError unless the tensors are those of a record."""
        refuse_others(record, self.record(), "these tensors are not those")
