"""Training of one dictionary over ports: the size of a latent is its code times the sum of the norms at all ports."""

import logging

import pytest
import torch
from interrupted import Interrupted

import saelens_lite as sl
from saelens_lite.cache import TensorSource
from saelens_lite.errors import ConfigError, HookError, Stopped
from saelens_lite.sparsity import normalise_decoder_
from saelens_lite.training import Trainer

HOOK = "blocks.2.hook_resid_pre"
BASE, CHAT, DIFFERENCE = f"base:{HOOK}", f"chat:{HOOK}", f"chat-base:{HOOK}"
WIDTHS, K, D_SAE = (6, 10), 4, 40
UNIT = {"topk": {"k": K}, "batch_topk": {"k": K}, "matryoshka": {"k": K}, "group_max": {"k": K}, "gated": {}, "p_anneal": {}}


def activations(n: int = 2048, seed: int = 0, widths: tuple[int, int] = WIDTHS) -> dict[str, torch.Tensor]:
    """Return activations of two models of other widths, sizes and means: sparse sums of 30 directions, some of one model."""
    generator = torch.Generator().manual_seed(seed)
    strength = torch.rand(n, 30, generator=generator) * (torch.rand(n, 30, generator=generator) < 0.1)
    directions = torch.Generator().manual_seed(7)
    base, chat = (torch.randn(30, width, generator=directions) for width in widths)
    base[:5], chat[5:10] = 0, 0
    noise = [0.01 * torch.randn(n, width, generator=generator) for width in widths]
    return {BASE: strength @ base + 0.5 + noise[0], CHAT: 40 * (strength @ chat + noise[1]) - 9}


def config(rule: str = "batch_topk", **changes) -> sl.TrainConfig:
    usual = {"reads": (BASE, CHAT), "d_sae": D_SAE, "n_tokens": 4000, "batch_size": 80, "options": UNIT.get(rule, {})}
    return sl.TrainConfig(sparsity=rule, **usual | changes)


