"""Work that is interrupted and goes on ends with the same bytes as work that was left alone."""

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from interrupted import Interrupted

import saelens_lite as sl
from saelens_lite import TrainConfig, devices, files
from saelens_lite.cache import TensorSource
from saelens_lite.cache.capture import _ShardWriter
from saelens_lite.errors import (
    ConfigError,
    CorruptFileError,
    DiskFullError,
    LockedError,
    NonFiniteError,
    OutputExistsError,
    Stopped,
)
from saelens_lite.train import checkpoint

HOOKS = ["blocks.1.hook_resid_pre", "blocks.2.hook_mlp_out"]
SWEEP = [
    TrainConfig(
        hook=hook, sparsity=rule, options=options, d_sae=40, batch_size=32, n_tokens=n, log_every=100, dead_after=200, lr=1e-3
    )
    for hook, rule, options, n in [
        (HOOKS[0], "topk", {"k": 3}, 500),
        (HOOKS[1], "l1", {}, 300),
        (HOOKS[0], "gated", {}, 420),
        (HOOKS[0], "batch_topk", {"k": 3}, 500),
    ]
]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def stream(lm, documents):
    config = sl.TextConfig(n_ctx=32)
    return sl.ActivationStream(lm, documents, HOOKS, text_config=config, buffer_tokens=128, batch_tokens=64)


@pytest.mark.parametrize("kind", ["cache", "stream"])
@pytest.mark.parametrize("stops", [[0], [6], [3, 9, 15]], ids=str)
def test_a_run_goes_on_to_the_same_bytes(cache, lm, documents, tmp_path, kind, stops):
    def source():
        return sl.ActivationCache.open(cache.path) if kind == "cache" else stream(lm, documents)

    sl.train(source(), SWEEP, tmp_path / "alone", validation_tokens=70)
    out = tmp_path / "run"
    with pytest.raises(Stopped):
        sl.train(Interrupted(source(), stops[0]), SWEEP, out, validation_tokens=70)
    for at in stops[1:]:
        with pytest.raises(Stopped):
            sl.resume(out, Interrupted(source(), at))
    runs = sl.resume(out, source())
    assert contents(out) == contents(tmp_path / "alone")
    assert [run.history[-1]["tokens"] for run in runs] == [512, 320, 448, 512]


def test_each_dictionary_of_a_sweep_is_what_it_is_alone(cache, tmp_path):
    together = sl.train(cache, SWEEP, tmp_path / "sweep")
    for i, (config, run) in enumerate(zip(SWEEP, together, strict=True)):
        (alone,) = sl.train(cache, config, tmp_path / str(i))
        assert contents(alone.folder) == contents(run.folder)


def test_the_command_that_is_printed_goes_on(cache, tmp_path):
    run = [
        sys.executable,
        "-m",
        "saelens_lite.cli",
        "train",
        str(cache.path),
        "--hook",
        HOOKS[0],
        "--options.k",
        "3",
        "--d-sae",
        "40",
    ]
    run += ["--batch-size", "32", "--log-every", "100"]
    alone, out = tmp_path / "alone", tmp_path / "a run"
    code = "import signal; from saelens_lite.train import Trainer; s = Trainer.step\n"
    code += "def step(self, *batch):\n    s(self, *batch)\n    if self.n_steps == 7: signal.raise_signal(signal.SIGINT)\n"
    code += "Trainer.step = step\nfrom saelens_lite.cli import main; main()"
    subprocess.run([*run, "--n-tokens", "500", "--out", alone], check=True, capture_output=True)
    stopped = subprocess.run(
        [sys.executable, "-c", code, *run[3:], "--n-tokens", "500", "--out", out], check=False, capture_output=True, text=True
    )
    assert stopped.returncode == 130, stopped.stderr
    (line,) = stopped.stderr.strip().splitlines()
    command = line.split("go on with: saelens-lite ")[1]
    assert command == f"train --resume '{out}'"
    subprocess.run([sys.executable, "-m", "saelens_lite.cli", "train", "--resume", out], check=True, capture_output=True)
    assert contents(out) == contents(alone)


def interrupted_run(x, out: Path) -> Path:
    with pytest.raises(Stopped):
        sl.train(
            Interrupted(TensorSource(x), 8), TrainConfig(d_sae=12, batch_size=32, n_tokens=640), out, checkpoint_seconds=0.0
        )
    return out


@pytest.fixture
def x():
    return torch.randn(400, 6, generator=torch.Generator().manual_seed(0))


