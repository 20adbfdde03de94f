"""Commands that measure dictionaries."""

from pathlib import Path
from typing import Literal

from saelens_lite.cli import processes
from saelens_lite.cli.base import app, console
from saelens_lite.cli.options import (
    THE_MODEL,
    DictionaryPath,
    DictionaryPaths,
    Exists,
    Flag,
    JsonFile,
    ModelOptions,
    StoreOption,
    TextName,
    TextOfDictionary,
    TextOfDictionaryOptions,
    store_of,
)
from saelens_lite.cli.processes import Devices
from saelens_lite.processes import team


@app.command(name="eval")
def evaluate(
    dictionaries: DictionaryPaths,
    *,
    text: TextName = "python-docs:held-out",
    text_config: TextOfDictionaryOptions = TextOfDictionary(),  # noqa: B008 (frozen)
    of: ModelOptions = THE_MODEL,
    n_tokens: int = 100_000,
    by_frequency: Flag = False,
    by_position: Flag = False,
    controls: Flag = False,
    devices: Devices = None,
    json_out: JsonFile = None,
) -> None:
    """Measure the sparsity and reconstruction of dictionaries of one hook, and the model's loss on their reconstructions.

    Of dictionaries of several hooks or models, all with the same ones, each port is also measured alone.

    Each report is written to eval.json in the dictionary's folder and replaces an earlier one. A dictionary without a folder (a
    file or an address) needs --json to keep its report.

    Parameters
    ----------
    n_tokens
        Tokens to read.
    by_frequency
        Also report the reconstruction error of rare and of frequent tokens.
    by_position
        Also report reconstruction and loss by position in a row. Not for dictionaries that write several models.
    controls
        Also measure four controls: a random dictionary of the same size and L0, PCA with L0 components, the dictionary with
        10 % of its decoder rows permuted, and the dictionary on the model with its weights shuffled. Metrics that cannot tell a
        control from the dictionary are marked.
    """
    if processes.start(devices, of.device):
        return
    import saelens_lite as sl
    from saelens_lite.addresses import dictionary_folders
    from saelens_lite.evaluation import frequency_table, position_table, table
    from saelens_lite.files import write_json
    from saelens_lite.tokens import named_text

    dictionaries = dictionary_folders(dictionaries)
    loaded = [sl.load(path) for path in dictionaries]
    lm = of.model_of(*loaded)
    reports = sl.evaluate(
        loaded,
        lm,
        named_text(text),
        hook=of.hook,
        n_tokens=n_tokens,
        text_config=text_config,
        by_frequency=by_frequency,
        by_position=by_position,
        controls=controls,
    )
    if not team().is_first:
        return
    named = {str(path): report for path, report in zip(dictionaries, reports, strict=True)}
    for path, report in named.items():
        if Path(path).is_dir():
            report.to_json(Path(path) / "eval.json")
    if json_out:
        write_json(json_out, {path: report.to_dict() for path, report in named.items()})
    console().print(table(named))
    if by_frequency:
        console().print(frequency_table(named))
    if by_position:
        console().print(position_table(named))


@app.command(name="check-hook")
def check_hook(
    dictionary: DictionaryPath,
    *,
    text: TextName = "python-docs:held-out",
    text_config: TextOfDictionaryOptions = TextOfDictionary(),  # noqa: B008 (frozen)
    of: ModelOptions = THE_MODEL,
    n_tokens: int = 4096,
    json_out: JsonFile = None,
) -> None:
    """Measure a dictionary at the hook that it names and at its neighbours: before and after norms, centred, scaled, by layer.

    Parameters
    ----------
    n_tokens
        Tokens to read.
    """
    import saelens_lite as sl
    from saelens_lite.files import write_json
    from saelens_lite.tokens import named_text

    loaded, lm = of.load(dictionary)
    checked = sl.check_hook(loaded, lm, named_text(text), hook=of.hook, n_tokens=n_tokens, text_config=text_config)
    console().print(checked.table())
    if json_out:
        write_json(json_out, checked.columns())


