"""OpenAI's sparse_autoencoder: one .pt file, a pickle.

    z = (x − mean(x)) / (std(x) + 1e-5)        TopK files; ReLU files use x itself
    h = (z − pre_bias) encoder.weightᵀ + latent_bias        y = (codes decoder.weightᵀ + pre_bias) · std(x) + mean(x)

Each token has its own normalisation, so it cannot be folded into the weights. The dictionary keeps it as its token_norm.
"""

from pathlib import Path

from saelens_lite import Origin
from saelens_lite.errors import ConfigError
from saelens_lite.formats import Format, Outline, Settings, TorchFile, strings_in_pickle

NAMES = {
    "W_enc": ("encoder.weight", "d_sae d_in"),
    "b_enc": ("latent_bias", "d_sae"),
    "W_dec": ("decoder.weight", "d_out d_sae"),
    "b_dec": ("pre_bias", "d_out"),
}
STATISTICS = frozenset({"stats_last_nonzero", "latents_activation_frequency", "latents_mean_square"})


class OpenAI(Format):
    """OpenAI's .pt files, ReLU and TopK; read (only on request, because they are pickles)."""

    pickled = True

    def detect(self, path: Path) -> bool:
        return path.is_file() and {"pre_bias", "latent_bias"} <= strings_in_pickle(path)

    def outline(self, path: Path) -> Outline:
        file = TorchFile(path)
        settings = Settings(path, file.values)
        function = settings.text("activation", "ReLU")
        after = settings.text("activation_state_dict.postact_fn", "ReLU")
        if function not in ("ReLU", "TopK") or after != "ReLU":
            raise ConfigError(
                f"{path}: codes by {function} followed by {after} are not supported: negative codes would be lost"
            )
        topk = function == "TopK"
        return Outline(
            file,
            "topk" if topk else "l1",
            NAMES,
            options={"k": settings.whole("activation_state_dict.k")} if topk else {},
            origin=Origin(excluded_positions=()),
            token_norm="layer_norm" if topk else None,
            unused=STATISTICS,
            config=file.values,
            architecture=function,
        )
