"""Controls of a model diff: dictionaries trained on two models whose difference is known.

- The base model twice: the activations of the base model stand for both models. Nothing is specific, so the share of latents
  called specific is the rate of false alarms.
- The base model with one planted change: on PLANTED of the tokens, chosen at random, a random direction is added to the
  activations of the second model. Its latent should be called specific to that model, and little else.

Both dictionaries are trained with the settings of the dictionary that they are controls of, and measured like it.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from saelens_lite.cache.source import TensorSource
from saelens_lite.config import TrainConfig
from saelens_lite.dictionary import Dictionary
from saelens_lite.diffing.measure import report_of
from saelens_lite.diffing.reads import Reads, of_source
from saelens_lite.diffing.report import DiffControl
from saelens_lite.diffing.sides import Sides, needed_keys
from saelens_lite.errors import ConfigError
from saelens_lite.ports import key_of
from saelens_lite.training import train

PLANTED = 0.01  # share of the tokens
STRENGTH = (0.5, 1.0)  # least and largest size of the change, as a share of the RMS distance of activations from their mean
NEAR = 0.7  # cosine with the planted direction of latents that stand for it, or for a part of it
Acts = dict[str, Float[Tensor, "n _"]]


class KnownDifference(NamedTuple):
    """Activations of two models whose difference is known, and the direction that was added at each hook."""

    acts: Acts
    direction: Float[Tensor, " d"] | None


def run_controls(
    dictionary: Dictionary, sides: Sides, reads: Reads, config: TrainConfig | None, seed: int
) -> dict[str, DiffControl]:
    """Train and measure the controls of a dictionary on the base model's activations, which are kept in memory.

    Raises:
        ConfigError: the dictionary does not record its training, and `config` is not given.
    """
    config = settings_of_controls(dictionary, config)
    keys = sides.keys(sides.base)
    rows = [some.acts for some in reads.with_progress("activations for the controls")]
    x = {key: torch.cat([acts[key].cpu() for acts in rows]) for key in keys}
    controls = {}
    if not any(port.minus for port in (*dictionary.reads, *dictionary.writes)):  # else there would be only zeros to train on
        controls[f"{sides.base} twice"] = _measure(
            KnownDifference(x | dict(zip(sides.keys(sides.tuned), x.values(), strict=True)), None), dictionary, sides, config
        )
    planted = with_planted_change(x, sides, seed)
    controls[f"{sides.base} with a planted change"] = _measure(planted, dictionary, sides, config)
    return controls


def settings_of_controls(dictionary: Dictionary, config: TrainConfig | None) -> TrainConfig:
    """Return the settings for the training of controls, with the ports of the dictionary."""
    recorded = dictionary.training_record.get("config")
    if config is None and not isinstance(recorded, dict):
        raise ConfigError("this dictionary does not record the settings of its training; give those for controls: train=…")
    config = config or TrainConfig(**recorded)
    reads, writes = ([port.key for port in side] for side in (dictionary.reads, dictionary.writes))
    return config.replace(hook=None, reads=reads, writes=() if dictionary.writes_what_it_reads else writes)


def with_planted_change(x: Acts, sides: Sides, seed: int) -> KnownDifference:
    """Return the base model's activations, and the same with a direction added on some tokens, for the other model."""
    generator = torch.Generator().manual_seed(seed)
    n = len(next(iter(x.values())))
    size = (torch.rand(n, generator=generator) < PLANTED) * torch.empty(n).uniform_(*STRENGTH, generator=generator)
    tuned, directions = {}, []
    for key, base in zip(sides.keys(sides.tuned), x.values(), strict=True):
        unit = F.normalize(torch.randn(base.shape[1], generator=generator), dim=0)
        spread = float((base - base.mean(0)).double().square().sum(1).mean().sqrt())
        tuned[key] = base + size.to(base)[:, None] * (spread * unit.to(base))
        directions.append(unit * spread)
    return KnownDifference(x | tuned, torch.cat(directions))


def _measure(known: KnownDifference, dictionary: Dictionary, sides: Sides, config: TrainConfig) -> DiffControl:
    """Train a dictionary on the first half of activations with a known difference; return a diff's result on the other half."""
    acts = dict(known.acts)
    for port in (*dictionary.reads, *dictionary.writes):
        if port.minus is not None:
            acts[port.key] = acts[key_of(port.hook, port.model)] - acts[key_of(port.hook, port.minus)]
    half = len(next(iter(acts.values()))) // 2
    seen, unseen = (
        TensorSource({key: x[part] for key, x in acts.items()}, origin=dictionary.origin)
        for part in (slice(half), slice(half, None))
    )
    (run,) = train(seen, config)
    trained = run.dictionary.cpu()
    reads = of_source(unseen, needed_keys(trained, sides), None)
    report = report_of(trained, sides, reads)
    by_norm = not report.is_of_differences
    if known.direction is None:
        return DiffControl(
            n_latents=report.d_sae,
            share_by_norm=report.share_specific("norm") if by_norm else None,
            share_by_nu=report.share_specific(),
        )
    cosine = _cosines(trained, sides, known.direction)
    nearest, near = int(cosine.argmax()), (cosine >= NEAR).nonzero().flatten().tolist()
    without = {nearest, *near}
    return DiffControl(
        n_latents=report.d_sae,
        share_by_norm=report.share_specific("norm", without) if by_norm else None,
        share_by_nu=report.share_specific("nu", without),
        cosine=float(cosine[nearest]),
        planted_by_norm=report.classes("norm")[nearest] if by_norm else None,
        planted_by_nu=report.classes()[nearest],
    )


def _cosines(dictionary: Dictionary, sides: Sides, direction: Float[Tensor, " d"]) -> Float[Tensor, " d_sae"]:
    """Return the cosines of the latents' directions in the tuned model with the planted one."""
    rows = dictionary.W_dec.detach()
    if not sides.is_of_differences:
        rows = sides.directions(rows, dictionary.writes, sides.tuned, dict.fromkeys(sides.all_keys, 1.0))
    return F.cosine_similarity(rows.double(), direction.double(), dim=1)
