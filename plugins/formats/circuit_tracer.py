"""circuit-tracer: config.yaml and one file per layer with its transcoder.

    codes = act(x W_encᵀ + b_enc)        y = codes W_dec + b_dec + x W_skipᵀ

The file holds W_enc as [d_sae d_in]. If config.yaml names no activation, it is JumpReLU for a file with thresholds, else ReLU.
Hook names are relative to their layer, or contain {layer} for its number. circuit-tracer needs all layers from 0 on, so put the
layer files of several dictionaries into one folder. Files with lower-case names are copies of Gemma Scope 2's.

A cross-layer transcoder (CLT) has two files per layer, W_enc_0.safetensors and W_dec_0.safetensors and so on. Each pair is a
dictionary: it reads its layer and writes that layer and all later ones, and its output is its part of a sum.
"""

import json
import logging
import re
from pathlib import Path
from typing import Any, Literal

import yaml

from saelens_lite import Dictionary, Origin
from saelens_lite.errors import ConfigError, CorruptFileError
from saelens_lite.formats import (
    Format,
    JoinedFiles,
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

CONFIG, LAYERS, ENCODERS = "config.yaml", "layer_*.safetensors", "W_enc_*.safetensors"
KINDS = ("transcoder_set", "cross_layer_transcoder")
MAX_YAML_BYTES, MAX_YAML_DEPTH = 1 << 16, 100
ACTIVATIONS = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu"}  # published architecture → their name
RULES = {"relu": "l1", "topk": "topk", "jumprelu": "jumprelu"}
THRESHOLD, SKIP, K = "activation_function.threshold", "W_skip", "k"
FOUR = {"W_enc", "b_enc", "W_dec", "b_dec"}
COPIED = {**{name.lower(): name for name in FOUR}, "threshold": THRESHOLD, "affine_skip_connection": SKIP}


class CircuitTracer(Format):
    """circuit-tracer's transcoders, one file per layer; read and written."""

    files = (CONFIG, LAYERS)

    def detect(self, path: Path) -> bool:
        if path.is_dir() and "transcoders" in _settings_or_none(path) and not any(path.glob(LAYERS)):
            return True  # `outline` says where they are
        file = path if path.is_file() else next(iter(sorted([*path.glob(LAYERS), *path.glob(ENCODERS)])), None)
        if file is None or not tensor_names(file):
            return False
        if _clt_layer(file) is not None:
            return True
        names = tensor_names(file) - {THRESHOLD, SKIP, K}
        if re.fullmatch(r"layer_\d+\.safetensors", file.name) and names == FOUR:
            return True
        if not (file.parent / CONFIG).is_file():
            return False
        return (names <= FOUR and len(names) > 2) or FOUR <= {COPIED.get(name) for name in names} <= set(COPIED.values())

    def outline(self, path: Path) -> Outline:
        config = _settings((path if path.is_dir() else path.parent) / CONFIG)
        path = _layer_file(path, config)
        layer = _clt_layer(path)
        file = open_tensors(path) if layer is None else _joined(path.parent, layer)
        kind = config.text("model_kind", KINDS[layer is not None])
        if kind not in KINDS or kind != KINDS[layer is not None]:
            raise ConfigError(
                f"{config.path}: model_kind is {kind!r}, but {path} holds tensors of a {KINDS[layer is not None]}"
            )
        names = _clt_tensors(file, layer) if layer is not None else _tensors(file)
        threshold = "rule.plain_threshold" in names
        default = "jumprelu" if threshold else "topk" if K in file.specs else "relu"
        activation = config.text("activation", default).lower()
        if activation not in RULES:
            raise ConfigError(f"{config.path}: no rule computes {activation!r}; supported are {', '.join(RULES)}")
        if activation == "jumprelu":
            names |= {} if threshold else {"rule.plain_threshold": (THRESHOLD, "d_sae")}
        else:
            names.pop("rule.plain_threshold", None)
        k = _k(config, file) if activation == "topk" else None
        hooks = _hooks(config, file, names, _layer(path, config) if layer is None else layer)
        itself = hooks.get("hook") is not None and hooks["hook"] == hooks["target"] and "W_skip" not in names
        return Outline(
            file,
            RULES[activation],
            names,
            options={"topk": {"k": k}, "jumprelu": {"parameter": "plain"}}.get(activation, {}),
            **hooks,
            origin=Origin(model=config.text("model_name"), excluded_positions=()),
            transcoder=not itself,
            subtracts_b_dec=False,
            rectifies=activation != "jumprelu",
            unused=frozenset({K} if activation == "topk" else ()),
            config=config.values,
            architecture=f"{activation} {'transcoder' if layer is None else 'layer of a cross-layer transcoder'}",
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


def _layer_file(path: Path, config: Settings) -> Path:
    """Return the path itself, or the only layer file of a folder."""
    if path.is_file():
        return path
    files = sorted(path.glob(LAYERS)) or sorted(path.glob(ENCODERS))
    if len(files) > 1:
        raise ConfigError(f"{path} holds transcoders of {len(files)} layers; name the file of one, such as {files[0]}")
    if not files and (listed := _listed(config)):
        first = listed[0][1]
        where = first if first.startswith("hf://") else path / first
        raise ConfigError(
            f"{config.path} only lists transcoders of {len(listed)} layers; load the file of one, such as {where}"
        )
    return files[0] if files else path / LAYERS.replace("*", "0")


def _listed(config: Settings) -> list[tuple[int, str]]:
    """Return the layer and the file of each of the transcoders that config.yaml lists: addresses, or tables."""
    listed = config.values.get("transcoders") or []
    if not isinstance(listed, list):
        raise CorruptFileError(f"{config.path}: transcoders is a {type(listed).__name__}; expected a list")
    rows = [row if isinstance(row, dict) else {"layer": str(i), "filepath": row} for i, row in enumerate(listed)]
    if not all(isinstance(row.get("filepath"), str) and re.fullmatch(r"\d{1,4}", str(row.get("layer"))) for row in rows):
        raise CorruptFileError(
            f"{config.path}: transcoders holds an entry without a layer or a file; expected an address, or both"
        )
    return [(int(row["layer"]), row["filepath"]) for row in rows]


def _layer(file: Path, config: Settings) -> int | None:
    """Return the layer of a file: from its name, or else from the list in config.yaml."""
    if named := re.fullmatch(r"layer_(\d{1,4})\.safetensors", file.name):
        return int(named[1])
    layers = {layer for layer, listed in _listed(config) if Path(listed).name == file.name}
    return layers.pop() if len(layers) == 1 else None


def _clt_layer(file: Path) -> int | None:
    """Return the layer of a file of a cross-layer transcoder, or None for another file."""
    named = re.fullmatch(r"W_(?:enc|dec)_(\d{1,4})\.safetensors", file.name)
    return int(named[1]) if named and tensor_names(file) & {f"W_enc_{named[1]}", f"W_dec_{named[1]}"} else None


def _joined(folder: Path, layer: int) -> TensorFile:
    """Return the encoder and the decoder of a layer of a cross-layer transcoder as one file."""
    files = [folder / f"W_{side}_{layer}.safetensors" for side in ("enc", "dec")]
    for file in files:
        if not file.is_file():
            raise CorruptFileError(f"{file} is missing; a layer of a cross-layer transcoder needs it")
    logging.getLogger(__name__).warning(
        "%s: its output is one layer's part of the output of a cross-layer transcoder, which is the sum of the parts of all "
        "its layers",
        files[0],
    )
    return JoinedFiles([open_tensors(file) for file in files])


def _tensors(file: TensorFile) -> dict[str, tuple[str, str]]:
    """Return the names and axes of the tensors of a layer file.

    The sizes tell the axes of a copied W_enc. If it is square, they are those of Gemma Scope 2, as circuit-tracer reads it.
    """
    copied = "w_enc" in file.specs
    names = {name: name.lower() if copied else name for name in sorted(FOUR)}
    skip, threshold = ("affine_skip_connection", "threshold") if copied else (SKIP, THRESHOLD)
    d_sae, shape = (file.specs[name].shape if name in file.specs else () for name in (names["b_enc"], names["W_enc"]))
    latents_first = not copied or (shape[:1] == d_sae and shape[1:] != d_sae)
    return {
        "W_enc": (names["W_enc"], "d_sae d_in" if latents_first else "d_in d_sae"),
        "b_enc": (names["b_enc"], "d_sae"),
        "W_dec": (names["W_dec"], "d_sae d_out"),
        "b_dec": (names["b_dec"], "d_out"),
        **({"W_skip": (skip, "d_in d_out" if copied else "d_out d_in")} if skip in file.specs else {}),
        **({"rule.plain_threshold": (threshold, "d_sae")} if threshold in file.specs or copied else {}),
    }


def _clt_tensors(file: TensorFile, layer: int) -> dict[str, tuple[str, str]]:
    """Return the names and axes of the tensors of a layer of a cross-layer transcoder, whose skip is x W_skip."""
    skip, threshold = f"W_skip_{layer}", f"threshold_{layer}"
    return {
        "W_enc": (f"W_enc_{layer}", "d_sae d_in"),
        "b_enc": (f"b_enc_{layer}", "d_sae"),
        "W_dec": (f"W_dec_{layer}", "d_sae n_writes d_out"),
        "b_dec": (f"b_dec_{layer}", "d_out"),
        **({"W_skip": (skip, "d_in d_out")} if skip in file.specs else {}),
        **({"rule.plain_threshold": (threshold, "d_sae")} if threshold in file.specs else {}),
    }


def _settings_or_none(folder: Path) -> dict[str, Any]:
    try:
        return dict(_settings(folder / CONFIG).values)
    except CorruptFileError:
        return {}


def _settings(path: Path) -> Settings:
    """Read config.yaml. All values are text except k. A repository without it has no settings."""
    if not path.is_file():
        return Settings(path, {})
    size = file_size(path)
    if size > MAX_YAML_BYTES:
        raise CorruptFileError(f"{path}: {size:,} bytes is too large for a settings file")
    try:
        text = path.read_text(encoding="utf-8")
        _check_events(text)
        values = yaml.load(text, Loader=yaml.BaseLoader)  # creates only text, lists and tables
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise CorruptFileError(f"{path} is not valid YAML: {str(error)[:200]}") from None
    if not isinstance(values, dict):
        raise CorruptFileError(f"{path} holds a {type(values).__name__}, not a table")
    values = {key: value for key, value in values.items() if value not in ("", "null", "~")}
    if re.fullmatch(r"\d{1,9}", str(values.get("k"))):
        values["k"] = int(values["k"])
    return Settings(path, values)


def _check_events(text: str) -> None:
    """Refuse what makes YAML slow to read: aliases, and deep nesting, whose time grows as the square of the depth."""
    depth = 0
    for event in yaml.parse(text):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("it uses YAML aliases, which are not supported")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_YAML_DEPTH:
            raise ValueError(f"it is nested more than {MAX_YAML_DEPTH} levels deep")


def _k(config: Settings, file: TensorFile) -> int:
    """Return k from config.yaml, or else from the file."""
    stored = int(file.read([K])[K]) if file.ndim(K) == 0 else None
    if stored is None and "k" not in config:
        raise CorruptFileError(f"{config.path}: the activation is topk, but k is missing; add a line such as k: 32 to it")
    k = config.whole("k", stored)
    if stored not in (None, k):
        raise CorruptFileError(f"{file.path}: k = {stored}, but {config.path} has k = {k}")
    _say_what_differs(k)
    return k


def _hooks(config: Settings, file: TensorFile, names: dict[str, tuple[str, str]], layer: int | None) -> dict[str, Any]:
    """Return the hooks that are read and written: those of a layer, and for a cross-layer transcoder those of later layers."""
    if not config.path.is_file():
        lacks = f"{config.path} is missing, so the model and hooks that {file.path} was made for are unknown; the dictionary "
        return {"lacks_hook": f"{lacks}names none"}
    hook, (dec, axes) = _hook(config, "input", layer), names["W_dec"]
    if "n_writes" not in axes or layer is None or file.ndim(dec) != 3:
        return {"hook": hook, "target": _hook(config, "output", layer)}
    return {
        "hook": hook,
        "target": tuple(_hook(config, "output", layer + i) for i in range(min(file.specs[dec].shape[1], 1000))),
    }


def _hook(config: Settings, side: Literal["input", "output"], layer: int | None) -> str | None:
    """Return transformer-lens's name for a hook of a layer, or None if the layer or the hook is unknown."""
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
        hook = hook_of_module(name, side, config.text("model_name"))
        if hook is None:
            logging.getLogger(__name__).warning(
                "%s: %s is %r, the %s of a module without a known hook; the dictionary names none: give the hook, such as "
                "blocks.%s.mlp.hook_in, wherever you use it",
                *(config.path, key, name[:80], side, layer),
            )
        return hook
    return None if layer is None else f"blocks.{layer}.{name}"


def _say_what_differs(k: int) -> None:
    logging.getLogger(__name__).warning(
        "circuit-tracer keeps negative codes where fewer than k = %d pre-activations are positive; here they are 0", k
    )
