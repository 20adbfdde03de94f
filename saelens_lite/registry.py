"""Plugins by name: built-in ones, strangers' packages (entry points) and classes registered in a notebook.

There are three kinds, each with an entry-point group `saelens_lite.<kind>`. Listing reads package metadata only; a plugin's
module is imported when the plugin is asked for, so a broken one disturbs nobody else.

A plugin that reads files is also listed in a group `saelens_lite.<kind>.<ending>` for each ending that its file names have,
such as `saelens_lite.formats.npz` or `saelens_lite.formats.cfg.json`. Only files of such names get it imported.

SAELENS_LITE_PLUGINS, a comma-separated list of distributions and kind:name pairs, restricts which installed plugins may be
loaded. Unset: all. Built-in plugins and those registered in the process always may; an empty value leaves only these.
"""

import os
import re
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal, NamedTuple, TypeVar

from saelens_lite.errors import PluginError, near_matches

KINDS = ("sparsity", "formats", "loggers")
VARIABLE = "SAELENS_LITE_PLUGINS"
OWN_DISTRIBUTION = "saelens-lite"
T = TypeVar("T")

_registered: dict[tuple[str, str], Any] = {}


class Plugin(NamedTuple):
    """Where a plugin comes from; nothing has been imported yet."""

    name: str
    kind: str
    distribution: str
    version: str
    target: str
    entry_point: EntryPoint | None  # None: registered in this process

    @property
    def allowed(self) -> bool:
        """Whether SAELENS_LITE_PLUGINS lets it be loaded."""
        listed = os.environ.get(VARIABLE)
        if listed is None or self.entry_point is None or _canonical(self.distribution) == OWN_DISTRIBUTION:
            return True
        entries = {_canonical(entry) for entry in listed.split(",")}
        return not entries.isdisjoint({_canonical(self.distribution), _canonical(f"{self.kind}:{self.name}")})

    def __str__(self) -> str:
        return " ".join(f"{self.kind} plugin {self.name!r} of {self.distribution} {self.version}".split())


class Finding(NamedTuple):
    """What loading a plugin showed: whether it works and why not, the paper it cites, and its first line of documentation."""

    plugin: Plugin
    status: Literal["ok", "broken", "restricted"]
    why: str = ""
    paper: str = ""
    summary: str = ""


def plugins(kind: str = "sparsity") -> list[Plugin]:
    """All plugins of a kind, sorted by name; a name claimed twice appears twice, and restricted ones are included.

    Raises:
        PluginError: there is no such kind.
    """
    if kind not in KINDS:
        raise PluginError(f"unknown kind of plugin {kind!r}; kinds are {', '.join(KINDS)}")
    found = [_installed(point, kind) for point in entry_points(group=f"saelens_lite.{kind}")]
    found += [
        Plugin(name, kind, "this session", "", f"{target.__module__}:{target.__qualname__}", None)
        for (its_kind, name), target in _registered.items()
        if its_kind == kind
    ]
    return sorted(found, key=lambda p: (p.name, p.distribution))


def endings(kind: str) -> dict[str, set[str]]:
    """Return, for each plugin, the endings of file names that its package lists it under. Imports nothing."""
    prefix, points = f"saelens_lite.{kind}.", entry_points()
    found: dict[str, set[str]] = {}
    for group in points.groups:
        if group.startswith(prefix):
            for point in points.select(group=group):
                found.setdefault(point.name, set()).add(group.removeprefix(prefix))
    return found


def names(kind: str = "sparsity") -> list[str]:
    """The names of all plugins of a kind that may be loaded."""
    return sorted({p.name for p in plugins(kind) if p.allowed})


def register(name: str) -> Callable[[type[T]], type[T]]:
    """Class decorator that makes a plugin known under `name` in this process; its kind is that of its base class.

    Running a notebook cell again replaces the cell's own class, never an installed plugin.

    Raises:
        PluginError: an installed package has that name already, or the class is no plugin.
    """

    def decorate(target: type[T]) -> type[T]:
        kind = getattr(target, "plugin_kind", None)
        if kind not in KINDS:
            raise PluginError(
                f"{target!r} cannot be registered as {name!r}: derive it from the base class of its kind of plugin"
            )
        for point in entry_points(group=f"saelens_lite.{kind}", name=name):
            raise PluginError(f"{kind} plugin {name!r} is already supplied by {_installed(point, kind).distribution}")
        _registered[kind, name] = target
        target.plugin_name = name  # type: ignore[attr-defined]
        return target

    return decorate


