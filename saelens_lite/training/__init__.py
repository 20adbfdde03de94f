"""Train dictionaries: one loop for all rules, and for many dictionaries in one pass over the data.

```python
configs = [
    sl.TrainConfig(sparsity="topk", options={"k": 32}, d_sae=4096, n_tokens=300_000, lr=1e-3),
    sl.TrainConfig(sparsity="gated", options={"coefficient": 2.0}, d_sae=4096, n_tokens=300_000, lr=2e-3),
]
runs = sl.train(cache, configs, out="runs", validation_tokens=8192)
d = runs[0].dictionary
```

```sh
saelens-lite train cache --sparsity topk --options.k 32 --d-sae 1536 --out runs/topk
saelens-lite train cache --config run.toml --out runs  # a [[dictionary]] table for each
saelens-lite train --text book.txt --hook blocks.2.hook_resid_pre --out runs/live  # no cache
```

Each dictionary has the same bytes as if it were trained alone. `validation_tokens` is the number of activations that are kept
out of training; the log reports `val_fvu` and `val_l0` on them.

**Activations of your own.** No language model is needed; x is [n d_in]. `fit` takes the fields of `TrainConfig` and the options
of the rule. Batches and steps follow the number of rows.

```python
d = sl.fit(x, sparsity="topk", d_sae=4096, k=32, n_tokens=1_000_000, validation_tokens=500)
print(d.history[-1]["val_fvu"])
```

`sl.SparseCoder(d_sae=4096, k=32)` is the same as an estimator of scikit-learn, for pipelines and grid searches; see
`saelens_lite.estimator`.

**Transcoders and crosscoders.** `TrainConfig(hook="blocks.2.ln2.hook_out", writes=("blocks.2.hook_mlp_out",), skip=True)`
predicts the output of an MLP from its input. `reads=(hook_1, hook_2)` trains one dictionary over several hooks. Every rule
except `matching_pursuit` can predict hooks other than those it reads. Evaluation and `splice` then act at the predicted hooks.

**Resuming.** Ctrl-C and SIGTERM finish the step and save a checkpoint. `sl.resume("runs")` or `saelens-lite train --resume
runs` continues, and the result has the same bytes as without the interruption. Resuming with another text, cache or model
is refused, even if it has the same size.

**Several objectives.** With codes f, the classic objective min ‖x − x̂‖² + λ‖f‖₀ is `jumprelu` with the penalty `l0`. `l1` is
its relaxation, with ‖f‖₁ in place of ‖f‖₀. `p_anneal` moves from ‖f‖₁ towards ‖f‖₀. The rules with a `k` fix ‖f‖₀.

**Numbers in the log.** `l0` is the mean number of latents that fire on a token, and `fvu` the fraction of variance unexplained.
Losses are those of scaled activations. After training, the scale is folded into the weights, so a dictionary takes raw
activations.

**Loggers.** Choose them with `loggers=("jsonl", "tensorboard")` or `--loggers jsonl,tensorboard`. No number depends on them. A
logger that fails during training is dropped with a warning.

`saelens_lite.training.step` follows one batch through a step, with the equations.
"""

import logging
import os
import re
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tomli_w
import torch

from saelens_lite import registry
from saelens_lite.cache import ActivationCache, Source, TensorSource, open_source
from saelens_lite.cache.resumed import expect, record_of
from saelens_lite.codes.encoder import Spare
from saelens_lite.config import TrainConfig
from saelens_lite.cuda_streams import uploaded
from saelens_lite.devices import chosen_device, device_to_train_on, is_available, works
from saelens_lite.dictionary import Dictionary
from saelens_lite.errors import (
    ConfigError,
    DiskFullError,
    NonFiniteError,
    OutputExistsError,
    PluginError,
    SaelensLiteError,
    SourceChangedError,
)
from saelens_lite.files import check_inside, write_text
from saelens_lite.kinds import DICTIONARY, RUN, Kind
from saelens_lite.locks import locked
from saelens_lite.loggers import DEFAULT_LOGGERS, RunLog, load_loggers, open_log
from saelens_lite.outputs import followed, refuse_existing, refuse_inputs_in, remove_own
from saelens_lite.paths import check_input, check_output
from saelens_lite.progress import progress_bar
from saelens_lite.training.aside import Aside, put_back_runs, remove_replaced
from saelens_lite.training.checkpoint import (
    earlier_states,
    is_interrupted,
    load_checkpoint,
    remove_checkpoints,
    save_checkpoint,
)
from saelens_lite.training.stopping import Stopping
from saelens_lite.training.trainer import Trainer, check_sizes

__all__ = ["Run", "Trainer", "resume", "train"]

log = logging.getLogger(__name__)


