"""The dictionaries in a repository, and the files that belong to each: its weights, and the settings that its reader needs.

A dictionary is a folder, or one file of a folder with many, such as layer_3.safetensors.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import NamedTuple

from saelens_lite.errors import HubNotFoundError, near_matches
from saelens_lite.hub_client.client import Address

SETTINGS = (".json", ".yaml", ".yml", ".md")
WEIGHTS = (".safetensors", ".npz", ".pt", ".pth")  # if a folder has several kinds, the first one is downloaded
CONFIG_FILES = ("cfg.json", "config.json", "hyperparams.json", "config.yaml", "conf.yaml")
CHECKPOINT = "checkpoints/final.safetensors"  # of Llama Scope's first layout, below hyperparams.json
OF_A_FOLDER = ("sae_weights.safetensors", "sae.safetensors", "ae.pt", "params.npz", "params.safetensors")  # never one of many
ONE_OF_MANY = re.compile(r"layer_?\d+\..+")
NEVER_READ = ("activations_store_state.safetensors",)
BESIDE_A_FILE = (  # settings that a single file may need, from its folder
    *("config.yaml", "wanb-config.yaml", "conf.yaml", "cfg.json", "config.json", "{stem}_cfg.json"),
    *("../hyperparams.json", "../lm_config.json"),
)
BESIDE = {  # name of a weights file → other files that belong to it, from its folder
    r"sae\.safetensors": ("../config.json", "../../config.json", "../../../config.json"),  # sparsify's settings of the run
    r"W_enc_(\d+)\.safetensors": (r"W_dec_\1.safetensors",),
}
MOST_LISTED = 20


class Choice(NamedTuple):
    """A dictionary in a repository: its path (of a file or a folder), its folder, and the files that belong to it."""

    path: str
    folder: str
    files: dict[str, int]


def choose(address: Address, files: Mapping[str, int]) -> Choice:
    """Return the dictionary at an address, or the only one of the repository. `files` are the sizes by path.

    Raises:
        HubNotFoundError: there is no such dictionary, or the address names several.
    """
    known, path = dictionaries(files), address.folder
    if path is None:
        if "" not in known and len(known) != 1:
            raise HubNotFoundError(f"{address.repo}: name the folder of the dictionary{_listed(known)}")
        path = "" if "" in known else known[0]
    if path.isdigit() and f"W_enc_{path}.safetensors" in files:  # SAELens's name of a layer of a cross-layer transcoder
        path = f"W_enc_{path}.safetensors"
    if path in files and path.endswith(WEIGHTS):
        name = PurePosixPath(path).name
        if name not in OF_A_FOLDER or name == "ae.pt":
            return _one_file(path, files)
        path = path.rpartition("/")[0]
    if path not in known:
        inside = [name for name in known if name.startswith(f"{path}/")]
        if inside:
            raise HubNotFoundError(f"{address.repo}: {path!r} holds several dictionaries; name one{_listed(inside)}")
        raise HubNotFoundError(f"{address.repo} has no dictionary {path!r}{near_matches(path, known)}{_listed(known)}")
    chosen = files_of(files, path)
    pickle = next((file for file in chosen if file.endswith((".pt", ".pth")) and file.rpartition("/")[2] != "ae.pt"), None)
    return Choice(pickle or path, path, chosen)


def dictionaries(files: Iterable[str]) -> list[str]:
    """Return the paths of the folders and files that look like dictionaries."""
    folders: dict[str, set[str]] = {}
    for path in files:
        folder, _, name = path.rpartition("/")
        folders.setdefault(folder, set()).add(name)
    paths = []
    for folder, names in folders.items():
        weights = _weights(names)
        many = _many(names, weights)
        is_whole = not names.isdisjoint(CONFIG_FILES) or not weights[0].endswith(".safetensors") if weights else False
        if "hyperparams.json" in names and "final.safetensors" in folders.get(_joined(folder, "checkpoints"), ()):
            paths.append(folder)
        elif many:
            paths += [_joined(folder, name) for name in many]
        elif is_whole:
            paths.append(folder)
    return sorted(paths)


def files_of(files: Mapping[str, int], folder: str) -> dict[str, int]:
    """Return the files that belong to the dictionary in a folder, and the card."""
    names = {path.rpartition("/")[2] for path in files if path.rpartition("/")[0] == folder}
    weights = _weights(names)
    chosen = [_joined(folder, name) for name in names if name.endswith(SETTINGS)]
    if "hyperparams.json" in names and _joined(folder, CHECKPOINT) in files:
        chosen.append(_joined(folder, CHECKPOINT))
    else:
        chosen += [_joined(folder, name) for name in weights]
    for name in weights:
        chosen += _beside(_joined(folder, name), files)
    return {path: files[path] for path in sorted(set(chosen))}


def _one_file(path: str, files: Mapping[str, int]) -> Choice:
    """Return the choice of one file with the settings that it may need."""
    folder, _, name = path.rpartition("/")
    stem = name.rpartition(".")[0]
    others = [_resolved(folder, other.replace("{stem}", stem)) for other in BESIDE_A_FILE]
    chosen = sorted({path, *(other for other in others if other in files), *_beside(path, files)})
    above = next((other.rpartition("/")[0] for other in chosen if other.rpartition("/")[2] == "hyperparams.json"), None)
    is_checkpoint = above is not None and path == _joined(above, CHECKPOINT)
    return Choice(above if is_checkpoint else path, above if is_checkpoint else folder, {one: files[one] for one in chosen})


def _beside(path: str, files: Mapping[str, int]) -> list[str]:
    """Return the files that belong to a weights file by its name."""
    folder, _, name = path.rpartition("/")
    matches = ((re.fullmatch(pattern, name), others) for pattern, others in BESIDE.items())
    wanted = [_resolved(folder, match.expand(other)) for match, others in matches if match for other in others]
    return [other for other in wanted if other in files]


def _weights(names: Iterable[str]) -> list[str]:
    """Return the weights files of a folder: those of the first kind that it has."""
    usable = sorted(name for name in names if name not in NEVER_READ)
    kind = next((kind for kind in WEIGHTS if any(name.endswith(kind) for name in usable)), None)
    if kind == ".pt" and "ae.pt" in usable:
        return ["ae.pt"]
    return [name for name in usable if kind is not None and name.endswith(kind)]


def _many(names: set[str], weights: list[str]) -> list[str]:
    """Return the weights files of a folder if each is a dictionary of its own."""
    if not names.isdisjoint(OF_A_FOLDER):
        return []
    with_settings = [name for name in weights if f"{name.rpartition('.')[0]}_cfg.json" in names]
    numbered = [name for name in weights if ONE_OF_MANY.fullmatch(name)]
    if len(weights) > 1 and not weights[0].endswith(".safetensors"):
        return weights
    return next((several for several in (numbered, with_settings) if len(several) > 1), [])


def _joined(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _resolved(folder: str, name: str) -> str | None:
    """Return a path relative to a folder, or None if it leads out of the repository."""
    parts = folder.split("/") if folder else []
    while name.startswith("../"):
        if not parts:
            return None
        parts, name = parts[:-1], name.removeprefix("../")
    return "/".join([*parts, name])


def _listed(known: list[str]) -> str:
    more = f" and {len(known) - MOST_LISTED} more" if len(known) > MOST_LISTED else ""
    return f"; it has {', '.join(name or '(its root)' for name in known[:MOST_LISTED]) or 'none'}{more}"
