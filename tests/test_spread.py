"""Models spread over memory and disk, or over processes: hooks, replacements and weights are those of the plain model."""

import json

import pytest
import torch
from together import in_processes

import saelens_lite as sl
from saelens_lite.cache import open_source
from saelens_lite.errors import ConfigError
from saelens_lite.model.partial_forward import PartialForward
from saelens_lite.processes import team

INSIDE = ["blocks.1.attn.hook_z", "blocks.1.attn.q.hook_out", "blocks.2.mlp.hook_post", "blocks.0.mlp.in.hook_out"]
TOKENS = torch.arange(30).reshape(2, 15)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """Return the folder of a Llama of three blocks with random weights, in several files, in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, tie_word_embeddings=True,
    )  # fmt: skip
    where = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).bfloat16().save_pretrained(where, max_shard_size="20KB")
    return str(where)


@pytest.fixture(scope="module")
def plain(folder):
    return sl.load_model(folder, device="cpu", dtype="bfloat16")


@pytest.fixture(scope="module")
def offloaded(folder):
    return sl.load_model(folder, device_map="auto", max_memory={"cpu": "30KB"})


def test_an_offloaded_model_gives_the_bytes_of_the_plain_one(plain, offloaded):
    assert "disk" in offloaded.module.hf_device_map.values()
    assert any(weight.is_meta for weight in offloaded.module.parameters())
    assert (offloaded.device, offloaded.dtype, offloaded.precision) == (plain.device, torch.bfloat16, "bfloat16")
    assert not offloaded.is_shared
    assert offloaded.fingerprint() == plain.fingerprint()
    hooks = plain.hook_names + INSIDE
    assert offloaded.hook_names == plain.hook_names
    ours, theirs = (lm.run(TOKENS, hooks) for lm in (offloaded, plain))
    assert all(torch.equal(ours[hook], theirs[hook]) for hook in hooks)
    assert torch.equal(offloaded.logits(TOKENS), plain.logits(TOKENS))
    assert torch.equal(offloaded.unembedding(), plain.unembedding())
    x = torch.randn(3, 32)
    assert torch.equal(offloaded.final_norm_divisor(x), plain.final_norm_divisor(x))
    assert offloaded.fingerprint() == plain.fingerprint()  # also after a forward pass


def test_replacements_and_shortened_passes_work_on_an_offloaded_model(plain, offloaded):
    logits = []
    for lm in (plain, offloaded):
        with lm.replace("blocks.1.hook_resid_mid", lambda x: x * 2), lm.replace(INSIDE[2], torch.relu):
            logits.append(lm.logits(TOKENS))
        partial = PartialForward(lm, ["blocks.2.hook_resid_pre"], TOKENS)
        partial.read(TOKENS, [])
        assert partial.n_skipped == 2
        logits.append(partial.logits(TOKENS, torch.ones(2, 15, 32, dtype=lm.dtype)))
    assert torch.equal(logits[0], logits[2])
    assert torch.equal(logits[1], logits[3])
    assert not torch.equal(logits[0], plain.logits(TOKENS))


def test_gradients_reach_a_replaced_activation_of_an_offloaded_model(plain, offloaded):
    found = []
    for lm in (plain, offloaded):
        x = lm.run(TOKENS, INSIDE[0])[INSIDE[0]].requires_grad_()
        with lm.replace(INSIDE[0], lambda _, x=x: x * 1):
            logits = lm.logits(TOKENS, differentiable=True)
        found.append(torch.autograd.grad(logits[:, -1, 3].sum(), x)[0])
    assert torch.equal(*found)
    assert found[0].abs().max() > 0


def test_captures_of_an_offloaded_model_are_those_of_the_plain_one(plain, offloaded, tmp_path):
    for name, lm in (("plain", plain), ("offloaded", offloaded)):
        sl.capture(lm, TOKENS, ["blocks.2.hook_resid_pre"], tmp_path / name, text_name="numbers")
    hashes = [(tmp_path / name / "shard-00000.safetensors").read_bytes() for name in ("plain", "offloaded")]
    assert hashes[0] == hashes[1]


def test_what_needs_weights_in_memory_is_refused(offloaded):
    with pytest.raises(ConfigError, match="shuffled weights changes them in memory, but some are on the disk"):  # noqa: SIM117
        with offloaded.redrawn():
            pass
    with pytest.raises(ConfigError, match=r"a bridge needs all weights .*loaded with device_map='auto'"):
        offloaded.bridge()
    with pytest.raises(ConfigError, match="centring the writing weights needs all weights"):
        offloaded.center_writing_weights_()


def test_device_maps_that_contradict_are_refused(folder, monkeypatch):
    with pytest.raises(ConfigError, match="device = 'cpu' and device_map = 'auto': give one of them"):
        sl.load_model(folder, device="cpu", device_map="auto")
    with pytest.raises(ConfigError, match="max_memory needs device_map = 'auto'"):
        sl.load_model(folder, max_memory={"cpu": "1GB"})
    with pytest.raises(ConfigError, match="device = 'fast'"):
        sl.load_model(folder, device_map="fast")
    monkeypatch.setattr("saelens_lite.model.spread.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"device_map = 'auto' needs accelerate: pip install 'saelens-lite\[large\]'"):
        sl.load_model(folder, device_map="auto")


def test_a_device_map_of_one_device_is_a_device(folder, plain):
    lm = sl.load_model(folder, device_map="cpu", dtype="bfloat16")
    assert lm.device_map is None
    assert torch.equal(lm.logits(TOKENS), plain.logits(TOKENS))


def test_with_one_process_tp_is_the_plain_model_in_its_own_dtype(folder, plain):
    lm = sl.load_model(folder, device_map="tp")
    assert (lm.is_shared, lm.dtype) == (False, torch.bfloat16)
    assert torch.equal(lm.logits(TOKENS), plain.logits(TOKENS))


def _cut(folder: str, gpt2: str, out: str) -> dict:
    """Compare a model that both processes hold together with the plain model. Return what the test checks."""
    plain, lm = sl.load_model(folder, device="cpu"), sl.load_model(folder, device_map="tp", dtype="float32")
    cache = sl.capture(lm, TOKENS, "blocks.1.hook_resid_pre", out, dtype="float32", batch_tokens=15)  # before any other pass
    captured = cache.read_shard(0)
    kept = plain.run(TOKENS, "blocks.1.hook_resid_pre")["blocks.1.hook_resid_pre"].flatten(0, 1)[captured["tokens"].long()]
    hooks = plain.hook_names + INSIDE
    ours, theirs = (one.run(TOKENS, hooks) for one in (lm, plain))
    off = max(float((ours[hook] - theirs[hook]).abs().max() / theirs[hook].abs().max()) for hook in hooks)
    found, gradients = [], []
    for one in (plain, lm):
        x = one.run(TOKENS, INSIDE[0])[INSIDE[0]].requires_grad_()
        with one.replace(INSIDE[0], lambda _, x=x: x * 1.5), one.replace("blocks.2.hook_resid_pre", lambda y: y * 2):
            logits = one.logits(TOKENS, differentiable=True)
        found.append(logits.detach())
        gradients.append(torch.autograd.grad(logits[:, -1, 3].sum(), x)[0])
    shortened = []
    for one in (plain, lm):
        partial = PartialForward(one, ["blocks.2.hook_resid_pre"], TOKENS)
        partial.read(TOKENS, [])
        shortened.append(partial.logits(TOKENS, torch.ones(2, 15, 32)) * (partial.n_skipped == 2))
    with lm.redrawn() as redrawn:
        shuffled = redrawn.logits(TOKENS)
    with pytest.raises(ConfigError, match="no plan for cutting a gpt2 into parts; use device_map='auto'"):
        sl.load_model(gpt2, device_map="tp")
    with pytest.raises(ConfigError, match="centring the writing weights needs all weights"):
        lm.center_writing_weights_()
    return {
        "is_shared": lm.is_shared,
        "is_cut": lm.module.model.layers[0].mlp.down_proj.weight.to_local().shape == (32, 40),
        "same": (lm.fingerprint() == plain.fingerprint(), lm.hook_names == plain.hook_names),
        "activations": off,
        "captured": float((captured["blocks.1.hook_resid_pre"] - kept).abs().max() / kept.abs().max()),
        "logits": float((found[0] - found[1]).abs().max() / found[0].abs().max()),
        "gradients": float((gradients[0] - gradients[1]).abs().max() / gradients[0].abs().max()),
        "shortened": torch.allclose(*shortened, rtol=1e-4, atol=1e-5) and bool(shortened[0].any()),
        "unembedding": torch.equal(lm.unembedding(), plain.unembedding()),
        "shuffled": team().agree({"logits": shuffled.sum().item()}, "logits") is None and not torch.equal(shuffled, found[1]),
        "restored": float((lm.logits(TOKENS) - plain.logits(TOKENS)).abs().max()) < 1e-4,
    }


def test_a_model_cut_over_two_processes_gives_whole_activations(folder, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=8, n_embd=8, n_layer=1, n_head=1)).save_pretrained(tmp_path)
    for found in in_processes(2, _cut, folder, str(tmp_path), str(tmp_path / "cache")):
        assert max(found.pop(name) for name in ("activations", "captured", "logits", "gradients")) < 1e-5
        assert found.pop("same") == (True, True)
        assert all(found.values()), found


def test_a_stream_of_a_spread_model_is_found_again(tmp_path):
    text = tmp_path / "book.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 30)
    lm = sl.load_model("tiny", device_map={"": torch.device("cpu")}, dtype="float32")
    stream = sl.ActivationStream(lm, text, "blocks.1.hook_resid_pre", buffer_tokens=128)
    description = json.loads(json.dumps(stream.describe()))
    assert description["model"]["device_map"] == {"": "cpu"}
    again = open_source(description, "cpu")
    assert again.lm.device_map == {"": "cpu"}
    assert torch.equal(*(next(iter(one.batches(one.hooks, 50, 0)))[one.hooks[0]] for one in (stream, again)))


def test_commands_take_a_device_map(command, tmp_path):
    text = tmp_path / "book.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 30)
    options = ("--hook", "blocks.1.hook_resid_pre", "--device-map", "auto", "--out", tmp_path / "cache")
    assert command("capture", text, *options).code == 0
    assert sl.ActivationCache.open(tmp_path / "cache").origin("blocks.1.hook_resid_pre").precision == "float16"  # its own
    code, _, err = command("capture", text, *options[:-1], tmp_path / "other", "--device", "cpu")
    assert code == 2
    assert "device = 'cpu' and --device-map auto: give one of them" in " ".join(err.split())
