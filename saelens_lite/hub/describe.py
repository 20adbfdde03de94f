"""Description of a dictionary on the Hub from its settings and file headers, without downloading its weights."""

from pathlib import Path
from typing import Any

from huggingface_hub.errors import SafetensorsParsingError
from huggingface_hub.utils import SafetensorsFileMetadata

from saelens_lite.errors import CorruptFileError
from saelens_lite.files import MAX_JSON_BYTES, read_json
from saelens_lite.hub.card import EVALUATION_FILE
from saelens_lite.hub.download import CONFIG_FILES, check_sizes, choose_folder, dictionary_files, download, listing
from saelens_lite.hub_client.client import Address, client, typed_errors
from saelens_lite.hub_client.guard import Guard
from saelens_lite.hub_client.listing import RepoFile

HEADERS_OF = ".safetensors"
MAX_HEADER_BYTES = 8 << 20


def describe(address: Address | str) -> dict[str, Any]:
    """Return settings, metrics and address with commit of a dictionary, and the size, SHA-256 and tensor shapes of each file.

    Raises:
        ConfigError, HubError: as for `pull`.
        CorruptFileError: the settings cannot be read.
    """
    address = Address.parse(address) if isinstance(address, str) else address
    commit, there = listing(address)
    folder = choose_folder(address, there)
    files = dictionary_files({path: file.size for path, file in there.items()}, folder)
    settings = {path: size for path, size in files.items() if path.endswith(".json")}
    check_sizes(address, settings, max_bytes=2 * MAX_JSON_BYTES)
    pinned = Address(address.repo, folder or None, commit)
    by_name = {Path(path).name: path for path in settings}
    facts: dict[str, Any] = {}
    if settings:
        snapshot = download(address.repo, commit, [there[path] for path in settings])
        config = next((by_name[name] for name in CONFIG_FILES if name in by_name), None)
        facts = read_json(snapshot / config) if config else {}
        if EVALUATION_FILE in by_name:
            facts["eval"] = read_json(snapshot / by_name[EVALUATION_FILE]).get("metrics")
    return facts | {"address": str(pinned), "files": {Path(path).name: _file_facts(pinned, there[path]) for path in files}}


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
