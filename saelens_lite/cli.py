"""The command line: the library's nouns as verbs, over the same functions."""

import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter

from saelens_lite.config import TextConfig, TrainConfig, read_toml, train_configs
from saelens_lite.errors import ConfigError, PluginError, SaelensLiteError, Stopped

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from saelens_lite.dictionary import Dictionary
    from saelens_lite.model import LanguageModel
    from saelens_lite.registry import Finding
    from saelens_lite.testing import PluginReport

app = App(
    name="saelens-lite",
    suppress_keyboard_interrupt=False,  # `main` says what was saved
    help="Hook a transformer, cache its residual stream, train sparse dictionaries, read them and publish them.",
    help_format="plaintext",
)
app.meta.group_parameters = app.meta["--help"].group = "Global options"

Exists = Literal["error", "overwrite"]


app.meta.suppress_keyboard_interrupt = False


@app.meta.default
def _launch(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    verbose: Annotated[bool, Parameter(negative="")] = False,
    traceback: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Hook a transformer, cache its residual stream, train sparse dictionaries, read them and publish them.

    Parameters
    ----------
    verbose
        Log what the library does.
    traceback
        Show the whole traceback of an error.
    """
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s")
    command, bound, _ = app.parse_args(tokens, exit_on_error=False, print_error=False)
    command(*bound.args, **bound.kwargs)


def main() -> None:
    """Run a command. Errors are one line on standard error: exit code 2 for the user's mistakes, 1 for the rest."""
    wants_traceback = "--traceback" in sys.argv
    try:
        app.meta(sys.argv[1:], exit_on_error=False, print_error=False)
    except SaelensLiteError as error:
        _fail(error, str(error), error.exit_code, wants_traceback)
    except CycloptsError as error:
        _fail(error, str(error), 2, wants_traceback)
    except Stopped as error:
        _fail(error, str(error), error.exit_code, wants_traceback)
    except KeyboardInterrupt as error:
        _fail(error, "interrupted", 130, wants_traceback)
    except BrokenPipeError:
        sys.exit(1)
    except Exception as error:
        _fail(error, f"{type(error).__name__}: {error} (add --traceback to see where)", 1, wants_traceback)


def _fail(error: BaseException, message: str, code: int, wants_traceback: bool) -> None:
    if wants_traceback:
        raise error
    print(f"saelens-lite: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def _console() -> "Console":
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True)


@app.command
def demo(out: Path = Path("demo"), *, exists: Exists = "error") -> None:
    """See everything once, on the embedded model, without a network.

    Parameters
    ----------
    out
        Folder for the results.
    exists
        What to do when the folder is not empty.
    """
    from saelens_lite.demo import demo as run_demo
    from saelens_lite.evaluate import table

    console = _console()
    result = run_demo(out, exists=exists, say=console.print)
    console.print(table(result.reports))
    parts = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in result.seconds.items())
    console.print(f"{sum(result.seconds.values()):.0f} s: {parts}")
    console.print(f"Features: open {result.folder / 'topk.html'} in a browser (also l1.html, gated.html)")
    console.print(f"Ready for the Hub: {result.folder / 'runs'}/*/dictionary")


@app.command
def capture(
    text: str,
    *,
    hooks: list[str],
    model: str = "tiny",
    out: Path = Path("cache"),
    text_config: Annotated[TextConfig, Parameter(name="*")] = TextConfig(),  # noqa: B008 (frozen)
    n_tokens: int | None = None,
    dtype: Literal["float16", "bfloat16", "float32"] = "float16",
    device: str | None = None,
    center_writing_weights: Annotated[bool, Parameter(negative="")] = False,
    exists: Exists = "error",
) -> None:
    """Run a model over text once and store activations.

    Parameters
    ----------
    text
        A .txt, .md, .jsonl or .parquet file; hf:org/name:config:split for a dataset of the Hugging Face Hub; or "python-docs",
        "python-docs:train", "python-docs:held-out" for the embedded corpus.
    hooks
        transformer-lens hook names, e.g. blocks.2.hook_resid_pre.
    model
        "tiny", a Hugging Face Hub id, or a folder.
    out
        Folder for the cache.
    n_tokens
        Activations to store; default: all of the text.
    dtype
        How activations are stored.
    device
        Where the model runs, e.g. cuda.
    center_writing_weights
        Take the mean out of all that is written to the residual stream first; for models whose norms are LayerNorm.
    exists
        What to do when the folder is not empty.
    """
    import saelens_lite as sl
    from saelens_lite.tokens import named_text

    lm = sl.load_model(model, device=device, center_writing_weights=center_writing_weights)
    documents = named_text(text)
    name = text if isinstance(documents, str) else Path(text).name
    cache = sl.capture(
        lm, documents, hooks, out, n_tokens=n_tokens, text_config=text_config, dtype=dtype, exists=exists, text_name=name
    )
    _console().print(str(cache), markup=False)


