"""Dictionaries in memory and on disk: the same numbers before and after, and the published files mean what they should.

`published` below reads a folder with nothing but json and safetensors and computes the reconstruction as the published
architecture is defined.
"""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import saelens_lite as sl
from saelens_lite import registry
from saelens_lite.errors import ConfigError, CorruptFileError, NonFiniteError, PluginError, ShapeError

D_IN, D_SAE = 12, 40
RULES = {
    "l1": {"coefficient": 3.5, "p": 0.5},
    "topk": {"k": 5, "aux_k": 3, "aux_coefficient": 0.25},
    "gated": {"coefficient": 2.0},
    "batch_topk": {"k": 5},
    "jumprelu": {"penalty": "target_l0", "target_l0": 5.0, "threshold_speed": 2.0},
    "matryoshka": {"k": 5, "prefixes": (0.25, 0.5)},
    "p_anneal": {"p_end": 0.3},
    "group_max": {"k": 5},
    "matching_pursuit": {"k": 5},
}
STANDARD = {"W_enc", "b_enc", "W_dec", "b_dec"}
ARCHITECTURES = {  # what SAELens reads each rule as, and the tensors it expects
    "l1": ("standard", STANDARD),
    "topk": ("topk", STANDARD),
    "gated": ("gated", {"W_enc", "b_gate", "r_mag", "b_mag", "W_dec", "b_dec"}),
    "batch_topk": ("jumprelu", {*STANDARD, "threshold"}),
    "jumprelu": ("jumprelu", {*STANDARD, "threshold"}),
    "matryoshka": ("jumprelu", {*STANDARD, "threshold"}),
    "p_anneal": ("standard", STANDARD),
    "group_max": ("group_max", STANDARD),  # SAELens has no such architecture
    "matching_pursuit": ("matching_pursuit", {"W_dec", "b_dec"}),
}
PUBLISHED = sorted(RULES.keys() - {"group_max"})
OWN_FILES = {"jumprelu": {"scaled_log_threshold"}, "p_anneal": {"p", "growth"}}  # what the published files have no place for


def make(rule: str, seed: int = 0, **more) -> sl.Dictionary:
    """Return all parameters random; buffers as some training might leave them."""
    d = sl.Dictionary.create(rule, reads=D_IN, d_sae=D_SAE, options=RULES.get(rule), **more)
    generator = torch.Generator().manual_seed(seed)
    for parameter in d.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * (0.5 if parameter.ndim == 1 else 1))
    for i, buffer in enumerate(d.buffers()):
        buffer.fill_(0.75 + i)
    if d.rule.tied:
        d.rule.after_step(d)
    return d


def dense_codes(d: sl.Dictionary, x: torch.Tensor) -> torch.Tensor:
    """Return codes by the dense definition of the rule."""
    if d.rule.plugin_name != "matching_pursuit":
        return d.rule.activation(d.pre(x))
    residual, codes = x - d.b_dec, torch.zeros(*x.shape[:-1], D_SAE)
    for _ in range(d.rule.config.k):
        best = (residual @ d.W_dec.T).relu().max(-1, keepdim=True)
        codes = codes.scatter_add(-1, best.indices, best.values)
        residual = x - d.b_dec - codes @ d.W_dec
    return codes


@pytest.fixture(params=RULES)
def dictionary(request) -> sl.Dictionary:
    """A random dictionary of each rule in turn."""
    return make(request.param)


@pytest.fixture
def x() -> torch.Tensor:
    """Activations, far enough from nought to matter."""
    return torch.randn(50, D_IN, generator=torch.Generator().manual_seed(9)) * 2 + 0.5


