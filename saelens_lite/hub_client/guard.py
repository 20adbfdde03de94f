"""A guard over each request to a Hub. It limits the hosts that get the token, the bytes of an answer, and the time.

huggingface_hub trusts its endpoint: it names files after the ETag of an answer, follows links to any host with the token, and
reads answers of any size. So the requests of this package carry the key of a Guard in a header, which is removed before the
request is sent. Hooks of the HTTP client let the guard check each request and each answer. Requests of other code through the
same client are not checked.
"""

import re
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit
from weakref import WeakValueDictionary

from huggingface_hub import HfApi, constants, set_client_factory
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import _http

from saelens_lite.errors import HubError, HubUnreachableError

HTTPX: Any = sys.modules[HTTPError.__module__.partition(".")[0]]  # the httpx package that this huggingface_hub uses
TAG, EXTENSION = "X-Saelens-Lite-Guard", "saelens_lite_guard"
HUB = "https://huggingface.co"  # mirrors link to it, and it issues the token
COMMIT = re.compile("[0-9a-f]{40}")
MAX_ANSWER_BYTES, MAX_ERROR_BYTES = 8 << 20, 1 << 20
SECONDS_BETWEEN_BYTES = 10
SECONDS_TO_WAIT = 300  # longest wait that an endpoint may ask for
GRACE_SECONDS, LEAST_BYTES_PER_SECOND = 60, 1000
_ETAG = re.compile(r'(W/)?"?(?!\.)[\w.+=-]{1,128}"?')  # huggingface_hub names a file after the text between the quotes
_guards: "WeakValueDictionary[str, Guard]" = WeakValueDictionary()
_lock = threading.Lock()


class Guard:
    """The limits of one task, such as a listing or the download of one file.

    repo: name for messages. limit: bytes of an answer. commit: the only allowed commit of an answer. hurry: raise if the task
    takes longer than GRACE_SECONDS and receives less than LEAST_BYTES_PER_SECOND.
    """

    def __init__(self, repo: str, limit: int = MAX_ANSWER_BYTES, commit: str | None = None, *, hurry: bool = True):
        self.repo, self.limit, self.commit, self.hurry = repo, limit, commit, hurry
        self.key = secrets.token_hex(8)
        self._started, self._n_bytes = time.monotonic(), 0
        _guards[self.key] = self

    def request(self, request: Any) -> None:
        """Check a request before it is sent.

        Raises:
            HubError: the request would send the token to another host or without encryption.
            HubUnreachableError: the task takes too long.
        """
        self._check_pace()
        url, endpoint = str(request.url), constants.ENDPOINT
        if "authorization" in request.headers and _origin(url) not in (_origin(endpoint), _origin(HUB)):
            raise HubError(f"{self.repo}: {endpoint} asks to send the token to {_origin(url)[1]}; it was not sent")
        if endpoint.startswith("https:") and not url.startswith("https:"):
            raise HubError(f"{self.repo}: {endpoint} leads to an address without encryption, on {_origin(url)[1]}")
        if request.method in ("GET", "HEAD"):
            request.headers["Accept-Encoding"] = "identity"  # so that what is sent is what arrives
            waits = request.extensions.get("timeout") or {}
            most = SECONDS_BETWEEN_BYTES
            request.extensions["timeout"] = {
                kind: min(most, waits.get(kind) or most) for kind in ("connect", "read", "write", "pool")
            }

    def response(self, response: Any) -> None:
        """Check the headers of an answer, and count its content while it is read.

        Raises:
            HubError: a header holds a path, names another commit, or announces more than the limit.
            HubUnreachableError: the answer asks for too long a wait.
        """
        headers, request = response.headers, response.request
        commit = headers.get(constants.HUGGINGFACE_HEADER_X_REPO_COMMIT)
        if commit is not None and (not COMMIT.fullmatch(commit) or self.commit not in (None, commit)):
            wanted = self.commit or "40 hexadecimal digits"
            raise HubError(f"{self.repo}: the Hub answers with commit {commit[:60]!r}; expected {wanted}; fetch it again")
        if request.method == "HEAD":
            for name in (constants.HUGGINGFACE_HEADER_X_LINKED_ETAG, "ETag"):
                if (etag := headers.get(name)) is not None and not _ETAG.fullmatch(etag):
                    raise HubError(f"{self.repo}: the Hub sends the ETag {etag[:60]!r}, which cannot be the name of a file")
        if response.status_code >= 400:
            self._check_wait(headers)
        else:
            self._check_length(headers, request.method)
        response.stream = _Counted(response.stream, self, self._limit(response))

    def _limit(self, response: Any) -> int:
        """Return the limit of an answer in bytes, less the part of the file that is already downloaded."""
        if response.status_code >= 400:
            return MAX_ERROR_BYTES
        start = re.match(r"bytes=(\d{1,18})-", response.request.headers.get("Range", ""))
        return max(0, self.limit - int(start[1])) if start and response.status_code == 206 else self.limit

    def _check_wait(self, headers: Any) -> None:
        asked = [headers.get("Retry-After", ""), *re.findall(r"\bt=(\d+)", headers.get("ratelimit", ""))]
        seconds = max((float(text) for text in asked if re.fullmatch(r"\d+(\.\d+)?", text)), default=0)
        if seconds > SECONDS_TO_WAIT:
            raise HubUnreachableError(f"{self.repo}: the Hub asks to wait {seconds:,.0f} seconds; try again later")

    def _check_length(self, headers: Any, method: str) -> None:
        encoding, length = headers.get("Content-Encoding", "identity"), headers.get("Content-Length", "0")
        if method == "GET" and encoding != "identity":
            raise HubError(f"{self.repo}: the Hub sends the encoding {encoding[:40]!r}, although plain bytes were requested")
        if not re.fullmatch(r"\d{1,18}", length):
            raise HubError(f"{self.repo}: the Hub announces {length[:40]!r} bytes")
        if method == "GET" and int(length) > self.limit:
            raise HubError(f"{self.repo}: the Hub announces {int(length):,} bytes; the limit is {self.limit:,}")

    def arrived(self, n: int) -> None:
        """Count received bytes. Raise HubUnreachableError if they arrive too slowly."""
        self._n_bytes += n
        self._check_pace()

    def _check_pace(self) -> None:
        seconds = time.monotonic() - self._started
        if self.hurry and seconds > GRACE_SECONDS + self._n_bytes / LEAST_BYTES_PER_SECOND:
            raise HubUnreachableError(f"{self.repo}: the Hub sent {self._n_bytes:,} bytes in {seconds:.0f} seconds; try again")


