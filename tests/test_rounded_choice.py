"""A support chosen from bfloat16 products: codes and gradients there against each rule's equation in float64."""

import pytest
import torch

import saelens_lite as sl
from saelens_lite.cache import TensorSource
from saelens_lite.dictionary import Dictionary
from saelens_lite.training import Trainer
from saelens_lite.training.step import SparseStep

D_IN, D_SAE, BATCH = 64, 256, 300
K = {"k": 8}
RULES = {
    "l1": {},
    "p_anneal": {},
    "topk": K,
    "batch_topk": K,
    "matryoshka": K,
    "group_max": K,
    "jumprelu": {"threshold": 0.05, "bandwidth": 0.01},
    "gated": {},
    "matching_pursuit": {"k": 20},
}


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(rule: str) -> Dictionary:
    """Return a dictionary in training, with random biases and thresholds; where there is a k, fewer than k latents are
    positive.
    """
    d = Dictionary.create(rule, reads=D_IN, d_sae=D_SAE, options=RULES[rule]).train()
    for i, (name, parameter) in enumerate(d.named_parameters()):
        if parameter.ndim == 1:
            parameter.data.add_(normal(*parameter.shape, seed=i), alpha=0.1)
        if name == "b_enc" and "k" in RULES[rule]:
            parameter.data.sub_(1.9)
        if name == "rule.b_mag":
            parameter.data.add_(1)
    if rule == "matching_pursuit":
        d.W_dec.data[:, 8:] = 0  # 256 directions of 8 axes: what is left is soon as small as the rounding
        d.rule.after_step(d)
    return d


def a_step(d: Dictionary) -> SparseStep:
    x = normal(BATCH, D_IN, seed=100)
    return SparseStep(d, x, dead=torch.zeros(D_SAE, dtype=torch.bool), progress=0.5, warmup=1.0, halves=True)


