"""Losses and gradients of a training step against the plugins' documented equations in dense float64 autograd.

The reference below shares no code with saelens_lite. Where a rule has to choose among equals (ties), it may choose any;
the choice is read off the step, checked to be a valid one, and given to the reference.
"""

from types import MethodType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saelens_lite.codes import SparseCodes, encoder
from saelens_lite.dictionary import Dictionary
from saelens_lite.ports import Port
from saelens_lite.training.step import DenseStep, SparseStep

WARMUP = 0.75
JUMP = {"bandwidth": 0.4, "threshold_speed": 2.0}
RULES = {
    "l1": ("l1", {"coefficient": 3.0}),
    "l1, p = 0.5": ("l1", {"coefficient": 3.0, "p": 0.5}),
    "topk": ("topk", {"k": 3}),
    "topk, dead latents": ("topk", {"k": 3, "aux_k": 4, "aux_coefficient": 0.25}),
    "gated": ("gated", {"coefficient": 2.0}),
    "batch_topk": ("batch_topk", {"k": 3}),
    "batch_topk, dead latents": ("batch_topk", {"k": 3, "aux_k": 4, "aux_coefficient": 0.25}),
    "jumprelu, l0": ("jumprelu", {**JUMP, "coefficient": 2.0}),
    "jumprelu, target_l0": ("jumprelu", {**JUMP, "penalty": "target_l0", "target_l0": 5.0}),
    "jumprelu, tanh": ("jumprelu", {**JUMP, "penalty": "tanh"}),
    "jumprelu, tanh, dead latents": ("jumprelu", {**JUMP, "penalty": "tanh", "dead_coefficient": 0.5}),
    "matryoshka": ("matryoshka", {"k": 3, "prefixes": (0.125, 0.375, 0.5)}),
    "matryoshka, dead latents": ("matryoshka", {"k": 3, "prefixes": (0.25,), "aux_k": 4, "aux_coefficient": 0.25}),
    "p_anneal": ("p_anneal", {"coefficient": 3.0}),
    "group_max": ("group_max", {"k": 4}),
    "group_max, dead latents": ("group_max", {"k": 4, "aux_k": 3, "aux_coefficient": 0.25}),
    "matching_pursuit": ("matching_pursuit", {"k": 3}),
}
P, GROWTH = 0.5, 1.75  # where annealing stands


STEPS = {"dense": (DenseStep, 2**27), "sparse": (SparseStep, 2**27), "sparse, in tiles": (SparseStep, 4 * 100)}


@pytest.fixture(scope="module", autouse=True, params=STEPS)
def step_class(request):
    """Every test of this file runs with all ways to compute a step."""
    base, tile_bytes = STEPS[request.param]
    SpiedStep.__bases__ = (Spy, base)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder, "TILE_BYTES", tile_bytes)  # a few rows of a few latents
        patch.setattr(encoder, "LEAST_ROWS", 1)
        yield


class Spy:
    """A step that remembers which codes were decoded (first x_hat's, last those of an auxiliary term), and what was pursued."""

    def __init__(self, dictionary, *args, **kwargs):
        if isinstance(pursue := getattr(dictionary.rule, "pursue", None), MethodType):
            dictionary.rule.pursue = lambda *parts: self.__dict__.setdefault("pursued", pursue(*parts))
        super().__init__(dictionary, *args, **kwargs)

    def decode(self, codes, frozen=False):
        self.__dict__.setdefault("decoded", []).append(codes)
        return super().decode(codes, frozen)


class SpiedStep(Spy, DenseStep):
    """The step under test; `step_class` puts its base in place."""


def make_dictionary(rule: str, d_in: int, d_sae: int, seed: int, grid: bool, **kind) -> Dictionary:
    """Return all parameters random; `kind` makes it a transcoder or a crosscoder.

    grid: multiples of 1/8, so that pre-activations are exact in float32 and ties are common.
    """
    name, options = RULES[rule]
    dictionary = Dictionary.create(name, **{"reads": d_in, **kind}, d_sae=d_sae, options=options).train()
    generator = torch.Generator().manual_seed(seed)
    for parameter in dictionary.parameters():
        value = torch.randn(parameter.shape, generator=generator) * (1 if parameter.ndim == 2 else 0.5)
        parameter.data.copy_((value * 8).round() / 8 if grid else value)
    dictionary.W_dec.data[dictionary.W_dec.norm(dim=1) == 0] = 0.125  # ‖W_dec[i]‖^p has no gradient at 0 for p < 1
    if name == "p_anneal":
        dictionary.rule.p.fill_(P)
        dictionary.rule.growth.fill_(GROWTH)
    if name == "matching_pursuit":
        dictionary.rule.after_step(dictionary)  # its rows are unit vectors
    return dictionary


