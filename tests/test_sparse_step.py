"""The sparse step against the dense one, where tests/test_gradients.py (float64, rule by rule) does not look."""

from typing import ClassVar

import pytest
import torch
from torch import nn

from saelens_lite import registry
from saelens_lite.cache import TensorSource
from saelens_lite.codes import encoder, support_of_mask
from saelens_lite.codes.products import DENSE_ABOVE, Decode, pair_products, transposed_product
from saelens_lite.config import TrainConfig
from saelens_lite.dictionary import Dictionary
from saelens_lite.sparsity import Sparsity, register
from saelens_lite.training import Trainer
from saelens_lite.training.step import DenseStep, SparseStep


@pytest.fixture
def activation_only():
    """A rule that supplies an activation function with a parameter, and nothing else."""

    @register("shifted_square")
    class ShiftedSquare(Sparsity):
        def __init__(self, config, *, d_in, d_sae):
            super().__init__(config, d_in=d_in, d_sae=d_sae)
            self.shift = nn.Parameter(torch.linspace(0.5, 1.5, d_sae))

        def activation(self, pre):
            return (pre - self.shift).relu().square()

    yield "shifted_square"
    registry.unregister("shifted_square")


@pytest.mark.parametrize("bias", [-1.5, 0.0, 2.0], ids=["few fire", "some fire", "most fire"])
def test_a_rule_with_only_an_activation_gets_exact_gradients(activation_only, bias):
    d = Dictionary.create(activation_only, reads=12, d_sae=50)
    d.b_enc.data.fill_(bias)
    x = torch.randn(40, 12, generator=torch.Generator().manual_seed(1))
    p = {name: q.detach().double().requires_grad_() for name, q in d.named_parameters()}
    h = (x.double() - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
    f = torch.relu(h - p["rule.shift"]) ** 2
    ((x.double() - f @ p["W_dec"] - p["b_dec"]) ** 2).sum(1).mean().backward()
    step = SparseStep(d, x, dead=torch.zeros(50, dtype=torch.bool), progress=0.5, warmup=1.0)
    assert len(step.codes.value) == int((f != 0).sum())
    step.losses()["mse"].backward()
    for name, q in d.named_parameters():
        reference = p[name].grad
        assert (q.grad.double() - reference).abs().max() <= 1e-5 * reference.abs().max(), name


@pytest.mark.parametrize("density", [0.0, 0.02, DENSE_ABOVE["cpu"] - 0.01, DENSE_ABOVE["cpu"] + 0.02, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (33, 50), (8, 129)])
def test_products_of_a_support(shape, density):
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(shape, generator=generator) < density
    support, value = support_of_mask(mask), torch.randn(int(mask.sum()), generator=generator)
    dense = torch.zeros(shape).masked_scatter(mask, value)
    left, weight = torch.randn(shape[0], 5, generator=generator), torch.randn(shape[1], 5, generator=generator)
    torch.testing.assert_close(Decode.apply(value, weight, support), dense @ weight)
    if len(value):
        torch.testing.assert_close(transposed_product(support, value, left, shape[1]), dense.T @ left)
        torch.testing.assert_close(pair_products(support, left, weight), (left @ weight.T)[mask])


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("topk", {"k": 4}),
        ("l1", {"coefficient": 2.0}),
        ("gated", {"coefficient": 2.0}),
        ("batch_topk", {"k": 4}),
        ("jumprelu", {"penalty": "target_l0", "target_l0": 4.0}),
        ("matryoshka", {"k": 4}),
        ("p_anneal", {"coefficient": 0.5, "p_end": 0.6}),  # near 0.2 the slope at zero magnifies rounding to 0.3 % of the loss
        ("group_max", {"k": 4}),
        ("matching_pursuit", {"k": 4}),
    ],
)
def test_two_hundred_steps_end_where_the_dense_definition_ends(planted, rule, options):
    x, _ = planted(8_000, d_in=32, n_directions=64)
    config = TrainConfig(
        sparsity=rule, options=options, d_sae=96, n_tokens=200 * 128, batch_size=128, lr=2e-3, dead_after=4_000, log_every=10**9
    )
    lines = []
    for step_class in (DenseStep, SparseStep):
        source = TensorSource(x)
        trainer = Trainer(config, source)
        trainer.step_class = step_class
        for batch in source.batches(["x"], config.batch_size, 0):
            if trainer.n_steps == 180:
                trainer.log_line()  # compare the mean of the last twenty steps
            trainer.step(batch["x"])
            if trainer.done:
                break
        lines.append(trainer.log_line())
    dense, sparse = lines
    assert sparse["step"] == dense["step"] == 200
    assert sparse["loss"] == pytest.approx(dense["loss"], rel=1e-3)
    assert sparse["fvu"] < 0.6


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("topk", {"k": 16}),
        ("l1", {}),
        ("l1", {"p": 0.5}),
        ("gated", {}),
        ("batch_topk", {"k": 16}),
        ("jumprelu", {}),
        ("jumprelu", {"penalty": "tanh"}),
        ("matryoshka", {"k": 16}),
        ("p_anneal", {"start": 0.0}),
        ("group_max", {"k": 16}),
        ("matching_pursuit", {"k": 16}),
    ],
)
def test_the_same_seed_gives_the_same_bytes_at_a_size_that_runs_in_parallel(rule, options):
    x = torch.randn(1024, 64, generator=torch.Generator().manual_seed(0))
    config = TrainConfig(sparsity=rule, options=options, d_sae=1024, n_tokens=10_240, batch_size=1024, lr=1e-3, warmup=0)

    def weights() -> dict[str, torch.Tensor]:
        trainer = Trainer(config, TensorSource(x))
        for _ in range(4):
            trainer.step(x)
        return {name: tensor.clone() for name, tensor in trainer.dictionary.state_dict().items()}

    first = weights()
    for _ in range(3):
        assert all(torch.equal(p, first[name]) for name, p in weights().items())


