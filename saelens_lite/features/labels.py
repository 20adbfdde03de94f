"""Labels, which say what a latent seems to stand for: those of Neuronpedia, and those of a store in their own JSON file.

labels = sl.labels.from_neuronpedia(d)
labels[123], labels[123].author, labels.search("license")
store.label_all(labels)
"""

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from saelens_lite.dictionary import Dictionary
from saelens_lite.errors import ConfigError, CorruptFileError, UserError, not_a_dictionary
from saelens_lite.features.explanations import Explanation, neuronpedia_id, read_explanations
from saelens_lite.features.info import StoreInfo, own_id, weights_hash
from saelens_lite.features.label import Label, origin_of
from saelens_lite.features.label_scores import OfLatents, auroc_of, current, kinds_of, scores_beside
from saelens_lite.features.store_files import read_info
from saelens_lite.files import MAX_LIST_BYTES, named_file, write_json
from saelens_lite.locks import locked
from saelens_lite.outputs import new_file
from saelens_lite.schemas import Checked, String, read_checked
from saelens_lite.tables import Result, grid
from saelens_lite.terminal import visible

__all__ = ["Label", "Labels", "from_neuronpedia", "load"]
LABELS_FILE = "labels.json"
FORMAT = 2  # 1 lacks imported labels
MOST = 1000  # characters of a label
MOST_OF_LATENT = 100  # explanations
SHOWN = 20  # labels in a table
logger = logging.getLogger(__name__)


class _Imported(Checked):
    """The labels that one author wrote, from one source, and from the contexts of one store if `store` names them."""

    source: String
    author: String
    store: String = ""
    labels: dict[String, str]


class _Content(Checked):
    """The content of a labels file: your own labels, and those of others."""

    format: Literal[1, 2]
    dictionary_sha256: String
    labels: dict[String, str]
    imported: list[_Imported] = Field([])


class Labels(Mapping[int, str], Result):
    """The labels of a dictionary's latents. `labels[123]` is a text with `source` and `author`.

    If a latent has several explanations, its label is the newest; of those with the same date or without one, it is the last in
    the files. Scores are not compared, because those of different methods have different scales. `explanations(123)` has all.
    `scores[123]["detection"]` is the score of a label, if it was read with the labels.
    """

    def __init__(
        self, labels: Mapping[int, Iterable[str]], d_sae: int, dictionary_sha256: str, scores: OfLatents | None = None
    ):
        self.d_sae, self.dictionary_sha256, self.scores = d_sae, dictionary_sha256, scores or {}
        self._labels = {latent: list(several) for latent, several in sorted(labels.items())}

    def __getitem__(self, latent: int) -> str:
        return self._labels[latent][0]

    def __iter__(self) -> Iterator[int]:
        return iter(self._labels)

    def __len__(self) -> int:
        return len(self._labels)

    def explanations(self, latent: int) -> list[str]:
        """Return all explanations of a latent, the newest first; none if it has no label."""
        return list(self._labels.get(latent, ()))

    def search(self, text: str) -> "Labels":
        """Return the labels that contain a text. Capitals do not matter."""
        hits = {i: [label] for i, label in self.items() if text.casefold() in label.casefold()}
        return Labels(hits, self.d_sae, self.dictionary_sha256, {i: self.scores[i] for i in hits if i in self.scores})

    def save(self, path: str | Path, *, exists: Literal["error", "overwrite"] = "error") -> Path:
        """Write the labels to a JSON file, which `sl.labels.load` and `store.read_labels` read, and return its path.

        Raises:
            OutputExistsError: the file exists and `exists` is "error".
        """
        with new_file(Path(path), "labels", exists):
            write_labels(Path(path), self, self.dictionary_sha256)
        return Path(path)

    def columns(self) -> dict[str, list[Any]]:
        """Return all labels, column by column."""
        rows = [(i, str(label), *_origin(label)) for i, label in self.items()]
        columns = {name: [row[j] for row in rows] for j, name in enumerate(("latent", "label", "source", "author"))}
        for kind in kinds_of(self.scores):
            of_each = [self.scores.get(i, {}).get(kind) for i in self]
            columns[f"{kind}_auroc"] = [None if one is None else one.score.auroc.value for one in of_each]
        return columns

    def table(self) -> Any:
        """Return the first labels as a table."""
        more = f"… and {len(self) - SHOWN:,} more" if len(self) > SHOWN else ""
        return label_table(dict(list(self.items())[:SHOWN]), self.scores, title=repr(self), more=more)

    def __repr__(self) -> str:
        origins = Counter(_origin(label) for label in self.values()).most_common(3)
        wrote = "; ".join(f"{n:,} by {author or 'unknown'}, {source or 'own'}" for (source, author), n in origins)
        return visible(f"Labels({len(self):,} of {self.d_sae:,} latents{': ' if wrote else ''}{wrote})")


