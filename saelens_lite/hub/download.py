"""Download of a dictionary from the Hub: only its own files, from one commit, within a size limit."""

import glob
import logging
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

import torch
from huggingface_hub import try_to_load_from_cache

from saelens_lite.dictionary import Dictionary
from saelens_lite.dictionary.folder import CONFIG_FILE, PLUGIN_FILE, SPARSITY_FILE, WEIGHTS_FILE
from saelens_lite.errors import ConfigError, HubError, HubNotFoundError, HubUnreachableError, near_matches
from saelens_lite.files import MAX_JSON_BYTES, named_file, write_text
from saelens_lite.formats import read
from saelens_lite.hub_client.client import Address, bars_on_terminals_only, client, typed_errors
from saelens_lite.hub_client.guard import Guard
from saelens_lite.hub_client.listing import RepoFile, list_files, revisions
from saelens_lite.kinds import DICTIONARY as KIND
from saelens_lite.outputs import new_folder
from saelens_lite.paths import is_address

logger = logging.getLogger(__name__)

MAX_BYTES = 32 << 30
MAX_FILES = 1000  # per dictionary
SETTINGS = (".json", ".yaml", ".yml", ".md")
WEIGHTS = (".safetensors", ".npz", ".pt")  # if a folder has several kinds, the first one is downloaded
CONFIG_FILES = ("cfg.json", "config.json", "config.yaml")
DICTIONARY_FILES = (CONFIG_FILE, WEIGHTS_FILE, SPARSITY_FILE, PLUGIN_FILE)


class Fetched(NamedTuple):
    """A dictionary of the Hub in the local cache, and its address with the commit, which always gives the same bytes."""

    folder: Path
    address: Address


def pull(
    repo: str,
    folder: str | None = None,
    *,
    revision: str | None = None,
    device: str | torch.device = "cpu",
    max_bytes: int = MAX_BYTES,
    format: str | None = None,
) -> Dictionary:
    """Load the dictionary in a folder of a Hub repository. Its `source` is the address with the commit.

    `folder` may be left out if the repository holds one dictionary. `revision` is a branch, a tag or a commit. Downloaded files
    come from huggingface_hub's cache, also without a network. `format` names the format plugin; it is needed only for another
    tool's pickles.

    Raises:
        ConfigError: `repo` or `folder` is not a valid name, or the file is a pickle and `format` was not given.
        HubError: the dictionary does not exist, may not be read, cannot be reached, or is larger than `max_bytes`.
        CorruptFileError: the files are not a dictionary, or do not fit their settings.
    """
    fetched = fetch(Address.of(repo, folder, revision), max_bytes=max_bytes)
    dictionary = read(fetched.folder, device, format)
    dictionary.source = str(fetched.address)
    return dictionary


def fetch(address: Address | str, *, max_bytes: int = MAX_BYTES) -> Fetched:
    """Download the files of a dictionary into the local cache, all from one commit.

    Raises:
        ConfigError, HubError: as `pull`.
    """
    address = Address.parse(address) if isinstance(address, str) else address
    try:
        return _from_hub(address, max_bytes)
    except HubUnreachableError as error:
        cached = _from_cache(address, error)
        logger.warning("%s: the Hub cannot be reached; using the cache: %s", address, cached.address)
        return cached


def local_folder(path: str | Path) -> Path:
    """Return a folder of this computer as it is, and for an address the folder of the cache that it was fetched to.

    Raises:
        ConfigError, HubError: as `pull`.
    """
    return fetch(str(path)).folder if is_address(path) else named_file(path)


def copy_to(fetched: Fetched, out: Path, exists: Literal["error", "overwrite"] = "error") -> Path:
    """Copy the files of a fetched dictionary to the folder `out`. The folder appears complete or not at all.

    Raises:
        OutputExistsError: `out` is not empty and `exists` is "error".
    """
    names = dictionary_files({path.name: path.stat().st_size for path in fetched.folder.iterdir() if path.is_file()}, "")
    with new_folder(out, KIND, exists, any_format=True) as folder:
        for name in names:
            shutil.copyfile(fetched.folder / name, folder / name)
    return out


def _from_hub(address: Address, max_bytes: int) -> Fetched:
    """Fetch the dictionary from the Hub."""
    commit, there = listing(address)
    files = {path: file.size for path, file in there.items()}
    folder = choose_folder(address, files)
    chosen = dictionary_files(files, folder)
    check_sizes(address, chosen, max_bytes)
    snapshot = download(address.repo, commit, [there[path] for path in chosen])
    _note_revision(snapshot, address.revision or "main")
    return Fetched(snapshot / folder, Address(address.repo, folder or None, commit))


def download(repo: str, commit: str, files: Sequence[RepoFile]) -> Path:
    """Download the files of a commit that are not in the cache yet. Return their folder in the cache.

    The settings come last, so that an interrupted download does not look like a dictionary.

    Raises:
        HubError: the Hub sends other files than it lists, or cannot be reached.
    """
    snapshot = None
    for file in sorted(files, key=lambda file: PurePosixPath(file.path).name in CONFIG_FILES):
        cached = isinstance(try_to_load_from_cache(repo, file.path, revision=commit), str)
        hub = client(Guard(repo, file.size, commit))
        with typed_errors(repo), bars_on_terminals_only():
            path = Path(hub.hf_hub_download(repo, file.path, revision=commit))
        snapshot = Path(str(path).removesuffix(str(Path(file.path))))
        _check_download(repo, path, file, snapshot, cached)
    if snapshot is None:
        raise HubError(f"{repo}: the list of files to fetch is empty")
    return snapshot


