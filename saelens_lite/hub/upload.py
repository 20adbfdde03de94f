"""Publish: push dictionaries with a card to the Hugging Face Hub, and pull them by folder and revision.

```python
from saelens_lite.hub import write_card

folder = d.save("my-dictionary", exists="overwrite")
write_card("my-dictionary", d, report)  # README.md, the evaluation, two figures
```

```sh
saelens-lite card runs/topk                         # the model card; --out README.md writes it
saelens-lite push runs/topk user/repo --dry-run     # what would be sent, also without a network
saelens-lite push runs/topk user/repo               # send it, in one commit; --stores STORE also sends its labels
saelens-lite pull user/repo blocks.2.hook_resid_pre --out pulled
saelens-lite inspect hf://user/repo
```

`sl.push("runs", "user/repo")` sends every dictionary of a run in one commit: either all of them arrive, or the repository stays
as it was. The commit names the compared commit as its parent, so the Hub refuses it if the repository changed since. Pushing
the same again sends nothing. `sl.pull("user/repo", "blocks.2.hook_resid_pre", revision=…)` and the address
hf://user/repo/folder@revision fetch one dictionary, or take it from the local cache if it was fetched before. SAELens loads
published dictionaries from the same address if it has an architecture for the rule.

`sl.push(…, stores=["store"])` sends the labels of a feature store as labels.json and their scores as scores.json. The card then
says who wrote the labels, and shows their scores as quantiles beside those of the controls. Fetch a dictionary with `pull
--out`, and `sl.labels.load("pulled/labels.json", d)` reads both. A later push of the same dictionary without labels keeps those
that were published.

Log in with `hf auth login`. The token goes to the Hub and nowhere else. The Hub's answers are checked before they are used,
and every request is limited in size and time.
"""

import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from saelens_lite.dictionary import Dictionary
from saelens_lite.dictionary.folder import CONFIG_FILE, is_own_folder
from saelens_lite.errors import (
    ConfigError,
    CorruptFileError,
    HubConflictError,
    HubError,
    HubNotFoundError,
    HubUnreachableError,
)
from saelens_lite.features.info import codes_hash, weights_hash
from saelens_lite.features.labels import LABELS_FILE
from saelens_lite.features.store_files import read_info
from saelens_lite.files import MAX_JSON_BYTES, file_hash, named_file, write_file
from saelens_lite.formats import read
from saelens_lite.hub.card import (
    CARD_FILE,
    EVALUATION_FILE,
    card_files,
    evaluation_text,
    load_text,
    loads_in_sae_lens,
    stored_report,
    with_labels,
    with_section,
)
from saelens_lite.hub.download import download, fetch
from saelens_lite.hub.index import CardEntry, TableLine, index_files
from saelens_lite.hub.label_card import LABEL_FILES, PublishedLabels, labels_of, labels_text
from saelens_lite.hub_client.client import Address, bars_on_terminals_only, check_folder, client, typed_errors
from saelens_lite.hub_client.guard import Guard
from saelens_lite.hub_client.listing import RepoFile, list_files
from saelens_lite.names import is_on_hub
from saelens_lite.outputs import refuse_existing
from saelens_lite.paths import check_output
from saelens_lite.tables import Result, columns_of, grid

logger = logging.getLogger(__name__)

OWN_NAMES = (CONFIG_FILE, EVALUATION_FILE, CARD_FILE)
OWN_SUFFIXES = (".safetensors", ".png")
Source = Dictionary | str | Path


class _Ready(NamedTuple):
    """A folder of a dictionary, and the dictionary that was read from it."""

    folder: Path
    dictionary: Dictionary


class PushFile(NamedTuple):
    """A file of the repository and its planned change. Size in bytes."""

    path: str
    size: int
    sha256: str | None  # None for a deleted file
    status: Literal["new", "changed", "unchanged", "deleted", "unknown"]  # unknown: it could not be compared


