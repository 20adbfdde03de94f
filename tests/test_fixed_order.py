"""Sums of floats in a fixed order: no operation of a training step adds by what a GPU does with atomics."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from saelens_lite import registry
from saelens_lite.cache import TensorSource
from saelens_lite.codes import SparseCodes, Support, picked, products, support_of_mask
from saelens_lite.codes.products import read_at, sum_at
from saelens_lite.config import TrainConfig
from saelens_lite.dictionary import Dictionary
from saelens_lite.ports import Port
from saelens_lite.sparsity import Sparsity, register
from saelens_lite.training import Trainer
from saelens_lite.training.step import SparseStep

ADDS = {
    "index_add", "scatter_add", "scatter_reduce", "index_reduce", "embedding_dense_backward", "_embedding_bag_backward",
    "_embedding_bag_dense_backward", "_embedding_bag_sparse_backward", "_embedding_bag_per_sample_weights_backward", "bincount",
}  # fmt: skip
ACCUMULATES = {"index_put", "_index_put_impl", "_unsafe_index_put", "put"}
RULES = {
    "l1": ("l1", {}),
    "l1, p = 0.5": ("l1", {"p": 0.5}),
    "p_anneal": ("p_anneal", {"start": 0.0}),
    "topk": ("topk", {"k": 6}),
    "batch_topk": ("batch_topk", {"k": 6}),
    "matryoshka": ("matryoshka", {"k": 6}),
    "group_max": ("group_max", {"k": 8}),
    "jumprelu, l0": ("jumprelu", {"bandwidth": 0.1}),
    "jumprelu, target_l0": ("jumprelu", {"bandwidth": 0.1, "penalty": "target_l0"}),
    "jumprelu, tanh": ("jumprelu", {"bandwidth": 0.1, "penalty": "tanh"}),
    "gated": ("gated", {}),
    "matching_pursuit": ("matching_pursuit", {"k": 6}),
}
NINE = {plugin.name for plugin in registry.plugins() if plugin.distribution == registry.OWN_DISTRIBUTION}


class Atomics(TorchDispatchMode):
    """Notes the operations on floats that a GPU carries out by atomics, or might."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        given = dict(zip([argument.name for argument in func._schema.arguments], args, strict=False)) | kwargs
        floats = any(isinstance(value, torch.Tensor) and value.is_floating_point() for value in given.values())
        if floats and (name in ADDS or (name in ACCUMULATES and given.get("accumulate"))):
            self.found.append(name)
        return func(*args, **kwargs)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_all_rules_are_looked_at():
    assert {name for name, _ in RULES.values()} == NINE


@pytest.mark.parametrize("read", [lambda p, i: p[i], lambda p, i: p.index_select(0, i), lambda p, i: p.gather(0, i)])
def test_ways_to_read_by_index_that_add_by_atomics_are_noticed(read):
    parameter, index = torch.ones(5, requires_grad=True), torch.tensor([0, 0, 3])
    with Atomics() as atomics:
        read(parameter, index).sum().backward()
    assert atomics.found


