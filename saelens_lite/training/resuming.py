"""Interrupted runs are resumed, and runs are extended to more tokens."""

import logging
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import torch

from saelens_lite import processes
from saelens_lite.cache import Source, TensorSource, open_source, with_differences
from saelens_lite.cache.resumed import expect
from saelens_lite.config import TrainConfig
from saelens_lite.devices import chosen_device, device_to_train_on, is_available
from saelens_lite.errors import ConfigError, SourceChangedError
from saelens_lite.files import check_inside
from saelens_lite.kinds import runs_in
from saelens_lite.locks import locked
from saelens_lite.loggers import load_loggers
from saelens_lite.outputs import check_shared
from saelens_lite.paths import check_input
from saelens_lite.training.aside import put_back_runs, remove_replaced
from saelens_lite.training.checkpoint import is_interrupted, load_checkpoint
from saelens_lite.training.distribution import meet_statistics, share_when_resumed
from saelens_lite.training.finished import read_finished
from saelens_lite.training.folders import locked_folders, run_folders, run_kind
from saelens_lite.training.history import History
from saelens_lite.training.loop import Group, runs_of_all, train_to_the_end
from saelens_lite.training.run import Run
from saelens_lite.training.trainer import Trainer, check_sizes

log = logging.getLogger(__name__)


def resume(
    run: str | Path,
    source: Source | None = None,
    *,
    text: str | None = None,
    n_tokens: int | None = None,
    device: str | torch.device | None = None,
    loggers: str | Sequence[str] | None = None,
    checkpoint_seconds: float | None = None,
) -> list[Run]:
    """Resume an interrupted run from its newest undamaged checkpoint, or extend a run, and return its runs.

    The result has the same bytes as without the interruption, if the number of processes is the same. Any number can resume: a
    checkpoint has the whole state. Dropped dictionaries stay dropped. The token rows, tensors or
    cache are compared with those that had been read when the checkpoint was written.

    Args:
        run: the folder that `train` was given as `out`.
        source: the activations that the run is trained on. Not needed for a cache, or for a stream of a file, a dataset or
            the embedded corpus: the checkpoint names these.
        text: the new path of the text of a stream, if it has moved.
        n_tokens: a new total, which extends the run. An interrupted run keeps its state, and its schedule is stretched to the
            new total; a last share with KL (`kl_share`) that has begun ends, and begins again in the last share of the new
            total. A finished run keeps no moments of Adam, and its learning rate has fallen to 0; so training continues
            from its dictionary with new moments and a new schedule (warm-up, plateau, decay) over the additional tokens, which
            are those after the ones it has read.
        device, loggers, checkpoint_seconds: by default those of the run. If its device is missing, the default of `train`
            replaces it, with a warning.

    Raises:
        ConfigError: the run has no checkpoints and n_tokens is not given, n_tokens is not more than the run has seen, or the
            source must be given.
        SourceChangedError: the part of the source that was read has changed. The run stays as it is.
        CorruptFileError: all checkpoints are damaged.
        LockedError: another process trains or resumes this run.
        Stopped: after Ctrl-C or SIGTERM.
    """
    run = check_input(run)
    if source is not None and text is not None:
        raise ConfigError("both a source and a text were given; give only one of them")
    if not os.path.lexists(run.parent):
        raise ConfigError(f"{run} has no checkpoints, so there is nothing to resume")
    team = processes.team()
    processes.check_same({"resume": str(run), "n_tokens": n_tokens}, None, device)
    check_shared(run, team)
    with ExitStack() as stack:

        def lock() -> None:
            stack.enter_context(locked(run, "run"))
            put_back_runs(run, [run], run_kind())

        team.first(lock)
        begin = _interrupted if team.tell(is_interrupted(run)) or n_tokens is None else _extended
        job, folders, source = begin(run, source, text, n_tokens, device, loggers, checkpoint_seconds)
        team.first(lambda: _enter(stack, locked_folders(*(folder for folder in folders if folder != run))))
        runs = train_to_the_end(job, source)
        team.first(lambda: remove_replaced(run, folders))
    return runs_of_all(job, folders, runs)