@app.command
def train(
    cache: Path | None = None,
    settings: Annotated[TrainConfig, Parameter(name="*")] = TrainConfig(),  # noqa: B008 (frozen)
    *,
    config: Path | None = None,
    out: Path | None = None,
    resume: Path | None = None,
    text: str | None = None,
    model: str = "tiny",
    text_config: Annotated[TextConfig, Parameter(name="*")] = TextConfig(),  # noqa: B008 (frozen)
    buffer_tokens: int = 65_536,
    data_seed: int | None = None,
    validation_tokens: int | None = None,
    checkpoint_seconds: float | None = None,
    device: str | None = None,
    loggers: str | None = None,
    exists: Exists | None = None,
) -> None:
    """Train one or several dictionaries on a cache, or on a text without one; go on with a run that was interrupted.

    Parameters
    ----------
    cache
        Folder written by `capture`.
    config
        TOML file with the same settings, and a [[dictionary]] table for each of several; flags win over it.
    out
        Folder for the run; default: runs/dictionary.
    resume
        Folder of an interrupted run. Its settings hold; a cache need only be named if it has moved.
    text
        Instead of a cache: text as for `capture`, from which activations are computed while training goes on.
    model
        With --text: "tiny", a Hugging Face Hub id, or a folder.
    buffer_tokens
        With --text: activations of each hook that are mixed in memory.
    data_seed
        Seed of the order of the data; default: 0.
    validation_tokens
        Activations never trained on; val_fvu and val_l0 in the log are of them. Default: 0.
    checkpoint_seconds
        Seconds between two checkpoints; default: 600.
    device
        Where to train, e.g. cuda; default: cpu.
    loggers
        Where metrics go, comma-separated: jsonl (log.jsonl in the run folder), tensorboard, wandb, trackio, or one of your own.
        Default: jsonl.
    exists
        What to do when the folder is not empty; default: error.
    """
    import saelens_lite as sl
    from saelens_lite.config import parse_options

    names = None if loggers is None else [name.strip() for name in loggers.split(",") if name.strip()]
    common = _given(device=device, loggers=names, checkpoint_seconds=checkpoint_seconds)
    only_new = _given(data_seed=data_seed, validation_tokens=validation_tokens, exists=exists)
    flags = {name: getattr(settings, name) for name in settings.model_fields_set}
    if "options" in flags:
        flags["options"] = parse_options(flags["options"])
    if resume:
        if surplus := flags | only_new | _given(config=config, out=out, text=text):
            raise ConfigError(f"--resume keeps the settings of {resume}; leave out {', '.join(surplus)}")
        runs = sl.resume(resume, cache and sl.ActivationCache.open(cache), **common)
    else:
        configs = train_configs(read_toml(config) if config else {}, flags)
        source = _source(cache, text, model, text_config, [c.hook for c in configs], buffer_tokens, device)
        runs = sl.train(source, configs, out or Path("runs/dictionary"), **common, **only_new)
    for run in runs:
        last = run.history[-1]
        _console().print(
            f"{run.folder}/dictionary: {run.config.sparsity}, l0 {last['l0']:.1f}, fvu {last['fvu']:.4f}", markup=False
        )


def _given(**flags: Any) -> dict[str, Any]:
    """The flags that have a value."""
    return {name: value for name, value in flags.items() if value is not None}


def _source(
    cache: Path | None,
    text: str | None,
    model: str,
    text_config: TextConfig,
    hooks: list[str | None],
    buffer_tokens: int,
    device: str | None,
) -> Any:
    """The activations to train on: a cache or a stream."""
    import saelens_lite as sl
    from saelens_lite.tokens import named_text

    if cache and text:
        raise ConfigError(f"both a cache ({cache}) and --text ({text}) were given; training reads one of them")
    if cache:
        return sl.ActivationCache.open(cache)
    if not text:
        raise ConfigError("nothing to train on: give the folder of a cache, or --text with --hook")
    if None in hooks:
        raise ConfigError("with --text, say which hook to train on: --hook, or hook = in each [[dictionary]]")
    lm = sl.load_model(model, device=device)
    return sl.ActivationStream(
        lm, named_text(text), hooks, text_config=text_config, buffer_tokens=buffer_tokens, text_name=text
    )


