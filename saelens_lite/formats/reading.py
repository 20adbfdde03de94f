"""Read a dictionary from a folder or file of any format, including our own."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from saelens_lite.dictionary import Dictionary
from saelens_lite.dictionary.folder import OWN, is_own_folder
from saelens_lite.errors import ConfigError
from saelens_lite.files import named_file
from saelens_lite.formats.detection import format_of
from saelens_lite.formats.known import Known
from saelens_lite.formats.state_dict import STATE_DICT, inspect_state_dict, read_state_dict
from saelens_lite.outputs import restore


def read(
    path: str | Path,
    device: str | torch.device = "cpu",
    format: str | None = None,
    known: Known | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Dictionary:
    """Return the dictionary in a folder written by `Dictionary.save`, or in a file or folder of another tool.

    Args:
        format: Name of the format plugin, or "saelens_lite"; only needed for pickles.
        known: Facts about a public dictionary that its files may not state.
        settings: With format="state_dict", the arguments of `read_state_dict`; else facts that another tool's files do not
            state, by the names of `Known`.

    Raises:
        CorruptFileError: a file is missing or damaged, contradicts another, or has no known format.
        ConfigError: another tool's dictionary cannot be represented here, or it is a pickle and `format` is not given.
        PluginError: the sparsity rule is not installed; the message names its distribution.
    """
    path = named_file(path)
    restore(path)
    if format == STATE_DICT:
        return read_state_dict(path, **(settings or {})).to(device).eval()
    is_own = format in (None, OWN) and is_own_folder(path)
    if refused := [name for name in settings or () if is_own or name not in Known.model_fields]:
        kind = "one of ours, which says this itself" if is_own else "detected" if format is None else format
        raise ConfigError(
            f"{', '.join(refused)} can be set with format={STATE_DICT!r} only, which reads a bare state dict; the format of "
            f"{path} is {kind}"
        )
    if is_own:
        return Dictionary.load(path, device)
    if settings:
        known = Known(**(known.model_dump(exclude_unset=True) if known else {}) | dict(settings))
    reader = format_of(path, format)
    dictionary = reader.read(path, known) if known else reader.read(path)
    return dictionary.to(device).eval()


def inspect(path: str | Path, format: str | None = None) -> dict[str, Any]:
    """Return the facts about a file or folder of another tool without reading its weights. Raise as `read` does."""
    if format == STATE_DICT:
        return inspect_state_dict(Path(path))
    reader = format_of(Path(path), None if format == OWN else format)
    return {"format": reader.plugin_name, **reader.outline(Path(path)).facts()}


def find_file(path: Path, *names: str) -> Path | None:
    """Return `path` if it is a file, else the first of `names` that exists in the folder, else None."""
    candidates = [path] if path.is_file() else [path / name for name in names]
    return next((candidate for candidate in candidates if candidate.is_file()), None)
