"""A sparse dictionary: W_enc, b_enc, W_dec, b_dec and the rule that makes codes sparse.

    h = (x − b_dec) W_enc + b_enc        codes = rule(h)        x_hat = codes W_dec + b_dec

x are the activations at the read ports, and x_hat replaces those at the write ports (see `saelens_lite.ports`). If the ports
differ, as in a transcoder (Dunefsky et al. 2024, arXiv:2406.11944), with or without a skip connection (Paulo et al. 2025,
arXiv:2501.18823), b_dec is a bias of the output only:

    h = x W_enc + b_enc                  codes = rule(h)        y_hat = codes W_dec + b_dec + x W_skipᵀ

Dictionaries of other tools may normalise each activation separately. No weights can express this, so it is a setting of its
own, `token_norm`.

On disk a dictionary is a folder that SAELens 6 can load: cfg.json, sae_weights.safetensors, sparsity.safetensors. Settings that
SAELens does not know are under `metadata.saelens_lite` in cfg.json. Tensors of the rule that the published architecture does
not have are in plugin.safetensors.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from saelens_lite import registry
from saelens_lite.arrays import ArrayLike, as_tensor, described, not_finite
from saelens_lite.codes import SparseCodes
from saelens_lite.codes.change import CodeChange, offsets, scaled
from saelens_lite.codes.encoder import Encoder
from saelens_lite.config import Origin
from saelens_lite.dictionary.folder import (
    CONFIG_FILE,
    PLUGIN_FILE,
    SPARSITY_FILE,
    TOKEN_NORMS,
    WEIGHTS_FILE,
    check_published,
    check_state,
    is_own,
    own_names,
    read_density,
    read_settings,
    settings_of,
)
from saelens_lite.dictionary.modules import dictionary_of_module
from saelens_lite.dictionary.tensors import dictionary_of
from saelens_lite.errors import ConfigError, CorruptFileError, NonFiniteError, ShapeError
from saelens_lite.files import check_fits_memory, differences, named_file, read_json, write_json
from saelens_lite.kinds import DICTIONARY as KIND
from saelens_lite.outputs import new_folder, restore
from saelens_lite.paths import check_input, is_address
from saelens_lite.ports import Port, Ports, apart, as_ports, names, width
from saelens_lite.sparsity import Sparsity, normalise_decoder_
from saelens_lite.tensor_files import DTYPES, read_tensors, tensor_specs

__all__ = ["Dictionary"]


class Dictionary(nn.Module):
    """An overcomplete set of directions, with a sparse code over them, for the activations at its ports.

    Calling it on x: Float[... d_in] returns x_hat: Float[... d_out]. If the rule is tied, W_enc is W_decᵀ and not a parameter.
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
            raise ConfigError(f"{rule.plugin_name} encodes with W_decᵀ, so it must write the one port that it reads")
        if skip and self.writes_what_it_reads:
            raise ConfigError("skip = True maps the input to the output, so it needs write ports other than the read ports")
        if token_norm not in TOKEN_NORMS:
            raise ConfigError(f"token_norm = {token_norm!r}; expected one of {', '.join(map(str, TOKEN_NORMS))}")
        if token_norm and not (self.writes_what_it_reads and len(self.reads) == 1):
            raise ConfigError(f"token_norm = {token_norm!r} needs a dictionary that writes the one port that it reads")
        self.token_norm = token_norm
        self.origin = (origin or Origin()).among(
            {name for port in (*self.reads, *self.writes) for name in (port.model, port.minus)}
        )
        self.density = density
        self.training_record = training or {}
        self.source: str | None = None  # the address `saelens_lite.load` read it from, of the Hub with the revision; not stored
        self.history: list[dict[str, Any]] = []  # the lines of the log of `fit`; not stored
        self.rule = rule
        if not rule.tied:
            self.W_enc = nn.Parameter(torch.zeros(d_sae, self.d_in).T)  # each latent is a row in memory, as in W_dec
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
        """Return a new dictionary with random directions of equal norm and zero biases. Columns of W_enc are these directions.

        If `writes` differs from `reads`, the rows of W_enc and W_dec are drawn independently, and W_skip is zero. Decoder norms
        are 1. Each port gets directions of its own, also one hook in several models: where all models begin with the same ones,
        latents go to what the models share, and fewer find what one has alone (88 % instead of 98 % of planted directions).

        Args:
            reads, writes: ports, or the width of a single port whose hook is not known. `writes` is `reads` by default.

        Raises:
            PluginError: there is no such sparsity rule.
            ConfigError: an option is unknown or has a bad value, or the rule does not support the ports.
        """
        rule_class, d_in = registry.load(sparsity), width(as_ports(reads))
        rule = rule_class(rule_class.Config(**(options or {})), d_in=d_in, d_sae=d_sae)
        self = cls(rule, reads=reads, writes=writes, d_sae=d_sae, skip=skip, origin=origin)
        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(d_sae, d_in, generator=generator)
        is_same = self.writes_what_it_reads
        self.W_dec.data.copy_(directions if is_same else torch.randn(d_sae, self.d_out, generator=generator))
        normalise_decoder_(self)
        if not rule.tied:
            self.W_enc.data.copy_((directions / directions.norm(dim=1, keepdim=True)).T)
        return self.eval()

    @classmethod
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
        mean: Any = None,
        scale: Any = None,
        subtract_b_dec: bool | None = None,
        token_norm: str | None = None,
        hook: str | None = None,
        reads: str | Ports | None = None,
        writes: str | Ports | None = None,
        d_in: int | None = None,
        d_sae: int | None = None,
        axes: dict[str, str] | None = None,
        origin: Origin | None = None,
        **rule_tensors: Any,
    ) -> "Dictionary":
        """Return a dictionary made of tensors, arrays or lists, converted to float32.

            z = (x − mean) · scale      h = (z − b_dec) W_enc + b_enc      codes = rule(h)
            x_hat = (codes W_dec + b_dec) / scale + mean

        All of it is folded into the weights, so that the dictionary takes raw activations.

        Args:
            W_enc, W_dec: [d_in d_sae] and [d_sae d_out], or transposed; the sizes decide. A rule that encodes with W_decᵀ takes
                no W_enc.
            W_skip: [d_out d_in], or transposed; the sizes decide. x W_skipᵀ is added to the output.
            b_enc, b_dec: zeros by default.
            rule: name of the sparsity rule.
            options: settings of the rule, such as {"k": 32}.
            mean, scale: subtracted from x, which is then multiplied; a number or one for each entry of x. Autoencoders only.
            subtract_b_dec: False if your encoder does not subtract b_dec from z, so that h = z W_enc + b_enc. Default: True,
                but False if the output is of another hook.
            token_norm: "layer_norm" or "constant_norm" of each activation, before b_dec is subtracted.
            hook: the hook that is read and written; with `writes`, only read.
            reads, writes: hook names or ports. Without `writes` and W_skip the dictionary writes the ports that it reads. The
                same hook in both also makes an autoencoder.
            d_in, d_sae: width of x and number of latents; only needed if the tensors do not decide.
            axes: order of the axes of square matrices, such as {"W_enc": "d_sae d_in", "W_dec": "d_out d_sae"}.
            origin: the model and text that the activations come from.
            rule_tensors: other tensors of the rule, such as threshold= (or log_threshold=) of jumprelu. A number counts for all
                latents.

        Raises:
            ShapeError: a tensor does not fit the others, is not a tensor, or its sizes do not decide which axis is which.
            NonFiniteError: a tensor holds NaN or infinity.
            ConfigError: an option is unknown, a tensor is missing or unknown to the rule, or settings contradict each other.
            PluginError: there is no such rule.
        """
        return dictionary_of(
            cls,
            {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec, "W_skip": W_skip},
            rule_tensors,
            rule=rule,
            options=options,
            mean=mean,
            scale=scale,
            subtract_b_dec=subtract_b_dec,
            token_norm=token_norm,
            d_in=d_in,
            d_sae=d_sae,
            axes=axes,
            hook=hook,
            reads=reads,
            writes=writes,
            origin=origin,
        )

    @classmethod
    def from_module(
        cls,
        module: Any,
        x: Float[Tensor, "*shape d_in"] | ArrayLike,
        *,
        rule: str | None = None,
        options: dict[str, Any] | None = None,
        hook: str | None = None,
        names: dict[str, str] | None = None,
        output: Callable[[Tensor], Any] | None = None,
        tolerance: float = 1e-4,
        **settings: Any,
    ) -> "Dictionary":
        """Return the dictionary that computes what a torch module of another tool computes.

        The module's tensors are recognised by their names. Where they leave open what the module does with them (is b_dec
        subtracted from x, ReLU or top-k, …), the possibilities are tried on x. The one that reproduces x_hat, and the codes if
        the module has `encode`, is returned. If none does, or several do, an error says so.

        Args:
            module: a torch module, or another object that can be called and has tensors. It is run in evaluation mode, and in
                float32 if it is of half precision.
            x: activations of its hook, a few hundred or more.
            rule, options: the sparsity rule and its settings, if known. Without `rule`, ReLU, top-k, JumpReLU and gated are
                tried; k is an attribute of the module or its settings.
            names: our name → theirs, for tensors whose names are not recognised, such as {"W_enc": "analysis"}.
            output: function of x that returns x_hat, if calling the module returns something else.
            tolerance: largest error of an activation, relative to its own norm or, if larger, to the median norm. Rules with a
                jump may differ on 1 % of the activations, because pre-activations may be nearly equal; a warning is logged.
            hook, settings: other arguments of `from_tensors`, such as mean= and writes=.

        Raises:
            ConfigError: no description reproduces the module's output, or x does not decide between several; the tensors are
                not recognised; the module fails on x.
        """
        return dictionary_of_module(
            cls,
            module,
            x,
            rule=rule,
            options=options,
            names=names,
            output=output,
            tolerance=tolerance,
            settings=settings | ({} if hook is None else {"hook": hook}),
        )

    @property
    def input_bias(self) -> Float[Tensor, " d_in"] | None:
        """The bias that is subtracted from x before the encoder: b_dec, or None if the write ports are not the read ports."""
        return self.b_dec if self.writes_what_it_reads else None

    @property
    def ports(self) -> dict[str, tuple[Port, ...] | None]:
        """The arguments `reads` and `writes` that give another dictionary the same ports."""
        return {"reads": self.reads, "writes": None if self.writes_what_it_reads else self.writes}

    @property
    def hook(self) -> str | None:
        """The hook that is read; None if there are several, if it is not known, or if a difference of models is read."""
        return self.reads[0].hook if len(self.reads) == 1 and self.reads[0].minus is None else None

    @property
    def place(self) -> str:
        """The hooks of the dictionary in words, such as "blocks.1.hook_resid_pre" or "blocks.1.ln2 → blocks.1.hook_mlp_out"."""
        return names(self.reads) if self.writes_what_it_reads else f"{names(self.reads)} → {names(self.writes)}"

    def decoder_norms(self) -> Float[Tensor, " d_sae"]:
        """Return the norm of each latent's direction: the sum over write ports of ‖W_dec[i, port]‖; differentiable."""
        first, *others = (torch.linalg.vector_norm(part, dim=1) for part in apart(self.W_dec, self.writes))
        return sum(others, first)

    def as_input(self, x: Float[Tensor, "*shape d_in"] | ArrayLike) -> Float[Tensor, "*shape d_in"]:
        """Return activations as a tensor. Arrays and lists are put on the device of the parameters.

        Raises:
            ShapeError: x is not an array of numbers, or its last axis does not have d_in entries.
            ConfigError: x is a tensor on another device.
        """
        x = as_tensor(x, device=self.W_dec.device)
        self.check_input(x)
        return x

    def check_input(self, x: Tensor | ArrayLike) -> None:
        """Raise an error unless x can be encoded.

        Raises:
            ShapeError: x is not a tensor, or its last axis does not have d_in entries.
            ConfigError: x is not on the device of the parameters.
        """
        if not isinstance(x, Tensor):
            raise ShapeError(f"x is {described(x)}; expected a tensor [..., {self.d_in}]")
        if x.ndim == 0 or x.shape[-1] != self.d_in:
            raise ShapeError(f"x has shape {tuple(x.shape)}; this dictionary takes [..., {self.d_in}] ({names(self.reads)})")
        if x.device != self.W_dec.device:
            raise ConfigError(
                f"x is on {x.device}, the dictionary on {self.W_dec.device}; move one of them: dictionary.to({str(x.device)!r})"
            )

    def not_finite(self) -> str | None:
        """Return the name of the first parameter or buffer that holds NaN or infinity; None if all are finite."""
        return next(iter(not_finite(self.state_dict())), None)

    def check_finite(self) -> None:
        """Raise NonFiniteError if a parameter or buffer holds NaN or infinity."""
        if name := self.not_finite():
            raise NonFiniteError(f"{name} of the dictionary holds NaN or infinity")

    def pre(self, x: Float[Tensor, "*shape d_in"] | ArrayLike) -> Float[Tensor, "*shape d_sae"]:
        """Return the pre-activations h = (x − b_dec) W_enc + b_enc; for a transcoder, x W_enc + b_enc."""
        x = self.as_input(x)
        x = self._normalised(x.to(self.W_enc.dtype))
        h = (x if self.input_bias is None else x - self.input_bias) @ self.W_enc
        return h if self.b_enc is None else h + self.b_enc

    def encode(self, x: Float[Tensor, "*shape d_in"] | ArrayLike) -> SparseCodes:
        """Return the codes of activations: the latents that fire and their values; differentiable in x and the parameters.

        Args:
            x: a tensor on the device of the parameters, a numpy array, a DataFrame or a list of numbers.

        Raises:
            ShapeError: the last axis of x does not have d_in entries, or x holds something other than numbers.
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
        """Return x_hat for sparse or dense codes.

        Args:
            x: the activations that were encoded. Required with a token_norm; without x, a skip connection is left out.

        Raises:
            ConfigError: the dictionary has a token_norm, and x was not given.
            ShapeError: the last axis of dense codes does not have d_sae entries, or that of x does not have d_in.
        """
        x = None if x is None else self.as_input(x)
        if not isinstance(codes, SparseCodes):
            codes = self._dense_codes(codes)
        x_hat = codes.decode(self.W_dec) if isinstance(codes, SparseCodes) else codes @ self.W_dec
        x_hat = x_hat + self.base(x)
        if self.token_norm is None:
            return x_hat
        if x is None:
            raise ConfigError(f"decode(codes, x) needs x, to undo the {self.token_norm} of each activation")
        mean, scale = self._statistics(x.to(x_hat.dtype))
        return x_hat * scale + mean

    def _dense_codes(self, codes: ArrayLike) -> Float[Tensor, "*shape d_sae"]:
        """Return dense codes as a tensor. Arrays and lists get the dtype and device of the parameters."""
        if not isinstance(codes, Tensor):
            codes = as_tensor(codes, "codes", self.W_dec.device).to(self.W_dec.dtype)
        if codes.ndim == 0 or codes.shape[-1] != self.d_sae:
            raise ShapeError(f"codes have shape {tuple(codes.shape)}; this dictionary takes [..., {self.d_sae}]")
        return codes

    def output_scale(self, x: Float[Tensor, "*shape d_in"]) -> Float[Tensor, "*shape_or_none 1"]:
        """Return the factor of Σ_i f_i W_dec[i] in the output for each x: 1, or the scale of its token_norm."""
        if self.token_norm is None:
            return self.W_dec.new_ones(1)
        return self._statistics(x.to(self.W_dec.dtype))[1]

    def _statistics(self, x: Float[Tensor, "*shape d_in"]) -> tuple[Tensor, Tensor]:
        """Return the mean and scale with which each activation is normalised."""
        if self.token_norm == "constant_norm":
            return x.new_zeros(()), x.norm(dim=-1, keepdim=True) / self.d_in**0.5
        return x.mean(-1, keepdim=True), x.std(-1, keepdim=True)

    def _normalised(self, x: Float[Tensor, "*shape d_in"]) -> Float[Tensor, "*shape d_in"]:
        """Return x with its token_norm: (x − mean) / (std + 1e-5) for layer_norm, √d_in x / ‖x‖ for constant_norm."""
        if self.token_norm is None:
            return x
        mean, scale = self._statistics(x)
        return (x - mean) / (scale + 1e-5 if self.token_norm == "layer_norm" else scale)

    def base(self, x: Float[Tensor, "*shape d_in"] | None = None) -> Float[Tensor, "*shape_or_none d_out"]:
        """Return the part of the output that does not depend on the codes: b_dec, plus x W_skipᵀ with a skip connection.

        Without x, the skip connection is left out.
        """
        if self.W_skip is None or x is None:
            return self.b_dec
        return self.b_dec + x.to(self.W_skip.dtype) @ self.W_skip.T

    def check_edits(self, edits: Sequence[CodeChange]) -> None:
        """Raise ConfigError if an edit names a latent that the dictionary does not have."""
        largest = max((latent for edit in edits for latent in edit.latents), default=0)
        if largest >= self.d_sae:
            raise ConfigError(f"no latent {largest}; this dictionary has latents 0 to {self.d_sae - 1}")

    def needs_input(self, edits: Sequence[CodeChange]) -> bool:
        """Return whether the change by these edits depends on x: not if they only add to codes, without a token_norm."""
        return self.token_norm is not None or any(edit.gain != 1 for edit in edits)

    def change(
        self,
        x: Float[Tensor, "*shape d_in"] | ArrayLike | None,
        edits: Sequence[CodeChange],
        at: Sequence[Bool[Tensor, "..."]] | None = None,
    ) -> Float[Tensor, "*shape d_out"]:
        """Return the change of the output if edits act on the codes of x in turn: output_scale · Σ_i (new_i − old_i) W_dec[i].

        Args:
            x: activations; None if `needs_input` is false and `at` is given.
            at: for each edit, a mask of the activations it acts on, broadcast to the leading shape of x. Default: all.

        Raises:
            ConfigError: an edit names a latent that the dictionary does not have.
            ShapeError: the last axis of x does not have d_in entries.
        """
        self.check_edits(edits)
        if x is None and (not at or self.needs_input(edits)):
            raise ConfigError("the change by these edits depends on x, or there are no masks (at=) to say its shape; give x")
        x = None if x is None else self.as_input(x)
        if at is None:
            at = [torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)] * len(edits)
        at = torch.broadcast_tensors(*at) if edits else ()
        total = self.W_dec.new_zeros(*(at[0].shape if x is None else x.shape[:-1]), self.d_out)
        if any(edit.offset for edit in edits):
            total = total + offsets(edits, at, self.W_dec)
        if any(edit.gain != 1 for edit in edits):  # else the change does not depend on the codes
            total = total + scaled(self.encode(x), edits, at).decode(self.W_dec)
        return total if x is None else total * self.output_scale(x)

    def forward(self, x: Float[Tensor, "*shape d_in"] | ArrayLike) -> Float[Tensor, "*shape d_out"]:
        """Return x_hat, in the dtype of x."""
        x = self.as_input(x)
        return self.decode(self.encode(x), x).to(x.dtype)

    @torch.no_grad()
    def fold_scales_(self, reads: Sequence[float], writes: Sequence[float]) -> "Dictionary":
        """Turn a dictionary of scaled activations into one of raw activations.

        The codes stay the same, except those of a tied rule: they are then in units of raw activations.

        Args:
            reads: for each read port, the number by which its activations were multiplied.
            writes: for each write port, the number by which its target was multiplied.
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
        """Turn a dictionary of x − shift into one of x, with the same codes and output. The write ports must be other ports."""
        self.b_enc.sub_(shift @ self.W_enc)
        if self.W_skip is not None:
            self.b_dec.sub_(self.W_skip @ shift)
        return self

    @torch.no_grad()
    def fold_decoder_norms_(self) -> "Dictionary":
        """Make the decoder norms 1 and multiply the codes by them; x_hat stays the same.

        Nothing changes if the rule is not homogeneous, such as top-k, whose choice depends on the sizes of the codes.
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
        """Write the dictionary to a folder, completely or not at all, and return the folder.

        Raises:
            OutputExistsError: the folder is not empty and `exists` is "error", or it holds something other than a dictionary.
            NonFiniteError: a parameter holds NaN or infinity.
        """
        from safetensors.torch import save_file

        own = {k: v for k, v in self.state_dict().items() if not k.startswith("rule.")}
        if name := self.not_finite():
            raise NonFiniteError(f"{name} holds NaN or infinity, so the dictionary was not written")
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
            write_json(folder / CONFIG_FILE, settings_of(self))
        return Path(path)

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> "Dictionary":
        """Return the dictionary in a folder written by `save`. `saelens_lite.load` also reads addresses and other tools' files.

        Raises:
            CorruptFileError: a file is missing, damaged or contradicts another, or another tool wrote the folder.
            ConfigError: an address was given instead of a folder.
            PluginError: the sparsity rule is not installed. The message names the distribution that provides it.
        """
        if is_address(folder):
            raise ConfigError(f"{folder} is an address; Dictionary.load takes a folder. Use saelens_lite.load({str(folder)!r})")
        folder = check_input(named_file(folder))
        restore(folder)
        if not os.path.lexists(folder / CONFIG_FILE):
            raise CorruptFileError(
                f"{folder / CONFIG_FILE} is missing; is {folder} the folder you meant? saelens_lite.load also reads "
                "dictionaries of other tools, and says what a folder holds instead"
            )
        if not is_own(read_json(folder / CONFIG_FILE)):
            raise CorruptFileError(
                f"{folder / CONFIG_FILE} was not written by saelens_lite; use saelens_lite.load, which also reads "
                "dictionaries of other tools"
            )
        return cls._load_own(folder).to(device).eval()

    @classmethod
    def _load_own(cls, folder: Path) -> "Dictionary":
        config, said = read_settings(folder)
        ours, d_in, d_sae = said.metadata.saelens_lite, said.d_in, said.d_sae
        d_out = said.d_out
        rule_class = registry.load(ours.sparsity, written_by=ours.distribution, from_file=True)
        specs = own_names(folder, tensor_specs)
        sized = {"W_dec": (d_sae, d_in if d_out is None else d_out)}
        sized |= {} if d_out is None else {"W_enc": (d_in, d_sae)}
        if missing := sized.keys() - specs.keys():
            raise CorruptFileError(f"{folder / WEIGHTS_FILE}: {differences(missing, (), specs)}")
        for name, wanted in sized.items():
            if specs[name].shape != wanted:  # else a forged size would be allocated
                raise CorruptFileError(f"{folder / WEIGHTS_FILE}: {name} has shape {specs[name].shape}, cfg.json says {wanted}")
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
        check_state(folder, specs, self.to(DTYPES[said.dtype]).state_dict(), optional=set(form.tensors) if form else set())
        check_published(self, folder, config, specs)
        self.load_state_dict(own_names(folder, read_tensors), strict=False)
        self.density = read_density(folder, d_sae)
        return self

    @property
    def trained_on(self) -> str:
        """The models, their weight processing, the hooks and the rows in words, such as "gpt2, blocks.8.hook_resid_pre"."""
        known = self.origin
        models = []
        for name, one in known.of_each.items():
            label = "" if name is None else f"{name} = "
            models += [f"{label}{one.model or 'a model without a name'}{f' at {one.revision}' if one.revision else ''}"]
            models += one.processing
        rows = f"rows of {known.n_ctx} tokens" if known.n_ctx else ""
        bos = {True: "rows begin with BOS", False: "rows without BOS"}.get(known.prepend_bos, "")
        return ", ".join(filter(None, (*models, self.place, rows, bos)))

    def extra_repr(self) -> str:
        rule = getattr(self.rule, "plugin_name", "?")
        target = "" if self.writes_what_it_reads else f", d_out={self.d_out}"
        first = f"d_in={self.d_in}, d_sae={self.d_sae}, sparsity={rule!r}{target}"
        read_from = self.training_record.get("read_from", {})
        release = read_from.get("release") if isinstance(read_from, dict) else None
        others = {"trained on": self.trained_on, "release": release, "source": self.source}
        return "\n".join([first, *(f"{name}: {str(text)[:300]}" for name, text in others.items() if text)])
