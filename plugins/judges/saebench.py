"""A dictionary as the SAE object that SAELens's and SAEBench's evaluations take: dense codes, and a config.

sae = sl.judge("saebench").sae(d)
"""

import re
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from saelens_lite import Dictionary
from saelens_lite.errors import ConfigError
from saelens_lite.judges import Judge, JudgeConfig


@dataclass
class DenseSAEConfig:
    """What evaluations read of an SAE's `cfg`, under their names.

    SAEBench reads the fields themselves; SAELens 6 reads those about the model and the text from `metadata`.
    """

    d_in: int
    d_sae: int
    dtype: str
    device: str
    architecture: str
    model_name: str | None
    hook_name: str
    hook_layer: int
    context_size: int | None
    prepend_bos: bool | None
    dataset_path: str | None
    model_from_pretrained_kwargs: dict[str, bool]
    hook_head_index: None = None
    seqpos_slice: tuple[None] = (None,)
    dataset_trust_remote_code: bool = False
    apply_b_dec_to_input: bool = True
    normalize_activations: str = "none"
    reshape_activations: str = "none"
    architecture_str: str = field(init=False)
    metadata: SimpleNamespace = field(init=False, default_factory=SimpleNamespace)

    def __post_init__(self) -> None:
        self.architecture_str = self.architecture
        vars(self.metadata).update(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data, but for `metadata`, which repeats them."""
        return {name: value for name, value in asdict(self).items() if name != "metadata"}


class DenseSAE(nn.Module):
    """A frozen copy of a dictionary whose codes are dense tensors; made by `SAEBench.sae`.

    Moving it or changing its dtype leaves the dictionary it was made of alone.
    """

    hook_z_reshaping_mode = False  # at hook_z the heads already stand side by side, as [... d_in]

    def __init__(self, dictionary: Dictionary, cfg: DenseSAEConfig):
        super().__init__()
        self.dictionary = deepcopy(dictionary).eval().requires_grad_(False)
        self.cfg = cfg
        self._encoded: Tensor | None = None  # what a dictionary that normalises each activation decodes by

    @property
    def W_enc(self) -> Float[Tensor, "d_in d_sae"]:
        """Encoder directions, as columns."""
        return self.dictionary.W_enc

    @property
    def W_dec(self) -> Float[Tensor, "d_sae d_out"]:
        """Decoder directions, as rows."""
        return self.dictionary.W_dec

    @property
    def b_enc(self) -> Float[Tensor, " d_sae"]:
        """Encoder bias; zeros where the rule has biases of its own."""
        own = self.dictionary.b_enc
        return self.W_dec.new_zeros(self.dictionary.d_sae) if own is None else own

    @property
    def b_dec(self) -> Float[Tensor, " d_out"]:
        """Decoder bias."""
        return self.dictionary.b_dec

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are stored in."""
        return self.W_dec.dtype

    def encode(self, x: Float[Tensor, "*shape d_in"]) -> Float[Tensor, "*shape d_sae"]:
        """The dictionary's codes of x, dense, in the dtype of the weights."""
        self._encoded = x if self.dictionary.token_norm else None
        return self.dictionary.encode(x).to_dense()

    def decode(self, acts: Float[Tensor, "*shape d_sae"]) -> Float[Tensor, "*shape d_out"]:
        """x_hat of dense codes; where each activation is normalised by itself, they are to be codes of the x encoded last.

        Raises:
            ConfigError: they cannot be, as their shape shows.
        """
        if self.dictionary.token_norm and (self._encoded is None or self._encoded.shape[:-1] != acts.shape[:-1]):
            raise ConfigError(
                f"codes of shape {tuple(acts.shape)} cannot be decoded: this dictionary undoes the "
                f"{self.dictionary.token_norm} of each activation, and the activations encoded last have another shape"
            )
        return self.dictionary.decode(acts, self._encoded)

    def forward(self, x: Float[Tensor, "*shape d_in"]) -> Float[Tensor, "*shape d_out"]:
        """x_hat, in the dtype of the weights."""
        return self.dictionary.decode(self.encode(x), x)

    def turn_off_forward_pass_hook_z_reshaping(self) -> None:
        """Nothing to do: it is never on."""

    def _apply(self, fn, recurse: bool = True) -> "DenseSAE":
        super()._apply(fn, recurse)
        self.cfg.dtype, self.cfg.device = str(self.dtype).removeprefix("torch."), str(self.device)
        self.cfg.metadata.dtype, self.cfg.metadata.device = self.cfg.dtype, self.cfg.device
        return self


class SAEBenchOptions(JudgeConfig):
    """Where the dictionary belongs, if it does not say so itself."""

    hook: str | None = Field(None, description="Hook of the dictionary; default: the one that it names.")


class SAEBench(Judge):
    """The SAE object that `run_evals` of SAEBench's core and of SAELens take.

    Its codes are the dictionary's, as dense tensors. Decoder rows keep their norms; for evaluations that want unit rows, call
    `dictionary.fold_decoder_norms_()` first. These evaluations do not know transcoders, crosscoders and hooks outside the
    blocks of the model: a ConfigError.
    """

    paper = "Karvonen et al. 2025, SAEBench, arXiv:2503.09532"
    Config = SAEBenchOptions
    config: SAEBenchOptions

    def sae(self, dictionary: Dictionary) -> DenseSAE:
        if not dictionary.writes_what_it_reads or len(dictionary.reads) > 1:
            raise ConfigError(
                f"{dictionary.place}: SAEBench and SAELens evaluate dictionaries that reconstruct the activations of one hook; "
                "use saelens_lite.evaluation"
            )
        return dense_sae(dictionary, self.config.hook)


def dense_sae(dictionary: Dictionary, hook: str | None = None) -> DenseSAE:
    """A dictionary or transcoder with dense codes and a config; ConfigError without a hook inside a block."""
    origin = dictionary.origin
    hook = hook or dictionary.reads[0].hook
    if hook is None:
        raise ConfigError("the dictionary does not say which hook it belongs to; give hook=")
    layer = re.match(r"blocks\.(\d+)\.", hook)
    if layer is None:
        raise ConfigError(f"hook {hook!r}: the evaluations need a hook inside a block, such as blocks.2.hook_resid_pre")
    cfg = DenseSAEConfig(
        d_in=dictionary.d_in,
        d_sae=dictionary.d_sae,
        dtype=str(dictionary.W_dec.dtype).removeprefix("torch."),
        device=str(dictionary.W_dec.device),
        architecture=f"saelens_lite.{dictionary.rule.plugin_name}",  # a name of theirs would make them ask for its tensors
        model_name=origin.model,
        hook_name=hook,
        hook_layer=int(layer[1]),
        context_size=origin.n_ctx,
        prepend_bos=origin.prepend_bos,
        dataset_path=origin.text,
        model_from_pretrained_kwargs=dict.fromkeys(origin.processing, True),
    )
    return DenseSAE(dictionary, cfg)
