"""The folder of a dictionary: cfg.json and tensors, in the layout of SAELens, with our own settings beside.

The settings that SAELens does not know are under `metadata.saelens_lite` in cfg.json. Tensors of the rule that the published
architecture does not have are in plugin.safetensors.
"""

import importlib.metadata
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from saelens_lite import registry
from saelens_lite.config import Origin
from saelens_lite.errors import CorruptFileError
from saelens_lite.files import differences, read_json, shortened
from saelens_lite.ports import Port, split_head, width
from saelens_lite.schemas import Checked, Positive, String, checked
from saelens_lite.sparsity import PublishedForm
from saelens_lite.tensor_files import DTYPES, Spec, read_tensors, tensor_specs

FORMAT = 2  # format 1 has hooks in the origin, and a key "transcoder"
TOKEN_NORMS = {None: "none", "layer_norm": "layer_norm", "constant_norm": "constant_norm_rescale"}  # names in SAELens
OWN, CONFIG_FILE = "saelens_lite", "cfg.json"  # the name of our format, and the file that holds it
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
            raise ValueError("d_out must be given if and only if the dictionary has write ports other than its read ports")
        if width(ours.reads) != self.d_in or width(ours.writes or ()) != (self.d_out or 0):
            raise ValueError("the widths of the ports do not add up to d_in and d_out")
        return self


