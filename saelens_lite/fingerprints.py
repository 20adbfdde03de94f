"""Fingerprints of a model's weights in records: of a capture, a stream, a feature store, kept answers."""

from collections.abc import Mapping
from typing import Any

EVERY_ENTRY = "every entry: "  # begins fingerprints that depend on all entries of the weights


class Fingerprint(str):
    """A fingerprint that depends on every entry of the weights. It is compared and written as a string.

    `sampled` is the fingerprint of the same weights as earlier versions recorded it, from some entries of each weight.
    """

    sampled: str

    def __new__(cls, whole: str, sampled: str = "") -> "Fingerprint":
        """Return the fingerprint of this hash of all entries and this hash of some."""
        one = super().__new__(cls, whole if whole.startswith(EVERY_ENTRY) else EVERY_ENTRY + whole)
        one.sampled = sampled
        return one

    def like(self, record: Any) -> str:
        """Return the fingerprint in the form of a recorded one."""
        return self.sampled if isinstance(record, str) and not record.startswith(EVERY_ENTRY) else str(self)


def like_recorded(facts: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    """Return facts, with each fingerprint in the form that the record has it in."""
    return {key: fact.like(record.get(key)) if isinstance(fact, Fingerprint) else fact for key, fact in facts.items()}
