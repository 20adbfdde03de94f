"""The card at the root of a repository: its metadata, and a table of all its dictionaries.

A push writes only the metadata and the marked section. All other text stays.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import yaml
from huggingface_hub import ModelCard, ModelCardData

from saelens_lite.dictionary import Dictionary
from saelens_lite.errors import HubError
from saelens_lite.hub.card import (
    CARD_FILE,
    OWN_LIBRARY,
    evaluation_results,
    find_section,
    metadata,
    metric_values,
    section,
    with_section,
)
from saelens_lite.hub.plots import frontier_plot
from saelens_lite.markdown import cell

FRONTIER_FILE = "frontier.png"
SECTION = "dictionaries"
MAX_METADATA_CHARACTERS, MAX_METADATA_PARTS, MAX_METADATA_DEPTH = 1 << 19, 50_000, 50
_METADATA = re.compile(r"\s*---[ \t]*\r?\n(.*?)(?:\r?\n---|\Z)", re.DOTALL)
COLUMNS = ("dictionary", "hook", "rule", "latents", "l0", "fvu", "ce_loss_score")


class TableLine(NamedTuple):
    """A line of the table, as the text of its cells."""

    name: str
    hook: str
    rule: str
    latents: str
    l0: str
    fvu: str
    ce_loss_score: str

    @classmethod
    def of(cls, name: str, d: Dictionary, evaluation: dict[str, Any]) -> "TableLine":
        """Return the line of a dictionary."""
        values = metric_values(evaluation)
        hook = d.place if d.reads[0].hook else ""
        numbers = [f"{values[key]:.4g}" if key in values else "" for key in ("l0", "fvu", "ce_loss_score")]
        return cls(name, cell(hook), cell(d.rule.plugin_name), str(d.d_sae), *numbers)

    @classmethod
    def parse(cls, line: str) -> "TableLine | None":
        """Parse a line that `str` wrote. Return None for any other line."""
        cells = [part.strip() for part in re.split(r"(?<!\\)\|", line.strip())[1:-1]]
        link = re.fullmatch(r"\[(.+)\]\(\S+\)", cells[0]) if len(cells) == len(COLUMNS) else None
        return cls(link[1], *cells[1:]) if link else None

    @property
    def point(self) -> tuple[str, str, float, float] | None:
        """Name, hook, L0 and FVU, or None if L0 or FVU is not a number."""
        try:
            return self.name, self.hook, float(self.l0), float(self.fvu)
        except ValueError:
            return None

    def __str__(self) -> str:
        return "| " + " | ".join([f"[{self.name}](./{self.name})", *self[1:]]) + " |"


class CardEntry(NamedTuple):
    """The data of a pushed dictionary in the card of the repository."""

    row: TableLine
    dictionary: Dictionary
    load: str  # code that loads it
    sae_lens: bool  # True if SAELens can load it
    evaluation: dict[str, Any]

    @property
    def name(self) -> str:
        """Its folder in the repository."""
        return self.row.name


def index_files(
    card: str | None, repo: str, entries: Sequence[CardEntry], *, license: str | None, tags: Sequence[str]
) -> dict[str, bytes]:
    """Return the files at the root of the repository. `card` is the current text of its README.md.

    Raises:
        HubError: the metadata of `card` cannot be read and would be lost.
    """
    old = find_section(card or "", SECTION)
    rows = {row.name: row for line in (old[1] if old else "").splitlines() if (row := TableLine.parse(line))}
    rows |= {entry.name: entry.row for entry in entries}
    frontier = frontier_plot([row.point for row in sorted(rows.values()) if row.point])
    text = _section_text(entries[0].load, sorted(rows.values()), with_frontier=frontier is not None)
    page = _page(card, repo)
    page.text = with_section(page.text, SECTION, text) if old else f"{page.text.rstrip()}\n\n{section(SECTION, text)}\n"
    results = [result for entry in entries for result in evaluation_results(entry.name, entry.evaluation)]
    dictionaries, sae_lens = [entry.dictionary for entry in entries], any(entry.sae_lens for entry in entries)
    _update(page, metadata(dictionaries, results, name=repo, sae_lens=sae_lens, license=license, tags=tags))
    return {CARD_FILE: str(page).encode()} | ({FRONTIER_FILE: frontier} if frontier else {})


def _section_text(load: str, rows: Sequence[TableLine], *, with_frontier: bool) -> str:
    """Return the table, the frontier, and the code that loads one of the dictionaries."""
    header = ["| " + " | ".join(COLUMNS) + " |", "| --- | --- | --- " + "| ---: " * 4 + "|"]
    figure = [f"![FVU over L0]({FRONTIER_FILE})", ""] if with_frontier else []
    return "\n".join(["## Dictionaries", *header, *map(str, rows), "", *figure, load])


def _page(card: str | None, repo: str) -> ModelCard:
    """Parse the card with huggingface_hub, or start a new one."""
    _check_metadata(card or "", repo)
    body = card or f"# {repo.partition('/')[2]}\n\nSparse dictionaries of activations, trained with saelens_lite.\n"
    try:
        return ModelCard(body if body.lstrip().startswith("---") else f"---\n\n---\n{body}")
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError, yaml.YAMLError) as error:
        raise _unreadable(repo, str(error)) from None


def _unreadable(repo: str, why: str) -> HubError:
    why = " ".join(why.split())[:400]
    return HubError(f"{repo}: the metadata of its README.md cannot be read; mend it on the Hub first: {why}")


def _check_metadata(card: str, repo: str) -> None:
    """Raise HubError for metadata that would take huggingface_hub's parser too much time, memory or depth."""
    metadata = _METADATA.match(card)
    if metadata is None:
        return
    if len(metadata[1]) > MAX_METADATA_CHARACTERS:
        raise _unreadable(repo, f"they have {len(metadata[1]):,} characters; the limit is {MAX_METADATA_CHARACTERS:,}")
    depth = 0
    try:
        for number, event in enumerate(yaml.parse(metadata[1], Loader=yaml.SafeLoader)):
            if number > MAX_METADATA_PARTS:
                raise _unreadable(repo, f"they have more than {MAX_METADATA_PARTS:,} parts")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_METADATA_DEPTH:
                raise _unreadable(repo, f"they are nested deeper than {MAX_METADATA_DEPTH} levels")
            if isinstance(event, yaml.AliasEvent):
                raise _unreadable(repo, f"they use the YAML alias *{event.anchor}, which can expand a line to a page")
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise _unreadable(repo, str(error)) from None


def _update(page: ModelCard, new: ModelCardData) -> None:
    """Add to the metadata of a card. Results of the same dictionaries are replaced; everything else stays."""
    data = page.data
    for key in ("tags", "base_model", "datasets"):
        setattr(data, key, list(dict.fromkeys([*_as_list(data.get(key)), *_as_list(new.get(key))])) or None)
    data.library_name = new.library_name if data.library_name in (None, OWN_LIBRARY) else data.library_name
    data.license = new.license or data.license
    results = new.eval_results or []
    pushed = {str(result.metric_name).rpartition(": ")[0] for result in results}
    kept = [old for old in data.eval_results or [] if str(old.metric_name).rpartition(": ")[0] not in pushed]
    data.eval_results = [*kept, *results] or None
    data.model_name = data.model_name or new.model_name


def _as_list(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else value or []
