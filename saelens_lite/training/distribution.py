"""The distribution of a training over several processes: by dictionaries, by latents or by rows of the batch."""

import logging
from collections.abc import Sequence
from typing import Literal, NamedTuple

from saelens_lite import processes, registry
from saelens_lite.cache import Source
from saelens_lite.codes.parallel import ALL_HERE, Layout
from saelens_lite.config import TrainConfig
from saelens_lite.errors import ConfigError
from saelens_lite.processes import ALONE, Team
from saelens_lite.training.trainer import choose_hooks

Parallel = Literal["auto", "sweep", "latents", "data"]
log = logging.getLogger(__name__)
MODES = ("sweep", "latents", "data")  # in the order in which "auto" tries them


class Share(NamedTuple):
    """The part of a training that this process does.

    numbers: of the dictionaries that it trains. layout: what it holds of each. is_sweep: other processes train the others.
    """

    numbers: Sequence[int]
    layout: Layout = ALL_HERE
    team: Team = ALONE
    is_sweep: bool = False

    @property
    def writes(self) -> bool:
        """True if this process writes the logs and results of its dictionaries."""
        return self.is_sweep or self.team.is_first


def share_of(parallel: Parallel, configs: Sequence[TrainConfig], team: Team) -> Share:
    """Return the part of this process.

    Args:
        parallel: "sweep": each process trains some of the dictionaries. "latents": the processes of one machine hold different
            latents of each dictionary, and each machine has other rows of the batch. "data": each process has other rows.
            "auto": a sweep if there are at least as many dictionaries as processes, else latents, else data.

    Raises:
        ConfigError: the dictionaries cannot be distributed like that.
    """
    if parallel not in ("auto", "sweep", "latents", "data"):
        raise ConfigError(f"parallel = {parallel!r}; expected auto, sweep, latents or data")
    everything = range(len(configs))
    if team.world == 1:
        return Share(everything)
    n = _together(team)
    objections: dict[str, str] = {}
    for chosen in MODES if parallel == "auto" else (parallel,):
        objections[chosen] = _objection(chosen, configs, team.world, n)
        if not objections[chosen]:
            break
    else:
        reasons = "; ".join(f"{mode}: {why}" for mode, why in objections.items())
        raise ConfigError(f"this training cannot be distributed over {team.world} processes: {reasons}")
    if chosen == "sweep":
        return Share(everything[team.rank :: team.world], team=team, is_sweep=True)
    if chosen == "data":
        return Share(everything, Layout(rows=team, everyone=team), team)
    machines = [list(range(first, first + n)) for first in range(0, team.world, n)]
    rows = [list(range(i, team.world, n)) for i in range(n)]
    return Share(everything, Layout(team.among(rows), team.among(machines), team), team)


def share_when_resumed(parallel: Parallel, configs: Sequence[TrainConfig], team: Team) -> Share:
    """Return the part of this process in a run that began with other processes: as before if that works, else "auto"."""
    try:
        return share_of(parallel, configs, team)
    except ConfigError as error:
        log.warning("%s; it is resumed with parallel = 'auto'", error)
        return share_of("auto", configs, team)


def _together(team: Team) -> int:
    """Return the number of processes that hold latents together: those of a machine, if each machine has as many."""
    here, *others = set(team.gather(processes.on_this_machine()))
    return here if not others and here > 1 and team.world % here == 0 else team.world


def _objection(mode: str, configs: Sequence[TrainConfig], world: int, together: int) -> str:
    """Return why dictionaries cannot be distributed in a mode, or an empty string."""
    if mode == "sweep":
        few = len(configs) < world
        return f"there are fewer dictionaries ({len(configs)}) than processes" if few else ""
    n_latents = together if mode == "latents" else 1
    for config in configs:
        rule = registry.load(config.sparsity)
        if not rule.shardable:
            return f"a dictionary with the rule {config.sparsity} can only be trained by one process"
        neighbours = rule(rule.Config(**config.options), d_in=1, d_sae=config.d_sae).latents_together
        if config.d_sae % (n_latents * neighbours):
            of_groups = f" into groups of {neighbours}" if neighbours > 1 else ""
            return f"d_sae = {config.d_sae} cannot be divided equally among {n_latents} processes{of_groups}"
        if config.batch_size % (world // n_latents):
            return f"batch_size = {config.batch_size} cannot be divided equally among {world // n_latents} processes"
    return ""


def meet_statistics(source: Source, configs: Sequence[TrainConfig], team: Team) -> None:
    """Have all processes compute the statistics of the same hooks, in the same order: a stream needs all of them for each."""
    if team.world > 1:
        for hook in dict.fromkeys(hook for config in configs for hook in choose_hooks(config, source).all):
            source.statistics(hook)
