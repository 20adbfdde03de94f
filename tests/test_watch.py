"""A trainer whose losses are read later than the steps, as on a GPU: the same results, and the same state after a bad step."""

import pytest
import torch

import saelens_lite as sl
from saelens_lite import registry
from saelens_lite.cache import TensorSource
from saelens_lite.errors import NonFiniteError, PluginError
from saelens_lite.training import Trainer
from saelens_lite.training.trainer import DEAD_EVERY
from saelens_lite.training.watch import MOST_UNREAD, Watch

SIZE, STEPS, BAD = 16, 12, 5
SETTINGS = {"d_sae": 24, "batch_size": SIZE, "n_tokens": STEPS * SIZE, "lr": 1e-2, "dead_after": 10**6}
RULES = {"topk": {"k": 2}, "batch_topk": {"k": 3}, "l1": {}, "p_anneal": {"start": 0.0}, "jumprelu": {"threshold": 0.4}}


@pytest.fixture
def batches() -> torch.Tensor:
    return torch.randn(STEPS, SIZE, 6, generator=torch.Generator().manual_seed(0)) + 0.5


@pytest.fixture
def trainer(batches, monkeypatch):
    """Return a function that makes a trainer which reads the losses at once or later."""

    def make(rule: str, later: bool, **settings) -> Trainer:
        monkeypatch.setattr("saelens_lite.training.trainer.asynchronous", lambda _: later)
        config = sl.TrainConfig(sparsity=rule, options=RULES.get(rule, {}), **(SETTINGS | settings))
        return Trainer(config, TensorSource(batches.flatten(0, 1)))

    return make


def state(trainer: Trainer) -> tuple[dict, dict]:
    tensors, numbers = trainer.state()
    return {name: x.clone() for name, x in tensors.items() if name != "dead"}, dict(numbers)


def assert_same(a: tuple[dict, dict], b: tuple[dict, dict]) -> None:
    assert a[0].keys() == b[0].keys()
    for name, x in a[0].items():
        assert torch.equal(x, b[0][name]), name
    assert a[1] == b[1]


@pytest.mark.parametrize("rule", RULES)
def test_training_is_the_same_whenever_the_losses_are_read(rule, trainer, batches):
    both = [trainer(rule, later) for later in (False, True)]
    lines = []
    for one in both:
        for x in batches:
            one.step(x)
        lines.append(one.log_line())
    assert lines[0] == pytest.approx(lines[1], abs=2e-6)
    states = [state(one) for one in both]
    assert_same(*states)


@pytest.mark.parametrize("rule", RULES)
def test_a_bad_batch_leaves_the_state_before_it_and_training_can_go_on(rule, trainer, batches):
    good, late = trainer(rule, False), trainer(rule, True)
    for x in batches[: BAD - 1]:
        good.step(x)
    before = state(good)
    for i, x in enumerate(batches[:-2], 1):
        late.step(x * torch.nan if i == BAD else x)
    assert late.n_steps == len(batches) - 2
    with pytest.raises(NonFiniteError, match=rf"^the activations became NaN or infinite in step {BAD}, {rule}") as error:
        late.check()
    assert error.value.in_activations
    after = state(late)
    if good.dictionary.rule.unit_decoder:  # after_step divided unit vectors by their norms again
        torch.testing.assert_close(after[0].pop("dictionary.W_dec"), before[0].pop("dictionary.W_dec"), rtol=1e-6, atol=0)
        assert_same(after, before)
        return
    assert_same(after, before)
    for one in (good, late):
        one.step(batches[-1])
    assert_same(state(late), state(good))
    assert not torch.equal(state(late)[0]["dictionary.W_enc"], before[0]["dictionary.W_enc"])


def test_negative_codes_change_nothing(trainer, batches):
    @sl.register("dips")
    class Dips(sl.Sparsity):
        def activation(self, pre):
            return pre.relu() - (1.0 if self.training and getattr(self, "n", 0) == BAD else 0.0)

        def losses(self, step):
            self.n = getattr(self, "n", 1) + 1
            return {}

    try:
        good, late = trainer("dips", False), trainer("dips", True)
        for x in batches[: BAD - 1]:
            good.step(x)
        for x in batches:
            late.step(x)
        with pytest.raises(PluginError, match="gave a negative code"):
            late.check()
        assert_same(state(late), state(good))
    finally:
        registry.unregister("dips")


def test_a_restored_trainer_forgets_a_bad_step(trainer, batches):
    one, other = trainer("l1", True), trainer("l1", True)
    one.step(batches[0])
    good = state(one)
    one.step(batches[1] * torch.nan)
    one.restore(*good)
    for again in (one, other):
        if again is other:
            other.step(batches[0])
        again.step(batches[1])
    assert_same(state(one), state(other))


def test_the_list_of_dead_latents_is_kept_and_restored(trainer, batches):
    one = trainer("topk", True, dead_after=2 * SIZE, n_tokens=100 * SIZE)
    for i in range(DEAD_EVERY + 3):
        one.step(batches[i % STEPS])
    tensors, numbers = one.state()
    assert torch.equal(tensors["dead"].nonzero().squeeze(1), one._dead_latents)
    assert tensors["dead"].any()
    other = trainer("topk", True, dead_after=2 * SIZE, n_tokens=100 * SIZE)
    other.restore({name: x.clone() for name, x in tensors.items()}, dict(numbers))
    for again in (one, other):
        for x in batches:
            again.step(x)
    assert_same(state(one), state(other))


def test_figures_are_read_at_the_latest_after_so_many_steps(trainer, batches):
    one = trainer("l1", True, n_tokens=10**6)
    for i in range(1, MOST_UNREAD):
        one.step(batches[i % STEPS] * (torch.nan if i == 3 else 1.0))
    with pytest.raises(NonFiniteError, match="in step 3, "):
        one.step(batches[0])
    assert (one.n_steps, one.n_seen) == (2, 2 * SIZE)


def test_figures_come_back_by_step_and_name():
    watch = Watch(torch.device("cpu"))
    watch.note({"a": torch.tensor(1.0), "b": torch.tensor(2.0)}, torch.tensor(0.0))
    assert not watch.stopped
    watch.note({"a": torch.tensor(torch.inf)}, torch.tensor(0.0))
    assert watch.stopped
    assert watch.read() == [{"a": 1.0, "b": 2.0}, {"a": torch.inf}]
    assert watch.read() == []
    assert watch.stopped
