"""SAE objects for the evaluations of SAELens and SAEBench, made from dictionaries: dense codes, and a config.

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
    """The fields of an SAE's `cfg` that evaluations read, under their names.

    SAEBench reads the fields themselves. SAELens 6 reads those about the model and the text from `metadata`.
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
        """Return the fields as plain data, without `metadata`, which repeats them."""
        return {name: value for name, value in asdict(self).items() if name != "metadata"}


class DenseSAE(nn.Module):
    """A frozen copy of a dictionary, with dense codes; `SAEBench.sae` makes one.

    A change of its device or dtype does not affect the original dictionary.
    """

    hook_z_reshaping_mode = False  # at hook_z the heads are already concatenated, as [... d_in]

    def __init__(self, dictionary: Dictionary, cfg: DenseSAEConfig):
        super().__init__()
        self.dictionary = deepcopy(dictionary).eval().requires_grad_(False)
        self.cfg = cfg
        self._encoded: Tensor | None = None  # needed to decode if the dictionary normalises each activation

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
        """Encoder bias; zeros if the rule has its own biases."""
        own = self.dictionary.b_enc
        return self.W_dec.new_zeros(self.dictionary.d_sae) if own is None else own

    @property
    def b_dec(self) -> Float[Tensor, " d_out"]:
        """Decoder bias."""
        return self.dictionary.b_dec

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.W_dec.dtype

    def encode(self, x: Float[Tensor, "*shape d_in"]) -> Float[Tensor, "*shape d_sae"]:
        """Return the dictionary's codes of x, dense, in the dtype of the weights."""
        self._encoded = x if self.dictionary.token_norm else None
        return self.dictionary.encode(x).to_dense()

    def decode(self, acts: Float[Tensor, "*shape d_sae"]) -> Float[Tensor, "*shape d_out"]:
        """Return x_hat of dense codes. If the dictionary normalises each activation, they must be codes of the last encoded x.

        Raises:
            ConfigError: their shape shows that they are not.
        """
        if self.dictionary.token_norm and (self._encoded is None or self._encoded.shape[:-1] != acts.shape[:-1]):
            raise ConfigError(
                f"codes of shape {tuple(acts.shape)} cannot be decoded: this dictionary undoes the "
                f"{self.dictionary.token_norm} of each activation, and the activations encoded last have another shape"
            )
        return self.dictionary.decode(acts, self._encoded)

    def forward(self, x: Float[Tensor, "*shape d_in"]) -> Float[Tensor, "*shape d_out"]:
        """Return x_hat, in the dtype of the weights."""
        return self.dictionary.decode(self.encode(x), x)

    def turn_off_forward_pass_hook_z_reshaping(self) -> None:
        """Do nothing: it is never on."""

    def _apply(self, fn, recurse: bool = True) -> "DenseSAE":
        super()._apply(fn, recurse)
        self.cfg.dtype, self.cfg.device = str(self.dtype).removeprefix("torch."), str(self.device)
        self.cfg.metadata.dtype, self.cfg.metadata.device = self.cfg.dtype, self.cfg.device
        return self


class SAEBenchOptions(JudgeConfig):
    """The hook of a dictionary that does not name one."""

    hook: str | None = Field(None, description="Hook of the dictionary; default: the one that it names.")


class SAEBench(Judge):
    """SAE objects that `run_evals` of SAEBench's core and of SAELens take.

    The codes are the dictionary's, as dense tensors. Decoder rows keep their norms. For evaluations that need unit rows, call
    `dictionary.fold_decoder_norms_()` first. Transcoders, crosscoders and hooks outside the blocks of the model raise a
    ConfigError, because these evaluations do not support them.
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
    """Return a dictionary or transcoder with dense codes and a config. Raise ConfigError unless its hook is in a block."""
    ports = (*dictionary.reads, *dictionary.writes)
    if any(port.minus for port in ports) or len({port.model for port in ports}) > 1:
        raise ConfigError(
            f"{dictionary.place}: this judge gives the dictionary activations of one model; use saelens_lite.evaluation"
        )
    origin = dictionary.origin.of(ports[0].model)
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
        architecture=f"saelens_lite.{dictionary.rule.plugin_name}",  # with one of their names, they would ask for its tensors
        model_name=origin.model,
        hook_name=hook,
        hook_layer=int(layer[1]),
        context_size=origin.n_ctx,
        prepend_bos=origin.prepend_bos,
        dataset_path=origin.text,
        model_from_pretrained_kwargs=dict.fromkeys(origin.processing, True),
    )
    return DenseSAE(dictionary, cfg)
