"""Labels from Neuronpedia's files, over real HTTP from a local server, and labels with their origin in stores and pages."""

import gzip
import json
import logging
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit
from xml.sax.saxutils import escape

import pytest
import torch

import saelens_lite as sl
from saelens_lite.errors import (
    ConfigError,
    CorruptFileError,
    HubError,
    HubNotFoundError,
    HubUnreachableError,
    OutputExistsError,
    UserError,
)
from saelens_lite.features import explanations
from saelens_lite.features.label import Label
from saelens_lite.files import read_json
from saelens_lite.hub_client import web

D_SAE, ID = 12, "gpt2-small/8-res-jb"
HOSTILE = "<img src=x onerror=alert(1)>\x1b[31m</script>"


def line(index, text, **others) -> bytes:
    """Return a line as Neuronpedia writes it: the index is a text, and an embedding takes most of the bytes."""
    row = {
        "id": f"c{index}", "modelId": "gpt2-small", "layer": "8-res-jb", "index": str(index), "description": text,
        "typeName": "oai_token-act-pair", "explanationModelName": "gpt-4o-mini", "embedding": [0.5] * 256, "scoreV1": 0,
        "createdAt": "2024-06-01T10:00:00.000Z", "authorId": "clkht01d40000jv08hvalcvly", "notes": None,
    }  # fmt: skip
    return json.dumps(row | others).encode() + b"\n"


BATCHES = {
    0: line(0, "dogs") + line(1, "  the word\n license ") + line(2, "") + line(3, None),
    1: line(1, "older", createdAt="2023-01-01 00:00:00.000+00", explanationModelName="claude-3")
    + line(7, "undated", createdAt=None),
    2: line(7, "newest", createdAt="2025-01-01T00:00:00Z", explanationModelName=None, typeName=None, author={"name": "Ann"}),
    10: line(11, "in the eleventh file") + line(11, "same day, later line"),
}  # fmt: skip
WANTED = {0: "dogs", 1: "the word license", 7: "newest", 11: "same day, later line"}


class Bucket:
    """A server of files by path, which lists them as S3 does, two a page."""

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.status: dict[str, list[int]] = {}  # answers to give first, by path
        self.requests: list[str] = []
        self.headers: list[dict[str, str]] = []
        own = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                own.requests.append(self.path)
                own.headers.append(dict(self.headers))
                path = urlsplit(self.path).path
                status, content = own.answer(path.lstrip("/"), parse_qs(urlsplit(self.path).query))
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", content.decode())
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, path: str, query: dict[str, list[str]]) -> tuple[int, bytes]:
        if self.status.get(path):
            status = self.status[path].pop(0)
            return status, f"{self.url}/moved.jsonl".encode() if status == 302 else b"trouble"
        if path in self.files:
            return 200, self.files[path]
        if query.get("list-type") != ["2"]:
            return 404, b"<Error/>"
        names = sorted(name for name in self.files if name.startswith(query["prefix"][0]))
        start = int(query.get("continuation-token", ["0"])[0])
        more = start + 2 < len(names)
        keys = "".join(f"<Contents><Key>{escape(name)}</Key><Size>1</Size></Contents>" for name in names[start : start + 2])
        token = f"<NextContinuationToken>{start + 2}</NextContinuationToken>" if more else ""
        space = 'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'
        page = f"<ListBucketResult {space}><IsTruncated>{str(more).lower()}</IsTruncated>{token}{keys}</ListBucketResult>"
        return 200, page.encode()


@pytest.fixture
def bucket(monkeypatch):
    monkeypatch.setattr(web, "WAITS", (0.01, 0.01))
    bucket = Bucket()
    for number, content in BATCHES.items():
        bucket.files[f"v1/{ID}/explanations/batch-{number}.jsonl.gz"] = gzip.compress(content)
    bucket.files[f"v1/{ID}/explanations/notes & more.txt"] = b"not explanations"
    thread = threading.Thread(target=bucket.server.serve_forever, args=(0.01,))
    thread.start()
    yield bucket
    bucket.server.shutdown()
    bucket.server.server_close()
    thread.join()


def dictionary(neuronpedia=ID) -> sl.Dictionary:
    d = sl.Dictionary.create("topk", reads=sl.Port(hook="blocks.1.hook_resid_pre", width=48), d_sae=D_SAE, options={"k": 3})
    d.training_record["read_from"] = {"neuronpedia": neuronpedia}
    return d


@pytest.fixture(scope="module")
def d():
    return dictionary()


