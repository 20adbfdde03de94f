"""Commands that show the text to which latents respond."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from saelens_lite.cli import checks, processes
from saelens_lite.cli.base import app, console
from saelens_lite.cli.options import (
    THE_MODEL,
    DictionaryPaths,
    Exists,
    ModelOptions,
    TextName,
    TextOfDictionary,
    TextOfDictionaryOptions,
)
from saelens_lite.cli.processes import Devices
from saelens_lite.config import StoreConfig
from saelens_lite.processes import team


@app.command
def features(
    dictionaries: DictionaryPaths,
    *,
    text: TextName = "python-docs:held-out",
    text_config: TextOfDictionaryOptions = TextOfDictionary(),  # noqa: B008 (frozen)
    of: ModelOptions = THE_MODEL,
    settings: Annotated[StoreConfig, Parameter(name="*", negative="")] = StoreConfig(),  # noqa: B008 (frozen)
    out: Path | None = None,
    html: Path = Path("features.html"),
    devices: Devices = None,
    exists: Exists = "error",
) -> None:
    """Write one HTML page per dictionary, which shows the text that each latent responds to. The model reads the text once.

    The page also shows the stability scores that `compare --out` saved in the dictionary's folder.

    Parameters
    ----------
    out
        Folder for the collected data, which `dashboard` and `prompt --store` read. Several dictionaries get subfolders 0-topk,
        1-l1, … (number and rule). Repeat the command to resume an interrupted pass.
    html
        File to write. Several dictionaries get one file each: features-0-topk.html, ….
    """
    import saelens_lite as sl
    from saelens_lite.addresses import dictionary_folders
    from saelens_lite.features.compare import STABILITY_FILE, Stability
    from saelens_lite.features.store import folder_names
    from saelens_lite.outputs import refuse_existing
    from saelens_lite.tokens import named_text

    dictionaries = [Path(path) for path in dictionary_folders(dictionaries)]
    if len(dictionaries) == 1:
        checks.is_free(html, exists)
    if processes.start(devices, of.device, lambda: "repeat the command" + " to resume it" * (out is not None)):
        return
    loaded = [sl.load(path) for path in dictionaries]
    pages = [html] if len(loaded) == 1 else [html.with_stem(f"{html.stem}-{name}") for name in folder_names(loaded)]
    for page in pages:
        refuse_existing(page, exists)
    lm = of.model_of(*loaded)
    stores = sl.FeatureStore.build(
        loaded if len(loaded) > 1 else loaded[0],
        lm,
        named_text(text),
        settings,
        hook=of.hook,
        text_config=text_config,
        out=out,
        stability=[Stability.load(path) if (path / STABILITY_FILE).exists() else None for path in dictionaries],
        exists=exists,
    )
    if not team().is_first:
        return
    for store, page in zip(stores if isinstance(stores, list) else [stores], pages, strict=True):
        store.dashboard(page, exists=exists)
        console().print(f"{page}: {store.info.d_sae} latents, {page.stat().st_size / 1e6:.1f} MB", markup=False)
    if out:
        console().print(f"{out}: collected data, for `dashboard` and `prompt --store`", markup=False)


@app.command
def dashboard(
    store: Path,
    *,
    html: Path = Path("features.html"),
    images: Path | None = None,
    diff: Path | None = None,
    exists: Exists = "error",
) -> None:
    """Write the HTML page of a store that `features --out` wrote, with its current labels.

    Parameters
    ----------
    store
        Folder of the store.
    html
        File to write.
    images
        Folder that holds the images, if the store is of rows named by image files.
    diff
        File that `diff --json` wrote, to show its numbers and classes of two models.
    """
    import saelens_lite as sl

    loaded = sl.FeatureStore.load(store)
    report = None if diff is None else sl.DiffReport.from_json(diff)
    loaded.dashboard(html, images=images, diff=report, exists=exists)
    console().print(f"{html}: {loaded.info.d_sae} latents, {html.stat().st_size / 1e6:.1f} MB", markup=False)
