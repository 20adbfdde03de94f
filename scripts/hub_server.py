"""Run a Hugging Face Hub on the loopback interface, for tests: repositories in memory, real HTTP, faults to order.

    python scripts/hub_server.py hf_anytoken

prints its address, knows the token as that of the user `me`, and serves until its standard input ends.

It speaks what the unmodified huggingface_hub client asks of the Hub when it creates, lists, uploads to and downloads from
model repositories: JSON endpoints under /api, git-LFS uploads to a storage host and downloads from a CDN host, which are
`localhost` while the Hub is 127.0.0.1, so that a token sent to the wrong one is seen.
"""

import base64
import hashlib
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_SUFFIXES = (".safetensors", ".png", ".npz", ".pt")
TREE_PAGE = 20  # the real one sends 1000 a page
DATE = "2026-01-01T00:00:00.000Z"


class Blob(NamedTuple):
    """The content of a file, and whether it lies in large-file storage."""

    content: bytes
    lfs: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        """git's hash of the file, or of the pointer to it."""
        stored = self.content
        if self.lfs:
            stored = (
                f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n".encode()
            )
        return hashlib.sha1(f"blob {len(stored)}\0".encode() + stored).hexdigest()


class Commit(NamedTuple):
    """A state of the repository."""

    id: str
    parent: str | None
    title: str
    files: dict[str, Blob]


@dataclass
class Repository:
    """Commits, and the branches and tags that point to them."""

    name: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def head(self) -> Commit:
        return self.commits[self.branches["main"]]

    def history(self, revision: str = "main") -> list[Commit]:
        """Return the commits of a revision, last one first."""
        found, commit = [], self.find(revision)
        while commit is not None:
            found.append(commit)
            commit = self.commits.get(commit.parent) if commit.parent else None
        return found

    def find(self, revision: str) -> Commit:
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        if oid not in self.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]

    def add(self, title: str, files: dict[str, Blob], branch: str = "main") -> Commit:
        """Make a commit the head of a branch: all at once, or, where an error came before, not at all."""
        parent = self.branches.get(branch)
        listing = json.dumps([parent, title, sorted((path, blob.oid) for path, blob in files.items())])
        commit = Commit(hashlib.sha1(f"{listing}{len(self.commits)}".encode()).hexdigest(), parent, title, dict(files))
        self.commits[commit.id] = commit
        self.branches[branch] = commit.id
        return commit


@dataclass
class Account:
    """Whom a token belongs to."""

    user: str
    may_write: bool = True
    expired: bool = False


@dataclass
class Fault:
    """Set the fault of the next `times` requests of a method whose path matches.

    kind: "status" (answer with `status`), "drop" (hang up in the middle of the request), "lose" (do it, then hang up instead of
    answering), "cut" (hang up in the middle of the answer), "slow" (answer in small pieces), "meanwhile" (call `action` first).
    """

    method: str
    path: str
    kind: str
    times: int = 1
    status: int = 500
    message: str = "Internal Error - We're working hard to fix this as soon as possible!"
    action: Callable[[], Any] | None = None

    def matches(self, method: str, path: str) -> bool:
        return self.times > 0 and method == self.method and re.search(self.path, path) is not None


class Request(NamedTuple):
    """A request that came in; `size` of its body, `range` of bytes that it asks for."""

    method: str
    host: str
    path: str
    token: str | None
    size: int
    range: str | None = None


class Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, code: str | None = None, **extra: Any):
        super().__init__(message)
        self.status, self.message, self.code, self.extra = status, message, code, extra


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @classmethod
    def json(cls, value: Any, status: int = 200, **headers: str) -> "Answer":
        return cls(status, {"Content-Type": "application/json", **headers}, json.dumps(value).encode())


