"""Comparing dictionaries: planted matchings are found exactly, random ones are at chance, bad input says so."""

import itertools
import json
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import saelens_lite as sl
from saelens_lite.errors import ConfigError, CorruptFileError, NonFiniteError, OutputExistsError, ShapeError
from saelens_lite.features import compare as module
from saelens_lite.features.compare import Comparison, Directions, Stability, random_like
from saelens_lite.features.info import weights_hash
from saelens_lite.features.tensors import NONE
from saelens_lite.tables import as_text

D_IN, D_SAE = 32, 60
METHODS = ["hungarian", "mutual"]


def make(d_sae: int = D_SAE, d_in: int = D_IN, seed: int = 0) -> sl.Dictionary:
    """Return a dictionary whose decoder and encoder directions are random and independent of each other."""
    d = sl.Dictionary.create("topk", reads=d_in, d_sae=d_sae, options={"k": 4}, seed=seed)
    d.W_enc.data.copy_(torch.randn(d_in, d_sae, generator=torch.Generator().manual_seed(1000 + seed)))
    return d


def permuted(d: sl.Dictionary, order: torch.Tensor, noise: float = 0.0, seed: int = 5) -> sl.Dictionary:
    """Return a dictionary whose latent i is latent order[i] of `d`, at another scale, each direction disturbed a little."""
    generator = torch.Generator().manual_seed(seed)
    other = make(len(order), d.d_in)
    for name, rows in (("W_dec", d.W_dec), ("W_enc", d.W_enc.T)):
        unit = torch.nn.functional.normalize(rows.data[order], dim=1)
        disturbed = unit + noise * torch.randn(unit.shape, generator=generator) / d.d_in**0.5
        scaled = disturbed * (0.5 + torch.rand(len(order), 1, generator=generator))
        getattr(other, name).data.copy_(scaled if name == "W_dec" else scaled.T)
    return other


def shuffle(n: int, seed: int = 3) -> torch.Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_a_planted_permutation_is_recovered(method, noise):
    a, order = make(), shuffle(D_SAE)
    c = sl.compare(a, permuted(a, order, noise), method=method)
    for found in (c.pairs.match, c.pairs.encoder_match, c.pairs.nearest):
        torch.testing.assert_close(found, order.argsort())
    assert c.shared.all()
    assert c.pairs.mutual.all()
    assert c.summary[:5] == (D_SAE, D_SAE, 1.0, 1.0, 1.0)
    expected = 1 / (1 + noise**2) ** 0.5  # the noise is nearly orthogonal to the direction it is added to
    assert c.summary.decoder.mean == pytest.approx(expected, abs=0.03)
    assert c.summary.encoder.mean == pytest.approx(expected, abs=0.03)


def test_cosines_are_those_of_a_float64_reference():
    a, b = make(), make(40, seed=1)
    c = sl.compare(a, b)

    def unit(rows):
        rows = rows.detach().double()
        return rows / rows.square().sum(1, keepdim=True).sqrt()

    decoder, encoder = unit(a.W_dec) @ unit(b.W_dec).T, unit(a.W_enc.T) @ unit(b.W_enc.T).T
    matched = (c.pairs.match != NONE).nonzero().squeeze(1)
    assert len(matched) == 40 == len(set(c.pairs.match[matched].tolist()))
    for found, wanted in ((c.pairs.decoder_cosine, decoder), (c.pairs.encoder_cosine, encoder)):
        torch.testing.assert_close(found[matched].double(), wanted[matched, c.pairs.match[matched]], atol=1e-6, rtol=0)
        assert (found[c.pairs.match == NONE] == 0).all()
    torch.testing.assert_close(c.pairs.nearest_cosine.double(), decoder.max(1).values, atol=1e-6, rtol=0)
    torch.testing.assert_close(c.pairs.nearest, decoder.argmax(1))
    torch.testing.assert_close(c.pairs.mutual, decoder.argmax(0)[decoder.argmax(1)] == torch.arange(D_SAE))
    quantiles = torch.quantile(c.pairs.decoder_cosine[matched].double(), torch.tensor(module.QUANTILES).double())
    assert c.summary.decoder.quantiles == pytest.approx(quantiles.tolist())
    assert sum(c.summary.decoder.histogram) == 40
    assert sum(c.summary.nearest.histogram) == D_SAE
    low = int((c.pairs.decoder_cosine[matched] < 0.5).sum())
    assert sum(c.summary.decoder.histogram[:15]) == low  # bins are 0.1 wide, from -1


