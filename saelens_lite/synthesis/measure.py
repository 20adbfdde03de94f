"""Measures of a dictionary against planted features.

w_i are the rows of W_dec, d_j the planted directions, and |cos| their absolute cosine. The nearest feature of latent i is the j
with the largest |cos(w_i, d_j)|. All sums are in float64.

| measure | definition |
| --- | --- |
| mcc | mean \\|cos\\| over one-to-one pairs of latents and features whose sum is largest (Hungarian method) |
| uniqueness | number of different nearest features, as a share of the latents |
| precision | share of its firings at which the nearest feature of a latent is active; the mean over all latents |
| recall | share of the activations with the nearest feature at which a latent fires; the mean over all latents |
| f1 | harmonic mean of precision and recall of a latent; the mean over all latents |
| explained_variance | 1 − Σ‖x − x̂‖² / Σ‖x − mean‖² |
| l0, true_l0 | latents that fire, and features that are active, for an activation |
| dead | share of the latents that never fire |
| shrinkage | mean ‖x̂‖ / ‖x‖ |

There are min(d_sae, n_features) pairs in mcc. A dictionary with fewer latents than there are features is not blamed for the
others. Precision, recall and f1 of a latent are 0 where they would be 0 / 0, so dead latents lower them. The matching of mcc is
one to one; that of f1 is not, so that copies of a latent all count. A latent that splits a feature has high precision and low
recall, one that merges features low precision.

Intervals come from a Poisson bootstrap over blocks of independent activations. mcc and uniqueness depend on W_dec alone.

Source: Chanin and Garriga-Alonso 2026, arXiv:2602.14687, section 4; the definitions are those of SAELens 6.54.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from saelens_lite.codes import SparseCodes
from saelens_lite.dictionary import Dictionary
from saelens_lite.errors import ConfigError
from saelens_lite.evaluation.sums import Metric, poisson_weights, with_interval
from saelens_lite.seeds import mixed_seed
from saelens_lite.synthesis.report import SyntheticReport
from saelens_lite.synthesis.source import SyntheticSource, Truth

BLOCK = 64  # activations that the bootstrap draws together
REPLICATES = 200
FEWEST = 2048  # activations, for a bootstrap of 32 blocks
SMALLEST_NORM = 1e-6  # of an activation that counts for shrinkage


class Decoded(NamedTuple):
    """Activations with their truth, and what a dictionary makes of them."""

    truth: Truth
    codes: SparseCodes
    x_hat: Float[Tensor, "n d_in"]


@torch.no_grad()
def decoded(dictionary: Dictionary, truth: Truth) -> Decoded:
    """Return what a dictionary makes of activations."""
    x = truth.x.to(dictionary.W_dec.device)
    codes = dictionary.encode(x)
    return Decoded(truth, codes, dictionary.decode(codes, x))


@torch.no_grad()
def score(
    source: SyntheticSource, W_dec: Float[Tensor, "d_sae d_in"], pieces: Iterable[Decoded], seed: int = 0
) -> SyntheticReport:
    """Return the measures of a dictionary of any tool, given its decoder, its codes and its reconstructions.

    Args:
        pieces: activations with their truth from `SyntheticSource.pieces`, in order, each of PIECE rows but for the last.
    """
    cosine = cosines(W_dec, source.directions)
    largest, nearest = cosine.max(1)
    sums = [_block_sums(piece, nearest) for piece in pieces]
    blocks = {name: torch.cat([one[name] for one in sums]) for name in sums[0]}
    weights = poisson_weights(mixed_seed("synthetic", "bootstrap", seed), range(len(blocks["n"])), REPLICATES).double().T
    weights = torch.cat([torch.ones_like(weights[:1]), weights])
    per_latent = _detection(blocks, weights)
    values = _pooled({name: weights @ value for name, value in blocks.items() if name not in LATENT_SUMS})
    metrics = {
        "mcc": fixed(float(matched_cosines(cosine).mean())),
        "uniqueness": fixed(len(nearest.unique()) / len(nearest)),
        "precision": with_interval(per_latent.precision),
        "recall": with_interval(per_latent.recall),
        "f1": with_interval(per_latent.f1),
        **{name: with_interval(value) for name, value in values.items()},
        "dead": fixed(float((blocks["fires"].sum(0) == 0).double().mean())),
    }
    order = ("mcc", "uniqueness", "precision", "recall", "f1", "explained_variance", "l0", "true_l0", "dead", "shrinkage")
    return SyntheticReport(
        {name: metrics[name] for name in order},
        n=int(blocks["n"].sum()),
        settings=source.config.model_dump(mode="json"),
        feature=nearest.cpu(),
        cosine=largest.cpu(),
        f1=per_latent.f1_of_each.float(),
    )


def fixed(value: float) -> Metric:
    """Return a value that does not depend on the activations."""
    return Metric(value, math.nan, math.nan)


def cosines(
    W_dec: Float[Tensor, "d_sae d_in"], directions: Float[Tensor, "n_features d_in"]
) -> Float[Tensor, "d_sae n_features"]:
    """Return the absolute cosine of each latent with each feature, on the CPU; 0 for latents without a direction."""
    unit = F.normalize(W_dec.detach().double(), dim=1)
    return (unit.float() @ directions.to(unit.device).T).abs().cpu()


def matched_cosines(cosine: Float[Tensor, "d_sae n_features"]) -> Float[Tensor, " n_pairs"]:
    """Return the absolute cosines of the one-to-one pairs whose sum is largest.

    Raises:
        ConfigError: scipy is not installed.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise ConfigError("measuring the MCC needs scipy: pip install 'saelens-lite[analysis]'") from None
    numbers = cosine.numpy()
    latent, feature = linear_sum_assignment(numbers, maximize=True)
    return torch.from_numpy(numbers[latent, feature]).double()


