"""Training that starts from a dictionary: its codes and its output are those of the dictionary."""

import pytest
import torch

import saelens_lite as sl
from saelens_lite.cache import TensorSource
from saelens_lite.errors import ConfigError
from saelens_lite.evaluation.replicates import recipe_of
from saelens_lite.training import Trainer

RULES = {
    "topk": {"k": 4},
    "batch_topk": {"k": 4, "threshold_decay": 0.999999},  # θ follows each batch
    "matryoshka": {"k": 4, "threshold_decay": 0.999999},
    "group_max": {"k": 4},
    "l1": {"coefficient": 0.5},
    "p_anneal": {"coefficient": 0.5},
    "gated": {"coefficient": 0.5},
    "jumprelu": {},
    "matching_pursuit": {"k": 4},
}
PLACES = {
    "autoencoder": {"hook": "a"},
    "transcoder": {"hook": "a", "writes": ("b",), "skip": True},
    "crosscoder": {"reads": ("a", "b")},
}
CASES = [(rule, place) for rule in RULES for place in PLACES if rule != "matching_pursuit" or place == "autoencoder"]
IDS = ["-".join(case) for case in CASES]


def activations(n: int = 512, factor: float = 1.0) -> dict[str, torch.Tensor]:
    """Return activations of two hooks of other widths, sizes and means."""
    random = torch.Generator().manual_seed(0)
    strengths = torch.rand(n, 32, generator=random) * (torch.rand(n, 32, generator=random) < 0.1)
    a = strengths @ torch.randn(32, 12, generator=random) + torch.randn(12, generator=random)
    b = 7 * (strengths @ torch.randn(32, 8, generator=random)) + 3
    return {"a": factor * a, "b": b}


def trained(rule: str, place: str, x: dict[str, torch.Tensor], **more) -> sl.Dictionary:
    settings = {"d_sae": 16, "n_tokens": 2048, "batch_size": 64, "lr": 1e-2, "options": RULES[rule]}
    return sl.train(TensorSource(x), sl.TrainConfig(sparsity=rule, **settings, **PLACES[place], **more))[0].dictionary


def joined(x: dict[str, torch.Tensor], ports) -> torch.Tensor:
    return torch.cat([x[port.hook] for port in ports], 1)


