"""Names of dictionaries: a path of this computer, an address on the Hub, or a public name, release/id. A path comes first."""

import os
import re
from pathlib import Path

from saelens_lite.errors import CorruptFileError, HubNotFoundError, near_matches
from saelens_lite.paths import is_address, no_dictionary_at
from saelens_lite.releases import Entry, entry, releases


def is_on_hub(name: str | Path) -> bool:
    """Return whether a name is an address, or the public name of a dictionary and not a path of this computer.

    Raises:
        HubNotFoundError: as `public`.
    """
    return is_address(name) or public(name) is not None


def public(name: str | Path) -> Entry | None:
    """Return the entry of a public name; None for addresses, for paths and for unknown releases.

    Raises:
        HubNotFoundError: the release is known, but has no such dictionary, and nothing is at this path.
    """
    text = name.as_posix() if isinstance(name, Path) else name
    if is_address(text) or _is_surely_a_path(text) or os.path.lexists(text):
        return None
    try:
        return entry(text)
    except HubNotFoundError as error:
        raise HubNotFoundError(f"{error}; {text} is not a file or folder either") from None


def no_such(path: Path) -> CorruptFileError:
    """Return the error for a name that is neither the path of a dictionary nor a public name."""
    text = path.as_posix()
    close = "" if _is_surely_a_path(text) else near_matches(text.partition("/")[0], releases())
    hint = f" No public release has that name either{close}" if close else ""
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text):
        hint += f" A repository of the Hub is written hf://{text}."
    return CorruptFileError(f"{no_dictionary_at(path)}{hint}")


def _is_surely_a_path(text: str) -> bool:
    return text.startswith((".", "/", "~")) or os.path.isabs(text)
