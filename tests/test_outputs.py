"""Nothing but the output itself is touched: overwriting, leftovers of killed processes, locks and permissions."""

import hashlib
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from interrupted import Interrupted

import saelens_lite as sl
from saelens_lite import outputs
from saelens_lite.cache import TensorSource
from saelens_lite.errors import ConfigError, LockedError, OutputExistsError, PluginError, SaelensLiteError, Stopped
from saelens_lite.hub import write_card
from saelens_lite.kinds import CACHE, DICTIONARY, RUN, foreign
from saelens_lite.locks import locked
from saelens_lite.outputs import leftovers, new_folder, temporary

HOOK = "blocks.1.hook_resid_pre"
QUICK = {"d_sae": 16, "options": {"k": 2}, "n_tokens": 200, "batch_size": 20}


def contents(folder: Path) -> dict[str, str | None]:
    """Return the hash of each file below a folder, and None for each folder."""
    paths = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else None for p in paths}


def neighbours(out: Path) -> None:
    """Files and folders beside `out` whose names resemble those of its temporary files."""
    token = "0123456789abcdef"
    name = out.name
    for beside in (
        *(f"{name}.v2", f"{name}.html", f"{name}.tmp", f"{name}.old", f".{name}", f"{name}~", f"{name}1", f"x{name}"),
        *(f".{name}.tmp", f".{name}.old", f".{name}.v2.tmp", f".{name}.abc.old", f".{name}.v2.unfinished", f".{name}.1234.tmp"),
        *(f".{name}.v2.saelens-lite-{token}.old", f".{name}.html.saelens-lite-{token}.tmp", f".{name}.saelens-lite-{token}"),
        *(f".{name}.saelens-lite-{token[:-1]}.tmp", f".x.{name}.saelens-lite-{token}.tmp", f".{name}.SAELENS-LITE-{token}.tmp"),
    ):
        (out.parent / beside).mkdir(parents=True)
        (out.parent / beside / "book.txt").write_text("the only copy")
    (out.parent / f".{name}.v2.saelens-lite.lock").write_text("")
    (out.parent / f"{name}.txt").write_text("the only copy")


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(400, 8, generator=torch.Generator().manual_seed(0))


def a_dictionary() -> sl.Dictionary:
    return sl.Dictionary.create("topk", reads=sl.Port(hook=HOOK, width=48), d_sae=64, options={"k": 4})


@pytest.fixture
def dictionary() -> sl.Dictionary:
    return a_dictionary()


TEXT = ["The old man looked at the sea and said nothing."] * 12


@pytest.fixture(scope="module")
def given(random_lm, tmp_path_factory) -> tuple[Path, sl.FeatureStore]:
    """The folder of a dictionary, and its store."""
    d = a_dictionary()
    return d.save(tmp_path_factory.mktemp("given") / "dictionary"), sl.FeatureStore.build(d, random_lm, TEXT)


@pytest.fixture
def writers(dictionary, random_lm, x, given):
    """Everything that writes an output folder, by name: write(out, exists)."""
    folder, store = given
    return {
        "save": lambda out, exists="error": dictionary.save(out, exists=exists),
        "capture": lambda out, exists="error": sl.capture(random_lm, TEXT, HOOK, out, exists=exists),
        "train": lambda out, exists="error": sl.train(TensorSource(x), sl.TrainConfig(**QUICK), out, exists=exists),
        "build": lambda out, exists="error": sl.FeatureStore.build(dictionary, random_lm, TEXT, out=out, exists=exists),
        "store": lambda out, exists="error": store.save(out, exists=exists),
        "convert": lambda out, exists="error": sl.convert(folder, out, "sparsify", exists=exists),
    }


WRITERS = ("save", "capture", "train", "build", "store", "convert")


@pytest.mark.parametrize("name", WRITERS)
def test_neighbours_with_similar_names_are_not_touched(writers, name, tmp_path):
    out = tmp_path / "here" / "out"
    neighbours(out)
    before = contents(out.parent)
    writers[name](out)
    writers[name](out, "overwrite")
    with pytest.raises(OutputExistsError):
        writers[name](out)
    after = contents(out.parent)
    assert {path: found for path, found in after.items() if path.split("/")[0] != "out"} == before
    assert len(after) > len(before)


