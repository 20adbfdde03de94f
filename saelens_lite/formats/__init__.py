"""Read and write other formats: the contract of a file format, and how dictionaries of another tool come in and go out.

`sl.load` and `saelens-lite inspect` recognise other tools' dictionaries by what the files hold. Scales and means are folded
in, so that they take raw activations. Settings that change the function, the hook or the tokens that count are translated or
refused.

```python
sl.convert("my-dictionary", "converted", format="sparsify")  # or saelens, dictionary_learning, circuit_tracer
```

```sh
saelens-lite convert runs/topk/dictionary out --format sparsify
saelens-lite inspect runs/topk/dictionary
```

A format that cannot hold a dictionary is an error that says what would be lost. Pickles (dictionary_learning, OpenAI) are read
on request, `format="openai"`, and only their tensors. For tensors in no known format there is
`sl.Dictionary.from_tensors(W_enc=…, W_dec=…, b_enc=…, b_dec=…, rule="topk", options={"k": 32})`.

**A format of your own** is a class:

    @register("my_format")
    class MyFormat(Format):
        def detect(self, path): ...         # by what the files hold
        def outline(self, path): ...        # what the file says before its weights are read
        def write(self, dictionary, folder): ...

A package names the class under the entry-point group `saelens_lite.formats`, where `format="my_format"` finds it, and once
more under each ending that its file names have. For files of other names, the package is not imported:

```toml
[project.entry-points."saelens_lite.formats"]
my_format = "my_package:MyFormat"

[project.entry-points."saelens_lite.formats.npz"]
my_format = "my_package:MyFormat"
```

`outline` names, for each of our parameters, the tensor that holds it and that tensor's axes; sizes are checked and axes put in
order here. Files come from strangers. Read them by `read_json` and `open_tensors`, which check before they allocate and
execute nothing.
"""

import json
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from einops import rearrange, repeat
from torch import Tensor

from saelens_lite import registry
from saelens_lite.config import Origin
from saelens_lite.dictionary import Dictionary, read_density
from saelens_lite.errors import ConfigError, CorruptFileError, NonFiniteError, PluginError
from saelens_lite.files import (
    DTYPES,
    file_hash,
    file_size,
    is_zip,
    nesting,
    read_json,
    shortened,
    write_file,
    write_json,
    write_tensors,
    write_text,
)
from saelens_lite.format_detection import OWN, format_of
from saelens_lite.formats.containers import (
    TensorFile,
    TorchFile,
    open_tensors,
    strings_in_pickle,
    tensor_names,
)
from saelens_lite.kinds import DICTIONARY as KIND
from saelens_lite.outputs import new_folder, refuse_inputs_in
from saelens_lite.places import is_address
from saelens_lite.ports import Port

__all__ = [
    "Format",
    "Outline",
    "Settings",
    "TensorFile",
    "TorchFile",
    "cannot_write",
    "convert",
    "file_size",
    "fill_layer",
    "find_file",
    "format_of",
    "hook_of_module",
    "inspect",
    "is_zip",
    "open_tensors",
    "read_density",
    "read_json",
    "strings_in_pickle",
    "tensor_names",
    "write",
    "write_json",
    "write_tensors",
    "write_text",
    "write_torch",
]

AXES = {  # of the parameters; those of rules that are not named here have one entry a latent
    "W_enc": "d_in d_sae",
    "W_dec": "d_sae d_out",
    "b_dec": "d_out",
    "W_skip": "d_out d_in",
    "mean": "d_in",
}
MAX_LATENTS = 2**31 - 1
MAX_CONFIG_BYTES, MAX_CONFIG_DEPTH = 1 << 20, 50  # of settings, which cfg.json then holds beside our own
BLOCK = r"(?:.*\.)?(?:layers|h|blocks)\.(\d+)"
MODULES = (  # of transformers models, and transformer-lens's names for what enters and leaves them
    (rf"{BLOCK}", "blocks.{}.hook_resid_pre", "blocks.{}.hook_resid_post"),
    (rf"{BLOCK}\.mlp", "blocks.{}.mlp.hook_in", "blocks.{}.hook_mlp_out"),
    (rf"{BLOCK}\.(?:self_attn|attn|attention)", "blocks.{}.attn.hook_in", "blocks.{}.hook_attn_out"),
    (rf"{BLOCK}\.self_attn\.o_proj", "blocks.{}.attn.hook_z", "blocks.{}.hook_attn_out"),
    (rf"{BLOCK}\.pre_feedforward_layernorm", None, "blocks.{}.mlp.hook_in"),
    (rf"{BLOCK}\.post_feedforward_layernorm", None, "blocks.{}.hook_mlp_out"),
    (r"(?:.*\.)?(?:embed_tokens|wte|embed_in)", None, "hook_embed"),
)


class Format:
    """Base of all formats. One that only writes leaves out `outline`, one that only reads leaves out `write`."""

    plugin_kind: ClassVar[str] = "formats"
    plugin_name: ClassVar[str]  # set by the registry
    pickled: ClassVar[bool] = False  # its files are pickles: they are read only where the format is asked for by name
    folders: ClassVar[bool] = False  # it reads folders, not single files
    files: ClassVar[tuple[str, ...]] = ()  # patterns of the files that have to lie together in a folder, for error messages

    def detect(self, path: Path) -> bool:
        """Whether a file or folder is of this format, judged by what it holds. Never raises, never unpickles."""
        return False

    def outline(self, path: Path) -> "Outline":
        """What the files say before any weight is read.

        Raises:
            CorruptFileError: they are damaged or contradict each other.
            ConfigError: what they hold cannot be represented here; the message says what would be lost.
        """
        raise ConfigError(f"{self.plugin_name} files can be written, not read")

    def read(self, path: Path) -> Dictionary:
        """The dictionary in a file or folder; raises what `outline` raises."""
        return self.outline(path).build(self.plugin_name)

    def write(self, dictionary: Dictionary, folder: Path) -> None:
        """Fill an empty folder with the files of a dictionary.

        Raises:
            ConfigError: the format has no place for something that would change the numbers.
        """
        raise ConfigError(f"{self.plugin_name} files can be read, not written")


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
        for name, tensor in own.items():
            if not torch.isfinite(tensor).all():
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


