"""Write a rule: the contract of a sparsity rule, with the methods that a plugin defines and the objects that they receive.

A rule turns pre-activations h = (x − b_dec) W_enc + b_enc into codes and adds losses to the reconstruction error. Everything
else (parameters, training, saving, evaluation, feature pages) is the same for all rules. The same rule trains autoencoders,
whose target is x, and transcoders, whose target is another activation.

```python
from saelens_lite.testing import check_plugin


@sl.register("soft_threshold")
class SoftThreshold(sl.Sparsity):
    homogeneous = False  # twice the pre-activation is not twice the code

    class Config(sl.RuleConfig):
        threshold: float = 0.5

    def activation(self, pre):
        return (pre - self.config.threshold).relu()


d = sl.fit(x, sparsity="soft_threshold", d_sae=4096)
check_plugin(SoftThreshold, planted=None).raise_if_failed()  # gradients, saving, resuming, the same bytes from a seed, …
```

One method, `activation`, is enough for a rule. `support` and `values` choose the pairs that fire and compute their codes
without a dense result, `losses` adds a penalty, `after_step` adjusts parameters, and `inference_form` names the
published architecture with the same codes, so that other tools can load the dictionary. `saelens_lite.training.step` shows
where each is called.

If the rule has a penalty with a coefficient, derive its `Config` from `sl.PenaltyConfig` and multiply the penalty by
`step.coefficient`. Then it also takes `target_l0`, and training adjusts the coefficient until that many latents fire.

In a package, name the class in pyproject.toml; nothing else is needed:

```toml
[project.entry-points."saelens_lite.sparsity"]
soft_threshold = "my_package:SoftThreshold"
```

`notebooks/4-write-a-plugin.ipynb` goes from an idea to a package, and `tests/stranger/` is a complete package.

Codes are never negative: 0 means that a latent does not fire. Every count of firing latents (L0, density, dead latents,
the feature store) counts codes that are not zero. A direction with both signs needs two latents.

To read a tensor that has one row per latent, use `self.at(tensor, latent)`, also in `losses`. To sum values by index, use
`sum_at`. Both sum in a fixed order on every device, so that the same seed gives the same bytes.

**Several devices.** A dictionary can be trained on several devices if its rule says `shardable = True`. Each device then has
other rows of the batch, or other latents. Tensors whose first axis is d_sae have a row for each latent of the device; all
others are equal everywhere, and `self.d_sae` counts all latents. Such a rule compares latents only by `largest` and
`largest_positive`, decodes by `step.decode`, and sums over pairs by `step.mean`, `step.sum` and `step.min`, which add what
the other devices have. All devices must call these equally often, and draw equally many random numbers.

A rule is fast on a GPU if it does not make the host wait. `support_above` chooses what is above a threshold with one wait,
`largest` the k largest of each row with none, and `step.dead_latents` lists the dead latents; `nonzero`, `.item()` and boolean
indices wait each time. A GPU may give `support` pre-activations in bfloat16; `values` gets them in float32. With
`unit_decoder = True`, the rows of W_dec stay unit vectors, and a GPU sees to that in the same pass as Adam.

**Several ports.** If a dictionary writes several ports, as a crosscoder does, the size of a latent is f_i Σ_p ‖W_dec[i, p]‖:
its code times the sum of the norms of its directions. `step.decoder_norms` is this sum, for penalties. Codes and directions are
fixed only up to a factor, since f s and d / s give the same output. `unit_decoder = True` chooses the factor for which the sum
is 1 (with unit rows, it would lie between 1 and √P for P ports). The k largest of f are then the k largest of f Σ_p ‖d_p‖, as
crosscoders choose them, and a rule need not know of ports.
"""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from saelens_lite.codes import SparseCodes, Support, parallel, picked, support_above, support_of_indices, support_of_mask
from saelens_lite.codes.encoder import Encoder
from saelens_lite.codes.parallel import largest, largest_of, largest_positive
from saelens_lite.codes.products import read_at, sum_at
from saelens_lite.config import FrozenConfig
from saelens_lite.errors import PluginError
from saelens_lite.registry import load, names, plugins, register

__all__ = [
    "DeadLatentsConfig",
    "PenaltyConfig",
    "PublishedForm",
    "RuleConfig",
    "Sparsity",
    "Step",
    "Support",
    "dead_latents_explain",
    "largest",
    "largest_positive",
    "load",
    "names",
    "normalise_decoder_",
    "plugins",
    "register",
    "root_of_batch",
    "sum_at",
    "support_above",
    "support_of_indices",
    "support_of_mask",
]


