"""Facts about latents that follow from weights alone: their effects on the logits, and their nearest latents.

    effect of latent i on the logits = W_dec[i] · W_Uᵀ        (W_U with the final norm's scale folded in, or raw)

The computation runs tile by tile, so that neither all effects nor all cosines are in memory at once.
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
from saelens_lite.model.models import AnyModel, Models
from saelens_lite.ports import apart
from saelens_lite.progress import progress_bar

N_EFFECTS = 10  # most promoted and most suppressed tokens kept for a latent
N_LOGIT_BINS = 48
N_NEIGHBOURS = 10
MAX_NUMBERS = 1 << 24  # effects or cosines in memory at once; on a GPU, more cosines
MIN_ROWS = 1024  # latents whose cosines are computed at once; fewer would make slow products
IN_CACHE = 8  # latents whose effects fit in a processor's cache while they are counted
log = logging.getLogger(__name__)


class LatentWeights(NamedTuple):
    """Facts about each latent that follow from the weights of a dictionary and its model.

    An effect is the change of a token's logit for one unit of activation. Promoted and suppressed tokens come strongest first.
    Bin j of the histogram counts the tokens with an effect in [logit_low + j · logit_width, logit_low + (j + 1) · logit_width);
    the last bin also counts the largest effect. Kurtosis is excess kurtosis. Neighbours come nearest first.

    Tensors of facts that do not exist are empty. n_effects, n_bins and n_acting are 0 without direct effects on the logits: the
    output is not as wide as the residual stream, or the logits are not linear in the normalised stream. n_both is 0 if encoder
    and decoder have different widths.
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
def latent_weights(dictionary: Dictionary, lm: AnyModel | None, *, raw_unembedding: bool = False) -> LatentWeights:
    """Return the facts about each latent that follow from the weights, on the CPU.

    Effects on logits are those of the last port that the dictionary writes, in its own model; without a model, their tensors
    are empty.

    Args:
        raw_unembedding: Compute effects with the raw W_U, without the scale (and centring) of the model's final norm.

    Raises:
        NonFiniteError: a parameter of the dictionary is NaN or infinite.
    """
    dictionary.check_finite()
    decoder, encoder = F.normalize(dictionary.W_dec.float()), F.normalize(dictionary.W_enc.T.float())
    same_width = decoder.shape == encoder.shape
    last = dictionary.writes[-1].model
    effects = logit_effects(apart(dictionary.W_dec.float(), dictionary.writes)[-1], unembedding_of(lm, last, raw_unembedding))
    numbers = (
        *effects,
        *nearest(decoder, "decoder neighbours"),
        *nearest(encoder, "encoder neighbours"),
        (decoder * encoder).sum(1) if same_width else decoder.new_zeros(0),
    )
    return LatentWeights(*(x.cpu() for x in numbers))


def unembedding_of(lm: AnyModel | None, name: str | None, raw: bool) -> Float[Tensor, "d_vocab d_model"]:
    """Return W_U of a model, or of the one with that name among several, for the token ids that all of them have.

    Without a model, or with a warning if logits are not linear in the stream, return an empty matrix.
    """
    if lm is None:
        return torch.zeros(0, 0)
    one = lm[name] if isinstance(lm, Models) else lm
    try:
        return one.unembedding(fold_norm=not raw)[: lm.d_vocab]
    except ConfigError as error:
        log.warning("no effects on logits: %s", error)
        return torch.zeros(0, 0, device=lm.device)


def logit_effects(
    directions: Float[Tensor, "d_sae d_out"], unembedding: Float[Tensor, "d_vocab d_model"], n: int = N_EFFECTS
) -> Effects:
    """Return the effects of directions on the logits, with the n tokens at either end; empty if the widths differ."""
    if directions.shape[1] != unembedding.shape[1]:
        none = directions.new_zeros(len(directions), 0)
        return Effects(none.int(), none, none.int(), none, none.int(), *[none.new_zeros(0)] * 4)
    n = min(n, len(unembedding))
    directions = directions.to(unembedding.device)
    tiles = _tiles(directions, len(unembedding), "effects on logits")
    size = IN_CACHE if directions.device.type == "cpu" else len(directions)  # a GPU waits for the start of small kernels
    parts = [_effects(few, n) for tile in tiles for few in (directions[tile] @ unembedding.T).split(size)]
    return Effects(*(torch.cat(field) for field in zip(*parts, strict=True)))


