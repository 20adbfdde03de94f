"""Bootstrap replicates that a report keeps for comparisons with others, and the recipe that its dictionary was trained by."""

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from torch import Tensor

from saelens_lite.dictionary import Dictionary

COLUMNS = ("l0", "fvu", "ce_loss_score", "kl_div_score", "frac_alive")  # the metrics that tables show
KEPT = 200  # replicates of each metric in a report; the floor then has an error of 5 %, which its degrees of freedom count
LEAST = 10  # replicates from which a covariance is estimated
WITHOUT_EFFECT = ("seed", "log_every")  # settings that are not part of a recipe
AS_TAKEN = ("tokens", "steps", "kl_after")  # of a training record: as many as the settings say, up to a batch


class Units(NamedTuple):
    """The units that a bootstrap draws, such as documents: their number, and how many of equal size would be as informative.

    The latter is (Σ n)² / Σ n² for units of n tokens.
    """

    name: str
    n: int
    n_effective: int | float

    def __str__(self) -> str:
        return f"{self.n:,} {self.name}"

    @classmethod
    def of_sizes(cls, name: str, sizes: Iterable[int]) -> "Units":
        """Return the units, given the number of tokens in each; those without tokens do not count."""
        sizes = [n for n in sizes if n]
        return cls(name, len(sizes), sum(sizes) ** 2 / sum(n * n for n in sizes) if sizes else 0.0)

    @classmethod
    def from_dict(cls, content: Any) -> "Units":
        """Return units from plain data; TypeError or KeyError if the data are something else."""
        units = cls(**{name: content[name] for name in cls._fields})
        if not isinstance(units.name, str) or type(units.n) is not int or type(units.n_effective) not in (int, float):
            raise TypeError(f"units are {content!r:.80}")
        return units


@dataclass(frozen=True)
class Replicates:
    """Differences of bootstrap replicates from the value, by metric.

    `weights` identifies the weights of the sequences. Replicates with the same weights are paired: number b of one report and
    number b of another weigh the same sequences alike. `steps` has the smallest difference of metrics that are counts, such as
    1 / d_sae for the share of latents that fire. `units` are what was weighted; None in reports of earlier versions.
    """

    weights: str
    of: Mapping[str, Float[np.ndarray, " replicates"]]
    steps: Mapping[str, float] = field(default_factory=dict)
    units: Units | None = None

    @classmethod
    def of_values(
        cls,
        weights: str,
        values: Mapping[str, Float[Tensor, " replicates"]],
        steps: Mapping[str, float] | None = None,
        units: Units | None = None,
    ) -> "Replicates":
        """Return the first replicates of each metric. Entry 0 of its values is the value itself, the others are replicates."""
        kept = {name: (x[1 : 1 + KEPT] - x[0]).cpu().numpy().astype(np.float32) for name, x in values.items()}
        return cls(weights, kept, steps or {}, units)

    def to_dict(self) -> dict[str, Any]:
        """Return the replicates as plain data: float32, little-endian, in base64."""
        coded = {name: base64.b64encode(x.astype("<f4").tobytes()).decode() for name, x in self.of.items()}
        content = {"weights": self.weights, "differences": coded, "steps": dict(self.steps)}
        return content if self.units is None else content | {"units": self.units._asdict()}

    @classmethod
    def from_dict(cls, content: Any) -> "Replicates":
        """Return replicates from `to_dict`; TypeError, KeyError or ValueError if the data are something else."""
        if not isinstance(content["weights"], str):
            raise TypeError(f"weights is {content['weights']!r:.40}")
        coded = {name: base64.b64decode(text, validate=True) for name, text in content["differences"].items()}
        steps = {name: float(step) for name, step in content["steps"].items()}
        kept = {name: np.frombuffer(x, "<f4").astype(np.float32) for name, x in coded.items()}
        return cls(content["weights"], kept, steps, Units.from_dict(content["units"]) if "units" in content else None)


def weights_id(seed: int, n_sequences: int, *hashes: str) -> str:
    """Return a name for the bootstrap weights of some sequences. The hashes identify the sequences and their order."""
    return hashlib.sha256(repr((seed, n_sequences, *hashes)).encode()).hexdigest()[:16]


class Recipe(NamedTuple):
    """The settings that a dictionary was trained with, apart from its seed.

    `sha256` is the hash of all settings, of the training data, the hooks and the start; `rule` and `options` are for people.
    Dictionaries of the same hash and different seeds say how much a result depends on the seed.
    """

    rule: str
    options: dict[str, Any]
    sha256: str
    seed: int

    def __str__(self) -> str:
        return " ".join([self.rule, *(f"{name}={value}" for name, value in self.options.items())])

    @classmethod
    def from_dict(cls, content: Any) -> "Recipe":
        """Return a recipe from plain data; TypeError or KeyError if the data are something else."""
        recipe = cls(**{name: content[name] for name in cls._fields})
        kinds = {"rule": str, "options": dict, "sha256": str, "seed": int}
        for name, kind in kinds.items():
            if not isinstance(value := getattr(recipe, name), kind):
                raise TypeError(f"{name} is {value!r:.40}")
        return recipe


def recipe_of(dictionary: Dictionary) -> Recipe | None:
    """Return the recipe of a dictionary; None if it does not record its settings, seed and data, as those of other tools."""
    record, origin = dictionary.training_record, dictionary.origin
    config = record.get("config")
    if not isinstance(config, dict) or not isinstance(config.get("seed"), int) or "read_from" in record:
        return None
    if not (origin.text or origin.text_sha256 or record.get("data_sha256")):
        return None
    rule, current = dictionary.rule.plugin_name, dictionary.rule.config.model_dump(mode="json")
    facts = {
        **_planned(record, config),
        "config": {name: value for name, value in config.items() if name not in WITHOUT_EFFECT},
        "origin": origin.model_dump(mode="json"),
        "place": dictionary.place,
        "rule": [rule, current],  # these may have changed since the training
    }
    content = json.dumps(facts, sort_keys=True, default=str)
    options = {name: current.get(name, value) for name, value in (config.get("options") or {}).items()}
    return Recipe(
        rule=rule or type(dictionary.rule).__name__,
        options=json.loads(json.dumps(options, default=str)),
        sha256=hashlib.sha256(content.encode()).hexdigest()[:16],
        seed=config["seed"],
    )


def _planned(record: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a training record without the tokens and steps that were taken, if these are as many as the config says.

    The last batch may pass n_tokens, and batches of whole rows differ in size, so seeds on other data take slightly different
    numbers. Those of a training that has ended early stay.
    """
    n_tokens, batch_size, tokens = config.get("n_tokens"), config.get("batch_size"), record.get("tokens")
    is_whole = all(isinstance(n, int) for n in (n_tokens, batch_size, tokens)) and n_tokens <= tokens < n_tokens + batch_size
    return {name: value for name, value in record.items() if not (is_whole and name in AS_TAKEN)}
