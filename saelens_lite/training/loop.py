"""The loop that trains dictionaries together, and all that happens at its end: results, errors, checkpoints."""

import hashlib
import json
import logging
import shlex
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from saelens_lite.cache import ActivationCache, Source, TensorSource
from saelens_lite.cache.resumed import record_of
from saelens_lite.codes.encoder import Spare
from saelens_lite.config import read_toml
from saelens_lite.cuda_streams import uploaded
from saelens_lite.dictionary import Dictionary
from saelens_lite.errors import (
    ConfigError,
    DiskFullError,
    NonFiniteError,
    PluginError,
    ProcessLostError,
    SaelensLiteError,
    SourceChangedError,
    Stopped,
)
from saelens_lite.files import write_text
from saelens_lite.kinds import DICTIONARY
from saelens_lite.loggers import RunLog, load_loggers, open_log
from saelens_lite.outputs import remove_own
from saelens_lite.paths import is_address
from saelens_lite.progress import progress_bar
from saelens_lite.training.advice import warn_of_l0
from saelens_lite.training.checkpoint import KeptDictionary, earlier_states, is_interrupted, remove_checkpoints, save_checkpoint
from saelens_lite.training.distribution import Share
from saelens_lite.training.feed import Feed
from saelens_lite.training.finished import write_finished
from saelens_lite.training.history import History
from saelens_lite.training.run import Run
from saelens_lite.training.stopping import Stopping
from saelens_lite.training.trainer import Trainer

log = logging.getLogger(__name__)
MEET_EVERY = 16  # steps between two meetings of processes with GPUs, because a meeting makes the hosts wait for each other


@dataclass
class Group:
    """The state of dictionaries that are trained together: their trainers, folders, logs and progress.

    In a sweep over several processes, the lists are of this process's dictionaries. `share.numbers` are their numbers among
    all.
    """

    source: Source
    trainers: list[Trainer]
    folders: list[Path | None]
    out: Path | None
    data_seed: int
    validation: TensorSource | None
    loggers: list[str]
    checkpoint_seconds: float
    request: dict[str, Any]
    share: Share
    histories: list[History] = field(default_factory=list)
    n_batches: int = 0
    dropped: list[str | None] = field(default_factory=list)  # for each dictionary, why its training ended early

    def __post_init__(self) -> None:
        self.histories = self.histories or [History() for _ in self.trainers]
        self.dropped = self.dropped or [None] * len(self.trainers)

    @property
    def at_work(self) -> list[int]:
        """The numbers of the dictionaries that are still in training."""
        return [i for i, trainer in enumerate(self.trainers) if self.dropped[i] is None and not trainer.done]

    @property
    def n_seen(self) -> int:
        """The number of tokens that the most advanced dictionary has seen."""
        return max(trainer.n_seen for trainer in self.trainers)

    @property
    def how_to_go_on(self) -> str:
        """The command that resumes the run."""
        if self.request["source"]:
            devices = f" --devices {self.share.team.world}" if self.share.team.world > 1 else ""
            return f"saelens-lite train --resume {shlex.quote(str(self.out))}{devices}"
        return f"saelens_lite.resume({str(self.out)!r}, source)"

    def save(self) -> None:
        """Write a checkpoint, if the run has a folder. All processes do it together."""
        self.check()
        if self.out is None:
            return
        dictionaries = {
            number: KeptDictionary(trainer.config, trainer.state(), trainer.latents, self.histories[i], self.dropped[i])
            for i, (number, trainer) in enumerate(zip(self.share.numbers, self.trainers, strict=True))
        }
        loop = {
            "request": self.request,
            "source": record_of(self.source),
            "loggers": self.loggers,
            "n_batches": self.n_batches,
        }
        save_checkpoint(self.out, dictionaries, loop, self.share)

    def request_of(self, folder: Path) -> dict[str, Any]:
        """Return the request as if the dictionary in a folder were trained alone."""
        started, number = self.request.get("start_from"), self.share.numbers[self.folders.index(folder)]
        return self.request | ({"start_from": [started[number]]} if started else {})

    def result(self, i: int) -> Dictionary:
        """Return a dictionary for raw activations, with the record of its training."""
        trainer = self.trainers[i]
        dictionary = trainer.result()
        if started := self.request.get("start_from"):
            begin = started[self.share.numbers[i]]
            here = begin and not is_address(begin["source"] or "")  # a path of this machine
            dictionary.training_record["start_from"] = begin | {"source": None} if here else begin
        record = record_of(self.source) or {}
        if record.get("kind") in ("tensors", "synthetic activations"):  # the origin does not say which activations
            content = json.dumps(record, sort_keys=True)
            dictionary.training_record["data_sha256"] = hashlib.sha256(content.encode()).hexdigest()
        if trainer.first_seen:
            dictionary.training_record["extended_after"] = trainer.first_seen
        return dictionary

    def log_line(self, i: int) -> dict[str, Any]:
        """Return the next line of one dictionary's log, and note it in its history."""
        trainer = self.trainers[i]
        line = trainer.log_line()
        if self.validation:
            line |= trainer.validate(self.validation.x)
        self.histories[i].append(line)
        log.info("%s %s", trainer.config.sparsity, line)
        return line

    def check(self) -> None:
        """Drop the dictionaries that have diverged. On a GPU, this waits for the steps that were begun."""
        for i in self.at_work:
            try:
                self.trainers[i].check()
            except NonFiniteError as error:
                self.drop(i, error)

    def drop(self, i: int, cause: NonFiniteError) -> None:
        """Stop training a dictionary, and write its last good state. Raise the error if it is of the data, and so of all."""
        if cause.in_activations:
            raise cause
        try:
            kept = _kept(self, i, cause)
        except ProcessLostError:
            raise
        except SaelensLiteError as error:  # must not end the training of the others
            kept = f"; its last good state cannot be written: {error}"
        self.dropped[i] = f"{cause}{kept}"
        log.warning("stopped training %s: %s", self.name(i), self.dropped[i])

    def name(self, i: int) -> str:
        """Return the name of a dictionary in messages: its folder, or its number and rule."""
        return str(self.folders[i] or f"{self.share.numbers[i]}-{self.trainers[i].config.sparsity}")