def make_x(batch: int, d_in: int, seed: int, grid: bool) -> torch.Tensor:
    x = torch.randn(batch, d_in, generator=torch.Generator().manual_seed(seed + 1_000_000))
    return (x * 8).round() / 8 if grid else x


def bias(dictionary: Dictionary) -> torch.Tensor:
    """Return the parameter that decides how easily each latent fires, or a tensor without effect."""
    if dictionary.rule.tied:
        return torch.zeros(dictionary.d_sae)
    return (dictionary.b_enc if dictionary.b_enc is not None else dictionary.rule.b_gate).data


def as_mask(codes: SparseCodes, batch: int, d_sae: int) -> torch.Tensor:
    """Return a mask [batch d_sae] of the pairs of `codes`. Each pair must occur once."""
    counts = torch.zeros(batch, d_sae, dtype=torch.long)
    for r in range(batch):
        for i in codes.latent[codes.crow[r] : codes.crow[r + 1]].tolist():
            counts[r, i] += 1
    assert counts.max() <= 1, "a pair was chosen twice"
    return counts.bool()


def assert_largest(chosen: torch.Tensor, scores: torch.Tensor, k: int) -> None:
    """Check that `chosen` has k entries in each row, and that each is at least as large as every other entry."""
    assert (chosen.sum(1) == k).all()
    worst_in = scores.masked_fill(~chosen, torch.inf).amin(1)
    best_out = scores.masked_fill(chosen, -torch.inf).amax(1)
    assert (worst_in >= best_out - 1e-5).all()


def mse(y: torch.Tensor, x_hat: torch.Tensor) -> torch.Tensor:
    return ((y - x_hat) ** 2).sum(1).mean()


def sum_of_norms(p, step) -> torch.Tensor:
    """Return Σ over the write ports of the norm of each latent's direction."""
    return sum(part.norm(dim=1) for part in p["W_dec"].split([port.width for port in step.dictionary.writes], dim=1))


def reference_l1(options, p, y, base, h, dead, step):
    fires = h > 0
    strength = torch.where(fires, h, 1.0)
    norms = sum_of_norms(p, step)
    exponent = options.get("p", 1.0)
    penalty = torch.where(fires, strength**exponent * norms**exponent, 0.0).sum(1).mean()
    x_hat = torch.where(fires, h, 0.0) @ p["W_dec"] + base
    return {"mse": mse(y, x_hat), "l1": WARMUP * options["coefficient"] * penalty}


def reference_p_anneal(options, p, y, base, h, dead, step):
    fires = h > 0
    penalty = torch.where(fires, torch.where(fires, h, 1.0) ** P, 0.0).sum(1).mean()
    x_hat = torch.where(fires, h, 0.0) @ p["W_dec"] + base
    return {"mse": mse(y, x_hat), "lp": WARMUP * options["coefficient"] * GROWTH * penalty}


def reference_gated(options, p, y, base, h, dead, step):
    pi = h + p["rule.b_gate"]
    f = (pi > 0) * torch.relu(h * p["rule.r_mag"].exp() + p["rule.b_mag"])
    x_gate = torch.relu(pi) @ p["W_dec"].detach() + base.detach()
    return {
        "mse": mse(y, f @ p["W_dec"] + base),
        "gate_l1": WARMUP * options["coefficient"] * torch.relu(pi).sum(1).mean(),
        "gate_error": mse(y, x_gate),
    }


