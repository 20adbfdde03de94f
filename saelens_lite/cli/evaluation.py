"""Commands that measure dictionaries."""

from pathlib import Path
from typing import Literal

from saelens_lite.cli.base import app, console
from saelens_lite.cli.options import (
    THE_MODEL,
    DictionaryPath,
    DictionaryPaths,
    Exists,
    Flag,
    JsonFile,
    ModelOptions,
    TextName,
    TextOptions,
)
from saelens_lite.config import TextConfig


@app.command(name="eval")
def evaluate(
    dictionaries: DictionaryPaths,
    *,
    text: TextName = "python-docs:held-out",
    text_config: TextOptions = TextConfig(),  # noqa: B008 (frozen)
    of: ModelOptions = THE_MODEL,
    n_tokens: int = 100_000,
    by_frequency: Flag = False,
    by_position: Flag = False,
    controls: Flag = False,
    json_out: JsonFile = None,
) -> None:
    """Measure dictionaries of one hook: sparsity, reconstruction, and what the model loses.

    Each report goes to eval.json in its dictionary's folder, in place of an earlier one; where there is no such folder, only
    --json keeps it.

    Parameters
    ----------
    n_tokens
        Tokens to read.
    by_frequency
        Show the reconstruction error of rare and frequent tokens as well.
    by_position
        Report reconstruction and loss by position in a row as well.
    controls
        Measure the same of a random dictionary of the same size and L0, of PCA with L0 components, and of the dictionary on the
        model with its weights re-drawn.
    """
    import saelens_lite as sl
    from saelens_lite.evaluation import frequency_table, position_table, table
    from saelens_lite.files import write_json
    from saelens_lite.tokens import named_text

    loaded = [sl.load(path) for path in dictionaries]
    lm = of.model_of(*loaded)
    reports = sl.evaluate(
        [dictionary.to(lm.device) for dictionary in loaded],
        lm,
        named_text(text),
        hook=of.hook,
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
    console().print(table(named))
    if by_frequency:
        console().print(frequency_table(named))
    if by_position:
        console().print(position_table(named))


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
    json_out: JsonFile = None,
) -> None:
    """Measure how well a few latents tell texts of two classes apart, beside all latents and the raw activations.

    Parameters
    ----------
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
    seed
        Seed of the split into texts to train on and texts held out.
    """
    import saelens_lite as sl
    from saelens_lite.evaluation.labelled import read_labelled
    from saelens_lite.evaluation.probing import probe_table
    from saelens_lite.files import write_json

    datasets = {str(path): read_labelled(path, column=column, label_column=label_column) for path in data}
    loaded, lm = of.load(dictionary)
    reports = sl.probe(loaded, lm, datasets, hook=of.hook, ks=ks, pooling=pooling, seed=seed)
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
    out: Path | None = None,
    json_out: JsonFile = None,
    exists: Exists = "error",
) -> None:
    """See how many latents of a dictionary others have as well, such as those of other seeds.

    Parameters
    ----------
    others
        Dictionaries to compare it with.
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
    """
    import saelens_lite as sl
    from saelens_lite.features.compare import STABILITY_FILE, Stability, compare_all, comparison_table
    from saelens_lite.files import write_json
    from saelens_lite.outputs import refuse_existing

    if out:
        refuse_existing(out / STABILITY_FILE, exists)
    loaded = sl.load(dictionary)
    settings = {"threshold": threshold, "method": method, "include_dead": include_dead, "seed": seed}
    found = compare_all(loaded, [sl.load(path) for path in others], **settings)
    compared = dict(zip(map(str, others), found, strict=True))
    if json_out:
        write_json(json_out, {path: comparison.to_dict() for path, comparison in compared.items()})
    console().print(comparison_table(compared))
    scores = Stability.of(list(compared.values()))
    if len(compared) > 1:
        console().print(f"shared with all {len(compared)}: {scores.shared_in_all:.1%}, with none: {scores.shared_in_none:.1%}")
    if out:
        console().print(f"{scores.save(out, exists=exists)}: a score for each latent", markup=False)
