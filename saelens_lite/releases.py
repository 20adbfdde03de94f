"""The index of public dictionaries: find them, and learn what their files do not state.

`data/releases.toml` describes releases by templates; `scripts/releases.py` writes it. A table of the file is a release. Its
keys are fields of `Entry`, and `rows` lists what its dictionaries do not share. A row is a list of name=values, where several
values, separated by commas, give one dictionary each: «layer=0-2 width=16k,65k» describes six. 1-3 is 1,2,3 and 5*3 is 5,5,5.
«l0@layer=…» has one value for each layer, in their order. A row that ends with a colon begins each row below it, up to the
next one with a colon. A name in braces stands for its value: «layer_{layer}/width_{width}».

A table whose name has braces describes several releases: one for each combination that its `where` lists, in the form of rows.
"""

import re
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from itertools import product
from math import log2
from typing import TYPE_CHECKING, Any, NamedTuple

from saelens_lite.errors import HubNotFoundError, near_matches

if TYPE_CHECKING:
    from saelens_lite.formats.known import Known
    from saelens_lite.hub_client.client import Address

FILE = "data/releases.toml"
_MULTIPLES = {"k": 1000, "m": 1_000_000}
_RANGE, _REPEATED = re.compile(r"(\d+)-(\d+)"), re.compile(r"([^*]+)\*(\d+)")
_TEMPLATES = ("id", "hook", "target", "path", "neuronpedia")


class Entry(NamedTuple):
    """A public dictionary: its name, its place on the Hub, and facts about it. None stands for what is not known."""

    release: str
    id: str
    repo: str
    path: str
    format: str  # name of the format plugin that reads it
    model: str | None  # Hub id
    hook: str | None = None
    target: str | None = None
    width: int | None = None  # number of latents
    l0: float | None = None  # as published; some are aims of the training
    rule: str | None = None
    license: str | None = None
    neuronpedia: str | None = None
    revision: str | None = None
    processing: tuple[str, ...] = ()
    prepend_bos: bool | None = None
    n_ctx: int | None = None
    k: int | None = None  # of a top-k rule, for files that do not state it
    token_norm: str | None = None
    scale: float | None = None  # factor of the activations, for files that do not state it

    @property
    def name(self) -> str:
        """The name that `sl.load` takes: release/id, or the address of a repository that is not in the index."""
        return f"{self.release}/{self.id}" if self.release else f"hf://{self.repo}"

    @property
    def known(self) -> "Known":
        """The facts that reading the files can use."""
        from saelens_lite.formats.known import Known

        shared = {key: getattr(self, key) for key in Known.model_fields if key in self._fields}
        return Known(**shared | {"release": self.name})

    @property
    def address(self) -> "Address":
        """The address on the Hub. Its folder may be the path of a single file."""
        from saelens_lite.hub_client.client import Address

        return Address(self.repo, self.path or None, self.revision)


def entries() -> Iterator[Entry]:
    """Return all dictionaries of the index, release by release."""
    for release in _releases():
        yield from of_release(release)


def releases() -> list[str]:
    """Return the names of all releases."""
    return list(_releases())


def of_release(release: str) -> Iterator[Entry]:
    """Return the dictionaries of one release."""
    yield from _expanded(release).values()


def repositories() -> set[str]:
    """Return the repositories of all releases."""
    return set(_by_repo())


def entry(name: str) -> Entry | None:
    """Return the dictionary called release/id. Return None if `name` does not begin with the name of a release.

    Raises:
        HubNotFoundError: the release has no such dictionary.
    """
    release, _, id = name.partition("/")
    if release not in _releases():
        return None
    ids = _expanded(release)
    if id in ids:
        return ids[id]
    close = near_matches(id, ids) if id else ""
    some = "" if close else f"; it has {', '.join(list(ids)[:5])}" + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")
    asked = f"no dictionary {id!r}" if id else f"{len(ids):,} dictionaries; name one of them"
    raise HubNotFoundError(f"release {release} has {asked}{close}{some} (`saelens-lite find --release {release}`)")


