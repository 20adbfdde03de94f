"""Work that is interrupted and goes on ends with the same bytes as work that was left alone."""

import copy
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from interrupted import Interrupted
from tokenizers.normalizers import Lowercase

import saelens_lite as sl
from saelens_lite import TrainConfig, devices, files
from saelens_lite.cache import TensorSource
from saelens_lite.cache.writing import ShardWriter
from saelens_lite.errors import (
    ConfigError,
    CorruptFileError,
    DiskFullError,
    LockedError,
    NonFiniteError,
    OutputExistsError,
    SourceChangedError,
    Stopped,
)
from saelens_lite.tokens import token_rows
from saelens_lite.training import checkpoint
from saelens_lite.training.history import History

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
    code = "import signal; from saelens_lite.training import Trainer; s = Trainer.step\n"
    code += "def step(self, *batch):\n    s(self, *batch)\n    if self.n_steps == 7: signal.raise_signal(signal.SIGINT)\n"
    code += "Trainer.step = step\nfrom saelens_lite.cli import main; main()"
    subprocess.run([*run, "--n-tokens", "500", "--out", alone], check=True, capture_output=True)
    stopped = subprocess.run(
        [sys.executable, "-c", code, *run[3:], "--n-tokens", "500", "--out", out], check=False, capture_output=True, text=True
    )
    assert stopped.returncode == 130, stopped.stderr
    (line,) = stopped.stderr.strip().splitlines()
    command = line.split("resume with: saelens-lite ")[1]
    assert command == f"train --resume '{out}'"
    subprocess.run([sys.executable, "-m", "saelens_lite.cli", "train", "--resume", out], check=True, capture_output=True)
    assert contents(out) == contents(alone)


def checkpoints_of(run: Path) -> list[Path]:
    """Return the folders of a run's checkpoints, oldest first."""
    return sorted(path for path in (run / "checkpoints").iterdir() if path.is_dir())


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
    older, newest = checkpoints_of(out)
    file = newest / "0.safetensors"
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    assert checkpoint.load_checkpoint(out)[1]["n_batches"] == int(older.name) // 32
    (older / "state.json").unlink()
    with pytest.raises(CorruptFileError, match=r"all checkpoints of .* are damaged"):
        sl.resume(out, TensorSource(x))


def test_what_cannot_be_resumed(x, tmp_path):
    out = interrupted_run(x, tmp_path / "run")
    with pytest.raises(ConfigError, match="give source="):
        sl.resume(out)
    with pytest.raises(ConfigError, match="not those the run was trained on"):
        sl.resume(out, TensorSource(2 * x + 1))
    with pytest.raises(OutputExistsError, match="interrupted run; resume it"):
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
    with pytest.raises(OutputExistsError, match=r"n_ctx.*repeat that request, delete it, or set exists='overwrite'"):
        sl.capture(lm, documents, HOOKS, tmp_path / "cache", **settings(n_ctx=16))
    with pytest.raises(OutputExistsError, match="of another text"):
        sl.capture(lm, documents[1:], HOOKS, tmp_path / "cache", **settings())
    with pytest.raises(OutputExistsError, match="of another text"):  # shorter than what is there
        sl.capture(lm, documents[0][:300], HOOKS, tmp_path / "cache", **settings())
    sl.capture(lm, documents[1:], HOOKS, tmp_path / "cache", **settings(exists="overwrite"))
    sl.capture(lm, documents[1:], HOOKS, tmp_path / "alone", **settings())
    assert contents(tmp_path / "cache") == contents(tmp_path / "alone")


def test_two_captures_into_one_folder(lm, documents, tmp_path, monkeypatch):
    original = ShardWriter.add
    refused = []

    def add(self, piece):
        if not refused:
            with pytest.raises(LockedError, match="is being written by process"):
                sl.capture(lm, documents, HOOKS, tmp_path / "cache", **settings())
            refused.append(True)
        original(self, piece)

    monkeypatch.setattr(ShardWriter, "add", add)
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
    """Any loggers, and any damage to their files."""
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


