"""Load and convert dictionaries: a local folder or file, an address hf://user/repo/folder@revision, or a public name.

The folder of a run stands for the dictionary in it.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch

from saelens_lite import registry
from saelens_lite.dictionary import Dictionary
from saelens_lite.dictionary.folder import CONFIG_FILE, OWN
from saelens_lite.errors import ConfigError
from saelens_lite.formats import read, write
from saelens_lite.kinds import is_run, listed, runs_in
from saelens_lite.names import is_on_hub, no_such
from saelens_lite.outputs import refuse_inputs_in, restore
from saelens_lite.paths import check_input


def load(address: str | Path, device: str | torch.device = "cpu", format: str | None = None, **settings: Any) -> Dictionary:
    """Return the dictionary at an address. Its `source` is the address; of the Hub, with the commit.

    The dictionary stays on the CPU unless `device` is given. Functions that get a model as well use the model's device.

    Args:
        address: a folder written by `Dictionary.save`, the folder of a finished run, or a file or folder of another tool; a
            dictionary on the Hub, hf://user/repo/folder@revision; or a dictionary of a public release, release/id, such as
            gpt2-small-res-jb/blocks.8.hook_resid_pre. A file or folder of this computer comes first.
        format: name of the format plugin, or "saelens_lite"; only needed for pickles, except those of a public release.
            "state_dict" reads a file of tensors that no tool describes.
        settings: with format="state_dict", rule=, options=, hook= and the other arguments of `Dictionary.from_tensors`; see
            `saelens_lite.formats.read_state_dict`. For files of other tools, facts that they do not state: hook=, and
            models={"base": "google/gemma-2-2b", "chat": "google/gemma-2-2b-it"} for the ports of a crosscoder, in their order;
            hook="chat-base:…" for a dictionary of differences; scale=; the other fields of `saelens_lite.formats.Known`.

    Raises:
        CorruptFileError: a file is missing or damaged, contradicts another file, or has no known format; or the address is
            neither a path nor the name of a public dictionary.
        ConfigError: the address is of an unknown kind; another tool's file holds something that cannot be represented here,
            or is a pickle and `format` was not given; the folder holds several runs, or a run that is not finished.
        PluginError: the sparsity rule is not installed; the message names the distribution that supplies it.
        HubError: the files cannot be fetched from the Hub.
    """
    if is_on_hub(address):
        from saelens_lite.hub import fetch

        return fetch(str(address)).load(device, format, settings)
    folder = Path(dictionary_folder(address))
    if not folder.exists():
        raise no_such(folder)
    dictionary = read(folder, device, format, settings=settings)
    dictionary.source = str(address)
    return dictionary


def dictionary_folder(address: str | Path) -> str | Path:
    """Return the folder of the dictionary in the folder of a run. Other addresses and names are returned unchanged.

    Raises:
        ConfigError: the folder holds several runs, or a run that is not finished.
    """
    if is_on_hub(address):
        return address
    folder = check_input(address)
    restore(folder)
    if os.path.lexists(folder / CONFIG_FILE) or not folder.is_dir():
        return address
    if os.path.lexists(folder / "dictionary" / CONFIG_FILE):
        return folder / "dictionary"
    if is_run(folder):
        from saelens_lite.training import Run

        raise ConfigError(f"{folder} has no dictionary: {Run.load(folder).what_next}")
    if several := runs_in(folder):
        raise ConfigError(f"{folder} holds {listed(several)}; choose one of them")
    return address


def dictionary_folders(addresses: Iterable[str | Path]) -> list[str | Path]:
    """Return the folder of each dictionary. A folder with several runs stands for the dictionaries in all of them.

    Raises:
        ConfigError: a run is not finished.
    """
    folders: list[str | Path] = []
    for address in addresses:
        is_local = not is_on_hub(address) and not os.path.lexists(Path(address) / CONFIG_FILE)
        runs = runs_in(check_input(address)) if is_local else []
        folders += [dictionary_folder(one) for one in runs or [address]]
    return folders


def convert(
    source: str | Path,
    out: str | Path,
    format: str,
    *,
    source_format: str | None = None,
    exists: Literal["error", "overwrite"] = "error",
) -> Path:
    """Write a dictionary in another format, and return the folder.

    Args:
        source: address of the dictionary; see `load`.
        format: name of the format to write; "saelens_lite" is our own.
        source_format: name of the format to read; see `load`.

    Raises:
        PluginError: there is no such format.
        ConfigError: the format cannot represent a part of the dictionary.
        OutputExistsError: the folder is not empty and `exists` is "error"; or it holds files that would be lost, such as
            `source`.
    """
    if not is_on_hub(source):
        refuse_inputs_in(Path(out), [Path(source)])
    writer = None if format == OWN else registry.load(format, "formats")()
    dictionary = load(source, format=source_format)
    if writer is None:
        return dictionary.save(out, exists=exists)
    return write(dictionary, out, writer, exists=exists)