def published(folder, x):
    """Return codes and reconstruction by the field's definition of the architecture in cfg.json."""
    config = json.loads((folder / "cfg.json").read_text())
    t = load_file(folder / "sae_weights.safetensors")
    assert config["apply_b_dec_to_input"] is True
    if config["architecture"] == "matching_pursuit":
        assert (config["residual_threshold"], config["stop_on_duplicate_support"]) == (0.0, False)
        codes, residual = torch.zeros(len(x), len(t["W_dec"])), x - t["b_dec"]
        for _ in range(config["max_iterations"]):
            best = (residual @ t["W_dec"].T).relu().max(1, keepdim=True)
            codes.scatter_add_(1, best.indices, best.values)
            residual = residual - best.values * t["W_dec"][best.indices[:, 0]]
        return codes, codes @ t["W_dec"] + t["b_dec"]
    h = (x - t["b_dec"]) @ t["W_enc"]
    if config["architecture"] == "standard":
        codes = torch.relu(h + t["b_enc"])
    elif config["architecture"] == "topk":
        h = torch.relu(h + t["b_enc"])
        kept = torch.zeros_like(h).scatter(-1, h.topk(config["k"], dim=-1).indices, 1.0)
        codes = h * kept
    elif config["architecture"] == "jumprelu":
        h = h + t["b_enc"]
        codes = torch.relu(h) * (h > t["threshold"])
    else:
        assert config["architecture"] == "gated"
        codes = (h + t["b_gate"] > 0) * torch.relu(h * t["r_mag"].exp() + t["b_mag"])
    return codes, codes @ t["W_dec"] + t["b_dec"]


def test_a_new_dictionary_is_tied_and_of_one_norm():
    for rule, options in RULES.items():
        d = sl.Dictionary.create(rule, reads=D_IN, d_sae=D_SAE, options=options, seed=3)
        torch.testing.assert_close(d.W_dec.norm(dim=1), torch.ones(D_SAE))
        assert torch.equal(d.W_enc, d.W_dec.T)
        assert all(not p.any() for name, p in d.named_parameters() if p.ndim == 1 and name != "rule.scaled_log_threshold")
        again = sl.Dictionary.create(rule, reads=D_IN, d_sae=D_SAE, options=options, seed=3)
        assert torch.equal(d.W_dec, again.W_dec)
        other = sl.Dictionary.create(rule, reads=D_IN, d_sae=D_SAE, options=options, seed=4)
        assert not torch.equal(d.W_dec, other.W_dec)


def test_encode_decode_call(dictionary, x):
    codes = dictionary.encode(x)
    dense = dense_codes(dictionary, x)
    torch.testing.assert_close(codes.to_dense(), dense, rtol=1e-5, atol=1e-5)
    assert (codes.value != 0).all()
    wanted = dense @ dictionary.W_dec + dictionary.b_dec
    for x_hat in (dictionary(x), dictionary.decode(codes), dictionary.decode(codes.to_dense())):
        torch.testing.assert_close(x_hat, wanted, rtol=1e-5, atol=1e-5)


def test_every_leading_shape(dictionary, x):
    whole = dictionary(x)
    assert torch.equal(dictionary.encode(x).l0, dictionary.encode(x[:, None]).l0[:, 0])
    for shape in ((5, 10), (2, 5, 5), (50, 1)):
        codes = dictionary.encode(x.reshape(*shape, D_IN))
        assert codes.l0.shape == shape
        torch.testing.assert_close(dictionary.decode(codes), whole.reshape(*shape, D_IN))
    torch.testing.assert_close(dictionary(x[0]), whole[0], rtol=1e-5, atol=1e-5)
    assert dictionary.encode(x[0]).to_dense().shape == (D_SAE,)
    assert dictionary(x[:0]).shape == (0, D_IN)
    assert dictionary.encode(x[None, :0]).to_dense().shape == (1, 0, D_SAE)


def test_codes_are_differentiable_in_x(dictionary, x):
    x64 = x[:3].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda y: dictionary.double()(y), (x64,))


def test_the_dtype_of_x_comes_back(dictionary, x):
    assert dictionary(x.half()).dtype == torch.float16
    assert dictionary(x.double()).dtype == torch.float64


