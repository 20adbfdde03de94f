"""Commands that capture activations and train dictionaries."""

import shlex
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter, UnknownOptionError

from saelens_lite.cli import checks, processes
from saelens_lite.cli.base import app, console, more_help, on_unknown_option
from saelens_lite.cli.options import DeviceMap, Exists, Flag, ModelDtype, TextName, TextOptions
from saelens_lite.cli.processes import Devices
from saelens_lite.config import RunConfig, TextConfig, TrainConfig, parse_options, read_toml, train_configs
from saelens_lite.errors import ConfigError, PluginError
from saelens_lite.keys import captured
from saelens_lite.settings_file import other_place, run_config


@app.command
def capture(
    text: TextName,
    *,
    hook: list[str],
    model: tuple[str, ...] = ("tiny",),
    one_at_a_time: Flag = False,
    out: Path = Path("cache"),
    text_config: TextOptions = TextConfig(),  # noqa: B008 (frozen)
    n_tokens: int | None = None,
    dtype: Literal["float16", "bfloat16", "float32"] = "float16",
    device: str | None = None,
    devices: Devices = None,
    device_map: DeviceMap = None,
    center_writing_weights: Flag = False,
    model_dtype: ModelDtype = "auto",
    model_revision: str | None = None,
    trust_remote_code: Flag = False,
    exists: Exists = "error",
) -> None:
    """Run a model, or several on the same tokens, over a text once and store the activations.

    Parameters
    ----------
    hook
        transformer-lens hook name, e.g. blocks.2.hook_resid_pre; `saelens-lite hooks MODEL` lists them. Of several models, this
        hook of each, or base:blocks.2.hook_resid_pre of one. May be repeated.
    model
        "tiny", a Hugging Face Hub id, or a folder. For several models, NAME=MODEL for each, such as --model base=gpt2
        --model chat=org/gpt2-chat.
    one_at_a_time
        Load several models in turn, if they do not fit into memory together.
    out
        Folder for the cache.
    n_tokens
        Number of activations to store; default: all of the text.
    dtype
        Number type of the stored activations.
    device
        Device for the model, e.g. cuda; default: CUDA if available, else MPS if it works, else the CPU.
    center_writing_weights
        Before capture, subtract the mean from the weights that write to the residual stream. Only for models with LayerNorm.
    model_revision
        Commit, branch or tag of the model on the Hub.
    trust_remote_code
        Run Python code that comes with the model's files.
    """
    named = checks.models_have(model, hook)
    if named and model_revision is not None:
        raise ConfigError("--model-revision is for one model; leave it out, or give folders of the revisions to compare")
    if one_at_a_time and len(named) < 2:
        raise ConfigError("--one-at-a-time needs several models, such as --model base=gpt2 --model chat=org/gpt2-chat")
    checks.is_free(out, exists)
    if processes.start(devices, device, lambda: "repeat the command to resume it"):
        return
    import saelens_lite as sl
    from saelens_lite.tokens import named_text

    load = partial(
        sl.load_model,
        device=device,
        device_map=device_map,
        dtype=model_dtype,
        revision=model_revision,
        center_writing_weights=center_writing_weights,
        trust_remote_code=trust_remote_code,
    )
    if one_at_a_time:
        lm: Any = {name: partial(load, place) for name, place in named.items()}
    else:
        lm = {name: load(place) for name, place in named.items()} if named else load(model[0])
    documents = named_text(text)
    name = text if isinstance(documents, str) else Path(text).name
    cache = sl.capture(
        lm, documents, hook, out, n_tokens=n_tokens, text_config=text_config, dtype=dtype, exists=exists, text_name=name
    )
    console().print(str(cache), markup=False)


@app.command
def train(
    cache: Path | None = None,
    /,
    *,
    config: Path | None = None,
    resume: Path | None = None,
    port: tuple[str, ...] = (),
    settings: Annotated[TrainConfig, Parameter(name="*")] = TrainConfig(),  # noqa: B008 (frozen)
    run: Annotated[RunConfig, Parameter(name="*", negative="")] = RunConfig(),  # noqa: B008 (frozen)
    text_config: TextOptions = TextConfig(),  # noqa: B008 (frozen)
    devices: Devices = None,
    trust_remote_code: Flag = False,
) -> None:
    """Train one or several dictionaries on a cache or a text, or resume an interrupted run.

    Parameters
    ----------
    cache
        Folder that `capture` wrote.
    config
        TOML file with the same settings, such as the config.toml of a run. [[dictionary]] tables describe several dictionaries.
        Flags override the file.
    resume
        Folder of an interrupted run. Its settings are kept. Give the cache or --text only if it has moved. With --n-tokens, the
        new total, an interrupted or finished run is extended.
    port
        Hook to read, such as base:blocks.2.hook_resid_pre of a model that the capture calls base; the same as --reads.
        May be repeated, for a crosscoder.
    trust_remote_code
        With --text: run Python code that comes with the model's files.
    """
    flags = _given(settings) | _given(run) | _given(text_config)
    if cache:
        flags["cache"] = str(cache)
    if port:
        flags["reads"] = (*flags.get("reads", ()), *port)
    if "options" in flags:
        flags["options"] = parse_options(flags["options"])
    runs = _resume(resume, flags, config, devices) if resume else _train(flags, config, devices, trust_remote_code)
    for trained in runs:
        console().print(str(trained), markup=False)


def _given(settings: Any) -> dict[str, Any]:
    """Return the settings that were given as flags."""
    return {name: getattr(settings, name) for name in settings.model_fields_set}