def _check_download(repo: str, path: Path, file: RepoFile, snapshot: Path, cached: bool) -> None:
    """Raise unless a file is in the cache with the listed size. For a new file, also compare its hash with the listing."""
    target = path.resolve()
    if not target.is_relative_to(snapshot.parents[2].resolve()):
        raise HubError(f"{path} leads out of the cache, to {target}; delete it and fetch it again")
    if target.stat().st_size != file.size:
        raise HubError(f"{path} does not have the {file.size:,} bytes that the Hub announces; delete it and fetch it again")
    if not cached and not file.holds(target):
        path.unlink()
        target.unlink(missing_ok=True)
        raise HubError(f"{repo}: {file.path} does not match the hash that the Hub lists, so it was deleted; fetch it again")


def _note_revision(snapshot: Path, revision: str) -> None:
    """Record in the cache the commit of a branch or tag, as huggingface_hub does, for use without a network."""
    if revision == snapshot.name:
        return
    ref = snapshot.parents[1] / "refs" / revision
    try:
        if not ref.is_file() or ref.read_text(encoding="utf-8") != snapshot.name:
            ref.parent.mkdir(parents=True, exist_ok=True)
            write_text(ref, snapshot.name)
    except OSError as error:  # a read-only cache can still be used
        logger.warning("%s cannot be written: %s", ref, error)


def _from_cache(address: Address, why: HubUnreachableError) -> Fetched:
    """Return the dictionary from the cache. Raise `why` if it is incomplete there."""

    def snapshot(*needed: str) -> Path:
        revision = address.revision
        return Path(hub.snapshot_download(address.repo, revision=revision, allow_patterns=[*needed], local_files_only=True))

    hub = client(Guard(address.repo))
    try:
        with typed_errors(address.repo):
            cached = snapshot()
            files = {p.relative_to(cached).as_posix(): p.stat().st_size for p in cached.rglob("*") if p.is_file()}
            folder = choose_folder(address, files)
            snapshot(*(glob.escape(f"{folder}/{name}".lstrip("/")) for name in DICTIONARY_FILES))  # raises if one is missing
    except HubNotFoundError as error:
        raise (HubUnreachableError(f"{why}. In the cache: {error}") if dictionary_folders(files) else why) from None
    except HubError:
        raise why from None
    return Fetched(cached / folder, Address(address.repo, folder or None, cached.name))


def listing(address: Address) -> tuple[str, dict[str, RepoFile]]:
    """Return the commit of a revision and its files by path."""
    try:
        listed = list_files(address.repo, address.revision)
        return listed.commit, listed.files
    except HubNotFoundError:
        raise _no_such_revision(address) from None


def _no_such_revision(address: Address) -> HubNotFoundError:
    """Return the error for a revision that does not exist. Raise if the repository does not exist either."""
    names = revisions(address.repo)
    hint = near_matches(address.revision or "main", names) or f"; it has {', '.join(names[:20]) or 'none'}"
    return HubNotFoundError(f"{address.repo} has no revision {address.revision or 'main'!r}{hint}")


def dictionary_folders(files: Iterable[str]) -> list[str]:
    """Return the folders that look like dictionaries: they hold settings and weights, or weights that need no settings."""
    suffixes: dict[str, set[str]] = {}
    for path in map(PurePosixPath, files):
        endings = suffixes.setdefault("" if str(path.parent) == "." else str(path.parent), set())
        endings.add("settings" if path.name in CONFIG_FILES else path.suffix)
    settings, alone = "settings", (".npz", ".pt")
    return sorted(
        folder
        for folder, endings in suffixes.items()
        if (settings in endings and endings.intersection(WEIGHTS)) or endings.intersection(alone)
    )


def choose_folder(address: Address, files: Iterable[str]) -> str:
    """Return the folder asked for, or the only folder with a dictionary."""
    known = dictionary_folders(files)
    listed = "; it has " + (", ".join(name or "(its root)" for name in known[:20]) or "none")
    listed += f" and {len(known) - 20} more" if len(known) > 20 else ""
    if address.folder is None:
        if "" in known or len(known) == 1:
            return "" if "" in known else known[0]
        raise HubNotFoundError(f"{address.repo}: name the folder of the dictionary{listed}")
    if address.folder not in known:
        close = near_matches(address.folder, known)
        raise HubNotFoundError(f"{address.repo} has no dictionary {address.folder!r}{close}{listed}")
    return address.folder


def dictionary_files(files: dict[str, int], folder: str) -> dict[str, int]:
    """Return the files of a folder that belong to its dictionary, and the card."""
    own = {path: size for path, size in files.items() if path.rpartition("/")[0] == folder}
    kind = next((suffix for suffix in WEIGHTS if any(path.endswith(suffix) for path in own)), WEIGHTS[0])
    return {path: size for path, size in sorted(own.items()) if path.endswith((*SETTINGS, kind))}


def check_sizes(address: Address, files: dict[str, int], max_bytes: int) -> None:
    """Raise before the download if the files are too many or too large."""
    if max_bytes < 1:
        raise ConfigError(f"max_bytes = {max_bytes}; expected a positive number")
    if len(files) > MAX_FILES:
        raise HubError(f"{address} has {len(files):,} files; a dictionary may have at most {MAX_FILES:,}")
    if len({path.casefold() for path in files}) < len(files):
        raise HubError(f"{address} has files whose names differ only in case, which some disks cannot store")
    for path, size in files.items():
        if path.endswith(SETTINGS) and size > MAX_JSON_BYTES:
            raise HubError(f"{address.repo}: {path} has {size:,} bytes; that is too large for a settings file")
    if sum(files.values()) > max_bytes:
        raise HubError(f"{address} has {sum(files.values()):,} bytes, more than max_bytes = {max_bytes:,}; nothing was fetched")