def train_to_the_end(job: Group, source: Source) -> list[Run]:
    """Train to the end, write the dictionaries and return their runs. After an error, write the last good states."""
    classes = load_loggers(job.loggers) if job.out else {}
    has_begun = False
    try:
        with ExitStack() as stack:
            logs = [
                stack.enter_context(open_log(classes if job.share.writes else {}, folder, trainer.config, trainer.n_seen))
                for trainer, folder in zip(job.trainers, job.folders, strict=True)
            ]
            has_begun = True
            _loop(source, job, logs)
        return _results(job)
    except ProcessLostError as error:
        if job.out is None or not is_interrupted(job.out):
            raise
        raise ProcessLostError(f"{error}; resume from the last checkpoint with: {job.how_to_go_on}") from error
    except DiskFullError as error:
        if job.out is None or not is_interrupted(job.out):
            raise
        raise DiskFullError(f"{error}; free some space, then resume with: {job.how_to_go_on}") from error
    except SourceChangedError:  # the run stays as it is, for the right source
        raise
    except SaelensLiteError as error:
        alike = job.share.team.world == 1 or job.share.is_sweep or isinstance(error, NonFiniteError | PluginError)
        if has_begun and alike:
            _keep_what_is_good(job, error)
        raise


def _results(job: Group) -> list[Run]:
    """Write the dictionaries to their folders, if they have any, remove checkpoints, and return the runs.

    Raises:
        NonFiniteError: all dictionaries were dropped.
    """
    runs = []
    for i, (trainer, history, folder) in enumerate(zip(job.trainers, job.histories, job.folders, strict=True)):
        dictionary = job.result(i)
        own = None if trainer.latents.is_part else trainer.dictionary.not_finite()
        bad = own or dictionary.not_finite()
        if job.dropped[i] is None and bad:
            job.drop(i, NonFiniteError(f"{bad} became NaN or infinite in the last step, {trainer.described}"))
        if job.dropped[i] is None:
            runs.append(Run(trainer.config, dictionary, history, folder))
            warn_of_l0(str(folder or trainer.config.sparsity), dictionary, history.last)
    team = job.share.team
    if not team.any(bool(runs)):
        alone = len(job.trainers) == 1 and not job.share.is_sweep
        causes = [cause if alone else f"{job.name(i)}: {cause}" for i, cause in enumerate(job.dropped)]
        every = [cause for some in team.gather(causes) for cause in some]
        raise NonFiniteError("; ".join(dict.fromkeys(every)))
    with team.failing_together():
        for run in runs if job.share.writes else ():
            _write_result(job, run)
    if job.out:
        team.first(lambda: remove_checkpoints(job.out))
    return runs


def runs_of_all(job: Group, folders: Sequence[Path], runs: list[Run]) -> list[Run]:
    """Return the runs of all processes: those that this one has trained, and those in the folders of the others."""
    if not job.share.is_sweep:
        return runs
    own = {run.folder: run for run in runs}
    finished = {folder for some in job.share.team.gather(list(own)) for folder in some}
    return [own.get(folder) or Run.load(folder) for folder in folders if folder in finished]


def _write_result(job: Group, run: Run) -> None:
    """Write the dictionary of a finished run into its folder, if it has one."""
    if run.folder:
        run.dictionary.save(run.folder / "dictionary", exists="overwrite")
        remove_own(run.folder / "last_good", DICTIONARY)  # from an error before the run was resumed
        _note_total(run.folder / "config.toml", run.config.n_tokens)
        write_finished(run.folder, job.request_of(run.folder), job.source, job.loggers)


def _note_total(path: Path, n_tokens: int) -> None:
    """Write the number of tokens into config.toml, if the run was extended."""
    with suppress(ConfigError):  # the file is gone or was edited; the dictionary holds the settings too
        if (tables := read_toml(path)).get("n_tokens") != n_tokens:
            write_text(path, tomli_w.dumps(tables | {"n_tokens": n_tokens}))


