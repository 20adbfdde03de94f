"""Dictionary.from_module: modules of other tools become the dictionary with their own codes and output, or are refused."""

import logging
from typing import NamedTuple

import pytest
import torch
from torch import nn

import saelens_lite as sl
from saelens_lite.errors import ConfigError, ShapeError

D_IN, D_SAE, K = 10, 24, 4


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X = normal(300, D_IN, seed=9) * 2 + 0.5
W_ENC, W_DEC = normal(D_IN, D_SAE, seed=1) * 0.5, normal(D_SAE, D_IN, seed=3)
B_ENC, B_DEC = normal(D_SAE, seed=2) * 0.3, normal(D_IN, seed=4)


def largest(h: torch.Tensor, k: int) -> torch.Tensor:
    return h.relu() * torch.zeros_like(h).scatter(-1, h.topk(k).indices, 1.0)


class LikeOpenAI(nn.Module):
    """Shaped as OpenAI's autoencoder: its pre_bias is subtracted and added, and it counts what fires."""

    def __init__(self, normalise: bool, d_sae: int = D_SAE):
        super().__init__()
        self.pre_bias, self.latent_bias = nn.Parameter(B_DEC.clone()), nn.Parameter(normal(d_sae, seed=2) * 0.3)
        self.encoder, self.decoder = nn.Linear(D_IN, d_sae, bias=False), nn.Linear(d_sae, D_IN, bias=False)
        self.encoder.weight.data = normal(d_sae, D_IN, seed=1) * 0.5
        self.decoder.weight.data = normal(D_IN, d_sae, seed=3)
        self.activation = nn.Module()
        self.activation.k = K
        self.normalise = normalise
        self.register_buffer("stats_last_nonzero", torch.zeros(d_sae, dtype=torch.long))

    def encode(self, x):
        mean, std = (x.mean(-1, keepdim=True), x.std(-1, keepdim=True)) if self.normalise else (0, 1)
        z = (x - mean) / (std + 1e-5) if self.normalise else x
        return largest(self.encoder(z - self.pre_bias) + self.latent_bias, K), {"mean": mean, "std": std}

    def forward(self, x):
        codes, info = self.encode(x)
        self.stats_last_nonzero += 1
        return codes, (self.decoder(codes) + self.pre_bias) * info["std"] + info["mean"]


class Pair(nn.Module):
    """Two linear layers with ReLU."""

    def __init__(self, subtract: bool):
        super().__init__()
        self.encoder, self.decoder, self.subtract = nn.Linear(D_IN, D_SAE), nn.Linear(D_SAE, D_IN), subtract
        self.encoder.weight.data, self.encoder.bias.data = W_ENC.T.clone(), B_ENC.clone()
        self.decoder.weight.data, self.decoder.bias.data = W_DEC.T.clone(), B_DEC.clone()

    def encode(self, x):
        return self.encoder(x - self.decoder.bias if self.subtract else x).relu()

    def forward(self, x):
        return self.decoder(self.encode(x))


class Returned(NamedTuple):
    """An output in a named tuple."""

    sae_out: torch.Tensor
    loss: torch.Tensor


class LikeSAELens(nn.Module):
    """Shaped as SAELens's TopK, which chooses and reports codes in units of the decoder's norms."""

    def __init__(self):
        super().__init__()
        for name, x in {"W_enc": W_ENC, "b_enc": B_ENC, "W_dec": W_DEC, "b_dec": B_DEC}.items():
            self.register_parameter(name, nn.Parameter(x.clone()))
        self.cfg = {"k": K}

    def encode(self, x):
        return largest(((x - self.b_dec) @ self.W_enc + self.b_enc) * self.W_dec.norm(dim=1), K)

    def forward(self, x):
        y = (self.encode(x) / self.W_dec.norm(dim=1)) @ self.W_dec + self.b_dec
        return Returned(y, (y - x).square().mean())


