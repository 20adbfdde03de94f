"""Gemma Scope: params.npz (first release), or params.safetensors and config.json (second release).

    codes = ReLU(h) · 1[h > threshold],   h = x W_enc + b_enc        y = codes W_dec + b_dec + x A

The files hold A, affine_skip_connection, as [d_in d_out]. Without config.json, the hooks follow from the second release's names
of folders, such as resid_post/layer_17_width_16k_l0_big. Files of the first release name neither their model nor their hook.

A crosscoder or a cross-layer transcoder (CLT) has a file for each of its layers, params_layer_0.safetensors and so on. The
latents of a file read its layer and write that layer and later ones. The folder of a crosscoder is one dictionary, which reads
and writes all its layers. A single file is a dictionary too: it reads one layer, and its output is its part of a sum.

Dictionaries of the embedding were trained on embeddings before Gemma multiplies them by √d_model. hook_embed is after that, so
both sides are scaled here; SAELens scales W_enc and W_dec alike, but not b_dec.

Source: McDougall et al. 2025, Gemma Scope 2, section 2.6.
"""

import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from saelens_lite import Dictionary, Origin, Port
from saelens_lite.errors import ConfigError, CorruptFileError
from saelens_lite.formats import (
    Format,
    JoinedFiles,
    Known,
    Outline,
    Settings,
    TensorFile,
    apart,
    cannot_write,
    find_file,
    hook_of_module,
    is_zip,
    open_tensors,
    tensor_names,
    write_json,
    write_tensors,
)

FILES = ("params.npz", "params.safetensors")
LAYER_FILES, LAYER_FILE = "params_layer_*.safetensors", r"params_layer_(\d{1,4})\.safetensors"
FIRST = {"W_enc", "W_dec", "b_enc", "b_dec", "threshold"}
SECOND = {name.lower() for name in FIRST}
SKIP = "affine_skip_connection"
EMBED = "hook_embed"
MAX_LAYERS = 1000
MANY = ("clt", "crosscoder")
MLP = ("pre_feedforward_layernorm.output", "post_feedforward_layernorm.output")
SITES = {  # name of a folder → type, input and output in a layer
    "resid_post": ("sae", "output", "output"),
    "attn_out": ("sae", "self_attn.o_proj.input", "self_attn.o_proj.input"),
    "mlp_out": ("sae", MLP[1], MLP[1]),
    "transcoder": ("transcoder", *MLP),
    "clt": ("clt", *MLP),
    "crosscoder": ("crosscoder", "output", "output"),
}

POINTS = {  # our hook in a layer → theirs
    "hook_resid_post": "output",
    "attn.hook_z": "self_attn.o_proj.input",
    "mlp.hook_in": MLP[0],
    "hook_mlp_out": MLP[1],
}


class Place(NamedTuple):
    """The hooks that the latents of a file read and write, and the number of layers before them."""

    reads: tuple[str | None, ...]
    writes: tuple[str | None, ...]
    before: int = 0


