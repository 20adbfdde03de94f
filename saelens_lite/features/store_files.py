"""The files of a feature store.

features.json holds the facts about the store, the text of each token, the bytes of the tokens that are parts of characters
(older stores have them in the texts), and the hashes of the tensor files: features.safetensors, weights.safetensors, of several
models models.safetensors, and with a control, control.safetensors. A store of activations has no tokens, but rows.safetensors
with the names and groups of its rows. codes.parquet is the table of all codes. labels.json, scores.json
and stability.safetensors may be added later; other modules write them.
"""

from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
from jaxtyping import jaxtyped
from pydantic import Field, model_validator
from torch import Tensor

from saelens_lite.errors import CorruptFileError
from saelens_lite.features.codes import CODES_FILE, CodesTable
from saelens_lite.features.info import StoreInfo
from saelens_lite.features.per_model import ModelTensors
from saelens_lite.features.reduce import N_BINS
from saelens_lite.features.rows import RowTensors
from saelens_lite.features.tensors import NONE, OF_TEXT, FeatureTensors
from saelens_lite.features.weights import LatentWeights
from saelens_lite.files import file_hash, write_json
from saelens_lite.outputs import restore
from saelens_lite.schemas import Checked, Count, Sha256, String, read_checked
from saelens_lite.tensor_files import check_axes, read_tensors, tensor_specs, write_tensor_blocks
from saelens_lite.tokens.display import Vocabulary

FORMAT = 5  # 3 lacks partner_tokens in info, 4 the facts about the model's weights
INFO_FILE = "features.json"
TENSORS_FILE, WEIGHTS_FILE, CONTROL_FILE = "features.safetensors", "weights.safetensors", "control.safetensors"
ROWS_FILE, MODELS_FILE = "rows.safetensors", "models.safetensors"
ROWS = 1 << 14  # of a tensor that are written at once


_TokenId = Annotated[str, Field(pattern="^(0|[1-9][0-9]{0,9})$")]
_Bytes = Annotated[str, Field(pattern="^([0-9a-f]{2})*$")]


class _Codes(Checked):
    """The entry of the table of codes in features.json."""

    n_bytes: Count
    sha256: Sha256


class _Content(Checked):
    """The content of features.json."""

    format: Literal[3, 4, 5]
    sha256: dict[String, Sha256]
    codes: _Codes | None
    info: StoreInfo
    control: StoreInfo | None
    vocabulary: list[String]  # empty without a model: rows.safetensors has the names of rows
    parts: dict[_TokenId, _Bytes] | None = None  # older stores have them in the texts

    @model_validator(mode="after")
    def _agrees(self) -> "_Content":
        wanted = {TENSORS_FILE, WEIGHTS_FILE} | (set() if self.control is None else {CONTROL_FILE})
        if self.info.model is None:
            wanted.add(ROWS_FILE)
        if self.info.models:
            wanted.add(MODELS_FILE)
        if self.sha256.keys() != wanted:
            raise ValueError(f"it lists the files {', '.join(self.sha256)[:200]}; expected {', '.join(sorted(wanted))}")
        if self.info.model is None and self.control is not None:
            raise ValueError("it has a control without a model")
        if (not self.vocabulary) != (self.info.model is None):
            raise ValueError("it has a vocabulary without a model, or a model without a vocabulary")
        if any(int(i) >= len(self.vocabulary) for i in self.parts or ()):
            raise ValueError("parts has a token id that is not in the vocabulary")
        return self


class Control(NamedTuple):
    """The facts and tensors of the same dictionary on a model with shuffled weights; the rest is the store's."""

    info: StoreInfo
    tensors: FeatureTensors


class Parts(NamedTuple):
    """The content of a store's files."""

    info: StoreInfo
    tensors: FeatureTensors
    weights: LatentWeights
    vocabulary: Vocabulary
    codes: CodesTable | None
    control: Control | None
    rows: RowTensors | None = None
    models: ModelTensors | None = None


