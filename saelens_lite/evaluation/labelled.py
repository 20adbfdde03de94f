"""Labelled texts from files."""

import csv
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from saelens_lite.errors import ConfigError, TextError, near_matches
from saelens_lite.paths import check_input


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
    for place, record in _jsonl(path) if path.suffix == ".jsonl" else _csv(path):
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


@contextmanager
def _fields_of_any_length() -> Iterator[None]:
    """Allow csv fields of more than 131,072 characters in a block."""
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _csv(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the place and the content of each record, without columns that a short line lacks."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file, _fields_of_any_length():
            reader = csv.DictReader(file, strict=True)
            for record in reader:
                yield f"{path}, line {reader.line_num}", {k: v for k, v in record.items() if None not in (k, v)}
    except (csv.Error, UnicodeDecodeError) as error:
        raise TextError(f"{path} is damaged or not a UTF-8 CSV file: {error}") from None
