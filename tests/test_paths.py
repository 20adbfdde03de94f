"""Paths that cannot work: each function and each command that takes one says so by a typed error and touches nothing."""

import errno
import os
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import saelens_lite as sl
from saelens_lite import registry
from saelens_lite.demo import demo
from saelens_lite.errors import ConfigError, CorruptFileError, DiskFullError, OutputExistsError, SaelensLiteError
from saelens_lite.features.compare import Stability
from saelens_lite.features.labels import Labels
from saelens_lite.files import disk_full_is_typed
from saelens_lite.formats import inspect, write_torch
from saelens_lite.formats import write as write_as
from saelens_lite.hub import write_card
from saelens_lite.paths import check_input, check_output
from saelens_lite.tensor_files import write_tensors

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
    "load": lambda made, path: sl.load(path),
    "load, format": lambda made, path: sl.load(path, format="saelens"),
    "inspect": lambda made, path: inspect(path),
    "convert": lambda made, path: sl.convert(path, made["folder"] / "converted", "saelens"),
    "load_model": lambda made, path: sl.load_model(path),
    "ActivationCache.open": lambda made, path: sl.ActivationCache.open(path),
    "resume": lambda made, path: sl.resume(path),
    "FeatureStore.load": lambda made, path: sl.FeatureStore.load(path),
    "read_labels": lambda made, path: made["store"].read_labels(path),
    "labels.load": lambda made, path: sl.labels.load(path, made["d"]),
    "labels.from_neuronpedia": lambda made, path: sl.labels.from_neuronpedia(made["d"], path),
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
    "Labels.save": lambda made, path: Labels({}, 16, "hash").save(path),
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


OF_TEXT = ("capture", "evaluate", "FeatureStore.build")


@pytest.mark.parametrize(
    ("reader", "name"),
    [*((reader, ".") for reader in READERS), *((reader, "file") for reader in READERS if reader not in OF_TEXT)],
)
def test_readers_refuse_a_folder_in_place_of_a_file_and_the_other_way_round(name, reader, place, made):
    with pytest.raises(SaelensLiteError):
        READERS[reader](made, place / name)


@pytest.mark.parametrize("writer", ["to_json", "write_labels", "Labels.save", "dashboard", "dashboard, overwrite"])
def test_writers_of_files_refuse_a_folder(writer, place, made):
    with pytest.raises(SaelensLiteError):
        WRITERS[writer](made, place)


@pytest.mark.parametrize(
    "writer", sorted(WRITERS.keys() - {"Dictionary.save, overwrite", "to_json", "write_labels", "dashboard, overwrite"})
)
def test_writers_refuse_a_file_that_is_there(writer, place, made):
    with pytest.raises(SaelensLiteError):
        WRITERS[writer](made, place / "file")


@pytest.fixture
def closed(tmp_path):
    """A folder in which nobody can make a file or folder, not even the administrator."""
    if os.geteuid() == 0:
        yield Path("/proc")
    else:
        folder = tmp_path / "closed"
        folder.mkdir(mode=0o500)
        yield folder
        folder.chmod(0o700)


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("name", ["new", "new/inner"])
def test_writers_refuse_a_folder_in_which_nothing_can_be_made(name, writer, closed, made):
    with pytest.raises(SaelensLiteError):
        WRITERS[writer](made, closed / name)


COMMANDS = {
    "inspect": ["inspect", "BAD"],
    "convert, source": ["convert", "BAD", "NEW", "--format", "saelens"],
    "convert, out": ["convert", "D", "BAD", "--format", "saelens"],
    "push": ["push", "BAD", "user/repo", "--dry-run"],
    "pull": ["pull", "user/repo", "--out", "BAD"],
    "capture, text": ["capture", "BAD", "--hooks", HOOK, "--out", "NEW"],
    "capture, model": ["capture", "BOOK", "--hooks", HOOK, "--out", "NEW", "--model", "BAD"],
    "capture, out": ["capture", "BOOK", "--hooks", HOOK, "--n-tokens", "50", "--n-ctx", "32", "--out", "BAD"],
    "train, cache": ["train", "BAD", "--out", "NEW", "--d-sae", "8", "--n-tokens", "50"],
    "train, text": ["train", "--text", "BAD", "--hook", HOOK, "--out", "NEW", "--d-sae", "8", "--n-tokens", "50"],
    "train, config": ["train", "CACHE", "--config", "BAD"],
    "train, resume": ["train", "--resume", "BAD"],
    "train, out": ["train", "CACHE", "--out", "BAD", "--d-sae", "8", "--n-tokens", "50", "--batch-size", "50"],
    "eval": ["eval", "BAD"],
    "eval, text": ["eval", "D", "--text", "BAD"],
    "eval, json": ["eval", "D", "--text", "BOOK", "--json", "BAD"],
    "check-hook": ["check-hook", "BAD"],
    "check-hook, json": ["check-hook", "D", "--text", "BOOK", "--n-tokens", "50", "--json", "BAD"],
    "probe": ["probe", "BAD", "BOOK"],
    "probe, data": ["probe", "D", "BAD"],
    "compare": ["compare", "D", "BAD"],
    "compare, out": ["compare", "D", "D", "--out", "BAD"],
    "compare, json": ["compare", "D", "D", "--json", "BAD"],
    "features": ["features", "BAD", "--html", "NEW"],
    "features, html": ["features", "D", "--text", "BOOK", "--html", "BAD"],
    "features, out": ["features", "D", "--text", "BOOK", "--n-tokens", "50", "--html", "NEW", "--out", "BAD"],
    "dashboard": ["dashboard", "BAD", "--html", "NEW"],
    "steer": ["steer", "BAD", "--prompt", "a", "--clamp", "1=2"],
    "doses": ["doses", "BAD", "--latent", "1"],
    "attribute": ["attribute", "BAD", "--prompt", "a"],
    "attribute, json": ["attribute", "D", "--prompt", "a", "--json", "BAD"],
    "prompt": ["prompt", "BAD", "--prompt", "a"],
    "prompt, store": ["prompt", "D", "--prompt", "a b", "--store", "BAD"],
    "prompt, json": ["prompt", "D", "--prompt", "a b", "--json", "BAD"],
    "demo": ["demo", "BAD"],
}