def test_each_line_is_written_once_and_a_checkpoint_knows_its_part(x, tmp_path, monkeypatch):
    """Bytes written do not grow with the number of checkpoints, and lines of a killed process are cut off."""
    written = []
    original = History.save

    def save(self, path):
        size = path.stat().st_size if path.exists() else 0
        part = original(self, path)
        written.append(path.stat().st_size - size)
        return part

    (alone,) = sl.train(TensorSource(x), LONG, tmp_path / "alone", checkpoint_seconds=0.0)
    monkeypatch.setattr(History, "save", save)
    out = tmp_path / "run"
    with pytest.raises(Stopped):
        sl.train(Interrupted(TensorSource(x), 50), LONG, out, checkpoint_seconds=0.0)
    file = out / "checkpoints/history-0.jsonl"
    assert len(written) == 51
    assert sum(written) == file.stat().st_size
    lines = file.read_bytes().splitlines(keepends=True)
    assert [json.loads(line) for line in lines] == alone.history[: len(lines)]
    parts = [json.loads((folder / "state.json").read_text())["histories"][0] for folder in checkpoints_of(out)]
    assert [part["bytes"] for part in parts] == [sum(map(len, lines[:n])) for n in (len(lines) - 1, len(lines))]
    assert [part["sha256"] for part in parts] == [files.file_hash(b"".join(lines[:n])) for n in (len(lines) - 1, len(lines))]
    with open(file, "ab") as opened:
        opened.write(b"half of a li")
    with pytest.raises(Stopped):
        sl.resume(out, Interrupted(TensorSource(x), 52), checkpoint_seconds=0.0)
    assert [json.loads(line) for line in file.read_bytes().splitlines()] == alone.history[: len(lines) + 2]
    sl.resume(out, TensorSource(x))
    assert contents(out) == contents(tmp_path / "alone")


@pytest.mark.parametrize("damage", ["changed", "cut"])
def test_a_checkpoint_whose_log_is_damaged_is_passed_over(x, tmp_path, damage):
    sl.train(TensorSource(x), LONG, tmp_path / "alone", checkpoint_seconds=0.0)
    out = tmp_path / "run"
    with pytest.raises(Stopped):
        sl.train(Interrupted(TensorSource(x), 8), LONG, out, checkpoint_seconds=0.0)
    older, newest = checkpoints_of(out)
    file = out / "checkpoints/history-0.jsonl"
    first, last = (json.loads((folder / "state.json").read_text())["histories"][0]["bytes"] for folder in (older, newest))
    content = file.read_bytes()
    assert len(content) == last > first
    digit = first + content[first:].index(b": ") + 2
    file.write_bytes(content[:digit] + b"7" + content[digit + 1 :] if damage == "changed" else content[: last - 9])
    assert checkpoint.load_checkpoint(out)[1]["n_batches"] == int(older.name) // 16
    sl.resume(out, TensorSource(x))
    assert contents(out) == contents(tmp_path / "alone")


def test_a_checkpoint_without_its_log_is_refused(x, tmp_path):
    with pytest.raises(Stopped):
        sl.train(Interrupted(TensorSource(x), 8), LONG, tmp_path / "run")
    (tmp_path / "run/checkpoints/history-0.jsonl").unlink()
    with pytest.raises(CorruptFileError, match=r"history-0\.jsonl is missing"):
        sl.resume(tmp_path / "run", TensorSource(x))


def test_a_history_file_that_is_lost_in_training_is_written_again(tmp_path):
    lines = [{"step": n, "tokens": 8 * n, "fvu": 1 / (n + 1), "l0": float(n)} for n in range(9)]
    history = History(lines[:4])
    history.save(tmp_path / "history")
    (tmp_path / "history").unlink()
    for line in lines[4:]:
        history.append(line)
    part = history.save(tmp_path / "history")
    assert [json.loads(line) for line in (tmp_path / "history").read_text().splitlines()] == lines == list(history)
    assert part == {"bytes": (tmp_path / "history").stat().st_size, "sha256": files.file_hash(tmp_path / "history")}


