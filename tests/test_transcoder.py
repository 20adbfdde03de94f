"""Transcoders: a dictionary that predicts the activation at another hook."""

import json
import signal

import pytest
import torch

import saelens_lite as sl
from saelens_lite.cache import TensorSource
from saelens_lite.errors import ConfigError, CorruptFileError, HookError, ShapeError, Stopped
from saelens_lite.training import Trainer

D_IN, D_OUT, D_SAE = 10, 6, 40
RULES = {
    "l1": {"coefficient": 0.1},
    "topk": {"k": 4},
    "gated": {"coefficient": 0.1},
    "batch_topk": {"k": 4},
    "jumprelu": {"coefficient": 0.01},
    "matryoshka": {"k": 4},
    "p_anneal": {"coefficient": 0.05},
    "group_max": {"k": 4},
}
HOOKS = ("blocks.1.ln2.hook_out", "blocks.1.hook_mlp_out")


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pairs(n: int, *, linear: float = 0.0) -> TensorSource:
    """Return x, sparse sums of planted directions far from the origin, and y, sums of other directions for the same codes +
    linear·x.
    """
    codes = (torch.rand(n, 16, generator=torch.Generator().manual_seed(1)) < 0.15) * (0.5 + normal(n, 16, seed=2).abs())
    x = codes @ torch.nn.functional.normalize(normal(16, D_IN, seed=3), dim=1) * 3 + 20 * normal(D_IN, seed=4)
    y = codes @ normal(16, D_OUT, seed=5) + 100 * normal(D_OUT, seed=6) + linear * (x @ normal(D_IN, D_OUT, seed=7))
    return TensorSource({"in": x, "out": y})


def trained(source, rule: str = "topk", **settings) -> sl.Dictionary:
    common = {"d_sae": D_SAE, "n_tokens": 50_000, "batch_size": 256, "lr": 1e-2, "options": RULES[rule]}
    config = sl.TrainConfig(hook="in", writes=("out",), sparsity=rule, **common | settings)
    return sl.train(source, config)[0].dictionary


def fvu(d: sl.Dictionary, source: TensorSource) -> float:
    x, y = source.x["in"], source.x["out"]
    with torch.no_grad():
        return float((y - d(x)).square().sum() / (y - y.mean(0)).square().sum())


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_predicts_the_other_activation(rule, skip, tmp_path):
    """On raw activations, whose scales and means are folded in; the best prediction of all, without x, has an fvu of 1."""
    source = pairs(4096)
    d = trained(source, rule, skip=skip)
    assert (d.W_enc.shape, d.W_dec.shape, d.b_dec.shape) == ((D_IN, D_SAE), (D_SAE, D_OUT), (D_OUT,))
    assert (d.writes_what_it_reads, d.d_out, d.writes[0].hook) == (False, D_OUT, "out")
    assert fvu(d, source) < 0.25
    x = source.x["in"][:64]
    codes = d.encode(x).to_dense()
    h = x.double() @ d.W_enc.detach().double() + d.b_enc.detach().double()
    torch.testing.assert_close(d.pre(x).double(), h, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(codes, d.rule.activation(d.pre(x)), rtol=1e-4, atol=1e-4)
    wanted = codes @ d.W_dec + d.b_dec + (x @ d.W_skip.T if skip else 0)
    torch.testing.assert_close(d(x), wanted, rtol=1e-4, atol=1e-3)
    loaded = sl.Dictionary.load(d.save(tmp_path / "d"))
    assert torch.equal(loaded(x), d(x))
    assert (loaded.origin, loaded.ports, loaded.d_out, loaded.W_skip is not None) == (d.origin, d.ports, D_OUT, skip)


def test_a_skip_connection_takes_over_what_is_linear():
    source = pairs(4096, linear=1.0)
    without, with_skip = (fvu(trained(source, skip=skip), source) for skip in (False, True))
    assert with_skip < 0.5 * without


def test_folding_leaves_the_function_as_it_was():
    """The result maps raw activations as the trainer's dictionary maps centred, scaled ones."""
    source = pairs(1024)
    config = sl.TrainConfig(hook="in", writes=("out",), skip=True, d_sae=D_SAE, options={"k": 4}, n_tokens=10_000, lr=1e-2)
    trainer = Trainer(config, source)
    for _ in range(20):
        trainer.step(source.x)
    x = source.x["in"]
    inside = trainer.dictionary.eval()((x - x.mean(0)) * trainer.scales[0]) / trainer.target_scales[0]
    torch.testing.assert_close(trainer.result()(x), inside, rtol=1e-4, atol=1e-3)


def test_validation_is_of_the_target(tmp_path):
    source = pairs(4096)
    config = sl.TrainConfig(hook="in", writes=("out",), d_sae=D_SAE, options={"k": 4}, n_tokens=12_000, batch_size=256, lr=1e-2)
    (run,) = sl.train(source, config, validation_tokens=512)
    held, _ = source.hold_out(512)
    assert run.history[-1]["val_fvu"] == pytest.approx(fvu(run.dictionary, held), rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"writes": ("in",), "skip": True}, r"skip = True needs write hooks"),
        ({"writes": (), "skip": True}, r"skip = True needs write hooks .* set writes"),
        ({"sparsity": "matching_pursuit", "options": {}}, r"matching_pursuit encodes with W_decᵀ"),
        ({"hook": None, "writes": ()}, r"several hooks; .* hook=: in, out"),
    ],
)
def test_settings_that_make_no_transcoder(settings, message):
    config = sl.TrainConfig(**{"hook": "in", "writes": ("out",), "d_sae": D_SAE, "options": {"k": 4}, **settings})
    with pytest.raises(ConfigError, match=message):
        sl.train(pairs(64), config)