def test_folding_a_scale_keeps_codes_and_scales_the_reconstruction_back(dictionary, x):
    c = 3.7
    codes, x_hat = dictionary.encode(x * c).to_dense(), dictionary(x * c) / c
    if dictionary.rule.tied:
        codes = codes / c  # what a latent explains of x is in the units of x
    assert dictionary.fold_scales_([c], [c]) is dictionary
    torch.testing.assert_close(dictionary.encode(x).to_dense(), codes, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dictionary(x), x_hat, rtol=1e-5, atol=1e-5)


def test_folding_decoder_norms_moves_them_into_the_codes(dictionary, x):
    norms = dictionary.W_dec.norm(dim=1).detach()
    codes, x_hat = dictionary.encode(x).to_dense(), dictionary(x)
    assert dictionary.fold_decoder_norms_() is dictionary
    torch.testing.assert_close(dictionary(x), x_hat, rtol=1e-5, atol=1e-5)
    if not dictionary.rule.homogeneous:
        assert torch.equal(dictionary.encode(x).to_dense(), codes)
    else:
        torch.testing.assert_close(dictionary.encode(x).to_dense(), codes * norms, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(dictionary.W_dec.norm(dim=1), torch.ones(D_SAE))


def test_folding_norms_leaves_a_direction_of_length_nought_alone(x):
    d = make("l1")
    d.W_dec.data[3] = 0
    x_hat = d(x)
    d.fold_decoder_norms_()
    torch.testing.assert_close(d(x), x_hat, rtol=1e-5, atol=1e-5)
    assert all(torch.isfinite(p).all() for p in d.parameters())


def test_saved_and_loaded_to_the_bit(dictionary, x, tmp_path):
    dictionary.reads = dictionary.writes = (sl.Port(hook="blocks.1.hook_resid_pre", width=D_IN),)
    dictionary.origin = sl.Origin(model="tiny", n_ctx=64, excluded_positions=(0, 2))
    dictionary.training_record = {"tokens": 5, "config": {"lr": 0.1}}
    path = dictionary.save(tmp_path / "d")
    assert path == tmp_path / "d"
    loaded = sl.Dictionary.load(path)
    state = dictionary.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    assert type(loaded.rule) is type(dictionary.rule)
    assert loaded.rule.config == dictionary.rule.config
    assert loaded.rule.config.model_dump().items() >= RULES[loaded.rule.plugin_name].items()
    assert (loaded.origin, loaded.training_record) == (dictionary.origin, dictionary.training_record)
    assert (loaded.reads, loaded.writes) == (dictionary.reads, dictionary.writes)
    assert loaded.density is None
    assert torch.equal(loaded(x), dictionary(x))
    loaded.save(tmp_path / "again")
    for file in path.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_survive(dictionary, tmp_path, dtype):
    loaded = sl.Dictionary.load(dictionary.to(dtype).save(tmp_path / "d"))
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), dictionary.parameters(), strict=True))


