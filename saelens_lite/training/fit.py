"""Train a dictionary on activations in memory."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saelens_lite import registry
from saelens_lite.arrays import ArrayLike, as_tensor
from saelens_lite.cache import TensorSource
from saelens_lite.config import TrainConfig
from saelens_lite.dictionary import Dictionary
from saelens_lite.errors import ConfigError, near_matches
from saelens_lite.training import train

MIN_STEPS, MIN_PASSES, MAX_PASSES = 1000, 10, 20
LINES = 20  # of the log; more if training is long


def fit(
    x: Float[Tensor, "n d_in"] | ArrayLike,
    sparsity: str = "topk",
    *,
    options: dict[str, Any] | None = None,
    validation_tokens: int = 0,
    device: str | torch.device | None = None,
    **settings: Any,
) -> Dictionary:
    """Train a dictionary on activations in memory, and return it. `history` of the dictionary has the lines of the log.

    By default a batch is a fiftieth of the rows, but at least 8 and at most 2,048. There are at least ten passes over x, and up
    to twenty to make 1,000 steps.

    Args:
        x: a tensor, a numpy array, a DataFrame or a list of rows.
        validation_tokens: number of rows, the last ones of x, that are kept out of training. The history then has val_fvu and
            val_l0. Shuffle rows that are sorted, for example by class.
        device: the device to train on. By default that of x if it is an accelerator, else the default of `train`; the
            dictionary is then returned on the device of x.
        options: settings of the sparsity rule, such as {"k": 32}.
        settings: fields of TrainConfig, such as d_sae, n_tokens, batch_size, lr and seed, and settings of the rule: k=32.

    Raises:
        ShapeError: x is not an array [n d_in] of floating-point numbers.
        ConfigError, PluginError: a setting or rule does not exist, or a value is bad.
        NonFiniteError: x holds NaN, or training diverged.
    """
    settings, options = _divided(sparsity, settings, options or {})
    config = TrainConfig(**settings, sparsity=sparsity, options=options)
    source = TensorSource(x := as_tensor(x))
    config = config.replace(**_from_size(source.n_tokens - validation_tokens, config))
    where = x.device if device is None and x.device.type != "cpu" else device
    (run,) = train(source, config, device=where, data_seed=config.seed, validation_tokens=validation_tokens)
    dictionary = run.dictionary.to(x.device) if device is None else run.dictionary
    dictionary.history = run.history
    return dictionary


def _divided(sparsity: str, given: dict[str, Any], options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the fields of TrainConfig among the settings, and all options of the rule, which are checked.

    Raises:
        ConfigError: a setting is neither, an option is given twice or unknown, or its value is bad.
        PluginError: there is no such rule.
    """
    rule = registry.load(sparsity).Config
    settings = {name: value for name, value in given.items() if name in TrainConfig.model_fields}
    direct = {name: value for name, value in given.items() if name not in settings and name in rule.model_fields}
    for name in given.keys() - settings.keys() - direct.keys():
        hint = near_matches(name, [*rule.model_fields, *TrainConfig.model_fields])
        raise ConfigError(
            f"unknown key {name!r}{f'{hint} It' if hint else '; it'} is neither a field of TrainConfig nor an option of "
            f"{sparsity}, which has {', '.join(rule.model_fields) or 'no options'}"
        )
    if twice := sorted(direct.keys() & options.keys()):
        name = twice[0]
        raise ConfigError(f"{name} is given twice: {name}={direct[name]!r} and options={{{name!r}: {options[name]!r}}}")
    rule(**options, **direct)
    return settings, {**options, **direct}


def _from_size(n: int, config: TrainConfig) -> dict[str, int]:
    """Return the settings that follow from the number of rows to train on, without those that were given."""
    n = max(n, 1)  # if nothing is left to train on, `train` says so
    size = config.batch_size if "batch_size" in config.model_fields_set else max(1, min(n, max(8, n // 50), 2048))
    wanted = min(max(MIN_STEPS * size, MIN_PASSES * n), MAX_PASSES * n)
    n_tokens = config.n_tokens if "n_tokens" in config.model_fields_set else wanted
    settings = {"batch_size": size, "n_tokens": n_tokens, "log_every": min(65_536, -(-n_tokens // LINES))}
    return {name: value for name, value in settings.items() if name not in config.model_fields_set}
