"""Diff: find the latents that two models share, and those that one of them has alone.

A dictionary that writes the same hook of two models, such as a base model and its fine-tuned version, is a crosscoder. It has
one code for each latent and a direction in each model. Train it with `batch_topk`: with L1, latents that look specific to a
model are often artefacts of the penalty.

```python
models = {"base": lm, "chat": sl.load_model("tiny")}  # in place of two copies: your model and its fine-tuned version
hook = "blocks.2.hook_resid_pre"
both = sl.capture(models, "python-docs:train", hooks=[hook], out="cache-of-both", n_tokens=20_000)
settings = {"sparsity": "batch_topk", "options": {"k": 16}, "n_tokens": 50_000}
(crosscoder,) = sl.train(both, sl.TrainConfig(reads=(f"base:{hook}", f"chat:{hook}"), d_sae=512, **settings))
difference = sl.diff(crosscoder.dictionary, both)
print(difference)  # how many latents are in one model only, in both, or neither of these
difference.only("chat")  # the latents of the chat model alone, the most specific ones first
difference["delta_norm"]  # a number for each latent; difference.to_frame() has all of them
difference = sl.diff(crosscoder.dictionary, models, "python-docs:held-out", n_tokens=20_000)  # on other text
```

```sh
saelens-lite diff runs/crosscoder cache-of-both --controls --plot diff.png --json diff.json
```

**By norm.** Decoder norms are compared in units in which the activations of both models have the same RMS norm, measured on
the activations of the diff. So a model whose activations are larger does not look as if it had more.

    Δ_norm = ½ ((‖d_base‖ − ‖d_tuned‖) / max(‖d_base‖, ‖d_tuned‖) + 1)

is 0 for a latent that only the tuned model has, and 1 for one that only the base model has. Below 0.1 the class is "chat only"
(with the name of your model), from 0.4 to 0.6 "shared", above 0.9 "base only", else "other". A norm does not say whether the
model has the direction: training may have shrunk it away.

**By latent scaling.** β is the factor by which f d, the contribution of a latent, must be multiplied to fit what it should
explain; ν compares the factors in both models, with the tuned model's direction d:

    β = dᵀ(Yᵀf) / (‖d‖² ‖f‖²)        ν = β_base / β_tuned

- ν^ε, with Y the error of the reconstruction without this latent: is the latent missing in the base model's reconstruction
  although its activations have it?
- ν^r, with Y the reconstruction: do other latents express it in the base model?

Both are near 0 for a latent that only the tuned model has. The class is "chat only" if the 95 % intervals of |ν^ε| and |ν^r|
lie below 0.2 and 0.5, and Δ_norm is below 0.4. `mirror_error` and `mirror_reconstruction` are β_tuned / β_base with the
direction of the base model, and decide on "base only". If all four exceed 0.5, the latent is "shared". `measure.py` has the
definitions in full, and says where they differ from Minder et al. 2025, arXiv:2504.02922.

**Intervals** are drawn over rows of the text; for a cache and for arrays, over blocks of consecutive activations, because
activations of one text are not independent. A block is as long as two rows if the length of a row is known, else 128 (less if
there would be few blocks). Intervals are too narrow if blocks are shorter than the texts that activations depend on. A latent
that fires in fewer than 10 of them, or whose β_tuned may be 0, is "unknown": it is never called specific.

**Differences.** The simplest baseline is a dictionary of the difference of two models, with the key `chat-base:HOOK`. A latent
has one direction there, so there is no Δ_norm. Its ν compares both models' own activations: Y = x − mean, and "chat only" means
that the interval of |ν| lies below 0.5. Activations of both models are needed, not only those of their difference.

**Controls.** `controls=True` trains two more dictionaries with the same settings: one of the base model twice, in which every
specific latent is a false alarm, and one of the base model with a direction planted on 1 % of the tokens, which should come
out and little else. They are trained on the first half of the activations and measured on the other half. Believe a number of
specific latents that is far above the first control. Latents called "chat only" by latent scaling often have a Δ_norm of 0.2 to
0.4, so that there may be none below 0.1.

Tokens must be the same in both models. Template tokens of a chat model are left out with
`text_config=sl.TextConfig(exclude_template=True)` in capture: many latents that look specific to a chat model fire there.

sides.py finds the models of the ports, reads.py the activations, measure.py has the numbers, sums.py their intervals,
report.py the classes and tables, controls.py the controls.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from saelens_lite.config import TextConfig, TrainConfig
from saelens_lite.devices import on_device
from saelens_lite.dictionary import Dictionary
from saelens_lite.diffing.controls import run_controls, settings_of_controls
from saelens_lite.diffing.measure import report_of
from saelens_lite.diffing.reads import opened
from saelens_lite.diffing.report import DiffControl, DiffReport
from saelens_lite.diffing.sides import Sides, needed_keys
from saelens_lite.errors import ConfigError
from saelens_lite.model import LanguageModel
from saelens_lite.model.models import Models, as_model
from saelens_lite.tokens import Text, TokenRows

__all__ = ["DiffControl", "DiffReport", "diff"]

N_TOKENS = 200_000


def diff(
    dictionary: Dictionary,
    cache_or_models: Any,
    text: Text | TokenRows | None = None,
    *,
    base: str | None = None,
    n_tokens: int | None = N_TOKENS,
    text_config: TextConfig | None = None,
    controls: bool = False,
    train: TrainConfig | None = None,
    batch_tokens: int | None = None,
    seed: int = 0,
) -> DiffReport:
    """Return the numbers of each latent in two models, and its class: in one model only, shared, other or unknown.

    Dictionaries on another device are copied to the models'; your own stay where they are.

    Args:
        dictionary: one that writes the same hooks of two models, or the difference of the models at a hook.
        cache_or_models: the activations of both models: a cache, a TensorSource or arrays by key, such as {"base:HOOK": x,
            "chat:HOOK": y}; or the models by name, {"base": lm, "chat": lm2}, together with a text. A dictionary of
            differences needs the activations of both models too.
        text: a text source or token rows. The rows are cut, and positions left out, as in training.
        base: the name of the model that the other one was made from. Default: the model of the dictionary's first port, or the
            one that is subtracted.
        n_tokens: number of activations to read, from the beginning; None for all.
        text_config: settings of the token rows; see `evaluate`.
        controls: train two dictionaries on models whose difference is known, and measure how many latents are wrongly called
            specific; see `saelens_lite.diffing.controls`. Takes about as long as two trainings, and keeps the activations of
            `n_tokens` tokens in memory.
        train: settings for the training of the controls. Default: those that the dictionary was trained with.
        batch_tokens: tokens in a batch. It bounds the memory. Default: as for `evaluate`.
        seed: seed of the planted change.

    Raises:
        ConfigError: the dictionary is not one of two models, the activations are of another kind, there are too few of them,
            or the controls cannot be trained.
        HookError: the activations of a port are missing.
        ShapeError: activations have another width than a port.
        TextError: there is no text.
        NonFiniteError: the activations or the dictionary hold NaN or infinity.
    """
    if n_tokens is not None and n_tokens < 1:
        raise ConfigError(f"n_tokens = {n_tokens}; expected at least 1, or None for all")
    sides, given = Sides.of(dictionary, base), cache_or_models
    dictionary.check_finite()
    if isinstance(given, Mapping) and any(isinstance(lm, LanguageModel) for lm in given.values()):
        given = as_model(given)
    if isinstance(given, Models):
        dictionary = on_device(dictionary, given.device)
    if controls:
        settings_of_controls(dictionary, train)
    elif train is not None:
        raise ConfigError("train = … are settings of the controls; add controls=True")
    keys = needed_keys(dictionary, sides)
    with opened(dictionary, given, text, keys, n_tokens, text_config, batch_tokens) as reads:
        report = report_of(dictionary, sides, reads)
        if not controls:
            return report
        return replace(report, controls=run_controls(dictionary, sides, reads, train, seed))