def test_the_log_of_a_billion_tokens_is_small_and_comes_back(tmp_path):
    """15,259 lines, which a checkpoint in the middle has cut in two."""
    numbers = torch.rand(15_259, 6, generator=torch.Generator().manual_seed(0)).tolist()
    names = ("mse", "loss", "l0", "fvu", "dead", "lr")
    lines = [
        {"step": 16 * n, "tokens": 65_536 * n} | dict(zip(names, (round(x, 6) for x in row), strict=True))
        for n, row in enumerate(numbers, 1)
    ]
    history = History(lines[:9000])
    middle = history.save(tmp_path / "history")
    for line in lines[9000:]:
        history.append(line)
    end = history.save(tmp_path / "history")
    assert end["bytes"] == (tmp_path / "history").stat().st_size < 200 * len(lines)
    for part, n in ((middle, 9000), (end, len(lines))):
        back = History.load(tmp_path / "history", part["bytes"], part["sha256"], n, checkpoint._check_line)
        assert (len(back), back.last) == (n, lines[n - 1])
        assert list(back) == lines[:n]
        with pytest.raises(CorruptFileError, match=f"at most {n - 1:,} complete lines"):
            History.load(tmp_path / "history", part["bytes"], part["sha256"], n - 1, checkpoint._check_line)


