"""Comparison of the evaluation text with the text that a dictionary was trained on, as far as records can tell."""

from typing import NamedTuple

from saelens_lite.config import Origin
from saelens_lite.tokens import PythonDocs, hub_name


class Overlap(NamedTuple):
    """The answer: `disjoint` is True, False, or None if records cannot tell; `why` is the reason in words."""

    disjoint: bool | None
    why: str


def overlap(origin: Origin, source: str | None, sha256: str) -> Overlap:
    """Compare the text of an origin with a text called `source`, whose token rows have the hash `sha256`.

    Source names and the hashes of the token rows are compared. Only parts of one source that are known to share nothing are
    disjoint, because two texts with different names may hold the same passages.
    """
    if origin.text_sha256 == sha256:
        return Overlap(False, "its rows are those of the training text, token for token")
    if origin.text is None:
        return Overlap(None, "the dictionary does not say what it was trained on")
    if source is None:
        return Overlap(None, f"this text has no name to compare with that of the training text, {origin.text}")
    names = f"trained on {origin.text}, evaluated on {source}"
    if {origin.text, source} == {"python-docs:train", "python-docs:held-out"}:
        return Overlap(True, f"{names}: parts without a document in common")
    trained, evaluated = hub_name(origin.text), hub_name(source)
    if trained and evaluated and trained[:2] == evaluated[:2]:
        if (trained.split or "train") != (evaluated.split or "train"):
            return Overlap(True, f"{names}: different splits of one dataset")
        return Overlap(None, f"{names}: the same split, maybe the same part of it")
    if origin.text in PythonDocs.NAMES and source in PythonDocs.NAMES:
        return Overlap(False, f"{names}: one holds documents of the other")
    if origin.text == source:
        return Overlap(None, f"{names}: the same source, maybe the same part of it")
    return Overlap(None, f"{names}; only these names could be compared")
