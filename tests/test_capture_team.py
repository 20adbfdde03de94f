"""Several processes write one cache: the bytes of one process, also after kills, and errors that all of them hear of."""

import functools
import json
import os
import random
import shutil
import signal
import threading
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch
from together import in_processes

import saelens_lite as sl
from saelens_lite import resumable
from saelens_lite.errors import (
    ConfigError,
    CorruptFileError,
    DiskFullError,
    LockedError,
    NonFiniteError,
    OutputExistsError,
    ProcessLostError,
)
from saelens_lite.kinds import CACHE, UNFINISHED_CAPTURE
from saelens_lite.locks import locked
from saelens_lite.processes import team
from saelens_lite.tokens import RowBlocks, blocks, encoding

HOOKS = ["a", "b"]
BLOCK = 320  # tokens of a block of rows; a section has at least half as many activations
words = random.Random(0)
DOCUMENTS = [" ".join(words.choices(["cat", "ship", "grey", "sea", "tree"], k=words.randrange(70))) for _ in range(24)]


class Model:
    """A model of bytes whose activations are sums over the row so far."""

    name, revision, precision, tokenizer_hash = "bytes", None, "float32", "0" * 64
    device, is_causal, module = torch.device("cpu"), True, None
    d_vocab, n_ctx, bos_id, eos_id, pad_id, special_ids = 258, 32, 256, 257, 257, frozenset((256, 257))

    def __init__(self, nan_at: str | None = None, kill: tuple[int, int] | None = None, is_shared: bool = False):
        self.is_shared = is_shared and team().world > 1
        self.processing, self.vocabulary = [], [chr(i) for i in range(258)]
        self.nan_at, self.kill = nan_at and list(nan_at.encode()), kill
        self.n_runs = self.n_texts = 0

    def text_tokenizer(self, texts, **_):
        self.n_texts += sum(map(len, texts))
        return {"input_ids": [list(text.encode()) for text in texts]}

    def hook_point(self, name):
        assert name in HOOKS

    def check_ids(self, ids):
        assert ids.tokens.shape[1] <= self.n_ctx

    def begin_with_bos(self, ids):
        return False

    warn_of_leading_pads = check_ids

    def fingerprint(self):
        return "weights"

    def run(self, rows, hooks):
        self.n_runs += 1
        if self.kill == (team().rank, self.n_runs):
            os.kill(os.getpid(), signal.SIGKILL)
        x = (rows.tokens[..., None] * torch.tensor([0.01, 0.3, 1.7])).sin().cumsum(1)
        if self.nan_at and any(bytes(self.nan_at) in bytes(row[row < 256].tolist()) for row in rows.tokens):
            x = x * torch.nan
        return {hook: x * (1 + HOOKS.index(hook)) for hook in hooks}


def captured(out: Path, text=DOCUMENTS, model=(), **settings) -> dict:
    """Capture in one of the processes, in small sections, and return what it did."""
    module, lm = import_module("saelens_lite.cache.capture"), Model(*model)
    os.fsync = bool  # a kill loses nothing that was written
    settings = {"dtype": "float32", "shard_tokens": 64, "batch_tokens": 64, "n_ctx": 32} | settings
    module.RowBlocks = functools.partial(RowBlocks, block_tokens=BLOCK)
    blocks.encode = functools.partial(encoding.encode, stretch=200, context=20)
    cache = sl.capture(lm, text, HOOKS, out, **settings)
    return {"n_tokens": cache.n_tokens, "runs": lm.n_runs, "texts": lm.n_texts}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def capturing(out, settings):
    return captured(out, **settings)


