"""Resumption of interrupted runs."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from saelens_lite.cache import Source, open_source
from saelens_lite.cache.resumed import expect
from saelens_lite.config import TrainConfig
from saelens_lite.devices import chosen_device, device_to_train_on, is_available
from saelens_lite.errors import ConfigError, SourceChangedError
from saelens_lite.files import check_inside
from saelens_lite.locks import locked
from saelens_lite.loggers import load_loggers
from saelens_lite.paths import check_input
from saelens_lite.training.aside import put_back_runs, remove_replaced
from saelens_lite.training.checkpoint import load_checkpoint
from saelens_lite.training.folders import locked_folders, run_folders, run_kind
from saelens_lite.training.loop import Group, train_to_the_end
from saelens_lite.training.run import Run
from saelens_lite.training.trainer import Trainer, check_sizes

log = logging.getLogger(__name__)


def resume(
    run: str | Path,
    source: Source | None = None,
    *,
    text: str | None = None,
    device: str | torch.device | None = None,
    loggers: str | Sequence[str] | None = None,
    checkpoint_seconds: float | None = None,
) -> list[Run]:
    """Resume an interrupted run from its newest undamaged checkpoint, and return its runs.

    The result has the same bytes as without the interruption. Dropped dictionaries stay dropped. The token rows, tensors or
    cache are compared with those that had been read when the checkpoint was written.

    Args:
        run: the folder that `train` was given as `out`.
        source: the activations that the run is trained on. Not needed for a cache, or for a stream of a file, a dataset or
            the embedded corpus: the checkpoint names these.
        text: the new path of the text of a stream, if it has moved.
        device, loggers, checkpoint_seconds: by default those of the run. If its device is missing, the default of `train`
            replaces it, with a warning.

    Raises:
        ConfigError: the run has no checkpoints, or its source must be given.
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
    with locked(run, "run"):
        put_back_runs(run, [run], run_kind())
        job, source = _interrupted(run, source, text, device, loggers, checkpoint_seconds)
        with locked_folders(*(folder for folder in job.folders if folder != run)):
            runs = train_to_the_end(job, source)
        remove_replaced(run, job.folders)
    return runs


def _interrupted(
    run: Path,
    source: Source | None,
    text: str | None,
    device: str | torch.device | None,
    loggers: str | Sequence[str] | None,
    checkpoint_seconds: float | None,
) -> tuple[Group, Source]:
    """Return the job that the newest checkpoint describes, ready to continue, and its source."""
    states, loop = load_checkpoint(run)
    request = loop["request"]
    device = _device_of(request, device)
    if source is None:
        source = open_source(request["source"], device, text)
    _check_source(source.describe(), request["source"])
    validation, source = source.hold_out(n) if (n := request["validation_tokens"]) else (None, source)
    expect(source, loop.get("source"))
    configs = [TrainConfig(**c) for c in loop["configs"]]
    for config, (tensors, _) in zip(configs, states, strict=True):
        check_sizes(config, source, tensors)
    for folder in set(run_folders(run, configs)) - {run}:
        check_inside(folder)
    trainers = [Trainer(config, source, device or request["device"]) for config in configs]
    try:
        for trainer, state in zip(trainers, states, strict=True):
            trainer.restore(*state)
    except (KeyError, RuntimeError) as error:
        raise ConfigError(
            f"the checkpoint of {run} does not fit its dictionaries: {error}; it may be of another version of a plugin"
        ) from error
    chosen = loop["loggers"] if loggers is None else [loggers] if isinstance(loggers, str) else list(loggers)
    load_loggers(chosen)
    job = Group(
        source=source,
        trainers=trainers,
        folders=run_folders(run, [trainer.config for trainer in trainers]),
        out=run,
        data_seed=request["data_seed"],
        validation=validation,
        loggers=chosen,
        checkpoint_seconds=request["checkpoint_seconds"] if checkpoint_seconds is None else checkpoint_seconds,
        request=request,
        histories=loop["histories"],
        n_batches=loop["n_batches"],
        dropped=loop.get("dropped", []),
    )
    log.info("resuming %s after batch %d", run, job.n_batches)
    return job, source


def _device_of(request: dict[str, Any], device: str | torch.device | None) -> str | torch.device | None:
    """Return the device to resume on, or None for the device of the run."""
    if device is not None:
        return device_to_train_on(device)
    if is_available(request["device"]):
        return None
    chosen = chosen_device(None)
    log.warning("the run was trained on %s, which is not available; resuming on %s", request["device"], chosen)
    return chosen


def _check_source(given: dict[str, Any] | None, wanted: dict[str, Any] | None) -> None:
    """Raise SourceChangedError if both are caches whose descriptions differ in more than the path."""
    if given and wanted and "cache" in given and "cache" in wanted and given | {"cache": None} != wanted | {"cache": None}:
        raise SourceChangedError(f"{given['cache']} is not the cache the run was trained on, which was {wanted['cache']}")