@pytest.fixture(scope="module")
def built(d, random_lm):
    return sl.FeatureStore.build(d, random_lm, ["It was the best of times", "Read the license"], window=(3, 2), top_n=2, seed=0)


@pytest.fixture
def folder(tmp_path):
    """The files of a public source in a local folder; one of them is not packed."""
    (tmp_path / "source/explanations").mkdir(parents=True)
    for number, content in BATCHES.items():
        name = f"batch-{number}.jsonl" + ".gz" * (number > 0)
        (tmp_path / "source/explanations" / name).write_bytes(gzip.compress(content) if number else content)
    return tmp_path / "source"


@pytest.fixture
def store(built, tmp_path):
    return sl.FeatureStore.load(built.save(tmp_path / "store"))


def test_labels_come_from_the_bucket_of_the_dictionarys_own_id(d, bucket, monkeypatch):
    monkeypatch.setattr(explanations, "BUCKET", bucket.url)
    labels = sl.labels.from_neuronpedia(d)
    assert dict(labels) == WANTED
    assert (labels[0].source, labels[0].author) == ("Neuronpedia gpt2-small/8-res-jb", "gpt-4o-mini (oai_token-act-pair)")
    assert labels[7].author == "Ann"
    assert [(str(one), one.author) for one in labels.explanations(1)] == [
        ("the word license", "gpt-4o-mini (oai_token-act-pair)"),
        ("older", "claude-3 (oai_token-act-pair)"),
    ]
    assert labels.explanations(5) == []
    assert dict(labels.search("LICENSE")) == {1: "the word license"}
    assert not any("notes" in path for path in bucket.requests)
    assert not any("uthorization" in name for headers in bucket.headers for name in headers)


@pytest.mark.parametrize("form", ["/v1/{id}/explanations/", "/v1/{id}", "/index.html?prefix=v1/{id}/"])
def test_a_folder_of_a_bucket_is_read_by_its_url(d, bucket, form):
    assert dict(sl.labels.from_neuronpedia(d, bucket.url + form.format(id=ID))) == WANTED


@pytest.mark.parametrize(
    "source", [ID, "https://www.neuronpedia.org/gpt2-small/8-res-jb", "https://neuronpedia.org/gpt2-small/8-res-jb/5"]
)
def test_an_id_and_the_address_of_a_page_lead_to_the_bucket(bucket, monkeypatch, source):
    monkeypatch.setattr(explanations, "BUCKET", bucket.url)
    assert dict(sl.labels.from_neuronpedia(dictionary(None), source)) == WANTED


def test_one_file_of_a_server_is_read_after_a_redirect_and_two_failures(d, bucket):
    bucket.files["one.jsonl"] = bucket.files["moved.jsonl"] = BATCHES[0]
    bucket.status["one.jsonl"] = [503, 429, 302]
    assert dict(sl.labels.from_neuronpedia(d, f"{bucket.url}/one.jsonl")) == {0: "dogs", 1: "the word license"}


def test_a_server_that_fails_or_sends_too_much_is_a_typed_error(d, bucket):
    bucket.files["one.jsonl"] = BATCHES[0]
    bucket.status["one.jsonl"] = [500] * 3
    with pytest.raises(HubUnreachableError, match="answers 500"):
        sl.labels.from_neuronpedia(d, f"{bucket.url}/one.jsonl")
    with pytest.raises(HubNotFoundError, match="does not exist or is not public"):
        sl.labels.from_neuronpedia(d, f"{bucket.url}/two.jsonl")
    with pytest.raises(HubNotFoundError, match="no files of explanations"):
        sl.labels.from_neuronpedia(d, f"{bucket.url}/v1/gpt2-small/9-res-jb/")
    with pytest.raises(HubError, match="more than 100 bytes"):
        list(web.web_files([f"{bucket.url}/one.jsonl"], 100))
    with pytest.raises(HubError, match="does not answer as an S3 bucket does"):
        web._parsed("a server", b"<!DOCTYPE x [<!ENTITY a 'aaaa'>]><x>&a;</x>")
    with pytest.raises(HubError, match="does not answer as an S3 bucket does"):
        web._parsed("a server", b"<html><p></html>")
    bucket.server.shutdown()
    bucket.server.server_close()
    with pytest.raises(HubUnreachableError, match="check the address and the network"):
        sl.labels.from_neuronpedia(d, f"{bucket.url}/one.jsonl")