def test_the_hungarian_matching_is_the_best_of_all():
    a, b = make(6), make(6, seed=1)
    c = sl.compare(a, b, method="hungarian")
    cosines = torch.nn.functional.normalize(a.W_dec.data, dim=1) @ torch.nn.functional.normalize(b.W_dec.data, dim=1).T
    best = max(itertools.permutations(range(6)), key=lambda order: float(cosines[range(6), order].sum()))
    assert c.pairs.match.tolist() == list(best)


def test_tiles_change_nothing(monkeypatch):
    a, b = make(), make(45, seed=1)
    whole = sl.compare(a, b, method="mutual")
    monkeypatch.setattr(module, "TILE", 7)
    tiled = sl.compare(a, b, method="mutual")
    for one, other in zip(whole.pairs, tiled.pairs, strict=True):
        torch.testing.assert_close(one, other)


def test_shared_needs_decoder_and_encoder():
    a = make()
    b = permuted(a, torch.arange(D_SAE))
    b.W_enc.data[:, :10] = make(seed=9).W_enc.data[:, :10]  # write the same, read something else
    b.W_dec.data[10:15] = make(seed=9).W_dec.data[10:15]  # the other way round
    c = sl.compare(a, b, threshold=0.9)
    assert c.shared.tolist() == [False] * 15 + [True] * (D_SAE - 15)
    assert c.summary.shared == pytest.approx(1 - 15 / D_SAE)
    assert (c.pairs.decoder_cosine[:10] > 0.99).all()


def test_independent_random_dictionaries_are_at_chance():
    a, b = make(400, 64), make(400, 64, seed=1)
    c = sl.compare(a, b)
    assert c.summary.shared == c.chance.shared == 0
    assert c.summary.decoder.mean == pytest.approx(c.chance.decoder.mean, abs=0.02)
    assert c.summary.nearest.mean == pytest.approx(c.chance.nearest.mean, abs=0.02)
    assert c.summary.mutual == pytest.approx(c.chance.mutual, abs=0.1)  # 3 standard deviations of a share of 400
    planted = sl.compare(a, permuted(a, shuffle(400)))
    assert planted.summary.decoder.mean > 2 * planted.chance.decoder.mean


def test_the_random_dictionary_prefers_the_same_subspace():
    """In two dimensions of 32, random latents of the other's moments are near each other where isotropic ones would not be."""
    plane = torch.linalg.qr(torch.randn(D_IN, 2, generator=torch.Generator().manual_seed(0))).Q.T
    a, b = make(), make(seed=1)
    for d, seed in ((a, 2), (b, 3)):
        d.W_dec.data.copy_(torch.randn(D_SAE, 2, generator=torch.Generator().manual_seed(seed)) @ plane)
    chance = sl.compare(a, b).chance
    assert chance.decoder.mean > 0.85
    assert chance.encoder.mean < 0.5


def test_random_directions_lie_as_the_others_do():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(20_000, 3, generator=generator) * torch.tensor([3.0, 1.0, 0.1])
    unit = torch.nn.functional.normalize(rows, dim=1)
    drawn = random_like(Directions(unit, -unit), seed=1)
    torch.testing.assert_close(drawn.decoder, -drawn.encoder)
    moments = [x.T @ x / len(x) for x in (unit, drawn.decoder)]
    assert (moments[0] - moments[1]).abs().max() < 0.16  # scaling to unit length moves the moments a little
    assert moments[1][0, 0] > 1.5 * moments[1][1, 1] > 10 * moments[1][2, 2]
    torch.testing.assert_close(drawn.decoder.norm(dim=1), torch.ones(20_000))


