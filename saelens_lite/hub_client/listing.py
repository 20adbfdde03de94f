"""The commit and the files of a repository, from checked answers."""

import logging
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import quote, urljoin, urlsplit

from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, http_backoff
from pydantic import BaseModel, Discriminator, Field, StringConstraints, Tag, TypeAdapter, ValidationError

from saelens_lite.errors import HubError
from saelens_lite.files import file_hash
from saelens_lite.hub_client.client import SECONDS_TO_ANSWER, is_usable, typed_errors
from saelens_lite.hub_client.guard import COMMIT, TAG, Guard, guarded_client, same_origin

MAX_PAGE_BYTES, MAX_LISTING_BYTES, MAX_PAGES, MAX_FILES = 8 << 20, 64 << 20, 1000, 200_000
MAX_CONTAINERS = 300_000  # per answer
MAX_NAME_BYTES, MAX_PATH_CHARACTERS = 255, 1000
logger = logging.getLogger(__name__)

Sha1 = Annotated[str, StringConstraints(pattern="^[0-9a-f]{40}$")]
Sha256 = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
Size = Annotated[int, Field(ge=0, le=1 << 53, strict=True)]
Name = Annotated[str, StringConstraints(max_length=4096)]


class _Info(BaseModel):
    sha: Sha1
    private: bool = False


class _LargeFile(BaseModel):
    oid: Sha256
    size: Size


class _File(BaseModel):
    type: Literal["file"]
    path: Name
    size: Size
    oid: Sha1
    lfs: _LargeFile | None = None


class _Other(BaseModel):
    type: Annotated[str, StringConstraints(max_length=40)]


class _Ref(BaseModel):
    name: Name


class _Refs(BaseModel):
    branches: Annotated[list[_Ref], Field(max_length=10_000)] = []
    tags: Annotated[list[_Ref], Field(max_length=10_000)] = []


def _kind(entry: Any) -> str:
    return "file" if isinstance(entry, dict) and entry.get("type") == "file" else "other"


_Entry = Annotated[Annotated[_File, Tag("file")] | Annotated[_Other, Tag("other")], Discriminator(_kind)]
_INFO, _PAGE, _REFS = TypeAdapter(_Info), TypeAdapter(list[_Entry]), TypeAdapter(_Refs)


class RepoFile(NamedTuple):
    """A file of a repository: its size in bytes, git's hash of it or of its pointer, and its SHA-256 if it is in LFS."""

    path: str
    size: int
    blob_id: str
    sha256: str | None

    def holds(self, content: Path | bytes, sha256: str | None = None) -> bool:
        """Return whether the file has these bytes, by SHA-256 if it is in LFS and by git's hash otherwise.

        sha256: the SHA-256 of the content, if it is known.
        """
        if self.size != (len(content) if isinstance(content, bytes) else content.stat().st_size):
            return False
        if self.sha256 is not None:
            return (sha256 or file_hash(content)) == self.sha256
        return file_hash(content, "sha1", f"blob {self.size}\0".encode()) == self.blob_id


class Listing(NamedTuple):
    """A commit, its files by path, and whether the repository is private."""

    commit: str
    files: dict[str, RepoFile]
    private: bool


def list_files(repo: str, revision: str | None) -> Listing:
    """Return the files of a repository at a revision.

    Raises:
        HubError: the repository or revision does not exist, or the answers are not those of a Hub.
    """
    with typed_errors(repo):
        commit, private = find_commit(repo, revision)
        files: dict[str, RepoFile] = {}
        url: str | None = f"api/models/{repo}/tree/{commit}?recursive=true"
        guard, asked, n_bytes = Guard(repo, MAX_PAGE_BYTES), set(), 0
        left_out = 0
        while url is not None:
            asked.add(url)
            answer = _answer(guard, url, retry=True)
            n_bytes += len(answer.content)
            if len(asked) > MAX_PAGES or n_bytes > MAX_LISTING_BYTES:
                raise HubError(f"{repo}: the list of its files does not end after {len(asked)} pages and {n_bytes:,} bytes")
            for entry in _checked(repo, _PAGE, answer.content):
                if isinstance(entry, _File):
                    left_out += not _add(repo, files, entry)
            url = _next_page(repo, url, answer)
            if url in asked:
                raise HubError(f"{repo}: the list of its files returns to an earlier page")
        if left_out:
            logger.warning("%s: skipped %d files whose names cannot be used here", repo, left_out)
        return Listing(commit, files, private)