@pytest.mark.parametrize("bad", ["long name", "NUL", "broken link", "link to itself", "below a file"])
@pytest.mark.parametrize("name", COMMANDS)
def test_commands_end_with_one_line(name, bad, place, made, command, tmp_path):
    folder = made["folder"]
    places = {"D": folder / "d", "CACHE": folder / "cache", "BOOK": folder / "book.txt", "NEW": tmp_path / "new"}
    arguments = [BAD[bad](place) if word == "BAD" else places.get(word, word) for word in COMMANDS[name]]
    said = command(*arguments)
    assert said.code == 2, said
    assert said.err.startswith("saelens-lite: ")
    assert said.err.count("\n") == 1
    assert not any(word in said.err for word in ("Traceback", "Error:", "Errno"))
    assert not (tmp_path / "new").exists()


def test_what_the_errors_say(place):
    for path, error, message in [
        (place / ("x" * 300), ConfigError, r"a name in it is too long; at most 255 bytes are possible here"),
        (long_path(place), ConfigError, "is longer than 4096 bytes"),
        (place / "a\0b", ConfigError, r"a\\x00b' cannot be a path: it holds a NUL character"),
        (place / "link", CorruptFileError, r"link is a link to .*nowhere, which is missing; is that the path you meant\?"),
        (place / "link/a", CorruptFileError, "link is a link to .*nowhere, which is missing"),
        (place / "file/a", CorruptFileError, "Not a directory"),
    ]:
        with pytest.raises(error, match=message):
            check_input(path)
    for path, error, message in [
        (place / ("x" * 250), ConfigError, r"a name in it is too long; at most 215 bytes are possible here"),
        (
            place / "link",
            OutputExistsError,
            "link is a link to .*nowhere, which is missing; remove the link",
        ),
        (place / "file/a/b", OutputExistsError, r"because .*file is not a folder; choose another place"),
    ]:
        with pytest.raises(error, match=message):
            check_output(path)


def test_paths_that_work_are_let_through(place, tmp_path):
    for path in (place, place / "file", place / "new/inner", "relative", Path("."), place / ("x" * 215), place / "日本 é\n"):
        assert check_output(path) == Path(path)
        assert check_input(path) == Path(path)
    (tmp_path / "good").symlink_to(place / "file")
    assert check_output(tmp_path / "good") == check_input(tmp_path / "good") == tmp_path / "good"
    assert check_input(place / ("x" * 255)).name == "x" * 255


# A full disk


@contextmanager
def files_of_at_most(n_bytes: int):
    import resource
    import signal

    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)  # before pytest writes to its own output, which may be a file
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("write", [write_torch, write_tensors])
def test_a_file_of_tensors_that_does_not_fit_is_a_full_disk(write, tmp_path):
    (tmp_path / "f").write_text("old")
    with (
        pytest.raises(DiskFullError, match="f cannot be written: the disk is full or a quota is reached"),
        files_of_at_most(50_000),
    ):
        write(tmp_path / "f", {"a": torch.zeros(100_000)})
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize("name", ["saelens_lite", "saelens", "dictionary_learning", "sparsify"])
def test_dictionaries_that_do_not_fit_are_a_full_disk(name, tmp_path):
    d = sl.Dictionary.create("topk", reads=64, d_sae=512)
    write = d.save if name == "saelens_lite" else lambda out: write_as(d, out, registry.load(name, "formats")())
    with pytest.raises(DiskFullError), files_of_at_most(50_000):
        write(tmp_path / "d")
    assert not list(tmp_path.iterdir())


def test_what_is_written_by_torch_is_what_torch_reads(tmp_path):
    write_torch(tmp_path / "a", {"x": torch.arange(5.0)})
    write_torch(tmp_path / "b", {"x": torch.arange(5.0)})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    torch.testing.assert_close(torch.load(tmp_path / "a", weights_only=True)["x"], torch.arange(5.0))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_known_behind_other_errors(code, tmp_path):
    def fails():
        try:
            raise OSError(code, os.strerror(code))
        except OSError:
            raise RuntimeError("the writer of a library failed")  # noqa: B904 (as libraries do)

    with pytest.raises(DiskFullError, match="out cannot be written"), disk_full_is_typed(tmp_path / "out"):
        fails()
    with pytest.raises(RuntimeError, match="else"), disk_full_is_typed(tmp_path / "out"):
        raise RuntimeError("something else")
