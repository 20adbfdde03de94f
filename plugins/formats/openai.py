"""OpenAI's sparse_autoencoder: one .pt file, a pickle.

    z = (x − mean(x)) / (std(x) + 1e-5)        TopK files; ReLU files use x itself
    h = (z − pre_bias) encoder.weightᵀ + latent_bias        y = (codes decoder.weightᵀ + pre_bias) · std(x) + mean(x)

Each token has its own normalisation, so it cannot be folded into the weights. The dictionary keeps it as its token_norm.
The tensors may be one level deeper. A tied decoder stores the encoder's weights a second time. In the folders of OpenAI's
bucket, the names of the folder and the file tell the hook.
"""

from pathlib import Path

from saelens_lite import Origin
from saelens_lite.errors import ConfigError
from saelens_lite.formats import Format, Outline, Settings, TorchFile, match_in_path, strings_in_pickle

PLACES = {  # their folders → transformer-lens's hooks
    "mlp_post_act": "mlp.hook_post",
    "resid_delta_attn": "hook_attn_out",
    "resid_delta_mlp": "hook_mlp_out",
    "resid_post_attn": "hook_resid_mid",
    "resid_post_mlp": "hook_resid_post",
}
PLACE = rf"^({'|'.join(PLACES)})(?:_v\d+(?:_\d+k)?)?$"
STATISTICS = frozenset({"stats_last_nonzero", "latents_activation_frequency", "latents_mean_square"})


class OpenAI(Format):
    """OpenAI's .pt files, ReLU and TopK; read (only on request, because they are pickles)."""

    pickled = True

    def detect(self, path: Path) -> bool:
        held = {name.rpartition(".")[2] for name in strings_in_pickle(path)} if path.is_file() else set()
        return {"pre_bias", "latent_bias"} <= held

    def outline(self, path: Path) -> Outline:
        file = TorchFile(path)
        at = next((name.removesuffix("pre_bias") for name in file.specs if name.endswith("pre_bias")), "")
        settings = Settings(path, file.values)
        function = settings.text(f"{at}activation", "ReLU")
        after = settings.text(f"{at}activation_state_dict.postact_fn", "ReLU")
        if function not in ("ReLU", "TopK") or after != "ReLU":
            raise ConfigError(
                f"{path}: codes by {function} followed by {after} are not supported: negative codes would be lost"
            )
        topk, tied = function == "TopK", f"{at}decoder.linear.weight" in file.specs
        return Outline(
            file,
            "topk" if topk else "l1",
            {
                "W_enc": (f"{at}encoder.weight", "d_sae d_in"),
                "b_enc": (f"{at}latent_bias", "d_sae"),
                "W_dec": (f"{at}decoder.linear.weight", "d_sae d_out") if tied else (f"{at}decoder.weight", "d_out d_sae"),
                "b_dec": (f"{at}pre_bias", "d_out"),
            },
            options={"k": settings.whole(f"{at}activation_state_dict.k")} if topk else {},
            **_place(path),
            token_norm="layer_norm" if topk else None,
            unused=frozenset(f"{at}{name}" for name in STATISTICS),
            config=file.values,
            architecture=function,
        )


def _place(path: Path) -> dict:
    """Return the hook and origin that the path tells, as in resid_post_mlp_v5_32k/autoencoders/8.pt; the model is GPT-2."""
    match = match_in_path(path, PLACE) if path.parent.name == "autoencoders" and path.stem.isdecimal() else None
    hook = f"blocks.{int(path.stem)}.{PLACES[match[1]]}" if match else None
    return {"hook": hook, "origin": Origin(model="gpt2" if match else None, excluded_positions=())}
