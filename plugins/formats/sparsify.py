"""EleutherAI's sparsify: cfg.json and sae.safetensors in a folder that is called like the module it belongs to.

h = ReLU((x − b_dec) encoder.weightᵀ + encoder.bias)        of a transcoder  h = ReLU(x encoder.weightᵀ + encoder.bias)
codes = the k largest of h, or the largest of each of k groups        y = codes W_dec + b_dec + x W_skipᵀ
"""

from pathlib import Path

from saelens_lite import Dictionary, Origin
from saelens_lite.errors import ConfigError
from saelens_lite.formats import (
    Format,
    Outline,
    Settings,
    cannot_write,
    hook_of_module,
    open_tensors,
    tensor_names,
    write_json,
    write_tensors,
)

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
RULES = {"topk": "topk", "groupmax": "group_max"}
NAMES = {
    "W_enc": ("encoder.weight", "d_sae d_in"),
    "b_enc": ("encoder.bias", "d_sae"),
    "W_dec": ("W_dec", "d_sae d_out"),
    "b_dec": ("b_dec", "d_out"),
}


class Sparsify(Format):
    """sparsify's cfg.json and sae.safetensors, autoencoders and transcoders; read and written."""

    def detect(self, path: Path) -> bool:
        return {"encoder.weight", "W_dec", "b_dec"} <= tensor_names(path / WEIGHTS) and (path / CONFIG).is_file()

    def outline(self, path: Path) -> Outline:
        config, file = Settings.read(path / CONFIG), open_tensors(path / WEIGHTS)
        activation, transcoder = config.text("activation", "topk"), config.flag("transcode")
        skip = {"W_skip": ("W_skip", "d_out d_in")} if "W_skip" in file.specs else {}
        if activation not in RULES or config.flag("signed"):
            raise ConfigError(f"{config.path}: activation {activation!r}, or one that keeps negative codes, has no rule here")
        if skip and not transcoder:
            raise ConfigError(f"{config.path}: an autoencoder with a skip connection has no place here; it would be left out")
        d_in = config.whole("d_in")
        name = path.resolve().name
        hook = hook_of_module(name, "input" if transcoder else "output")
        return Outline(
            file,
            RULES[activation],
            NAMES | skip,
            options={"k": config.whole("k")},
            origin=Origin(hook=hook, target_hook=hook_of_module(name) if transcoder else None, excluded_positions=()),
            transcoder=transcoder,
            sizes={
                "d_in": d_in,
                "d_out": d_in,
                "d_sae": config.whole("num_latents", 0) or d_in * config.whole("expansion_factor"),
            },
            config=config.values,
            architecture=f"{activation}{' transcoder' if transcoder else ''}",
        )

    def write(self, dictionary: Dictionary, folder: Path) -> None:
        activation = {rule: name for name, rule in RULES.items()}.get(dictionary.rule.plugin_name)
        if activation is None:
            raise cannot_write(dictionary, self.plugin_name, f"its codes are those of {', '.join(RULES.values())} only")
        if dictionary.d_in != dictionary.d_out:
            raise cannot_write(dictionary, self.plugin_name, "its transcoders have outputs as wide as their inputs")
        if dictionary.token_norm:
            raise cannot_write(dictionary, self.plugin_name, f"the {dictionary.token_norm} of each activation would be lost")
        k = min(dictionary.rule.config.k, dictionary.d_sae)
        config = {
            "activation": activation,
            "expansion_factor": max(1, round(dictionary.d_sae / dictionary.d_in)),
            "normalize_decoder": True,
            "num_latents": dictionary.d_sae,
            "k": k,
            "multi_topk": False,
            "skip_connection": dictionary.W_skip is not None,
            "transcode": dictionary.is_transcoder,
            "d_in": dictionary.d_in,
        }
        tensors = {"encoder.weight": dictionary.W_enc.T, "encoder.bias": dictionary.b_enc, "W_dec": dictionary.W_dec}
        tensors |= {"b_dec": dictionary.b_dec} | ({} if dictionary.W_skip is None else {"W_skip": dictionary.W_skip})
        write_tensors(folder / WEIGHTS, tensors)
        write_json(folder / CONFIG, config)
