"""Folders that appear whole, and files as every system and every reader takes them."""

import ast
import os
import shutil
from pathlib import Path

import pytest
from interrupted import Interrupted
from windows import windows_rules

import saelens_lite as sl
from saelens_lite import files
from saelens_lite.errors import ConfigError, CorruptFileError, Stopped
from saelens_lite.features.labels import read_labels, write_labels
from saelens_lite.kinds import DICTIONARY
from saelens_lite.outputs import new_folder
from saelens_lite.training.history import History


def test_a_new_folder_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Or a power cut leaves a folder of that name with files that are empty."""
    synced, at_renaming = set(), []
    fsync, replace = os.fsync, os.replace

    def noting(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def checking(source, target) -> None:
        at_renaming.append({path.name for path in source.rglob("*") if path.stat().st_ino not in synced})
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noting)
    monkeypatch.setattr(os, "replace", checking)
    with new_folder(tmp_path / "out", DICTIONARY) as new:
        (new / "inner").mkdir()
        for name in ("a", "inner/b"):
            (new / name).write_text("content")
    assert at_renaming == [set()]
    assert sorted(path.name for path in (tmp_path / "out").rglob("*")) == ["a", "b", "inner"]


HOOK = "blocks.1.hook_resid_pre"


def test_all_that_is_written_obeys_the_rules_of_windows(lm, tmp_path):
    """Nothing is synced through a handle that only reads; nothing open is removed, renamed or replaced, locks included."""
    text = ["The old man looked at the sea and said nothing."] * 40
    d = sl.Dictionary.create("topk", reads=sl.Port(hook=HOOK, width=lm.d_model), d_sae=64, options={"k": 4})
    configs = [sl.TrainConfig(d_sae=32, options={"k": 4}, n_tokens=n, batch_size=64) for n in (640, 320)]
    with windows_rules():
        for _ in range(2):  # the second time in place of the first
            d.save(tmp_path / "dictionary", exists="overwrite")
            cache = sl.capture(lm, text, HOOK, tmp_path / "cache", exists="overwrite")
            sl.train(cache, configs, tmp_path / "runs", checkpoint_seconds=0.0, exists="overwrite")
            store = sl.FeatureStore.build(d, lm, text, out=tmp_path / "store", codes=True, exists="overwrite")
            store.label(3, "a label")
        # what was read does not stay open either
        sl.Dictionary.load(tmp_path / "dictionary").save(tmp_path / "dictionary", exists="overwrite")
        sl.FeatureStore.load(tmp_path / "store").save(tmp_path / "store", exists="overwrite")
        with pytest.raises(Stopped):
            sl.train(Interrupted(cache, 5), configs[0], tmp_path / "run", checkpoint_seconds=0.0)
        sl.resume(tmp_path / "run", cache, checkpoint_seconds=0.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "dictionary", "run", "runs", "store"]


def test_the_rules_of_windows_are_those(tmp_path):
    """The stand-in above would notice each of the faults."""
    if not Path("/proc/self/maps").exists():
        return
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a/file").write_text("content")
    with windows_rules(), open(tmp_path / "a/file", "rb") as file:
        for attempt in (
            lambda: os.fsync(file.fileno()),
            lambda: shutil.rmtree(tmp_path / "a"),
            (tmp_path / "a/file").unlink,
            lambda: os.replace(tmp_path / "a", tmp_path / "c"),
            lambda: os.replace(tmp_path / "a", tmp_path / "b"),
        ):
            with pytest.raises(OSError, match="Windows"):
                attempt()
    assert (tmp_path / "a/file").read_text() == "content"


def test_only_one_function_syncs_files():
    calls = {
        (path.name, node.name)
        for path in Path(sl.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and "os.fsync(" in ast.unparse(node)
    }
    assert calls == {("files.py", "sync"), ("files.py", "sync_folder")}


def test_what_is_written_as_json_can_be_read(tmp_path, monkeypatch):
    """One limit for both: no work is saved that nobody can read again."""
    file = tmp_path / "a.json"
    monkeypatch.setattr(files, "MAX_JSON_BYTES", 1000)
    fits = {"a": "x" * (1000 - len('{\n  "a": ""\n}\n'))}
    files.write_json(file, fits)
    assert file.stat().st_size == 1000
    assert files.read_json(file) == fits
    too_large = {"a": fits["a"] + "é"}
    with pytest.raises(
        ConfigError, match=r"a\.json would have 1,002 bytes; at most 1,000 can be read again. Nothing was written"
    ):
        files.write_json(file, too_large)
    assert files.read_json(file) == fits
    files.write_json(file, too_large, 2000)
    with pytest.raises(CorruptFileError, match="1,002 bytes is too large"):
        files.read_json(file)
    assert files.read_json(file, 2000) == too_large


def test_nesting_has_one_limit_for_both(tmp_path):
    value: dict = {}
    for _ in range(files.MAX_JSON_DEPTH):
        value = {"a": value}
    files.write_json(tmp_path / "a.json", value)
    assert files.read_json(tmp_path / "a.json") == value
    with pytest.raises(ConfigError, match="nested deeper"):
        files.write_json(tmp_path / "a.json", {"a": value})


def test_caches_and_labels_may_be_larger_than_settings(lm, documents, tmp_path, monkeypatch):
    """They grow with the data."""
    monkeypatch.setattr(files, "MAX_JSON_BYTES", 2000)
    sl.capture(lm, documents, HOOK, tmp_path / "cache", n_ctx=32, shard_tokens=20)
    assert (tmp_path / "cache/manifest.json").stat().st_size > 2000
    assert sl.ActivationCache.open(tmp_path / "cache").n_tokens > 0
    labels = {i: "some words" for i in range(200)}
    write_labels(tmp_path / "labels.json", labels, "hash")
    assert read_labels(tmp_path / "labels.json", "hash", 200) == labels


def test_lines_come_back_exactly(tmp_path):
    lines = [{"step": i, "loss": 0.1 * i, "ü": [None, True]} for i in range(50)] + [{"loss": float("inf")}]
    History(lines).save(tmp_path / "log")
    assert files.read_lines(tmp_path / "log") == lines
    assert b"\r" not in (tmp_path / "log").read_bytes()
    for content, wanted in (("{}\n{", "line 2: not valid JSON"), ("{}\n3\n", "other than a JSON object")):
        (tmp_path / "log").write_text(content)
        with pytest.raises(CorruptFileError, match=wanted):
            files.read_lines(tmp_path / "log")
