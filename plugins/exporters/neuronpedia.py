"""Write a feature store for Neuronpedia, in the format of its bulk import.

    store.export("neuronpedia", "out/", set_name="my-set", creator_id="my-account")

out/<model>/<layer>-<set_name>/ holds release.jsonl, model.jsonl, sourceset.jsonl and source.jsonl. Gzipped batches of latents
are in features/batch-0.jsonl.gz … and activations/batch-0.jsonl.gz …; if the store has labels, those of the same latents are in
explanations/batch-0.jsonl.gz …, which `sl.labels.from_neuronpedia` reads too.
"""

import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field

from saelens_lite import Dictionary, FeatureStore, labels
from saelens_lite.errors import ConfigError
from saelens_lite.features import Example
from saelens_lite.features.exporters import PART, Exporter, ExporterConfig, progress_bar

BATCH = 1024  # latents per file
DECIMALS = 3
TOP = -1  # instead of a lower bound and a share: marks the strongest contexts


class _Names(NamedTuple):
    """The names that each line needs."""

    model: str
    source: str
    set: str
    creator: str
    created: str

    @property
    def line(self) -> dict[str, Any]:
        """The keys that features and activations have in common."""
        return {"modelId": self.model, "layer": self.source, "creatorId": self.creator, "createdAt": self.created}


class NeuronpediaOptions(ExporterConfig):
    """Names and descriptions for Neuronpedia that are not in the store."""

    set_name: str = Field(description="Name of the set of sources, the same for all layers.")
    creator_id: str = Field(description="Account on Neuronpedia that owns the set.")
    model_id: str | None = Field(None, description="Neuronpedia's name of the model; default: the model's name here.")
    creator_name: str = Field("", description="Name of the creator, for people.")
    release: str | None = Field(None, description="Name of the release; default: the name of the set.")
    description: str = Field("", description="One sentence about the set.")
    created: datetime | None = Field(None, description="Date of creation; default: now.")


class Neuronpedia(Exporter):
    """Files for Neuronpedia's bulk import.

    Numbers are rounded to three decimals, except densities and vectors. If the dictionary is given, each latent has its decoder
    vector for steering. Names may have letters, digits, dots, dashes and underscores. The hook must be inside a block.

    A label is an explanation: its author is the explanationModelName, and its source, such as "max_act 1", the typeName. Both
    are null for your own labels and for those of people. Neuronpedia accepts only models and types that it knows. Its
    explanation files have no scores, so the scores of labels are left out.
    """

    Config = NeuronpediaOptions
    config: NeuronpediaOptions
    files = (
        *(r"release\.jsonl", r"model\.jsonl", r"sourceset\.jsonl", r"source\.jsonl"),
        r"(features|activations|explanations)/batch-\d+\.jsonl\.gz",
    )

    def subfolder(self, store: FeatureStore) -> str:
        names = _names(store, self.config)
        return f"{names.model}/{names.source}"

    def write(self, store: FeatureStore, dictionary: Dictionary | None, folder: Path) -> None:
        names = _names(store, self.config)
        common = {"creatorId": names.creator, "createdAt": names.created}
        for name, line in _descriptions(store, names, self.config).items():
            _write_line(folder / f"{name}.jsonl", line | common)
        _write_latents(store, folder, names, dictionary)


def _descriptions(store: FeatureStore, names: _Names, options: NeuronpediaOptions) -> dict[str, dict[str, Any]]:
    """Return the content of the files that describe the release, the model, the set and the source."""
    release = options.release or names.set
    n_seq, n_ctx = store.tensors.tokens.shape
    return {
        "release": {
            "name": release,
            "description": options.description or release,
            "creatorName": options.creator_name,
            "urls": [],
        },
        "model": {
            "id": names.model,
            "displayName": names.model,
            "displayNameShort": names.model,
            "instruct": False,
            "layers": 0,
            "neuronsPerLayer": 0,
            "owner": "",
            "updatedAt": names.created,
        },
        "sourceset": {
            "modelId": names.model,
            "name": names.set,
            "description": options.description,
            "type": store.info.rule,
            "creatorName": options.creator_name,
            "releaseName": release,
            "urls": [],
        },
        "source": {
            "id": names.source,
            "modelId": names.model,
            "setName": names.set,
            "dataset": store.info.text,
            "num_prompts": n_seq,
            "num_tokens_in_prompt": n_ctx,
        },
    }


