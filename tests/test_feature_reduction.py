"""The numbers of a feature store against plain loops in double precision, for any split of text and latents."""

import math
import os
from collections import Counter
from fractions import Fraction

import pytest
import torch

from saelens_lite.codes import SparseCodes
from saelens_lite.errors import CorruptFileError
from saelens_lite.features import FeatureTensors, StoreInfo, code_log, cooccurrence, reduce, sampling
from saelens_lite.features.build import reduced
from saelens_lite.features.code_log import CodeLog, Codes, Sample
from saelens_lite.features.cooccurrence import MIN_TOGETHER, N_PARTNERS
from saelens_lite.features.reduce import N_BINS
from saelens_lite.features.tensors import NONE
from saelens_lite.tokens import TokenRows

N_SEQ, N_CTX, D_SAE = 40, 20, 48
SILENT, ALWAYS, EQUAL, TWICE = 3, 7, 11, 13  # latents: never fires, on every token, always as strongly, on two tokens
WINDOW = (4, 2)


@pytest.fixture(scope="module")
def rows() -> TokenRows:
    """Rows of different lengths, position 0 and the end of most of them not counting, and a hole in one."""
    generator = torch.Generator().manual_seed(0)
    length = torch.randint(5, N_CTX + 1, (N_SEQ, 1), generator=generator)
    position = torch.arange(N_CTX)
    keep = (position > 0) & (position < length)
    keep[4, 2] = False
    return TokenRows(torch.randint(0, 100, (N_SEQ, N_CTX), generator=generator), keep)


@pytest.fixture(scope="module")
def acts(rows) -> torch.Tensor:
    """Codes [seq pos latent] of very different densities and scales, many of them equal; 0 where nothing counts."""
    generator = torch.Generator().manual_seed(1)
    shape = (N_SEQ, N_CTX, D_SAE)
    share = torch.linspace(0.01, 0.6, D_SAE)[torch.randperm(D_SAE, generator=generator)]
    value = torch.where(torch.arange(D_SAE) % 2 == 0, torch.rand(shape, generator=generator) + 0.01, 0)
    value = torch.where(value > 0, value, torch.randint(1, 5, shape, generator=generator) / 3)
    acts = torch.where(torch.rand(shape, generator=generator) < share, value * torch.logspace(-4, 4, D_SAE), 0)
    acts[..., SILENT] = 0
    acts[..., ALWAYS] = torch.rand(shape[:2], generator=generator) + 0.5
    acts[..., EQUAL] = torch.where(torch.rand(shape[:2], generator=generator) < 0.2, 0.1, 0)
    acts[..., TWICE] = 0
    acts[20, 3, TWICE], acts[20, 4, TWICE] = 1, 2
    acts = acts.where(rows.keep[..., None], 0)
    assert rows.keep[20, 4]
    return acts


@pytest.fixture(scope="module")
def info(rows) -> StoreInfo:
    return StoreInfo(
        model="none", revision=None, hook="none", rule="none", d_sae=D_SAE, n_tokens=rows.n_kept, top_n=6, n_groups=4,
        group_size=3, n_random=5, n_silent=8, window=WINDOW, seed=5, bos_id=None, text_sha256="", dictionary_sha256="",
        options={}, token_norm=None,
    )  # fmt: skip


def numbers(codes: Codes, rows, info) -> FeatureTensors:
    return reduced(codes, rows, info).tensors


def collected(folder, acts, rows, per_batch: int = 7, order_seed: int = 0, sample: Sample | None = None) -> Codes:
    """Return the codes on disk, so many rows at a time, in any order."""
    filled = CodeLog(folder / "0" / "0", D_SAE, sample=sample)
    filled.open()
    order = torch.randperm(N_SEQ, generator=torch.Generator().manual_seed(order_seed))
    for number, chosen in enumerate(order.split(per_batch)):
        keep = rows.keep[chosen]
        place = (chosen[:, None] * N_CTX + torch.arange(N_CTX))[keep]
        filled.add(number, place, SparseCodes.from_dense(acts[chosen][keep]))
    filled.sync()
    filled.close()
    return Codes([filled], [True], folder / "0" / "sorted.bin")