def test_two_checkpoints_are_kept_and_a_damaged_one_is_passed_over(x, tmp_path):
    out = interrupted_run(x, tmp_path / "run")
    older, newest = sorted((out / "checkpoints").iterdir())
    file = newest / "0.safetensors"
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    assert checkpoint.load_checkpoint(out)[1]["n_batches"] == int(older.name) // 32
    (older / "state.json").unlink()
    with pytest.raises(CorruptFileError, match="no checkpoint that is not damaged"):
        sl.resume(out, TensorSource(x))


def test_what_cannot_be_resumed(x, tmp_path):
    out = interrupted_run(x, tmp_path / "run")
    with pytest.raises(ConfigError, match="give source="):
        sl.resume(out)
    with pytest.raises(ConfigError, match="not those the run was trained on"):
        sl.resume(out, TensorSource(2 * x + 1))
    with pytest.raises(OutputExistsError, match="interrupted; resume it"):
        sl.train(TensorSource(x), TrainConfig(d_sae=12, n_tokens=10), out)
    sl.resume(out, TensorSource(x))
    with pytest.raises(ConfigError, match="no checkpoints"):
        sl.resume(out, TensorSource(x))


def test_a_cache_that_was_captured_anew_is_noticed(cache, lm, documents, tmp_path):
    shutil.copytree(cache.path, tmp_path / "cache")
    with pytest.raises(Stopped):
        sl.train(Interrupted(sl.ActivationCache.open(tmp_path / "cache"), 3), SWEEP, tmp_path / "run")
    sl.capture(lm, documents, HOOKS, tmp_path / "cache", n_ctx=16, exists="overwrite")
    with pytest.raises(ConfigError, match="is not the cache the run was trained on"):
        sl.resume(tmp_path / "run")


# --- capture ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def broken_off(lm, monkeypatch):
    """broken_off(n, error): capture fails with `error` after the model ran n times."""

    def arrange(n: int, error: BaseException) -> None:
        runs = itertools.count()
        original = type(lm).run

        def run(self, *args, **kwargs):
            if next(runs) == n:
                raise error
            return original(self, *args, **kwargs)

        monkeypatch.setattr(type(lm), "run", run)

    yield arrange
    monkeypatch.undo()


def settings(**more) -> dict:
    return {"n_ctx": 32, "dtype": "float32", "shard_tokens": 90, "batch_tokens": 64} | more


@pytest.mark.parametrize("n", [0, 1, 2, 5, 9])
def test_a_capture_goes_on_to_the_same_bytes(lm, documents, tmp_path, broken_off, monkeypatch, n):
    sl.capture(lm, documents, HOOKS, tmp_path / "alone", **settings())
    broken_off(n, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        sl.capture(lm, documents, HOOKS, tmp_path / "cache", **settings())
    monkeypatch.undo()
    assert not (tmp_path / "cache").exists()
    there = {path.name: path.stat().st_ino for path in (tmp_path / ".cache.unfinished").rglob("shard-*")}
    sl.capture(lm, documents, HOOKS, tmp_path / "cache", **settings())
    assert there == {name: (tmp_path / "cache" / name).stat().st_ino for name in there}  # not written again
    assert bool(there) == (n >= 5)
    assert contents(tmp_path / "cache") == contents(tmp_path / "alone")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "cache"]


def test_an_unfinished_capture_of_something_else_is_not_continued(lm, documents, tmp_path, broken_off, monkeypatch):
    broken_off(5, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        sl.capture(lm, documents, HOOKS, tmp_path / "cache", **settings())
    monkeypatch.undo()
    with pytest.raises(OutputExistsError, match=r"n_ctx.*ask for the same, delete it, or say exists='overwrite'"):
        sl.capture(lm, documents, HOOKS, tmp_path / "cache", **settings(n_ctx=16))
    with pytest.raises(OutputExistsError, match="of another text"):
        sl.capture(lm, documents[1:], HOOKS, tmp_path / "cache", **settings())
    with pytest.raises(OutputExistsError, match="of another text"):  # shorter than what is there
        sl.capture(lm, documents[0][:300], HOOKS, tmp_path / "cache", **settings())
    sl.capture(lm, documents[1:], HOOKS, tmp_path / "cache", **settings(exists="overwrite"))
    sl.capture(lm, documents[1:], HOOKS, tmp_path / "alone", **settings())
    assert contents(tmp_path / "cache") == contents(tmp_path / "alone")


def test_two_captures_into_one_folder(lm, documents, tmp_path, monkeypatch):
    original = _ShardWriter.add
    refused = []

    def add(self, piece):
        if not refused:
            with pytest.raises(LockedError, match="is being written by process"):
                sl.capture(lm, documents, HOOKS, tmp_path / "cache", **settings())
            refused.append(True)
        original(self, piece)

    monkeypatch.setattr(_ShardWriter, "add", add)
    sl.capture(lm, documents, HOOKS, tmp_path / "cache", **settings())
    assert refused


def test_a_disk_that_is_too_small_is_noticed_before_the_work(lm, documents, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 5000, 5000))
    with pytest.raises(DiskFullError, match=r"100 tokens take 0\.00 GB more"):
        sl.capture(lm, documents, HOOKS, tmp_path / "cache", **settings(n_tokens=100))
    assert not list(tmp_path.iterdir())