USUAL_L0 = 32.0  # the target of rules that are given neither a coefficient nor a target


class RuleConfig(FrozenConfig):
    """Base of a rule's settings. The defaults are the paper's."""


class DeadLatentsConfig(RuleConfig):
    """Settings of rules that revive dead latents by `dead_latents_explain`."""

    aux_k: int | None = Field(
        None, ge=0, description="Number of dead latents that explain the error of a token; default: d_in / 2."
    )
    aux_coefficient: float = Field(1 / 32, ge=0, description="α, weight of the auxiliary error.")


class PenaltyConfig(RuleConfig):
    """Settings of rules whose penalty is multiplied by λ. In training, `step.coefficient` is the present λ times the warm-up.

    With a target L0, the trainer adjusts λ. `Sparsity.raise_thresholds_` and `excess` help it.
    """

    usual_coefficient: ClassVar[float] = 1.0  # λ at the start of training to a target
    coefficient: float | None = Field(
        None,
        ge=0,
        description="λ, for activations of norm sqrt(d_in); default: adjusted in training until L0 is target_l0. With "
        "target_l0, λ at the start.",
    )
    target_l0: float | None = Field(
        None, gt=0, description="Latents per token to reach by adjusting λ; default: 32, or none if coefficient is set."
    )

    @model_validator(mode="after")
    def _can_be_adjusted(self) -> "PenaltyConfig":
        if self.target_l0 is not None and self.coefficient == 0:
            raise ValueError("a coefficient of 0 cannot be adjusted to reach target_l0; leave one of the two out")
        return self

    @property
    def l0_to_reach(self) -> float | None:
        """The target L0, or None if λ stays as it is."""
        return USUAL_L0 if self.target_l0 is None and self.coefficient is None else self.target_l0

    @property
    def first_coefficient(self) -> float:
        """λ at the start of training."""
        return self.usual_coefficient if self.coefficient is None else self.coefficient


def root_of_batch(batch_size: int) -> float:
    """Return sqrt(batch_size / 256), 0.7 to 3: larger batches bear a larger learning rate, most of all with ReLU penalties."""
    return min(3.0, max(0.7, (batch_size / 256) ** 0.5))


class PublishedForm(NamedTuple):
    """A published architecture that computes the same codes: its name, extra tensors and extra settings."""

    architecture: str
    tensors: Mapping[str, Tensor] = MappingProxyType({})
    settings: Mapping[str, Any] = MappingProxyType({})


@runtime_checkable
class Step(Protocol):
    """The data of one training step that a rule may read."""

    x: Float[Tensor, "batch d_in"]
    target: Float[Tensor, "batch d_out"]  # x itself; for a transcoder, the other activation
    x_hat: Float[Tensor, "batch d_out"]
    codes: SparseCodes
    dead: Bool[Tensor, " d_sae"]  # True for latents that have not fired for `dead_after` tokens; a GPU looks every few steps
    progress: float  # share of the training that is done, 0 … 1
    warmup: float  # factor of the penalties; rises from 0 to 1 over the sparsity warm-up
    coefficient: float | Float[Tensor, ""]  # of a rule with a PenaltyConfig: the present λ, times warmup

    @property
    def n_dead(self) -> int:
        """The number of dead latents, on all devices. This does not make the host wait for a GPU."""
        ...

    def mean(self, x: Float[Tensor, " nnz"]) -> Float[Tensor, ""]:
        """Return Σx / number of rows, for a number of each pair that fires; differentiable."""
        ...

    def sum(self, x: Float[Tensor, " nnz"]) -> Float[Tensor, ""]:
        """Return Σx, for a number of each pair that fires; without gradient."""
        ...

    def min(self, x: Float[Tensor, " nnz"]) -> Float[Tensor, ""]:
        """Return the least entry of x, or infinity if no pair fires; without gradient."""
        ...

    @property
    def first_latent(self) -> int:
        """The number of the latent that is number 0 in `codes`; 0 unless the latents are split over several devices."""
        ...

    @property
    def dead_latents(self) -> Int[Tensor, " n_dead"]:
        """The dead latents, ascending. Unlike `dead.nonzero()`, this does not make the host wait for a GPU."""
        ...

    @property
    def decoder_norms(self) -> Float[Tensor, " d_sae"]:
        """The norm of each latent's direction, summed over the write ports; differentiable."""
        ...

    def pre_tiles(self, latents: Int[Tensor, " n"]) -> Iterator[Float[Tensor, "rows n"]]:
        """Return an iterator over the pre-activations of some latents, one tile of rows at a time, without gradient.

        The next tile overwrites the last one.
        """
        ...

    def pre_at(self, support: Support) -> Float[Tensor, " nnz"]:
        """Return the pre-activations at a support; differentiable."""
        ...

    def decode(self, codes: SparseCodes, frozen: bool = False) -> Float[Tensor, "batch d_out"]:
        """Return Σ value · W_dec[latent], without bias; differentiable. frozen: no gradient reaches W_dec."""
        ...

    def base(self, frozen: bool = False) -> Float[Tensor, "batch_or_one d_out"]:
        """Return the base of x_hat: b_dec, plus the skip connection if there is one. frozen: without gradient."""
        ...


