"""The spelling of flags: aliases, and error messages of the library in the words of the command line."""

import re
from collections.abc import Sequence

ALIASES = {"--hooks": "--hook"}
_KEYWORD = re.compile(r"(?<![\w.-])(?P<name>[a-z]\w*)=(?P<value>'[^']*'|\w[\w.]*\w|\w|(?=[\s,.;:)]|$))(?!\()")
_ASSIGNED = re.compile(
    r"(?:^|(?<=\s))(?:\w+: )?(?P<name>[a-z]\w*) = (?P<value>'[^']*'|\[[^\]]*\]|\([^)]*\)|[^\s;:,]+)(?=[:;,]|$)"
)
_LEFT_OUT = re.compile(r"(?<=leave out )(?P<name>[a-z]\w*)")
_IN_CALL = re.compile(r"\w\([^()]*$")


def is_flag(token: str) -> bool:
    """Return whether a token of a command line is a flag rather than a value."""
    return token.startswith("--")


def with_aliases(tokens: Sequence[str]) -> list[str]:
    """Return tokens with other names of a flag replaced by its name."""
    return [ALIASES.get(name, name) + mark + value for name, mark, value in (token.partition("=") for token in tokens)]


def in_flags(message: str, flags: dict[str, str], tokens: Sequence[str]) -> str:
    """Return a message of the library with Python's spelling of settings replaced by that of flags.

    «exists='overwrite'» becomes «--exists overwrite». «d_sae = -4: …» becomes «--d-sae -4: …» if the flag was given; if not,
    the value comes from a file or is a default.

    Args:
        flags: the flag of each setting of the command.
    """
    given = {token.partition("=")[0].removeprefix("--").replace("-", "_") for token in tokens if is_flag(token)}

    def keyword(match: re.Match[str]) -> str:
        flag, value = flags.get(match["name"]), match["value"].strip("'")
        if flag is None or match["name"] == "options" or _IN_CALL.search(message[: match.start()]):
            return match[0]
        return flag if value in ("", "True") else f"{flag} {value}"

    def assigned(match: re.Match[str]) -> str:
        name, value = match["name"], match["value"].strip("'[]()")
        for spelled in (name, f"options.{name}"):
            if spelled in given:
                return f"--{spelled.replace('_', '-')} {value}"
        return match[0]

    message = _ASSIGNED.sub(assigned, _KEYWORD.sub(keyword, message))
    return _LEFT_OUT.sub(lambda match: flags.get(match["name"], match["name"]), message)
