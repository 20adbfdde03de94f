"""Evaluation on rows of activations, without a model."""

import logging
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelens_lite.arrays import ArrayLike, as_tensor, described
from saelens_lite.cache.resumed import tensor_hash
from saelens_lite.devices import float64_device, wide
from saelens_lite.dictionary import Dictionary
from saelens_lite.errors import ConfigError, NonFiniteError, ShapeError, near_matches
from saelens_lite.evaluation import metrics
from saelens_lite.evaluation.controls import PERMUTED, moments, permuted_dictionary, untrained
from saelens_lite.evaluation.metrics import Kept
from saelens_lite.evaluation.replicates import Units, recipe_of, weights_id
from saelens_lite.evaluation.report import EvalReport
from saelens_lite.evaluation.sums import PooledSums, run_in_rounds
from saelens_lite.model.passes import BATCH_TOKENS
from saelens_lite.ports import Port, names, spans, together
from saelens_lite.processes import Team, check_same, team
from saelens_lite.progress import progress_bar

MAX_UNITS = 4096  # groups beyond this number are drawn several at a time, which saves time and hardly changes an interval
SAMPLE = 2048  # rows on which a random dictionary is scaled

log = logging.getLogger(__name__)
Batch = TypeVar("Batch")


class RowData(NamedTuple):
    """Activations, the output that is wanted for each, and the numbers of the units that the bootstrap draws."""

    x: Float[Tensor, "n d_in"]
    wanted: Float[Tensor, "n d_out"]
    unit: Int[Tensor, " n"]
    n_groups: int
    name: str | None
    batch_rows: int
    n_bootstrap: int
    seed: int
    sha256: str
    team: Team
    weights: str  # of the bootstrap, see `weights_id`
    units: Units


def evaluate_rows(
    dictionaries: Sequence[Dictionary],
    x: ArrayLike,
    target: ArrayLike | None,
    groups: ArrayLike | None,
    *,
    controls: bool,
    further: Mapping[str, Dictionary],
    name: str | None,
    batch_rows: int | None,
    n_bootstrap: int,
    seed: int,
) -> list[EvalReport]:
    """Return the reports of dictionaries on activations; see `evaluate`."""
    if target is None and isinstance(x, tuple) and len(x) == 2 and all(getattr(part, "ndim", 0) == 2 for part in x):
        x, target = x
    if isinstance(x, Mapping):
        inputs, wanted = _of_ports(x, target, dictionaries)
        target = None if wanted is inputs else wanted
    else:
        inputs = _checked(x, "x")
        wanted = inputs if target is None else _checked(target, "target")
    if len(wanted) != len(inputs):
        raise ShapeError(f"x has {len(inputs):,} rows and target {len(wanted):,}; expected the same number")
    for one in [*dictionaries, *further.values()]:
        _check_fit(one, inputs, None if target is None else wanted)
    unit, sizes = _units(groups, len(inputs), seed)
    n_groups = len(sizes)
    if n_groups == 1:
        log.warning("no intervals: a bootstrap draws groups of rows, and there is only one; give at least two")
    everyone = team()
    sha256 = tensor_hash(inputs) if wanted is inputs else f"{tensor_hash(inputs)} {tensor_hash(wanted)}"
    if everyone.world > 1:
        check_same({"dictionaries": [identity(one) for one in [*dictionaries, *further.values()]]}, device=inputs.device)
    units_hash = tensor_hash(unit)
    everyone.agree(
        {"activations": sha256, "groups": units_hash, "batch_tokens": batch_rows, "n_bootstrap": n_bootstrap,
         "seed": seed, "controls": controls},
        "evaluations",
    )  # fmt: skip
    rows = RowData(
        x=inputs,
        wanted=wanted,
        unit=unit,
        n_groups=n_groups,
        name=name,
        batch_rows=batch_rows or BATCH_TOKENS["cpu" if inputs.device.type == "cpu" else "cuda"],
        n_bootstrap=n_bootstrap,
        seed=seed,
        sha256=sha256,
        team=everyone,
        weights=weights_id(seed, n_groups, sha256, units_hash),
        units=Units.of_sizes("rows" if groups is None else "groups", sizes),
    )
    reports = _reports(rows, dictionaries)
    return _with_controls(rows, dictionaries, reports, further) if controls or further else reports