def _keep_what_is_good(job: Group, error: SaelensLiteError) -> None:
    """Write the dictionaries as they were before an error."""
    for i, (trainer, folder) in enumerate(zip(job.trainers, job.folders, strict=True)):
        if folder and trainer.n_steps and job.dropped[i] is None:
            try:
                log.warning("stopped%s", _kept(job, i, error))
            except SaelensLiteError as another:  # the first error is the one to report
                log.warning("the last good state of %s cannot be written: %s", job.name(i), another)


def _kept(job: Group, i: int, cause: SaelensLiteError) -> str:
    """Write the last good state of a dictionary to last_good/, and return the end of a sentence that says so.

    That is the state before the failed step. If it is not finite either, it is the newest finite one of the checkpoints.
    """
    trainer, folder = job.trainers[i], job.folders[i]
    if folder is None or not trainer.n_steps:
        return ""
    number = job.share.numbers[i]
    with suppress(NonFiniteError, PluginError):  # a GPU may have counted steps that changed nothing
        trainer.check()
    good, states = job.result(i), earlier_states(job.out, number)
    while good.not_finite():
        if (state := next(states, None)) is None:
            return f"; after step {trainer.n_steps} it is not finite either, so there is no last good dictionary"
        trainer.restore(*state)
        good = job.result(i)
    good.training_record["stopped"] = str(cause)
    with job.share.team.failing_together() if not job.share.is_sweep else nullcontext():
        if job.share.writes:
            good.save(folder / "last_good", exists="overwrite")
    return f"; the dictionary after step {trainer.n_steps} is in {folder / 'last_good'}"


def _loop(source: Source, job: Group, logs: list[RunLog]) -> None:
    """Feed every trainer the same batches until each has seen the tokens it asked for."""
    trainers = job.trainers
    hooks = list(dict.fromkeys(hook for trainer in trainers for hook in trainer.hooks.all))
    due = [(trainer.n_seen // trainer.config.log_every + 1) * trainer.config.log_every for trainer in trainers]
    device = trainers[0].dictionary.W_dec.device
    gathers_there = device.type == "cuda" and type(getattr(source, "whole", source)) in (ActivationCache, TensorSource)
    where: dict[str, Any] = {"device": device} if gathers_there else {}
    rows = job.share.layout.rows
    if rows.world > 1:
        where |= {"rank": rows.rank, "world": rows.world}
    batches = source.batches(hooks, trainers[0].config.batch_size, job.data_seed, job.n_batches, **where)
    feed = Feed(uploaded(batches, device), source, hooks, trainers[0].config.batch_size, job.data_seed)
    saved, spare = time.monotonic(), Spare()
    with (
        ExitStack() as stack,
        Stopping() if job.out else nullcontext() as stopping,
        progress_bar("train", max(t.config.n_tokens for t in trainers)) as bar,
    ):
        stack.callback(feed.close)
        bar(job.n_seen, "")
        meets_every = MEET_EVERY if device.type == "cuda" and job.share.team.world > 1 else 1
        goes_on = job.share.team.any(bool(job.at_work))
        while goes_on:
            try:
                n = feed.read(job.n_batches, [trainers[i] for i in job.at_work])
            except SourceChangedError:
                raise
            except Exception:
                if job.n_batches and job.share.team.world == 1:  # other processes may have gone on
                    job.save()  # all trainers are at the same batch
                raise
            for i in job.at_work:
                trainer = trainers[i]
                try:
                    batch, divergence = feed.of(trainer)
                    trainer.step(batch, spare, divergence)
                    says = trainer.n_seen >= due[i] or trainer.done or trainer.kl_is_due
                    if says:
                        trainer.check()
                except NonFiniteError as error:
                    job.drop(i, error)
                    continue
                if says:
                    logs[i].log(job.log_line(i))
                if trainer.n_seen >= due[i]:
                    due[i] += trainer.config.log_every
            job.n_batches += 1
            latest = [history.last for history in job.histories if history]
            bar(
                rows.world * n,
                "  ".join(f"fvu {line['fvu']:.3f} l0 {line['l0']:.0f}" for line in latest),
            )
            if job.n_batches % meets_every:
                continue
            is_due = time.monotonic() - saved > job.checkpoint_seconds
            signal, is_due, goes_on = _met(job, stopping.signal if stopping else None, is_due)
            if stopping and (signal or is_due):
                job.save()
                saved = time.monotonic()
                if signal:
                    raise Stopped(f"stopped after {job.n_seen:,} tokens; resume with: {job.how_to_go_on}", signal)


def _met(job: Group, signal: int | None, is_due: bool) -> tuple[int | None, bool, bool]:
    """Return the signal that some process got, whether a checkpoint is due, and whether some dictionary is in training."""
    signals, due, at_work = zip(*job.share.team.gather((signal, is_due, bool(job.at_work))), strict=True)
    return next(filter(None, signals), None), any(due), any(at_work)
