"""One pass of a model over token rows that collects the sums of all metrics for several dictionaries of the same hooks."""

import logging
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelens_lite.devices import float64_device, where_float64_is
from saelens_lite.dictionary import Dictionary
from saelens_lite.errors import NonFiniteError, ShapeError
from saelens_lite.evaluation import metrics
from saelens_lite.evaluation.held import Held
from saelens_lite.evaluation.metrics import Kept, Predictions
from saelens_lite.evaluation.splices import SplicedModels
from saelens_lite.evaluation.sums import ExactSums, PooledSums, run_in_rounds
from saelens_lite.model import AnyModel
from saelens_lite.model.passes import read
from saelens_lite.ports import together
from saelens_lite.processes import ALONE, Team
from saelens_lite.progress import progress_bar
from saelens_lite.tokens import TokenRows

MAX_ROW_LOGITS = 1 << 29  # a row with more logits is worked on in parts

log = logging.getLogger(__name__)


class Grouping(NamedTuple):
    """Tokens in bands: the function that returns the band of each position of some tokens, and the number of bands."""

    name: str
    band: Callable[[Int[Tensor, "n pos"]], Int[Tensor, "n pos"]]
    n_bands: int


class _Part(NamedTuple):
    """A batch on the model's device, or a part of a long row: the positions from `first` on at which `keep` is true.

    `unit` has the number of the unit of the bootstrap to which each row belongs. `earlier` is true at the positions before the
    part that count.
    """

    rows: TokenRows
    unit: Int[Tensor, " n"]
    first: int = 0
    earlier: Bool[Tensor, "n pos"] | None = None


def _parts(lm: AnyModel, held: Held, n_positions: int) -> Iterator[_Part]:
    """Yield the batches. A row longer than n_positions comes in parts, without those in which no position counts."""
    for batch in held:
        here = batch.rows.to(lm.device)
        n, width = here.tokens.shape
        if n > 1 or width <= n_positions:
            yield _Part(here, held.unit(batch))
            continue
        for first in range(0, width, n_positions):
            part = here.narrowed(first + n_positions + 1)
            position = torch.arange(part.keep.shape[1], device=part.keep.device)
            keep = part.keep & (position >= first) & (position < first + n_positions)
            if keep.any():
                yield _Part(part._replace(keep=keep), held.unit(batch), first, part.keep & (position < first))


def kept_activations(lm: AnyModel, held: Held, hooks: Sequence[str], what: str) -> Iterator[Float[Tensor, "n_kept d"]]:
    """Yield the activations of the kept tokens at some hooks, batch by batch. Forward passes stop after these hooks."""
    with progress_bar(what, held.n_own) as advance:
        for batch in held:
            activations = read(lm, batch, hooks)
            yield together(activations.acts, hooks).float()
            advance(len(activations.row), "")


def mean_activation(lm: AnyModel, held: Held, hooks: Sequence[str], team: Team = ALONE) -> Float[Tensor, " d"]:
    """Return the mean activation of the kept tokens of all processes at some hooks.

    Raises:
        NonFiniteError: an activation is NaN or infinite.
    """
    sums = ExactSums()

    def steps() -> Generator[None, None, None]:
        for x in kept_activations(lm, held, hooks, "mean"):
            sums.add("x", where_float64_is(x).sum(0, dtype=torch.float64))
            yield

    run_in_rounds(steps(), team)
    sums.pool(team)
    if not torch.isfinite(sums["x"]).all():
        raise NonFiniteError(
            f"the activations of {' + '.join(hooks)} in {lm.name} hold NaN or infinity, so nothing can be measured"
        )
    return (sums["x"] / held.n_kept).float().to(float64_device(lm.device))


