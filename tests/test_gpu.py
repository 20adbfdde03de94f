"""Training on a CUDA device: the kernels and the rules against references, the same bytes, resumed runs, and no waits.

These tests are left out where torch finds no CUDA device. `test_triton.py` tests each kernel, compiled where there is a GPU.
"""

from contextlib import contextmanager
from copy import deepcopy

import pytest
import torch
from interrupted import Interrupted
from torch import Tensor

import saelens_lite as sl
from saelens_lite.cache import TensorSource
from saelens_lite.codes import products, support_of_indices
from saelens_lite.codes.choice import largest_latents
from saelens_lite.dictionary import Dictionary
from saelens_lite.errors import Stopped
from saelens_lite.training import Trainer
from saelens_lite.training.step import DenseStep, SparseStep

pytestmark = pytest.mark.gpu

D_IN, D_SAE, BATCH = 64, 512, 256
RULES = {
    "topk": {"k": 8},
    "batch_topk": {"k": 8},
    "matryoshka": {"k": 8, "prefixes": (0.25, 0.5)},
    "group_max": {"k": 8},
    "l1": {},
    "gated": {},
    "jumprelu": {"threshold": 0.2, "bandwidth": 0.1},
    "p_anneal": {"start": 0.0},
    "matching_pursuit": {"k": 4},
}
FIXED_K = ("topk", "batch_topk", "group_max")


@pytest.fixture
def device() -> str:
    return "cuda"


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def trainer(rule: str, device: str, **settings) -> Trainer:
    config = {
        "options": RULES[rule],
        "d_sae": D_SAE,
        "batch_size": BATCH,
        "n_tokens": 20 * BATCH,
        "lr": 1e-3,
        "dead_after": 1000,
    }
    return Trainer(sl.TrainConfig(sparsity=rule, **(config | settings)), TensorSource(randn(4 * BATCH, D_IN)), device)


def parameters(of: Trainer) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in of.dictionary.state_dict().items()}


def steps(of: Trainer, n: int, device: str) -> None:
    for i in range(n):
        of.step(randn(BATCH, D_IN, seed=i).to(device))


# --- the kernels at the sizes of real dictionaries -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 32, 128])
def test_topk_of_wide_rows(k, dtype, device):
    pre = randn(64, 24_576).to(dtype)
    chosen = largest_latents(pre.to(device), k).cpu()
    assert (chosen.sort(1).values.diff(dim=1) > 0).all(), "a latent is chosen twice"
    wanted = pre.double().topk(k, dim=1).values
    assert torch.equal(pre.double().gather(1, chosen).sort(1, descending=True).values, wanted)


@pytest.mark.parametrize("d", [768, 2304])
def test_products_of_a_support(d, device):
    n, d_sae, k = 300, 4096, 32
    latent = randn(n, d_sae - 1).topk(k, dim=1).indices + 1
    latent[:, 5] = 0  # a latent that fires in every row
    S = torch.zeros(n, d_sae, dtype=torch.float64)
    value, by_row, by_latent = randn(n * k), randn(n, d, seed=1), randn(d_sae, d, seed=2)
    S.scatter_(1, latent, value.double().reshape(n, k))
    support, v = support_of_indices(latent.to(device)), value.to(device)
    found = {
        "sparse": products.sparse_product(support, v, by_latent.to(device)),
        "transposed": products.transposed_product(support, v, by_row.to(device), d_sae),
        "pairs": products.pair_products(support, by_row.to(device), by_latent.to(device)).reshape(n, k),
        "sums": products.sum_at(v, support.latent, d_sae),
    }
    wanted = {
        "sparse": S @ by_latent.double(),
        "transposed": S.T @ by_row.double(),
        "pairs": (by_row.double() @ by_latent.double().T).gather(1, latent),
        "sums": S.sum(0),
    }
    for name, exact in wanted.items():
        error = float((found[name].cpu().double() - exact).norm() / exact.norm())
        assert error < 1e-6, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("rule", RULES)
def test_gradients_of_a_step_are_those_of_float64(rule, device):
    d = Dictionary.create(rule, reads=D_IN, d_sae=D_SAE, options=RULES[rule])
    for i, parameter in enumerate(d.parameters()):
        parameter.data.add_(randn(*parameter.shape, seed=i), alpha=0.01)
    x, how = randn(BATCH, D_IN, seed=50), {"progress": 0.5, "warmup": 1.0}
    gradients = []
    for kind, own, input_ in ((SparseStep, deepcopy(d).to(device), x.to(device)), (DenseStep, d.double(), x.double())):
        step = kind(own, input_, dead=torch.arange(D_SAE, device=input_.device) % 2 == 0, **how)
        torch.stack(list(step.losses().values())).sum().backward()
        gradients.append({name: p.grad.double().cpu() for name, p in own.named_parameters() if p.grad is not None})
    found, exact = gradients
    assert found.keys() == exact.keys()
    for name in exact:
        error = float((found[name] - exact[name]).norm() / exact[name].norm())
        assert error < 1e-4, f"{name}: relative error {error:.1e}"