def _names(store: FeatureStore, options: NeuronpediaOptions) -> _Names:
    """Return the names of an export. Raise ConfigError if Neuronpedia cannot take one of them."""
    info = store.info
    if len(info.reads) + len(info.writes) > 2:
        raise ConfigError(f"{info.place}: Neuronpedia takes only dictionaries that read one hook and write one")
    layer = re.match(r"blocks\.(\d+)\.", info.reads[0])
    if layer is None:
        raise ConfigError(f"{info.reads[0]} is not inside a block; Neuronpedia names sources by their layer")
    created = options.created or datetime.now(UTC)
    source = f"{layer[1]}-{options.set_name}"
    names = _Names(options.model_id or info.model, source, options.set_name, options.creator_id, created.isoformat())
    for what, name in (("model_id", names.model), ("set_name", names.set), ("creator_id", names.creator)):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ConfigError(f"{what} = {name!r}; expected letters, digits, dots, dashes and underscores")
    return names


def _write_latents(store: FeatureStore, folder: Path, names: _Names, dictionary: Dictionary | None) -> None:
    """Write the lines of all latents."""
    for kind in ("features", "activations", *["explanations"] * bool(store.labels)):
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
            if store.labels:
                explanations = (_explanation(names, i, store.labels[i]) for i in latents if store.labels.get(i, "").split())
                _write_lines(folder / "explanations" / f"batch-{number}.jsonl.gz", explanations)
            advance(len(latents))


def _feature(store: FeatureStore, names: _Names, latent: int, vector: list[float] | None) -> dict[str, Any]:
    """Return the line of a latent."""
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
        "topkCosSimIndices": [latent, *w.decoder_neighbours[latent].tolist()],  # Neuronpedia expects the latent itself first
        "topkCosSimValues": [1.0, *_rounded(w.decoder_cosine[latent].tolist())],
        "hasVector": vector is not None,
        **(steering if vector is not None else {"hookName": store.info.writes[0], "vector": []}),
    }


def _activations(store: FeatureStore, names: _Names, latent: int) -> Iterator[dict[str, Any]]:
    """Yield the lines of a latent's contexts: the strongest ones, then those from its quantiles of activation."""
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


def _explanation(names: _Names, latent: int, label: str) -> dict[str, Any]:
    """Return the line of a label. Labels of Neuronpedia keep their model and type, or their person."""
    source, author = (label.source, label.author) if isinstance(label, labels.Label) else ("", "")
    model, kind, person = author or None, source or None, None
    if source.startswith("Neuronpedia"):
        if by_model := re.fullmatch(r"(.+) \((.+)\)", author):
            (model, kind), person = by_model.groups(), None
        else:
            model, kind, person = None, None, author or None
    return {
        "id": _id(names, latent, "explanation"),
        "modelId": names.model,
        "layer": names.source,
        "index": str(latent),
        "description": " ".join(label.split()),
        "authorId": names.creator,
        **({"authorName": person} if person else {}),
        "typeName": kind,
        "explanationModelName": model,
        "createdAt": names.created,
    }


def _context(example: Example) -> dict[str, Any]:
    """Return the part of a line that depends only on the context."""
    largest = max(example.values)
    return {
        "tokens": [token or PART for token in example.tokens],  # an activation on an empty text would be invisible
        "values": _rounded(example.values),
        "maxValue": _short(largest),
        "maxValueTokenIndex": example.values.index(largest),  # the largest before rounding
        "minValue": _short(min(example.values)),
        "qualifyingTokenIndex": example.peak,
        "dataIndex": str(example.row),
    }


def _id(names: _Names, latent: int, number: int | str) -> str:
    """Return an id of 25 characters, unique to a context or an explanation."""
    digest = hashlib.sha256(f"{names.model} {names.source} {names.created} {latent} {number}".encode())
    return f"c{digest.hexdigest()[:24]}"


def _short(value: float | int) -> float:
    return round(float(value), DECIMALS)


def _rounded(values: Iterable[float]) -> list[float]:
    return [_short(value) for value in values]


def _write_line(path: Path, line: dict[str, Any]) -> None:
    path.write_text(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def _write_lines(path: Path, lines: Iterator[dict[str, Any]]) -> None:
    """Write gzipped lines of JSON. The same lines give the same bytes."""
    with open(path, "wb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as file:
        for line in lines:
            file.write((json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n").encode())
