"""circuit-tracer: config.yaml and one file per layer with its transcoder.

    codes = act(x W_encᵀ + b_enc)        y = codes W_dec + b_dec + x W_skipᵀ

The file holds W_enc as [d_sae d_in]. If config.yaml names no activation, it is JumpReLU for a file with thresholds, else ReLU.
Hook names are relative to their layer, or contain {layer} for its number. circuit-tracer needs all layers from 0 on, so put the
layer files of several dictionaries into one folder.
"""

import json
import logging
import re
from pathlib import Path
from typing import Literal

import yaml

from saelens_lite import Dictionary, Origin
from saelens_lite.errors import ConfigError, CorruptFileError
from saelens_lite.formats import (
    Format,
    Outline,
    Settings,
    TensorFile,
    cannot_write,
    file_size,
    fill_layer,
    hook_of_module,
    open_tensors,
    tensor_names,
    write_tensors,
    write_text,
)

CONFIG, LAYERS = "config.yaml", "layer_*.safetensors"
MAX_YAML_BYTES = 1 << 16
ACTIVATIONS = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu"}  # published architecture → their name
RULES = {"relu": "l1", "topk": "topk", "jumprelu": "jumprelu"}
THRESHOLD, SKIP, K = "activation_function.threshold", "W_skip", "k"
NAMES = {
    "W_enc": ("W_enc", "d_sae d_in"),
    "b_enc": ("b_enc", "d_sae"),
    "W_dec": ("W_dec", "d_sae d_out"),
    "b_dec": ("b_dec", "d_out"),
}


class CircuitTracer(Format):
    """circuit-tracer's transcoders, one file per layer; read and written."""

    files = (CONFIG, LAYERS)

    def detect(self, path: Path) -> bool:
        file = path if path.is_file() else next(iter(sorted(path.glob(LAYERS))), None)
        if file is None or not (file.parent / CONFIG).is_file():
            return False
        names = tensor_names(file) - {THRESHOLD, SKIP, K}
        return names <= NAMES.keys() and len(names) > 2  # `outline` names one that is missing

    def outline(self, path: Path) -> Outline:
        file = open_tensors(_layer_file(path))
        config = _settings(file.path.parent / CONFIG)
        kind = config.text("model_kind", "transcoder_set")
        if kind != "transcoder_set":
            raise ConfigError(f"{config.path}: a {kind} writes to several layers, which is not supported")
        default = next((name for tensor, name in ((THRESHOLD, "jumprelu"), (K, "topk")) if tensor in file.specs), "relu")
        activation = config.text("activation", default).lower()
        if activation not in RULES:
            raise ConfigError(f"{config.path}: no rule computes {activation!r}; supported are {', '.join(RULES)}")
        k = _k(config, file) if activation == "topk" else None
        layer = re.fullmatch(r"layer_(\d+)\.safetensors", file.path.name)
        hook, target = (_hook(config, side, layer and int(layer[1])) for side in ("input", "output"))
        return Outline(
            file,
            RULES[activation],
            NAMES
            | ({"rule.plain_threshold": (THRESHOLD, "d_sae")} if activation == "jumprelu" else {})
            | ({SKIP: (SKIP, "d_out d_in")} if SKIP in file.specs else {}),
            options={"topk": {"k": k}, "jumprelu": {"parameter": "plain"}}.get(activation, {}),
            hook=hook,
            target=target,
            origin=Origin(model=config.text("model_name"), excluded_positions=()),
            transcoder=True,
            rectifies=activation != "jumprelu",
            unused=frozenset({K} if activation == "topk" else ()),
            config=config.values,
            architecture=f"{activation} transcoder",
        )

    def write(self, dictionary: Dictionary, folder: Path) -> None:
        form = dictionary.rule.inference_form()
        place = re.fullmatch(r"blocks\.(\d+)\.(.+)", dictionary.reads[0].hook or "")
        target = re.fullmatch(r"blocks\.(\d+)\.(.+)", dictionary.writes[0].hook or "")
        is_one_to_one = len(dictionary.reads) + len(dictionary.writes) == 2 and dictionary.d_in == dictionary.d_out
        if dictionary.writes_what_it_reads or not is_one_to_one:
            raise cannot_write(
                dictionary, self.plugin_name, "it reads only transcoders whose input and output have the same width"
            )
        if form is None or form.architecture not in ACTIVATIONS:
            raise cannot_write(dictionary, self.plugin_name, f"it supports only {', '.join(RULES)}")
        if not place or not target or place[1] != target[1]:
            raise cannot_write(dictionary, self.plugin_name, "it needs hooks of a single layer, blocks.<i>.…")
        activation = ACTIVATIONS[form.architecture]
        config = {
            "model_kind": "transcoder_set",
            "model_name": dictionary.origin.model,
            "feature_input_hook": place[2],
            "feature_output_hook": target[2],
            "scan": None,
            "activation": activation,
        }
        tensors = {"W_enc": dictionary.W_enc.T, "W_dec": dictionary.W_dec, "b_enc": dictionary.b_enc, "b_dec": dictionary.b_dec}
        if dictionary.W_skip is not None:
            tensors[SKIP] = dictionary.W_skip
        if activation == "jumprelu":
            tensors[THRESHOLD] = form.tensors["threshold"]
        if activation == "topk":
            config["k"] = form.settings["k"]
            _say_what_differs(config["k"])
        lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in config.items()]
        write_tensors(folder / f"layer_{place[1]}.safetensors", tensors)
        write_text(folder / CONFIG, "".join(lines))


