"""Loading of language models: the embedded one, local folders, and the Hugging Face Hub."""

import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from saelens_lite.config import Origin
from saelens_lite.devices import chosen_device
from saelens_lite.errors import (
    ConfigError,
    HubError,
    HubUnreachableError,
    ModelNotFoundError,
    ProcessLostError,
    not_a_dictionary,
)
from saelens_lite.model.language_model import EMBEDDED, LanguageModel
from saelens_lite.model.models import AnyModel, Models
from saelens_lite.model.nicknames import hub_id
from saelens_lite.model.processing import CENTER_WRITING_WEIGHTS
from saelens_lite.model.spread import DeviceMap, check_device_map, placement, spreads
from saelens_lite.paths import check_input, names_a_folder
from saelens_lite.tensor_files import DTYPES

log = logging.getLogger(__name__)


def load_model(
    name: str | Path = "tiny",
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    center_writing_weights: bool = False,
    trust_remote_code: bool = False,
    device_map: DeviceMap | None = None,
    max_memory: dict[int | str, int | str] | None = None,
    offload_folder: str | Path | None = None,
) -> LanguageModel:
    """Load a causal language model, frozen, in evaluation mode.

    Args:
        name: "tiny" (embedded, no network), a local folder, or a Hugging Face Hub id such as "gpt2". The short names of
            transformer-lens, such as gpt2-small, stand for Hub ids.
        device: Default: CUDA if available, else MPS if it works, else the CPU.
        dtype: Number type of the weights: "float32", "bfloat16", "float16", "float64" or a torch.dtype. "auto" is float32,
            but on CUDA the checkpoint's own. A float32 checkpoint then has TF32 products in its forward passes on CUDA;
            dtype="float32" turns them off. With a `device_map` for several devices, "auto" is the checkpoint's own everywhere.
        revision: Branch, tag or commit on the Hub.
        center_writing_weights: Apply `LanguageModel.center_writing_weights_`.
        trust_remote_code: Run Python code that comes with the model's files. It may do anything. Without this, a model that
            needs such code is refused; there is no prompt on the terminal.
        device_map: For models larger than a device, instead of `device`. "auto" fills the GPUs, then memory, then leaves the
            rest on the disk; a dict names the device, "cpu" or "disk" of each module. Both need `saelens-lite[large]`. "tp"
            cuts each weight into a part for each process that torchrun started; all of them must then do the same with
            the model. A device such as "cpu" means the same as in `device`.
        max_memory: With "auto": the most memory to use, such as {0: "20GB", "cpu": "60GB"}.
        offload_folder: Folder for weights on the disk, if the checkpoint does not have them as the model needs them.

    Raises:
        ModelNotFoundError: the model does not exist, the Hub cannot be reached, transformers does not know the architecture,
            or the model needs its own code.
        ConfigError: the device is missing, the dtype is unknown, the writing weights of this model cannot be centred, or the
            device map does not fit the model, the other arguments or what is installed.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as hf_logging

    check_device_map(device_map, device, max_memory)
    is_spread = spreads(device_map)
    name, where, local = model_place(name)
    commit, only_cached = (revision, True) if local else _on_hub(str(name), revision)
    source = {"revision": revision, "local_files_only": only_cached, "trust_remote_code": bool(trust_remote_code)}
    device, number_type = chosen_device(device if is_spread else device or device_map), _number_type(dtype)  # type: ignore[arg-type]
    is_own = number_type == "auto" and (is_spread or device.type == "cuda")
    number_type = torch.float32 if number_type == "auto" and not is_own else number_type
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)  # it warns of weights on the disk, as was asked
    try:
        config = AutoConfig.from_pretrained(str(where), **source)
        if not trust_remote_code and _names_kernels(config):
            raise _needs_code(name)
        places = placement(device_map, max_memory, offload_folder, config) if is_spread else {}  # type: ignore[arg-type]
        module = AutoModelForCausalLM.from_pretrained(str(where), dtype=number_type, config=config, **source, **places)
        tokenizer = None
        if not local or _has_tokenizer(Path(str(where))):
            tokenizer = AutoTokenizer.from_pretrained(str(where), **source)
    except (ModelNotFoundError, ConfigError, ProcessLostError):
        raise
    except Exception as error:  # transformers raises errors of many kinds for a damaged folder
        reason = " ".join(str(error).split())
        if not trust_remote_code and "trust_remote_code" in reason:
            raise _needs_code(name) from error
        help_ = "check the folder." if local else "is it a causal language model that transformers knows?"
        raise ModelNotFoundError(f"cannot load the model {str(name)!r}: {help_} transformers says: {reason[:400]}") from error
    finally:
        if bars:
            hf_logging.enable_progress_bar()
    if tokenizer is None or set(tokenizer.get_vocab().values()) <= set(tokenizer.all_special_ids):
        log.warning("%s has no tokenizer: it takes token ids only, not text", name)
        tokenizer = None  # transformers makes one that knows only special tokens
    lm = LanguageModel(module if places else module.to(device), tokenizer, name=str(name), revision=commit)
    lm.device_map = device_map if is_spread else None
    if placed := getattr(module, "hf_device_map", None):
        log.info("%s is on %s", name, ", ".join(f"{place}: {n} modules" for place, n in Counter(placed.values()).items()))
    device = lm.device if places else device
    lm.tf32 = is_own if lm.dtype == torch.float32 and device.type == "cuda" else None
    return lm.center_writing_weights_() if center_writing_weights else lm


def model_place(name: str | Path) -> tuple[str | Path, str | Path, bool]:
    """Return the name of a model as a Hub id or a folder, the place to load it from, and whether that is a folder.

    Raises:
        ModelNotFoundError: the name is that of a folder that does not exist.
    """
    check_input(name)
    where = EMBEDDED.get(str(name)) or (Path(name).expanduser() if str(name).startswith("~") else name)
    if Path(str(where)).is_dir():
        return name, where, True
    if names_a_folder(name):
        raise ModelNotFoundError(f"no model folder at {name}; give a folder with config.json, a Hub id, or 'tiny'")
    return hub_id(str(name)), hub_id(str(name)), False


@runtime_checkable
class HasOrigin(Protocol):
    """A dictionary, or anything else that knows the origin of its activations."""

    origin: Origin


def model_for(
    *dictionaries: HasOrigin,
    name: str | Path | Mapping[str, str | Path] | None = None,
    revision: str | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
    device_map: DeviceMap | None = None,
) -> AnyModel:
    """Return the model that dictionaries were trained on, or the model called `name`, with the same weight processing.

    For dictionaries of several models, return these as `Models`, or those of `name`, such as {"base": "gpt2", "chat": …}.

    The commit is that of the dictionaries' origins, unless `name` is another model or `revision` is given. An origin is read
    from a file. So it cannot allow a model's code to run, and a local folder that it names is mentioned in the log.

    Args:
        dictionaries: Without `name`, each must name its model.
        device, dtype, device_map: See `load_model`.

    Raises:
        ConfigError: an origin does not name its model and `name` is not given; the origins name several models or commits;
            `revision` is given for several models; or `trust_remote_code` is set without a name.
        ModelNotFoundError: see `load_model`.
    """
    for one in dictionaries:
        if not isinstance(one, HasOrigin):
            raise not_a_dictionary(one)
    if name is None and not dictionaries:
        raise ConfigError("there is no dictionary to load the model of; give one, or name=")
    origins = [dictionary.origin for dictionary in dictionaries]
    settings = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code, "device_map": device_map}
    several = dict.fromkeys(facts.name for origin in origins for facts in origin.models)
    if isinstance(name, Mapping) or (several and name is None):
        if revision is not None:
            raise ConfigError(
                f"revision = {revision!r} is the commit of one model, and there are several; give folders of those commits, "
                "or in Python load each with load_model"
            )
        named = dict(name or several)
        return Models({part: _model_of([o.of(part) for o in origins], own, None, settings) for part, own in named.items()})
    return _model_of([one for o in origins for one in o.of_each.values()], name, revision, settings)


def _model_of(origins: list[Origin], name: str | Path | None, revision: str | None, settings: dict[str, Any]) -> LanguageModel:
    """Return the model that dictionaries of these origins were trained on, or the model called `name`."""
    if name is None and not all(origin.model for origin in origins):
        which = "this dictionary does" if len(origins) == 1 else "one of the dictionaries does"
        raise ConfigError(f"{which} not say which model it was trained on; give --model, or name= in Python")
    known = [(hub_id(o.model), o.revision) for o in origins if o.model is not None]
    places = list(dict.fromkeys(place for place in known if name is None or place[0] == hub_id(str(name))))
    named = ", ".join(model if commit is None else f"{model} at {commit}" for model, commit in places)
    if len({model for model, _ in places}) > 1:
        raise ConfigError(f"the dictionaries were trained on several models: {named}; name the one to use")
    if revision is None and len(places) > 1:
        raise ConfigError(f"the dictionaries were trained on several commits of one model: {named}; name the revision to use")
    model, commit = places[0] if places else (name, None)
    if name is None:
        if settings["trust_remote_code"]:
            raise ConfigError(f"trust_remote_code needs the name of the model; if you trust {model}, name it as well")
        mention_folder(model)
    return load_model(
        model,
        revision=revision or commit,
        center_writing_weights=any(CENTER_WRITING_WEIGHTS in origin.processing for origin in origins),
        **settings,
    )


def _number_type(dtype: str | torch.dtype) -> str | torch.dtype:
    """Return "auto" or a dtype. Raise ConfigError for anything else."""
    chosen = DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if chosen != "auto" and chosen not in DTYPES.values():
        raise ConfigError(f"dtype = {str(dtype)!r}; expected auto, {', '.join(DTYPES)}, or one of these as a torch.dtype")
    return chosen


def mention_folder(name: str) -> None:
    """Log a warning if a model name that was read from a file is a local folder."""
    if name not in EMBEDDED and Path(name).expanduser().is_dir():
        log.warning("loading the model from the folder %s, as a file says; if that is not your model, name yours", name)


def _needs_code(name: str | Path) -> ModelNotFoundError:
    return ModelNotFoundError(
        f"the model {str(name)!r} needs Python code that comes with its files, which was not run; read that code, and if you "
        f"trust it, call load_model({str(name)!r}, trust_remote_code=True), or --trust-remote-code in a command"
    )


def _names_kernels(config: Any) -> bool:
    """Return whether a model's config names code on the Hub for its attention or its experts."""
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))]
    kinds = ("_attn_implementation", "_experts_implementation")
    return any("/" in str(getattr(part, kind, None)) for part in parts for kind in kinds)


def _has_tokenizer(folder: Path) -> bool:
    """Return whether a model folder has any of the usual tokenizer files."""
    patterns = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.spm", "*.tiktoken", "tekken.json")
    return any(any(folder.glob(pattern)) for pattern in patterns)


def _on_hub(name: str, revision: str | None) -> tuple[str, bool]:
    """Return the commit of a model on the Hub, and whether its files must come from the cache.

    Without a network, transformers alone would try to reach the Hub for half a minute before it looks into the cache.
    """
    from saelens_lite.hub_client.models import find_model

    try:
        return find_model(name, revision)
    except HubUnreachableError as error:
        raise ModelNotFoundError(
            f"cannot load the model {name!r}: without a network use 'tiny' or a local folder with the model's files. {error}"
        ) from None
    except HubError as error:
        raise ModelNotFoundError(f"cannot load the model {name!r}, which is not a local folder: {error}") from None