@pytest.mark.parametrize("name", WRITERS)
def test_overwriting_refuses_a_folder_with_anything_else_in_it(writers, given, name, tmp_path):
    """An empty folder of somebody's is no loss; a file or a link is."""
    out = tmp_path / "here" / "out"
    writers[name](out)
    (out / "notes.txt").write_text("mine")
    before = contents(out.parent)
    with pytest.raises(OutputExistsError, match=r"holds 'notes\.txt', which the new .* would not have"):
        writers[name](out, "overwrite")
    assert contents(out.parent) == before
    (out / "notes.txt").unlink()
    (out / "link").symlink_to(given[0])
    with pytest.raises(OutputExistsError, match="'link'"):
        writers[name](out, "overwrite")
    assert (given[0] / "cfg.json").exists()


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("content", [["book.txt"], ["README.md"], ["config.toml"], ["manifest.json", "book.txt"]], ids=str)
def test_overwriting_refuses_a_folder_of_another_kind(writers, name, content, tmp_path):
    out = tmp_path / "here"
    out.mkdir()
    for file in content:
        (out / file).write_text('[project]\nname = "mine"')
    before = contents(tmp_path)
    with pytest.raises(OutputExistsError):
        writers[name](out, "overwrite")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("first", WRITERS)
@pytest.mark.parametrize("then", WRITERS)
def test_one_kind_of_output_does_not_replace_another(writers, first, then, tmp_path):
    kinds = {"save": "dictionary", "convert": "dictionary", "build": "store", "store": "store"}
    out = tmp_path / "here" / "out"
    writers[first](out)
    before = contents(out)
    if kinds.get(first, first) == kinds.get(then, then) and (first, then) != ("convert", "save"):
        writers[then](out, "overwrite")
    else:
        with pytest.raises(OutputExistsError):
            writers[then](out, "overwrite")
        assert contents(out) == before


def test_a_text_is_not_overwritten_by_its_own_activations(random_lm, dictionary, tmp_path):
    book = tmp_path / "data" / "book.txt"
    book.parent.mkdir()
    book.write_text("It was the best of times. " * 20)
    for write in (
        lambda out: sl.capture(random_lm, book, HOOK, out, exists="overwrite"),
        lambda out: sl.FeatureStore.build(dictionary, random_lm, book, out=out, exists="overwrite"),
    ):
        with pytest.raises(OutputExistsError, match=r"book\.txt"):
            write(tmp_path / "data")
    assert book.read_text().startswith("It was")


def test_training_does_not_remove_the_cache_it_reads(random_lm, tmp_path):
    cache = sl.capture(random_lm, TEXT, HOOK, tmp_path / "proj" / "cache")
    before = contents(tmp_path)
    with pytest.raises(OutputExistsError, match="cache/manifest"):
        sl.train(cache, sl.TrainConfig(**QUICK), tmp_path / "proj", exists="overwrite")
    assert contents(tmp_path) == before


def test_training_does_not_remove_the_text_it_reads(random_lm, x, tmp_path):
    sl.train(TensorSource(x), sl.TrainConfig(**QUICK), tmp_path / "run")
    stream = sl.ActivationStream(random_lm, tmp_path / "run" / "log.jsonl", HOOK, text_config=sl.TextConfig(column="tokens"))
    before = contents(tmp_path)
    with pytest.raises(OutputExistsError, match=r"log\.jsonl is an input, and replacing .* would remove it"):
        sl.train(stream, sl.TrainConfig(**QUICK), tmp_path / "run", exists="overwrite")
    assert contents(tmp_path) == before


def test_converting_does_not_replace_its_source(dictionary, tmp_path):
    own = dictionary.save(tmp_path / "own")
    before = contents(own)
    with pytest.raises(OutputExistsError, match=r"is an input, and replacing .* would remove it"):
        sl.convert(own, own, "sparsify", exists="overwrite")
    assert contents(own) == before


def test_labels_survive_the_overwriting_of_a_store(dictionary, random_lm, tmp_path):
    out = tmp_path / "store"
    store = sl.FeatureStore.build(dictionary, random_lm, TEXT, out=out)
    store.label(3, "about the sea")
    store.write_labels()
    with pytest.raises(OutputExistsError, match=r"'labels\.json'"):
        sl.FeatureStore.build(dictionary, random_lm, TEXT, out=out, exists="overwrite")
    sl.FeatureStore.load(out).save(out, exists="overwrite")
    assert sl.FeatureStore.load(out).labels == {3: "about the sea"}


def test_a_link_is_followed_when_its_target_is_replaced(dictionary, tmp_path):
    dictionary.save(tmp_path / "disk" / "d")
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "d")
    dictionary.W_dec.data.mul_(2)
    dictionary.save(tmp_path / "link", exists="overwrite")
    assert (tmp_path / "link").is_symlink()
    assert torch.equal(sl.Dictionary.load(tmp_path / "disk" / "d").W_dec, dictionary.W_dec)