def pursued(atoms: torch.Tensor, residual: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """Return v [batch step] of matching pursuit with the given latents, step by step."""
    v = []
    for latent in latents.T:
        v.append((residual * atoms[latent]).sum(1).relu())
        residual = residual - v[-1][:, None] * atoms[latent]
    return torch.stack(v, 1)


def codes_in_float64(rule: str, p: dict[str, torch.Tensor], x: torch.Tensor, step: SparseStep, latents: torch.Tensor | None):
    """Return the codes at a step's support, the pairs too near a threshold to judge, and the wrongly chosen pairs."""
    row, latent = step.codes.row, step.codes.latent
    if rule == "matching_pursuit":
        v = pursued(p["W_dec"], x - p["b_dec"], latents)
        dense = torch.zeros(BATCH, D_SAE, dtype=torch.double).scatter_add(1, latents, v)
        return dense[row, latent], torch.zeros_like(row, dtype=torch.bool), (v == 0).flatten()
    h = ((x - p["b_dec"]) @ p["W_enc"] + p.get("b_enc", 0.0))[row, latent]
    if rule == "gated":
        gate = h + p["rule.b_gate"][latent]
        magnitude = torch.relu(h * p["rule.r_mag"].exp()[latent] + p["rule.b_mag"][latent])
        return (gate > 0) * magnitude, gate.abs() < 1e-5, (gate <= 0) & (magnitude > 0.1)
    if rule == "jumprelu":
        threshold = (10 * p["rule.scaled_log_threshold"]).exp()[latent]
        window = threshold - 0.01 * D_IN**0.5 / 2
        return h * (h > threshold), (h - threshold).abs() < 1e-5, h < window
    return h.relu(), h.abs() < 1e-5, h < 0


@pytest.mark.parametrize("rule", RULES)
def test_codes_and_gradients_are_those_of_the_exact_pre_activations(rule, monkeypatch):
    d = make(rule)
    found = []
    if rule == "matching_pursuit":
        pursue = d.rule.pursue
        monkeypatch.setattr(d.rule, "pursue", lambda *args: found.append(pursue(*args)) or found[0])
    step = a_step(d)
    p = {name: value.detach().double().requires_grad_() for name, value in d.named_parameters()}
    codes, unclear, mistaken = codes_in_float64(rule, p, step.x.double(), step, found[0][0] if found else None)
    assert mistaken.any(), "bfloat16 and float64 agree everywhere here"
    assert unclear.float().mean() < 1e-3
    value = step.codes.value
    assert (value >= 0).all()
    tolerance = {"matching_pursuit": 1e-4}.get(rule, 1e-5)
    torch.testing.assert_close(value.detach()[~unclear].double(), codes.detach()[~unclear], rtol=1e-4, atol=tolerance)

    weights = normal(len(value), seed=7) * ~unclear
    (value * weights).sum().backward()
    (codes * weights.double()).sum().backward()
    for name, parameter in d.named_parameters():
        if "threshold" in name:  # an estimate, no gradient of a code
            continue
        wanted = torch.zeros_like(p[name]) if p[name].grad is None else p[name].grad
        got = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert (got.double() - wanted).abs().max() <= 1e-3 * wanted.abs().max().clamp_min(1e-6), name


@pytest.mark.parametrize("rule", RULES)
def test_no_step_of_a_training_has_a_negative_code_and_zeros_do_not_count(rule, monkeypatch):
    x = normal(2048, D_IN, seed=1) @ normal(D_IN, D_IN, seed=2)
    config = sl.TrainConfig(
        sparsity=rule, options=RULES[rule], d_sae=D_SAE, batch_size=512, n_tokens=2048, lr=1e-3, encoder_precision="bfloat16"
    )
    trainer = Trainer(config, TensorSource(x))
    steps = []
    observe = trainer.dictionary.rule.observe
    monkeypatch.setattr(trainer.dictionary.rule, "observe", lambda step: steps.append(step.codes.detach()) or observe(step))
    for batch in x.split(512):
        trainer.step(batch)
    assert min(float(codes.value.min()) for codes in steps) >= 0
    n_fired = sum(int((codes.to_dense() > 0).sum()) for codes in steps)
    assert trainer.log_line()["l0"] == pytest.approx(n_fired / 2048, abs=1e-6)


def test_codes_that_are_zero_pay_no_penalty():
    """Σ f^p over codes, of which a stored zero is one."""
    value = torch.tensor([0.0, 2.0, 0.0, 0.5])
    for rule in ("l1", "p_anneal"):
        options = {"coefficient": 5.0} | ({"p": 0.2} if rule == "l1" else {})
        d = Dictionary.create(rule, reads=4, d_sae=4, options=options)
        d.W_dec.data.copy_(torch.eye(4))
        if rule == "p_anneal":
            d.rule.p.fill_(0.2)
        step = SparseStep(d, torch.zeros(1, 4), dead=torch.zeros(4, dtype=torch.bool), progress=0.5, warmup=1.0)
        step.codes = sl.SparseCodes.from_dense(torch.ones(1, 4))._replace(value=value)
        (penalty,) = d.rule.losses(step).values()
        torch.testing.assert_close(penalty, d.rule.config.coefficient * value[value > 0].pow(0.2).sum())


def test_a_threshold_stored_as_it_is_stays_above_zero_in_training():
    d = Dictionary.create("jumprelu", reads=8, d_sae=16, options={"parameter": "plain"}).train()
    d.rule.plain_threshold.data.copy_(torch.linspace(-1, 1, 16))
    x = normal(50, 8, seed=0)
    assert (d.encode(x).value > 0).all()
    torch.testing.assert_close(d.encode(x).to_dense(), d.pre(x).relu() * (d.pre(x) > d.rule.threshold))
    d.rule.after_step(d)
    torch.testing.assert_close(d.rule.threshold, torch.linspace(-1, 1, 16).clamp(min=0))
