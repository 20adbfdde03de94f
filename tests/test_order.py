"""The order of stored rows: each once an epoch, from any batch on, with bounded memory, whatever the sizes are."""

import itertools
import threading
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saelens_lite.cache.order import cut_into_batches, part_of, shuffled_batches
from saelens_lite.errors import ConfigError
from saelens_lite.seeds import mixed_seed, permutation

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=12)


class Rows:
    """Rows that are numbered through all chunks, and a note of which chunks were asked for together."""

    def __init__(self, lengths: list[int]):
        self.lengths = np.array(lengths)
        self.first = np.cumsum(self.lengths) - self.lengths
        self.loads: list[list[int]] = []

    def load(self, chunks: list[int]) -> dict[str, torch.Tensor]:
        self.loads.append(chunks)
        rows = np.concatenate([np.arange(self.first[i], self.first[i] + self.lengths[i]) for i in chunks])
        return {"row": torch.from_numpy(rows)[:, None], "twice": torch.from_numpy(2 * rows)[:, None]}

    def batches(
        self, n: int, pool: int, batch_size: int, seed: int = 0, start: int = 0, part: slice | None = None
    ) -> list[dict[str, torch.Tensor]]:
        return list(itertools.islice(shuffled_batches(self.lengths, pool, self.load, batch_size, seed, start, part), n))


def numbers(batches: list[dict[str, torch.Tensor]]) -> list[int]:
    return [i for batch in batches for i in batch["row"].flatten().tolist()]


@given(lengths=LENGTHS, pool=st.integers(1, 60), batch_size=st.integers(1, 40), seed=st.integers(0, 9))
def test_every_row_once_an_epoch(lengths, pool, batch_size, seed):
    rows = Rows(lengths)
    n = sum(lengths)
    batches = rows.batches(-(-3 * n // batch_size), pool, batch_size, seed)
    assert {len(x) for batch in batches for x in batch.values()} == {batch_size}
    assert all(torch.equal(batch["twice"], 2 * batch["row"]) for batch in batches)
    seen = numbers(batches)
    for epoch in range(3):
        assert sorted(seen[epoch * n : (epoch + 1) * n]) == list(range(n))


@given(data=st.data(), lengths=LENGTHS, pool=st.integers(1, 60), batch_size=st.integers(1, 40))
def test_a_reader_may_begin_anywhere(data, lengths, pool, batch_size):
    n = -(-3 * sum(lengths) // batch_size) + 1
    start = data.draw(st.integers(0, n - 1))
    whole = Rows(lengths).batches(n, pool, batch_size, seed=5)
    assert numbers(Rows(lengths).batches(n - start, pool, batch_size, seed=5, start=start)) == numbers(whole[start:])


@given(lengths=LENGTHS, pool=st.integers(1, 60), rows=st.integers(1, 9), world=st.integers(1, 5), start=st.integers(0, 7))
def test_the_parts_of_all_processes_are_the_batches_of_one(lengths, pool, rows, world, start):
    size = rows * world
    whole = Rows(lengths).batches(6, pool, size, seed=2, start=start)
    parts = [Rows(lengths).batches(6, pool, size, 2, start, part_of(size, rank, world)) for rank in range(world)]
    for batch, *of_ranks in zip(whole, *parts, strict=True):
        assert {len(part["row"]) for part in of_ranks} == {rows}
        for name in batch:
            assert torch.equal(torch.cat([part[name] for part in of_ranks]), batch[name])


@pytest.mark.parametrize(("size", "rank", "world"), [(8, 0, 3), (8, 2, 2), (8, -1, 2), (8, 0, 0)])
def test_unequal_parts_and_unknown_processes_are_refused(size, rank, world):
    with pytest.raises(ConfigError, match=r"rank = |divided"):
        part_of(size, rank, world)


@given(lengths=LENGTHS, pool=st.integers(1, 60))
def test_a_pool_is_no_larger_than_asked_but_for_the_rest_of_a_chunk(lengths, pool):
    rows = Rows(lengths)
    rows.batches(1, pool, 2 * sum(lengths))  # a batch of two epochs
    asked = [i for chunks in rows.loads for i in chunks]
    assert {Counter(asked)[i] for i in range(len(lengths))} <= {2, 3}  # and the next pool, which is read in advance
    for chunks in rows.loads:
        assert sum(rows.lengths[chunks[:-1]]) < pool


def test_far_away_batches_cost_no_reading():
    rows = Rows([4] * 100)
    start = 10**6
    rows.batches(1, 40, 8, start=start)
    assert len(rows.loads) <= 3
    epoch, skip = divmod(start * 8, 400)
    assert rows.loads[0] == permutation(100, 0, epoch)[skip // 40 * 10 :][:10].tolist()


def test_a_pool_is_shuffled_as_a_whole_and_epochs_differ():
    rows = Rows([8] * 64)
    first, second = (numbers(rows.batches(1, 10**9, 512, start=epoch)) for epoch in (0, 1))
    assert first != second != sorted(second)
    same_chunk = sum(a // 8 == b // 8 for a, b in itertools.pairwise(first))
    assert same_chunk < 25  # 511 · 7 / 511 = 7 are expected of a perfect shuffle, 448 of chunks that stay together
    assert numbers(Rows([8] * 64).batches(1, 10**9, 512)) == first
    assert numbers(Rows([8] * 64).batches(1, 10**9, 512, seed=1)) != first


@given(cuts=st.lists(st.integers(0, 30), max_size=6), batch_size=st.integers(1, 12))
def test_batches_do_not_depend_on_where_the_pools_are_cut(cuts, batch_size):
    x = torch.arange(60.0).reshape(30, 2)
    order = permutation(30, 0)
    edges = [0, *sorted(cuts), 30]
    pools = [({"x": x}, order[a:b]) for a, b in itertools.pairwise(edges)]
    batches = [batch["x"] for batch in cut_into_batches(pools, batch_size)]
    assert len(batches) == 30 // batch_size
    assert all(torch.equal(batch, x[order[i * batch_size :][:batch_size]]) for i, batch in enumerate(batches))


def test_what_a_pool_becomes_later_does_not_change_a_batch():
    ring = torch.zeros(4, 1)

    def pools():
        for number in range(3):
            ring.fill_(number)
            yield {"x": ring}, torch.arange(4)

    batches = [batch["x"].flatten().tolist() for batch in cut_into_batches(pools(), 3)]
    assert batches == [[0, 0, 0], [0, 1, 1], [1, 1, 2], [2, 2, 2]]


def test_a_reader_that_is_closed_leaves_no_thread():
    before = threading.enumerate()
    batches = shuffled_batches(np.array([5, 5]), 5, Rows([5, 5]).load, 3, 0)
    next(batches)
    assert len(threading.enumerate()) == len(before) + 1
    batches.close()
    assert threading.enumerate() == before


def test_an_error_in_the_thread_comes_to_the_reader():
    def load(chunks):
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        next(shuffled_batches(np.array([5]), 5, load, 3, 0))


def test_seeds_differ_and_fit_into_32_bits():
    tuples = [*itertools.product(range(4), repeat=2), *itertools.product(range(4), repeat=3), ("rows", 1), ("round", 1)]
    seeds = [mixed_seed(*numbers) for numbers in tuples]
    assert len(set(seeds)) == len(tuples)
    assert max(seeds) < 2**32
