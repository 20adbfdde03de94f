"""SAELens: cfg.json and sae_weights.safetensors, in the layout of version 6 and of earlier versions.

    h = (x − b_dec) W_enc + b_enc      without apply_b_dec_to_input: h = x W_enc + b_enc

Our own folders are already SAELens folders; this format writes the same without the parts that only we read. Since version 6,
the model, the hook and the rows are in `metadata` of cfg.json; before, they are at the top level. A file that does not say its
version, such as one written by hand, may have them in either place. If a file from before version 6 names no loading options,
GPT-2 was loaded with HookedTransformer's defaults, which subtract the mean from everything that is written to the residual
stream.

Settings that change the codes, the output or the counted tokens are translated or refused. `seqpos_slice` becomes excluded
positions. A list in `exclude_special_tokens` becomes excluded token ids (true adds nothing, because special tokens are always
left out).
"""

import logging
import re
from pathlib import Path
from typing import Any

import torch

from saelens_lite import Dictionary, Origin
from saelens_lite.errors import ConfigError, CorruptFileError
from saelens_lite.formats import (
    Format,
    Outline,
    Settings,
    cannot_write,
    fill_layer,
    hook_of_module,
    open_tensors,
    read_json,
    tensor_names,
    write_json,
)

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
ENCODER = {"W_enc": ("W_enc", "d_in d_sae"), "b_enc": ("b_enc", "d_sae")}
DECODER = {"W_dec": ("W_dec", "d_sae d_out"), "b_dec": ("b_dec", "d_out")}
SKIP = {"W_skip": ("W_skip", "d_out d_in")}
THRESHOLD = {"rule.plain_threshold": ("threshold", "d_sae")}
GATED = {f"rule.{name}": (name, "d_sae") for name in ("b_gate", "r_mag", "b_mag")}
RULES = {  # architecture → (our rule, its tensors)
    "standard": ("l1", ENCODER | DECODER),
    "topk": ("topk", ENCODER | DECODER),
    "jumprelu": ("jumprelu", ENCODER | DECODER | THRESHOLD),
    "gated": ("gated", {"W_enc": ENCODER["W_enc"]} | DECODER | GATED),
    "matching_pursuit": ("matching_pursuit", DECODER),
    "transcoder": ("l1", ENCODER | DECODER),
    "skip_transcoder": ("l1", ENCODER | DECODER | SKIP),
    "jumprelu_transcoder": ("jumprelu", ENCODER | DECODER | THRESHOLD),
    "jumprelu_skip_transcoder": ("jumprelu", ENCODER | DECODER | THRESHOLD | SKIP),
}
TOKEN_NORMS = {"none": None, "layer_norm": "layer_norm", "constant_norm_rescale": "constant_norm"}
CENTERED = "center_writing_weights"
FACTORS = ("scaling_factor", "finetuning_scaling_factor")  # per latent: codes are multiplied by it before decoding
HEADS = ("hook_head_index", "hook_point_head_index", "hook_head_index_out", "hook_point_head_index_out")
PLACE = (  # settings that say where a dictionary belongs
    *("model_name", "model_class_name", "model_from_pretrained_kwargs", "hook_name", "hook_name_out", "hook_point"),
    *(
        "hook_layer",
        "hook_point_layer",
        "context_size",
        "prepend_bos",
        "dataset_path",
        "seqpos_slice",
        "exclude_special_tokens",
    ),
)
LOADING = {  # loading options of a model that do not change its activations, or that the origin records
    *(CENTERED, "revision", "dtype", "torch_dtype", "device", "n_devices", "device_map", "move_to_device", "trust_remote_code"),
    *("attn_implementation", "token", "cache_dir", "center_unembed", "low_cpu_mem_usage", "local_files_only"),
}
DEFAULT_K = 100  # SAELens's default for a top-k file without k
MAX_EXCLUDED = 1 << 20


