"""Rows of activations without a text: their names, their groups, and in which groups each latent fires.

A store of activations is a store of a text whose rows have one token each: row i is at place i, and its token's text is its
name.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from saelens_lite.errors import ConfigError, ShapeError
from saelens_lite.features.reduce import Block
from saelens_lite.features.tensors import NONE

N_RATES = 10  # groups listed for a latent
MAX_CHARACTERS = 1 << 16  # of a name


class ExampleRow(NamedTuple):
    """A row of the activations: its name, a latent's activation there, its group (None without groups), its number."""

    name: str
    value: float
    group: str | None
    row: int


class GroupRate(NamedTuple):
    """A group of `n_rows` rows; a latent fires on `count` of them, a share of `firing_rate`, with this mean activation."""

    group: str
    n_rows: int
    count: int
    firing_rate: float
    mean_activation: float


class RowTensors(NamedTuple):
    """The names and groups of rows, as tensors. Without groups, the tensors about groups are empty.

    Texts are UTF-8, one after another; `end` has the end of each. Rates are of the groups that a latent prefers most, see
    `evidence`; NONE stands for a missing group or row.
    """

    name_text: UInt8[Tensor, " n_name_bytes"]
    name_end: Int[Tensor, " n_seq"]
    label_text: UInt8[Tensor, " n_label_bytes"]
    label_end: Int[Tensor, " n_labels"]
    group_of_row: Int[Tensor, " n_grouped"]
    distinct_value: Float[Tensor, "d_sae n_distinct"]  # the largest activations, at most one a group
    distinct_place: Int[Tensor, "d_sae n_distinct"]
    rate_group: Int[Tensor, "d_sae n_rates"]
    rate_count: Int[Tensor, "d_sae n_rates"]
    rate_mean: Float[Tensor, "d_sae n_rates"]

    @property
    def names(self) -> list[str]:
        """The name of each row."""
        return _texts(self.name_text, self.name_end)

    def fit(self, count: Int[Tensor, " d_sae"], n_rows: int, top_n: int) -> bool:
        """Return whether the tensors fit each other and a store whose latents fire `count` times."""
        n_labels = len(self.label_end)
        if not (_are_texts(self.name_text, self.name_end) and _are_texts(self.label_text, self.label_end)):
            return False
        shapes = [len(self.name_end), len(self.group_of_row), self.distinct_place.shape[1], self.rate_group.shape[1]]
        if shapes != [n_rows, n_rows if n_labels else 0, top_n if n_labels else 0, min(N_RATES, n_labels)]:
            return False
        limits = ((self.group_of_row, 0, n_labels), (self.distinct_place, NONE, n_rows), (self.rate_group, NONE, n_labels))
        if not all(bool((low <= x).all() and (x < high).all()) for x, low, high in limits if x.numel()):
            return False
        if not ((self.distinct_place != NONE) == (self.distinct_value > 0)).all():
            return False
        sizes = torch.bincount(self.group_of_row, minlength=n_labels)
        most = torch.minimum(count[:, None], sizes[self.rate_group.long().clamp(min=0)]) if n_labels else self.rate_count
        return bool(torch.where(self.rate_group == NONE, self.rate_count == 0, self.rate_count <= most).all())


OF_GROUPS = RowTensors._fields[5:]  # have a row for each latent


class Rows:
    """The groups of a store's rows, and the answers about them; `labels` are the names of the groups.

    built_here: False if the rows were read from a file, which may be a stranger's.
    """

    def __init__(self, tensors: RowTensors, built_here: bool = False):
        self.tensors, self.built_here = tensors, built_here
        self.labels = _texts(tensors.label_text, tensors.label_end)
        self.sizes = torch.bincount(tensors.group_of_row, minlength=len(self.labels))

    def group(self, row: int) -> str | None:
        """Return the group of a row, or None without groups."""
        return self.labels[int(self.tensors.group_of_row[row])] if self.labels else None

    def examples(self, names: Sequence[str], places: Tensor, values: Tensor) -> list[ExampleRow]:
        """Return the rows at places, with a latent's activations there."""
        pairs = zip(places.tolist(), values.tolist(), strict=True)
        return [ExampleRow(names[place], value, self.group(place), place) for place, value in pairs if place != NONE]

    def rates(self, latent: int) -> list[GroupRate]:
        """Return the groups in which a latent fires, those that it prefers most first."""
        t = self.tensors
        columns = (x[latent].tolist() for x in (t.rate_group, t.rate_count, t.rate_mean))
        return [
            GroupRate(self.labels[group], size := int(self.sizes[group]), count, count / size, mean)
            for group, count, mean in zip(*columns, strict=True)
            if group != NONE
        ]


