"""Labels: what somebody thinks a latent stands for, in a JSON file of their own."""

from collections.abc import Mapping
from pathlib import Path

from saelens_lite.errors import ConfigError, CorruptFileError
from saelens_lite.files import MAX_LIST_BYTES, read_json, write_json

LABELS_FILE = "labels.json"
FORMAT = 1


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
    content = read_json(path, MAX_LIST_BYTES)
    found = content.get("labels")
    if content.get("format") != FORMAT or not isinstance(found, dict):
        raise CorruptFileError(f"{path} holds no labels of format {FORMAT}")
    if content.get("dictionary_sha256") != dictionary_sha256:
        raise ConfigError(f"{path} has the labels of another dictionary")
    numbers = {str(latent): latent for latent in range(d_sae)}
    for latent, text in found.items():
        if latent not in numbers or not isinstance(text, str):
            raise CorruptFileError(f"{path}: {latent[:40]!r} is no latent of 0 to {d_sae - 1}, or its label no text")
    return {numbers[latent]: text for latent, text in found.items()}
