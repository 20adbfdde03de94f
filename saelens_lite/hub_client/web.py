"""Public files of other servers than the Hub, without a token: one file, or the files of a folder in an S3 bucket."""

import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote, urlsplit
from xml.etree import ElementTree

from saelens_lite.errors import ConfigError, HubError, HubNotFoundError, HubUnreachableError
from saelens_lite.hub_client.guard import GRACE_SECONDS, HTTPX, LEAST_BYTES_PER_SECOND, SECONDS_BETWEEN_BYTES

MAX_FILE_BYTES, MAX_PAGE_BYTES, MAX_PAGES = 64 << 20, 8 << 20, 100
AT_ONCE = 4  # requests
WAITS = (0.5, 2.0)  # seconds before a request that failed is repeated


def web_files(urls: Sequence[str], limit: int = MAX_FILE_BYTES) -> Iterator[bytes]:
    """Yield the content of files of at most `limit` bytes each, in order. A few are fetched at once.

    Raises:
        HubNotFoundError: a file does not exist, or is not public.
        HubUnreachableError: the server cannot be reached, fails or is too slow.
        HubError: a file is larger than `limit`, or the server leads to an address without encryption.
    """
    with _client() as client, ThreadPoolExecutor(AT_ONCE) as pool:
        for start in range(0, len(urls), AT_ONCE):  # so that only these, and the one in use, are in memory
            yield from pool.map(lambda url: _content(client, url, limit), urls[start : start + AT_ONCE])


def bucket_files(url: str, pattern: str) -> list[str]:
    """Return the URLs of the files in a public folder of an S3 bucket, given by its URL, whose names match a pattern.

    Raises:
        ConfigError: it is not a URL.
        HubNotFoundError, HubUnreachableError, HubError: as for `web_files`, or the answers are not those of a bucket.
    """
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise ConfigError(f"{url} is not a URL: {error}") from None
    root, prefix = f"{parts.scheme}://{parts.netloc}/", parts.path.strip("/") + "/"
    names: list[str] = []
    query = f"?list-type=2&prefix={quote(prefix, safe='')}"
    with _client() as client:
        for _ in range(MAX_PAGES):
            page = _parsed(root, _content(client, root + query, MAX_PAGE_BYTES))
            names += [key.removeprefix(prefix) for key in page.get("Key", ()) if key.startswith(prefix)]
            if page.get("IsTruncated") != ["true"]:
                return [root + quote(prefix + name) for name in names if re.fullmatch(pattern, name)]
            token = page.get("NextContinuationToken", [""])[0]
            query = f"?list-type=2&prefix={quote(prefix, safe='')}&continuation-token={quote(token, safe='')}"
    raise HubError(f"{url}: the list of its files does not end after {MAX_PAGES} pages")


def _parsed(place: str, content: bytes) -> dict[str, list[str]]:
    """Return the texts of each kind of element in an S3 listing."""
    try:
        text = content.decode("utf-8")  # as text, so that a declared encoding does not count
        if "<!" in text:  # no bucket declares entities, which can grow without end
            raise ValueError("it declares entities")
        root = ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError) as error:
        raise HubError(f"{place} does not answer as an S3 bucket does: {error}; give the URL of a file") from None
    texts: dict[str, list[str]] = {}
    for element in root.iter():
        texts.setdefault(element.tag.rpartition("}")[2], []).append(element.text or "")
    return texts


def _client() -> Any:
    """Return an HTTP client that follows few redirects, none of them from an encrypted address to a plain one."""

    def keep_encryption(response: Any) -> None:
        here = response.request.url
        target = here.join(response.headers["Location"]) if response.has_redirect_location else here
        if here.scheme == "https" != target.scheme:
            raise HubError(f"{here} leads to an address without encryption, on {target.host}")

    return HTTPX.Client(
        timeout=SECONDS_BETWEEN_BYTES,
        follow_redirects=True,
        max_redirects=5,
        headers={"User-Agent": "saelens_lite", "Accept-Encoding": "identity"},
        event_hooks={"response": [keep_encryption]},
    )


def _content(client: Any, url: str, limit: int) -> bytes:
    """Return the content of one file. A request is repeated if the server is in trouble."""
    for wait in WAITS:
        try:
            return _once(client, url, limit)
        except HubUnreachableError:
            time.sleep(wait)
    return _once(client, url, limit)


def _once(client: Any, url: str, limit: int) -> bytes:
    """Return the content of one file after one request."""
    started, content = time.monotonic(), bytearray()
    try:
        with client.stream("GET", url) as response:
            status = response.status_code
            if status in (401, 403, 404, 410):
                raise HubNotFoundError(
                    f"{url} does not exist or is not public (the server answers {status}); check the address"
                )
            if status == 429 or status >= 500:
                raise HubUnreachableError(f"{url}: the server answers {status}; try again later")
            if status != 200:
                raise HubError(f"{url}: the server answers {status} instead of the file")
            for piece in response.iter_raw():
                content += piece
                n_bytes, seconds = len(content), time.monotonic() - started
                if n_bytes > limit:
                    raise HubError(f"{url} has more than {limit:,} bytes, the largest file that is fetched")
                if seconds > GRACE_SECONDS + n_bytes / LEAST_BYTES_PER_SECOND:
                    raise HubUnreachableError(f"{url}: {n_bytes:,} bytes arrived in {seconds:.0f} seconds; try again")
    except (HTTPX.HTTPError, HTTPX.InvalidURL, UnicodeError, OSError) as error:
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise HubUnreachableError(f"{url} cannot be fetched: {said}; check the address and the network") from None
    return bytes(content)
