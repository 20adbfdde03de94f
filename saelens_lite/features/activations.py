"""The numbers of a feature store of activations, computed from a dictionary without a model or a text."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saelens_lite.arrays import ArrayLike, as_tensor
from saelens_lite.config import StoreConfig
from saelens_lite.dictionary import Dictionary
from saelens_lite.errors import ConfigError, NonFiniteError, ShapeError
from saelens_lite.features.build import SHOWN, reduced
from saelens_lite.features.code_log import CodeLog
from saelens_lite.features.collect import MAX_PLACES
from saelens_lite.features.info import StoreInfo, facts_of
from saelens_lite.features.reduce import Block
from saelens_lite.features.rows import GroupsOfBlocks, RowTensors, row_tensors, texts_of
from saelens_lite.features.tensors import FeatureTensors
from saelens_lite.progress import progress_bar
from saelens_lite.tokens import TokenRows

OF_TEXT = ("n_tokens", "window", "control", "raw_unembedding")  # settings that activations do not have
BATCH_ROWS = 4096


class NamedRows(NamedTuple):
    """Activations with their names, labels of groups, and the number of each row's group; the last two may be empty."""

    x: Tensor | np.ndarray
    names: list[str]
    labels: list[str]
    group_of_row: Tensor

    @classmethod
    def of(cls, dictionary: Dictionary, x: ArrayLike, names: Any, groups: Any) -> "NamedRows":
        """Return checked inputs. An array stays where it is, such as in a file, and is read in batches."""
        if names is None and hasattr(x, "columns") and hasattr(x, "index"):  # a DataFrame
            names = x.index
        x = x if isinstance(x, np.ndarray) else as_tensor(x)
        if x.ndim != 2 or not len(x):
            raise ShapeError(f"x has shape {tuple(x.shape)}; expected [n {dictionary.d_in}] with at least one row")
        if len(x) > MAX_PLACES:
            raise ConfigError(f"x has {len(x):,} rows; give at most {MAX_PLACES:,}")
        first = as_tensor(x[:1])
        if not first.is_floating_point():
            raise ShapeError(f"x holds {first.dtype}; expected floating-point numbers")
        dictionary.check_input(first.to(dictionary.W_dec.device))
        texts = texts_of(names, len(x), "names", default=str)
        number: dict[str, int] = {}
        given = [] if groups is None else texts_of(groups, len(x), "groups")
        group_of_row = torch.tensor([number.setdefault(text, len(number)) for text in given], dtype=torch.long)
        return cls(x, texts, list(number), group_of_row)

    def batches(self, size: int) -> Iterator[tuple[int, Float[Tensor, "batch d_in"]]]:
        """Yield the number of the first row and the rows of each batch. Raise NonFiniteError if one is NaN or infinite."""
        for start in range(0, len(self.x), size):
            x = as_tensor(self.x[start : start + size]).detach()
            if not (fine := torch.isfinite(x).all(1)).all():
                row = start + int(fine.int().argmin())
                raise NonFiniteError(f"x holds NaN or infinity in row {row:,} ({self.names[row]:.80}); leave out such rows")
            yield start, x


class RowParts(NamedTuple):
    """The parts of a store that depend on the activations."""

    info: StoreInfo
    tensors: FeatureTensors
    rows: RowTensors


def own_config(config: StoreConfig | None, settings: dict[str, Any]) -> StoreConfig:
    """Return the settings of a store of activations. Raise ConfigError for those that need a model or a text."""
    config = (config or StoreConfig()).replace(**settings)
    if changed := [name for name in OF_TEXT if getattr(config, name) != getattr(StoreConfig(), name)]:
        raise ConfigError(f"{changed[0]} needs a model and a text, but this store is built from activations; leave it out")
    return config.replace(window=(0, 0))


@torch.no_grad()
def row_parts(dictionary: Dictionary, given: NamedRows, config: StoreConfig, folder: Path, codes: Path | None) -> RowParts:
    """Return the parts of a store, computed by way of codes in a temporary folder. With `codes`, also write them there.

    Raises:
        NonFiniteError: an activation or a code is NaN or infinite.
        UserError: no latent fires.
    """
    dictionary.check_finite()
    code_log, digest, n = CodeLog(folder, dictionary.d_sae), hashlib.sha256(), len(given.x)
    code_log.open()
    try:
        with progress_bar("features", n, "rows") as advance:
            for start, x in given.batches(config.batch_tokens or BATCH_ROWS):
                digest.update(x.cpu().contiguous().view(torch.uint8).numpy().tobytes())
                batch_codes = dictionary.encode(x.to(dictionary.W_enc.device))
                if not torch.isfinite(batch_codes.value).all():
                    raise NonFiniteError(f"the codes of rows {start:,} to {start + len(x) - 1:,} hold NaN or infinity")
                code_log.add(torch.arange(start, start + len(x)), batch_codes)
                advance(len(x), "")
    finally:
        code_log.close()
    ports = ([port.hook or "activations" for port in side] for side in (dictionary.reads, dictionary.writes))
    reads, writes = map(tuple, ports)
    info = StoreInfo(
        model=None, revision=None, reads=reads, writes=writes, n_tokens=n, bos_id=None, text=None,
        text_sha256=digest.hexdigest(), **facts_of(dictionary), **config.model_dump(include=SHOWN),
    )  # fmt: skip
    rows = TokenRows(torch.arange(n)[:, None], torch.ones(n, 1, dtype=torch.bool))
    groups = GroupsOfBlocks(given.group_of_row, len(given.labels)) if given.labels else None

    def add(block: Block) -> None:
        if groups is not None:
            groups.add(block)

    tensors = reduced(code_log, rows, info, codes, also=add)
    none = torch.zeros(dictionary.d_sae, 0)
    of_latents = [none, none.int(), none.int(), none.int(), none] if groups is None else groups.tensors()
    return RowParts(info, tensors, row_tensors(given.names, given.labels, given.group_of_row, of_latents))
