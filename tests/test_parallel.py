"""Training on several processes: the same supports, losses and gradients as in one, by rows and by latents."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from together import in_processes

import saelens_lite as sl
from saelens_lite.cache import TensorSource
from saelens_lite.codes import parallel
from saelens_lite.codes.parallel import ALL_HERE, Layout
from saelens_lite.config import TrainConfig
from saelens_lite.errors import ConfigError, NonFiniteError, Stopped
from saelens_lite.processes import Team, team
from saelens_lite.training.distribution import share_of
from saelens_lite.training.trainer import Trainer

RULES = {
    "topk": {"k": 2, "aux_k": 7},
    "batch_topk": {"k": 5, "aux_k": 7},
    "matryoshka": {"k": 5, "prefixes": (0.1, 0.4, 0.6), "aux_k": 7},
    "group_max": {"k": 8, "aux_k": 7},
    "l1": {"target_l0": 6},
    "gated": {"target_l0": 6},
    "p_anneal": {"target_l0": 6, "start": 0.1},
    "jumprelu": {"target_l0": 6, "bandwidth": 0.3},
    "jumprelu tanh": {"penalty": "tanh", "coefficient": 0.1, "bandwidth": 0.3, "dead_coefficient": 0.1},
}
D_IN, D_SAE, ROWS, STEPS = 12, 96, 64, 6


def _data() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(30, D_IN, generator=generator)
    codes = torch.rand(1024, 30, generator=generator) * (torch.rand(1024, 30, generator=generator) < 0.1)
    return codes @ directions + 0.02 * torch.randn(1024, D_IN, generator=generator)


def _source(kind: str) -> TensorSource:
    x = _data()
    if kind == "transcoder":
        return TensorSource({"a": x, "b": (x @ torch.randn(D_IN, 10, generator=torch.Generator().manual_seed(1))).tanh()})
    return TensorSource({"a": x[:, :7].contiguous(), "b": x[:, 7:].contiguous()}) if kind == "crosscoder" else TensorSource(x)


PORTS = {
    "autoencoder": {},
    "transcoder": {"hook": "a", "writes": ("b",), "skip": True},
    "crosscoder": {"reads": ("a", "b"), "writes": ("a", "b")},
}


def _layout(mode: str) -> Layout:
    everyone = team()
    if mode == "data":
        return Layout(rows=everyone, everyone=everyone)
    if mode == "latents":
        return Layout(latents=everyone, everyone=everyone)
    if mode == "both":
        return Layout(everyone.among([[0, 2], [1, 3]]), everyone.among([[0, 1], [2, 3]]), everyone)
    return ALL_HERE


def _train(rule: str, kind: str, mode: str) -> dict:
    """Train some steps in float64, and return what each gives, with the tensors of all latents."""
    torch.set_default_dtype(torch.float64)
    source, layout = _source(kind), _layout(mode)
    config = TrainConfig(
        sparsity=rule.split(maxsplit=1)[0], options=RULES[rule], d_sae=D_SAE, n_tokens=ROWS * STEPS, batch_size=ROWS,
        dead_after=60, lr=0.01, clip_grad_norm=0, **PORTS[kind],
    )  # fmt: skip
    trainer = Trainer(config, source, layout=layout)
    trainer.shift = None if trainer.shift is None else trainer.shift.double()
    batches = source.batches(source.hooks, ROWS, 0, rank=layout.rows.rank, world=layout.rows.world)
    steps = []
    for _ in range(STEPS):
        batch = next(batches)
        if trainer.n_steps == 0:
            trainer.calibrate(batch)
        computed = trainer.backward(batch)
        codes = computed.step.codes
        support = torch.zeros(codes.n_rows, codes.d_sae, dtype=torch.bool)
        support[codes.row[codes.fires], codes.latent[codes.fires]] = True
        support = layout.latents.stack(support.int()).transpose(0, 1).flatten(1)
        gradients = {name: p.grad for name, p in trainer.dictionary.named_parameters() if p.grad is not None}
        step = {
            "support": layout.rows.cat(support),
            "losses": torch.stack([*computed.losses.values()]),
            "norm": trainer._norm_of_gradient(),
            "fires": trainer.latents.whole("fire_count", computed.fires),
            **{name: trainer.latents.whole(f"dictionary.{name}", g) for name, g in gradients.items()},
        }
        trainer.update(computed)
        steps.append(step | {"n_dead": torch.tensor(trainer._count_dead())})
    line, validated = trainer.log_line(), trainer.validate(source.x)
    result = {name: x for name, x in trainer.result().state_dict().items()}
    return {"steps": steps, "line": line | validated, "result": result}


def _close(ours: torch.Tensor, wanted: torch.Tensor, what: str) -> float:
    difference = float((ours - wanted).abs().max() / wanted.abs().max().clamp(min=1e-300)) if wanted.numel() else 0.0
    assert difference < 1e-9, (what, difference)
    return difference


def _train_all(mode: str, kinds: tuple[str, ...]) -> dict:
    return {(rule, kind): _train(rule, kind, mode) for kind in kinds for rule in RULES}


def compared(alone: dict, together: list[dict]) -> dict[str, float]:
    """Return the largest relative difference of losses, gradients and parameters between several processes and one."""
    differences: dict[str, list[float]] = {"losses": [], "gradients": [], "parameters": []}
    for other in together:
        for number, (wanted, step) in enumerate(zip(alone["steps"], other["steps"], strict=True)):
            assert wanted.keys() == step.keys()
            for name, value in wanted.items():
                if value.dtype.is_floating_point:
                    kind = "losses" if name == "losses" else "gradients"
                    differences[kind].append(_close(step[name], value, f"{name} in step {number}"))
                else:
                    assert torch.equal(step[name], value), f"{name} in step {number}"
        for name, value in alone["result"].items():
            differences["parameters"].append(_close(other["result"][name], value, name))
        assert other["line"] == pytest.approx(alone["line"], rel=1e-6)
    for name, value in together[0]["result"].items():
        assert all(torch.equal(other["result"][name], value) for other in together), f"{name} differs between processes"
    return {kind: max(values) for kind, values in differences.items()}


@pytest.fixture(scope="module")
def alone():
    return in_processes(1, _train_all, "alone", tuple(PORTS))[0]


@pytest.mark.parametrize(("n", "mode", "kinds"), [
    (2, "data", tuple(PORTS)), (2, "latents", tuple(PORTS)), (4, "both", ("autoencoder",)), (4, "latents", ("autoencoder",)),
])  # fmt: skip
def test_several_processes_train_like_one(alone, n, mode, kinds):
    together = in_processes(n, _train_all, mode, kinds)
    for case in together[0]:
        differences = compared(alone[case], [one[case] for one in together])
        assert max(differences.values()) < 1e-10, (case, differences)
    if mode == "latents":
        assert any(step["n_dead"] > 0 for step in alone["topk", "autoencoder"]["steps"]), "no latent was dead"


def _equal_entries(mode: str) -> list[torch.Tensor]:
    """Return the supports that the rules' choices give on activations with many equal entries, over all latents."""
    pre = (torch.randn(32, 24, generator=torch.Generator().manual_seed(3)) * 2).round()
    layout = _layout(mode)
    rows = slice(None) if mode != "data" else slice(16 * layout.rows.rank, 16 * (layout.rows.rank + 1))
    width = 24 // layout.latents.world
    own = pre[rows, layout.latents.rank * width : (layout.latents.rank + 1) * width]
    masks = []
    with parallel.using(layout):
        chosen = [choose(own, k) for choose in (parallel.largest, parallel.largest_positive) for k in (1, 5, 13)]
        for support in chosen:
            mask = torch.zeros(own.shape, dtype=torch.int)
            mask[support.row, support.latent] = 1
            masks.append(layout.rows.cat(layout.latents.stack(mask).transpose(0, 1).flatten(1)))
    return masks