def test_pages_reports_and_cards_replace_only_their_like(dictionary, random_lm, tmp_path):
    store = sl.FeatureStore.build(dictionary, random_lm, TEXT)
    (tmp_path / "page.html").write_text("a book")
    with pytest.raises(OutputExistsError, match="is not a page"):
        store.dashboard(tmp_path / "page.html", exists="overwrite")
    (tmp_path / "README.md").write_text("# My project")
    with pytest.raises(OutputExistsError, match="is not the card of a dictionary"):
        write_card(tmp_path, dictionary)
    saved = dictionary.save(tmp_path / "d")
    write_card(saved, dictionary)
    write_card(saved, dictionary)
    assert (tmp_path / "page.html").read_text() == "a book"
    assert (tmp_path / "README.md").read_text() == "# My project"


def test_a_json_report_replaces_only_a_report(dictionary, tmp_path, monkeypatch, capsys):
    from saelens_lite.cli import main

    folders = [str(dictionary.save(tmp_path / name)) for name in "ab"]
    (tmp_path / "book.txt").write_text("the only copy")
    monkeypatch.setattr(sys, "argv", ["saelens-lite", "compare", *folders, "--json", str(tmp_path / "book.txt")])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "is not an earlier report" in capsys.readouterr().err
    assert (tmp_path / "book.txt").read_text() == "the only copy"


class TestRuns:
    """The old run waits until the new one is complete."""

    @pytest.fixture
    def run(self, x, tmp_path) -> Path:
        return sl.train(TensorSource(x), sl.TrainConfig(**QUICK), tmp_path / "run")[0].folder

    def test_a_run_that_fails_at_once_leaves_the_old_one(self, run, x):
        before = contents(run.parent)
        bad = x.clone()
        bad[:] = torch.nan
        with pytest.raises(SaelensLiteError):
            sl.train(TensorSource(bad), sl.TrainConfig(**QUICK), run, exists="overwrite")
        assert contents(run.parent) == before

    def test_a_run_whose_data_ends_early_leaves_the_old_one(self, run, x):
        before = contents(run.parent)

        class Broken(TensorSource):
            def batches(self, *given, **kwargs):
                raise OSError("the disk is gone")

        with pytest.raises(OSError, match="disk is gone"):
            sl.train(Broken(x), sl.TrainConfig(**QUICK), run, exists="overwrite")
        assert contents(run.parent) == before

    def test_an_interrupted_run_keeps_the_old_one_until_it_is_complete(self, run, x, caplog):
        source = TensorSource(x)
        old = contents(run)
        config = sl.TrainConfig(**QUICK, seed=5)
        with pytest.raises(Stopped):
            sl.train(Interrupted(source, 4), config, run, exists="overwrite")
        assert "until the new one is complete" in caplog.text
        (waiting,) = leftovers(run, "old")
        assert contents(waiting) == old
        sl.resume(run, source)
        assert [path.name for path in run.parent.iterdir()] == ["run"]
        (whole,) = sl.train(source, config)
        assert torch.equal(sl.Dictionary.load(run / "dictionary").W_dec, whole.dictionary.W_dec)

    @pytest.mark.parametrize("use", ["train", "resume"])
    def test_a_run_killed_before_its_first_checkpoint_is_put_back(self, run, x, use, caplog):
        """As a kill leaves it: the old run aside, and of the new one only settings and a log."""
        before = contents(run)
        outputs.move_aside(run)
        run.mkdir()
        (run / "config.toml").write_bytes((leftovers(run, "old")[0] / "config.toml").read_bytes())
        (run / "log.jsonl").write_text('{"tokens": 20}\n')
        with pytest.raises((OutputExistsError, SaelensLiteError)):
            sl.resume(run, TensorSource(x)) if use == "resume" else sl.train(TensorSource(x), sl.TrainConfig(**QUICK), run)
        assert "the old run is back" in caplog.text
        assert contents(run) == before

    def test_a_sweep_killed_before_its_first_checkpoint_is_put_back(self, x, tmp_path):
        configs = [sl.TrainConfig(**QUICK), sl.TrainConfig(**QUICK, seed=1)]
        with pytest.raises(Stopped):
            sl.train(Interrupted(TensorSource(x), 4), configs, tmp_path / "runs")
        before = contents(tmp_path / "runs")
        for name in ("0-topk", "1-topk", "checkpoints"):
            outputs.move_aside(tmp_path / "runs" / name)
        (tmp_path / "runs" / "0-topk").mkdir()
        with pytest.raises(OutputExistsError, match="interrupted"):
            sl.train(TensorSource(x), configs, tmp_path / "runs")
        assert contents(tmp_path / "runs") == before
        assert len(sl.resume(tmp_path / "runs", TensorSource(x))) == 2

    def test_what_is_not_a_checkpoint_stays(self, x, tmp_path):
        with pytest.raises(Stopped):
            sl.train(Interrupted(TensorSource(x), 4), sl.TrainConfig(**QUICK), tmp_path / "run")
        notes = tmp_path / "run" / "checkpoints" / "2024-notes"
        notes.mkdir()
        (notes / "a.txt").write_text("mine")
        sl.resume(tmp_path / "run", TensorSource(x))
        assert contents(tmp_path / "run" / "checkpoints").keys() == {"2024-notes", "2024-notes/a.txt"}

    def test_a_resume_whose_logger_cannot_start_removes_nothing(self, x, tmp_path, monkeypatch):
        with pytest.raises(Stopped):
            sl.train(Interrupted(TensorSource(x), 4), sl.TrainConfig(**QUICK), tmp_path / "run")
        before = contents(tmp_path / "run")

        @sl.register("broken_logger")
        class Broken(sl.Logger):
            def start(self, folder, config, tokens=0):
                raise OSError("no")

        try:
            with pytest.raises(PluginError, match="cannot start"):
                sl.resume(tmp_path / "run", TensorSource(x), loggers=["broken_logger"])
        finally:
            sl.registry.unregister("broken_logger", "loggers")
        assert contents(tmp_path / "run") == before

    @pytest.mark.parametrize("out", [".", ".."])
    def test_a_run_needs_a_folder_with_a_name(self, x, tmp_path, monkeypatch, out):
        (tmp_path / "a").mkdir()
        monkeypatch.chdir(tmp_path / "a")
        with pytest.raises(ConfigError, match="name a new folder"):
            sl.train(TensorSource(x), sl.TrainConfig(**QUICK), out, exists="overwrite")

    def test_a_folder_of_a_loggers_name_belongs_to_the_run(self, run, x):
        (run / "tensorboard").mkdir()
        (run / "tensorboard" / "events.1").write_text("")
        sl.train(TensorSource(x), sl.TrainConfig(**QUICK), run, exists="overwrite")
        assert not (run / "tensorboard").exists()


