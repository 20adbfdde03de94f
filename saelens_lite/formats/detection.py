"""Detect the format of a file or folder. If there is no known format, raise an error that says what is there and what to do.

Each format is asked if it detects the path. Nothing is unpickled and no weights are read. A format is imported only for files
with an ending that its package declares (see `registry.endings`), or if it is requested by name.
"""

import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from saelens_lite import registry
from saelens_lite.dictionary.folder import CONFIG_FILE, OWN, is_own_folder
from saelens_lite.errors import ConfigError, CorruptFileError
from saelens_lite.files import is_zip
from saelens_lite.formats.containers import check_new_enough, tensor_names
from saelens_lite.paths import check_input, no_dictionary_at
from saelens_lite.tensor_files import check_header

log = logging.getLogger(__name__)
MAX_LOOKED_AT = 200  # files and folders searched below one that holds no dictionary itself


class Formats:
    """The formats that may be loaded. A format is imported when a file's name could be one of its own."""

    def __init__(self) -> None:
        self.endings = registry.endings("formats")
        self.plugins = {plugin.name: plugin for plugin in registry.plugins("formats") if plugin.allowed}
        self._readers: dict[str, Any] = {}

    def __str__(self) -> str:
        return ", ".join(self.plugins)

    def of(self, path: Path) -> list[Any]:
        """Return the formats that a file or folder could have. Formats that cannot be imported are logged and left out.

        Raises:
            PluginError: two distributions supply the same format.
        """
        files = [f".{file.name}" for file in (path.iterdir() if path.is_dir() else [path])]
        return [reader for name in self.plugins if self._may_be_of(name, files) and (reader := self._reader(name))]

    def detected(self, path: Path) -> list[Any]:
        """Return the formats that detect a file or folder as theirs."""
        return [reader for reader in self.of(path) if _detects(reader, path)]

    def _may_be_of(self, name: str, files: list[str]) -> bool:
        """Return whether a file has an ending of the format; always True for a format registered in this process."""
        if self.plugins[name].entry_point is None:
            return True
        wanted = tuple(f".{ending}" for ending in self.endings.get(name, ()))
        return any(file.endswith(wanted) for file in files)

    def _reader(self, name: str) -> Any:
        if name not in self._readers:
            finding = registry.check(registry.find(name, "formats"))
            if finding.status != "ok":
                log.warning("%s was left out: %s", finding.plugin, finding.why)
            self._readers[name] = registry.load(name, "formats")() if finding.status == "ok" else None
        return self._readers[name]


def format_of(path: Path, name: str | None = None) -> Any:
    """Return the format plugin that reads a file or folder: the named one, else the one that detects it.

    Raises:
        CorruptFileError: no format detects it, several do, or another than the named one; the message says what is there.
        ConfigError: its files are pickles, which are read only on request.
        PluginError: there is no format with that name.
    """
    if not check_input(path).exists():
        raise CorruptFileError(no_dictionary_at(path))
    if name is not None:
        return _named(path, name)
    formats = Formats()
    readers = formats.detected(path)
    if not readers:
        return _nearest(path, formats)
    if len(readers) > 1:
        raise CorruptFileError(f"{path} could be any of {_names(readers)}; set format= to one of them")
    if readers[0].pickled:
        raise ConfigError(
            f"{path} looks like {readers[0].plugin_name}, whose files are pickles, which are read only on request: set "
            f"format={readers[0].plugin_name!r} (only tensors are read; nothing is executed)"
        )
    return readers[0]


def _named(path: Path, name: str) -> Any:
    """Return the format with that name. Raise CorruptFileError if the path has another one."""
    reader = None if name == OWN else registry.load(name, "formats")()
    if reader is not None and reader.detect(path):
        return reader
    formats = Formats()
    if other := _detected(path, formats):
        raise CorruptFileError(f"{path} holds a dictionary of {other[0]}, not of {name}; set format={other[0]!r}")
    if elsewhere := _elsewhere(path, formats):
        raise CorruptFileError(elsewhere)
    if reader is None:
        _nearest(path, formats)
        raise CorruptFileError(f"{path} holds no dictionary written by saelens_lite; leave out format= to detect its format")
    if reader.folders and path.is_file():
        raise CorruptFileError(f"{path} is a file; a {name} dictionary is a folder with {' and '.join(reader.files)}")
    return reader  # its own errors say what is missing


