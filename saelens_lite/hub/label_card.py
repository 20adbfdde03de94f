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
from saelens_lite.features.explaining.scores import RESULTS, Judged, Kind, LabelScore, by_floors
from saelens_lite.features.info import codes_hash, weights_hash
from saelens_lite.features.label import origin_of
from saelens_lite.features.label_scores import (
    SCORES_FILE,
    OfLatents,
    current,
    exceeds_controls,
    kinds_of,
    scores_beside,
    write_scores,
)
from saelens_lite.features.labels import LABELS_FILE, read_labels, write_labels
from saelens_lite.markdown import cell, code

THE = {"token baseline": "the token baseline"}  # for a sentence
LABEL_FILES = (LABELS_FILE, SCORES_FILE)
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
MOST_NAMES = 5
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
        sha256, d_sae = weights_hash(dictionary), dictionary.d_sae
        labels = {i: text for i, text in read_labels(folder / LABELS_FILE, sha256, d_sae).items() if text}
        scores = current(scores_beside(folder, dictionary), labels)
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
    by = [f"{n:,} by {code(origin) if origin else 'a person, without a name'}" for origin, n in authors[:MOST_NAMES]]
    by += [f"{sum(n for _, n in authors[MOST_NAMES:]):,} by others"] * (len(authors) > MOST_NAMES)
    lines = ["## Labels", f"{len(labels):,} of {published.d_sae:,} latents have a label: {'; '.join(by)}."]
    if not scores:
        return "\n".join([*lines, "No label was scored, so nothing is known about how well they fit."])
    lines.append(f"{len(scores):,} of them were scored.")
    return "\n\n".join(["\n".join(lines), *(_of_kind(kind, scores) for kind in kinds_of(scores))])


def _of_kind(kind: Kind, scores: OfLatents) -> str:
    """Return the distribution of the scores of one kind, beside that of the controls, as Markdown."""
    ones = [kinds[kind] for kinds in scores.values() if kind in kinds]
    judges = sorted({one.judge for one in ones})
    named = ", ".join(map(code, judges[:MOST_NAMES])) + f" and {len(judges) - MOST_NAMES:,} others" * (len(judges) > MOST_NAMES)
    rows = [_row(f"AUROC, {told}", ones, name, "auroc") for name, told in ROWS.items()]
    rows += [_row(f"balanced accuracy, {told}", ones, name, "balanced_accuracy") for name, told in ROWS.items()]
    head = ["score", "n", *(f"{q:.0%}" if q != 0.5 else "median" for q in QUANTILES)]
    table = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}", *filter(None, rows)]
    unusable = sum(one.score.n_unusable for one in ones)
    told = [
        f"{sum(exceeds_controls(one) is True for one in of):,} of {len(of):,} labels are better than "
        f"{' and '.join(THE.get(name, name) for name in floors)}: the 95 % interval of the difference of AUROCs is above zero."
        if floors
        else f"{len(of):,} labels were not compared with a control."
        for floors, of in by_floors(ones).items()
    ]
    told += [f"{unusable:,} contexts got no usable answer and count as wrong."] * (unusable > 0)
    if n_elsewhere := sum(one.made_elsewhere for one in ones):
        told.append(f"{n_elsewhere:,} labels may have been made from the contexts that they are scored on.")
    return "\n".join(
        [
            f"**{kind.capitalize()}** (judge: {named}), quantiles over latents:",
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
        stores: folders of feature stores, by the hash of the dictionary that each is of (`codes_hash`).

    Raises:
        ConfigError: the store has no labels, or its labels belong to another dictionary.
        CorruptFileError: a file is damaged.
    """
    store = stores.get(codes_hash(dictionary)) if stores else None
    labels = PublishedLabels.read(store or folder, dictionary)
    if store and labels is None:
        raise ConfigError(f"{store} has no labels; label its latents first, or leave it out")
    return labels