@pytest.mark.parametrize("path", ["sparse", "dense", "as on a GPU"])
@pytest.mark.parametrize("halves", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("transcoder", [False, True], ids=["autoencoder", "transcoder"])
@pytest.mark.parametrize("rule", RULES)
def test_no_step_of_a_rule_adds_by_atomics(rule, transcoder, halves, path, monkeypatch):
    name, options = RULES[rule]
    if transcoder and registry.load(name).tied:
        return  # it makes no transcoder
    monkeypatch.setattr(products, "DENSE_ABOVE", dict.fromkeys(products.DENSE_ABOVE, -1.0 if path == "dense" else 1.0))
    if path == "as on a GPU":
        monkeypatch.setattr(products, "latent_sums", products._sorted_sums)
    kind = {"writes": Port(width=11), "skip": True} if transcoder else {}
    d = Dictionary.create(name, reads=16, d_sae=64, options=options, **kind).train()
    for i, parameter in enumerate(d.parameters()):
        parameter.data.add_(normal(*parameter.shape, seed=i), alpha=0.1)
    x, target = normal(40, 16, seed=50), normal(40, 11, seed=51) if transcoder else None
    with Atomics() as atomics:
        step = SparseStep(d, x, target, dead=torch.arange(64) % 2 == 0, progress=0.5, warmup=0.75, halves=halves)
        torch.stack(list(step.losses().values())).sum().backward()
        with torch.no_grad():
            d.rule.observe(step)
            d.rule.after_step(d)
    assert atomics.found == []
    assert len(step.codes.value) > len(step.codes.support.used), "no latent fires twice, so that there is nothing to add"


@pytest.mark.parametrize("rule", RULES)
def test_no_step_of_a_trainer_adds_by_atomics(rule):
    name, options = RULES[rule]
    x = normal(128, 16)
    config = TrainConfig(sparsity=name, options=options, d_sae=64, batch_size=128, n_tokens=512, dead_after=1)
    trainer = Trainer(config, TensorSource(x))
    with Atomics() as atomics:
        for _ in range(3):
            trainer.step(x)
    assert atomics.found == []


def test_nor_does_a_rule_of_which_only_the_activation_is_known():
    @register("plain_relu_of_tests")
    class PlainRelu(Sparsity):
        def activation(self, pre):
            return pre.relu()

        def losses(self, step):
            return {"l1": (step.codes.value * self.at(step.decoder_norms, step.codes.latent)).sum()}

    try:
        d = Dictionary.create("plain_relu_of_tests", reads=16, d_sae=64).train()
        with Atomics() as atomics:
            step = SparseStep(d, normal(40, 16), dead=torch.zeros(64, dtype=torch.bool), progress=0.5, warmup=0.75)
            sum(step.losses().values()).backward()
        assert atomics.found == []
    finally:
        registry.unregister("plain_relu_of_tests")


@pytest.mark.parametrize("shape", [(7,), (7, 1), (7, 5), (7, 2, 3)])
@pytest.mark.parametrize("index", [[0, 6, 6, 6, 2, 0, 2], [3], []], ids=["repeated", "one", "none"])
def test_read_at_is_indexing(shape, index):
    index = torch.tensor(index, dtype=torch.long)
    tensor = normal(*shape, dtype=torch.double).requires_grad_()
    weights = normal(len(index), *shape[1:], seed=1, dtype=torch.double)
    assert torch.equal(read_at(tensor, index), tensor[index])
    (found,) = torch.autograd.grad((read_at(tensor, index) * weights).sum(), tensor)
    (wanted,) = torch.autograd.grad((tensor[index] * weights).sum(), tensor)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("index", [[0, 6, 6, 6, 2, 0, 2], [3], []], ids=["repeated", "one", "none"])
def test_sum_at_adds_what_belongs_together(index):
    value = normal(len(index), dtype=torch.double).requires_grad_()
    at = torch.tensor(index, dtype=torch.long)
    wanted = torch.stack(
        [sum((v for v, i in zip(value, index, strict=True) if i == j), torch.zeros(()).double()) for j in range(8)]
    )
    torch.testing.assert_close(sum_at(value, at, 8), wanted)
    weights = normal(8, seed=1, dtype=torch.double)
    (found,) = torch.autograd.grad((sum_at(value, at, 8) * weights).sum(), value)
    torch.testing.assert_close(found, weights[at])


def test_picked_is_indexing_by_different_places():
    x = normal(6, dtype=torch.double).requires_grad_()
    place = torch.tensor([4, 0, 5])
    assert torch.equal(picked(x, place), x[place])
    assert torch.autograd.gradcheck(lambda x: picked(x, place), (x,))


@pytest.mark.parametrize("density", [0.0, 0.03, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_of_each_latent_are_the_columns_sums_by_either_way(density, dtype):
    mask = torch.rand(50, 20, generator=torch.Generator().manual_seed(0)) < density
    support, value = support_of_mask(mask), normal(int(mask.sum()), dtype=dtype)
    wanted = torch.zeros(50, 20, dtype=torch.double).masked_scatter(mask, value.double()).sum(0)
    for sums in (products.latent_sums, products._sorted_sums):
        found = sums(support, value, 20)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


def test_a_support_is_known_by_its_latents_as_long_as_it_lives():
    support = support_of_mask(normal(5, 9) > 0)
    assert Support.of_latent(support.latent) is support
    other = Support.of_latent(support.latent.clone())
    assert other is not support
    assert other.n_rows == len(support.latent)
    assert Support.of_latent(SparseCodes.of(support, support.latent.float(), 9).latent) is support
    latent = support.latent
    order = support.order
    del support
    assert Support.of_latent(latent).n_rows == len(latent)
    assert torch.equal(Support.of_latent(latent).order, order)
