"""Download of a dictionary from the Hub: only its own files, from one commit, within a size limit."""

import glob
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from huggingface_hub import try_to_load_from_cache

from saelens_lite import registry
from saelens_lite.dictionary import Dictionary
from saelens_lite.dictionary.folder import CONFIG_FILE, PLUGIN_FILE, SPARSITY_FILE, WEIGHTS_FILE
from saelens_lite.errors import ConfigError, HubError, HubNotFoundError, HubUnreachableError, near_matches
from saelens_lite.files import MAX_JSON_BYTES, write_text
from saelens_lite.formats import Known, read
from saelens_lite.hub.layouts import CONFIG_FILES, SETTINGS, Choice, choose, dictionaries
from saelens_lite.hub_client.client import Address, bars_on_terminals_only, client, typed_errors
from saelens_lite.hub_client.guard import Guard
from saelens_lite.hub_client.listing import RepoFile, list_files, revisions
from saelens_lite.kinds import DICTIONARY as KIND
from saelens_lite.names import public
from saelens_lite.outputs import new_folder
from saelens_lite.paths import is_address
from saelens_lite.releases import Entry, entry_at

logger = logging.getLogger(__name__)

MAX_BYTES = 32 << 30
MAX_FILES = 1000  # per dictionary
UNREADABLE = {"temporal": "is a temporal dictionary: its codes depend on earlier tokens, which cannot be read here"}
DICTIONARY_FILES = (CONFIG_FILE, WEIGHTS_FILE, SPARSITY_FILE, PLUGIN_FILE)