class SAELens(Format):
    """cfg.json and sae_weights.safetensors, of version 6 and before; read and written."""

    folders = True
    files = (CONFIG, WEIGHTS)
    architectures = frozenset(RULES)

    def detect(self, path: Path) -> bool:
        return {"W_dec", "b_dec"} <= tensor_names(path / WEIGHTS) and (path / CONFIG).is_file()

    def outline(self, path: Path) -> Outline:
        config = Settings.read(path / CONFIG)
        file = open_tensors(path / WEIGHTS)
        architecture = self._architecture(config)
        rule, names = RULES[architecture]
        transcoder = "transcoder" in architecture
        self._refuse_what_is_not_computed(config, transcoder)
        scaled = config.flag("finetuning_scaling_factor")
        name = next((name for name in FACTORS if name in file.specs), FACTORS[0])
        factor = {"finetuning": (name, "d_sae")} if scaled or name in file.specs else {}
        rescaled = architecture == "topk" and config.flag("rescale_acts_by_decoder_norm")

        def adjust(weights):
            factors = weights.pop("finetuning", None)
            if scaled:
                weights["W_dec"] *= factors[:, None]
            elif factors is not None and not torch.allclose(factors, torch.ones_like(factors)):
                raise ConfigError(
                    f"{file.path} holds {name}, which differs from 1, but finetuning_scaling_factor in {config.path} is "
                    "not true; set it to true to multiply codes by it before decoding, or remove the tensor"
                )
            if not weights.keys() & {"W_enc"} and (weights["W_dec"].norm(dim=1) - 1).abs().max() > 1e-3:
                raise ConfigError(f"{config.path}: rows of W_dec are not unit vectors, which our matching pursuit needs")
            if rescaled:  # the largest are chosen after multiplying by the norms of W_dec; decoding divides by them
                norms = weights["W_dec"].norm(dim=1)
                weights["W_enc"] *= norms
                weights["b_enc"] *= norms
                weights["W_dec"] /= norms[:, None]

        return Outline(
            file,
            rule,
            names | factor,
            options=self._options(architecture, config),
            **self._place(config, transcoder),
            transcoder=transcoder,
            subtracts_b_dec=config.flag("apply_b_dec_to_input", True) and not transcoder,
            token_norm=self._token_norm(config),
            adjust=adjust if factor or rescaled or architecture == "matching_pursuit" else None,
            sizes={name: config.whole(name) for name in ("d_in", "d_sae", *(["d_out"] if transcoder else []))},
            config=config.values,
            architecture=architecture,
            density=path,
        )

    def _architecture(self, config: Settings) -> str:
        architecture = config.text("architecture", "standard")
        function = config.text("activation_fn") or config.text("activation_fn_str") or "relu"
        if function == "topk" and architecture in ("standard", "topk"):
            if architecture == "standard" and "k" not in config and "k" not in config.part("activation_fn_kwargs"):
                raise CorruptFileError(
                    f"{config.path}: activation_fn is 'topk', but k is missing (activation_fn_kwargs.k); add it"
                )
            return "topk"
        if architecture not in RULES or function != "relu":
            raise ConfigError(
                f"{config.path}: no rule computes the codes of architecture {architecture!r} with {function!r}; supported are "
                f"{', '.join(RULES)}"
            )
        return architecture

    def _refuse_what_is_not_computed(self, config: Settings, transcoder: bool) -> None:
        """Raise ConfigError for settings that change the codes or the output and have no equivalent."""
        for settings in (config, config.part("metadata")):
            for key in HEADS:
                if key in settings:
                    raise ConfigError(
                        f"{config.path}: {key} = {settings.values[key]!r}, so the dictionary belongs to one attention head; "
                        "only dictionaries of all heads are supported. Dictionary.from_tensors reads its tensors, for "
                        "activations of that head that you select yourself"
                    )
        reshaped = config.text("reshape_activations", "none")
        if reshaped not in ("none", "hook_z"):
            raise ConfigError(f"{config.path}: reshape_activations is {reshaped!r}; supported are 'none' and 'hook_z'")
        if transcoder and config.flag("apply_b_dec_to_input"):
            raise ConfigError(f"{config.path}: apply_b_dec_to_input is true; in a transcoder b_dec belongs only to the output")

    def _k(self, config: Settings) -> int:
        said = [part.whole("k") for part in (config, config.part("activation_fn_kwargs")) if "k" in part]
        if len(set(said)) > 1:
            raise CorruptFileError(f"{config.path}: k is {said[0]}, but activation_fn_kwargs.k is {said[1]}")
        if not said:
            logging.getLogger(__name__).warning("%s does not say k; %d is used, as in SAELens", config.path, DEFAULT_K)
        return said[0] if said else DEFAULT_K

    def _options(self, architecture: str, config: Settings) -> dict:
        if architecture == "topk":
            return {"k": self._k(config)}
        if "jumprelu" in architecture:
            return {"parameter": "plain"}
        if architecture == "matching_pursuit":
            if not config.flag("apply_b_dec_to_input", True):
                raise ConfigError(f"{config.path}: our matching pursuit starts from x − b_dec, this one from x")
            if config.number("residual_threshold", 1e-2) or config.flag("stop_on_duplicate_support", True):
                raise ConfigError(
                    f"{config.path}: this matching pursuit stops early (residual_threshold, stop_on_duplicate_support); ours "
                    "always takes all steps, so codes would differ"
                )
            return {"k": config.whole("max_iterations", config.whole("d_in"))}
        return {}

    def _token_norm(self, config: Settings) -> str | None:
        name = config.values.get("normalize_activations")
        if name is None or isinstance(name, bool):  # the form of versions before 6
            name = "expected_average_only_in" if name else "none"
        if not isinstance(name, str) or name not in TOKEN_NORMS:
            raise ConfigError(
                f"{config.path}: normalize_activations is {name!r}, whose statistics are not in the file: fold them in "
                "with the tool that has them (fold_activation_norm_scaling_factor of SAELens)"
            )
        return TOKEN_NORMS[name]

    def _place(self, config: Settings, transcoder: bool) -> dict[str, Any]:
        """Return the hooks and the origin, as fields of an Outline."""
        metadata, is_old = _metadata(config)
        model = metadata.text("model_name")
        loading = metadata.part("model_from_pretrained_kwargs")
        old_default = is_old and "model_from_pretrained_kwargs" not in metadata and str(model).startswith("gpt2")
        _say_what_is_not_applied(loading)
        n_ctx = metadata.whole("context_size") if "context_size" in metadata else None
        origin = Origin(
            model={"gpt2-small": "gpt2"}.get(model, model),
            revision=loading.text("revision"),
            model_class=metadata.text("model_class_name"),
            processing=(CENTERED,) if loading.values.get(CENTERED) is True or old_default else (),
            n_ctx=n_ctx,
            prepend_bos=metadata.flag("prepend_bos") if "prepend_bos" in metadata else None,
            text=metadata.text("dataset_path"),
            excluded_positions=_excluded_positions(metadata, n_ctx),
            excluded_token_ids=_excluded_token_ids(metadata),
        )
        target = _hook(metadata, "hook_name_out") if transcoder else None
        return {"origin": origin, "hook": _hook(metadata, "hook_name", "hook_point"), "target": target}

    def write(self, dictionary: Dictionary, folder: Path) -> None:
        form = dictionary.rule.inference_form()
        if form is None:
            raise cannot_write(dictionary, self.plugin_name, "SAELens has no architecture with these codes")
        dictionary.save(folder)
        config = read_json(folder / CONFIG)
        if config["architecture"] not in RULES:
            raise cannot_write(dictionary, self.plugin_name, f"SAELens has no architecture {config['architecture']!r}")
        del config["metadata"]["saelens_lite"]
        write_json(folder / CONFIG, config)
        (folder / "plugin.safetensors").unlink(missing_ok=True)