class TestReplacement:
    """The old folder or the new one is there at every moment."""

    @pytest.mark.parametrize("can_exchange", [True, False])
    def test_a_kill_at_any_step_leaves_the_old_or_the_new_dictionary(self, dictionary, tmp_path, monkeypatch, can_exchange):
        """Each call that renames, exchanges or removes in turn is the last one that the process makes."""
        old = dictionary.save(tmp_path / "d")
        first = dictionary.W_dec.detach().clone()
        dictionary.W_dec.data.mul_(-1)
        if not can_exchange:
            monkeypatch.setattr(outputs, "exchange", lambda a, b: False)
        for at in range(40):
            place = tmp_path / str(at) / "d"
            place.parent.mkdir()
            shutil.copytree(old, place)
            child = os.fork()
            if child == 0:
                _die_at(at)
                dictionary.save(place, exists="overwrite")
                os._exit(0)
            finished = os.waitpid(child, 0)[1] == 0
            found = sl.Dictionary.load(place).W_dec
            assert torch.equal(found, first) or torch.equal(found, -first)
            assert not finished or torch.equal(found, -first)
            dictionary.save(place, exists="overwrite")
            assert [path.name for path in place.parent.iterdir()] == ["d"]
            if finished:
                break
        assert finished
        assert at > 5

    def test_readers_put_back_what_a_kill_left_aside(self, dictionary, random_lm, tmp_path, caplog):
        dictionary.save(tmp_path / "d")
        sl.capture(random_lm, TEXT, HOOK, tmp_path / "cache")
        sl.FeatureStore.build(dictionary, random_lm, TEXT, out=tmp_path / "store")
        for name, read in (("d", sl.Dictionary.load), ("cache", sl.ActivationCache.open), ("store", sl.FeatureStore.load)):
            outputs.move_aside(tmp_path / name)
            read(tmp_path / name)
            assert f"{tmp_path / name} was being replaced" in caplog.text
        assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "d", "store"]

    def test_an_unfinished_folder_of_somebody_else_is_refused(self, random_lm, tmp_path):
        theirs = tmp_path / ".cache.unfinished"
        theirs.mkdir()
        (theirs / "novel.txt").write_text("mine")
        with pytest.raises(OutputExistsError, match=r"novel\.txt"):
            sl.capture(random_lm, TEXT, HOOK, tmp_path / "cache", exists="overwrite")
        assert contents(tmp_path).keys() == {".cache.unfinished", ".cache.unfinished/novel.txt"}


