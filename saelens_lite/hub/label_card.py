"""Labels beside a published dictionary: their files, and the section of the model card about them.

The card says who wrote the labels, and shows their scores as a distribution beside those of the controls. It claims nothing
about labels that were not scored.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from saelens_lite.dictionary import Dictionary
from saelens_lite.errors import ConfigError
from saelens_lite.features.explaining.scores import RESULTS, Judged, Kind, LabelScore
from saelens_lite.features.info import weights_hash
from saelens_lite.features.label import origin_of
from saelens_lite.features.label_scores import (
    SCORES_FILE,
    OfLatents,
    current,
    exceeds_controls,
    kinds_of,
    read_scores,
    write_scores,
)
from saelens_lite.features.labels import LABELS_FILE, read_labels, write_labels
from saelens_lite.markdown import cell, one_line

LABEL_FILES = (LABELS_FILE, SCORES_FILE)
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
MOST_AUTHORS = 5
ROWS = RESULTS | {"score": "the label", "hard": "the label, against the nearest latent"}


class PublishedLabels(NamedTuple):
    """The labels of a dictionary, and the current scores of these labels."""

    labels: dict[int, str]
    scores: OfLatents
    d_sae: int

    @classmethod
    def read(cls, folder: Path, dictionary: Dictionary) -> "PublishedLabels | None":
        """Return the labels in a folder of a dictionary or of its store, or None if it has none.

        Raises:
            CorruptFileError: a file is damaged.
            ConfigError: the labels or the scores belong to another dictionary.
        """
        if not (folder / LABELS_FILE).exists():
            return None
        sha256, d_sae, scores = weights_hash(dictionary), dictionary.d_sae, {}
        labels = {i: text for i, text in read_labels(folder / LABELS_FILE, sha256, d_sae).items() if text}
        if (folder / SCORES_FILE).exists():
            scores = current(read_scores(folder / SCORES_FILE, sha256, d_sae), labels)
        return cls(dict(sorted(labels.items())), scores, d_sae) if labels else None

    def write(self, folder: Path, dictionary_sha256: str) -> dict[str, Path]:
        """Write the labels, and their scores if there are some, to files in a folder. Return the files by name."""
        folder.mkdir(parents=True, exist_ok=True)
        write_labels(folder / LABELS_FILE, self.labels, dictionary_sha256)
        if self.scores:
            write_scores(folder / SCORES_FILE, self.scores, dictionary_sha256)
        return {name: folder / name for name in LABEL_FILES if (folder / name).exists()}


def labels_text(published: PublishedLabels | None) -> str:
    """Return the section of a card about labels as Markdown; empty without labels."""
    if published is None:
        return ""
    labels, scores = published.labels, published.scores
    authors = Counter(origin_of(label) for label in labels.values()).most_common()
    by = [f"{n:,} by {one_line(origin) if origin else 'a person, without a name'}" for origin, n in authors[:MOST_AUTHORS]]
    by += [f"{sum(n for _, n in authors[MOST_AUTHORS:]):,} by others"] * (len(authors) > MOST_AUTHORS)
    lines = ["## Labels", f"{len(labels):,} of {published.d_sae:,} latents have a label: {'; '.join(by)}."]
    if not scores:
        return "\n".join([*lines, "No label was scored, so nothing is known about how well they fit."])
    lines.append(f"{len(scores):,} of them were scored.")
    return "\n\n".join(["\n".join(lines), *(_of_kind(kind, scores) for kind in kinds_of(scores))])


def _of_kind(kind: Kind, scores: OfLatents) -> str:
    """Return the distribution of the scores of one kind, beside that of the controls, as Markdown."""
    ones = [kinds[kind] for kinds in scores.values() if kind in kinds]
    judges = ", ".join(sorted({one_line(one.judge) for one in ones}))
    rows = [_row(f"AUROC, {told}", ones, name, "auroc") for name, told in ROWS.items()]
    rows += [_row(f"balanced accuracy, {told}", ones, name, "balanced_accuracy") for name, told in ROWS.items()]
    head = ["score", "n", *(f"{q:.0%}" if q != 0.5 else "median" for q in QUANTILES)]
    table = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}", *filter(None, rows)]
    verdicts = [exceeds_controls(one) for one in ones]
    n_compared, unusable = len(verdicts) - verdicts.count(None), sum(one.score.n_unusable for one in ones)
    told = [
        f"{verdicts.count(True):,} of {n_compared:,} labels are better than the token baseline and another latent's "
        "explanation: the 95 % interval of the difference of AUROCs is above zero."
        if n_compared
        else "The labels were not compared with a control."
    ]
    told += [f"{unusable:,} contexts got no usable answer and count as wrong."] * (unusable > 0)
    if n_elsewhere := sum(one.made_elsewhere for one in ones):
        told.append(f"{n_elsewhere:,} labels may have been made from the contexts that they are scored on.")
    return "\n".join(
        [
            f"**{kind.capitalize()}** (judge: {judges}), quantiles over latents:",
            "",
            *table,
            "",
            " ".join(told),
        ]
    )


def _row(title: str, ones: list[LabelScore], name: str, metric: str) -> str:
    """Return a line of the table; empty if no score has this result."""
    results: list[Judged] = [of for one in ones if (of := getattr(one, name)) is not None]
    if not results:
        return ""
    quantiles = np.quantile([getattr(of, metric).value for of in results], QUANTILES)
    return f"| {cell(title)} | {len(results):,} | {' | '.join(f'{x:.2f}' for x in quantiles)} |"


def labels_of(folder: Path, dictionary: Dictionary, stores: Mapping[str, Path]) -> PublishedLabels | None:
    """Return the labels of a dictionary: those of its store, or else those in its own folder.

    Args:
        stores: folders of feature stores, by the hash of the dictionary that each is of.

    Raises:
        ConfigError: the store has no labels, or its labels belong to another dictionary.
        CorruptFileError: a file is damaged.
    """
    store = stores.get(weights_hash(dictionary)) if stores else None
    labels = PublishedLabels.read(store or folder, dictionary)
    if store and labels is None:
        raise ConfigError(f"{store} has no labels; label its latents first, or leave it out")
    return labels
