"""Captures of several models of which one is in memory at a time.

Each model's activations are captured into a cache of their own, parts/0, parts/1, … in the folder of the unfinished capture.
Then the shards are joined one by one, which frees those of the parts. A shard that exists in shards/ is complete.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from saelens_lite.cache.shards import MANIFEST, SHARDS, Shard, check_size, chunk_checksums, read_chunks, write_shard
from saelens_lite.cache.stored import Manifest
from saelens_lite.errors import CorruptFileError, SourceChangedError
from saelens_lite.files import MAX_LIST_BYTES, file_hash, read_json
from saelens_lite.model import Models, ModelsInTurn
from saelens_lite.ports import split_key
from saelens_lite.processes import Team
from saelens_lite.progress import progress_bar
from saelens_lite.schemas import checked
from saelens_lite.tensor_files import DTYPES

PARTS = "parts"
log = logging.getLogger(__name__)


def capture_parts(
    lm: ModelsInTurn, keys: Sequence[str], folder: Path, team: Team, capture: Callable[[Models, list[str], Path], Any]
) -> bool:
    """Capture the activations of each model, and return whether any was not complete before.

    The last model comes first, because it is still in memory.

    capture: writes the activations at some keys into a cache.
    """
    any_is_new = False
    for number, name in reversed([*enumerate(lm.models)]):
        own, place = [key for key in keys if split_key(key).model == name], folder / PARTS / str(number)
        if own and not team.tell((place / MANIFEST).exists()):
            log.info("running %s = %s over the text", name, lm.models[name].name)
            lm.run_with(name, lambda part, own=own, place=place: capture(part, own, place))
            any_is_new = True
    return any_is_new


def joined(lm: ModelsInTurn, keys: Sequence[str], folder: Path, text_sha256: Callable[[], str] | None) -> dict[str, Any]:
    """Join the caches of the models into shards/, and return its manifest. Repeat an interrupted call to resume it.

    text_sha256: returns the hash of the token rows, for parts that are all of an earlier call.

    Raises:
        SourceChangedError: the text changed between two models.
        CorruptFileError: a part is damaged.
    """
    places = sorted((folder / PARTS).glob("[0-9]*"), key=lambda place: int(place.name))
    manifests = [read_json(place / MANIFEST, MAX_LIST_BYTES, finite=True) for place in places]
    for place, manifest in zip(places, manifests, strict=True):
        checked(place / MANIFEST, manifest, Manifest)
    first = manifests[0]
    texts = {(manifest["text_sha256"], manifest["n_rows"]) for manifest in manifests}
    if len(texts) > 1 or (text_sha256 is not None and text_sha256() != first["text_sha256"]):
        raise SourceChangedError(f"the text changed after the first model had read it; delete {folder} and repeat the call")
    (folder / SHARDS).mkdir(exist_ok=True)
    for path in (folder / SHARDS).glob(".*"):  # left by a killed process
        path.unlink()
    shards = []
    with progress_bar("join", sum(entry["n_tokens"] for entry in first["shards"])) as advance:
        for entry in first["shards"]:
            shards.append(_joined_shard(folder / SHARDS / entry["file"], entry["n_tokens"], places, manifests))
            advance(entry["n_tokens"], "")
    of_hooks = {key: entry for manifest in manifests for key, entry in manifest["hooks"].items()}
    origin = first["origin"] | {"models": [facts.model_dump(mode="json") for facts in lm.facts]}
    return first | {"origin": origin, "hooks": {key: of_hooks[key] for key in keys}, "shards": shards}


def _joined_shard(path: Path, n_tokens: int, places: list[Path], manifests: list[dict[str, Any]]) -> dict[str, Any]:
    """Write a shard from those of the parts, unless it exists. Delete those, and return its manifest entry."""
    parts = [place / path.name for place in places]
    if path.exists():
        facts = {"file": path.name, "n_tokens": n_tokens, "bytes": path.stat().st_size, "sha256": file_hash(path)}
    else:
        rows: dict[str, torch.Tensor] = {}
        for part, manifest in zip(parts, manifests, strict=True):
            entry = next(entry for entry in manifest["shards"] if entry["file"] == path.name)
            check_size(part, entry["bytes"])
            widths = {key: hook["d_in"] for key, hook in manifest["hooks"].items()}
            shard = Shard(part, entry["bytes"], entry["n_tokens"], widths, DTYPES[manifest["dtype"]])
            for key in shard.shapes:
                x = read_chunks([shard], [(0, i) for i in range(shard.n_chunks)], key)
                if key in rows and not torch.equal(rows[key], x):
                    raise CorruptFileError(f"{part} has other token ids than {parts[0]}; delete {path.parent.parent}")
                rows[key] = x
        checksums = torch.tensor([chunk_checksums(rows[key]) for key in sorted(rows)])
        facts = write_shard(path, {key: [rows[key]] for key in sorted(rows)}, checksums)
    for part in parts:
        part.unlink(missing_ok=True)
    return facts