class Hub:
    """The server's state: repositories, stored large files, accounts, faults to come, and the requests that came."""

    def __init__(self) -> None:
        self.labels: dict[str, tuple[str, ...]] = {}  # tags of repositories, for searches
        self.repositories: dict[str, Repository] = {}
        self.storage: dict[str, bytes] = {}  # large files by sha256
        self.accounts: dict[str, Account] = {}
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.lock = threading.RLock()
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def storage_url(self) -> str:
        return f"http://localhost:{self.port}"

    def create(self, name: str, *, private: bool = False) -> Repository:
        """Return a new repository with the commit that every one begins with."""
        repository = Repository(name, private)
        repository.add("initial commit", {".gitattributes": Blob(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")})
        self.repositories[name] = repository
        return repository

    def order(self, *faults: Fault) -> None:
        """Have these faults happen, and no others."""
        self.faults = list(faults)

    def sent(self, method: str = "", path: str = "") -> list[Request]:
        """Return the requests of a method whose path matches."""
        return [r for r in self.requests if method in ("", r.method) and re.search(path, r.path)]

    # --- what the endpoints do ---------------------------------------------------------------------------------------

    def account(self, token: str | None) -> Account | None:
        if token is None:
            return None
        if token not in self.accounts:
            raise Refused(401, "Invalid credentials in Authorization header")
        if self.accounts[token].expired:
            raise Refused(401, 'User Access Token "test" is expired')
        return self.accounts[token]

    def repository(self, name: str, account: Account | None, *, write: bool = False) -> Repository:
        found = self.repositories.get(name)
        if found is None or (found.private and (account is None or account.user != name.partition("/")[0])):
            missing = "Repository not found" if account else "Invalid username or password."
            raise Refused(404 if account else 401, missing, "RepoNotFound")
        if write and account is None:
            raise Refused(401, "Invalid username or password.")
        if write and not (account.may_write and account.user == name.partition("/")[0]):
            raise Refused(403, f"You don't have the rights to write to {name}")
        return found

    def whoami(self, account: Account | None, **_: Any) -> Answer:
        if account is None:
            raise Refused(401, "Invalid username or password.")
        return Answer.json({"type": "user", "name": account.user, "auth": {"accessToken": {"role": "write"}}})

    def create_repo(self, account: Account | None, data: dict[str, Any], **_: Any) -> Answer:
        if account is None:
            raise Refused(401, "Invalid username or password.")
        owner = data.get("organization") or account.user
        if owner != account.user or not account.may_write:
            raise Refused(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        name = f"{owner}/{data['name']}"
        if name in self.repositories:
            raise Refused(409, "You already created this model repo", url=f"{self.url}/{name}")
        self.create(name, private=data.get("private") is True or data.get("visibility") == "private")
        return Answer.json({"url": f"{self.url}/{name}", "name": name})

    def validate_yaml(self, data: dict[str, Any], **_: Any) -> Answer:
        errors = list(_metadata_errors(data["content"]))
        content = {"errors": [{"message": message} for message in errors], "warnings": []}
        return Answer.json(content, status=400 if errors else 200)

    def info(self, account: Account | None, name: str, revision: str = "main", **_: Any) -> Answer:
        repository = self.repository(name, account)
        commit = repository.find(revision)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        content = {"_id": "1", "id": name, "modelId": name, "sha": commit.id, "private": repository.private, "tags": []}
        return Answer.json(
            content | {"siblings": siblings, "downloads": 0, "likes": 0, "createdAt": DATE, "lastModified": DATE}
        )

    def models(self, query: dict[str, str], **_: Any) -> Answer:
        """List the repositories whose labels the test has set and that carry the label asked for."""
        named = [name for name, labels in self.labels.items() if query.get("filter") in labels]
        return Answer.json([{"_id": "1", "id": name, "modelId": name, "tags": list(self.labels[name])} for name in named])

    def tree(
        self, account: Account | None, name: str, revision: str, query: dict[str, str], within: str = "", **_: Any
    ) -> Answer:
        files = self.repository(name, account).find(revision).files
        prefix = f"{within}/" if within else ""
        inside = {path: blob for path, blob in files.items() if path.startswith(prefix)}
        if within and not inside:
            raise Refused(404, f"{within} does not exist on {revision!r}", "EntryNotFound")
        recursive = query.get("recursive", "").lower() in ("1", "true")
        entries = [_entry(path, blob) for path, blob in sorted(inside.items()) if recursive or "/" not in path[len(prefix) :]]
        folders = {path[: len(prefix) + cut] for path in inside for cut in _slashes(path[len(prefix) :])}
        entries += [
            {"type": "directory", "oid": hashlib.sha1(folder.encode()).hexdigest(), "size": 0, "path": folder}
            for folder in sorted(folders)
            if recursive or "/" not in folder[len(prefix) :]
        ]
        start = int(query.get("cursor", 0))
        headers = {}
        if start + TREE_PAGE < len(entries):
            path = f"{self.url}/api/models/{name}/tree/{revision}{'/' + within if within else ''}"
            recursive_part = f"recursive={query['recursive']}&" if "recursive" in query else ""
            headers["Link"] = f'<{path}?{recursive_part}cursor={start + TREE_PAGE}>; rel="next"'
        return Answer.json(entries[start : start + TREE_PAGE], **headers)

    def paths_info(self, account: Account | None, name: str, revision: str, data: dict[str, Any], **_: Any) -> Answer:
        files = self.repository(name, account).find(revision).files
        return Answer.json([_entry(path, files[path]) for path in data["paths"] if path in files])

    def refs(self, account: Account | None, name: str, **_: Any) -> Answer:
        repository = self.repository(name, account)

        def listed(refs: dict[str, str], kind: str) -> list[dict[str, str]]:
            return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": commit} for n, commit in refs.items()]

        branches, tags = listed(repository.branches, "heads"), listed(repository.tags, "tags")
        return Answer.json({"branches": branches, "tags": tags, "converts": [], "pullRequests": []})

    def commits(self, account: Account | None, name: str, revision: str, **_: Any) -> Answer:
        history = self.repository(name, account).history(revision)
        author = [{"user": name.partition("/")[0]}]
        return Answer.json([{"id": c.id, "title": c.title, "message": "", "date": DATE, "authors": author} for c in history])

    def tag(self, account: Account | None, name: str, revision: str, data: dict[str, Any], **_: Any) -> Answer:
        repository = self.repository(name, account, write=True)
        if data["tag"] in repository.tags:
            raise Refused(409, f"Tag reference exists already: {data['tag']}")
        repository.tags[data["tag"]] = repository.find(revision).id
        return Answer.json({})

    def preupload(self, account: Account | None, name: str, revision: str, data: dict[str, Any], **_: Any) -> Answer:
        files = self.repository(name, account, write=True).find(revision).files
        answers = []
        for asked in data["files"]:
            old = files.get(asked["path"])
            oid = None if old is None else old.sha256 if old.lfs else old.oid
            mode = "lfs" if asked["path"].endswith(LFS_SUFFIXES) else "regular"
            answers.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return Answer.json({"files": answers})

    def lfs_batch(self, account: Account | None, name: str, data: dict[str, Any], **_: Any) -> Answer:
        self.repository(name, account, write=True)
        objects = []
        for asked in data["objects"]:
            known: dict[str, Any] = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.storage:
                known["actions"] = {
                    "upload": {"href": f"{self.storage_url}/storage/{asked['oid']}"},
                    "verify": {"href": f"{self.url}/api/complete/{asked['oid']}"},
                }
            objects.append(known)
        return Answer.json({"transfer": "basic", "objects": objects})

    def store(self, oid: str, body: bytes, **_: Any) -> Answer:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, "The content does not match its checksum")
        self.storage[oid] = body
        return Answer(200, {}, b"")

    def verify(self, oid: str, data: dict[str, Any], **_: Any) -> Answer:
        if len(self.storage.get(oid, b"")) != data["size"]:
            raise Refused(400, f"{oid} is not complete")
        return Answer.json({"success": True})

    def commit(self, account: Account | None, name: str, revision: str, body: bytes, **_: Any) -> Answer:
        repository = self.repository(name, account, write=True)
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        with self.lock:
            head = repository.find(revision)
            if header.get("parentCommit") not in (None, head.id):
                raise Refused(412, "A commit has happened since. Please refresh and try again.")
            files = dict(head.files)
            for line in lines:
                self._apply(files, line["key"], line["value"])
            made = repository.add(header["summary"], files, branch=revision)
        url = f"{self.url}/{name}/commit/{made.id}"
        return Answer.json({"success": True, "commitOid": made.id, "commitUrl": url, "hookOutput": ""})

    def _apply(self, files: dict[str, Blob], kind: str, value: dict[str, Any]) -> None:
        """Apply one line of a commit."""
        if kind == "file":
            files[value["path"]] = Blob(base64.b64decode(value["content"], validate=True))
        elif kind == "lfsFile":
            if value["oid"] not in self.storage:
                raise Refused(400, f"LFS pointer pointed to a file that does not exist: {value['oid']}")
            files[value["path"]] = Blob(self.storage[value["oid"]], lfs=True)
        elif kind == "deletedFile":
            if value["path"] not in files:
                raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
            del files[value["path"]]
        elif kind != "header":
            raise Refused(400, f"unknown line {kind}")

    def resolve(self, account: Account | None, name: str, revision: str, path: str, **_: Any) -> Answer:
        commit = self.repository(name, account).find(revision)
        blob = commit.files.get(path)
        headers = {"X-Repo-Commit": commit.id}
        if blob is None:
            raise Refused(404, "Entry not found", "EntryNotFound", headers=headers)
        if not blob.lfs:
            return Answer(200, {**headers, "ETag": f'"{blob.oid}"', "Accept-Ranges": "bytes"}, blob.content)
        headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.content))}
        self.storage.setdefault(blob.sha256, blob.content)
        return Answer(302, {**headers, "Location": f"{self.storage_url}/cdn/{blob.sha256}"}, b"")

    def cdn(self, oid: str, **_: Any) -> Answer:
        if oid not in self.storage:
            raise Refused(404, "no such object")
        return Answer(200, {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"}, self.storage[oid])


NAME = r"(?P<name>[^/]+/[^/]+)"
ROUTES: list[tuple[str, str, Callable[..., Answer]]] = [
    ("GET", r"/api/whoami-v2", Hub.whoami),
    ("POST", r"/api/repos/create", Hub.create_repo),
    ("POST", r"/api/validate-yaml", Hub.validate_yaml),
    ("GET", r"/api/models", Hub.models),
    ("GET", rf"/api/models/{NAME}", Hub.info),
    ("GET", rf"/api/models/{NAME}/revision/(?P<revision>[^/]+)", Hub.info),
    ("GET", rf"/api/models/{NAME}/tree/(?P<revision>[^/]+)(/(?P<within>.+))?", Hub.tree),
    ("POST", rf"/api/models/{NAME}/paths-info/(?P<revision>[^/]+)", Hub.paths_info),
    ("GET", rf"/api/models/{NAME}/refs", Hub.refs),
    ("GET", rf"/api/models/{NAME}/commits/(?P<revision>[^/]+)", Hub.commits),
    ("POST", rf"/api/models/{NAME}/tag/(?P<revision>[^/]+)", Hub.tag),
    ("POST", rf"/api/models/{NAME}/preupload/(?P<revision>[^/]+)", Hub.preupload),
    ("POST", rf"/api/models/{NAME}/commit/(?P<revision>[^/]+)", Hub.commit),
    ("POST", r"/(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch", Hub.lfs_batch),
    ("PUT", r"/storage/(?P<oid>[0-9a-f]{64})", Hub.store),
    ("POST", r"/api/complete/(?P<oid>[0-9a-f]{64})", Hub.verify),
    ("GET", r"/cdn/(?P<oid>[0-9a-f]{64})", Hub.cdn),
    ("GET", rf"/{NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Hub.resolve),
]


class Handler(BaseHTTPRequestHandler):
    """One connection; `server.hub` is the state."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        self._serve("GET")

    def do_HEAD(self) -> None:
        self._serve("GET", with_body=False)

    def do_POST(self) -> None:
        self._serve("POST")

    def do_PUT(self) -> None:
        self._serve("PUT")

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _serve(self, method: str, with_body: bool = True) -> None:
        fault = self._next_fault()
        if fault is not None and fault.kind == "drop":
            self._hang_up(after=int(self.headers.get("Content-Length") or 0) // 2)
            return
        body = self._read_body()
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        host = (self.headers.get("Host") or "").partition(":")[0]
        self.hub.requests.append(Request(self.command, host, self.path, token, len(body), self.headers.get("Range")))
        if fault is not None and fault.kind == "meanwhile":
            fault.action()
        try:
            if fault is not None and fault.kind == "status":
                raise Refused(fault.status, fault.message)
            answer = self._ranged(self._route(method, body, token))
        except Refused as refused:
            answer = _error(refused)
        if fault is not None and fault.kind == "lose":
            self._hang_up()
            return
        self._send(answer, with_body, fault.kind if fault else None)

    def _next_fault(self) -> Fault | None:
        with self.hub.lock:
            for i, fault in enumerate(self.hub.faults):
                if fault.matches(self.command, self.path):
                    self.hub.faults[i] = replace(fault, times=fault.times - 1)
                    return fault
        return None

    def _route(self, method: str, body: bytes, token: str | None) -> Answer:
        parts = urlsplit(self.path)
        for its_method, pattern, endpoint in ROUTES:
            found = re.fullmatch(pattern, parts.path) if its_method == method else None
            if found:
                named = {key: unquote(value) for key, value in found.groupdict().items() if value is not None}
                is_json = "json" in self.headers.get("Content-Type", "") and "ndjson" not in self.headers["Content-Type"]
                data = json.loads(body) if is_json and body else {}
                query = {key: values[0] for key, values in parse_qs(parts.query).items()}
                return endpoint(self.hub, account=self.hub.account(token), data=data, body=body, query=query, **named)
        raise Refused(404, f"no endpoint {method} {parts.path}")

    def _read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _ranged(self, answer: Answer) -> Answer:
        """Return the part of an answer that was asked for."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked is None or answer.status != 200:
            return answer
        start, size = int(asked[1]), len(answer.body)
        if start >= size:
            raise Refused(416, "Range Not Satisfiable", headers={"Content-Range": f"bytes */{size}"})
        end = min(int(asked[2] or size - 1), size - 1)
        return Answer(206, answer.headers | {"Content-Range": f"bytes {start}-{end}/{size}"}, answer.body[start : end + 1])

    def _send(self, answer: Answer, with_body: bool, fault: str | None) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if not with_body:
            return
        if fault == "cut":
            self.wfile.write(answer.body[: len(answer.body) // 2])
            self._hang_up()
        elif fault == "slow":
            for start in range(0, len(answer.body), max(1, len(answer.body) // 5)):
                self.wfile.write(answer.body[start : start + max(1, len(answer.body) // 5)])
                self.wfile.flush()
                time.sleep(0.02)
        else:
            self.wfile.write(answer.body)

    def _hang_up(self, after: int = 0) -> None:
        """Close the connection, having read part of the request."""
        if after:
            self.rfile.read(after)
        self.close_connection = True
        self.connection.close()


def _error(refused: Refused) -> Answer:
    content = {"error": refused.message, **{key: value for key, value in refused.extra.items() if key != "headers"}}
    headers = {"X-Error-Message": refused.message, **refused.extra.get("headers", {})}
    if refused.code:
        headers["X-Error-Code"] = refused.code
    return Answer.json(content, status=refused.status, **headers)


def _entry(path: str, blob: Blob) -> dict[str, Any]:
    entry = {"type": "file", "oid": blob.oid, "size": len(blob.content), "path": path}
    return entry | ({"lfs": {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 134}} if blob.lfs else {})


def _slashes(path: str) -> list[int]:
    return [i for i, character in enumerate(path) if character == "/"]


def _metadata_errors(card: str) -> Iterator[str]:
    """Return the part of a card's metadata that the Hub would not accept."""
    found = re.match(r"\s*---\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", card, re.DOTALL)
    try:
        data = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError as error:
        yield f"YAML: {error}"
        return
    if not isinstance(data, dict):
        yield "the metadata is no mapping"
        return
    for key in ("tags", "datasets", "base_model"):
        values = data.get(key, [])
        if not all(isinstance(value, str) for value in ([values] if isinstance(values, str) else values)):
            yield f'"{key}" must be an array of strings'
    for value in data.get("base_model", []):
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", value):
            yield f'"base_model" with value {value!r} is not valid'
    if "license" in data and not re.fullmatch(r"[a-z0-9.-]+", str(data["license"])):
        yield '"license" must be one of the known licences'
    for model in data.get("model-index", []):
        if not isinstance(model.get("name"), str):
            yield '"model-index[0].name" is required'
        for result in model.get("results", []):
            for part, keys in (("task", ("type",)), ("dataset", ("type", "name"))):
                for key in keys:
                    if not isinstance(result.get(part, {}).get(key), str):
                        yield f'"model-index[0].results.{part}.{key}" is required'
            for metric in result.get("metrics", []):
                if not isinstance(metric.get("type"), str) or "value" not in metric:
                    yield '"model-index[0].results.metrics" needs type and value'


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Run a Hub on the loopback interface during the block."""
    hub = Hub()
    handler = type("HubHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.handle_error = lambda request, client_address: None  # a client that went away
    hub.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def main() -> None:
    """Serve one account until the standard input ends, so that no server outlives the process that started it."""
    with running_hub() as hub:
        hub.accounts[sys.argv[1]] = Account("me")
        print(hub.url, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
