"""Evaluation of texts with long rows: what is in memory is bounded, and no number changes."""

import logging
from importlib import import_module

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import saelens_lite as sl
from saelens_lite.tokens import TokenRows, token_rows

measure = import_module("saelens_lite.evaluation.measure")
SENTENCE = "The old man looked at the sea, and the sea looked back. "


class Largest(TorchDispatchMode):
    """The most bytes of a tensor that an operation made within the block, views aside, and the most of one of logits."""

    def __init__(self, d_vocab: int):
        super().__init__()
        self.d_vocab, self.n_bytes, self.n_logits = d_vocab, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_flatten(out)[0]:
            if isinstance(x, torch.Tensor):
                self.n_bytes = max(self.n_bytes, x.untyped_storage().nbytes())
                if x.ndim and x.shape[-1] == self.d_vocab and x.is_floating_point():
                    self.n_logits = max(self.n_logits, x.numel())
        return out


@pytest.fixture(scope="module")
def models(lm):
    """By name, models that read 131,072 tokens: attention without positions in the stream, and a recurrent one."""
    from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    llama = LlamaConfig(
        vocab_size=lm.d_vocab, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=131_072, initializer_range=0.2,
    )  # fmt: skip
    mamba = MambaConfig(vocab_size=lm.d_vocab, hidden_size=16, num_hidden_layers=2, state_size=4, initializer_range=0.2)
    made = {"Llama": LlamaForCausalLM(llama), "Mamba": MambaForCausalLM(mamba)}
    return {name: sl.LanguageModel(module, lm.tokenizer, name=name) for name, module in made.items()}


def dictionary(hook, seed=0, **origin):
    return sl.Dictionary.create(
        "topk", reads=sl.Port(hook=hook, width=16), d_sae=32, options={"k": 3}, origin=sl.Origin(**origin), seed=seed
    )


@pytest.mark.parametrize("settings", [{}, {"n_ctx": 131_072}, {"n_ctx": 131_072, "pack": True}])
def test_memory_does_not_grow_with_the_longest_document(models, settings):
    """A thousand tokens of short documents and one of a million characters, for any length of rows."""
    model = models["Llama"]
    text = [SENTENCE] * 60 + [SENTENCE * 20_000]
    with Largest(model.d_vocab) as largest:
        report = sl.evaluate(
            dictionary("blocks.1.hook_resid_pre"),
            model,
            text,
            n_tokens=1000,
            text_config=sl.TextConfig(**settings),
            n_bootstrap=5,
        )
    assert report.n_tokens == 1000
    assert 0 < largest.n_logits <= 2048 * model.d_vocab
    assert largest.n_bytes <= 4 * 2048 * model.d_vocab


def test_rows_are_read_as_far_as_they_count(models):
    """Of the 100,000 tokens of a row that was given, 400 count."""
    model = models["Llama"]
    tokens = torch.randint(1, model.d_vocab, (1, 100_000), generator=torch.Generator().manual_seed(0))
    rows = TokenRows(tokens, (torch.arange(100_000) > 0)[None] & (torch.arange(100_000) <= 400))
    with Largest(model.d_vocab) as largest:
        assert sl.evaluate(dictionary("blocks.1.hook_resid_pre"), model, rows, n_bootstrap=0).n_tokens == 400
    assert 0 < largest.n_logits <= 402 * model.d_vocab


@pytest.mark.parametrize("family", ["Llama", "Mamba"])
@pytest.mark.parametrize("hook", ["blocks.1.hook_resid_pre", "blocks.0.hook_resid_post", "hook_embed", "blocks.0.{}.hook_out"])
def test_logits_of_long_rows_come_in_parts_and_change_no_number(models, family, hook, monkeypatch, caplog):
    """One whole row beside shorter ones, a stretch in the middle that does not count, two dictionaries, all bands."""
    model = models[family]
    hook = hook.format("attn" if family == "Llama" else "mixer")
    n = 100
    rows = token_rows(model, [SENTENCE * 20, SENTENCE, SENTENCE * 3], n_ctx=n)
    keep = rows.keep.clone()
    keep[0, 16:40] = False
    keep[1, :20] = False
    rows = rows._replace(keep=keep)
    several = [dictionary(hook), dictionary(hook, seed=1)]
    settings = {"by_frequency": True, "by_position": True, "n_bootstrap": 30, "batch_tokens": 1}
    whole = sl.evaluate(several, model, rows, **settings)
    monkeypatch.setattr(measure, "MAX_ROW_LOGITS", 16 * model.d_vocab + 5)
    with Largest(model.d_vocab) as largest, caplog.at_level(logging.INFO, logger="saelens_lite.evaluation"):
        parts = sl.evaluate(several, model, rows, **settings)
    assert "rows of 100 tokens: the model runs once for every 16 positions" in caplog.text
    probe = 2 * 16  # two short rows on which the tail of the model is tried out
    assert largest.n_logits <= max(17, probe) * model.d_vocab
    for one, other in zip(whole, parts, strict=True):
        assert one.n_sequences == other.n_sequences
        torch.testing.assert_close(one.density, other.density)
        for name, metric in one.metrics.items():
            assert tuple(other.metrics[name]) == pytest.approx(tuple(metric), rel=1e-4, abs=1e-6, nan_ok=True), name
        for bands in ("by_frequency", "by_position"):
            for a, b in zip(getattr(one, bands), getattr(other, bands), strict=True):
                assert a.n_tokens == b.n_tokens
                assert tuple(b.fvu) == pytest.approx(tuple(a.fvu), rel=1e-4, nan_ok=True)


def test_rows_given_with_a_mask_come_in_parts_too(models, monkeypatch):
    """Positions behind the last token have no prediction, whatever part they are in."""
    model = models["Llama"]
    tokens = torch.randint(1, model.d_vocab, (2, 50), generator=torch.Generator().manual_seed(0))
    rows = TokenRows(tokens, torch.arange(50).expand(2, 50) > 0, torch.tensor([50, 33]))
    rows = rows._replace(keep=rows.keep & rows.holds_token)
    d = dictionary("blocks.1.hook_resid_pre")
    whole = sl.evaluate(d, model, rows, n_bootstrap=0, batch_tokens=1)
    monkeypatch.setattr(measure, "MAX_ROW_LOGITS", 7 * model.d_vocab)
    parts = sl.evaluate(d, model, rows, n_bootstrap=0, batch_tokens=1)
    assert parts["ce_sae"] == pytest.approx(whole["ce_sae"], rel=1e-5)
    assert parts["ce_clean"] == pytest.approx(whole["ce_clean"], rel=1e-5)
    assert parts["kl_zero"] == pytest.approx(whole["kl_zero"], rel=1e-5)


def test_the_row_at_whose_middle_the_reading_stops_is_no_other_than_before(models):
    """A report on the first 90 tokens is that of rows cut by hand."""
    model = models["Llama"]
    d = dictionary("blocks.1.hook_resid_pre", n_ctx=400)
    text = [SENTENCE * 2, SENTENCE * 100]
    found = sl.evaluate(d, model, text, n_tokens=90, n_bootstrap=0)
    by_hand = sl.evaluate(d, model, token_rows(model, text, n_ctx=400, n_tokens=90), n_bootstrap=0)
    assert found.text_sha256 == by_hand.text_sha256
    assert found.n_tokens == by_hand.n_tokens == 90
    for name, metric in found.metrics.items():
        assert metric.value == pytest.approx(by_hand[name], rel=1e-5, nan_ok=True), name
