"""Labelled texts from files."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from saelens_lite.errors import ConfigError, TextError, near_matches
from saelens_lite.paths import check_input
from saelens_lite.tokens.sources import csv_records


def read_labelled(path: str | Path, *, column: str = "text", label_column: str = "label") -> tuple[list[str], list[Any]]:
    """Return the texts and labels of a .jsonl file (one object per line) or a .csv file (with a header).

    Labels of a .csv are strings.

    Raises:
        TextError: the file is missing, damaged or empty, or a record lacks its text or label.
        ConfigError: the file is of another kind.
    """
    path = check_input(path)
    if not path.is_file():
        raise TextError(f"no labelled texts at {path}")
    if path.suffix not in (".jsonl", ".csv"):
        raise ConfigError(f"{path}: cannot read {path.suffix or 'such'} files; give labelled texts as .jsonl or .csv")
    texts, labels = [], []
    for place, record in _jsonl(path) if path.suffix == ".jsonl" else csv_records(path):
        text, label = _value(record, column, place, "column"), _value(record, label_column, place, "label_column")
        if not isinstance(text, str):
            raise TextError(f"{place}: expected text under {column!r}; found {text!r:.40}")
        if label is None or isinstance(label, list | dict):
            raise TextError(f"{place}: expected a word or number under {label_column!r}; found {label!r:.40}")
        texts.append(text)
        labels.append(label)
    if not texts:
        raise TextError(f"{path} holds no texts")
    return texts, labels


def _value(record: Any, key: str, place: str, option: str) -> Any:
    """Return the value of a record under a key; `option` is the argument that chooses the key, for messages."""
    if not isinstance(record, dict):
        raise TextError(f"{place}: expected a record with the key {key!r}; found a {type(record).__name__}")
    if key not in record:
        names = [str(name) for name in record]
        raise TextError(f"{place}: no {key!r}{near_matches(key, names)}; it has {', '.join(names)}; choose one with {option}=")
    return record[key]


def _jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the place and the content of each line that is not blank."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.isspace():
                try:
                    yield f"{path}, line {number}", json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise TextError(f"{path}, line {number}: expected a JSON object; {error}") from None
