"""The description of a dictionary in a file before its weights are read, and the dictionary built from it."""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor

from saelens_lite import registry
from saelens_lite.arrays import not_finite
from saelens_lite.config import ModelFacts, Origin
from saelens_lite.dictionary import Dictionary
from saelens_lite.dictionary.folder import read_density
from saelens_lite.dictionary.tensors import AXES as MATRICES
from saelens_lite.errors import ConfigError, CorruptFileError, PluginError
from saelens_lite.files import check_fits_memory, differences, file_hash, nesting
from saelens_lite.formats.containers import TensorFile
from saelens_lite.formats.known import Known
from saelens_lite.formats.settings import MAX_LATENTS
from saelens_lite.ports import Port, split_key
from saelens_lite.tensor_files import DTYPES

AXES = MATRICES | {"b_dec": "d_out", "mean": "d_in"}  # parameters that are not listed have one entry a latent
PLAIN = {name: (name, AXES.get(name, "d_sae")) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}  # our names in the file too
SEVERAL = {"d_in": "n_reads", "d_out": "n_writes", "d_sae": "blocks"}  # axis → the axis that counts it, 1 by default
MAX_PORTS = 1000
MAX_CONFIG_BYTES, MAX_CONFIG_DEPTH = 1 << 20, 50  # of settings, which our cfg.json keeps
Place = str | tuple[str | None, ...] | None  # a hook, or one for each port


