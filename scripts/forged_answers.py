"""Ask a forged Hub on this machine for dictionaries, and say what came of it.

    python scripts/forged_answers.py --runs 2000 --seed 0

Each run starts from the right answers of a Hub that has one dictionary and changes one to three of them: a value of the JSON,
a header, a name, the content of a file, or how it is sent. The dictionary is then pulled, described, or compared for a push.
A run must end within 10 s with the dictionary itself or an error of saelens_lite, take less than 1 GiB of memory, write
nothing outside of its own folder, and send the token to nobody else. Exits with 1 if one does not.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock
from urllib.parse import unquote, urlsplit

REPO, COMMIT, TOKEN = "me/dictionaries", "0123456789abcdef0123456789abcdef01234567", "hf_tokenthatnobodymaysee"
SECONDS, MEMORY = 10, 1 << 30
STRINGS = [
    "", ".", "..", "../../../../outside", "/outside", "a/../../outside", "a//b", "a\0b", "a\\..\\..\\outside", "C:\\outside",
    "C:outside", "\\\\host\\share", "x" * 5000, "a/" * 2000 + "b", "\u202egnp.exe", "\x1b[2J", "con", "café\u0301", "~", "-rf",
    "${HOME}", "%2e%2e%2foutside", "a\r\nX: y", ".lock", "0" * 39, "g" * 40, COMMIT.upper(), "file:///etc/passwd", "\ud800",
]  # fmt: skip
NUMBERS = [-1, 0, 1, 2**31, 2**63, 2**70, 10**400, 1.5, 1e308, float("nan"), float("inf"), True]
METADATA = {
    "deep": "a: " + "[" * 5000,
    "deep block": "\n".join("  " * i + "a:" for i in range(500)),
    "bomb": "a: &a [x, x]\n" + "\n".join(f"{chr(98 + i)}: &{chr(98 + i)} [{f'*{chr(97 + i)}, ' * 9}]" for i in range(20)),
    "python": "a: !!python/object/apply:os.system [touch outside]",
    "list": "- a\n- b",
    "numbers": "tags: 7\nbase_model: {a: 1}\ndatasets: [[1]]",
    "index": "model-index: [{name: 1, results: 7}]",
    "control": "a: \x00\x07",
    "long": "tags: [" + "a, " * 300_000 + "]",
    "not yaml": "[not: yaml",
}


@dataclass
class Reply:
    """An answer to be sent; `how`: plain, cut, hang, drip, endless, or without a length."""

    status: int
    headers: dict[str, str]
    body: bytes
    how: str = "plain"


class Request(NamedTuple):
    """Return the kind of a client's question, and the address it went to."""

    kind: str  # info, tree, refs, head, get or other
    path: str
    host: str
    token: bool


Change = Callable[[Reply, random.Random], None]


