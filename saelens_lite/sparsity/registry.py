"""Plugins by name: built-in ones, strangers' packages (entry points) and classes registered in a notebook.

Listing reads package metadata only; a plugin's module is imported when the plugin is asked for.
"""

from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Any, NamedTuple, TypeVar

from saelens_lite.errors import PluginError, near_matches

KINDS = ("sparsity", "formats", "loggers")
T = TypeVar("T")

_registered: dict[tuple[str, str], Any] = {}


class Plugin(NamedTuple):
    """Where a plugin comes from; nothing has been imported yet."""

    name: str
    kind: str
    distribution: str
    version: str
    target: str
    entry_point: EntryPoint | None


def plugins(kind: str = "sparsity") -> list[Plugin]:
    """All plugins of a kind, sorted by name; a name claimed twice appears twice."""
    found = [
        Plugin(p.name, kind, p.dist.name if p.dist else "?", p.dist.version if p.dist else "?", p.value, p)
        for p in entry_points(group=f"saelens_lite.{kind}")
    ]
    found += [
        Plugin(name, kind, "this session", "", f"{target.__module__}:{target.__qualname__}", None)
        for (its_kind, name), target in _registered.items()
        if its_kind == kind
    ]
    return sorted(found, key=lambda p: (p.name, p.distribution))


def names(kind: str = "sparsity") -> list[str]:
    """The names of all plugins of a kind."""
    return sorted({p.name for p in plugins(kind)})


def register(name: str, kind: str = "sparsity") -> Callable[[type[T]], type[T]]:
    """Class decorator that makes a plugin known under `name` in this process.

    Raises:
        PluginError: an installed package has that name already, or the kind is unknown.
    """
    if kind not in KINDS:
        raise PluginError(f"unknown kind of plugin {kind!r}; kinds are {', '.join(KINDS)}")
    for plugin in entry_points(group=f"saelens_lite.{kind}", name=name):
        raise PluginError(f"{kind} plugin {name!r} is already supplied by {plugin.dist.name if plugin.dist else plugin.value}")

    def decorate(target: type[T]) -> type[T]:
        _registered[kind, name] = target  # running a notebook cell again replaces its own class
        target.plugin_name = name  # type: ignore[attr-defined]
        return target

    return decorate


def unregister(name: str, kind: str = "sparsity") -> None:
    """Forget a class made known by `register`."""
    _registered.pop((kind, name), None)


def find(name: str, kind: str = "sparsity", *, written_by: str | None = None) -> Plugin:
    """The one plugin of that name.

    Raises:
        PluginError: no such plugin (near matches listed), or two distributions supply it.
    """
    candidates = [p for p in plugins(kind) if p.name == name]
    if not candidates:
        origin = f"; the file was written with {written_by}, which supplies it" if written_by else ""
        known = names(kind)
        hint = near_matches(name, known) or f"; known: {', '.join(known)}"
        raise PluginError(f"no {kind} plugin is called {name!r}{hint}{origin}")
    if len(candidates) > 1:
        claims = " and ".join(f"{p.distribution} ({p.target})" for p in candidates)
        raise PluginError(f"{kind} plugin {name!r} is supplied by {claims}; uninstall one of them")
    return candidates[0]


def load(name: str, kind: str = "sparsity", *, written_by: str | None = None) -> Any:
    """The class of a plugin, imported now.

    Raises:
        PluginError: as `find`, or its module cannot be imported.
    """
    plugin = find(name, kind, written_by=written_by)
    if plugin.entry_point is None:
        return _registered[kind, name]
    try:
        target = plugin.entry_point.load()
    except Exception as error:  # whatever a stranger's module raises on import
        raise PluginError(
            f"{kind} plugin {name!r} of {plugin.distribution} {plugin.version} cannot be loaded from {plugin.target}: "
            f"{type(error).__name__}: {error}"
        ) from error
    target.plugin_name = name
    return target
