"""A sparse dictionary: W_enc, b_enc, W_dec, b_dec and the rule that makes codes sparse.

    h = (x − b_dec) W_enc + b_enc        codes = rule(h)        x_hat = codes W_dec + b_dec

x is what its read ports hold, x_hat what its write ports get (see `saelens_lite.ports`). Where these are not the same ports, as
of a transcoder (Dunefsky et al. 2024, arXiv:2406.11944), with or without a skip connection (Paulo et al. 2025,
arXiv:2501.18823), b_dec is a bias of the output alone:

    h = x W_enc + b_enc                  codes = rule(h)        y_hat = codes W_dec + b_dec + x W_skipᵀ

Dictionaries of other tools may normalise each activation by itself, which no weights can take over: `token_norm`.

On disk it is a folder that SAELens 6 loads as it stands: cfg.json, sae_weights.safetensors, sparsity.safetensors.
What SAELens does not know stands under `metadata.saelens_lite` in cfg.json, and a rule's tensors that the published
architecture has no place for in plugin.safetensors.
"""

import importlib.metadata
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from saelens_lite import registry
from saelens_lite.arrays import ArrayLike, as_tensor, described
from saelens_lite.codes import SparseCodes
from saelens_lite.codes.change import Edit, offsets, scaled
from saelens_lite.codes.encoder import Encoder
from saelens_lite.config import Origin
from saelens_lite.errors import ConfigError, CorruptFileError, NonFiniteError, ShapeError
from saelens_lite.files import (
    DTYPES,
    Spec,
    check_fits_memory,
    read_json,
    read_tensors,
    shortened,
    tensor_specs,
    write_json,
)
from saelens_lite.format_detection import CONFIG_FILE, OWN, format_of, is_own_folder
from saelens_lite.kinds import DICTIONARY as KIND
from saelens_lite.outputs import new_folder, restore
from saelens_lite.places import local_folder
from saelens_lite.ports import Port, Ports, apart, as_ports, names, width
from saelens_lite.schemas import Checked, Positive, String, checked
from saelens_lite.sparsity import PublishedForm, Sparsity
from saelens_lite.state_dicts import float_tensors, in_order, sizes_of

FORMAT = 2  # 1 names hooks in the origin, and whether it is a transcoder
TOKEN_NORMS = {None: "none", "layer_norm": "layer_norm", "constant_norm": "constant_norm_rescale"}  # as SAELens calls them
WEIGHTS_FILE, SPARSITY_FILE, PLUGIN_FILE = "sae_weights.safetensors", "sparsity.safetensors", "plugin.safetensors"


class _Ours(Checked):
    """The content of metadata.saelens_lite in cfg.json."""

    format: Literal[2]
    reads: Annotated[list[Port], Field(min_length=1)]
    writes: list[Port] | None = None
    skip: bool = False
    token_norm: String | None = None
    sparsity: String
    options: dict[str, Any] = Field({})
    distribution: String | None = None
    version: String | None = None
    origin: Origin = Origin()
    training: dict[str, Any] = Field({})


class _Metadata(Checked, extra="ignore"):
    """The part of the metadata in cfg.json that is ours; the rest is for other tools."""

    saelens_lite: _Ours


class _Config(Checked, extra="ignore"):
    """The part of cfg.json that is read; the rest is for other tools."""

    d_in: Positive
    d_sae: Positive
    d_out: Positive | None = None
    dtype: Literal["float32", "float16", "bfloat16", "float64"]
    metadata: _Metadata

    @model_validator(mode="after")
    def _agrees(self) -> "_Config":
        ours = self.metadata.saelens_lite
        if (ours.writes is None) != (self.d_out is None):
            raise ValueError("d_out belongs to dictionaries whose write ports are others than their read ports")
        if width(ours.reads) != self.d_in or width(ours.writes or ()) != (self.d_out or 0):
            raise ValueError("the widths of the ports do not add up to d_in and d_out")
        return self