LATENT_SUMS = ("fires", "active", "both")


def _block_sums(piece: Decoded, nearest: Int[Tensor, " d_sae"]) -> dict[str, Float[Tensor, "n_blocks ..."]]:
    """Return the sums over each block of BLOCK rows, in float64 on the CPU."""
    truth, codes = piece.truth, piece.codes.detach().without_zeros()
    x, x_hat = truth.x.double().cpu(), piece.x_hat.detach().double().cpu()
    n_blocks, d_sae, n_features = -(-len(x) // BLOCK), codes.d_sae, truth.codes.d_sae
    row, latent = codes.row.cpu(), codes.latent.cpu()
    active = torch.zeros(len(x), n_features, dtype=torch.bool)
    active[truth.codes.row.cpu(), truth.codes.latent.cpu()] = True
    is_right = active[row, nearest.cpu()[latent]]

    def counted(row: Int[Tensor, " n"], column: Int[Tensor, " n"], n_columns: int) -> Float[Tensor, "n_blocks n_columns"]:
        counts = torch.bincount(row // BLOCK * n_columns + column, minlength=n_blocks * n_columns)
        return counts.view(n_blocks, n_columns).double()

    def summed(values: Float[Tensor, "n ..."]) -> Float[Tensor, "n_blocks ..."]:
        return torch.stack([part.sum(0) for part in values.split(BLOCK)])

    norm = x.norm(dim=1)
    has_norm = norm > SMALLEST_NORM
    return {
        "fires": counted(row, latent, d_sae),
        "active": counted(truth.codes.row.cpu(), truth.codes.latent.cpu(), n_features)[:, nearest.cpu()],
        "both": counted(row[is_right], latent[is_right], d_sae),
        "n": summed(torch.ones(len(x), dtype=torch.float64)),
        "l0": summed(codes.l0.double().cpu()),
        "true_l0": summed(truth.codes.l0.double().cpu()),
        "x": summed(x),
        "square": summed(x.square().sum(1)),
        "error": summed((x - x_hat).square().sum(1)),
        "ratio": summed(torch.where(has_norm, x_hat.norm(dim=1) / norm.clamp(min=SMALLEST_NORM), 0.0)),
        "n_ratio": summed(has_norm.double()),
    }


class Detected(NamedTuple):
    """Precision, recall and F1, the mean over latents; entry 0 is the value, the others are replicates."""

    precision: Float[Tensor, " replicates"]
    recall: Float[Tensor, " replicates"]
    f1: Float[Tensor, " replicates"]
    f1_of_each: Float[Tensor, " d_sae"]


def _detection(blocks: dict[str, Float[Tensor, "n_blocks ..."]], weights: Float[Tensor, "replicates n_blocks"]) -> Detected:
    fires, active, both = (weights @ blocks[name] for name in LATENT_SUMS)
    f1 = _ratio(2 * both, fires + active)
    return Detected(_ratio(both, fires).mean(1), _ratio(both, active).mean(1), f1.mean(1), f1[0])


def _ratio(part: Float[Tensor, "..."], whole: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return a quotient, and 0 where it would be 0 / 0."""
    return torch.where(whole > 0, part / whole.clamp(min=1e-300), 0.0)


def _pooled(sums: dict[str, Float[Tensor, "replicates ..."]]) -> dict[str, Float[Tensor, " replicates"]]:
    n = sums["n"]
    variance = sums["square"] - sums["x"].square().sum(1) / n
    return {
        "explained_variance": 1 - sums["error"] / variance,
        "l0": sums["l0"] / n,
        "true_l0": sums["true_l0"] / n,
        "shrinkage": sums["ratio"] / sums["n_ratio"],
    }