class _Counted(HTTPX.SyncByteStream):
    """The content of an answer, limited to a number of bytes."""

    def __init__(self, stream: Any, guard: Guard, limit: int):
        self._stream, self._guard, self._limit = stream, guard, limit

    def __iter__(self) -> Iterator[bytes]:
        n = 0
        for chunk in self._stream:
            n += len(chunk)
            self._guard.arrived(len(chunk))
            if n > self._limit:
                raise HubError(f"{self._guard.repo}: the Hub sends more than the limit of {self._limit:,} bytes")
            yield chunk

    def close(self) -> None:
        self._stream.close()


class _Guarded:
    """A factory of HTTP clients that adds our hooks to theirs."""

    def __init__(self, factory: Callable[[], Any]):
        self.factory = factory

    def __call__(self) -> Any:
        client = self.factory()
        hooks = client.event_hooks
        client.event_hooks = {"request": [_on_request, *hooks["request"]], "response": [_on_response, *hooks["response"]]}
        return client


def _on_request(request: Any) -> None:
    guard = _guards.get(request.headers.pop(TAG, "")) or request.extensions.get(EXTENSION)  # the latter after a redirect
    if guard is not None:
        request.extensions[EXTENSION] = guard
        guard.request(request)


def _on_response(response: Any) -> None:
    guard = response.request.extensions.get(EXTENSION)
    if guard is not None:
        guard.response(response)


def guarded_client(guard: Guard) -> HfApi:
    """Return a client of the Hub whose requests the guard checks."""
    with _lock:
        if not isinstance(_http._GLOBAL_CLIENT_FACTORY, _Guarded):
            set_client_factory(_Guarded(_http._GLOBAL_CLIENT_FACTORY))
    api = HfApi(library_name="saelens_lite", headers={TAG: guard.key})
    api.guard = guard  # keeps the guard alive as long as the client
    return api


def _origin(url: str) -> tuple[str, str, int | None]:
    parts = urlsplit(url)
    return parts.scheme, (parts.hostname or "").lower(), parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def same_origin(url: str) -> bool:
    """Return whether a URL is on the endpoint, or on the Hub that it mirrors."""
    try:
        return _origin(url) in (_origin(constants.ENDPOINT), _origin(HUB))
    except ValueError:
        return False