@dataclass
class Forged:
    """A Hub with one repository, whose answers are changed on the way out."""

    files: dict[str, bytes]
    rng: random.Random
    changes: list[tuple[str, str, Change]] = field(default_factory=list)  # the kind of question, a name, and the change
    times: Counter = field(default_factory=Counter)
    requests: list[Request] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    url: str = ""

    def entry(self, path: str) -> dict[str, Any]:
        """Return a file in the listing."""
        content = self.files[path]
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        entry = {"type": "file", "oid": oid, "size": len(content), "path": path}
        if path.endswith(".safetensors"):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        return entry

    def right(self, method: str, path: str) -> tuple[str, Reply]:
        """Return the kind of a question, and its right answer."""
        parts = urlsplit(path)
        place = unquote(parts.path)
        if place.startswith(f"/api/models/{REPO}/tree/"):
            return "tree", _json([self.entry(name) for name in sorted(self.files)])
        if place.startswith(f"/api/models/{REPO}/refs"):
            return "refs", _json({"branches": [{"name": "main", "ref": "refs/heads/main", "targetCommit": COMMIT}], "tags": []})
        if place.startswith(f"/api/models/{REPO}"):
            return "info", _json(
                {"id": REPO, "sha": COMMIT, "private": False, "siblings": [{"rfilename": n} for n in self.files]}
            )
        name = place.removeprefix(f"/{REPO}/resolve/{COMMIT}/")
        large = place.removeprefix("/cdn/") if place.startswith("/cdn/") else None
        if large in self.files:
            return "get", Reply(200, {"ETag": '"anything"'}, self.files[large])
        if name not in self.files:
            return "other", Reply(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b"")
        entry = self.entry(name)
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{entry["oid"]}"'}
        if "lfs" in entry:
            linked = {"X-Linked-Etag": f'"{entry["lfs"]["oid"]}"', "X-Linked-Size": str(entry["size"])}
            location = {"Location": f"{self.url.replace('127.0.0.1', 'localhost')}/cdn/{name}"}
            return method.lower(), Reply(302, headers | linked | location, b"")
        return method.lower(), Reply(200, headers, self.files[name])

    def answer(self, method: str, path: str, host: str, token: bool) -> Reply:
        """Return the answer to a question, changed where that was ordered."""
        kind, reply = self.right(method, path)
        self.requests.append(Request(kind, path, host, token))
        for wanted, _, change in self.changes:
            if wanted == kind:
                change(reply, self.rng)
        return reply


def _json(value: Any) -> Reply:
    return Reply(200, {"Content-Type": "application/json"}, json.dumps(value).encode())


# --- changes ----------------------------------------------------------------------------------------------------------


def any_value(rng: random.Random) -> Any:
    """Return a value that should not be there."""
    deep: Any = []
    for _ in range(rng.choice([1, 60, 300])):
        deep = [deep]
    return rng.choice([None, rng.choice(NUMBERS), rng.choice(STRINGS), rng.choice(STRINGS), [], {}, deep, {"a": deep}])


def change_value(reply: Reply, rng: random.Random) -> None:
    """Change a value somewhere in the JSON, or drop a key."""
    value = json.loads(reply.body)
    places: list[tuple[Any, Any]] = []

    def walk(inner: Any) -> None:
        for key in inner if isinstance(inner, dict) else range(len(inner)):
            places.append((inner, key))
            if isinstance(inner[key], dict | list):
                walk(inner[key])

    walk(value)
    inner, key = rng.choice(places)
    if rng.random() < 0.2:
        del inner[key]
    elif rng.random() < 0.15 and isinstance(inner, list):
        inner += [inner[key]] * rng.choice([1, 3000])
    else:
        inner[key] = any_value(rng)
    reply.body = json.dumps(value).encode("utf-8", "surrogatepass")


def change_name(reply: Reply, rng: random.Random) -> None:
    """Add a file with a forbidden name, or rename one."""
    entries = json.loads(reply.body)
    new = dict(rng.choice(entries))
    folder, _, name = new["path"].rpartition("/")
    new["path"] = rng.choice(
        [rng.choice(STRINGS), f"{folder}/{rng.choice(STRINGS)}.json", new["path"].upper(), new["path"], name]
    )
    if rng.random() < 0.5:
        entries[rng.randrange(len(entries))] = new
    else:
        entries.append(new)
    reply.body = json.dumps(entries).encode()