class LikeBatchTopK(nn.Module):
    """Shaped as dictionary_learning's BatchTopK after training: one threshold, and a k that has no more effect."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(D_IN, D_SAE), nn.Linear(D_SAE, D_IN, bias=False)
        self.encoder.weight.data, self.encoder.bias.data, self.decoder.weight.data = (
            W_ENC.T.clone(),
            B_ENC.clone(),
            W_DEC.T.clone(),
        )
        self.b_dec = nn.Parameter(B_DEC.clone())
        self.register_buffer("threshold", torch.tensor(1.5))
        self.register_buffer("k", torch.tensor(K))

    def encode(self, x):
        h = self.encoder(x - self.b_dec).relu()
        return h * (h > self.threshold)

    def forward(self, x):
        return self.decoder(self.encode(x)) + self.b_dec


class Plain:
    """An object with tensors, that is no torch module; one matrix both ways."""

    def __init__(self):
        self.W, self.b = W_ENC.clone(), B_ENC.clone()

    def __call__(self, x):
        return (x @ self.W + self.b).relu() @ self.W.T


def check(d: sl.Dictionary, codes: torch.Tensor, y: torch.Tensor) -> None:
    """Codes and output are those of a float64 computation, to 1e-6 of their size, for other activations than X."""
    for ours, theirs in ((d.double().encode(OTHER).to_dense(), codes), (d(OTHER), y)):
        assert (ours - theirs).abs().max() < 1e-6 * theirs.abs().max()


OTHER = (normal(50, D_IN, seed=11) * 3).double()


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("square", [False, True])
def test_a_module_shaped_as_openai(normalise, square):
    module = LikeOpenAI(normalise, D_IN if square else D_SAE).train()
    which = {"output": lambda x: module(x)[1]} if square else {}  # codes and x_hat have the same shape
    d = sl.Dictionary.from_module(module, X, hook="blocks.1.hook_resid_pre", **which)
    codes, y = module.double()(OTHER)
    check(d, codes, y)
    assert (d.hook, d.rule.plugin_name, d.rule.config.k) == ("blocks.1.hook_resid_pre", "topk", K)
    assert d.token_norm == ("layer_norm" if normalise else None)
    assert module.training
    assert module.encoder.training


class Centring(Pair):
    """A module that changes x in place, and in `encode` its own buffer."""

    def __init__(self):
        super().__init__(True)
        self.register_buffer("mean", torch.full((D_IN,), 2.0))
        self.register_buffer("n", torch.zeros(()))

    def encode(self, x):
        self.n = self.n + 1
        x -= self.mean
        return super().encode(x)


def test_a_module_that_changes_x_in_place_is_checked_on_the_same_x():
    module, x = Centring(), X.clone()
    buffer = module.n
    with pytest.raises(ConfigError, match="no description of"):
        sl.Dictionary.from_module(module, x)
    assert torch.equal(x, X)
    assert module.n is buffer
    assert module.n == 0
    d = sl.Dictionary.from_module(module, x, output=lambda x: module(x) + module.mean, mean=module.mean)
    codes = Pair(True).double().encode(OTHER - 2)
    check(d, codes, codes @ W_DEC.double() + B_DEC.double() + 2)


class Curved(Pair):
    """A module whose output is bent a little, except for massive activations."""

    def forward(self, x):
        y = super().forward(x)
        return y * torch.where(x.norm(dim=1, keepdim=True) > 1000, 1.0, 1.01)


def test_a_massive_activation_does_not_hide_the_errors_of_the_others():
    x = torch.cat([X, 1e6 * X[:1]])
    with pytest.raises(ConfigError, match=r"misses x_hat by 0\.00\d+ "):
        sl.Dictionary.from_module(Curved(True), x)
    check(sl.Dictionary.from_module(Pair(True), x), *(f(OTHER) for f in (Pair(True).double().encode, Pair(True).double())))


class Unlike(Pair):
    """A module whose `encode` returns something other than its codes first."""

    def __init__(self, returned):
        super().__init__(True)
        self.returned = returned

    def encode(self, x):
        return self.returned(super().encode(x))

    def forward(self, x):
        return self.decoder(super().encode(x))


def fail(codes):
    raise RuntimeError("not ready")


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (lambda codes: (*codes.topk(K), codes - 1), "does not return codes alone or first"),
        (lambda codes: {"pre_acts": codes - 1}, "does not return codes alone or first"),
        (fail, "failed, so only x_hat is compared: RuntimeError: not ready"),
    ],
)
def test_only_codes_of_encode_are_compared(returned, said, caplog):
    caplog.set_level(logging.INFO)
    d = sl.Dictionary.from_module(Unlike(returned), X)
    assert said in caplog.text
    codes = Pair(True).double().encode(OTHER)
    check(d, codes, codes @ W_DEC.double() + B_DEC.double())


def test_layers_that_do_not_fit_each_other_are_refused():
    module = Pair(True)
    module.encoder, module.decoder = nn.Linear(D_IN, 64), nn.Linear(32, D_IN)
    with pytest.raises(ConfigError, match=r"tried as .*W_enc has shape \(64, 10\), W_dec \(10, 32\)"):
        sl.Dictionary.from_module(module, X, output=lambda x: x)


def test_the_module_is_left_as_it_is():
    module = LikeOpenAI(False).train()
    before = {name: x.clone() for name, x in module.state_dict().items()}
    sl.Dictionary.from_module(module, X)
    assert all(torch.equal(before[name], x) for name, x in module.state_dict().items())
    assert module.training


@pytest.mark.parametrize("subtract", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_linear_layers_with_b_dec_subtracted_or_not(subtract, dtype):
    module = Pair(subtract).to(dtype)
    d = sl.Dictionary.from_module(module, X.numpy())
    assert module.encoder.weight.dtype == dtype
    module.double()
    check(d, module.encode(OTHER), module(OTHER))
    assert d.rule.plugin_name == "l1"


def test_codes_in_units_of_the_norms_of_the_decoder():
    module = LikeSAELens()
    d = sl.Dictionary.from_module(module, X)
    module.double()
    check(d, module.encode(OTHER), module(OTHER).sae_out)
    torch.testing.assert_close(d.decoder_norms(), torch.ones(D_SAE).double())


def test_a_threshold_counts_and_a_k_without_effect_does_not():
    module = LikeBatchTopK()
    d = sl.Dictionary.from_module(module, X)
    module.double()
    check(d, module.encode(OTHER), module(OTHER))
    assert d.rule.plugin_name == "jumprelu"


def test_an_object_with_one_matrix_and_names_of_its_own():
    thing = Plain()
    d = sl.Dictionary.from_module(thing, X, names={"W_enc": "W", "b_enc": "b"})
    codes = (OTHER @ W_ENC.double() + B_ENC.double()).relu()
    check(d, codes, codes @ W_ENC.double().T)


def test_what_the_module_does_is_told_in_the_log(caplog):
    caplog.set_level(logging.INFO)
    sl.Dictionary.from_module(Pair(False), X)
    assert "Pair is rule='l1', subtract_b_dec=False; relative to their size, x_hat differ by " in caplog.text


class Shifted(Pair):
    """A module that does more than its tensors say."""

    def encode(self, x):
        return super().encode((x - 3) * 0.25)

    def forward(self, x):
        return self.decoder(self.encode(x)) * 4 + 3 if x.shape[-1] == D_IN else None


def test_what_no_description_explains_is_refused_and_can_be_completed():
    module = Shifted(True)
    with pytest.raises(ConfigError, match=r"no description of .*\.Shifted .*closest of \d+, .*misses x_hat by .* and codes by"):
        sl.Dictionary.from_module(module, X)
    with pytest.raises(ConfigError, match="no description of"):
        sl.Dictionary.from_module(module, X, mean=3.0)
    d = sl.Dictionary.from_module(module, X, mean=3.0, scale=0.25)
    module.double()
    check(d, module.encode(OTHER), module(OTHER))


def test_a_wrong_rule_is_refused():
    with pytest.raises(ConfigError, match=r"closest of \d+, rule='topk', options=\{'k': 4\}.* misses"):
        sl.Dictionary.from_module(Pair(True), X, rule="topk", options={"k": 4})


def test_activations_that_do_not_decide_are_refused():
    module = LikeOpenAI(False)
    module.latent_bias.data -= 6
    near = X[(module.encode(X)[0] > 0).sum(1) == 2][:3]
    assert len(near) == 3  # fewer than k latents fire
    with pytest.raises(ConfigError, match=r"x does not decide between .*rule='l1'.*; rule='topk'.*Give more activations"):
        sl.Dictionary.from_module(module, near)
    assert sl.Dictionary.from_module(module, near, rule="topk", options={"k": K}).rule.config.k == K


def test_silent_latents_prove_nothing():
    module = Pair(True)
    module.encoder.bias.data -= 1000
    with pytest.raises(ConfigError, match="no description of"):
        sl.Dictionary.from_module(module, X)


@pytest.mark.parametrize(
    ("module", "x", "settings", "error", "reason"),
    [
        (nn.ReLU(), X, {}, ConfigError, r"nn\.ReLU|a torch\.ReLU without tensors"),
        (nn.Linear(D_IN, D_IN), X, {}, ConfigError, r"no tensor has a known name of W_dec; .*names=\{'W_dec': 'bias'\}"),
        (Pair(True), X[:, :7], {}, ConfigError, r"Pair failed on x \[300 7\]: RuntimeError"),
        (Pair(True), X[:0], {}, ShapeError, "expected activations"),
        (Pair(True), "text", {}, ShapeError, "x is a str"),
        (Pair(True), X, {"options": {"k": 3}}, ConfigError, r"options \{'k': 3\} need rule="),
        (Pair(True), X, {"output": lambda x: None}, ConfigError, "holds 0 tensors that could be x_hat"),
        (Pair(True), X, {"names": {"W_enc": "encode"}}, ConfigError, "no tensor 'encode'"),
        (Pair(True), X * torch.nan, {}, ConfigError, "no description of|NaN"),
    ],
)
def test_what_cannot_be_checked_is_refused(module, x, settings, error, reason):
    with pytest.raises(error, match=reason):
        sl.Dictionary.from_module(module, x, **settings)