def _die_at(n: int) -> None:
    """Have the process killed at its n-th call of os.replace, os.rmdir, os.unlink or the exchange of two names."""
    calls = iter(range(n + 1))

    def counted(function):
        def act(*given, **named):
            if next(calls, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*given, **named)

        return act

    for name in ("replace", "rmdir", "unlink", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))
    outputs.exchange = counted(outputs.exchange)


class TestLocks:
    def test_the_error_names_the_process(self, dictionary, tmp_path):
        with locked(tmp_path / "d", "dictionary"), pytest.raises(LockedError, match=rf"process {os.getpid()} on .*dictionary"):
            dictionary.save(tmp_path / "d")
        dictionary.save(tmp_path / "d")
        assert [path.name for path in tmp_path.iterdir()] == ["d"]

    @pytest.mark.parametrize("name", WRITERS)
    def test_every_writer_takes_the_lock(self, writers, name, tmp_path):
        out = tmp_path / "here" / "out"
        with locked(out, "test"), pytest.raises(LockedError):
            writers[name](out)
        assert contents(out.parent) == {}

    def test_resuming_takes_the_lock(self, x, tmp_path):
        with pytest.raises(Stopped):
            sl.train(Interrupted(TensorSource(x), 4), sl.TrainConfig(**QUICK), tmp_path / "run")
        before = contents(tmp_path)
        with locked(tmp_path / "run", "run"), pytest.raises(LockedError):
            sl.resume(tmp_path / "run", TensorSource(x))
        assert contents(tmp_path) == before

    def test_a_lock_of_a_dead_process_is_no_lock(self, dictionary, tmp_path):
        program = (
            "import time; from pathlib import Path; from saelens_lite.locks import locked\n"
            f"with locked(Path({str(tmp_path / 'd')!r}), 'x'): print(1, flush=True); time.sleep(60)"
        )
        with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
            process.stdout.read(1)
            with pytest.raises(LockedError, match=f"process {process.pid} "):
                dictionary.save(tmp_path / "d")
            process.kill()
        dictionary.save(tmp_path / "d")
        assert [path.name for path in tmp_path.iterdir()] == ["d"]


@pytest.mark.parametrize("name", ["save", "capture", "train", "build", "save a store", "convert", "page", "pull", "export"])
def test_interrupts_kills_and_races_touch_nothing_else(random_lm, name, tmp_path):
    """Fewer of them than the script makes by itself."""
    import attack_outputs as attack

    rng = random.Random(name)
    write = attack.writers(random_lm, tmp_path)[name]
    assert set(attack.nothing_else_is_touched(write, tmp_path / "kills", 1, rng).values()) == {0}
    assert attack.one_of_two(write, tmp_path / "races", 1) == 0


@pytest.mark.parametrize("name", WRITERS)
def test_files_and_folders_follow_the_umask(writers, name, tmp_path):
    (tmp_path / "here").mkdir()
    old = os.umask(0o027)
    try:
        writers[name](tmp_path / "here" / "out")
    finally:
        os.umask(old)
    for path in [tmp_path / "here" / "out", *(tmp_path / "here").rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o750 if path.is_dir() else 0o640), path


def test_only_names_of_this_output_are_leftovers(tmp_path):
    """A pattern such as .NAME.*.tmp would also match those of NAME.v2."""
    own = temporary(tmp_path / "s", "tmp")
    other = temporary(tmp_path / "s.v2", "tmp")
    own.mkdir()
    other.mkdir()
    assert leftovers(tmp_path / "s", "tmp") == [own]
    with new_folder(tmp_path / "s", DICTIONARY) as new:
        (new / "cfg.json").write_text("{}")
    assert other.exists()
    assert not own.exists()


def test_kinds_know_their_own_folders(dictionary, random_lm, x, tmp_path):
    dictionary.save(tmp_path / "d")
    sl.capture(random_lm, TEXT, HOOK, tmp_path / "c")
    sl.train(TensorSource(x), sl.TrainConfig(**QUICK), tmp_path / "r")
    kinds = {"d": DICTIONARY, "c": CACHE, "r": RUN}
    for name in kinds:
        (tmp_path / name / ".DS_Store").write_text("")
        assert [other for other, kind in kinds.items() if not foreign(tmp_path / name, kind)] == [name]