def _effects(logits: Float[Tensor, "few d_vocab"], n: int) -> Effects:
    """Return the effects of a few latents from their effects on all logits, which are overwritten."""
    high, low = logits.topk(n, dim=1), logits.topk(n, dim=1, largest=False)
    smallest, largest = low.values[:, 0], high.values[:, 0]
    width = (largest - smallest) / N_LOGIT_BINS
    histogram = _histogram(logits, smallest, width)
    skew, kurtosis = _shape(logits)
    return Effects(high.indices.int(), high.values, low.indices.int(), low.values, histogram, smallest, width, skew, kurtosis)


def _histogram(
    x: Float[Tensor, "rows columns"], low: Float[Tensor, " rows"], width: Float[Tensor, " rows"]
) -> Int[Tensor, "rows n_bins"]:
    """Return the counts of each row's numbers in bins from `low` on; nearly equal numbers all go to the first bin."""
    per_unit = (1 / width).nan_to_num(posinf=0)  # also 0 for widths near zero
    cell = ((x - low[:, None]) * per_unit[:, None]).int().clamp_(max=N_LOGIT_BINS - 1)
    cell += N_LOGIT_BINS * torch.arange(len(x), dtype=torch.int32, device=x.device)[:, None]
    counts = torch.bincount(cell.flatten(), minlength=len(x) * N_LOGIT_BINS)
    return rearrange(counts.int(), "(rows n_bins) -> rows n_bins", rows=len(x))


def _shape(x: Float[Tensor, "rows columns"]) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]:
    """Return the skew and excess kurtosis of each row, 0 if all its numbers are equal. Overwrite x."""
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
    """Return, for each unit vector, the n others with the largest cosines, and the cosines. Zero vectors have cosine 0."""
    n, numbers, parts = min(n, len(units) - 1), cosines_at_once(units.device), []
    n_columns = max(min(len(units), numbers // MIN_ROWS), 1)
    for tile in _tiles(units, n_columns, what, numbers):
        bests = []
        for start in range(0, len(units), n_columns):
            cosines = units[tile] @ units[start : start + n_columns].T
            cosines[max(start - tile.start, 0) :, max(tile.start - start, 0) :].diagonal().fill_(-torch.inf)  # with itself
            best = cosines.topk(min(n, cosines.shape[1]), dim=1)
            bests.append((best.values, best.indices + start))
        values, indices = (torch.cat(x, 1) for x in zip(*bests, strict=True))
        if len(bests) > 1:
            values, order = values.topk(n, dim=1)
            indices = indices.gather(1, order)
        parts.append((indices.int(), values))
    indices, values = (torch.cat(x) for x in zip(*parts, strict=True))
    return indices, values


def cosines_at_once(device: torch.device) -> int:
    """Return how many cosines should be in memory at once: on a GPU, they take a sixty-fourth of its memory.

    This depends on the size of its memory, not on how much is free, so that results do not change from run to run.
    """
    if device.type != "cuda":
        return MAX_NUMBERS
    return max(MAX_NUMBERS, torch.cuda.get_device_properties(device).total_memory // 256)


def _tiles(rows: Float[Tensor, "n d"], n_columns: int, what: str, numbers: int = 0) -> Iterator[slice]:
    """Yield slices of rows that have at most `numbers` entries (0: MAX_NUMBERS) with `n_columns` columns; show progress."""
    size = max(1, (numbers or MAX_NUMBERS) // n_columns)
    with progress_bar(what, len(rows), "latents") as advance:
        for start in range(0, len(rows), size):
            tile = slice(start, min(start + size, len(rows)))
            yield tile
            advance(tile.stop - tile.start)
