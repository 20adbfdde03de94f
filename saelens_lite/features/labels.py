"""Labels: what somebody thinks a latent stands for, in a JSON file of their own."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from saelens_lite.errors import ConfigError, CorruptFileError
from saelens_lite.files import MAX_LIST_BYTES, write_json
from saelens_lite.schemas import Checked, String, read_checked

LABELS_FILE = "labels.json"
FORMAT = 1


class _Content(Checked):
    """The content of a file of labels."""

    format: Literal[1]
    dictionary_sha256: String
    labels: dict[String, str]


def write_labels(path: Path, labels: Mapping[int, str], dictionary_sha256: str) -> None:
    """Put labels and the dictionary they are of in a file."""
    named = {str(latent): labels[latent] for latent in sorted(labels)}
    write_json(path, {"format": FORMAT, "dictionary_sha256": dictionary_sha256, "labels": named}, MAX_LIST_BYTES)


def read_labels(path: Path, dictionary_sha256: str, d_sae: int) -> dict[int, str]:
    """The labels in a file.

    Raises:
        CorruptFileError: the file is missing, damaged or of another format.
        ConfigError: they are of another dictionary.
    """
    content = read_checked(path, _Content, MAX_LIST_BYTES)
    if content.dictionary_sha256 != dictionary_sha256:
        raise ConfigError(f"{path} has the labels of another dictionary")
    numbers = {str(latent): latent for latent in range(d_sae)}
    for latent in content.labels:
        if latent not in numbers:
            raise CorruptFileError(f"{path}: {latent[:40]!r} is no latent of 0 to {d_sae - 1}")
    return {numbers[latent]: text for latent, text in content.labels.items()}
