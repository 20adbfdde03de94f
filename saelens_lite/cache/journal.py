"""The journals of an unfinished capture: one for each section of the text, so that any process can resume any section.

The first line of a journal describes the rows of its section. Each further line describes a shard that is complete on the
disk, with Σx and Σ‖x‖² of each hook as float64 in base64, so that no bit is lost and all lines have one length.
"""

import base64
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saelens_lite.cache.shards import Facts, check_size
from saelens_lite.cache.source import Moments
from saelens_lite.errors import CorruptFileError
from saelens_lite.files import append_line, parsed_json, write_text
from saelens_lite.schemas import Checked, Count, Positive, Sha256, checked
from saelens_lite.tokens import Place


class Heading(Checked):
    """The first line of a journal: the rows of a section, its shards, and the place in the text behind it.

    marked_sha256: hash of the file of rows; None if there is no such file.
    """

    n_rows: Count
    n_kept: Count
    rows_sha256: Sha256
    marked_sha256: Sha256 | None = None
    first_shard: Count
    shard_tokens: Positive
    after: Place | None

    @property
    def n_shards(self) -> int:
        """Number of shards of the section."""
        return -(-self.n_kept // self.shard_tokens)


class _Line(Checked):
    """Any other line of a journal."""

    facts: Facts
    sums: dict[str, str]


class Journal:
    """The journal of a section.

    shards: the manifest entries of its shards that are complete, in order.
    """

    def __init__(self, path: Path, heading: Heading):
        self.path, self.heading = path, heading
        self.shards: list[dict[str, Any]] = []
        self._sums: list[dict[str, str]] = []
        self._is_on_disk = False

    @property
    def is_complete(self) -> bool:
        """True if all shards of the section are on the disk."""
        return len(self.shards) == self.heading.n_shards

    @property
    def n_done(self) -> int:
        """Number of activations in complete shards."""
        return sum(shard["n_tokens"] for shard in self.shards)

    @classmethod
    def read(cls, path: Path, folder: Path) -> "Journal | None":
        """Return a journal with its lines up to the first missing or damaged shard. None: there is no intact journal.

        folder: that of the shards, whose sizes are checked.
        """
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.exists() else []
        try:
            journal = cls(path, checked(path, parsed_json(_whole(lines[0]), finite=True), Heading))
        except (IndexError, ValueError, RecursionError, CorruptFileError):
            return None
        journal._is_on_disk = True
        for number, line in enumerate(lines[1:], journal.heading.first_shard):
            try:
                entry = checked(path, parsed_json(_whole(line), finite=True), _Line)
                entry.facts.check_name(number)
                check_size(folder / entry.facts.file, entry.facts.bytes)
            except (ValueError, RecursionError, CorruptFileError):
                journal._is_on_disk = False  # there are more lines, which are damaged or whose shard is missing
                break
            journal._keep(entry.facts.model_dump(), entry.sums)
        return journal

    def begin(self) -> None:
        """Write the journal anew if it is not on the disk as it is here."""
        if not self._is_on_disk:
            lines = [self.heading.model_dump(mode="json")]
            lines += [{"facts": facts, "sums": sums} for facts, sums in zip(self.shards, self._sums, strict=True)]
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in lines))
            self._is_on_disk = True

    def note(self, facts: dict[str, Any], moments: dict[str, Moments]) -> None:
        """Add a shard that is complete on the disk."""
        sums = {hook: _packed(of_hook) for hook, of_hook in moments.items()}
        append_line(self.path, json.dumps({"facts": facts, "sums": sums}))
        self._keep(facts, sums)

    def _keep(self, facts: dict[str, Any], sums: dict[str, str]) -> None:
        self.shards.append(facts)
        self._sums.append(sums)

    def moments(self, hook: str) -> list[Moments]:
        """Return the sums of each shard at a hook."""
        return [
            _unpacked(self.path, sums, hook, facts["n_tokens"]) for facts, sums in zip(self.shards, self._sums, strict=True)
        ]


def merged(journals: Iterable[Journal], hooks: Sequence[str]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the manifest entries of all shards and of all hooks. Sums are added in the order of the shards."""
    shards: list[dict[str, Any]] = []
    totals: dict[str, Moments] = {}
    for journal in journals:
        shards += journal.shards
        for hook in hooks:
            for of_shard in journal.moments(hook):
                total = totals.setdefault(hook, Moments(len(of_shard.total)))
                if len(total.total) != len(of_shard.total):
                    raise CorruptFileError(
                        f"{journal.path} is damaged: the sums of {hook} have {len(of_shard.total)} entries, those before have "
                        f"{len(total.total)}; delete it"
                    )
                total.add_sums(of_shard.n, of_shard.total, of_shard.square)
    statistics = {hook: total.statistics() for hook, total in totals.items()}
    return shards, {
        hook: {"d_in": len(mean), "rms_norm": rms_norm, "mean": mean.tolist()} for hook, (mean, rms_norm) in statistics.items()
    }


def _whole(line: str) -> str:
    """Return a line. Raise ValueError if its end is missing."""
    if not line.endswith("\n"):
        raise ValueError("the line is cut off")
    return line


def _packed(moments: Moments) -> str:
    """Return Σx and, behind it, Σ‖x‖² as text."""
    values = np.append(moments.total.numpy(), moments.square).astype("<f8")
    return base64.b64encode(values.tobytes()).decode("ascii")


def _unpacked(path: Path, sums: dict[str, str], hook: str, n: int) -> Moments:
    try:
        values = torch.from_numpy(np.frombuffer(base64.b64decode(sums[hook], validate=True), "<f8").astype(np.float64))
        if not values.isfinite().all():
            raise ValueError("NaN or infinity")
        moments = Moments(len(values) - 1)
        moments.add_sums(n, values[:-1], values[-1])
    except (KeyError, ValueError, RuntimeError) as error:
        raise CorruptFileError(f"{path} is damaged: the sums of {hook} cannot be read: {error!r}; delete it") from None
    return moments
