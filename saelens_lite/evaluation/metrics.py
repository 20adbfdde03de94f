"""Metric definitions: sums that are collected per sequence, and the metrics that are computed from them.

All sums are float64, and pooled over all kept tokens before any ratio is taken. sums.py adds them, with bootstrap weights.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from saelens_lite.codes import SparseCodes
from saelens_lite.evaluation.replicates import COLUMNS, Replicates, Units
from saelens_lite.evaluation.sums import CHUNK_LATENTS, Metric, PooledSums

CHUNK_LOGITS = 1 << 23  # logits that are processed at a time
DENSE = 0.1  # a latent that fires on a larger share of the tokens is dense


class Kept(NamedTuple):
    """The places of the tokens of a batch that count, and the number of sequences."""

    row: Int[Tensor, " n_kept"]
    position: Int[Tensor, " n_kept"]
    n: int

    @classmethod
    def of(cls, keep: Bool[Tensor, "n pos"]) -> "Kept":
        """Return the places at which `keep` is true."""
        return cls(*keep.nonzero(as_tuple=True), len(keep))

    def of_each(self, x: Shaped[Tensor, "n pos ..."]) -> Shaped[Tensor, "n_kept ..."]:
        """Return the entries of x for these tokens."""
        return x[self.row, self.position]

    def per_sequence(self, values: Shaped[Tensor, "n_kept ..."]) -> Float[Tensor, "n ..."]:
        """Return the sums over the tokens of each sequence."""
        return _sums_of_runs(values.double(), torch.bincount(self.row, minlength=self.n))


def _sums_of_runs(values: Float[Tensor, "n_values ..."], lengths: Int[Tensor, " n"]) -> Float[Tensor, "n ..."]:
    """Return the sums over consecutive runs of values. Unlike index_add_, this has a fixed order of additions on a GPU."""
    return torch.segment_reduce(values, "sum", lengths=lengths, axis=0)


def add_activations(
    sums: PooledSums, x: Float[Tensor, "n_kept d"], center: Float[Tensor, " d"], kept: Kept
) -> Float[Tensor, " n_kept"]:
    """Collect the sums that depend only on the activations, and return ‖x − center‖² of each token.

    Sums are of x − center, so that with a center near the mean the variance is not a difference of large numbers.
    """
    shifted = x - center
    square = shifted.square().sum(-1, dtype=torch.float64)
    sums.add("n", kept.per_sequence(torch.ones_like(square)))
    sums.add("x", kept.per_sequence(shifted))
    sums.add("x_square", kept.per_sequence(square))
    return square


def add_reconstruction(
    sums: PooledSums,
    name: str,
    x: Float[Tensor, "n_kept d"],
    x_hat: Float[Tensor, "n_kept d"],
    square: Float[Tensor, " n_kept"],
    kept: Kept,
) -> Float[Tensor, " n_kept"]:
    """Collect the sums of a reconstruction, and return its squared errors. Tokens with x_hat = 0 count as cosine 0.

    Args:
        square: ‖x − mean‖² of each token, from `add_activations`.
    """
    error = (x - x_hat).square().sum(-1, dtype=torch.float64)
    dot = (x * x_hat).sum(-1, dtype=torch.float64)
    norm, norm_hat = (torch.linalg.vector_norm(t, dim=-1, dtype=torch.float64) for t in (x, x_hat))
    cosine = torch.where((norm > 0) & (norm_hat > 0), dot / (norm * norm_hat).clamp_min(1e-300), 0)
    ratio = torch.where(norm > 0, norm_hat / norm.clamp_min(1e-300), 0)
    legacy = 1 - torch.where(square > 0, error / square, math.nan)
    for key, value in {
        "error": error, "legacy": legacy, "cosine": cosine, "ratio": ratio, "dot": dot, "norm_hat": norm_hat.square(),
    }.items():  # fmt: skip
        sums.add(f"{name}.{key}", kept.per_sequence(value))
    return error


def add_parts(
    sums: PooledSums, x: Float[Tensor, "n_kept d"], center: Float[Tensor, " d"], parts: Iterable[slice], kept: Kept
) -> None:
    """Collect the sums of `add_activations` for parts of the columns, such as those of a port."""
    for part in parts:
        square = (x[:, part] - center[part]).square().sum(-1, dtype=torch.float64)
        sums.add(f"{_label(part)}.x_square", kept.per_sequence(square))


def add_part_errors(
    sums: PooledSums,
    name: str,
    x: Float[Tensor, "n_kept d"],
    x_hat: Float[Tensor, "n_kept d"],
    parts: Iterable[slice],
    kept: Kept,
) -> None:
    """Collect the squared errors of a reconstruction in parts of the columns."""
    for part in parts:
        error = (x[:, part] - x_hat[:, part]).square().sum(-1, dtype=torch.float64)
        sums.add(f"{name}.{_label(part)}.error", kept.per_sequence(error))


def part_metrics(sums: PooledSums, name: str, parts: Sequence[slice]) -> dict[str, Metric]:
    """Return mse, fvu and explained_variance in some parts of the columns together; see `reconstruction_metrics`."""
    n, x = sums["n"], sums["x"]
    error = sum(sums[f"{name}.{_label(part)}.error"] for part in parts)
    variance = sum(sums[f"{_label(part)}.x_square"] - x[:, part].square().sum(-1) / n for part in parts)
    values = {"mse": error / n, "fvu": error / variance, "explained_variance": 1 - error / variance}
    return {key: sums.metric(value) for key, value in values.items()}


def _label(part: slice) -> str:
    return f"columns {part.start} to {part.stop}"


def add_codes(sums: PooledSums, name: str, codes: SparseCodes, kept: Kept) -> None:
    """Collect the number of latents that fire on the kept tokens, the sum of their codes, and the count of each latent."""
    codes = codes.without_zeros()
    sequence = kept.row[codes.row]
    count = torch.bincount(sequence, minlength=kept.n)
    sums.add(f"{name}.l0", count)
    sums.add(f"{name}.l1", _sums_of_runs(codes.value.double().abs(), count))
    sums.add_fired(name, sequence, codes.latent, codes.d_sae)


def reconstruction_metrics(sums: PooledSums, name: str) -> dict[str, Metric]:
    """Return the metrics of `reconstruction_values` with their intervals."""
    return {key: sums.metric(value) for key, value in reconstruction_values(sums, name).items()}


def reconstruction_values(sums: PooledSums, name: str) -> dict[str, Float[Tensor, " replicates"]]:
    """Return the metrics of the codes and the reconstruction, of the text and of each bootstrap replicate.

    l0 is the mean number of latents that fire on a token, and l1 the mean sum of their codes.
    mse = mean over tokens of Σ_d (x − x̂)².
    fvu = Σ‖x − x̂‖² / (N (E‖x‖² − ‖E x‖²)), so predicting the mean scores exactly 1. explained_variance = 1 − fvu.
    explained_variance_legacy = mean over tokens of 1 − ‖x − x̂‖² / ‖x − E x‖². Other tools use the mean of each batch for E x;
    here it is the mean of all kept tokens, so batches do not matter. It is NaN if a token equals E x.
    cossim and l2_ratio are means over tokens of cos(x, x̂) and ‖x̂‖ / ‖x‖.
    relative_reconstruction_bias = E‖x̂‖² / E x·x̂ (Rajamanoharan et al. 2024).
    """
    n = sums["n"]
    variance = sums["x_square"] - sums["x"].square().sum(-1) / n
    fvu = sums[f"{name}.error"] / variance
    return {
        "l0": sums[f"{name}.l0"] / n,
        "l1": sums[f"{name}.l1"] / n,
        "mse": sums[f"{name}.error"] / n,
        "fvu": fvu,
        "explained_variance": 1 - fvu,
        "explained_variance_legacy": sums[f"{name}.legacy"] / n,
        "cossim": sums[f"{name}.cosine"] / n,
        "l2_ratio": sums[f"{name}.ratio"] / n,
        "relative_reconstruction_bias": sums[f"{name}.norm_hat"] / sums[f"{name}.dot"],
    }


def density(sums: PooledSums, name: str) -> Float[Tensor, " d_sae"]:
    """Return the share of the tokens on which each latent fires."""
    return (sums.fired(name)[:, 0] / sums["n"][0]).float()


def alive_values(sums: PooledSums, name: str) -> Float[Tensor, " replicates"]:
    """Return the share of latents that fire at all, and replicates of it that vary as it does over texts of as many tokens.

    To count again in a resample would not do: it loses latents but never finds one, so the counts vary far too little. The
    jackknife asks what the count loses without sequence u, which is n_u, the number of latents that fire in u alone. Replicate
    b is the count + Σ_u w_b(u) (n_u − f t_u / T), with f = Σ n_u, t_u tokens in u and T in all. Its variance is at least that
    of the count, in expectation, and near it if most of these latents are rare.

    A latent fires in one sequence alone if its counts in the replicates are multiples of that on the text. Each replicate lets
    about half of the others pass, so with ten or more of them hardly any is mistaken.
    Source: Efron and Stein 1981, The jackknife estimate of variance; Good 1953 (latents seen once tell of those not seen).
    """
    fired = sums.fired(name)
    n = sums["n"][: fired.shape[1]]
    alive, alone = torch.zeros((), dtype=torch.float64), torch.zeros_like(n)
    for counts in fired.split(CHUNK_LATENTS):
        alive += (counts[:, 0] > 0).sum()
        weight = counts / counts[:, :1]  # NaN for latents that never fire
        alone += weight[(weight == weight.round()).all(1)].sum(0)
    return (alive + alone - alone[0] * n / n[0]) / len(fired)


def latent_metrics(sums: PooledSums, name: str) -> dict[str, Metric]:
    """Return frac_alive and frac_dense: the shares of latents that fire at all, and on more than a tenth of the tokens.

    The interval of frac_alive is the value ± 1.96 standard deviations, with the variance of the replicates of `alive_values`
    and of two latents more: few latents that fire in one sequence alone, or none, may be few by chance.
    Source: Wilson 1927 (an interval of a count needs about 1.96² / 2 more).
    """
    fired, alive = sums.fired(name), alive_values(sums, name)
    dense = (fired > DENSE * sums["n"][: fired.shape[1]]).sum(0).double() / len(fired)
    value, low, high = sums.metric(alive)
    if math.isfinite(low):
        spread = 1.96 * sums.widening * math.hypot(float(alive[1:].std(correction=0)), 2**0.5 / len(fired))
        low, high = max(0.0, value - spread), min(1.0, value + spread)
    return {
        "frac_alive": Metric(value, low, high),
        "frac_dense": sums.metric(dense),
    }


def membership(band: Int[Tensor, " n_kept"], n_bands: int) -> Float[Tensor, "n_kept n_bands"]:
    """Return 1 where a token belongs to a band, else 0."""
    return F.one_hot(band, n_bands).double()


def add_bands(
    sums: PooledSums,
    name: str,
    x: Float[Tensor, "n_kept d"],
    center: Float[Tensor, " d"],
    square: Float[Tensor, " n_kept"],
    member: Float[Tensor, "n_kept n_bands"],
    kept: Kept,
) -> None:
    """Collect the sums of `add_activations` for each band of tokens."""
    x_of_band = torch.stack([kept.per_sequence((x - center) * column[:, None]) for column in member.unbind(1)], dim=1)
    sums.add(f"{name}.n", kept.per_sequence(member))
    sums.add(f"{name}.x", rearrange(x_of_band, "n band d -> n (band d)"))
    sums.add(f"{name}.x_square", kept.per_sequence(member * square[:, None]))


def add_band_values(
    sums: PooledSums, name: str, values: Float[Tensor, " n_kept"], member: Float[Tensor, "n_kept n_bands"], kept: Kept
) -> None:
    """Collect the sums of a value of each token over each band."""
    sums.add(name, kept.per_sequence(member * values[:, None]))


def band_fvu(sums: PooledSums, bands: str, name: str) -> list[Metric]:
    """Return the fvu of each band b of tokens.

    fvu_b = Σ_b ‖x − x̂‖² / Σ_b ‖x − m‖², where m is the mean of all kept tokens. So the fvu of the whole text is the mean of
    the bands, weighted by their share of its variance, and predicting m scores exactly 1 in each band.
    """
    n = sums[f"{bands}.n"]  # [replicates n_bands]
    x = rearrange(sums[f"{bands}.x"], "r (b d) -> r b d", b=n.shape[1])
    mean = sums["x"] / sums["n"][:, None]
    variance = sums[f"{bands}.x_square"] - 2 * torch.einsum("rbd,rd->rb", x, mean) + n * mean.square().sum(-1, keepdim=True)
    return [sums.metric(column) for column in (sums[f"{name}.{bands}.error"] / variance).unbind(1)]


def band_ce(sums: PooledSums, bands: str, name: str) -> list[Metric]:
    """Return CE_sae − CE_clean (nats) of the predictions made from each band of tokens."""
    increase = sums[f"{name}.{bands}.ce"] / sums[f"{bands}.predictions"]
    return [sums.metric(column) for column in increase.unbind(1)]


class Predictions(NamedTuple):
    """The predictions of a pass without replacement, and the next tokens.

    log_p and the logits it is compared with begin at position `first`. A prediction counts if the token it is made from
    counts. `has_target` is false at the last position of a row, which has no next token.
    """

    log_p: Float[Tensor, "n n_logits d_vocab"]
    target: Int[Tensor, " n_kept"]
    has_target: Bool[Tensor, " n_kept"]
    kept: Kept
    first: int = 0

    @classmethod
    def of(
        cls,
        logits: Float[Tensor, "n n_logits d_vocab"],
        tokens: Int[Tensor, "n pos"],
        length: Int[Tensor, " n"],
        kept: Kept,
        first: int = 0,
    ) -> "Predictions":
        """Return the predictions of a clean pass. The logits may be overwritten.

        Args:
            length: length of each row, whose first tokens are `tokens`.
        """
        log_p = logits.float().contiguous()  # else flatten would return a copy
        for row in log_p.flatten(0, 1).split(_chunk(log_p)):
            row.copy_(row.log_softmax(-1))
        return cls(log_p, kept.of_each(tokens.roll(-1, 1)), kept.position < length[kept.row] - 1, kept, first)

    def clean_losses(self) -> Float[Tensor, " n_kept"]:
        """Return −log p of the next token (nats), or 0 for tokens without a next one."""
        cross_entropy = -self.log_p[self.kept.row, self.kept.position - self.first, self.target].double()
        return cross_entropy * self.has_target

    def losses(
        self, logits: Float[Tensor, "n_or_1 n_logits d_vocab"]
    ) -> tuple[Float[Tensor, " n_kept"], Float[Tensor, " n_kept"]]:
        """Return the cross-entropy of the next token and KL(clean ‖ new) for other logits, in nats.

        Logits of a single row are used for all rows.
        """
        cross_entropy, kl = [], []
        for some in torch.arange(len(self.target), device=logits.device).split(_chunk(logits)):
            row, position = self.kept.row[some], self.kept.position[some] - self.first
            new = logits[row if len(logits) == self.kept.n else torch.zeros_like(row), position].float().log_softmax(-1)
            cross_entropy.append(-new.gather(1, self.target[some, None]).squeeze(1).double())
            divergence = F.kl_div(new, self.log_p[row, position], reduction="none", log_target=True)
            kl.append(divergence.sum(-1, dtype=torch.float64))
        return torch.cat(cross_entropy) * self.has_target, torch.cat(kl)


def _chunk(logits: Tensor) -> int:
    return max(1, CHUNK_LOGITS // logits.shape[-1])


def add_clean(sums: PooledSums, predictions: Predictions, label: str = "") -> Float[Tensor, " n_kept"]:
    """Collect and return the cross-entropies of a clean pass. label: ends the names of the sums."""
    cross_entropy = predictions.clean_losses()
    sums.add(f"clean{label}.ce", predictions.kept.per_sequence(cross_entropy))
    sums.add(f"n_predictions{label}", predictions.kept.per_sequence(predictions.has_target))
    return cross_entropy


def add_losses(
    sums: PooledSums, name: str, predictions: Predictions, logits: Float[Tensor, "n_or_1 n_logits d_vocab"]
) -> Float[Tensor, " n_kept"]:
    """Collect the losses of the predictions under a replacement, and return the cross-entropies."""
    cross_entropy, kl = predictions.losses(logits)
    sums.add(f"{name}.ce", predictions.kept.per_sequence(cross_entropy))
    sums.add(f"{name}.kl", predictions.kept.per_sequence(kl))
    return cross_entropy


def prediction_metrics(sums: PooledSums, name: str, label: str = "", clean: str = "") -> dict[str, Metric]:
    """Return the metrics of `prediction_values` with their intervals."""
    return {key: sums.metric(value) for key, value in prediction_values(sums, name, label, clean).items()}


def prediction_values(sums: PooledSums, name: str, label: str = "", clean: str = "") -> dict[str, Float[Tensor, " replicates"]]:
    """Return the losses (nats) with and without replacement, and the share of an ablation's loss that is recovered.

    ce_loss_score = (CE_zero − CE_sae) / (CE_zero − CE_clean) and kl_div_score = (KL_zero − KL_sae) / KL_zero, with zeros at all
    positions of the hook. ce_loss_score_mean and kl_div_score_mean use the mean of the kept tokens at all positions instead.
    Scores are ratios of pooled means. KL is KL(clean ‖ new) over all kept tokens, including those at the end of a row.

    Args:
        label, clean: the ends of the names of the sums with replacement, and of those of the clean pass.
    """
    n, n_kept = sums[f"n_predictions{clean}"], sums["n"]
    replaced = {key: f"{source}{label}" for key, source in (("sae", name), ("zero", "zero"), ("mean", "mean"))}
    ce = {"clean": sums[f"clean{clean}.ce"] / n} | {key: sums[f"{source}.ce"] / n for key, source in replaced.items()}
    kl = {key: sums[f"{source}.kl"] / n_kept for key, source in replaced.items()}
    return {
        "ce_loss_score": (ce["zero"] - ce["sae"]) / (ce["zero"] - ce["clean"]),
        "ce_loss_score_mean": (ce["mean"] - ce["sae"]) / (ce["mean"] - ce["clean"]),
        "kl_div_score": (kl["zero"] - kl["sae"]) / kl["zero"],
        "kl_div_score_mean": (kl["mean"] - kl["sae"]) / kl["mean"],
        **{f"ce_{key}": value for key, value in ce.items()},
        **{f"kl_{key}": value for key, value in kl.items()},
    }


def kept_replicates(sums: PooledSums, name: str, weights: str, units: Units, *, with_losses: bool) -> Replicates | None:
    """Return the replicates of the metrics that tables show; None if there is one unit to draw, or without a bootstrap."""
    if sums.n_units < 2 or not sums.n_bootstrap:
        return None
    values = reconstruction_values(sums, name) | {"frac_alive": alive_values(sums, name)}
    values |= prediction_values(sums, name) if with_losses else {}
    steps = {"frac_alive": 1 / len(sums.fired(name))}
    return Replicates.of_values(weights, {key: value for key, value in values.items() if key in COLUMNS}, steps, units)