def test_dead_latents_do_not_count():
    a = make()
    b = permuted(a, torch.arange(D_SAE))
    a.density = torch.full((D_SAE,), 0.1)
    a.density[:6] = 0
    b.density = torch.full((D_SAE,), 0.1)
    b.density[4:16] = 0
    c = sl.compare(a, b)
    assert c.n_dead == (6, 12)
    assert c.summary.n_latents == 54
    assert c.summary.n_matched == 48
    assert c.pairs.match[16:].tolist() == list(range(16, D_SAE))
    assert (c.pairs.match[:6] == NONE).all()
    assert not c.pairs.mutual[:6].any()
    assert not set(c.pairs.match.tolist()) & set(range(6, 16))  # nobody is matched with a dead one
    assert c.summary.shared == pytest.approx(44 / 54)
    assert sl.compare(a, b, include_dead=True).summary.shared == 1
    a.density = torch.zeros(D_SAE)
    with pytest.raises(ConfigError, match=r"all 60 have density 0; include_dead=True"):
        sl.compare(a, b)


def test_rows_of_zeros_are_like_nothing():
    a = make()
    b = permuted(a, torch.arange(D_SAE))
    b.W_dec.data[3] = 0
    a.W_enc.data[:, 5] = 0
    c = sl.compare(a, b)
    assert (~c.shared).nonzero().squeeze(1).tolist() == [3, 5]
    assert c.pairs.decoder_cosine[3] == c.pairs.encoder_cosine[5] == 0
    assert torch.isfinite(c.pairs.nearest_cosine).all()


def test_large_dictionaries_are_matched_by_mutual_neighbours(monkeypatch):
    monkeypatch.setattr(module, "MOST_HUNGARIAN", 50)
    a = make()
    assert sl.compare(a, make(40, seed=1)).method == "mutual"
    a.density = (torch.arange(D_SAE) < 50).float()
    assert sl.compare(a, make(40, seed=1)).method == "hungarian"


def test_others_of_all_sizes_are_matched_by_one_method(monkeypatch):
    monkeypatch.setattr(module, "MOST_HUNGARIAN", 65)
    assert sl.stability(make(), [make(40, seed=1), make(70, seed=2)]).method == "mutual"
    assert sl.stability(make(), [make(40, seed=1), make(65, seed=2)]).method == "hungarian"


def test_the_random_dictionary_is_drawn_in_tiles(monkeypatch):
    """Its moments are those of all rows, whatever the tiles."""
    unit = torch.nn.functional.normalize(torch.randn(200, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    whole = random_like(Directions(unit, -unit), seed=1)
    monkeypatch.setattr(module, "TILE", 64)
    tiled = random_like(Directions(unit, -unit), seed=1)
    torch.testing.assert_close(tiled.decoder, -tiled.encoder)
    torch.testing.assert_close(tiled.decoder[:192], whole.decoder[:192])  # numbers are drawn 16 at a time


def test_different_hooks_are_compared_with_a_warning(caplog):
    a, b = make(), make(seed=1)
    a.origin = b.origin = sl.Origin(model="m")
    a.reads = b.reads = a.writes = b.writes = (sl.Port(hook="one", width=a.d_in),)
    sl.compare(a, b)
    assert not caplog.text
    b.reads = b.writes = (sl.Port(hook="two", width=a.d_in),)
    sl.compare(a, b)
    assert "hooks: one and two" in caplog.text


def trained(seed: int | None, weights: int, hook: str = "blocks.1.hook_resid_pre") -> sl.Dictionary:
    """Return a dictionary with random weights whose record says that it was trained with a seed."""
    d = sl.Dictionary.create("topk", reads=sl.Port(hook=hook, width=D_IN), d_sae=D_SAE, options={"k": 4}, seed=weights)
    d.training_record = {} if seed is None else {"config": {"seed": seed, "d_sae": D_SAE}}
    return d


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        ((0, 0), (1, 1), None),
        ((None, 0), (None, 1), None),
        ((None, 0), (0, 1), None),
        ((0, 0), (0, 1), "the compared dictionaries were both trained with seed 0, so they began with the same directions"),
        ((0, 0), (1, 0), "the compared dictionaries have the same weights, so they agree in everything"),
        ((None, 0), (None, 0), "the compared dictionaries have the same weights"),
    ],
)
def test_agreement_that_is_no_evidence_is_said(one, other, said, caplog):
    sl.compare(trained(*one), trained(*other))
    assert (said in caplog.text) if said else not caplog.records