def from_neuronpedia(dictionary: Dictionary, source: str | Path | None = None) -> Labels:
    """Return the labels of a dictionary from Neuronpedia's public explanation files.

    Args:
        source: A file (.jsonl or .jsonl.gz), a folder of such files, the URL of one file or of a folder in an S3 bucket, or a
            Neuronpedia id such as "gpt2-small/8-res-jb". By default, the id that came with the dictionary, whose files are in
            Neuronpedia's bucket.

    Raises:
        ConfigError: the dictionary has no Neuronpedia id and no source is given; the explanations are of another dictionary.
        CorruptFileError: a file is missing, damaged or too large.
        HubNotFoundError: Neuronpedia has no explanations of this dictionary.
        HubUnreachableError: the server cannot be reached.
    """
    if not isinstance(dictionary, Dictionary):
        raise not_a_dictionary(dictionary)
    own = own_id(dictionary)
    if source is None and own is None:
        raise ConfigError(
            'the dictionary does not say its Neuronpedia id; give source, such as "gpt2-small/8-res-jb" or a file'
        )
    return _read(own if source is None else source, own, dictionary.d_sae, weights_hash(dictionary))


def load(path: str | Path, dictionary: Dictionary) -> Labels:
    """Return the labels of a dictionary in a file that `Labels.save` or a feature store wrote.

    The scores of labels.json are in scores.json beside it, if they exist.

    Raises:
        CorruptFileError: a file is missing, damaged or of another format.
        ConfigError: the labels belong to another dictionary.
    """
    sha256, path = weights_hash(dictionary), named_file(path)
    labels = {latent: text for latent, text in read_labels(path, sha256, dictionary.d_sae).items() if text}
    scores = current(scores_beside(path.parent, dictionary), labels) if path.name == LABELS_FILE else {}
    return Labels({latent: [text] for latent, text in labels.items()}, dictionary.d_sae, sha256, scores)


def label_table(labels: Mapping[int, str], scores: OfLatents, *, title: str = "", more: str = "") -> Any:
    """Return a table of labels with their origin and their scores, if some have them."""
    kinds, by = kinds_of(scores), any(origin_of(label) for label in labels.values())
    rows = [
        (
            *(str(i), visible(label)),
            *[visible(origin_of(label))] * by,
            *(auroc_of(scores.get(i, {}).get(kind)) for kind in kinds),
        )
        for i, label in labels.items()
    ]
    marked = any(row[-1 - j].endswith("*") for row in rows for j in range(len(kinds)))
    about = "detection, fuzzing: AUROC of the label" + "; * not better than a control" * marked if kinds else ""
    return grid(
        ("latent", "label", *["by"] * by, *kinds), rows, title=title, caption="\n".join(part for part in (more, about) if part)
    )


def _read(place: str | Path, own: str | None, d_sae: int, sha256: str) -> Labels:
    """Return the labels at a place, which must be those of the dictionary's own Neuronpedia id, if it is known."""
    asked = neuronpedia_id(str(place)) if isinstance(place, str) and not os.path.exists(place) else None
    if own and asked and asked != own:
        raise ConfigError(f"this dictionary is {own} on Neuronpedia; the labels of {asked} are not its own")
    wanted, is_warned, dates = own or asked, False, {}
    for number, one in enumerate(read_explanations(place, d_sae)):
        wanted = wanted or one.source
        if wanted and not own and not is_warned:
            logger.warning("%s has labels of %s; this dictionary does not say whether it is that one", place, wanted)
            is_warned = True
        if one.source and one.source.casefold() != wanted.casefold():
            raise ConfigError(f"{place} has explanations of {one.source}; expected those of {wanted}")
        of_latent = dates.setdefault(one.latent, [])
        if len(of_latent) == MOST_OF_LATENT:
            raise CorruptFileError(f"{place} has more than {MOST_OF_LATENT} explanations of latent {one.latent}")
        of_latent.append((one.created or datetime.min.replace(tzinfo=UTC), number, _label(one)))
    newest = {i: [label for _, _, label in sorted(several, reverse=True)] for i, several in dates.items()}
    return Labels(newest, d_sae, sha256)


def _label(one: Explanation) -> Label:
    """Return an explanation as a label of at most MOST characters."""
    text = one.text if len(one.text) <= MOST else one.text[: MOST - 1] + "…"
    return Label(text, f"Neuronpedia {one.source}".strip(), one.author)


def _origin(label: str) -> tuple[str, str]:
    """Return the source and the author of a label; both are empty for your own label."""
    return (label.source, label.author) if isinstance(label, Label) else ("", "")


def merged(own: Mapping[int, str], labels: Mapping[int, str], info: StoreInfo, replace: bool) -> dict[int, str]:
    """Return a store's labels with others added. Your own labels stay, unless `replace` is true.

    Raises:
        ConfigError: the labels belong to another dictionary.
        UserError: there is no such latent, or a label is not valid.
    """
    if isinstance(labels, Labels) and labels.dictionary_sha256 != info.dictionary_sha256:
        raise ConfigError("the labels belong to another dictionary than the store; read them for the dictionary of this store")
    together = dict(own)
    for latent, text in labels.items():
        check_latent(latent, info)
        if text and (replace or latent not in own or isinstance(own[latent], Label)):
            together[latent] = checked_label(text)
    return dict(sorted(together.items()))