class GemmaScope(Format):
    """Google DeepMind's JumpReLU dictionaries of Gemma: both releases are read, the second one's form is written."""

    def detect(self, path: Path) -> bool:
        file = find_file(path, *FILES) or next(iter(_layer_files(path)), None)
        if file is None:
            return False
        named = file.name in FILES or re.fullmatch(LAYER_FILE, file.name) is not None
        names = tensor_names(file) - {SKIP}
        alone = names == SECOND and (named or not (file.parent / "config.yaml").is_file())  # which circuit-tracer writes
        is_ours = alone or (names == FIRST and is_zip(file))
        return is_ours or (named and max(len(names & FIRST), len(names & SECOND)) > 2)

    def outline(self, path: Path) -> Outline:
        first = find_file(path, *FILES)
        files = [first] if first else _layer_files(path) or [path / FILES[0]]
        opened = [open_tensors(file) for file in files]
        W = "w" if opened[0].specs.keys() & {"w_enc", "w_dec"} else "W"
        config = _settings(files[0].parent, W)
        kind, architecture = config.text("type"), config.text("architecture", "jump_relu")
        if kind not in (None, "sae", "transcoder", *MANY) or architecture not in ("jump_relu", "jumprelu"):
            raise ConfigError(
                f"{config.path}: type {kind!r} with architecture {architecture!r}; only sae, transcoder, crosscoder, clt with "
                "jump_relu work"
            )
        if config.flag("affine_connection") and SKIP not in opened[0].specs:
            raise CorruptFileError(f"{files[0]}: affine_connection is true, but tensor {SKIP!r} is missing")
        whole = not path.is_file() and opened[0].ndim(f"{W}_dec") == 3
        file = _crosscoder(opened, kind) if whole else opened[0]
        place = _place(file, config, kind)
        transcoder = SKIP in file.specs or place.reads != place.writes or kind in ("transcoder", "clt")
        if kind == "sae" and transcoder:
            raise CorruptFileError(
                f"{config.path}: type is 'sae', but it has a skip connection, or hf_hook_point_out is not hf_hook_point_in"
            )
        outline = Outline(
            file,
            "jumprelu",
            _tensors(file, W),
            options={"parameter": "plain"},
            hook=place.reads if len(place.reads) > 1 else place.reads[0],
            target=(place.writes if len(place.writes) > 1 else place.writes[0]) if transcoder else None,
            origin=Origin(model=_model(config.text("model_name")), prepend_bos=True, excluded_positions=()),
            transcoder=transcoder,
            subtracts_b_dec=False,
            before=place.before,
            lacks_hook="" if "hf_hook_point_in" in config else _lacks_hook(file.path),
            config=config.values if W == "w" and config.path.is_file() else {},
            architecture=architecture,
        )
        return _of_embeddings(outline) if outline.hook == EMBED else outline

    def read(self, path: Path, known: Known | None = None) -> Dictionary:
        outline = self.outline(path)
        if known:
            outline, was = outline.knowing(known), outline.hook
            outline = _of_embeddings(outline) if was != outline.hook == EMBED else outline
        return outline.build(self.plugin_name)

    def write(self, dictionary: Dictionary, folder: Path) -> None:
        d, form = dictionary, dictionary.rule.inference_form()
        if form is None or form.architecture not in ("standard", "jumprelu") or d.b_enc is None or d.token_norm:
            raise cannot_write(d, self.plugin_name, "its codes are ReLU(h) above a threshold, for activations as they are")
        many = len(d.reads) > 1
        if len(d.writes) != len(d.reads) or (many and not d.writes_what_it_reads):
            raise cannot_write(d, self.plugin_name, "it reads and writes one hook, or writes the hooks that it reads")
        points = {f"hf_hook_point_{end}": _point(d, ports) for end, ports in (("in", d.reads), ("out", d.writes))}
        W_enc, b_enc = d.W_enc.cpu(), d.b_enc.cpu()
        if d.writes_what_it_reads:
            b_enc = (b_enc.double() - d.b_dec.cpu().double() @ W_enc.double()).to(W_enc.dtype)
        threshold = form.tensors.get("threshold", torch.zeros_like(b_enc)).cpu()
        n = len(d.reads)
        W_enc, W_dec, b_dec = _blocks(d, W_enc), apart(d.W_dec, d.writes), apart(d.b_dec, d.writes)
        for i, (b, theta, rows) in enumerate(
            zip(b_enc.chunk(n), threshold.chunk(n), torch.stack(W_dec, 1).chunk(n), strict=True)
        ):
            tensors = {
                "w_enc": W_enc[i],
                "b_enc": b,
                "w_dec": rows if many else rows[:, 0],
                "b_dec": b_dec[i],
                "threshold": theta,
            }
            tensors |= {} if d.W_skip is None else {SKIP: d.W_skip.T}
            write_tensors(folder / (f"params_layer_{i}.safetensors" if many else FILES[1]), tensors)
        settings = {"architecture": "jump_relu", "model_name": d.origin.model, "width": d.d_sae, **points}
        kind = "crosscoder" if many else "sae" if d.writes_what_it_reads else "transcoder"
        write_json(folder / "config.json", settings | {"type": kind, "affine_connection": d.W_skip is not None})