def find_commit(repo: str, revision: str | None) -> tuple[str, bool]:
    """Return the commit of a revision, and whether the repository is private. Raise HubError as `list_files` does."""
    with typed_errors(repo):
        part = f"/revision/{quote(revision, safe='')}" if revision else ""
        answer = _answer(Guard(repo), f"api/models/{repo}{part}", retry=False)
        info = _checked(repo, _INFO, answer.content)
        if revision and COMMIT.fullmatch(revision) and info.sha != revision:
            raise HubError(f"{repo}: the Hub answers with commit {info.sha}; {revision} was requested")
        return info.sha, info.private


def revisions(repo: str) -> list[str]:
    """Return the printable names of branches and tags. Raise HubError as `list_files` does."""
    with typed_errors(repo):
        refs = _checked(repo, _REFS, _answer(Guard(repo), f"api/models/{repo}/refs", retry=False).content)
        return [ref.name for ref in (*refs.branches, *refs.tags) if ref.name.isprintable()]


def _answer(guard: Guard, path: str, *, retry: bool) -> Any:
    """Return the answer to a request, of limited size. A failed request is repeated if `retry` is true."""
    hub = guarded_client(guard)
    url = f"{hub.endpoint}/{path}"
    headers = build_hf_headers(library_name="saelens_lite", headers={TAG: guard.key})
    if retry:
        response = http_backoff("GET", url, headers=headers, timeout=SECONDS_TO_ANSWER)
    else:
        response = get_session().get(url, headers=headers, timeout=SECONDS_TO_ANSWER)
    hf_raise_for_status(response)
    return response


def _checked(repo: str, schema: TypeAdapter, content: bytes) -> Any:
    """Parse the content of an answer against a schema."""
    if content.count(b"[") + content.count(b"{") > MAX_CONTAINERS:  # parsing each takes 30 times its bytes
        raise HubError(f"{repo}: the endpoint answers with more than {MAX_CONTAINERS:,} lists and tables, which no Hub does")
    try:
        return schema.validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(str(part)[:40] for part in first["loc"])
        raise HubError(
            f"{repo}: the endpoint does not answer as a Hub does: {place + ': ' if place else ''}{first['msg'][:200]}; is "
            "HF_ENDPOINT right?"
        ) from None


def _add(repo: str, files: dict[str, RepoFile], entry: _File) -> bool:
    """Add a file. Return False if its name cannot be used here. Raise HubError if no repository can hold it."""
    names = entry.path.split("/")
    if "" in names or "." in names or ".." in names or "\0" in entry.path:
        raise HubError(f"{repo}: the Hub lists a file {entry.path[:100]!r}, which is not a valid path")
    if entry.path in files:
        raise HubError(f"{repo}: the Hub lists {entry.path[:100]!r} twice")
    if len(files) == MAX_FILES:
        raise HubError(f"{repo}: it has more than {MAX_FILES:,} files")
    if entry.lfs is not None and entry.lfs.size != entry.size:
        raise HubError(f"{repo}: the Hub gives two sizes for {entry.path[:100]!r}: {entry.size:,} and {entry.lfs.size:,} bytes")
    usable = all(is_usable(name) and len(name.encode()) <= MAX_NAME_BYTES for name in names)
    if usable and len(entry.path) <= MAX_PATH_CHARACTERS:
        files[entry.path] = RepoFile(entry.path, entry.size, entry.oid, entry.lfs.oid if entry.lfs else None)
        return True
    return False


def _next_page(repo: str, url: str, answer: Any) -> str | None:
    """Return the URL of the next page of a listing, or None after the last. Only the cursor may differ from this page's URL."""
    link = answer.links.get("next", {}).get("url")
    if link is None:
        return None
    target = urljoin(str(answer.request.url), link)
    if not same_origin(target):
        host = (urlsplit(target).hostname or "")[:100]
        raise HubError(f"{repo}: the list of its files continues at another host, {host!r}; it was not contacted")
    return f"{url.partition('?')[0]}?{urlsplit(target).query}"
