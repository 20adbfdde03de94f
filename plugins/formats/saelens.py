"""SAELens: cfg.json and sae_weights.safetensors, in the layout of version 6 and of earlier versions.

    h = (x − b_dec) W_enc + b_enc      without apply_b_dec_to_input: h = x W_enc + b_enc

Our own folders are already SAELens folders; this format writes the same without the parts that only we read. Since version 6,
the model, the hook and the rows are in `metadata` of cfg.json; before, they are at the top level. A file that does not say its
version, such as one written by hand, may have them in either place. If a file from before version 6 names no loading options,
GPT-2 was loaded with HookedTransformer's defaults, which subtract the mean from everything that is written to the residual
stream.

Settings that change the codes, the output or the counted tokens are translated or refused. `seqpos_slice` becomes excluded
positions. A list in `exclude_special_tokens` becomes excluded token ids (true adds nothing, because special tokens are always
left out). A head's number becomes part of the hook's name: blocks.5.attn.hook_z.head_3.

Checkpoints of a training are read as SAELens exports them at its end. The threshold of batchtopk and matryoshka_batchtopk
becomes that of a jumprelu. rescale_acts_by_decoder_norm is folded in, so that rows of W_dec are unit vectors:

    h' = ‖W_dec‖ h        W_dec' = W_dec / ‖W_dec‖

Activations may be scaled (z = s x, activation_scaler.json) or whitened (z = (x − mean) M, activation_whitening.safetensors) in
training. Both are folded in.
"""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from saelens_lite import Dictionary
from saelens_lite.errors import ConfigError, CorruptFileError
from saelens_lite.formats import (
    PLAIN,
    Format,
    Known,
    Outline,
    Settings,
    TensorFile,
    cannot_write,
    open_tensors,
    read_json,
    tensor_names,
    write_json,
)
from saelens_lite_plugins.formats.saelens_metadata import metadata_of, place_of

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
SCALER, WHITENING = "activation_scaler.json", "activation_whitening.safetensors"  # of a training, beside the weights
DECODER = {name: PLAIN[name] for name in ("W_dec", "b_dec")}
SKIP = {"W_skip": ("W_skip", "d_out d_in")}
THRESHOLD = {"rule.plain_threshold": ("threshold", "d_sae")}
GATED = {f"rule.{name}": (name, "d_sae") for name in ("b_gate", "r_mag", "b_mag")}
RULES = {  # architecture → (our rule, its tensors)
    "standard": ("l1", PLAIN),
    "topk": ("topk", PLAIN),
    "jumprelu": ("jumprelu", PLAIN | THRESHOLD),
    "gated": ("gated", {"W_enc": PLAIN["W_enc"]} | DECODER | GATED),
    "matching_pursuit": ("matching_pursuit", DECODER),
    "transcoder": ("l1", PLAIN),
    "skip_transcoder": ("l1", PLAIN | SKIP),
    "jumprelu_transcoder": ("jumprelu", PLAIN | THRESHOLD),
    "jumprelu_skip_transcoder": ("jumprelu", PLAIN | THRESHOLD | SKIP),
}
CHECKPOINT = ("jumprelu", PLAIN | {"rule.plain_threshold": ("topk_threshold", "")})
CHECKPOINTS = {"batchtopk": CHECKPOINT, "matryoshka_batchtopk": CHECKPOINT}  # exported as jumprelu after training
REFUSED = {
    "abstopk": "its codes can be negative; codes are never negative here",
    "temporal": "its codes depend on earlier tokens, not on one activation",
}
TOKEN_NORMS = {"none": None, "layer_norm": "layer_norm", "constant_norm_rescale": "constant_norm"}
AVERAGE, SCALAR, WHITENED = "expected_average_only_in", "constant_scalar_rescale", "covariance_whitening"
MIN_NORM = 1e-8  # of a row of W_dec, as in SAELens
FACTORS = ("scaling_factor", "finetuning_scaling_factor")  # per latent: codes are multiplied by it before decoding
DEFAULT_K = 100  # SAELens's default for a top-k file without k


