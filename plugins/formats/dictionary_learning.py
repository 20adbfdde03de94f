"""dictionary_learning: ae.pt, a pickle, and config.json; checkpoints/ae_N.pt with config.json in the folder above.

    h = (x − b_dec) W_enc + b_enc     AutoEncoder, AutoEncoderTopK, BatchTopKSAE, MatryoshkaBatchTopKSAE, GatedAutoEncoder
    h = x W_enc + b_enc               JumpReluAutoEncoder, AutoEncoderNew

A state dict may be one level deeper, beside act_mean, which is subtracted from the activations first. AutoEncoderTopK also
stores a threshold; like that tool, we use the k largest instead. Settings that name no class name its trainer. The submodules
resid_post_layer_3, mlp_out_layer_3 and attention_out_layer_3 are the outputs of modules of a transformers model.
"""

import re
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch

from saelens_lite import Dictionary, Origin
from saelens_lite.errors import ConfigError, CorruptFileError
from saelens_lite.formats import (
    PLAIN,
    Format,
    Outline,
    Settings,
    TorchFile,
    cannot_write,
    find_file,
    hook_of_module,
    read_json,
    strings_in_pickle,
    write_json,
    write_torch,
)

WEIGHTS, CONFIG = "ae.pt", "config.json"
LINEAR = {"W_enc": ("encoder.weight", "d_sae d_in"), "W_dec": ("decoder.weight", "d_out d_sae")}
BIASED = LINEAR | {"b_enc": ("encoder.bias", "d_sae"), "b_dec": ("b_dec", "d_out")}
CLASSES = {  # their class → (our rule, its tensors)
    "AutoEncoder": ("l1", BIASED | {"b_dec": ("bias", "d_out")}),
    "AutoEncoderNew": ("l1", BIASED | {"b_dec": ("decoder.bias", "d_out")}),
    "AutoEncoderTopK": ("topk", BIASED),
    "BatchTopKSAE": ("batch_topk", BIASED | {"rule.threshold": ("threshold", "")}),
    "MatryoshkaBatchTopKSAE": ("matryoshka", PLAIN | {"rule.threshold": ("threshold", "")}),
    "JumpReluAutoEncoder": ("jumprelu", PLAIN | {"rule.plain_threshold": ("threshold", "d_sae")}),
    "GatedAutoEncoder": (
        "gated",
        LINEAR
        | {
            "b_dec": ("decoder_bias", "d_out"),
            "rule.r_mag": ("r_mag", "d_sae"),
            "rule.b_gate": ("gate_bias", "d_sae"),
            "rule.b_mag": ("mag_bias", "d_sae"),
        },
    ),
}
WRITTEN = {"l1": "AutoEncoder", "p_anneal": "AutoEncoder"} | {
    rule: name for name, (rule, _) in CLASSES.items() if name not in ("AutoEncoder", "AutoEncoderNew")
}
TRAINERS = {  # the start of a trainer's name, without "Trainer" → the class that it trains
    "Standard": "AutoEncoder",
    "PAnneal": "AutoEncoder",
    "Gated": "GatedAutoEncoder",
    "TopK": "AutoEncoderTopK",
    "BatchTopK": "BatchTopKSAE",
    "Matryoshka": "MatryoshkaBatchTopKSAE",
    "Matroyshka": "MatryoshkaBatchTopKSAE",
    "JumpRelu": "JumpReluAutoEncoder",
}
PLACES = {
    "resid_pre": "hook_resid_pre",
    "resid_post": "hook_resid_post",
    "mlp_out": "mlp.hook_out",
    "attn_out": "attn.hook_out",
    "attention_out": "attn.hook_out",
}
KEEP_B_DEC = ("AutoEncoderNew", "JumpReluAutoEncoder")
UNSET = torch.tensor(-1.0)  # marks a threshold that is not set


