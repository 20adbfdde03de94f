"""crosscoder-model-diff-replication: cc_weights.pt, a pickle, and cfg.json; in training 3.pt and 3_cfg.json.

    f = ReLU(Σ_p s_p x_p W_enc[p] + b_enc)      s_p x̂_p = f W_dec[:, p] + b_dec[p]

The models are called A and B. Each is scaled by s_p = √d_in / mean ‖x_p‖, which training measures and does not store; so the
caller or the list of public releases has to state it. BOS tokens are left out.

Source: ckkissane/crosscoder-model-diff-replication, crosscoder.py and buffer.py.
"""

import logging
from pathlib import Path

from saelens_lite import Origin
from saelens_lite.errors import ConfigError, CorruptFileError
from saelens_lite.formats import Format, Outline, Settings, TorchFile, find_file, strings_in_pickle

CONFIG, WEIGHTS = "cfg.json", "cc_weights.pt"
NAMES = {
    "W_enc": ("W_enc", "n_reads d_in d_sae"),
    "b_enc": ("b_enc", "d_sae"),
    "W_dec": ("W_dec", "d_sae n_writes d_out"),
    "b_dec": ("b_dec", "n_writes d_out"),
}


class CrossCoderModelDiff(Format):
    """ckkissane's crosscoders of two models; read (on request, because they are pickles)."""

    pickled = True
    files = (CONFIG, WEIGHTS)

    def detect(self, path: Path) -> bool:
        file = find_file(path, WEIGHTS)
        if (
            file is None
            or not _config_of(file).is_file()
            or not {"W_enc", "W_dec", "b_enc", "b_dec"} <= strings_in_pickle(file)
        ):
            return False
        try:
            return _is_of_the_tool(Settings.read(_config_of(file)))
        except CorruptFileError:
            return False

    def outline(self, path: Path) -> Outline:
        file = TorchFile(find_file(path, WEIGHTS) or path / WEIGHTS)
        config = Settings.read(_config_of(file.path))
        if other := [key for key, value in config.values.items() if value and ("topk" in key.lower() or key == "activation")]:
            raise ConfigError(
                f"{config.path}: {other[0]} = {str(config.values[other[0]])[:80]!r}; only ReLU codes are supported"
            )
        if file.ndim("W_enc") != 3 or file.specs["W_enc"].shape[0] != 2:
            raise ConfigError(
                f"{file.path}: W_enc is not of two models; crosscoders of other tools with these names are not read"
            )
        models = {letter: config.text(f"model_name_{letter}") for letter in "AB"}
        if not any(models.values()) and "model_name" in config:
            logging.getLogger(__name__).warning(
                "%s names model %r, and not the other one; models={'base': …, 'chat': …} names both",
                *(config.path, config.text("model_name")),
            )
        return Outline(
            file,
            "l1",
            NAMES,
            hook=config.text("hook_point"),
            models=models,
            origin=Origin(n_ctx=config.whole("seq_len") if "seq_len" in config else None, prepend_bos=True),
            subtracts_b_dec=False,
            lacks_scale=(
                f"{file.path}: the factors of the activations are not in the files. State them, √d_in over the mean norm of a "
                "model's activations, as training printed them: load(…, format='crosscoder_model_diff', scale=(0.28, 0.24))"
            ),
            sizes=config.sizes(d_in="d_in", d_sae="dict_size"),
            config=config.values,
            architecture="CrossCoder",
        )


def _config_of(file: Path) -> Path:
    """Return the settings of a file of weights: cfg.json beside cc_weights.pt, 3_cfg.json beside 3.pt."""
    own = file.parent / f"{file.stem}_{CONFIG}"
    return own if own.is_file() else file.parent / CONFIG


def _is_of_the_tool(config: Settings) -> bool:
    return {"d_in", "dict_size", "hook_point"} <= config.values.keys()