def check_latent(latent: int, info: StoreInfo) -> None:
    """Raise UserError unless the dictionary of a store has a latent."""
    if not 0 <= latent < info.d_sae:
        raise UserError(f"no latent {latent}; this dictionary has latents 0 to {info.d_sae - 1}")


def checked_label(text: str) -> str:
    """Return a label. Raise UserError if it is too long, or holds bytes that are not text."""
    if len(text) > MOST:
        raise UserError(f"the label has {len(text):,} characters; at most {MOST:,} are allowed")
    if text != text.encode("utf-8", "replace").decode():
        raise UserError(f"the label {text[:40]!r} holds bytes that are not text")
    return text


def stored_labels(folder: Path, info: StoreInfo | None = None) -> dict[int, str]:
    """Return the labels in the folder of a store. `info` is that of the store, if it has been read.

    Raises:
        CorruptFileError: it is not a store, or a file is damaged.
        ConfigError: the labels belong to another dictionary.
    """
    info, path = info or read_info(folder), folder / LABELS_FILE
    labels = read_labels(path, info.dictionary_sha256, info.d_sae) if os.path.lexists(path) else {}
    return {latent: text for latent, text in sorted(labels.items()) if text}


def label_stored(folder: Path, latent: int, text: str) -> dict[int, str]:
    """Change one label in the folder of a store, and return all labels. An empty text removes the label.

    Raises:
        UserError: there is no such latent, or the label is not valid.
        CorruptFileError: it is not a store, or a file is damaged.
        LockedError: another process is changing the labels.
    """
    info = read_info(folder)
    check_latent(latent, info)
    checked_label(text)
    with locked(folder / LABELS_FILE, "labels"):
        labels = {i: own for i, own in (stored_labels(folder, info) | {latent: text}).items() if own}
        write_labels(folder / LABELS_FILE, labels, info.dictionary_sha256)
    return labels


def import_stored(folder: Path, source: str, replace: bool = False) -> tuple[Labels, int]:
    """Add the labels of Neuronpedia at a source to the folder of a store. Return them, and how many of your own were kept.

    Raises:
        ConfigError, CorruptFileError, HubError: as for `from_neuronpedia`.
        LockedError: another process is changing the labels.
    """
    info = read_info(folder)
    labels = _read(source, info.neuronpedia, info.d_sae, info.dictionary_sha256)
    return labels, add_stored(folder, labels, info, replace)


def add_stored(folder: Path, labels: Mapping[int, str], info: StoreInfo, replace: bool = False) -> int:
    """Add labels to the folder of a store. Return how many of your own were kept in their place.

    Raises:
        ConfigError: the labels belong to another dictionary.
        UserError: there is no such latent, or a label is not valid.
        LockedError: another process is changing the labels.
    """
    with locked(folder / LABELS_FILE, "labels"):
        own = stored_labels(folder, info)
        write_labels(folder / LABELS_FILE, merged(own, labels, info, replace), info.dictionary_sha256)
    return 0 if replace else sum(latent in labels and not isinstance(text, Label) for latent, text in own.items())


def write_labels(path: Path, labels: Mapping[int, str], dictionary_sha256: str) -> None:
    """Write labels to a file, with the hash of the dictionary that they belong to. Those of others have source and author."""
    groups: dict[tuple[str, str, str], dict[str, str]] = {}
    for latent in sorted(labels):
        label = labels[latent]
        groups.setdefault((*_origin(label), getattr(label, "store", "")), {})[str(latent)] = str(label)
    own = groups.pop(("", "", ""), {})
    imported = [
        {"source": source, "author": author} | ({"store": store} if store else {}) | {"labels": of}
        for (source, author, store), of in groups.items()
    ]
    content = {"format": FORMAT, "dictionary_sha256": dictionary_sha256, "labels": own, "imported": imported}
    write_json(path, content, MAX_LIST_BYTES)


def read_labels(path: Path, dictionary_sha256: str, d_sae: int) -> dict[int, str]:
    """Return the labels in a file.

    Raises:
        CorruptFileError: the file is missing, damaged or of another format.
        ConfigError: the labels belong to another dictionary.
    """
    content = read_checked(path, _Content, MAX_LIST_BYTES)
    if content.dictionary_sha256 != dictionary_sha256:
        raise ConfigError(f"{path} has the labels of another dictionary; load the labels of this one")
    numbers = {str(latent): latent for latent in range(d_sae)}
    named = [
        (latent, Label(text, of.source, of.author, of.store)) for of in content.imported for latent, text in of.labels.items()
    ]
    for latent, _ in (*named, *content.labels.items()):
        if latent not in numbers:
            raise CorruptFileError(f"{path}: {latent[:40]!r} is not a latent; expected 0 to {d_sae - 1}")
    return {numbers[latent]: text for latent, text in (*named, *content.labels.items())}