def joined(x: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([x[BASE], x[CHAT]], 1)


def sizes_of(weight: torch.Tensor, scales=(1.0, 1.0)) -> torch.Tensor:
    """Return Σ_p scale_p ‖d_p‖, in float64."""
    parts = weight.detach().double().split(list(WIDTHS), dim=1)
    return sum(scale * part.norm(dim=1) for scale, part in zip(scales, parts, strict=True))


def scales_of(x: dict[str, torch.Tensor]) -> list[float]:
    """Return the number that gives the activations of each port an RMS norm of sqrt(d)."""
    return [float(t.shape[1] ** 0.5 / t.double().square().sum(1).mean().sqrt()) for t in x.values()]


@pytest.mark.parametrize("rule", ["topk", "batch_topk", "group_max"])
def test_the_latents_are_those_with_the_largest_codes_times_norms_of_all_ports(rule):
    """The published choice with decoder norms of any size, in float64, gives the output of ours, whose norms add up to 1."""
    generator = torch.Generator().manual_seed(3)
    d = sl.Dictionary.create(
        rule, reads=(sl.Port(hook="a", width=6), sl.Port(hook="b", width=10)), d_sae=D_SAE, options={"k": K}
    )
    for parameter in d.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    d.W_dec.data.mul_(torch.rand(D_SAE, 1, generator=generator) * 5 + 0.1)
    x = torch.randn(64, 16, generator=generator)
    weights = {name: parameter.detach().double().clone() for name, parameter in d.named_parameters()}

    f = ((x.double() - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]).relu()
    sizes = f * sizes_of(weights["W_dec"])
    if rule == "group_max":
        groups = sizes.unflatten(1, (K, -1))
        kept = (groups == groups.amax(2, keepdim=True)).flatten(1)
    else:
        compared = sizes if rule == "topk" else sizes.flatten()[None]
        n = K if rule == "topk" else K * len(x)
        kept = (compared >= compared.topk(n, dim=1).values[:, -1:]).view_as(sizes)
    wanted = (f * kept) @ weights["W_dec"] + weights["b_dec"]

    norms = sizes_of(weights["W_dec"]).float()
    normalise_decoder_(d)
    d.W_enc.data.mul_(norms)
    d.b_enc.data.mul_(norms)
    torch.testing.assert_close(d.train()(x).double(), wanted, rtol=1e-4, atol=1e-4)
    by_codes_alone = (f.topk(K, dim=1).indices.sort().values, (f * kept).topk(K, dim=1).indices.sort().values)
    assert not torch.equal(*by_codes_alone), "the norms must matter"


@pytest.mark.parametrize("rule", [*UNIT, "jumprelu", "l1"])
def test_norms_of_all_ports_add_up_to_one_in_training_and_in_scaled_units_afterwards(rule):
    x = activations()
    trainer = Trainer(config(rule), TensorSource(x))
    torch.testing.assert_close(sizes_of(trainer.dictionary.W_dec), torch.ones(D_SAE).double(), rtol=1e-5, atol=0)
    for batch in (0, 1, 2):
        trainer.step({key: rows[80 * batch : 80 * batch + 80] for key, rows in x.items()})
    if rule != "l1":
        torch.testing.assert_close(sizes_of(trainer.dictionary.W_dec), torch.ones(D_SAE).double(), rtol=1e-5, atol=0)
    assert trainer.scales == pytest.approx(scales_of(x), rel=1e-5)
    sizes = sizes_of(trainer.result().W_dec, scales_of(x))
    torch.testing.assert_close(sizes, torch.ones(D_SAE).double(), rtol=1e-5, atol=0)


def test_a_saved_crosscoder_is_the_published_one_of_raw_activations(tmp_path):
    """f counts where f Σ_p ‖d_p‖ in scaled units is above θ, and L0 is close to k on activations that were not trained on."""
    x, fresh = activations(6000), activations(3000, seed=5)
    (run,) = sl.train(TensorSource(x), config(n_tokens=40_000, batch_size=200), tmp_path / "run")
    d = sl.load(run.folder)
    d.requires_grad_(False)
    weights = {name: tensor.double() for name, tensor in d.state_dict().items()}
    raw = joined(fresh).double()
    f = ((raw - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]).relu()
    sizes, theta = f * sizes_of(weights["W_dec"], scales_of(x)), weights["rule.threshold"]
    assert (theta == theta[0]).all()
    codes = d.encode(raw.float()).to_dense().double()
    clear = ((sizes - theta).abs() > 1e-3 * theta).all(1)  # rows in which float32 rounding decides nothing
    assert clear.double().mean() > 0.9
    torch.testing.assert_close(codes[clear], (f * (sizes > theta))[clear], rtol=1e-4, atol=1e-4)
    x_hat = codes @ weights["W_dec"] + weights["b_dec"]
    torch.testing.assert_close(d(raw.float()).double(), x_hat, rtol=1e-4, atol=1e-3)
    assert (codes > 0).sum(1).double().mean() == pytest.approx(K, rel=0.1)
    error = ((raw - x_hat).split(list(WIDTHS), dim=1), raw.split(list(WIDTHS), dim=1))
    fvu = [float(e.square().sum() / (y - y.mean(0)).square().sum()) for e, y in zip(*error, strict=True)]
    assert max(fvu) < 0.15  # both ports, though the activations of one are 40 times as large


def same_widths() -> dict[str, torch.Tensor]:
    return activations(widths=(6, 6))


SWEEP = [
    config(n_tokens=800), config("l1", n_tokens=600), config(reads=(), hook=DIFFERENCE, n_tokens=800),
    config("topk", reads=(BASE, DIFFERENCE), n_tokens=800),
]  # fmt: skip


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_sweep_of_crosscoders_and_differences_has_the_same_bytes_again_and_when_it_is_resumed(tmp_path):
    x = same_widths()
    sl.train(TensorSource(x), SWEEP, tmp_path / "alone", validation_tokens=100)
    out = tmp_path / "run"
    with pytest.raises(Stopped):
        sl.train(Interrupted(TensorSource(x), 4), SWEEP, out, validation_tokens=100)
    sl.resume(out, TensorSource(x))
    assert contents(out) == contents(tmp_path / "alone")


@pytest.fixture(scope="module")
def cache(lm, documents, tmp_path_factory):
    """A cache of one hook in two models."""
    other = sl.load_model("tiny", device="cpu")
    with torch.no_grad():
        other.blocks[0].mlp.c_proj.weight.mul_(0.5)
    folder, hook = tmp_path_factory.mktemp("two models") / "cache", "blocks.1.hook_resid_pre"
    return sl.capture({"base": lm, "chat": other}, documents, [hook], folder, n_ctx=32, n_tokens=1500)


def test_a_cache_of_two_models_is_reopened_by_an_interrupted_run_of_their_difference(cache, tmp_path):
    base, chat = cache.hooks
    configs = [
        sl.TrainConfig(hook=hook, d_sae=32, n_tokens=900, batch_size=60, options={"k": 4})
        for hook in ("chat-base:blocks.1.hook_resid_pre", None)
    ]
    runs = sl.train(cache, configs, tmp_path / "alone", validation_tokens=100)
    assert [run.dictionary.place for run in runs] == ["chat-base:blocks.1.hook_resid_pre", f"{base} + {chat}"]
    out = tmp_path / "run"
    with pytest.raises(Stopped):
        sl.train(Interrupted(cache, 5), configs, out, validation_tokens=100)
    sl.resume(out)  # by the description in the checkpoint
    assert contents(out) == contents(tmp_path / "alone")
    sl.resume(out / "0-topk", n_tokens=1200)
    assert sl.Run.load(out / "0-topk").dictionary.training_record["tokens"] == 1200


def test_commands_train_crosscoders_and_differences(cache, command, tmp_path):
    base, chat = cache.hooks
    usual = ["--d-sae", 32, "--n-tokens", 120, "--batch-size", 60, "--k", 4]
    for flags, place in {
        (): f"{base} + {chat}",
        ("--port", chat, "--port", base): f"{chat} + {base}",
        ("--port", "base-chat:blocks.1.hook_resid_pre"): "base-chat:blocks.1.hook_resid_pre",
        ("--hook", base): base,
    }.items():
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        code, _, err = command("train", cache.path, *flags, *usual, "--out", out)
        assert code == 0, err
        assert sl.load(out).place == place
    code, _, err = command("train", cache.path, "--port", "chat-bse:blocks.1.hook_resid_pre", *usual, "--out", tmp_path / "x")
    assert (code, "no activations of 'bse:blocks.1.hook_resid_pre'; did you mean" in err) == (2, True), err


@pytest.mark.parametrize(
    ("hooks", "reads"),
    [
        ([BASE, CHAT], (BASE, CHAT)), ([BASE, CHAT, DIFFERENCE], (BASE, CHAT)), ([DIFFERENCE], (DIFFERENCE,)),
        ([BASE, "chat:h"], None), (["a", "b"], None), ([BASE, HOOK], None),
    ],
)  # fmt: skip
def test_without_a_hook_one_hook_of_several_models_makes_a_crosscoder(hooks, reads, caplog):
    source, settings = TensorSource({hook: torch.randn(99, 3) for hook in hooks}), config(reads=(), n_tokens=80)
    if reads is None:
        with pytest.raises(ConfigError, match="choose one with hook="):
            sl.train(source, settings)
        return
    with caplog.at_level(logging.INFO):
        (run,) = sl.train(source, settings)
    assert tuple(port.key for port in run.dictionary.reads) == reads
    assert ("a crosscoder reads one hook in several models: " in caplog.text) == (len(reads) > 1)


def test_a_model_that_is_missing_is_named():
    with pytest.raises(HookError, match="not of 'other:"):
        sl.train(TensorSource(same_widths()), config(reads=(BASE, f"other:{HOOK}")))
