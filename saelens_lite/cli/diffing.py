"""The command that compares two models by a dictionary of both."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from saelens_lite.cli import checks
from saelens_lite.cli.base import app, console
from saelens_lite.cli.options import (
    THE_MODEL,
    DictionaryPath,
    Exists,
    Flag,
    JsonFile,
    ModelOptions,
    TextName,
    TextOfDictionary,
    TextOfDictionaryOptions,
)
from saelens_lite.errors import ConfigError


@app.command
def diff(
    dictionary: DictionaryPath,
    cache: Path | None = None,
    *,
    text: TextName | None = None,
    text_config: TextOfDictionaryOptions = TextOfDictionary(),  # noqa: B008 (frozen)
    of: ModelOptions = THE_MODEL,
    base: str | None = None,
    n_tokens: Annotated[int, Parameter(help="Tokens to read.")] = 200_000,
    controls: Flag = False,
    plot: Path | None = None,
    json_out: JsonFile = None,
    exists: Exists = "error",
) -> None:
    """List the latents that two models share, and those that one of them has alone.

    Give the activations of both models as a cache, or a text to run the models on.

    Parameters
    ----------
    cache
        Folder that `capture` wrote, with the activations of both models.
    text
        Text to run the models on, in place of a cache.
    base
        Name of the model that the other one was made from; default: the first one of the dictionary's ports.
    controls
        Also train two dictionaries on models whose difference is known, to measure false alarms. Takes about as long as two
        trainings.
    plot
        File for a picture, .png or .svg.
    """
    if (cache is None) == (text is None):
        given = "both a cache and --text were" if cache else "neither a cache nor --text was"
        raise ConfigError(f"{given} given; a diff reads one of them")
    if cache is not None:
        checks.hooks_in_cache(cache)
    if plot is not None:
        if plot.suffix.lower() not in (".png", ".svg"):
            raise ConfigError(f"--plot {plot}: expected the ending .png or .svg")
        checks.is_free(plot, exists)
    import saelens_lite as sl
    from saelens_lite.tokens import named_text

    loaded = sl.load(dictionary)
    settings = {"base": base, "n_tokens": n_tokens, "controls": controls}
    if cache is not None:
        report = sl.diff(loaded, sl.ActivationCache.open(cache), **settings)
    else:
        report = sl.diff(loaded, of.model_of(loaded), named_text(text), text_config=text_config, **settings)
    console().print(report.table())
    if json_out:
        report.to_json(json_out)
    if plot:
        report.plot(plot)
        console().print(str(plot), markup=False)