def _model_of(dictionary: "Dictionary", model: str | None, device: str | None = None) -> "LanguageModel":
    """The model a dictionary belongs to, or the one asked for, with its weights processed as they were."""
    import saelens_lite as sl

    origin = dictionary.origin
    processing = dict.fromkeys(origin.processing, True)
    return sl.load_model(model or origin.model or "tiny", device=device, **processing)


@app.command(name="eval")
def evaluate(
    dictionaries: list[Path],
    *,
    text: str = "python-docs:held-out",
    text_config: Annotated[TextConfig, Parameter(name="*")] = TextConfig(),  # noqa: B008 (frozen)
    model: str | None = None,
    hook: str | None = None,
    n_tokens: int = 100_000,
    by_frequency: Annotated[bool, Parameter(negative="")] = False,
    by_position: Annotated[bool, Parameter(negative="")] = False,
    controls: Annotated[bool, Parameter(negative="")] = False,
    device: str | None = None,
    json_out: Annotated[Path | None, Parameter(name="--json")] = None,
) -> None:
    """Measure dictionaries of one hook: sparsity, reconstruction, and what the model loses.

    Each report goes to eval.json in its dictionary's folder, in place of an earlier one; where there is no such folder, only
    --json keeps it.

    Parameters
    ----------
    dictionaries
        Dictionary folders, folders or files of other tools, or addresses such as hf://user/repo/folder@revision.
    text
        A .txt, .md, .jsonl or .parquet file; hf:org/name:config:split for a dataset of the Hugging Face Hub; or "python-docs",
        "python-docs:train", "python-docs:held-out" for the embedded corpus.
    model
        The model; default: the one the dictionary was trained on.
    hook
        The hook, for dictionaries that do not say theirs.
    n_tokens
        Tokens to read.
    by_frequency
        Show the reconstruction error of rare and frequent tokens as well.
    by_position
        Report reconstruction and loss by position in a row as well.
    controls
        Measure the same of a random dictionary of the same size and L0, of PCA with L0 components, and of the dictionary on the
        model with its weights re-drawn.
    device
        Where to run, e.g. cuda.
    json_out
        File for all the reports together.
    """
    import saelens_lite as sl
    from saelens_lite.evaluate import frequency_table, position_table, table
    from saelens_lite.files import write_json
    from saelens_lite.tokens import named_text

    loaded = [sl.Dictionary.load(path) for path in dictionaries]
    lm = _model_of(loaded[0], model, device)
    reports = sl.evaluate(
        [d.to(lm.device) for d in loaded],
        lm,
        named_text(text),
        hook=hook,
        n_tokens=n_tokens,
        text_config=text_config,
        by_frequency=by_frequency,
        by_position=by_position,
        controls=controls,
    )
    named = {str(path): report for path, report in zip(dictionaries, reports, strict=True)}
    for path, report in named.items():
        if Path(path).is_dir():
            report.to_json(Path(path) / "eval.json")
    if json_out:
        write_json(json_out, {path: report.to_dict() for path, report in named.items()})
    _console().print(table(named))
    if by_frequency:
        _console().print(frequency_table(named))
    if by_position:
        _console().print(position_table(named))