def assert_same_function(d: sl.Dictionary, again: sl.Dictionary, x: dict[str, torch.Tensor]) -> None:
    inputs = joined(x, d.reads)
    torch.testing.assert_close(again.encode(inputs).to_dense(), d.encode(inputs).to_dense(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(again(inputs), d(inputs), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("rule", "place"), CASES, ids=IDS)
def test_training_that_moves_nothing_gives_the_same_dictionary(rule, place, tmp_path):
    """Compared on other rows: a threshold may be exactly the code of a row that was trained on."""
    x, held_out = ({hook: rows[part] for hook, rows in activations(768).items()} for part in (slice(512), slice(512, None)))
    d = sl.load(trained(rule, place, x).save(tmp_path / "d"))
    config = sl.TrainConfig(n_tokens=256, batch_size=64, lr=1e-12)  # the rest is the dictionary's
    source = TensorSource({hook: torch.cat([x[hook], held_out[hook]]) for hook in x})
    (run,) = sl.train(source, config, start_from=d, validation_tokens=256)
    assert (run.config.sparsity, run.config.d_sae, run.dictionary.place) == (rule, 16, d.place)
    assert_same_function(d, run.dictionary, held_out)
    if len(d.writes) == 1:  # with several write ports, val_fvu weighs them
        y, y_hat = joined(held_out, d.writes), d(joined(held_out, d.reads))
        fvu = (y - y_hat).square().sum() / (y - y.mean(0)).square().sum()
        assert run.history[-1]["val_fvu"] == pytest.approx(fvu.item(), rel=1e-3)


@pytest.mark.parametrize("rule", ["topk", "l1", "gated", "jumprelu"])
def test_activations_of_another_size_change_only_the_unit_of_the_codes(rule):
    d = trained(rule, "autoencoder", activations())
    x = activations(factor=5.0)
    trainer = Trainer(sl.TrainConfig(sparsity=rule, options=RULES[rule], d_sae=16, hook="a"), TensorSource(x))
    trainer.start_from(d)
    again = trainer.result()
    norms = again.W_dec.norm(dim=1) / d.W_dec.norm(dim=1)
    torch.testing.assert_close(norms, norms.mean().expand(16), rtol=1e-4, atol=0)  # one factor for all latents
    torch.testing.assert_close(again(x["a"]), d(x["a"]), rtol=1e-3, atol=1e-3)
    codes = d.encode(x["a"]).to_dense()
    torch.testing.assert_close(again.encode(x["a"]).to_dense() * norms.mean(), codes, rtol=1e-3, atol=1e-3)


def test_unit_directions_of_large_activations_train_as_well_as_our_own():
    """Other tools write unit rows for raw activations. Adam's steps must fit them however large the activations are."""
    x = activations(factor=1000.0)["a"]
    d = sl.Dictionary.from_tensors(
        W_dec=torch.eye(12).repeat(2, 1)[:16], W_enc=torch.eye(12).repeat(1, 2)[:, :16], d_in=12, rule="l1"
    )
    config = sl.TrainConfig(n_tokens=2048, batch_size=64, lr=1e-3, options={"coefficient": 0.0}, log_every=64)
    (run,) = sl.train(TensorSource(x), config, start_from=d)
    assert run.history[0]["fvu"] < 5
    assert run.history[-1]["fvu"] < run.history[0]["fvu"]


@pytest.mark.parametrize("given", [{"coefficient": 0.5}, {"target_l0": 3.0}])
def test_a_new_aim_replaces_that_of_the_dictionary(given):
    d = trained("l1", "autoencoder", activations())
    old = {"coefficient": 2.0} if "target_l0" in given else {"target_l0": 8.0}
    d.rule.config = type(d.rule.config)(**old)
    config = sl.TrainConfig(hook="a", n_tokens=64, batch_size=64, options=given)
    (run,) = sl.train(TensorSource(activations()), config, start_from=d)
    assert run.dictionary.rule.target_l0 == given.get("target_l0")
    assert run.dictionary.rule.config.coefficient == given.get("coefficient")


def test_unequal_directions_of_a_top_k_dictionary_are_said(caplog):
    d = trained("topk", "autoencoder", activations())
    with torch.no_grad():
        d.W_dec[3] *= 2
    Trainer(sl.TrainConfig(options={"k": 4}, d_sae=16, hook="a"), TensorSource(activations())).start_from(d)
    assert "topk makes them equal" in caplog.text


def test_another_rule_starts_from_the_same_directions():
    x = activations()
    d = trained("l1", "autoencoder", x)
    config = sl.TrainConfig(hook="a", sparsity="topk", options={"k": 16}, n_tokens=64, batch_size=64, lr=1e-12)
    (run,) = sl.train(TensorSource(x), config, start_from=d)
    assert run.dictionary.rule.plugin_name == "topk"
    torch.testing.assert_close(run.dictionary(x["a"]), d(x["a"]), rtol=1e-3, atol=1e-3)  # k = d_sae leaves ReLU


def test_the_first_step_does_not_rescale_the_encoder():
    """An untrained encoder is scaled to the first batch; that of a dictionary is not."""
    x = activations()
    d = trained("l1", "autoencoder", x)
    with torch.no_grad():
        d.W_enc *= 0.5
    config = sl.TrainConfig(hook="a", n_tokens=64, batch_size=64, lr=1e-12)
    (run,) = sl.train(TensorSource(x), config, start_from=d)
    torch.testing.assert_close(run.dictionary.W_enc, d.W_enc, rtol=1e-3, atol=1e-5)


def test_the_record_names_the_start():
    x = activations()
    begin, config = trained("topk", "autoencoder", x), sl.TrainConfig(hook="a", n_tokens=64, batch_size=64)
    (run,) = sl.train(TensorSource(x), config, start_from=begin)
    record = dict(run.dictionary.training_record["start_from"])
    assert len(record.pop("sha256")) == 64
    assert record == {"source": None, "sparsity": "topk", "tokens": 2048}
    (same,) = sl.train(TensorSource(x), config, start_from=begin)
    assert same.dictionary.training_record == run.dictionary.training_record
    with torch.no_grad():
        begin.b_dec += 1
    (other,) = sl.train(TensorSource(x), config, start_from=begin)
    assert other.dictionary.training_record["start_from"]["sha256"] != run.dictionary.training_record["start_from"]["sha256"]
    assert recipe_of(other.dictionary).sha256 != recipe_of(run.dictionary).sha256


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hook": "a", "d_sae": 32}, "d_sae = 32, but the dictionary to start from has 16; leave out d_sae"),
        ({"hook": "b"}, r"ports have the widths \[12\] → the same .* expected \[8\]"),
        ({"hook": "a", "writes": ("b",)}, r"expected \[12\] → \[8\]"),
        ({"hook": "a", "sparsity": "gated"}, "a gated dictionary cannot start from this topk dictionary, because b_enc"),
        ({"hook": "a", "sparsity": "matching_pursuit"}, "W_enc has the shape"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(settings, message):
    x = activations()
    d = trained("topk", "autoencoder", x)
    with pytest.raises(ConfigError, match=message):
        sl.train(TensorSource(x), sl.TrainConfig(n_tokens=64, batch_size=64, **settings), start_from=d)
    with pytest.raises(ConfigError, match="2 dictionaries for 1 configs"):
        sl.train(TensorSource(x), sl.TrainConfig(hook="a"), start_from=[d, d])