def measure(
    dictionaries: Sequence[Dictionary],
    models: SplicedModels,
    held: Held,
    *,
    sums: PooledSums,
    mean: Float[Tensor, " d"],
    batch_tokens: int,
    groupings: Sequence[Grouping] = (),
) -> Generator[None, None, None]:
    """Add the sums over the batches of this process to `sums`, in steps. Names of sums of dictionary number i begin with i.

    Memory does not depend on the amount of text: it holds two sets of logits of a batch, or one more than the models that are
    written, and the bootstrap sums. A row with more than MAX_ROW_LOGITS logits is worked on in parts, with separate forward
    passes for each.

    mean: the mean activation of the whole text at the written hooks.
    """
    lm, hooks = models.lm, models.hooks
    where = float64_device(lm.device)  # for the sums
    ablations = {"zero": torch.zeros_like(mean), "mean": mean}
    most = max(batch_tokens, MAX_ROW_LOGITS // lm.d_vocab)
    if held.width > most:
        log.info("rows of %s tokens: the model runs once for every %s positions", f"{held.width:,}", f"{most:,}")
    fixed = {} if held.width > most else _fixed(models, held, ablations)
    with progress_bar("evaluate", held.n_own) as advance:
        for part in _parts(lm, held, most):
            tokens, kept, first = part.rows.tokens, Kept.of(part.rows.keep.to(where)), part.first
            earlier = None if part.earlier is None else Kept.of(part.earlier.to(where))
            predicted = torch.full((len(tokens),), tokens.shape[1]) if part.rows.ends_text else part.rows.lengths
            acts, logits = models.read(tokens, first)
            x, y = (together(acts, side).to(where) for side in hooks)
            clean = {
                label: Predictions.of(logits.pop(label).to(where), tokens.to(where), predicted.to(where), kept, first)
                for label in list(logits)
            }
            sums.weigh(part.unit)
            ce_clean = {label: metrics.add_clean(sums, predictions, label) for label, predictions in clean.items()}
            for splice in models.splices:
                for name, value in ablations.items():
                    new = fixed.get(name + splice.label)
                    if new is None:
                        new = models.logits(splice, tokens, models.everywhere(splice, value, tokens), first)
                    metrics.add_losses(sums, name + splice.label, clean[splice.clean], new.to(where))
            before = None if earlier is None else earlier.of_each(x)
            x, wanted = kept.of_each(x), kept.of_each(y).float()
            square = metrics.add_activations(sums, wanted, mean, kept)
            metrics.add_parts(sums, wanted, mean, models.parts, kept)
            members = _members(groupings, part, kept)
            for name, member in members.items():
                metrics.add_bands(sums, name, wanted, mean, square, member, kept)
                has_target = next(iter(clean.values())).has_target
                metrics.add_band_values(sums, f"{name}.predictions", has_target.double(), member, kept)
            for i, dictionary in enumerate(dictionaries):
                here = x.to(dictionary.W_enc.device)
                codes = dictionary.encode(here)
                if dictionary.d_out != y.shape[-1]:
                    raise ShapeError(
                        f"a dictionary returns [..., {dictionary.d_out}], but {' + '.join(hooks.writes)} is {list(y.shape)}"
                    )
                x_hat = dictionary.decode(codes, here).float().to(x.device)
                metrics.add_codes(sums, str(i), codes.to(x.device), kept)
                error = metrics.add_reconstruction(sums, str(i), wanted, x_hat, square, kept)
                metrics.add_part_errors(sums, str(i), wanted, x_hat, models.parts, kept)
                spliced = y.index_put((kept.row, kept.position), x_hat.to(y.dtype))
                if earlier is not None:
                    x_hat = dictionary(before.to(dictionary.W_enc.device)).to(y)
                    spliced = spliced.index_put((earlier.row, earlier.position), x_hat)
                for splice in models.splices:
                    new = models.logits(splice, tokens, spliced, first).to(where)
                    ce = metrics.add_losses(sums, f"{i}{splice.label}", clean[splice.clean], new)
                    for name, member in members.items() if splice.label == "" else ():
                        metrics.add_band_values(sums, f"{i}.{name}.ce", ce - ce_clean[""], member, kept)
                for name, member in members.items():
                    metrics.add_band_values(sums, f"{i}.{name}.error", error, member, kept)
            advance(len(x), "")
            yield


def _fixed(models: SplicedModels, held: Held, ablations: Mapping[str, Float[Tensor, " d"]]) -> dict[str, Tensor]:
    """Return the logits of the ablations that are the same for every row."""
    where, lm = float64_device(models.lm.device), models.lm
    row = held.probe.tokens[:, : held.width].to(lm.device)
    row = F.pad(row, (0, max(0, held.width - row.shape[1])), value=lm.pad_id)
    return {
        name + splice.label: models.logits(splice, row, models.everywhere(splice, value, row)).to(where)
        for splice in models.splices
        if models.is_constant(splice)
        for name, value in ablations.items()
    }


def _members(groupings: Sequence[Grouping], part: _Part, kept: Kept) -> dict[str, Float[Tensor, "n_kept _"]]:
    """Return, for each grouping, the membership of the kept tokens in its bands."""
    members = {}
    for grouping in groupings:
        band = grouping.band(part.rows.tokens).to(kept.row.device)
        members[grouping.name] = metrics.membership(kept.of_each(band), grouping.n_bands)
    return members
