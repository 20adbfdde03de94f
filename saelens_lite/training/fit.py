"""Train a dictionary on activations in memory."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saelens_lite.arrays import ArrayLike, as_tensor
from saelens_lite.cache import TensorSource
from saelens_lite.config import TrainConfig
from saelens_lite.dictionary import Dictionary
from saelens_lite.training import train


def fit(
    x: Float[Tensor, "n d_in"] | ArrayLike,
    sparsity: str = "topk",
    *,
    options: dict[str, Any] | None = None,
    device: str | torch.device | None = None,
    **settings: Any,
) -> Dictionary:
    """Train a dictionary on activations in memory, and return it.

    Args:
        x: a tensor, a numpy array, a DataFrame or a list of rows.
        options: the settings of the sparsity rule, such as {"k": 32}.
        device: the device to train on. By default that of x if it is an accelerator, else the default of `train`; the
            dictionary is then returned on the device of x.
        settings: fields of TrainConfig, such as d_sae, n_tokens, batch_size, lr and seed. By default n_tokens is ten passes
            over x, and batch_size is 2,048, or the length of x if that is smaller.

    Raises:
        ShapeError: x is not an array [n d_in] of floating-point numbers.
        ConfigError, PluginError: a setting or rule does not exist, or a value is bad.
        NonFiniteError: x holds NaN, or training diverged.
    """
    source = TensorSource(x := as_tensor(x))
    defaults = {"n_tokens": 10 * len(x), "batch_size": min(2048, len(x))}
    config = TrainConfig(**{**defaults, **settings, "sparsity": sparsity, "options": options or {}})
    where = x.device if device is None and x.device.type != "cpu" else device
    dictionary = train(source, config, device=where, data_seed=config.seed)[0].dictionary
    return dictionary.to(x.device) if device is None else dictionary