@dataclass(frozen=True)
class Push(Result):
    """The result of a push, or its plan if `commit` is None."""

    repo: str
    files: tuple[PushFile, ...]
    parent: str | None  # the compared commit; None if the repository does not exist yet
    commit: str | None
    url: str
    uncompared: str = ""  # the reason why the plan was not compared with the repository; empty if it was

    @property
    def n_bytes(self) -> int:
        """Total size of the files that are new, changed, or could not be compared, in bytes."""
        return sum(file.size for file in self.files if file.status in ("new", "changed", "unknown"))

    def columns(self) -> dict[str, list[Any]]:
        """Return the files, column by column."""
        return columns_of(PushFile, self.files)

    def table(self) -> Any:
        """Return a rich table of the files."""
        rows = [(file.status, f"{file.size:,}", file.path) for file in self.files]
        return grid(("change", "bytes", "file"), rows, caption=self._outcome)

    @property
    def _outcome(self) -> str:
        what = f"commit {self.commit}" if self.commit else "nothing was sent"
        if self.uncompared:
            why = f"The files could not be compared with the repository. {self.uncompared}"
            return f"{self.url}: {self.n_bytes:,} bytes, {what}\n{why}"
        return f"{self.url}: {self.n_bytes:,} bytes new or changed, {what}"

    def __str__(self) -> str:
        lines = [f"{f.status:9} {f.size:>13,}  {f.sha256[:12] if f.sha256 else '':12}  {f.path}" for f in self.files]
        return "\n".join([*lines, self._outcome])


class _Remote(NamedTuple):
    """The files of a repository at its latest commit."""

    commit: str | None  # None if the repository does not exist
    files: dict[str, RepoFile]
    private: bool = True
    uncompared: str = ""  # the reason why its files are not known


def push(
    dictionaries: Source | Mapping[str, Source],
    repo: str,
    *,
    revision: str | None = None,
    private: bool = False,
    license: str | None = None,
    tags: Sequence[str] = (),
    message: str | None = None,
    parent_commit: str | None = None,
    dry_run: bool = False,
    out: str | Path | None = None,
    stores: Sequence[str | Path] = (),
) -> Push:
    """Push dictionaries to the Hub repository "user/name" in one commit.

    `dictionaries` is a dictionary or its folder, named after its hook; the folder of a run with several; or a mapping from
    folders in the repository to dictionaries or their folders. A folder may also be an hf:// address. Each dictionary is pushed
    with its card, eval.json and figures, and listed in the card of the repository. The repository is created if needed. Files
    that an interrupted push uploaded are not sent again. `private` is for a new repository, `license` replaces an earlier
    license, `revision` is the branch. `dry_run` sends nothing. Without a network it lists all files, as for a new repository.
    With `dry_run`, `out` is a new folder for the cards and figures, as they would be in the repository. `stores` are folders of
    feature stores; their labels, and the scores of these, are pushed with the dictionaries that they are of.

    Raises:
        ConfigError: a name is not valid, no dictionary is given, `private` is given for a public repository, `out` is given
            without `dry_run`, or a store is of another dictionary.
        OutputExistsError: `out` is not empty.
        CorruptFileError: a dictionary cannot be read.
        HubConflictError: the repository has changed since `parent_commit`, or during the comparison. Nothing was written.
        HubError: the Hub refuses or cannot be reached. The repository is unchanged, or new and empty.
    """
    Address.of(repo)
    if out is not None and not dry_run:
        raise ConfigError("out is the folder for the cards of a dry run; set dry_run, or leave out `out`")
    if out is not None:
        refuse_existing(check_output(out), "error")
    named = _named(dictionaries)
    with tempfile.TemporaryDirectory(prefix="saelens_lite-push-") as scratch:
        entries, files = _prepare(named, repo, Path(scratch), license=license, tags=tags, stores=stores)
        remote = _remote_if_reached(repo, revision) if dry_run and parent_commit is None else _remote(repo, revision)
        if parent_commit is not None and remote.commit != parent_commit:
            raise HubConflictError(
                f"{repo} is at {remote.commit or 'no commit at all'}, not at {parent_commit}; nothing was sent. "
                "Check the changes, then push with parent_commit set to the latest commit"
            )
        if remote.commit is None and not dry_run:
            _create(repo, private)
            remote = _remote(repo, revision)
        if private and not remote.private:
            raise ConfigError(
                f"{repo} exists and is public; nothing was sent. Make it private on the Hub, or leave out private"
            )
        files |= index_files(_remote_card(repo, remote), repo, entries, license=license, tags=tags)
        for entry in entries:
            if f"{entry.name}/{LABELS_FILE}" not in files:
                files |= _kept_labels(repo, remote, entry, files[f"{entry.name}/{CARD_FILE}"])
        planned = _compare(files, remote, [entry.name for entry in entries])
        if remote.uncompared:
            planned = tuple(file._replace(status="unknown") for file in planned)
        url = f"{_writer(repo).endpoint}/{repo}"
        if dry_run:
            if out is not None:
                _write_made(files, Path(out))
            return Push(repo, planned, remote.commit, None, url, remote.uncompared)
        commit = _commit(repo, revision, planned, files, remote, message or _message(list(named)))
        return Push(repo, planned, remote.commit, commit, url)


