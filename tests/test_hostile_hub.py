"""A Hub that answers as none should: what is forged is refused in time, and nothing goes where it does not belong."""

import importlib.util
import json
import random
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, try_to_load_from_cache

import saelens_lite as sl
from saelens_lite.errors import CorruptFileError, HubError, HubNotFoundError, HubUnreachableError, SaelensLiteError
from saelens_lite.hub import describe, fetch
from saelens_lite.hub.index import _check_metadata
from saelens_lite.hub_client import guard, listing

SCRIPT = Path(__file__).parents[1] / "scripts/forged_answers.py"
pytestmark = pytest.mark.filterwarnings("ignore:Not enough free disk space:UserWarning")  # of a size that was forged
WEIGHTS, CFG = "a/sae_weights.safetensors", "a/cfg.json"


@pytest.fixture(scope="module")
def forging():
    """The script that forges answers, as a module."""
    spec = importlib.util.spec_from_file_location("forged_answers", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["forged_answers"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["forged_answers"]


@pytest.fixture(scope="module")
def files(forging, tmp_path_factory):
    return forging.true_files(tmp_path_factory.mktemp("true"))


@pytest.fixture
def hub(forging, files, tmp_path, monkeypatch):
    """A Hub with one dictionary that can be told what to forge; whatever is written outside of the folder is an error."""
    folder = tmp_path / "home"
    folder.mkdir()
    with forging.serving() as (handler, url):
        forged = forging.Forged(dict(files), random.Random(0), url=url)
        handler.forged = forged
        forged.cache = folder / "cache"
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        with forging.client_of(url, forged.cache), forging.WATCH.only(folder) as outside, forging.time_limit(30):
            yield forged
        forged.ended.set()
        assert outside == []
        assert {request.host for request in forged.requests if request.token} <= {"127.0.0.1"}


REPO, COMMIT = "me/dictionaries", "0123456789abcdef0123456789abcdef01234567"


def forge(hub, kind: str, change) -> None:
    """Have answers of a kind changed by a function of them."""
    hub.changes.append((kind, "", lambda reply, _: change(reply)))


def forge_json(hub, kind: str, change) -> None:
    """Have the JSON of answers of a kind changed in place."""

    def changed(reply) -> None:
        value = json.loads(reply.body)
        reply.body = json.dumps(change(value) or value).encode()

    forge(hub, kind, changed)


def refused(match: str, error: type[SaelensLiteError] = HubError) -> SaelensLiteError:
    with pytest.raises(error, match=match) as caught:
        sl.pull(REPO, "a")
    assert str(caught.value).isprintable()
    return caught.value


def cached(hub) -> list[str]:
    return sorted(str(path.relative_to(hub.cache)) for path in hub.cache.rglob("*") if path.is_file())


def test_the_right_answers_are_taken(hub, files):
    d = sl.pull(REPO, "a")
    assert d.source == f"hf://{REPO}/a@{COMMIT}"
    assert (fetch(f"hf://{REPO}/a").folder / "sae_weights.safetensors").read_bytes() == files[WEIGHTS]
    assert describe(f"hf://{REPO}/a")["d_sae"] == 32
    hub.changes.append(("info", "", lambda reply, _: setattr(reply, "status", 500)))
    assert torch.equal(sl.pull(REPO, "a").W_dec, d.W_dec)  # from the cache, by the name of the branch


# --- names that would become paths ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", ["ETag", "X-Linked-Etag"])
@pytest.mark.parametrize("etag", ['"../../../outside"', '"/outside"', 'W/"../x"', '".."', '""', '"a\\b"', f'"{"e" * 300}"'])
def test_an_etag_that_is_a_path(hub, header, etag):
    forge(hub, "head", lambda reply: reply.headers.update({header: etag}))
    refused("the Hub sends the ETag .*, which cannot be the name of a file")


@pytest.mark.parametrize("commit", ["../../outside", "f" * 40, COMMIT.upper(), "", "0" * 39])
@pytest.mark.parametrize("status", [200, 404])
def test_a_commit_in_a_header_that_is_another_or_none(hub, commit, status):
    def change(reply) -> None:
        reply.headers |= {"X-Repo-Commit": commit} | ({"X-Error-Code": "EntryNotFound"} if status == 404 else {})
        reply.status = reply.status if status == 200 else status

    forge(hub, "head", change)
    refused(f"the Hub answers with commit .*; expected {COMMIT}")


@pytest.mark.parametrize("commit", ["../../outside", "g" * 40, COMMIT[:39], COMMIT.upper(), None, 7, [COMMIT]])
def test_a_commit_that_is_none(hub, commit):
    forge_json(hub, "info", lambda info: info.update(sha=commit))
    refused("the endpoint does not answer as a Hub does: sha: ")


def test_another_commit_than_was_asked_for(hub):
    with pytest.raises(HubError, match=f"the Hub answers with commit {COMMIT}; {'f' * 40} was requested"):
        sl.pull(REPO, "a", revision="f" * 40)


@pytest.mark.parametrize("name", ["../x.json", "a/../../x.json", "/etc/x.json", "a//x.json", "a/./x.json", "a/\0.json", "a/"])
def test_names_that_no_repository_can_hold(hub, name):
    forge_json(hub, "tree", lambda entries: entries.append(entries[0] | {"path": name}))
    refused("the Hub lists a file .*, which is not a valid path")


@pytest.mark.parametrize("name", ["a/..\\x.json", "C:x.json", "a/\u202egnp.json", "a/\x1b[2J.json", "a/" + "x" * 256 + ".json"])
def test_names_that_cannot_be_used_here_are_left_out(hub, name, caplog):
    forge_json(hub, "tree", lambda entries: entries.append(entries[0] | {"path": name}))
    assert sl.pull(REPO, "a").d_sae == 32
    assert "skipped 1 files whose names cannot be used here" in caplog.text
    assert not [request for request in hub.requests if request.kind == "other"]


def test_names_that_come_twice_or_differ_only_in_case(hub):
    forge_json(hub, "tree", lambda entries: entries.append(entries[-1]))
    refused("the Hub lists 'a/sparsity.safetensors' twice|the Hub lists 'a/sae_weights.safetensors' twice")
    hub.changes.clear()
    forge_json(hub, "tree", lambda entries: entries.append(entries[1] | {"path": "a/CFG.json"}))
    refused("has files whose names differ only in case")


def test_a_link_out_of_the_cache_is_noticed(hub, tmp_path):
    path = fetch(f"hf://{REPO}/a").folder / "cfg.json"
    stranger = tmp_path / "home/stranger.json"
    stranger.write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(stranger)
    refused(r"cfg\.json leads out of the cache, to ")
    assert stranger.exists()


# --- where the token goes ------------------------------------------------------------------------------------------------


def test_a_listing_that_goes_on_at_another_host(hub):
    other = hub.url.replace("127.0.0.1", "localhost")
    forge(hub, "tree", lambda reply: reply.headers.update(Link=f'<{other}/api/models/{REPO}/tree/x>; rel="next"'))
    refused("the list of its files continues at another host, 'localhost'")
    assert not [request for request in hub.requests if request.host == "localhost"]


@pytest.mark.parametrize("kind", ["info", "tree"])
def test_a_redirect_to_another_host_gets_no_token(hub, kind):
    other = hub.url.replace("127.0.0.1", "localhost")

    def change(reply) -> None:
        if hub.requests[-1].host != "localhost":
            reply.status, reply.headers["Location"] = 307, other + hub.requests[-1].path

    forge(hub, kind, change)
    assert sl.pull(REPO, "a").d_sae == 32
    assert kind in {request.kind for request in hub.requests if request.host == "localhost"}


def test_the_guard_lets_no_request_take_the_token_elsewhere(hub):
    api = guard.guarded_client(guard.Guard(REPO))
    for url in (hub.url.replace("127.0.0.1", "localhost"), "http://127.0.0.1:1"):
        with pytest.raises(HubError, match="asks to send the token to"):
            HfApi(endpoint=url, headers=api.headers).model_info(REPO)
    assert not [request for request in hub.requests if request.host == "localhost"]


def test_an_encrypted_connection_is_not_left(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://127.0.0.1:1")
    api = guard.guarded_client(guard.Guard(REPO))
    with pytest.raises(HubError, match="leads to an address without encryption"):
        HfApi(endpoint=hub.url, token=False, headers=api.headers).model_info(REPO)


def test_requests_of_others_are_left_alone(hub):
    """The hooks are in the client that all share."""
    sl.pull(REPO, "a")
    n = len(hub.requests)
    forge(hub, "info", lambda reply: reply.headers.update({"X-Repo-Commit": "elsewhere"}))
    assert HfApi().model_info(REPO).sha == COMMIT
    assert len(hub.requests) == n + 1


# --- how much may come ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [WEIGHTS, CFG])
@pytest.mark.parametrize("announced", [False, True])
def test_more_than_the_listing_says(hub, path, announced):
    """Without an announcement there is no end to it; max_bytes was met by the listing."""

    def change(reply) -> None:
        if hub.requests[-1].path.endswith(path.rpartition("/")[2]):
            reply.how = "plain" if announced else "endless"
            reply.headers |= {"Content-Length": "10000000000"} if announced else {}

    forge(hub, "get", change)
    refused(r"announces 10,000,000,000 bytes; the limit is \d" if announced else r"sends more than the limit of [\d,]+ bytes")
    assert sum(path.stat().st_size for path in hub.cache.rglob("*") if path.is_file()) < 100_000


@pytest.mark.parametrize("kind", ["info", "tree"])
def test_an_answer_without_end(hub, kind):
    forge(hub, kind, lambda reply: setattr(reply, "how", "endless"))
    refused(r"sends more than the limit of [\d,]+ bytes")


@pytest.mark.parametrize("cursor", ["new", "same"])
def test_a_listing_without_end(hub, cursor, monkeypatch):
    monkeypatch.setattr(listing, "MAX_PAGES", 40)
    address = f"/api/models/{REPO}/tree/{COMMIT}?recursive=true&cursor="

    def change(reply) -> None:
        reply.body = b"[]"
        reply.headers["Link"] = f'<{address}{len(hub.requests) if cursor == "new" else 1}>; rel="next"'

    forge(hub, "tree", change)
    refused("does not end after 41 pages" if cursor == "new" else "returns to an earlier page")


def test_a_listing_of_too_many_files(hub, monkeypatch):
    monkeypatch.setattr(listing, "MAX_FILES", 30)
    forge_json(hub, "tree", lambda entries: entries + [entries[0] | {"path": f"x/{i}"} for i in range(30)])
    refused("it has more than 30 files")
    monkeypatch.undo()


@pytest.mark.parametrize("size", [None, -1, 1.5, 2**60, 2**70, "7", True])
def test_sizes_that_are_none(hub, size):
    forge_json(hub, "tree", lambda entries: entries[1].update(size=size))
    refused("the endpoint does not answer as a Hub does: ")


def test_an_answer_of_millions_of_lists_is_not_parsed(hub):
    forge(hub, "info", lambda reply: setattr(reply, "body", b'{"sha": [' + b"[]," * 1_000_000 + b"[]]}"))
    refused("the endpoint answers with more than 300,000 lists and tables, which no Hub does")


def test_two_sizes_of_one_file(hub):
    forge_json(hub, "tree", lambda entries: [e | ({"size": 5} if "lfs" in e else {}) for e in entries])
    refused("the Hub gives two sizes for ")


def test_compressed_content_is_not_unpacked(hub):
    forge(hub, "get", lambda reply: reply.headers.update({"Content-Encoding": "gzip"}))
    refused("the Hub sends the encoding 'gzip'")


# --- what it says --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["info", "tree"])
@pytest.mark.parametrize(
    "body",
    [
        b"", b"null", b"7", b"<!doctype html>", b"\xff\xfe", b"[" * 200_000, b'{"a":' * 50_000, b'{"sha": ', b"[NaN]",
        b'[{"type": "file"}]', b'["file"]', b"[[]]",
    ],
    ids=lambda body: repr(body[:12]),
)  # fmt: skip
def test_answers_that_are_not_those_of_a_hub(hub, kind, body):
    forge(hub, kind, lambda reply: setattr(reply, "body", body))
    refused("the endpoint does not answer as a Hub does: .*; is HF_ENDPOINT right?")


@pytest.mark.parametrize("path", [WEIGHTS, CFG])
def test_other_contents_than_the_listing_says_are_not_kept(hub, path, files):
    """Of the same size, from the Hub itself or from where it stores large files."""

    def change(reply) -> None:
        if hub.requests[-1].path.endswith(path.rpartition("/")[2]):
            reply.body = reply.body[:-1] + bytes([reply.body[-1] ^ 1])

    forge(hub, "get", change)
    refused("does not match the hash that the Hub lists, so it was deleted")
    assert not isinstance(try_to_load_from_cache(REPO, path, revision=COMMIT), str)
    hub.changes.clear()
    sl.pull(REPO, "a")
    assert (fetch(f"hf://{REPO}/a").folder / path.rpartition("/")[2]).read_bytes() == files[path]
    blobs = [(hub.cache / name).read_bytes() for name in cached(hub) if "/blobs/" in name]
    assert sorted(map(len, blobs)) == sorted(len(files[name]) for name in files if name.startswith("a/"))


def test_what_was_there_stays_when_a_pull_fails(hub, tmp_path, command):
    out = tmp_path / "home/mine"
    assert command("pull", REPO, "a", "--out", out)[0] == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    hub.changes.append(("head", "", lambda reply, _: reply.headers.update({"ETag": '"../x"'})))
    for path in hub.cache.rglob("*"):
        path.unlink() if path.is_symlink() else None
    code, _, err = command("pull", REPO, "a", "--out", out, "--exists", "overwrite")
    assert code == 1, err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (401, SaelensLiteError), (403, SaelensLiteError), (404, HubNotFoundError), (429, HubUnreachableError),
        (500, HubUnreachableError), (503, HubUnreachableError),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["info", "tree", "head", "get"])
def test_each_status_is_an_error_of_its_kind(hub, kind, status, error):
    code = {"X-Error-Code": "RepoNotFound" if kind == "info" else "EntryNotFound"} if status == 404 else {}

    def change(reply) -> None:
        reply.status, reply.headers, reply.body = status, {"X-Repo-Commit": COMMIT} | code, b"<html>"

    forge(hub, kind, change)
    with pytest.raises(HubError) as caught:
        sl.pull(REPO, "a")
    if status != 404:
        assert isinstance(caught.value, error)


def test_a_message_of_the_hub_is_shown_without_control_characters(hub):
    def change(reply) -> None:
        reply.status, reply.headers["X-Error-Message"] = 403, "no\x1b[2J\u202e".encode().decode("latin-1")

    forge(hub, "info", change)
    refused("this token may not do that")


# --- how long it takes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["hang", "drip"])
@pytest.mark.parametrize("kind", ["info", "tree", "get"])
def test_a_hub_that_hangs_or_drips(hub, kind, how):
    forge(hub, kind, lambda reply: setattr(reply, "how", how))
    refused("cannot be reached|in .* seconds; try again", HubUnreachableError)


@pytest.mark.parametrize("header", [{"Retry-After": "1000000000"}, {"ratelimit": '"api";r=0;t=1000000000'}])
def test_a_hub_that_asks_to_wait_for_years(hub, header):
    def change(reply) -> None:
        reply.status, reply.headers = 429, header

    forge(hub, "tree", change)
    refused("the Hub asks to wait 1,000,000,000 seconds", HubUnreachableError)


# --- the card of a repository --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["deep", "deep block", "bomb", "python", "control", "long", "not yaml"])
def test_metadata_of_a_card_that_would_be_a_trap(hub, forging, name):
    hub.files["README.md"] = f"---\n{forging.METADATA[name]}\n---\n# x\n".encode()
    with pytest.raises(HubError, match=r"the metadata of its README\.md cannot be read; mend it on the Hub first"):
        sl.push({"b": sl.Dictionary.create("topk", reads=4, d_sae=8)}, REPO, dry_run=True)


def test_metadata_that_is_usual_is_read(files):
    for path in ("README.md", "a/README.md"):
        _check_metadata(files[path].decode(), REPO)
    _check_metadata("# no metadata\n---\n*a\n---", REPO)


def test_headers_of_a_file_that_is_no_tensors(hub):
    hub.files[WEIGHTS] = b"\xff" * 100
    with pytest.raises(CorruptFileError, match="does not have the header of a safetensors file"):
        describe(f"hf://{REPO}/a")
    header = b'{"a": ' * 2000
    hub.files[WEIGHTS] = len(header).to_bytes(8, "little") + header
    with pytest.raises(CorruptFileError, match="does not have the header of a safetensors file"):
        describe(f"hf://{REPO}/a")


# --- at random -----------------------------------------------------------------------------------------------------------


def test_forged_answers_at_random(forging):
    """A sample of what scripts/forged_answers.py does at length."""
    found = [outcome for _, outcome in forging.outcomes(list(range(0, 2000, 50)), seed=0)]
    assert [outcome for outcome in found if outcome.fault] == []
    said = {outcome.said for outcome in found}
    assert {"right", "HubError", "HubUnreachableError"} <= said


def test_a_forged_run_can_fail(forging, monkeypatch):
    """Without the guard, an ETag leads out of the folder and an answer has no end."""
    monkeypatch.setattr(guard.Guard, "response", lambda self, response: None)

    def escape(reply, _) -> None:
        reply.headers["ETag"] = reply.headers["X-Linked-Etag"] = '"../../../../outside"'

    monkeypatch.setattr(forging, "CHANGES", {"head": (escape,)})
    monkeypatch.setattr(forging, "change_files", lambda forged, rng: "nothing")
    found = [outcome for _, outcome in forging.outcomes(list(range(1, 9)), seed=0)]
    assert [outcome for outcome in found if outcome.fault.startswith("outside: ")]
