"""Statistics of latents from the weights, against dense float64 computations."""

from types import SimpleNamespace

import pytest
import torch
from scipy import stats

import saelens_lite as sl
from saelens_lite.errors import NonFiniteError
from saelens_lite.features import weights
from saelens_lite.features.weights import N_LOGIT_BINS, LatentWeights, latent_weights

D_MODEL, D_SAE = 48, 90  # d_model of random_lm
HOOK = "blocks.1.hook_resid_pre"


@pytest.fixture(scope="module")
def dictionary() -> sl.Dictionary:
    """Latent 5 is a copy of 6, 7 points away from it, 8 has no direction, 9 writes skewed effects."""
    d = sl.Dictionary.create("topk", reads=sl.Port(hook=HOOK, width=D_MODEL), d_sae=D_SAE, options={"k": 4}, seed=3)
    generator = torch.Generator().manual_seed(4)
    d.W_enc.data += 0.3 * torch.randn(D_MODEL, D_SAE, generator=generator)
    d.W_dec.data[5] = 2 * d.W_dec[6]
    d.W_dec.data[7] = -d.W_dec[6]
    d.W_dec.data[8] = 0
    return d


@pytest.fixture(params=[None, 7], ids=["one tile", "7 latents a tile of cosines, 1 of effects"])
def found(request, dictionary, random_lm, monkeypatch) -> LatentWeights:
    if request.param:
        monkeypatch.setattr(weights, "MAX_NUMBERS", request.param * D_SAE)
    return latent_weights(dictionary, random_lm)


def exact_logits(dictionary, lm) -> torch.Tensor:
    """Return effects in float64, through the norm's scale and centring written out."""
    norm = lm.module.transformer.ln_f
    head = lm.module.lm_head.weight.double()
    through = dictionary.W_dec.double() * norm.weight.double()
    through = through - dictionary.W_dec.double().mean(1, keepdim=True) * norm.weight.double()
    return (through @ head.T).detach()


def test_effects_are_those_through_the_final_norm(found, dictionary, random_lm):
    """Up to a constant for each latent, which no difference of logits sees."""
    logits = exact_logits(dictionary, random_lm)
    for ids, effects, order in (
        (found.promoted, found.promoted_effect, logits.argsort(1, descending=True)),
        (found.suppressed, found.suppressed_effect, logits.argsort(1)),
    ):
        expected = logits.gather(1, order[:, :10])
        shown = logits.gather(1, ids.long())
        torch.testing.assert_close(shown, expected, rtol=0, atol=1e-5)  # tokens of equal effect may change places
        torch.testing.assert_close(effects.double(), shown, rtol=0, atol=1e-5)


def test_raw_unembedding_is_the_plain_product(dictionary, random_lm):
    found = latent_weights(dictionary, random_lm, raw_unembedding=True)
    logits = (dictionary.W_dec.double() @ random_lm.module.lm_head.weight.double().T).detach()
    torch.testing.assert_close(found.promoted_effect.double(), logits.topk(10, dim=1).values, rtol=0, atol=1e-5)
    folded = latent_weights(dictionary, random_lm)
    assert float((found.promoted_effect - folded.promoted_effect).abs().max()) > 0.01


def test_histogram_counts_every_token(found, dictionary, random_lm):
    """An effect within rounding of an edge may fall on either side of it."""
    logits = exact_logits(dictionary, random_lm)
    assert found.logit_histogram.sum(1).tolist() == [random_lm.d_vocab] * D_SAE
    for i in set(range(D_SAE)) - {8}:
        low, width = float(logits[i].min()), float(logits[i].max() - logits[i].min()) / N_LOGIT_BINS
        assert float(found.logit_low[i]) == pytest.approx(low, rel=1e-5)
        assert float(found.logit_width[i]) == pytest.approx(width, rel=1e-5)
        edges = low + width * torch.arange(1, N_LOGIT_BINS, dtype=torch.float64)
        counted = found.logit_histogram[i].cumsum(0)[:-1]
        below, at_most = ((logits[i, :, None] < edges + slack).sum(0) for slack in (-1e-6, 1e-6))
        assert bool(((below <= counted) & (counted <= at_most)).all())


def test_skew_and_kurtosis_are_scipys(found, dictionary, random_lm):
    logits = exact_logits(dictionary, random_lm)
    chosen = [i for i in range(D_SAE) if i != 8]
    expected = torch.from_numpy(stats.skew(logits[chosen].numpy(), axis=1))
    torch.testing.assert_close(found.logit_skew[chosen].double(), expected, rtol=0, atol=1e-5)
    expected = torch.from_numpy(stats.kurtosis(logits[chosen].numpy(), axis=1))
    torch.testing.assert_close(found.logit_kurtosis[chosen].double(), expected, rtol=0, atol=1e-5)


def test_a_latent_without_direction_has_no_shape(found, random_lm):
    assert found.promoted_effect[8].tolist() == found.suppressed_effect[8].tolist() == [0] * 10
    assert found.logit_histogram[8].tolist() == [random_lm.d_vocab] + [0] * (N_LOGIT_BINS - 1)
    assert [float(x[8]) for x in (found.logit_low, found.logit_width, found.logit_skew, found.logit_kurtosis)] == [0] * 4
    assert found.decoder_cosine[8].tolist() == [0] * 10
    assert float(found.encoder_decoder_cosine[8]) == 0


