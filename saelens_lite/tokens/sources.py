"""Sources of text: strings, files and datasets. Each is read piece by piece."""

import csv
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import torch

from saelens_lite.config import TextConfig
from saelens_lite.errors import ConfigError, CorruptFileError, SaelensLiteError, TextError, near_matches
from saelens_lite.paths import check_input
from saelens_lite.tokens.python_docs import Document, PythonDocs

Text = str | Path | Mapping[str, Any] | Iterable[Any]  # of strings, Documents, Paths, records; or token ids, see inputs.py

READ_CHARS = 1 << 16
PARQUET_ROWS = 64
SUFFIXES = (".txt", ".md", ".csv", ".jsonl", ".parquet")
_HUB_NAME = re.compile(r"hf:([^\s:]+)(?::([^\s:]*))?(?::([^\s:]*))?")
_CORPUS_NAME = re.compile(r"python-docs(:\S*)?")


class Piece(NamedTuple):
    """A stretch of a document, as text or token ids. `first` is true at the start of a document.

    `mark` is the place before it, if the text can be read again from there (see `places`).
    """

    content: str | list[int]
    first: bool
    mark: Any = None


class HubName(NamedTuple):
    """A dataset on the Hugging Face Hub."""

    name: str
    config: str | None
    split: str | None


def hub_name(text: str) -> HubName | None:
    """Parse `hf:org/name`, `hf:org/name:config`, `hf:org/name:config:split` or `hf:org/name::split`. Return None for other
    strings.
    """
    match = _HUB_NAME.fullmatch(text)
    return HubName(match[1], match[2] or None, match[3] or None) if match else None


def named_text(name: str) -> Text:
    """Return the text with a name: "hf:…" is a dataset of the Hub, "python-docs…" the embedded corpus, anything else a file.

    Raises:
        TextError: the embedded corpus has no such part.
    """
    if hub_name(name):
        return name
    return PythonDocs(name) if _names_corpus(name) else Path(name)


def _names_corpus(text: Any) -> bool:
    """Return whether a text names the embedded corpus or a part of it."""
    return isinstance(text, str) and _CORPUS_NAME.fullmatch(text) is not None


def name_of(text: Any) -> str | None:
    """Return the name by which `named_text` finds a text again, or None if it is only in memory."""
    if isinstance(text, Path):
        return str(text.resolve())
    if isinstance(text, PythonDocs):
        return text.name
    return text if _names_corpus(text) or (isinstance(text, str) and hub_name(text)) else None


def files_of(text: Any) -> list[Path]:
    """Return the files of a text that are known before it is read."""
    texts = text if isinstance(text, list | tuple) else [text]
    return [one for one in texts if isinstance(one, Path)]


def source_name(text: Any, config: TextConfig | None = None) -> str | None:
    """Return a short name of a text: a file without its folder, a dataset with its split, or None."""
    if isinstance(text, Path | PythonDocs):
        return text.name
    dataset = hub_name(text) if isinstance(text, str) else None
    if dataset and config and config.split and not dataset.split:
        return f"hf:{dataset.name}:{dataset.config or ''}:{config.split}"
    return text if dataset or _names_corpus(text) else None


def read_pieces(text: Text, config: TextConfig) -> Iterator[Piece]:
    """Yield the documents of a text, long ones in several pieces. Reading is lazy.

    A string is a document, unless it names a dataset ("hf:org/name:config:split") or a part of the embedded corpus
    ("python-docs:train"). A Path is a file: a .txt or .md file is one document; in .jsonl each line is one, in .csv and
    .parquet each row. A mapping holds the splits of a dataset. Anything else is a sequence of documents: strings, Documents,
    Paths, or records with the column that `config` names.

    Raises:
        TextError: a file or dataset cannot be read, the embedded corpus has no such part, or a record has no text.
        ConfigError: the kind of file is not supported, the column or split does not exist, or a string names a file.
        CorruptFileError: a .parquet file is damaged.
    """
    if isinstance(text, str) and (name := hub_name(text)):
        yield from _hub(name, config)
    elif _names_corpus(text):
        yield from read_pieces(PythonDocs(text), config)
    elif isinstance(text, str | Document | Path):
        yield from _item(text, "the text", config)
    elif isinstance(text, Mapping):
        yield from read_pieces(_split(text, config), config)
    else:
        for number, item in enumerate(text):
            yield from _item(item, f"item {number}", config)


def _split(splits: Mapping[str, Any], config: TextConfig) -> Any:
    """Return the split of a dataset that `config` names."""
    asked = config.split or "train"
    if asked not in splits:
        raise ConfigError(
            f"no split {asked!r}{near_matches(asked, splits)}; it has {', '.join(map(str, splits))}; choose with split="
        )
    return splits[asked]


def _item(item: Any, place: str, config: TextConfig) -> Iterator[Piece]:
    """Yield the pieces of one document, or of the documents in a file."""
    if isinstance(item, Path):
        yield from _file(item, config)
    elif isinstance(item, Mapping):
        yield Piece(_content(item, place, config), True)
    elif config.token_column is not None:
        raise ConfigError(f"token_column = {config.token_column!r} is for records; {place} is of type {type(item).__name__}")
    elif isinstance(item, str) and item.endswith(SUFFIXES) and os.path.isfile(item):
        raise ConfigError(f"{place}, {item!r:.200}, names a file; strings are read as text, so give Path({item!r:.200})")
    elif isinstance(item, str | Document):
        yield Piece(item if isinstance(item, str) else item.text, True)
    else:
        raise TextError(f"{place}: expected a string, a Document, a Path or a record; found {type(item).__name__}")


