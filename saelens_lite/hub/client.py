"""Talking to the Hub: addresses of dictionaries there, and typed errors in place of those of the HTTP client.

The token is found by huggingface_hub itself (HF_TOKEN or `hf auth login`); it is never handed on, stored or shown.
"""

import errno
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,  # of whichever httpx this huggingface_hub is built on
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
from saelens_lite.hub.guard import Guard, guarded_client

NAME = r"[A-Za-z0-9][\w.-]*"
SECONDS_TO_ANSWER = 5
LOG_IN = "log in with `hf auth login` or set HF_TOKEN (https://huggingface.co/settings/tokens)"
_ADDRESS = re.compile(
    rf"hf://(?P<repo>{NAME}/{NAME})(@(?P<first>refs/(?:pr|convert)/[^/]+|[^/@]+))?(/(?P<folder>[^@]*))?(@(?P<last>[^@]+))?"
)


class Address(NamedTuple):
    """Where a dictionary lies on the Hub."""

    repo: str
    folder: str | None = None
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Address":
        """Return the address hf://user/repo/folder@revision, or hf://user/repo@revision/folder as huggingface_hub writes it.

        Raises:
            ConfigError: it is not of this form.
        """
        found = _ADDRESS.fullmatch(text)
        if found is None or (found["first"] and found["last"]):
            raise ConfigError(f"{text!r} is not an address on the Hub; expected hf://user/repo/folder@revision")
        return cls.of(found["repo"], found["folder"], found["first"] or found["last"])

    @classmethod
    def of(cls, repo: str, folder: str | None = None, revision: str | None = None) -> "Address":
        """Return an address whose parts are well formed.

        Raises:
            ConfigError: they are not.
        """
        if not re.fullmatch(rf"{NAME}/{NAME}", repo):
            raise ConfigError(f"{repo!r} is not the name of a repository; expected user/name")
        if revision and (".." in revision or not re.fullmatch(r"[^\s/~^:?*\[\\][^\s~^:?*\[\\]*", revision)):  # as git has it
            raise ConfigError(f"{revision!r} cannot be a revision; expected a branch, a tag or a commit")
        folder = check_folder(folder) if folder and folder.strip("/") else None
        return cls(repo, folder, revision or None)

    def __str__(self) -> str:
        folder = f"/{self.folder}" if self.folder else ""
        return f"hf://{self.repo}{folder}{f'@{self.revision}' if self.revision else ''}"


def check_folder(folder: str) -> str:
    """Return the name of a folder in a repository, without slashes around it; ConfigError unless it is a plain relative path."""
    folder = folder.strip("/")
    if not re.fullmatch(rf"{NAME}(/{NAME})*", folder):
        raise ConfigError(f"{folder!r} cannot be a folder of a repository: use letters, digits and . _ - between slashes")
    return folder


def client(guard: Guard) -> HfApi:
    """Return a client that asks the Hub in bounds, with the endpoint, cache and token of huggingface_hub's environment
    variables.
    """
    return guarded_client(guard)


@contextmanager
def bars_on_terminals_only() -> Iterator[None]:
    """Within the block, huggingface_hub draws its progress bars only where somebody can see them."""
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
    """Within the block, whatever huggingface_hub and its HTTP client raise is a HubError about `repo`.

    The original is not chained: a malformed token can stand in its message.
    """
    try:
        yield
    except SaelensLiteError:
        raise
    except Exception as error:  # the client takes answers apart without a look at their form: KeyError, RecursionError, …
        raise _typed(error, repo) from None


def _typed(error: Exception, repo: str) -> SaelensLiteError:
    """Return the error of ours that says the same."""
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):  # an upload wraps what went wrong
        error = error.__cause__
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return DiskFullError(f"{repo} cannot be stored: the disk is full")
    said = _in_short(error)
    if isinstance(error, OfflineModeIsEnabled):
        return HubUnreachableError(f"{repo}: the environment variable HF_HUB_OFFLINE forbids to ask the Hub; unset it")
    if isinstance(error, LocalTokenNotFoundError):
        return HubAccessError(f"{repo}: there is no token; {LOG_IN}")
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        return _from_status(error, repo, said)
    if isinstance(error, HTTPError | LocalEntryNotFoundError | ConnectionError | TimeoutError):
        return HubUnreachableError(f"{repo}: the Hub cannot be reached; check the network and try again. It says: {said}")
    return HubError(f"{repo}: {said}")


def _from_status(error: HfHubHTTPError, repo: str, said: str) -> HubError:
    """What an answer of the Hub means."""
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
        return HubConflictError(f"{repo} has changed in the meantime; nothing was written. The Hub says: {said}")
    if status == 429 or status >= 500:
        return HubUnreachableError(f"{repo}: the Hub is in trouble or asks to wait; try again later. It says: {said}")
    return HubError(f"{repo}: the Hub refuses: {said}")


def _in_short(error: Exception) -> str:
    """Return the message of an error on one line, never with the token in it."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in text[:10_000])
    text = re.sub(r"Bearer [^'\"]*", "Bearer …", text)  # as it stands in a header that cannot be sent
    token = get_token()
    return (text.replace(token, "…") if token else text)[:400]
