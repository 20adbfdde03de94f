"""Plugins by name: built-in ones, those of other packages (entry points) and classes registered in a notebook.

A kind of plugin is a contract: a class that all plugins of the kind derive from, with the name of the kind as `plugin_kind`.
The package of the contract declares the kind in the entry-point group `saelens_lite.kinds`. Each plugin of it is an entry
point in the group `saelens_lite.<kind>`. So a package can add a new kind, and other packages can add plugins of that kind:

    [project.entry-points."saelens_lite.kinds"]
    explainers = "my_package:Explainer"                # class Explainer: plugin_kind = "explainers"

    [project.entry-points."saelens_lite.explainers"]
    by_words = "my_package.words:ByWords"              # class ByWords(Explainer): …

    registry.load("by_words", "explainers")            # the class ByWords, imported now

Listing reads package metadata only. A plugin's module is imported when the plugin is loaded, so a broken plugin does not affect
others.

A plugin that reads files is also listed in a group `saelens_lite.<kind>.<ending>` for each ending of its file names, such as
`saelens_lite.formats.npz` or `saelens_lite.formats.cfg.json`. It is imported only for files with such names.

The environment variable SAELENS_LITE_PLUGINS restricts the installed plugins that may be loaded: a comma-separated list of
distributions and kind:name pairs. If it is not set, all may be loaded. Built-in plugins and those registered in the process are
always allowed; an empty value allows only these.
"""

import os
import re
import sys
import traceback
from collections.abc import Callable
from functools import lru_cache
from hashlib import sha256
from importlib.metadata import entry_points
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from saelens_lite.errors import PluginError, near_matches

DECLARED = "saelens_lite.kinds"  # the group in which packages declare kinds
VARIABLE = "SAELENS_LITE_PLUGINS"
OWN_DISTRIBUTION = "saelens-lite"
T = TypeVar("T")

_registered: dict[tuple[str, str], Any] = {}


class Plugin(NamedTuple):
    """A plugin and its distribution. Its module may not be imported yet."""

    name: str
    kind: str
    distribution: str
    version: str
    target: str
    entry_point: Any  # an EntryPoint, of Python or of its backport importlib_metadata; None: registered in this process

    @property
    def allowed(self) -> bool:
        """True if SAELENS_LITE_PLUGINS allows the plugin to be loaded."""
        listed = os.environ.get(VARIABLE)
        if listed is None or self.entry_point is None or _canonical(self.distribution) == OWN_DISTRIBUTION:
            return True
        entries = {_canonical(entry) for entry in listed.split(",")}
        return not entries.isdisjoint({_canonical(self.distribution), _canonical(f"{self.kind}:{self.name}")})

    def __str__(self) -> str:
        return " ".join(f"{self.kind} plugin {self.name!r} of {self.distribution} {self.version}".split())


class Finding(NamedTuple):
    """The result of loading a plugin: its status, the reason if it fails, its paper, and its first line of documentation."""

    plugin: Plugin
    status: Literal["ok", "broken", "restricted"]
    why: str = ""
    paper: str = ""
    summary: str = ""


def kinds() -> dict[str, str]:
    """Return the kinds of plugins, sorted by name, each with its contract as «module:class». Imports nothing.

    A kind that two packages declare has both contracts, with " or " between them.
    """
    contracts = [(point.name, point.value) for point in _points().select(group=DECLARED)]
    contracts += [(kind, _target(_contract(plugin))) for (kind, _), plugin in _registered.items()]
    return {kind: " or ".join(sorted({c for k, c in contracts if k == kind})) for kind in sorted({k for k, _ in contracts})}


def plugins(kind: str = "sparsity") -> list[Plugin]:
    """Return all plugins of a kind, sorted by name.

    A name claimed twice appears twice, and restricted plugins are included.

    Raises:
        PluginError: there is no such kind.
    """
    known = kinds()
    if kind not in known:
        expected = f"; kinds are {', '.join(known)}" if known else f"; no kind is declared: reinstall {OWN_DISTRIBUTION}"
        raise PluginError(f"unknown kind of plugin {kind!r}{near_matches(kind, known)}{expected}")
    installed = _installed(kind, _search_path())
    registered = [
        Plugin(name, kind, "this session", "", _target(target), None)
        for (its_kind, name), target in _registered.items()
        if its_kind == kind
    ]
    return sorted(installed + registered, key=lambda p: (p.name, p.distribution))