def model_card(
    dictionary: Source,
    *,
    repo: str = "user/repo",
    license: str | None = None,
    tags: Sequence[str] = (),
    stores: Sequence[str | Path] = (),
) -> str:
    """Return the model card of a dictionary, or of all dictionaries of a run, as Markdown. No network is needed.

    `dictionary` is a dictionary, its folder or address, or the folder of a run. `repo` is the repository that the card names.
    `stores` are folders of feature stores with the labels of the dictionaries.

    Raises:
        ConfigError: a name is not valid, or a store is of another dictionary.
        CorruptFileError: a dictionary cannot be read.
    """
    Address.of(repo)
    named = _named(dictionary, unnamed="dictionary")
    with tempfile.TemporaryDirectory(prefix="saelens_lite-card-") as scratch:
        entries, files = _prepare(named, repo, Path(scratch), license=license, tags=tags, stores=stores)
        if len(named) > 1:
            files = index_files(None, repo, entries, license=license, tags=tags)
        card = files[CARD_FILE if len(named) > 1 else f"{next(iter(named))}/{CARD_FILE}"]
    return card.decode() if isinstance(card, bytes) else _read_card(card)


def _write_made(files: Mapping[str, Path | bytes], out: Path) -> None:
    """Write the files that were made for the push, which are cards and figures, into a folder."""
    for name, content in files.items():
        if isinstance(content, bytes):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            write_file(out / name, lambda path, content=content: path.write_bytes(content))


def _named(dictionaries: Source | Mapping[str, Source], unnamed: str | None = None) -> dict[str, Source | _Ready]:
    """Return the dictionaries by folder in the repository. `unnamed` is the folder of one that does not name its hook."""
    if isinstance(dictionaries, Mapping):
        named = {check_folder(name): source for name, source in dictionaries.items()}
        if len(named) < len(dictionaries):
            raise ConfigError(f"two dictionaries would have the same folder: {', '.join(dictionaries)}")
    elif isinstance(dictionaries, Dictionary):
        named = {_hook_name(dictionaries, unnamed): dictionaries}
    elif is_on_hub(dictionaries):
        ready = _fetched(dictionaries)
        named = {_hook_name(ready.dictionary, unnamed): ready}
    else:
        named = _named_folders(named_file(dictionaries), unnamed)
    if not named:
        raise ConfigError("nothing to push: give at least one dictionary")
    return named


def _named_folders(folder: Path, unnamed: str | None = None) -> dict[str, Source]:
    """Return the dictionary in a folder, named after its hook, or the dictionaries of a run, named after their folders."""
    for one in (folder, folder / "dictionary"):
        if (one / CONFIG_FILE).is_file():
            return {_hook_name(read(one), unnamed): one}
    several = sorted({path.parent for pattern in ("*/", "*/dictionary/") for path in folder.glob(pattern + CONFIG_FILE)})
    if not several:
        raise CorruptFileError(f"{folder} does not hold a dictionary: it has no {CONFIG_FILE}, and neither do its folders")
    return {check_folder(path.relative_to(folder).parts[0]): path for path in several}


def _hook_name(dictionary: Dictionary, unnamed: str | None = None) -> str:
    keys = [port.key for port in dictionary.reads]
    if None in keys:
        if unnamed is not None:
            return unnamed
        raise ConfigError("the dictionary does not name its hook; name its folder: push({'name': dictionary}, …)")
    return check_folder("_and_".join(str(key).replace(":", "_") for key in keys))


