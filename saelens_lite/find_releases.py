"""The search in the index of public dictionaries."""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from saelens_lite.errors import ConfigError
from saelens_lite.releases import Entry, entries, of_release, releases, repositories, width_of
from saelens_lite.tables import Result, columns_of, grid

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

TAGS = ("saelens", "saelens_lite", "sparsify")  # on the Hub, with the format that reads such dictionaries
MOST_ROWS = 60  # of a table with one row for each dictionary
MIN_WIDTH, HOOK_WIDTH = 11, 15  # of a column, and of that of the hooks
L0_FACTOR = 2.0

Number = int | float | str
Bounds = Number | Sequence[Number]


class PublicDictionaries(Result, Sequence[Entry]):
    """Dictionaries of the index. `print` shows a table; if they are many, it has one row for each release."""

    def __init__(self, entries: Iterable[Entry]):
        self.entries = tuple(entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, at: Any) -> Any:
        return PublicDictionaries(self.entries[at]) if isinstance(at, slice) else self.entries[at]

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PublicDictionaries) and self.entries == other.entries

    __hash__ = None

    def __repr__(self) -> str:
        names = ", ".join([one.name for one in self.entries[:3]] + ["…"] * (len(self) > 3))
        return f"PublicDictionaries({len(self):,}{': ' if names else ''}{names})"

    def columns(self) -> dict[str, list[Any]]:
        """Return the fields of the dictionaries, after the names that `sl.load` takes."""
        return {"name": [one.name for one in self]} | columns_of(Entry, self)

    def table(self) -> "Table | Text":
        """Return a table of the dictionaries, or of their releases if they are more than 60."""
        if not self.entries:
            from rich.text import Text

            return Text("no public dictionary of the index meets these conditions")
        if len(self) > MOST_ROWS:
            return self._by_release()
        titles = ("name", "model", "hook", "width", "L0", "rule", "license", "Neuronpedia")
        rows = [(e.name, e.model, _ports(e), _text(e.width), _text(e.l0), e.rule, e.license, e.neuronpedia) for e in self]
        return _table(titles, rows)

    def _by_release(self) -> "Table":
        """Return a table of the releases."""
        groups: dict[str, list[Entry]] = {}
        for one in self.entries:
            groups.setdefault(one.release or one.name, []).append(one)
        rows = [
            (
                *(name, _text(len(group)), group[0].model, _common({e.hook for e in group if e.hook})),
                *(_span(e.width for e in group), _span(e.l0 for e in group), group[0].rule, group[0].license),
            )
            for name, group in groups.items()
        ]
        caption = f"{len(self):,} dictionaries in {len(rows):,} releases; name a release to see its dictionaries"
        return _table(("release", "number", "model", "hook", "width", "L0", "rule", "license"), rows, caption=caption)


def find(
    text: str | None = None,
    *,
    model: str | None = None,
    hook: str | None = None,
    width: Bounds | None = None,
    l0: Bounds | None = None,
    release: str | None = None,
    online: bool = False,
) -> PublicDictionaries:
    """Return the public dictionaries that meet all conditions. Their names, release/id, can be given to `sl.load`.

        sl.find(model="gpt2", hook="resid", width=24576, l0=50)

    A dictionary of which the index does not know a fact does not meet a condition on it. Upper and lower case do not matter.

    Args:
        text: words; each must occur in the name of the dictionary or of its model.
        model: part of the model's Hub id or of the release's name.
        hook: part of the hook that is read or written.
        width: number of latents, or the smallest and the largest: 24576, (16384, 65536), "16k" or "16k-65k".
        l0: number of active latents per token, as published: from half to twice a number, the nearest first; or the smallest
            and the largest: 50, (40, 60) or "40-60".
        release: part of the release's name. If a release has exactly this name, only this one.
        online: also ask the Hub for repositories tagged saelens, saelens_lite or sparsify that are not in the index. Only
            `text`, `model` and `release` select among these, because the Hub does not list the other facts.

    Raises:
        ConfigError: `width` or `l0` is not a positive number or two in order.
        HubError: `online` is True and the Hub cannot be reached.
    """
    widths, l0s = _bounds("width", width, 1.0), _bounds("l0", l0, L0_FACTOR)
    exact = release if release in releases() else None
    words = (text or "").lower().split()

    def named_so(e: Entry) -> bool:
        about = f"{e.name} {e.model}".lower()
        return (
            all(word in about for word in words)
            and (model or "").lower() in f"{e.model} {e.release or e.name}".lower()
            and (exact is not None or (release or "").lower() in (e.release or e.name).lower())
        )

    matches = [
        e
        for e in (of_release(exact) if exact else entries())
        if named_so(e)
        and (hook is None or any(hook.lower() in (place or "").lower() for place in (e.hook, e.target)))
        and (widths is None or (e.width is not None and widths.low <= e.width <= widths.high))
        and (l0s is None or (e.l0 is not None and l0s.low <= e.l0 <= l0s.high))
    ]
    if l0s and l0s.asked:
        matches.sort(key=lambda e: abs(math.log(e.l0 / l0s.asked)))
    return PublicDictionaries([*matches, *(filter(named_so, _on_the_hub()) if online else ())])


