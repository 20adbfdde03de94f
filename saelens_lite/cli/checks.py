"""Checks of what a command was asked, before torch is imported and anything is read. The library checks all of it again."""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from saelens_lite import registry
from saelens_lite.config import RunConfig, TrainConfig
from saelens_lite.embedded_hooks import hooks_of_embedded
from saelens_lite.errors import ConfigError, HookError, ModelNotFoundError, TextError, near_matches
from saelens_lite.keys import MODEL_NAME, captured, split_key, usual_reads
from saelens_lite.names import is_on_hub, no_such
from saelens_lite.paths import check_input, is_address, names_a_folder
from saelens_lite.rule_options import check_options


def training(run: RunConfig, configs: list[TrainConfig]) -> None:
    """Raise the error that training with these settings would raise, as far as it can be known at once."""
    for config in configs:
        check_options(config.sparsity, config.options)
    for name in run.loggers:
        registry.find(name, "loggers")
    if run.cache and run.text:
        raise ConfigError(f"both a cache ({run.cache}) and --text ({run.text}) were given; training reads only one of them")
    if run.cache:
        for config in configs:
            if config.kl_share:
                raise ConfigError(
                    f"kl_share = {config.kl_share:g} runs the model on token rows, which a cache does not hold; give --text "
                    "and --model in place of the cache"
                )
            cache_has(Path(run.cache), hooks_of(config))
    elif not run.text:
        raise ConfigError("nothing to train on: give the folder of a cache, or --text with --hook")
    else:
        if not all(hooks_of(config) for config in configs):
            raise ConfigError("--text needs a hook: give --hook, or hook = in each [[dictionary]]")
        text_exists(run.text)
        model_has(run.model, [hook for config in configs for hook in hooks_of(config)])
    folders = [f"{i}-{config.sparsity}" for i, config in enumerate(configs)] if len(configs) > 1 else [""]
    if not os.path.exists(Path(run.out) / "checkpoints"):  # of an interrupted run, which has a message of its own
        for folder in folders:
            is_free(Path(run.out) / folder, run.exists)


def hooks_of(config: TrainConfig) -> tuple[str, ...]:
    """Return the hooks that the settings of a dictionary name."""
    reads = config.reads or ((config.hook,) if config.hook else ())
    return (*reads, *config.writes) if reads else ()


def hooks_in_cache(folder: Path) -> list[str]:
    """Return the hooks of a cache; none if its manifest is damaged."""
    from saelens_lite.files import MAX_LIST_BYTES, read_json
    from saelens_lite.outputs import restore

    restore(folder)
    known = read_json(folder / "manifest.json", MAX_LIST_BYTES).get("hooks")
    return list(known) if isinstance(known, dict) else []


def cache_has(folder: Path, hooks: Sequence[str]) -> None:
    """Raise if there is no cache in a folder, if it lacks a hook, or if it has hooks to choose from and none is named."""
    known = hooks_in_cache(folder)
    if not known:  # the library says what is damaged
        return
    if not hooks and not usual_reads(known):
        raise ConfigError(f"the activations come from several hooks; choose one with hook=: {', '.join(known)}")
    for hook in captured(hooks, known):
        if hook not in known:
            raise HookError(
                f"{folder} has no activations of {hook!r}{near_matches(hook, known) or '; it has ' + ', '.join(known)}"
            )


def text_exists(name: str) -> None:
    """Raise TextError if a text is neither a file nor a name of the Hub or of the embedded corpus."""
    if not name.startswith(("hf:", "python-docs")) and not check_input(name).is_file():
        raise TextError(f"no text file at {name}")


def named_models(values: Sequence[str]) -> dict[str, str]:
    """Return the models of NAME=MODEL by name; empty if there is no value, or one without a name.

    Raises:
        ConfigError: several models are given, and one has no name, or the same name as another.
    """
    if len(values) == 1 and os.path.isdir(values[0]):  # a folder with = in its name
        return {}
    named: dict[str, str] = {}
    for value in values:
        name, _, model = value.partition("=")
        if not re.fullmatch(MODEL_NAME, name) or not model:
            if len(values) == 1 and not re.fullmatch(rf"{MODEL_NAME}=", value):
                return {}
            raise ConfigError(f"--model {value}: expected NAME=MODEL, such as --model base=gpt2 --model chat=org/gpt2-chat")
        if name in named:
            raise ConfigError(f"--model gives {name} twice: {named[name]} and {model}")
        named[name] = model
    return named


def model_has(model: str, hooks: Iterable[str]) -> None:
    """Raise if a model folder is missing, or if the embedded model lacks a hook."""
    if names_a_folder(model) and not os.path.isdir(Path(model).expanduser()):  # False for a name that is too long
        raise ModelNotFoundError(f"no model folder at {model}; give a folder with config.json, a Hub id, or 'tiny'")
    known = hooks_of_embedded(model)
    for hook in hooks:
        if known and re.sub(r"\.head_\d+$", "", hook) not in known:
            usual = [name for name in known if name.count(".") == 2]
            hint = near_matches(hook, known) or f"; for example {', '.join(usual[:5])}"
            raise HookError(f"no hook {hook!r} in {model}{hint}; `saelens-lite hooks {model}` lists them")


def models_have(values: Sequence[str], hooks: Sequence[str]) -> dict[str, str]:
    """Return the models of NAME=MODEL by name; empty for one without a name. Raise as `named_models` and `model_has`."""
    named = named_models(values)
    if not named:
        model_has(values[0], hooks)
    keys = [split_key(hook) for hook in hooks]
    for key in keys if named else ():
        for name in {key.model, key.minus} - {None, *named}:
            raise ConfigError(f"there is no model {name!r}; --model gives {', '.join(named)}")
    for name, model in named.items():
        model_has(model, [key.hook for key in keys if key.model is None or name in (key.model, key.minus)])
    return named


def dictionaries(_: Any, paths: Path | list[Path]) -> None:
    """Raise CorruptFileError if a path is neither that of a dictionary nor the name of a public one, nor an address."""
    from saelens_lite.outputs import restore

    for path in paths if isinstance(paths, list) else [paths]:
        if not is_address(path):
            restore(path)
            if not check_input(path).exists() and not is_on_hub(path):
                raise no_such(path)


def run_exists(folder: Path) -> None:
    """Raise ConfigError if there is no folder of a run, nor any left aside by a killed process."""
    from saelens_lite.outputs import leftovers

    if not check_input(folder).exists() and not leftovers(folder, "old"):
        raise ConfigError(f"{folder} does not exist, so there is no run to resume")


def is_free(out: Path, exists: str) -> None:
    """Raise OutputExistsError if an output exists and may not be replaced."""
    from saelens_lite.outputs import refuse_existing

    if exists == "error":
        refuse_existing(out, exists)