class GroupsOfBlocks:
    """The groups of rows, and the numbers about them for a block of latents."""

    def __init__(self, group_of_row: Int[Tensor, " n_rows"], n_labels: int):
        self.group_of_row, self.n_labels = group_of_row, n_labels
        self.sizes = torch.bincount(group_of_row, minlength=n_labels)

    def numbers(self, block: Block) -> dict[str, Tensor]:
        """Return the last five tensors of RowTensors for a block of latents. Without groups, they are empty."""
        if not self.n_labels:
            none = torch.zeros(block.n, 0)
            return dict(zip(OF_GROUPS, [none, none.int(), none.int(), none.int(), none], strict=True))
        return dict(zip(OF_GROUPS, [*self._distinct(block), *self._rates(block)], strict=True))

    def _distinct(self, block: Block) -> tuple[Tensor, Tensor]:
        """Return the largest activations and their rows, at most one a group; of equals, the earlier."""
        pair = (block.latent * self.n_labels + self.group_of_row[block.place])[block.falling]
        order = pair.argsort(stable=True)
        first = order[pair[order].diff(prepend=pair.new_full((1,), -1)) != 0].sort().values  # of each pair, the largest
        return block.strongest(block.falling[first])

    def _rates(self, block: Block) -> tuple[Tensor, Tensor, Tensor]:
        """Return groups, on how many rows of each a latent fires, and the mean there."""
        key = block.latent * self.n_labels + self.group_of_row[block.place]
        pair, inverse, count = key.unique(return_inverse=True, return_counts=True)
        latent, group = pair // self.n_labels, pair % self.n_labels
        mean = torch.bincount(inverse, block.value.double(), len(pair)) / count
        score = evidence(count, self.sizes[group], block.count[latent], len(self.group_of_row))
        order = score.argsort(descending=True, stable=True)
        order = order[latent[order].argsort(stable=True)]
        n_pairs = torch.bincount(latent, minlength=block.n)
        rank = torch.arange(len(order)) - (n_pairs.cumsum(0) - n_pairs)[latent[order]]
        best, shape = order[rank < N_RATES], (block.n, min(N_RATES, self.n_labels))
        at = (latent[best], rank[rank < N_RATES])
        return (
            torch.full(shape, NONE, dtype=torch.int32).index_put_(at, group[best].int()),
            torch.zeros(shape, dtype=torch.int32).index_put_(at, count[best].int()),
            torch.zeros(shape).index_put_(at, mean[best].float()),
        )


def evidence(count: Int[Tensor, " n"], size: Int[Tensor, " n"], total: Int[Tensor, " n"], n_rows: int) -> Float[Tensor, " n"]:
    """Return the evidence (nats) that latents fire on another share p of a group's rows than of all; negative if p is smaller.

        G = k ln(k / (n p)) + (n − k) ln((n − k) / (n (1 − p))),    p = total / n_rows
    A latent fires on k = count of the n = size rows of the group, and on `total` of all rows.
    Source: Dunning 1993, Accurate Methods for the Statistics of Surprise and Coincidence (half of his −2 log λ).
    """
    k, n, p = count.double(), size.double(), total.double() / n_rows
    inside, outside = torch.special.xlogy(k, k), torch.special.xlogy(n - k, n - k)
    g = inside + outside - torch.special.xlogy(k, n * p) - torch.special.xlogy(n - k, n * (1 - p))
    return torch.where(count * n_rows >= size * total, g, -g)


def row_tensors(names: Sequence[str], labels: Sequence[str], group_of_row: Tensor, of_latents: Sequence[Tensor]) -> RowTensors:
    """Return names and groups as tensors. `of_latents` are the tensors with a row for each latent."""
    return RowTensors(*_joined(names), *_joined(labels), group_of_row.int(), *of_latents)


def texts_of(values: Any, n: int, what: str, default: Callable[[int], str] | None = None) -> list[str]:
    """Return one text for each of n rows.

    Raises:
        ShapeError: there are not n values.
        ConfigError: `values` is one text, or a value is missing or too long.
    """
    if values is None and default is not None:
        return [default(i) for i in range(n)]
    if isinstance(values, str | bytes | dict) or not hasattr(values, "__len__"):
        raise ConfigError(f"{what} is {values!r:.80}; expected a list with one entry for each row of x")
    if len(values) != n:
        raise ShapeError(f"{what} has {len(values):,} entries for {n:,} rows of x; give one for each row")
    texts = []
    for i, value in enumerate(values.tolist() if hasattr(values, "tolist") else values):
        text = str(value).encode("utf-8", "backslashreplace").decode()  # lone surrogates cannot be written
        if not isinstance(value, str) and text in ("None", "nan", "<NA>", "NaT"):
            raise ConfigError(f"{what}[{i}] is missing ({text}); give each row a text or a number")
        if len(text) > MAX_CHARACTERS:
            raise ConfigError(f"{what}[{i}] has {len(text):,} characters; at most {MAX_CHARACTERS:,}")
        texts.append(text)
    return texts


def _joined(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    pieces = [text.encode() for text in texts]
    joined = np.frombuffer(b"".join(pieces), np.uint8).copy()
    return torch.from_numpy(joined), torch.tensor([len(piece) for piece in pieces], dtype=torch.long).cumsum(0)


def _texts(text: Tensor, end: Tensor) -> list[str]:
    joined, start, texts = text.numpy().tobytes(), 0, []
    for stop in end.tolist():
        texts.append(joined[start:stop].decode())
        start = stop
    return texts


def _are_texts(text: Tensor, end: Tensor) -> bool:
    """Return whether the ends ascend to the length of the text, and cut it into UTF-8."""
    size = end.diff(prepend=end.new_zeros(1))
    if not bool((size >= 0).all()) or (int(end[-1]) if len(end) else 0) != len(text):
        return False
    try:
        _texts(text, end)
    except UnicodeDecodeError:
        return False
    return True