class Run(NamedTuple):
    """A trained dictionary, its settings (`config`), the lines of its log (`history`) and its `folder`, if it was written."""

    config: TrainConfig
    dictionary: Dictionary
    history: list[dict[str, Any]]
    folder: Path | None


def train(
    source: Source,
    configs: Sequence[TrainConfig] | TrainConfig,
    out: str | Path | None = None,
    *,
    data_seed: int = 0,
    validation_tokens: int = 0,
    checkpoint_seconds: float = 600.0,
    device: str | torch.device | None = None,
    loggers: str | Sequence[str] = DEFAULT_LOGGERS,
    exists: Literal["error", "overwrite"] = "error",
) -> list[Run]:
    """Train dictionaries on the same batches, in one pass over the source, and return their runs.

    Each dictionary has the same bytes as if it were trained alone. If the loss or the parameters of one of several become NaN
    or infinite, it is dropped: a warning names it and the cause, its folder keeps the last good state in last_good/, the
    returned list leaves it out, and the others finish.

    Args:
        out: the folder of the run. One dictionary is written to `out` itself, each of several to `out`/<number>-<rule>. A
            folder gets config.toml, dictionary/ and the files of the loggers.
        data_seed: the only seed that the order of the data depends on.
        validation_tokens: number of activations that are kept out of training. The log reports val_fvu and val_l0 on them.
        checkpoint_seconds: time between checkpoints. Checkpoints are in `out`/checkpoints/, and Ctrl-C and SIGTERM also write
            one. `resume` continues from there to the same bytes.
        device: by default that of a stream's model; for other sources CUDA if available, else MPS if it works, else the CPU.
        loggers: names of logger plugins; log.jsonl by default.
        exists: "overwrite" replaces an earlier run, but no folder that holds anything else. The earlier run is kept until the
            new one is complete, and put back if the new one fails before its first checkpoint.

    Raises:
        ConfigError: there is no config, batch sizes differ, loggers lack `out`, or validation_tokens is below 0 or is 1.
        PluginError, HookError: a rule, logger or hook does not exist, or a logger cannot start.
        OutputExistsError: an output folder is not empty and `exists` is "error", or overwriting would lose other files.
        LockedError: another process trains or resumes in `out`.
        NonFiniteError: activations, or all dictionaries, became NaN or infinite. The last good states are in last_good/.
        Stopped: after Ctrl-C or SIGTERM.
    """
    configs = [configs] if isinstance(configs, TrainConfig) else list(configs)
    if not configs:
        raise ConfigError("nothing to train: give at least one TrainConfig")
    sizes = {c.batch_size for c in configs}
    if len(sizes) > 1:
        raise ConfigError(f"dictionaries trained together need the same batch_size; found {sorted(sizes)}")
    if out is None and loggers and loggers != DEFAULT_LOGGERS:
        raise ConfigError(f"loggers = {loggers!r} need a run folder; give out=")
    if validation_tokens < 0 or validation_tokens == 1:
        raise ConfigError(f"validation_tokens = {validation_tokens}; expected 0 or at least 2")
    load_loggers([] if out is None else loggers)
    device = device_to_train_on(_device_of_model(source) if device is None else device)
    out = None if out is None else check_output(out) if len(configs) > 1 else followed(Path(out))
    folders = [None] * len(configs) if out is None else run_folders(out, configs)
    description = source.describe()
    if out:
        with _locked(out, *folders):
            _refuse_existing_runs(out, folders, exists, description)
    validation, source = source.hold_out(validation_tokens) if validation_tokens else (None, source)
    job = _Group(
        source=source,
        trainers=[Trainer(c, source, device) for c in configs],
        folders=folders,
        out=out,
        data_seed=data_seed,
        validation=validation,
        loggers=[loggers] if isinstance(loggers, str) else list(loggers),
        checkpoint_seconds=checkpoint_seconds,
        request={
            "source": description,
            "validation_tokens": validation_tokens,
            "data_seed": data_seed,
            "device": str(device),
            "checkpoint_seconds": checkpoint_seconds,
        },
    )
    if out is None:
        return _run(job, source)
    with _locked(out, *folders):
        _refuse_existing_runs(out, folders, exists, description)
        with Aside(out, folders, _kind()):
            for config, folder in zip(configs, folders, strict=True):
                write_text(folder / "config.toml", tomli_w.dumps(config.model_dump(mode="json", exclude_none=True)))
            return _run(job, source)


def _device_of_model(source: Source) -> torch.device | None:
    """Return the device of a stream's model if training works there; None for other sources."""
    lm = getattr(source, "lm", None)
    return None if lm is None or (lm.device.type == "mps" and not works("mps")) else lm.device


@contextmanager
def _locked(*folders: Path) -> Iterator[None]:
    """Hold the locks on the folders of runs, each once."""
    with ExitStack() as stack:
        for folder in dict.fromkeys(folders):
            stack.enter_context(locked(folder, "run"))
        yield