# --- training ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["topk", "l1"])
def test_a_crosscoder_trains_as_on_a_cpu_and_norms_of_both_ports_add_up_to_one(rule, device):
    config = sl.TrainConfig(sparsity=rule, options=RULES[rule], d_sae=D_SAE, batch_size=BATCH, n_tokens=5 * BATCH, lr=1e-3)
    settings = config.replace(encoder_precision="float32")
    weights = []
    for where in (device, "cpu"):
        halves = {f"{model}:h": randn(BATCH, D_IN // 2, seed=i) for i, model in enumerate(("base", "chat"))}
        made = Trainer(settings, TensorSource(halves), where)
        for _ in range(3):
            made.step({key: x.to(where) for key, x in halves.items()})
        weights.append(parameters(made)["W_dec"])
        if rule == "topk":
            sizes = sum(part.norm(dim=1) for part in weights[-1].split(D_IN // 2, dim=1))
            torch.testing.assert_close(sizes, torch.ones(D_SAE), rtol=1e-5, atol=0)
    torch.testing.assert_close(*weights, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("rule", RULES)
def test_training_with_float32_products_agrees_with_the_cpu(rule, device):
    """After ten steps, the parameters differ by at most 2 % of what training changed."""
    start, ends = {}, []
    for where in ("cpu", device):
        own = trainer(rule, where, encoder_precision="float32")
        own.step(randn(BATCH, D_IN, seed=99).to(where))
        start = start or parameters(own)
        steps(own, 10, where)
        ends.append(parameters(own))
    on_cpu, on_device = ends
    for name, value in on_cpu.items():
        changed = float((value - start[name]).norm())
        assert float((on_device[name] - value).norm()) <= 0.02 * changed + 1e-6, name


@pytest.mark.parametrize("rule", RULES)
def test_the_same_seed_gives_the_same_bytes(rule, device):
    ends = []
    for _ in range(3):
        own = trainer(rule, device)
        steps(own, 8, device)
        ends.append(own.state()[0])
    for other in ends[1:]:
        assert all(torch.equal(value, other[name]) for name, value in ends[0].items())


@pytest.mark.parametrize("rule", ["topk", "l1", "batch_topk"])
def test_a_run_resumes_to_the_same_bytes(rule, device, tmp_path):
    x = randn(4 * BATCH, D_IN)
    config = trainer(rule, "cpu").config
    (alone,) = sl.train(TensorSource(x), config, device=device)
    with pytest.raises(Stopped):
        sl.train(Interrupted(TensorSource(x), 7), config, tmp_path / "run", device=device)
    (resumed,) = sl.resume(tmp_path / "run", TensorSource(x))
    for name, value in alone.dictionary.state_dict().items():
        assert torch.equal(value, resumed.dictionary.state_dict()[name]), name


@pytest.mark.parametrize("rule", ["topk", "l1", "gated"])
def test_a_run_of_a_cpu_resumes_on_a_gpu(rule, device, tmp_path):
    x = randn(4 * BATCH, D_IN)
    config = trainer(rule, "cpu", encoder_precision="float32").config
    (alone,) = sl.train(TensorSource(x), config, device="cpu")
    with pytest.raises(Stopped):
        sl.train(Interrupted(TensorSource(x), 7), config, tmp_path / "run", device="cpu")
    (resumed,) = sl.resume(tmp_path / "run", TensorSource(x), device=device)
    assert resumed.dictionary.W_dec.device.type == device
    for name, value in alone.dictionary.state_dict().items():
        difference = float((value - resumed.dictionary.state_dict()[name].cpu()).norm())
        assert difference <= 0.01 * float(value.norm()) + 1e-6, name
    assert resumed.history[-1]["tokens"] == alone.history[-1]["tokens"]


@contextmanager
def waits_are_errors(device: str):
    """Raise RuntimeError in a block where the host waits for the GPU."""
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dead", [0, D_SAE // 2])
@pytest.mark.parametrize("rule", FIXED_K)
def test_a_step_with_a_fixed_number_of_pairs_waits_nowhere(rule, dead, device):
    own, x = trainer(rule, device, dead_after=10**6), randn(BATCH, D_IN).to(device)
    own.dictionary.b_enc.data[:dead] = -1000.0
    for _ in range(4):
        own.since_fired[:dead] = 10**7
        own.step(x)
    with waits_are_errors(device):
        for _ in range(3):
            own.step(x)
