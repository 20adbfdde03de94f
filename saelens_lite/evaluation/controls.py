"""Controls to compare a dictionary with: untrained dictionaries of the same size or sparsity, and a damaged copy of its own."""

import copy
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from saelens_lite.config import Origin
from saelens_lite.devices import wide
from saelens_lite.dictionary import Dictionary
from saelens_lite.errors import ConfigError
from saelens_lite.evaluation.sums import ExactSums, run_in_rounds
from saelens_lite.processes import ALONE, Team
from saelens_lite.seeds import permutation

RANDOM, PCA, PERMUTED, REDRAWN = "random", "PCA", "10 % permuted", "shuffled weights"
PERMUTED_SHARE = 0.1  # of the live latents


class MeanAndCovariance(NamedTuple):
    """Mean and covariance of activations."""

    mean: Float[Tensor, " d"]
    covariance: Float[Tensor, "d d"]


def moments(batches: Iterable[Float[Tensor, "_ d"]], device: torch.device, team: Team = ALONE) -> MeanAndCovariance:
    """Return the mean and covariance of the activations in the batches of all processes, in float64 on a device."""
    sums = ExactSums()

    def steps() -> Generator[None, None, None]:
        for x in batches:
            exact = wide(x)
            sums.add("n", torch.tensor(float(len(x)), dtype=torch.float64))
            sums.add("x", exact.sum(0))
            sums.add("products", exact.T @ exact)
            yield

    run_in_rounds(steps(), team)
    sums.pool(team)
    n = float(sums["n"])
    mean = sums["x"] / n
    covariance = sums["products"] / n - torch.outer(mean, mean)
    return MeanAndCovariance(mean.to(device), covariance.to(device))


def pca_dictionary(stats: MeanAndCovariance, n_components: int, origin: Origin) -> Dictionary:
    """Return a dictionary whose x̂ is the mean plus the projection on the first principal components.

    Its latents are the components and their opposites. One of each pair fires on every token, so L0 is `n_components`.
    """
    d_in = len(stats.mean)
    n = max(1, min(n_components, d_in))
    directions = torch.linalg.eigh(stats.covariance).eigenvectors[:, -n:].float()
    both = torch.cat([directions, -directions], dim=1)
    dictionary = Dictionary.create("l1", reads=d_in, d_sae=2 * n, origin=origin).to(both.device)
    dictionary.W_enc.data.copy_(both)
    dictionary.W_dec.data.copy_(both.T)
    dictionary.b_dec.data.copy_(stats.mean)
    return dictionary


def random_dictionary(
    stats: MeanAndCovariance, x: Float[Tensor, "n d"], d_sae: int, k: int, origin: Origin, seed: int
) -> Dictionary:
    """Return a top-k dictionary with random unit directions.

    The rows of W_dec have the norm with the least squared error on x, because overlapping unit vectors would add up to more.
    """
    d_in = len(stats.mean)
    k = max(1, min(k, d_sae))
    dictionary = Dictionary.create("topk", reads=d_in, d_sae=d_sae, options={"k": k}, seed=seed, origin=origin).to(x.device)
    dictionary.b_dec.data.copy_(stats.mean)
    centred, part = x - dictionary.b_dec, dictionary(x) - dictionary.b_dec
    dictionary.W_dec.data.mul_((centred * part).sum() / part.square().sum())
    return dictionary


def untrained(
    stats: MeanAndCovariance, x: Float[Tensor, "n d"], trained: Sequence[Dictionary], l0: Sequence[float]
) -> list[dict[str, Dictionary]]:
    """Return the controls of each dictionary: a random one of its size and L0, and PCA with L0 components.

    x: some of the activations, on which random dictionaries are scaled.
    """
    return [
        {
            RANDOM: random_dictionary(stats, x, d.d_sae, round(n), d.origin, seed=i),
            PCA: pca_dictionary(stats, round(n), d.origin),
        }
        for i, (d, n) in enumerate(zip(trained, l0, strict=True))
    ]


def permuted_dictionary(
    dictionary: Dictionary, density: Float[Tensor, " d_sae"] | None, seed: int, share: float = PERMUTED_SHARE
) -> Dictionary:
    """Return a copy in which the decoder rows of a share of the live latents, but at least two, have changed places.

    Each of these latents fires as before and writes the direction of another: a metric of the decoder that does not tell this
    copy from the dictionary cannot tell right directions from wrong ones. The copy encodes with the dictionary itself, because
    some rules encode with W_decᵀ. It has no training record.

    Args:
        density: the firing frequencies, of which those above 0 are of live latents; None: all latents are live.
    """
    damaged = copy.deepcopy(dictionary)
    alive = range(dictionary.d_sae) if density is None else (density > 0).nonzero().squeeze(1).tolist()
    order = permutation(len(alive), "permuted", seed)[: max(2, round(share * len(alive)))]
    chosen = torch.tensor([alive[i] for i in order.tolist()], dtype=torch.long, device=dictionary.W_dec.device)
    damaged.W_dec.data[chosen] = dictionary.W_dec.data[chosen.roll(1)]  # a single cycle, so no row stays
    damaged.encode = dictionary.encode
    damaged.training_record = {}
    return damaged


def further_controls(controls: bool | Mapping[str, Dictionary]) -> dict[str, Dictionary]:
    """Return the controls that a caller gave in addition to the usual ones.

    Raises:
        ConfigError: the argument is something else, or has the name of a usual control.
    """
    if isinstance(controls, bool):
        return {}
    if not isinstance(controls, Mapping) or not all(
        isinstance(name, str) and isinstance(one, Dictionary) for name, one in controls.items()
    ):
        raise ConfigError(f"controls = {controls!r:.50}; expected True, False, or dictionaries by name: {{'oracle': d}}")
    if taken := sorted({RANDOM, PCA, PERMUTED, REDRAWN} & controls.keys()):
        raise ConfigError(f"controls has the name {taken[0]!r}, which is that of a usual control; choose another")
    return dict(controls)
