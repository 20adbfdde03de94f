"""Dictionary.from_tensors: a state dict in either orientation gives its function; what does not fit is refused by name."""

import logging

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import saelens_lite as sl
from saelens_lite.dictionary.tensors import check_types
from saelens_lite.errors import ConfigError, NonFiniteError, PluginError, ShapeError

D_IN, D_SAE, D_OUT, K = 10, 24, 7, 3
RELU, TOPK = "l1", "topk"


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def state(d_out: int = D_IN, d_sae: int = D_SAE) -> dict[str, torch.Tensor]:
    return {
        "W_enc": normal(D_IN, d_sae, seed=1) * 0.5,
        "b_enc": normal(d_sae, seed=2) * 0.3,
        "W_dec": normal(d_sae, d_out, seed=3),
        "b_dec": normal(d_out, seed=4),
    }


X = normal(30, D_IN, seed=9) * 2
THETA = normal(D_SAE, seed=5)


def pre(t: dict[str, torch.Tensor]) -> torch.Tensor:
    w = {name: tensor.double() for name, tensor in t.items()}
    return (X.double() - w["b_dec"]) @ w["W_enc"] + w["b_enc"]


def check(d: sl.Dictionary, codes: torch.Tensor, y: torch.Tensor, folder) -> None:
    """Codes and output are those, also once saved and loaded."""
    for dictionary in (d, sl.Dictionary.load(d.save(folder))):
        torch.testing.assert_close(dictionary.encode(X).to_dense().double(), codes.double(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(dictionary(X).double(), y.double(), rtol=1e-5, atol=1e-5)
        assert not dictionary.training


@pytest.mark.parametrize("flip_enc", [False, True])
@pytest.mark.parametrize("flip_dec", [False, True])
@pytest.mark.parametrize("d_sae", [D_SAE, 6])
def test_either_orientation_gives_the_function(flip_enc, flip_dec, d_sae, tmp_path):
    t = state(d_sae=d_sae)
    codes = pre(t).clamp(min=0)
    given = t | {"W_enc": t["W_enc"].T if flip_enc else t["W_enc"], "W_dec": t["W_dec"].T if flip_dec else t["W_dec"]}
    d = sl.Dictionary.from_tensors(**given, rule=RELU, reads="blocks.1.hook_resid_pre")
    check(d, codes, codes @ t["W_dec"].double() + t["b_dec"].double(), tmp_path / "d")
    assert (d.d_in, d.d_sae, d.hook) == (D_IN, d_sae, "blocks.1.hook_resid_pre")


def test_without_biases_they_are_zero_and_a_size_has_to_be_given(tmp_path):
    t = state()
    codes = (X.double() @ t["W_enc"].double()).clamp(min=0)
    for size in ({"d_in": D_IN}, {"d_sae": D_SAE}, {"reads": D_IN}, {"mean": torch.zeros(D_IN)}, {"scale": [1.0] * D_IN}):
        d = sl.Dictionary.from_tensors(W_enc=t["W_enc"].T, W_dec=t["W_dec"].T, **size)
        check(d, codes, codes @ t["W_dec"].double(), tmp_path / next(iter(size)))
    with pytest.raises(ShapeError, match=r"\(24, 10\) and W_dec \(10, 24\), which do not decide .* give d_in= or d_sae="):
        sl.Dictionary.from_tensors(W_enc=t["W_enc"].T, W_dec=t["W_dec"].T)
    few = state(d_sae=6)  # fewer latents than inputs: b_dec says so
    assert sl.Dictionary.from_tensors(W_enc=few["W_enc"], W_dec=few["W_dec"], b_dec=few["b_dec"]).d_sae == 6


@pytest.mark.parametrize("flip_enc", [False, True])
@pytest.mark.parametrize("flip_dec", [False, True])
def test_square_matrices_need_the_order_of_their_axes(flip_enc, flip_dec, tmp_path):
    t = state(d_sae=D_IN)
    codes = pre(t).clamp(min=0)
    given = t | {"W_enc": t["W_enc"].T if flip_enc else t["W_enc"], "W_dec": t["W_dec"].T if flip_dec else t["W_dec"]}
    axes = {"W_enc": "d_sae d_in" if flip_enc else "d_in d_sae", "W_dec": "d_out d_sae" if flip_dec else "d_sae d_out"}
    d = sl.Dictionary.from_tensors(**given, axes=axes)
    check(d, codes, codes @ t["W_dec"].double() + t["b_dec"].double(), tmp_path / "d")
    for name, other in (("W_enc", "W_dec"), ("W_dec", "W_enc")):
        with pytest.raises(ShapeError, match=rf"{name} is square, \(10, 10\), .*; give axes=.'{name}': "):
            sl.Dictionary.from_tensors(**given, axes={other: axes[other]})


def test_a_square_skip_connection_needs_the_order_of_its_axes():
    t, W_skip = state(), normal(D_IN, D_IN, seed=6)
    with pytest.raises(ShapeError, match="W_skip is square"):
        sl.Dictionary.from_tensors(**t, W_skip=W_skip, writes="b")
    for axes, A in (("d_out d_in", W_skip), ("d_in d_out", W_skip.T)):
        d = sl.Dictionary.from_tensors(**t, W_skip=W_skip, writes="b", axes={"W_skip": axes})
        assert torch.equal(d.W_skip, A)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_and_arrays_become_float32(dtype):
    given = {name: tensor.to(dtype) for name, tensor in state().items()}
    if dtype != torch.bfloat16:
        given = {name: tensor.numpy() for name, tensor in given.items()}
    d = sl.Dictionary.from_tensors(**given)
    for name, value in given.items():
        assert torch.equal(d.state_dict()[name], torch.as_tensor(value).float())


def test_the_given_tensors_are_copied():
    t = {name: torch.nn.Parameter(tensor) for name, tensor in state().items()}
    d = sl.Dictionary.from_tensors(**t)
    before = d.W_enc.detach().clone()
    with torch.no_grad():
        t["W_enc"].zero_()
    assert torch.equal(d.W_enc, before)


def test_rules_with_tensors_and_options(tmp_path):
    t = state()
    h, W_dec, b_dec = pre(t), t["W_dec"].double(), t["b_dec"].double()

    def both(name, codes, rule, options=None, **own):
        d = sl.Dictionary.from_tensors(**t, rule=rule, options=options, **own)
        check(d, codes, codes @ W_dec + b_dec, tmp_path / name)
        return d

    top = h.clamp(min=0) * torch.zeros_like(h).scatter(1, h.topk(K).indices, 1.0)
    both("topk", top, "topk", {"k": K})
    theta = THETA.double()
    d = both("jumprelu", h.clamp(min=0) * (h > theta), "jumprelu", threshold=THETA)  # some are negative: those are ReLUs
    assert torch.equal(load_file(tmp_path / "jumprelu" / "sae_weights.safetensors")["threshold"], THETA.clamp(min=0))
    assert torch.equal(d.rule.threshold, THETA.clamp(min=0))
    both("one", h * (h > 0.5), "jumprelu", threshold=0.5)
    both("batch", h * (h > 0.5), "batch_topk", {"k": K}, threshold=torch.tensor(0.5))
    both("unset", h.clamp(min=0), "batch_topk", {"k": K}, threshold=torch.tensor([-1.0]))
    gates = {"b_gate": normal(D_SAE, seed=7), "r_mag": normal(D_SAE, seed=8) * 0.3, "b_mag": normal(D_SAE, seed=9)}
    del t["b_enc"]
    linear = (X.double() - b_dec) @ t["W_enc"].double()
    magnitude = linear * gates["r_mag"].double().exp() + gates["b_mag"].double()
    both("gated", (linear + gates["b_gate"].double() > 0) * magnitude.clamp(min=0), "gated", **gates)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_transcoders(skip, turned, tmp_path):
    t, W_skip = state(d_out=D_OUT), normal(D_OUT, D_IN, seed=6)
    x, w = X.double(), {name: tensor.double() for name, tensor in t.items()}
    codes = (x @ w["W_enc"] + w["b_enc"]).clamp(min=0)
    y = codes @ w["W_dec"] + w["b_dec"] + (x @ W_skip.double().T if skip else 0)
    given = t | ({"W_skip": W_skip} if skip else {})
    given = {name: tensor.T if turned and tensor.ndim == 2 else tensor for name, tensor in given.items()}
    d = sl.Dictionary.from_tensors(**given, reads="a", writes="b")
    check(d, codes, y, tmp_path / "d")
    assert (d.writes_what_it_reads, d.reads[0].hook, d.writes[0].hook) == (False, "a", "b")


def test_the_origin_is_kept_beside_the_hook():
    origin = sl.Origin(model="gpt2", excluded_positions=(0, 1))
    d = sl.Dictionary.from_tensors(**state(), origin=origin, reads="b")
    assert (d.origin, d.hook) == (origin, "b")
    assert sl.Dictionary.from_tensors(**state()).origin == sl.Origin(excluded_positions=())


def test_directions_of_a_tied_rule_are_to_be_unit_vectors():
    unit = torch.nn.functional.normalize(normal(D_SAE, D_IN, seed=3), dim=1)
    d = sl.Dictionary.from_tensors(W_dec=unit.T, b_dec=torch.zeros(D_IN), rule="matching_pursuit", options={"k": 2})
    assert torch.equal(d.W_dec, unit)
    assert torch.equal(d.W_enc, unit.T)
    with pytest.raises(ConfigError, match="matching_pursuit needs unit vectors"):
        sl.Dictionary.from_tensors(W_dec=2 * unit, d_in=D_IN, rule="matching_pursuit", options={"k": 2})


MEAN, SCALE = normal(D_IN, seed=12) * 3, 0.25


@pytest.mark.parametrize("scale", [None, SCALE, normal(D_IN, seed=13).abs() + 0.1])
@pytest.mark.parametrize("mean", [None, MEAN, 2.0])
@pytest.mark.parametrize("subtract", [None, True, False])
def test_a_mean_is_subtracted_before_the_scale_and_then_b_dec(mean, scale, subtract, tmp_path):
    t = state()
    w = {name: tensor.double() for name, tensor in t.items()}
    m, s = torch.as_tensor(0.0 if mean is None else mean).double(), torch.as_tensor(1.0 if scale is None else scale).double()
    z = (X.double() - m) * s
    codes = ((z if subtract is False else z - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).clamp(min=0)
    y = (codes @ w["W_dec"] + w["b_dec"]) / s + m
    d = sl.Dictionary.from_tensors(**t, mean=mean, scale=scale, subtract_b_dec=subtract)
    assert (d.double().encode(X).to_dense() - codes).abs().max() < 1e-6 * codes.max()
    assert (d(X.double()) - y).abs().max() < 1e-6 * y.abs().max()


def test_gates_and_thresholds_of_an_encoder_that_does_not_subtract_b_dec():
    t = {name: tensor for name, tensor in state().items() if name != "b_enc"}
    gates = {"b_gate": normal(D_SAE, seed=7), "r_mag": normal(D_SAE, seed=8) * 0.3, "b_mag": normal(D_SAE, seed=9)}
    linear = X.double() @ t["W_enc"].double()
    magnitude = linear * gates["r_mag"].double().exp() + gates["b_mag"].double()
    codes = (linear + gates["b_gate"].double() > 0) * magnitude.clamp(min=0)
    d = sl.Dictionary.from_tensors(**t, **gates, rule="gated", subtract_b_dec=False).double()
    assert (d.encode(X).to_dense() - codes).abs().max() < 1e-6 * codes.max()
    d = sl.Dictionary.from_tensors(**t, log_threshold=THETA.abs().log(), rule="jumprelu", subtract_b_dec=False).double()
    codes = linear.clamp(min=0) * (linear > THETA.double().abs())
    assert (d.encode(X).to_dense() - codes).abs().max() < 1e-6 * codes.max()


def test_a_transcoder_may_subtract_b_dec_of_its_own_width():
    t = state()
    codes = pre(t).clamp(min=0)
    d = sl.Dictionary.from_tensors(**t, hook="a", writes="b", subtract_b_dec=True).double()
    assert (d.encode(X).to_dense() - codes).abs().max() < 1e-6 * codes.max()
    assert (d.reads[0].hook, d.writes[0].hook) == ("a", "b")


class LikeJax:
    """An array that is known only by its conversion to numpy, as arrays of jax are."""

    def __init__(self, x: torch.Tensor):
        self.x = x

    def __array__(self, dtype=None, copy=None):
        return self.x.numpy().astype(dtype or np.float32)


@pytest.mark.parametrize("kind", [torch.Tensor.tolist, LikeJax, lambda x: x.numpy()[::1].astype(">f4")])
def test_lists_and_other_arrays(kind):
    d = sl.Dictionary.from_tensors(**{name: kind(tensor) for name, tensor in state().items()})
    assert all(torch.equal(d.state_dict()[name], tensor) for name, tensor in state().items())


def nan(shape: int) -> torch.Tensor:
    return torch.full((shape,), torch.nan)


@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        ({"W_enc": torch.zeros(D_IN, 25)}, ShapeError, r"b_enc has 24 entries; W_enc has shape \(10, 25\), W_dec \(24, 10\)"),
        ({"W_enc": torch.zeros(9, D_SAE)}, ShapeError, "the input has 9 entries and the output 10; give writes="),
        ({"W_enc": torch.zeros(8, 9)}, ShapeError, r"W_enc has shape \(8, 9\) and W_dec \(24, 10\)"),
        ({"W_enc": torch.zeros(D_SAE)}, ShapeError, r"W_enc has shape \(24,\); expected a matrix"),
        ({"W_enc": torch.zeros(0, 0), "W_dec": torch.zeros(0, 0), "b_enc": None, "b_dec": None}, ShapeError, "no empty tensor"),
        ({"b_enc": torch.zeros(23)}, ShapeError, "b_enc has 23 entries"),
        ({"b_dec": torch.zeros(11)}, ShapeError, r"b_dec has shape \(11,\); expected \(10,\)"),
        ({"b_dec": torch.zeros(1, D_IN)}, ShapeError, r"b_dec has shape \(1, 10\); expected \(10,\)"),
        ({"b_enc": "zeros"}, ShapeError, "b_enc is a str; expected a tensor"),
        (
            {"b_enc": torch.zeros(D_SAE, dtype=torch.bool)},
            ShapeError,
            "b_enc is a .*bool; expected a dense one of real numbers",
        ),
        ({"b_enc": torch.zeros(D_SAE, dtype=torch.complex64)}, ShapeError, "complex64"),
        ({"b_enc": nan(D_SAE)}, NonFiniteError, "b_enc holds NaN or infinity"),
        ({"W_dec": np.full((D_SAE, D_IN), 1e300)}, NonFiniteError, r"W_dec holds NaN or infinity \(as float32\)"),
        ({"W_enc": None}, ConfigError, "l1 needs W_enc"),
        ({"threshold": THETA}, ConfigError, "missing: none; not expected: threshold"),
        ({"rule": "jumprelu"}, ConfigError, "of its own: threshold; missing: threshold;"),
        ({"rule": "jumprelu", "threshold": torch.ones(5)}, ShapeError, "threshold has shape"),
        ({"rule": "batch_topk", "options": {"k": 3}}, ConfigError, "missing: threshold"),
        ({"rule": "gated"}, ConfigError, "of its own: b_gate, b_mag, r_mag; missing: b_gate.*; not expected: b_enc"),
        ({"rule": "topk", "options": {"kay": 3}}, ConfigError, "kay"),
        ({"rule": "top_k"}, PluginError, "did you mean topk"),
        ({"mean": torch.zeros(9)}, ShapeError, r"mean has shape \(9,\); expected \(10,\)"),
        ({"mean": nan(D_IN)}, NonFiniteError, "mean holds NaN"),
        (
            {"mean": 1.0, "writes": "b"},
            ConfigError,
            "for autoencoders, not for a dictionary with an output that is not its input",
        ),
        ({"scale": 2.0, "token_norm": "layer_norm"}, ConfigError, "not for a dictionary with a token_norm"),
        ({"scale": 0.0}, ConfigError, "scale is 0; expected a number above 0"),
        ({"scale": 1e-44}, NonFiniteError, "W_dec becomes NaN or infinite"),
        ({"scale": torch.ones(2, 2)}, ShapeError, "scale has shape"),
        ({"W_enc": torch.zeros(1, D_IN, D_SAE)}, ShapeError, r"W_enc has shape \(1, 10, 24\); expected a matrix"),
        ({"W_enc": torch.zeros(D_IN, D_SAE, device="meta")}, ShapeError, "W_enc is a meta tensor"),
        ({"W_enc": [[1.0, 2.0], [3.0]]}, ShapeError, "W_enc is a list; expected a tensor or an array of numbers"),
        ({"b_enc": np.zeros(D_SAE, complex)}, ShapeError, "complex"),
        ({"d_in": D_SAE}, ShapeError, r"d_in = 24; W_enc has shape \(10, 24\), W_dec \(24, 10\)|b_enc has 24 entries"),
        ({"d_sae": 25}, ShapeError, "d_sae = 25"),
        ({"hook": "a", "reads": "b"}, ConfigError, "both say what is read"),
        (
            {"axes": {"W_enc": "d_sae d_out"}},
            ConfigError,
            "axes of W_enc are 'd_sae d_out'; expected 'd_in d_sae' or 'd_sae d_in'",
        ),
        ({"axes": {"b_enc": "d_sae"}}, ConfigError, "axes are given for 'b_enc'"),
        ({"axes": {"W_enc": "d_sae d_in"}}, ShapeError, "W_enc has shape"),
        (
            {"subtract_b_dec": True, "writes": "b", "W_dec": torch.ones(D_SAE, 7), "b_dec": torch.ones(7)},
            ShapeError,
            "width 10",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, error, reason):
    with pytest.raises(error, match=reason):
        sl.Dictionary.from_tensors(**(state() | change))


def test_nothing_is_logged_for_usual_tensors(caplog):
    caplog.set_level(logging.DEBUG)
    sl.Dictionary.from_tensors(**state(), rule="topk", options={"k": K})
    assert not [record for record in caplog.records if record.name.startswith("saelens_lite")]


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("axes", ["x"], "a list; expected Mapping"),
        ("axes", {3: "d_in d_sae"}, "with str inside"),
        ("options", [1], "a list; expected Mapping"),
        ("rule", None, "a NoneType; expected str"),
        ("token_norm", ["a"], "a list; expected str"),
        ("reads", [3], r"a list; expected .*Port.* \(with Port inside\)"),
        ("writes", True, "a bool; expected str or int or Port"),
        ("hook", 3, "'3', a int; expected str"),
        ("origin", {"model": "gpt2"}, "a dict; expected Origin"),
        ("d_in", 10.0, "a float; expected int"),
        ("subtract_b_dec", 1, "a int; expected bool"),
    ],
)
def test_arguments_of_the_wrong_type_are_refused_by_name(name, value, wanted):
    with pytest.raises(ConfigError, match=rf"^{name} is .*{wanted}"):
        check_types({name: value})
    check_types(
        {"axes": {}, "hook": None, "reads": 3, "writes": [sl.Port(width=3)], "d_sae": np.int64(3), "origin": sl.Origin()}
    )
