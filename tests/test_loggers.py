"""Loggers write what training reports, read back with their own tools; one that fails never costs a run."""

import contextvars
import json
import logging
import resource
import struct
import sys
from contextlib import contextmanager
from types import ModuleType
from typing import ClassVar

import pytest
import torch

import saelens_lite as sl
from saelens_lite import registry
from saelens_lite.cache import TensorSource
from saelens_lite.errors import ConfigError, NonFiniteError, PluginError
from saelens_lite.loggers import load_loggers, open_log

N_TOKENS, LOG_EVERY = 1200, 300
TOPK = sl.TrainConfig(sparsity="topk", options={"k": 3}, d_sae=16, n_tokens=N_TOKENS, batch_size=100, log_every=LOG_EVERY)
L1 = TOPK.replace(sparsity="l1", options={})


@pytest.fixture
def source() -> TensorSource:
    return TensorSource(torch.randn(600, 8, generator=torch.Generator().manual_seed(0)))


@pytest.fixture
def logger():
    """logger(name, class) registers a logger for the length of a test."""
    known = []

    def make(name: str, target: type) -> None:
        known.append(name)
        sl.register(name)(target)

    yield make
    for name in known:
        registry.unregister(name, "loggers")


class Recorder(sl.Logger):
    """Keeps the calls it gets."""

    calls: list

    def start(self, folder, config, tokens=0):
        self.calls.append(("start", folder.name, config.sparsity, tokens))

    def log(self, line):
        self.calls.append(("log", line))

    def close(self):
        self.calls.append(("close",))


@pytest.fixture
def recorder(logger) -> list:
    """The calls that the logger "recorder" gets."""
    calls: list = []
    logger("recorder", type("Fresh", (Recorder,), {"calls": calls}))
    return calls


