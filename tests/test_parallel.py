"""Training on several processes: the same supports, losses and gradients as in one, by rows and by latents."""

import pytest
import torch
from together import in_processes

from saelens_lite.cache import TensorSource
from saelens_lite.codes.parallel import ALL_HERE, Layout
from saelens_lite.config import TrainConfig
from saelens_lite.processes import team
from saelens_lite.training.trainer import Trainer

RULES = {
    "topk": {"k": 5, "aux_k": 7},
    "batch_topk": {"k": 5, "aux_k": 7},
    "matryoshka": {"k": 5, "prefixes": (0.1, 0.4, 0.6), "aux_k": 7},
    "group_max": {"k": 8, "aux_k": 7},
    "l1": {"target_l0": 6},
    "gated": {"target_l0": 6},
    "p_anneal": {"target_l0": 6, "start": 0.1},
    "jumprelu": {"target_l0": 6, "bandwidth": 0.3},
    "jumprelu tanh": {"penalty": "tanh", "coefficient": 0.1, "bandwidth": 0.3, "dead_coefficient": 0.1},
}
D_IN, D_SAE, ROWS, STEPS = 12, 48, 64, 6


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


def _split(mode: str) -> Layout:
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
    source, layout = _source(kind), _split(mode)
    config = TrainConfig(
        sparsity=rule.split(maxsplit=1)[0], options=RULES[rule], d_sae=D_SAE, n_tokens=ROWS * STEPS, batch_size=ROWS,
        dead_after=100, lr=0.01, clip_grad_norm=0, **PORTS[kind],
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
        print(*case, mode, n, compared(alone[case], [one[case] for one in together]))