def test_the_only_other_hook_is_the_input():
    (run,) = sl.train(pairs(64), sl.TrainConfig(writes=("out",), d_sae=8, options={"k": 2}, n_tokens=64, batch_size=32))
    assert (run.dictionary.reads[0].hook, run.dictionary.writes[0].hook, run.dictionary.d_in) == ("in", "out", D_IN)


def test_a_target_that_was_not_captured():
    with pytest.raises(HookError, match=r"there are activations of in, out, not of 'ouch'"):
        sl.train(pairs(64), sl.TrainConfig(hook="in", writes=("ouch",)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_out": D_OUT + 1}, r"W_dec has shape \(40, 6\), cfg\.json says \(40, 7\)"),
        ({"d_out": None}, r"cfg\.json is damaged: .*d_out must be given if and only if"),
        ({"d_in": 0}, r"d_in = 0: input should be greater than 0"),
        ({"d_in": float("inf")}, r"cfg\.json is not valid JSON: Infinity is not a number of JSON"),
        ({"d_in": 10**12}, r"W_enc has shape"),
    ],
)
def test_a_config_that_does_not_fit_its_weights(change, message, tmp_path):
    folder = sl.Dictionary.create("topk", reads=D_IN, d_sae=D_SAE, writes=D_OUT).save(tmp_path / "d")
    config = json.loads((folder / "cfg.json").read_text())
    ours = config["metadata"]["saelens_lite"]
    for ports, d in (("reads", "d_in"), ("writes", "d_out")):
        ours[ports][0]["width"] = change.get(d) or ours[ports][0]["width"]
    (folder / "cfg.json").write_text(json.dumps(config | change))
    with pytest.raises(CorruptFileError, match=message):
        sl.Dictionary.load(folder)