@app.command
def features(
    dictionaries: list[Path],
    *,
    text: str = "python-docs:held-out",
    text_config: Annotated[TextConfig, Parameter(name="*")] = TextConfig(),  # noqa: B008 (frozen)
    model: str | None = None,
    n_tokens: int | None = None,
    out: Path | None = None,
    codes: Annotated[bool, Parameter(negative="")] = False,
    control: Annotated[bool, Parameter(negative="")] = False,
    html: Path = Path("features.html"),
    device: str | None = None,
    exists: Exists = "error",
) -> None:
    """See what each latent responds to: one HTML file a dictionary, from one pass of the model.

    Stability scores that `compare --out` left in the folder of a dictionary are shown as well.

    Parameters
    ----------
    dictionaries
        Dictionary folders, of one model.
    text
        A .txt, .md, .jsonl or .parquet file; hf:org/name:config:split for a dataset of the Hugging Face Hub; or "python-docs",
        "python-docs:train", "python-docs:held-out" for the embedded corpus.
    model
        The model; default: the one the dictionary was trained on.
    n_tokens
        Tokens to read; default: all.
    out
        Folder for the collected data, to be loaded again; several dictionaries have folders 0-topk, 1-l1, … in it (number and
        rule). After an interruption the same command goes on.
    codes
        Keep all activations in --out as a Parquet table, for queries in SQL.
    control
        Collect the same on the model with its weights re-drawn.
    html
        The file to write; several dictionaries have files features-0-topk.html, ….
    device
        Where to run, e.g. cuda.
    exists
        What to do when an output exists.
    """
    import saelens_lite as sl
    from saelens_lite.features.compare import STABILITY_FILE, Stability
    from saelens_lite.features.store import folder_names
    from saelens_lite.files import refuse_existing
    from saelens_lite.tokens import named_text

    loaded = [sl.Dictionary.load(path) for path in dictionaries]
    pages = [html] if len(loaded) == 1 else [html.with_stem(f"{html.stem}-{name}") for name in folder_names(loaded)]
    for page in pages:
        refuse_existing(page, exists)
    lm = _model_of(loaded[0], model, device)
    stores = sl.FeatureStore.build(
        [d.to(lm.device) for d in loaded] if len(loaded) > 1 else loaded[0].to(lm.device),
        lm,
        named_text(text),
        n_tokens=n_tokens,
        text_config=text_config,
        out=out,
        codes=codes,
        control=control,
        stability=[Stability.load(path) if (path / STABILITY_FILE).exists() else None for path in dictionaries],
        exists=exists,
    )
    for store, page in zip(stores if isinstance(stores, list) else [stores], pages, strict=True):
        store.dashboard(page, exists=exists)
        _console().print(f"{page}: {store.info.d_sae} latents, {page.stat().st_size / 1e6:.1f} MB", markup=False)


@app.command
def dashboard(store: Path, *, html: Path = Path("features.html"), exists: Exists = "error") -> None:
    """Write the page of a store that `features --out` collected, with the labels that were given since.

    Parameters
    ----------
    store
        Folder of the store.
    html
        The file to write.
    exists
        What to do when the file exists.
    """
    import saelens_lite as sl

    loaded = sl.FeatureStore.load(store)
    loaded.dashboard(html, exists=exists)
    _console().print(f"{html}: {loaded.info.d_sae} latents, {html.stat().st_size / 1e6:.1f} MB", markup=False)


@app.command
def compare(
    dictionary: Path,
    others: list[Path],
    *,
    threshold: float = 0.7,
    method: Literal["auto", "hungarian", "mutual"] = "auto",
    include_dead: Annotated[bool, Parameter(negative="")] = False,
    seed: int = 0,
    out: Path | None = None,
    json_out: Annotated[Path | None, Parameter(name="--json")] = None,
    exists: Exists = "error",
) -> None:
    """See how many latents of a dictionary others have as well, such as those of other seeds.

    Parameters
    ----------
    dictionary
        Dictionary folder.
    others
        Dictionary folders to compare it with.
    threshold
        Cosine above which matched latents are shared, in decoder and encoder.
    method
        How latents are matched: one to one by the Hungarian algorithm, only mutual nearest neighbours, or the former as far as
        8192 latents.
    include_dead
        Count latents that never fired in training.
    seed
        Seed of the random dictionary that shows the level of chance.
    out
        Folder, of the dictionary or its feature store, for a score of each latent: stability.safetensors.
    json_out
        File for all figures.
    exists
        What to do when there are scores in the folder already.
    """
    import saelens_lite as sl
    from saelens_lite.features.compare import STABILITY_FILE, Stability, compare_all, comparison_table
    from saelens_lite.files import refuse_existing, write_json

    if out:
        refuse_existing(out / STABILITY_FILE, exists)
    loaded = sl.Dictionary.load(dictionary)
    settings = {"threshold": threshold, "method": method, "include_dead": include_dead, "seed": seed}
    found = compare_all(loaded, [sl.Dictionary.load(path) for path in others], **settings)
    compared = dict(zip(map(str, others), found, strict=True))
    if json_out:
        write_json(json_out, {path: comparison.to_dict() for path, comparison in compared.items()})
    _console().print(comparison_table(compared))
    scores = Stability.of(list(compared.values()))
    if len(compared) > 1:
        _console().print(f"shared with all {len(compared)}: {scores.shared_in_all:.1%}, with none: {scores.shared_in_none:.1%}")
    if out:
        _console().print(f"{scores.save(out, exists=exists)}: a score for each latent", markup=False)


