"""Metric definitions: sums that are collected per sequence, and what is computed from them.

All sums are float64, and pooled over all kept tokens before any ratio is taken. A confidence interval comes from a
Poisson bootstrap over sequences (tokens of one text are not independent): replicate b weighs each sequence by a
Poisson(1) draw, so that only the weighted sums have to be kept, whatever the amount of text.
Source: Chamandy, Muralidharan, Najmi and Naidu 2012, Estimating uncertainty for massive data streams.
"""

from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from saelens_lite.codes import SparseCodes


class Metric(NamedTuple):
    """A value and its 95 % bootstrap confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


class PooledSums:
    """Weighted sums over sequences: entry 0 weighs each once, entries 1 … n are bootstrap replicates."""

    def __init__(self, n_bootstrap: int, seed: int):
        self.n_bootstrap = n_bootstrap
        self._generator = torch.Generator().manual_seed(seed)
        self._sums: dict[str, Tensor] = {}
        self._weights = torch.empty(0)

    def next_sequences(self, n: int) -> None:
        """Draw the weights of the next n sequences."""
        drawn = torch.poisson(torch.ones(self.n_bootstrap, n), generator=self._generator)
        self._weights = torch.cat([torch.ones(1, n), drawn]).double()

    def add(self, name: str, per_sequence: Num[Tensor, "n ..."]) -> None:
        """Add sums over the tokens of each sequence (scalars or vectors)."""
        values = per_sequence.double().cpu()
        pooled = self._weights @ values
        self._sums[name] = self._sums[name] + pooled if name in self._sums else pooled

    def __getitem__(self, name: str) -> Float[Tensor, "replicates ..."]:
        return self._sums[name]

    def metric(self, values: Float[Tensor, " replicates"]) -> Metric:
        """Entry 0 and the central 95 % of the replicates."""
        replicates = values[1:][torch.isfinite(values[1:])]
        if not len(replicates):
            return Metric(float(values[0]), float("nan"), float("nan"))
        low, high = torch.quantile(replicates, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        return Metric(float(values[0]), low, high)


def add_activations(sums: PooledSums, x: Float[Tensor, "n pos d"], keep: Bool[Tensor, "n pos"]) -> None:
    """Collect what depends on the activations alone."""
    kept = x.double() * keep[..., None]
    sums.add("n", keep.sum(1))
    sums.add("x", kept.sum(1))
    sums.add("x_square", kept.square().sum((1, 2)))


def add_reconstruction(
    sums: PooledSums,
    name: str,
    x: Float[Tensor, "n pos d"],
    x_hat: Float[Tensor, "n pos d"],
    codes: SparseCodes,
    keep: Bool[Tensor, "n pos"],
) -> None:
    """Collect what a dictionary's codes and reconstruction give; tokens with x_hat = 0 count as cosine 0."""
    x, x_hat = x.double(), x_hat.double()
    norm, norm_hat, dot = x.norm(dim=-1), x_hat.norm(dim=-1), (x * x_hat).sum(-1)
    cosine = torch.where((norm > 0) & (norm_hat > 0), dot / (norm * norm_hat).clamp_min(1e-300), 0)
    ratio = torch.where(norm > 0, norm_hat / norm.clamp_min(1e-300), 0)
    l1 = codes._replace(value=codes.value.abs()).to_dense().double().sum(-1)
    for key, value in {
        "error": (x - x_hat).square().sum(-1), "cosine": cosine, "ratio": ratio, "dot": dot, "norm_hat": norm_hat.square(),
        "l0": codes.l0, "l1": l1,
    }.items():  # fmt: skip
        sums.add(f"{name}.{key}", (value * keep).sum(1))


