"""Pushing to and pulling from a Hub on the loopback interface, with everything that can go wrong on the way."""

import dataclasses
import hashlib
import json
import logging
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from hub_server import Account, Blob, Fault, Hub, running_hub
from huggingface_hub import HfApi, close_session
from safetensors.torch import load, load_file, save_file

import saelens_lite as sl
from saelens_lite.config import ModelFacts
from saelens_lite.errors import (
    ConfigError,
    CorruptFileError,
    HubAccessError,
    HubConflictError,
    HubError,
    HubNotFoundError,
    HubUnreachableError,
    ModelNotFoundError,
    OutputExistsError,
)
from saelens_lite.evaluation.metrics import Metric
from saelens_lite.features.explaining.scores import Judged, LabelScore
from saelens_lite.features.label import Label
from saelens_lite.hub import Address, describe, fetch, model_card, write_card
from saelens_lite.hub.plots import log_plot

TOKEN, READ_TOKEN, EXPIRED_TOKEN = "hf_secretsecretsecret", "hf_readonlyreadonly", "hf_expiredexpired"
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")  # huggingface_hub's, of its client
HOOK, REPO = "blocks.1.hook_resid_pre", "me/dictionaries"


def connect(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point huggingface_hub at a server, as HF_ENDPOINT, HF_HUB_CACHE and HF_TOKEN do before it is imported; no waiting."""
    constants = "huggingface_hub.constants."
    monkeypatch.setattr(constants + "ENDPOINT", hub.url)
    monkeypatch.setattr(constants + "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants + "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants + "HF_TOKEN_PATH", str(cache / "no-token"))
    monkeypatch.setattr(constants + "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda _: None))
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub with an account that may write, and a client that knows it."""
    with running_hub() as running:
        running.accounts = {
            TOKEN: Account("me"),
            READ_TOKEN: Account("me", may_write=False),
            EXPIRED_TOKEN: Account("me", expired=True),
        }
        connect(running, tmp_path / "hf-cache", monkeypatch)
        yield running
        close_session()


def dictionary(seed: int = 0, sparsity: str = "topk", hook: str | None = HOOK, **origin) -> sl.Dictionary:
    known = {"model": "gpt2", "text": "hf:org/books:main:train"} | origin
    reads = sl.Port(hook=hook, width=8)
    return sl.Dictionary.create(sparsity, reads=reads, d_sae=32, seed=seed, origin=sl.Origin(**known))


def report(fvu: float = 0.25, l0: float = 4.0) -> sl.EvalReport:
    metrics = {"fvu": Metric(fvu, fvu - 0.01, fvu + 0.01), "l0": Metric(l0, l0, l0), "ce_loss_score": Metric(0.9, 0.8, 0.95)}
    metrics["undefined"] = Metric(float("nan"), float("nan"), float("nan"))
    return sl.EvalReport(
        metrics=metrics,
        n_tokens=1000,
        n_sequences=10,
        text="some books",
        text_sha256="ab12",
        disjoint=True,
        disjoint_why="held out",
        model="gpt2",
        hook=HOOK,
        excluded="BOS and padding",
        density=torch.linspace(0, 0.5, 32),
    )


@pytest.fixture
def folder(tmp_path):
    """A dictionary folder with a card."""
    d = dictionary()
    d.density = torch.linspace(0, 0.5, 32)
    path = d.save(tmp_path / "made")
    write_card(path, d, report())
    return path


@pytest.fixture
def run_folder(tmp_path):
    """The folder of a run with two dictionaries."""
    for i, name in enumerate(("0-topk", "1-gated")):
        d = dictionary(seed=i, sparsity=name[2:])
        write_card(d.save(tmp_path / "run" / name / "dictionary"), d, report(0.2 + i / 10, 4.0 + i))
    return tmp_path / "run"


def on_hub(hub: Hub, repo: str = REPO) -> dict[str, bytes]:
    """Return the files of a repository, or nothing."""
    found = hub.repositories.get(repo)
    return {path: blob.content for path, blob in found.head.files.items()} if found else {}


def metadata_of(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


# --- there and back ---------------------------------------------------------------------------------------------------


def test_round_trip_gives_the_same_bytes(hub, folder):
    pushed = sl.push(folder, REPO, license="mit")
    pulled = fetch(f"hf://{REPO}/{HOOK}")
    for name in ("cfg.json", "sae_weights.safetensors", "sparsity.safetensors", "eval.json"):
        assert (pulled.folder / name).read_bytes() == (folder / name).read_bytes() == on_hub(hub)[f"{HOOK}/{name}"]
    assert not (pulled.folder / "density.png").exists()  # nothing a dictionary does not need
    assert f"{HOOK}/density.png" in on_hub(hub)
    d = sl.pull(REPO)
    assert torch.equal(d.W_dec, sl.load(folder).W_dec)
    assert d.source == f"hf://{REPO}/{HOOK}@{pushed.commit}"
    assert d.source == str(pulled.address)
    assert pushed.url == f"{hub.url}/{REPO}"
    assert not hub.repositories[REPO].private


def test_a_dictionary_in_memory(hub):
    d = dictionary()
    sl.push(d, REPO, private=True)
    assert hub.repositories[REPO].private
    assert torch.equal(sl.load(f"hf://{REPO}/{HOOK}").W_enc, d.W_enc)
    assert torch.equal(sl.load(Path(f"hf://{REPO}/{HOOK}")).W_enc, d.W_enc)  # as the command line hands it on
    assert d.source is None


def test_revisions(hub):
    first = sl.push({"a": dictionary(0)}, REPO)
    HfApi().create_tag(REPO, tag="v1")
    second = sl.push({"a": dictionary(1)}, REPO)
    old, new = dictionary(0).W_dec, dictionary(1).W_dec
    assert not torch.equal(old, new)
    assert torch.equal(sl.pull(REPO, "a").W_dec, new)
    for revision in ("v1", first.commit):
        pinned = sl.pull(REPO, "a", revision=revision)
        assert torch.equal(pinned.W_dec, old)
        assert pinned.source == f"hf://{REPO}/a@{first.commit}"
    assert torch.equal(sl.load(pinned.source).W_dec, old)
    assert [c.id for c in hub.repositories[REPO].history()][:2] == [second.commit, first.commit]


def test_several_dictionaries_in_one_commit(hub, run_folder):
    pushed = sl.push(run_folder, REPO)
    assert len(hub.repositories[REPO].history()) == 2  # the initial one, and this
    assert {path.partition("/")[0] for path in on_hub(hub)} >= {"0-topk", "1-gated", "README.md", "frontier.png"}
    assert sl.pull(REPO, "1-gated").rule.plugin_name == "gated"
    again = sl.push({"deep/er": run_folder / "0-topk", "memory": dictionary(5)}, REPO)
    assert again.parent == pushed.commit
    assert torch.equal(sl.pull(REPO, "deep/er").W_dec, dictionary(0).W_dec)
    assert sorted(row[:12] for row in table_rows(on_hub(hub)["README.md"].decode())) == [
        "| [0-topk](.", "| [1-gated](", "| [deep/er](", "| [memory](.",
    ]  # fmt: skip


def table_rows(card: str) -> list[str]:
    return [line for line in card.splitlines() if line.startswith("| [")]


# --- what is sent -----------------------------------------------------------------------------------------------------


def test_a_dry_run_needs_no_network(hub, run_folder, tmp_path, monkeypatch, command):
    """The plan and the cards are those for a new repository; a push that means to send still fails."""
    reached = sl.push(run_folder, REPO, dry_run=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    planned = sl.push(run_folder, REPO, dry_run=True, out=tmp_path / "cards")
    assert planned.files == tuple(file._replace(status="unknown") for file in reached.files)
    assert planned.n_bytes == reached.n_bytes
    assert (reached.uncompared, planned.commit) == ("", None)
    assert f"nothing was sent\nThe files could not be compared with the repository. {REPO}: HF_HUB_OFFLINE is" in str(planned)
    made = {str(path.relative_to(tmp_path / "cards")): path for path in (tmp_path / "cards").rglob("*") if path.is_file()}
    assert {"README.md", "0-topk/README.md", "1-gated/README.md"} <= made.keys()
    assert {name: path.stat().st_size for name, path in made.items()}.items() <= {f.path: f.size for f in planned.files}.items()
    assert "0-topk" in made["README.md"].read_text(encoding="utf-8")
    with pytest.raises(OutputExistsError):
        sl.push(run_folder, REPO, dry_run=True, out=tmp_path / "cards")
    with pytest.raises(ConfigError, match="set dry_run"):
        sl.push(run_folder, REPO, out=tmp_path / "other")
    with pytest.raises(HubUnreachableError):
        sl.push(run_folder, REPO)
    said = command("push", run_folder, REPO, "--dry-run")
    assert (said.code, said.out.count("README.md"), "--out FOLDER" in said.out) == (0, 3, True)
    assert on_hub(hub) == {}


def test_the_card_of_a_dictionary_and_of_a_run(folder, run_folder, tmp_path, command):
    one = model_card(folder, repo=REPO)
    assert f'"{REPO}"' in one.partition("## Load it")[2]
    assert metadata_of(one) == metadata_of((folder / "README.md").read_text(encoding="utf-8"))
    of_run = model_card(run_folder, repo=REPO)
    assert "| [0-topk](" in of_run
    assert "| [1-gated](" in of_run
    assert metadata_of(of_run)["base_model"] == ["gpt2"]
    unnamed = dictionary(hook=None)
    assert "topk dictionary of gpt2" in model_card(unnamed)
    said = command("card", folder, "--repo", REPO)
    assert said.out.strip() == model_card(folder, repo=REPO).strip()
    assert command("card", folder, "--out", tmp_path / "README.md").code == 0
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == model_card(folder)
    assert command("card", folder, "--out", tmp_path / "README.md").code == 2


def test_dry_run_sends_nothing_and_says_exactly_what_would_be_sent(hub, folder):
    empty = sl.push(folder, REPO, dry_run=True)
    assert {file.status for file in empty.files} == {"new"}
    assert (empty.parent, empty.commit) == (None, None)
    assert {r.method for r in hub.requests} == {"GET"}
    assert hub.repositories == {}
    first = sl.push(folder, REPO)
    assert first.files == empty.files
    for file in first.files:
        blob = hub.repositories[REPO].head.files[file.path]
        assert (file.size, file.sha256) == (len(blob.content), blob.sha256)
    hub.requests.clear()
    changed = dictionary(3)
    planned = sl.push(changed, REPO, dry_run=True)
    assert {r.method for r in hub.requests} <= {"GET", "HEAD"}
    assert {file.path.rpartition("/")[2]: file.status for file in planned.files} == {
        "README.md": "changed",  # of the folder; the one of the repository stands first and is overwritten here
        "cfg.json": "unchanged",
        "sae_weights.safetensors": "changed",
        "sparsity.safetensors": "deleted",
        "density.png": "deleted",
        "eval.json": "deleted",
    }
    assert sl.push(changed, REPO).files == planned.files
    assert f"{HOOK}/eval.json" not in on_hub(hub)
    assert "nothing was sent" in str(planned)
    assert re.search(rf"^deleted .* {re.escape(HOOK)}/eval\.json$", str(planned), re.MULTILINE)


def test_nothing_new_is_no_commit_and_no_upload(hub, folder):
    first = sl.push(folder, REPO)
    hub.requests.clear()
    second = sl.push(folder, REPO)
    assert second.commit == first.commit
    assert {file.status for file in second.files} == {"unchanged"}
    assert second.n_bytes == 0
    assert not hub.sent("POST")
    assert not hub.sent("PUT")


def test_only_files_of_a_dictionary_are_sent(hub, folder):
    (folder / "notes.txt").write_text("private")
    (folder / ".env").write_text("SECRET=1")
    (folder / "checkpoints").mkdir()
    pushed = sl.push(folder, REPO)
    assert not [f.path for f in pushed.files if f.path.endswith((".txt", ".env"))]


def test_what_others_have_put_into_the_repository_stays(hub, folder):
    repository = hub.create(REPO)
    mine = "---\nlicense: apache-2.0\ntags:\n- mine\ndatasets: my/data\n---\n# By hand\n\nDo not touch | this.\n"
    theirs = {"README.md": Blob(mine.encode()), f"{HOOK}/notes.txt": Blob(b"x"), "other/cfg.json": Blob(b"{}")}
    repository.add("by hand", theirs)
    sl.push(folder, REPO, tags=["mine", "more"])
    files = on_hub(hub)
    assert files[f"{HOOK}/notes.txt"] == b"x"
    assert files["other/cfg.json"] == b"{}"
    card = files["README.md"].decode()
    assert "# By hand\n\nDo not touch | this.\n" in card
    data = metadata_of(card)
    assert data["license"] == "apache-2.0"
    assert data["tags"] == ["mine", "saelens_lite", "sparse-autoencoder", "interpretability", "saelens", "more"]
    assert data["datasets"] == ["my/data", "org/books"]
    before = card
    sl.push(folder, REPO)
    assert on_hub(hub)["README.md"].decode() == before


def test_results_of_the_same_dictionary_are_replaced(hub, run_folder, folder):
    sl.push(run_folder, REPO)
    d = dictionary()
    write_card(folder, d, report(0.125))
    sl.push({"0-topk": folder}, REPO)
    (model,) = metadata_of(on_hub(hub)["README.md"].decode())["model-index"]
    (result,) = model["results"]
    found = {m["name"]: m["value"] for m in result["metrics"]}
    assert len(found) == len(result["metrics"]) == 6
    assert (found["0-topk: fvu"], found["0-topk: l0"], found["1-gated: fvu"]) == (0.125, 4.0, 0.3)
    rows = table_rows(on_hub(hub)["README.md"].decode())
    assert rows[0] == f"| [0-topk](./0-topk) | {HOOK} | topk | 32 | 4 | 0.125 | 0.9 |"


def test_damaged_metadata_is_not_written_over(hub, folder):
    hub.create(REPO).add("broken", {"README.md": Blob(b"---\n[not: yaml\n---\n# x")})
    with pytest.raises(HubError, match=r"the metadata of its README\.md cannot be read; mend it on the Hub first"):
        sl.push(folder, REPO)
    assert len(hub.repositories[REPO].history()) == 2


def test_from_one_repository_to_another(hub, folder):
    sl.push(folder, REPO)
    sl.push({"copy": f"hf://{REPO}/{HOOK}"}, "me/second")
    sl.push(f"hf://{REPO}/{HOOK}", "me/third")
    for repo, name in (("me/second", "copy"), ("me/third", HOOK)):
        assert on_hub(hub, repo)[f"{name}/cfg.json"] == (folder / "cfg.json").read_bytes()
        assert f'sl.pull("{repo}", "{name}")' in on_hub(hub, repo)[f"{name}/README.md"].decode()


def test_lost_files_of_an_earlier_dictionary_are_removed(hub):
    first, second = dictionary(0), dictionary(1)
    first.density = torch.full((32,), 0.1)
    sl.push({"a": first}, REPO)
    assert sl.pull(REPO, "a").density is not None
    sl.push({"a": second}, REPO)
    assert not {"a/sparsity.safetensors", "a/density.png"} & on_hub(hub).keys()
    assert sl.pull(REPO, "a").density is None


# --- faults -----------------------------------------------------------------------------------------------------------

BROKEN_UPLOADS = {
    "storage fails": (Fault("PUT", "/storage/", "status", times=99), HubUnreachableError),
    "storage hangs up in the middle": (Fault("PUT", "/storage/", "drop", times=99), HubUnreachableError),
    "the commit fails": (Fault("POST", "/commit/", "status", times=99), HubUnreachableError),
    "the connection is lost before the commit": (Fault("POST", "/commit/", "drop", times=99), HubUnreachableError),
    "the commit is refused": (Fault("POST", "/commit/", "status", status=403, message="no"), HubAccessError),
    "the token expires on the way": (
        Fault("POST", "/commit/", "status", times=99, status=401, message="User Access Token is expired"),
        HubAccessError,
    ),
    "the upload mode cannot be asked": (Fault("POST", "/preupload/", "status", times=99, status=503), HubUnreachableError),
    "verification fails": (Fault("POST", "/complete/", "status", times=99), HubUnreachableError),
    "the head changes meanwhile": (Fault("POST", "/commit/", "status", status=409, message="conflict"), HubConflictError),
    "too many requests": (Fault("POST", "/commit/", "status", status=429, message="slow down"), HubUnreachableError),
}


@pytest.mark.parametrize("name", BROKEN_UPLOADS)
def test_a_push_that_breaks_changes_nothing_and_can_be_repeated(hub, folder, name, caplog, capsys, tmp_path):
    caplog.set_level(logging.DEBUG)
    before = sl.push({"first": dictionary(7)}, REPO)
    files = on_hub(hub)
    fault, kind = BROKEN_UPLOADS[name]
    hub.order(fault)
    with pytest.raises(kind, match=REPO) as caught:
        sl.push(folder, REPO)
    assert on_hub(hub) == files
    assert hub.repositories[REPO].head.id == before.commit
    hub.order()
    stored = set(hub.storage)
    hub.requests.clear()
    sl.push(folder, REPO)
    assert sl.pull(REPO, HOOK).d_sae == 32
    assert sl.pull(REPO, "first").d_sae == 32
    assert not [r for r in hub.sent("PUT") if r.path.rpartition("/")[2] in stored]  # nothing is uploaded twice
    out, err = capsys.readouterr()
    assert TOKEN not in f"{out}{err}{caplog.text}{caught.value!r}"
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


@pytest.mark.parametrize(
    "fault",
    [
        Fault("PUT", "/storage/", "status", times=2),
        Fault("PUT", "/storage/", "drop", times=2),
        Fault("PUT", "/storage/", "lose", times=1),
        Fault("POST", "/preupload/", "status", times=2, status=503),
        Fault("POST", "/commit/", "lose"),
    ],
    ids=lambda fault: f"{fault.path} {fault.kind}",
)
def test_a_push_outlives_a_passing_fault(hub, folder, fault):
    hub.create(REPO)
    hub.order(fault)
    pushed = sl.push(folder, REPO)
    assert pushed.commit == hub.repositories[REPO].head.id
    assert len(hub.repositories[REPO].history()) == 2
    assert torch.equal(sl.pull(REPO).W_dec, dictionary().W_dec)


def test_an_interrupted_upload_goes_on_where_it_was(hub, run_folder):
    hub.create(REPO)
    hub.order(Fault("POST", "/commit/", "status", times=99))
    with pytest.raises(HubUnreachableError, match="Push again; uploaded files are not sent twice"):
        sl.push(run_folder, REPO)
    first = len(hub.sent("PUT"))
    assert first >= len(hub.storage) > 2
    hub.order()
    sl.push(run_folder, REPO)
    assert len(hub.sent("PUT")) == first


def test_a_push_that_was_overtaken_loses_nothing(hub, folder):
    sl.push({"first": dictionary(7)}, REPO)
    repository = hub.repositories[REPO]
    theirs = {"README.md": Blob(b"---\n---\n# theirs\n"), "theirs/cfg.json": Blob(b"{}")}
    overtake = Fault("POST", "/commit/", "meanwhile", action=lambda: repository.add("theirs", repository.head.files | theirs))
    hub.order(overtake)
    with pytest.raises(HubConflictError, match=f"{REPO} has changed since it was read; nothing was written.*Push again"):
        sl.push(folder, REPO)
    assert repository.head.title == "theirs"
    sl.push(folder, REPO)
    files = on_hub(hub)
    assert files["theirs/cfg.json"] == b"{}"
    assert "# theirs" in files["README.md"].decode()
    assert f"{HOOK}/cfg.json" in files


def test_two_pushes_at_once(hub, tmp_path):
    hub.create(REPO)
    both_compared = threading.Barrier(2, timeout=60)
    hub.order(Fault("POST", "/preupload/", "meanwhile", times=2, action=both_compared.wait))
    outcomes: dict[str, object] = {}

    def one(name: str, seed: int) -> None:
        try:
            outcomes[name] = sl.push({name: dictionary(seed)}, REPO).commit
        except HubConflictError as error:
            outcomes[name] = error

    threads = [threading.Thread(target=one, args=pair) for pair in (("a", 1), ("b", 2))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [name for name, outcome in outcomes.items() if isinstance(outcome, str)]
    (loser,) = [name for name, outcome in outcomes.items() if isinstance(outcome, HubConflictError)]
    assert f"{winner}/cfg.json" in on_hub(hub)
    assert f"{loser}/cfg.json" not in on_hub(hub)
    sl.push({loser: dictionary(9)}, REPO)
    assert len(table_rows(on_hub(hub)["README.md"].decode())) == 2


def test_the_parent_that_was_asked_for(hub, folder):
    first = sl.push(folder, REPO)
    second = sl.push(dictionary(2), REPO, parent_commit=first.commit)
    hub.requests.clear()
    with pytest.raises(HubConflictError, match=f"{REPO} is at {second.commit}, not at {first.commit}; nothing was sent"):
        sl.push(folder, REPO, parent_commit=first.commit)
    with pytest.raises(HubConflictError, match="me/new is at no commit at all"):
        sl.push(folder, "me/new", parent_commit=first.commit)
    assert {r.method for r in hub.requests} == {"GET"}


def test_rules_of_the_repository_that_keep_files_out(hub, folder, monkeypatch):
    hub.create(REPO)
    applied = Hub._apply
    monkeypatch.setattr(
        Hub, "_apply", lambda self, files, kind, value: None if "cfg.json" in str(value) else applied(self, files, kind, value)
    )
    with pytest.raises(HubError, match=rf"lacks {HOOK}/cfg\.json; does a \.gitignore there exclude them\?"):
        sl.push(folder, REPO)


# --- who may ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "kind", "said"),
    [
        ("hf_wrong", HubAccessError, "the token is missing, wrong or has expired; log in with `hf auth login` or set HF_TOKEN"),
        (EXPIRED_TOKEN, HubAccessError, "the token is missing, wrong or has expired"),
        (READ_TOKEN, HubAccessError, "this token may not do that"),
        ("", HubAccessError, "the token is missing"),
        ("hf_no\u20acnever", HubError, "can't encode"),
    ],
)
def test_tokens_that_will_not_do(hub, folder, monkeypatch, token, kind, said, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(kind, match=said) as caught:
        sl.push(folder, REPO)
    assert hub.repositories == {}
    if token:
        assert token not in f"{caught.value!r}{caplog.text}"
        assert caught.value.__suppress_context__


def test_private_is_not_ignored(hub, folder):
    hub.create(REPO)
    with pytest.raises(ConfigError, match=f"{REPO} exists and is public; nothing was sent"):
        sl.push(folder, REPO, private=True)
    assert len(hub.repositories[REPO].history()) == 1


def test_somebody_elses_name(hub, folder):
    with pytest.raises(HubAccessError, match="you/x: this token may not do that"):
        sl.push(folder, "you/x")
    hub.create("you/secret", private=True)
    with pytest.raises(HubNotFoundError, match="the Hub shows no repository you/secret; check its name, and is this account"):
        sl.pull("you/secret")


def test_a_private_repository(hub, folder, monkeypatch):
    sl.push(folder, REPO, private=True)
    assert sl.pull(REPO).d_in == 8
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(
        HubNotFoundError, match=f"the Hub shows no repository {REPO}; check its name, and if it is private, log in"
    ):
        fetch(f"hf://{REPO}")


def test_the_token_goes_to_the_hub_and_nowhere_else(hub, folder):
    sl.push(folder, REPO, private=True)
    sl.pull(REPO)
    assert {r.token for r in hub.requests if r.host == "127.0.0.1"} == {TOKEN}
    elsewhere = [r for r in hub.requests if r.host == "localhost"]
    assert {r.method for r in elsewhere} == {"PUT", "GET"}
    assert {r.token for r in elsewhere} == {None}


# --- what is fetched --------------------------------------------------------------------------------------------------


def test_what_is_not_there(hub, run_folder):
    sl.push(run_folder, REPO)
    HfApi().create_tag(REPO, tag="v1.0")
    with pytest.raises(HubNotFoundError, match="the Hub shows no repository me/nothing"):
        sl.pull("me/nothing")
    with pytest.raises(HubNotFoundError, match=rf"{REPO} has no revision 'v1\.1'; did you mean v1\.0\?"):
        sl.pull(REPO, "0-topk", revision="v1.1")
    with pytest.raises(HubNotFoundError, match=f"{REPO} has no revision 'dev'; it has main, v1.0"):
        sl.pull(REPO, "0-topk", revision="dev")
    with pytest.raises(
        HubNotFoundError, match=f"{REPO} has no dictionary '0-topl'; did you mean 0-topk.*it has 0-topk, 1-gated"
    ):
        sl.pull(REPO, "0-topl")
    with pytest.raises(HubNotFoundError, match=f"{REPO}: name the folder of the dictionary; it has 0-topk, 1-gated"):
        sl.pull(REPO)
    with pytest.raises(HubNotFoundError, match="has no such revision"):
        sl.push(run_folder, REPO, revision="dev")
    hub.create("me/empty")
    with pytest.raises(HubNotFoundError, match="me/empty: name the folder of the dictionary; it has none"):
        sl.pull("me/empty")


def test_without_a_network_the_cache_is_read(hub, run_folder, monkeypatch, caplog):
    pushed = sl.push(run_folder, REPO)
    fresh = sl.pull(REPO, "0-topk")
    hub.order(Fault("GET", "/", "drop", times=99), Fault("HEAD", "/", "drop", times=99))
    offline = sl.pull(REPO, "0-topk")
    assert torch.equal(offline.W_dec, fresh.W_dec)
    assert offline.source == fresh.source == f"hf://{REPO}/0-topk@{pushed.commit}"
    assert "the Hub cannot be reached; using the cache" in caplog.text
    assert torch.equal(sl.load(fresh.source).W_dec, fresh.W_dec)
    assert torch.equal(sl.pull(REPO).W_dec, fresh.W_dec)  # the only one in the cache
    with pytest.raises(HubUnreachableError, match=f"{REPO} has no dictionary '1-gated'; it has 0-topk"):
        sl.pull(REPO, "1-gated")
    with pytest.raises(HubUnreachableError, match="me/other: the Hub cannot be reached; check the network"):
        sl.pull("me/other")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert torch.equal(sl.pull(REPO, "0-topk").W_dec, fresh.W_dec)
    with pytest.raises(HubUnreachableError, match=r"HF_HUB_OFFLINE is set.* unset it"):
        sl.pull("me/other")
    assert hub.requests == []


def test_a_model_without_a_network(hub, random_lm, tmp_path, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=waits.append))
    random_lm.module.save_pretrained(tmp_path)
    random_lm.tokenizer.save_pretrained(tmp_path)
    saved = [path for path in tmp_path.iterdir() if path.is_file()]
    files = {path.name: Blob(path.read_bytes(), lfs=path.suffix == ".safetensors") for path in saved}
    commit = hub.create("me/model").add("model", files)
    fresh = sl.load_model("me/model", device="cpu")
    with pytest.raises(ModelNotFoundError, match=r"cannot load the model 'me/none'.*: the Hub shows no"):
        sl.load_model("me/none")
    hub.order(Fault("GET", "/", "drop", times=99), Fault("HEAD", "/", "drop", times=99))
    cached = sl.load_model("me/model", device="cpu")
    assert cached.revision == fresh.revision == commit.id
    assert torch.equal(cached.logits("a"), random_lm.logits("a"))
    with pytest.raises(ModelNotFoundError, match="cannot load the model 'me/none': without a network use 'tiny' or a local"):
        sl.load_model("me/none")
    assert waits == []  # nothing was tried again and again


def test_half_a_dictionary_in_the_cache_is_none(hub, folder):
    sl.push(folder, REPO)
    hub.order(Fault("GET", "/cdn/", "status", times=99))
    with pytest.raises(HubUnreachableError):
        sl.pull(REPO)
    hub.order(Fault("GET", "/", "status", times=99))
    with pytest.raises(HubUnreachableError):
        sl.pull(REPO)
    hub.order()
    assert sl.pull(REPO).d_sae == 32


def test_what_a_dictionary_is_without_its_weights(hub, folder):
    pushed = sl.push(folder, REPO)
    hub.requests.clear()
    facts = describe(f"hf://{REPO}")
    assert (facts["architecture"], facts["d_sae"], facts["metadata"]["hook_name"]) == ("topk", 32, HOOK)
    assert facts["metadata"]["saelens_lite"]["sparsity"] == "topk"
    assert facts["eval"]["fvu"]["value"] == 0.25
    assert facts["address"] == f"hf://{REPO}/{HOOK}@{pushed.commit}"
    weights = (folder / "sae_weights.safetensors").read_bytes()
    sha256 = hashlib.sha256(weights).hexdigest()
    assert facts["files"]["sae_weights.safetensors"] == {
        "bytes": len(weights),
        "sha256": sha256,
        "tensors": {
            name: {"dtype": "F32", "shape": list(tensor.shape)}
            for name, tensor in load_file(folder / "sae_weights.safetensors").items()
        },
    }
    assert facts["files"]["cfg.json"] == {"bytes": (folder / "cfg.json").stat().st_size}
    assert {r.range for r in hub.sent("GET", "cdn|safetensors")} == {"bytes=0-100000"}
    repository = hub.repositories[REPO]
    repository.add("hostile", repository.head.files | {f"{HOOK}/sae_weights.safetensors": Blob(b"x" * 100, lfs=True)})
    with pytest.raises(CorruptFileError, match=r"sae_weights\.safetensors does not have the header of a safetensors file"):
        describe(f"hf://{REPO}")
    with pytest.raises(HubNotFoundError, match="has no dictionary 'b'"):
        describe(f"hf://{REPO}/b")


@pytest.mark.parametrize("kind", ["drop", "cut", "slow"])
def test_a_pull_outlives_a_passing_fault(hub, folder, kind):
    sl.push(folder, REPO)
    hub.order(Fault("GET", "/cdn/", kind, times=2))
    assert torch.equal(sl.pull(REPO).W_dec, dictionary().W_dec)


FOREIGN = {
    "sparsify": ({"cfg.json", "sae.safetensors"}, {"notes.txt", "model.onnx"}),
    "dictionary_learning": ({"config.json", "ae.pt"}, {"events.out", "optim.bin"}),
    "gemma scope": ({"params.npz"}, {"code.py"}),
    "llama scope": ({"config.json", "sae_weights.safetensors"}, {"old.pt"}),
    "circuit-tracer": ({"config.yaml", "layer_0.safetensors"}, {"other.npz"}),
    "cross-layer": ({"config.yaml", "W_enc_0.safetensors", "W_dec_0.safetensors", "W_enc_1.safetensors"}, {"x.pt"}),
    "temporal": ({"conf.yaml", "latest_ckpt.safetensors"}, {"x.pt"}),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_files_of_other_layouts(hub, name):
    wanted, others = FOREIGN[name]
    files = {
        f"a/{file}": Blob(file.encode(), lfs="." in file and not file.endswith(("json", "yaml"))) for file in wanted | others
    }
    files |= {"a/deeper/cfg.json": Blob(b"{}"), "a/deeper/sae.safetensors": Blob(b"x"), "b/cfg.json": Blob(b"{}")}
    hub.create("them/theirs").add("all", files)
    got = fetch("hf://them/theirs/a")
    assert {path.name for path in got.folder.iterdir() if path.is_file()} == wanted
    assert {(got.folder / file).read_bytes() for file in wanted} == {file.encode() for file in wanted}


def test_what_other_tools_wrote(hub, folder, tmp_path):
    """It is read as it lies on the Hub, and pushed in our own format."""
    ours, x = sl.load(folder), torch.randn(16, 8)
    repository = hub.create("them/theirs")
    for tool in ("sparsify", "dictionary_learning"):
        theirs = sl.convert(folder, tmp_path / tool, tool)
        files = [path for path in theirs.iterdir() if path.is_file()]
        added = {f"{tool}/{path.name}": Blob(path.read_bytes(), lfs=path.suffix in (".safetensors", ".pt")) for path in files}
        repository.add(tool, repository.head.files | added)
    for found in (
        sl.pull("them/theirs", "sparsify"),
        sl.pull("them/theirs", "dictionary_learning", format="dictionary_learning"),
        sl.load("hf://them/theirs/dictionary_learning", format="dictionary_learning"),
    ):
        assert torch.allclose(found(x), ours(x), atol=1e-6)
        assert found.source.endswith(f"@{repository.head.id}")
    with pytest.raises(ConfigError, match="pickles, which are read only on request"):
        sl.pull("them/theirs", "dictionary_learning")
    sl.push({"a": tmp_path / "sparsify", "b": "hf://them/theirs/sparsify"}, REPO)
    assert {"a/cfg.json", "a/sae_weights.safetensors", "b/cfg.json"} < on_hub(hub).keys()
    assert not any("sae.safetensors" in path for path in on_hub(hub))
    assert torch.allclose(sl.pull(REPO, "b")(x), ours(x), atol=1e-6)


def test_nothing_is_fetched_that_is_too_large(hub, folder, monkeypatch):
    sl.push(folder, REPO)
    hub.requests.clear()
    with pytest.raises(HubError, match=rf"{REPO} has [\d,]+ bytes, more than max_bytes = 1,000; nothing was fetched"):
        sl.pull(REPO, max_bytes=1000)
    monkeypatch.setattr("saelens_lite.hub.download.MAX_JSON_BYTES", 100)
    with pytest.raises(HubError, match=r"README\.md has [\d,]+ bytes; that is too large for a settings file"):
        sl.pull(REPO)
    assert not hub.sent(path="resolve|cdn")
    with pytest.raises(ConfigError, match="max_bytes = 0"):
        sl.pull(REPO, max_bytes=0)


def test_a_stranger_sends_what_is_no_dictionary(hub, folder, tmp_path):
    sl.push(folder, REPO)
    repository = hub.repositories[REPO]
    good = repository.head.files
    whole = good[f"{HOOK}/sae_weights.safetensors"].content
    save_file(load(whole) | {"W_dec": torch.full((32, 8), float("nan"))}, tmp_path / "nan.safetensors")
    for content, said in {
        whole[:-10]: "header announces",
        b"\xff" * 64: "not a safetensors file",
        (tmp_path / "nan.safetensors").read_bytes(): "NaN or infinity",
    }.items():
        repository.add("hostile", good | {f"{HOOK}/sae_weights.safetensors": Blob(content, lfs=True)})
        with pytest.raises(CorruptFileError, match=said):
            sl.pull(REPO)
    repository.add("hostile", good | {f"{HOOK}/cfg.json": Blob(b"[" * 100_000)})
    with pytest.raises(CorruptFileError, match=r"cfg\.json is not valid JSON"):
        sl.pull(REPO)


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("hf://me/x", Address("me/x")),
        ("hf://me/x/a", Address("me/x", "a")),
        ("hf://me/x/a.1/b@v1", Address("me/x", "a.1/b", "v1")),
        ("hf://me/x@v1/a", Address("me/x", "a", "v1")),
        ("hf://me/x@refs/pr/3/a", Address("me/x", "a", "refs/pr/3")),
        ("hf://me/x/a@refs/pr/3", Address("me/x", "a", "refs/pr/3")),
        ("hf://me/x/", Address("me/x")),
    ],
)
def test_addresses(text, address):
    assert Address.parse(text) == address
    assert Address.parse(str(address)) == address


@pytest.mark.parametrize(
    "text",
    [
        "hf://me",
        "hf://me/x@a/b@c",
        "hf://../x",
        "hf://me/x/../y",
        "hf://me/x/.git",
        "hf:///a/b",
        "hf://me/x/a@../b",
        "hf://me/x@a b",
    ],
)
def test_addresses_that_are_none(text):
    with pytest.raises(
        ConfigError, match=r"is not an address on the Hub|cannot be a folder of a repository|cannot be a revision"
    ):
        sl.load(text)


def test_bad_requests(hub, folder, tmp_path):
    with pytest.raises(ConfigError, match="s3:// is not known; give a folder or hf://"):
        sl.load("s3://bucket/x")
    with pytest.raises(ConfigError, match="'dictionaries' is not the name of a repository; expected user/name"):
        sl.push(folder, "dictionaries")
    with pytest.raises(ConfigError, match=r"'\.\./x' cannot be a folder of a repository"):
        sl.push({"../x": folder}, REPO)
    with pytest.raises(ConfigError, match="two dictionaries would have the same folder: a, /a/"):
        sl.push({"a": folder, "/a/": folder}, REPO)
    with pytest.raises(ConfigError, match="the dictionary does not name its hook; name its folder"):
        sl.push(dictionary(hook=None), REPO)
    with pytest.raises(ConfigError, match="give at least one dictionary"):
        sl.push({}, REPO)
    with pytest.raises(CorruptFileError, match=r"does not hold a dictionary: it has no cfg\.json"):
        sl.push(tmp_path / "nowhere", REPO)
    (folder / "sae_weights.safetensors").write_bytes(b"damaged")
    with pytest.raises(CorruptFileError):
        sl.push(folder, REPO)
    assert hub.requests == []


# --- the card ---------------------------------------------------------------------------------------------------------


def test_the_card_says_what_is_needed(hub, run_folder):
    log = [{"tokens": n, "fvu": 1 / n, "l0": 32.0, "loss": None} for n in (1, 2, 3)]
    (run_folder / "0-topk/log.jsonl").write_text("\n".join(map(json.dumps, log)) + '\n{"tokens": 4, "fv')
    d = sl.load(run_folder / "0-topk/dictionary")
    d.training_record = {"tokens": 1234567, "config": {"lr": 0.001, "k | nasty\n": "a|b", "seed": 0, "nothing": None}}
    write_card(run_folder / "0-topk/dictionary", d, report(), text="some books", tags=["mine"])
    sl.push(run_folder, REPO, license="mit")
    files = on_hub(hub)
    card = files["0-topk/README.md"].decode()
    for wanted in (
        "**32 latents**", "`gpt2`", "1,234,567 activations", "| fvu | 0.25 | 0.24 … 0.26 |",
        "1,000 tokens in 10 sequences of some books, without BOS and padding", "| lr | 0.001 |", "| k \\| nasty | a\\|b |",
        "![How often the latents fire](density.png)", "![Error and sparsity in the course of training](training.png)",
        f'd = sl.pull("{REPO}", "0-topk")', f'SAE.from_pretrained("{REPO}", "0-topk")',
        "Training text: hf:org/books:main:train.",
    ):  # fmt: skip
        assert wanted in card
    assert "path/to/this/folder" not in card
    assert "path/to/this/folder" in (run_folder / "0-topk/dictionary/README.md").read_text()
    for figure in ("0-topk/density.png", "0-topk/training.png", "frontier.png"):
        assert files[figure].startswith(b"\x89PNG")
    data = metadata_of(files["README.md"].decode())
    assert data["library_name"] == "saelens"
    assert {"saelens", "sparse-autoencoder"} <= set(data["tags"])
    assert (data["base_model"], data["datasets"], data["license"]) == (["gpt2"], ["org/books"], "mit")
    assert metadata_of(card)["tags"][-1] == "mine"


RULES = {  # name: the architecture in SAELens; None where it has none
    "topk": "topk", "batch_topk": "jumprelu", "matryoshka": "jumprelu", "jumprelu": "jumprelu", "gated": "gated",
    "l1": "standard", "p_anneal": "standard", "matching_pursuit": "matching_pursuit", "group_max": None,
}  # fmt: skip
TRANSCODERS = {
    "l1": "skip_transcoder",
    "jumprelu": "jumprelu_skip_transcoder",
    "batch_topk": "jumprelu_skip_transcoder",
    "topk": None,
}


def test_the_code_in_the_cards_works(hub, lm, monkeypatch):
    """Every rule's block, as its card has it; scripts/comparisons/check_saelens.py says what SAELens makes of it."""
    monkeypatch.setattr("saelens_lite.load_model", lambda name: {"tiny": lm}[name], raising=False)
    target = "blocks.1.hook_mlp_out"
    sizes = {"reads": sl.Port(hook=HOOK, width=lm.d_model), "d_sae": 32, "origin": sl.Origin(model="tiny")}
    made = {rule: sl.Dictionary.create(rule, **sizes) for rule in RULES}
    sizes["writes"] = sl.Port(hook=target, width=lm.d_model)
    made |= {f"{rule}-across": sl.Dictionary.create(rule, skip=True, **sizes) for rule in TRANSCODERS}
    sl.push(made, REPO)
    for name, d in made.items():
        card = on_hub(hub)[f"{name}/README.md"].decode()
        blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        names: dict[str, object] = {}
        exec(blocks[0], names)
        x = lm.run("The old man looked at the sea.", HOOK)[HOOK]
        assert torch.equal(names["codes"].to_dense(), d.encode(x).to_dense())
        assert torch.equal(names["x_hat" if d.writes_what_it_reads else "y_hat"], d(x))
        architecture = {**RULES, **{f"{rule}-across": known for rule, known in TRANSCODERS.items()}}[name]
        if architecture:
            assert f"which calls this architecture `{architecture}`" in card
            assert f'SAE.from_pretrained("{REPO}", "{name}")' in blocks[1]
        else:
            assert (
                f"SAELens has no architecture `{d.rule.plugin_name}{'' if d.writes_what_it_reads else '_skip_transcoder'}`"
                in card
            )
            assert len(blocks) == 1
        assert (f"activations of `{target}` from the" in card) != d.writes_what_it_reads
        assert metadata_of(card)["library_name"] == ("saelens" if architecture else "saelens_lite")


def test_the_model_of_a_card_is_the_one_it_was_trained_on(tmp_path):
    def code(**origin) -> str:
        d = dictionary(**origin)
        return write_card(d.save(tmp_path / str(len(list(tmp_path.iterdir())))), d).read_text()

    call = 'lm = sl.load_model(\n    "gpt2",\n    revision="abc",\n    center_writing_weights=True,\n)'
    assert call in code(revision="abc", processing=("center_writing_weights",))
    for nobody_elses in ("random", str(tmp_path), None, 'x"); import os; ("'):
        assert "load_model" not in code(model=nobody_elses)


@pytest.mark.parametrize("minus", [False, True])
def test_a_card_of_several_models_names_loads_and_measures_them_all(hub, lm, monkeypatch, minus):
    loaded = []

    def load_model(name: str, **settings) -> sl.LanguageModel:
        loaded.append((name, settings))
        return lm

    monkeypatch.setattr("saelens_lite.load_model", load_model, raising=False)
    ports = [sl.Port(hook=HOOK, width=lm.d_model, model=name) for name in ("base", "chat")]
    ports = [ports[1].replace(minus="base")] if minus else ports
    facts = [
        ModelFacts(name="base", model="gpt2", revision="abc"),
        ModelFacts(name="chat", model="org/chat", precision="bfloat16"),
    ]
    d = sl.Dictionary.create("topk", reads=ports, d_sae=32, options={"k": 4}, origin=sl.Origin(models=facts))
    name = f"chat-base_{HOOK}" if minus else f"base_{HOOK}_and_chat_{HOOK}"
    sl.push(d, REPO)
    card = on_hub(hub)[f"{name}/README.md"].decode()
    names: dict[str, object] = {}
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], names)
    assert loaded == [("gpt2", {"revision": "abc"}), ("org/chat", {})]
    acts = sl.Models({"base": lm, "chat": lm}).run("The old man looked at the sea.", [port.key for port in ports])
    assert torch.equal(names["x_hat"], d(torch.cat(list(acts.values()), dim=-1)))
    assert (names["report"].by_port is None) == minus
    assert metadata_of(card)["base_model"] == ["gpt2", "org/chat"]
    assert "in `gpt2` (base) and `org/chat` (chat), trained" in card
    assert f"belongs to these models at commit `abc` (base) and {'this hook' if minus else 'these hooks'};" in card
    assert "computed the activations in bfloat16 (chat)." in card
    assert d.trained_on == f"base = gpt2 at abc, chat = org/chat, {' + '.join(port.key for port in ports)}"