class DictionaryLearning(Format):
    """dictionary_learning's ae.pt and config.json, seven classes; read (on request, because it is a pickle) and written."""

    pickled = True
    files = (CONFIG, WEIGHTS)

    def detect(self, path: Path) -> bool:
        file = find_file(path, WEIGHTS)
        held = strings_in_pickle(file) if file else set()

        def holds(key: str) -> bool:
            return any(name == key or name.endswith(f".{key}") for name in held)

        return (holds("decoder.weight") or (holds("W_dec") and holds("threshold"))) and not (
            holds("latent_bias") or holds("code_normalization_id") or not _is_trainers(_config_of(file))
        )

    def outline(self, path: Path) -> Outline:
        file = TorchFile(find_file(path, WEIGHTS) or path / WEIGHTS)
        config = Settings.read(_config_of(file.path))
        trainer = config.part("trainer")
        name = trainer.text("dict_class") or _class_of(trainer.text("trainer_class"), file)
        if name not in CLASSES:
            raise ConfigError(
                f"{config.path}: trainer.dict_class is {name!r}, trainer_class {trainer.text('trainer_class')!r}; supported "
                f"classes are {', '.join(CLASSES)}"
            )
        rule, names = CLASSES[name]
        at = next((key.removesuffix(names["W_dec"][0]) for key in file.specs if key.endswith(names["W_dec"][0])), "")
        mean = next((key for key in (f"{at}act_mean", "act_mean") if key in file.specs), None)
        return Outline(
            file,
            rule,
            {ours: (at + theirs, axes) for ours, (theirs, axes) in names.items()} | ({"mean": (mean, "d_in")} if mean else {}),
            options=_options(name, trainer, file, at),
            **_place(trainer, config.part("buffer")),
            subtracts_b_dec=name not in KEEP_B_DEC,
            unused=frozenset({f"{at}k", f"{at}group_sizes"} | ({f"{at}threshold"} if name == "AutoEncoderTopK" else set())),
            sizes=trainer.sizes(d_in="activation_dim", d_sae="dict_size"),
            config=config.values,
            architecture=name,
        )

    def write(self, dictionary: Dictionary, folder: Path) -> None:
        rule = dictionary.rule
        if rule.plugin_name not in WRITTEN or not dictionary.writes_what_it_reads or len(dictionary.reads) > 1:
            raise cannot_write(dictionary, self.plugin_name, "no class computes it")
        if dictionary.token_norm:
            raise cannot_write(dictionary, self.plugin_name, f"the {dictionary.token_norm} of each activation would be lost")
        name = WRITTEN[rule.plugin_name]
        weights = self._weights(dictionary, name)
        tensors = {theirs: _ordered(weights[ours], ours, axes) for ours, (theirs, axes) in CLASSES[name][1].items()}
        trainer = {
            "dict_class": name,
            "activation_dim": dictionary.d_in,
            "dict_size": dictionary.d_sae,
            "lm_name": dictionary.origin.model,
            "layer": _layer(dictionary.hook),
            "submodule_name": dictionary.hook,
        }
        if "TopK" in name:
            trainer["k"] = min(rule.config.k, dictionary.d_sae)
            tensors = {"threshold": UNSET} | tensors | {"k": torch.tensor(trainer["k"], dtype=torch.int32)}
        if name == "MatryoshkaBatchTopKSAE":
            ends = [0, *rule.lengths(), dictionary.d_sae]
            tensors["group_sizes"] = torch.tensor([b - a for a, b in pairwise(ends)])
        write_torch(folder / WEIGHTS, tensors)
        write_json(folder / CONFIG, {"trainer": trainer, "buffer": {"ctx_len": dictionary.origin.n_ctx}})

    def _weights(self, dictionary: Dictionary, name: str) -> dict[str, torch.Tensor]:
        """Return the parameters by our names, with the values of their class `name`."""
        weights = dict(dictionary.named_parameters()) | {"W_enc": dictionary.W_enc}
        threshold = dictionary.rule.inference_form().tensors.get("threshold")
        if name == "JumpReluAutoEncoder":  # its encoder reads x itself
            b_dec, W_enc, b_enc = (x.cpu().double() for x in (dictionary.b_dec, dictionary.W_enc, dictionary.b_enc))
            b_enc = (b_enc - b_dec @ W_enc).to(dictionary.b_enc.dtype)
            weights |= {"b_enc": b_enc, "rule.plain_threshold": threshold}
        elif threshold is not None:
            if (threshold != threshold[0]).any():
                raise cannot_write(
                    dictionary, self.plugin_name, f"{name} has one threshold, but the thresholds of this dictionary differ"
                )
            weights["rule.threshold"] = threshold[0]
        return weights