def test_the_one_of_several_that_is_no_evidence_is_named(caplog):
    sl.stability(trained(0, 0), [trained(1, 1), trained(0, 2)])
    assert [record.getMessage()[:70] for record in caplog.records] == [
        "the dictionary and number 2 of the others were both trained with seed "
    ]


def test_the_directions_are_compared_on_the_named_device(monkeypatch):
    """The device goes where the default is decided, and its default is not the CPU's."""
    asked = []
    monkeypatch.setattr(module, "chosen_device", lambda device: asked.append(device) or torch.device("cpu"))
    sl.compare(make(), make(seed=1))
    sl.compare(make(), make(seed=1), device="cpu")
    assert asked == [None, "cpu"]
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="device = 'gpu'"):
        sl.compare(make(), make(seed=1), device="gpu")


def test_what_cannot_be_compared():
    a = make()
    with pytest.raises(ShapeError, match=r"widths \(32, 32\) and \(16, 16\) \(read, written\)"):
        sl.compare(a, make(d_in=16))
    broken = make(seed=1)
    broken.W_enc.data[4, 4] = torch.nan
    with pytest.raises(NonFiniteError, match="the encoder of a dictionary"):
        sl.compare(a, broken)
    broken.W_enc.data[4, 4] = torch.inf
    with pytest.raises(NonFiniteError):
        sl.compare(broken, a)
    with pytest.raises(ConfigError, match=r"threshold = 1\.0; expected"):
        sl.compare(a, a, threshold=1.0)
    with pytest.raises(ConfigError, match="method = 'greedy'; expected one of auto, hungarian, mutual"):
        sl.compare(a, a, method="greedy")
    with pytest.raises(ConfigError, match="comparisons of one dictionary with others"):
        sl.stability(a, [])


def test_without_scipy_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ConfigError, match=r"pip install 'saelens-lite\[analysis\]'"):
        sl.compare(make(), make(seed=1))
    assert sl.compare(make(), make(), method="mutual").summary.shared == 1


def test_the_same_seed_gives_the_same_figures():
    a, b = make(), make(seed=1)
    first, again, other = (sl.compare(a, b, seed=seed) for seed in (0, 0, 1))
    assert first.to_dict() == again.to_dict()
    assert first.summary == other.summary
    assert first.chance != other.chance


def test_the_report_as_json(tmp_path):
    a, b = make(), make(40, seed=1)
    c = sl.compare(a, b)
    text = c.to_json(tmp_path / "c.json")
    content = json.loads((tmp_path / "c.json").read_text())
    assert content == json.loads(text)
    assert content["summary"]["decoder"]["mean"] == c.summary.decoder.mean
    assert content["sha256"] == [weights_hash(a), weights_hash(b)]
    assert "40/60    0.0%" in str(c)
    frame = c.to_frame()
    assert frame["match"].tolist() == c.pairs.match.tolist()
    assert frame["nearest_cosine"].tolist() == c.pairs.nearest_cosine.tolist()
    assert int(frame["shared"].sum()) == round(c.summary.shared * 60)


@pytest.fixture
def scores() -> Stability:
    """Latents 0 to 29 are in both others, 30 to 44 in one."""
    a = make()
    first = permuted(a, torch.arange(45), 0.2, seed=1)
    return sl.stability(a, [first, permuted(a, torch.arange(30), 0.2, seed=2)])


def test_stability_without_live_latents_has_a_table(scores):
    none = replace(scores, live=torch.zeros_like(scores.live))
    assert "No latent is live" in as_text(none.table())