def lines_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def warnings_of(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


# The contract


def test_a_logger_follows_its_run(source, recorder, tmp_path):
    (run,) = sl.train(source, TOPK, tmp_path / "one", loggers="recorder")
    assert recorder == [("start", "one", "topk", 0), *(("log", line) for line in run.history), ("close",)]
    assert [line["tokens"] for line in run.history] == [300, 600, 900, 1200]
    assert not (tmp_path / "one/log.jsonl").exists()


def test_each_dictionary_has_loggers_of_its_own(source, recorder, tmp_path):
    runs = sl.train(source, [TOPK, L1], tmp_path, loggers=["recorder", "jsonl", "recorder"])
    assert [call for call in recorder if call[0] == "start"] == [("start", "0-topk", "topk", 0), ("start", "1-l1", "l1", 0)]
    assert [call for call in recorder if call[0] == "close"] == [("close",)] * 2
    logged = [line for name, *line in recorder if name == "log"]
    assert logged == [[line] for pair in zip(*(run.history for run in runs), strict=True) for line in pair]
    for run in runs:
        assert lines_of(run.folder / "log.jsonl") == run.history


def test_loggers_change_neither_numbers_nor_parameters(source, logger, tmp_path):
    class Vandal(sl.Logger):
        def log(self, line):
            torch.manual_seed(0)
            line.clear()

    logger("vandal", Vandal)
    (bare,) = sl.train(source, TOPK, tmp_path / "bare", loggers=())
    (full,) = sl.train(source, TOPK, tmp_path / "full", loggers=("vandal", "jsonl"))
    assert bare.history == full.history == lines_of(tmp_path / "full/log.jsonl")
    assert len(bare.history) == N_TOKENS // LOG_EVERY
    weights = [(tmp_path / name / "dictionary/sae_weights.safetensors").read_bytes() for name in ("bare", "full")]
    assert weights[0] == weights[1]
    assert sorted(path.name for path in (tmp_path / "bare").iterdir()) == ["config.toml", "data.json", "dictionary"]


def test_without_a_folder_there_is_nothing_to_write(source):
    assert len(sl.train(source, TOPK)[0].history) == 4
    assert len(sl.train(source, TOPK, loggers=())[0].history) == 4
    with pytest.raises(ConfigError, match=r"loggers = \('jsonl', 'wandb'\) need a run folder; give out="):
        sl.train(source, TOPK, loggers=("jsonl", "wandb"))


@pytest.mark.parametrize("stop", [NonFiniteError, KeyboardInterrupt])
def test_loggers_are_closed_when_training_stops(source, recorder, tmp_path, monkeypatch, stop):
    from saelens_lite.training import Trainer

    real = Trainer.step

    def step(self, *batch):
        if self.n_steps == 4:
            raise stop("enough")
        real(self, *batch)

    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(stop):
        sl.train(source, TOPK, tmp_path / "run", loggers=("recorder", "jsonl"))
    assert [call[0] for call in recorder] == ["start", "log", "close"]
    assert [line["tokens"] for line in lines_of(tmp_path / "run/log.jsonl")] == [300]


# A logger that cannot do its work


def test_a_logger_that_fails_is_dropped_with_one_warning(source, logger, recorder, tmp_path, caplog):
    class Failing(Recorder):
        calls: ClassVar[list] = []

        def log(self, line):
            super().log(line)
            if line["tokens"] > LOG_EVERY:
                raise ConnectionError("the server is away")

        def close(self):
            super().close()
            raise ConnectionError("still away")

    logger("failing", Failing)
    (run,) = sl.train(source, TOPK, tmp_path / "run", loggers=("failing", "recorder"))
    assert [name for name, *_ in Failing.calls] == ["start", "log", "log", "close"]
    assert [line for name, *line in recorder if name == "log"] == [[line] for line in run.history]
    assert len(run.history) == 4
    assert warnings_of(caplog) == [
        "the failing logger failed; training continues without it: ConnectionError: the server is away"
    ]
    assert sl.Dictionary.load(tmp_path / "run/dictionary").d_sae == 16


def test_a_logger_that_cannot_be_closed_is_a_warning(source, logger, recorder, tmp_path, caplog):
    class Sticky(Recorder):
        calls: ClassVar[list] = []

        def close(self):
            raise OSError("no space left")

    logger("sticky", Sticky)
    sl.train(source, TOPK, tmp_path / "run", loggers=("recorder", "sticky"))
    assert recorder[-1] == ("close",)
    assert warnings_of(caplog) == ["the sticky logger could not be closed: OSError: no space left"]


def test_a_logger_that_cannot_start_keeps_training_from_beginning(source, logger, recorder, tmp_path):
    class Locked(Recorder):
        calls: ClassVar[list] = []

        def start(self, folder, config, tokens=0):
            if config.sparsity == "l1":
                raise PermissionError("no key")

    logger("locked", Locked)
    with pytest.raises(PluginError, match=r"^the locked logger cannot start in .*1-l1: PermissionError: no key$"):
        sl.train(source, [TOPK, L1], tmp_path / "runs", loggers=("recorder", "locked"))
    assert [name for name, *_ in recorder] == ["start", "start", "close", "close"]
    assert Locked.calls == [("close",)]
    assert list((tmp_path / "runs").iterdir()) == []
    assert len(sl.train(source, [TOPK, L1], tmp_path / "runs", loggers="recorder")) == 2


def test_an_unknown_logger_is_said_before_anything_is_touched(source, tmp_path):
    sl.train(source, TOPK, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(PluginError, match=r"no loggers plugin is called 'tensorbord'; did you mean tensorboard\?"):
        sl.train(source, TOPK, tmp_path / "run", loggers=("jsonl", "tensorbord"), exists="overwrite")
    with pytest.raises(PluginError, match=r"no loggers plugin is called 'topk'"):
        sl.train(source, TOPK, tmp_path / "run", loggers="topk", exists="overwrite")
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_is_said_with_the_pip_command(source, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"saelens_lite_plugins.loggers.{name}", raising=False)
    for loaded in [module for module in sys.modules if module.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, loaded)
    with pytest.raises(PluginError, match=rf"loggers plugin '{name}' .*{name}.*; pip install 'saelens-lite\[{name}\]'$"):
        sl.train(source, TOPK, tmp_path / "run", loggers=("jsonl", name))
    assert not (tmp_path / "run").exists()


def test_a_class_without_log_says_so(logger, source, tmp_path, caplog):
    logger("mute", type("Mute", (sl.Logger,), {}))
    sl.train(source, TOPK, tmp_path / "run", loggers="mute")
    assert warnings_of(caplog) == [
        "the mute logger failed; training continues without it: NotImplementedError: Mute must define log(line)"
    ]


# jsonl


@contextmanager
def largest_file(n: int):
    """Make every write beyond n bytes of a file fail in the block, as on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)  # before pytest writes to its own output, which may be a file


def test_a_full_disk_costs_the_log_and_not_the_run(source, tmp_path, caplog):
    with largest_file(6000):  # every other file of this run is smaller
        (run,) = sl.train(source, TOPK.replace(n_tokens=9000, log_every=100), tmp_path / "run")
    assert len(run.history) == 90
    written = lines_of(tmp_path / "run/log.jsonl")
    assert 30 < len(written) < 60
    assert written == run.history[: len(written)]  # whole lines only
    (warning,) = warnings_of(caplog)
    assert warning == "the jsonl logger failed; training continues without it: OSError: [Errno 27] File too large"
    assert torch.equal(sl.Dictionary.load(run.folder / "dictionary").W_dec, run.dictionary.W_dec)


@pytest.mark.parametrize(
    ("tokens", "left"),
    [(0, []), (299, []), (300, [300]), (750, [300, 600]), (900, [300, 600, 900]), (5000, [300, 600, 900, 1200])],
)
def test_a_resumed_log_is_cut_back_to_the_checkpoint(source, tmp_path, tokens, left):
    (run,) = sl.train(source, TOPK, tmp_path / "run")
    with open_log(load_loggers("jsonl"), run.folder, TOPK, tokens) as log:
        assert [line["tokens"] for line in lines_of(run.folder / "log.jsonl")] == left
        log.log({"tokens": tokens + 10, "loss": 0.5})
    assert lines_of(run.folder / "log.jsonl") == [*run.history[: len(left)], {"tokens": tokens + 10, "loss": 0.5}]


@pytest.mark.parametrize(
    "damage", ['{"tokens": 400', '{"tokens": 400}', "[400]\n", "{}\n", '{"tokens": "x"}\n', "\xff\n", "\0\n"]
)
def test_a_damaged_log_is_cut_back_to_its_whole_lines(tmp_path, damage):
    (tmp_path / "log.jsonl").write_text('{"tokens": 300}\n' + damage, encoding="latin-1")
    with open_log(load_loggers("jsonl"), tmp_path, TOPK, 1000):
        pass
    assert (tmp_path / "log.jsonl").read_text() == '{"tokens": 300}\n'


# tensorboard


def events_of(folder) -> dict[str, list[tuple[int, float]]]:
    """Return {tag: [(step, value)]} as TensorBoard itself reads the folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def expected_events(history: list[dict]) -> dict[str, list[tuple[int, float]]]:
    tags = [name for name in history[0] if name != "tokens"]
    return {tag: [(line["tokens"], pytest.approx(line[tag], rel=1e-6)) for line in history] for tag in tags}


def test_tensorboard_reads_the_curves_over_tokens(source, tmp_path):
    runs = sl.train(source, [TOPK, L1], tmp_path, loggers=("tensorboard", "jsonl"))
    for run in runs:
        assert events_of(run.folder / "tensorboard") == expected_events(run.history)
        assert lines_of(run.folder / "log.jsonl") == run.history


def test_tensorboard_shows_the_settings(source, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    (run,) = sl.train(source, TOPK, tmp_path / "run", loggers="tensorboard")
    events = EventAccumulator(str(run.folder / "tensorboard")).Reload()
    (event,) = events.Tensors("config/text_summary")
    text = make_ndarray(event.tensor_proto)[0].decode()
    assert json.loads(text.removeprefix("```json\n").removesuffix("\n```")) == TOPK.model_dump(mode="json")


def test_a_resumed_tensorboard_forgets_what_lies_beyond_the_checkpoint(source, tmp_path):
    (run,) = sl.train(source, TOPK, tmp_path / "run", loggers="tensorboard")
    again = [{**line, "loss": 7.0} for line in run.history if line["tokens"] > 600]
    with open_log(load_loggers("tensorboard"), run.folder, TOPK, 600) as log:
        for line in again:
            log.log(line)
    assert events_of(run.folder / "tensorboard") == expected_events([*run.history[:2], *again])


# wandb


@pytest.fixture
def wandb_offline(tmp_path, monkeypatch):
    """wandb without a network and without a trace outside the test's folder."""
    for name, value in {
        "MODE": "offline",
        "SILENT": "true",
        "PROJECT": "",
        "CONFIG_DIR": "w",
        "CACHE_DIR": "w",
        "DATA_DIR": "w",
    }.items():
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path / value) if value == "w" else value)
    monkeypatch.delenv("WANDB_PROJECT")
    yield
    import wandb

    wandb.teardown()


def wandb_records(folder) -> list:
    """Return the records of an offline run: a LevelDB log behind seven bytes, one protocol buffer a record."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # its service writes the end of the file after `finish` has returned
    (path,) = folder.rglob("*.wandb")
    data, at, records = path.read_bytes(), 7, []
    assert data.startswith(b":W&B")
    while at < len(data):
        length, fragment = struct.unpack_from("<HB", data, at + 4)
        assert fragment == 1  # a whole record
        records.append(Record.FromString(data[at + 7 : at + 7 + length]))
        at += 7 + length
    return records


def test_wandb_offline_holds_each_run(source, tmp_path, wandb_offline):
    runs = sl.train(source, [TOPK, L1], tmp_path / "runs", loggers="wandb")
    for run in runs:
        records = wandb_records(run.folder)
        (about,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
        assert (about.project, about.display_name, about.run_group) == ("saelens_lite", run.folder.name, run.folder.name)
        settings = {item.key: json.loads(item.value_json) for item in about.config.update}
        assert settings.items() >= run.config.model_dump(mode="json").items()
        history = [record.history for record in records if record.WhichOneof("record_type") == "history"]
        logged = [{(i.key or i.nested_key[0]): json.loads(i.value_json) for i in line.item} for line in history]
        assert [{key: value for key, value in line.items() if key[0] != "_"} for line in logged] == run.history
        assert [line["_step"] for line in logged] == [line["tokens"] for line in run.history]
        assert records[-1].WhichOneof("record_type") in ("exit", "footer", "final")


def test_a_resumed_wandb_is_a_run_of_the_same_group(tmp_path, wandb_offline, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    (tmp_path / "run").mkdir()
    with open_log(load_loggers("wandb"), tmp_path / "run", TOPK, 600) as log:
        log.log({"step": 9, "tokens": 900, "loss": 0.5})
    (about,) = [r.run for r in wandb_records(tmp_path / "run") if r.WhichOneof("record_type") == "run"]
    assert (about.project, about.display_name, about.run_group) == ("mine", "run-600", "run")


# trackio


@pytest.fixture
def trackio(monkeypatch) -> dict:
    """A stand-in for trackio: {run name: its calls}. Like the real one, init finishes the run it finds in its context."""
    runs: dict[str, dict] = {}
    current = contextvars.ContextVar("current_run", default=None)

    class Run:
        def __init__(self, name):
            self.seen = runs.setdefault(name, {"log": [], "finished": 0})

        def log(self, metrics: dict, step: int | None = None):
            assert not self.seen["finished"]
            assert not {"project", "run", "timestamp", "step", "time", "metrics"} & metrics.keys()
            self.seen["log"].append((step, metrics))

        def finish(self):
            self.seen["finished"] += 1

    def init(project, name=None, group=None, space_id=None, *, config=None, resume="never", embed=True):
        if current.get() is not None:
            current.get().finish()
        run = Run(name)
        run.seen |= {"project": project, "group": group, "config": config, "embed": embed}
        current.set(run)
        return run

    module = ModuleType("trackio")
    module.init, module.Run = init, Run
    monkeypatch.setitem(sys.modules, "trackio", module)
    monkeypatch.delitem(sys.modules, "saelens_lite_plugins.loggers.trackio", raising=False)
    monkeypatch.delenv("TRACKIO_PROJECT", raising=False)
    return runs


def test_trackio_holds_each_run(source, tmp_path, trackio):
    runs = sl.train(source, [TOPK, L1], tmp_path / "runs", loggers="trackio")
    assert list(trackio) == ["0-topk", "1-l1"]
    for run in runs:
        seen = trackio[run.folder.name]
        assert seen["log"] == [
            (line["tokens"], {key: value for key, value in line.items() if key not in ("step", "tokens")})
            for line in run.history
        ]
        assert seen["config"] == run.config.model_dump(mode="json")
        assert (seen["project"], seen["group"], seen["embed"]) == ("saelens_lite", run.folder.name, False)
        assert seen["finished"] == 1


def test_a_resumed_trackio_is_a_run_of_the_same_group(tmp_path, trackio, monkeypatch):
    monkeypatch.setenv("TRACKIO_PROJECT", "mine")
    with open_log(load_loggers("trackio"), tmp_path, TOPK, 600) as log:
        log.log({"step": 9, "tokens": 900, "loss": 0.5})
    (name,) = trackio
    assert name == f"{tmp_path.name}-600"
    assert trackio[name]["log"] == [(900, {"loss": 0.5})]
    assert (trackio[name]["project"], trackio[name]["group"]) == ("mine", tmp_path.name)