@dataclass
class Outline:
    """The description of a dictionary whose weights have not been read.

    names: Our parameter → (its name in the file, its axes there), such as {"W_enc": ("encoder.weight", "d_sae d_in")}.
        Parameters of the rule are called "rule.…". A scalar has axes "" and applies to all latents. "mean" is subtracted from
        activations first and added to the output. Tensors of the file that are in neither `names` nor `unused` are an error.
        With several ports, an axis "n_reads" or "n_writes" stands before "d_in" or "d_out", which are the widths of one port.
        "blocks" before "d_sae" means that each read port has latents of its own. b_dec and W_skip without the axis "n_writes"
        are those of the first write port; for the other ports they are zero.
    hook, target: The hook that is read and the one that a transcoder writes; a tuple of one for each port if there are several.
        They are keys of ports, such as "base:blocks.3.hook_resid_pre". A single hook of several ports is the same hook in
        several models.
    models: Names in ports of several models → their Hub ids, in the order of the ports.
    scale, target_scale: Factor of the activations before the encoder, and divisor of the output; a tuple of one for each port
        if they differ.
    before: Write ports in W_dec before the first one. They are left out; a warning is logged unless they are zero.
    adjust: Function that changes the parameters (float64, with our names and axes) in place into those of our equation.
    """

    file: TensorFile
    rule: str
    names: Mapping[str, tuple[str, str]]
    options: Mapping[str, Any] = field(default_factory=dict)
    origin: Origin = field(default_factory=Origin)
    hook: Place = None
    target: Place = None
    models: Mapping[str, str | None] = field(default_factory=dict)
    transcoder: bool = False  # the output ports differ from the input ports
    subtracts_b_dec: bool = True  # from activations, before the encoder
    scale: float | tuple[float, ...] = 1.0
    target_scale: float | tuple[float, ...] | None = None  # default: scale
    lacks_scale: str = ""  # message of the error if the settings ask for a scale that neither they nor `known` state
    lacks_hook: str = ""  # warning if neither the files nor `known` name the hook that is read
    token_norm: str | None = None  # "layer_norm" or "constant_norm" of each activation
    adjust: Callable[[dict[str, Tensor]], None] | None = None
    before: int = 0
    rectifies: bool = True  # its codes are never negative, so a threshold below zero acts as zero
    unused: frozenset[str] = frozenset()
    sizes: Mapping[str, int] = field(default_factory=dict)  # d_in, d_sae, d_out in the settings
    config: Mapping[str, Any] = field(default_factory=dict)  # the settings file, which is kept
    architecture: str = ""  # its name in the other tool
    density: Path | None = None  # the folder with sparsity.safetensors, if there may be one
    known: Known = field(default_factory=Known)

    def __post_init__(self) -> None:
        self.config = self._kept_settings()
        there = self.file.specs.keys()
        wanted = {name for name, _ in self.names.values()}
        missing, surplus = wanted - there, there - wanted - self.unused
        if missing or surplus:
            raise CorruptFileError(f"{self.file.path}: {differences(missing, surplus, there)}")
        if self.token_norm and (self.transcoder or "mean" in self.names or self._scaled):
            kind = "a transcoder" if self.transcoder else "a dictionary with its own scale or mean"
            raise ConfigError(f"{self.file.path}: {kind} cannot be combined with {self.token_norm} of its input here")
        self.axes = self._check_shapes()
        self.dims = {axis: self.axes[axis] * self.axes[count] for axis, count in SEVERAL.items()}
        if any(self.axes[count] > 1 for count in SEVERAL.values()):  # the zeros between ports are not in the file
            d_in, d_out, d_sae = (self.dims[axis] for axis in ("d_in", "d_out", "d_sae"))
            check_fits_memory(self.file.path, 4 * (d_sae * (d_in + d_out) + d_in * d_out * ("W_skip" in self.names)))
        if self.transcoder and self.hook is not None and self.hook == self.target and self.dims["d_in"] == self.dims["d_out"]:
            raise ConfigError(  # a dictionary that writes what it reads subtracts b_dec
                f"{self.file.path.parent}: a transcoder that reads and writes {self.hook} cannot be represented here; name its "
                "output hook in the settings"
            )
        self.rule_class = registry.load(self.rule)
        try:
            self.rule_config = self.rule_class.Config(**self.options)
        except ConfigError as error:
            raise CorruptFileError(f"{self.file.path.parent}: {error}") from None

    def knowing(self, known: Known) -> "Outline":
        """Return the description completed with facts from outside the file. If the file names a hook, that name counts."""
        source = "the release list" if known.release else "the call"
        for side, stated, other in (("reads", self.hook, known.hook), ("writes", self.target, known.target)):
            if None not in (stated, other) and other not in (stated, *(stated if isinstance(stated, tuple) else ())):
                logging.getLogger(__name__).warning(
                    "%s says that it %s %s; %s says %s, which was not used", self.file.path, side, stated, source, other
                )
        return replace(
            self,
            hook=self.hook or known.hook,
            target=self.target or known.target,
            models=known.models or self.models,
            transcoder=self.transcoder or known.target not in (None, known.hook),
            token_norm=self.token_norm or known.token_norm,
            **({"scale": known.scale, "lacks_scale": ""} if known.scale and self.lacks_scale else {}),
            **({"lacks_scale": ""} if known.token_norm else {}),
            origin=known.origin(self.origin),
            known=known.replace(neuronpedia=known.neuronpedia or self.known.neuronpedia),
        )

    @property
    def _scaled(self) -> bool:
        return (self.scale, self.target_scale) != (1.0, None)

    def _kept_settings(self) -> dict[str, Any]:
        """Return the settings as plain JSON data. NaN, which JSON lacks, becomes text."""
        if nesting(self.config) > MAX_CONFIG_DEPTH:
            raise CorruptFileError(f"{self.file.path.parent}: settings are nested deeper than {MAX_CONFIG_DEPTH} levels")
        text = json.dumps(dict(self.config), ensure_ascii=False)
        try:
            size = len(text.encode())
        except UnicodeEncodeError as error:
            raise CorruptFileError(f"{self.file.path.parent}: the settings hold invalid text: {error}") from None
        if size > MAX_CONFIG_BYTES:
            raise CorruptFileError(f"{self.file.path.parent}: {size:,} bytes of settings; the limit is {MAX_CONFIG_BYTES:,}")
        return json.loads(text, parse_constant=str)

    def _check_shapes(self) -> dict[str, int]:
        """Return the length of every axis. Raise CorruptFileError unless all tensors and the settings agree."""
        dims = {axis: size for axis, size in self.sizes.items() if axis != "d_out" or self.transcoder}
        if not self.transcoder and "d_in" in dims:
            dims["d_out"] = dims["d_in"]
        for count, hooks in (("n_reads", self.hook), ("n_writes", self.target if self.transcoder else self.hook)):
            if isinstance(hooks, tuple):
                dims[count] = len(hooks)
        for own, (name, axes) in self.names.items():
            spec = self.file.specs[name]
            if spec.dtype not in DTYPES.values():
                raise CorruptFileError(f"{self.file.path}: {name} has dtype {spec.dtype}; expected one of {', '.join(DTYPES)}")
            named, before = axes.split(), self.before if own == "W_dec" else 0
            shape = [size - before if axis == "n_writes" else size for axis, size in zip(named, spec.shape, strict=False)]
            if len(named) != len(spec.shape) or any(dims.setdefault(a, n) != n for a, n in zip(named, shape, strict=True)):
                known = " ".join(f"{axis} = {dims[axis]}" for axis in named if axis in dims)
                raise CorruptFileError(f"{self.file.path}: {name} has shape {spec.shape}, expected [{axes}] with {known}")
        dims.setdefault("d_in", dims["d_out"])  # if the encoder is the decoder
        dims = dict.fromkeys(SEVERAL.values(), 1) | dims
        if not self.transcoder and dims["d_in"] != dims["d_out"]:
            raise CorruptFileError(f"{self.file.path}: an autoencoder has d_in = {dims['d_in']} but d_out = {dims['d_out']}")
        if not all(
            0 < dims[count] <= MAX_PORTS and 0 < dims[axis] * dims[count] <= MAX_LATENTS for axis, count in SEVERAL.items()
        ):
            raise CorruptFileError(
                f"{self.file.path}: {dims} are not valid sizes; expected 1 to {MAX_LATENTS}, and ports to {MAX_PORTS}"
            )
        return dims

    def facts(self) -> dict[str, Any]:
        """Return the facts that `saelens-lite inspect` shows."""
        files = [{"name": path.name, "kind": self.file.kind, "sha256": file_hash(path)} for path in self.file.paths]
        return {
            "architecture": self.architecture or self.rule,
            "sparsity": self.rule,
            "options": dict(self.options),
            **self.dims,
            **({"token_norm": self.token_norm} if self.token_norm else {}),
            **({"scale": self.scale} if self.scale != 1 else {}),
            "reads": self.hook,
            **({"models": dict(self.models)} if self.models else {}),
            **({"writes": self.target} if self.transcoder else {}),
            "origin": self.origin.model_dump(),
            **({"file": files[0]} if len(files) == 1 else {"files": files}),
            "tensors": {
                name: {"dtype": str(spec.dtype).removeprefix("torch."), "shape": list(spec.shape)}
                for name, spec in sorted(self.file.specs.items())
            },
            "config": self.config,
        }

    @torch.no_grad()
    def build(self, format_name: str) -> Dictionary:
        """Return the dictionary with its weights. If nothing is folded in, the weights equal the file's to the bit."""
        if self.lacks_scale:
            raise ConfigError(self.lacks_scale)
        if self.lacks_hook and self.hook is None:
            logging.getLogger(__name__).warning(self.lacks_hook)
        dims = self.dims
        reads = self._ports(self.hook, "n_reads", "d_in")
        writes = self._ports(self.target, "n_writes", "d_out") if self.transcoder else None
        weights = self._weights()
        try:
            rule = self.rule_class(self.rule_config, d_in=dims["d_in"], d_sae=dims["d_sae"])
            dictionary = Dictionary(
                rule,
                reads=reads,
                writes=writes,
                d_sae=dims["d_sae"],
                skip="W_skip" in weights,
                origin=self._origin_of([*reads, *(writes or ())]),
                token_norm=self.token_norm,
                training={"read_from": {"format": format_name, "config": self.config, **self.known.kept}},
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
            outer = self.scale if self.target_scale is None else self.target_scale
            dictionary.fold_scales_(self._each(self.scale, dictionary.reads), self._each(outer, dictionary.writes))
        if self.density is not None:
            dictionary.density = read_density(self.density, dictionary.d_sae)
        for name in not_finite(own):
            raise CorruptFileError(f"{self.file.path}: {name} becomes NaN or infinite when its scales are folded in")
        return dictionary.eval()

    def _each(self, scale: float | tuple[float, ...], ports: tuple[Port, ...]) -> tuple[float, ...]:
        """Return a scale of each port."""
        scales = scale if isinstance(scale, tuple) else (scale,) * len(ports)
        if len(scales) != len(ports):
            raise ConfigError(f"{self.file.path}: {len(scales)} scales were given; it has {len(ports)} ports")
        return scales

    def _ports(self, hooks: Place, count: str, axis: str) -> tuple[Port, ...]:
        """Return the ports of one side. The same hook in several models is named after the models, else model_0 and so on."""
        n = self.axes[count]
        keys = hooks if isinstance(hooks, tuple) else (hooks,) * n
        given = list(self.models) if not any(key and split_key(key).model for key in keys) else []
        if given and len(given) != n:
            hint = "; for the difference of two, set hook= to a key such as chat-base:blocks.3.hook_resid_pre" if n == 1 else ""
            raise ConfigError(f"{self.file.path}: {len(given)} models were named ({', '.join(given)}); it has {n} ports{hint}")
        is_one_hook = n > 1 and isinstance(hooks, str) and split_key(hooks).model is None
        names = given or ([f"model_{i}" for i in range(n)] if is_one_hook else [None] * n)
        width = self.axes[axis]
        return tuple(
            Port(hook=key, width=width, model=name) if key is None or name else Port.of(key, width)
            for key, name in zip(keys, names, strict=True)
        )

    def _origin_of(self, ports: list[Port]) -> Origin:
        """Return the origin, with the facts about each model that ports name."""
        names = dict.fromkeys(name for port in ports for name in (port.minus, port.model) if name)
        if not names:
            return self.origin
        shared = {"processing": self.origin.processing, "precision": self.origin.precision}
        models = [ModelFacts(name=name, model=self.models.get(name), **shared) for name in sorted(names, key=self._rank)]
        return self.origin.replace(
            **dict.fromkeys(("model", "revision", "model_class", "precision")), processing=(), models=models
        )

    def _rank(self, name: str) -> int:
        """Return the place of a model among those that were named; behind them if it was not."""
        return [*self.models, name].index(name)

    def _weights(self) -> dict[str, Tensor]:
        """Return the parameters under our names, with our axes and one dtype."""
        read = self.file.read(name for name, _ in self.names.values())
        weights = {own: self._in_order(own, read[name], axes) for own, (name, axes) in self.names.items()}
        dtype = reduce(torch.promote_types, (weights[own].dtype for own, (_, axes) in self.names.items() if axes))
        if self._scaled or self.adjust or "mean" in weights or not (self.subtracts_b_dec or self.transcoder):
            dtype = torch.promote_types(dtype, torch.float32)
            self._fold(weights)
        for name in weights.keys() & {"rule.threshold", "rule.plain_threshold"}:
            n_negative = int((weights[name] < 0).sum())
            if n_negative and not self.rectifies:
                raise ConfigError(
                    f"{self.file.path}: {n_negative:,} thresholds are below zero, so the other tool's codes can be negative; "
                    "codes are never negative here, so its function cannot be computed"
                )
            weights[name] = weights[name].clamp(min=0)
        return {name: weight.to(dtype) for name, weight in weights.items()}

    def _fold(self, weights: dict[str, Tensor]) -> None:
        """Fold all steps that our equation lacks into the weights, in place and in float64, except scales."""
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
        ours, named = AXES.get(own, "d_sae"), axes.split()
        if own == "W_dec" and self.before:
            tensor = self._without_ports_before(tensor, named.index("n_writes"))
        if not axes:
            return repeat(tensor, " -> d_sae", d_sae=self.dims["d_sae"])
        if own == "W_enc" and "blocks" in named:  # the latents of a block do not read the other ports
            return torch.block_diag(*rearrange(tensor, f"{axes} -> blocks d_in d_sae"))
        for axis, count in SEVERAL.items():
            if count in named:
                ours = ours.replace(axis, f"({count} {axis})")
        ordered = rearrange(tensor, f"{axes} -> {ours}")
        if own in ("b_dec", "W_skip") and len(ordered) < self.dims["d_out"]:
            rest = ordered.new_zeros(self.dims["d_out"] - len(ordered), *ordered.shape[1:])
            return torch.cat([ordered, rest])
        return ordered

    def _without_ports_before(self, tensor: Tensor, axis: int) -> Tensor:
        dropped, kept = tensor.split([self.before, tensor.shape[axis] - self.before], dim=axis)
        if dropped.count_nonzero():
            logging.getLogger(__name__).warning(
                "%s: the decoder also writes ports before the one it reads, with weights up to %.3g (the others: %.3g), which "
                "were left out",
                *(self.file.path, dropped.abs().max(), kept.abs().max()),
            )
        return kept
