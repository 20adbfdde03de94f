"""The format of a file or folder; where there is none, what was found instead and the one thing to do.

Formats are asked whether they detect a path. Nothing is unpickled and no weights are read. A format is imported only for files
whose names end as the metadata of its package says (see `registry.endings`), or when it is asked for by name.
"""

import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from saelens_lite import registry
from saelens_lite.dictionary import CONFIG_FILE, OWN, is_own_folder
from saelens_lite.errors import ConfigError, CorruptFileError
from saelens_lite.files import check_header, is_zip
from saelens_lite.paths import check_input

log = logging.getLogger(__name__)
MAX_LOOKED_AT = 200  # files and folders below one that holds no dictionary itself


class Formats:
    """The formats that may be loaded. One is imported when a file could be its own, to judge by the file's name."""

    def __init__(self) -> None:
        self.endings = registry.endings("formats")
        self.plugins = {plugin.name: plugin for plugin in registry.plugins("formats") if plugin.allowed}
        self._readers: dict[str, Any] = {}

    def __str__(self) -> str:
        return ", ".join(self.plugins)

    def of(self, path: Path) -> list[Any]:
        """Return the formats that a file or folder could be of; one that cannot be imported is named in the log and left out.

        Raises:
            PluginError: two distributions supply one of them.
        """
        files = [f".{file.name}" for file in (path.iterdir() if path.is_dir() else [path])]
        return [reader for name in self.plugins if self._may_be_of(name, files) and (reader := self._reader(name))]

    def detected(self, path: Path) -> list[Any]:
        """Return the formats that say a file or folder is theirs."""
        return [reader for reader in self.of(path) if _detects(reader, path)]

    def _may_be_of(self, name: str, files: list[str]) -> bool:
        """Return whether a file name ends as those of the format do; one registered in this process is imported anyway."""
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
    """Return the format plugin that reads a file or folder: the one of that name, else the one that detects it.

    Raises:
        CorruptFileError: none does, or several do, or another than the named one does; the message says what was found.
        ConfigError: its files are pickles, which are only read on request.
        PluginError: there is no format of that name.
    """
    if not check_input(path).exists():
        raise CorruptFileError(f"{path / CONFIG_FILE} is missing; is {path} the folder you meant?")
    if name is not None:
        return _named(path, name)
    formats = Formats()
    found = formats.detected(path)
    if not found:
        return _nearest(path, formats)
    if len(found) > 1:
        names = ", ".join(reader.plugin_name for reader in found)
        raise CorruptFileError(f"{path} could be any of {names}; say which by format=")
    if found[0].pickled:
        raise ConfigError(
            f"{path} looks like {found[0].plugin_name}, whose files are pickles, which are read only on request: say "
            f"format={found[0].plugin_name!r} (tensors only; nothing in it is executed)"
        )
    return found[0]


def _named(path: Path, name: str) -> Any:
    """The format of that name, unless the path is of another one."""
    reader = None if name == OWN else registry.load(name, "formats")()
    if reader is not None and reader.detect(path):
        return reader
    formats = Formats()
    if other := _detected(path, formats):
        raise CorruptFileError(f"{path} holds a dictionary of {other[0]}, not of {name}; say format={other[0]!r}")
    if elsewhere := _elsewhere(path, formats):
        raise CorruptFileError(elsewhere)
    if reader is None:
        _nearest(path, formats)
        raise CorruptFileError(
            f"{path} holds no dictionary written by saelens_lite; leave out format= to have its format found"
        )
    if reader.folders and path.is_file():
        raise CorruptFileError(f"{path} is a file; a dictionary of {name} is a folder with {' and '.join(reader.files)}")
    return reader  # its own errors say what is missing


def _nearest(path: Path, formats: Formats) -> Any:
    """The format whose files are all there, though what they hold is not its own; else an error that says what was found."""
    if elsewhere := _elsewhere(path, formats):
        raise CorruptFileError(elsewhere)
    for file in sorted(path.glob("*.safetensors")):
        check_header(file)  # a damaged file should be called that
    if path.is_file():
        raise CorruptFileError(f"{path} holds no dictionary of saelens_lite, and nothing of {formats}{_tensors(path)}")
    present = {reader: [bool(next(path.glob(file), None)) for file in reader.files] for reader in formats.of(path)}
    whole = [reader for reader in present if reader.files and all(present[reader])]
    if len(whole) == 1 and not whole[0].pickled:
        return whole[0]
    if whole:
        raise CorruptFileError(
            f"{path} has the files of {_names(whole)}, but not their content; say which by format= to see why"
        )
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
        raise CorruptFileError(f"{path} holds {', '.join(there)}, but {wanted} is missing; put it there")
    raise CorruptFileError(
        f"{path / CONFIG_FILE} is missing; is {path} the folder you meant? Nothing of {formats} was found there either"
    )


def _elsewhere(path: Path, formats: Formats) -> str | None:
    """Where the dictionary is that somebody meant by a path: the folder of the file, inside the folder, or above it."""
    if path.is_file() and (found := _detected(path.parent, formats)):
        where = f"{path} holds no dictionary by itself; it belongs to the one of {found[0]} in its folder"
        return f"{where}: {_load(path.parent, found)}"
    if path.is_dir():
        below = {inner: found for inner in islice(_below(path), MAX_LOOKED_AT) if (found := _detected(inner, formats))}
        whole = [inner for inner in below if inner.parent not in below]  # not a folder's single files as well
        if whole:
            count = "a dictionary" if len(whole) == 1 else "several dictionaries, which are read one by one,"
            where = f"{path} holds no dictionary itself, but below it {count} of {below[whole[0]][0]}"
            return f"{where}: {_load(whole[0], below[whole[0]])}"
        if found := _detected(path.resolve().parent, formats):
            return f"{path} holds no dictionary; the folder above it does, of {found[0]}: {_load(path.resolve().parent, found)}"
    return None


def _below(folder: Path, depth: int = 3) -> Iterator[Path]:
    """Files and folders in a folder, and in folders in it, as deep as run/hook/seed."""
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
    """The names of the formats of a path; ours alone where it is ours."""
    try:
        if is_own_folder(path):
            return [OWN]
    except CorruptFileError:
        return []
    return [reader.plugin_name for reader in formats.detected(path)]


def _load(path: Path, names: list[str]) -> str:
    """What to do to load the dictionary there."""
    pickled = names != [OWN] and registry.load(names[0], "formats").pickled
    return f"load {path}" + (f" with format={names[0]!r}" if pickled else "")


def _tensors(path: Path) -> str:
    """What to do with a file of tensors of no known format."""
    try:
        names = ", ".join(sorted(str(name)[:40] for name in check_header(path)[0] if name != "__metadata__")[:6])
    except CorruptFileError:
        if not is_zip(path):
            return ""
        names = "a PyTorch or numpy archive"
    return f"; it holds tensors ({names}): read them and give them to Dictionary.from_tensors"


def _detects(reader: Any, path: Path) -> bool:
    """Return whether a format detects a path; one that fails at that is named in the log and left out."""
    try:
        return bool(reader.detect(path))
    except Exception as error:  # whatever a stranger's plugin raises
        log.warning(
            "format %s was left out, because it failed on %s: %s: %s", _source(reader), path, type(error).__name__, error
        )
        return False


def _source(reader: Any) -> str:
    named = [plugin for plugin in registry.plugins("formats") if plugin.name == reader.plugin_name]
    return ", ".join(map(str, named)) or reader.plugin_name


def _names(formats: list[Any]) -> str:
    return ", ".join(reader.plugin_name for reader in formats)
