"""A feature store in the format that Neuronpedia imports in bulk.

<folder>/<model>/<layer>-<set>/ holds release.jsonl, model.jsonl, sourceset.jsonl, source.jsonl, and, gzipped and in batches of
latents, features/batch-0.jsonl.gz … and activations/batch-0.jsonl.gz ….
"""

import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

from saelens_lite.dictionary import Dictionary
from saelens_lite.errors import ConfigError
from saelens_lite.features.queries import StoreQueries
from saelens_lite.features.summary import Example
from saelens_lite.files import disk_full_is_typed
from saelens_lite.kinds import NEURONPEDIA
from saelens_lite.outputs import new_folder
from saelens_lite.progress import progress_bar
from saelens_lite.tokens.display import PART

BATCH = 1024  # latents of a file
DECIMALS = 3
TOP = -1  # in place of a lower bound and a share: these are the strongest contexts


class _Names(NamedTuple):
    """What every line says of where it belongs."""

    model: str
    source: str
    set: str
    creator: str
    created: str

    @property
    def line(self) -> dict[str, Any]:
        """The keys that features and activations have in common."""
        return {"modelId": self.model, "layer": self.source, "creatorId": self.creator, "createdAt": self.created}


def export_neuronpedia(
    store: StoreQueries,
    folder: str | Path,
    *,
    set_name: str,
    creator_id: str,
    model_id: str | None = None,
    creator_name: str = "",
    release: str | None = None,
    description: str = "",
    dictionary: Dictionary | None = None,
    created: datetime | None = None,
    exists: Literal["error", "overwrite"] = "error",
) -> Path:
    """Write a store for Neuronpedia; the folder of its source, <folder>/<model>/<layer>-<set_name>.

    Numbers are rounded to three decimals, but for densities and vectors. `creator_id` is the account it belongs to. `model_id`
    is what Neuronpedia calls the model, by default its name here. With its `dictionary`, each latent has its decoder vector for
    steering. `created`: default now.

    Raises:
        ConfigError: names with other characters than letters, digits, dots, dashes and underscores; a hook that is in no
            block; another dictionary.
        OutputExistsError: the folder of the source holds something and `exists` is "error".
        DiskFullError: there is no room for it.
    """
    created = created or datetime.now(UTC)
    names = _names(store, set_name, creator_id, model_id, created)
    if dictionary is not None:
        store.info.check_dictionary(dictionary)
    out = Path(folder) / names.model / names.source
    release = release or set_name
    common = {"creatorId": names.creator, "createdAt": names.created}
    with new_folder(out, NEURONPEDIA, exists) as new:
        _write_line(
            new / "release.jsonl",
            {"name": release, "description": description or release, "creatorName": creator_name, "urls": [], **common},
        )
        _write_line(
            new / "model.jsonl",
            {
                "id": names.model,
                "displayName": names.model,
                "displayNameShort": names.model,
                "instruct": False,
                "layers": 0,
                "neuronsPerLayer": 0,
                "owner": "",
                "updatedAt": names.created,
                **common,
            },
        )
        _write_line(
            new / "sourceset.jsonl",
            {
                "modelId": names.model,
                "name": names.set,
                "description": description,
                "type": store.info.rule,
                "creatorName": creator_name,
                "releaseName": release,
                "urls": [],
                **common,
            },
        )
        n_seq, n_ctx = store.tensors.tokens.shape
        _write_line(
            new / "source.jsonl",
            {
                "id": names.source,
                "modelId": names.model,
                "setName": names.set,
                "dataset": store.info.text,
                "num_prompts": n_seq,
                "num_tokens_in_prompt": n_ctx,
                **common,
            },
        )
        _write_latents(store, new, names, dictionary)
    return out


def _names(store: StoreQueries, set_name: str, creator_id: str, model_id: str | None, created: datetime) -> _Names:
    """The names of an export, checked."""
    info = store.info
    if len(info.reads) + len(info.writes) > 2:
        raise ConfigError(f"{info.place}: Neuronpedia has dictionaries of one hook to read and one to write")
    layer = re.match(r"blocks\.(\d+)\.", info.reads[0])
    if layer is None:
        raise ConfigError(f"{info.reads[0]} is in no block; Neuronpedia names sources by their layer")
    names = _Names(model_id or info.model, f"{layer[1]}-{set_name}", set_name, creator_id, created.isoformat())
    for what, name in (("model_id", names.model), ("set_name", set_name), ("creator_id", creator_id)):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ConfigError(f"{what} = {name!r}; expected letters, digits, dots, dashes and underscores")
    return names