def change_body(reply: Reply, rng: random.Random) -> None:
    """Replace or damage the body."""
    body = bytearray(reply.body or b"{}")
    body[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
    reply.body = rng.choice([
        bytes(body), bytes(body), reply.body[: rng.randrange(len(reply.body) + 1)], b"", b"null", b"[]", b"{}", b"7", b'"x"',
        b"<!doctype html><html>Please log in</html>", b"\xff\xfe\x00" * 50, b"[" * 200_000, b'{"a":' * 50_000, b"NaN",
        b"[" + b"[]," * 3_000_000 + b"[]]", b" " * 20_000_000, reply.body * 2,
    ])  # fmt: skip


def change_header(reply: Reply, rng: random.Random) -> None:
    """Forge, damage or drop a header."""
    text = rng.choice(STRINGS).encode("ascii", "replace").decode().replace("\r", "").replace("\n", "")
    name = rng.choice(["ETag", "X-Linked-Etag", "X-Linked-Size", "X-Repo-Commit", "Content-Type", "Location", "X-Error-Code"])
    if name in reply.headers and rng.random() < 0.25:
        del reply.headers[name]
        return
    commits = [text, "f" * 40, "../../outside", COMMIT + "/..", ".."]
    sizes = ["-1", "0", "99999999999999999999", "1e9", text, "null"]
    reply.headers[name] = rng.choice({
        "ETag": [f'"{text}"', text, '"../../../outside"', 'W/"../outside"', '"a/b"', '".."', '""'],
        "X-Linked-Etag": [f'"{text}"', '"../../../outside"', '"/outside"', f'"{"e" * 4000}"'],
        "X-Repo-Commit": commits, "X-Linked-Size": sizes, "Content-Type": ["text/html", text],
        "X-Error-Code": ["GatedRepo", text],
        "Location": ["/", text, "file:///etc/passwd", "//localhost/x", "http://[", "http://localhost:1/x", "gopher://x/"],
    }[name])  # fmt: skip
    if name == "Location":
        reply.status = rng.choice([301, 302, 307, 308])


def change_length(reply: Reply, rng: random.Random) -> None:
    """Forge the length, the encoding or the range."""
    header, values = rng.choice([
        ("Content-Length", ["-1", "99999999999", "x", "0", str(len(reply.body) + 100), str(max(0, len(reply.body) - 3))]),
        ("Content-Encoding", ["gzip", "br", "x" * 100]),
        ("Content-Range", ["bytes 0-1/99999999999", "x", "bytes */*"]),
    ])  # fmt: skip
    reply.headers[header] = rng.choice(values)
    if header == "Content-Range":
        reply.status = 206


def change_status(reply: Reply, rng: random.Random) -> None:
    """Change the status, with or without a request to wait."""
    reply.status = rng.choice([204, 206, 304, 400, 401, 403, 404, 409, 416, 418, 429, 429, 500, 502, 503])
    wait = rng.choice([{}, {"Retry-After": "1000000000"}, {"Retry-After": "x"}, {"ratelimit": '"api";r=0;t=1000000000'}])
    reply.headers |= wait | rng.choice([{}, {"X-Error-Message": rng.choice(["no", "\x1b[2J"])}])
    if rng.random() < 0.5:
        change_body(reply, rng)


def change_way(reply: Reply, rng: random.Random) -> None:
    """Send the right answer in a wrong way."""
    reply.how = rng.choice(["cut", "hang", "drip", "endless", "without a length"])


def change_link(reply: Reply, rng: random.Random) -> None:
    """Forge the next page of a listing: at another host, without end, or useless."""
    here = f"/api/models/{REPO}/tree/{COMMIT}?recursive=true"
    link = rng.choice([
        "http://localhost:1/x", "https://evil.invalid/x", f"{here}&cursor={rng.random()}", here, "//evil.invalid/", "file:///x",
        "http://[", "", "/other?cursor=1",
    ])  # fmt: skip
    reply.headers["Link"] = f'<{link}>; rel="next"'
    if rng.random() < 0.5:
        reply.body = b"[]"


JSON_CHANGES = (change_value, change_value, change_body, change_status, change_length, change_way)
CHANGES: dict[str, tuple[Change, ...]] = {
    "info": JSON_CHANGES,
    "tree": (*JSON_CHANGES, change_name, change_name, change_link),
    "head": (change_header, change_header, change_header, change_status, change_length, change_way),
    "get": (change_body, change_body, change_status, change_length, change_way, change_header),
    "refs": (change_value, change_body),
    "other": (change_header, change_status),
}
WEIGHTS = {"info": 3, "tree": 5, "head": 6, "get": 5, "refs": 1, "other": 1}


def change_files(forged: Forged, rng: random.Random) -> str:
    """Other contents, which the listing announces rightly; returns what was changed."""
    path = rng.choice(sorted(forged.files))
    reply = Reply(200, {}, forged.files[path])
    if path.endswith("README.md"):
        name = rng.choice(sorted(METADATA))
        reply.body = f"---\n{METADATA[name]}\n---\n# x\n".encode()
    elif path.endswith(".json") and rng.random() < 0.8:
        change_value(reply, rng)
    else:
        change_body(reply, rng)
    forged.files[path] = reply.body
    return "contents"


# --- the server -------------------------------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    """One connection; `forged` is the Hub of the current run."""

    protocol_version = "HTTP/1.1"
    forged: Forged

    def do_GET(self) -> None:
        self._serve("GET")

    def do_HEAD(self) -> None:
        self._serve("HEAD")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._serve("POST")

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _serve(self, method: str) -> None:
        forged = type(self).forged
        host = (self.headers.get("Host") or "").partition(":")[0]
        reply = forged.answer(method, self.path, host, TOKEN in (self.headers.get("Authorization") or ""))
        if reply.how == "hang":
            forged.ended.wait(SECONDS + 2)
            self.close_connection = True
            return
        self.send_response(reply.status)
        length = {} if reply.how in ("endless", "without a length") else {"Content-Length": str(len(reply.body))}
        for name, value in (length | reply.headers).items():
            self.send_header(name, value.encode("latin-1", "replace").decode("latin-1"))
        self.close_connection = True
        self.send_header("Connection", "close")
        self.end_headers()
        if method != "HEAD":
            for piece in self._pieces(reply, forged):
                self.wfile.write(piece)

    @staticmethod
    def _pieces(reply: Reply, forged: Forged) -> Iterator[bytes]:
        """Yield the body, as it is sent."""
        if reply.how == "endless":
            while not forged.ended.is_set():
                yield reply.body or b"x" * 65_536
        elif reply.how == "drip":
            for byte in reply.body:
                if forged.ended.wait(0.2):
                    return
                yield bytes([byte])
        else:
            yield reply.body[: len(reply.body) // 2] if reply.how == "cut" else reply.body


@contextmanager
def serving() -> Iterator[tuple[type[Handler], str]]:
    """Run a server on the loopback interface. Yield its handler, which learns of each Hub, and its address."""
    handler = type("ForgedHandler", (Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads, server.block_on_close = True, False
    server.handle_error = lambda request, client_address: None  # a client that went away
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield handler, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


# --- what is watched --------------------------------------------------------------------------------------------------


WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
ON_ONE_PATH = ("os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "shutil.rmtree")


def _touched(event: str, args: tuple) -> list[tuple[Any, str]]:
    """Return the paths that an event of the interpreter changes, and the folders that they are relative to."""
    if event == "open":
        return [(args[0], "")] if args[2] & WRITES and isinstance(args[0], str | bytes) else []
    if event in ON_ONE_PATH:
        return [(args[0], _opened(args[-1]))] if isinstance(args[0], str | bytes | os.PathLike) else []
    if event in ("os.rename", "os.link"):
        return [(args[0], _opened(args[2])), (args[1], _opened(args[3]))]
    if event == "os.symlink":
        return [(args[1], ""), (args[0], os.path.dirname(os.fsdecode(args[1])))]
    return []


def _opened(descriptor: Any) -> str:
    """Return the folder that a descriptor stands for; of the working folder, an empty path."""
    is_one = isinstance(descriptor, int) and descriptor > 2
    return os.readlink(f"/proc/self/fd/{descriptor}") if is_one and os.path.exists(f"/proc/self/fd/{descriptor}") else ""


class Watch:
    """The paths that the process writes, removes or moves, as the interpreter's audit hook reports them."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.outside: list[str] = []
        self._installed = False

    def _hook(self, event: str, args: tuple) -> None:
        if self.folder is None:
            return
        for path, folder in _touched(event, args):
            place = os.path.abspath(os.path.join(folder, os.fsdecode(path)))
            place = os.path.join(os.path.realpath(os.path.dirname(place)), os.path.basename(place))
            if place != "/dev/null" and not Path(place).is_relative_to(self.folder):
                self.outside.append(f"{event} {place}")

    @contextmanager
    def only(self, folder: Path) -> Iterator[list[str]]:
        """Record in the list everything that happens outside of a folder during the block."""
        if not self._installed:
            sys.addaudithook(self._hook)
            self._installed = True
        self.folder, self.outside = folder.resolve(), []
        try:
            yield self.outside
        finally:
            self.folder = None


WATCH = Watch()


class TooLong(BaseException):
    """The time of a run is over."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TooLong in a block that takes longer."""

    def ring(*_: Any) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def memory(reset: bool = False) -> int:
    """Return the most memory the process had since the last reset, in bytes; 0 where the system does not say."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) << 10
    except (OSError, IndexError):
        return 0


@contextmanager
def client_of(url: str, cache: Path) -> Iterator[None]:
    """Make huggingface_hub in the block use a server, a cache folder and short timeouts."""
    from huggingface_hub import close_session, constants, file_download
    from huggingface_hub.utils import _http

    from saelens_lite.hub_client import guard, listing

    no_waiting = SimpleNamespace(sleep=lambda _: None, monotonic=time.monotonic, time=time.time)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    changed = {
        constants: {
            "ENDPOINT": url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_XET": True,
            "HF_TOKEN_PATH": str(cache / "no-token"),
        },
        _http: {"time": no_waiting}, file_download: {"time": no_waiting}, listing: {"SECONDS_TO_ANSWER": 0.6},
        guard: {"SECONDS_BETWEEN_BYTES": 0.6, "GRACE_SECONDS": 2},
    }  # fmt: skip
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, {"HF_TOKEN": TOKEN}))
        for module, values in changed.items():
            for name, value in values.items():
                stack.enter_context(mock.patch.object(module, name, value))
        stack.callback(close_session)
        yield


# --- runs -------------------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """The changes, the question and its end; `fault` is empty where it ended well."""

    changes: str
    asked: str
    said: str
    fault: str
    seconds: float
    n_bytes: int


def true_files(folder: Path) -> dict[str, bytes]:
    """Return the files of a repository that holds a dictionary and its card."""
    import saelens_lite as sl
    from saelens_lite.hub import write_card

    d = sl.Dictionary.create(
        "topk", reads=sl.Port(hook="blocks.1.hook_resid_pre", width=8), d_sae=32, origin=sl.Origin(model="gpt2")
    )
    made = d.save(folder / "made")
    write_card(made, d)
    files = {f"a/{path.name}": path.read_bytes() for path in sorted(made.iterdir()) if path.suffix in (".json", ".safetensors")}
    return files | {"README.md": b"---\ntags:\n- mine\n---\n# mine\n", "a/README.md": (made / "README.md").read_bytes()}


def forged_run(number: int, seed: int, files: dict[str, bytes], handler: type[Handler], url: str, scratch: Path) -> Outcome:
    """Return one run; `files` are the right ones."""
    rng = random.Random(f"{seed} {number}")
    forged = Forged(dict(files), rng, url=url)
    names = []
    for _ in range(rng.choice([0, 1, 1, 1, 1, 2, 3]) if number else 0):
        if rng.random() < 0.2:
            names.append(change_files(forged, rng))
        else:
            kind = rng.choices(list(CHANGES), weights=[WEIGHTS[kind] for kind in CHANGES])[0]
            change = rng.choice(CHANGES[kind])
            names.append(f"{kind}: {change.__name__.removeprefix('change_')}")
            forged.changes.append((kind, names[-1], change))
    asked = rng.choice(["pull", "pull", "pull", "describe", "push"])
    handler.forged = forged
    folder = scratch / str(number)
    (folder / "tmp").mkdir(parents=True)
    before, start = memory(reset=True), time.monotonic()
    with (
        client_of(url, folder / "cache"),
        mock.patch.object(tempfile, "tempdir", str(folder / "tmp")),
        WATCH.only(folder) as out,
    ):
        said, fault = attempt(asked, forged, files)
    seconds, n_bytes = time.monotonic() - start, max(0, memory() - before)
    forged.ended.set()
    if out:
        fault = f"outside: {out[0]}"
    elif elsewhere := {request.host for request in forged.requests if request.token and request.host != "127.0.0.1"}:
        fault = f"the token went to {elsewhere}"
    elif n_bytes > MEMORY:
        fault = f"{n_bytes >> 20} MiB"
    shutil.rmtree(folder)
    return Outcome(" + ".join(sorted(names)) or "nothing", asked, said, fault, seconds, n_bytes)


def attempt(asked: str, forged: Forged, files: dict[str, bytes]) -> tuple[str, str]:
    """Return the end of a question, and what is wrong with it."""
    import torch

    import saelens_lite as sl
    from saelens_lite.errors import SaelensLiteError
    from saelens_lite.hub import describe

    try:
        with time_limit(SECONDS):
            if asked == "pull":
                d = sl.pull(REPO, "a")
                weights = files["a/sae_weights.safetensors"]
                same = (
                    forged.files["a/sae_weights.safetensors"] == weights and forged.files["a/cfg.json"] == files["a/cfg.json"]
                )
                right = torch.equal(d.W_dec, true_weights(weights)) if same else bool(torch.isfinite(d.W_dec).all())
                return ("right", "") if right else ("wrong", "another dictionary")
            if asked == "describe":
                describe(f"hf://{REPO}/a")
            else:
                sl.push({"b": sl.Dictionary.create("topk", reads=4, d_sae=8)}, REPO, dry_run=True)
            return "right", ""
    except SaelensLiteError as error:
        text = str(error)
        bad = "the token in a message" if TOKEN in text else "" if text.isprintable() else "control characters in a message"
        return type(error).__name__, bad
    except TooLong:
        return "no end", f"more than {SECONDS} s"
    except Exception as error:
        return type(error).__name__, f"untyped: {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def true_weights(content: bytes) -> Any:
    """W_dec in the bytes of a dictionary."""
    from safetensors.torch import load

    return load(content)["W_dec"]


def outcomes(numbers: range | list[int], seed: int) -> Iterator[tuple[int, Outcome]]:
    """Yield the outcomes of some runs; run 0 is without a change, and goes first for whatever is loaded or cached once."""
    with tempfile.TemporaryDirectory() as folder, serving() as (handler, url):
        scratch = Path(folder).resolve()
        files = true_files(scratch)
        for _ in range(3):
            handler.forged = Forged(dict(files), random.Random(0), url=url)
            with client_of(url, scratch / "warm"):
                for asked in ("pull", "describe", "push"):
                    attempt(asked, handler.forged, files)
        for number in numbers:
            yield number, forged_run(number, seed, files, handler, url, scratch)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    table: dict[str, list[Outcome]] = defaultdict(list)
    faults = []
    for number, outcome in outcomes(range(asked.runs), asked.seed):
        for name in set(outcome.changes.split(" + ")):
            table[name].append(outcome)
        if outcome.fault:
            faults.append(f"run {number}, {outcome.asked}, {outcome.changes}: {outcome.said}: {outcome.fault}")
            print(faults[-1], file=sys.stderr, flush=True)
    print("| changed | runs | right | typed errors | faults | slowest, s | most memory, MiB |")
    print("| --- | ---: | ---: | --- | ---: | ---: | ---: |")
    for name, found in sorted(table.items()):
        said = Counter(o.said for o in found if o.said != "right" and not o.fault).most_common()
        cells = [len(found), sum(o.said == "right" for o in found), ", ".join(f"{n} {what}" for what, n in said)]
        cells += [sum(bool(o.fault) for o in found), f"{max(o.seconds for o in found):.1f}"]
        print(f"| {name} | {' | '.join(map(str, cells))} | {max(o.n_bytes for o in found) >> 20} |")
    print(f"\n{asked.runs} runs, {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
