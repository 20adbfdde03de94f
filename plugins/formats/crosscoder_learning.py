"""crosscoder_learning, the fork of dictionary_learning for model diffing: config.json and model.safetensors.

    z_p = (x_p − μ_p) s_p     f = ReLU(Σ_p z_p W_enc[p] + b_enc)     x̂_p = (f W_dec[p] + b_dec[p]) / (s_p + 1e-8) + μ_p

BatchTopKCrossCoder keeps f where f · n > θ, one θ for all latents; n is the code normalisation of each latent, by its decoder:

    CROSSCODER  Σ_p ‖d_p‖     SAE  ‖(d_1, d_2, …)‖     MIXED  α_sae · SAE + α_cc · CROSSCODER     NONE  1

so that latent i has the threshold θ / n_i. DECOUPLED has a code for each port, which no dictionary here has. BatchTopKSAE, also
of differences of two models, is (z − b_dec) W_enc + b_enc with f > θ. Older files hold no μ, s and code normalisation; then
μ = 0, s = 1, and the normalisation is CROSSCODER. If μ or the standard deviation holds NaN, activations are not normalised.

The files name no models. The hook is the output of trainer.layer in trainer_config.json. We write the keys of the ports and the
models there as well, under `ports` and `models`, which the tool ignores.

Source: science-of-finetuning/crosscoder_learning, dictionary.py; Minder et al. 2025, arXiv:2504.02922.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saelens_lite import Dictionary, Origin
from saelens_lite.errors import ConfigError, CorruptFileError
from saelens_lite.formats import (
    Format,
    Outline,
    Settings,
    Spec,
    TensorFile,
    TorchFile,
    apart,
    cannot_write,
    find_file,
    open_tensors,
    split_key,
    tensor_names,
    write_json,
    write_tensors,
)

CONFIG, WEIGHTS, RUN = "config.json", "model.safetensors", "trainer_config.json"
CODES = ("CROSSCODER", "SAE", "MIXED", "NONE", "DECOUPLED")  # numbered from 1 in code_normalization_id
STATISTICS = ("activation_mean", "activation_std", "activation_global_scale", "target_rms")
ENCODER = {"W_enc": ("encoder.weight", "n_reads d_in d_sae"), "b_enc": ("encoder.bias", "d_sae")}
CROSSCODER = ENCODER | {"W_dec": ("decoder.weight", "n_writes d_sae d_out"), "b_dec": ("decoder.bias", "n_writes d_out")}
SAE = {
    "W_enc": ("encoder.weight", "d_sae d_in"),
    "b_enc": ("encoder.bias", "d_sae"),
    "W_dec": ("decoder.weight", "d_out d_sae"),
    "b_dec": ("b_dec", "d_out"),
    "rule.threshold": ("threshold", ""),
}
SMALL = 1e-8  # added to the scale of the output, in that tool
NEVER = 1e30  # a threshold that no code exceeds
TOLERANCE = 1e-6  # relative difference of thresholds that count as one
log = logging.getLogger(__name__)


class CrossCoderLearning(Format):
    """The fork of dictionary_learning for model diffing: crosscoders and difference dictionaries; read and written."""

    keeps_models = True
    files = (CONFIG, WEIGHTS)

    def detect(self, path: Path) -> bool:
        file = find_file(path, WEIGHTS)
        if file is None or not {"encoder.weight", "encoder.bias", "decoder.weight"} <= tensor_names(file):
            return False
        opened = open_tensors(file)
        shapes = opened.ndim("encoder.weight"), opened.ndim("decoder.weight")
        is_sae = shapes == (2, 2) and {"b_dec", "threshold", "k"} <= opened.specs.keys()
        return (shapes == (3, 3) or is_sae) and (file.parent / CONFIG).is_file()

    def outline(self, path: Path) -> Outline:
        weights = find_file(path, WEIGHTS) or path / WEIGHTS
        file = _checkpoint(weights) if weights.suffix in (".pt", ".pth") else open_tensors(weights)
        config = Settings.read(weights.parent / CONFIG)
        run = Settings.read(weights.parent / RUN) if (weights.parent / RUN).is_file() else config
        trainer, own = run.part("trainer"), config.part("trainer") if "trainer" in config else config
        if missing := {"encoder.weight", "encoder.bias", "decoder.weight"} - file.specs.keys():
            raise CorruptFileError(
                f"{file.path}: tensors missing: {sorted(missing)}; not expected: none; found: {sorted(file.specs)}"
            )
        if file.ndim("encoder.weight") == 2 and "b_dec" in file.specs:
            return self._sae(file, config, own, trainer)
        if file.ndim("encoder.weight") != 3:
            raise ConfigError(
                f"{file.path}: only CrossCoder, BatchTopKCrossCoder and BatchTopKSAE are supported; their encoder.weight has 3 "
                f"or 2 axes, and b_dec belongs to the latter (there: {', '.join(sorted(file.specs))[:200]})"
            )
        file = _with_all_layers(file, own)
        is_batch = not file.specs.keys().isdisjoint({"k", "threshold"})
        norm = _code_norm(file, own) if is_batch else "CROSSCODER"
        weights_of = {
            "SAE": own.number("code_normalization_alpha_sae", 1.0),
            "CROSSCODER": own.number("code_normalization_alpha_cc", 0.1),
        }
        mean, scale = _statistics(file)

        def adjust(weights: dict[str, Tensor]) -> None:
            if is_batch:
                n = _norms(weights["W_dec"].unflatten(1, (len(scale), -1)), norm, weights_of)
                theta = weights["rule.plain_threshold"]
                fires = (n > 0) | (theta < 0)  # else f n > θ is false for each f
                weights["rule.plain_threshold"] = torch.where(fires, theta / n.clamp(min=1e-90), NEVER).clamp(max=NEVER)
            _fold(weights, mean, scale)

        return Outline(
            file,
            "jumprelu" if is_batch else "l1",
            CROSSCODER | ({"rule.plain_threshold": ("threshold", "")} if is_batch else {}),
            options={"parameter": "plain"} if is_batch else {},
            **_place(trainer, file, n=len(scale)),
            subtracts_b_dec=False,
            adjust=adjust,
            unused=_unused(file),
            sizes=own.sizes(d_in="activation_dim", d_sae="dict_size", n_reads="num_layers"),
            config=config.values | _k(file, own),
            architecture="BatchTopKCrossCoder" if is_batch else "CrossCoder",
        )

    def _sae(self, file: TensorFile, config: Settings, own: Settings, trainer: Settings) -> Outline:
        _check_threshold(file)
        mean, scale = _statistics(file)
        return Outline(
            file,
            "batch_topk",
            SAE,
            options=_k(file, own) or {"k": own.whole("k")},
            **_place(trainer, file, n=1),
            adjust=lambda weights: _fold(weights, mean, scale, subtracts_b_dec=True),
            unused=_unused(file),
            sizes=own.sizes(d_in="activation_dim", d_sae="dict_size"),
            config=config.values | _k(file, own),
            architecture="BatchTopKSAE",
        )

    def write(self, dictionary: Dictionary, folder: Path) -> None:
        d, form = dictionary, dictionary.rule.inference_form()
        widths = {port.width for port in d.reads}
        if d.token_norm or not d.writes_what_it_reads or len(widths) > 1:
            raise cannot_write(d, self.plugin_name, "it writes what it reads, ports of one width, without a token_norm")
        if form is None or form.architecture not in ("standard", "jumprelu") or d.b_enc is None:
            raise cannot_write(d, self.plugin_name, "its codes are ReLU(h), or those of them above a threshold")
        if form.architecture == "jumprelu" and len(d.reads) == 1:
            self._write_sae(d, form.tensors["threshold"], folder)
            return
        W_dec = torch.stack([part.double().cpu() for part in apart(d.W_dec, d.writes)])
        W_enc = torch.stack([part.T.double().cpu() for part in apart(d.W_enc.T, d.reads)])
        b_dec = torch.stack([part.double().cpu() for part in apart(d.b_dec, d.writes)])
        b_enc = d.b_enc.double().cpu() - torch.einsum("pd,pdf->f", b_dec, W_enc)
        config: dict[str, Any] = {"activation_dim": widths.pop(), "dict_size": d.d_sae, "num_layers": len(d.reads)}
        norm, buffers = "CROSSCODER", {}
        if form.architecture == "jumprelu":
            norm, theta, scales = self._code_norm_of(d, form.tensors["threshold"].double().cpu(), W_dec)
            if scales is not None:
                W_enc, W_dec, b_dec = W_enc / (scales - SMALL), W_dec * scales, b_dec * scales[:, 0]
                buffers = _without_mean(scales - SMALL, config["activation_dim"])
            config["k"] = self._k_of(d)
            buffers |= {"k": torch.tensor(config["k"], dtype=torch.int32), "threshold": theta.float()}
        config["code_normalization"] = norm
        tensors = {"encoder.weight": W_enc, "encoder.bias": b_enc, "decoder.weight": W_dec, "decoder.bias": b_dec}
        tensors = {name: x.to(d.W_dec.dtype) for name, x in tensors.items()} | buffers
        write_tensors(folder / WEIGHTS, tensors | {"code_normalization_id": torch.tensor(CODES.index(norm) + 1)})
        write_json(folder / CONFIG, config)
        write_json(folder / RUN, {"trainer": _trainer(d)})

    def _write_sae(self, d: Dictionary, theta: Tensor, folder: Path) -> None:
        if (theta != theta[0]).any():
            raise cannot_write(d, self.plugin_name, "it has one threshold for all latents, but those of this dictionary differ")
        k = self._k_of(d)
        tensors = {"encoder.weight": d.W_enc.T, "encoder.bias": d.b_enc, "decoder.weight": d.W_dec.T, "b_dec": d.b_dec}
        tensors |= {"k": torch.tensor(k, dtype=torch.int32), "threshold": theta[0].float()}
        write_tensors(folder / WEIGHTS, tensors)
        write_json(folder / CONFIG, {"activation_dim": d.d_in, "dict_size": d.d_sae, "k": k})
        write_json(folder / RUN, {"trainer": _trainer(d)})

    def _code_norm_of(self, d: Dictionary, theta: Tensor, W_dec: Tensor) -> tuple[str, Tensor, Tensor | None]:
        """Return a code normalisation and its one threshold that stand for the thresholds of all latents.

        Where latents have different thresholds because activations were scaled, also return the scale of each port, [port 1 1].
        """
        silent = (theta >= NEVER) & ~W_dec.any(dim=2).any(dim=0)
        for norm in ("NONE", "CROSSCODER", "SAE"):
            scaled = theta * _norms(W_dec.transpose(0, 1), norm)
            scaled = scaled if norm == "NONE" else scaled[~silent]
            if len(scaled) and (scaled - scaled.mean()).abs().max() <= TOLERANCE * scaled.mean():
                return norm, scaled.mean(), None
        each = (theta[:, None] * W_dec.norm(dim=2).T)[~silent]
        for norm, power in (("CROSSCODER", 1), ("SAE", 2)):  # Σ_p (θ_i s_p ‖d_p‖)^power = 1 for each latent i
            parts = each**power
            scales = torch.linalg.lstsq(parts, parts.new_ones(len(parts), 1)).solution[:, 0]
            if (parts @ scales - 1).abs().max() <= TOLERANCE and scales.min() > SMALL:
                return norm, parts.new_ones(()), scales[:, None, None] ** (1 / power)
        raise cannot_write(d, self.plugin_name, "it has one threshold for all latents, but those of this dictionary differ")

    def _k_of(self, d: Dictionary) -> int:
        """Return the codes of a token: those of the rule, or of the files that the dictionary was read from."""
        read = d.training_record.get("read_from", {})
        k = getattr(d.rule.config, "k", None) or (read.get("config", {}) if isinstance(read, dict) else {}).get("k")
        if not isinstance(k, int) and d.density is not None:
            k = max(1, round(float(d.density.sum())))
        if not isinstance(k, int):
            raise cannot_write(d, self.plugin_name, "it states k, the codes of a token, which this dictionary does not")
        return min(k, d.d_sae)


class _AllLayers(TensorFile):
    """A file whose encoder reads some of the layers, with weights of zero for the others."""

    def __init__(self, file: TensorFile, layers: list[int], n: int):
        self.file, self.layers, self.kind = file, layers, file.kind  # type: ignore[misc]
        spec = file.specs["encoder.weight"]
        super().__init__(file.path, file.specs | {"encoder.weight": Spec(spec.dtype, (n, *spec.shape[1:]))})

    def _load(self, names: list[str]) -> dict[str, Tensor]:
        tensors = self.file._load(names)
        if "encoder.weight" in tensors:
            weight = tensors["encoder.weight"]
            tensors["encoder.weight"] = weight.new_zeros(self.specs["encoder.weight"].shape)
            tensors["encoder.weight"][self.layers] = weight
        return tensors


def _checkpoint(path: Path) -> TorchFile:
    """Return a checkpoint. If the model was compiled, names begin with _orig_mod."""
    file = TorchFile(path)
    for held in (file.tensors, file.specs):
        for name in [name for name in held if name.startswith("_orig_mod.")]:
            held[name.removeprefix("_orig_mod.")] = held.pop(name)  # type: ignore[assignment]
    return file


def _with_all_layers(file: TensorFile, config: Settings) -> TensorFile:
    """Return the file, of which the encoder reads all layers. Raise an error if the decoder writes other ones."""
    layers, decoded = config.values.get("encoder_layers"), config.values.get("num_decoder_layers")
    shape, written = file.specs["encoder.weight"].shape, file.specs.get("decoder.weight", Spec(torch.float32, ())).shape
    n = config.whole("num_layers", len(layers) if isinstance(layers, list) else shape[0])
    if decoded not in (None, n) or (written and written[0] != n):
        raise ConfigError(
            f"{file.path}: the decoder writes {written[0] if written else decoded} layers and {n} were read; which of them it "
            "writes is not stated, so this is not supported"
        )
    if layers is None:
        return file
    whole = isinstance(layers, list) and all(type(i) is int and 0 <= i < n for i in layers)
    if not whole or len(set(layers)) != len(layers) or len(layers) != shape[0]:
        raise CorruptFileError(f"{config.path}: encoder_layers is {str(layers)[:80]}; expected {shape[0]} of {n} layers")
    return _AllLayers(file, layers, n)


def _code_norm(file: TensorFile, config: Settings) -> str:
    """Return the name of the code normalisation, and check the threshold that it is for."""
    stated, held = config.text("code_normalization"), None
    stated = None if stated is None else stated.upper()
    if file.ndim("code_normalization_id") == 0:
        number = int(file.read(["code_normalization_id"])["code_normalization_id"])
        if not 1 <= number <= len(CODES):
            raise CorruptFileError(f"{file.path}: code_normalization_id is {number}; expected 1 to {len(CODES)}")
        held = CODES[number - 1]
    if stated is not None and stated not in CODES:
        raise CorruptFileError(f"{config.path}: code_normalization is {stated!r}; expected one of {', '.join(CODES)}")
    if None not in (stated, held) and stated != held:
        raise CorruptFileError(f"{config.path}: code_normalization is {stated}, but code_normalization_id says {held}")
    norm = stated or held
    if norm is None:
        log.warning("%s does not state its code normalisation; CROSSCODER is used, as in that tool", file.path)
    if norm == "DECOUPLED":
        raise ConfigError(
            f"{file.path}: its code normalisation is DECOUPLED, with a code for each port; a latent here has one code"
        )
    _check_threshold(file)
    return norm or "CROSSCODER"


def _check_threshold(file: TensorFile) -> None:
    """Raise ConfigError if the threshold is missing. Log a warning if training never set it."""
    if file.ndim("threshold") != 0:
        raise ConfigError(
            f"{file.path} has no number 'threshold': without it, codes depend on the other tokens of a batch; add it, the mean "
            "of the least codes that training kept"
        )
    if float(file.read(["threshold"])["threshold"]) < 0:
        log.warning(
            "%s: its threshold was never set, so that all positive pre-activations are codes, as in that tool; training kept "
            "fewer of them",
            file.path,
        )


def _statistics(file: TensorFile) -> tuple[Tensor | None, Tensor]:
    """Return μ, [port width], and s, [port], in float64. μ is None if activations are not normalised."""
    shape = file.specs["encoder.weight"].shape
    n, width = (shape[0], shape[1]) if len(shape) == 3 else (1, shape[1])
    there = [name for name in STATISTICS if name in file.specs]
    if 0 < len(there) < len(STATISTICS):
        missing = ", ".join(name for name in STATISTICS if name not in there)
        raise CorruptFileError(
            f"{file.path} holds {', '.join(there)}, but lacks {missing}, so activations cannot be normalised"
        )
    shapes = [file.specs[name].shape for name in there[:3]]
    of_port = (n, width) if len(shape) == 3 else (width,)
    if there and (shapes[:2] != [of_port, of_port] or shapes[2] not in (of_port[:-1], ())):
        raise CorruptFileError(
            f"{file.path}: {', '.join(there[:3])} have shapes {shapes}; expected {of_port} and {of_port[:-1]}"
        )
    held = file.read(there[:2], finite=False)
    if not there or any(tensor.isnan().any() for tensor in held.values()):
        return None, torch.ones(n, dtype=torch.float64)
    mean, scale = (file.read([name])[name].double() for name in (STATISTICS[0], STATISTICS[2]))
    if scale.min() <= 0:
        raise CorruptFileError(f"{file.path}: activation_global_scale is {scale.tolist()}; expected numbers above 0")
    return mean.reshape(n, width), scale.expand(of_port[:-1]).reshape(n)


def _fold(weights: dict[str, Tensor], mean: Tensor | None, scale: Tensor, subtracts_b_dec: bool = False) -> None:
    """Turn a dictionary of z into one of x, in place. The caller then adds `mean` to b_dec."""
    if mean is None:
        return
    inner = scale.repeat_interleave(mean.shape[1])
    outer = inner + SMALL
    weights["W_enc"] *= inner[:, None]
    if subtracts_b_dec:
        weights["b_enc"] += (weights["b_dec"] / outer - weights["b_dec"] / inner) @ weights["W_enc"]
    weights["W_dec"] /= outer
    weights["b_dec"] = weights["b_dec"] / outer
    weights["mean"] = mean.flatten()


def _norms(W_dec: Tensor, norm: str, weights_of: Mapping[str, float] | None = None) -> Tensor:
    """Return the code normalisation of each latent, for W_dec [d_sae port width]."""
    if norm == "NONE":
        return W_dec.new_ones(len(W_dec))
    if norm == "SAE":
        return W_dec.flatten(1).norm(dim=1)
    if norm == "MIXED":
        return sum((weight * _norms(W_dec, kind) for kind, weight in (weights_of or {}).items()), W_dec.new_zeros(len(W_dec)))
    return W_dec.norm(dim=2).sum(dim=1)


def _k(file: TensorFile, config: Settings) -> dict[str, int]:
    """Return the number of codes of a token, if the files state it."""
    k = int(file.read(["k"])["k"]) if file.ndim("k") == 0 else None
    if k is not None and config.whole("k", k) != k:
        raise CorruptFileError(f"{file.path}: k = {k}, but {config.path} has k = {config.whole('k')}")
    return {} if k is None else {"k": k}


def _unused(file: TensorFile) -> frozenset[str]:
    return frozenset({"k", "code_normalization_id", "threshold", *STATISTICS} & file.specs.keys())


def _place(trainer: Settings, file: TensorFile, n: int) -> dict[str, Any]:
    """Return the hooks, the models and the origin, as fields of an Outline."""
    keys, models = trainer.values.get("ports"), trainer.values.get("models", {})
    if keys is not None and not (
        isinstance(keys, list) and len(keys) == n and all(isinstance(key, str | None) for key in keys)
    ):
        raise CorruptFileError(f"{trainer.path}: trainer.ports is {str(keys)[:80]}; expected the keys of {n} ports")
    if not isinstance(models, dict) or not all(isinstance(model, str | None) for model in models.values()):
        raise CorruptFileError(f"{trainer.path}: trainer.models is {str(models)[:80]}; expected ids by the names of models")
    layer = trainer.whole("layer") if "layer" in trainer else None
    hook = tuple(keys) if any(keys or ()) else None if layer is None or n == 1 else f"blocks.{layer}.hook_resid_post"
    which = "its hook and models" if n > 1 else "its hook, and whether it is of differences of two models"
    several, one = (
        'hook="blocks.13.hook_resid_post", models={"base": …, "chat": …}',
        'hook="chat-base:blocks.13.hook_resid_post"',
    )
    return {
        "hook": hook[0] if isinstance(hook, tuple) and n == 1 else hook,
        "models": models if keys and any(key and split_key(key).model for key in keys) else {},
        "origin": Origin(model=trainer.text("lm_name") if keys else None, excluded_positions=()),
        "lacks_hook": (
            f"{file.path}: the files do not tell {which}; the dictionary names none. To state them: load(…, "
            f"{several if n > 1 else one})"
        ),
    }


def _trainer(d: Dictionary) -> dict[str, Any]:
    """Return what a run of the tool says of its place, with our ports and models beside."""
    hooks = {port.hook for port in d.reads}
    hook = hooks.pop() if len(hooks) == 1 else None
    at = (hook or "").removeprefix("blocks.").removesuffix(".hook_resid_post")
    return {
        "layer": int(at) if at.isdecimal() else None,
        "lm_name": d.origin.model,
        "ports": [port.key for port in d.reads],
        "models": {facts.name: facts.model for facts in d.origin.models},
    }


def _without_mean(scales: Tensor, width: int) -> dict[str, Tensor]:
    """Return the statistics of activations that are scaled only, for scales [port 1 1]."""
    std = (1 / scales[:, :, 0] / width**0.5).expand(-1, width)
    return {
        "activation_mean": torch.zeros_like(std).float(),
        "activation_std": std.float(),
        "activation_global_scale": scales[:, 0, 0].float(),
        "target_rms": torch.tensor(1.0),
    }
