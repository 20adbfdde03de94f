"""Commands that capture activations and train dictionaries."""

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from saelens_lite.cli.base import app, console
from saelens_lite.cli.options import Exists, Flag, ModelDtype, TextName, TextOptions, given
from saelens_lite.config import TextConfig, TrainConfig, read_toml, train_configs
from saelens_lite.errors import ConfigError


@app.command
def capture(
    text: TextName,
    *,
    hooks: list[str],
    model: str = "tiny",
    out: Path = Path("cache"),
    text_config: TextOptions = TextConfig(),  # noqa: B008 (frozen)
    n_tokens: int | None = None,
    dtype: Literal["float16", "bfloat16", "float32"] = "float16",
    device: str | None = None,
    center_writing_weights: Flag = False,
    model_dtype: ModelDtype = "auto",
    model_revision: str | None = None,
    trust_remote_code: Flag = False,
    exists: Exists = "error",
) -> None:
    """Run a model over a text once and store its activations.

    Parameters
    ----------
    hooks
        transformer-lens hook names, e.g. blocks.2.hook_resid_pre.
    model
        "tiny", a Hugging Face Hub id, or a folder.
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
    import saelens_lite as sl
    from saelens_lite.tokens import named_text

    lm = sl.load_model(
        model,
        device=device,
        dtype=model_dtype,
        revision=model_revision,
        center_writing_weights=center_writing_weights,
        trust_remote_code=trust_remote_code,
    )
    documents = named_text(text)
    name = text if isinstance(documents, str) else Path(text).name
    cache = sl.capture(
        lm, documents, hooks, out, n_tokens=n_tokens, text_config=text_config, dtype=dtype, exists=exists, text_name=name
    )
    console().print(str(cache), markup=False)


@app.command
def train(
    cache: Path | None = None,
    settings: Annotated[TrainConfig, Parameter(name="*")] = TrainConfig(),  # noqa: B008 (frozen)
    *,
    config: Path | None = None,
    out: Path | None = None,
    resume: Path | None = None,
    start_from: list[Path] | None = None,
    text: str | None = None,
    model: str = "tiny",
    model_dtype: ModelDtype = "auto",
    model_revision: str | None = None,
    trust_remote_code: Flag = False,
    text_config: TextOptions = TextConfig(),  # noqa: B008 (frozen)
    buffer_tokens: int = 65_536,
    data_seed: int | None = None,
    validation_tokens: int | None = None,
    checkpoint_seconds: float | None = None,
    device: str | None = None,
    loggers: str | None = None,
    exists: Exists | None = None,
) -> None:
    """Train one or several dictionaries on a cache or a text, or resume an interrupted run.

    Parameters
    ----------
    cache
        Folder that `capture` wrote.
    config
        TOML file with the same settings, with a [[dictionary]] table for each of several dictionaries. Flags override the file.
    out
        Folder for the run; default: runs/dictionary.
    resume
        Folder of an interrupted run. Its settings are kept. Give the cache or --text only if it has moved. With --n-tokens, the
        new total, an interrupted or finished run is extended.
    start_from
        Dictionary whose parameters training starts from; with several dictionaries to train, one for all, or one for each.
        It also supplies the settings that are not given: rule, options and hooks.
    text
        Text to read in place of a cache, as for `capture`. Activations are computed during training.
    model
        With --text: "tiny", a Hugging Face Hub id, or a folder.
    model_revision
        With --text: commit, branch or tag of the model on the Hub.
    trust_remote_code
        With --text: run Python code that comes with the model's files.
    buffer_tokens
        With --text: number of activations per hook that are shuffled in memory.
    data_seed
        Seed of the order of the data; default: 0.
    validation_tokens
        Number of activations held out from training, for val_fvu and val_l0 in the log; default: 0.
    checkpoint_seconds
        Seconds between checkpoints; default: 600.
    device
        Device to train on, e.g. cuda; default: CUDA if available, else MPS if it works, else the CPU. With --resume, the
        default is the device of the run.
    loggers
        Loggers, comma-separated: jsonl (log.jsonl in the run folder), tensorboard, wandb, trackio, or your own plugin.
        Default: jsonl.
    exists
        If the folder is not empty: stop with an error, or overwrite it; default: error.
    """
    import saelens_lite as sl
    from saelens_lite.config import parse_options

    names = None if loggers is None else [name.strip() for name in loggers.split(",") if name.strip()]
    common = given(device=device, loggers=names, checkpoint_seconds=checkpoint_seconds)
    only_new = given(data_seed=data_seed, validation_tokens=validation_tokens, exists=exists)
    flags = {name: getattr(settings, name) for name in settings.model_fields_set}
    if "options" in flags:
        flags["options"] = parse_options(flags["options"])
    if resume:
        total = flags.pop("n_tokens", None)
        if surplus := flags | only_new | given(config=config, out=out, start_from=start_from):
            raise ConfigError(f"--resume keeps the settings of {resume}, so leave out {', '.join(surplus)}")
        runs = sl.resume(resume, cache and sl.ActivationCache.open(cache), text=text, n_tokens=total, **common)
    else:
        configs = train_configs(read_toml(config) if config else {}, flags)
        loading = {
            "device": device, "dtype": model_dtype, "revision": model_revision, "trust_remote_code": trust_remote_code,
        }  # fmt: skip
        starts = [sl.load(address) for address in start_from or ()]
        if starts:
            only_new["start_from"] = starts[0] if len(starts) == 1 else starts
        of_starts = tuple(port.hook for d in starts for port in (*d.reads, *d.writes) if port.hook)
        source = _source(cache, text, model, text_config, [_hooks(c) or of_starts for c in configs], buffer_tokens, loading)
        runs = sl.train(source, configs, out or Path("runs/dictionary"), **common, **only_new)
    for run in runs:
        console().print(str(run), markup=False)


def _source(
    cache: Path | None,
    text: str | None,
    model: str,
    text_config: TextConfig,
    hooks: list[tuple[str, ...]],
    buffer_tokens: int,
    loading: dict[str, Any],
) -> Any:
    """Return the activations to train on: a cache, or a stream from a model that is loaded with the `loading` arguments."""
    import saelens_lite as sl
    from saelens_lite.tokens import named_text

    if cache and text:
        raise ConfigError(f"both a cache ({cache}) and --text ({text}) were given; training reads only one of them")
    if cache:
        return sl.ActivationCache.open(cache)
    if not text:
        raise ConfigError("nothing to train on: give the folder of a cache, or --text with --hook")
    if () in hooks:
        raise ConfigError("--text needs a hook: give --hook, or hook = in each [[dictionary]]")
    lm = sl.load_model(model, **loading)
    return sl.ActivationStream(
        lm,
        named_text(text),
        list(dict.fromkeys(hook for some in hooks for hook in some)),
        text_config=text_config,
        buffer_tokens=buffer_tokens,
        text_name=text,
    )


def _hooks(config: TrainConfig) -> tuple[str, ...]:
    """Return the hooks that the settings of a dictionary name."""
    reads = config.reads or ((config.hook,) if config.hook else ())
    return (*reads, *config.writes) if reads else ()