def _on_the_hub() -> Iterator[Entry]:
    """Return the tagged repositories that are not in the index."""
    from saelens_lite.hub_client.tagged import tagged_repositories

    known = repositories()
    for one in tagged_repositories(TAGS):
        if one.repo not in known:
            format = "sparsify" if "sparsify" in one.tags else "saelens"
            facts = {"model": one.fact("base_model"), "license": one.fact("license")}
            yield Entry(release="", id="", repo=one.repo, path="", format=format, **facts)


class _Range(NamedTuple):
    """The smallest and the largest allowed value; `asked` if a single number was given."""

    low: float
    high: float
    asked: float | None = None


def _bounds(name: str, value: Bounds | None, factor: float) -> _Range | None:
    """Return the allowed values."""
    if value is None:
        return None
    parts = value.split("-") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    try:
        numbers = [_number(part) for part in parts]
        if len(numbers) == 1 and parts is not value:
            numbers = [numbers[0] / factor, numbers[0] * factor]
        low, high = numbers
    except (ValueError, TypeError, OverflowError):
        low = high = math.nan
    if not 0 < low <= high < math.inf:
        raise ConfigError(f"{name} = {value!r}; expected a positive number, or the smallest and the largest as in 16-64")
    return _Range(low, high, math.sqrt(low * high) if len(parts) == 1 else None)


def _number(part: object) -> float:
    """Return the number in a text such as 24576 or 16k, or a number itself."""
    if isinstance(part, bool):
        raise TypeError("a truth value is not a number")
    text = part.strip().lower() if isinstance(part, str) else ""
    return float(width_of(text)) if text[-1:] in ("k", "m") and text else float(part)  # type: ignore[arg-type]


def _table(titles: Sequence[str], rows: Sequence[Sequence[str | None]], caption: str = "") -> "Table":
    """Return a table without its empty columns. Facts that all rows share are in the title."""
    by_title = {title: [row[at] or "" for row in rows] for at, title in enumerate(titles)}
    shared = {title: values[0] for title, values in by_title.items() if len(rows) > 1 and len(set(values)) == 1 and values[0]}
    kept = [title for title, values in by_title.items() if title not in shared and any(values)] or [titles[0]]
    return grid(
        kept,
        list(zip(*(by_title[title] for title in kept), strict=True)),
        title=", ".join(f"{title} {value}" for title, value in shared.items()),
        caption=caption,
        collapse_padding=True,
        column=lambda title: {
            **{"overflow": "fold", "no_wrap": title in ("name", "release")},  # so that names can be copied
            **{"min_width": min(HOOK_WIDTH if title == "hook" else MIN_WIDTH, max(map(len, (title, *by_title[title]))))},
            **{"justify": "right" if title in ("width", "L0", "number") else "left"},
        },
    )


def _ports(e: Entry) -> str:
    """Return the hooks of a dictionary, unless its name says them."""
    if e.hook and e.hook in e.id and not e.target:
        return ""
    if not e.target:
        return e.hook or ""
    blocks = {re.split(r"(?<=\d\.)", hook)[0] for hook in (e.hook or "", e.target)}
    block = blocks.pop() if len(blocks) == 1 else ""  # the name says it
    return f"{(e.hook or '').removeprefix(block)} → {e.target.removeprefix(block)}"


def _text(value: int | float | None) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _span(values: Iterable[int | float | None]) -> str:
    """Return the smallest and the largest of the known values."""
    known = sorted({value for value in values if value is not None})
    return "" if not known else _text(known[0]) if len(known) == 1 else f"{_text(known[0])}–{_text(known[-1])}"


def _common(hooks: set[str]) -> str:
    """Return hooks without their layers."""
    return ", ".join(sorted({re.sub(r"^blocks\.\d+\.", "", hook) for hook in hooks}))
