"""Llamascopium (Llama Scope), in three layouts.

    h = c_in x W_E + b_E      codes = act(h · ‖W_D‖) / ‖W_D‖      y = (codes W_D + b_D) / c_out

- today: config.json and sae_weights.safetensors with W_E [d_in d_sae], …
- R1-Distill: the same files, with encoder.weight [d_sae d_in], …
- Llama Scope: hyperparams.json and checkpoints/final.safetensors with encoder.weight [d_sae d_in], …; one threshold θ

c is √d_model / the hook's average norm if norm_activation is "dataset-wise", else 1. SAELens lists it as norm_scaling_factor.
The norms of W_D's rows are left out if sparsity_include_decoder_norm is false. If they affect which latents are the k largest,
they are folded in: codes are multiplied by ‖W_D‖ and rows of W_dec are unit vectors.

Llama Scope's θ was measured after the tool had folded c and ‖W_D‖ into the weights, so a latent fires if h · ‖W_D‖ > θ · c_out.
SAELens compares h > θ · c_in, which is the same only if all rows of W_D have norm 1 and both hooks have the same c.
"""

from pathlib import Path

from saelens_lite import Origin
from saelens_lite.errors import ConfigError, CorruptFileError
from saelens_lite.formats import Format, Outline, Settings, TensorFile, open_tensors, tensor_names

CONFIG, WEIGHTS = "config.json", "sae_weights.safetensors"
FIRST_CONFIG, FIRST_WEIGHTS = "hyperparams.json", "checkpoints/final.safetensors"
RULES = {"relu": "l1", "topk": "topk", "jumprelu": "jumprelu"}
NORM = "dataset_average_activation_norm"
PLAIN = {
    "W_enc": ("W_E", "d_in d_sae"),
    "b_enc": ("b_E", "d_sae"),
    "W_dec": ("W_D", "d_sae d_out"),
    "b_dec": ("b_D", "d_out"),
    "rule.plain_threshold": ("activation_function.log_jumprelu_threshold", "d_sae"),
}
LINEAR = {
    "W_enc": ("encoder.weight", "d_sae d_in"),
    "b_enc": ("encoder.bias", "d_sae"),
    "W_dec": ("decoder.weight", "d_out d_sae"),
    "b_dec": ("decoder.bias", "d_out"),
    "rule.plain_threshold": ("log_jumprelu_threshold", "d_sae"),
}
MARKS = ({"W_E", "b_E"}, {"encoder.weight", "decoder.weight"}, {"W_Q", "W_K", "W_V", "W_O"})  # the last are attention's
TINY = 1e-30  # in place of the norm of a row of zeros, whose latent never fires