def test_of_equal_pre_activations_the_first_are_chosen():
    pre = (torch.randn(32, 24, generator=torch.Generator().manual_seed(3)) * 2).round()
    wanted = []
    for k in (1, 5, 13):
        best = pre.sort(dim=1, descending=True, stable=True).indices[:, :k]
        wanted.append(torch.zeros_like(pre, dtype=torch.int).scatter(1, best, 1))
    for k in (1, 5, 13):
        best = [i for i in pre.flatten().sort(descending=True, stable=True).indices[: k * 32].tolist() if pre.flatten()[i] > 0]
        mask = torch.zeros(32 * 24, dtype=torch.int)
        mask[best] = 1
        wanted.append(mask.reshape(32, 24))
    for mode, n in (("alone", 1), ("data", 2), ("latents", 2), ("latents", 4)):
        for found in in_processes(n, _equal_entries, mode):
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)), (mode, n)


def _configs(n: int) -> list[TrainConfig]:
    rules = ["topk", "gated", "batch_topk", "jumprelu"]
    options = [{"k": 5}, {"target_l0": 6}, {"k": 5}, {"target_l0": 6}]
    common = {"d_sae": 48, "n_tokens": 64 * 24, "batch_size": 64, "lr": 0.01, "dead_after": 300, "log_every": 256}
    return [TrainConfig(sparsity=rules[i], options=options[i], **common) for i in range(n)]