def write(folder: Path, parts: Parts) -> None:
    """Write all files except the table of codes into a new folder, which already holds that table."""
    files = {TENSORS_FILE: parts.tensors._asdict(), WEIGHTS_FILE: parts.weights._asdict()}
    if parts.control is not None:
        own = {name: x for name, x in parts.control.tensors._asdict().items() if name not in OF_TEXT}
        files[CONTROL_FILE] = own
    if parts.rows is not None:
        files[ROWS_FILE] = parts.rows._asdict()
    if parts.models is not None:
        files[MODELS_FILE] = parts.models._asdict()
    blocks = {name: {key: x.cpu().split(ROWS) for key, x in tensors.items()} for name, tensors in files.items()}
    words = (Vocabulary() if parts.rows is not None else parts.vocabulary).to_json()
    content = {
        "format": FORMAT,
        "sha256": {name: write_tensor_blocks(folder / name, tensors) for name, tensors in blocks.items()},
        "codes": None if parts.codes is None else {"n_bytes": parts.codes.n_bytes, "sha256": parts.codes.sha256},
        "info": parts.info.model_dump(mode="json"),
        "control": None if parts.control is None else parts.control.info.model_dump(mode="json"),
        "vocabulary": words["texts"],
        "parts": words["parts"],
    }
    write_json(folder / INFO_FILE, content)


def read_info(folder: Path) -> StoreInfo:
    """Return the facts about the store in a folder. Raise CorruptFileError if it is not a store."""
    restore(folder)
    return read_checked(folder / INFO_FILE, _Content).info


def read(folder: Path) -> Parts:
    """Return the content of a store's files in a folder.

    Raises:
        CorruptFileError: a file is missing, truncated or damaged, or the files do not belong together.
    """
    content = read_checked(folder / INFO_FILE, _Content)
    parts = _parts(folder, content)
    rows, info = parts.rows, parts.info
    if rows is not None and not (_typed(rows) and _are_rows(info, parts.tensors, rows)):
        raise CorruptFileError(f"{folder / ROWS_FILE} does not match {INFO_FILE}; build the store again")
    if rows is not None:
        parts = parts._replace(vocabulary=Vocabulary(rows.names))
    controls = [] if parts.control is None else [parts.control]
    fits = all(_fits(one.info, one.tensors, parts.weights, parts.vocabulary) for one in (parts, *controls))
    if models := parts.models:
        fits = fits and _typed(models) and models.fit(info, parts.tensors, len(parts.vocabulary))
    if not fits:
        raise CorruptFileError(f"{folder}: the tensors and {INFO_FILE} do not match; build the store again")
    return parts


def _parts(folder: Path, content: _Content) -> Parts:
    """Return the parts as they are in the files. Check only sizes and hashes."""
    info, control, codes = content.info, content.control, None
    if content.codes is not None:
        codes = CodesTable(folder / CODES_FILE, content.codes.n_bytes, content.codes.sha256)
        codes.check_size()
    tensors = FeatureTensors(**_checked(folder / TENSORS_FILE, content, _axes(FeatureTensors), _sizes(info)))
    if control is not None:
        shared = {name: getattr(tensors, name) for name in OF_TEXT}
        own = {name: axes for name, axes in _axes(FeatureTensors).items() if name not in shared}
        own_tensors = _checked(folder / CONTROL_FILE, content, own, _sizes(control))
        control = Control(control, FeatureTensors(**shared, **own_tensors))
    weights = LatentWeights(**_checked(folder / WEIGHTS_FILE, content, _axes(LatentWeights), {"d_sae": info.d_sae}))
    words = Vocabulary.from_json(content.vocabulary, content.parts)
    rows = None
    if info.model is None:
        rows = RowTensors(**_checked(folder / ROWS_FILE, content, _axes(RowTensors), {"d_sae": info.d_sae}))
    models = ModelTensors(**_checked(folder / MODELS_FILE, content, _axes(ModelTensors), _sizes(info))) if info.models else None
    return Parts(info, tensors, weights, words, codes, control, rows, models)


def _axes(kind: type[FeatureTensors] | type[LatentWeights] | type[RowTensors] | type[ModelTensors]) -> dict[str, str]:
    """Return the axes of each tensor, from its annotation."""
    return {name: field.dim_str for name, field in kind.__annotations__.items()}


def _sizes(info: StoreInfo) -> dict[str, int]:
    """Return the lengths of axes that follow from a store's info."""
    return {name: getattr(info, name) for name in ("d_sae", "top_n", "n_groups", "group_size", "n_random", "n_silent")} | {
        "window": sum(info.window) + 1,
        "n_bins": N_BINS,
        "n_models": len(info.models),
    }