@pytest.fixture(scope="module")
def found(tmp_path_factory, acts, rows, info) -> FeatureTensors:
    return numbers(collected(tmp_path_factory.mktemp("codes"), acts, rows), rows, info)


def fired(acts, latent: int) -> list[tuple[float, int, int]]:
    """Return (activation, row, position) in the order of the text."""
    return [(acts[r, p, latent].item(), r, p) for r, p in acts[..., latent].nonzero().tolist()]


def nearby(acts, latent: int, row: int, position: int) -> list[float]:
    """Return activations in the window, 0 outside the row."""
    around = range(position - WINDOW[0], position + WINDOW[1] + 1)
    return [acts[row, p, latent].item() if 0 <= p < N_CTX else 0.0 for p in around]


def places(x: torch.Tensor) -> list[tuple[int, int]]:
    return [divmod(place, N_CTX) for place in x.tolist() if place != NONE]


def test_the_case_is_hard_enough(acts):
    counts = (acts > 0).sum((0, 1))
    assert counts[SILENT] == 0
    assert counts[counts > 0].min() == 2
    assert sum(len(set(v for v, _, _ in fired(acts, i))) < counts[i] for i in range(D_SAE)) > 15


def test_counts_moments_and_histograms(found, acts):
    for latent in range(D_SAE):
        values = [v for v, _, _ in fired(acts, latent)]
        n = len(values)
        assert found.count[latent] == n
        mean = math.fsum(values) / max(n, 1)
        std, *higher = (math.fsum((v - mean) ** k for v in values) / max(n, 1) for k in (2, 3, 4))
        std = math.sqrt(std)
        varies = len(set(values)) > 1
        skew, kurtosis = (higher[0] / std**3, higher[1] / std**4 - 3) if varies else (0, 0)
        for name, expected in (("mean", mean), ("std", std if varies else 0), ("skew", skew), ("kurtosis", kurtosis)):
            assert getattr(found, name)[latent].item() == pytest.approx(expected, rel=1e-6, abs=1e-6), name
        largest = max(values, default=0)
        expected = [0] * N_BINS
        for v in values:
            expected[min(int(Fraction(v) * N_BINS / Fraction(largest)), N_BINS - 1)] += 1
        assert found.histogram[latent].tolist() == expected
        assert found.bin_width[latent].item() == pytest.approx(largest / N_BINS, rel=1e-6)


def test_strongest_contexts(found, acts):
    for latent in range(D_SAE):
        best = {}
        for v, r, p in fired(acts, latent):
            if r not in best or v > best[r][0]:
                best[r] = (v, r, p)
        expected = sorted(best.values(), key=lambda entry: (-entry[0], entry[1]))[:6]
        assert places(found.top_place[latent]) == [(r, p) for _, r, p in expected]
        assert found.top_value[latent].tolist() == [v for v, _, _ in expected] + [0] * (6 - len(expected))
        shown = [nearby(acts, latent, r, p) for _, r, p in expected]
        assert found.top_nearby[latent].tolist() == shown + [[0] * 7] * (6 - len(expected))


