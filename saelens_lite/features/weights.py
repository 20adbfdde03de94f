"""What the weights alone say about latents: their effect on the logits, and which other latents are alike.

    effect of latent i on the logits = W_dec[i] · W_Uᵀ        (W_U with the final norm's scale folded in, or as it is)

Everything goes tile by tile: neither all effects nor all cosines are ever held at once.
"""

import logging
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor

from saelens_lite.dictionary import Dictionary
from saelens_lite.errors import ConfigError
from saelens_lite.model import LanguageModel
from saelens_lite.ports import apart
from saelens_lite.progress import progress_bar

N_EFFECTS = 10  # tokens kept at either end of a latent's effects
N_LOGIT_BINS = 48
N_NEIGHBOURS = 10
MAX_NUMBERS = 1 << 24  # effects or cosines held at once
IN_CACHE = 8  # latents whose effects a processor's cache holds while they are counted
log = logging.getLogger(__name__)


class LatentWeights(NamedTuple):
    """What follows from the weights of a dictionary and its model, for each latent.

    Effects are what one unit of activation adds to a token's logit; promoted and suppressed tokens come strongest first. Bin
    j of the histogram counts the tokens with an effect in [logit_low + j · logit_width, logit_low + (j + 1) · logit_width),
    the last bin also the largest. Kurtosis is that in excess of the normal distribution's. Neighbours come nearest first.

    What does not exist has no entries: n_effects, n_bins and n_acting are 0 where the output is not as wide as the residual
    stream, or the logits are not linear in the normalised stream, so that there are no direct effects on them; n_both is 0
    where encoder and decoder are of different widths.
    """

    promoted: Int[Tensor, "d_sae n_effects"]
    promoted_effect: Float[Tensor, "d_sae n_effects"]
    suppressed: Int[Tensor, "d_sae n_effects"]
    suppressed_effect: Float[Tensor, "d_sae n_effects"]
    logit_histogram: Int[Tensor, "d_sae n_bins"]
    logit_low: Float[Tensor, " n_acting"]
    logit_width: Float[Tensor, " n_acting"]
    logit_skew: Float[Tensor, " n_acting"]
    logit_kurtosis: Float[Tensor, " n_acting"]
    decoder_neighbours: Int[Tensor, "d_sae n_neighbours"]
    decoder_cosine: Float[Tensor, "d_sae n_neighbours"]
    encoder_neighbours: Int[Tensor, "d_sae n_neighbours"]
    encoder_cosine: Float[Tensor, "d_sae n_neighbours"]
    encoder_decoder_cosine: Float[Tensor, " n_both"]


class Effects(NamedTuple):
    """The effects of some latents on the logits; fields as in LatentWeights."""

    promoted: Int[Tensor, "n n_effects"]
    promoted_effect: Float[Tensor, "n n_effects"]
    suppressed: Int[Tensor, "n n_effects"]
    suppressed_effect: Float[Tensor, "n n_effects"]
    logit_histogram: Int[Tensor, "n n_bins"]
    logit_low: Float[Tensor, " n_acting"]
    logit_width: Float[Tensor, " n_acting"]
    logit_skew: Float[Tensor, " n_acting"]
    logit_kurtosis: Float[Tensor, " n_acting"]


@torch.no_grad()
def latent_weights(dictionary: Dictionary, lm: LanguageModel, *, raw_unembedding: bool = False) -> LatentWeights:
    """What the weights say about every latent, on the CPU. Effects on logits are those of the last port that is written.

    raw_unembedding: effects through W_U as it is, without the scale (and centring) of the model's final norm.

    Raises:
        NonFiniteError: a parameter of the dictionary is NaN or infinite.
    """
    dictionary.check_finite()
    decoder, encoder = F.normalize(dictionary.W_dec.float()), F.normalize(dictionary.W_enc.T.float())
    same_width = decoder.shape == encoder.shape
    effects = logit_effects(apart(dictionary.W_dec.float(), dictionary.writes)[-1], _unembedding(lm, raw_unembedding))
    numbers = (
        *effects,
        *nearest(decoder, "decoder neighbours"),
        *nearest(encoder, "encoder neighbours"),
        (decoder * encoder).sum(1) if same_width else decoder.new_zeros(0),
    )
    return LatentWeights(*(x.cpu() for x in numbers))