def _content(record: Any, place: str, config: TextConfig) -> str | list[int]:
    """Return the text of a record, or its token ids if `config` names their column."""
    column = config.token_column or config.column
    option = "token_column" if config.token_column else "column"
    wanted = f"{place}: expected a record with the key {column!r}"
    if not isinstance(record, Mapping):
        raise TextError(f"{wanted}; found a {type(record).__name__}")
    if column not in record:
        names = [str(name) for name in record]
        raise TextError(f"{wanted}{near_matches(column, names)}; it has {', '.join(names)}; say which with {option}=")
    value = record[column]
    if config.token_column is None:
        if not isinstance(value, str):
            raise TextError(f"{wanted} that holds text; found {value!r:.40}")
        return value
    try:
        ids = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        ids = None
    if ids is None or ids.ndim != 1 or (ids.is_floating_point() and len(ids)) or ids.dtype == torch.bool:
        raise TextError(f"{wanted} that holds a list of token ids; found {value!r:.40}")
    return ids.tolist()


def check_file(path: Path, config: TextConfig) -> None:
    """Raise unless the file is there and of a kind that can be read as `config` says."""
    if not check_input(path).is_file():
        raise TextError(f"no text file at {path}")
    if path.suffix not in (*SUFFIXES, ""):
        raise ConfigError(f"{path}: cannot read {path.suffix} files; give {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    if config.token_column is not None and path.suffix not in (".jsonl", ".parquet"):
        raise ConfigError(f"token_column = {config.token_column!r} is for .jsonl and .parquet; {path} holds only text")


def _file(path: Path, config: TextConfig) -> Iterator[Piece]:
    check_file(path, config)
    if path.suffix == ".jsonl":
        return _jsonl(path, config)
    if path.suffix == ".csv":
        return (Piece(_content(record, place, config), True) for place, record in csv_records(path))
    return _parquet(path, config) if path.suffix == ".parquet" else _plain(path)


def _plain(path: Path) -> Iterator[Piece]:
    """Yield one document, a block of characters at a time."""
    try:
        with open(path, encoding="utf-8") as file:
            first = True
            while block := file.read(READ_CHARS):
                yield Piece(block, first)
                first = False
    except UnicodeDecodeError as error:
        raise TextError(f"{path} is not UTF-8 text: {error}") from None


def _jsonl(path: Path, config: TextConfig) -> Iterator[Piece]:
    """Yield a document a line; blank lines are passed over."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.isspace():
                continue
            place = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise TextError(
                    f"{place}: expected a record with the key {config.token_column or config.column!r}; {error}"
                ) from None
            yield Piece(_content(record, place, config), True)


def csv_records(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the place and the record of each row of a .csv file with a header, without columns that a short row lacks.

    Raises:
        TextError: the file is damaged or not UTF-8.
    """
    before = csv.field_size_limit(2**31 - 1)  # for texts of more than 131,072 characters
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            for record in reader:
                yield f"{path}, line {reader.line_num}", {k: v for k, v in record.items() if None not in (k, v)}
    except (csv.Error, UnicodeDecodeError) as error:
        raise TextError(f"{path} is damaged or not a UTF-8 CSV file: {error}") from None
    finally:
        csv.field_size_limit(before)


def _parquet(path: Path, config: TextConfig) -> Iterator[Piece]:
    """Yield a document a row; only the one column is read, a few rows at a time."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ConfigError(f"reading {path} needs pyarrow: pip install 'saelens-lite[parquet]'") from None
    column = config.token_column or config.column
    try:
        with ParquetFile(path, pre_buffer=False) as file:  # buffering would hold the whole column in memory
            names = file.schema_arrow.names
            if column not in names:
                option = "token_column" if config.token_column else "column"
                raise ConfigError(
                    f"{path} has no column {column!r}{near_matches(column, names)}; it has {', '.join(names)}; "
                    f"say which with {option}="
                )
            number = 0
            for batch in file.iter_batches(PARQUET_ROWS, columns=[column]):
                for record in batch.to_pylist():
                    yield Piece(_content(record, f"{path}, row {number}", config), True)
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise CorruptFileError(f"{path} is damaged or no parquet file: {error}") from None


def _hub(dataset: HubName, config: TextConfig) -> Iterator[Piece]:
    """Yield a dataset of the Hub, streamed."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise ConfigError(f"reading hf:{dataset.name} needs datasets: pip install 'saelens-lite[datasets]'") from None
    if config.split and dataset.split and config.split != dataset.split:
        raise ConfigError(f"split = {config.split!r}, but the text names the split {dataset.split!r}; say it once")
    split = dataset.split or config.split or "train"
    # from version 4 on datasets runs no code of a dataset and knows no such argument
    refusal = {"trust_remote_code": False} if "trust_remote_code" in signature(load_dataset).parameters else {}
    try:
        documents = load_dataset(dataset.name, dataset.config, split=split, streaming=True, **refusal)
        yield from read_pieces(documents, config)
    except SaelensLiteError:
        raise
    except Exception as error:  # datasets raises errors of many kinds, also in the middle of a stream
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        raise TextError(
            f"cannot read the dataset {dataset.name!r}, config {dataset.config!r}, split {split!r}: {reason}"
        ) from error