def identity(dictionary: Dictionary) -> dict[str, Any]:
    """Return the facts about a dictionary that its report depends on, with hashes of its weights."""
    return {
        "place": dictionary.place,
        "rule": dictionary.rule.plugin_name,
        "options": dictionary.rule.config.model_dump(mode="json"),
        "token_norm": dictionary.token_norm,
        "weights": {name: tensor_hash(torch.atleast_1d(x)) for name, x in dictionary.state_dict().items()},
    }


def _checked(x: ArrayLike, name: str) -> Float[Tensor, "n d"]:
    """Return activations as a tensor.

    Raises:
        ShapeError: they are not [n d] with at least two rows of floating-point numbers.
        NonFiniteError: they hold NaN or infinity, or all rows are the same.
    """
    x = as_tensor(x, name).detach()
    if x.ndim != 2 or not x.is_floating_point():
        raise ShapeError(f"{name} is {described(x)}; expected floating-point numbers [n d], a row for each activation")
    if len(x) < 2:
        raise ShapeError(f"{name} has {len(x)} rows; at least two are needed, because fvu compares errors with the variance")
    finite = torch.isfinite(x).all(1)
    if not finite.all():
        bad = (~finite).nonzero().squeeze(1)
        raise NonFiniteError(
            f"{name} holds NaN or infinity in {len(bad):,} of {len(x):,} rows, the first of which is row {int(bad[0])}"
        )
    if (x == x[0]).all():
        raise NonFiniteError(f"the {len(x):,} rows of {name} are all the same, so there is no variance to explain")
    return x


def _of_ports(
    x: Mapping[str, ArrayLike], target: ArrayLike | None, dictionaries: Sequence[Dictionary]
) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, "n d_out"]]:
    """Return the activations at the read ports and at the written ports, from activations by port key.

    Raises:
        ConfigError: a target is given beside them, the dictionaries have different ports, or a port is missing.
        ShapeError: the activations at a port have another width, or another number of rows than at others.
    """
    if target is not None:
        raise ConfigError("x names activations by port, also those that are written; leave out target")
    sides = list(dict.fromkeys((names(d.reads), names(d.writes)) for d in dictionaries))
    if len(sides) != 1:
        raise ConfigError(
            f"activations by port are for dictionaries of the same ports; found {sides}; evaluate them one by one"
        )
    parts: dict[str, Tensor] = {}
    for port in (*dictionaries[0].reads, *dictionaries[0].writes):
        if port.key is None:
            raise ConfigError(
                "a port of the dictionary names no hook; give one tensor [n d_in] in place of activations by port"
            )
        if port.key not in x:
            raise ConfigError(f"x has no activations of {port.key!r}{near_matches(port.key, x) or '; it has ' + ', '.join(x)}")
        part = parts[port.key] = _checked(x[port.key], f"x[{port.key!r}]")
        if part.shape[1] != port.width:
            raise ShapeError(f"x[{port.key!r}] has shape {tuple(part.shape)}; the dictionary has {port.width} columns there")
    if len({len(part) for part in parts.values()}) != 1:
        counts = ", ".join(f"{len(part):,} of {key}" for key, part in parts.items())
        raise ShapeError(f"x has different numbers of rows: {counts}; expected one row of each port for each token")
    device = next(iter(parts.values())).device
    reads, writes = (
        [parts[str(port.key)].to(device) for port in side] for side in (dictionaries[0].reads, dictionaries[0].writes)
    )
    inputs = together(reads)
    return inputs, inputs if dictionaries[0].writes_what_it_reads else together(writes)