@app.command
def probe(
    dictionary: Path,
    *,
    data: list[Path],
    column: str = "text",
    label_column: str = "label",
    ks: tuple[int, ...] = (1, 4, 16),
    pooling: Literal["mean", "max", "last"] = "mean",
    model: str | None = None,
    seed: int = 0,
    device: str | None = None,
    json_out: Annotated[Path | None, Parameter(name="--json")] = None,
) -> None:
    """Measure how well a few latents tell texts of two classes apart, beside all latents and the raw activations.

    Parameters
    ----------
    dictionary
        Dictionary folder.
    data
        Labelled texts: .jsonl or .csv files, each a dataset of its own.
    column
        Key or column of the text.
    label_column
        Key or column of the label.
    ks
        Numbers of latents.
    pooling
        How the tokens of a text become one vector.
    model
        The model; default: the one the dictionary was trained on.
    seed
        Seed of the split into texts to train on and texts held out.
    device
        Where to run, e.g. cuda.
    json_out
        File for the full reports.
    """
    import saelens_lite as sl
    from saelens_lite.evaluate.labelled import read_labelled
    from saelens_lite.evaluate.probing import probe_table
    from saelens_lite.files import write_json

    datasets = {str(path): read_labelled(path, column=column, label_column=label_column) for path in data}
    loaded = sl.Dictionary.load(dictionary)
    lm = _model_of(loaded, model, device)
    reports = sl.probe(loaded.to(lm.device), lm, datasets, ks=ks, pooling=pooling, seed=seed)
    _console().print(probe_table(reports))
    if json_out:
        write_json(json_out, {name: report.to_dict() for name, report in reports.items()})


@app.command
def steer(
    dictionary: Path,
    *,
    prompt: str,
    ablate: list[int] | None = None,
    scale: list[str] | None = None,
    clamp: list[str] | None = None,
    add: list[str] | None = None,
    positions: list[int] | None = None,
    max_new_tokens: int = 50,
    temperature: float = 0.8,
    seed: int = 0,
    model: str | None = None,
    device: str | None = None,
) -> None:
    """See what a model writes when latents are changed, beside what it writes without, and what that costs.

    Parameters
    ----------
    dictionary
        Dictionary folder.
    prompt
        Beginning of the text.
    ablate
        Latent that is kept from firing; this and the next three may be given several times, and are applied in this order.
    scale
        LATENT=FACTOR: multiply its code, e.g. 9=0.5.
    clamp
        LATENT=VALUE: set its code, e.g. 7=8.0.
    add
        LATENT=AMOUNT: add to its code, e.g. 3=2.
    positions
        Positions that change, counted from BOS, which is 0; default: all that the dictionary was trained on.
    max_new_tokens
        Tokens to write.
    temperature
        0 takes the likeliest token each time.
    seed
        Seed of the draws.
    model
        The model; default: the one the dictionary was trained on.
    device
        Where to run, e.g. cuda.
    """
    import saelens_lite as sl
    from saelens_lite.interventions.steering import steer as run_steer
    from saelens_lite.interventions.steering import table

    edits = [sl.Ablate(latent, positions=positions) for latent in ablate or ()]
    for kind, flag, given in ((sl.Scale, "scale", scale), (sl.Clamp, "clamp", clamp), (sl.Add, "add", add)):
        edits += [kind(*_latent_and_value(flag, text), positions=positions) for text in given or ()]
    loaded = sl.Dictionary.load(dictionary)
    lm = _model_of(loaded, model, device)
    settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    _console().print(table(run_steer(lm, loaded.to(lm.device), prompt, edits, **settings)))


def _latent_and_value(flag: str, text: str) -> tuple[int, float]:
    """The two sides of "7=8.0"."""
    latent, _, value = text.partition("=")
    try:
        return int(latent), float(value)
    except ValueError:
        raise ConfigError(f"--{flag} {text}: expected LATENT=NUMBER, such as --{flag} 7=0.5") from None


