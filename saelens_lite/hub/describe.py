"""Description of a dictionary on the Hub from its settings and file headers, without downloading its weights."""

from pathlib import Path
from typing import Any

from huggingface_hub.errors import SafetensorsParsingError
from huggingface_hub.utils import SafetensorsFileMetadata

from saelens_lite.errors import CorruptFileError
from saelens_lite.files import MAX_JSON_BYTES, read_json
from saelens_lite.hub.card import EVALUATION_FILE
from saelens_lite.hub.download import check_sizes, download, listing, place_of
from saelens_lite.hub.label_card import LABEL_FILES
from saelens_lite.hub.layouts import CONFIG_FILES, choose
from saelens_lite.hub_client.client import Address, client, typed_errors
from saelens_lite.hub_client.guard import Guard
from saelens_lite.hub_client.listing import RepoFile
from saelens_lite.releases import Entry

HEADERS_OF = ".safetensors"
MAX_HEADER_BYTES = 8 << 20


def describe(address: Address | str) -> dict[str, Any]:
    """Return settings, metrics and address with commit of a dictionary, and the size, SHA-256 and tensor shapes of each file.

    If the list of public releases names the dictionary, what it says is under "known".

    Raises:
        ConfigError, HubError: as for `pull`.
        CorruptFileError: the settings cannot be read.
    """
    place = place_of(address)
    address = place.address
    commit, there = listing(address)
    choice = choose(address, {path: file.size for path, file in there.items()})
    settings = {path: size for path, size in choice.files.items() if path.endswith(".json") and not path.endswith(LABEL_FILES)}
    check_sizes(address, settings, max_bytes=2 * MAX_JSON_BYTES)
    pinned = place.pinned(choice, commit)
    own = {Path(path).name: path for path in settings if path.rpartition("/")[0] == choice.folder}
    facts: dict[str, Any] = {}
    if settings:
        snapshot = download(address.repo, commit, [there[path] for path in settings])
        named = [name for name in own if name.endswith("_cfg.json")]
        config = next((own[name] for name in (*named, *CONFIG_FILES) if name in own), None)
        facts = read_json(snapshot / config) if config else {}
        if EVALUATION_FILE in own:
            facts["eval"] = read_json(snapshot / own[EVALUATION_FILE]).get("metrics")
    entry = place.entry_of(choice)
    known = {"known": _facts(entry)} if entry else {}
    files = {_name(path, choice.folder): _file_facts(pinned, there[path]) for path in choice.files}
    return facts | known | {"address": str(pinned), "files": files}


def _facts(entry: Entry) -> dict[str, Any]:
    """Return the facts of the index about a dictionary."""
    shown = {name: getattr(entry, name) for name in ("format", "rule", "width", "l0", "license")}
    return {name: value for name, value in shown.items() if value is not None} | entry.known.model_dump(exclude_defaults=True)


def _name(path: str, folder: str) -> str:
    """Return the path of a file from the folder of its dictionary; the whole path for a file above it."""
    return path.removeprefix(f"{folder}/") if folder else path


def _file_facts(address: Address, file: RepoFile) -> dict[str, Any]:
    """Return the size, the SHA-256 (if the Hub knows it) and the tensor shapes of a file. Only its header is read."""
    facts: dict[str, Any] = {"bytes": file.size}
    if file.sha256 is not None:
        facts["sha256"] = file.sha256
    if file.path.endswith(HEADERS_OF):
        header = _header(address, file.path)
        facts["tensors"] = {name: {"dtype": tensor.dtype, "shape": tensor.shape} for name, tensor in header.tensors.items()}
    return facts


def _header(address: Address, path: str) -> SafetensorsFileMetadata:
    hub = client(Guard(address.repo, MAX_HEADER_BYTES, address.revision))
    with typed_errors(address.repo):
        try:
            return hub.parse_safetensors_file_metadata(address.repo, path, revision=address.revision)
        except (SafetensorsParsingError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CorruptFileError(f"{address.repo}: {path} does not have the header of a safetensors file: {error}") from None