def _write_latents(store: StoreQueries, folder: Path, names: _Names, dictionary: Dictionary | None) -> None:
    """Write the lines of all latents."""
    for kind in ("features", "activations"):
        (folder / kind).mkdir()
    vectors = None if dictionary is None else dictionary.W_dec.detach().float().cpu()
    with progress_bar("Neuronpedia", store.info.d_sae, "latents") as advance:
        for number, start in enumerate(range(0, store.info.d_sae, BATCH)):
            latents = range(start, min(start + BATCH, store.info.d_sae))
            vector = {i: None if vectors is None else vectors[i].tolist() for i in latents}
            features = (_feature(store, names, i, vector[i]) for i in latents)
            _write_lines(folder / "features" / f"batch-{number}.jsonl.gz", features)
            activations = (line for i in latents for line in _activations(store, names, i))
            _write_lines(folder / "activations" / f"batch-{number}.jsonl.gz", activations)
            advance(len(latents))


def _feature(store: StoreQueries, names: _Names, latent: int, vector: list[float] | None) -> dict[str, Any]:
    """The line of a latent."""
    t, w = store.tensors, store.weights
    promoted, suppressed = store.promoted(latent), store.suppressed(latent)
    largest = float(t.top_value[latent, 0])
    width = float(t.bin_width[latent])
    heights = t.histogram[latent].tolist() if width else []
    effects = w.logit_histogram[latent].tolist()
    low, step = (float(x[latent]) if len(x) else 0.0 for x in (w.logit_low, w.logit_width))
    steering = {"hookName": store.info.writes[0], "vector": vector, "vectorDefaultSteerStrength": _short(largest)}
    return {
        **names.line,
        "index": str(latent),
        "sourceSetName": names.set,
        "maxActApprox": _short(largest),
        "frac_nonzero": int(t.count[latent]) / store.info.n_tokens,
        "pos_str": [text for text, _ in promoted],
        "pos_values": _rounded(effect for _, effect in promoted),
        "neg_str": [text for text, _ in suppressed],
        "neg_values": _rounded(effect for _, effect in suppressed),
        "freq_hist_data_bar_heights": heights,
        "freq_hist_data_bar_values": _rounded((j + 0.5) * width for j in range(len(heights))),
        "logits_hist_data_bar_heights": effects,
        "logits_hist_data_bar_values": _rounded(low + (j + 0.5) * step for j in range(len(effects))),
        "topkCosSimIndices": [latent, *w.decoder_neighbours[latent].tolist()],  # the latent itself comes first there
        "topkCosSimValues": [1.0, *_rounded(w.decoder_cosine[latent].tolist())],
        "hasVector": vector is not None,
        **(steering if vector is not None else {"hookName": store.info.writes[0], "vector": []}),
    }


def _activations(store: StoreQueries, names: _Names, latent: int) -> Iterator[dict[str, Any]]:
    """The lines of a latent's contexts: the strongest, then those drawn from groups of equally many activations."""
    top = store.top_examples(latent)
    groups = [(TOP, top[0].value, TOP, top)] if top else []
    groups += store.quantile_examples(latent)
    number = 0
    for low, high, share, examples in groups:
        for example in examples:
            yield {
                "id": _id(names, latent, number),
                **names.line,
                "index": str(latent),
                **_context(example),
                "binMin": _short(low),
                "binMax": _short(high),
                "binContains": share,
            }
            number += 1


def _context(example: Example) -> dict[str, Any]:
    """The keys that a context alone decides."""
    largest = max(example.values)
    return {
        "tokens": [token or PART for token in example.tokens],  # texts to show; an activation on an empty one cannot be seen
        "values": _rounded(example.values),
        "maxValue": _short(largest),
        "maxValueTokenIndex": example.values.index(largest),  # of those that are equal but for the rounding, the largest
        "minValue": _short(min(example.values)),
        "qualifyingTokenIndex": example.peak,
        "dataIndex": str(example.row),
    }


def _id(names: _Names, latent: int, number: int) -> str:
    """25 characters that no other context has."""
    digest = hashlib.sha256(f"{names.model} {names.source} {names.created} {latent} {number}".encode())
    return f"c{digest.hexdigest()[:24]}"


def _short(value: float | int) -> float:
    return round(float(value), DECIMALS)


def _rounded(values: Iterable[float]) -> list[float]:
    return [_short(value) for value in values]


def _write_line(path: Path, line: dict[str, Any]) -> None:
    path.write_text(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def _write_lines(path: Path, lines: Iterator[dict[str, Any]]) -> None:
    """Lines of JSON, gzipped; the same lines give the same bytes."""
    with disk_full_is_typed(path), open(path, "wb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as file:
        for line in lines:
            file.write((json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n").encode())