@app.command
def probe(
    dictionary: DictionaryPath,
    *,
    data: list[Path],
    column: str = "text",
    label_column: str = "label",
    ks: tuple[int, ...] = (1, 4, 16),
    pooling: Literal["mean", "max", "last"] = "mean",
    of: ModelOptions = THE_MODEL,
    seed: int = 0,
    store: StoreOption = None,
    json_out: JsonFile = None,
) -> None:
    """Measure how well a few latents separate texts of two classes, compared with all latents and with the raw activations.

    Parameters
    ----------
    data
        Labelled texts: .jsonl or .csv files. Each file is one dataset.
    column
        Key or column that holds the text.
    label_column
        Key or column that holds the label.
    ks
        Numbers of latents to probe with.
    pooling
        Method that reduces the tokens of a text to one vector.
    seed
        Seed of the split into training and test texts.
    """
    import saelens_lite as sl
    from saelens_lite.evaluation.labelled import read_labelled
    from saelens_lite.evaluation.probing import probe_table
    from saelens_lite.files import write_json

    datasets = {str(path): read_labelled(path, column=column, label_column=label_column) for path in data}
    loaded, lm = of.load(dictionary)
    settings = {"ks": ks, "pooling": pooling, "seed": seed, "store": store_of(store, loaded)}
    reports = sl.probe(loaded, lm, datasets, hook=of.hook, **settings)
    console().print(probe_table(reports))
    if json_out:
        write_json(json_out, {name: report.to_dict() for name, report in reports.items()})


@app.command
def compare(
    dictionary: DictionaryPath,
    others: list[Path],
    *,
    threshold: float = 0.7,
    method: Literal["auto", "hungarian", "mutual"] = "auto",
    include_dead: Flag = False,
    seed: int = 0,
    device: str | None = None,
    out: Path | None = None,
    json_out: JsonFile = None,
    exists: Exists = "error",
) -> None:
    """Count the latents that a dictionary shares with others, such as dictionaries trained with other seeds.

    Parameters
    ----------
    others
        Dictionaries to compare it with.
    threshold
        Matched latents count as shared if both their decoder cosine and their encoder cosine exceed this.
    method
        Matching of latents: hungarian (one to one), mutual (mutual nearest neighbours), or auto (hungarian up to 8,192 live
        latents).
    include_dead
        Also count latents that never fired in training.
    seed
        Seed of the random directions that give the chance level.
    device
        Device to compute on, e.g. cuda; default: CUDA if available, else MPS if it works, else the CPU.
    out
        Folder for stability.safetensors, which holds a score for each latent. Use the folder of the dictionary or its feature
        store.
    """
    import saelens_lite as sl
    from saelens_lite.addresses import dictionary_folders
    from saelens_lite.features.compare import STABILITY_FILE, Stability, compare_all, comparison_table
    from saelens_lite.files import write_json
    from saelens_lite.outputs import refuse_existing

    if out:
        refuse_existing(out / STABILITY_FILE, exists)
    loaded, others = sl.load(dictionary), dictionary_folders(others)
    settings = {"threshold": threshold, "method": method, "include_dead": include_dead, "seed": seed, "device": device}
    comparisons = compare_all(loaded, [sl.load(path) for path in others], **settings)
    compared = dict(zip(map(str, others), comparisons, strict=True))
    if json_out:
        write_json(json_out, {path: comparison.to_dict() for path, comparison in compared.items()})
    console().print(comparison_table(compared))
    scores = Stability.of(list(compared.values()))
    if len(compared) > 1:
        console().print(f"shared with all {len(compared)}: {scores.shared_in_all:.1%}, with none: {scores.shared_in_none:.1%}")
    if out:
        console().print(f"{scores.save(out, exists=exists)}: a score for each latent", markup=False)