def test_an_error_before_the_first_shard_leaves_nothing(lm, documents, tmp_path, broken_off):
    broken_off(0, NonFiniteError("x"))
    with pytest.raises(NonFiniteError):
        sl.capture(lm, documents, HOOKS, tmp_path / "cache", **settings())
    assert not list(tmp_path.iterdir())


# --- the log of a run --------------------------------------------------------------------------------------------------------

LONG = TrainConfig(sparsity="topk", options={"k": 3}, d_sae=12, batch_size=16, n_tokens=16 * 60, log_every=16, lr=1e-3)


@pytest.mark.parametrize("loggers", [["jsonl"], []], ids=["logged", "not logged"])
@pytest.mark.parametrize("damage", [None, "removed", "edited"])
def test_a_log_longer_than_a_settings_file_comes_back_whole(x, tmp_path, monkeypatch, loggers, damage):
    """Whatever loggers there are, and whatever happens to their files."""
    (alone,) = sl.train(TensorSource(x), [LONG], tmp_path / "alone", loggers=loggers)
    assert len(alone.history) == 60
    assert len(json.dumps(alone.history)) > 7000
    monkeypatch.setattr(files, "MAX_JSON_BYTES", 7000)
    out = tmp_path / "run"
    with pytest.raises(Stopped):
        sl.train(Interrupted(TensorSource(x), 50), LONG, out, loggers=loggers)
    if loggers and damage:
        (out / "log.jsonl").unlink() if damage == "removed" else (out / "log.jsonl").write_text("{}\n")
    (run,) = sl.resume(out, TensorSource(x))
    assert run.history == alone.history
    if not damage:
        assert contents(out) == contents(tmp_path / "alone")


def test_a_checkpoint_whose_log_is_damaged_is_passed_over(x, tmp_path):
    out = interrupted_run(x, tmp_path / "run")
    older, newest = sorted((out / "checkpoints").iterdir())
    with open(newest / "0.jsonl", "a", encoding="utf-8") as file:
        file.write("{}\n")
    assert checkpoint.load_checkpoint(out)[1]["n_batches"] == int(older.name) // 32


def test_a_checkpoint_with_its_log_in_state_json_is_resumed(x, tmp_path, monkeypatch):
    """As versions before this one wrote them, whatever the size."""
    sl.train(TensorSource(x), LONG, tmp_path / "alone")
    out = tmp_path / "run"
    with pytest.raises(Stopped):
        sl.train(Interrupted(TensorSource(x), 50), LONG, out)
    (folder,) = (out / "checkpoints").iterdir()
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    del state["dropped"]
    state["histories"] = [files.read_lines(folder / "0.jsonl")]
    (folder / "0.jsonl").unlink()
    (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")
    checksums = {name: files.file_hash(folder / name) for name in ("0.safetensors", "state.json")}
    (folder / "checksums.json").write_text(json.dumps({"format": 2, "sha256": checksums}), encoding="utf-8")
    monkeypatch.setattr(files, "MAX_JSON_BYTES", 5000)
    assert (folder / "state.json").stat().st_size > 5000
    (run,) = sl.resume(out, TensorSource(x))
    assert len(run.history) == 60
    assert contents(out) == contents(tmp_path / "alone")


def test_a_run_whose_device_is_missing_is_resumed_on_another(x, tmp_path, caplog):
    out = interrupted_run(x, tmp_path / "run")
    for folder in (out / "checkpoints").iterdir():
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        state["request"]["device"] = "cuda:99"
        (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")
        content = json.loads((folder / "checksums.json").read_text(encoding="utf-8"))
        content["sha256"]["state.json"] = files.file_hash(folder / "state.json")
        (folder / "checksums.json").write_text(json.dumps(content), encoding="utf-8")
    (run,) = sl.resume(out, TensorSource(x))
    assert run.dictionary.W_dec.device == devices.natural_device()
    assert "the run was trained on cuda:99, which is not here; resuming on" in caplog.text
