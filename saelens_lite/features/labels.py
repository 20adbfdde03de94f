"""Labels, which say what a person thinks a latent stands for, in their own JSON file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from saelens_lite.errors import ConfigError, CorruptFileError
from saelens_lite.files import MAX_LIST_BYTES, write_json
from saelens_lite.schemas import Checked, String, read_checked

LABELS_FILE = "labels.json"
FORMAT = 1


class _Content(Checked):
    """The content of a labels file."""

    format: Literal[1]
    dictionary_sha256: String
    labels: dict[String, str]


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