def _run(out: str, n: int, mode: str, validation_tokens: int = 64) -> list[str]:
    """Train n dictionaries, and return the names of their folders."""
    runs = sl.train(TensorSource(_data()), _configs(n), out, parallel=mode, validation_tokens=validation_tokens)
    return [run.folder.name for run in runs]


def files(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def test_a_sweep_over_processes_writes_the_bytes_of_one_process(tmp_path):
    for n in (1, 2, 3):
        names = in_processes(n, _run, str(tmp_path / "runs"), 4, "auto")
        assert names == [["0-topk", "1-gated", "2-batch_topk", "3-jumprelu"]] * n
        (tmp_path / "runs").rename(tmp_path / f"of-{n}")
    assert files(tmp_path / "of-1") == files(tmp_path / "of-2") == files(tmp_path / "of-3")


@pytest.mark.parametrize("mode", ["latents", "data"])
def test_a_dictionary_of_several_processes_has_one_folder(tmp_path, mode):
    results = {}
    for n in (1, 2, 2):
        place = tmp_path / f"{len(results)}"
        in_processes(n, _run, str(tmp_path / "run"), 1, mode)
        (tmp_path / "run").rename(place)
        results[place] = sl.load(place)
    one, two, again = results
    assert files(two) == files(again)
    assert files(one).keys() == files(two).keys()
    for name, x in results[one].state_dict().items():
        torch.testing.assert_close(results[two].state_dict()[name], x, rtol=1e-3, atol=1e-4)
    lines = [[json.loads(line) for line in (place / "log.jsonl").read_text().splitlines()] for place in results]
    assert len(lines[0]) == len(lines[1]) == 6
    for a, b in zip(lines[0], lines[1], strict=True):
        assert b == pytest.approx(a, rel=1e-3, abs=1e-4)


class _Ending(TensorSource):
    """A source that gets a signal after some batches."""

    def batches(self, *args, **kwargs):
        for number, batch in enumerate(super().batches(*args, **kwargs)):
            if number == 13 and team().rank == team().world - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch


def _interrupted(out: str, n: int, mode: str) -> str:
    with pytest.raises(Stopped, match="stopped after") as stopped:
        sl.train(_Ending(_data()), _configs(n), out, parallel=mode)
    return str(stopped.value)


def _resumed(out: str) -> list[str]:
    return [run.folder.name for run in sl.resume(out, TensorSource(_data()))]


@pytest.mark.parametrize(("mode", "n_dictionaries"), [("sweep", 3), ("latents", 1), ("data", 2)])
def test_a_run_of_several_processes_is_resumed_by_any_number(tmp_path, mode, n_dictionaries):
    in_processes(2, _run, str(tmp_path / "whole"), n_dictionaries, mode, 0)
    said = in_processes(2, _interrupted, str(tmp_path / "run"), n_dictionaries, mode)
    assert said[0] == said[1]
    assert list((tmp_path / "run/checkpoints").glob("0*/0.safetensors"))
    assert bool(list((tmp_path / "run/checkpoints").glob("0*/0-1.safetensors"))) == (mode == "latents")
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    in_processes(2, _resumed, str(tmp_path / "run"))
    assert not (tmp_path / "run/checkpoints").exists()
    assert _results(tmp_path / "run") == _results(tmp_path / "whole")
    alone = in_processes(1, _resumed, str(tmp_path / "copy"))
    assert len(alone[0]) == n_dictionaries
    for place in _dictionaries(tmp_path / "run"):
        other = sl.load(tmp_path / "copy" / place.relative_to(tmp_path / "run"))
        for name, x in sl.load(place).state_dict().items():
            torch.testing.assert_close(other.state_dict()[name], x, rtol=1e-3, atol=1e-4)


def _dictionaries(out: Path) -> list[Path]:
    return sorted(out.rglob("dictionary"))


def _results(out: Path) -> dict[str, bytes]:
    return {name: data for name, data in files(out).items() if "dictionary/" in name or name.endswith("log.jsonl")}


class _Two(Team):
    """The second of two processes, of which the other one says the same."""

    def __init__(self):
        super().__init__()
        self.rank, self.world = 1, 2

    def gather(self, value):
        return [value, value]


@pytest.mark.parametrize(("changes", "mode", "said"), [
    ({"d_sae": 49}, "latents", "d_sae = 49 cannot be divided equally among 2 processes"),
    ({"batch_size": 65}, "data", "batch_size = 65 cannot be divided equally among 2 processes"),
    ({}, "sweep", r"fewer dictionaries \(1\) than processes"),
    ({"sparsity": "matching_pursuit"}, "auto", "matching_pursuit can only be trained by one process"),
    ({"sparsity": "group_max", "options": {"k": 3}}, "latents", "into groups of 16"),
    ({"d_sae": 49, "batch_size": 65}, "auto", "cannot be distributed over 2 processes: sweep: .*; latents: .*; data: "),
])  # fmt: skip
def test_what_cannot_be_distributed_is_refused(changes, mode, said):
    with pytest.raises(ConfigError, match=said):
        share_of(mode, [_configs(1)[0].replace(**changes)], _Two())


def test_what_auto_chooses():
    several = _Two()
    share = share_of("auto", _configs(3), several)
    assert (share.is_sweep, list(share.numbers), share.writes) == (True, [1], True)
    share = share_of("auto", _configs(1), several)
    assert (share.is_sweep, list(share.numbers), share.writes) == (False, [0], False)
    assert share.layout.latents.world == 2
    share = share_of("auto", [_configs(1)[0].replace(d_sae=49)], several)
    assert (share.layout.latents.world, share.layout.rows.world) == (1, 2)


class _Poisoned(TensorSource):
    """A source whose fourth batch holds a NaN, among the rows of the last process."""

    def batches(self, *args, **kwargs):
        for number, batch in enumerate(super().batches(*args, **kwargs)):
            if number == 3 and kwargs.get("rank", 0) == kwargs.get("world", 1) - 1:
                batch["x"][-1, 2] = torch.nan
            yield batch


def _nan(mode: str) -> str:
    with pytest.raises(NonFiniteError, match="the activations became NaN or infinite in step 4") as error:
        sl.train(_Poisoned(_data()), _configs(2), parallel=mode)
    return str(error.value)


@pytest.mark.parametrize("mode", ["latents", "data"])
def test_a_nan_ends_all_processes_with_the_same_message(mode):
    first, second = in_processes(2, _nan, mode)
    assert first == second


def _other_data(mode: str) -> str:
    x = _data() + (team().rank == 1)
    with pytest.raises(ConfigError, match=r"the processes have different data: .*sha256") as error:
        sl.train(TensorSource(x), _configs(1), parallel=mode)
    return str(error.value)


def _other_start(mode: str) -> str:
    begin = sl.Dictionary.create("topk", reads=D_IN, d_sae=48, seed=team().rank)
    with pytest.raises(ConfigError, match=r"different settings: start_from\.0\.W_enc") as error:
        sl.train(TensorSource(_data()), _configs(1), parallel=mode, start_from=begin)
    return str(error.value)


@pytest.mark.parametrize("case", [_other_data, _other_start])
def test_processes_with_different_data_or_beginnings_are_refused(case):
    first, second = in_processes(2, case, "data")
    assert first == second


def _start_from(mode: str) -> torch.Tensor:
    begin = sl.Dictionary.create("l1", reads=D_IN, d_sae=48, seed=3)
    (run,) = sl.train(TensorSource(_data()), _configs(1), parallel=mode, start_from=begin)
    return run.dictionary.W_dec.detach()


def test_latents_that_begin_with_a_dictionary_are_its_own():
    wanted, (first, second) = in_processes(1, _start_from, "auto")[0], in_processes(2, _start_from, "latents")
    assert torch.equal(first, second)
    torch.testing.assert_close(first, wanted, rtol=1e-3, atol=1e-4)


def _nan_in_one_row(mode: str) -> str:
    """Train on an input with a NaN whose target is finite."""
    source = _source("transcoder")
    trainer = Trainer(TrainConfig(sparsity="topk", options={"k": 5}, d_sae=48, n_tokens=640, batch_size=64, hook="a",
                                  writes=("b",)), source, layout=_layout(mode))  # fmt: skip
    batch = {name: x[:64].clone() for name, x in source.x.items()}
    trainer.step(batch)
    batch["a"][5, 2] = torch.nan
    with pytest.raises(NonFiniteError, match="the activations") as error:
        trainer.step(batch)
    return str(error.value)


def test_a_nan_in_the_input_alone_is_noticed():
    messages = [in_processes(1, _nan_in_one_row, "alone")[0], *in_processes(2, _nan_in_one_row, "latents")]
    assert len(set(messages)) == 1


def _buffers() -> list[tuple[int, ...]]:
    @sl.register("with_a_buffer")
    class WithABuffer(sl.Sparsity):
        shardable = True

        def __init__(self, config, *, d_in, d_sae):
            super().__init__(config, d_in=d_in, d_sae=d_sae)
            self.register_buffer("number", torch.arange(d_sae), persistent=False)
            self.register_buffer("limits", torch.zeros(3))

        def activation(self, pre):
            return pre.relu()

    trainer = Trainer(TrainConfig(sparsity="with_a_buffer", d_sae=48, n_tokens=640), _source("x"), layout=_layout("latents"))
    rule = trainer.dictionary.rule
    return [tuple(rule.number.tolist()), tuple(rule.limits.shape), rule.d_sae]


def test_each_process_has_its_entries_of_a_buffer_that_is_not_saved():
    assert in_processes(2, _buffers) == [[tuple(range(24)), (3,), 48], [tuple(range(24, 48)), (3,), 48]]


def _uneven() -> tuple[int, int]:
    os.environ["LOCAL_WORLD_SIZE"] = "2" if team().rank < 2 else "1"
    layout = share_of("latents", _configs(1), team()).layout
    return layout.latents.world, layout.rows.world


def test_latents_go_over_all_processes_if_machines_have_unequally_many():
    assert in_processes(3, _uneven) == [(3, 1)] * 3


def _two_machines() -> tuple[int, int]:
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    layout = share_of("latents", _configs(1), team()).layout
    return layout.latents.rank, layout.latents.world, layout.rows.rank, layout.rows.world


def test_each_machine_holds_all_latents_and_some_rows():
    assert in_processes(4, _two_machines) == [(0, 2, 0, 2), (1, 2, 0, 2), (0, 2, 1, 2), (1, 2, 1, 2)]