def test_groups_hold_equally_many_and_contexts_come_from_their_group(found, acts):
    for latent in range(D_SAE):
        ordered = sorted(fired(acts, latent), key=lambda entry: (-entry[0], entry[1:]))
        n = len(ordered)
        for group in range(4):
            members = ordered[n * group // 4 : n * (group + 1) // 4]
            assert found.group_count[latent, group] == len(members)
            limits = (found.group_low[latent, group].item(), found.group_high[latent, group].item())
            assert limits == ((members[-1][0], members[0][0]) if members else (0, 0))
            drawn = places(found.group_place[latent, group])
            assert len(set(drawn)) == len(drawn) == min(3, len(members))
            ranks = [[entry[1:] for entry in members].index(place) for place in drawn]
            assert ranks == sorted(ranks)
            for (r, p), around in zip(drawn, found.group_nearby[latent, group].tolist(), strict=False):
                assert around == nearby(acts, latent, r, p)


def test_random_contexts_are_of_firing_tokens(found, acts):
    for latent in range(D_SAE):
        everywhere = [(r, p) for _, r, p in fired(acts, latent)]
        drawn = places(found.random_place[latent])
        assert len(drawn) == min(5, len(everywhere))
        assert drawn == sorted(set(drawn))
        assert set(drawn) <= set(everywhere)
        for (r, p), around in zip(drawn, found.random_nearby[latent].tolist(), strict=False):
            assert around == nearby(acts, latent, r, p)


def test_silent_contexts_are_silent(found, acts, rows):
    for latent in range(D_SAE):
        drawn = places(found.silent_place[latent])
        assert len(set(drawn)) == len(drawn)
        assert all(rows.keep[place] for place in drawn)
        assert all(sum(nearby(acts, latent, *place)) == 0 for place in drawn)
    assert [len(places(found.silent_place[latent])) for latent in (SILENT, TWICE, ALWAYS)] == [8, 8, 0]


def test_positions(found, acts, rows):
    bands = list(zip(found.band_low.tolist(), found.band_high.tolist(), strict=True))
    assert bands == [(0, 0), (1, 1), (2, 3), (4, 7), (8, 15), (16, 19)]
    for band, (low, high) in enumerate(bands):
        assert found.band_tokens[band] == rows.keep[:, low : high + 1].sum()
        for latent in range(D_SAE):
            values = [v for v, _, p in fired(acts, latent) if low <= p <= high]
            assert found.band_count[latent, band] == len(values)
            mean = math.fsum(values) / max(len(values), 1)
            assert found.band_mean[latent, band].item() == pytest.approx(mean, rel=1e-6)


def test_partners(found, acts, rows):
    fires = (acts > 0).flatten(0, 1).double()
    together = (fires.T @ fires).long()
    count = together.diagonal().tolist()
    for latent in range(D_SAE):
        pairs = [(n, other) for other, n in enumerate(together[latent].tolist()) if other != latent and n > 0]
        frequent = sorted(pairs, key=lambda pair: (-pair[0], pair[1]))[:N_PARTNERS]
        by_pmi = [(Fraction(n * rows.n_kept, count[latent] * count[other]), n, other) for n, other in pairs]
        by_pmi = sorted((x for x in by_pmi if x[1] >= MIN_TOGETHER), key=lambda x: (-x[0], x[2]))[:N_PARTNERS]
        for kind, expected in (("frequent", frequent), ("specific", [x[1:] for x in by_pmi])):
            missing = N_PARTNERS - len(expected)
            assert getattr(found, f"{kind}_partner")[latent].tolist() == [other for _, other in expected] + [NONE] * missing
            assert getattr(found, f"{kind}_count")[latent].tolist() == [n for n, _ in expected] + [0] * missing


@pytest.mark.parametrize("max_table", [0, 1 << 24], ids=["searched", "table"])
def test_partners_of_a_long_text_are_those_of_a_sample_of_its_tokens(max_table, found, tmp_path, acts, rows, info, monkeypatch):
    monkeypatch.setattr(code_log, "MAX_LISTS", 200)
    monkeypatch.setattr(code_log, "MAX_TABLE", max_table)
    monkeypatch.setattr(code_log, "MAX_ENTRIES", 500)
    sample = Sample.of(rows.n_kept, seed=3)
    assert sample.share == 200 / rows.n_kept
    place = torch.arange(N_SEQ * N_CTX)
    listed = rows.keep.flatten() & sample.holds(place)
    assert abs(int(listed.sum()) - 200) < 5 * math.sqrt(200)
    again = reduced(collected(tmp_path, acts, rows, sample=sample), rows, info)
    assert again.partner_tokens == int(listed.sum())
    fires = (acts > 0).flatten(0, 1).double()
    together, count = (fires[listed].T @ fires[listed]).long().fill_diagonal_(0), fires.sum(0)
    for latent in range(D_SAE):
        pairs = [(-n, other) for other, n in enumerate(together[latent].tolist()) if n > 0]
        frequent = sorted(pairs)[:N_PARTNERS]
        specific = sorted((n / int(count[other]), other, -n) for n, other in pairs if -n >= MIN_TOGETHER)[:N_PARTNERS]
        for kind, expected in (("frequent", [(j, -n) for n, j in frequent]), ("specific", [x[1:] for x in specific])):
            partner, n = (again.of_latents[f"{kind}_{field}"][latent].tolist() for field in ("partner", "count"))
            assert [pair for pair in zip(partner, n, strict=True) if pair[0] != NONE] == expected
    of_pairs = {"frequent_partner", "frequent_count", "specific_partner", "specific_count"}
    for name, x in found._asdict().items():
        assert name in of_pairs or torch.equal(getattr(again.tensors, name), x), name


@pytest.mark.parametrize("n_logs", [2, 3])
def test_several_logs_are_one(n_logs, found, tmp_path, acts, rows, info, monkeypatch):
    monkeypatch.setattr(code_log, "MAX_ENTRIES", 100)
    logs = []
    for rank in range(n_logs):
        log = CodeLog(tmp_path / str(rank) / "0", D_SAE)
        log.open()
        for row in range(rank, N_SEQ, n_logs):
            keep = rows.keep[row]
            log.add(row, row * N_CTX + keep.nonzero().squeeze(1), SparseCodes.from_dense(acts[row][keep]))
        log.close()
        logs.append(CodeLog(log.folder, D_SAE, log.sizes))  # as another process reads it: without the counts
    again = numbers(Codes(logs, [True] * n_logs, tmp_path / "0" / "sorted.bin"), rows, info)
    assert all(torch.equal(a, b) for a, b in zip(again, found, strict=True))


@pytest.mark.parametrize("gain", [0, 1e9], ids=["lists", "products"])
def test_both_ways_of_counting_pairs(gain, found, tmp_path, acts, rows, info, monkeypatch):
    monkeypatch.setattr(cooccurrence, "DENSE_GAIN", gain)
    again = numbers(collected(tmp_path, acts, rows), rows, info)
    assert all(torch.equal(a, b) for a, b in zip(again, found, strict=True))


def test_neither_batches_nor_blocks_matter(found, tmp_path, acts, rows, info, monkeypatch):
    for name, (per_batch, block, max_entries, cells) in enumerate([(1, 5, 100, 60), (40, 16, 1, 1000), (13, 1000, 1000, 1)]):
        monkeypatch.setattr(code_log, "BLOCK", block)
        monkeypatch.setattr(code_log, "MAX_ENTRIES", max_entries)
        monkeypatch.setattr(cooccurrence, "MAX_CELLS", cells)
        monkeypatch.setattr(cooccurrence, "MAX_PAIRS", cells)
        again = numbers(collected(tmp_path / str(name), acts, rows, per_batch, order_seed=name), rows, info)
        for field, a, b in zip(FeatureTensors._fields, again, found, strict=True):
            assert torch.equal(a, b), field


def test_what_is_drawn_follows_the_seed(found, tmp_path, acts, rows, info):
    again = numbers(collected(tmp_path, acts, rows), rows, info.replace(seed=6))
    for name in ("group_place", "random_place", "silent_place"):
        assert not torch.equal(getattr(again, name), getattr(found, name))
    assert torch.equal(again.top_place, found.top_place)


def test_many_latents_in_few_files(tmp_path):
    wide = CodeLog(tmp_path / "0" / "0", 200_000)
    wide.open()
    codes = SparseCodes.from_dense(torch.zeros(2, 200_000).index_fill(1, torch.tensor([0, 70_000, 199_999]), 1.5))
    wide.add(0, torch.tensor([9, 4]), codes)
    wide.sync()
    count = wide.count()
    assert count.nonzero().squeeze(1).tolist() == [0, 70_000, 199_999]
    entries = [
        (piece.first + int(latent), int(place), float(value))
        for number in range(wide.n_blocks)
        for piece in Codes([wide], [True], tmp_path / "0" / "sorted.bin").pieces(number, count)
        for place, latent, value in zip(*piece.entries[:3], strict=True)
    ]
    assert sorted(entries) == [(latent, place, 1.5) for latent in (0, 70_000, 199_999) for place in (4, 9)]
    wide.close()
    assert len(list((tmp_path / "0" / "0").iterdir())) == 5  # a pass over many dictionaries has all their files open


def test_codes_count_as_they_are_stored(tmp_path):
    """A code that float32 rounds to zero does not fire."""
    made = CodeLog(tmp_path, 3)
    made.open()
    made.add(0, torch.tensor([0]), SparseCodes.from_dense(torch.tensor([[1e-60, 2.0, 0.5]], dtype=torch.float64)))
    made.close()
    assert made.count().tolist() == [0, 1, 1]


def test_uniform_numbers_are_those_of_splitmix64():
    """The mixing function in whole numbers, as published."""

    def mixed(x: int) -> int:
        mask = (1 << 64) - 1
        x = (x + 0x9E3779B97F4A7C15) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    assert mixed(0) == 0xE220A8397B1DCDAF  # the first output of the generator with seed 0
    numbers = torch.arange(-3, 4)
    assert [sampling._mixed(x).item() & ((1 << 64) - 1) for x in numbers] == [mixed(x % (1 << 64)) for x in range(-3, 4)]
    u = sampling.uniform(1, "x", torch.arange(200)[:, None], torch.arange(100))
    assert ((u >= 0) & (u < 1)).all()
    counts = torch.histc(u, 20, 0, 1)
    assert ((counts - 1000).abs() < 5 * math.sqrt(1000)).all()
    assert not torch.equal(u, sampling.uniform(1, "y", torch.arange(200)[:, None], torch.arange(100)))


def test_every_set_of_draws_is_equally_likely():
    n_draws = 20_000
    u = sampling.uniform(0, "test", torch.arange(n_draws)[:, None], torch.arange(3))
    drawn = Counter(map(tuple, sampling.distinct(torch.full((n_draws,), 6), u).tolist()))
    assert len(drawn) == 20  # of 6, 3 in ascending order
    expected = n_draws / 20
    assert all(abs(n - expected) < 5 * math.sqrt(expected) for n in drawn.values())
    few = sampling.distinct(torch.tensor([0, 1, 3]), u[:3])
    assert few.tolist() == [[NONE, NONE, NONE], [0, NONE, NONE], [0, 1, 2]]


def test_bins_do_not_depend_on_rounding():
    """An activation on the border of two bins belongs to the upper one."""
    value = torch.arange(1, N_BINS + 1).float()
    n = len(value)
    rows = TokenRows(torch.zeros(1, n, dtype=torch.long), torch.ones(1, n, dtype=torch.bool))
    info = StoreInfo(
        model="", revision=None, hook="", rule="", d_sae=1, n_tokens=n, top_n=1, n_groups=1, group_size=1, n_random=1,
        n_silent=1, window=(0, 0), bos_id=None, text_sha256="", dictionary_sha256="", options={}, token_norm=None,
    )  # fmt: skip
    entries = reduce.Entries(torch.arange(n), torch.zeros(n, dtype=torch.long), value)
    histogram = reduce.Block(entries, 0, 1, reduce.TextFacts.of(rows), info).reduced()["histogram"]
    assert histogram.tolist() == [[0] + [1] * (N_BINS - 2) + [2]]


def test_a_log_with_too_few_entries_is_damaged(acts, rows, tmp_path):
    """A file that is cut while it is read, and counts of blocks that do not add up."""
    log = collected(tmp_path, acts, rows).logs[0]
    log.check()
    counts = (log.folder / "blocks.bin").read_bytes()
    (log.folder / "blocks.bin").write_bytes(bytes([counts[0] + 1]) + counts[1:])
    with pytest.raises(CorruptFileError, match=r"blocks\.bin counts"):
        log.check()
    (log.folder / "blocks.bin").write_bytes(counts)
    os.truncate(log.folder / "entries.bin", log.sizes["entries.bin"] - 1)
    with pytest.raises(CorruptFileError, match=r"entries\.bin ends too early"):
        list(log.runs(0))