SETTINGS = {
    "plain": {},
    "n_tokens": {"n_tokens": 1500},
    "packed and balanced": {"text_config": sl.TextConfig(n_ctx=32, pack=True, min_context=4, max_token_share=0.3)},
    "rows": {"text": torch.arange(40 * 20).reshape(40, 20) % 256, "n_ctx": None},
    "masked": {
        "text": torch.arange(40 * 20).reshape(40, 20) % 256, "n_ctx": None, "n_tokens": 320,
        "attention_mask": (torch.arange(20) < torch.arange(40)[:, None] % 19 + 1).long(),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_several_processes_write_the_bytes_of_one(tmp_path, name):
    alone = in_processes(1, capturing, tmp_path / "1", SETTINGS[name])[0]
    for n in (2, 3, 4) if name == "plain" else (4,):
        found = in_processes(n, capturing, tmp_path / str(n), SETTINGS[name])
        assert contents(tmp_path / str(n)) == contents(tmp_path / "1")
        assert {each["n_tokens"] for each in found} == {alone["n_tokens"]}
        assert sum(each["runs"] for each in found) == alone["runs"]  # each batch is run by one of them
        assert max(each["runs"] for each in found) < alone["runs"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_processes_that_hold_the_model_together_all_run_it(tmp_path):
    """Each with the same batches, as tensor parallelism needs; the first one writes."""
    shared = {"model": (None, None, True)}
    alone = in_processes(1, capturing, tmp_path / "1", shared)[0]
    assert in_processes(2, capturing, tmp_path / "2", shared) == [alone, {**alone, "texts": 0}]
    assert contents(tmp_path / "2") == contents(tmp_path / "1")
    for message in in_processes(
        2, failing, tmp_path / "c", {"text": ["NaN" * 9], "model": ("NaN", None, True)}, NonFiniteError
    ):
        assert "NaN, infinity or a number too large" in message


def test_a_section_ends_with_a_shard_of_its_own(tmp_path):
    in_processes(1, capturing, tmp_path / "c", {})
    sizes = [shard["n_tokens"] for shard in sl.ActivationCache.open(tmp_path / "c").manifest["shards"]]
    short = [i for i, n in enumerate(sizes) if n < 64]
    assert len(short) > 3
    assert max(sizes) == 64
    n_tokens = sum(sizes[: short[2] + 1])
    assert in_processes(1, capturing, tmp_path / "d", {"n_tokens": n_tokens})[0]["n_tokens"] == n_tokens
    shards = {path.name: path.read_bytes() for path in (tmp_path / "d").glob("shard-*")}
    assert len(shards) == short[2] + 1
    assert shards.items() <= contents(tmp_path / "c").items()


@pytest.mark.parametrize(("kill", "n", "then"), [((0, 9), 2, 2), ((1, 21), 2, 3), ((2, 5), 4, 1), ((3, 10), 4, 2)], ids=str)
def test_a_killed_worker_is_resumed_by_any_number_of_processes(tmp_path, kill, n, then):
    alone = in_processes(1, capturing, tmp_path / "1", {})[0]
    with pytest.raises((ProcessLostError, AssertionError)):
        in_processes(n, capturing, tmp_path / "c", {"model": (None, kill)})
    assert not (tmp_path / "c").exists()
    there = {path.name: path.stat().st_ino for path in (tmp_path / ".c.unfinished").rglob("shard-*")}
    assert there
    found = in_processes(then, capturing, tmp_path / "c", {})
    assert contents(tmp_path / "c") == contents(tmp_path / "1")
    assert sum(each["runs"] for each in found) < alone["runs"] * (1 - 0.7 * len(there) / len(contents(tmp_path / "1")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "c"]


@pytest.mark.parametrize("settings", [{}, {"text": "".join(DOCUMENTS)}, {"n_tokens": 2000}], ids=["", "one document", "n"])
def test_a_restart_does_not_tokenise_what_is_done(tmp_path, settings):
    alone = in_processes(1, capturing, tmp_path / "1", settings)[0]
    with pytest.raises((ProcessLostError, AssertionError)):
        in_processes(1, capturing, tmp_path / "c", settings | {"model": (None, (0, int(alone["runs"] * 0.8)))})
    (found,) = in_processes(1, capturing, tmp_path / "c", settings)
    assert contents(tmp_path / "c") == contents(tmp_path / "1")
    assert found["texts"] < 0.6 * alone["texts"]


def test_a_restart_notices_another_text_that_is_not_tokenised(tmp_path):
    with pytest.raises((ProcessLostError, AssertionError)):
        in_processes(2, capturing, tmp_path / "c", {"model": (None, (0, 21))})
    assert len(list((tmp_path / ".c.unfinished/journal").glob("*.jsonl"))) > 3
    swapped = [DOCUMENTS[1], DOCUMENTS[0], *DOCUMENTS[2:]]
    for text in (swapped, DOCUMENTS[:4], [DOCUMENTS[0] + "s", *DOCUMENTS[1:]]):
        with pytest.raises(OutputExistsError, match=r"of another text: it(s first| ends)"):
            in_processes(2, capturing, tmp_path / "c", {"text": text})
    in_processes(2, capturing, tmp_path / "c", {"text": swapped, "exists": "overwrite"})
    in_processes(1, capturing, tmp_path / "alone", {"text": swapped})
    assert contents(tmp_path / "c") == contents(tmp_path / "alone")


def _killed(tmp_path) -> Path:
    """Return the folder of the journals of a capture that was killed."""
    with pytest.raises((ProcessLostError, AssertionError)):
        in_processes(1, capturing, tmp_path / "c", {"model": (None, (0, 21))})
    return tmp_path / ".c.unfinished/journal"


def _repaired(tmp_path, file: Path, match: str) -> None:
    """Check that a damaged journal is named in an error, and that the capture is right once it is deleted."""
    for n in (1, 2):
        with pytest.raises(CorruptFileError, match=match):
            in_processes(n, capturing, tmp_path / "c", {})
    file.unlink()
    in_processes(2, capturing, tmp_path / "c", {})
    in_processes(1, capturing, tmp_path / "1", {})
    assert contents(tmp_path / "c") == contents(tmp_path / "1")


def test_damaged_rows_of_a_section_that_is_not_read_again_are_refused(tmp_path):
    folder = _killed(tmp_path)
    damaged = bytearray((folder / "000001.rows").read_bytes())
    damaged[8] ^= 1
    (folder / "000001.rows").write_bytes(damaged)
    _repaired(
        tmp_path, folder / "000001.jsonl", r"000001\.rows is missing or damaged; delete .*000001\.jsonl and repeat the call"
    )


@pytest.mark.parametrize("damage", [{"ids": [1] * 32}, {"ids": [258]}, {"ids": [-1]}, {"ids": [5], "start": 2}, {"tail": [1]}])
def test_a_damaged_place_in_a_journal_is_refused(tmp_path, damage):
    folder = _killed(tmp_path)
    file = max(folder.glob("*.jsonl"))
    while True:  # the last complete section
        heading, *shards = map(json.loads, file.read_text().splitlines())
        if len(shards) == -(-heading["n_kept"] // heading["shard_tokens"]):
            break
        file = file.with_name(f"{int(file.stem) - 1:06d}.jsonl")
    heading["after"] |= damage
    file.write_text("".join(json.dumps(line) + "\n" for line in (heading, *shards)))
    _repaired(tmp_path, file, rf"{file.name}: the place behind token row \d+ is damaged: it has .*; delete it")


def test_nan_in_one_process_ends_all_and_what_is_written_is_kept(tmp_path):
    marked = [*DOCUMENTS[:14], "NaN", *DOCUMENTS[14:]]
    in_processes(1, capturing, tmp_path / "1", {"text": marked})
    outcomes = in_processes(2, failing, tmp_path / "c", {"text": marked, "model": ("NaN",)}, NonFiniteError)
    assert len(set(outcomes)) == 1
    assert ": NaN, infinity or a number too large" in outcomes[0]
    assert list((tmp_path / ".c.unfinished").rglob("shard-*"))
    in_processes(2, capturing, tmp_path / "c", {"text": marked})
    assert contents(tmp_path / "c") == contents(tmp_path / "1")


def failing(out, settings, error) -> str:
    with pytest.raises(error) as caught:
        captured(out, **settings)
    return str(caught.value)


def _full(out):
    """Let the disk of the second process be full."""
    if team().rank == 1:
        writing = import_module("saelens_lite.cache.writing")

        def full(path, *_):
            raise DiskFullError(f"{path} cannot be written: the disk is full")

        writing.write_shard = full
    return failing(out, {}, DiskFullError)


def test_a_full_disk_of_one_process_ends_all(tmp_path):
    first, second = in_processes(2, _full, tmp_path / "c")
    assert "the disk is full" in first
    assert "the disk is full" in second
    assert "complete parts in" in first


def _ahead(out):
    """Capture with other settings in the second process."""
    return failing(out, {"shard_tokens": 64 + team().rank}, ConfigError)


def test_processes_with_other_settings_are_refused(tmp_path):
    for message in in_processes(2, _ahead, tmp_path / "c"):
        assert "different settings: shard_tokens is 64 in process 0 and 65 in process 1" in message
    assert not list(tmp_path.iterdir())


def _blind(folders):
    import_module("saelens_lite.outputs").check_shared.__defaults__ = (0.2,)
    return failing(folders[team().rank] / "c", {}, ConfigError)


def test_processes_that_do_not_share_a_folder_are_refused(tmp_path):
    for message in in_processes(2, _blind, [tmp_path / "a", tmp_path / "b"]):
        assert "is not the same folder for all processes: process 1 on" in message


def test_a_cache_that_another_job_writes_is_locked(tmp_path):
    with pytest.raises((ProcessLostError, AssertionError)):
        in_processes(1, capturing, tmp_path / "c", {"model": (None, (0, 15))})
    for file in ("c", ".c.unfinished/worker-1"):  # the first process of the other job; a worker that outlived its own
        with locked(tmp_path / file, "cache"):
            for message in in_processes(2, failing, tmp_path / "c", {}, LockedError):
                assert "is being written by process" in message
    with locked(tmp_path / "c", "cache"), pytest.raises(LockedError, match="is being written by process"):
        sl.ActivationCache.open(tmp_path / "c")
    with pytest.raises(CorruptFileError, match="its capture was interrupted; repeat the call"):
        sl.ActivationCache.open(tmp_path / "c")
    in_processes(2, capturing, tmp_path / "c", {})


def test_an_unfinished_capture_in_a_folder_that_can_only_be_read_is_named(tmp_path, monkeypatch):
    _killed(tmp_path)

    def refuse(*_, **__):
        raise PermissionError("read-only")

    monkeypatch.setattr("saelens_lite.locks.FileLock.acquire", refuse)
    with pytest.raises(CorruptFileError, match="its capture was interrupted; repeat the call"):
        sl.ActivationCache.open(tmp_path / "c")


def test_a_capture_waits_while_a_reader_looks_at_its_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(resumable, "PATIENCE", 60.0)
    is_held = threading.Event()

    def look():
        with locked(tmp_path / "c", "cache"):
            is_held.set()
            time.sleep(0.2)

    reader = threading.Thread(target=look)
    reader.start()
    is_held.wait()
    with resumable.unfinished(tmp_path / "c", CACHE, {}, UNFINISHED_CAPTURE, lambda _: False, "error") as folder:
        assert folder.is_dir()
    reader.join()


def test_an_unfinished_capture_of_an_earlier_version_is_refused_and_kept(tmp_path):
    """Its request does not name the format of the journal."""
    with pytest.raises((ProcessLostError, AssertionError)):
        in_processes(1, capturing, tmp_path / "c", {"model": (None, (0, 15))})
    folder = tmp_path / ".c.unfinished"
    shutil.rmtree(folder / "journal")
    (folder / "journal.jsonl").write_text("{}\n")
    request = json.loads((folder / "request.json").read_text())
    assert request.pop("journal_format") == 2
    (folder / "request.json").write_text(json.dumps(request))
    before = sorted(folder.rglob("[!.]*"))
    with pytest.raises(OutputExistsError, match=r"other settings: journal_format = None \(now 2\)"):
        in_processes(1, capturing, tmp_path / "c", {})
    assert sorted(folder.rglob("[!.]*")) == before
    in_processes(1, capturing, tmp_path / "c", {"exists": "overwrite"})
    in_processes(1, capturing, tmp_path / "d", {})
    assert contents(tmp_path / "c") == contents(tmp_path / "d")


def _apart(out, texts, exists="error"):
    return failing(out, {"text": texts[team().rank], "exists": exists}, ConfigError)


def test_processes_with_other_texts_are_refused(tmp_path):
    other = [text.replace("ship", "boat") for text in DOCUMENTS]
    for i, text in enumerate((other, DOCUMENTS[:12], DOCUMENTS[:-1])):
        for texts in ((DOCUMENTS, text), (text, DOCUMENTS)):
            for message in in_processes(2, _apart, tmp_path / str(i), texts, "overwrite"):
                assert "the processes have different texts: SHA-256 of the text is '" in message
            assert not (tmp_path / str(i)).exists()


def _slow(out, lasts):
    """Let the second process take `lasts` seconds longer for each batch."""
    run = Model.run
    Model.run = lambda *args: (time.sleep(lasts * team().rank), run(*args))[1]
    return captured(out)


def test_a_process_may_be_slower_than_the_others_for_longer_than_they_wait(tmp_path):
    found = in_processes(2, _slow, tmp_path / "2", 0.18, timeout=3.0)
    assert found[1]["runs"] * 0.18 > 4
    in_processes(1, capturing, tmp_path / "1", {})
    assert contents(tmp_path / "2") == contents(tmp_path / "1")