def _enter(stack: ExitStack, context: AbstractContextManager) -> None:
    stack.enter_context(context)


def _interrupted(
    run: Path,
    source: Source | None,
    text: str | None,
    n_tokens: int | None,
    device: str | torch.device | None,
    loggers: str | Sequence[str] | None,
    checkpoint_seconds: float | None,
) -> tuple[Group, list[Path], Source]:
    """Return the job that the newest checkpoint describes, the folders of all dictionaries, and the source."""
    if n_tokens is None and not is_interrupted(run):
        _refuse_without_checkpoint(run)
    states, loop = load_checkpoint(run)
    steps = {"batches": loop["n_batches"], "tokens": [numbers["n_seen"] for _, numbers in states]}
    processes.team().agree(steps, "checkpoints")
    request, configs = loop["request"], [TrainConfig(**c) for c in loop["configs"]]
    if n_tokens is not None:
        _check_total(run, n_tokens, max(numbers["n_seen"] for _, numbers in states))
    device = _device_of(request, device)
    processes.check_same({}, device=device)
    validation, source = _reopened(request, source, text, device, configs)
    expect(source, loop.get("source"))
    for config, (tensors, _) in zip(configs, states, strict=True):
        check_sizes(config, source, tensors)
    for folder in set(run_folders(run, configs)) - {run}:
        check_inside(folder)
    share = share_when_resumed(request.get("parallel", "auto"), configs, processes.team())
    meet_statistics(source, configs, share.team)
    trainers = [Trainer(configs[i], source, device, share.layout) for i in share.numbers]
    try:
        for trainer, i in zip(trainers, share.numbers, strict=True):
            trainer.restore(*states[i])
    except (KeyError, RuntimeError) as error:
        raise ConfigError(
            f"the checkpoint of {run} does not fit its dictionaries: {error}; it may be of another version of a plugin"
        ) from error
    if n_tokens is not None:
        for trainer in trainers:
            trainer.stretch(n_tokens)
    folders, dropped = run_folders(run, configs), loop.get("dropped") or [None] * len(configs)
    job = Group(
        source=source,
        trainers=trainers,
        folders=[folders[i] for i in share.numbers],
        out=run,
        data_seed=request["data_seed"],
        validation=validation,
        loggers=_loggers(loop["loggers"], loggers),
        checkpoint_seconds=request["checkpoint_seconds"] if checkpoint_seconds is None else checkpoint_seconds,
        request=request,
        share=share,
        histories=[loop["histories"][i] for i in share.numbers],
        n_batches=loop["n_batches"],
        dropped=[dropped[i] for i in share.numbers],
    )
    log.info("resuming %s after batch %d", run, job.n_batches)
    return job, folders, source