def test_a_card_has_the_numbers_of_each_port(tmp_path):
    d, fit = dictionary(), {"fvu": Metric(0.125, 0.1, 0.2), "ce_loss_score": Metric(0.75, 0.7, 0.8)}
    several = dataclasses.replace(
        report(), by_port={f"base:{HOOK}": fit, f"chat:{HOOK}": fit}, by_model={"base": fit, "chat": fit}
    )
    card = write_card(d.save(tmp_path / "d"), d, several).read_text()
    assert "| at chat |  | 0.125 ±0.05 | 0.750 ±0.05 |  |" in card
    assert "A line that begins with `at` is of one port" in card
    assert "| at chat |  | 0.125 ±0.05 | 0.750 ±0.05 |  |" in write_card(tmp_path / "d", d).read_text()  # from eval.json


def test_an_evaluation_that_came_after_the_card(hub, tmp_path):
    d = dictionary()
    folder = d.save(tmp_path / "d")
    write_card(folder, d)
    assert "## Evaluation\nNone yet." in (folder / "README.md").read_text()
    report(0.125).to_json(folder / "eval.json")
    sl.push({"a": folder}, REPO)
    card = on_hub(hub)["a/README.md"].decode()
    assert "| fvu | 0.125 |" in card
    assert "None yet." not in card
    (folder / "README.md").unlink()
    assert "| fvu | 0.125 |" in write_card(folder, d).read_text()
    (folder / "eval.json").write_text("{}")
    with pytest.raises(CorruptFileError, match="an evaluation of format None"):
        sl.push({"a": folder}, REPO)