def _options(name: str, trainer: Settings, file: TorchFile, at: str) -> dict:
    if name == "JumpReluAutoEncoder":
        return {"parameter": "plain"}
    if "TopK" not in name:
        return {}
    k = int(file.read([f"{at}k"])[f"{at}k"]) if file.ndim(f"{at}k") == 0 else trainer.whole("k")
    if k != trainer.whole("k", k):
        raise CorruptFileError(f"{file.path}: k = {k}, but {trainer.path} has trainer.k = {trainer.whole('k')}")
    if name != "MatryoshkaBatchTopKSAE":
        return {"k": k}
    ends = list(accumulate(_group_sizes(trainer, file, f"{at}group_sizes")))
    if not ends or ends != sorted(set(ends)) or ends[0] <= 0 or ends[-1] != trainer.whole("dict_size", ends[-1]):
        raise CorruptFileError(f"{file.path}: group_sizes must be positive and add up to dict_size")
    return {"k": k, "prefixes": tuple(end / ends[-1] for end in ends[:-1])}


def _group_sizes(trainer: Settings, file: TorchFile, name: str) -> list[int]:
    """Return the sizes of the groups: from the file, or from the settings, where they may be fractions of dict_size."""
    if name in file.specs:
        return file.read([name])[name].flatten().long().tolist()
    sizes, shares = (trainer.values.get(key) for key in ("group_sizes", "group_fractions"))
    if isinstance(sizes, list) and all(type(size) is int for size in sizes):
        return sizes
    if not isinstance(shares, list) or not all(isinstance(share, float | int) and 0 < share <= 1 for share in shares):
        raise CorruptFileError(
            f"{file.path}: tensor 'group_sizes' is missing, and {trainer.path} has neither group_sizes nor group_fractions"
        )
    whole = trainer.whole("dict_size")
    sizes = [int(share * whole) for share in shares[:-1]]  # the last group gets the rest
    return [*sizes, whole - sum(sizes)]


def _config_of(file: Path) -> Path:
    """Return the settings of a file of weights. Those of checkpoints, ae_N.pt, may be in the folder above."""
    beside, above = file.parent / CONFIG, file.parent.parent / CONFIG
    return above if file.name != WEIGHTS and not beside.is_file() and above.is_file() else beside


def _is_trainers(config: Path) -> bool:
    """Return whether a file has the settings of a trainer."""
    try:
        return isinstance(read_json(config).get("trainer"), dict)
    except CorruptFileError:
        return False


def _class_of(trainer: str | None, file: TorchFile) -> str | None:
    """Return the class that a trainer trains, for settings that do not name it, or None if the trainer is unknown."""
    kind = (trainer or "").replace("Trainer", "")
    name = next((TRAINERS[start] for start in TRAINERS if kind.startswith(start)), None)
    new = name == "AutoEncoder" and any(key.endswith("decoder.bias") for key in file.specs)
    return "AutoEncoderNew" if new else name


def _place(trainer: Settings, buffer: Settings) -> dict[str, Any]:
    """Return the hook and the origin, as fields of an Outline."""
    module, side = trainer.text("submodule_name"), buffer.text("io", "out")
    if side not in ("in", "out"):
        raise ConfigError(f"{buffer.path}: buffer.io is {side!r}: its input and output differ, which no supported class allows")
    if "layer" in buffer and "io" not in buffer:
        raise ConfigError(
            f"{buffer.path}: the buffer holds attention heads, and the settings do not say which one; Dictionary.from_tensors "
            "reads its tensors for a hook that you name"
        )
    place = re.fullmatch(rf"({'|'.join(PLACES)})_layer_(\d+)", module or "")
    if place:
        hook = f"blocks.{place[2]}.{PLACES[place[1]]}"
    elif module is not None:
        model = trainer.text("lm_name")
        hook = module if module.startswith("blocks.") else hook_of_module(module, "input" if side == "in" else "output", model)
    else:
        hook = f"blocks.{trainer.whole('layer')}.hook_resid_{'pre' if side == 'in' else 'post'}" if "layer" in trainer else None
    if side == "in" and (place or (module or "").startswith("blocks.")):
        raise ConfigError(
            f"{buffer.path}: buffer.io is 'in', but submodule_name is {module!r}, an activation; remove one of them"
        )
    n_ctx = buffer.whole("ctx_len") if "ctx_len" in buffer else None
    origin = Origin(model=trainer.text("lm_name"), n_ctx=n_ctx, excluded_positions=())
    return {"hook": hook, "origin": origin}


def _layer(hook: str | None) -> int | None:
    match = re.match(r"blocks\.(\d+)\.", hook or "")
    return int(match[1]) if match else None


def _ordered(tensor: torch.Tensor, ours: str, axes: str) -> torch.Tensor:
    """Return a parameter with the axis order of their files."""
    return tensor.T if (ours, axes) in (("W_enc", "d_sae d_in"), ("W_dec", "d_out d_sae")) else tensor