@pytest.mark.parametrize("ports", ["reads", "writes"])
def test_ports_of_another_width_than_the_weights(ports, tmp_path):
    folder = sl.Dictionary.create("topk", reads=D_IN, d_sae=D_SAE, writes=D_OUT).save(tmp_path / "d")
    config = json.loads((folder / "cfg.json").read_text())
    config["metadata"]["saelens_lite"][ports][0]["width"] += 1
    (folder / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(CorruptFileError, match="the widths of the ports do not add up to d_in and d_out"):
        sl.Dictionary.load(folder)


@pytest.mark.parametrize(
    ("rule", "skip", "architecture"),
    [
        ("l1", False, "transcoder"),
        ("l1", True, "skip_transcoder"),
        ("batch_topk", False, "jumprelu_transcoder"),
        ("jumprelu", True, "jumprelu_skip_transcoder"),
        ("topk", False, "topk_transcoder"),
    ],
)
def test_what_other_tools_call_it(rule, skip, architecture, tmp_path):
    d = sl.Dictionary.create(rule, reads=D_IN, d_sae=D_SAE, writes=D_OUT, skip=skip)
    config = json.loads((d.save(tmp_path / "d") / "cfg.json").read_text())
    assert (config["architecture"], config["d_out"], config["apply_b_dec_to_input"]) == (architecture, D_OUT, False)


@pytest.fixture(scope="module")
def lm():
    return sl.load_model("tiny")


TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom."


def mlp(lm, skip: bool = False) -> sl.Dictionary:
    """Return a transcoder that is exactly linear: y = x Aᵀ, by the skip connection alone."""
    d = sl.Dictionary.create(
        "topk",
        reads=sl.Port(hook=HOOKS[0], width=lm.d_model),
        writes=sl.Port(hook=HOOKS[1], width=lm.d_model),
        d_sae=8,
        skip=skip,
        options={"k": 1},
        origin=sl.Origin(excluded_positions=(0,)),
    )
    d.W_dec.data.zero_()
    if skip:
        d.W_skip.data.copy_(normal(lm.d_model, lm.d_model, seed=1))
    return d


def test_splice_puts_the_prediction_at_the_target(lm):
    d = mlp(lm, skip=True)
    acts = lm.run(TEXT, HOOKS)
    wanted = acts[HOOKS[0]] @ d.W_skip.T
    wanted[:, 0] = acts[HOOKS[1]][:, 0]
    with lm.splice(d):
        found = lm.run(TEXT, ["blocks.1.hook_mlp_out", "blocks.1.hook_resid_post", "blocks.1.hook_resid_mid"])
        spliced = lm.logits(TEXT)
    torch.testing.assert_close(found["blocks.1.hook_mlp_out"], wanted, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(
        found["blocks.1.hook_resid_post"], found["blocks.1.hook_resid_mid"] + wanted, rtol=1e-4, atol=1e-3
    )
    with lm.replace(HOOKS[1], lambda _: wanted):
        torch.testing.assert_close(spliced, lm.logits(TEXT), rtol=1e-4, atol=1e-3)


def test_splice_while_generating_reads_each_new_token(lm):
    d = mlp(lm, skip=False)
    with lm.splice(d):
        ours = lm.generate("The old man", max_new_tokens=12, temperature=0)
        tokens = lm.to_tokens("The old man").tokens
        for _ in range(12):
            tokens = torch.cat([tokens, lm.logits(tokens)[:, -1:].argmax(-1)], dim=1)
    assert ours == lm.tokenizer.decode(tokens[0, 1:])


def test_splice_of_a_target_before_its_hook(lm):
    d = mlp(lm)
    d.reads, d.writes = d.writes, d.reads
    with (
        lm.splice(d),
        pytest.raises(HookError, match=r"blocks\.1\.ln2\.hook_out before blocks\.1\.hook_mlp_out"),
    ):
        lm.logits(TEXT)


def test_splice_of_another_width(lm):
    reads, writes = sl.Port(hook=HOOKS[0], width=lm.d_model), sl.Port(hook=HOOKS[1], width=3)
    d = sl.Dictionary.create("topk", reads=reads, writes=writes, d_sae=8, options={"k": 1})
    with lm.splice(d), pytest.raises(ShapeError, match=r"gives \[1, \d+, 3\]; blocks\.1\.hook_mlp_out of this model is"):
        lm.logits(TEXT)


def interrupted_after(n: int, step):
    def interrupted(self, *batch):
        step(self, *batch)
        if self.n_steps == n:
            signal.raise_signal(signal.SIGINT)

    return interrupted


def test_state_of_other_activations_is_refused():
    source = pairs(256)
    moved = TensorSource({"in": source.x["in"] + 5, "out": source.x["out"]})
    config = sl.TrainConfig(hook="in", writes=("out",), d_sae=8, options={"k": 2}, n_tokens=1000, batch_size=64)
    trainer = Trainer(config, source)
    trainer.step({hook: x[:64] for hook, x in source.x.items()})
    with pytest.raises(ConfigError, match=r"are not those the run was trained on: their mean differs"):
        Trainer(config, moved).restore(*trainer.state())
    with pytest.raises(ShapeError, match=r"lacks the activations of out"):
        trainer.step(source.x["in"][:64])


def test_from_capture_to_a_saved_run_and_back(lm, tmp_path, monkeypatch):
    """Cache, stream and checkpoint know the target; a run that is resumed in the middle ends at the same bytes."""
    cache = sl.capture(lm, [TEXT * 8] * 6, HOOKS, tmp_path / "cache", n_tokens=600)
    config = sl.TrainConfig(
        hook=HOOKS[0], writes=(HOOKS[1],), skip=True, d_sae=32, options={"k": 4}, n_tokens=1200, batch_size=100, lr=1e-2
    )
    (run,) = sl.train(cache, config, tmp_path / "run")
    loaded = sl.Dictionary.load(tmp_path / "run" / "dictionary")
    assert loaded.writes[0].hook == HOOKS[1]
    assert run.history[-1]["fvu"] < 0.9
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted_after(6, Trainer.step))
        with pytest.raises(Stopped):
            sl.train(cache, config, tmp_path / "stopped")
    (resumed,) = sl.resume(tmp_path / "stopped")
    for name, value in run.dictionary.state_dict().items():
        assert torch.equal(resumed.dictionary.state_dict()[name], value), name
    stream = sl.ActivationStream(lm, [TEXT * 8] * 6, hooks=HOOKS)
    (live,) = sl.train(stream, config)
    assert live.dictionary.writes[0].hook == HOOKS[1]