def _unembedding(lm: LanguageModel, raw: bool) -> Float[Tensor, "d_vocab d_model"]:
    """Return W_U, without rows or columns where the model has none that directions can be multiplied by."""
    try:
        return lm.unembedding(fold_norm=not raw)
    except ConfigError as error:
        log.warning("no effects on logits: %s", error)
        return torch.zeros(0, 0, device=lm.device)


def logit_effects(
    directions: Float[Tensor, "d_sae d_out"], unembedding: Float[Tensor, "d_vocab d_model"], n: int = N_EFFECTS
) -> Effects:
    """The effects of directions on the logits, with the n tokens at either end; no entries where widths differ."""
    if directions.shape[1] != unembedding.shape[1]:
        none = directions.new_zeros(len(directions), 0)
        return Effects(none.int(), none, none.int(), none, none.int(), *[none.new_zeros(0)] * 4)
    n = min(n, len(unembedding))
    directions = directions.to(unembedding.device)
    tiles = _tiles(directions, len(unembedding), "effects on logits")
    found = [_effects(few, n) for tile in tiles for few in (directions[tile] @ unembedding.T).split(IN_CACHE)]
    return Effects(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _effects(logits: Float[Tensor, "few d_vocab"], n: int) -> Effects:
    """The effects of a few latents, of which all logits are given (and overwritten)."""
    high, low = logits.topk(n, dim=1), logits.topk(n, dim=1, largest=False)
    smallest, largest = low.values[:, 0], high.values[:, 0]
    width = (largest - smallest) / N_LOGIT_BINS
    histogram = _histogram(logits, smallest, width)
    skew, kurtosis = _shape(logits)
    return Effects(high.indices.int(), high.values, low.indices.int(), low.values, histogram, smallest, width, skew, kurtosis)


def _histogram(
    x: Float[Tensor, "rows columns"], low: Float[Tensor, " rows"], width: Float[Tensor, " rows"]
) -> Int[Tensor, "rows n_bins"]:
    """The numbers of each row counted into bins from `low` on; all into the first where they are all but equal."""
    per_unit = (1 / width).nan_to_num(posinf=0)  # of widths near zero too
    cell = ((x - low[:, None]) * per_unit[:, None]).int().clamp_(max=N_LOGIT_BINS - 1)
    cell += N_LOGIT_BINS * torch.arange(len(x), dtype=torch.int32, device=x.device)[:, None]
    counts = torch.bincount(cell.flatten(), minlength=len(x) * N_LOGIT_BINS)
    return rearrange(counts.int(), "(rows n_bins) -> rows n_bins", rows=len(x))


def _shape(x: Float[Tensor, "rows columns"]) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]:
    """Skew and excess kurtosis of each row, 0 where all its numbers are equal; x is overwritten."""
    x -= x.mean(1, keepdim=True)
    spread = x.square().mean(1, keepdim=True).sqrt()
    x /= torch.where(spread > 0, spread, 1)
    square, n = x.square(), x.shape[1]
    skew = einsum(square, x, "rows columns, rows columns -> rows") / n
    kurtosis = einsum(square, square, "rows columns, rows columns -> rows") / n - 3
    return skew, torch.where(spread.squeeze(1) > 0, kurtosis, 0)


def nearest(
    units: Float[Tensor, "d_sae d"], what: str = "neighbours", n: int = N_NEIGHBOURS
) -> tuple[Int[Tensor, "d_sae n"], Float[Tensor, "d_sae n"]]:
    """Of each unit vector, the n others of largest cosine and these cosines; zero vectors have cosine 0 with all."""
    n, found = min(n, len(units) - 1), []
    for tile in _tiles(units, len(units), what):
        cosines = units[tile] @ units.T
        own = torch.arange(len(units), device=units.device)[tile, None]
        best = cosines.scatter_(1, own, -torch.inf).topk(n, dim=1)
        found.append((best.indices.int(), best.values))
    indices, cosines = zip(*found, strict=True)
    return torch.cat(indices), torch.cat(cosines)


def _tiles(rows: Float[Tensor, "n d"], n_columns: int, what: str) -> Iterator[slice]:
    """Slices of rows such that so many columns of them fit into MAX_NUMBERS, with a progress bar."""
    size = max(1, MAX_NUMBERS // n_columns)
    with progress_bar(what, len(rows), "latents") as advance:
        for start in range(0, len(rows), size):
            tile = slice(start, min(start + size, len(rows)))
            yield tile
            advance(tile.stop - tile.start)
