"""The start of training: requests are checked, and the folders of the runs are made."""

import hashlib
import json
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch

from saelens_lite import processes
from saelens_lite.cache import Source, with_differences
from saelens_lite.cache.resumed import record_of, tensor_hash
from saelens_lite.config import TrainConfig
from saelens_lite.devices import device_to_train_on, works
from saelens_lite.dictionary import Dictionary
from saelens_lite.errors import ConfigError, OutputExistsError
from saelens_lite.files import write_text
from saelens_lite.keys import captured
from saelens_lite.loggers import DEFAULT_LOGGERS, load_loggers
from saelens_lite.outputs import check_shared, followed, refuse_existing, refuse_inputs_in
from saelens_lite.paths import check_output
from saelens_lite.training.advice import warn_of_many_passes
from saelens_lite.training.aside import Aside, put_back_runs
from saelens_lite.training.checkpoint import is_interrupted
from saelens_lite.training.distribution import Parallel, meet_statistics, share_of
from saelens_lite.training.folders import locked_folders, run_folders, run_kind
from saelens_lite.training.loop import Group, runs_of_all, train_to_the_end
from saelens_lite.training.run import Run
from saelens_lite.training.settings import settings_text
from saelens_lite.training.trainer import Trainer

log = logging.getLogger(__name__)
AIMS = {"coefficient", "target_l0", "penalty"}  # options that set how sparse codes are


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
    start_from: Dictionary | Sequence[Dictionary] | None = None,
    parallel: Parallel = "auto",
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
        start_from: begin with the parameters of this dictionary, or of one for each config, instead of random ones. Its d_sae
            is kept. Settings that a config leaves unset are also the dictionary's: rule, options and hooks.
        parallel: distribution over the processes that torchrun started. "sweep": each trains some of the dictionaries.
            "latents": each holds some latents of every dictionary; processes on other machines have other rows of the batch.
            "data": each has some rows of the batch. "auto": a sweep if there are enough dictionaries, else latents, else data.

    Returns:
        The runs, in every process. In a sweep without `out`, those of this process.

    Raises:
        ConfigError: there is no config, batch sizes differ, loggers lack `out`, validation_tokens is below 0 or is 1, or the
            parameters of `start_from` do not fit.
        PluginError, HookError: a rule, logger or hook does not exist, or a logger cannot start.
        OutputExistsError: an output folder is not empty and `exists` is "error", or overwriting would lose other files.
        LockedError: another process trains or resumes in `out`.
        NonFiniteError: activations, or all dictionaries, became NaN or infinite. The last good states are in last_good/.
        ProcessLostError: another process ended or does not answer. The last checkpoint is good.
        Stopped: after Ctrl-C or SIGTERM.
    """
    configs = [configs] if isinstance(configs, TrainConfig) else list(configs)
    if not configs:
        raise ConfigError("nothing to train: give at least one TrainConfig")
    begins = starts(start_from, len(configs))
    configs = [c if d is None else like(d, c, source.hooks) for c, d in zip(configs, begins, strict=True)]
    configs = _of_one_batch_size(configs)
    source = with_differences(source, [hook for config in configs for hook in config.hooks])
    if out is None and loggers and loggers != DEFAULT_LOGGERS:
        raise ConfigError(f"loggers = {loggers!r} need a run folder; give out=")
    if validation_tokens < 0 or validation_tokens == 1:
        raise ConfigError(f"validation_tokens = {validation_tokens}; expected 0 or at least 2")
    load_loggers([] if out is None else loggers)
    device = device_to_train_on(_device_of_model(source) if device is None else device)
    out = None if out is None else check_output(out) if len(configs) > 1 else followed(Path(out))
    folders = [None] * len(configs) if out is None else run_folders(out, configs)
    description = source.describe()
    team = processes.team()
    if team.world > 1:
        settings = {"dictionary": [config.model_dump(mode="json") for config in configs], "data_seed": data_seed}
        settings |= {"out": str(out), "parallel": parallel, "validation_tokens": validation_tokens, "exists": exists}
        settings |= {"start_from": [d and _hashes(d) for d in begins]}
        processes.check_same(settings, [description, record_of(source)], device)
    share = share_of(parallel, configs, team)
    if out:
        check_shared(out, team)

        def check() -> None:
            with locked_folders(out, *folders):
                _refuse_existing_runs(out, folders, exists, description)

        team.first(check)
    validation, source = source.hold_out(validation_tokens) if validation_tokens else (None, source)
    warn_of_many_passes(source, configs)
    meet_statistics(source, configs, team)
    trainers = [Trainer(configs[i], source, device, share.layout) for i in share.numbers]
    for trainer, i in zip(trainers, share.numbers, strict=True):
        if begins[i] is not None:
            trainer.start_from(begins[i])
        if not trainer.config.hooks and len(trainer.hooks.reads) > 1:
            log.info("no hook was chosen, so a crosscoder reads one hook in several models: %s", trainer.hooks)
    job = Group(
        source=source,
        trainers=trainers,
        folders=[folders[i] for i in share.numbers],
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
            **({} if parallel == "auto" else {"parallel": parallel}),
            **({} if start_from is None else {"start_from": [_described(dictionary) for dictionary in begins]}),
        },
        share=share,
    )
    if out is None:
        return train_to_the_end(job, source)
    with ExitStack() as stack:

        def begin() -> None:
            stack.enter_context(locked_folders(out, *folders))
            _refuse_existing_runs(out, folders, exists, description)
            stack.enter_context(Aside(out, folders, run_kind()))

        team.first(begin)
        with team.failing_together():
            for trainer, folder in zip(trainers, job.folders, strict=True) if share.writes else ():
                write_text(folder / "config.toml", settings_text(trainer.config, job.request_of(folder), job.loggers))
        runs = train_to_the_end(job, source)
        team.first(stack.close)
    return runs_of_all(job, folders, runs)


def _of_one_batch_size(configs: list[TrainConfig]) -> list[TrainConfig]:
    """Return configs with the batch size that some of them set. Raise ConfigError if they differ."""
    given = {c.batch_size for c in configs if "batch_size" in c.model_fields_set}
    sizes = given or {c.batch_size for c in configs}
    if len(sizes) > 1:
        why = "" if given else ", the defaults for their n_tokens; set batch_size"
        raise ConfigError(f"dictionaries trained together need the same batch_size; found {sorted(sizes)}{why}")
    (size,) = sizes
    return [c if c.batch_size == size else c.replace(batch_size=size) for c in configs]


def starts(given: Dictionary | Sequence[Dictionary] | None, n: int) -> list[Dictionary | None]:
    """Return the dictionary that each of n trainings starts from, or None for random parameters."""
    if given is None or isinstance(given, Dictionary):
        return [given] * n
    if len(given) != n:
        raise ConfigError(f"start_from holds {len(given)} dictionaries for {n} configs; give one for all, or one for each")
    return list(given)


def like(dictionary: Dictionary, config: TrainConfig, hooks: Sequence[str] | None = None) -> TrainConfig:
    """Return the settings of training that starts from a dictionary, which supplies what the config leaves unset.

    hooks: those of the source. The dictionary's own are taken only if they are among these, or differences of them.

    Raises:
        ConfigError: the config sets another d_sae.
    """
    given, rule = config.model_fields_set, dictionary.rule
    if "d_sae" in given and config.d_sae != dictionary.d_sae:
        raise ConfigError(f"d_sae = {config.d_sae}, but the dictionary to start from has {dictionary.d_sae}; leave out d_sae")
    changes: dict[str, Any] = {"d_sae": dictionary.d_sae}
    if "sparsity" not in given or config.sparsity == rule.plugin_name:
        options = rule.config.model_dump(mode="json", exclude_none=True)
        if AIMS & config.options.keys():  # they exclude each other
            options = {name: value for name, value in options.items() if name not in AIMS}
        changes |= {"sparsity": rule.plugin_name, "options": options | config.options}
    own = [port.key for port in (*dictionary.reads, *dictionary.writes)]
    if not given & {"hook", "reads", "writes"} and all(own) and (hooks is None or set(captured(own, hooks)) <= set(hooks)):
        reads = tuple(own[: len(dictionary.reads)])
        changes |= {"hook": reads[0]} if len(reads) == 1 else {"reads": reads}
        if not dictionary.writes_what_it_reads:
            changes |= {"writes": tuple(own[len(reads) :])}
    if "skip" not in given:
        changes["skip"] = dictionary.W_skip is not None
    return config.replace(**changes)


def _hashes(dictionary: Dictionary) -> dict[str, str]:
    """Return the hash of each tensor of a dictionary."""
    return {name: tensor_hash(torch.atleast_1d(x)) for name, x in dictionary.state_dict().items()}


def _described(dictionary: Dictionary) -> dict[str, Any]:
    """Return the origin of a dictionary that training starts from, for the record of the new one."""
    tokens = dictionary.training_record.get("tokens")
    sha256 = hashlib.sha256(json.dumps(_hashes(dictionary), sort_keys=True).encode()).hexdigest()
    return {"source": dictionary.source, "sparsity": dictionary.rule.plugin_name, "tokens": tokens, "sha256": sha256}


def _device_of_model(source: Source) -> torch.device | None:
    """Return the device of a stream's model if training works there; None for other sources."""
    lm = getattr(source, "lm", None)
    return None if lm is None or (lm.device.type == "mps" and not works("mps")) else lm.device


def _refuse_existing_runs(out: Path, folders: Sequence[Path], exists: str, description: dict[str, Any] | None) -> None:
    """Put back the old runs that a killed process left aside, then refuse folders that must not be replaced.

    Raises:
        OutputExistsError: a folder is not empty and `exists` is "error", or it holds something other than a run, or replacing
            it would remove the source.
    """
    put_back_runs(out, folders, run_kind())
    if exists == "error" and is_interrupted(out):
        raise OutputExistsError(f"{out} holds an interrupted run; resume it, choose another folder, or pass exists='overwrite'")
    read = [Path(description[key]) for key in ("cache", "text") if description and key in description]
    for folder in folders:
        refuse_existing(folder, exists, run_kind())
        refuse_inputs_in(folder, read)