def _of_format_2(config: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a cfg.json of format 1, which names hooks in the origin, in format 2."""
    ours = config["metadata"]["saelens_lite"]
    origin, is_transcoder = ours.get("origin", {}), ours.get("transcoder", False)
    if not isinstance(origin, dict) or not isinstance(is_transcoder, bool) or ours.keys() & {"reads", "writes"}:
        raise CorruptFileError("metadata.saelens_lite is not of format 1, as it claims")
    origin = dict(origin)
    hook, target = origin.pop("hook", None), origin.pop("target_hook", None)
    if target is not None and not is_transcoder:
        raise CorruptFileError("it names a target hook, but the dictionary is not a transcoder")
    ports = {
        "reads": [{"hook": hook, "width": config.get("d_in")}],
        "writes": [{"hook": target, "width": config.get("d_out")}] if is_transcoder else None,
    }
    kept = {key: value for key, value in ours.items() if key != "transcoder"} | ports | {"format": FORMAT, "origin": origin}
    other = {} if is_transcoder else {"d_out": None}
    return config | other | {"metadata": config["metadata"] | {"saelens_lite": kept}}


def read_settings(folder: Path) -> tuple[dict[str, Any], _Config]:
    """Return the content of cfg.json as it is, and its part for us in the newest format.

    Raises:
        CorruptFileError: the file is damaged, or of an unknown version.
    """
    config = read_json(folder / CONFIG_FILE, finite=True)
    ours = config["metadata"]["saelens_lite"]
    if not isinstance(ours, dict) or isinstance(ours.get("format"), bool) or ours.get("format") not in (1, FORMAT):
        raise CorruptFileError(
            f"{folder / CONFIG_FILE} was not written by this version of saelens_lite (metadata.saelens_lite.format is "
            f"{ours.get('format') if isinstance(ours, dict) else 'absent'!r:.40}, expected 1 or {FORMAT})"
        )
    try:
        newer = config if ours["format"] == FORMAT else _of_format_2(config)
    except CorruptFileError as error:
        raise CorruptFileError(f"{folder / CONFIG_FILE} is damaged: {error}") from None
    return config, checked(folder / CONFIG_FILE, newer, _Config)


def is_own_folder(folder: Path) -> bool:
    """Return whether a folder was written by `Dictionary.save` of any version."""
    return (folder / CONFIG_FILE).is_file() and is_own(read_json(folder / CONFIG_FILE))


def is_own(config: dict[str, Any]) -> bool:
    metadata = config.get("metadata")
    return isinstance(metadata, dict) and OWN in metadata


def own_names(folder: Path, read: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Return the results of `read` for the tensors of both files, by our names.

    Raises:
        CorruptFileError: both files hold a tensor of the same name.
    """
    own = ("W_enc", "b_enc", "W_dec", "b_dec", "W_skip")
    weights = {k if k in own or k.startswith("rule.") else f"rule.{k}": v for k, v in read(folder / WEIGHTS_FILE).items()}
    if not os.path.lexists(folder / PLUGIN_FILE):
        return weights
    extra = {f"rule.{k}": v for k, v in read(folder / PLUGIN_FILE).items()}
    if both := weights.keys() & extra.keys():
        raise CorruptFileError(f"{folder}: {WEIGHTS_FILE} and {PLUGIN_FILE} both hold {shortened(both)}")
    return weights | extra


def read_density(folder: Path, d_sae: int) -> Float[Tensor, " d_sae"] | None:
    """Return the firing frequency of each latent from sparsity.safetensors, or None if the folder has no such file.

    Raises:
        CorruptFileError: the file is damaged, or not of d_sae latents.
    """
    path = folder / SPARSITY_FILE
    if not os.path.lexists(path):
        return None
    specs = tensor_specs(path)
    if specs.keys() != {"sparsity"} or specs["sparsity"].shape != (d_sae,) or not specs["sparsity"].dtype.is_floating_point:
        raise CorruptFileError(f"{path}: expected a tensor 'sparsity' of shape {(d_sae,)}")
    log_density = read_tensors(path)["sparsity"]
    return (10.0 ** log_density.double() - 1e-10).clamp(0, 1).float()


def slice_without(excluded: Sequence[int], n_ctx: int | None) -> list[int | None] | None:
    """Return the [start, stop] or [start, stop, step] of the slice of a row that leaves out exactly these positions.

    None if nothing is left out, if no slice does it, or if the slice depends on an unknown row length.
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


def _architecture(d: Any, form: PublishedForm | None) -> str:
    """Return the name of the architecture in other tools; if they have no name, one made of the rule's name."""
    if len(d.reads) + len(d.writes) > 2:
        return f"{d.rule.plugin_name}_crosscoder"
    if d.writes_what_it_reads:
        return form.architecture if form else d.rule.plugin_name
    kind = "transcoder" if d.W_skip is None else "skip_transcoder"
    if form and form.architecture in ("standard", "jumprelu"):
        return kind if form.architecture == "standard" else f"jumprelu_{kind}"
    return f"{d.rule.plugin_name}_{kind}"


def settings_of(d: Any) -> dict[str, Any]:
    """Return the content of cfg.json for a dictionary."""
    form = d.rule.inference_form()
    plugin = registry.find(d.rule.plugin_name)
    names = {(port.model, port.minus) for port in (*d.reads, *d.writes)}
    origin = d.origin.of(d.reads[0].model) if len(names) == 1 and d.reads[0].minus is None else d.origin
    return {
        "architecture": _architecture(d, form),
        "d_in": d.d_in,
        "d_sae": d.d_sae,
        **({} if d.writes_what_it_reads else {"d_out": d.d_out}),
        "dtype": str(d.W_enc.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": d.writes_what_it_reads,
        "normalize_activations": TOKEN_NORMS[d.token_norm],
        "reshape_activations": "none",
        **(form.settings if form else {}),
        "metadata": {
            "sae_lens_version": "6.0.0",  # without it SAELens takes the file for an old one and drops the metadata
            "model_name": origin.model,
            "model_class_name": origin.model_class or "AutoModelForCausalLM",
            **_place("", d.reads[0]),
            **({} if d.writes_what_it_reads else _place("_out", d.writes[0])),
            "context_size": d.origin.n_ctx,
            "prepend_bos": d.origin.prepend_bos,
            "dataset_path": d.origin.text,
            **_tokens_left_out(d.origin),
            "model_from_pretrained_kwargs": dict.fromkeys(origin.processing, True),
            "saelens_lite": {
                "format": FORMAT,
                "reads": [port.model_dump() for port in d.reads],
                "writes": None if d.writes_what_it_reads else [port.model_dump() for port in d.writes],
                "skip": d.W_skip is not None,
                **({"token_norm": d.token_norm} if d.token_norm else {}),
                "sparsity": d.rule.plugin_name,
                "options": d.rule.config.model_dump(),
                "distribution": f"{plugin.distribution} {plugin.version}" if plugin.entry_point else None,
                "version": importlib.metadata.version("saelens-lite"),
                "origin": d.origin.model_dump(),
                "training": d.training_record,
            },
        },
    }


def _place(end: str, port: Port) -> dict[str, Any]:
    """Return a hook under the names of SAELens, which keeps the number of an attention head apart.

    Differences of two models are not at a hook. They get their key, chat-base:…, which is no hook of a model, so that no tool
    takes them for the activations of one.
    """
    hook = port.hook if port.minus is None else port.key
    whole, head = split_head(hook) if hook else (None, None)
    index = {} if end and head is None else {f"hook_head_index{end}": head}
    return {f"hook_name{end}": whole, **index}


def _tokens_left_out(origin: Origin) -> dict[str, Any]:
    """Return excluded token ids and, if a slice of a row expresses them, positions under the names of SAELens."""
    kept = slice_without(origin.excluded_positions, origin.n_ctx)
    token_ids = list(origin.excluded_token_ids)
    return ({"seqpos_slice": kept} if kept else {}) | ({"exclude_special_tokens": token_ids} if token_ids else {})


def check_published(d: Any, folder: Path, config: dict[str, Any], state: dict[str, Spec]) -> None:
    """Raise CorruptFileError if the part of cfg.json for other tools contradicts the part for us."""
    expected = settings_of(d)
    del expected["metadata"], expected["device"]
    for key, value in expected.items():
        if key in config and config[key] != value:
            raise CorruptFileError(
                f"{folder / CONFIG_FILE}: {key} is {config[key]!r}, but metadata.saelens_lite makes it {value!r}"
            )
    for name in ("W_dec", "b_dec"):
        if state[name].dtype != d.W_dec.dtype:
            raise CorruptFileError(f"{folder}: {name} has dtype {state[name].dtype}, cfg.json says {config['dtype']}")


def check_state(folder: Path, specs: dict[str, Spec], expected: dict[str, Tensor], optional: set[str]) -> None:
    """Raise CorruptFileError unless names, shapes and dtypes fit. Files may also hold the `optional` tensors."""
    missing = expected.keys() - specs.keys()
    surplus = {k for k in specs.keys() - expected.keys() if k.removeprefix("rule.") not in optional}
    if missing or surplus:
        raise CorruptFileError(f"{folder}: {differences(missing, surplus, specs)}")
    for name, tensor in expected.items():
        if specs[name].shape != tensor.shape:
            raise CorruptFileError(f"{folder}: {name} has shape {tuple(specs[name].shape)}, expected {tuple(tensor.shape)}")
        if specs[name].dtype not in DTYPES.values():
            raise CorruptFileError(f"{folder}: {name} has dtype {specs[name].dtype}; expected one of {', '.join(DTYPES)}")
