"""Dictionaries by address: a folder or file of this computer, or hf://user/repo/folder@revision on the Hub."""

from pathlib import Path
from typing import Literal

import torch

from saelens_lite import registry
from saelens_lite.dictionary import OWN, Dictionary
from saelens_lite.formats import read, write
from saelens_lite.outputs import refuse_inputs_in
from saelens_lite.paths import is_address


def load(address: str | Path, device: str | torch.device = "cpu", format: str | None = None) -> Dictionary:
    """Return the dictionary at an address; `source` of one from the Hub is its address with the commit.

    Args:
        address: a folder written by `Dictionary.save`, a file or folder of another tool, or either on the Hub:
            hf://user/repo/folder@revision.
        format: name of the format plugin to read it with, or "saelens_lite"; only needed where the files are pickles.

    Raises:
        CorruptFileError: a file is missing, damaged, contradicts another, or is of no known format.
        ConfigError: the address is of an unknown kind; what another tool's file holds cannot be represented here, or is a
            pickle and `format` was not given.
        PluginError: its sparsity rule is not installed; the message names the distribution that wrote it.
        HubError: it cannot be fetched from the Hub.
    """
    if not is_address(address):
        return read(address, device, format)
    from saelens_lite.hub import fetch

    fetched = fetch(str(address))
    dictionary = read(fetched.folder, device, format)
    dictionary.source = str(fetched.address)
    return dictionary


def convert(
    source: str | Path,
    out: str | Path,
    format: str,
    *,
    source_format: str | None = None,
    exists: Literal["error", "overwrite"] = "error",
) -> Path:
    """The folder a dictionary, ours or another tool's, is written to in a format; "saelens_lite" is our own.

    Raises:
        PluginError: there is no such format.
        ConfigError: something cannot be represented in it.
        OutputExistsError: the folder holds something and `exists` is "error", or holds what would be lost, such as `source`.
    """
    if not is_address(source):
        refuse_inputs_in(Path(out), [Path(source)])
    writer = None if format == OWN else registry.load(format, "formats")()
    dictionary = load(source, format=source_format)
    if writer is None:
        return dictionary.save(out, exists=exists)
    return write(dictionary, out, writer, exists=exists)
