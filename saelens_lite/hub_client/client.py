"""Addresses of dictionaries on the Hub, and our typed errors in place of the HTTP client's errors.

huggingface_hub itself reads the token (HF_TOKEN or `hf auth login`). This package never passes on, stores or shows it.
"""

import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple
from urllib.parse import unquote

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,  # from the httpx package that this huggingface_hub uses
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from saelens_lite.errors import (
    ConfigError,
    DiskFullError,
    HubAccessError,
    HubConflictError,
    HubError,
    HubNotFoundError,
    HubUnreachableError,
    SaelensLiteError,
)
from saelens_lite.hub_client.guard import Guard, guarded_client

NAME = r"[A-Za-z0-9][\w.-]*"
SECONDS_TO_ANSWER = 5
LOG_IN = "log in with `hf auth login` or set HF_TOKEN (https://huggingface.co/settings/tokens)"
_ADDRESS = re.compile(
    rf"hf://(?P<repo>{NAME}/{NAME})(@(?P<first>refs/(?:pr|convert)/[^/]+|[^/@]+))?(/(?P<folder>[^@]*))?(@(?P<last>[^@]+))?"
)


class Address(NamedTuple):
    """The address of a dictionary on the Hub."""

    repo: str
    folder: str | None = None
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Address":
        """Parse hf://user/repo/folder@revision, or huggingface_hub's own form hf://user/repo@revision/folder.

        An @ in the name of a folder is written %40, and a % is written %25.

        Raises:
            ConfigError: the text does not have this form.
        """
        scheme, _, rest = text.partition(":/")
        if rest and scheme != "hf":
            raise ConfigError(f"{text}: {scheme}:// is not known; give a folder or hf://user/repo/folder@revision")
        match = _ADDRESS.fullmatch(f"hf://{rest.removeprefix('/')}")  # pathlib makes one slash of two
        if match is None or (match["first"] and match["last"]):
            raise ConfigError(f"{text!r} is not an address on the Hub; expected hf://user/repo/folder@revision")
        return cls.of(match["repo"], unquote(match["folder"] or ""), match["first"] or match["last"])

    @classmethod
    def of(cls, repo: str, folder: str | None = None, revision: str | None = None) -> "Address":
        """Return an address after checking its parts.

        Raises:
            ConfigError: a part is not well formed.
        """
        if not re.fullmatch(rf"{NAME}/{NAME}", repo):
            raise ConfigError(f"{repo!r} is not the name of a repository; expected user/name")
        if revision and (".." in revision or not re.fullmatch(r"[^\s/~^:?*\[\\][^\s~^:?*\[\\]*", revision)):  # git's rules
            raise ConfigError(f"{revision!r} cannot be a revision; expected a branch, a tag or a commit")
        folder = check_path(folder) if folder and folder.strip("/") else None
        return cls(repo, folder, revision or None)

    def __str__(self) -> str:
        folder = f"/{self.folder}".replace("%", "%25").replace("@", "%40") if self.folder else ""
        return f"hf://{self.repo}{folder}{f'@{self.revision}' if self.revision else ''}"


def is_usable(name: str) -> bool:
    """Return whether a name in a path of the Hub can be that of a file or folder on this computer."""
    forbidden = '\\*?"<>|' + ":" * (os.name == "nt")
    return name.isprintable() and not set(name) & set(forbidden) and not re.match("[A-Za-z]:", name)


def check_path(path: str) -> str:
    """Return a path in a repository without slashes around it. Raise ConfigError unless it is a plain relative path."""
    path = path.strip("/")
    if not all(name and not name.startswith(".") and is_usable(name) for name in path.split("/")):
        raise ConfigError(f"{path!r} cannot be a folder of a repository: expected names between slashes, such as layers.3/mlp")
    return path


def check_folder(folder: str) -> str:
    """Return the name of a new folder without slashes around it. Raise ConfigError unless any tool can address it."""
    folder = folder.strip("/")
    if not re.fullmatch(rf"{NAME}(/{NAME})*", folder):
        raise ConfigError(f"{folder!r} cannot be a folder of a repository: use letters, digits and . _ - between slashes")
    return folder


def client(guard: Guard) -> HfApi:
    """Return a guarded client with the endpoint, cache and token of huggingface_hub's environment variables."""
    return guarded_client(guard)


@contextmanager
def bars_on_terminals_only() -> Iterator[None]:
    """Turn off huggingface_hub's progress bars in the block unless a terminal shows them."""
    hide = not sys.stderr.isatty() and not are_progress_bars_disabled()
    if hide:
        disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            enable_progress_bars()


@contextmanager
def typed_errors(repo: str) -> Iterator[None]:
    """Turn errors of huggingface_hub and its HTTP client in the block into a HubError about `repo`.

    The original error is not chained, because its message can hold a malformed token.
    """
    try:
        yield
    except SaelensLiteError:
        raise
    except Exception as error:  # the client does not check answers before it parses them: KeyError, RecursionError, …
        raise _typed(error, repo) from None


def _typed(error: Exception, repo: str) -> SaelensLiteError:
    """Return our error for an error of huggingface_hub."""
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):  # an upload wraps the actual error
        error = error.__cause__
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return DiskFullError(f"{repo} cannot be stored: the disk is full")
    said = _in_short(error)
    if isinstance(error, OfflineModeIsEnabled):
        return HubUnreachableError(f"{repo}: HF_HUB_OFFLINE is set, so the Hub was not contacted; unset it")
    if isinstance(error, LocalTokenNotFoundError):
        return HubAccessError(f"{repo}: there is no token; {LOG_IN}")
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        return _from_status(error, repo, said)
    if isinstance(error, HTTPError | LocalEntryNotFoundError | ConnectionError | TimeoutError):
        return HubUnreachableError(f"{repo}: the Hub cannot be reached; check the network and try again. It says: {said}")
    return HubError(f"{repo}: {said}")


def _from_status(error: HfHubHTTPError, repo: str, said: str) -> HubError:
    """Return our error for an HTTP status of the Hub."""
    status = error.response.status_code
    if isinstance(error, GatedRepoError):
        return HubAccessError(f"{repo} is gated: ask for access on https://huggingface.co/{repo}, then {LOG_IN}")
    if isinstance(error, RevisionNotFoundError):
        return HubNotFoundError(f"{repo} has no such revision. The Hub says: {said}")
    about_token = re.search("token|credentials", str(error.server_message or ""), re.IGNORECASE)
    if isinstance(error, RepositoryNotFoundError) and not about_token:
        hint = "is this account allowed to see it?" if get_token() else f"if it is private, {LOG_IN}"
        return HubNotFoundError(f"the Hub shows no repository {repo}; check its name, and {hint}")
    if status == 401:
        return HubAccessError(f"{repo}: the token is missing, wrong or has expired; {LOG_IN}. The Hub says: {said}")
    if status == 403:
        return HubAccessError(
            f"{repo}: this token may not do that; use one that may write there, and {LOG_IN}. It says: {said}"
        )
    if status in (409, 412):
        return HubConflictError(f"{repo} has changed since it was read; nothing was written. The Hub says: {said}")
    if status == 429 or status >= 500:
        return HubUnreachableError(f"{repo}: the Hub is in trouble or asks to wait; try again later. It says: {said}")
    return HubError(f"{repo}: the Hub refuses: {said}")


def _in_short(error: Exception) -> str:
    """Return the message of an error on one line, without the token."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in text[:10_000])
    text = re.sub(r"Bearer [^'\"]*", "Bearer …", text)  # from errors about a header that cannot be sent
    token = get_token()
    return (text.replace(token, "…") if token else text)[:400]
