"""The settings file of a training run: its keys, and the places where misplaced keys belong."""

from contextlib import suppress
from typing import Any

from saelens_lite import registry
from saelens_lite.config import OF_THE_RUN, RunConfig, TextConfig, TrainConfig
from saelens_lite.errors import ConfigError, PluginError, near_matches
from saelens_lite.rule_options import config_of

ONLY_FLAGS = ("config", "resume", "devices", "trust_remote_code", "import", "verbose", "traceback")


def run_config(tables: dict[str, Any], overrides: dict[str, Any] | None = None) -> tuple[RunConfig, TextConfig]:
    """Return the settings of a run and of its text from a settings file. `overrides` override them.

    Raises:
        ConfigError: a key is unknown or in the wrong place, or a value is bad.
    """
    _check_keys(tables)
    given = tables | (overrides or {})
    run, text = ({key: given[key] for key in given if key in part.model_fields} for part in (RunConfig, TextConfig))
    return RunConfig(**run), TextConfig(**text)


def _check_keys(tables: dict[str, Any]) -> None:
    """Raise ConfigError if a key at the top of a settings file is unknown. The message says where it belongs."""
    known = [*TrainConfig.model_fields, *OF_THE_RUN, "dictionary"]
    for key, value in tables.items():
        if key not in known and key != "target_hook":  # of older files
            rule = tables.get("sparsity", "topk")
            if (swapped := key.replace("-", "_")) in known:
                hint = f"; write {swapped}"
            elif isinstance(value, dict) and value.keys() <= set(known):
                hint = f"; write its keys without the line [{key}], above the first table"
            else:
                hint = other_place(key, rule) or near_matches(key, known) or f"; the keys are {', '.join(sorted(known))}"
            raise ConfigError(f"unknown key {key!r} in the settings file{hint}")


def other_place(key: str, rule: Any) -> str:
    """Return the end of a message that says where a key belongs if it is not a setting of a dictionary; "" if nowhere."""
    if key in ONLY_FLAGS:
        return f"; it is only a flag, --{key.replace('_', '-')}, and not a key of settings"
    if key in OF_THE_RUN:
        return "; it is a setting of the whole run, not of a dictionary"
    having = [name for name in dict.fromkeys([rule, *registry.names()]) if isinstance(name, str) and _has_option(name, key)]
    if not having:
        return ""
    names = having[0] if having[0] == rule else ", ".join(having)
    return f"; it is an option of {names}: options = {{{key} = …}} in a file, options={{{key!r}: …}} in Python"


def _has_option(rule: str, key: str) -> bool:
    with suppress(PluginError):
        return key in config_of(rule).model_fields
    return False
