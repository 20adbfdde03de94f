"""Labels, which say what a person thinks a latent stands for, in their own JSON file."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from saelens_lite.errors import ConfigError, CorruptFileError, UserError
from saelens_lite.features.info import StoreInfo
from saelens_lite.features.store_files import read_info
from saelens_lite.files import MAX_LIST_BYTES, write_json
from saelens_lite.locks import locked
from saelens_lite.schemas import Checked, String, read_checked

LABELS_FILE = "labels.json"
FORMAT = 1
MOST = 1000  # characters of a label


class _Content(Checked):
    """The content of a labels file."""

    format: Literal[1]
    dictionary_sha256: String
    labels: dict[String, str]


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
    if not 0 <= latent < info.d_sae:
        raise UserError(f"no latent {latent}; this dictionary has latents 0 to {info.d_sae - 1}")
    checked_label(text)
    with locked(folder / LABELS_FILE, "labels"):
        labels = {i: own for i, own in (stored_labels(folder, info) | {latent: text}).items() if own}
        write_labels(folder / LABELS_FILE, labels, info.dictionary_sha256)
    return labels


def write_labels(path: Path, labels: Mapping[int, str], dictionary_sha256: str) -> None:
    """Write labels to a file, with the hash of the dictionary that they belong to."""
    named = {str(latent): labels[latent] for latent in sorted(labels)}
    write_json(path, {"format": FORMAT, "dictionary_sha256": dictionary_sha256, "labels": named}, MAX_LIST_BYTES)


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
    for latent in content.labels:
        if latent not in numbers:
            raise CorruptFileError(f"{path}: {latent[:40]!r} is not a latent; expected 0 to {d_sae - 1}")
    return {numbers[latent]: text for latent, text in content.labels.items()}