def _nearest(path: Path, formats: Formats) -> Any:
    """Return the only format whose files are all present, though it did not detect them; else raise an error with advice."""
    if elsewhere := _elsewhere(path, formats):
        raise CorruptFileError(elsewhere)
    for file in [path] if path.is_file() else sorted(path.glob("*.safetensors")):
        _refuse_temporal(file, tensor_names(file))
    for file in sorted(path.glob("*.safetensors")):
        check_header(file)  # report a damaged file as such
    if path.is_file():
        check_new_enough(path)
        raise CorruptFileError(f"{path} holds no dictionary of saelens_lite or of {formats}{_tensors(path)}")
    present = {reader: [bool(next(path.glob(file), None)) for file in reader.files] for reader in formats.of(path)}
    whole = [reader for reader in present if reader.files and all(present[reader])]
    if len(whole) == 1 and not whole[0].pickled:
        return whole[0]
    if whole:
        raise CorruptFileError(f"{path} has the files of {_names(whole)}, but not their content; set format= to see why")
    partly = [reader for reader in present if any(present[reader])]
    missing: dict[str, list[str]] = {}
    for reader in partly:
        for file, there in zip(reader.files, present[reader], strict=True):
            if not there:
                missing.setdefault(file, []).append(reader.plugin_name)
    if missing:
        there = sorted(
            {file for reader in partly for file, is_there in zip(reader.files, present[reader], strict=True) if is_there}
        )
        wanted = " or ".join(f"{file} ({', '.join(names)})" for file, names in missing.items())
        raise CorruptFileError(f"{path} holds {', '.join(there)}, but {wanted} is missing; add it to the folder")
    raise CorruptFileError(
        f"{path / CONFIG_FILE} is missing; is {path} the folder you meant? It has no files of {formats} either"
    )


def _refuse_temporal(file: Path, names: set[str]) -> None:
    """Raise ConfigError if a file is a temporal SAE of canrager/temporalSAEs, with tensors D, b and attn_layers.…."""
    if names >= {"D", "b"} and any(name.startswith("attn_layers.") for name in names):
        raise ConfigError(
            f"{file} holds a temporal SAE, which predicts a part of each activation from earlier tokens by attention; a "
            "dictionary here encodes each token by itself, so its function cannot be computed: use the tool that trained it"
        )


def _elsewhere(path: Path, formats: Formats) -> str | None:
    """Return a message if the dictionary is in a file's folder, or below or above a folder; else None."""
    if path.is_file() and (names := _detected(path.parent, formats)):
        where = f"{path} holds no dictionary by itself; it is part of the {names[0]} dictionary in its folder"
        return f"{where}: {_load(path.parent, names)}"
    if path.is_dir():
        below = {inner: names for inner in islice(_below(path), MAX_LOOKED_AT) if (names := _detected(inner, formats))}
        whole = [inner for inner in below if inner.parent not in below]  # without the single files of a folder
        if whole:
            count = "is a dictionary" if len(whole) == 1 else "are several dictionaries, which are read one at a time,"
            where = f"{path} holds no dictionary itself, but below it {count} of {below[whole[0]][0]}"
            return f"{where}: {_load(whole[0], below[whole[0]])}"
        if names := _detected(path.resolve().parent, formats):
            return (
                f"{path} holds no dictionary; the folder above it has one of {names[0]}: {_load(path.resolve().parent, names)}"
            )
    return None


def _below(folder: Path, depth: int = 3) -> Iterator[Path]:
    """Yield the files and folders in a folder and its subfolders, as deep as run/hook/seed."""
    try:
        inner = sorted(folder.iterdir())
    except OSError:
        return
    yield from inner
    if depth > 1:
        for path in inner:
            if path.is_dir() and not path.is_symlink():
                yield from _below(path, depth - 1)


def _detected(path: Path, formats: Formats) -> list[str]:
    """Return the names of the formats that detect a path; only ours if the folder is ours."""
    try:
        if is_own_folder(path):
            return [OWN]
    except CorruptFileError:
        return []
    return [reader.plugin_name for reader in formats.detected(path)]


def _load(path: Path, names: list[str]) -> str:
    """Return the advice for loading the dictionary at a path."""
    pickled = names != [OWN] and registry.load(names[0], "formats").pickled
    return f"load {path}" + (f" with format={names[0]!r}" if pickled else "")


def _tensors(path: Path) -> str:
    """Return the advice for a file of tensors in no known format; empty for other files."""
    try:
        names = ", ".join(sorted(str(name)[:40] for name in check_header(path)[0] if name != "__metadata__")[:6])
    except CorruptFileError:
        if not is_zip(path):
            return ""
        names = "a PyTorch or numpy archive"
    return (
        f"; it holds tensors ({names}): load them with format='state_dict' and rule= (rule='l1' is ReLU), or pass them to "
        "Dictionary.from_tensors"
    )


def _detects(reader: Any, path: Path) -> bool:
    """Return whether a format detects a path. If it fails, log a warning and return False."""
    try:
        return bool(reader.detect(path))
    except Exception as error:  # a third-party plugin may raise anything
        log.warning(
            "format %s was left out, because it failed on %s: %s: %s", _source(reader), path, type(error).__name__, error
        )
        return False


def _source(reader: Any) -> str:
    named = [plugin for plugin in registry.plugins("formats") if plugin.name == reader.plugin_name]
    return ", ".join(map(str, named)) or reader.plugin_name


def _names(formats: list[Any]) -> str:
    return ", ".join(reader.plugin_name for reader in formats)