def reconstruction_metrics(sums: PooledSums, name: str) -> dict[str, Metric]:
    """Metrics of the codes and the reconstruction.

    fvu = Σ‖x − x̂‖² / (N (E‖x‖² − ‖E x‖²)), so that predicting the mean scores exactly 1; explained_variance = 1 − fvu.
    mse = mean over tokens of Σ_d (x − x̂)². relative_reconstruction_bias = E‖x̂‖² / E x·x̂ (Rajamanoharan et al. 2024).
    """
    n = sums["n"]
    variance = sums["x_square"] - sums["x"].square().sum(-1) / n
    fvu = sums[f"{name}.error"] / variance
    values = {
        "l0": sums[f"{name}.l0"] / n,
        "l1": sums[f"{name}.l1"] / n,
        "mse": sums[f"{name}.error"] / n,
        "fvu": fvu,
        "explained_variance": 1 - fvu,
        "cossim": sums[f"{name}.cosine"] / n,
        "l2_ratio": sums[f"{name}.ratio"] / n,
        "relative_reconstruction_bias": sums[f"{name}.norm_hat"] / sums[f"{name}.dot"],
    }
    return {key: sums.metric(value) for key, value in values.items()}


def membership(band: Int[Tensor, "n pos"], n_bands: int, keep: Bool[Tensor, "n pos"]) -> Float[Tensor, "n pos n_bands"]:
    """1 where a kept token belongs to a band, else 0."""
    return (torch.nn.functional.one_hot(band, n_bands) * keep[..., None]).double()


def add_bands(sums: PooledSums, x: Float[Tensor, "n pos d"], member: Float[Tensor, "n pos n_bands"]) -> None:
    """Collect what depends on the activations alone, for each band of tokens."""
    x = x.double()
    sums.add("band.n", member.sum(1))
    sums.add("band.x", rearrange(torch.einsum("npb,npd->nbd", member, x), "n b d -> n (b d)"))
    sums.add("band.x_square", torch.einsum("npb,np->nb", member, x.square().sum(-1)))


def add_band_errors(
    sums: PooledSums,
    name: str,
    x: Float[Tensor, "n pos d"],
    x_hat: Float[Tensor, "n pos d"],
    member: Float[Tensor, "n pos n_bands"],
) -> None:
    """Collect a dictionary's squared errors for each band of tokens."""
    error = (x.double() - x_hat.double()).square().sum(-1)
    sums.add(f"{name}.band.error", torch.einsum("npb,np->nb", member, error))


def band_fvu(sums: PooledSums, name: str) -> list[Metric]:
    """The fvu of each band b of tokens.

    fvu_b = Σ_b ‖x − x̂‖² / Σ_b ‖x − m‖², where m is the mean over all kept tokens: the fvu of the whole text is the mean of
    the bands' weighted by their share of its variance, and predicting m scores exactly 1 in each.
    """
    n = sums["band.n"]  # [replicates n_bands]
    x = rearrange(sums["band.x"], "r (b d) -> r b d", b=n.shape[1])
    mean = sums["x"] / sums["n"][:, None]
    variance = sums["band.x_square"] - 2 * torch.einsum("rbd,rd->rb", x, mean) + n * mean.square().sum(-1, keepdim=True)
    fvu = sums[f"{name}.band.error"] / variance
    return [sums.metric(column) for column in fvu.unbind(1)]


def add_cross_entropy(
    sums: PooledSums, name: str, logits: Float[Tensor, "n pos d_vocab"], tokens: Tensor, keep: Bool[Tensor, "n pos"]
) -> None:
    """Collect the cross-entropy (nats) of each next token; a prediction counts when source and target both count."""
    counted = keep[:, :-1] & keep[:, 1:]
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), tokens[:, 1:], reduction="none")
    sums.add(f"{name}.ce", (losses.double() * counted).sum(1))
    if name == "clean":
        sums.add("n_predictions", counted.sum(1))


def cross_entropy_metrics(sums: PooledSums, name: str) -> dict[str, Metric]:
    """Cross-entropies in nats, and ce_loss_score = (CE_zero − CE_sae) / (CE_zero − CE_clean), a ratio of pooled means."""
    n = sums["n_predictions"]
    clean, zero, spliced = (sums[f"{key}.ce"] / n for key in ("clean", "zero", name))
    values = {"ce_loss_score": (zero - spliced) / (zero - clean), "ce_clean": clean, "ce_sae": spliced, "ce_zero": zero}
    return {key: sums.metric(value) for key, value in values.items()}