def _checked(path: Path, content: _Content, axes: dict[str, str], sizes: dict[str, int]) -> dict[str, Tensor]:
    """Return the tensors of a file. Raise CorruptFileError unless its axes and its hash are as recorded."""
    check_axes(path, tensor_specs(path), axes, sizes)
    if file_hash(path) != content.sha256[path.name]:
        raise CorruptFileError(f"{path} does not match the checksum in {INFO_FILE}; build the store again")
    return read_tensors(path)


def _fits(info: StoreInfo, t: FeatureTensors, w: LatentWeights, vocabulary: list[str]) -> bool:
    """Return whether types and shapes match each other and the info, and every token id, place and latent exists."""
    n_vocab = len(vocabulary)
    consistent = _typed(t) and _typed(w) and len(t.count) == len(w.promoted) == info.d_sae
    shapes = (t.top_nearby.shape[1:], t.group_nearby.shape[1:], t.random_nearby.shape[1:], t.silent_place.shape[1:])
    width = sum(info.window) + 1
    wanted = ((info.top_n, width), (info.n_groups, info.group_size, width), (info.n_random, width), (info.n_silent,))
    if not consistent or shapes != wanted or t.histogram.shape[1] != N_BINS:
        return False
    if not {len(w.logit_low), len(w.encoder_decoder_cosine)} <= {0, info.d_sae}:
        return False
    if info.bos_id is not None and not 0 <= info.bos_id < n_vocab:
        return False
    latents = (t.frequent_partner, t.specific_partner)
    limits = [
        *((ids, 0, n_vocab) for ids in (t.tokens, w.promoted, w.suppressed)),
        *((latent, NONE, info.d_sae) for latent in latents),
        *((latent, 0, info.d_sae) for latent in (w.decoder_neighbours, w.encoder_neighbours)),
    ]
    inside = all(int(ids.min()) >= low and int(ids.max()) < high for ids, low, high in limits if ids.numel())
    return inside and _places_exist(t) and _counts_agree(info, t) and all(isinstance(text, str) for text in vocabulary)


def _are_rows(info: StoreInfo, t: FeatureTensors, rows: RowTensors) -> bool:
    """Return whether the text is one token a row, its number, and the names and groups are of these rows."""
    numbers = torch.arange(info.n_tokens, dtype=t.tokens.dtype)[:, None]
    return info.window == (0, 0) and torch.equal(t.tokens, numbers) and rows.fit(t.count, info.n_tokens, info.top_n)


def _places_exist(t: FeatureTensors) -> bool:
    """Return whether every place lies within its row, and each latent fires at the peaks of its strongest contexts."""
    n_seq, n_ctx = t.tokens.shape
    if not ((t.length >= 0) & (t.length <= n_ctx)).all():
        return False
    if not ((t.top_place != NONE) == (t.top_value > 0)).all():
        return False
    for place in (t.top_place, t.group_place, t.random_place, t.silent_place):
        at = place[place != NONE].long()
        if not ((at >= 0) & (at < n_seq * n_ctx)).all() or not (at % n_ctx < t.length[at // n_ctx]).all():
            return False
    return True


def _counts_agree(info: StoreInfo, t: FeatureTensors) -> bool:
    """Return whether groups, bins and bands each sum to all activations, and no count exceeds its maximum."""
    if not all((x >= 0).all() for x in (t.count, t.group_count, t.histogram, t.band_count)):
        return False
    if not all((x.sum(1) == t.count).all() for x in (t.group_count, t.histogram, t.band_count)):
        return False
    if t.band_tokens.sum() != info.n_tokens or not (t.band_count <= t.band_tokens).all():
        return False
    for partner, together in ((t.frequent_partner, t.frequent_count), (t.specific_partner, t.specific_count)):
        most = torch.minimum(t.count[:, None], t.count[partner.clamp(min=0).long()])
        if not torch.where(partner == NONE, True, (together > 0) & (together <= most)).all():
            return False
    return True


def _typed(tensors: FeatureTensors | LatentWeights | RowTensors | ModelTensors) -> bool:
    """Return whether every tensor has the type of its field, and axes of one name have one length."""
    with jaxtyped("context"):
        return all(isinstance(x, type(tensors).__annotations__[name]) for name, x in tensors._asdict().items())
