"""Llamascopium (Llama Scope): config.json and sae_weights.safetensors.

    h = c_in x W_E + b_E      codes = act(h · ‖W_D‖) / ‖W_D‖      y = (codes W_D + b_D) / c_out

c is √d_model / dataset_average_activation_norm of the hook if norm_activation is "dataset-wise", else 1. The norms of W_D's
rows are left out if sparsity_include_decoder_norm is false. If they affect which latents are the k largest, they are folded in:
codes are multiplied by ‖W_D‖ and rows of W_dec are unit vectors.
"""

from pathlib import Path

from saelens_lite import Origin
from saelens_lite.errors import ConfigError, CorruptFileError
from saelens_lite.formats import Format, Outline, Settings, open_tensors, tensor_names

CONFIG, WEIGHTS = "config.json", "sae_weights.safetensors"
RULES = {"relu": "l1", "topk": "topk", "jumprelu": "jumprelu"}
NORM = "dataset_average_activation_norm."
THRESHOLD = "activation_function.log_jumprelu_threshold"


class Llamascopium(Format):
    """Llama Scope's config.json and sae_weights.safetensors, autoencoders and transcoders; read."""

    folders = True
    files = (CONFIG, WEIGHTS)

    def detect(self, path: Path) -> bool:
        return {"W_E", "b_E", "W_D"} <= tensor_names(path / WEIGHTS) and (path / CONFIG).is_file()

    def outline(self, path: Path) -> Outline:
        config, file = Settings.read(path / CONFIG), open_tensors(path / WEIGHTS)
        function, hook = config.text("act_fn", "relu").lower(), config.text("hook_point_in")
        target = config.text("hook_point_out", hook)
        if function not in RULES:
            raise ConfigError(f"{config.path}: codes by {function!r} depend on the rest of their batch, which is not supported")
        kind = config.text("sae_type", "sae")
        if kind not in ("sae", "transcoder"):
            raise ConfigError(f"{config.path}: sae_type {kind!r} is not supported; supported are sae and transcoder")
        subtracted = config.flag("apply_decoder_bias_to_pre_encoder")
        if subtracted and target != hook:
            raise ConfigError(f"{config.path}: apply_decoder_bias_to_pre_encoder is not supported for a transcoder")
        if config.flag("use_glu_encoder") or file.ndim("W_E") == 3:
            raise ConfigError(f"{config.path}: a gated encoder, or an encoder of several layers, is not supported")
        by_norm = config.flag("sparsity_include_decoder_norm", True)

        def adjust(weights):
            if function == "jumprelu":
                weights["rule.plain_threshold"] = weights["rule.plain_threshold"].exp()
            norms = weights["W_dec"].norm(dim=1)
            if by_norm and function == "jumprelu":
                weights["rule.plain_threshold"] /= norms  # h ‖W_D‖ > θ
            if by_norm and function == "topk":
                weights["W_enc"] *= norms
                weights["b_enc"] *= norms
                weights["W_dec"] /= norms[:, None]
            weights.setdefault("b_dec", weights["W_dec"].new_zeros(weights["W_dec"].shape[1]))

        biased = config.flag("use_decoder_bias", True)
        scale, target_scale = self._scales(config, file, hook, target)
        return Outline(
            file,
            RULES[function],
            {
                "W_enc": ("W_E", "d_in d_sae"),
                "b_enc": ("b_E", "d_sae"),
                "W_dec": ("W_D", "d_sae d_out"),
                **({"b_dec": ("b_D", "d_out")} if biased else {}),
                **({"rule.plain_threshold": (THRESHOLD, "d_sae")} if function == "jumprelu" else {}),
            },
            options={"topk": {"k": config.whole("top_k", 50)}, "jumprelu": {"parameter": "plain"}}.get(function, {}),
            hook=hook,
            target=target if target != hook else None,
            origin=Origin(excluded_positions=()),
            transcoder=target != hook,
            subtracts_b_dec=subtracted,
            scale=scale,
            target_scale=target_scale,
            adjust=adjust,
            unused=frozenset(name for name in file.specs if name.startswith(NORM)),
            sizes={"d_in": config.whole("d_model")} | ({"d_sae": config.whole("d_sae")} if "d_sae" in config else {}),
            config=config.values,
            architecture=f"{kind} {function}",
        )

    def _scales(self, config: Settings, file, hook: str | None, target: str | None) -> tuple[float, float | None]:
        """Return (c_in, c_out)."""
        kind = config.text("norm_activation", "dataset-wise")
        if kind == "inference":
            return 1.0, None
        if kind != "dataset-wise":
            raise ConfigError(
                f"{config.path}: norm_activation {kind!r} is computed from each batch or token, which is not supported"
            )
        names = [f"{NORM}{point}" for point in (hook, target)]
        if missing := [name for name in names if file.ndim(name) != 0]:
            raise CorruptFileError(f"{file.path}: norm_activation is 'dataset-wise', but it has no number {missing[0]!r}")
        norms = [float(value) for value in map(file.read(names).get, names)]
        if min(norms) <= 0:
            raise CorruptFileError(f"{file.path}: average norms of activations are {norms}; expected positive numbers")
        c_in, c_out = (config.whole("d_model") ** 0.5 / norm for norm in norms)
        return c_in, c_out