def _extended(
    run: Path,
    source: Source | None,
    text: str | None,
    n_tokens: int,
    device: str | torch.device | None,
    loggers: str | Sequence[str] | None,
    checkpoint_seconds: float | None,
) -> tuple[Group, list[Path], Source]:
    """Return a job that continues finished runs from their dictionaries, their folders, and the source."""
    runs = Run.load_all(run)
    if open_ended := [str(one.folder) for one in runs if one.state != "finished"]:
        raise ConfigError(f"{', '.join(open_ended)}: not a finished run, so it cannot be extended")
    configs = [one.config.replace(n_tokens=n_tokens) for one in runs]
    records = [one.dictionary.training_record for one in runs]
    steps, seen = ({record.get(name) for record in records} for name in ("steps", "tokens"))
    if [one.folder for one in runs] != run_folders(run, configs) or len(steps) > 1 or len(seen) > 1:
        kl = ""
        if len({one.config.n_tokens for one in runs}) == 1 and any(one.config.kl_share for one in runs):
            kl = " (kl_share makes batches of whole rows, which are smaller)"
        raise ConfigError(
            f"the runs in {run} were not trained together for equally many steps and tokens{kl}, so extend them one at a time: "
            + ", ".join(str(one.folder) for one in runs)
        )
    (n_steps,), (n_seen,) = steps, seen
    processes.team().agree({"steps": n_steps, "tokens": n_seen}, "finished runs")
    if n_steps is None or n_seen is None:
        raise ConfigError(f"the dictionary in {run} has no record of its training, so the run cannot be extended")
    _check_total(run, n_tokens, n_seen)
    data = read_finished(runs[0].folder)
    request = data.request.model_dump()
    device = _device_of(request, device)
    processes.check_same({}, device=device)
    validation, source = _reopened(request, source, text, device, configs)
    if data.source is not None:
        expect(source, data.source)
    share = share_when_resumed(request["parallel"], configs, processes.team())
    meet_statistics(source, configs, share.team)
    own = [runs[i] for i in share.numbers]
    trainers = [Trainer(configs[i], source, device, share.layout) for i in share.numbers]
    for trainer, one in zip(trainers, own, strict=True):
        trainer.start_from(one.dictionary, n_seen, n_steps, one.history[-1].get("coefficient") if one.history else None)
    log.info("extending %s from %s to %s tokens, with new moments and a new schedule", run, f"{n_seen:,}", f"{n_tokens:,}")
    job = Group(
        source=source,
        trainers=trainers,
        folders=[one.folder for one in own],
        out=run,
        data_seed=request["data_seed"],
        validation=validation,
        loggers=_loggers(data.loggers, loggers),
        checkpoint_seconds=request["checkpoint_seconds"] if checkpoint_seconds is None else checkpoint_seconds,
        request=request,
        share=share,
        histories=[History(line for line in one.history if line["tokens"] <= n_seen) for one in own],
        n_batches=n_steps,
    )
    return job, [one.folder for one in runs], source


def _refuse_without_checkpoint(run: Path) -> None:
    """Raise ConfigError for a run without checkpoints. The message says what can be done with it."""
    if runs_in(run) and all(one.state == "finished" for one in Run.load_all(run)):
        raise ConfigError(f"{run} is finished and has no checkpoints; to extend it, give n_tokens (--n-tokens), the new total")
    if is_interrupted(run.parent):
        raise ConfigError(f"{run} has no checkpoints of its own; it is one of several in {run.parent}: resume that")


def _check_total(run: Path, n_tokens: int, n_seen: int) -> None:
    """Raise ConfigError unless the new total is more than the run has seen."""
    if n_tokens <= n_seen:
        raise ConfigError(
            f"n_tokens = {n_tokens:,} is the new total of {run}, which has already seen {n_seen:,} tokens; give more than that"
        )


def _loggers(of_run: list[str], given: str | Sequence[str] | None) -> list[str]:
    """Return the names of the loggers: the given ones, else those of the run. Raise PluginError if one does not exist."""
    chosen = of_run if given is None else [given] if isinstance(given, str) else list(given)
    load_loggers(chosen)
    return chosen


def _reopened(
    request: dict[str, Any],
    source: Source | None,
    text: str | None,
    device: str | torch.device | None,
    configs: Sequence[TrainConfig],
) -> tuple[TensorSource | None, Source]:
    """Return the activations to validate on and those to train on, from the given source or from that of the run."""
    if source is None:
        source = open_source(request["source"], device, text)
    _check_source(source.describe(), request["source"])
    source = with_differences(source, [hook for config in configs for hook in config.hooks])
    return source.hold_out(n) if (n := request["validation_tokens"]) else (None, source)


def _device_of(request: dict[str, Any], device: str | torch.device | None) -> torch.device:
    """Return the device to resume on."""
    if device is not None:
        return device_to_train_on(device)
    if is_available(request["device"]):
        return chosen_device(request["device"])  # of several processes, each has its own GPU
    chosen = chosen_device(None)
    log.warning("the run was trained on %s, which is not available; resuming on %s", request["device"], chosen)
    return chosen


def _check_source(given: dict[str, Any] | None, wanted: dict[str, Any] | None) -> None:
    """Raise SourceChangedError if both are caches whose descriptions differ in more than the path."""
    if given and wanted and "cache" in given and "cache" in wanted and given | {"cache": None} != wanted | {"cache": None}:
        raise SourceChangedError(f"{given['cache']} is not the cache the run was trained on, which was {wanted['cache']}")