def _metadata(config: Settings) -> tuple[Settings, bool]:
    """Return the settings in `metadata` and at the top level as one, and whether they are in the form from before version 6.

    If both places have a setting, the version decides. Without a version they must agree.
    """
    newer = config.part("metadata")
    version = config.text("sae_lens_version") or newer.text("sae_lens_version")
    is_old = "model_name" not in newer if version is None else not re.match(r"[6-9]|[1-9]\d", version)
    for key in PLACE if version is None else ():
        if key in config and key in newer and config.values[key] != newer.values[key]:
            said = f"{str(config.values[key])[:80]!r}, but metadata.{key} is {str(newer.values[key])[:80]!r}"
            raise CorruptFileError(f"{config.path}: {key} is {said}; remove the wrong one, or add metadata.sae_lens_version")
    first, second = (config, newer) if is_old else (newer, config)
    return Settings(config.path, {**second.values, **{k: v for k, v in first.values.items() if v is not None}}), is_old


def _hook(metadata: Settings, *keys: str) -> str | None:
    """Return transformer-lens's name for the hook under the first of these keys."""
    name = next((name for name in map(metadata.text, keys) if name), None)
    if name is None or name.startswith(("blocks.", "hook_")):
        layer = next((metadata.whole(key) for key in ("hook_layer", "hook_point_layer") if key in metadata), None)
        return fill_layer(metadata.path, name, layer)
    return hook_of_module(name, model=metadata.text("model_name")) or name