class SAELens(Format):
    """cfg.json and sae_weights.safetensors, of version 6 and before; read and written."""

    folders = True
    keeps_models = True  # hook_name is the key of the port
    files = (CONFIG, WEIGHTS)
    architectures = frozenset(RULES)

    def detect(self, path: Path) -> bool:
        return {"W_dec", "b_dec"} <= tensor_names(path / WEIGHTS) and (path / CONFIG).is_file()

    def outline(self, path: Path) -> Outline:
        config = Settings.read(path / CONFIG)
        file = open_tensors(path / WEIGHTS)
        architecture = self._architecture(config)
        rule, names = (RULES | CHECKPOINTS)[architecture]
        if "log_threshold" in file.specs and "rule.plain_threshold" in names:
            names = {**names, "log_threshold": ("log_threshold", "d_sae")}
            del names["rule.plain_threshold"]
        transcoder = "transcoder" in architecture
        self._refuse_what_is_not_computed(config, transcoder)
        name = next((name for name in FACTORS if name in file.specs), FACTORS[0])
        if config.flag("finetuning_scaling_factor") or name in file.specs:
            names = names | {"finetuning": (name, "d_sae")}
        metadata, is_old = metadata_of(config)
        neuronpedia = metadata.values.get("neuronpedia_id")
        scaling = _scaling(path, config)
        return Outline(
            file,
            rule,
            names,
            options=self._options(architecture, config),
            **place_of(metadata, is_old, transcoder),
            transcoder=transcoder,
            subtracts_b_dec=config.flag("apply_b_dec_to_input", True) and not transcoder,
            **scaling,
            adjust=self._adjust(path, config, architecture, file, names, scaling["scale"]),
            sizes={name: config.whole(name) for name in ("d_in", "d_sae", *(["d_out"] if transcoder else []))},
            config=config.values,
            architecture=architecture,
            density=path,
            known=Known(neuronpedia=neuronpedia if isinstance(neuronpedia, str) else None),
        )

    def _adjust(
        self, path: Path, config: Settings, architecture: str, file: TensorFile, names: Mapping[str, Any], scale: float
    ) -> Callable[[dict[str, torch.Tensor]], None] | None:
        """Return a function that folds the remaining settings into the weights, or None if no setting remains."""
        by_norms = architecture in ("topk", *CHECKPOINTS) and config.flag("rescale_acts_by_decoder_norm")
        whitening = _whitening(path, config) if config.values.get("normalize_activations") == WHITENED else None
        pursuit = architecture == "matching_pursuit"
        if whitening and (pursuit or "transcoder" in architecture):
            raise ConfigError(f"{config.path}: {WHITENED} cannot be folded into {architecture}")

        def adjust(weights):
            if "log_threshold" in weights:
                weights["rule.plain_threshold"] = weights.pop("log_threshold").exp()
            if "finetuning" in weights:
                _apply_factors(weights, config, file, names["finetuning"][0])
            if pursuit and (weights["W_dec"].norm(dim=1) - 1).abs().max() > 1e-3:
                raise ConfigError(f"{config.path}: rows of W_dec are not unit vectors, which our matching pursuit needs")
            if by_norms:
                _fold_norms(weights, scale)
            if whitening:
                _fold_whitening(weights, whitening.read(whitening.specs), config.flag("apply_b_dec_to_input", True))

        needed = by_norms or whitening or pursuit or names.keys() & {"log_threshold", "finetuning"}
        return adjust if needed else None

    def _architecture(self, config: Settings) -> str:
        architecture = config.text("architecture", "standard")
        function = config.text("activation_fn") or config.text("activation_fn_str") or "relu"
        if function == "topk" and architecture in ("standard", "topk"):
            if architecture == "standard" and "k" not in config and "k" not in config.part("activation_fn_kwargs"):
                raise CorruptFileError(
                    f"{config.path}: activation_fn is 'topk', but k is missing (activation_fn_kwargs.k); add it"
                )
            return "topk"
        known = RULES | CHECKPOINTS
        if architecture not in known or function not in ("relu", *(["jumprelu"] if "jumprelu" in architecture else [])):
            why = f" ({REFUSED[architecture]})" if architecture in REFUSED else ""
            raise ConfigError(
                f"{config.path}: no rule computes the codes of architecture {architecture!r} with {function!r}{why}; "
                f"supported are {', '.join(known)}"
            )
        return architecture

    def _refuse_what_is_not_computed(self, config: Settings, transcoder: bool) -> None:
        """Raise ConfigError for settings that change the codes or the output and have no equivalent."""
        if config.part("activation_fn_kwargs").flag("signed"):
            raise ConfigError(f"{config.path}: activation_fn_kwargs.signed is true; codes are never negative here")
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
        if (RULES | CHECKPOINTS)[architecture][0] == "jumprelu":
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


