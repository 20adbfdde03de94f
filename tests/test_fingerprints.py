"""Fingerprints of models: every entry of the weights counts, the device and layout do not, and old records are still read."""

import copy
import json
from importlib import import_module
from itertools import combinations

import pytest
import torch
from torch import Tensor, nn

import saelens_lite as sl
from saelens_lite.errors import OutputExistsError, SourceChangedError
from saelens_lite.fingerprints import EVERY_ENTRY, Fingerprint
from saelens_lite.model.weight_hash import BLOCK, block_sums, fingerprint_of

HOOK = "blocks.2.hook_resid_pre"
SETTINGS = {"n_ctx": 32, "dtype": "float32", "shard_tokens": 90, "batch_tokens": 64}


def sums_by_hand(content: bytes) -> list[int]:
    """Return the block sums of bytes in Python's own integers."""
    state, multipliers = 0, []
    for _ in range(BLOCK + 1):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        multipliers.append(z ^ z >> 31 | 1)
    words = [int.from_bytes(content[i : i + 8], "little") for i in range(0, len(content) // 8 * 8, 8)]
    sums = []
    for first in range(0, len(words), BLOCK):
        products = [k * word % 2**64 for k, word in zip(multipliers, words[first : first + BLOCK], strict=False)]
        shifted = [(m >> 32) + (2**64 - 2**32 if m >> 63 else 0) for m in products]  # the sign fills the highest bits
        total = sum(k * (m ^ s) for k, m, s in zip(multipliers[1:], products, shifted, strict=False)) % 2**64
        sums.append(total - 2**64 if total >> 63 else total)
    return sums


def as_bytes(x: Tensor) -> bytes:
    return x.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("n_threads", [1, 3])
def test_block_sums_are_those_of_exact_integers(monkeypatch, n_threads):
    monkeypatch.setattr("saelens_lite.model.weight_hash.torch.get_num_threads", lambda: n_threads)
    x = torch.randn(4 * BLOCK + 11, generator=torch.Generator().manual_seed(0))  # two whole blocks, a short one, four bytes
    sums, rest = block_sums(x)
    assert sums.tolist() == sums_by_hand(as_bytes(x))
    assert bytes(rest.tolist()) == as_bytes(x)[-4:]
    assert len(sums) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, torch.float64, torch.bool, torch.float8_e4m3fn])
def test_weights_of_any_dtype_and_place_in_memory_have_sums(dtype):
    x = torch.randn(203, generator=torch.Generator().manual_seed(0)).to(dtype)
    for y in (x, x[1:], x[:0], x[5:6]):  # the second does not begin at a multiple of eight bytes
        sums, rest = block_sums(y)
        assert sums.tolist() == sums_by_hand(as_bytes(y))
        assert len(rest) == y.numel() * dtype.itemsize % 8


def test_every_bit_of_every_entry_counts():
    torch.manual_seed(0)
    module = nn.Linear(5, 3)
    bits = module.weight.data.view(torch.int32).view(-1)
    seen = {fingerprint_of(module)}
    for entry in range(15):
        for bit in range(32):
            mask = (1 << bit) - (1 << 32 if bit == 31 else 0)
            bits[entry] ^= mask
            seen.add(fingerprint_of(module))
            bits[entry] ^= mask
    assert len(seen) == 15 * 32 + 1


def test_changed_and_exchanged_rows_and_columns_count():
    """Signs are the highest bits, whose changes cancel in a sum without mixing."""
    torch.manual_seed(0)
    module = nn.Linear(8, 8)
    whole, seen = module.weight.data.clone(), {fingerprint_of(module)}
    for i, j in combinations(range(8), 2):
        exchanged = list(range(8))
        exchanged[i], exchanged[j] = j, i
        signs = torch.ones(8)
        signs[[i, j]] = -1
        for changed in (whole[exchanged], whole[:, exchanged], whole * signs, whole * signs[:, None], whole * (signs > 0)):
            module.weight.data = changed
            seen.add(fingerprint_of(module))
    assert len(seen) == 5 * 28 + 1


def test_the_layout_of_weights_does_not_count():
    plain = nn.Linear(40, 24)
    other = nn.Linear(40, 24)
    other.weight.data = plain.weight.data.T.contiguous().T
    other.bias.data = torch.cat([torch.zeros(1), plain.bias.data])[1:]
    assert not other.weight.is_contiguous()
    assert fingerprint_of(other) == fingerprint_of(plain)
    assert fingerprint_of(other).sampled == fingerprint_of(plain).sampled


def ablated(lm):
    """Return the model with zeros in some heads' columns of the outputs of the attention, between those that were sampled."""
    other = sl.LanguageModel(copy.deepcopy(lm.module), lm.tokenizer, name=lm.name)
    for block in other.module.transformer.h:
        block.attn.c_proj.weight.data[:, 64:96] = 0
        block.attn.c_proj.weight.data[:, 160:192] = 0
    return other