class Fetched(NamedTuple):
    """A dictionary of the Hub in the local cache.

    address: With the commit, so that it always gives the same bytes.
    path: The file or folder to read; in `folder`, or `folder` itself.
    files: Its files below `folder`. Settings above the folder are in the cache, but not in this list.
    known: Facts from the list of public releases, if it lists the dictionary.
    format: Its format, if the list of public releases says that it is a pickle.
    """

    folder: Path
    address: Address
    path: Path
    files: tuple[str, ...]
    known: Known | None = None
    format: str | None = None

    def load(
        self,
        device: str | torch.device = "cpu",
        format: str | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> Dictionary:
        """Return the dictionary. Raise as `saelens_lite.load` does."""
        dictionary = read(self.path, device, format or self.format, self.known, settings)
        dictionary.source = str(self.address)
        logger.info("%s: trained on %s; saelens_lite.model_for loads that model so", self.address, dictionary.trained_on)
        return dictionary


class HubPlace(NamedTuple):
    """The address of a dictionary, and its entry in the index of public dictionaries if it was named by that."""

    address: Address
    entry: Entry | None = None

    def entry_of(self, choice: Choice) -> Entry | None:
        """Return the entry of the chosen files in the index."""
        paths = dict.fromkeys((self.address.folder or "", choice.path, choice.folder))
        return self.entry or next(filter(None, (entry_at(self.address.repo, path) for path in paths)), None)

    def pinned(self, choice: Choice, commit: str) -> Address:
        """Return the address of the chosen files at a commit."""
        return Address(self.address.repo, self.address.folder or choice.path or None, commit)


def pull(
    repo: str,
    folder: str | None = None,
    *,
    revision: str | None = None,
    device: str | torch.device = "cpu",
    max_bytes: int = MAX_BYTES,
    format: str | None = None,
) -> Dictionary:
    """Load a dictionary of a Hub repository or of a public release. Its `source` is the address with the commit.

    `folder` is the dictionary's folder, or its file if a folder holds many; it may be left out if the repository holds one
    dictionary. `revision` is a branch, a tag or a commit. Downloaded files come from huggingface_hub's cache, also without a
    network. `format` names the format plugin; it is needed only for pickles of other tools that no public release lists.

    Raises:
        ConfigError: `repo` or `folder` is not a valid name, or the file is a pickle and `format` was not given.
        HubError: the dictionary does not exist, may not be read, cannot be reached, or is larger than `max_bytes`.
        CorruptFileError: the files are not a dictionary, or do not fit their settings.
    """
    return fetch(named_place(repo, folder, revision), max_bytes=max_bytes).load(device, format)


def named_place(repo: str, folder: str | None = None, revision: str | None = None) -> Address | str:
    """Return the address of a dictionary in a repository, or the name of a public dictionary.

    Raises:
        ConfigError: `repo` or `folder` is not a valid name, or is given beside a complete address.
        HubNotFoundError: as `public`.
    """
    if is_address(repo):
        if folder or revision:
            raise ConfigError(f"{repo} is a complete address; leave out the folder and the revision")
        return repo
    name = f"{repo}/{folder}" if folder else repo
    return name if revision is None and public(name) else Address.of(repo, folder, revision)


def fetch(address: Address | str, *, max_bytes: int = MAX_BYTES) -> Fetched:
    """Download the files of a dictionary into the local cache, all from one commit.

    Args:
        address: Address, or name of a public dictionary.

    Raises:
        ConfigError, HubError: as `pull`.
    """
    place = place_of(address)
    _check_readable(place)
    try:
        snapshot, choice = _from_hub(place.address, max_bytes)
    except HubUnreachableError as error:
        snapshot, choice = _from_cache(place.address, error)
        logger.warning("%s: the Hub cannot be reached; using the cache: %s", place.address, snapshot.name)
    entry, pinned = place.entry_of(choice), place.pinned(choice, snapshot.name)
    prefix = f"{choice.folder}/" if choice.folder else ""
    return Fetched(
        snapshot / choice.folder,
        pinned,
        snapshot / choice.path,
        tuple(path.removeprefix(prefix) for path in choice.files if path.startswith(prefix)),
        entry.known if entry else None,
        entry.format if entry and _is_pickled(entry.format) else None,
    )


def place_of(address: Address | str) -> HubPlace:
    """Return the place that an address or the name of a public dictionary stands for.

    Raises:
        ConfigError: the text is neither.
        HubNotFoundError: the text names a public release that has no such dictionary.
    """
    if isinstance(address, Address):
        return HubPlace(address)
    entry = public(address)
    return HubPlace(entry.address, entry) if entry else HubPlace(Address.parse(address))


def _is_installed(format_name: str) -> bool:
    return any(plugin.name == format_name for plugin in registry.plugins("formats"))


def _is_pickled(format_name: str) -> bool:
    """Return whether the files of a format are pickles; False if the format is not installed."""
    return _is_installed(format_name) and registry.load(format_name, "formats").pickled


def _check_readable(place: HubPlace) -> None:
    """Raise ConfigError if the index says that a dictionary has a format that no plugin reads."""
    entry = place.entry or entry_at(place.address.repo, place.address.folder or "")
    if entry and not _is_installed(entry.format):
        why = UNREADABLE.get(entry.format, f"has the format {entry.format}, which no installed plugin reads")
        raise ConfigError(f"{entry.name} {why}; nothing was fetched")


def copy_to(
    fetched: Fetched, out: Path, exists: Literal["error", "overwrite"] = "error", loaded: Dictionary | None = None
) -> Path:
    """Copy the files of a fetched dictionary to the folder `out`. The folder appears complete or not at all.

    If the dictionary is of another tool and the index has facts about it, the files alone would lack these. Then `loaded`, the
    dictionary read from them, is written as `Dictionary.save` does.

    Raises:
        OutputExistsError: `out` is not empty and `exists` is "error".
    """
    if fetched.known is not None:
        loaded = loaded or fetched.load()
        if "read_from" in loaded.training_record:
            logger.info("%s: written in saelens_lite's own format, with the facts of the index", out)
            return loaded.save(out, exists=exists)
    with new_folder(out, KIND, exists, any_format=True) as folder:
        for name in fetched.files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(fetched.folder / name, folder / name)
    return out


def _from_hub(address: Address, max_bytes: int) -> tuple[Path, Choice]:
    """Fetch the dictionary from the Hub. Return the folder of the commit in the cache, and the files."""
    commit, there = listing(address)
    choice = choose(address, {path: file.size for path, file in there.items()})
    check_sizes(address, choice.files, max_bytes)
    snapshot = download(address.repo, commit, [there[path] for path in choice.files])
    _note_revision(snapshot, address.revision or "main")
    return snapshot, choice


def download(repo: str, commit: str, files: Sequence[RepoFile]) -> Path:
    """Download the files of a commit that are not in the cache yet. Return their folder in the cache.

    The settings come last, so that an interrupted download does not look like a dictionary.

    Raises:
        HubError: the Hub sends other files than it lists, or cannot be reached.
    """
    snapshot = None
    for file in sorted(files, key=lambda file: (_names_settings(file.path), file.path.count("/"))):
        cached = isinstance(try_to_load_from_cache(repo, file.path, revision=commit), str)
        hub = client(Guard(repo, file.size, commit))
        with typed_errors(repo), bars_on_terminals_only():
            path = Path(hub.hf_hub_download(repo, file.path, revision=commit))
        snapshot = Path(str(path).removesuffix(str(Path(file.path))))
        _check_download(repo, path, file, snapshot, cached)
    if snapshot is None:
        raise HubError(f"{repo}: the list of files to fetch is empty")
    return snapshot


def _names_settings(path: str) -> bool:
    return path.endswith((*CONFIG_FILES, "_cfg.json"))


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


def _from_cache(address: Address, why: HubUnreachableError) -> tuple[Path, Choice]:
    """Return the dictionary from the cache, as `_from_hub` does. Raise `why` if it is incomplete there."""

    def snapshot(*needed: str) -> Path:
        revision = address.revision
        return Path(hub.snapshot_download(address.repo, revision=revision, allow_patterns=[*needed], local_files_only=True))

    hub = client(Guard(address.repo))
    try:
        with typed_errors(address.repo):
            cached = snapshot()
            files = {p.relative_to(cached).as_posix(): p.stat().st_size for p in cached.rglob("*") if p.is_file()}
            choice = choose(address, files)
            own = (f"{choice.folder}/{name}".lstrip("/") for name in DICTIONARY_FILES if choice.path == choice.folder)
            snapshot(*map(glob.escape, (*own, *choice.files)))  # raises if one is missing
    except HubNotFoundError as error:
        raise (HubUnreachableError(f"{why}. In the cache: {error}") if dictionaries(files) else why) from None
    except HubError:
        raise why from None
    return cached, choice


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