def test_files_and_tensors_of_the_published_format(dictionary, tmp_path):
    rule = dictionary.rule.plugin_name
    dictionary.save(tmp_path / "d")
    tensors = load_file(tmp_path / "d" / "sae_weights.safetensors")
    files = {p.name for p in (tmp_path / "d").iterdir()}
    assert files - {"plugin.safetensors"} == {"cfg.json", "sae_weights.safetensors"}
    assert ("plugin.safetensors" in files) == (rule in OWN_FILES)
    if rule in OWN_FILES:
        assert load_file(tmp_path / "d" / "plugin.safetensors").keys() == OWN_FILES[rule]
    assert tensors.keys() == ARCHITECTURES[rule][1]
    shapes = {"W_enc": (D_IN, D_SAE), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
    assert all(t.shape == shapes.get(name, (D_SAE,)) for name, t in tensors.items())


def test_cfg_json_of_the_published_format(dictionary, tmp_path):
    dictionary.reads = dictionary.writes = (sl.Port(hook="h", width=D_IN),)
    dictionary.origin = sl.Origin(model="tiny", model_class="GPT2LMHeadModel", n_ctx=64, prepend_bos=True, text="docs")
    rule = dictionary.rule.plugin_name
    config = json.loads((dictionary.save(tmp_path / "d") / "cfg.json").read_text())
    top = {
        "architecture": ARCHITECTURES[rule][0],
        "d_in": D_IN,
        "d_sae": D_SAE,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
    }
    if rule == "topk":
        top |= {"k": 5, "rescale_acts_by_decoder_norm": False}
    if rule == "matching_pursuit":
        top |= {"max_iterations": 5, "residual_threshold": 0.0, "stop_on_duplicate_support": False}
    metadata = config.pop("metadata")
    ours = metadata.pop("saelens_lite")
    assert config == top
    assert metadata == {
        "sae_lens_version": "6.0.0",
        "model_name": "tiny",
        "model_class_name": "GPT2LMHeadModel",
        "hook_name": "h",
        "hook_head_index": None,
        "context_size": 64,
        "prepend_bos": True,
        "seqpos_slice": [1, None],  # position 0 is not trained on
        "dataset_path": "docs",
        "model_from_pretrained_kwargs": {},
    }
    assert ours["sparsity"] == rule
    assert ours["options"].items() >= json.loads(json.dumps(RULES[rule])).items()
    assert ours["distribution"].startswith("saelens-lite ")


def test_published_k_is_never_more_than_there_are_latents(tmp_path, x):
    d = sl.Dictionary.create("topk", reads=D_IN, d_sae=8, options={"k": 100})
    folder = d.save(tmp_path / "d")
    assert json.loads((folder / "cfg.json").read_text())["k"] == 8
    assert sl.Dictionary.load(folder).rule.config.k == 100
    torch.testing.assert_close(published(folder, x)[1], d(x).detach())


@pytest.mark.parametrize("rule", PUBLISHED)
def test_the_published_architecture_gives_the_same_numbers(rule, x, tmp_path):
    dictionary = make(rule)
    codes, x_hat = published(dictionary.save(tmp_path / "d"), x)
    torch.testing.assert_close(codes, dictionary.encode(x).to_dense().detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x_hat, dictionary(x).detach(), rtol=1e-5, atol=1e-5)
    assert 0 < (codes != 0).float().mean() < 1


@given(st.sampled_from(PUBLISHED), st.integers(0, 1000), st.floats(0.01, 100))
def test_the_published_architecture_after_folding(tmp_path_factory, rule, seed, scale):
    d = make(rule, seed)
    x = torch.randn(20, D_IN, generator=torch.Generator().manual_seed(seed))
    x_hat = (d(x * scale) / scale).detach()
    d.fold_decoder_norms_().fold_scales_([scale], [scale])
    found = published(d.save(tmp_path_factory.mktemp("published") / "d"), x)[1]
    assert (found - x_hat).abs().max() <= 1e-5 * x_hat.abs().max()


def test_density_is_written_as_its_logarithm(tmp_path):
    d = make("topk")
    d.density = torch.linspace(0, 1, D_SAE)
    folder = d.save(tmp_path / "d")
    written = load_file(folder / "sparsity.safetensors")
    assert written.keys() == {"sparsity"}
    assert written["sparsity"].dtype == torch.float32
    torch.testing.assert_close(written["sparsity"], torch.log10(torch.linspace(0, 1, D_SAE) + 1e-10))
    loaded = sl.Dictionary.load(folder).density
    torch.testing.assert_close(loaded, d.density, rtol=1e-5, atol=1e-12)
    assert loaded[0] == 0


@pytest.fixture
def shifted_relu():
    """A rule of a stranger: one parameter of its own and no published form."""

    @sl.register("shifted_relu")
    class ShiftedRelu(sl.Sparsity):
        class Config(sl.RuleConfig):
            start: float = 0.25

        def __init__(self, config, *, d_in, d_sae):
            super().__init__(config, d_in=d_in, d_sae=d_sae)
            self.shift = nn.Parameter(torch.full((d_sae,), config.start))

        def activation(self, pre):
            return (pre - self.shift).relu()

    yield ShiftedRelu
    registry.unregister("shifted_relu")


def test_a_rule_without_a_published_form_keeps_its_tensors(shifted_relu, tmp_path, x):
    d = make("shifted_relu")
    folder = d.save(tmp_path / "d")
    assert load_file(folder / "sae_weights.safetensors").keys() == {"W_enc", "b_enc", "W_dec", "b_dec"}
    extra = load_file(folder / "plugin.safetensors")
    assert extra.keys() == {"shift"}
    assert torch.equal(extra["shift"], d.rule.shift)
    assert json.loads((folder / "cfg.json").read_text())["architecture"] == "shifted_relu"
    loaded = sl.Dictionary.load(folder)
    assert type(loaded.rule) is shifted_relu
    assert torch.equal(loaded.rule.shift, d.rule.shift)
    assert torch.equal(loaded(x), d(x))
    wanted = torch.relu((x - d.b_dec) @ d.W_enc + d.b_enc - d.rule.shift)
    torch.testing.assert_close(d.encode(x).to_dense(), wanted)


def test_loading_without_the_plugin_names_who_wrote_it(shifted_relu, tmp_path):
    folder = make("shifted_relu").save(tmp_path / "d")
    config = json.loads((folder / "cfg.json").read_text())
    config["metadata"]["saelens_lite"]["distribution"] = "shifted-sparsity 2.1"
    (folder / "cfg.json").write_text(json.dumps(config))
    registry.unregister("shifted_relu")
    with pytest.raises(PluginError, match=r"no sparsity plugin is called 'shifted_relu'.*written with shifted-sparsity 2\.1"):
        sl.Dictionary.load(folder)


def test_a_missing_plugin_file_is_noticed(shifted_relu, tmp_path):
    folder = make("shifted_relu").save(tmp_path / "d")
    (folder / "plugin.safetensors").unlink()
    with pytest.raises(CorruptFileError, match=r"tensors missing: \['rule\.shift'\]"):
        sl.Dictionary.load(folder)


def test_options_are_validated():
    with pytest.raises(ConfigError, match=r"TopK: unknown key 'aux_kk'; did you mean aux_k"):
        sl.Dictionary.create("topk", reads=4, d_sae=8, options={"aux_kk": 3})
    with pytest.raises(ConfigError, match=r"TopK: k = 0: input should be greater than 0"):
        sl.Dictionary.create("topk", reads=4, d_sae=8, options={"k": 0})


def test_a_dictionary_with_nan_is_not_written(dictionary, tmp_path):
    dictionary.W_dec.data[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="W_dec holds NaN or infinity"):
        dictionary.save(tmp_path / "d")
    assert not list(tmp_path.iterdir())


def test_x_of_another_width(dictionary):
    dictionary.reads = dictionary.writes = (sl.Port(hook="blocks.1.hook_resid_pre", width=D_IN),)
    for use in (dictionary, dictionary.encode, dictionary.pre):
        with pytest.raises(ShapeError, match=r"x has shape \(3, 13\); this dictionary takes \[\.\.\., 12\] \(blocks\.1"):
            use(torch.zeros(3, 13))


def test_repr_says_what_it_is(dictionary):
    assert f"d_in=12, d_sae=40, sparsity='{dictionary.rule.plugin_name}'" in repr(dictionary)


def test_a_loaded_dictionary_is_one_to_use_not_to_train(tmp_path):
    d = sl.Dictionary.create("topk", reads=4, d_sae=8).train()
    d.save(tmp_path / "d")
    assert not sl.Dictionary.load(tmp_path / "d").training