def entry_at(repo: str, path: str) -> Entry | None:
    """Return the dictionary at a path of a repository, or None if the index does not have it.

    If it has several names, the one with Neuronpedia's id is returned.
    """
    path = path.strip("/")
    there = [e for release in _by_repo().get(repo, ()) for e in _expanded(release).values() if e.path == path]
    return max(there, key=lambda e: (e.neuronpedia is not None, e.l0 is not None), default=None)


def width_of(text: str) -> int:
    """Return the number of latents for a text such as 24576, 16k or 1m. The latter two stand for the nearest power of two."""
    return 1 << round(log2(int(text[:-1]) * _MULTIPLES[text[-1]])) if text[-1] in _MULTIPLES else int(text)


_NUMBERS = {"width": width_of, "l0": float, "scale": float}


@cache
def _releases() -> dict[str, dict[str, Any]]:
    return parsed(files("saelens_lite").joinpath(FILE).read_text(encoding="utf-8"))


def parsed(text: str) -> dict[str, dict[str, Any]]:
    """Return the tables of an index, one for each release."""
    releases = {}
    for name, table in tomllib.loads(text).items():
        for values in _combinations(table.pop("where", [""])):
            releases[_filled(name, values)] = {key: _filled(value, values) for key, value in table.items()} if values else table
    return releases


def _filled(value: Any, values: dict[str, str]) -> Any:
    """Replace some names in braces by their values. Other names stay."""
    if isinstance(value, list):
        return [_filled(one, values) for one in value]
    for name, text in values.items() if isinstance(value, str) else ():
        value = value.replace(f"{{{name}}}", text)
    return value


@cache
def _by_repo() -> dict[str, list[str]]:
    """Return the releases of each repository."""
    by_repo: dict[str, list[str]] = {}
    for release, facts in _releases().items():
        by_repo.setdefault(facts["repo"], []).append(release)
    return by_repo


@cache
def _expanded(release: str) -> dict[str, Entry]:
    """Return the dictionaries of a release by their ids."""
    facts = _releases()[release]
    every = (_entry(release, facts | values) for values in _combinations(facts["rows"]))
    return {one.id: one for one in every}


def _combinations(rows: list[str]) -> Iterator[dict[str, str]]:
    """Return the values of the columns, one combination after the other."""
    beginning = ""
    for row in rows:
        if row.endswith(":"):
            beginning = row[:-1]
            continue
        columns = [column.split("=", 1) for column in f"{beginning} {row}".split()]
        axes = {name: _values(text) for name, text in columns if "@" not in name}
        aligned = [(*name.split("@"), _values(text)) for name, text in columns if "@" in name]
        for places in product(*(range(len(values)) for values in axes.values())):
            at = dict(zip(axes, places, strict=True))
            values = {name: axes[name][place] for name, place in at.items()}
            yield values | {name: values_of[at[axis]] for name, axis, values_of in aligned}


def _entry(release: str, variables: dict[str, Any]) -> Entry:
    """Return the dictionary that templates describe with the values of their variables."""
    for field in _TEMPLATES:  # in this order, so that a template may use the ones before it
        if field in variables:
            variables[field] = variables[field].format_map(variables)
    values: dict[str, Any] = {name: variables[name] for name in Entry._fields if name in variables}
    for name, kind in _NUMBERS.items():
        if name in values:
            values[name] = kind(str(values[name]))
    values["processing"] = tuple(values.get("processing", ()))
    return Entry(release=release, **values)


@cache
def _values(text: str) -> tuple[str, ...]:
    """Return the values of a column: 1-3 is 1,2,3 and 5*3 is 5,5,5."""
    values: list[str] = []
    for part in text.split(","):
        if match := _RANGE.fullmatch(part):
            values += map(str, range(int(match[1]), int(match[2]) + 1))
        elif match := _REPEATED.fullmatch(part):
            values += [match[1]] * int(match[2])
        else:
            values.append(part)
    return tuple(values)