def reference_of_chosen(options, p, y, base, h, dead, step, chosen):
    """Return the parts common to all rules with the largest pre-activations: x̂, and dead latents that explain the error."""
    x_hat = (chosen * torch.relu(h)) @ p["W_dec"] + base
    losses = {"mse": mse(y, x_hat)}
    if dead.any():
        aux = as_mask(step.decoded[-1], *h.shape)
        assert not aux[:, ~dead].any(), "the auxiliary term used a latent that is alive"
        assert_largest(aux[:, dead], h.detach()[:, dead], min(options.get("aux_k", len(p["W_enc"]) // 2), int(dead.sum())))
        error = (y - x_hat).detach()
        losses["aux"] = options.get("aux_coefficient", 1 / 32) * mse(error, (aux * torch.relu(h)) @ p["W_dec"])
    return losses


def reference_topk(options, p, y, base, h, dead, step):
    chosen = as_mask(step.decoded[0], *h.shape)
    assert_largest(chosen, h.detach(), min(options["k"], h.shape[1]))
    return reference_of_chosen(options, p, y, base, h, dead, step, chosen)


def reference_group_max(options, p, y, base, h, dead, step):
    chosen = as_mask(step.decoded[0], *h.shape)
    size = h.shape[1] // options["k"]
    for begin in range(0, h.shape[1], size):
        assert_largest(chosen[:, begin : begin + size], h.detach()[:, begin : begin + size], 1)
    return reference_of_chosen(options, p, y, base, h, dead, step, chosen)


def reference_batch_topk(options, p, y, base, h, dead, step):
    chosen = as_mask(step.decoded[0], *h.shape)
    wanted = min(options["k"] * len(h), int((step.decoded[0].value > 0).sum()))
    assert wanted == options["k"] * len(h) or not (h.detach()[~chosen] > 1e-5).any(), "some positive ones were left out"
    assert_largest(chosen.reshape(1, -1), h.detach().reshape(1, -1), wanted)
    return reference_of_chosen(options, p, y, base, h, dead, step, chosen)


def reference_matryoshka(options, p, y, base, h, dead, step):
    losses = reference_batch_topk(options, p, y, base, h, dead, step)
    f = as_mask(step.decoded[0], *h.shape) * torch.relu(h)
    lengths = {max(1, round(share * h.shape[1])) for share in options["prefixes"]} - {h.shape[1]}
    if lengths:
        losses["prefixes"] = sum(mse(y, f[:, :m] @ p["W_dec"][:m] + base) for m in lengths)
    return losses


class Fires(torch.autograd.Function):
    """1[h > θ], with the estimated derivative in θ of Rajamanoharan et al., equation 12."""

    @staticmethod
    def forward(ctx, h, threshold, width):
        ctx.save_for_backward(h, threshold)
        ctx.width = width
        return (h > threshold).double()

    @staticmethod
    def backward(ctx, g):
        h, threshold = ctx.saved_tensors
        kernel = (((h - threshold) / ctx.width).abs() < 0.5).double()
        return None, (-kernel / ctx.width * g).sum(0), None


class Jump(Fires):
    """h · 1[h > θ], with the estimated derivative in θ of equation 11."""

    @staticmethod
    def forward(ctx, h, threshold, width):
        return h * Fires.forward(ctx, h, threshold, width)

    @staticmethod
    def backward(ctx, g):
        h, threshold = ctx.saved_tensors
        return (h > threshold) * g, threshold * Fires.backward(ctx, g)[1], None


def reference_jumprelu(options, p, y, base, h, dead, step):
    threshold = (options["threshold_speed"] * p["rule.scaled_log_threshold"]).exp()
    width = options["bandwidth"] * len(p["W_enc"]) ** 0.5
    f = Jump.apply(h, threshold, width)
    losses = {"mse": mse(y, f @ p["W_dec"] + base)}
    weight = WARMUP * options.get("coefficient", 1.0)
    l0 = Fires.apply(h, threshold, width).sum(1).mean()
    norms = sum_of_norms(p, step)
    match options.get("penalty", "l0"):
        case "l0":
            losses["l0_penalty"] = weight * l0
        case "target_l0":
            losses["l0_penalty"] = weight * len(p["W_enc"]) * (l0 / options["target_l0"] - 1) ** 2
        case "tanh":
            losses["tanh"] = weight * torch.tanh(4 * f * norms).sum(1).mean()
            if dead.any():
                losses["lift"] = options["dead_coefficient"] * (torch.relu(threshold - h) * norms * dead).sum(1).mean()
    return losses


def reference_matching_pursuit(options, p, y, base, h, dead, step):
    residual = y - base
    for latent, explains in zip(*(part.T for part in step.pursued), strict=True):
        fit = residual @ p["W_dec"].T
        strength = fit.gather(1, latent[:, None])
        assert (strength >= fit.amax(1, keepdim=True) - 1e-4).all(), "a latent was taken that does not fit best"
        assert (strength[explains] > -1e-4).all()
        assert (strength[~explains] < 1e-4).all()
        residual = residual - explains[:, None] * strength * p["W_dec"][latent]
    return {"mse": (residual**2).sum(1).mean()}


def reference_losses(
    rule: str, p: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor | None, dead: torch.Tensor, step: SpiedStep
):
    """Return the losses of the plugin files' first lines, dense and in float64; without y, those of an autoencoder."""
    name, options = RULES[rule]
    h = (x if y is not None else x - p["b_dec"]) @ p.get("W_enc", p["W_dec"].T) + p.get("b_enc", 0.0)
    base = p["b_dec"] + x @ p["W_skip"].T if "W_skip" in p else p["b_dec"]
    return globals()[f"reference_{name}"](options, p, x if y is None else y, base, h, dead, step)


def check(rule: str, dictionary: Dictionary, x: torch.Tensor, y: torch.Tensor | None = None) -> SpiedStep:
    """Check that losses and the gradient of their sum agree with the reference for every parameter."""
    d_sae = dictionary.d_sae
    dead = torch.zeros(d_sae, dtype=torch.bool)
    if "dead latents" in rule:
        dead[::2] = True
    step = SpiedStep(dictionary, x, y, dead=dead, progress=0.5, warmup=WARMUP)
    losses = step.losses()
    sum(losses.values()).backward()

    reference = {name: value.detach().double().requires_grad_() for name, value in dictionary.named_parameters()}
    expected = reference_losses(rule, reference, x.double(), None if y is None else y.double(), dead, step)
    sum(expected.values()).backward()

    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            losses[name].double(), value, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"loss {name}: {m}"
        )
    for name, parameter in dictionary.named_parameters():
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        wanted = torch.zeros_like(reference[name]) if reference[name].grad is None else reference[name].grad
        error = (found.double() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-2)  # 1e-6 is float32 rounding
        assert error <= 1e-4, f"gradient of {name}: relative error {error:.2e}"
    return step


@pytest.mark.parametrize("rule", RULES)
@given(
    batch=st.integers(1, 17),
    d_in=st.integers(1, 12),
    d_sae=st.integers(1, 40),
    seed=st.integers(0, 10_000),
    grid=st.booleans(),
)
def test_random_shapes(rule, batch, d_in, d_sae, seed, grid):
    if "group_max" in rule:
        d_sae += -d_sae % 4  # groups of one size
    grid = (
        grid or "p = 0.5" in rule or "p_anneal" in rule
    )  # f^(p−1) magnifies float32 rounding of codes near zero; on the grid no code is
    check(rule, make_dictionary(rule, d_in, d_sae, seed, grid), make_x(batch, d_in, seed, grid))


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "matching_pursuit"])
@given(
    batch=st.integers(1, 17),
    d_in=st.integers(1, 12),
    d_out=st.integers(1, 12),
    skip=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_transcoders(rule, batch, d_in, d_out, skip, seed):
    dictionary = make_dictionary(rule, d_in, 24, seed, grid=True, writes=d_out, skip=skip)
    check(rule, dictionary, make_x(batch, d_in, seed, grid=True), make_x(batch, d_out, seed + 1, grid=True))


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "matching_pursuit"])
@given(
    batch=st.integers(1, 17),
    widths=st.lists(st.integers(1, 9), min_size=2, max_size=3),
    is_transcoder=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_several_ports(rule, batch, widths, is_transcoder, seed):
    """Crosscoders of ports of different widths, and transcoders that read one of them and write all."""
    ports = tuple(Port(hook=f"h{i}", width=width) for i, width in enumerate(widths))
    d_in = widths[0] if is_transcoder else sum(widths)
    kind = {"reads": Port(hook="x", width=d_in), "writes": ports} if is_transcoder else {"reads": ports}
    y = make_x(batch, sum(widths), seed + 1, grid=True) if is_transcoder else None
    check(rule, make_dictionary(rule, d_in, 24, seed, grid=True, **kind), make_x(batch, d_in, seed, grid=True), y)


def ties(dictionary, x):
    dictionary.W_enc.data.copy_(dictionary.W_enc[:, :1].expand_as(dictionary.W_enc))
    bias(dictionary).fill_(0.5)
    return x


def fewer_than_k_positive(dictionary, x):
    bias(dictionary).fill_(-1000.0)
    bias(dictionary)[1] = 1000.0
    return x


def one_fires_on_all_rows(dictionary, x):
    bias(dictionary)[2] = 1000.0
    return x


def none_fires(dictionary, x):
    bias(dictionary).fill_(-1000.0)
    return x


def batch_of_one(_dictionary, x):
    return x[:1]


def not_contiguous(_dictionary, x):
    wide = torch.stack([x, -x], dim=2).flatten(1)
    view = wide.T.contiguous().T[:, ::2]
    assert not view.is_contiguous()
    assert torch.equal(view, x)
    return view


def x_is_b_dec(dictionary, x):
    return dictionary.b_dec.detach().expand_as(x)


ADVERSARIAL = (ties, fewer_than_k_positive, one_fires_on_all_rows, none_fires, batch_of_one, not_contiguous, x_is_b_dec)
BY_BIAS = (fewer_than_k_positive, one_fires_on_all_rows, none_fires)


@pytest.mark.parametrize(
    ("rule", "case"),
    [
        pytest.param(rule, case, id=f"{rule}-{case.__name__}")
        for case in ADVERSARIAL
        for rule in RULES
        if rule != "matching_pursuit" or case not in BY_BIAS
    ],
)
def test_adversarial(rule, case):
    dictionary = make_dictionary(rule, d_in=8, d_sae=24, seed=7, grid=True)
    x = case(dictionary, make_x(16, 8, seed=7, grid=True))
    step = check(rule, dictionary, x)
    fires = step.codes.to_dense().detach() != 0
    if case is fewer_than_k_positive:
        assert fires.sum(1).max() <= 1
    if case is one_fires_on_all_rows and "gated" not in rule:
        assert fires[:, 2].all()
    if case is none_fires:
        assert not fires.any()


def test_larger_than_a_tile_of_anything():
    """Sizes at which a faster path might choose another kernel."""
    for rule in RULES.keys() - {"l1, p = 0.5"}:
        check(rule, make_dictionary(rule, d_in=48, d_sae=512, seed=3, grid=True), make_x(130, 48, seed=3, grid=True))


def test_aux_k_reaches_the_encoder_of_dead_latents_only():
    dictionary = make_dictionary("topk, dead latents", d_in=8, d_sae=24, seed=1, grid=False)
    dead = torch.arange(24) % 3 == 0
    step = SpiedStep(dictionary, make_x(32, 8, seed=1, grid=False), dead=dead, progress=0.5, warmup=1.0)
    of_encoder, of_decoder = torch.autograd.grad(step.losses()["aux"], [dictionary.W_enc, dictionary.W_dec])
    assert (of_encoder[:, dead].norm(dim=0) > 0).all()
    assert (of_decoder[dead].norm(dim=1) > 0).all()
    assert not of_encoder[:, ~dead].any()
    assert not of_decoder[~dead].any()


def test_aux_k_is_absent_without_dead_latents_or_weight():
    x = make_x(8, 6, seed=2, grid=False)
    dictionary = make_dictionary("topk, dead latents", d_in=6, d_sae=12, seed=2, grid=False)
    alive = SpiedStep(dictionary, x, dead=torch.zeros(12, dtype=torch.bool), progress=0.5, warmup=1.0)
    assert alive.losses().keys() == {"mse"}
    for options in ({"k": 2, "aux_coefficient": 0.0}, {"k": 2, "aux_k": 0}):
        without = Dictionary.create("topk", reads=6, d_sae=12, options=options)
        step = SpiedStep(without, x, dead=torch.ones(12, dtype=torch.bool), progress=0.5, warmup=1.0)
        assert step.losses().keys() == {"mse"}


def test_gate_error_leaves_the_decoder_alone():
    """W_dec gets nothing; b_dec only what comes through the centring of h, which is −W_enc · dL/db_gate."""
    dictionary = make_dictionary("gated", d_in=8, d_sae=24, seed=5, grid=False)
    step = SpiedStep(
        dictionary, make_x(32, 8, seed=5, grid=False), dead=torch.zeros(24, dtype=torch.bool), progress=0.5, warmup=1.0
    )
    wanted = [dictionary.W_dec, dictionary.b_dec, dictionary.rule.b_gate, dictionary.W_enc]
    of_W_dec, of_b_dec, of_b_gate, of_W_enc = torch.autograd.grad(step.losses()["gate_error"], wanted, allow_unused=True)
    assert of_W_dec is None or not of_W_dec.any()
    torch.testing.assert_close(of_b_dec, -dictionary.W_enc.detach() @ of_b_gate, rtol=1e-4, atol=1e-4)
    assert of_W_enc.abs().max() > 0


@pytest.mark.parametrize("rule", ["l1", "gated"])
def test_penalty_follows_the_warm_up_and_reconstruction_does_not(rule):
    dictionary = make_dictionary(rule, d_in=8, d_sae=24, seed=5, grid=False)
    x, dead = make_x(32, 8, seed=5, grid=False), torch.zeros(24, dtype=torch.bool)
    none, half, full = (SpiedStep(dictionary, x, dead=dead, progress=0.0, warmup=w).losses() for w in (0.0, 0.5, 1.0))
    penalty = {"l1": "l1", "gated": "gate_l1"}[rule]
    assert none[penalty] == 0
    assert full[penalty] > 0
    torch.testing.assert_close(half[penalty], full[penalty] / 2)
    for name in full.keys() - {penalty}:
        assert none[name] == full[name]