def _check_fit(dictionary: Dictionary, x: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_out"] | None) -> None:
    """Raise an error unless a dictionary is finite, takes x, and writes the target if there is one."""
    dictionary.check_finite()
    if x.shape[1] != dictionary.d_in:
        raise ShapeError(
            f"x has shape {tuple(x.shape)}; this dictionary takes [n, {dictionary.d_in}] ({names(dictionary.reads)})"
        )
    if dictionary.writes_what_it_reads and target is not None:
        raise ConfigError("a target was given, but this dictionary writes what it reads; leave out the target")
    if dictionary.writes_what_it_reads:
        return
    if target is None:
        raise ConfigError(
            f"this dictionary predicts other activations than it reads ({dictionary.place}); give them too: evaluate(d, (x, y))"
        )
    if target.shape[1] != dictionary.d_out:
        raise ShapeError(f"the target has shape {tuple(target.shape)}; this dictionary returns [n, {dictionary.d_out}]")


def _units(groups: ArrayLike | None, n: int, seed: int) -> tuple[Int[Tensor, " n"], list[int]]:
    """Return the unit of each row and the sizes of the groups. Without groups, each row is one.

    A unit is a group. If there are more than MAX_UNITS groups, it is several of them, chosen at random.

    Raises:
        ShapeError: groups do not have one label for each row.
    """
    group, n_groups = torch.arange(n), n
    if groups is not None:
        try:
            labels = np.asarray(groups.cpu() if isinstance(groups, Tensor) else groups)
            if labels.shape != (n,):
                raise ShapeError(f"groups have shape {labels.shape}; expected a label for each of the {n:,} rows of x")
            distinct, number = np.unique(labels, return_inverse=True)
        except (TypeError, ValueError) as error:
            raise ShapeError(f"groups are {described(groups)}; expected labels of one kind: {error}") from None
        group, n_groups = torch.from_numpy(number), len(distinct)
    sizes = group.bincount().tolist()
    if n_groups > MAX_UNITS:
        order = torch.randperm(n_groups, generator=torch.Generator().manual_seed(seed))
        group = (order * MAX_UNITS // n_groups)[group]
    return group, sizes


def _batches(unit: Int[Tensor, " n"], size: int) -> Iterator[tuple[Int[Tensor, " n_batch"], Kept, int]]:
    """Yield the numbers of rows, their places among the units of the batch, and the number of the first of these.

    A batch has as many whole units as fit into `size` rows, or a part of a larger unit.
    """
    order, ends = unit.argsort(stable=True), unit.bincount().cumsum(0).tolist()
    first = begin = 0
    while first < len(ends):
        after = first + 1
        while after < len(ends) and ends[after] - begin <= size:
            after += 1
        stop = ends[after - 1]
        for start in range(begin, stop, size):
            some = order[start : min(start + size, stop)]
            yield some, Kept(unit[some] - first, torch.zeros_like(some), after - first), first
        first, begin = after, stop


def _reports(
    rows: RowData, dictionaries: Sequence[Dictionary], ports: Sequence[Sequence[Port]] | None = None
) -> list[EvalReport]:
    """Read the rows once, and return a report for each dictionary.

    ports: those among which the columns of each are divided; default: the ports that it writes.
    """
    divided = [_by_port(one) for one in ports or [d.writes for d in dictionaries]]
    all_parts = list({(part.start, part.stop): part for of in divided for part in of.values()}.values())
    sums = PooledSums(rows.n_bootstrap, rows.seed, rows.units.n_effective)
    where = float64_device(rows.wanted.device)  # for the sums
    mean = (sum(wide(y).sum(0) for y in rows.wanted.split(rows.batch_rows)) / len(rows.wanted)).float()

    def steps() -> Generator[None, None, None]:
        for some, places, first in _own(_batches(rows.unit, rows.batch_rows), rows.team):
            sums.weigh(torch.arange(first, first + places.n))
            kept = Kept(places.row.to(where), places.position.to(where), places.n)
            x, wanted = rows.x[some.to(rows.x.device)], rows.wanted[some.to(rows.wanted.device)].to(where).float()
            square = metrics.add_activations(sums, wanted, mean, kept)
            metrics.add_parts(sums, wanted, mean, all_parts, kept)
            for i, dictionary in enumerate(dictionaries):
                here = x.to(dictionary.W_dec.device)
                codes = dictionary.encode(here)
                x_hat = dictionary.decode(codes, here).to(where).float()
                metrics.add_codes(sums, str(i), codes.to(where), kept)
                metrics.add_reconstruction(sums, str(i), wanted, x_hat, square, kept)
                metrics.add_part_errors(sums, str(i), wanted, x_hat, divided[i].values(), kept)
            advance(len(some), "")
            yield

    with progress_bar("evaluate", len(rows.x) // rows.team.world) as advance:
        run_in_rounds(steps(), rows.team)
    sums.pool(rows.team)
    return [
        EvalReport(
            metrics=metrics.reconstruction_metrics(sums, str(i)) | metrics.latent_metrics(sums, str(i)),
            n_tokens=len(rows.x),
            n_sequences=rows.n_groups,
            text=rows.name,
            text_sha256=rows.sha256,
            disjoint=None,
            disjoint_why="rows are not compared with those of the training",
            model=None,
            hook=_named(dictionary.writes),
            read_hook=_named(dictionary.reads),
            excluded="",
            density=metrics.density(sums, str(i)),
            by_port={key: metrics.part_metrics(sums, str(i), [part]) for key, part in divided[i].items()} or None,
            replicates=metrics.kept_replicates(sums, str(i), rows.weights, rows.units, with_losses=False),
            recipe=recipe_of(dictionary),
        )
        for i, dictionary in enumerate(dictionaries)
    ]


def _own(batches: Iterable[Batch], team: Team) -> Iterator[Batch]:
    """Return every W-th of the batches, which are those of this process of W."""
    return islice(batches, team.rank, None, team.world)


def _by_port(ports: Sequence[Port]) -> dict[str, slice]:
    """Return the columns of each port by its key, or by its number; none if there is only one port."""
    if len(ports) == 1:
        return {}
    return {port.key or f"port {i}": part for i, (port, part) in enumerate(zip(ports, spans(ports), strict=True))}


def _named(ports: Sequence[Port]) -> str:
    """Return the hooks of ports, or an empty string if they are not known."""
    return names(ports) if any(port.hook for port in ports) else ""


def _with_controls(
    rows: RowData, dictionaries: Sequence[Dictionary], reports: Sequence[EvalReport], further: Mapping[str, Dictionary]
) -> list[EvalReport]:
    """Return the reports together with those of their controls. A random dictionary and PCA reconstruct the wanted output."""
    wanted = rows.wanted.float()
    others = untrained(
        moments(_own(wanted.split(rows.batch_rows), rows.team), float64_device(wanted.device), rows.team),
        wanted[:: -(-len(wanted) // SAMPLE)],
        dictionaries,
        [report["l0"] for report in reports],
    )
    measured = iter(
        _reports(
            rows._replace(x=wanted, wanted=wanted, sha256=tensor_hash(wanted)),
            [control for some in others for control in some.values()],
            [d.writes for d, some in zip(dictionaries, others, strict=True) for _ in some],
        )
    )
    damaged = [permuted_dictionary(d, report.density, rows.seed) for d, report in zip(dictionaries, reports, strict=True)]
    altered = _reports(rows, [*damaged, *further.values()])
    of_further = dict(zip(further, altered[len(damaged) :], strict=True))
    return [
        replace(report, controls={name: next(measured) for name in some} | {PERMUTED: permuted} | of_further)
        for report, some, permuted in zip(reports, others, altered[: len(damaged)], strict=True)
    ]