class Llamascopium(Format):
    """Llama Scope's folders of all three layouts, autoencoders and transcoders; read."""

    folders = True
    files = (CONFIG, WEIGHTS)

    def detect(self, path: Path) -> bool:
        if (hyperparams := _hyperparams(path)).is_file():
            try:
                return {"hook_point_in", "act_fn"} <= Settings.read(hyperparams).values.keys()
            except CorruptFileError:
                return False
        names = tensor_names(path / WEIGHTS) if (path / CONFIG).is_file() else set()
        return any(marks <= names for marks in MARKS)

    def outline(self, path: Path) -> Outline:
        if (hyperparams := _hyperparams(path)).is_file():
            config, file = Settings.read(hyperparams), open_tensors(hyperparams.parent / FIRST_WEIGHTS)
        else:
            config, file = Settings.read(path / CONFIG), open_tensors(path / WEIGHTS)
        function, hook = config.text("act_fn", "relu").lower(), config.text("hook_point_in")
        target, one_threshold = config.text("hook_point_out", hook), config.path.name == FIRST_CONFIG
        theta = config.number("jump_relu_threshold", None if function == "jumprelu" else 0.0) if one_threshold else 0.0
        if function == "topk" and theta > 0:  # it was trained with top-k
            function = "jumprelu"
        kind = config.text("sae_type", "sae")
        self._check(config, file, function, kind)
        subtracted = config.flag("apply_decoder_bias_to_pre_encoder") and config.flag("use_decoder_bias", True)
        if subtracted and target != hook:
            raise ConfigError(f"{config.path}: apply_decoder_bias_to_pre_encoder is not supported for a transcoder")
        by_norm = config.flag("sparsity_include_decoder_norm", True)
        scale, target_scale, lacks = _scales(config, file, hook, target)
        names = dict(PLAIN if "W_E" in file.specs or "encoder.weight" not in file.specs else LINEAR)
        if not config.flag("use_decoder_bias", True):
            names.pop("b_dec")
        if function != "jumprelu" or one_threshold:
            names.pop("rule.plain_threshold")

        def adjust(weights):
            norms = weights["W_dec"].norm(dim=1).clamp(min=TINY)
            if function == "jumprelu":
                if one_threshold:
                    unit = (target_scale or 1.0) if by_norm else scale
                    weights["rule.plain_threshold"] = weights["b_enc"].new_full(weights["b_enc"].shape, theta * unit)
                else:
                    weights["rule.plain_threshold"] = weights["rule.plain_threshold"].exp()
                if by_norm:
                    weights["rule.plain_threshold"] /= norms  # h ‖W_D‖ > θ
            if by_norm and function == "topk":
                weights["W_enc"] *= norms
                weights["b_enc"] *= norms
                weights["W_dec"] /= norms[:, None]
            weights.setdefault("b_dec", weights["W_dec"].new_zeros(weights["W_dec"].shape[1]))

        return Outline(
            file,
            RULES[function],
            names,
            options={"topk": {"k": config.whole("top_k", 50)}, "jumprelu": {"parameter": "plain"}}.get(function, {}),
            hook=hook,
            target=target if target != hook else None,
            origin=Origin(excluded_positions=()),
            transcoder=target != hook,
            subtracts_b_dec=subtracted,
            scale=scale,
            target_scale=target_scale,
            lacks_scale=lacks,
            adjust=adjust,
            rectifies=False,
            unused=frozenset(name for name in file.specs if name.startswith(f"{NORM}.")),
            sizes=_sizes(config),
            config=config.values,
            architecture=f"{kind} {function}",
        )

    def _check(self, config: Settings, file: TensorFile, function: str, kind: str) -> None:
        """Raise ConfigError if the dictionary is of a kind that is not supported."""
        if kind not in ("sae", "transcoder"):
            raise ConfigError(
                f"{config.path}: sae_type {kind!r} is not supported; supported are sae and transcoder, which read one hook and "
                "write one hook"
            )
        if function not in RULES:
            raise ConfigError(f"{config.path}: codes by {function!r} depend on the rest of their batch, which is not supported")
        if config.flag("use_glu_encoder") or file.ndim("W_E") == 3:
            raise ConfigError(f"{config.path}: a gated encoder, or an encoder of several layers, is not supported")


def _hyperparams(path: Path) -> Path:
    """Return the settings file of the first layout in a folder, or at the path itself. It may not exist."""
    return path if path.name == FIRST_CONFIG and path.is_file() else path / FIRST_CONFIG


def _sizes(config: Settings) -> dict[str, int]:
    """Return d_in and d_sae as the settings state them."""
    d_in = config.whole("d_model")
    if "d_sae" in config:
        return {"d_in": d_in, "d_sae": config.whole("d_sae")}
    return {"d_in": d_in} | ({"d_sae": round(d_in * config.number("expansion_factor"))} if "expansion_factor" in config else {})


def _scales(config: Settings, file: TensorFile, hook: str | None, target: str | None) -> tuple[float, float | None, str]:
    """Return c_in and c_out, and a message if the files of an autoencoder lack its c.

    The average norms are in the settings or, as numbers, beside the weights. Some files of R1-Distill have none.
    """
    kind = config.text("norm_activation", "dataset-wise")
    if kind == "inference":
        return 1.0, None, ""
    if kind != "dataset-wise":
        raise ConfigError(
            f"{config.path}: norm_activation {kind!r} is computed from each batch or token, which is not supported"
        )
    if NORM in config:
        norms = [config.part(NORM).number(side) for side in ("in", "out")]
    else:
        names = [f"{NORM}.{point}" for point in (hook, target)]
        if missing := [name for name in names if file.ndim(name) != 0]:
            message = f"{file.path}: norm_activation is 'dataset-wise', but it has no number {missing[0]!r}"
            if hook == target and config.path.name == CONFIG and not any(name.startswith(f"{NORM}.") for name in file.specs):
                return 1.0, None, f"{message}: add it, the average norm of activations of the hook"
            raise CorruptFileError(message)
        norms = [float(value) for value in map(file.read(names).get, names)]
    if min(norms) <= 0:
        raise CorruptFileError(f"{config.path.parent}: average norms of activations are {norms}; expected positive numbers")
    c_in, c_out = (config.whole("d_model") ** 0.5 / norm for norm in norms)
    return c_in, c_out, ""
