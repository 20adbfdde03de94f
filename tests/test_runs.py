"""Runs that are loaded, plotted, extended, and taken for their dictionaries."""

import itertools
import json
import re
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
from interrupted import Interrupted

import saelens_lite as sl
from saelens_lite.cache import TensorSource
from saelens_lite.config import read_toml
from saelens_lite.errors import ConfigError, CorruptFileError, NonFiniteError, SourceChangedError, Stopped
from saelens_lite.training import curves
from saelens_lite.training import run as run_module

CONFIG = sl.TrainConfig(d_sae=12, batch_size=32, n_tokens=640, log_every=64, options={"k": 3}, lr=1e-3, warmup=0.1, decay=0.5)


def acts(n: int = 400) -> torch.Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with a sweep of two finished runs, and a run alone."""
    folder = tmp_path_factory.mktemp("runs")
    both = [CONFIG, CONFIG.replace(sparsity="l1", options={})]
    sl.train(TensorSource(acts()), both, folder / "sweep", validation_tokens=100)
    sl.train(TensorSource(acts()), CONFIG, folder / "alone", validation_tokens=100)
    return folder


def interrupted(out: Path, at: int = 8, config: sl.TrainConfig = CONFIG) -> Path:
    with pytest.raises(Stopped):
        sl.train(Interrupted(TensorSource(acts()), at), config, out, validation_tokens=100)
    return out


def test_a_finished_run_is_loaded(runs):
    run = sl.Run.load(runs / "alone")
    assert (run.config, run.state, run.tokens) == (CONFIG, "finished", 640)
    assert run.history == [json.loads(line) for line in (runs / "alone/log.jsonl").read_text().splitlines()]
    assert torch.equal(run.dictionary.W_dec, sl.Dictionary.load(runs / "alone/dictionary").W_dec)
    assert run.dictionary is run.dictionary
    last = run.history[-1]
    text = f"topk, L0 {last['l0']:.1f}, train FVU {last['fvu']:.4f}, validation FVU {last['val_fvu']:.4f}, 640 tokens"
    assert str(run) == f"{runs / 'alone'}: {text}"
    assert text in run._repr_html_()


def test_the_history_is_a_table(runs):
    run = sl.Run.load(runs / "alone")
    frame = run.to_frame()
    assert list(frame["tokens"]) == [line["tokens"] for line in run.history]
    assert set(frame.columns) == set(run.history[0])


def test_runs_in_memory_look_like_those_of_a_folder(runs):
    (run,) = sl.train(TensorSource(acts()), CONFIG, validation_tokens=100)
    loaded = sl.Run.load(runs / "alone")
    assert run.history == loaded.history
    assert str(run).partition(": ")[2] == str(loaded).partition(": ")[2]


def test_several_runs_are_loaded_together(runs):
    assert [run.config.sparsity for run in sl.Run.load_all(runs / "sweep")] == ["topk", "l1"]
    assert [run.folder for run in sl.Run.load_all(runs)] == [runs / "alone", runs / "sweep/0-topk", runs / "sweep/1-l1"]
    with pytest.raises(ConfigError, match=r"holds 2 runs: .*0-topk, .*1-l1; choose one"):
        sl.Run.load(runs / "sweep")


def test_folders_that_are_not_runs_are_refused(runs, tmp_path):
    with pytest.raises(ConfigError, match=r"is a folder in a run; give the folder of the run, .*alone"):
        sl.Run.load(runs / "alone/dictionary")
    for load in (sl.Run.load, sl.Run.load_all):
        with pytest.raises(ConfigError, match=r"has no config.toml that `train` wrote"):
            load(tmp_path)


def test_an_interrupted_run_says_so(tmp_path):
    out = interrupted(tmp_path / "run")
    run = sl.Run.load(out)
    assert run.state == "interrupted"
    assert run.tokens == 256
    assert f"resume it with: saelens-lite train --resume {out}" in str(run)
    for load in (lambda: run.dictionary, lambda: sl.load(out)):
        with pytest.raises(ConfigError, match=r"no dictionary.*interrupted; resume it with"):
            load()


def test_a_run_of_an_interrupted_sweep_names_the_sweep(tmp_path):
    with pytest.raises(Stopped):
        sl.train(Interrupted(TensorSource(acts()), 8), [CONFIG, CONFIG], tmp_path / "sweep")
    run = sl.Run.load(tmp_path / "sweep/1-topk")
    assert f"--resume {tmp_path / 'sweep'}" in str(run)
    with pytest.raises(ConfigError, match=r"one of several in .*sweep: resume that"):
        sl.resume(run.folder)


def test_a_failed_run_has_its_last_good_dictionary(tmp_path):
    x = acts()
    x[-1] = torch.nan
    source = TensorSource(x[:-1])
    source.x["x"] = x  # the statistics are finite, a batch is not
    source.n_tokens = len(x)
    source.statistics = TensorSource(x[:-1]).statistics
    with pytest.raises(NonFiniteError):
        sl.train(source, CONFIG, tmp_path / "run")
    run = sl.Run.load(tmp_path / "run")
    assert run.state == "failed"
    assert "stopped" in run.dictionary.training_record
    with pytest.raises(ConfigError, match=r"its last good dictionary is .*last_good"):
        sl.load(tmp_path / "run")
    assert torch.equal(sl.load(tmp_path / "run/last_good").W_dec, run.dictionary.W_dec)


def test_a_run_is_taken_for_its_dictionary(runs, command, tmp_path):
    d = sl.load(runs / "alone/dictionary")
    assert torch.equal(sl.load(runs / "alone").W_dec, d.W_dec)
    assert torch.equal(sl.load(str(runs / "sweep/0-topk")).W_dec, sl.load(runs / "sweep/0-topk/dictionary").W_dec)
    with pytest.raises(ConfigError, match=r"holds 2 runs: .*0-topk, .*1-l1; choose one of them"):
        sl.load(runs / "sweep")
    with pytest.raises(CorruptFileError, match=r"cfg\.json is missing"):
        sl.load(tmp_path)
    code, out, err = command("compare", runs / "alone", runs / "sweep")
    assert code == 0, err
    assert "0-topk" in out
    assert "1-l1" in out
    code, out, err = command("inspect", runs / "alone")
    assert code == 0, err
    assert json.loads(out)["d_sae"] == 12
    code, out, err = command("convert", runs / "alone", tmp_path / "copy", "--format", "saelens_lite")
    assert code == 0, err
    assert torch.equal(sl.load(tmp_path / "copy").W_dec, d.W_dec)


def test_curves_hold_the_numbers_of_the_log(runs):
    run, other = sl.Run.load_all(runs / "sweep")
    drawn = run.plot(beside=[other])
    assert drawn.names == ["0-topk", "1-l1"]
    axes = {one.get_title(loc="left"): one for one in drawn.figure().axes if one.get_visible()}
    for name, title in {"fvu": "FVU in training", "val_fvu": "FVU in validation", "lr": "learning rate"}.items():
        for line, history in zip(axes[title].lines, (run.history, other.history), strict=True):
            assert list(line.get_xdata()) == [one["tokens"] for one in history]
            assert list(line.get_ydata()) == [one[name] for one in history]
    assert axes["FVU in training"].get_ylim() == axes["FVU in validation"].get_ylim()
    assert [text.get_text() for text in drawn.figure().legends[0].get_texts()] == ["0-topk", "1-l1"]


def test_pictures_are_files_with_the_same_bytes_each_time(runs, tmp_path):
    run = sl.Run.load(runs / "alone")
    for name in ("a.png", "a.svg"):
        run.plot(tmp_path / name)
        first = (tmp_path / name).read_bytes()
        run.plot(tmp_path / name)
        assert (tmp_path / name).read_bytes() == first
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert ET.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")
    with pytest.raises(ConfigError, match=r"a\.jpg has the ending '\.jpg'; expected \.png or \.svg"):
        run.plot(tmp_path / "a.jpg")


def test_the_curve_of_a_long_log_keeps_its_ends_and_its_extremes():
    """A billion tokens are 15,259 lines; a picture needs 2,000 points."""
    ys = torch.rand(15_259, generator=torch.Generator().manual_seed(0)).add(0.5).tolist()
    ys[7001], ys[9002] = 0.001, 9.0
    lines = [{"tokens": 65_536 * (i + 1), "fvu": y} for i, y in enumerate(ys)]
    (panel,) = (panel for panel in curves.PANELS if panel.name == "fvu")
    tokens, values = curves.points(lines, panel)
    assert len(tokens) <= curves.MOST_POINTS + 2
    assert tokens == sorted(set(tokens))
    assert all(ys[round(x / 65_536) - 1] == y for x, y in zip(tokens, values, strict=True))
    assert (tokens[0], tokens[-1]) == (65_536, 65_536 * 15_259)
    assert (min(values), max(values)) == (0.001, 9.0)
    assert max(b - a for a, b in itertools.pairwise(tokens)) <= 65_536 * 2 * (2 * 15_259 // curves.MOST_POINTS + 1)
    assert curves.points(lines[: curves.MOST_POINTS], panel)[1] == ys[: curves.MOST_POINTS]


def test_a_log_that_is_too_large_to_read_is_said(runs, tmp_path, monkeypatch, caplog):
    shutil.copytree(runs / "alone", tmp_path / "run")
    monkeypatch.setattr(run_module, "MAX_LOG_BYTES", 100)
    assert sl.Run.load(tmp_path / "run").history == []
    assert "log.jsonl has " in caplog.text


def test_curves_in_a_terminal_fit_80_columns(runs, command, tmp_path):
    code, out, err = command("plot", runs / "sweep", runs / "alone")
    assert code == 0, err
    assert max(map(len, out.splitlines())) <= 80
    for name in ("loss", "FVU in training", "FVU in validation", "L0", "share of dead latents", "learning rate"):
        assert name in out
    assert re.search(r"a sweep/0-topk\n\s+b sweep/1-l1\n\s+c alone", out)
    code, out, err = command("plot", runs / "alone", "--out", tmp_path / "curves.svg")
    assert (code, out.strip()) == (0, str(tmp_path / "curves.svg")), err
    code, out, err = command("plot", tmp_path)
    assert code == 2
    assert "config.toml" in err


@pytest.mark.parametrize(
    ("package", "says"), [("matplotlib", "pictures need matplotlib"), ("plotext", "terminal need plotext")]
)
def test_a_missing_package_is_named(runs, package, says, monkeypatch):
    monkeypatch.setattr(curves, "find_spec", lambda name: None if name == package else object())
    drawn = sl.Run.load(runs / "alone").plot()
    with pytest.raises(ConfigError, match=rf"{says}.*pip install 'saelens-lite\[plots\]'"):
        str(drawn) if package == "plotext" else drawn.figure()


def test_a_run_without_a_log_cannot_be_plotted(runs, tmp_path):
    shutil.copytree(runs / "alone", tmp_path / "run")
    (tmp_path / "run/log.jsonl").unlink()
    with pytest.raises(ConfigError, match="nothing to plot: the log of run is empty"):
        sl.Run.load(tmp_path / "run").plot()


def lr(i: int, n: int) -> float:
    """Return the learning rate of CONFIG in step i (from 0) of n."""
    progress = (i + 0.5) / n
    return CONFIG.lr * min(1, progress / CONFIG.warmup, (1 - progress) / CONFIG.decay)


def test_an_interrupted_run_is_stretched_to_a_new_total(tmp_path):
    out = interrupted(tmp_path / "run")  # after 9 steps of 32
    (run,) = sl.resume(out, TensorSource(acts()), n_tokens=1280)
    assert run.tokens == 1280
    assert sl.Run.load(out).config == CONFIG.replace(n_tokens=1280)
    assert sl.Run.load(out).history == run.history
    for line in run.history:
        assert line["lr"] == pytest.approx(lr(line["step"] - 1, 20 if line["tokens"] <= 256 else 40))
    assert run.dictionary.density.max() <= 1


def test_a_run_stretched_before_its_first_step_is_a_longer_run(tmp_path):
    """With the whole state kept, only the schedule differs; without a schedule nothing does."""
    flat = CONFIG.replace(warmup=0.0, decay=0.0)
    out = interrupted(tmp_path / "run", config=flat)
    (stretched,) = sl.resume(out, TensorSource(acts()), n_tokens=1280)
    (longer,) = sl.train(TensorSource(acts()), flat.replace(n_tokens=1280), tmp_path / "longer", validation_tokens=100)
    assert torch.equal(stretched.dictionary.W_dec, longer.dictionary.W_dec)
    assert stretched.history == longer.history


def test_a_finished_run_is_extended_by_a_new_schedule_over_new_data(runs, tmp_path):
    out = shutil.copytree(runs / "alone", tmp_path / "run")
    before = sl.Run.load(out)
    weights = before.dictionary.W_dec.clone()
    source = Watched(acts())
    (run,) = sl.resume(out, source, n_tokens=960)
    assert source.rest.begun_at == [20]
    assert run.history[: len(before.history)] == before.history
    new = run.history[len(before.history) :]
    assert [line["step"] for line in new] == [22, 24, 26, 28, 30]
    assert [line["lr"] for line in new] == pytest.approx([lr(step - 21, 10) for step in (22, 24, 26, 28, 30)])
    loaded = sl.Run.load(out)
    assert (loaded.state, loaded.config.n_tokens, loaded.history) == ("finished", 960, run.history)
    record = loaded.dictionary.training_record
    assert (record["tokens"], record["steps"], record["extended_after"]) == (960, 30, 640)
    assert not torch.equal(loaded.dictionary.W_dec, weights)
    (again,) = sl.resume(out, TensorSource(acts()), n_tokens=992)
    assert again.tokens == 992


class Watched(TensorSource):
    """A source that notes the numbers of the batches that are asked for first."""

    def hold_out(self, n_tokens):
        held, rest = super().hold_out(n_tokens)
        self.rest = Watched(rest.x)
        self.rest.begun_at = []
        return held, self.rest

    def batches(self, hooks, batch_size, seed, start=0, **more):
        self.begun_at.append(start)
        return super().batches(hooks, batch_size, seed, start)


def test_an_extension_begins_where_the_dictionary_was(runs, tmp_path):
    """The first step of an extension with a tiny learning rate finds the error that the dictionary has."""
    out = shutil.copytree(runs / "alone", tmp_path / "run")
    text = (out / "config.toml").read_text()
    (out / "config.toml").write_text(text.replace("lr = 0.001", "lr = 1e-12"))
    before = sl.Run.load(out)
    weights = before.dictionary.W_dec.clone()
    (run,) = sl.resume(out, TensorSource(acts()), n_tokens=704)
    torch.testing.assert_close(run.dictionary.W_dec, weights, rtol=1e-4, atol=1e-6)
    assert run.history[-1]["val_fvu"] == pytest.approx(before.history[-1]["val_fvu"], abs=1e-5)


def test_an_interrupted_extension_is_resumed_to_the_same_bytes(runs, tmp_path):
    for name in ("alone", "stopped"):
        shutil.copytree(runs / "alone", tmp_path / name)
    sl.resume(tmp_path / "alone", TensorSource(acts()), n_tokens=1280)
    with pytest.raises(Stopped):
        sl.resume(tmp_path / "stopped", Interrupted(TensorSource(acts()), 27), n_tokens=1280)
    assert sl.Run.load(tmp_path / "stopped").state == "interrupted"
    sl.resume(tmp_path / "stopped", TensorSource(acts()))
    for file in ("log.jsonl", "config.toml", "data.json", "dictionary/cfg.json", "dictionary/sae_weights.safetensors"):
        assert (tmp_path / "stopped" / file).read_bytes() == (tmp_path / "alone" / file).read_bytes(), file


def test_a_sweep_is_extended_together(runs, tmp_path):
    out = shutil.copytree(runs / "sweep", tmp_path / "sweep")
    both = sl.resume(out, TensorSource(acts()), n_tokens=960)
    assert [(run.config.sparsity, run.tokens) for run in both] == [("topk", 960), ("l1", 960)]
    (one,) = sl.resume(out / "1-l1", TensorSource(acts()), n_tokens=1280)
    assert one.tokens == 1280
    with pytest.raises(
        ConfigError, match="not trained together for equally many steps and tokens, so extend them one at a time"
    ):
        sl.resume(out, TensorSource(acts()), n_tokens=1920)


def test_an_interrupted_extension_of_a_sweep_is_not_finished(runs, tmp_path):
    out = shutil.copytree(runs / "sweep", tmp_path / "sweep")
    with pytest.raises(Stopped):
        sl.resume(out, Interrupted(TensorSource(acts()), 27), n_tokens=1280)
    assert [run.state for run in sl.Run.load_all(out)] == ["interrupted", "interrupted"]
    with pytest.raises(ConfigError, match="not a finished run"):
        sl.resume(out / "0-topk", TensorSource(acts()), n_tokens=1280)


def test_an_extension_on_other_activations_is_refused(runs, tmp_path):
    out = shutil.copytree(runs / "alone", tmp_path / "run")
    with pytest.raises(SourceChangedError):
        sl.resume(out, TensorSource(acts() + 1), n_tokens=960)


def test_an_extension_keeps_the_coefficient_and_the_weight_of_the_penalty(tmp_path):
    config = sl.TrainConfig(
        sparsity="l1", options={"target_l0": 3.0}, d_sae=24, n_tokens=640, batch_size=32, lr=1e-3, log_every=32
    )
    (run,) = sl.train(TensorSource(acts()), config, tmp_path / "run")
    (longer,) = sl.resume(tmp_path / "run", TensorSource(acts()), n_tokens=3200)
    before, after = run.history[-1], longer.history[len(run.history)]
    assert after["step"] == before["step"] + 1
    assert before["coefficient"] > 1  # far from where it began, at 0.3
    assert after["coefficient"] == pytest.approx(before["coefficient"], rel=0.3)
    assert after["l1"] > 0.5 * before["l1"]  # the warm-up of penalties does not begin again


def test_each_dictionary_of_an_extended_sweep_keeps_its_own_start(tmp_path):
    configs = [sl.TrainConfig(options={"k": k}, n_tokens=64, batch_size=32) for k in (2, 4)]
    starts = [sl.fit(acts(), k=k, d_sae=24, n_tokens=tokens) for k, tokens in ((2, 320), (4, 640))]
    sl.train(TensorSource(acts()), configs, tmp_path / "sweep", start_from=starts)
    (one,) = sl.resume(tmp_path / "sweep/1-topk", TensorSource(acts()), n_tokens=96)
    assert one.dictionary.training_record["start_from"]["tokens"] == 640


def test_a_run_in_a_notebook_shows_numbers(runs):
    html = sl.Run.load(runs / "alone")._repr_html_()
    assert "<th>lr</th><td>0.001</td>" in html
    default = sl.train(TensorSource(acts()), sl.TrainConfig(d_sae=24, n_tokens=64, batch_size=32))[0]
    assert "<th>lr</th><td>default, up to 0.0" in default._repr_html_()


def test_what_cannot_be_extended(runs, tmp_path):
    with pytest.raises(ConfigError, match="is finished and has no checkpoints; to extend it, give n_tokens"):
        sl.resume(runs / "alone", TensorSource(acts()))
    with pytest.raises(ConfigError, match=r"n_tokens = 640 is the new total of .*, which has already seen 640"):
        sl.resume(runs / "alone", TensorSource(acts()), n_tokens=640)
    with pytest.raises(ConfigError, match="has already seen 288 tokens"):
        sl.resume(interrupted(tmp_path / "run"), TensorSource(acts()), n_tokens=100)
    older = shutil.copytree(runs / "alone", tmp_path / "older")
    (older / "data.json").unlink()
    with pytest.raises(ConfigError, match="an earlier version wrote it; start a new run from its dictionary"):
        sl.resume(older, TensorSource(acts()), n_tokens=1000)


def test_a_run_on_a_cache_is_extended_by_commands(cache, lm, documents, tmp_path, command):
    hook = "blocks.1.hook_resid_pre"
    common = ["--batch-size", 32, "--validation-tokens", 50, "--lr", 1e-3]
    out = tmp_path / "run"
    code, said, err = command("train", cache.path, "--hook", hook, "--d-sae", 40, "--n-tokens", 320, "--out", out, *common)
    assert code == 0, err
    assert re.fullmatch(rf"{re.escape(str(out))}: topk, L0 \S+, train FVU \S+, validation FVU \S+, 320 tokens\n", said)
    code, said, err = command("train", "--resume", out, "--n-tokens", 640)
    assert code == 0, err
    assert said.endswith("640 tokens\n")
    assert read_toml(out / "config.toml")["n_tokens"] == 640
    code, _, err = command("train", "--resume", out, "--n-tokens", 960, "--d-sae", 10)
    assert code == 2
    assert "d_sae" in err.replace("-", "_")
    new = tmp_path / "new"
    code, said, err = command("train", cache.path, "--start-from", out, "--n-tokens", 64, "--out", new, *common)
    assert code == 0, err
    assert sl.load(new).d_sae == 40
    assert sl.load(new).training_record["start_from"]["tokens"] == 640
    sl.capture(lm, documents, hook, tmp_path / "other", n_ctx=16, dtype="float32")
    with pytest.raises(SourceChangedError):
        sl.resume(out, sl.ActivationCache.open(tmp_path / "other"), n_tokens=960)
