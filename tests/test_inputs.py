"""Inputs: text, or token ids in any form, with or without a mask."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tr
from tokenizers import Tokenizer, models, pre_tokenizers

import saelens_lite as sl
from saelens_lite.config import Origin, TextConfig
from saelens_lite.errors import ConfigError, ShapeError, TextError
from saelens_lite.tokens import TokenRows, token_rows
from saelens_lite.tokens.inputs import token_ids

HOOK = "blocks.1.hook_resid_pre"
IDS = [[0, 5, 6, 9], [0, 7, 8, 11]]
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
TEXT = "The old man looked at the sea"


def small(kind, config, tokenizer=None) -> sl.LanguageModel:
    torch.manual_seed(0)
    module = kind(config)
    for parameter in module.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return sl.LanguageModel(module, tokenizer, name="small")


FAMILIES = {
    "gpt2": lambda: small(tr.GPT2LMHeadModel, tr.GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64, n_positions=32)),
    "llama": lambda: small(tr.LlamaForCausalLM, tr.LlamaConfig(**SMALL, intermediate_size=64, max_position_embeddings=32)),
    "opt": lambda: small(
        tr.OPTForCausalLM, tr.OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=32)
    ),
    "bloom": lambda: small(tr.BloomForCausalLM, tr.BloomConfig(hidden_size=32, n_layer=2, n_head=2, vocab_size=64)),
    "mamba": lambda: small(
        tr.MambaForCausalLM, tr.MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4, vocab_size=64, pad_token_id=0)
    ),
    "mistral with a sliding window": lambda: small(
        tr.MistralForCausalLM,
        tr.MistralConfig(
            **SMALL, intermediate_size=64, num_key_value_heads=2, head_dim=16, sliding_window=3, max_position_embeddings=32
        ),
    ),
}


@pytest.fixture(scope="module")
def bert():
    """A model in which every position reads the whole row."""
    return small(tr.BertLMHeadModel, tr.BertConfig(**SMALL, intermediate_size=64, max_position_embeddings=32))


@pytest.fixture(scope="module")
def topk(random_lm):
    return sl.Dictionary.create("topk", reads=sl.Port(hook=HOOK, width=random_lm.d_model), d_sae=96, options={"k": 5})


FORMS = {
    "int64 tensor": lambda ids: torch.tensor(ids),
    "int32 tensor": lambda ids: torch.tensor(ids, dtype=torch.int32),
    "uint8 tensor": lambda ids: torch.tensor(ids, dtype=torch.uint8),
    "uint16 tensor": lambda ids: torch.tensor(ids).to(torch.uint16),
    "array": lambda ids: np.array(ids),
    "uint16 array": lambda ids: np.array(ids, dtype=np.uint16),
    "read-only array": lambda ids: np.frombuffer(np.array(ids).tobytes(), dtype=np.int64).reshape(np.array(ids).shape),
    "lists": lambda ids: ids,
    "tuples": lambda ids: tuple(map(tuple, ids)),
    "tensors in a list": lambda ids: [torch.tensor(row) for row in ids],
    "arrays in a list": lambda ids: [np.array(row) for row in ids],
    "tensors [1 pos] in a list": lambda ids: [torch.tensor([row]) for row in ids],
    "dict": lambda ids: {"input_ids": torch.tensor(ids)},
    "dict of lists": lambda ids: {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]},
    "BatchEncoding": lambda ids: tr.BatchEncoding({"input_ids": ids, "token_type_ids": ids}),
    "TokenRows": lambda ids: TokenRows(torch.tensor(ids), torch.tensor(ids) > 0),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_token_ids_is_read_as_the_tensor(random_lm, topk, tmp_path, form):
    ids, given = torch.tensor(IDS), FORMS[form](IDS)
    assert torch.equal(random_lm.run(given, HOOK)[HOOK], random_lm.run(ids, HOOK)[HOOK])
    assert torch.equal(random_lm.logits(given), random_lm.logits(ids))
    rows = random_lm.to_tokens(given)
    assert torch.equal(rows.tokens.long(), ids)
    assert rows.keep.tolist() == [[False, True, True, True]] * 2
    wanted = sl.attribute(topk, random_lm, ids)
    found = sl.attribute(topk, random_lm, given)
    assert found.tokens == wanted.tokens
    assert torch.equal(found.gradient, wanted.gradient)
    assert sl.evaluate(topk, random_lm, given, n_bootstrap=0)["fvu"] == sl.evaluate(topk, random_lm, ids, n_bootstrap=0)["fvu"]
    cache = sl.capture(random_lm, given, HOOK, tmp_path / "cache")
    assert cache.n_tokens == 6
    store = sl.FeatureStore.build(topk, random_lm, given)
    assert store.info.n_tokens == 6
    doses = sl.dose_response(topk, random_lm, 3, [1.0], given, n_controls=0, metric="loss")
    assert torch.equal(doses.kl, sl.dose_response(topk, random_lm, 3, [1.0], ids, n_controls=0, metric="loss").kl)


@pytest.mark.parametrize("form", ["int64 tensor", "array", "lists", "tuples", "uint8 tensor", "dict"])
def test_a_single_row_needs_no_batch(random_lm, topk, form):
    row = IDS[0]
    given = {"tuples": tuple(row), "lists": row}.get(form) or FORMS[form](row)
    assert torch.equal(random_lm.run(given, HOOK)[HOOK], random_lm.run(torch.tensor([row]), HOOK)[HOOK])
    assert len(sl.prompt_view(topk, random_lm, given).tokens) == 4


def test_rows_of_different_lengths_are_each_what_they_are_alone(random_lm):
    rows = [[0, 5, 6, 9, 12], [0, 7]]
    found = random_lm.run(rows, HOOK)[HOOK]
    for i, row in enumerate(rows):
        torch.testing.assert_close(found[i, : len(row)], random_lm.run([row], HOOK)[HOOK][0])
    assert random_lm.to_tokens(rows).keep.tolist() == [[False, True, True, True, True], [False, True, False, False, False]]


NEITHER = {
    "a dict without ids": ({"text": ["The old man"]}, TextError, "found a dict of keys 'text'"),
    "a number": (7, TextError, "found an int"),
    "nothing": (None, TextError, "found a NoneType"),
    "bytes": (b"The old man", TextError, "found a bytes"),
    "a set": ({"The old man"}, TextError, "found a set"),
    "no texts": ([], TextError, "empty text"),
    "numbers with a point": (
        torch.tensor([[0.0, 5.0]]),
        ShapeError,
        r"shape \(1, 2\), dtype torch.float32",
    ),
    "an array of floats": (np.zeros((1, 3)), ShapeError, r"found a numpy.ndarray of shape \(1, 3\), dtype float64"),
    "a mask instead of ids": (
        torch.ones(1, 3, dtype=torch.bool),
        ShapeError,
        r"shape \(1, 3\), dtype torch.bool",
    ),
    "a batch of batches": (torch.zeros(1, 1, 3, dtype=torch.long), ShapeError, r"shape \(1, 1, 3\)"),
    "no ids": (torch.zeros(0, dtype=torch.long), ShapeError, r"shape \(0,\)"),
    "an id the model lacks": ([[0, 10**6]], ShapeError, "found 0 … 1000000"),
    "a negative id": ([[0, -1]], ShapeError, "found -1 … 0"),
    "lists of floats": ([[0.5, 1.5]], ShapeError, r"row 0 of the list is a torch.Tensor of shape \(2,\), dtype torch.float"),
    "an empty row": ([[0, 5], []], ShapeError, "row 1 of the list"),
    "ids among texts": (["The old man", 5], TextError, "item 1: expected a string"),
    "rows among numbers": ([[0, 5], 5], ShapeError, "found a row of type"),
}


@pytest.mark.parametrize("case", NEITHER)
@pytest.mark.parametrize("function", ["run", "logits", "to_tokens", "attribute", "dose_response", "prompt_view"])
def test_what_is_neither_text_nor_ids_is_refused(random_lm, topk, case, function):
    given, error, message = NEITHER[case]
    call = {
        "run": lambda: random_lm.run(given, HOOK),
        "logits": lambda: random_lm.logits(given),
        "to_tokens": lambda: random_lm.to_tokens(given),
        "attribute": lambda: sl.attribute(topk, random_lm, given),
        "dose_response": lambda: sl.dose_response(topk, random_lm, 3, [1.0], given, n_controls=0),
        "prompt_view": lambda: sl.prompt_view(topk, random_lm, given),
    }[function]
    with pytest.raises(error, match=message):
        call()


def test_an_array_of_strings_is_text(random_lm):
    texts = ["The old man", "looked"]
    assert torch.equal(random_lm.run(np.array(texts), HOOK)[HOOK], random_lm.run(texts, HOOK)[HOOK])


def test_a_file_is_read_where_text_is(random_lm, tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text(TEXT)
    assert torch.equal(random_lm.run(path, HOOK)[HOOK], random_lm.run(TEXT, HOOK)[HOOK])
    assert torch.equal(random_lm.logits([path, TEXT])[0], random_lm.logits(TEXT)[0])


PADDING = {
    "left": lambda n: ([0] * n, []),
    "right": lambda n: ([], [0] * n),
    "both": lambda n: ([0] * n, [0] * n),
}


@pytest.mark.parametrize("side", PADDING)
@pytest.mark.parametrize("family", FAMILIES)
def test_masked_padding_gives_the_values_without_padding(family, side):
    """The families differ in positions: learned, rotary, ALiBi, offset by two, recurrent."""
    lm = FAMILIES[family]()
    row = [3, 9, 27, 17, 51, 25]
    left, right = PADDING[side](4)
    ids = torch.tensor([left + row + right, (row + row + row)[: len(left + row + right)]])
    mask = torch.tensor([[0] * len(left) + [1] * len(row) + [0] * len(right), [1] * ids.shape[1]])
    here = slice(len(left), len(left) + len(row))
    hook = "blocks.1.hook_resid_post" if "blocks.1.hook_resid_post" in lm.hook_names else "blocks.1.hook_out"
    for get in (lambda *a, **k: lm.run(a[0], hook, **k)[hook], lambda *a, **k: lm.logits(a[0], **k)):
        found = get(ids, attention_mask=mask)
        torch.testing.assert_close(found[0, here], get(torch.tensor([row]))[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found[1], get(ids[1:])[0], atol=1e-4, rtol=1e-4)


def test_masked_tokens_inside_a_row_are_as_if_they_were_not_there(random_lm):
    ids, mask = torch.tensor([[0, 5, 99, 6, 99, 9]]), torch.tensor([[1, 1, 0, 1, 0, 1]])
    wanted = random_lm.run(torch.tensor([[0, 5, 6, 9]]), HOOK)[HOOK][0]
    torch.testing.assert_close(random_lm.run(ids, HOOK, attention_mask=mask)[HOOK][0, mask[0].bool()], wanted)
    rows = random_lm.to_tokens(ids, attention_mask=mask)
    assert rows.tokens[0, :4].tolist() == [0, 5, 6, 9]
    assert rows.length.tolist() == [4]


@pytest.mark.parametrize("keep", [False, True])
def test_a_splice_acts_at_the_same_tokens_of_a_row_padded_on_the_left(random_lm, topk, keep):
    row = random_lm.to_tokens(TEXT).tokens
    left, mask = torch.nn.functional.pad(row, (3, 0), value=7), torch.nn.functional.pad(torch.ones_like(row), (3, 0))
    chosen = torch.zeros_like(row, dtype=torch.bool)
    chosen[0, 2:4] = True
    with random_lm.splice(topk, keep=chosen if keep else None):
        wanted = random_lm.logits(row)
    with random_lm.splice(topk, keep=torch.nn.functional.pad(chosen, (3, 0)) if keep else None):
        found = random_lm.logits(left, attention_mask=mask)
    torch.testing.assert_close(found[:, 3:], wanted)
    assert not torch.allclose(wanted, random_lm.logits(row), atol=1e-3)


def test_every_function_that_takes_ids_takes_their_mask(random_lm, topk, tmp_path):
    row = random_lm.to_tokens(TEXT).tokens
    left, mask = torch.nn.functional.pad(row, (4, 0)), torch.nn.functional.pad(torch.ones_like(row), (4, 0))
    for given, settings in ((left, {"attention_mask": mask}), ({"input_ids": left, "attention_mask": mask.tolist()}, {})):
        for function, number in {
            "attribute": lambda x, **s: sl.attribute(topk, random_lm, x, **s).gradient,
            "dose": lambda x, **s: sl.dose_response(topk, random_lm, 3, [1.0], x, metric="loss", n_controls=0, **s).kl,
            "view": lambda x, **s: torch.tensor([r.activation for r in sl.prompt_view(topk, random_lm, x, **s).rows]),
            "evaluate": lambda x, **s: torch.tensor(sl.evaluate(topk, random_lm, x, n_bootstrap=0, **s)["ce_loss_score"]),
            "store": lambda x, **s: sl.FeatureStore.build(topk, random_lm, x, **s).density,
            "capture": lambda x, **s: next(
                sl.capture(random_lm, x, HOOK, tmp_path / "c", dtype="float32", exists="overwrite", **s).batches([HOOK], 6, 0)
            )[HOOK],
        }.items():
            torch.testing.assert_close(number(given, **settings), number(row), msg=lambda m, f=function: f"{f}: {m}")


BAD_MASKS = {
    "another shape": ([[1, 1, 1]], ShapeError, r"attention_mask is \[1, 3\], but the token ids are \[1, 4\]"),
    "other numbers": ([[1, 1, 2, 0]], ShapeError, "must be 1 at tokens"),
    "no token": ([[0, 0, 0, 0]], ShapeError, "leaves no token in row 0"),
}


@pytest.mark.parametrize("case", BAD_MASKS)
def test_masks_that_do_not_fit(random_lm, case):
    mask, error, message = BAD_MASKS[case]
    with pytest.raises(error, match=message):
        random_lm.run([[0, 5, 6, 9]], HOOK, attention_mask=mask)
    with pytest.raises(ShapeError, match="is only for token ids; a str is text"):
        random_lm.run(TEXT, HOOK, attention_mask=mask)
    with pytest.raises(ShapeError, match="TokenRows already know"):
        random_lm.run(random_lm.to_tokens(TEXT), HOOK, attention_mask=mask)


def test_ids_that_look_padded_on_the_left_are_warned_about(random_lm, topk, caplog):
    ids = [[0, 5, 6, 9, 4], [0, 0, 0, 0, 5]]
    for call in (lambda: random_lm.run(ids, HOOK), lambda: random_lm.logits(ids), lambda: random_lm.to_tokens(ids)):
        with caplog.at_level(logging.WARNING):
            call()
        assert "row 1 of the token ids begins with token 0 4 times" in caplog.text
        assert "attention_mask=" in caplog.text
        caplog.clear()
    with caplog.at_level(logging.WARNING):
        sl.evaluate(topk, random_lm, torch.tensor(ids), n_bootstrap=0)
    assert caplog.text.count("looks like padding") == 1
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        random_lm.run(ids, HOOK, attention_mask=[[1] * 5] * 2)
        random_lm.run(random_lm.to_tokens([[0, 5]]), HOOK)
        random_lm.run([[0, 5, 0, 0]], HOOK)
    assert not caplog.text


# One row a text


@pytest.fixture(scope="module")
def words() -> sl.LanguageModel:
    """A model whose tokenizer makes nothing of white space, and has a BOS token of its own."""
    vocabulary = {"[BOS]": 0, "the": 1, "old": 2, "man": 3, "[UNK]": 4, "[EOS]": 5}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = tr.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="[BOS]", eos_token="[EOS]", unk_token="[UNK]")
    config = tr.GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=16, n_positions=32, bos_token_id=0, eos_token_id=5)
    return small(tr.GPT2LMHeadModel, config, fast)


def test_a_text_without_tokens_is_named(words, tmp_path):
    texts = ["the old", "  ", "man"]
    d = sl.Dictionary.create("topk", reads=sl.Port(hook=HOOK, width=32), d_sae=64, options={"k": 4})
    for call in (
        lambda: words.run(texts, HOOK),
        lambda: words.logits(texts),
        lambda: words.to_tokens(texts),
        lambda: sl.attribute(d, words, texts),
        lambda: sl.dose_response(d, words, 3, [1.0], texts, n_controls=0),
        lambda: sl.probe(d, words, texts * 20, ([0, 1, 1] * 20)),
    ):
        with pytest.raises(TextError, match=r"text 1 (of|is)"):
            call()
    with pytest.raises(TextError, match="text 2 has no characters"):
        words.run(["the", "old", ""], HOOK)
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "the"}\n{"text": ""}\n')
    with pytest.raises(TextError, match="text 1 has no characters"):
        words.run(path, HOOK)


def test_a_corpus_may_hold_documents_without_tokens(words):
    rows = token_rows(words, ["the old man", "  ", "man old"])
    assert rows.tokens[:, :3].tolist() == [[0, 1, 2], [0, 3, 2]]


# BOS once


@pytest.mark.parametrize("n", [1, 2])
def test_a_text_that_begins_with_bos_gets_no_second_one(lm, tmp_path, n):
    bos, plain = lm.tokenizer.bos_token * n, lm.to_tokens(TEXT).tokens
    assert plain[0].tolist().count(lm.bos_id) == 1
    with_bos = bos + TEXT
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps({"text": with_bos, "ids": [lm.bos_id] * n + plain[0, 1:].tolist()}) + "\n")
    assert torch.equal(lm.to_tokens(with_bos).tokens, plain)
    assert torch.equal(lm.to_tokens(path).tokens, plain)
    for config in (TextConfig(), TextConfig(bos="document"), TextConfig(pack=True, n_ctx=plain.shape[1])):
        wanted = token_rows(lm, [TEXT], text_config=config).tokens
        assert torch.equal(token_rows(lm, [with_bos], text_config=config).tokens, wanted)
        assert torch.equal(token_rows(lm, path, text_config=config).tokens, wanted)
        assert torch.equal(token_rows(lm, path, text_config=config.replace(token_column="ids")).tokens, wanted)
    kept = token_rows(lm, [with_bos], text_config=TextConfig(bos="none")).tokens[0].tolist()
    assert kept == [lm.bos_id] * n + plain[0, 1:].tolist()  # the text has it, and rows add none
    assert lm.to_tokens(with_bos, prepend_bos=False).tokens[0].tolist() == kept
    assert lm.generate(with_bos, 5, temperature=0) == lm.generate(TEXT, 5, temperature=0)


def test_the_bos_string_alone_is_a_row_of_bos(lm):
    assert lm.to_tokens(lm.tokenizer.bos_token).tokens.tolist() == [[lm.bos_id]]
    assert lm.logits(lm.tokenizer.bos_token).shape == (1, 1, lm.d_vocab)


def test_bos_at_the_head_of_a_long_document_is_taken_off_once(lm):
    bos = lm.tokenizer.bos_token
    long = "The old man looked at the sea. " * 3000  # several stretches
    assert torch.equal(token_rows(lm, [bos + long]).tokens, token_rows(lm, [long]).tokens)
    inside = token_rows(lm, [f"{TEXT}{bos}{TEXT}"])
    assert (inside.tokens[0] == lm.bos_id).sum() == 2


# The same positions everywhere


def test_special_tokens_inside_a_row_are_left_out_everywhere(random_lm, topk):
    text = f"The old man.{random_lm.tokenizer.bos_token}The sea was"
    rows = random_lm.to_tokens(text)
    (inside,) = (rows.tokens[0, 1:] == random_lm.bos_id).nonzero().flatten().tolist()
    left_out = {0, inside + 1}
    assert {i for i, keep in enumerate(rows.keep[0].tolist()) if not keep} == left_out
    assert not {row.position for row in sl.prompt_view(topk, random_lm, text).rows} & left_out
    assert not set(sl.attribute(topk, random_lm, text).position.tolist()) & left_out
    assert sl.dose_response(topk, random_lm, 3, [1.0], text, n_controls=0).n_tokens == rows.n_kept
    with random_lm.splice(topk, keep=rows.keep):
        wanted = random_lm.logits(rows)
    with random_lm.splice(topk):
        assert torch.equal(random_lm.logits(text), wanted)
        assert torch.equal(random_lm.module(rows.tokens).logits, wanted)
    with random_lm.splice(topk, [sl.Add(3, 4.0)], keep=rows.keep):
        wanted = random_lm.logits(rows)
    with random_lm.splice(topk, [sl.Add(3, 4.0)]):
        assert torch.equal(random_lm.logits(text), wanted)


def test_token_ids_that_the_origin_excludes_are_left_out_everywhere(random_lm, topk):
    ids = random_lm.to_tokens(TEXT).tokens
    excluded = int(ids[0, 3])
    d = sl.Dictionary.create(
        "topk", reads=sl.Port(hook=HOOK, width=48), d_sae=96, options={"k": 5}, origin=Origin(excluded_token_ids=(excluded,))
    )
    counted = (ids[0] != excluded) & (torch.arange(ids.shape[1]) > 0)
    assert sl.evaluate(d, random_lm, [TEXT], n_bootstrap=0).n_tokens == int(counted.sum())
    assert "token ids" in sl.evaluate(d, random_lm, [TEXT], n_bootstrap=0).excluded
    assert {row.position for row in sl.prompt_view(d, random_lm, TEXT).rows} == set(counted.nonzero().flatten().tolist())
    assert sl.FeatureStore.build(d, random_lm, [TEXT]).info.n_tokens == int(counted.sum())
    with random_lm.splice(d, keep=counted[None]):
        wanted = random_lm.logits(ids)
    with random_lm.splice(d):
        assert torch.equal(random_lm.logits(ids), wanted)


def test_captures_record_the_token_ids_they_leave_out(random_lm, tmp_path):
    ids = random_lm.to_tokens(TEXT).tokens
    config = TextConfig(exclude_token_ids=(int(ids[0, 3]),))
    cache = sl.capture(random_lm, [TEXT], HOOK, tmp_path / "c", text_config=config)
    assert cache.n_tokens == ids.shape[1] - 2
    assert cache.origin(HOOK).excluded_token_ids == config.exclude_token_ids


# Attention in both directions


def test_attention_is_found_to_be_causal_or_not(random_lm, bert):
    assert random_lm.is_causal
    assert not bert.is_causal
    assert all(FAMILIES[name]().is_causal for name in FAMILIES)
    gemma = {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 32}
    for both_ways in (False, True):
        config = tr.Gemma3TextConfig(**SMALL, **gemma, use_bidirectional_attention=both_ways)
        assert small(tr.Gemma3ForCausalLM, config).is_causal is not both_ways


def test_what_is_found_does_not_depend_on_hooks_in_force(random_lm):
    lm = sl.LanguageModel(random_lm.module, random_lm.tokenizer, name="again")
    with lm.replace(HOOK, lambda x: x.flip(1)):
        assert lm.is_causal
    assert "is_causal" not in vars(sl.LanguageModel(random_lm.module, random_lm.tokenizer, name="lazy"))


def test_padding_changes_nothing_where_attention_goes_both_ways(bert, tmp_path):
    """Alone, in a batch, padded on either side, captured, and in a store."""
    hook, short, long = "blocks.1.hook_resid_post", [3, 9, 27], [5, 6, 7, 8, 10, 11, 12]
    alone = bert.run([short], hook)[hook][0]
    torch.testing.assert_close(bert.run([short, long], hook)[hook][0, :3], alone)
    torch.testing.assert_close(bert.logits([short, long])[0, :3], bert.logits([short])[0])
    left = [[0] * 4 + short, long]
    mask = [[0] * 4 + [1] * 3, [1] * 7]
    torch.testing.assert_close(bert.run(left, hook, attention_mask=mask)[hook][0, 4:], alone)
    cache = sl.capture(bert, [short, long], hook, tmp_path / "c", dtype="float32")
    wanted = torch.cat([alone[1:], bert.run([long], hook)[hook][0, 1:]])
    found = next(cache.batches([hook], len(wanted), 0))[hook]
    torch.testing.assert_close(found[found[:, 0].argsort()], wanted[wanted[:, 0].argsort()])
    d = sl.Dictionary.create("topk", reads=sl.Port(hook=hook, width=32), d_sae=64, options={"k": 4})
    store = sl.FeatureStore.build(d, bert, [short, long])
    torch.testing.assert_close(store.density, (d.encode(wanted).to_dense() > 0).float().mean(0))


def test_a_row_that_ends_in_tokens_that_do_not_count_is_read_to_its_end(bert, tmp_path):
    hook, ids = "blocks.1.hook_resid_post", [[5, 6, 7, 8, 10]]
    config = TextConfig(exclude_positions=(0, 3, 4))
    cache = sl.capture(bert, ids, hook, tmp_path / "c", text_config=config, dtype="float32")
    found = next(cache.batches([hook], 2, 0))[hook]
    wanted = bert.run(ids, hook)[hook][0, 1:3]
    torch.testing.assert_close(found[found[:, 0].argsort()], wanted[wanted[:, 0].argsort()])


def test_predictions_of_a_next_token_are_refused_where_attention_goes_both_ways(bert):
    d = sl.Dictionary.create("topk", reads=sl.Port(hook=HOOK, width=32), d_sae=64, options={"k": 4})
    for call in (lambda: sl.evaluate(d, bert, [[3, 9, 27]]), lambda: sl.attribute(d, bert, [[3, 9, 27]])):
        with pytest.raises(ConfigError, match="in BertLMHeadModel every position reads the whole row"):
            call()
    assert len(sl.attribute(d, bert, [[3, 9, 27]], (5, 6), position=1).latent)


def test_positions_that_roberta_sets_aside_are_no_part_of_the_context():
    config = tr.RobertaConfig(**SMALL, intermediate_size=64, max_position_embeddings=34, pad_token_id=1)
    lm = small(tr.RobertaForCausalLM, config)
    assert lm.n_ctx == 32
    assert lm.logits([list(range(2, 34))]).shape == (1, 32, 64)
    with pytest.raises(ShapeError, match="takes at most 32"):
        lm.logits([list(range(2, 35))])


# Models without tokenizer


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    """A model of a board game: ids that stand for moves, and id 0 is one of them."""
    config = tr.GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=61, n_positions=59, bos_token_id=None, eos_token_id=None)
    lm = small(tr.GPT2LMHeadModel, config)
    folder = tmp_path_factory.mktemp("board")
    lm.module.save_pretrained(folder)
    return lm, folder


def test_a_folder_without_tokenizer_takes_ids(board, caplog):
    lm, folder = board
    with caplog.at_level(logging.WARNING):
        loaded = sl.load_model(folder)
    assert loaded.tokenizer is None
    assert "has no tokenizer" in caplog.text
    ids = torch.randint(0, 61, (4, 20))
    torch.testing.assert_close(loaded.logits(ids), lm.logits(ids))


def test_a_folder_of_another_family_without_tokenizer_takes_ids(tmp_path):
    FAMILIES["llama"]().module.save_pretrained(tmp_path)  # transformers raises an error for its tokenizer
    assert sl.load_model(tmp_path).logits([[0, 3]]).shape == (1, 2, 64)


def test_without_tokenizer_no_id_is_dropped_and_text_is_refused(board, tmp_path):
    lm, _ = board
    ids = torch.randint(1, 61, (10, 59), generator=torch.Generator().manual_seed(0))
    ids[:, 5::6] = 0
    d = sl.Dictionary.create("topk", reads=sl.Port(hook=HOOK, width=32), d_sae=64, options={"k": 4})
    assert sl.evaluate(d, lm, ids, n_bootstrap=0).n_tokens == 10 * 58
    assert sl.capture(lm, ids, HOOK, tmp_path / "c").n_tokens == 10 * 58
    store = sl.FeatureStore.build(d, lm, ids, out=tmp_path / "store")
    assert store.info.n_tokens == 10 * 58
    assert store.promoted(int(store.density.argmax()))
    store.dashboard(tmp_path / "page.html")
    view = sl.prompt_view(d, lm, ids[0])
    assert {row.position for row in view.rows} == set(range(1, 59))
    assert view.tokens[5] == sl.attribute(d, lm, ids[0], ablation=False).tokens[0][5]
    assert "0" in view.tokens[5]
    sl.dose_response(d, lm, 3, [1.0], ids[:2], n_controls=2)
    for call in (
        lambda: lm.run("e4 e5", HOOK),
        lambda: lm.to_tokens(["e4 e5"]),
        lambda: lm.generate("e4 e5"),
        lambda: sl.evaluate(d, lm, ["e4 e5"]),
        lambda: sl.attribute(d, lm, "e4 e5"),
        lambda: sl.prompt_view(d, lm, "e4 e5"),
        lambda: sl.attribute(d, lm, ids[0], ("e4", "e5")),
    ):
        with pytest.raises((TextError, ConfigError), match=r"no tokenizer|give token ids"):
            call()


def test_a_tokenizer_without_bos_and_eos_reads_text(words):
    tokenizer = tr.PreTrainedTokenizerFast(tokenizer_object=words.tokenizer.backend_tokenizer, unk_token="[UNK]")
    lm = sl.LanguageModel(words.module, tokenizer, name="without BOS")
    assert lm.to_tokens("the old man").tokens.tolist() == [[1, 2, 3]]
    assert lm.run("the old man", HOOK)[HOOK].shape == (1, 3, 32)
    assert lm.generate("the old man", 2, temperature=0).startswith("the old man")
    d = sl.Dictionary.create("topk", reads=sl.Port(hook=HOOK, width=32), d_sae=64, options={"k": 4})
    assert {row.position for row in sl.prompt_view(d, lm, "the old man").rows} == {1, 2}
    assert set(sl.attribute(d, lm, "the old man").position.tolist()) == {1, 2}
    assert sl.evaluate(d, lm, ["the old man"] * 3, n_bootstrap=0).n_tokens == 6
    with pytest.raises(ConfigError, match="no BOS token"):
        lm.to_tokens("the old man", prepend_bos=True)


def test_datasets_and_records_are_not_ids():
    for text in ([{"text": "a"}], {"train": [{"text": "a"}]}, Path("x.txt"), [Path("x.txt")], iter(["a"]), ["a", "b"], "a"):
        assert token_ids(text) is None
