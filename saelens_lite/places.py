"""Where a dictionary lies: a folder, or an address such as hf://user/repo/folder@revision whose folder is fetched first.

What talks to the Hub is found by name when it is needed, so that what stands low in the tree can ask it.
"""

import re
from importlib import import_module
from pathlib import Path
from typing import Any

from saelens_lite.errors import ConfigError
from saelens_lite.files import named_file

SCHEMES = {"hf": "saelens_lite.hub"}  # scheme → the module whose `fetch` and `describe` take such addresses
_ADDRESS = re.compile(r"([a-z][a-z0-9+]+):/{1,2}(.+)")  # pathlib makes one slash of two


def is_address(path: str | Path) -> bool:
    """Whether it is an address rather than a folder."""
    return _ADDRESS.fullmatch(str(path)) is not None


def local_folder(path: str | Path) -> tuple[Path, str | None]:
    """The folder to read, and for an address the one that gives the same bytes at any time; None for a folder.

    Raises:
        ConfigError: an address of a kind that is not known.
        HubError: it cannot be fetched.
    """
    if not is_address(path):
        return named_file(path), None
    folder, pinned = _ask(path, "fetch")
    return folder, str(pinned)


def describe(address: str | Path) -> dict[str, Any]:
    """What the dictionary at an address is, without its weights.

    Raises:
        ConfigError: an address of a kind that is not known.
        HubError: it cannot be asked for.
    """
    return _ask(address, "describe")


def _ask(address: str | Path, function: str) -> Any:
    """What the module for addresses of this kind says."""
    scheme, rest = _ADDRESS.fullmatch(str(address)).groups()
    if scheme not in SCHEMES:
        known = " or ".join(f"{scheme}://…" for scheme in SCHEMES)
        raise ConfigError(f"{address}: {scheme}:// is not known; give a folder or {known}")
    return getattr(import_module(SCHEMES[scheme]), function)(f"{scheme}://{rest}")


def find_model(name: str, revision: str | None = None) -> tuple[str, bool]:
    """The commit that a revision of a model on the Hub stands for, and whether only the cache has its files.

    Raises:
        HubUnreachableError: the Hub cannot be reached, and the cache does not have the model.
        HubError: it has no such model, or shows it to nobody without a token.
    """
    return import_module("saelens_lite.hub.models").find_model(name, revision)