def test_a_redirect_to_an_address_without_encryption_is_refused(bucket):
    transport = web.HTTPX.MockTransport(
        lambda request: web.HTTPX.Response(302, headers={"Location": f"{bucket.url}/one.jsonl"})
    )
    with web._client() as client:
        client._transport, client._mounts = transport, {}
        with pytest.raises(HubError, match="without encryption, on 127"):
            web._content(client, "https://example.org/one.jsonl", 100)
    assert not bucket.requests


def test_labels_come_from_a_local_folder_and_a_file(d, folder):
    assert dict(sl.labels.from_neuronpedia(d, folder)) == WANTED
    assert dict(sl.labels.from_neuronpedia(d, str(folder / "explanations"))) == WANTED
    assert dict(sl.labels.from_neuronpedia(d, folder / "explanations/batch-2.jsonl.gz")) == {7: "newest"}
    with pytest.raises(CorruptFileError, match="has no files of explanations"):
        sl.labels.from_neuronpedia(d, folder.parent)


def test_labels_of_another_dictionary_are_refused(d, folder, caplog, bucket, monkeypatch):
    file = folder / "batch-11.jsonl"
    file.write_bytes(line(0, "dogs", layer="7-res-jb"))
    with pytest.raises(ConfigError, match="explanations of gpt2-small/7-res-jb; expected those of gpt2-small/8-res-jb"):
        sl.labels.from_neuronpedia(d, file)
    with pytest.raises(ConfigError, match="is gpt2-small/8-res-jb on Neuronpedia; the labels of gpt2-small/7-res-jb are not"):
        sl.labels.from_neuronpedia(d, "gpt2-small/7-res-jb")
    with caplog.at_level(logging.WARNING):
        assert dict(sl.labels.from_neuronpedia(dictionary(None), file)) == {0: "dogs"}
    assert "this dictionary does not say whether it is that one" in caplog.text
    caplog.clear()
    monkeypatch.setattr(explanations, "BUCKET", bucket.url)
    assert dict(sl.labels.from_neuronpedia(dictionary(None), ID)) == WANTED
    assert caplog.text.count("gpt2-small/8-res-jb has labels of gpt2-small/8-res-jb; this dictionary does not say") == 1
    file.write_bytes(line(0, "dogs") + line(1, "cats", modelId="pythia-70m"))
    with pytest.raises(ConfigError, match="explanations of pythia-70m/8-res-jb"):
        sl.labels.from_neuronpedia(dictionary(None), file)
    file.write_bytes(line(D_SAE, "dogs"))
    with pytest.raises(ConfigError, match="explains latent 12; this dictionary has latents 0 to 11"):
        sl.labels.from_neuronpedia(d, file)


@pytest.mark.parametrize("own", [None, "", "../../etc", "a/b/c", "https://evil.example/x", 3, ["a/b"]])
def test_a_dictionary_without_a_valid_id_needs_a_source(own):
    d = dictionary(own)
    for read_from in (d.training_record["read_from"], [own], own):
        d.training_record["read_from"] = read_from
        with pytest.raises(ConfigError, match="does not say its Neuronpedia id"):
            sl.labels.from_neuronpedia(d)


