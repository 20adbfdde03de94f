"""The numbers of a feature store of activations, computed from a dictionary without a model or a text."""

import hashlib
import json
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
from saelens_lite.features.build import SHOWN, Numbers, reduced
from saelens_lite.features.code_log import Coded, Sample
from saelens_lite.features.collect import MAX_PLACES, Logged, written
from saelens_lite.features.info import StoreInfo, facts_of, own_id
from saelens_lite.features.rows import OF_GROUPS, GroupsOfBlocks, RowTensors, row_tensors, texts_of
from saelens_lite.processes import Team, check_same
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
        if x.shape[1] != dictionary.d_in:
            raise ShapeError(f"x has shape {tuple(x.shape)}; this dictionary takes [n {dictionary.d_in}]")
        if not (first := as_tensor(x[:1])).is_floating_point():
            raise ShapeError(f"x holds {first.dtype}; expected floating-point numbers")
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
    numbers: Numbers
    rows: RowTensors


def own_config(config: StoreConfig | None, settings: dict[str, Any]) -> StoreConfig:
    """Return the settings of a store of activations. Raise ConfigError for those that need a model or a text."""
    config = (config or StoreConfig()).replace(**settings)
    if changed := [name for name in OF_TEXT if getattr(config, name) != getattr(StoreConfig(), name)]:
        raise ConfigError(f"{changed[0]} needs a model and a text, but this store is built from activations; leave it out")
    return config.replace(window=(0, 0))


@torch.no_grad()
def row_parts(dictionary: Dictionary, given: NamedRows, config: StoreConfig, folder: Path, team: Team) -> RowParts | None:
    """Return the parts of a store, computed by way of codes in a folder, in the first process of a team; None in the others.

    Raises:
        NonFiniteError: an activation or a code is NaN or infinite.
        UserError: no latent fires.
        ConfigError: the processes were given different activations, names, groups, dictionaries or settings.
    """
    with team.failing_together():
        dictionary.check_finite()
    digest, n, facts = hashlib.sha256(), len(given.x), facts_of(dictionary)
    if team.world > 1:
        named = {"names": given.names, "groups": given.labels, "group_of_row": given.group_of_row.tolist()}
        hashes = {name: hashlib.sha256(json.dumps(values).encode()).hexdigest() for name, values in named.items()}
        shape = {"rows": n, "dtype": str(given.x.dtype).removeprefix("torch.")}
        check_same({"dictionary": facts, **config.model_dump(mode="json")}, hashes | shape, dictionary.W_enc.device)

    def encoded(batch: tuple[int, Tensor]) -> Iterator[Coded]:
        start, x = batch
        codes = dictionary.encode(x.to(dictionary.W_enc.device))
        if not torch.isfinite(codes.value).all():
            raise NonFiniteError(f"the codes of rows {start:,} to {start + len(x) - 1:,} hold NaN or infinity")
        yield Coded(torch.arange(start, start + len(x)), codes)

    with progress_bar("features", n, "rows") as advance:

        def hashed() -> Iterator[tuple[int, Tensor]]:
            for start, x in given.batches(config.batch_tokens or BATCH_ROWS):
                digest.update(x.cpu().contiguous().view(torch.uint8).numpy().tobytes())
                yield start, x
                advance(len(x), "")

        codes = written(folder, [Logged(dictionary.d_sae)], Sample.of(n, config.seed), hashed(), encoded, team)[0]
    team.agree({"x": digest.hexdigest()}, "inputs of the store")
    ports = ([port.hook or "activations" for port in side] for side in (dictionary.reads, dictionary.writes))
    reads, writes = map(tuple, ports)
    info = StoreInfo(
        model=None, revision=None, reads=reads, writes=writes, n_tokens=n, bos_id=None, text=None,
        text_sha256=digest.hexdigest(), neuronpedia=own_id(dictionary), **facts, **config.model_dump(include=SHOWN),
    )  # fmt: skip
    rows = TokenRows(torch.arange(n, dtype=torch.int32)[:, None], torch.ones(n, 1, dtype=torch.bool))
    groups = GroupsOfBlocks(given.group_of_row, len(given.labels))
    numbers = reduced(codes, rows, info, config.codes, also=groups.numbers)
    if numbers is None:
        return None
    of_latents = [numbers.of_latents[name] for name in OF_GROUPS]
    named = row_tensors(given.names, given.labels, given.group_of_row, of_latents)
    return RowParts(info.replace(partner_tokens=numbers.partner_tokens), numbers, named)