def _again(out: str | Path, devices: int | str | None) -> str:
    """Return the end of a message that says how to resume a run."""
    from saelens_lite.training.checkpoint import is_interrupted

    if is_interrupted(Path(out)):
        return f"resume with: saelens-lite train --resume {shlex.quote(str(out))} --devices {devices}"
    return "there is no checkpoint yet, so begin again with --exists overwrite"


def _resume(folder: Path, flags: dict[str, Any], config: Path | None, devices: int | str | None) -> list[Any]:
    """Resume a run with the flags that may differ."""
    kept = {
        name: value for name, value in flags.items() if name in ("device", "loggers", "checkpoint_seconds", "text", "n_tokens")
    }
    if surplus := [name for name in [*flags, *(["config"] if config else [])] if name not in (*kept, "cache")]:
        flagged = ", ".join(f"--{name.replace('_', '-')}" for name in surplus)
        raise ConfigError(f"--resume keeps the settings of {folder}; run it again without {flagged}")
    checks.run_exists(folder)
    if processes.start(devices, flags.get("device"), lambda: _again(folder, devices)):
        return []
    import saelens_lite as sl

    return sl.resume(folder, sl.ActivationCache.open(flags["cache"]) if "cache" in flags else None, **kept)


def _train(flags: dict[str, Any], config: Path | None, devices: int | str | None, trust_remote_code: bool) -> list[Any]:
    """Train with the settings of a file and of flags, which are all checked before anything is read."""
    tables = read_toml(config) if config else {}
    if {"cache", "text"} & flags.keys():  # they replace each other
        tables = {name: value for name, value in tables.items() if name not in ("cache", "text")}
    run, text_config = run_config(tables, flags)
    configs = train_configs(tables, {name: value for name, value in flags.items() if name in TrainConfig.model_fields})
    starts, configs = _started(run, configs)
    checks.training(run, configs)
    if processes.start(devices, run.device, lambda: _again(run.out, devices)):
        return []
    import saelens_lite as sl

    source = sl.ActivationCache.open(run.cache) if run.cache else _stream(run, text_config, configs, trust_remote_code)
    how = {
        name: getattr(run, name)
        for name in ("data_seed", "validation_tokens", "checkpoint_seconds", "loggers", "exists", "parallel")
    }
    return sl.train(source, configs, run.out, device=run.device, start_from=starts, **how)


def _started(run: RunConfig, configs: list[TrainConfig]) -> tuple[Any, list[TrainConfig]]:
    """Return the dictionaries that training starts from, or None, and the settings with what they supply."""
    if not run.start_from:
        return None, configs
    import saelens_lite as sl
    from saelens_lite.training.start import like, starts

    dictionaries = [sl.load(address) for address in run.start_from]
    hooks = checks.hooks_in_cache(Path(run.cache)) if run.cache else None
    each = starts(dictionaries[0] if len(dictionaries) == 1 else dictionaries, len(configs))
    return each, [like(dictionary, config, hooks) for dictionary, config in zip(each, configs, strict=True)]


def _stream(run: RunConfig, text_config: TextConfig, configs: list[TrainConfig], trust_remote_code: bool) -> Any:
    """Return a stream of activations of a model that is loaded for it."""
    import saelens_lite as sl
    from saelens_lite.tokens import named_text

    lm = sl.load_model(
        run.model,
        device=None if run.device_map else run.device,
        device_map=run.device_map,
        dtype=run.model_dtype,
        revision=run.model_revision,
        center_writing_weights=run.center_writing_weights,
        trust_remote_code=trust_remote_code,
    )
    hooks = captured([hook for config in configs for hook in checks.hooks_of(config)])
    return sl.ActivationStream(
        lm, named_text(run.text), hooks, text_config=text_config, buffer_tokens=run.buffer_tokens, text_name=run.text
    )


def _rules(tokens: list[str]) -> list[str]:
    """Return the names of the rules that a command line or its settings file chooses."""
    values = dict(pairwise(tokens)) | dict(token.split("=", 1) for token in tokens if "=" in token)
    if "--sparsity" in values:
        return [values["--sparsity"]]
    tables = read_toml(values["--config"]) if "--config" in values else {}
    listed = tables.get("dictionary") if isinstance(tables.get("dictionary"), list) else []
    return list(dict.fromkeys(str(table.get("sparsity", tables.get("sparsity", "topk"))) for table in [*listed, {}]))


def _option_of_rule(tokens: list[str], error: UnknownOptionError) -> list[str]:
    """Read an unknown option such as --k as the rule's option --options.k, if it has that."""
    from saelens_lite.rule_options import config_of

    flag = (error.token.keyword or error.token.value).partition("=")[0]
    name = flag.removeprefix("--").replace("-", "_")
    if flag.startswith("--") and any(name in config_of(rule).model_fields for rule in _rules(tokens)):
        return [f"--options.{name}{t[len(flag) :]}" if t.partition("=")[0] == flag else t for t in tokens]
    place = other_place(name, None).partition(":")[0]
    if place.startswith("; it is an option of"):
        raise ConfigError(f"unknown option {flag}{place}, not of {', '.join(_rules(tokens))}; choose one with --sparsity")
    raise error


def _show_options(tokens: list[str]) -> None:
    """Print the options of the chosen rule, or of all rules, after the help."""
    from saelens_lite.cli.plugins import options_of_all, options_table

    if any(token.partition("=")[0] in ("--sparsity", "--config") for token in tokens):
        for name in _rules(tokens):
            with suppress(PluginError):  # it may be in a file that --import names
                console().print(options_table(name))
    else:
        console().print(options_of_all())


more_help["train"] = _show_options
on_unknown_option["train"] = _option_of_rule