def unregister(name: str, kind: str = "sparsity") -> None:
    """Forget a class made known by `register`."""
    _registered.pop((kind, name), None)


def find(name: str, kind: str = "sparsity", *, written_by: str | None = None) -> Plugin:
    """The one plugin of that name; `written_by` is the distribution a file says it comes from.

    Raises:
        PluginError: no such plugin (near matches listed), a restricted one, or two distributions supply it.
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
    known = names(kind)
    hint = near_matches(name, known) or (
        f"; known: {', '.join(known)}" if known else f"; none is known: reinstall {OWN_DISTRIBUTION}"
    )
    raise PluginError(f"no {kind} plugin is called {name!r}{hint}{origin}")


def load(name: str, kind: str = "sparsity", *, written_by: str | None = None) -> Any:
    """The class of a plugin, imported now.

    Raises:
        PluginError: as `find`, or its module cannot be imported, or what it names is no plugin of this kind.
    """
    plugin = find(name, kind, written_by=written_by)
    if plugin.entry_point is None:
        return _registered[kind, name]
    try:
        target = plugin.entry_point.load()
    except (Exception, SystemExit) as error:  # whatever a stranger's module raises on import
        cause = f"{type(error).__name__}: {error}{_remedy(plugin, error)}"
        raise PluginError(f"{plugin} cannot be loaded from {plugin.target}: {cause}") from error
    if not isinstance(target, type) or getattr(target, "plugin_kind", None) != kind:
        raise PluginError(f"{plugin} is not usable: {plugin.target} is not a class derived from the base of {kind} plugins")
    target.plugin_name = name
    return target


def check(plugin: Plugin) -> Finding:
    """Whether a plugin can be loaded, and what it says of itself. Never raises: the reason is in the finding."""
    if not plugin.allowed:
        return Finding(plugin, "restricted", _restriction(plugin).removeprefix(f"{plugin} "))
    try:
        target = load(plugin.name, plugin.kind)
    except PluginError as error:
        return Finding(plugin, "broken", " ".join(str(error).removeprefix(f"{plugin} ").split()))
    summary = (target.__doc__ or "").strip().partition("\n")[0]
    return Finding(plugin, "ok", paper=str(getattr(target, "paper", "")), summary=summary)


def _installed(point: EntryPoint, kind: str) -> Plugin:
    """The plugin of an entry point; "?" where the metadata of its distribution is damaged."""
    metadata = (point.dist.metadata if point.dist else None) or {}
    return Plugin(point.name, kind, metadata.get("Name") or "?", metadata.get("Version") or "?", point.value, point)


def _canonical(name: str) -> str:
    """A name as package indexes compare it: case, and which of - _ . is used, make no difference."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def _restriction(plugin: Plugin) -> str:
    return (
        f"{plugin} may not be loaded: {VARIABLE} is {os.environ.get(VARIABLE)!r}; "
        f"add {plugin.distribution} or {plugin.kind}:{plugin.name} to it"
    )


def _install(written_by: str) -> str:
    """The pip command for a distribution as files name it: «name version»."""
    pair = re.fullmatch(r"([\w.-]+) ([\w.+!-]+)", written_by)
    return f": pip install '{pair[1]}=={pair[2]}'" if pair else ""


def _remedy(plugin: Plugin, error: BaseException) -> str:
    """The pip command, where a package is missing and the distribution has an extra that is called like the plugin."""
    distribution = plugin.entry_point.dist if plugin.entry_point else None
    if not isinstance(error, ImportError) or distribution is None:
        return ""
    extras = distribution.metadata.get_all("Provides-Extra") or []
    return f"; pip install '{plugin.distribution}[{plugin.name}]'" if plugin.name in extras else ""