def _blocks(d: Dictionary, W_enc: Tensor) -> list[Tensor]:
    """Return the encoder of each port's own latents. Raise ConfigError if latents read other ports."""
    n = len(d.reads)
    if len({port.width for port in d.reads}) > 1 or d.d_sae % n:
        raise cannot_write(d, "gemma_scope", "its layers have the same width and number of latents")
    parts = [[block.T for block in rows.chunk(n)] for rows in apart(W_enc.T, d.reads)]  # [port][block] → [width latents]
    if any(parts[i][j].any() for i in range(n) for j in range(n) if i != j):
        raise cannot_write(d, "gemma_scope", "each of its latents reads one layer")
    return [parts[i][i] for i in range(n)]


def _point(d: Dictionary, ports: tuple[Port, ...]) -> str:
    """Return the point of the hooks of ports in a transformers model, such as model.layers.{5,9}.output."""
    matches = [re.fullmatch(r"blocks\.(\d+)\.(.+)", port.hook or "") for port in ports]
    sites = {match[2] for match in matches if match}
    if None in matches or len(sites) > 1 or sites - POINTS.keys() or any(port.model for port in ports):
        raise cannot_write(d, "gemma_scope", f"its hooks are one of {', '.join(POINTS)}, in layers of one model")
    layers = ",".join(match[1] for match in matches if match)
    return f"model.layers.{layers if len(ports) == 1 else f'{{{layers}}}'}.{POINTS[sites.pop()]}"


def _layer_files(path: Path) -> list[Path]:
    """Return the files of a folder's layers, in the order of the layers."""
    numbered = [(match, file) for file in path.glob(LAYER_FILES) if (match := re.fullmatch(LAYER_FILE, file.name))]
    return [file for match, file in sorted(numbered, key=lambda pair: int(pair[0][1]))]


def _settings(folder: Path, W: str) -> Settings:
    """Return the settings in config.json, or, without that file, those that the names of the second release's folders imply."""
    path = folder / "config.json"
    if W == "w" and path.is_file():
        return Settings.read(path)
    if folder.parent.parent.name == "embedding" and W == "W":
        return Settings(path, {"hf_hook_point_in": "embed_tokens.output"})
    site = SITES.get(folder.parent.name.removesuffix("_all"))
    layers = re.match(r"layer_(\d+(?:_\d+)*)_width_", folder.name)
    if W == "W" or site is None or not (layers or site[0] == "clt"):
        return Settings(path, {})
    kind, inside, outside = site
    layer = "all" if layers is None else layers[1].replace("_", ",")
    layer = layer if layer.isdecimal() else f"{{{layer}}}"
    points = {f"hf_hook_point_{side}": f"model.layers.{layer}.{at}" for side, at in (("in", inside), ("out", outside))}
    return Settings(path, {"type": kind, **points})


def _crosscoder(files: list[TensorFile], kind: str | None) -> JoinedFiles:
    """Return the files of a crosscoder's layers as one."""
    first = files[0].path
    if kind != "crosscoder":
        what = "a cross-layer transcoder" if kind == "clt" else "a crosscoder or a cross-layer transcoder"
        raise ConfigError(
            f"{first.parent} holds {len(files)} layers of {what}; name the file of one, such as {first}: its latents read one "
            "layer and write several"
        )
    if SKIP in files[0].specs:
        raise ConfigError(f"{first}: a crosscoder with {SKIP} is not supported; name the file of one layer")
    names = [f"params_layer_{i}.safetensors" for i in range(_n_layers(files[0], "w_dec"))]
    if [file.path.name for file in files] != names:
        raise CorruptFileError(
            f"{first.parent}: expected the files params_layer_0.safetensors to {names[-1]}, one for each layer"
        )
    return JoinedFiles(files, stacked=True)


