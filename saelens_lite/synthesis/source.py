"""Synthetic activations as a source for training, and samples of them with their truth."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelens_lite.cache import Batch, Statistics, TensorSource
from saelens_lite.cache.order import part_of
from saelens_lite.cache.resumed import refuse_others
from saelens_lite.cache.source import UNNAMED, Moments
from saelens_lite.codes import SparseCodes, concatenated
from saelens_lite.config import Origin
from saelens_lite.devices import chosen_device
from saelens_lite.errors import ConfigError, HookError, near_matches
from saelens_lite.files import check_fits_memory
from saelens_lite.prefetch import prefetched
from saelens_lite.seeds import mixed_seed
from saelens_lite.synthesis.planted import PlantedFeatures, planted_features
from saelens_lite.synthesis.sampling import Sampler
from saelens_lite.synthesis.settings import SyntheticConfig

PIECE = 2048  # rows that are drawn at once
STATISTICS_ROWS = 1 << 15
N_SEEDS = 1 << 32


class Truth(NamedTuple):
    """Synthetic activations x, and the codes of the planted features in them."""

    x: Float[Tensor, "n d_in"]
    codes: SparseCodes

    @property
    def active(self) -> Bool[Tensor, "n n_features"]:
        """The mask of the features that fire."""
        return self.codes.to_dense() != 0


class SyntheticSource:
    """Synthetic activations of planted features, without end; a source for `saelens_lite.train`.

        x = bias + Σ_i code_i · directions_i + noise

    Each batch is drawn when it is needed. Its content depends on the settings, the seed of the data, its number and its size,
    and on the kind of device. `sample` draws activations with their truth.
    """

    def __init__(self, config: SyntheticConfig, device: str | torch.device | None = None):
        self.config = config
        self.device = torch.device("cpu") if device is None else chosen_device(device)
        numbers = config.n_features * (config.d_in + config.rank + 8)
        check_fits_memory(f"{config.n_features:,} synthetic features", 16 * numbers)
        self.features: PlantedFeatures = planted_features(config).to(self.device)
        self._sampler = Sampler(self.features, config.exclusive, config.scale_children)
        self.hooks: Sequence[str] = (UNNAMED,)
        self.n_tokens: int | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.config!r})"

    @property
    def directions(self) -> Float[Tensor, "n_features d_in"]:
        """The unit direction of each feature."""
        return self.features.directions

    @property
    def n_features(self) -> int:
        """The number of planted features."""
        return self.config.n_features

    @cached_property
    def coherence(self) -> Float[Tensor, " n_features"]:
        """The largest absolute cosine of each direction with another one. The mean is what the benchmark calls ρ_mm."""
        largest = []
        for begin in range(0, self.n_features, PIECE):
            cosine = (self.directions[begin : begin + PIECE] @ self.directions.T).abs()
            cosine.diagonal(begin).zero_()
            largest.append(cosine.amax(1))
        return torch.cat(largest)

    def d_in(self, hook: str = UNNAMED) -> int:
        """Return the width of the activations."""
        self._check(hook)
        return self.config.d_in

    def _check(self, hook: str) -> None:
        if hook not in self.hooks:
            raise HookError(f"synthetic activations have the hook {UNNAMED!r}, not {hook!r}{near_matches(hook, self.hooks)}")

    def _generator(self, stream: str, seed: int, number: int = 0) -> torch.Generator:
        """Return the generator of a numbered part of a stream. Parts of one stream never share a seed."""
        first = mixed_seed("synthetic", self.config.seed, stream, seed)
        return torch.Generator(self.device).manual_seed((first + number) % N_SEEDS)

    def _drawn(self, n: int, generator: torch.Generator) -> Truth:
        codes = self._sampler.codes(n, generator)
        x = codes.decode(self.directions) + self.features.bias
        if self.config.noise:
            x += self.config.noise * torch.randn(x.shape, generator=generator, device=self.device)
        return Truth(x, codes)

    def _pieces(self, n: int, seed: int, stream: str = "sample") -> Iterator[Truth]:
        """Yield n rows in pieces of PIECE. Whole pieces are the same for every n; the rows of a shorter last one are others."""
        for number, begin in enumerate(range(0, n, PIECE)):
            yield self._drawn(min(PIECE, n - begin), self._generator(stream, seed, number))

    def pieces(self, n: int, seed: int = 0) -> Iterator[Truth]:
        """Yield the rows of `sample` in pieces, for large n."""
        if not isinstance(n, int) or n < 1:
            raise ConfigError(f"n = {n!r}; expected an integer, at least 1 activation")
        return self._pieces(n, seed)

    def sample(self, n: int, seed: int = 0) -> Truth:
        """Return n activations with their true codes. They are in no batch of training."""
        pieces = list(self.pieces(n, seed))
        codes = [piece.codes for piece in pieces]
        joined = SparseCodes.of(concatenated([c.support for c in codes]), torch.cat([c.value for c in codes]), self.n_features)
        return Truth(torch.cat([piece.x for piece in pieces]), joined)

    @cached_property
    def _sampled(self) -> tuple[Statistics, float]:
        """Statistics and L0 of activations that are in no batch."""
        moments, n_active = Moments(self.config.d_in), 0
        for piece in self._pieces(STATISTICS_ROWS, 0, "statistics"):
            moments.add(piece.x)
            n_active += len(piece.codes.value)
        return moments.statistics(), n_active / STATISTICS_ROWS

    @property
    def true_l0(self) -> float:
        """The number of features that fire for an activation, the mean of 32,768. With a hierarchy, less than is aimed at."""
        return self._sampled[1]

    def statistics(self, hook: str = UNNAMED) -> Statistics:
        """Return the mean and root mean square norm, estimated from activations that are in no batch."""
        self._check(hook)
        return self._sampled[0]

    def origin(self, hook: str = UNNAMED) -> Origin:
        """Return an origin that says that the activations are synthetic."""
        c = self.config
        return Origin(text=f"synthetic: {c.n_features} features, seed {c.seed}", excluded_positions=())

    def batches(
        self, hooks: Sequence[str], batch_size: int, seed: int, start: int = 0, rank: int = 0, world: int = 1
    ) -> Iterator[Batch]:
        """Yield new batches without end, from number `start` on; see `saelens_lite.cache.Source.batches`."""
        for hook in hooks:
            self._check(hook)
        part = part_of(batch_size, rank, world)

        def drawn() -> Iterator[Float[Tensor, "batch d_in"]]:
            number = start
            while True:
                yield self._drawn(batch_size, self._generator("batches", seed, number)).x[part]
                number += 1

        with prefetched(drawn(), depth=1) as ready:
            for x in ready:
                yield {hook: x for hook in hooks}

    def hold_out(self, n_tokens: int) -> tuple[TensorSource, "SyntheticSource"]:
        """Return activations that are in no batch, and this source."""
        if n_tokens < 1:
            raise ConfigError(f"{n_tokens} activations to validate on; expected at least 1")
        held = torch.cat([piece.x for piece in self._pieces(n_tokens, 0, "held out")])
        return TensorSource(held, hook=UNNAMED, origin=self.origin()), self

    def describe(self) -> None:
        """Return None: to resume a run, give the source again, as in `saelens_lite.resume(run, source)`."""

    def record(self) -> dict[str, Any]:
        """Return the settings, for a resumed run."""
        return {"kind": "synthetic activations", "device": self.device.type, **self.config.model_dump(mode="json")}

    def expect(self, record: dict[str, Any]) -> None:
        """Raise SourceChangedError unless the settings are those of a record."""
        refuse_others(record, self.record(), "these are not the synthetic activations")