def test_nasty_names_break_neither_metadata_nor_table(hub, tmp_path):
    nasty = "a: b\n---\n# x | `y` <script>"
    d = dictionary(model=nasty, text=nasty, hook=f"hook {nasty}")
    folder = d.save(tmp_path / "d")
    write_card(folder, d, report(), text=nasty, tags=["x: [y", "---"])
    card = (folder / "README.md").read_text()
    assert metadata_of(card)["tags"][-2:] == ["x: [y", "---"]
    assert "<script>" not in re.sub(r"`[^`]*`", "", card.partition("\n---\n")[2])
    assert "# x" not in card.splitlines()
    assert "base_model" not in metadata_of(card)
    sl.push({"a": folder}, REPO)
    (row,) = table_rows(on_hub(hub)["README.md"].decode())
    assert len(re.findall(r"(?<!\\)\|", row)) == 8
    sl.push({"b": folder}, REPO)
    assert len(table_rows(on_hub(hub)["README.md"].decode())) == 2


def test_a_transcoder_and_a_rule_that_saelens_does_not_know(hub):
    reads, writes = sl.Port(hook=HOOK, width=8), sl.Port(hook="blocks.1.hook_mlp_out", width=6)
    d = sl.Dictionary.create("topk", reads=reads, writes=writes, skip=True, d_sae=32, origin=sl.Origin(model="gpt2"))
    sl.push(d, REPO)
    card = on_hub(hub)[f"{HOOK}/README.md"].decode()
    assert "predicts the 6-dimensional\nactivations of `blocks.1.hook_mlp_out` from the 8-dimensional ones" in card
    assert "with a skip connection" in card
    assert "y_hat = d(activations)" in card
    assert {"transcoder", "saelens"} & set(metadata_of(card)["tags"]) == {"transcoder"}
    assert "sae_lens import" not in card  # SAELens has no top-k transcoders
    assert torch.equal(sl.pull(REPO).W_skip, d.W_skip)


