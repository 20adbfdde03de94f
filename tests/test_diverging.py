"""A dictionary that turns NaN: it is dropped and named, and the others are what they would be without it."""

import logging
from pathlib import Path

import pytest
import torch
from interrupted import Interrupted

import saelens_lite as sl
from saelens_lite import registry
from saelens_lite.cache import TensorSource
from saelens_lite.errors import NonFiniteError, Stopped

STEPS, SIZE = 20, 32
SETTINGS = {"d_sae": 24, "batch_size": SIZE, "n_tokens": STEPS * SIZE, "log_every": 4 * SIZE, "lr": 1e-3}
GOOD = sl.TrainConfig(sparsity="topk", options={"k": 3}, **SETTINGS)
OTHER = sl.TrainConfig(sparsity="l1", **SETTINGS)
BAD = sl.TrainConfig(sparsity="turns_bad", **SETTINGS)
AT = 8  # the step in which it goes wrong


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(400, 6, generator=torch.Generator().manual_seed(0)) + 0.5


@pytest.fixture(autouse=True, params=["read at once", "read later"])
def reading(request, monkeypatch):
    """Let the host read the losses of each step before the update, as on a CPU, or later, as on a GPU."""
    monkeypatch.setattr("saelens_lite.training.trainer.asynchronous", lambda _: request.param == "read later")


@pytest.fixture(autouse=True)
def turns_bad():
    """A rule whose part "bad" of the loss is NaN in step AT, or whose parameters are infinite after it."""

    @sl.register("turns_bad")
    class TurnsBad(sl.Sparsity):
        class Config(sl.RuleConfig):
            what: str = "loss"

        def activation(self, pre):
            return pre.relu()

        def losses(self, step):
            here = self.config.what == "loss" and step.progress >= (AT - 1) / STEPS
            return {"bad": step.codes.value.sum() * (torch.nan if here else 0.0)}

        def observe(self, step):
            self.now = step.progress >= {"loss": 2.0, "parameters": (AT - 1) / STEPS, "end": (AT - 1) / AT}[self.config.what]

        def after_step(self, dictionary):
            if getattr(self, "now", False):
                dictionary.W_dec.data[1, 2] = torch.inf

    yield
    registry.unregister("turns_bad")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def said(caplog) -> str:
    return "\n".join(record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)


@pytest.mark.parametrize("order", [[BAD, GOOD, OTHER], [GOOD, BAD, OTHER], [GOOD, OTHER, BAD]], ids=["first", "amid", "last"])
@pytest.mark.parametrize("validation_tokens", [0, 50])
def test_the_others_finish_to_the_bytes_they_have_alone(x, tmp_path, caplog, order, validation_tokens):
    runs = sl.train(TensorSource(x), order, tmp_path / "runs", validation_tokens=validation_tokens)
    healthy = [config for config in order if config is not BAD]
    assert [run.config for run in runs] == healthy
    for config, run in zip(healthy, runs, strict=True):
        (alone,) = sl.train(TensorSource(x), config, tmp_path / config.sparsity, validation_tokens=validation_tokens)
        assert contents(run.folder) == contents(alone.folder)
        assert run.history == alone.history
    bad = tmp_path / "runs" / f"{order.index(BAD)}-turns_bad"
    assert names(bad) == ["config.toml", "last_good", "log.jsonl"]
    good = sl.Dictionary.load(bad / "last_good")
    assert good.training_record["steps"] == AT - 1
    cause = f"the loss (bad) became NaN or infinite in step {AT}, turns_bad on x (after {(AT - 1) * SIZE} tokens)"
    assert good.training_record["stopped"] == cause
    assert torch.isfinite(good(x)).all()
    assert f"stopped training {bad}: {cause}; the dictionary after step {AT - 1} is in {bad / 'last_good'}" in said(caplog)
    assert names(tmp_path / "runs") == sorted(f"{i}-{config.sparsity}" for i, config in enumerate(order))


def test_without_a_folder_too(x, caplog):
    (run,) = sl.train(TensorSource(x), [BAD, GOOD])
    (alone,) = sl.train(TensorSource(x), GOOD)
    assert all(torch.equal(run.dictionary.state_dict()[name], value) for name, value in alone.dictionary.state_dict().items())
    assert "stopped training 0-turns_bad: the loss (bad)" in said(caplog)


@pytest.mark.parametrize("stops", [[3], [AT + 4], [3, AT - 1, AT + 4]], ids=str)
def test_a_resumed_sweep_ends_with_the_same_bytes(x, tmp_path, stops):
    order = [GOOD, BAD, OTHER]
    sl.train(TensorSource(x), order, tmp_path / "whole", validation_tokens=50)
    out = tmp_path / "run"
    with pytest.raises(Stopped):
        sl.train(Interrupted(TensorSource(x), stops[0]), order, out, validation_tokens=50)
    for at in stops[1:]:
        with pytest.raises(Stopped):
            sl.resume(out, Interrupted(TensorSource(x), at))
    runs = sl.resume(out, TensorSource(x))
    assert [run.config for run in runs] == [GOOD, OTHER]
    assert contents(out) == contents(tmp_path / "whole")


