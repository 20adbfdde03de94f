"""SAELens: cfg.json and sae_weights.safetensors, as version 6 and those before it write them.

    h = (x − b_dec) W_enc + b_enc      or, without apply_b_dec_to_input,      h = x W_enc + b_enc

Our own folders are SAELens folders already; what is written here is the same without what only we read. Before version 6,
settings stand at the top level of cfg.json, and where no loading options are mentioned, GPT-2 was loaded by HookedTransformer's
defaults, which take the mean out of what is written to the residual stream.
"""

from pathlib import Path

from saelens_lite import Dictionary, Origin
from saelens_lite.errors import ConfigError
from saelens_lite.formats import (
    Format,
    Outline,
    Settings,
    cannot_write,
    open_tensors,
    read_density,
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


class SAELens(Format):
    """cfg.json and sae_weights.safetensors, of version 6 and before; read and written."""

    def detect(self, path: Path) -> bool:
        return {"W_dec", "b_dec"} <= tensor_names(path / WEIGHTS) and (path / CONFIG).is_file()

    def outline(self, path: Path) -> Outline:
        config = Settings.read(path / CONFIG)
        file = open_tensors(path / WEIGHTS)
        architecture = self._architecture(config)
        rule, names = RULES[architecture]
        transcoder = "transcoder" in architecture
        scaled = {"finetuning": ("scaling_factor", "d_sae")} if "scaling_factor" in file.specs else {}
        rescaled = architecture == "topk" and config.flag("rescale_acts_by_decoder_norm")

        def adjust(weights):
            if scaled:  # codes are multiplied by it when they are decoded
                weights["W_dec"] *= weights.pop("finetuning")[:, None]
            if not weights.keys() & {"W_enc"} and (weights["W_dec"].norm(dim=1) - 1).abs().max() > 1e-3:
                raise ConfigError(f"{config.path}: rows of W_dec are no unit vectors, on which matching pursuit here depends")
            if rescaled:  # the largest are chosen after multiplying by the norms of W_dec, and divided by them when decoded
                norms = weights["W_dec"].norm(dim=1)
                weights["W_enc"] *= norms
                weights["b_enc"] *= norms
                weights["W_dec"] /= norms[:, None]

        return Outline(
            file,
            rule,
            names | scaled,
            options=self._options(architecture, config),
            origin=self._origin(config, transcoder),
            transcoder=transcoder,
            subtracts_b_dec=config.flag("apply_b_dec_to_input", True) and not transcoder,
            token_norm=self._token_norm(config),
            adjust=adjust if scaled or rescaled or architecture == "matching_pursuit" else None,
            sizes={name: config.whole(name) for name in ("d_in", "d_sae", *(["d_out"] if transcoder else []))},
            config=config.values,
            architecture=architecture,
        )

    def read(self, path: Path) -> Dictionary:
        dictionary = super().read(path)
        dictionary.density = read_density(path, dictionary.d_sae)
        return dictionary

    def _architecture(self, config: Settings) -> str:
        architecture = config.text("architecture", "standard")
        function = config.text("activation_fn") or config.text("activation_fn_str") or "relu"
        if architecture == "standard" and function == "topk":
            return "topk"
        if architecture not in RULES or (architecture == "standard" and function != "relu"):
            raise ConfigError(
                f"{config.path}: no rule here computes the codes of architecture {architecture!r} with {function!r}; those of "
                f"{', '.join(RULES)} are read"
            )
        return architecture

    def _options(self, architecture: str, config: Settings) -> dict:
        if architecture == "topk":
            return {"k": config.whole("k", config.part("activation_fn_kwargs").whole("k", 100))}
        if "jumprelu" in architecture:
            return {"parameter": "plain"}
        if architecture == "matching_pursuit":
            if not config.flag("apply_b_dec_to_input", True):
                raise ConfigError(f"{config.path}: matching pursuit here starts from x − b_dec, this one from x")
            if config.number("residual_threshold", 1e-2) or config.flag("stop_on_duplicate_support", True):
                raise ConfigError(
                    f"{config.path}: this matching pursuit stops early (residual_threshold, stop_on_duplicate_support); ours "
                    "takes all its steps, so codes would differ"
                )
            return {"k": config.whole("max_iterations", config.whole("d_in"))}
        return {}

    def _token_norm(self, config: Settings) -> str | None:
        name = config.values.get("normalize_activations")
        if name is None or isinstance(name, bool):  # as versions before 6 have it
            name = "expected_average_only_in" if name else "none"
        if not isinstance(name, str) or name not in TOKEN_NORMS:
            raise ConfigError(
                f"{config.path}: normalize_activations is {name!r}, whose statistics are not in the file: fold them in "
                "with the tool that has them (fold_activation_norm_scaling_factor of SAELens)"
            )
        return TOKEN_NORMS[name]

    def _origin(self, config: Settings, transcoder: bool) -> Origin:
        metadata = config.part("metadata") if "metadata" in config else config
        if "sae_lens_version" not in metadata:
            metadata = config
        model, hook = metadata.text("model_name"), metadata.text("hook_name") or metadata.text("hook_point")
        processing = metadata.part("model_from_pretrained_kwargs").values
        old_default = metadata is config and "model_from_pretrained_kwargs" not in config and str(model).startswith("gpt2")
        return Origin(
            model={"gpt2-small": "gpt2"}.get(model, model),
            model_class=metadata.text("model_class_name"),
            processing=(CENTERED,) if processing.get(CENTERED) is True or old_default else (),
            hook=hook,
            target_hook=metadata.text("hook_name_out") if transcoder else None,
            n_ctx=metadata.whole("context_size") if "context_size" in metadata else None,
            prepend_bos=metadata.flag("prepend_bos") if "prepend_bos" in metadata else None,
            text=metadata.text("dataset_path"),
            excluded_positions=(),
        )

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