def endings(kind: str) -> dict[str, set[str]]:
    """Return the endings of the file names that each plugin reads, as its package lists them. Imports nothing."""
    prefix, points = f"saelens_lite.{kind}.", _points()
    by_name: dict[str, set[str]] = {}
    for group in points.groups:
        if group.startswith(prefix):
            for point in points.select(group=group):
                by_name.setdefault(point.name, set()).add(group.removeprefix(prefix))
    return by_name


def names(kind: str = "sparsity") -> list[str]:
    """Return the names of all plugins of a kind that may be loaded."""
    return sorted({p.name for p in plugins(kind) if p.allowed})


def register(name: str) -> Callable[[type[T]], type[T]]:
    """Return a class decorator that registers a plugin under `name` in this process.

    The kind of the plugin is the `plugin_kind` of its base class. A base class with a new `plugin_kind` is a new kind.
    Running a notebook cell again replaces the cell's own class, but never an installed plugin.

    Raises:
        PluginError: an installed package has a plugin of that name, or the class does not derive from a contract.
    """

    def decorate(target: type[T]) -> type[T]:
        kind = getattr(target, "plugin_kind", None)
        if not isinstance(kind, str):
            raise PluginError(
                f"{target!r} cannot be registered as {name!r}: derive it from the base class of its kind of plugin"
            )
        for plugin in _installed(kind, _search_path()):
            if plugin.name == name:
                raise PluginError(f"{kind} plugin {name!r} is already supplied by {plugin.distribution}")
        _registered[kind, name] = target
        target.plugin_name = name  # type: ignore[attr-defined]
        return target

    return decorate


def unregister(name: str, kind: str = "sparsity") -> None:
    """Remove a class that was registered by `register`, if it is there."""
    _registered.pop((kind, name), None)


def import_file(path: str | Path) -> None:
    """Run a Python file that registers plugins, as `saelens-lite --import FILE` does.

    Raises:
        PluginError: the file is missing, is not Python, raises an error, or registers nothing.
    """
    path, before = Path(path), dict(_registered)
    if path.suffix != ".py" or not path.is_file():
        why = "no such file" if path.suffix == ".py" else "expected a Python file (.py) that registers plugins"
        raise PluginError(f"cannot import {path}: {why}")
    name = f"imported_{path.stem}_{sha256(str(path.absolute()).encode()).hexdigest()[:8]}"
    spec = spec_from_file_location(name, path.absolute())
    module = module_from_spec(spec)  # type: ignore[arg-type]
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)  # type: ignore[union-attr]
    except (Exception, SystemExit) as error:  # the file may raise anything
        del sys.modules[name]
        if isinstance(error, PluginError):
            raise
        raise PluginError(f"cannot import {path}: {type(error).__name__}{_line_of(error, path)}: {error}") from error
    if all(before.get(key) is target for key, target in _registered.items()):
        raise PluginError(f'{path} registers no plugin; put @sl.register("name") above its class')