def test_where_none_is_left_the_error_names_each(x, tmp_path):
    with pytest.raises(NonFiniteError) as error:
        sl.train(TensorSource(x), [BAD, BAD.replace(seed=1)], tmp_path / "runs")
    for i in range(2):
        folder = tmp_path / "runs" / f"{i}-turns_bad"
        assert f"{folder}: the loss (bad) became NaN or infinite in step {AT}" in str(error.value)
        assert sl.Dictionary.load(folder / "last_good").training_record["steps"] == AT - 1
    with pytest.raises(NonFiniteError, match=rf"^the loss \(bad\) became NaN or infinite in step {AT}, turns_bad on x"):
        sl.train(TensorSource(x), BAD, tmp_path / "run")
    assert names(tmp_path / "run") == ["config.toml", "last_good", "log.jsonl"]


@pytest.mark.parametrize(
    ("checkpoint_seconds", "kept"), [(600.0, False), (0.0, True)], ids=["without checkpoints", "with checkpoints"]
)
def test_parameters_that_became_infinite_are_named_and_not_written(x, tmp_path, caplog, checkpoint_seconds, kept):
    """The step after finds it out, so the newest state that is finite is in a checkpoint, if anywhere."""
    bad = BAD.replace(options={"what": "parameters"})
    (run,) = sl.train(TensorSource(x), [bad, GOOD], tmp_path / "runs", checkpoint_seconds=checkpoint_seconds)
    (alone,) = sl.train(TensorSource(x), GOOD, tmp_path / "alone", checkpoint_seconds=checkpoint_seconds)
    assert contents(run.folder) == contents(alone.folder)
    assert f"W_dec became NaN or infinite in step {AT}, turns_bad on x" in said(caplog)
    folder = tmp_path / "runs/0-turns_bad"
    assert (folder / "last_good").exists() == kept
    if kept:
        assert sl.Dictionary.load(folder / "last_good").training_record["steps"] == AT - 1
    else:
        assert f"after step {AT} it is not finite either, so there is no last good dictionary" in said(caplog)


def test_a_last_step_that_goes_wrong_is_noticed(x, tmp_path, caplog):
    bad = BAD.replace(options={"what": "end"}, n_tokens=AT * SIZE)
    assert [run.config for run in sl.train(TensorSource(x), [bad, GOOD], tmp_path / "runs")] == [GOOD]
    assert "W_dec became NaN or infinite in the last step, turns_bad on x" in said(caplog)
    assert not (tmp_path / "runs/0-turns_bad/dictionary").exists()
    with pytest.raises(NonFiniteError, match="W_dec became NaN or infinite in the last step"):
        sl.train(TensorSource(x), bad)


def test_bad_activations_stop_all_of_them(x, tmp_path):
    """Each dictionary has its last good state, in any order of failures."""

    class Spoilt(TensorSource):
        def batches(self, *args):
            for number, batch in enumerate(super().batches(*args), 1):
                yield {"x": batch["x"] * (torch.nan if number == AT + 3 else 1)}

    with pytest.raises(NonFiniteError, match=rf"the activations became NaN or infinite in step {AT + 3}, topk on x"):
        sl.train(Spoilt(x), [BAD, GOOD, OTHER], tmp_path / "runs")
    steps = {
        path.name: sl.Dictionary.load(path / "last_good").training_record["steps"] for path in (tmp_path / "runs").iterdir()
    }
    assert steps == {"0-turns_bad": AT - 1, "1-topk": AT + 2, "2-l1": AT + 2}


def test_an_error_is_reported_even_if_the_last_good_states_cannot_be_written(x, tmp_path, monkeypatch, caplog):
    class Spoilt(TensorSource):
        def batches(self, *args):
            yield from (batch for batch, _ in zip(super().batches(*args), range(3), strict=False))
            raise NonFiniteError("of the data")

    def save(self, path, **how):
        raise sl.errors.DiskFullError("no room")

    monkeypatch.setattr(sl.Dictionary, "save", save)
    with pytest.raises(NonFiniteError, match="of the data"):
        sl.train(Spoilt(x), [GOOD, OTHER], tmp_path / "runs")
    assert said(caplog).count("cannot be written: no room") == 2


def test_a_last_good_state_that_cannot_be_written_does_not_end_the_sweep(x, tmp_path, monkeypatch, caplog):
    save = sl.Dictionary.save

    def failing(self, path, **how):
        if Path(path).name == "last_good":
            raise sl.errors.DiskFullError("no room")
        return save(self, path, **how)

    monkeypatch.setattr(sl.Dictionary, "save", failing)
    assert [run.config for run in sl.train(TensorSource(x), [BAD, GOOD], tmp_path / "runs")] == [GOOD]
    assert f"the loss (bad) became NaN or infinite in step {AT}" in said(caplog)
    assert "its last good state cannot be written: no room" in said(caplog)
