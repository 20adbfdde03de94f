"""The names of activations: a hook, or a key that says whose hook it is, such as "base:blocks.3.hook_resid_pre"."""

import re
from collections.abc import Sequence
from typing import NamedTuple

MODEL_NAME = r"[A-Za-z_][A-Za-z0-9_.]*"


class Key(NamedTuple):
    """The parts of a port's key: the name of the model, of the model that is subtracted from it, and the hook."""

    model: str | None
    minus: str | None
    hook: str


def key_of(hook: str, model: str | None = None, minus: str | None = None) -> str:
    """Return the key of a port, such as "base:blocks.3.hook_resid_pre"."""
    if model is None:
        return hook
    return f"{model}:{hook}" if minus is None else f"{model}-{minus}:{hook}"


def split_key(key: str) -> Key:
    """Return the parts of a key; a name of another form is a hook of the only model."""
    match = re.fullmatch(rf"({MODEL_NAME})(?:-({MODEL_NAME}))?:(.+)", key)
    return Key(*match.groups()) if match else Key(None, None, key)


def parts_of(key: str) -> tuple[str, str] | None:
    """Return the keys whose difference a key names; None if it does not name a difference."""
    model, minus, hook = split_key(key)
    return (key_of(hook, model), key_of(hook, minus)) if minus else None


def captured(keys: Sequence[str], among: Sequence[str] = ()) -> list[str]:
    """Return the keys that must be captured for others: the parts of differences, unless `among` has these, and the rest."""
    return list(dict.fromkeys(one for key in keys for one in ((key not in among and parts_of(key)) or (key,))))


def usual_reads(keys: Sequence[str]) -> tuple[str, ...]:
    """Return the hooks to read if none is chosen: the only one, or all of one hook in several models. Return () if unclear."""
    plain = [key for key in keys if len(keys) == 1 or parts_of(key) is None]
    same_hook = len({split_key(key).hook for key in plain}) == 1
    return tuple(plain) if len(plain) == 1 or (same_hook and all(split_key(key).model for key in plain)) else ()