@app.command
def attribute(
    dictionary: Path,
    *,
    prompt: str,
    token: str | None = None,
    against: str | None = None,
    top: int = 15,
    ablation: bool = True,
    model: str | None = None,
    device: str | None = None,
    json_out: Annotated[Path | None, Parameter(name="--json")] = None,
) -> None:
    """See which latents make the model say what it says: by exact ablation, by gradient, and directly.

    Parameters
    ----------
    dictionary
        Dictionary folder.
    prompt
        The text; latents are those that fire on it.
    token
        With --against: the effect is on the logit of this token minus that of the other, at the end of the prompt. Mind the
        space in front of words. Without the two: on the mean loss over the prompt.
    against
        The other token.
    top
        Rows to show.
    ablation
        Also ablate each latent, a forward pass each.
    model
        The model; default: the one the dictionary was trained on.
    device
        Where to run, e.g. cuda.
    json_out
        File for all effects.
    """
    import saelens_lite as sl
    from saelens_lite.files import write_json

    metric = _pair(token, against) or "loss"
    loaded = sl.Dictionary.load(dictionary)
    lm = _model_of(loaded, model, device)
    found = sl.attribute(lm, loaded.to(lm.device), prompt, metric, ablation=ablation)
    _console().print(found.table(top))
    if json_out:
        write_json(json_out, found.to_dict())


def _pair(token: str | None, against: str | None) -> tuple[str, str] | None:
    """Two tokens whose logits are compared, if they were given."""
    if token is not None and against is not None:
        return token, against
    if token is None and against is None:
        return None
    raise ConfigError("--token and --against go together: the difference of their logits is what is explained")


@app.command(name="prompt")
def show_prompt(
    dictionary: Path,
    *,
    prompt: str,
    by: Literal["activation", "relative", "attribution"] = "activation",
    store: Path | None = None,
    token: str | None = None,
    against: str | None = None,
    top: int = 5,
    model: str | None = None,
    device: str | None = None,
    json_out: Annotated[Path | None, Parameter(name="--json")] = None,
) -> None:
    """See which latents fire at each token of a text.

    Parameters
    ----------
    dictionary
        Dictionary folder.
    prompt
        The text.
    by
        What comes first at a token: the largest activation, the largest share of the latent's largest activation (needs
        --store), or the largest effect on what the model says, by gradient.
    store
        Folder written by `features --out`, for labels and promoted tokens.
    token
        With --against: effects are on the logit of this token minus that of the other, at the end of the prompt. Mind the
        space in front of words. Without the two: on the mean loss over the prompt.
    against
        The other token.
    top
        Latents of each token.
    model
        The model; default: the one the dictionary was trained on.
    device
        Where to run, e.g. cuda.
    json_out
        File for what is shown.
    """
    import saelens_lite as sl
    from saelens_lite.files import write_json

    metric = _pair(token, against)
    loaded = sl.Dictionary.load(dictionary)
    collected = None if store is None else sl.FeatureStore.load(store, loaded)
    lm = _model_of(loaded, model, device)
    view = sl.prompt_view(loaded.to(lm.device), lm, prompt, by, store=collected, metric=metric, top=top)
    _console().print(view)
    if json_out:
        write_json(json_out, view.to_dict())