def _line_of(error: BaseException, path: Path) -> str:
    """Return the line of a file in which an error arose, for a message."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path.absolute()]
    return f" in line {lines[-1]}" if lines else ""


def find(name: str, kind: str = "sparsity", *, written_by: str | None = None, from_file: bool = False) -> Plugin:
    """Return the plugin of that name.

    Args:
        written_by: the distribution that supplies the plugin according to a file, for the message.
        from_file: a file names the plugin, so the message says how to import the module that registers it.

    Raises:
        PluginError: there is no such plugin or kind (near matches are listed), the plugin is restricted, or several
            distributions supply it.
    """
    named = [p for p in plugins(kind) if p.name == name]
    candidates = [p for p in named if p.allowed]
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        claims = " and ".join(f"{p.distribution} ({p.target})" for p in candidates)
        raise PluginError(f"{kind} plugin {name!r} is supplied by {claims}; uninstall one of them or restrict {VARIABLE}")
    if named:
        raise PluginError(_restriction(named[0]))
    origin = f"; the file was written with {written_by}, which supplies it{_install(written_by)}" if written_by else ""
    if from_file and not written_by:
        origin = "; import the module that registers it (--import FILE, or import it before sl.load)"
    known = names(kind)
    hint = near_matches(name, known) or (
        f"; known: {', '.join(known)}" if known else f"; none is known: reinstall {OWN_DISTRIBUTION}"
    )
    raise PluginError(f"no {kind} plugin is called {name!r}{hint}{origin}")


def load(name: str, kind: str = "sparsity", *, written_by: str | None = None, from_file: bool = False) -> Any:
    """Import a plugin and return its class.

    Raises:
        PluginError: see `find`; or its module cannot be imported, or the plugin is not a class of this kind.
    """
    plugin = find(name, kind, written_by=written_by, from_file=from_file)
    if plugin.entry_point is None:
        return _registered[kind, name]
    try:
        target = plugin.entry_point.load()
    except (Exception, SystemExit) as error:  # a stranger's module may raise anything on import
        cause = f"{type(error).__name__}: {error}{_remedy(plugin, error)}"
        raise PluginError(f"{plugin} cannot be loaded from {plugin.target}: {cause}") from error
    if not isinstance(target, type) or getattr(target, "plugin_kind", None) != kind:
        raise PluginError(f"{plugin} is not usable: {plugin.target} is not a class derived from {kinds()[kind]}")
    target.plugin_name = name
    return target


def check(plugin: Plugin) -> Finding:
    """Try to load a plugin, and return its status and description. An error is in the result, not raised."""
    if not plugin.allowed:
        return Finding(plugin, "restricted", _restriction(plugin).removeprefix(f"{plugin} "))
    try:
        target = load(plugin.name, plugin.kind)
    except PluginError as error:
        return Finding(plugin, "broken", " ".join(str(error).removeprefix(f"{plugin} ").split()))
    summary = (target.__doc__ or "").strip().partition("\n")[0]
    return Finding(plugin, "ok", paper=str(getattr(target, "paper", "")), summary=summary)


def _contract(plugin: type) -> type:
    """Return the base class that declares the kind of a plugin."""
    return next(base for base in reversed(plugin.__mro__) if "plugin_kind" in vars(base))


def _target(cls: type) -> str:
    """Return the place of a class as «module:class», as in an entry point."""
    return f"{cls.__module__}:{cls.__qualname__}"


def _points() -> Any:
    """Return the entry points of all installed packages."""
    return _points_on(_search_path())


def _search_path() -> tuple[tuple[str, int], ...]:
    """Return the places that Python imports from, each with the time of its last change: installing a package changes one."""

    def changed(place: str) -> int:
        try:
            return os.stat(place or ".").st_mtime_ns
        except OSError:
            return 0

    return tuple((place, changed(place)) for place in sys.path)


@lru_cache(maxsize=1)
def _points_on(search_path: tuple[tuple[str, int], ...]) -> Any:
    return entry_points()


@lru_cache(maxsize=32)
def _installed(kind: str, search_path: tuple[tuple[str, int], ...]) -> list[Plugin]:
    return [_plugin(point, kind) for point in _points_on(search_path).select(group=f"saelens_lite.{kind}")]


def _plugin(point: Any, kind: str) -> Plugin:
    """Return the plugin of an entry point, with "?" if the metadata of its distribution is damaged."""
    metadata = _metadata(point) or {}
    return Plugin(point.name, kind, metadata.get("Name") or "?", metadata.get("Version") or "?", point.value, point)


def _metadata(point: Any) -> Any:
    """Return the metadata of the distribution of an entry point, None if it is damaged."""
    try:
        return point.dist.metadata if point.dist else None
    except FileNotFoundError:  # from the backport importlib_metadata, which other packages put in Python's place
        return None


def _canonical(name: str) -> str:
    """Return a name in the form in which package indexes compare it: small letters, and - for _ and dots."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def _restriction(plugin: Plugin) -> str:
    return (
        f"{plugin} may not be loaded: {VARIABLE} is {os.environ.get(VARIABLE)!r}; "
        f"add {plugin.distribution} or {plugin.kind}:{plugin.name} to it"
    )


def _install(written_by: str) -> str:
    """Return the pip command for a distribution that a file names as «name version»."""
    pair = re.fullmatch(r"([\w.-]+) ([\w.+!-]+)", written_by)
    return f": pip install '{pair[1]}=={pair[2]}'" if pair else ""


def _remedy(plugin: Plugin, error: BaseException) -> str:
    """Return the pip command if a package is missing and the distribution has an extra with the name of the plugin."""
    metadata = _metadata(plugin.entry_point) if plugin.entry_point else None
    if not isinstance(error, ImportError) or metadata is None:
        return ""
    extras = metadata.get_all("Provides-Extra") or []
    return f"; pip install '{plugin.distribution}[{plugin.name}]'" if plugin.name in extras else ""