@pytest.mark.parametrize("number", [2, 3, 4])
def test_a_checkpoint_of_an_earlier_format_is_resumed(x, tmp_path, monkeypatch, number):
    """Format 2 has the log in state.json, whatever the size; 3 and 4 have <number>.jsonl beside it."""
    sl.train(TensorSource(x), LONG, tmp_path / "alone")
    out = tmp_path / "run"
    with pytest.raises(Stopped):
        sl.train(Interrupted(TensorSource(x), 50), LONG, out)
    (folder,) = checkpoints_of(out)
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    del state["dropped"], state["histories"]
    log = out / "checkpoints/history-0.jsonl"
    if number == 2:
        state["histories"] = [files.read_lines(log)]
        log.unlink()
    else:
        log.rename(folder / "0.jsonl")
    if number < 4:
        for numbers in state["dictionaries"]:
            (numbers["scale"],), (numbers["target_scale"],) = numbers.pop("scales"), numbers.pop("target_scales")
    (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")
    checksums = {path.name: files.file_hash(path) for path in folder.iterdir() if path.name != "checksums.json"}
    (folder / "checksums.json").write_text(json.dumps({"format": number, "sha256": checksums}), encoding="utf-8")
    if number == 2:
        monkeypatch.setattr(files, "MAX_JSON_BYTES", 5000)
        assert (folder / "state.json").stat().st_size > 5000
    with pytest.raises(Stopped):
        sl.resume(out, Interrupted(TensorSource(x), 52))
    assert len(log.read_bytes().splitlines()) == 53
    (run,) = sl.resume(out, TensorSource(x))
    assert len(run.history) == 60
    assert contents(out) == contents(tmp_path / "alone")


def test_a_run_whose_device_is_missing_is_resumed_on_another(x, tmp_path, caplog):
    out = interrupted_run(x, tmp_path / "run")
    for folder in checkpoints_of(out):
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        state["request"]["device"] = "cuda:99"
        (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")
        content = json.loads((folder / "checksums.json").read_text(encoding="utf-8"))
        content["sha256"]["state.json"] = files.file_hash(folder / "state.json")
        (folder / "checksums.json").write_text(json.dumps(content), encoding="utf-8")
    (run,) = sl.resume(out, TensorSource(x))
    assert run.dictionary.W_dec.device == devices.natural_device()
    assert "the run was trained on cuda:99, which is not available; resuming on" in caplog.text


# --- another source of the same size ------------------------------------------------------------------------------------------

STREAMED = TrainConfig(hook=HOOKS[0], sparsity="topk", options={"k": 3}, d_sae=40, batch_size=32, n_tokens=500, lr=1e-3)
LINES = [f"The {animal} saw {n} ships on the grey sea that day." for animal in ("cat", "dog", "owl") for n in range(21, 31)]


class Records:
    """A dataset: records that can be read again and again."""

    def __init__(self, lines):
        self.lines = lines

    def __iter__(self):
        return ({"text": line} for line in self.lines)


def text_file(lines, folder):
    path = folder / "book.txt"
    path.write_text("\n".join(lines))
    return path


def jsonl_file(lines, folder):
    path = folder / "book.jsonl"
    path.write_text("\n".join(json.dumps({"text": line}) for line in lines))
    return path


KINDS = {
    "text file": text_file,
    "jsonl": jsonl_file,
    "records": lambda lines, _: Records(lines),
    "strings": lambda lines, _: list(lines),
}


def swapped(lines, i=1, j=2):
    """Return the same lines, two of them in each other's place."""
    lines = list(lines)
    lines[i], lines[j] = lines[j], lines[i]
    return lines


def streamed(lm, text, **settings) -> sl.ActivationStream:
    known = {"text_config": sl.TextConfig(n_ctx=16), "buffer_tokens": 128, "batch_tokens": 64} | settings
    return sl.ActivationStream(lm, text, HOOKS[:1], **known)


def interrupted_stream(source, out: Path, at: int = 12, **settings) -> None:
    with pytest.raises(Stopped):
        sl.train(Interrupted(source, at), STREAMED, out, **settings)


@pytest.mark.parametrize("kind", KINDS)
def test_resume_refuses_another_text_of_the_same_size(lm, tmp_path, kind):
    def source(lines):
        return streamed(lm, KINDS[kind](lines, tmp_path))

    sl.train(source(LINES), STREAMED, tmp_path / "alone")
    out = tmp_path / "run"
    interrupted_stream(source(LINES), out)
    before = contents(out)
    one_word = [LINES[0].replace("21", "12"), *LINES[1:]]
    for other in (one_word, swapped(LINES), [LINES[-1], *LINES[1:]]):
        assert len("".join(other)) == len("".join(LINES))
        for _ in range(2):  # the refusal itself does not make the other text the run's
            with pytest.raises(SourceChangedError, match="the run was trained on"):
                sl.resume(out, source(other))
        assert contents(out) == before
    (run,) = sl.resume(out, source(LINES))
    assert contents(out) == contents(tmp_path / "alone")
    assert run.history[-1]["tokens"] == 512


def test_resume_refuses_a_file_that_was_edited_in_place(lm, tmp_path):
    """The source is found again by its name, as on the command line."""
    path = text_file(LINES, tmp_path)
    interrupted_stream(streamed(lm, path), tmp_path / "run")
    path.write_text("\n".join(swapped(LINES)))
    with pytest.raises(SourceChangedError, match="the run was trained on"):
        sl.resume(tmp_path / "run")
    path.write_text("\n".join(LINES))
    sl.resume(tmp_path / "run")


def test_a_text_that_differs_only_behind_what_was_read_is_not_refused(lm, tmp_path):
    """Nothing of it was trained on yet, so the result is that of a run on the new text."""
    lines = LINES * 3
    config = STREAMED.replace(n_tokens=250)
    settings = {"text_config": sl.TextConfig(n_ctx=16), "buffer_tokens": 128, "batch_tokens": 64}
    changed = [*lines[:-1], lines[-1].replace("grey", "blue")]
    rows = [token_rows(lm, text, text_config=settings["text_config"]) for text in (lines, changed)]
    assert rows[0].tokens.shape == rows[1].tokens.shape
    source = streamed(lm, rows[0])
    out = tmp_path / "run"
    with pytest.raises(Stopped):
        sl.train(Interrupted(source, 2), config, out)
    read = source.record()["rows"]["n_rows"]
    assert 0 < read < len(rows[0].tokens) / 2
    sl.train(streamed(lm, rows[1]), config, tmp_path / "alone")
    sl.resume(out, streamed(lm, rows[1]))
    assert contents(out / "dictionary") == contents(tmp_path / "alone/dictionary")


def test_resume_refuses_other_token_rows(lm, tmp_path):
    rows = token_rows(lm, LINES, n_ctx=16)
    interrupted_stream(streamed(lm, rows), tmp_path / "run")
    order = torch.arange(len(rows.tokens))
    order[0], order[1] = 1, 0
    context = rows.tokens.clone()
    context[:, 0] = 7  # position 0 does not count, but all that count see it
    counted = rows.keep.clone()
    counted[0] = counted[0].roll(1)
    for other in (rows.take(order), rows._replace(tokens=context), rows._replace(keep=counted), rows[:10]):
        with pytest.raises(SourceChangedError, match="the run was trained on"):
            sl.resume(tmp_path / "run", streamed(lm, other))
    sl.resume(tmp_path / "run", streamed(lm, rows))


def test_resume_refuses_another_tokenizer_model_and_settings(lm, tmp_path):
    interrupted_stream(streamed(lm, LINES), tmp_path / "run")
    other_tokenizer = sl.LanguageModel(lm.module, copy.deepcopy(lm.tokenizer), name=lm.name)
    other_tokenizer.tokenizer.backend_tokenizer.normalizer = Lowercase()
    with pytest.raises(SourceChangedError, match="the run was trained on"):
        sl.resume(tmp_path / "run", streamed(other_tokenizer, LINES))
    other_model = sl.LanguageModel(copy.deepcopy(lm.module), lm.tokenizer, name=lm.name)
    next(other_model.module.parameters()).data.mul_(1.0001)
    with pytest.raises(SourceChangedError, match="which had weights = "):
        sl.resume(tmp_path / "run", streamed(other_model, LINES))
    for settings in ({"buffer_tokens": 256}, {"batch_tokens": 32}):
        ((name, value),) = settings.items()
        with pytest.raises(SourceChangedError, match=rf"which had {name} = \d+ \(now {value}\)"):
            sl.resume(tmp_path / "run", streamed(lm, LINES, **settings))
    with pytest.raises(SourceChangedError, match="the run was trained on"):
        sl.resume(tmp_path / "run", streamed(lm, LINES, text_config=sl.TextConfig(n_ctx=15)))
    sl.resume(tmp_path / "run", streamed(lm, LINES))


@pytest.mark.parametrize("at", [3, 16, 30])
def test_resume_knows_a_text_that_was_read_several_times(lm, tmp_path, at):
    """Interrupted in the first, the second and the third pass over the text."""
    config = STREAMED.replace(n_tokens=32 * 40)
    sl.train(streamed(lm, LINES), config, tmp_path / "alone", validation_tokens=40)
    source, out = streamed(lm, LINES), tmp_path / "run"
    with pytest.raises(Stopped):
        sl.train(Interrupted(source, at), config, out, validation_tokens=40)
    (read,) = [json.loads(path.read_text())["source"]["rows"] for path in out.glob("checkpoints/*/state.json")]
    assert read["ended"] == (at > 3)
    others = [LINES[::-1], [line.replace("sea", "bay") for line in LINES], LINES[:5]]
    others += [swapped(LINES), swapped(LINES, -1, -2), [*LINES, "More."], LINES[:-1]] if read["ended"] else []
    for other in others:
        with pytest.raises(SourceChangedError, match="the run was trained on"):
            sl.resume(out, streamed(lm, other))
    sl.resume(out, streamed(lm, LINES))
    assert contents(out) == contents(tmp_path / "alone")


def test_a_text_that_changes_from_pass_to_pass_is_said(lm, caplog):
    class Changing:
        n = 0

        def __iter__(self):
            self.n += 1
            return iter(LINES[:20] if self.n < 3 else swapped(LINES[:20]))

    batches = streamed(lm, Changing()).batches(HOOKS[:1], 32, 0)
    for _ in range(40):
        next(batches)
    assert "the text has changed since it was first read (20 rows, now 20)" in caplog.text


def test_resume_refuses_another_kind_of_source(cache, lm, documents, tmp_path):
    interrupted_stream(streamed(lm, documents), tmp_path / "run")
    with pytest.raises(SourceChangedError, match="the run was trained on a stream, not on a cache"):
        sl.resume(tmp_path / "run", cache)
    x = TensorSource(torch.randn(600, lm.d_model), hook=HOOKS[0])
    with pytest.raises(SourceChangedError, match="the run was trained on a stream, not on tensors"):
        sl.resume(tmp_path / "run", x)


def test_resume_refuses_the_same_tensors_in_another_order(x, tmp_path):
    out = interrupted_run(x, tmp_path / "run")
    for other in (x.flip(0), x.double(), x.index_put((torch.tensor(3), torch.tensor(1)), torch.tensor(9.0))):
        with pytest.raises(SourceChangedError, match="these tensors are not those the run was trained on, which had sha256"):
            sl.resume(out, TensorSource(other))
    sl.resume(out, TensorSource(x.clone()))


def test_resume_refuses_a_cache_with_a_shard_of_another(cache, lm, documents, tmp_path):
    """Whole, of the same size, and with checksums of its own that fit; only the manifest is the old one."""
    shutil.copytree(cache.path, tmp_path / "cache")
    with pytest.raises(Stopped):
        sl.train(Interrupted(sl.ActivationCache.open(tmp_path / "cache"), 3), STREAMED, tmp_path / "run")
    flipped = [documents[1], documents[0], *documents[2:]]
    other = sl.capture(lm, flipped, HOOKS, tmp_path / "other", n_ctx=32, dtype="float32", shard_tokens=101, batch_tokens=128)
    shard = "shard-00001.safetensors"
    assert (other.path / shard).stat().st_size == (tmp_path / "cache" / shard).stat().st_size
    shutil.copyfile(other.path / shard, tmp_path / "cache" / shard)
    for source in (None, sl.ActivationCache.open(tmp_path / "cache")):
        with pytest.raises(SourceChangedError, match="is not the cache the run was trained on, which had checksums_sha256"):
            sl.resume(tmp_path / "run", source)
    shutil.copyfile(cache.path / shard, tmp_path / "cache" / shard)
    sl.resume(tmp_path / "run")


def without_source(run: Path) -> None:
    """Make the checkpoints those of a version that does not note what was read."""
    for folder in checkpoints_of(run):
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        del state["source"]
        (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")
        content = json.loads((folder / "checksums.json").read_text(encoding="utf-8"))
        content["sha256"]["state.json"] = files.file_hash(folder / "state.json")
        (folder / "checksums.json").write_text(json.dumps(content), encoding="utf-8")


def test_an_older_checkpoint_is_resumed_with_a_warning(lm, tmp_path, caplog):
    sl.train(streamed(lm, LINES), STREAMED, tmp_path / "alone")
    interrupted_stream(streamed(lm, LINES), tmp_path / "run")
    without_source(tmp_path / "run")
    sl.resume(tmp_path / "run", streamed(lm, LINES))
    assert (
        "the checkpoint has no record of the activations, so the source cannot be compared with that of the run" in caplog.text
    )
    assert contents(tmp_path / "run") == contents(tmp_path / "alone")


def test_an_unfinished_capture_is_not_continued_with_other_context(lm, tmp_path, broken_off, monkeypatch):
    """The tokens that count, which are in the shards, are the same; what stands before them is not."""
    rows = token_rows(lm, LINES, n_ctx=32)
    broken_off(5, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        sl.capture(lm, rows, HOOKS, tmp_path / "cache", **settings(n_ctx=None))
    monkeypatch.undo()
    assert list((tmp_path / ".cache.unfinished").rglob("shard-*"))
    tokens = rows.tokens.clone()
    tokens[:, 0] = 7
    with pytest.raises(OutputExistsError, match=r"of another text: its token rows 0 to \d+ differ"):
        sl.capture(lm, rows._replace(tokens=tokens), HOOKS, tmp_path / "cache", **settings(n_ctx=None))
    sl.capture(lm, rows, HOOKS, tmp_path / "cache", **settings(n_ctx=None))
    sl.capture(lm, rows, HOOKS, tmp_path / "alone", **settings(n_ctx=None))
    assert contents(tmp_path / "cache") == contents(tmp_path / "alone")


def test_a_stream_is_resumed_from_the_command_line(lm, tmp_path, command):
    """Its text is found again, also where it was moved to, and another one is refused."""
    path = text_file(LINES, tmp_path)
    sl.train(streamed(lm, path), STREAMED, tmp_path / "alone")
    for name in ("first", "second"):
        interrupted_stream(streamed(lm, path), tmp_path / name)
    assert command("train", "--resume", tmp_path / "first").code == 0
    assert contents(tmp_path / "first") == contents(tmp_path / "alone")
    moved, out = tmp_path / "elsewhere/book.txt", tmp_path / "second"
    moved.parent.mkdir()
    path.rename(moved)
    code, _, err = command("train", "--resume", out)
    assert (code, "no text file at" in err) == (2, True)
    other = tmp_path / "other.txt"
    other.write_text("\n".join(LINES[::-1]))
    code, _, err = command("train", "--resume", out, "--text", other)
    assert (code, "the run was trained on" in err) == (2, True)
    assert command("train", "--resume", out, "--text", moved).code == 0
    assert contents(out) == contents(tmp_path / "alone")


def test_a_run_on_a_cache_is_not_resumed_on_a_text(cache, tmp_path, command):
    with pytest.raises(Stopped):
        sl.train(Interrupted(cache, 3), STREAMED, tmp_path / "run")
    code, _, err = command("train", "--resume", tmp_path / "run", "--text", "python-docs")
    assert (code, "the run was trained on the cache" in err) == (2, True)
    with pytest.raises(ConfigError, match="both a source and a text were given"):
        sl.resume(tmp_path / "run", cache, text="python-docs")