def _of_format_2(config: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a cfg.json of format 1, which names hooks in the origin, as that of format 2."""
    ours = config["metadata"]["saelens_lite"]
    origin, is_transcoder = ours.get("origin", {}), ours.get("transcoder", False)
    if not isinstance(origin, dict) or not isinstance(is_transcoder, bool) or ours.keys() & {"reads", "writes"}:
        raise CorruptFileError("metadata.saelens_lite is not that of format 1")
    origin = dict(origin)
    hook, target = origin.pop("hook", None), origin.pop("target_hook", None)
    if target is not None and not is_transcoder:
        raise CorruptFileError("it names a target hook, but is not of a transcoder")
    ports = {
        "reads": [{"hook": hook, "width": config.get("d_in")}],
        "writes": [{"hook": target, "width": config.get("d_out")}] if is_transcoder else None,
    }
    kept = {key: value for key, value in ours.items() if key != "transcoder"} | ports | {"format": FORMAT, "origin": origin}
    other = {} if is_transcoder else {"d_out": None}
    return config | other | {"metadata": config["metadata"] | {"saelens_lite": kept}}


class Dictionary(nn.Module):
    """An overcomplete set of directions and a sparse code over them, for the activations at its ports.

    Calling it on x: Float[... d_in] returns x_hat: Float[... d_out]. Where the rule is tied, W_enc is W_decᵀ, not a parameter
    of its own.
    """

    W_enc: Float[Tensor, "d_in d_sae"]
    W_dec: Float[Tensor, "d_sae d_out"]
    W_skip: Float[Tensor, "d_out d_in"] | None

    def __init__(
        self,
        rule: Sparsity,
        *,
        reads: Ports,
        writes: Ports | None = None,
        d_sae: int,
        skip: bool = False,
        origin: Origin | None = None,
        density: Float[Tensor, " d_sae"] | None = None,
        training: dict[str, Any] | None = None,
        token_norm: str | None = None,
    ):
        super().__init__()
        self.reads = as_ports(reads)
        self.writes = self.reads if writes is None else as_ports(writes)
        self.d_in, self.d_sae, self.d_out = width(self.reads), d_sae, width(self.writes)
        is_named = all(port.hook is not None for port in self.reads)
        self.writes_what_it_reads = writes is None or (self.reads == self.writes and is_named)
        if rule.tied and not (self.writes_what_it_reads and len(self.reads) == 1):
            raise ConfigError(f"{rule.plugin_name} encodes with the directions it decodes with, so it has one port for both")
        if skip and self.writes_what_it_reads:
            raise ConfigError("skip = True adds a linear map of the input to the output; it needs other write ports")
        if token_norm not in TOKEN_NORMS:
            raise ConfigError(f"token_norm = {token_norm!r}; expected one of {', '.join(map(str, TOKEN_NORMS))}")
        if token_norm and not (self.writes_what_it_reads and len(self.reads) == 1):
            raise ConfigError(f"token_norm = {token_norm!r} is for dictionaries that write the one port they read")
        self.token_norm = token_norm
        self.origin = origin or Origin()
        self.density = density
        self.training_record = training or {}
        self.source: str | None = None  # the address it was read from, with its revision; not stored
        self.rule = rule
        if not rule.tied:
            self.W_enc = nn.Parameter(torch.zeros(d_sae, self.d_in).T)  # in memory a row a latent, like W_dec
        self.b_enc = nn.Parameter(torch.zeros(d_sae)) if rule.encoder_bias or not self.writes_what_it_reads else None
        self.W_dec = nn.Parameter(torch.zeros(d_sae, self.d_out))
        self.b_dec = nn.Parameter(torch.zeros(self.d_out))
        self.W_skip = nn.Parameter(torch.zeros(self.d_out, self.d_in)) if skip else None

    def __getattr__(self, name: str) -> Any:
        if name == "W_enc" and self.rule.tied:
            return self.W_dec.T
        return super().__getattr__(name)

    @classmethod
    def create(
        cls,
        sparsity: str,
        *,
        reads: Ports,
        writes: Ports | None = None,
        d_sae: int,
        skip: bool = False,
        options: dict[str, Any] | None = None,
        seed: int = 0,
        origin: Origin | None = None,
    ) -> "Dictionary":
        """A fresh dictionary: random directions of one norm, W_enc = W_decᵀ, biases zero.

        With other `writes` than `reads`, directions of the input and of the output are drawn independently; W_skip is zero.

        Args:
            reads, writes: ports, or the width of a single one whose hook is not known. `writes` defaults to `reads`.

        Raises:
            PluginError: no such sparsity rule.
            ConfigError: an option the rule does not have, a bad value, or ports that the rule cannot have.
        """
        rule_class, d_in = registry.load(sparsity), width(as_ports(reads))
        rule = rule_class(rule_class.Config(**(options or {})), d_in=d_in, d_sae=d_sae)
        self = cls(rule, reads=reads, writes=writes, d_sae=d_sae, skip=skip, origin=origin)
        generator, norm = torch.Generator().manual_seed(seed), rule.initial_decoder_norm()
        directions = norm * _unit_rows(d_sae, d_in, generator)
        is_same = self.writes_what_it_reads
        self.W_dec.data.copy_(directions if is_same else norm * _unit_rows(d_sae, self.d_out, generator))
        if not rule.tied:
            self.W_enc.data.copy_(directions.T)
        return self.eval()

    @classmethod
    @torch.no_grad()
    def from_tensors(
        cls,
        *,
        W_dec: Any,
        W_enc: Any = None,
        b_enc: Any = None,
        b_dec: Any = None,
        W_skip: Any = None,
        rule: str = "l1",
        options: dict[str, Any] | None = None,
        reads: str | Ports | None = None,
        writes: str | Ports | None = None,
        origin: Origin | None = None,
        **rule_tensors: Any,
    ) -> "Dictionary":
        """Make a dictionary of the tensors of a state dict.

            h = (x − b_dec) W_enc + b_enc        codes = rule(h)        x_hat = codes W_dec + b_dec

        Where the encoder takes x itself, give b_enc + b_dec @ W_enc as b_enc.

        Args:
            W_enc: [d_in d_sae] or [d_sae d_in]; W_dec: [d_sae d_out] or [d_out d_sae]. Sizes decide which. A square matrix is
                taken in the first of these orders, and a warning is logged. A rule that encodes with W_decᵀ takes no W_enc.
            W_skip: [d_out d_in], or the other way round where the sizes differ; x W_skipᵀ is added to the output.
            b_enc, b_dec: zeros where they are not given.
            rule: name of the sparsity rule; options: its settings, such as {"k": 32}.
            rule_tensors: its other tensors, such as threshold= of jumprelu; a number counts for all latents.
            reads, writes: names of hooks, or ports. Without `writes`, and without W_skip, the output is of the ports that are
                read, and b_dec is taken off x.
            origin: where the activations come from.

        Everything is converted to float32.

        Raises:
            ShapeError: a tensor has another shape than the others demand, or is no tensor.
            NonFiniteError: a tensor holds NaN or infinity.
            ConfigError: an option is unknown, or a tensor is missing or unknown to the rule.
            PluginError: there is no such rule.
        """
        others = writes is not None or W_skip is not None
        rule_class = registry.load(rule)
        own, settings = rule_class.from_published(float_tensors(rule_tensors), options or {})
        given = float_tensors({"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec, "W_skip": W_skip})
        if missing := {"W_dec", *(() if rule_class.tied else ("W_enc",))} - given.keys():
            raise ConfigError(f"{rule} needs {' and '.join(sorted(missing))}")
        sizes = sizes_of(given | own, transcoder=others)
        d_in, d_sae, d_out = sizes["d_in"], sizes["d_sae"], sizes["d_out"]
        self = cls(
            rule_class(rule_class.Config(**settings), d_in=d_in, d_sae=d_sae),
            reads=_of_width(reads, d_in),
            writes=_of_width(writes, d_out) if others else None,
            d_sae=d_sae,
            skip=W_skip is not None,
            origin=origin or Origin(excluded_positions=()),
        )
        state, given = self.state_dict(), given | {f"rule.{name}": tensor for name, tensor in own.items()}
        form = self.rule.inference_form()
        needed = {f"rule.{name}" for name, _ in self.rule.named_parameters()}
        needed |= {f"rule.{name}" for name in (form.tensors if form else ()) if f"rule.{name}" in state}
        unknown, missing = given.keys() - state.keys(), needed - given.keys()
        if unknown or missing:
            of_rule = form.tensors if form else [name.removeprefix("rule.") for name in needed]
            missing = missing and ({name for name in of_rule if f"rule.{name}" not in given} or missing)
            lists = [{name for name in state if not name.startswith("rule.")}, set(of_rule), unknown, missing]
            taken, own_names, surplus, absent = (
                ", ".join(sorted(n.removeprefix("rule.") for n in some)) or "none" for some in lists
            )
            raise ConfigError(
                f"{rule} takes {taken} and, of its own, {own_names}; tensors missing: {absent}; not expected: {surplus}"
            )
        for name, tensor in given.items():
            state[name].copy_(in_order(name.removeprefix("rule."), tensor, *state[name].shape))
        norms = torch.linalg.vector_norm(self.W_dec, dim=1)
        if rule_class.tied and (norms - 1).abs().max() > 1e-3:
            raise ConfigError(f"rows of W_dec have norms {norms.min():.3g} to {norms.max():.3g}; {rule} needs unit vectors")
        return self.eval()

    @property
    def input_bias(self) -> Float[Tensor, " d_in"] | None:
        """Bias that is subtracted from x before it is encoded: b_dec, or none where the output is of other ports."""
        return self.b_dec if self.writes_what_it_reads else None

    @property
    def ports(self) -> dict[str, tuple[Port, ...] | None]:
        """The arguments reads and writes that give another dictionary the same ports."""
        return {"reads": self.reads, "writes": None if self.writes_what_it_reads else self.writes}

    @property
    def hook(self) -> str | None:
        """The hook that is read; None where there are several, or where it is not known."""
        return self.reads[0].hook if len(self.reads) == 1 else None

    @property
    def place(self) -> str:
        """The hooks of the dictionary in words, such as "blocks.1.hook_resid_pre" or "blocks.1.ln2 → blocks.1.hook_mlp_out"."""
        return names(self.reads) if self.writes_what_it_reads else f"{names(self.reads)} → {names(self.writes)}"

    def decoder_norms(self) -> Float[Tensor, " d_sae"]:
        """The norm of each latent's direction: the sum over write ports of ‖W_dec[i, port]‖; differentiable."""
        first, *others = (torch.linalg.vector_norm(part, dim=1) for part in apart(self.W_dec, self.writes))
        return sum(others, first)

    def as_input(self, x: Float[Tensor, "*shape d_in"] | ArrayLike) -> Float[Tensor, "*shape d_in"]:
        """Return activations as a tensor, arrays and lists on the device of the parameters.

        Raises:
            ShapeError: x is not an array of numbers, or its last axis has not d_in entries.
            ConfigError: x is a tensor on another device.
        """
        x = as_tensor(x, device=self.W_dec.device)
        self.check_input(x)
        return x

    def check_input(self, x: Tensor | ArrayLike) -> None:
        """Raise ShapeError unless x is a tensor whose last axis has d_in entries, ConfigError unless it is where the
        parameters are."""
        if not isinstance(x, Tensor):
            raise ShapeError(f"x is {described(x)}; expected a tensor [..., {self.d_in}]")
        if x.ndim == 0 or x.shape[-1] != self.d_in:
            raise ShapeError(f"x has shape {tuple(x.shape)}; this dictionary takes [..., {self.d_in}] ({names(self.reads)})")
        if x.device != self.W_dec.device:
            raise ConfigError(
                f"x is on {x.device}, the dictionary on {self.W_dec.device}; move one of them: dictionary.to({str(x.device)!r})"
            )

    def not_finite(self) -> str | None:
        """Return the name of the first parameter or buffer that holds NaN or infinity; None where all are finite."""
        return next((name for name, tensor in self.state_dict().items() if not torch.isfinite(tensor).all()), None)

    def check_finite(self) -> None:
        """Raise NonFiniteError when a parameter is NaN or infinite."""
        if name := self.not_finite():
            raise NonFiniteError(f"{name} of the dictionary holds NaN or infinity")

    def pre(self, x: Float[Tensor, "*shape d_in"] | ArrayLike) -> Float[Tensor, "*shape d_sae"]:
        """Pre-activations h = (x − b_dec) W_enc + b_enc; of a transcoder, x W_enc + b_enc."""
        x = self.as_input(x)
        x = self._normalised(x.to(self.W_enc.dtype))
        h = (x if self.input_bias is None else x - self.input_bias) @ self.W_enc
        return h if self.b_enc is None else h + self.b_enc

    def encode(self, x: Float[Tensor, "*shape d_in"] | ArrayLike) -> SparseCodes:
        """Which latents fire for each activation, and how strongly; differentiable in x and the parameters.

        x: a tensor on the device of the parameters, an array of numpy, a DataFrame or a list of numbers.

        Raises:
            ShapeError: the last axis of x is not d_in, or x holds something other than numbers.
            PluginError: the sparsity rule gives negative codes.
        """
        x = self.as_input(x)
        flat = self._normalised(x.reshape(-1, self.d_in).to(self.W_enc.dtype))
        codes = self.rule.encode(Encoder(self.W_enc, self.b_enc, self.input_bias, flat))
        codes = codes._replace(shape=tuple(x.shape[:-1]))
        if bool((codes.value > 0).all()):
            return codes
        self.rule.check_codes(float(codes.value.detach().amin()))
        return codes.without_zeros()

    def decode(
        self,
        codes: SparseCodes | Float[Tensor, "*shape d_sae"] | ArrayLike,
        x: Float[Tensor, "*shape d_in"] | ArrayLike | None = None,
    ) -> Float[Tensor, "*shape d_out"]:
        """x_hat of sparse or dense codes.

        x: what was encoded. A skip connection is left out without it; where there is a token_norm it is required.

        Raises:
            ConfigError: the dictionary normalises each activation, and x was not given.
            ShapeError: the last axis of dense codes is not d_sae, or that of x not d_in.
        """
        x = None if x is None else self.as_input(x)
        if not isinstance(codes, SparseCodes):
            codes = self._dense_codes(codes)
        x_hat = codes.decode(self.W_dec) if isinstance(codes, SparseCodes) else codes @ self.W_dec
        x_hat = x_hat + self.base(x)
        if self.token_norm is None:
            return x_hat
        if x is None:
            raise ConfigError(f"decode(codes, x) needs x: this dictionary undoes the {self.token_norm} of each activation")
        mean, scale = self._statistics(x.to(x_hat.dtype))
        return x_hat * scale + mean

    def _dense_codes(self, codes: ArrayLike) -> Float[Tensor, "*shape d_sae"]:
        """Return dense codes as a tensor of the parameters' dtype where they were an array or a list."""
        if not isinstance(codes, Tensor):
            codes = as_tensor(codes, "codes", self.W_dec.device).to(self.W_dec.dtype)
        if codes.ndim == 0 or codes.shape[-1] != self.d_sae:
            raise ShapeError(f"codes have shape {tuple(codes.shape)}; this dictionary takes [..., {self.d_sae}]")
        return codes

    def output_scale(self, x: Float[Tensor, "*shape d_in"]) -> Float[Tensor, "*shape_or_none 1"]:
        """What Σ_i f_i W_dec[i] is multiplied by for each x: 1, unless each activation is normalised by itself."""
        if self.token_norm is None:
            return self.W_dec.new_ones(1)
        return self._statistics(x.to(self.W_dec.dtype))[1]

    def _statistics(self, x: Float[Tensor, "*shape d_in"]) -> tuple[Tensor, Tensor]:
        """(mean, scale) of each activation, by which it is normalised."""
        if self.token_norm == "constant_norm":
            return x.new_zeros(()), x.norm(dim=-1, keepdim=True) / self.d_in**0.5
        return x.mean(-1, keepdim=True), x.std(-1, keepdim=True)

    def _normalised(self, x: Float[Tensor, "*shape d_in"]) -> Float[Tensor, "*shape d_in"]:
        """What is encoded in the place of x: (x − mean) / (std + 1e-5) with layer_norm, √d_in x / ‖x‖ with constant_norm."""
        if self.token_norm is None:
            return x
        mean, scale = self._statistics(x)
        return (x - mean) / (scale + 1e-5 if self.token_norm == "layer_norm" else scale)

    def base(self, x: Float[Tensor, "*shape d_in"] | None = None) -> Float[Tensor, "*shape_or_none d_out"]:
        """What decoded codes are added to: b_dec, and x W_skipᵀ where there is a skip connection."""
        if self.W_skip is None or x is None:
            return self.b_dec
        return self.b_dec + x.to(self.W_skip.dtype) @ self.W_skip.T

    def check_edits(self, edits: Sequence[Edit]) -> None:
        """Raise ConfigError when an edit is of a latent that the dictionary does not have."""
        largest = max((latent for edit in edits for latent in edit.latents), default=0)
        if largest >= self.d_sae:
            raise ConfigError(f"no latent {largest}; this dictionary has latents 0 to {self.d_sae - 1}")

    def change(
        self,
        x: Float[Tensor, "*shape d_in"] | ArrayLike,
        edits: Sequence[Edit],
        at: Sequence[Bool[Tensor, "..."]] | None = None,
    ) -> Float[Tensor, "*shape d_out"]:
        """What edits of the codes of x, one after the other, add to the output: output_scale · Σ_i (new_i − old_i) W_dec[i].

        at: for each edit the activations it is for, to be broadcast to the leading shape of x; default: all of them.

        Raises:
            ConfigError: an edit of a latent that the dictionary does not have.
            ShapeError: the last axis of x is not d_in.
        """
        x = self.as_input(x)
        self.check_edits(edits)
        shape = x.shape[:-1]
        if at is None:
            at = [torch.ones(shape, dtype=torch.bool, device=x.device)] * len(edits)
        at = torch.broadcast_tensors(*at) if edits else ()
        total = self.W_dec.new_zeros(*shape, self.d_out)
        if any(edit.offset for edit in edits):
            total = total + offsets(edits, at, self.W_dec)
        if any(edit.gain != 1 for edit in edits):  # else no code need be known
            total = total + scaled(self.encode(x), edits, at).decode(self.W_dec)
        return total * self.output_scale(x)

    def forward(self, x: Float[Tensor, "*shape d_in"] | ArrayLike) -> Float[Tensor, "*shape d_out"]:
        """x_hat, in the dtype of x."""
        x = self.as_input(x)
        return self.decode(self.encode(x), x).to(x.dtype)

    @torch.no_grad()
    def fold_scales_(self, reads: Sequence[float], writes: Sequence[float]) -> "Dictionary":
        """Turn a dictionary of scaled activations into one of raw ones, with the same codes (of a tied rule, codes of x).

        Args:
            reads: for each read port, the number that its activations were multiplied by.
            writes: for each write port, the number that the output is divided by.
        """
        if not self.rule.tied:
            for scale, rows in zip(reads, apart(self.W_enc.T, self.reads), strict=True):
                rows.mul_(scale)
        for i, out in enumerate(writes):
            if not self.rule.tied:
                apart(self.W_dec, self.writes)[i].div_(out)
            apart(self.b_dec, self.writes)[i].div_(out)
            if self.W_skip is not None:
                for scale, columns in zip(reads, apart(apart(self.W_skip.T, self.writes)[i].T, self.reads), strict=True):
                    columns.mul_(scale / out)
        return self

    @torch.no_grad()
    def fold_shift_(self, shift: Float[Tensor, " d_in"]) -> "Dictionary":
        """Turn a dictionary of x − shift into one of x, with the same codes and output. Its output is of other ports."""
        self.b_enc.sub_(shift @ self.W_enc)
        if self.W_skip is not None:
            self.b_dec.sub_(self.W_skip @ shift)
        return self

    @torch.no_grad()
    def fold_decoder_norms_(self) -> "Dictionary":
        """Make decoder rows unit vectors and put their norms into the codes; x_hat stays the same.

        Rules whose codes do not scale latent by latent (top-k) are left as they are.
        """
        if not self.rule.homogeneous:
            return self
        norms = self.decoder_norms()
        norms = torch.where(norms > 0, norms, 1)
        self.W_enc.mul_(norms)
        if self.b_enc is not None:
            self.b_enc.mul_(norms)
        self.W_dec.div_(norms[:, None])
        self.rule.rescale_(norms)
        return self

    def save(self, path: str | Path, *, exists: Literal["error", "overwrite"] = "error") -> Path:
        """Write the dictionary folder; it appears whole or not at all.

        Raises:
            OutputExistsError: the folder holds something and `exists` is "error".
            NonFiniteError: a parameter is NaN or infinite.
        """
        from safetensors.torch import save_file

        own = {k: v for k, v in self.state_dict().items() if not k.startswith("rule.")}
        if name := self.not_finite():
            raise NonFiniteError(f"{name} is not finite; a dictionary with NaN or infinity is not written")
        form = self.rule.inference_form()
        published = dict(form.tensors) if form else {}
        extra = {k.removeprefix("rule."): v for k, v in self.state_dict().items() if k.startswith("rule.")}
        extra = {k: v for k, v in extra.items() if k not in published}
        with new_folder(Path(path), KIND, exists) as folder:
            save_file({k: v.detach().cpu().contiguous() for k, v in (own | published).items()}, folder / WEIGHTS_FILE)
            if extra:
                save_file({k: v.detach().cpu().contiguous() for k, v in extra.items()}, folder / PLUGIN_FILE)
            if self.density is not None:
                save_file({"sparsity": (self.density.cpu().float() + 1e-10).log10()}, folder / SPARSITY_FILE)
            write_json(folder / CONFIG_FILE, self._config())
        return Path(path)

    def _architecture(self, form: PublishedForm | None) -> str:
        """What other tools call it; the rule's own name where they have none."""
        if len(self.reads) + len(self.writes) > 2:
            return f"{self.rule.plugin_name}_crosscoder"
        if self.writes_what_it_reads:
            return form.architecture if form else self.rule.plugin_name
        kind = "transcoder" if self.W_skip is None else "skip_transcoder"
        if form and form.architecture in ("standard", "jumprelu"):
            return kind if form.architecture == "standard" else f"jumprelu_{kind}"
        return f"{self.rule.plugin_name}_{kind}"

    def _config(self) -> dict[str, Any]:
        """The content of cfg.json."""
        form = self.rule.inference_form()
        plugin = registry.find(self.rule.plugin_name)
        return {
            "architecture": self._architecture(form),
            "d_in": self.d_in,
            "d_sae": self.d_sae,
            **({} if self.writes_what_it_reads else {"d_out": self.d_out}),
            "dtype": str(self.W_enc.dtype).removeprefix("torch."),
            "device": "cpu",
            "apply_b_dec_to_input": self.writes_what_it_reads,
            "normalize_activations": TOKEN_NORMS[self.token_norm],
            "reshape_activations": "none",
            **(form.settings if form else {}),
            "metadata": {
                "sae_lens_version": "6.0.0",  # without it SAELens reads the file as an old one and drops the metadata
                "model_name": self.origin.model,
                "model_class_name": self.origin.model_class or "AutoModelForCausalLM",
                "hook_name": self.reads[0].hook,
                **({} if self.writes_what_it_reads else {"hook_name_out": self.writes[0].hook}),
                "hook_head_index": None,
                "context_size": self.origin.n_ctx,
                "prepend_bos": self.origin.prepend_bos,
                "dataset_path": self.origin.text,
                **self._tokens_left_out(),
                "model_from_pretrained_kwargs": dict.fromkeys(self.origin.processing, True),
                "saelens_lite": {
                    "format": FORMAT,
                    "reads": [port.model_dump() for port in self.reads],
                    "writes": None if self.writes_what_it_reads else [port.model_dump() for port in self.writes],
                    "skip": self.W_skip is not None,
                    **({"token_norm": self.token_norm} if self.token_norm else {}),
                    "sparsity": self.rule.plugin_name,
                    "options": self.rule.config.model_dump(),
                    "distribution": f"{plugin.distribution} {plugin.version}" if plugin.entry_point else None,
                    "version": importlib.metadata.version("saelens-lite"),
                    "origin": self.origin.model_dump(),
                    "training": self.training_record,
                },
            },
        }

    def _tokens_left_out(self) -> dict[str, Any]:
        """Excluded positions and token ids as SAELens says them; positions that are no slice of a row are left out."""
        kept = slice_without(self.origin.excluded_positions, self.origin.n_ctx)
        token_ids = list(self.origin.excluded_token_ids)
        return ({"seqpos_slice": kept} if kept else {}) | ({"exclude_special_tokens": token_ids} if token_ids else {})

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu", format: str | None = None) -> "Dictionary":
        """The dictionary in a folder written by `save`, in a file or folder of another tool, or in either on the Hub:
        hf://user/repo/folder@revision.

        format: name of the format plugin to read it with, or "saelens_lite"; only needed where the files are pickles.

        Raises:
            CorruptFileError: a file is missing, damaged, contradicts another, or is of no known format.
            ConfigError: what another tool's file holds cannot be represented here, or is a pickle and `format` was not given.
            PluginError: its sparsity rule is not installed; the message names the distribution that wrote it.
            HubError: it cannot be fetched from the Hub.
        """
        folder, source = local_folder(path)
        restore(folder)
        own = format in (None, OWN) and is_own_folder(folder)
        loaded = cls._load_own(folder) if own else format_of(folder, format).read(folder)
        loaded.source = source
        return loaded.to(device).eval()

    @classmethod
    def _load_own(cls, folder: Path) -> "Dictionary":
        config = read_json(folder / CONFIG_FILE, finite=True)
        ours = config["metadata"]["saelens_lite"]
        if not isinstance(ours, dict) or ours.get("format") not in (1, FORMAT):
            raise CorruptFileError(
                f"{folder / CONFIG_FILE} was not written by this version of saelens_lite (metadata.saelens_lite.format is "
                f"{ours.get('format') if isinstance(ours, dict) else 'absent'!r:.40}, expected 1 or {FORMAT})"
            )
        try:
            newer = config if ours["format"] == FORMAT else _of_format_2(config)
        except CorruptFileError as error:
            raise CorruptFileError(f"{folder / CONFIG_FILE} is damaged: {error}") from None
        said = checked(folder / CONFIG_FILE, newer, _Config)
        ours, d_in, d_sae = said.metadata.saelens_lite, said.d_in, said.d_sae
        d_out = said.d_out
        rule_class = registry.load(ours.sparsity, written_by=ours.distribution)
        specs = _own_names(folder, tensor_specs)
        found = specs["W_dec"].shape if "W_dec" in specs else None
        wanted = (d_sae, d_in if d_out is None else d_out)
        if found != wanted:  # else a forged size would be allocated
            raise CorruptFileError(f"{folder / WEIGHTS_FILE}: W_dec has shape {found}, cfg.json says {wanted}")
        if d_out is not None and ("W_enc" not in specs or specs["W_enc"].shape != (d_in, d_sae)):
            raise CorruptFileError(f"{folder / WEIGHTS_FILE}: W_enc is missing or not of shape {(d_in, d_sae)}")
        check_fits_memory(folder, sum(spec.nbytes for spec in specs.values()))
        try:
            rule = rule_class(rule_class.Config(**ours.options), d_in=d_in, d_sae=d_sae)
            self = cls(
                rule,
                reads=ours.reads,
                writes=ours.writes,
                d_sae=d_sae,
                skip=ours.skip,
                origin=ours.origin,
                training=ours.training,
                token_norm=ours.token_norm or None,
            )
        except (ConfigError, TypeError, ValueError) as error:
            raise CorruptFileError(f"{folder / CONFIG_FILE}: {error}") from None
        form = rule.inference_form()
        _check_state(folder, specs, self.to(DTYPES[said.dtype]).state_dict(), optional=set(form.tensors) if form else set())
        self._check_published(folder, config, specs)
        self.load_state_dict(_own_names(folder, read_tensors), strict=False)
        self.density = read_density(folder, d_sae)
        return self

    def _check_published(self, folder: Path, config: dict[str, Any], state: dict[str, Spec]) -> None:
        """Raise CorruptFileError where cfg.json tells other tools something else than us."""
        expected = self._config()
        del expected["metadata"], expected["device"]
        for key, value in expected.items():
            if key in config and config[key] != value:
                raise CorruptFileError(
                    f"{folder / CONFIG_FILE}: {key} is {config[key]!r}, but metadata.saelens_lite makes it {value!r}"
                )
        for name in ("W_dec", "b_dec"):
            if state[name].dtype != self.W_dec.dtype:
                raise CorruptFileError(f"{folder}: {name} is of {state[name].dtype}, cfg.json says {config['dtype']}")

    def extra_repr(self) -> str:
        rule = getattr(self.rule, "plugin_name", "?")
        target = "" if self.writes_what_it_reads else f", d_out={self.d_out}"
        return f"d_in={self.d_in}, d_sae={self.d_sae}, sparsity={rule!r}, {self.place}{target}"


def _own_names(folder: Path, read: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Return what `read` gives for the tensors of both files, by our names. CorruptFileError where a name is in both."""
    own = ("W_enc", "b_enc", "W_dec", "b_dec", "W_skip")
    found = {k if k in own or k.startswith("rule.") else f"rule.{k}": v for k, v in read(folder / WEIGHTS_FILE).items()}
    if not os.path.lexists(folder / PLUGIN_FILE):
        return found
    extra = {f"rule.{k}": v for k, v in read(folder / PLUGIN_FILE).items()}
    if both := found.keys() & extra.keys():
        raise CorruptFileError(f"{folder}: {WEIGHTS_FILE} and {PLUGIN_FILE} both hold {shortened(both)}")
    return found | extra


def _of_width(given: str | Ports | None, d: int) -> tuple[Port, ...]:
    """Return ports that were given by name, or not at all, with their width."""
    ports = (Port(hook=given, width=d),) if given is None or isinstance(given, str) else as_ports(given)
    if width(ports) != d:
        raise ShapeError(f"the tensors have {d} entries for {names(ports)}, which has {width(ports)}")
    return ports


def read_density(folder: Path, d_sae: int) -> Float[Tensor, " d_sae"] | None:
    """How often each latent fires, from sparsity.safetensors; None where there is none.

    Raises:
        CorruptFileError: it is damaged, or not about d_sae latents.
    """
    path = folder / SPARSITY_FILE
    if not os.path.lexists(path):
        return None
    found = tensor_specs(path)
    if found.keys() != {"sparsity"} or found["sparsity"].shape != (d_sae,) or not found["sparsity"].dtype.is_floating_point:
        raise CorruptFileError(f"{path}: expected a tensor 'sparsity' of shape {(d_sae,)}")
    log_density = read_tensors(path)["sparsity"]
    return (10.0 ** log_density.double() - 1e-10).clamp(0, 1).float()


def slice_without(excluded: Sequence[int], n_ctx: int | None) -> list[int | None] | None:
    """The [start, stop, step] of `row[start:stop:step]` that leaves out those positions and no others.

    None where nothing is left out, where no slice does it, or where it depends on a row's length that is not known.
    """
    excluded = sorted({position for position in excluded if n_ctx is None or position < n_ctx})
    if not excluded:
        return None
    if excluded == list(range(len(excluded))) and len(excluded) != n_ctx:
        return [len(excluded), None]
    left_out = set(excluded)
    if n_ctx is None or len(left_out) == n_ctx:
        return None
    first, last = (next(p for p in positions if p not in left_out) for positions in (range(n_ctx), range(n_ctx)[::-1]))
    step = next((p - first for p in range(first + 1, n_ctx) if p not in left_out), 1)
    n_kept = n_ctx - len(left_out)
    if n_kept != (last - first) // step + 1 or any((p - first) % step == 0 for p in excluded if first < p < last):
        return None
    return [first, None if last + step >= n_ctx else last + 1, *([step] if step > 1 else [])]


def _unit_rows(n: int, d: int, generator: torch.Generator) -> Float[Tensor, "n d"]:
    """Random unit vectors."""
    rows = torch.randn(n, d, generator=generator)
    return rows / rows.norm(dim=1, keepdim=True)


def _check_state(folder: Path, found: dict[str, Spec], expected: dict[str, Tensor], optional: set[str]) -> None:
    """Raise CorruptFileError unless names and shapes fit; a published tensor may be derived rather than stored."""
    missing = expected.keys() - found.keys()
    surplus = {k for k in found.keys() - expected.keys() if k.removeprefix("rule.") not in optional}
    if missing or surplus:
        raise CorruptFileError(f"{folder}: tensors missing: {sorted(missing) or 'none'}; not expected: {shortened(surplus)}")
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape:
            raise CorruptFileError(f"{folder}: {name} has shape {tuple(found[name].shape)}, expected {tuple(tensor.shape)}")
        if found[name].dtype not in DTYPES.values():
            raise CorruptFileError(f"{folder}: {name} has dtype {found[name].dtype}; expected one of {', '.join(DTYPES)}")