class Settings:
    """A settings file of a stranger, read key by key: what is missing or of another type is a CorruptFileError."""

    def __init__(self, path: Path, values: Mapping[str, Any]):
        self.path, self.values = path, values

    @classmethod
    def read(cls, path: Path) -> "Settings":
        """The settings in a JSON file."""
        return cls(path, read_json(path))

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def text(self, key: str, default: str | None = None) -> str | None:
        """A string, or the default where the key is absent or null."""
        return self._of_type(key, (str,), default)

    def flag(self, key: str, default: bool = False) -> bool:
        """true or false."""
        return self._of_type(key, (bool,), default)

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number ≥ 0; without a default the key is required."""
        value = self._of_type(key, (int,), default)
        if value is None or not 0 <= value <= MAX_LATENTS:
            raise CorruptFileError(f"{self.path}: {key} = {value!r}; expected a whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number."""
        value = self._of_type(key, (int, float), default)
        if value is None or not abs(value) < 1e30:
            raise CorruptFileError(f"{self.path}: {key} = {value!r}; expected a number")
        return float(value)

    def part(self, key: str) -> "Settings":
        """The settings under a key; none where it is absent."""
        return Settings(self.path, self._of_type(key, (dict,), {}))

    def _of_type(self, key: str, types: tuple[type, ...], default: Any) -> Any:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            wanted = " or ".join(t.__name__ for t in types)
            raise CorruptFileError(f"{self.path}: {key} is {str(value)[:80]!r}; expected {wanted}")
        return value


def find_file(path: Path, *names: str) -> Path | None:
    """`path` if it is a file; in a folder, the first of `names` that is there."""
    candidates = [path] if path.is_file() else [path / name for name in names]
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def write_torch(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors in a file of `torch.save` in one step, in an order of their own."""
    whole = OrderedDict((name, tensor.detach().cpu().contiguous().clone()) for name, tensor in tensors.items())

    def save(temporary: Path) -> None:
        with open(temporary, "wb") as file:  # an error of the disk then reaches us, and the name of the file is not in it
            torch.save(whole, file)

    write_file(path, save)


def hook_of_module(module: str, side: Literal["input", "output"] = "output") -> str | None:
    """transformer-lens's name for what enters or leaves a module of a transformers model; None where it is not known here."""
    for pattern, before, after in MODULES:
        if match := re.fullmatch(pattern, module):
            hook = before if side == "input" else after
            return hook and hook.format(*match.groups())
    return None


def fill_layer(path: Path, hook: str | None, layer: int | None) -> str | None:
    """Put the number of the layer into a hook's name: "blocks.{layer}.hook_mlp_out" of layer 3 is blocks.3.hook_mlp_out.

    Raises:
        ConfigError: the name has a placeholder, and the layer is not known or the placeholder is another one.
    """
    if hook is None or not re.search(r"[{}]", hook):
        return hook
    filled = hook.replace("{layer}", str(layer))
    if layer is None or re.search(r"[{}]", filled):
        raise ConfigError(
            f"{path}: the hook {hook!r} names no layer, nor does anything beside it; write the layer's number there"
        )
    return filled


def cannot_write(dictionary: Dictionary, format_name: str, loss: str) -> ConfigError:
    """The error of a format that has no place for something."""
    return ConfigError(
        f"a {dictionary.rule.plugin_name} dictionary of {dictionary.place} cannot be written as {format_name}: {loss}"
    )


def convert(
    source: str | Path,
    out: str | Path,
    format: str,
    *,
    source_format: str | None = None,
    exists: Literal["error", "overwrite"] = "error",
) -> Path:
    """The folder a dictionary, ours or another tool's, is written to in a format; "saelens_lite" is our own.

    Raises:
        PluginError: there is no such format.
        ConfigError: something cannot be represented in it.
        OutputExistsError: the folder holds something and `exists` is "error", or holds what would be lost, such as `source`.
    """
    if not is_address(source):
        refuse_inputs_in(Path(out), [Path(source)])
    writer = None if format == "saelens_lite" else registry.load(format, "formats")()
    dictionary = Dictionary.load(source, format=source_format)
    if writer is None:
        return dictionary.save(out, exists=exists)
    return write(dictionary, out, writer, exists=exists)


@torch.no_grad()
def write(dictionary: Dictionary, out: str | Path, writer: Format, *, exists: Literal["error", "overwrite"] = "error") -> Path:
    """The folder a format writes a dictionary to; it appears whole or not at all.

    Raises:
        ConfigError: something cannot be represented in the format.
        NonFiniteError: a parameter is NaN or infinite.
        OutputExistsError: the folder holds something and `exists` is "error".
    """
    for name, tensor in dictionary.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise NonFiniteError(f"{name} is not finite; a dictionary with NaN or infinity is not written")
    with new_folder(Path(out), KIND, exists, any_format=True) as folder:
        writer.write(dictionary, folder)
    return Path(out)


def inspect(path: str | Path, format: str | None = None) -> dict[str, Any]:
    """What a file or folder of another tool holds, without reading its weights; raises what `Dictionary.load` raises."""
    reader = format_of(Path(path), None if format == OWN else format)
    return {"format": reader.plugin_name, **reader.outline(Path(path)).facts()}
