"""A dictionary in a file whose weights have not been read, and the dictionary it becomes."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor

from saelens_lite import registry
from saelens_lite.arrays import not_finite
from saelens_lite.config import Origin
from saelens_lite.dictionary import Dictionary
from saelens_lite.errors import ConfigError, CorruptFileError, PluginError
from saelens_lite.files import DTYPES, file_hash, nesting, shortened
from saelens_lite.formats.containers import TensorFile
from saelens_lite.formats.settings import MAX_LATENTS
from saelens_lite.ports import Port

AXES = {  # of the parameters; those of rules that are not named here have one entry a latent
    "W_enc": "d_in d_sae",
    "W_dec": "d_sae d_out",
    "b_dec": "d_out",
    "W_skip": "d_out d_in",
    "mean": "d_in",
}
MAX_CONFIG_BYTES, MAX_CONFIG_DEPTH = 1 << 20, 50  # of settings, which cfg.json then holds beside our own


@dataclass
class Outline:
    """A dictionary whose weights have not been read: what it is, and which tensor of a file each of its parameters is in.

    names: our parameter → (its name in the file, its axes there), such as {"W_enc": ("encoder.weight", "d_sae d_in")};
    parameters of the rule are called "rule.…"; a scalar, axes "", counts for all latents. "mean" is what is taken off
    activations first and added again. Tensors of the file that stand in neither `names` nor `unused` are an error.
    adjust: changes the parameters, float64 by our names and with our axes, into those of our equation.
    """

    file: TensorFile
    rule: str
    names: Mapping[str, tuple[str, str]]
    options: Mapping[str, Any] = field(default_factory=dict)
    origin: Origin = field(default_factory=Origin)
    hook: str | None = None  # the hook that is read
    target: str | None = None  # of a transcoder: the hook that is written
    transcoder: bool = False  # whether the output is of another hook than the input
    subtracts_b_dec: bool = True  # from activations before they are encoded
    scale: float = 1.0  # activations are multiplied by this first
    target_scale: float | None = None  # what the output is divided by, where that is another number
    token_norm: str | None = None  # "layer_norm", "constant_norm": what is done to each activation by itself
    adjust: Callable[[dict[str, Tensor]], None] | None = None
    rectifies: bool = True  # codes are never negative there: a threshold below zero is as good as zero
    unused: frozenset[str] = frozenset()
    sizes: Mapping[str, int] = field(default_factory=dict)  # d_in, d_sae, d_out as the settings have them
    config: Mapping[str, Any] = field(default_factory=dict)  # the settings themselves, which are kept
    architecture: str = ""  # what the other tool calls it

    def __post_init__(self) -> None:
        self.config = self._kept_settings()
        there = self.file.specs.keys()
        wanted = {name for name, _ in self.names.values()}
        missing, surplus = wanted - there, there - wanted - self.unused
        if missing or surplus:
            raise CorruptFileError(
                f"{self.file.path}: tensors missing: {sorted(missing) or 'none'}; not expected: {shortened(surplus)}"
            )
        if self.token_norm and (self.transcoder or "mean" in self.names or self._scaled):
            kind = "a transcoder" if self.transcoder else "a dictionary with scales of its own"
            raise ConfigError(f"{self.file.path}: {kind} whose input has {self.token_norm} has no place here")
        self.dims = self._check_shapes()
        self.rule_class = registry.load(self.rule)
        try:
            self.rule_config = self.rule_class.Config(**self.options)
        except ConfigError as error:
            raise CorruptFileError(f"{self.file.path.parent}: {error}") from None

    @property
    def _scaled(self) -> bool:
        return (self.scale, self.target_scale) != (1.0, None)

    def _kept_settings(self) -> dict[str, Any]:
        """The settings as JSON that can be written again; NaN, which JSON does not have, becomes text."""
        if nesting(self.config) > MAX_CONFIG_DEPTH:
            raise CorruptFileError(f"{self.file.path.parent}: settings are nested deeper than {MAX_CONFIG_DEPTH} levels")
        text = json.dumps(dict(self.config), ensure_ascii=False)
        try:
            size = len(text.encode())
        except UnicodeEncodeError as error:
            raise CorruptFileError(f"{self.file.path.parent}: the settings hold what is no text: {error}") from None
        if size > MAX_CONFIG_BYTES:
            raise CorruptFileError(f"{self.file.path.parent}: {size:,} bytes of settings; {MAX_CONFIG_BYTES:,} are read")
        return json.loads(text, parse_constant=str)

    def _check_shapes(self) -> dict[str, int]:
        """The length of every axis, once all tensors and the settings agree on it."""
        dims = {axis: size for axis, size in self.sizes.items() if axis != "d_out" or self.transcoder}
        if not self.transcoder and "d_in" in dims:
            dims["d_out"] = dims["d_in"]
        for name, axes in self.names.values():
            spec = self.file.specs[name]
            if spec.dtype not in DTYPES.values():
                raise CorruptFileError(f"{self.file.path}: {name} has dtype {spec.dtype}; expected one of {', '.join(DTYPES)}")
            named = axes.split()
            if len(named) != len(spec.shape) or any(dims.setdefault(a, n) != n for a, n in zip(named, spec.shape, strict=True)):
                known = " ".join(f"{axis} = {dims[axis]}" for axis in named if axis in dims)
                raise CorruptFileError(f"{self.file.path}: {name} has shape {spec.shape}, expected [{axes}] with {known}")
        dims.setdefault("d_in", dims["d_out"])  # where the encoder is the decoder
        if not self.transcoder and dims["d_in"] != dims["d_out"]:
            raise CorruptFileError(f"{self.file.path}: d_in = {dims['d_in']} and d_out = {dims['d_out']} of an autoencoder")
        if not all(0 < size <= MAX_LATENTS for size in dims.values()):
            raise CorruptFileError(f"{self.file.path}: {dims} are no sizes of a dictionary")
        return dims

    def facts(self) -> dict[str, Any]:
        """What `saelens-lite inspect` shows."""
        return {
            "architecture": self.architecture or self.rule,
            "sparsity": self.rule,
            "options": dict(self.options),
            **self.dims,
            **({"token_norm": self.token_norm} if self.token_norm else {}),
            **({"scale": self.scale} if self.scale != 1 else {}),
            "reads": self.hook,
            **({"writes": self.target} if self.transcoder else {}),
            "origin": self.origin.model_dump(),
            "file": {"name": self.file.path.name, "kind": self.file.kind, "sha256": file_hash(self.file.path)},
            "tensors": {
                name: {"dtype": str(spec.dtype).removeprefix("torch."), "shape": list(spec.shape)}
                for name, spec in sorted(self.file.specs.items())
            },
            "config": self.config,
        }

    @torch.no_grad()
    def build(self, format_name: str) -> Dictionary:
        """The dictionary, with all weights read. Where nothing had to be folded they are the file's to the bit."""
        weights = self._weights()
        dims = self.dims
        try:
            rule = self.rule_class(self.rule_config, d_in=dims["d_in"], d_sae=dims["d_sae"])
            dictionary = Dictionary(
                rule,
                reads=Port(hook=self.hook, width=dims["d_in"]),
                writes=Port(hook=self.target, width=dims["d_out"]) if self.transcoder else None,
                d_sae=dims["d_sae"],
                skip="W_skip" in weights,
                origin=self.origin,
                token_norm=self.token_norm,
                training={"read_from": {"format": format_name, "config": self.config}},
            )
        except ConfigError as error:
            raise CorruptFileError(f"{self.file.path}: {error}") from None
        dictionary.to(weights["W_dec"].dtype)
        own = dictionary.state_dict()
        if own.keys() - weights.keys() == {"b_enc"}:
            weights["b_enc"] = torch.zeros(dims["d_sae"])
        if own.keys() != weights.keys():
            raise PluginError(f"format {format_name} names {sorted(weights)}; a {self.rule} dictionary has {sorted(own)}")
        for name, tensor in own.items():
            tensor.copy_(weights[name])
        if self._scaled:
            dictionary.fold_scales_([self.scale], [self.scale if self.target_scale is None else self.target_scale])
        for name in not_finite(own):
            raise CorruptFileError(f"{self.file.path}: {name} becomes NaN or infinite when its scales are folded in")
        return dictionary.eval()

    def _weights(self) -> dict[str, Tensor]:
        """Parameters by our names and with our axes, of one type."""
        read = self.file.read(name for name, _ in self.names.values())
        weights = {own: self._in_order(own, read[name], axes) for own, (name, axes) in self.names.items()}
        dtype = reduce(torch.promote_types, (weight.dtype for weight in weights.values()))
        if self._scaled or self.adjust or "mean" in weights or not (self.subtracts_b_dec or self.transcoder):
            dtype = torch.promote_types(dtype, torch.float32)
            self._fold(weights)
        for name in weights.keys() & {"rule.threshold", "rule.plain_threshold"}:
            n_negative = int((weights[name] < 0).sum())
            if n_negative and not self.rectifies:
                raise ConfigError(
                    f"{self.file.path}: {n_negative:,} thresholds are below zero, where the other tool's codes are negative; "
                    "codes are never negative here, so its function cannot be computed"
                )
            weights[name] = weights[name].clamp(min=0)
        return {name: weight.to(dtype) for name, weight in weights.items()}

    def _fold(self, weights: dict[str, Tensor]) -> None:
        """Put into the weights what is done to activations, and to codes, beside our equation; computed in float64."""
        for name, weight in weights.items():
            if self.adjust is not None or weight.ndim == 1:
                weights[name] = weight.double()
        if self.adjust is not None:
            self.adjust(weights)
        if not self.transcoder and not self.subtracts_b_dec and "W_enc" in weights:
            # h = x W_enc + b_enc = (x − b_dec) W_enc + (b_enc + b_dec W_enc)
            shift = weights["b_dec"] @ weights["W_enc"].double()
            if "rule.b_gate" in weights:
                weights["rule.b_gate"] = weights["rule.b_gate"] + shift
                weights["rule.b_mag"] = weights["rule.b_mag"] + shift * weights["rule.r_mag"].exp()
            else:
                weights["b_enc"] = weights.get("b_enc", 0) + shift
        if "mean" in weights:
            weights["b_dec"] = weights["b_dec"] + weights.pop("mean")

    def _in_order(self, own: str, tensor: Tensor, axes: str) -> Tensor:
        ours = AXES.get(own, "d_sae")
        if not axes:
            return repeat(tensor, " -> d_sae", d_sae=self.dims["d_sae"])
        return rearrange(tensor, f"{axes} -> {ours}")