def test_a_latent_of_almost_no_direction(random_lm):
    """Weight decay leaves numbers so small that their inverse overflows."""
    d = sl.Dictionary.create("topk", reads=D_MODEL, d_sae=3, options={"k": 1})
    d.W_dec.data[1] *= 1e-38
    found = latent_weights(d, random_lm)
    assert found.logit_histogram.sum(1).tolist() == [random_lm.d_vocab] * 3
    assert all(torch.isfinite(x).all() for x in found if x.is_floating_point())


def exact_cosines(rows: torch.Tensor) -> torch.Tensor:
    unit = torch.nn.functional.normalize(rows.detach().double(), dim=1)
    return unit @ unit.T


@pytest.mark.parametrize("side", ["decoder", "encoder"])
def test_neighbours_are_the_nearest_of_all(found, dictionary, side):
    cosines = exact_cosines(dictionary.W_dec if side == "decoder" else dictionary.W_enc.T)
    ids, values = getattr(found, f"{side}_neighbours").long(), getattr(found, f"{side}_cosine").double()
    assert not (ids == torch.arange(D_SAE)[:, None]).any()
    assert all(len(set(row)) == 10 for row in ids.tolist())
    torch.testing.assert_close(values, cosines.gather(1, ids), rtol=0, atol=1e-6)
    expected = cosines.fill_diagonal_(-torch.inf).topk(10, dim=1).values
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-6)


def test_tiles_of_cosines_change_no_neighbour(monkeypatch):
    """Tiles of all shapes, with the diagonal anywhere in them, against all cosines in float64."""
    units = torch.nn.functional.normalize(torch.randn(D_SAE, 12, generator=torch.Generator().manual_seed(0)))
    expected = (units.double() @ units.T.double()).fill_diagonal_(-torch.inf).topk(weights.N_NEIGHBOURS)
    for numbers, rows in [(1 << 24, 1024), (100, 7), (100, 3), (60, 60), (1, 1), (2000, 11)]:
        monkeypatch.setattr(weights, "MAX_NUMBERS", numbers)
        monkeypatch.setattr(weights, "MIN_ROWS", rows)
        indices, cosines = weights.nearest(units)
        assert torch.equal(indices.long(), expected.indices)
        torch.testing.assert_close(cosines.double(), expected.values, rtol=1e-5, atol=1e-6)


def test_a_gpu_has_larger_tiles(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 << 30))
    assert weights.cosines_at_once(torch.device("cuda", 1)) * 4 == (80 << 30) // 64
    assert weights.cosines_at_once(torch.device("cpu")) == weights.MAX_NUMBERS


def test_planted_neighbours(found):
    assert int(found.decoder_neighbours[5, 0]) == 6
    assert int(found.decoder_neighbours[6, 0]) == 5
    assert float(found.decoder_cosine[5, 0]) == pytest.approx(1, abs=1e-6)
    assert not {5, 6} & set(found.decoder_neighbours[7].tolist())  # opposite, not near


def test_encoder_decoder_cosine(found, dictionary):
    expected = torch.nn.functional.cosine_similarity(dictionary.W_enc.T.double(), dictionary.W_dec.double())
    torch.testing.assert_close(found.encoder_decoder_cosine.double(), expected.detach(), rtol=0, atol=1e-6)


def test_a_transcoder_acts_by_its_output(random_lm):
    """Read at a hook of another width, written to the stream."""
    d = sl.Dictionary.create("topk", reads=20, writes=D_MODEL, d_sae=30, options={"k": 4})
    found = latent_weights(d, random_lm)
    torch.testing.assert_close(
        found.promoted_effect.double(), exact_logits(d, random_lm).topk(10, dim=1).values, rtol=0, atol=1e-5
    )
    assert found.encoder_decoder_cosine.shape == (0,)
    assert found.encoder_neighbours.shape == (30, 10)


def test_what_is_not_written_to_the_stream_has_no_effects(random_lm):
    """Among them a transcoder that only reads it."""
    for d_in, d_out in ((64, None), (D_MODEL, 64)):
        d = sl.Dictionary.create("topk", reads=d_in, writes=d_out, d_sae=30, options={"k": 4})
        found = latent_weights(d, random_lm)
        for name in ("promoted", "promoted_effect", "suppressed", "suppressed_effect", "logit_histogram"):
            assert getattr(found, name).shape == (30, 0)
        for name in ("logit_low", "logit_width", "logit_skew", "logit_kurtosis"):
            assert getattr(found, name).shape == (0,)
        assert found.decoder_neighbours.shape == (30, 10)


def test_fewer_latents_than_neighbours(random_lm):
    d = sl.Dictionary.create("topk", reads=D_MODEL, d_sae=3, options={"k": 1})
    assert latent_weights(d, random_lm).decoder_neighbours.sort(1).values.tolist() == [[1, 2], [0, 2], [0, 1]]


def test_weights_must_be_finite(random_lm):
    d = sl.Dictionary.create("topk", reads=D_MODEL, d_sae=8, options={"k": 1})
    d.W_dec.data[3, 3] = torch.nan
    with pytest.raises(NonFiniteError, match="W_dec"):
        latent_weights(d, random_lm)
