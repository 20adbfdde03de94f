"""Commands that find, show and label the latents of a feature store."""

import math
from typing import Annotated

from cyclopts import Parameter

from saelens_lite.cli.base import app, console, say
from saelens_lite.cli.options import Flag, JsonFile, StoreFolder
from saelens_lite.errors import ConfigError


@app.command
def search(store: StoreFolder, text: str, *, top: int = 20, json_out: JsonFile = None) -> None:
    """Find the latents whose label, promoted tokens or top contexts contain a text, best first.

    Capitals do not matter. The text is looked for as whole words; if no latent has it as such, also inside words. Latents with
    the text in their label come first, then those that fire on it rather than near it.

    Parameters
    ----------
    text
        One or several words, in quotation marks.
    top
        Latents to show.
    """
    import saelens_lite as sl
    from saelens_lite.files import write_json

    result = sl.FeatureStore.load(store).search(text, top)
    console().print(result)
    if json_out:
        write_json(json_out, result.to_dict(), limit=math.inf)


@app.command
def latent(store: StoreFolder, latents: list[int]) -> None:
    """Show latents: how often they fire, the tokens they promote, similar latents, and their top contexts.

    Parameters
    ----------
    latents
        Numbers of the latents.
    """
    import saelens_lite as sl

    loaded = sl.FeatureStore.load(store)
    summaries = [loaded.latent(number) for number in latents]
    for number, summary in enumerate(summaries):
        console().print(*[""] * (number > 0), summary, sep="\n")


@app.command
def label(
    store: StoreFolder,
    latent: int | None = None,
    text: str | None = None,
    *,
    show_all: Annotated[Flag, Parameter(name="--list")] = False,
    neuronpedia: str | None = None,
    replace: Flag = False,
) -> None:
    """Label a latent. The label is written at once; `dashboard` and tables with --store show it. An empty text removes it.

    Without a text, the command shows the label and its scores. With --neuronpedia, it labels all latents that are explained
    there.

    Parameters
    ----------
    latent
        Number of the latent.
    text
        The label, in quotation marks.
    show_all
        List all labels.
    neuronpedia
        Take the labels of Neuronpedia: an id such as gpt2-small/8-res-jb, a file or folder of explanations, or its URL.
    replace
        Let the labels of Neuronpedia replace your own too.
    """
    from saelens_lite.features.html import visible
    from saelens_lite.features.label_scores import in_words, stored_scores_of
    from saelens_lite.features.labels import import_stored, label_stored, label_table, stored_labels

    if sum((latent is not None, show_all, neuronpedia is not None)) != 1 or (replace and neuronpedia is None):
        raise ConfigError("give the number of a latent and its label, or --list, or --neuronpedia, which --replace belongs to")
    if neuronpedia is not None:
        imported, kept = import_stored(store, neuronpedia, replace)
        own = f"; kept {kept:,} label{'s' * (kept > 1)} of your own" if kept else ""
        say(f"{store}: {imported!r}{own}")
        return
    labels = stored_labels(store) if latent is None or text is None else label_stored(store, latent, text)
    if latent is not None:
        say(f"latent {latent}: {visible(labels[latent])}" if latent in labels else f"latent {latent} has no label")
        for kind, one in stored_scores_of(store, labels).get(latent, {}).items():
            say(f"{kind}: {in_words(one)}")
    else:
        console().print(label_table(labels, stored_scores_of(store, labels)))