DAMAGED = {
    "not JSON": b"{",
    "a list": b"[]",
    "a negative latent": line("-1", "x"),
    "a latent with a fraction": line(0, "x").replace(b'"0"', b"1.5"),
    "a huge latent": line("9" * 400, "x"),
    "a text that is not one": line(0, ["x"]),
    "deep nesting": b'{"index": 0, "description": "x", "embedding": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a long line": line(0, "x" * (1 << 20)),
    "half a gzip file": gzip.compress(line(0, "x") * 50)[:-30],
    "damaged gzip": gzip.compress(line(0, "x") * 50)[:60] + b"\x00" * 60,
    "bytes that are not text": line(0, "x").replace(b'"x"', b'"\xff\xfe"'),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_damaged_files_are_typed_errors(d, tmp_path, content):
    (tmp_path / "batch-0.jsonl").write_bytes(content)
    with pytest.raises(CorruptFileError, match=r"batch-0\.jsonl"):
        sl.labels.from_neuronpedia(d, tmp_path)


def test_a_gzip_bomb_is_not_unpacked(d, tmp_path, monkeypatch):
    monkeypatch.setattr(explanations, "LEAST_BYTES", 1 << 20)
    bomb = gzip.compress((b" " * 1000 + b"\n") * 20_000)
    assert len(bomb) < 100_000
    (tmp_path / "batch-0.jsonl.gz").write_bytes(bomb)
    with pytest.raises(CorruptFileError, match="holds more text than explanations of these latents can have"):
        sl.labels.from_neuronpedia(d, tmp_path)
    half = gzip.compress((b" " * 1000 + b"\n") * 1000)  # each file is below the limit, and all together are above it
    for number in range(3):
        (tmp_path / f"batch-{number}.jsonl.gz").write_bytes(half)
    with pytest.raises(CorruptFileError, match=r"batch-1.*more text"):
        sl.labels.from_neuronpedia(d, tmp_path)


def test_saved_labels_are_loaded_with_source_and_author(d, folder, tmp_path):
    labels = sl.labels.from_neuronpedia(d, folder)
    path = labels.save(tmp_path / "saved.json")
    again = sl.labels.load(path, d)
    assert dict(again) == WANTED
    assert again.columns() == labels.columns()
    assert repr(again) == repr(labels)
    with pytest.raises(OutputExistsError):
        labels.save(path)
    with pytest.raises(ConfigError, match="labels of another dictionary"):
        sl.labels.load(path, sl.Dictionary.create("topk", reads=48, d_sae=D_SAE, options={"k": 2}, seed=1))
    assert labels.to_frame()["author"].tolist()[2] == "Ann"


def test_a_table_of_labels_shows_no_control_characters(d, tmp_path):
    (tmp_path / "batch-0.jsonl").write_bytes(line(1, HOSTILE, modelId=None, layer=None, explanationModelName="\x1b[31m"))
    labels = sl.labels.from_neuronpedia(d, tmp_path)
    assert labels[1].source == "Neuronpedia"
    assert "<img" in str(labels)
    assert "\x1b" not in str(labels) + repr(labels)
    assert "<img" not in labels._repr_html_()


def test_long_explanations_are_shortened_to_the_length_of_a_label(d, tmp_path):
    (tmp_path / "batch-0.jsonl").write_bytes(line(1, "x" * 5000))
    label = sl.labels.from_neuronpedia(d, tmp_path)[1]
    assert (len(label), label[-1]) == (1000, "…")


def test_labels_go_into_a_store_beside_those_of_ones_own(d, folder, store):
    store.label(1, "mine")
    labels = sl.labels.from_neuronpedia(d, folder)
    assert store.label_all(labels) == 3
    assert store.labels == WANTED | {1: "mine"}
    assert store.label_all(labels) == 0
    store.write_labels()
    content = read_json(store.folder / "labels.json")
    assert (content["format"], content["labels"]) == (2, {"1": "mine"})
    assert content["imported"][1] == {"source": "Neuronpedia gpt2-small/8-res-jb", "author": "Ann", "labels": {"7": "newest"}}
    again = sl.FeatureStore.load(store.folder)
    assert again.labels == store.labels
    assert (again.labels[7].author, type(again.labels[1])) == ("Ann", str)
    assert "Ann, Neuronpedia gpt2-small/8-res-jb" in str(again.latent(7))
    assert again.latent(7).label_origin == "Ann, Neuronpedia gpt2-small/8-res-jb"
    assert again.latent(1).label_origin == ""
    assert again.label_all({7: Label("a newer one", "elsewhere"), 1: "theirs"}, replace=True) == 2
    assert (again.labels[7], again.labels[1]) == ("a newer one", "theirs")
    again.label(7, "mine too")
    assert type(again.labels[7]) is str


def test_labels_of_another_dictionary_do_not_go_into_a_store(folder, store):
    other = sl.Dictionary.create("topk", reads=48, d_sae=D_SAE, options={"k": 2}, seed=1)
    with pytest.raises(ConfigError, match="belong to another dictionary than the store"):
        store.label_all(sl.labels.from_neuronpedia(other, folder))
    with pytest.raises(UserError, match="no latent 12"):
        store.label_all({3: "x", 12: "y"})
    assert store.labels == {}


def test_a_store_knows_the_neuronpedia_id_of_its_dictionary(store, built, folder, random_lm, tmp_path, caplog, command):
    assert store.info.neuronpedia == built.info.neuronpedia == ID
    code, _, err = command("label", store.folder, "--neuronpedia", "gpt2-small/7-res-jb")
    assert (code, "is gpt2-small/8-res-jb on Neuronpedia; the labels of gpt2-small/7-res-jb are not" in err) == (2, True)
    unknown = sl.FeatureStore.build(dictionary(None), random_lm, ["Read the license"], top_n=1, seed=0)
    saved = unknown.save(tmp_path / "unknown")
    assert "neuronpedia" not in read_json(saved / "features.json")["info"]  # as stores were written before
    assert sl.FeatureStore.load(saved).info == unknown.info
    assert command("label", saved, "--neuronpedia", folder).code == 0
    assert "does not say whether it is that one" in caplog.text


def test_a_latent_with_very_many_explanations_is_refused(d, tmp_path):
    (tmp_path / "batch-0.jsonl").write_bytes(line(3, "x") * 101)
    with pytest.raises(CorruptFileError, match="more than 100 explanations of latent 3"):
        sl.labels.from_neuronpedia(d, tmp_path)
    (tmp_path / "batch-0.jsonl").write_bytes(line(3, "x") * 100)
    (tmp_path / f"batch-{'0' * 25}.jsonl").write_bytes(line(4, "of a file with an endless number"))
    assert dict(sl.labels.from_neuronpedia(d, tmp_path)) == {3: "x"}


@pytest.mark.parametrize("encoding", ["utf-16", "ascii", "x-unknown"])
def test_listings_in_other_encodings_are_typed_errors(bucket, monkeypatch, encoding):
    entities = '<!DOCTYPE a [<!ENTITY b "bbbb">]><a>&b;</a>' if encoding == "utf-16" else "<a>\xff</a>"
    content = f'<?xml version="1.0" encoding="{encoding}"?>{entities}'.encode("utf-16" if encoding == "utf-16" else "latin-1")
    with pytest.raises(HubError, match="does not answer as an S3 bucket does"):
        web._parsed("a server", content)
    plain = f'<?xml version="1.0" encoding="{encoding}"?><a><Key>é</Key></a>'.encode()
    assert web._parsed("a server", plain)["Key"] == ["é"]


def test_a_text_that_is_no_url(d):
    with pytest.raises(ConfigError, match="is not a URL"):
        sl.labels.from_neuronpedia(d, "https://[::1/v1/")


def test_a_labels_file_of_the_first_format_is_read(store):
    content = {"format": 1, "dictionary_sha256": store.info.dictionary_sha256, "labels": {"3": "by hand"}}
    (store.folder / "labels.json").write_text(json.dumps(content))
    assert sl.FeatureStore.load(store.folder).labels == {3: "by hand"}


@pytest.mark.parametrize(
    "imported",
    [
        [{"source": "a", "author": "b", "labels": {"12": "x"}}],
        [{"source": "a", "labels": {}}],
        {"a": 1},
        [{"labels": {"1": 2}}],
    ],
    ids=lambda imported: str(imported)[:40],
)
def test_damaged_imported_labels(store, imported):
    content = {"format": 2, "dictionary_sha256": store.info.dictionary_sha256, "labels": {}, "imported": imported}
    (store.folder / "labels.json").write_text(json.dumps(content))
    with pytest.raises(CorruptFileError):
        sl.FeatureStore.load(store.folder)


def test_the_command_imports_labels_and_keeps_ones_own(store, folder, command):
    assert command("label", store.folder, 1, "mine").code == 0
    out = command("label", store.folder, "--neuronpedia", folder).out
    assert "Labels(4 of 12 latents" in out
    assert "kept 1 label of your own" in out
    listed = command("label", store.folder, "--list").out
    assert "Ann, Neuronpedia" in listed
    assert sl.FeatureStore.load(store.folder).labels == WANTED | {1: "mine"}
    assert command("label", store.folder, "--neuronpedia", folder, "--replace").code == 0
    assert sl.FeatureStore.load(store.folder).labels == WANTED
    for wrong in (("--replace",), (3, "x", "--neuronpedia", ID), ("--list", "--neuronpedia", ID)):
        code, _, err = command("label", store.folder, *wrong)
        assert (code, "give the number of a latent and its label" in err) == (2, True)


def test_labels_of_a_store_can_be_copied_and_pickled(d, folder, store):
    import copy
    import pickle

    store.label_all(sl.labels.from_neuronpedia(d, folder))
    for twin in (copy.deepcopy(store.labels), pickle.loads(pickle.dumps(store.labels))):
        assert [(one, one.source, one.author) for one in twin.values()] == [
            (one, one.source, one.author) for one in store.labels.values()
        ]


def test_hashes_decide_whose_labels_they_are(d, folder):
    changed = dictionary()
    changed.W_dec.data.copy_(torch.roll(d.W_dec.data, 1, 0))
    first, second = (sl.labels.from_neuronpedia(one, folder).dictionary_sha256 for one in (d, changed))
    assert first != second