class Sparsity(nn.Module):
    """Base of all rules. The parameters and buffers of a rule are trained, saved and loaded with the dictionary."""

    paper: ClassVar[str] = ""
    encoder_bias: ClassVar[bool] = True  # False: the rule has its own biases and h = (x − b_dec) W_enc
    homogeneous: ClassVar[bool] = True  # scaling h_i (and the rule by `rescale_`) scales code i and changes no other
    tied: ClassVar[bool] = False  # W_enc is W_decᵀ, rows of W_dec are unit vectors, and codes are in the units of x
    row_wise: ClassVar[bool] = False  # True: even in training, `support` reads each row alone, so it may get parts of a batch
    unit_decoder: bool = False  # True: `after_step` makes the norms of a latent's directions add up to 1. It may be a property
    shardable: ClassVar[bool] = False  # True: one dictionary may be trained on several devices; see the module's docstring
    Config: ClassVar[type[RuleConfig]] = RuleConfig
    plugin_kind: ClassVar[str] = "sparsity"
    plugin_name: ClassVar[str]  # set by the registry

    def __init__(self, config: RuleConfig, *, d_in: int, d_sae: int):
        super().__init__()
        self.config = config
        self.d_in, self.d_sae = d_in, d_sae

    @property
    def latents_together(self) -> int:
        """The number of neighbouring latents that must stay on one device: the size of a group, if latents form groups."""
        return 1

    @property
    def target_l0(self) -> float | None:
        """The L0 that training should reach, or None if there is no target."""
        return self.config.l0_to_reach if isinstance(self.config, PenaltyConfig) else None

    def activation(self, pre: Float[Tensor, "batch d_sae"]) -> Float[Tensor, "batch d_sae"]:
        """Return the codes of dense pre-activations, ≥ 0. A rule needs no other method: the support is the non-zero codes."""
        raise NotImplementedError(f"{type(self).__name__} must define activation(pre)")

    def support(self, pre: Float[Tensor, "batch d_sae"]) -> Support:
        """Choose the (row, latent) pairs that fire, without gradient.

        While `self.training` is true, the choice may depend on the whole batch (set `row_wise` if it does not: that saves
        memory). Otherwise the codes of an activation must not depend on the rest of its batch.
        """
        return support_of_mask(self.activation(pre) != 0)

    def values(self, pre: Float[Tensor, " nnz"], latent: Int[Tensor, " nnz"]) -> Float[Tensor, " nnz"] | None:
        """Return the codes at the support, given the pre-activations there; differentiable. None: use `activation`.

        The support may come from rounded pre-activations (`encoder_precision`), while `pre` is exact. So return the same as
        `activation` for every `pre`, even on the other side of a threshold: `pre.relu()`, not `pre`. Read per-latent parameters
        by `self.at(parameter, latent)`.
        """
        return None

    @staticmethod
    def at(tensor: Float[Tensor, "d_sae ..."], latent: Int[Tensor, " nnz"]) -> Float[Tensor, "nnz ..."]:
        """Return tensor[latent], the row of each latent; differentiable.

        The gradient is summed in a fixed order on every device. On a GPU, the gradients of `tensor[latent]` and
        `tensor.index_select(0, latent)` are not, so the same seed would not give the same bytes.
        """
        return read_at(tensor, latent)

    def encode(self, encoder: Encoder) -> SparseCodes:
        """Return the codes of a batch; differentiable. Override it if codes do not depend on the pre-activations alone.

        `encoder.tiles` and `encoder.at` are the pre_tiles and pre_at of `Step`; `encoder` also has the weights.
        """
        if type(self).values is not Sparsity.values:
            support = encoder.choose(self.support, whole=self.training and not self.row_wise)
            value = self.values(encoder.at(support), support.latent)
        else:
            pre = encoder.dense()
            support = self.support(pre.detach())
            value = picked(self.activation(pre).flatten(), support.flat(encoder.d_sae))
        return SparseCodes.of(support, value, encoder.d_sae)

    def losses(self, step: Step) -> dict[str, Float[Tensor, ""]]:
        """Return the losses that the rule adds to the reconstruction error, by name, as means over the batch."""
        return {}

    def check_codes(self, smallest: float) -> None:
        """Raise PluginError when the smallest code of a batch is negative."""
        if smallest < 0:
            name = getattr(self, "plugin_name", type(self).__name__)
            raise PluginError(
                f"sparsity rule {name} gave a negative code ({smallest:.3g}). Codes must be ≥ 0, where 0 means that a latent "
                "does not fire. End `activation` and `values` with .relu(), or give each sign a latent of its own"
            )

    def observe(self, step: Step) -> None:
        """Update running estimates. Called without gradient after each optimiser step, with the data of the step."""

    def after_step(self, dictionary: Any) -> None:
        """Change parameters in place. Called without gradient after each optimiser step and once before the first.

        A GPU may bring rows of W_dec back to norm 1 in the optimiser step itself, if there is one write port. Without an
        `after_step` of its own, a rule with `unit_decoder` is then not called.
        """
        if self.unit_decoder:
            normalise_decoder_(dictionary)

    @staticmethod
    def lr_factor(batch_size: int) -> float:
        """Return the factor by which the default learning rate suits this rule, if it is not 1."""
        return 1.0

    def raise_thresholds_(self, dictionary: Any, by: Float[Tensor, " d_sae"]) -> None:
        """Raise the threshold above which each latent fires. Called only in training to a target L0."""
        if dictionary.b_enc is None:
            raise PluginError(
                f"the sparsity rule {self.plugin_name} has no encoder bias; to reach a target L0 it must define "
                "raise_thresholds_, and excess unless its codes are what pre-activations exceed thresholds by"
            )
        dictionary.b_enc.sub_(by)

    def excess(self, codes: SparseCodes) -> Float[Tensor, ""]:
        """Return the mean by which the pre-activations of the firing latents exceed their thresholds."""
        return parallel.total(codes.value.sum()) / parallel.total(codes.fires.sum()).clamp(min=1)

    def rescale_(self, scale: Float[Tensor, " d_sae"]) -> None:
        """Rescale the rule's own tensors in place for pre-activations times `scale` > 0, so that codes scale by the same
        factor.
        """

    def inference_form(self) -> PublishedForm | None:
        """Return the published architecture with the same codes, or None if no published one has them."""
        return None

    @classmethod
    def from_published(
        cls, tensors: Mapping[str, Tensor], options: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the rule's own tensors and options, given tensors that may have the names of its published form."""
        return dict(tensors), dict(options)


@torch.no_grad()
def normalise_decoder_(dictionary: Any) -> None:
    """Divide every row of a `Dictionary`'s W_dec by its decoder norm, in place.

    The norm is the sum over the write ports of ‖W_dec[i, port]‖. With one port, rows become unit vectors.
    """
    weight = dictionary.W_dec.data
    weight.div_(dictionary.decoder_norms().clamp_min_(torch.finfo(weight.dtype).tiny)[:, None])


def dead_latents_explain(step: Step, config: DeadLatentsConfig) -> dict[str, Float[Tensor, ""]]:
    """Return {"aux": α · ‖e − ê‖²} as a mean over the batch, or {} if no latent is dead.

    e = target − x̂ is a constant; ê decodes the aux_k largest dead latents of the token.

    Source: Gao et al. 2024, arXiv:2406.04093, section A.2.
    """
    aux_k = min(config.aux_k if config.aux_k is not None else step.x.shape[1] // 2, step.n_dead)
    if aux_k == 0 or config.aux_coefficient == 0:
        return {}
    dead = step.dead_latents
    support = largest_of(step.pre_tiles(dead), aux_k, among=dead)
    error = (step.target - step.x_hat).detach()
    explained = step.decode(SparseCodes.of(support, step.pre_at(support).relu(), len(step.dead)))
    return {"aux": config.aux_coefficient * (error - explained).square().sum(1).mean()}
