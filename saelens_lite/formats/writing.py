"""Write a dictionary in the format of another tool."""

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from saelens_lite.dictionary import Dictionary
from saelens_lite.errors import ConfigError, NonFiniteError
from saelens_lite.files import write_file
from saelens_lite.formats.contract import Format
from saelens_lite.kinds import DICTIONARY as KIND
from saelens_lite.outputs import new_folder


@torch.no_grad()
def write(dictionary: Dictionary, out: str | Path, writer: Format, *, exists: Literal["error", "overwrite"] = "error") -> Path:
    """Write a dictionary in a format to a folder, which appears complete or not at all, and return the folder.

    Raises:
        ConfigError: the format cannot hold the dictionary.
        NonFiniteError: a parameter is NaN or infinite.
        OutputExistsError: the folder is not empty and `exists` is "error".
    """
    if name := dictionary.not_finite():
        raise NonFiniteError(f"{name} is not finite; a dictionary with NaN or infinity is not written")
    if any(port.minus for port in (*dictionary.reads, *dictionary.writes)) and not writer.keeps_models:
        loss = "other tools would take it for one of the activations themselves, not of their difference"
        raise cannot_write(dictionary, writer.plugin_name, loss)
    with new_folder(Path(out), KIND, exists, any_format=True) as folder:
        writer.write(dictionary, folder)
    return Path(out)


def write_torch(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to a file with `torch.save` in one step, in their order."""
    whole = OrderedDict((name, tensor.detach().cpu().contiguous().clone()) for name, tensor in tensors.items())

    def save(temporary: Path) -> None:
        with open(temporary, "wb") as file:  # so that disk errors reach us, and the file does not hold its name
            torch.save(whole, file)

    write_file(path, save)


def cannot_write(dictionary: Dictionary, format_name: str, loss: str) -> ConfigError:
    """Return the error of a format that cannot hold a dictionary."""
    return ConfigError(
        f"a {dictionary.rule.plugin_name} dictionary of {dictionary.place} cannot be written as {format_name}: {loss}"
    )
