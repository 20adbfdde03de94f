"""Dictionaries whose quality is known, to read the measures of others by.

oracle: the d_sae most frequent features with their true codes, and the mean of the rest as a bias. No dictionary can have a
better MCC, uniqueness or F1; its explained variance is what these features can explain with their own codes.

linear: an encoder that knows the directions. Latent i is the linear function of x that follows the code of feature i one to one
and varies least otherwise, w_i = C⁻¹ d_i / (d_i · C⁻¹ d_i) with the covariance C of x. It fires above the threshold with the
largest F1 on other activations. Encoders of most rules are of this form.

random: random unit directions, of which the same number fires as in the dictionary, scaled to the least squared error.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelens_lite.codes import SparseCodes, Support
from saelens_lite.dictionary import Dictionary
from saelens_lite.evaluation.controls import RANDOM, moments, random_dictionary
from saelens_lite.synthesis.measure import Decoded, decoded, score
from saelens_lite.synthesis.report import SyntheticReport
from saelens_lite.synthesis.source import SyntheticSource, Truth

ORACLE, LINEAR = "oracle", "linear"
N_FIT = 1 << 14  # activations that the controls are fitted on
LATENTS = 256  # thresholds that are chosen at once
SMALLEST_THRESHOLD = 1e-3


def control_reports(source: SyntheticSource, d_sae: int, l0: float, n: int, seed: int) -> dict[str, SyntheticReport]:
    """Return the reports of the controls for a dictionary with d_sae latents of which l0 fire."""
    fitted = source.sample(N_FIT, seed + 1)
    features = most_frequent(fitted, d_sae)
    random = random_dictionary(
        moments([fitted.x], fitted.x.device), fitted.x, d_sae, round(l0), source.origin(), source.config.seed
    )
    linear = linear_dictionary(source, fitted, features)
    reports = {ORACLE: score(source, source.directions[features], oracle(source, fitted, features, n, seed), seed)}
    for name, dictionary in ((LINEAR, linear), (RANDOM, random)):
        reports[name] = score(source, dictionary.W_dec, (decoded(dictionary, piece) for piece in source.pieces(n, seed)), seed)
    return reports


def most_frequent(sample: Truth, n: int) -> Int[Tensor, " n_chosen"]:
    """Return the n features that fire most often in a sample, or all; of equals, those with the smaller number."""
    return sample.codes.fire_counts.argsort(descending=True, stable=True)[:n].sort().values


def oracle(source: SyntheticSource, fitted: Truth, features: Int[Tensor, " n_chosen"], n: int, seed: int) -> Iterator[Decoded]:
    """Yield activations with the true codes of some features; the bias has the mean of all that these do not explain."""
    directions = source.directions[features]
    bias = (fitted.x - chosen(fitted.codes, features).decode(directions)).mean(0)
    for piece in source.pieces(n, seed):
        codes = chosen(piece.codes, features)
        yield Decoded(piece, codes, codes.decode(directions) + bias)


def chosen(codes: SparseCodes, features: Int[Tensor, " n_chosen"]) -> SparseCodes:
    """Return the codes of some features only, numbered from 0."""
    number = torch.full((codes.d_sae,), -1, device=codes.latent.device)
    number[features] = torch.arange(len(features), device=number.device)
    kept = codes.where(number[codes.latent] >= 0)
    return SparseCodes.of(Support(kept.crow, number[kept.latent]), kept.value, len(features))


def linear_dictionary(source: SyntheticSource, fitted: Truth, features: Int[Tensor, " n_chosen"]) -> Dictionary:
    """Return the dictionary of the control `linear`, for some features."""
    stats = moments([fitted.x], fitted.x.device)
    directions, codes = source.directions[features].double(), chosen(fitted.codes, features)
    size = stats.covariance.diagonal().mean()
    ridge = 1e-6 * size * torch.eye(len(stats.mean), dtype=torch.float64, device=stats.mean.device)
    filters = torch.linalg.solve(stats.covariance + ridge, directions.T)
    filters /= (filters * directions.T).sum(0)
    mean_code = torch.zeros(len(features), dtype=torch.float64, device=stats.mean.device)
    mean_code.index_add_(0, codes.latent, codes.value.double())
    offset = mean_code / len(fitted.x) - stats.mean @ filters
    W_enc, b_enc = filters.float(), offset.float()
    threshold = torch.empty(len(features), device=W_enc.device)
    for begin in range(0, len(features), LATENTS):
        part = slice(begin, begin + LATENTS)
        own = chosen(codes, torch.arange(len(features), device=W_enc.device)[part])
        threshold[part] = best_thresholds(fitted.x @ W_enc[:, part] + b_enc[part], own)
    without = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": directions.float()}
    axes = {"W_enc": "d_in d_sae", "W_dec": "d_sae d_out"}
    settings = {"rule": "jumprelu", "threshold": threshold, "subtract_b_dec": False, "axes": axes}
    unbiased = Dictionary.from_tensors(**without, **settings)
    return Dictionary.from_tensors(**without, b_dec=(fitted.x - unbiased(fitted.x)).mean(0), **settings)


def best_thresholds(h: Float[Tensor, "n n_latents"], codes: SparseCodes) -> Float[Tensor, " n_latents"]:
    """Return, for each latent, the positive threshold of h above which it detects its feature with the largest F1."""
    n = len(h)
    ordered, order = h.T.contiguous().sort(descending=True)
    hits = (codes.to_dense() != 0).T.contiguous().gather(1, order).cumsum(1, dtype=torch.int32)
    f1 = 2 * hits / (torch.arange(1, n + 1, device=h.device) + hits[:, -1:])
    best = f1.masked_fill(ordered <= SMALLEST_THRESHOLD, -1.0).argmax(1, keepdim=True)
    last, next_one = ordered.gather(1, best), ordered.gather(1, (best + 1).clamp(max=n - 1))
    return ((last + next_one) / 2).squeeze(1).clamp(min=SMALLEST_THRESHOLD)