def _place(file: TensorFile, config: Settings, kind: str | None) -> Place:
    """Return the hooks of a file, or of all files of a crosscoder."""
    inside, outside = config.text("hf_hook_point_in"), config.text("hf_hook_point_out")
    if outside is None and kind != "transcoder":
        outside = inside
    dec = "w_dec" if "w_dec" in file.specs else "W_dec"
    shape = file.specs[dec].shape if dec in file.specs else ()
    if len(shape) < 3:
        if kind in MANY:
            raise CorruptFileError(f"{file.path}: type is {kind!r}, but {dec} has shape {shape}, without an axis of layers")
        reads = _hooks(config, inside, 1)
        return Place(reads, reads if outside == inside else _hooks(config, outside, 1))
    n = _n_layers(file, dec)
    reads, writes = _hooks(config, inside, n), _hooks(config, outside, n)
    if len(shape) == 4:
        return Place(reads, writes)
    number = re.fullmatch(LAYER_FILE, file.path.name)
    if number is None or int(number[1]) >= n:
        raise ConfigError(
            f"{file.path} is a file of one of {n} layers; call it params_layer_<its place among them>.safetensors"
        )
    logging.getLogger(__name__).warning(
        "%s: its output is one layer's part of the output of a %s, which is the sum of the parts of all its layers",
        *(file.path, kind or "crosscoder or clt"),
    )
    i = int(number[1])
    return Place(reads[i : i + 1], writes[i:], i)


def _n_layers(file: TensorFile, dec: str) -> int:
    n = file.specs[dec].shape[-2]
    if not 0 < n <= MAX_LAYERS:
        raise CorruptFileError(f"{file.path}: {dec} is of {n:,} layers; expected 1 to {MAX_LAYERS}")
    return n


def _hooks(config: Settings, point: str | None, n: int) -> tuple[str | None, ...]:
    """Return the hooks of n layers. A point holds a list of layers such as {5,9}, or {all} of them."""
    if point is None:
        return (None,) * n
    layers = re.fullmatch(r"([^{}]*)\{([\d, ]+|all)\}([^{}]*)", point)
    numbers = [""] if layers is None else map(str, range(n)) if layers[2] == "all" else re.findall(r"\d+", layers[2])
    points = [point if layers is None else f"{layers[1]}{number}{layers[3]}" for number in numbers]
    if len(points) != n:
        raise CorruptFileError(f"{config.path}: {point[:80]!r} names {len(points)} layers; the tensors are of {n}")
    return tuple(_hook(point, config.text("model_name", "gemma-3")) for point in points)


def _hook(point: str, model: str | None) -> str | None:
    """Return transformer-lens's name for a hook such as "model.layers.3.output", or log that it is unknown and return None."""
    module, _, side = point.rpartition(".")
    hook = hook_of_module(module, side, model) if side in ("input", "output") else None
    if hook is None:
        logging.getLogger(__name__).warning("no hook is known for %s; the dictionary's origin names none", point[:80])
    return hook


def _tensors(file: TensorFile, W: str) -> dict[str, tuple[str, str]]:
    """Return the names and axes of the tensors. Files of a crosscoder are stacked: each is a block of latents."""
    n_axes = file.ndim(f"{W}_dec")
    block, port = ("blocks ", "n_writes ") if n_axes == 4 else ("", "")
    return {
        "W_enc": (f"{W}_enc", f"{block}d_in d_sae"),
        "b_enc": ("b_enc", f"{block}d_sae"),
        "W_dec": (f"{W}_dec", f"{block}d_sae n_writes d_out" if n_axes in (3, 4) else "d_sae d_out"),
        "b_dec": ("b_dec", f"{port}d_out"),
        "rule.plain_threshold": ("threshold", f"{block}d_sae"),
        **({"W_skip": (SKIP, "d_in d_out")} if SKIP in file.specs else {}),
    }


def _model(name: str | None) -> str | None:
    """Return the model's id on the Hub."""
    if name is None:
        return None
    name = (name if "/" in name else f"google/{name}").replace("gemma-v3-", "gemma-3-")
    return name.removesuffix("-pt") if "gemma-3-270m" in name else name


def _lacks_hook(path: Path) -> str:
    layer = re.search(r"\blayer_(\d+)\b", str(path))
    where = f" in layer {layer[1]}" if layer else ""
    return f"{path}: neither the file nor its folder's name tells which hook it reads{where}; the dictionary names none"


def _of_embeddings(outline: Outline) -> Outline:
    return replace(outline, scale=outline.dims["d_in"] ** -0.5)
