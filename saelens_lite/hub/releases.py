"""The index of public dictionaries, under the name that the Hub's modules use."""

from saelens_lite.releases import Entry, entries, entry, entry_at

__all__ = ["Entry", "entries", "entry", "entry_at"]