def test_a_card_of_ones_own_is_pushed_as_it_is(hub, folder):
    (folder / "README.md").write_text("# Mine alone\n")
    sl.push(folder, REPO)
    assert on_hub(hub)[f"{HOOK}/README.md"] == b"# Mine alone\n"


def test_cards_without_matplotlib(folder, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("saelens_lite.hub.plots.find_spec", lambda _: None)
    card = write_card(folder, dictionary(), report()).read_text()
    assert "density.png" not in card
    assert "pip install 'saelens-lite[plots]'" in caplog.text


def test_figures_are_the_same_for_the_same_numbers(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join(json.dumps({"tokens": n, "fvu": 1 / n}) for n in (1, 2, 4)))
    assert log_plot(log) == log_plot(log)
    log.write_text('{"tokens": 1, "fvu": 0.5}\nnot json\n[]\n{"tokens": 2, "fvu": NaN}')
    assert log_plot(log) is None


# --- the command line -------------------------------------------------------------------------------------------------


def test_commands(hub, folder, tmp_path, command):
    code, out, _ = command("push", folder, REPO, "--folder", "a", "--dry-run", "--json")
    assert code == 0
    planned = json.loads(out)
    assert planned["commit"] is None
    code, out, _ = command("push", folder, REPO, "--folder", "a", "--license", "mit", "--tags", "x")
    assert code == 0
    assert f"commit {hub.repositories[REPO].head.id}" in out
    assert [line.split()[-1] for line in out.splitlines()[:-1]] == [file["path"] for file in planned["files"]]
    code, out, _ = command("pull", REPO, "a", "--out", tmp_path / "got")
    assert code == 0
    assert f"{tmp_path / 'got'}: topk, 32 latents, hf://{REPO}/a@{hub.repositories[REPO].head.id}" in out
    assert (tmp_path / "got/cfg.json").read_bytes() == (folder / "cfg.json").read_bytes()
    assert sl.load(tmp_path / "got").d_sae == 32
    code, _, err = command("pull", REPO, "a", "--out", tmp_path / "got")
    assert code == OutputExistsError.exit_code
    assert "already exists" in err
    assert command("pull", f"hf://{REPO}/a")[0] == 0
    code, _, err = command("pull", f"hf://{REPO}/a", "b")
    assert (code, "leave out the folder and the revision" in err) == (2, True)
    code, out, _ = command("inspect", f"hf://{REPO}/a")
    assert (code, json.loads(out)["d_sae"]) == (0, 32)
    code, _, err = command("pull", REPO, "c")
    assert (code, "has no dictionary 'c'; it has a" in err) == (2, True)


def test_evaluation_by_address_and_of_a_foreign_folder(hub, tmp_path, monkeypatch, command):
    hook = "blocks.2.hook_resid_pre"
    d = sl.Dictionary.create(
        "topk", reads=sl.Port(hook=hook, width=192), d_sae=64, options={"k": 8}, origin=sl.Origin(model="tiny")
    )
    sl.push({"a": d.save(tmp_path / "made")}, REPO)
    sl.convert(tmp_path / "made", tmp_path / "foreign", format="sparsify")
    monkeypatch.chdir(tmp_path)
    for place in (f"hf://{REPO}/a", tmp_path / "foreign"):
        code, out, err = command("eval", place, "--model", "tiny", "--hook", hook, "--n-tokens", 300, "--json", "all.json")
        assert code == 0, err
        assert "fvu" in out
        (found,) = json.loads((tmp_path / "all.json").read_text()).values()
        assert found["metrics"]["l0"]["value"] == 8
    assert (tmp_path / "foreign/eval.json").exists()
    assert not (tmp_path / "hf:").exists()


def test_the_unmodified_client_in_a_process_of_its_own(hub, folder, tmp_path):
    own = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    command = [sys.executable, "-m", "saelens_lite.cli", "push", str(folder), REPO]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | own
    done = subprocess.run(command, env=environment | {"HF_TOKEN": TOKEN}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert on_hub(hub)[f"{HOOK}/sae_weights.safetensors"] == (folder / "sae_weights.safetensors").read_bytes()
    assert TOKEN not in done.stdout + done.stderr
    assert "saelens-lite" not in done.stderr


def scored_store(d: sl.Dictionary, lm, folder: Path, scored: bool = True) -> Path:
    """Return the folder of a store with labels of three authors, and scores of two of them."""
    store = sl.FeatureStore.build(d, lm, ["It was the best of times, it was the worst of times"], seed=0)
    store.labels |= {1: Label("nasty | <b>", "max_act 1", "gpt | <x>"), 2: Label("two", "max_act 1", "gpt | <x>"), 3: "mine"}

    def judged(value: float) -> Judged:
        return Judged(Metric(value, value - 0.05, value + 0.05), Metric(value - 0.1, value - 0.2, value))

    if scored:
        controls = {"by_tokens": judged(0.6), "of_random_latent": judged(0.5)}
        store.record_scores(
            [
                LabelScore(1, "nasty | <b>", "detection", "a | judge", 9, 9, judged(0.9), **controls),
                LabelScore(2, "two", "detection", "a | judge", 9, 9, judged(0.5), **controls),
            ]
        )
    return store.save(folder)


def test_labels_and_their_scores_are_pushed_and_pulled_with_a_dictionary(hub, random_lm, tmp_path, command):
    d = sl.Dictionary.create("topk", reads=sl.Port(hook=HOOK, width=48), d_sae=12, options={"k": 3})
    store, folder = scored_store(d, random_lm, tmp_path / "store"), d.save(tmp_path / "d")
    write_card(folder, d)
    assert "## Labels" not in (folder / "README.md").read_text()
    sl.push({"a": folder}, REPO, stores=[store])
    card = on_hub(hub)["a/README.md"].decode()
    assert "3 of 12 latents have a label: 2 by `gpt | <x>, max_act 1`; 1 by a person, without a name." in card
    assert "| AUROC, the label | 2 | 0.54 | 0.60 | 0.70 | 0.80 | 0.86 |" in card
    assert "| balanced accuracy, token baseline | 2 | 0.50 | 0.50 | 0.50 | 0.50 | 0.50 |" in card
    assert "1 of 2 labels are better than the token baseline and another latent's explanation: the 95 %" in card
    assert "**Detection** (judge: `a | judge`), quantiles" in card
    pulled = tmp_path / "pulled"
    assert command("pull", REPO, "a", "--out", pulled).code == 0
    labels = sl.labels.load(pulled / "labels.json", d)
    assert dict(labels) == {1: "nasty | <b>", 2: "two", 3: "mine"}
    assert labels.scores == sl.FeatureStore.load(store).label_scores
    sl.push({"b": pulled}, REPO)  # a folder with labels sends them again
    assert on_hub(hub)["b/labels.json"] == on_hub(hub)["a/labels.json"]
    assert "2 of them were scored." in on_hub(hub)["b/README.md"].decode()
    before, done = on_hub(hub), sl.push({"a": folder}, REPO)  # and one without keeps them
    assert {file.path for file in done.files if file.status != "unchanged"} <= {"README.md"}  # its example is of the last push
    assert {name for name in before if before[name] != on_hub(hub)[name]} <= {"README.md"}
    sl.push({"a": dictionary(1).save(tmp_path / "other")}, REPO)  # another dictionary in its place
    assert not {"a/labels.json", "a/scores.json"} & set(on_hub(hub))
    assert "## Labels" not in on_hub(hub)["a/README.md"].decode()


def test_a_card_claims_nothing_about_labels_that_were_not_scored(random_lm, tmp_path, command):
    d = sl.Dictionary.create("topk", reads=sl.Port(hook=HOOK, width=48), d_sae=12, options={"k": 3})
    store, folder = scored_store(d, random_lm, tmp_path / "store", scored=False), d.save(tmp_path / "d")
    assert "## Labels" not in model_card(folder)
    card = command("card", folder, "--stores", store).out
    assert "No label was scored, so nothing is known about how well they fit." in card
    assert "AUROC" not in card
    (store / "labels.json").unlink()
    with pytest.raises(ConfigError, match="has no labels"):
        model_card(folder, stores=[store])
    with pytest.raises(ConfigError, match="the store of another dictionary"):
        model_card(dictionary(1).save(tmp_path / "other"), stores=[store])


def test_labels_of_another_dictionary_are_not_published(random_lm, tmp_path):
    d = sl.Dictionary.create("topk", reads=sl.Port(hook=HOOK, width=48), d_sae=12, options={"k": 3})
    store, folder = scored_store(d, random_lm, tmp_path / "store"), dictionary(1).save(tmp_path / "other")
    (folder / "labels.json").write_bytes((store / "labels.json").read_bytes())
    with pytest.raises(ConfigError, match="labels of another dictionary"):
        model_card(folder)
    with pytest.raises(OutputExistsError, match=r"labels\.json"):
        dictionary(2).save(folder, exists="overwrite")