def test_a_model_with_ablated_heads_has_another_fingerprint(lm):
    assert ablated(lm).fingerprint() != lm.fingerprint()
    assert ablated(lm).fingerprint().sampled == lm.fingerprint().sampled  # the reason why it is no longer recorded
    assert sl.Models({"a": lm, "b": ablated(lm)}).fingerprint() != sl.Models({"a": lm, "b": lm}).fingerprint()


def test_a_saved_model_has_the_fingerprint_in_the_same_dtype(random_lm, tmp_path):
    random_lm.module.save_pretrained(tmp_path)
    random_lm.tokenizer.save_pretrained(tmp_path)
    assert sl.load_model(tmp_path, device="cpu").fingerprint() == random_lm.fingerprint()
    halves = [sl.load_model(tmp_path, device="cpu", dtype="bfloat16").fingerprint() for _ in range(2)]
    assert halves[0] == halves[1] != random_lm.fingerprint()


def test_old_records_are_compared_with_the_old_fingerprint(lm):
    own = lm.fingerprint()
    old = "78613831615d862a31e1bb0ba0b5fe7ada304a29d8958be379bf3b004a925ad1"  # as version 1.0 recorded it
    assert own.like(old) == own.like("0" * 64) == old
    assert own.like(str(own)) == own.like(EVERY_ENTRY) == own.like(None) == own
    both = sl.Models({"a": lm, "b": lm}).fingerprint()
    assert both.like("") == "f4c0a50ca1894272b778c784e43c42e40cdd83c9a4da191c61765febcd9c4bd4"
    assert copy.deepcopy(own).sampled == old
    assert json.loads(json.dumps({"weights": own})) == {"weights": str(own)}
    assert isinstance(own, Fingerprint)


def stopped_capture(lm, documents, out, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(import_module("saelens_lite.cache.capture")._Job, "manifest", stop)
        with pytest.raises(KeyboardInterrupt):
            sl.capture(lm, documents, HOOK, out, **SETTINGS)
    return out.with_name(f".{out.name}.unfinished") / "request.json"


def test_a_capture_is_resumed_only_with_the_same_model(lm, documents, tmp_path, monkeypatch):
    request = stopped_capture(lm, documents, tmp_path / "cache", monkeypatch)
    with pytest.raises(OutputExistsError, match="weights = 'every entry: "):
        sl.capture(ablated(lm), documents, HOOK, tmp_path / "cache", **SETTINGS)
    recorded = json.loads(request.read_text())
    for weights in ("0" * 64, lm.fingerprint().sampled):
        request.write_text(json.dumps(recorded | {"weights": weights}))
        if weights == "0" * 64:
            with pytest.raises(OutputExistsError, match=rf"weights = '0+' \(now '{lm.fingerprint().sampled}'"):
                sl.capture(lm, documents, HOOK, tmp_path / "cache", **SETTINGS)
    assert sl.capture(lm, documents, HOOK, tmp_path / "cache", **SETTINGS).n_tokens > 0


def test_a_stream_is_resumed_only_with_the_same_model(lm, documents):
    def stream(model):
        return sl.ActivationStream(model, documents, [HOOK], buffer_tokens=128, batch_tokens=64)

    record = json.loads(json.dumps(stream(lm).record()))
    stream(lm).expect(record)
    with pytest.raises(SourceChangedError, match="which had weights = 'every entry: "):
        stream(ablated(lm)).expect(record)
    stream(lm).expect(record | {"weights": lm.fingerprint().sampled})
    with pytest.raises(SourceChangedError, match="which had weights = '0000"):
        stream(lm).expect(record | {"weights": "0" * 64})


def test_answers_are_kept_for_one_model(lm, tmp_path, monkeypatch):
    """Those that an earlier version kept, which looked at some weights only, are asked again."""
    question = sl.Question("The capital of France is", max_tokens=4)
    sampled = lm.fingerprint().sampled
    first = sl.local_chat_model(lm, folder=tmp_path).ask([question])
    assert sl.local_chat_model(ablated(lm), folder=tmp_path).estimate([question]).n_questions == 1
    assert sl.local_chat_model(lm, folder=tmp_path).ask([question]) == [first[0]._replace(was_kept=True)]
    old = tmp_path / "old"
    with monkeypatch.context() as patch:
        patch.setattr(sl.LanguageModel, "fingerprint", lambda self: sampled)
        sl.local_chat_model(lm, folder=old).ask([question])
    assert sl.local_chat_model(lm, folder=old).estimate([question]).n_questions == 1