def _scaling(path: Path, config: Settings) -> dict[str, Any]:
    """Return what `normalize_activations` means, as fields of an Outline."""
    kind = config.values.get("normalize_activations")
    if kind is None or isinstance(kind, bool):  # the form of versions before 6
        kind = AVERAGE if kind else "none"
    if not isinstance(kind, str) or kind not in (*TOKEN_NORMS, AVERAGE, SCALAR, WHITENED):
        raise ConfigError(
            f"{config.path}: normalize_activations is {kind!r}; supported are {', '.join(TOKEN_NORMS)}, {AVERAGE}"
        )
    beside = Settings.read(path / SCALER) if (path / SCALER).is_file() else Settings(path / SCALER, {})
    source, key = (config, "activation_normalization_factor") if kind == SCALAR else (beside, "scaling_factor")
    scale = source.number(key) if key in source else None
    if scale is not None and scale <= 0:
        raise CorruptFileError(f"{source.path}: {key} is {scale}; expected a number above 0")
    if scale is not None and kind not in (AVERAGE, SCALAR):
        raise CorruptFileError(f"{source.path}: {key} is {scale}, but normalize_activations in {config.path} is {kind!r}")
    lacks = ""
    if kind in (AVERAGE, SCALAR) and scale is None:
        lacks = (
            f"{config.path}: normalize_activations is {kind!r}, whose statistics are not in the file: add {key} to "
            f"{source.path}, or fold it in with the tool that has it (fold_activation_norm_scaling_factor of SAELens)"
        )
    if kind in (AVERAGE, SCALAR) and "transcoder" in config.text("architecture", "standard"):
        raise ConfigError(f"{config.path}: normalize_activations is {kind!r}; the factor of a transcoder's output is unknown")
    return {"token_norm": TOKEN_NORMS.get(kind), "scale": scale or 1.0, "lacks_scale": lacks}


def _whitening(path: Path, config: Settings) -> TensorFile:
    """Return the file of the mean, the matrix M and its inverse. Raise ConfigError if it is missing."""
    if not (path / WHITENING).is_file():
        raise ConfigError(
            f"{config.path}: normalize_activations is {WHITENED!r}, whose matrices are in {WHITENING}; add it to the folder"
        )
    file, d_in = open_tensors(path / WHITENING), config.whole("d_in")
    shapes = {name: spec.shape for name, spec in file.specs.items()}
    if shapes != {"mean": (d_in,), "matrix": (d_in, d_in), "inverse_matrix": (d_in, d_in)}:
        raise CorruptFileError(f"{file.path} holds {shapes}; expected mean, matrix and inverse_matrix of d_in = {d_in}")
    return file


def _apply_factors(weights: dict[str, torch.Tensor], config: Settings, file: TensorFile, name: str) -> None:
    """Multiply each latent's row of W_dec by its factor, if the settings ask for it."""
    factors = weights.pop("finetuning")
    if config.flag("finetuning_scaling_factor"):
        weights["W_dec"] *= factors[:, None]
    elif not torch.allclose(factors, torch.ones_like(factors)):
        raise ConfigError(
            f"{file.path} holds {name}, which differs from 1, but finetuning_scaling_factor in {config.path} is "
            "not true; set it to true to multiply codes by it before decoding, or remove the tensor"
        )


def _fold_norms(weights: dict[str, torch.Tensor], scale: float) -> None:
    """Multiply codes by the norms that rows of W_dec have once the scale is folded in, and divide W_dec by them."""
    norms = weights["W_dec"].norm(dim=1).clamp(min=MIN_NORM) / scale
    weights["W_enc"] *= norms
    weights["b_enc"] *= norms
    weights["W_dec"] /= norms[:, None]
    if "rule.plain_threshold" in weights:  # it was compared with h ‖W_dec‖ before the scale was folded in
        weights["rule.plain_threshold"] = weights["rule.plain_threshold"] / scale


def _fold_whitening(weights: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor], subtracts_b_dec: bool) -> None:
    """Turn a dictionary of z = (x − mean) M into one of x."""
    mean, matrix, inverse = (tensors[name].double() for name in ("mean", "matrix", "inverse_matrix"))
    weights["W_enc"] = matrix @ weights["W_enc"]
    weights["W_dec"] = weights["W_dec"] @ inverse
    weights["b_dec"] = weights["b_dec"] @ inverse + mean
    shift = mean @ weights["W_enc"]
    if not subtracts_b_dec and "rule.b_gate" in weights:
        weights["rule.b_gate"] = weights["rule.b_gate"] - shift
        weights["rule.b_mag"] = weights["rule.b_mag"] - shift * weights["rule.r_mag"].exp()
    elif not subtracts_b_dec:
        weights["b_enc"] = weights["b_enc"] - shift