def _kind() -> Kind:
    """Return the kind of a run folder. Each logger may write to a subfolder that has its name."""
    return RUN.allowing(*(f"{re.escape(name)}/.*" for name in registry.names("loggers")))


def _refuse_existing_runs(out: Path, folders: Sequence[Path], exists: str, description: dict[str, Any] | None) -> None:
    """Put back the old runs that a killed process left aside, then refuse folders that must not be replaced.

    Raises:
        OutputExistsError: a folder is not empty and `exists` is "error", or it holds something other than a run, or replacing
            it would remove the source.
    """
    put_back_runs(out, folders, _kind())
    if exists == "error" and is_interrupted(out):
        raise OutputExistsError(f"{out} holds an interrupted run; resume it, choose another folder, or pass exists='overwrite'")
    read = [Path(description[key]) for key in ("cache", "text") if description and key in description]
    for folder in folders:
        refuse_existing(folder, exists, _kind())
        refuse_inputs_in(folder, read)


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
        put_back_runs(run, [run], _kind())
        job, source = _interrupted(run, source, text, device, loggers, checkpoint_seconds)
        with _locked(*(folder for folder in job.folders if folder != run)):
            runs = _run(job, source)
        remove_replaced(run, job.folders)
    return runs


def _interrupted(
    run: Path,
    source: Source | None,
    text: str | None,
    device: str | torch.device | None,
    loggers: str | Sequence[str] | None,
    checkpoint_seconds: float | None,
) -> "tuple[_Group, Source]":
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
    job = _Group(
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


@dataclass
class _Group:
    """The state of dictionaries that are trained together: their trainers, folders, logs and progress."""

    source: Source
    trainers: list[Trainer]
    folders: list[Path | None]
    out: Path | None
    data_seed: int
    validation: TensorSource | None
    loggers: list[str]
    checkpoint_seconds: float
    request: dict[str, Any]
    histories: list[list[dict[str, Any]]] = field(default_factory=list)
    n_batches: int = 0
    dropped: list[str | None] = field(default_factory=list)  # for each dictionary, why its training ended early

    def __post_init__(self) -> None:
        self.histories = self.histories or [[] for _ in self.trainers]
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
            return f"saelens-lite train --resume {shlex.quote(str(self.out))}"
        return f"saelens_lite.resume({str(self.out)!r}, source)"

    def save(self) -> None:
        """Write a checkpoint, if the run has a folder."""
        self.check()
        if self.out:
            loop = {
                "configs": [trainer.config.model_dump(mode="json") for trainer in self.trainers],
                "request": self.request,
                "source": record_of(self.source),
                "loggers": self.loggers,
                "histories": self.histories,
                "n_batches": self.n_batches,
                "dropped": self.dropped,
            }
            save_checkpoint(self.out, self.n_seen, [trainer.state() for trainer in self.trainers], loop)

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
        except SaelensLiteError as error:  # must not end the training of the others
            kept = f"; its last good state cannot be written: {error}"
        self.dropped[i] = f"{cause}{kept}"
        log.warning("stopped training %s: %s", self.name(i), self.dropped[i])

    def name(self, i: int) -> str:
        """Return the name of a dictionary in messages: its folder, or its number and rule."""
        return str(self.folders[i] or f"{i}-{self.trainers[i].config.sparsity}")


def _run(job: _Group, source: Source) -> list[Run]:
    """Train to the end, write the dictionaries and return their runs. After an error, write the last good states."""
    classes = load_loggers(job.loggers) if job.out else {}
    has_begun = False
    try:
        with ExitStack() as stack:
            logs = [
                stack.enter_context(open_log(classes, folder, trainer.config, trainer.n_seen))
                for trainer, folder in zip(job.trainers, job.folders, strict=True)
            ]
            has_begun = True
            _loop(source, job, logs)
        return _results(job)
    except DiskFullError as error:
        if job.out is None or not is_interrupted(job.out):
            raise
        raise DiskFullError(f"{error}; free some space, then resume with: {job.how_to_go_on}") from error
    except SourceChangedError:  # the run stays as it is, for the right source
        raise
    except SaelensLiteError as error:
        if has_begun:
            _keep_what_is_good(job, error)
        raise


def _results(job: _Group) -> list[Run]:
    """Write the dictionaries to their folders, if they have any, remove checkpoints, and return the runs.

    Raises:
        NonFiniteError: all dictionaries were dropped.
    """
    runs = []
    for i, (trainer, history, folder) in enumerate(zip(job.trainers, job.histories, job.folders, strict=True)):
        dictionary = trainer.result()
        if job.dropped[i] is None and (bad := trainer.dictionary.not_finite() or dictionary.not_finite()):
            job.drop(i, NonFiniteError(f"{bad} became NaN or infinite in the last step, {trainer.described}"))
        if job.dropped[i] is None:
            runs.append(Run(trainer.config, dictionary, history, folder))
    if not runs:
        causes = [cause if len(job.trainers) == 1 else f"{job.name(i)}: {cause}" for i, cause in enumerate(job.dropped)]
        raise NonFiniteError("; ".join(causes))
    for run in runs:
        if run.folder:
            run.dictionary.save(run.folder / "dictionary", exists="overwrite")
            remove_own(run.folder / "last_good", DICTIONARY)  # from an error before the run was resumed
    if job.out:
        remove_checkpoints(job.out)
    return runs


def _keep_what_is_good(job: _Group, error: SaelensLiteError) -> None:
    """Write the dictionaries as they were before an error."""
    for i, (trainer, folder) in enumerate(zip(job.trainers, job.folders, strict=True)):
        if folder and trainer.n_steps and job.dropped[i] is None:
            try:
                log.warning("stopped%s", _kept(job, i, error))
            except SaelensLiteError as another:  # the first error is the one to report
                log.warning("the last good state of %s cannot be written: %s", job.name(i), another)


def _kept(job: _Group, i: int, cause: SaelensLiteError) -> str:
    """Write the last good state of a dictionary to last_good/, and return the end of a sentence that says so.

    That is the state before the failed step. If it is not finite either, it is the newest finite one of the checkpoints.
    """
    trainer, folder = job.trainers[i], job.folders[i]
    if folder is None or not trainer.n_steps:
        return ""
    with suppress(NonFiniteError, PluginError):  # a GPU may have counted steps that changed nothing
        trainer.check()
    good, states = trainer.result(), earlier_states(job.out, i)
    while good.not_finite():
        if (state := next(states, None)) is None:
            return f"; after step {trainer.n_steps} it is not finite either, so there is no last good dictionary"
        trainer.restore(*state)
        good = trainer.result()
    good.training_record["stopped"] = str(cause)
    good.save(folder / "last_good", exists="overwrite")
    return f"; the dictionary after step {trainer.n_steps} is in {folder / 'last_good'}"


def _loop(source: Source, job: _Group, logs: list[RunLog]) -> None:
    """Feed every trainer the same batches until each has seen the tokens it asked for."""
    trainers = job.trainers
    hooks = list(dict.fromkeys(hook for trainer in trainers for hook in trainer.hooks.all))
    due = [(trainer.n_seen // trainer.config.log_every + 1) * trainer.config.log_every for trainer in trainers]
    device = trainers[0].dictionary.W_dec.device
    gathers_there = device.type == "cuda" and type(source) in (ActivationCache, TensorSource)
    where = {"device": device} if gathers_there else {}
    batches = source.batches(hooks, trainers[0].config.batch_size, job.data_seed, job.n_batches, **where)
    batches = uploaded(batches, device)  # once for all dictionaries
    saved = time.monotonic()
    spare = Spare()
    with (
        ExitStack() as stack,
        Stopping() if job.out else nullcontext() as stopping,
        progress_bar("train", max(t.config.n_tokens for t in trainers)) as bar,
    ):
        stack.callback(getattr(batches, "close", lambda: None))  # ends the thread that reads ahead
        bar(job.n_seen, "")
        while job.at_work:
            try:
                batch = next(batches)
            except SourceChangedError:
                raise
            except Exception:
                if job.n_batches:
                    job.save()  # all trainers are at the same batch
                raise
            for i in job.at_work:
                trainer = trainers[i]
                try:
                    trainer.step(batch, spare)
                    if trainer.n_seen >= due[i] or trainer.done:
                        trainer.check()
                except NonFiniteError as error:
                    job.drop(i, error)
                    continue
                if trainer.n_seen >= due[i] or trainer.done:
                    logs[i].log(job.log_line(i))
                    due[i] += trainer.config.log_every
            job.n_batches += 1
            latest = [h[-1] for h in job.histories if h]
            bar(len(batch[hooks[0]]), "  ".join(f"fvu {line['fvu']:.3f} l0 {line['l0']:.0f}" for line in latest))
            if stopping and (stopping.signal or time.monotonic() - saved > job.checkpoint_seconds):
                job.save()
                saved = time.monotonic()
                if stopping.signal:
                    raise stopping.error(f"stopped after {job.n_seen:,} tokens; resume with: {job.how_to_go_on}")


def run_folders(out: Path, configs: Sequence[TrainConfig]) -> list[Path]:
    """Return the folder of each dictionary: `out` for a single one, numbered folders in `out` for several."""
    if len(configs) == 1:
        return [out]
    return [out / f"{i}-{c.sparsity}" for i, c in enumerate(configs)]