def test_stability_counts_the_dictionaries_that_have_a_latent(scores):
    assert scores.n_shared.tolist() == [2] * 30 + [1] * 15 + [0] * 15
    assert scores.shared_in_all == pytest.approx(0.5)
    assert scores.shared_in_none == pytest.approx(0.25)
    assert scores.score[:30].min() > scores.score[30:45].max() > scores.score[45:].max()


def test_the_score_is_the_mean_of_the_nearest_cosines():
    a, b, c = make(), make(50, seed=1), make(40, seed=2)
    a.density = (torch.arange(D_SAE) > 2).float()
    comparisons = [sl.compare(a, other) for other in (b, c)]
    found = sl.stability(a, [b, c])
    expected = (comparisons[0].pairs.nearest_cosine + comparisons[1].pairs.nearest_cosine) / 2
    torch.testing.assert_close(found.score, expected)
    torch.testing.assert_close(Stability.of(comparisons).score, expected)
    assert (found.score[:3] == 0).all()
    assert found.live.tolist() == [False] * 3 + [True] * 57
    assert (found.sha256, found.other_sha256) == (weights_hash(a), (weights_hash(b), weights_hash(c)))
    with pytest.raises(ConfigError, match="all with the same settings"):
        Stability.of([comparisons[0], sl.compare(a, c, threshold=0.5)])


def test_scores_come_back_from_disk(scores, tmp_path):
    path = scores.save(tmp_path / "dictionary")
    assert path == tmp_path / "dictionary/stability.safetensors"
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    loaded = Stability.load(tmp_path / "dictionary")
    for name, value in vars(scores).items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(getattr(loaded, name), value)
        else:
            assert getattr(loaded, name) == value
    with pytest.raises(OutputExistsError):
        scores.save(tmp_path / "dictionary")
    scores.save(tmp_path / "dictionary", exists="overwrite")


def test_damaged_scores_are_found(scores, tmp_path):
    with pytest.raises(CorruptFileError, match=r"stability\.safetensors is missing"):
        Stability.load(tmp_path)
    path = scores.save(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(CorruptFileError, match="truncated"):
        Stability.load(tmp_path)
    path.write_bytes(whole.replace(b'\\"format\\": 1', b'\\"format\\": 9'))
    with pytest.raises(CorruptFileError, match="format 9, this version reads 1"):
        Stability.load(tmp_path)
    save_file({"score": torch.zeros(3)}, path)
    with pytest.raises(CorruptFileError, match="is damaged"):
        Stability.load(tmp_path)


@pytest.mark.parametrize("spoil", [{"score": torch.zeros(7)}, {"n_shared": torch.zeros(D_SAE)}, {"live": torch.zeros(D_SAE)}])
def test_scores_that_do_not_fit_together(scores, tmp_path, spoil):
    from safetensors import safe_open

    path = scores.save(tmp_path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(path) | spoil, path, metadata=metadata)
    with pytest.raises(CorruptFileError, match=r"stability\.safetensors"):
        Stability.load(tmp_path)


@pytest.mark.parametrize(
    "spoil", [{"sha256": 3}, {"other_sha256": "abc"}, {"other_sha256": [1]}, {"threshold": "x"}, {"method": []}, "[" * 200_000]
)
def test_metadata_of_wrong_types(scores, tmp_path, spoil):
    facts = {"format": 1, "sha256": "a", "other_sha256": ["b"], "threshold": 0.7, "method": "mutual"}
    metadata = {"stability": spoil if isinstance(spoil, str) else json.dumps(facts | spoil)}
    save_file(load_file(scores.save(tmp_path)), tmp_path / "stability.safetensors", metadata=metadata)
    with pytest.raises(CorruptFileError, match="is damaged"):
        Stability.load(tmp_path)


def test_a_comparison_is_frozen():
    c = sl.compare(make(), make())
    assert isinstance(c, Comparison)
    with pytest.raises(AttributeError):
        c.threshold = 0.1