@pytest.mark.parametrize(("rule", "options"), [("topk", {"k": 3}), ("l1", {}), ("gated", {})])
def test_encode_is_differentiable_in_x(rule, options):
    d = Dictionary.create(rule, reads=8, d_sae=30, options=options)
    for parameter in d.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)), alpha=0.2)
    x = torch.randn(12, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
    weights = torch.randn(12, 30, generator=torch.Generator().manual_seed(2))
    (of_sparse,) = torch.autograd.grad((d.encode(x).to_dense() * weights).sum(), x)
    (of_dense,) = torch.autograd.grad((d.rule.activation(d.pre(x)) * weights).sum(), x)
    torch.testing.assert_close(of_sparse, of_dense)


class FirstOfBatch(Sparsity):
    """Fires where a pre-activation is the largest of its latent in the batch while training, where it is positive after."""

    sizes: ClassVar[list[int]] = []

    def support(self, pre):
        self.sizes.append(len(pre))
        return support_of_mask(pre == pre.amax(0) if self.training else pre > 0)

    def values(self, pre, latent):
        return pre.relu()

    def activation(self, pre):
        return pre.relu() * (pre == pre.amax(0))


class RowWise(FirstOfBatch):
    """The same, wrongly declared to look at single rows."""

    row_wise = True


@pytest.mark.parametrize(
    ("rule_class", "training", "largest"), [(FirstOfBatch, True, 24), (RowWise, True, 5), (FirstOfBatch, False, 5)]
)
def test_only_row_wise_rules_are_given_parts_of_a_training_batch(monkeypatch, rule_class, training, largest):
    monkeypatch.setattr(encoder, "TILE_BYTES", 5 * 40 * 4)
    monkeypatch.setattr(encoder, "LEAST_ROWS", 1)
    d = Dictionary(rule_class(rule_class.Config(), d_in=6, d_sae=40), reads=6, d_sae=40).train(training)
    d.W_enc.data.normal_(generator=torch.Generator().manual_seed(0))
    rule_class.sizes.clear()
    x = torch.randn(24, 6, generator=torch.Generator().manual_seed(1))
    codes = d.encode(x)
    assert max(rule_class.sizes) == largest
    if largest == 24:
        assert len(codes.value) == 40
    if not training:
        torch.testing.assert_close(codes.to_dense(), d.pre(x).relu())


@pytest.mark.parametrize(
    ("d_sae", "d_in", "rows"),
    [(65_536, 768, 512), (262_144, 768, 128), (2**20, 768, 128), (2**23, 768, 128), (2**20, 16, 32), (2**30, 3, 3)],
)
def test_a_tile_of_very_many_latents_keeps_enough_rows_but_no_more_than_the_weight_has(d_sae, d_in, rows):
    """Within 128 MiB as long as that is 128 rows; then 128 rows, if the weight has at least as many."""
    assert encoder.tile_rows(d_sae, torch.empty(1, d_in)) == rows


def test_tiles_of_any_number_of_rows_give_the_same_product(monkeypatch):
    x = torch.randn(300, 96, generator=torch.Generator().manual_seed(0))
    d = Dictionary.create("topk", reads=96, d_sae=1024, options={"k": 20})
    whole = d.pre(x)
    monkeypatch.setattr(encoder, "TILE_BYTES", 1)
    for least in (1, 32, 128):
        monkeypatch.setattr(encoder, "LEAST_ROWS", least)
        tiles = [tile.clone() for tile in encoder.Encoder(d.W_enc, d.b_enc, d.input_bias, x).tiles()]
        assert max(map(len, tiles)) == min(least, 96)
        torch.testing.assert_close(torch.cat(tiles), whole, rtol=1e-5, atol=1e-5)


def test_an_encoder_of_halves_chooses_by_halves_and_codes_in_float32():
    d = Dictionary.create("topk", reads=64, d_sae=512, options={"k": 20})
    x = torch.randn(100, 64, generator=torch.Generator().manual_seed(0))
    step = SparseStep(d, x, dead=torch.zeros(512, dtype=torch.bool), progress=0.5, warmup=1.0, halves=True)
    rounded = x.bfloat16().double() @ d.W_enc.detach().bfloat16().double()
    kth = rounded.topk(20, dim=1).values[:, -1:]
    chosen = step.codes.to_dense() != 0
    assert (chosen == (rounded >= kth - 1e-6)).float().mean() > 0.9999
    exact = (x.double() @ d.W_enc.detach().double())[chosen]
    torch.testing.assert_close(step.codes.to_dense().detach()[chosen].double(), exact, rtol=1e-5, atol=1e-6)
    assert ((rounded >= kth) != (d.pre(x) >= d.pre(x).topk(20, dim=1).values[:, -1:])).any(), "the two choose the same here"


@pytest.mark.parametrize("limit", [0.0, 0.05, 1e6])
def test_clipping_is_that_of_a_gradient_scaled_down_before_adam(planted, monkeypatch, limit):
    monkeypatch.setattr("saelens_lite.training.trainer.scale_encoder_", lambda *_, **__: None)  # nor is the copy's scaled
    x, _ = planted(256, d_in=16, n_directions=32)
    config = TrainConfig(
        sparsity="l1",
        options={"coefficient": 5.0},
        d_sae=64,
        n_tokens=25_600,
        batch_size=256,
        clip_grad_norm=limit,
        warmup=0,
        decay=0,
        lr=1e-2,
        normalize="none",
    )
    trainer, copy = Trainer(config, TensorSource(x)), Trainer(config, TensorSource(x)).dictionary
    adam = torch.optim.Adam(copy.parameters(), lr=1e-2, betas=config.betas, eps=1e-8)
    norms = []
    for i in range(3):
        trainer.step(x)
        warmup = min(1.0, i / 100 / config.sparsity_warmup)
        step = DenseStep(copy, x, dead=torch.zeros(64, dtype=torch.bool), progress=i / 100, warmup=warmup)
        adam.zero_grad()
        sum(step.losses().values()).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(copy.parameters(), limit or 1e9)))
        adam.step()
    assert min(norms) > 0.05
    for found, wanted in zip(trainer.dictionary.parameters(), copy.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_an_activation_function_is_given_float32_numbers_whatever_the_support_is_chosen_from(activation_only):
    d = Dictionary.create(activation_only, reads=64, d_sae=256)
    x = 3 * torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    step = SparseStep(d, x, dead=torch.zeros(256, dtype=torch.bool), progress=0.5, warmup=1.0, halves=True)
    torch.testing.assert_close(step.codes.to_dense(), d.rule.activation(d.pre(x)), rtol=1e-4, atol=1e-5)


def test_second_derivatives_are_refused_rather_than_wrong():
    d = Dictionary.create("topk", reads=8, d_sae=24, options={"k": 4})
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    (gradient,) = torch.autograd.grad(d(x).square().sum(), d.W_enc, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


def test_memory_that_is_used_again_changes_nothing(monkeypatch):
    x = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))

    def weights(spare: encoder.Spare | None) -> list[torch.Tensor]:
        trainer = Trainer(TrainConfig(d_sae=24, options={"k": 3}, batch_size=60, n_tokens=600, dead_after=60), TensorSource(x))
        for rows in (60, 60, 7, 60):
            trainer.step(x[:rows], spare)
        return [p.detach().clone() for p in trainer.dictionary.parameters()]

    fresh = weights(None)
    taken = []
    original = encoder.Spare.take

    def noted(self, n_rows: int, width: int, like: torch.Tensor) -> torch.Tensor:
        buffer = original(self, n_rows, width, like)
        taken.append(buffer.data_ptr())
        return buffer.fill_(torch.nan)

    monkeypatch.setattr(encoder.Spare, "take", noted)
    again = weights(encoder.Spare())
    assert len(set(taken)) < len(taken)
    assert all(torch.equal(a, b) for a, b in zip(fresh, again, strict=True))


def test_steps_that_wait_for_their_update_do_not_share_memory():
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    spare, dead = encoder.Spare(), torch.zeros(24, dtype=torch.bool)
    d = Dictionary.create("topk", reads=8, d_sae=24, options={"k": 3})
    steps = [SparseStep(d, rows, dead=dead, progress=0.5, warmup=1.0, spare=spare) for rows in (x[:20], x[20:])]
    every = torch.arange(24)
    first, second = (next(step.pre_tiles(every)).clone() for step in steps)
    torch.testing.assert_close(torch.cat([first, second]), d.pre(x).detach())
    steps[0].release()
    third = SparseStep(d, x[20:], dead=dead, progress=0.5, warmup=1.0, spare=spare)
    assert torch.equal(next(third.pre_tiles(every)), second)
    torch.testing.assert_close(next(steps[0].pre_tiles(every)), first)  # computed again, not read from what was handed on
