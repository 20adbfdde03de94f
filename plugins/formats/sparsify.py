"""EleutherAI's sparsify: cfg.json and sae.safetensors in a folder with the name of its module.

h = ReLU((x − b_dec) encoder.weightᵀ + encoder.bias)        transcoders:  h = ReLU(x encoder.weightᵀ + encoder.bias)
codes = the k largest of h, or the largest of each of k groups        y = codes W_dec + b_dec + x W_skipᵀ

A run with several seeds has one folder per seed inside the module's folder: layers.5/seed0. Skip transcoders from before the
setting `transcode` also subtract b_dec from their input. The run's config.json, above the folders, lists the token ids that
training left out.
"""

import logging
import re
from pathlib import Path

from saelens_lite import Dictionary, Origin
from saelens_lite.errors import ConfigError, CorruptFileError
from saelens_lite.formats import (
    Format,
    Outline,
    Settings,
    cannot_write,
    hook_of_module,
    open_tensors,
    read_json,
    tensor_names,
    write_json,
    write_tensors,
)

CONFIG, WEIGHTS, RUN = "cfg.json", "sae.safetensors", "config.json"
DEFAULT_K, DEFAULT_FACTOR = 32, 32
NOT_COMPUTED = ("signed", "embed_skip", "gram_lookup")  # negative codes; terms that depend on the tokens
RULES = {"topk": "topk", "groupmax": "group_max"}
NAMES = {
    "W_enc": ("encoder.weight", "d_sae d_in"),
    "b_enc": ("encoder.bias", "d_sae"),
    "W_dec": ("W_dec", "d_sae d_out"),
    "b_dec": ("b_dec", "d_out"),
}


class Sparsify(Format):
    """sparsify's cfg.json and sae.safetensors, autoencoders and transcoders; read and written."""

    folders = True
    files = (CONFIG, WEIGHTS)

    def detect(self, path: Path) -> bool:
        return {"encoder.weight", "W_dec", "b_dec"} <= tensor_names(path / WEIGHTS) and (path / CONFIG).is_file()

    def outline(self, path: Path) -> Outline:
        config, file = Settings.read(path / CONFIG), open_tensors(path / WEIGHTS)
        activation, transcoder = config.text("activation", "topk"), config.flag("transcode")
        has_skip = "W_skip" in file.specs or config.flag("skip_connection")
        skip = {"W_skip": ("W_skip", "d_out d_in")} if has_skip else {}
        if activation not in RULES:
            raise ConfigError(f"{config.path}: no rule computes activation {activation!r}; supported are {', '.join(RULES)}")
        for key in NOT_COMPUTED:
            if config.flag(key):
                kept = (
                    "it keeps negative codes" if key == "signed" else "its output depends on tokens, not on activations alone"
                )
                raise ConfigError(f"{config.path}: {key} is true ({kept}), which is not supported")
        if skip and "transcode" in config and not transcoder:
            raise ConfigError(f"{config.path}: an autoencoder with a skip connection is not supported")
        older = bool(skip) and not transcoder

        def adjust(weights):
            weights["b_enc"] -= weights["b_dec"] @ weights["W_enc"]

        d_in, name = config.whole("d_in"), _module(path)
        hook = hook_of_module(name, "input" if transcoder or older else "output")
        return Outline(
            file,
            RULES[activation],
            NAMES | skip,
            options={"k": _k(config)},
            hook=hook,
            target=hook_of_module(name) if transcoder or older else None,
            origin=Origin(excluded_positions=(), excluded_token_ids=_excluded_token_ids(path)),
            transcoder=transcoder or older,
            adjust=adjust if older else None,
            sizes={
                "d_in": d_in,
                "d_out": d_in,
                "d_sae": config.whole("num_latents", 0) or d_in * config.whole("expansion_factor", DEFAULT_FACTOR),
            },
            config=config.values,
            architecture=f"{activation}{' transcoder' if transcoder or older else ''}",
        )

    def write(self, dictionary: Dictionary, folder: Path) -> None:
        activation = {rule: name for name, rule in RULES.items()}.get(dictionary.rule.plugin_name)
        if activation is None:
            raise cannot_write(dictionary, self.plugin_name, f"it supports only {', '.join(RULES.values())}")
        if dictionary.d_in != dictionary.d_out or len(dictionary.reads) + len(dictionary.writes) > 2:
            raise cannot_write(
                dictionary, self.plugin_name, "it supports only one read hook and one write hook of the same width"
            )
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
            "transcode": not dictionary.writes_what_it_reads,
            "d_in": dictionary.d_in,
        }
        tensors = {"encoder.weight": dictionary.W_enc.T, "encoder.bias": dictionary.b_enc, "W_dec": dictionary.W_dec}
        tensors |= {"b_dec": dictionary.b_dec} | ({} if dictionary.W_skip is None else {"W_skip": dictionary.W_skip})
        write_tensors(folder / WEIGHTS, tensors)
        write_json(folder / CONFIG, config)


def _module(path: Path) -> str:
    """Return the module that a folder is named after. A seed's folder is named after the folder above it."""
    folder = path.resolve()
    while re.fullmatch(r"seed_?\d+", folder.name):
        folder = folder.parent
    return folder.name


def _k(config: Settings) -> int:
    if "k" not in config:
        logging.getLogger(__name__).warning("%s does not say k; %d is used, as in sparsify", config.path, DEFAULT_K)
    return config.whole("k", DEFAULT_K)


def _excluded_token_ids(path: Path) -> tuple[int, ...]:
    """Return `exclude_tokens` from the run's config.json, one or two folders above, or () if there is no such file."""
    for folder in path.resolve().parents[:3]:
        if not (folder / RUN).is_file():
            continue
        try:
            run = read_json(folder / RUN)
        except CorruptFileError as error:
            logging.getLogger(__name__).warning("%s; if it belongs to the run, token ids that it excluded are unknown", error)
            return ()
        if "exclude_tokens" not in run or not isinstance(run.get("sae"), dict):
            return ()  # another tool's settings
        said = run["exclude_tokens"] or []
        if not isinstance(said, list) or not all(type(token) is int and token >= 0 for token in said):
            raise CorruptFileError(f"{folder / RUN}: exclude_tokens is {str(said)[:80]}; expected token ids")
        return tuple(sorted(set(said)))
    return ()