@app.command
def push(
    path: Path,
    repo: str,
    *,
    folder: str | None = None,
    revision: str | None = None,
    private: Annotated[bool, Parameter(negative="")] = False,
    license: str | None = None,
    tags: list[str] | None = None,
    message: str | None = None,
    parent_commit: str | None = None,
    dry_run: Annotated[bool, Parameter(negative="")] = False,
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Publish dictionaries on the Hugging Face Hub, in one commit. Log in first: `hf auth login`, or set HF_TOKEN.

    Parameters
    ----------
    path
        A dictionary folder, or the folder of a run with several.
    repo
        The repository, user/name; it is created if there is none.
    folder
        Name of the dictionary's folder in the repository; default: its hook.
    revision
        Branch to push to; default: main.
    private
        Let nobody else see the repository, if it is created.
    license
        Licence of the repository, e.g. mit.
    tags
        Further tags of the card.
    message
        Message of the commit.
    parent_commit
        Push only if this is the last commit there.
    dry_run
        Send nothing; show what would be sent.
    as_json
        Print JSON instead of text.
    """
    import saelens_lite as sl

    pushed = sl.push(
        {folder: path} if folder else path,
        repo,
        revision=revision,
        private=private,
        license=license,
        tags=tags or (),
        message=message,
        parent_commit=parent_commit,
        dry_run=dry_run,
    )
    facts = pushed._asdict() | {"files": [file._asdict() for file in pushed.files]}
    print(json.dumps(facts, indent=2, ensure_ascii=False) if as_json else pushed)


@app.command
def pull(
    repo: str,
    folder: str | None = None,
    *,
    revision: str | None = None,
    out: Path | None = None,
    max_bytes: int | None = None,
    format: str | None = None,
    exists: Exists = "error",
) -> None:
    """Fetch a dictionary from the Hugging Face Hub.

    Parameters
    ----------
    repo
        The repository, user/name; or an address, hf://user/name/folder@revision.
    folder
        The dictionary's folder in the repository; it may be left out if there is only one.
    revision
        Branch, tag or commit; default: main.
    out
        Folder to put it in; default: only huggingface_hub's cache.
    max_bytes
        Refuse to fetch more; default: 32 GiB.
    format
        Name of the format plugin to read it with; only needed for pickles.
    exists
        What to do when the folder is not empty.
    """
    import saelens_lite as sl
    from saelens_lite.files import refuse_existing
    from saelens_lite.hub import Address, copy_to, fetch

    if out:
        refuse_existing(out, exists)
    if repo.startswith("hf://") and (folder or revision):
        raise ConfigError(f"{repo} says which folder and revision; leave out the rest")
    address = Address.parse(repo) if repo.startswith("hf://") else Address.of(repo, folder, revision)
    fetched = fetch(address, **_given(max_bytes=max_bytes))
    loaded = sl.Dictionary.load(fetched.folder, format=format)
    place = copy_to(fetched, out, exists) if out else fetched.folder
    _console().print(f"{place}: {loaded.rule.plugin_name}, {loaded.d_sae} latents, {fetched.address}", markup=False)


@app.command
def inspect(path: Path, *, format: str | None = None) -> None:
    """Say what a dictionary or cache holds, ours or another tool's, without loading its tensors.

    Parameters
    ----------
    path
        A folder written by `train` or `capture`, a file or folder of another tool, or a dictionary on the Hub,
        hf://user/repo/folder@revision, whose weights are not fetched.
    format
        Name of the format plugin to read it with; only needed for pickles.
    """
    from saelens_lite import formats
    from saelens_lite.cache.stored import MANIFEST, ActivationCache
    from saelens_lite.dictionary import CONFIG_FILE
    from saelens_lite.files import read_json
    from saelens_lite.places import describe, is_address

    if is_address(path):
        facts = describe(path)
    elif (path / MANIFEST).exists():
        cache = ActivationCache.open(path)
        facts = {"activations": cache.n_tokens, **cache.manifest, "hooks": {h: cache.d_in(h) for h in cache.hooks}}
        facts["shards"] = len(cache.manifest["shards"])
    else:
        config = next((f for f in (path / CONFIG_FILE, path / "dictionary" / CONFIG_FILE) if f.exists()), path / CONFIG_FILE)
        facts = read_json(config) if format is None and config.exists() else {}
        if not _is_ours(facts):
            facts = formats.inspect(path, format)
        if (path / "eval.json").exists():
            facts["eval"] = read_json(path / "eval.json").get("metrics")
    print(json.dumps(facts, indent=2, ensure_ascii=False))
    _say_if_rule_is_missing(facts)


@app.command
def convert(source: Path, out: Path, *, format: str, source_format: str | None = None, exists: Exists = "error") -> None:
    """Write a dictionary, ours or another tool's, in a format.

    Parameters
    ----------
    source
        A dictionary folder, or a file or folder of another tool.
    out
        Folder to write.
    format
        saelens_lite, our own, or the name of a format plugin: saelens, sparsify, dictionary_learning, circuit_tracer.
    source_format
        Name of the format plugin to read the source with; only needed for pickles.
    exists
        What to do when the folder is not empty.
    """
    import saelens_lite as sl

    _console().print(str(sl.convert(source, out, format, source_format=source_format, exists=exists)), markup=False)


def _is_ours(facts: dict[str, Any]) -> bool:
    """Whether a cfg.json or manifest is one of ours."""
    metadata = facts.get("metadata")
    return isinstance(metadata, dict) and "saelens_lite" in metadata


def _say_if_rule_is_missing(facts: dict[str, Any]) -> None:
    """One line on standard error when a dictionary cannot be loaded for want of its sparsity rule."""
    from saelens_lite import registry

    metadata = facts.get("metadata")
    ours = metadata.get("saelens_lite") if isinstance(metadata, dict) else None
    if isinstance(ours, dict) and "sparsity" in ours:
        try:
            registry.find(ours["sparsity"], written_by=ours.get("distribution"))
        except PluginError as error:
            print(f"saelens-lite: this dictionary cannot be loaded here: {error}", file=sys.stderr)


@app.command
def plugins(
    *,
    check: str | None = None,
    options: dict[str, str] | None = None,
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """List the plugins that are installed, and whether each can be loaded; or check that one keeps its contract.

    The environment variable SAELENS_LITE_PLUGINS restricts which may be: a comma-separated list of distributions and
    kind:name pairs, e.g. SAELENS_LITE_PLUGINS=my-rules,loggers:my_logger. Built-in plugins always may; unset, all may.

    Parameters
    ----------
    check
        Name of a sparsity rule, format or logger, or kind:name, to check: a line for each thing that was looked at; exit code 1
        if anything fails. A logger writes where it is configured to: set WANDB_MODE=offline or the like before.
    options
        With --check: options of the sparsity rule, e.g. --options.k 4.
    as_json
        Print JSON instead of a table.
    """
    from saelens_lite import registry

    if options and not check:
        raise ConfigError("--options are those of a rule to check; say which: --check NAME")
    if check:
        _check(check, options or {}, as_json)
        return
    found = [registry.check(plugin) for kind in registry.KINDS for plugin in registry.plugins(kind)]
    if as_json:
        print(json.dumps([_facts(finding) for finding in found], indent=2, ensure_ascii=False))
    else:
        _console().print(_plugin_table(found))


def _check(asked: str, options: dict[str, str], as_json: bool) -> None:
    """Print what the conformance kit finds of a plugin; exit code 1 if a check fails."""
    from saelens_lite import registry
    from saelens_lite.config import parse_options
    from saelens_lite.testing import check_plugin

    kind, _, name = asked.rpartition(":")
    kinds = [kind] if kind else [k for k in registry.KINDS if any(p.name == asked for p in registry.plugins(k))]
    if len(kinds) > 1:
        raise PluginError(f"{asked!r} is the name of several plugins; say which: {' or '.join(f'{k}:{name}' for k in kinds)}")
    report = check_plugin(registry.load(name, *kinds), options=parse_options(options))
    if as_json:
        print(
            json.dumps({"plugin": report.plugin, "checks": [c._asdict() for c in report.checks]}, indent=2, ensure_ascii=False)
        )
    else:
        _console().print(_check_table(report))
    if not report.ok:
        sys.exit(1)


def _check_table(report: "PluginReport") -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    colours = {"ok": "green", "failed": "red", "warning": "yellow", "not checked": "dim"}
    grid = Table(box=SIMPLE_HEAD, title=f"{report.plugin}: {report.summary()}", title_justify="left")
    for title in ("check", "status", "found"):
        grid.add_column(title, overflow="fold", no_wrap=title != "found")
    for name, status, found in report.checks:
        grid.add_row(Text(name), Text(status, style=colours[status]), Text(found))
    return grid


def _facts(finding: "Finding") -> dict[str, str]:
    """A finding as flat JSON."""
    p = finding.plugin
    origin = {"name": p.name, "kind": p.kind, "distribution": p.distribution, "version": p.version, "target": p.target}
    return origin | {"paper": finding.paper, "summary": finding.summary, "status": finding.status, "why": finding.why}


def _plugin_table(findings: "list[Finding]") -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=SIMPLE_HEAD)
    for title in ("name", "kind", "distribution", "version", "paper", "status"):
        grid.add_column(title, overflow="fold", no_wrap=title not in ("paper", "status"))
    for finding in findings:
        p, status = finding.plugin, f"{finding.status}: {finding.why}" if finding.why else finding.status
        grid.add_row(*(Text(cell) for cell in (p.name, p.kind, p.distribution, p.version, finding.paper, status)))
    return grid


if __name__ == "__main__":
    main()