def _layer_file(path: Path) -> Path:
    """Return the path itself, or the only layer file of a folder."""
    if path.is_file():
        return path
    files = sorted(path.glob(LAYERS))
    if len(files) > 1:
        raise ConfigError(f"{path} holds transcoders of {len(files)} layers; name the file of one, such as {files[0]}")
    return files[0] if files else path / LAYERS.replace("*", "0")


def _settings(path: Path) -> Settings:
    """Read config.yaml. All values are text except k."""
    size = file_size(path)
    if size > MAX_YAML_BYTES:
        raise CorruptFileError(f"{path}: {size:,} bytes is too large for a settings file")
    try:
        text = path.read_text(encoding="utf-8")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
            raise ValueError("it uses YAML aliases, which are not supported")
        values = yaml.load(text, Loader=yaml.BaseLoader)  # creates only text, lists and tables
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise CorruptFileError(f"{path} is not valid YAML: {str(error)[:200]}") from None
    if not isinstance(values, dict):
        raise CorruptFileError(f"{path} holds a {type(values).__name__}, not a table")
    values = {key: value for key, value in values.items() if value not in ("", "null", "~")}
    if re.fullmatch(r"\d{1,9}", str(values.get("k"))):
        values["k"] = int(values["k"])
    return Settings(path, values)


def _k(config: Settings, file: TensorFile) -> int:
    """Return k from config.yaml, or else from the file."""
    stored = int(file.read([K])[K]) if file.ndim(K) == 0 else None
    k = config.whole("k", stored)
    if stored not in (None, k):
        raise CorruptFileError(f"{file.path}: k = {stored}, but {config.path} has k = {k}")
    _say_what_differs(k)
    return k


def _hook(config: Settings, side: Literal["input", "output"], layer: int | None) -> str | None:
    """Return transformer-lens's name for a hook of a layer, or None if the layer is unknown."""
    key = f"feature_{side}_hook"
    name = config.text(key)
    if name is None:
        raise CorruptFileError(f"{config.path}: {key} is missing")
    name = fill_layer(config.path, name, layer)
    if numbered := re.match(r"blocks\.(\d+)\.", name):
        if layer not in (None, int(numbered[1])):
            raise CorruptFileError(f"{config.path}: {key} is {name!r}, but the file is that of layer {layer}")
        return name
    if re.match(r"(model|transformer|gpt_neox|layers|h)\.", name):
        hook = hook_of_module(name, side)
        if hook is None:
            raise ConfigError(
                f"{config.path}: {key} is {name!r}, the {side} of a module without a known hook; replace it by "
                "transformer-lens's name, such as mlp.hook_in or hook_mlp_out"
            )
        return hook
    return None if layer is None else f"blocks.{layer}.{name}"


def _say_what_differs(k: int) -> None:
    logging.getLogger(__name__).warning(
        "circuit-tracer keeps negative codes where fewer than k = %d pre-activations are positive; here they are 0", k
    )
