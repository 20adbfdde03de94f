"""Sums, bootstrap weights and batches of an evaluation, against exact fractions and dense formulas."""

import weakref
from fractions import Fraction

import pytest
import torch

from saelens_lite.evaluation.held import Held, held_batches
from saelens_lite.evaluation.sums import ExactSums, PooledSums, poisson_weights
from saelens_lite.model.passes import batches
from saelens_lite.processes import ALONE, Team
from saelens_lite.tokens import TokenRows, token_rows


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_sums_are_exact_in_any_order():
    """Terms of very different sizes and both signs, most of which cancel; float64 alone loses some digits."""
    terms = (
        torch.randn(300, 40, generator=generator()).double()
        * torch.randn(300, 40, generator=generator(1)).double().mul(3).exp()
    )
    terms = torch.cat([terms, -terms[:299]])
    exact = [float(sum(Fraction(x.item()) for x in column)) for column in terms.unbind(1)]
    for seed in range(3):
        sums = ExactSums()
        for i in torch.randperm(len(terms), generator=generator(seed)).tolist():
            sums.add("x", terms[i].clone())
        assert sums["x"].tolist() == exact
    assert terms.sum(0).tolist() != exact


def test_large_sums_infinity_and_nan_are_those_of_plain_sums():
    terms = torch.randn(4, 300, 301, generator=generator()).double()
    terms[2, 1, 1], terms[1, 2, 2] = torch.inf, torch.nan
    sums = ExactSums()
    for term in terms:
        sums.add("x", term.clone())
    torch.testing.assert_close(sums["x"], terms.sum(0), rtol=1e-12, atol=1e-12, equal_nan=True)


def test_weights_are_poisson_draws_that_depend_on_the_sequence_alone():
    weights = poisson_weights(7, range(3000), 200).double()
    share = [float((weights == k).double().mean()) for k in range(5)]
    assert share == pytest.approx([0.36788, 0.36788, 0.18394, 0.06131, 0.01533], abs=0.003)
    correlation = torch.corrcoef(weights.T)[~torch.eye(200, dtype=torch.bool)]
    assert float(correlation.std()) == pytest.approx(3000**-0.5, rel=0.1)  # replicates are independent
    correlation = torch.corrcoef(weights[:200])[~torch.eye(200, dtype=torch.bool)]
    assert float(correlation.std()) == pytest.approx(200**-0.5, rel=0.1)  # so are sequences
    assert torch.equal(poisson_weights(7, [2999, 5], 51).double(), weights[[2999, 5], :51])
    assert not torch.equal(poisson_weights(8, [5], 51).double(), weights[[5], :51])


@pytest.mark.parametrize(("d_sae", "chunk"), [(10, 1 << 14), (5000, 1 << 14), (5000, 7)])
def test_firing_counts_are_those_of_a_dense_product(monkeypatch, d_sae, chunk):
    """With few latents, which takes the dense way, and with many, in one chunk and in several."""
    monkeypatch.setattr("saelens_lite.evaluation.sums.CHUNK_LATENTS", chunk)
    sums = PooledSums(n_bootstrap=30, seed=3, n_units=20)
    total = torch.zeros(d_sae, 31, dtype=torch.float64)
    for numbers in (torch.arange(6), torch.arange(6, 20)):
        n = len(numbers)
        sequence, latent = (torch.randint(top, (400,), generator=generator(top)) for top in (n, d_sae))
        sums.weigh(numbers)
        sums.add("n", torch.ones(n))
        sums.add_fired("a", sequence, latent, d_sae)
        dense = torch.zeros(n, d_sae, dtype=torch.float64).index_put(
            (sequence, latent), torch.tensor(1.0).double(), accumulate=True
        )
        draws = poisson_weights(sums._seed, numbers.tolist(), 30).double()
        total += dense.T @ torch.cat([torch.ones(n, 1), draws], dim=1).double()
    assert torch.equal(sums.fired("a"), total)
    assert sums["n"][0] == 20


def test_sums_of_one_batch_are_kept_apart_by_name():
    sums = PooledSums(n_bootstrap=3, seed=0, n_units=4)
    x = torch.randn(4, 5, generator=generator()).double()
    for numbers in (torch.arange(2), torch.arange(2, 4)):
        sums.weigh(numbers)
        sums.add("scalar", x[numbers, 0])
        sums.add("vector", x[numbers])
        sums.add("scalar", x[numbers, 1])
    weights = torch.cat([torch.ones(4, 1), poisson_weights(sums._seed, range(4), 3)], dim=1).double().T
    torch.testing.assert_close(sums["vector"], weights @ x)
    torch.testing.assert_close(sums["scalar"], weights @ (x[:, 0] + x[:, 1]))


class Member(Team):
    """One of several processes that deals batches but has nobody to wait for."""

    def __init__(self, rank: int, world: int):
        super().__init__()
        self.rank, self.world = rank, world


@pytest.mark.parametrize("in_memory", [1 << 26, 100])
def test_processes_hold_every_batch_once_and_read_it_back(lm, documents, monkeypatch, tmp_path, in_memory):
    """In memory and on a disk; a row without a counted position is in no batch."""
    monkeypatch.setattr("saelens_lite.evaluation.held.IN_MEMORY", in_memory)
    rows = token_rows(lm, documents, n_ctx=20, n_tokens=900)
    keep = rows.keep.clone()
    keep[3] = False
    rows = rows._replace(keep=keep)
    wanted = list(batches(lm, rows, 60))
    with held_batches(lm, [rows], 60, ALONE) as found:
        for _ in range(2):
            assert_same_batches(list(found), wanted)
        assert (found.n_rows, found.n_sequences, found.n_kept) == (len(rows.tokens), len(rows.tokens) - 1, rows.n_kept)
        assert torch.equal(found.per_token, torch.bincount(rows.tokens[rows.keep], minlength=lm.d_vocab))
    with open(tmp_path / "0", "w+b") as first, open(tmp_path / "1", "w+b") as second:
        parts = [Held(file, lm, [rows], 60, Member(rank, 2)) for rank, file in enumerate((first, second))]
        assert_same_batches(list(parts[0]), wanted[::2])
        assert_same_batches(list(parts[1]), wanted[1::2])
        assert sum(part.n_own for part in parts) == rows.n_kept
        assert parts[0].sha256 == parts[1].sha256


def assert_same_batches(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one.number, other.number)
        assert torch.equal(one.rows.tokens, other.rows.tokens)
        assert torch.equal(one.rows.keep, other.rows.keep)
        assert torch.equal(one.rows.lengths, other.rows.lengths)
        assert one.rows.ends_text == other.rows.ends_text


def test_a_stream_of_rows_is_not_held(lm, monkeypatch):
    """Of 40 blocks, those of a stretch are in memory at a time, and rows are numbered through."""
    monkeypatch.setattr("saelens_lite.evaluation.held.STRETCH", 300)
    alive: list[weakref.ref] = []
    most = 0

    def blocks():
        nonlocal most
        for i in range(40):
            tokens = torch.full((5, 12), i + 3)
            alive.append(weakref.ref(tokens))
            most = max(most, sum(one() is not None for one in alive))
            yield TokenRows(tokens, torch.ones(5, 12, dtype=torch.bool))
            del tokens

    with held_batches(lm, blocks(), 24, ALONE) as found:
        assert most <= 7  # five blocks are a stretch
        assert (found.n_rows, found.n_kept, found.width) == (200, 2400, 12)
        for batch in found:
            assert torch.equal(batch.rows.tokens[:, 0], batch.number // 5 + 3)
        assert sorted(i for batch in found for i in batch.number.tolist()) == list(range(200))