def _message(names: Sequence[str]) -> str:
    """Return the default message of the commit."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"Push {', '.join(names[:5])}{more}"


def _prepare(
    named: Mapping[str, Source | _Ready],
    repo: str,
    scratch: Path,
    *,
    license: str | None,
    tags: Sequence[str],
    stores: Sequence[str | Path],
) -> tuple[list[CardEntry], dict[str, Path | bytes]]:
    """Load the dictionaries, which also checks them, and return their entries and files for the repository."""
    entries, files, of_stores = [], {}, {read_info(Path(store)).codes_sha256: Path(store) for store in stores}
    unused = dict(of_stores)
    for i, (name, source) in enumerate(named.items()):
        folder, dictionary = _loaded(source, scratch / str(i))
        folder = folder if is_own_folder(folder) else dictionary.save(scratch / str(i))  # convert another tool's files
        labels = labels_of(folder, dictionary, of_stores)
        if stores:
            unused.pop(codes_hash(dictionary), None)
        load, report = load_text(folder, dictionary, Address(repo, name)), stored_report(folder)
        card, own = _published_files(folder, dictionary, labels, license=license, tags=tags)
        card = with_section(with_section(card, "load", load), "evaluation", evaluation_text(report))
        own |= labels.write(scratch / f"{i}-labels", weights_hash(dictionary)) if labels else {}
        own[CARD_FILE] = with_labels(card, labels_text(labels)).encode()
        files |= {f"{name}/{file}": content for file, content in own.items()}
        evaluation = report.to_dict() if report else {}
        entries.append(
            CardEntry(TableLine.of(name, dictionary, evaluation), dictionary, load, loads_in_sae_lens(folder), evaluation)
        )
    if unused:
        raise ConfigError(
            f"{next(iter(unused.values()))} is the store of another dictionary; leave it out, or push that one too"
        )
    return entries, files


def _published_files(
    folder: Path, dictionary: Dictionary, labels: PublishedLabels | None, *, license: str | None, tags: Sequence[str]
) -> tuple[str, dict[str, Path | bytes]]:
    """Return the card and the other published files of a dictionary folder. A missing card is made, with figures."""
    own: dict[str, Path | bytes] = {path.name: path for path in sorted(folder.iterdir()) if _is_published(path)}
    if own.pop(CARD_FILE, None):
        return _read_card(folder / CARD_FILE), own
    made = card_files(folder, dictionary, labels=labels, license=license, tags=tags)
    return made.pop(CARD_FILE).decode(), own | made


def _read_card(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CorruptFileError(f"{path} is not UTF-8 text: {error}") from None


def _fetched(name: str | Path) -> _Ready:
    """Return a dictionary of the Hub."""
    fetched = fetch(str(name))
    return _Ready(fetched.folder, fetched.load())


def _loaded(source: Source | _Ready, scratch: Path) -> _Ready:
    """Return the folder of a dictionary and the dictionary. One in memory is saved in the folder `scratch`."""
    if isinstance(source, _Ready):
        return source
    if isinstance(source, Dictionary):
        return _Ready(source.save(scratch), source)
    if is_on_hub(source):
        return _fetched(source)
    folder = named_file(source)
    folder = folder / "dictionary" if (folder / "dictionary" / CONFIG_FILE).is_file() else folder
    return _Ready(folder, read(folder))


def _is_published(path: Path) -> bool:
    """Return whether a file belongs to a dictionary. Other files of its folder are not published."""
    return path.is_file() and not path.name.startswith(".") and (path.name in OWN_NAMES or path.suffix in OWN_SUFFIXES)


def _remote(repo: str, revision: str | None) -> _Remote:
    """Return the current files of the repository."""
    try:
        return _Remote(*list_files(repo, revision))
    except HubNotFoundError:
        if revision not in (None, "main"):
            raise
        return _Remote(None, {})


def _remote_if_reached(repo: str, revision: str | None) -> _Remote:
    """Return the current files of the repository, or none and the reason if the Hub cannot be reached."""
    try:
        return _remote(repo, revision)
    except HubUnreachableError as error:
        return _Remote(None, {}, uncompared=str(error))


def _writer(repo: str) -> HfApi:
    """Return a client for uploads, without a time limit."""
    return client(Guard(repo, hurry=False))


def _create(repo: str, private: bool) -> None:
    """Create the repository unless it already exists."""
    with typed_errors(repo):
        _writer(repo).create_repo(repo, private=private, exist_ok=True)


def _remote_card(repo: str, remote: _Remote) -> str | None:
    """Return the current card of the repository."""
    if CARD_FILE not in remote.files:
        return None
    if remote.files[CARD_FILE].size > MAX_JSON_BYTES:
        raise HubError(f"{repo}: its README.md has {remote.files[CARD_FILE].size:,} bytes, which is too large for a card")
    folder = download(repo, remote.commit, [remote.files[CARD_FILE]])
    with typed_errors(repo):
        return (folder / CARD_FILE).read_text(encoding="utf-8")


def _kept_labels(repo: str, remote: _Remote, entry: CardEntry, card: bytes) -> dict[str, bytes | Path]:
    """Return the published labels and scores of a dictionary, with its card; nothing if they are of another dictionary."""
    names = [f"{entry.name}/{name}" for name in LABEL_FILES if f"{entry.name}/{name}" in remote.files]
    if f"{entry.name}/{LABELS_FILE}" not in names:
        return {}
    folder = download(repo, remote.commit, [remote.files[name] for name in names])
    try:
        labels = PublishedLabels.read(folder / entry.name, entry.dictionary)
    except (ConfigError, CorruptFileError) as error:
        logger.warning("%s: the published labels are deleted: %s", repo, error)
        return {}
    text = with_labels(card.decode(), labels_text(labels))
    return {name: folder / name for name in names} | {f"{entry.name}/{CARD_FILE}": text.encode()}


def _compare(files: Mapping[str, Path | bytes], remote: _Remote, folders: Sequence[str]) -> tuple[PushFile, ...]:
    """Return the planned change of each file. Files of an earlier dictionary in the same folder are deleted."""
    compared = []
    for path, content in sorted(files.items()):
        there, size = remote.files.get(path), len(content) if isinstance(content, bytes) else content.stat().st_size
        sha256 = file_hash(content)
        status = "new" if there is None else "unchanged" if there.holds(content, sha256) else "changed"
        compared.append(PushFile(path, size, sha256, status))
    for path, there in sorted(remote.files.items()):
        folder, _, name = path.rpartition("/")
        if path not in files and folder in folders and (name in (*OWN_NAMES, *LABEL_FILES) or name.endswith(OWN_SUFFIXES)):
            compared.append(PushFile(path, there.size, None, "deleted"))
    return tuple(compared)


def _commit(
    repo: str,
    revision: str | None,
    planned: Sequence[PushFile],
    files: Mapping[str, Path | bytes],
    remote: _Remote,
    message: str,
) -> str:
    """Commit the planned changes. Return the commit."""
    sent = [CommitOperationAdd(f.path, files[f.path]) for f in planned if f.status in ("new", "changed")]
    operations: list[Any] = sent + [CommitOperationDelete(f.path) for f in planned if f.status == "deleted"]
    if not operations:
        return str(remote.commit)
    try:
        with typed_errors(repo), bars_on_terminals_only():
            done = _writer(repo).create_commit(
                repo, operations, commit_message=message, revision=revision, parent_commit=remote.commit
            )
        commit = done.oid
    except HubConflictError as error:
        raise HubConflictError(f"{error}. Push again; uploaded files are not sent twice") from None
    except HubUnreachableError as error:
        commit = _arrived(repo, revision, planned, files, remote, error)
    _check_arrived(repo, commit, planned, files)
    return commit


def _arrived(
    repo: str,
    revision: str | None,
    planned: Sequence[PushFile],
    files: Mapping[str, Path | bytes],
    before: _Remote,
    error: HubUnreachableError,
) -> str:
    """Return the commit if only the Hub's answer was lost. Else raise an error that says that the repository is unchanged."""
    again = f"{error}. The repository is unchanged. Push again; uploaded files are not sent twice"
    try:
        now = _remote(repo, revision)
    except HubError:
        raise HubUnreachableError(f"{error}. The commit may have arrived. Push again; if it has, nothing changes") from None
    if now.commit in (None, before.commit) or _missing(planned, files, now):
        raise HubUnreachableError(again) from None
    logger.warning("%s: the answer of the Hub was lost, but commit %s holds all files", repo, now.commit)
    return now.commit


def _check_arrived(repo: str, commit: str, planned: Sequence[PushFile], files: Mapping[str, Path | bytes]) -> None:
    """Raise if the commit lacks planned files. Rules of the repository, such as .gitignore, can exclude them."""
    try:
        arrived = _remote(repo, commit)
    except HubUnreachableError as error:
        logger.warning("commit %s was made but could not be checked: %s", commit, error)
        return
    if missing := _missing(planned, files, arrived):
        raise HubError(f"{repo}: commit {commit} lacks {', '.join(missing)}; does a .gitignore there exclude them?")


def _missing(planned: Sequence[PushFile], files: Mapping[str, Path | bytes], remote: _Remote) -> list[str]:
    """Return the planned files that are missing or different on the Hub."""

    def arrived(file: PushFile) -> bool:
        there = remote.files.get(file.path)
        return there is None if file.sha256 is None else there is not None and there.holds(files[file.path], file.sha256)

    return [file.path for file in planned if not arrived(file)]
