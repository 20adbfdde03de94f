"""A bare state dict: a file of tensors by name, which says nothing of the function that they belong to.

Names are recognised (see `saelens_lite.dictionary.known_names`), and sizes say which axis is which. The caller says the rest.
"""

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from saelens_lite import registry
from saelens_lite.dictionary import Dictionary
from saelens_lite.dictionary.known_names import Recognised, recognise, rules_that_fit
from saelens_lite.dictionary.tensors import check_types
from saelens_lite.errors import ConfigError, CorruptFileError, NonFiniteError, ShapeError
from saelens_lite.files import is_zip, shortened
from saelens_lite.formats.containers import TensorFile, TorchFile, open_tensors, strings_in_pickle
from saelens_lite.formats.detection import Formats
from saelens_lite.paths import WEIGHT_ENDINGS, check_input

STATE_DICT = "state_dict"
log = logging.getLogger(__name__)


def read_state_dict(
    path: Path,
    *,
    rule: str | None = None,
    options: Mapping[str, Any] | None = None,
    names: Mapping[str, str] | None = None,
    prefix: str | None = None,
    ignore: Collection[str] = (),
    **settings: Any,
) -> Dictionary:
    """Return the dictionary in a safetensors, npz or PyTorch file (only its tensors are read; nothing is executed).

    Args:
        rule, options: the sparsity rule and its settings, such as rule="topk", options={"k": 32}.
        names: our name → theirs, for tensors whose names are not recognised, such as {"W_enc": "analysis", "mean": "mu"}.
        prefix: the names of the modules that the tensors are in, such as "model.sae."; tensors elsewhere are left out.
        ignore: names or patterns of tensors without effect on the function, such as "optimizer.*".
        settings: other arguments of `Dictionary.from_tensors`, such as hook= and subtract_b_dec=. If there is a b_dec and
            subtract_b_dec is not given, a warning is logged; if it is the bias of a decoder layer, an error is raised.

    Raises:
        CorruptFileError: the file is damaged, or does not hold tensors by name.
        ConfigError: rule= or subtract_b_dec= is missing, tensors are not recognised, or do not belong to the rule.
        ShapeError: the tensors do not fit each other, or do not decide which axis is which.
    """
    check_types({"options": options} | ({} if rule is None else {"rule": rule}))
    file = _open(path)
    try:
        theirs = recognise(file.specs, names, prefix=prefix, ignore=ignore)
        if theirs.surplus:
            raise ConfigError(
                f"tensors {shortened(theirs.surplus)} have no known meaning; set names= to theirs, such as names={{'mean': "
                f"{theirs.surplus[0]!r}}}, or ignore= if they have no effect on codes and x_hat"
            )
        if rule is None:
            raise ConfigError(f"a state dict does not say how codes are made; set rule= to one of {_rules(theirs)}")
        tensors = file.read(theirs.names.values())
        given = {ours: tensors[name] for ours, name in theirs.names.items()}
        options = _with_k(rule, dict(options or {}), given.pop("k", None))
        if twice := given.keys() & settings.keys():
            raise ConfigError(f"{', '.join(sorted(twice))} of the file and of the call; ignore= the tensor in the file")
        dictionary = Dictionary.from_tensors(rule=rule, options=options, **given, **settings)
        is_open = "b_dec" in given and dictionary.writes_what_it_reads and settings.get("subtract_b_dec") is None
        if is_open and theirs.names["b_dec"].removesuffix(".bias") == theirs.names["W_dec"].removesuffix(
            ".weight"
        ):  # a layer's
            raise ConfigError(
                f"the tensors do not say whether {theirs.names['b_dec']} is subtracted from x before the encoder: set "
                "subtract_b_dec=False if the encoder is a linear layer of x, as usual for torch.nn.Linear, or True if it is "
                "subtracted"
            )
    except (ConfigError, ShapeError, NonFiniteError) as error:
        raise type(error)(f"{file.path}: {error}") from None
    _warn(file)
    if is_open:
        log.warning(
            "%s: %s is subtracted from x before the encoder; if that is right, set subtract_b_dec=True, else False",
            file.path, theirs.names["b_dec"],
        )  # fmt: skip
    dictionary.training_record = {"read_from": {"format": STATE_DICT, "config": {"names": theirs.names}}}
    return dictionary


def inspect_state_dict(path: Path) -> dict[str, Any]:
    """Return the tensors of a file, their names here, and the rules that take them, without reading weights."""
    file = _open(path)
    theirs = recognise(file.specs)
    return {
        "format": STATE_DICT,
        "names": theirs.names,
        "not recognised": theirs.surplus,
        "rules": rules_that_fit(theirs.names),
        "tensors": {
            name: {"dtype": str(spec.dtype).removeprefix("torch."), "shape": list(spec.shape)}
            for name, spec in sorted(file.specs.items())
        },
    }


def _open(path: Path) -> TensorFile:
    """Return the file of tensors at a path, or the only one in a folder."""
    path = check_input(path)
    if path.is_dir():
        inner = sorted(one for ending in WEIGHT_ENDINGS for one in path.glob(f"*{ending}"))
        if len(inner) != 1:
            listed = shortened(one.name for one in inner)
            endings = ", ".join(WEIGHT_ENDINGS)
            raise CorruptFileError(f"{path} is a folder; name a file of tensors, one of {endings} (there: {listed})")
        path = inner[0]
    if not path.exists():
        raise CorruptFileError(f"{path} is missing; is it the file you meant?")
    if path.suffix != ".npz" and is_zip(path) and strings_in_pickle(path):
        return TorchFile(path)
    return open_tensors(path)


def _rules(theirs: Recognised) -> str:
    """Return the rules that take the tensors, in words."""
    fitting = rules_that_fit(theirs.names)
    said = ", ".join(f"{name!r} (with options={{'k': …}})" if _has_k(name) else repr(name) for name in fitting)
    return (
        f"{said}, which take its tensors ({', '.join(theirs.names)})"
        if said
        else (f"{', '.join(registry.names())}; none takes exactly its tensors, {', '.join(theirs.names)}")
    )


def _has_k(rule: str) -> bool:
    return "k" in registry.load(rule).Config.model_fields


def _with_k(rule: str, options: dict[str, Any], k: Any) -> dict[str, Any]:
    """Return the options with the k of the file. Raise ConfigError if they have another one, or it is not a whole number."""
    if k is None:
        return options
    if not _has_k(rule):
        log.warning("the tensor k of the file holds %s, which rule=%r does not use; is it a top-k rule?", k.tolist(), rule)
        return options
    if k.numel() != 1 or options.get("k", k.item()) != k.item():
        raise ConfigError(f"options have k = {options.get('k')}, but the tensor k of the file holds {k.tolist()}")
    if k.item() != int(k):
        raise ConfigError(
            f"the tensor k of the file holds {k.item()}, not a whole number; ignore= it and set options={{'k': …}}"
        )
    return options | {"k": int(k)}


def _warn(file: TensorFile) -> None:
    """Log what the file says and this format does not use."""
    if isinstance(file, TorchFile) and (file.values or file.unread):
        log.warning("%s: entries %s were not used; only tensors were", file.path, shortened([*file.values, *file.unread]))
    if detected := [reader.plugin_name for reader in Formats().detected(file.path)]:
        log.warning(
            "%s looks like a dictionary of %s, which knows how its tensors are used; it was read as a plain state dict",
            file.path, ", ".join(detected),
        )  # fmt: skip
