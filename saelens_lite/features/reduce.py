"""Reduction of the activations of a block of latents to the numbers of a feature store.

Random draws depend only on the seed, the latent and the number of the draw, not on batches or blocks.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from saelens_lite.evaluation.positions import PositionBands, position_bands
from saelens_lite.features.info import StoreInfo
from saelens_lite.features.sampling import distinct, uniform
from saelens_lite.features.tensors import NONE
from saelens_lite.tokens import TokenRows

N_BINS = 32  # of each histogram
SILENT_DRAWS = 4  # places drawn for each silent context wanted
MAX_CELLS = 1 << 22  # places of rows with holes in memory at once


class Entries(NamedTuple):
    """Activations of a block's latents: place in the text, latent (counted from the block's first), value.

    `part` has the part of each of several models in the pre-activation, see `per_model`.
    """

    place: Int[Tensor, " n"]
    latent: Int[Tensor, " n"]
    value: Float[Tensor, " n"]
    part: Float[Tensor, "n n_models"] | None = None


class TextFacts(NamedTuple):
    """The facts about the text that the reduction needs: a few numbers for each row, none for each token."""

    keep: Bool[Tensor, "n_seq n_ctx"]  # the places that count
    before: Int[Tensor, " n_seq"]  # places that count in the rows before
    first: Int[Tensor, " n_seq"]  # position of the first that counts
    has_hole: Bool[Tensor, " n_seq"]  # a place does not count that lies between two others that do
    length: Int[Tensor, " n_seq"]  # positions of a row up to the last that counts
    bands: PositionBands

    @classmethod
    def of(cls, rows: TokenRows) -> "TextFacts":
        """Return the facts of token rows."""
        n_kept, first = (
            torch.cat(x) for x in zip(*((p.keep.sum(1), p.keep.byte().argmax(1)) for p in rows.pieces()), strict=True)
        )
        length = rows.counted_lengths
        has_hole = (n_kept > 0) & (first + n_kept < length)
        return cls(rows.keep, n_kept.cumsum(0) - n_kept, first, has_hole, length, position_bands(rows))

    @property
    def n_seq(self) -> int:
        """Number of rows."""
        return self.keep.shape[0]

    @property
    def n_ctx(self) -> int:
        """Positions of a row."""
        return self.keep.shape[1]

    @property
    def n_places(self) -> int:
        """Number of places, including those that do not count."""
        return self.keep.numel()

    def kept(self, number: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """Return the places that count with these numbers, where number 0 is the first of the text."""
        row = torch.searchsorted(self.before, number, right=True) - 1
        rank = number - self.before[row]
        position = self.first[row] + rank
        if (holes := self.has_hole[row]).any():
            size = max(1, MAX_CELLS // self.n_ctx)
            pairs = zip(row[holes].split(size), rank[holes].split(size), strict=True)
            position[holes] = torch.cat([(self.keep[i].cumsum(1) <= j[:, None]).sum(1) for i, j in pairs])
        return row * self.n_ctx + position


class Block:
    """The activations of `n` latents from number `first` on, sorted by latent, then by place.

    `falling` is their order by latent, then by falling activation, then by place.
    """

    def __init__(self, entries: Entries, first: int, n: int, text: TextFacts, info: StoreInfo):
        self.first, self.n, self.text, self.info = first, n, text, info
        self.key, order = (entries.latent.long() * text.n_places + entries.place).sort()
        self.latent, self.place = entries.latent[order].long(), entries.place[order].long()
        self.value = entries.value[order].float()
        self.part = None if entries.part is None else entries.part[order]
        self.count = torch.bincount(self.latent, minlength=n)
        self.start = self.count.cumsum(0) - self.count
        size = self.value.view(torch.int32).long()  # the bits of positive floats sort as the floats do
        self.falling = ((self.latent << 32) + (torch.iinfo(torch.int32).max - size)).sort(stable=True).indices
        self.number = first + torch.arange(n)
        before, after = info.window
        self.offsets = torch.arange(-before, after + 1)

    def reduced(self) -> dict[str, Tensor]:
        """Return the fields of FeatureTensors that depend on these latents alone, one row a latent."""
        return {
            "count": self.count,
            **self._moments(),
            **self._histogram(),
            **self._bands(),
            **self._top(),
            **self._groups(),
            **self._random(),
            "silent_place": self._silent().int(),
            **({} if self.part is None else self._best_by_part()),
        }

    def _sized(self, rank: Int[Tensor, "latents ..."]) -> Float[Tensor, "latents ..."]:
        """Return the activations at these ranks, where rank 0 is a latent's largest; 0 if the latent never fires."""
        value = _at(self.value, _at(self.falling, _beside(self.start, rank) + rank))
        return torch.where(_beside(self.count, rank) > 0, value, 0)

    def _mean(self, x: Float[Tensor, " n"]) -> Float[Tensor, " latents"]:
        """Return the mean over the activations of each latent; 0 without activations."""
        return torch.bincount(self.latent, x, self.n) / self.count.clamp(min=1)

    def _moments(self) -> dict[str, Tensor]:
        """Return mean, standard deviation, skew and excess kurtosis in float64; the last three are 0 for equal activations."""
        value = self.value.double()
        mean = self._mean(value)
        centred = value - mean[self.latent]
        variance, third, fourth = (self._mean(centred**power) for power in (2, 3, 4))
        varies = self._sized(torch.zeros_like(self.count)) > self._sized(self.count - 1)
        moments = {"std": variance.sqrt(), "skew": third / variance**1.5, "kurtosis": fourth / variance**2 - 3}
        return {"mean": mean.float(), **{name: torch.where(varies, x, 0).float() for name, x in moments.items()}}

    def _histogram(self) -> dict[str, Tensor]:
        """Return counts in bins of equal width from 0 to the largest activation."""
        largest = self._sized(torch.zeros_like(self.count)).double()
        bins = (self.value.double() * N_BINS / largest[self.latent]).long().clamp_(max=N_BINS - 1)
        counts = torch.bincount(self.latent * N_BINS + bins, minlength=self.n * N_BINS)
        return {"histogram": counts.reshape(self.n, N_BINS).int(), "bin_width": (largest / N_BINS).float()}

    def _bands(self) -> dict[str, Tensor]:
        """Return how often and how strongly each latent fires in each band of positions."""
        bands = self.text.bands
        shape = (self.n, len(bands.low))
        cell = self.latent * shape[1] + bands.band[0, self.place % self.text.n_ctx]
        count = torch.bincount(cell, minlength=shape[0] * shape[1]).reshape(shape)
        total = torch.bincount(cell, self.value.double(), shape[0] * shape[1]).reshape(shape)
        return {"band_count": count.int(), "band_mean": (total / count.clamp(min=1)).float()}

    def _top(self) -> dict[str, Tensor]:
        """Return the largest activations, at most one a row; the first of equals wins."""
        index = self._ranked(self.falling[self._best_of_row(self.value)[self.falling]])
        value = torch.where(index == NONE, 0, _at(self.value, index))
        return {"top_value": value, **self._contexts("top", index)}

    def strongest(self, entries: Int[Tensor, " m"]) -> tuple[Float[Tensor, "latents top_n"], Int[Tensor, "latents top_n"]]:
        """Return the first `top_n` activations of each latent, and their places, among entries in the order `falling`."""
        index = self._ranked(entries)
        value, place = torch.where(index == NONE, 0, _at(self.value, index)), _at(self.place, index)
        return value, torch.where(index == NONE, NONE, place).int()

    def _ranked(self, entries: Int[Tensor, " m"]) -> Int[Tensor, "latents top_n"]:
        """Return the first `top_n` of each latent among entries that are in the order `falling`; NONE fills the rest."""
        latent = self.latent[entries]
        n_entries = torch.bincount(latent, minlength=self.n)
        rank = torch.arange(len(entries)) - (n_entries.cumsum(0) - n_entries)[latent]
        fits = rank < self.info.top_n
        index = entries.new_full((self.n, self.info.top_n), NONE)
        index[latent[fits], rank[fits]] = entries[fits]
        return index

    def _best_by_part(self) -> dict[str, Tensor]:
        """Return each model's mean part, and the entries with its largest parts, at most one a row; the first of equals."""
        ranked = []
        for part in self.part.unbind(1):
            falling = part.argsort(descending=True, stable=True)
            falling = falling[self.latent[falling].argsort(stable=True)]
            ranked.append(self._ranked(falling[self._best_of_row(part)[falling]]))
        mean = torch.stack([self._mean(part.double()) for part in self.part.unbind(1)], dim=1)
        return {"mean_part": mean.float(), **self._contexts("best", torch.stack(ranked, dim=1))}

    def _best_of_row(self, value: Float[Tensor, " n"]) -> Bool[Tensor, " n"]:
        """Return a mask of the entries that are the largest of their latent in their row; the first of equals."""
        starts = _starts(self.latent * self.text.n_seq + self.place // self.text.n_ctx)
        run = starts.cumsum(0) - 1
        largest = value.new_zeros(int(starts.sum())).scatter_reduce_(0, run, value, "amax", include_self=False)
        equal = (value == largest[run]).nonzero().squeeze(1)
        best = torch.zeros_like(starts)
        best[equal[_starts(run[equal])]] = True
        return best

    def _groups(self) -> dict[str, Tensor]:
        """Return groups of equally many activations, largest first, and contexts drawn from each."""
        n_groups, size = self.info.n_groups, self.info.group_size
        bound = self.count[:, None] * torch.arange(n_groups + 1) // n_groups
        first, count = bound[:, :-1], bound.diff(dim=1)
        of_group = (self.number[:, None, None], torch.arange(n_groups)[:, None], torch.arange(size))
        drawn = distinct(count, uniform(self.info.seed, "group", *of_group))
        rank = self.start[:, None, None] + first[..., None] + drawn
        index = torch.where(drawn == NONE, NONE, _at(self.falling, rank))
        limits = {
            name: torch.where(count > 0, self._sized(at), 0) for name, at in (("low", first + count - 1), ("high", first))
        }
        return {
            "group_count": count.int(),
            "group_low": limits["low"],
            "group_high": limits["high"],
            **self._contexts("group", index),
        }

    def _random(self) -> dict[str, Tensor]:
        """Return contexts drawn from all activations."""
        drawn = distinct(self.count, uniform(self.info.seed, "random", self.number[:, None], torch.arange(self.info.n_random)))
        return self._contexts("random", torch.where(drawn == NONE, NONE, self.start[:, None] + drawn))

    def _contexts(self, name: str, index: Int[Tensor, "latents ..."]) -> dict[str, Tensor]:
        """Return the places of entries, the activations of their latents around these places, and the parts of models there."""
        place = torch.where(index == NONE, NONE, _at(self.place, index))
        around = place[..., None] + self.offsets
        wanted = _beside(torch.arange(self.n), around) * self.text.n_places + around
        entry = torch.searchsorted(self.key, wanted)
        position = place[..., None] % self.text.n_ctx + self.offsets
        inside = (place[..., None] != NONE) & (position >= 0) & (position < self.text.n_ctx)
        there = inside & (_at(self.key, entry) == wanted)
        contexts = {f"{name}_place": place.int(), f"{name}_nearby": torch.where(there, _at(self.value, entry), 0)}
        if self.part is not None:
            parts = torch.stack([torch.where(index == NONE, 0, _at(part, index)) for part in self.part.unbind(1)], dim=-1)
            contexts[f"{name}_part"] = parts
        return contexts

    def _silent(self) -> Int[Tensor, "latents n_silent"]:
        """Return places, drawn from those that count, around which the latent does not fire; NONE if the draws gave too few."""
        n = self.info.n_silent
        u = uniform(self.info.seed, "silent", self.number[:, None], torch.arange(SILENT_DRAWS * n))
        place = self.text.kept((u * self.info.n_tokens).long())
        before, after = self.info.window
        position, row = place % self.text.n_ctx, place // self.text.n_ctx
        first = place - position.clamp(max=before)
        last = place + (self.text.length[row] - 1 - position).clamp(max=after)
        key = torch.arange(self.n)[:, None] * self.text.n_places
        silent = torch.searchsorted(self.key, key + first) == torch.searchsorted(self.key, key + last, right=True)
        again = (place[:, :, None] == place[:, None]).tril(-1).any(2)
        chosen = silent & ~again
        rank = torch.where(chosen, chosen.cumsum(1) - 1, n).clamp(max=n)  # column n is cut off
        return place.new_full((self.n, n + 1), NONE).scatter_(1, rank, place)[:, :n]


def _at(x: Shaped[Tensor, " n"], index: Int[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """Return x at the indices. Indices out of range give arbitrary entries."""
    return x[index.clamp(0, len(x) - 1)] if len(x) else x.new_zeros(index.shape)


def _beside(x: Int[Tensor, " latents"], y: Tensor) -> Tensor:
    """Return x with as many axes as y, so that the two can be broadcast."""
    return x.reshape(-1, *[1] * (y.ndim - 1))


def _starts(key: Int[Tensor, " n"]) -> Bool[Tensor, " n"]:
    """Return a mask of the positions at which a run of equal keys begins."""
    return torch.cat([torch.ones_like(key[:1], dtype=torch.bool), key[1:] != key[:-1]])
