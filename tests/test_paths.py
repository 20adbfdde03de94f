"""Paths that cannot work: each function and each command that takes one says so by a typed error and touches nothing."""

import os
from pathlib import Path

import pytest

import saelens_lite as sl
from saelens_lite.demo import demo
from saelens_lite.errors import SaelensLiteError
from saelens_lite.features.compare import Stability
from saelens_lite.formats import inspect
from saelens_lite.hub import write_card

HOOK = "blocks.1.hook_resid_pre"


def long_path(folder: Path) -> Path:
    return folder.joinpath(*["x" * 200] * 25)


BAD = {
    "long name": lambda folder: folder / ("x" * 300),
    "long name in a folder": lambda folder: folder / ("x" * 300) / "a",
    "long path": long_path,
    "NUL": lambda folder: folder / "a\0b",
    "half a character": lambda folder: folder / "a\ud800b",
    "broken link": lambda folder: folder / "link",
    "below a broken link": lambda folder: folder / "link/a",
    "link to itself": lambda folder: folder / "loop",
    "below a file": lambda folder: folder / "file/a",
    "below a device": lambda _: Path("/dev/null/a"),
}
BAD_OUTPUT = {"no room for a temporary name": lambda folder: folder / ("x" * 250)}


@pytest.fixture
def place(tmp_path):
    folder = tmp_path / "place"
    folder.mkdir()
    (folder / "link").symlink_to(folder / "nowhere")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "file").write_text("kept")
    yield folder
    assert sorted(os.listdir(folder)) == ["file", "link", "loop"]
    assert (folder / "file").read_text() == "kept"


@pytest.fixture(scope="module")
def made(lm, tmp_path_factory):
    """One of each thing that is read and written."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "book.txt").write_text("Once upon a time there was a book. " * 40)
    cache = sl.capture(lm, folder / "book.txt", HOOK, folder / "cache", n_tokens=200, n_ctx=32)
    (run,) = sl.train(cache, sl.TrainConfig(d_sae=16, n_tokens=100, batch_size=50), out=folder / "run")
    d = run.dictionary
    d.save(folder / "d")
    store = sl.FeatureStore.build(d, lm, folder / "book.txt", n_tokens=100)
    report = sl.evaluate(d, lm, folder / "book.txt", n_tokens=100, n_bootstrap=5)
    return {"folder": folder, "cache": cache, "d": d, "store": store, "report": report, "lm": lm}


READERS = {
    "Dictionary.load": lambda made, path: sl.Dictionary.load(path),
    "Dictionary.load, format": lambda made, path: sl.Dictionary.load(path, format="saelens"),
    "inspect": lambda made, path: inspect(path),
    "convert": lambda made, path: sl.convert(path, made["folder"] / "converted", "saelens"),
    "load_model": lambda made, path: sl.load_model(path),
    "ActivationCache.open": lambda made, path: sl.ActivationCache.open(path),
    "resume": lambda made, path: sl.resume(path),
    "FeatureStore.load": lambda made, path: sl.FeatureStore.load(path),
    "read_labels": lambda made, path: made["store"].read_labels(path),
    "EvalReport.from_json": lambda made, path: sl.EvalReport.from_json(path),
    "Stability.load": lambda made, path: Stability.load(path),
    "capture": lambda made, path: sl.capture(made["lm"], path, HOOK, made["folder"] / "other", n_tokens=50),
    "evaluate": lambda made, path: sl.evaluate(made["d"], made["lm"], path, n_tokens=50),
    "FeatureStore.build": lambda made, path: sl.FeatureStore.build(made["d"], made["lm"], path, n_tokens=50),
    "push": lambda made, path: sl.push(path, "user/repo", dry_run=True),
}
WRITERS = {
    "Dictionary.save": lambda made, path: made["d"].save(path),
    "Dictionary.save, overwrite": lambda made, path: made["d"].save(path, exists="overwrite"),
    "convert": lambda made, path: sl.convert(made["folder"] / "d", path, "saelens"),
    "capture": lambda made, path: sl.capture(made["lm"], made["folder"] / "book.txt", HOOK, path, n_tokens=50, n_ctx=32),
    "train": lambda made, path: sl.train(made["cache"], sl.TrainConfig(d_sae=8, n_tokens=50, batch_size=50), out=path),
    "FeatureStore.build": lambda made, path: sl.FeatureStore.build(
        made["d"], made["lm"], made["folder"] / "book.txt", n_tokens=50, out=path
    ),
    "FeatureStore.save": lambda made, path: made["store"].save(path),
    "write_labels": lambda made, path: made["store"].write_labels(path),
    "dashboard": lambda made, path: made["store"].dashboard(path),
    "dashboard, overwrite": lambda made, path: made["store"].dashboard(path, exists="overwrite"),
    "to_json": lambda made, path: made["report"].to_json(path),
    "write_card": lambda made, path: write_card(path, made["d"]),
    "demo": lambda made, path: demo(path),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("bad", BAD)
def test_readers_refuse(bad, reader, place, made):
    with pytest.raises(SaelensLiteError):
        READERS[reader](made, BAD[bad](place))


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("bad", BAD | BAD_OUTPUT)
def test_writers_refuse(bad, writer, place, made):
    with pytest.raises(SaelensLiteError):
        WRITERS[writer](made, (BAD | BAD_OUTPUT)[bad](place))