def _excluded_positions(metadata: Settings, n_ctx: int | None) -> tuple[int, ...]:
    """Return the positions that `seqpos_slice` leaves out. SAELens trains on activations[:, slice(*seqpos_slice)]."""
    bounds: Any = metadata.values.get("seqpos_slice")
    if bounds is None:
        return ()
    if (
        not isinstance(bounds, list)
        or not 1 <= len(bounds) <= 3
        or not all(bound is None or type(bound) is int for bound in bounds)
    ):
        raise CorruptFileError(
            f"{metadata.path}: seqpos_slice is {str(bounds)[:80]}; expected up to three whole numbers or nulls"
        )
    kept = slice(*bounds)
    start, step = kept.start or 0, 1 if kept.step is None else kept.step
    if step < 1:
        raise CorruptFileError(f"{metadata.path}: seqpos_slice is {bounds}; its step must be at least 1")
    if n_ctx is None and (start < 0 or kept.stop is not None or step > 1):
        raise CorruptFileError(f"{metadata.path}: seqpos_slice is {bounds}, but context_size, on which it depends, is missing")
    row = range(start if n_ctx is None else n_ctx)
    trained_on = row[kept]
    if len(row) - len(trained_on) > MAX_EXCLUDED or (n_ctx is not None and not trained_on):
        raise CorruptFileError(
            f"{metadata.path}: seqpos_slice is {bounds}, which leaves {len(trained_on):,} of {len(row):,} positions"
        )
    if not trained_on:
        return tuple(row)
    first, end = trained_on[0], trained_on[-1] + 1
    between = (position for position in range(first, end) if position not in trained_on) if step > 1 else ()
    return (*row[:first], *between, *row[end:])


def _excluded_token_ids(metadata: Settings) -> tuple[int, ...]:
    """Return the token ids in `exclude_special_tokens`. true and false add none."""
    said: Any = metadata.values.get("exclude_special_tokens")
    if said is None or isinstance(said, bool):
        return ()
    if not isinstance(said, list) or not all(type(token) is int and token >= 0 for token in said):
        raise CorruptFileError(
            f"{metadata.path}: exclude_special_tokens is {str(said)[:80]}; expected true, false or token ids"
        )
    return tuple(sorted(set(said)))


def _say_what_is_not_applied(loading: Settings) -> None:
    """Warn about loading options that may change the model's activations from those of `load_model`."""
    others = {key: value for key, value in loading.values.items() if key not in LOADING and value not in (None, False)}
    if others:
        logging.getLogger(__name__).warning(
            "%s: the model was loaded with %s, which load_model does not apply; its activations may differ",
            loading.path,
            ", ".join(f"{str(key)[:40]} = {str(value)[:40]}" for key, value in sorted(others.items())[:8]),
        )
