"""Comparison of tokenizers: what makes the same token ids mean something else, and what does not."""

import logging

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizer, PreTrainedTokenizerFast

import saelens_lite as sl
from saelens_lite.errors import ConfigError, ShapeError
from saelens_lite.model import as_model
from saelens_lite.tokens import Tokenizer as Reader
from saelens_lite.tokens.same_ids import _warn_of_bos, difference_of_ids

CORPUS = ["the old man and the sea", "It was the best of times, it was the worst of times", "12345 <b>äöü</b>"] * 3


def fast(change=lambda backend: None, *, chat=(), **special):
    """Return a byte-level BPE tokenizer, changed in one respect, with the added tokens of a chat."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    change(backend)
    backend.add_tokens([AddedToken(token, special=True) for token in chat])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{"bos_token": "<s>", "eos_token": "</s>"} | special)


def reader(tokenizer, name="base", d_vocab=400):
    return Reader(tokenizer, name=name, n_ctx=64, d_vocab=d_vocab)


class Slow(PreTrainedTokenizer):
    """A tokenizer written in Python, of one token for each character."""

    def __init__(self, lower=False, letters="abcdefghijklmnopqrstuvwxyzT", **settings):
        self.letters, self.lower = dict(zip(letters, range(1, 100), strict=False)) | {"?": 0}, lower
        super().__init__(unk_token="?", **settings)

    @property
    def vocab_size(self):
        return len(self.letters)

    def get_vocab(self):
        return self.letters | self.added_tokens_encoder

    def _tokenize(self, text, **_):
        return list(text.lower() if self.lower else text)

    def _convert_token_to_id(self, token):
        return self.letters.get(token, 0)

    def _convert_id_to_token(self, i):
        return {i: token for token, i in self.letters.items()}[i]


def test_tokens_of_a_chat_and_another_template_do_not_matter():
    def template(backend):
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])

    chat = fast(template, chat=["<|turn|>", "<|end|>"], pad_token="<|end|>")
    one, other = reader(fast()), reader(chat, "chat", d_vocab=512)
    assert one.tokenizer_hash != other.tokenizer_hash
    assert difference_of_ids(one, other) is None
    assert difference_of_ids(other, one) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda backend: setattr(backend, "normalizer", normalizers.Lowercase()), "differ in normalizer"),
        (lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.ByteLevel()), "differ in pre_tokenizer"),
        (lambda backend: setattr(backend.model, "dropout", 0.1), "differ in model"),
    ],
)
def test_other_rules_are_refused(change, message):
    one, other = fast(), fast(change)
    assert one.get_vocab() == other.get_vocab()
    assert message in difference_of_ids(reader(one), reader(other))


def test_ids_that_stand_for_two_tokens_are_refused():
    one, other = (reader(fast(chat=[token]), name) for name, token in {"base": "<|a|>", "chat": "<|b|>"}.items())
    assert "is '<|a|>' in base, but '<|b|>' in chat" in difference_of_ids(one, other)
    moved = reader(fast(chat=["<|new|>", "<|a|>"]), "chat")
    assert "'<|a|>' is token" in difference_of_ids(one, moved)


def test_tokenizers_in_python_are_compared_by_what_they_do():
    assert difference_of_ids(reader(Slow()), reader(Slow(additional_special_tokens=["<|turn|>"]), "chat")) is None
    other = reader(Slow(lower=True), "chat")
    assert other.tokenizer_hash == reader(Slow()).tokenizer_hash
    assert 'give different ids for "The old man' in difference_of_ids(reader(Slow()), other)


def test_models_without_tokenizers_need_equally_many_ids():
    assert difference_of_ids(reader(None), reader(None, "chat")) is None
    difference = difference_of_ids(reader(None), reader(None, "chat", d_vocab=512))
    assert "base has 400 and chat 512, and neither has a tokenizer" in difference
    assert "chat has no tokenizer" in difference_of_ids(reader(fast()), reader(None, "chat"))


def test_another_first_token_is_said_once(caplog):
    _warn_of_bos.cache_clear()
    one, other = reader(fast(chat=["<|turn|>"])), reader(fast(chat=["<|turn|>"], bos_token="<|turn|>"), "chat")
    with caplog.at_level(logging.WARNING):
        assert [difference_of_ids(one, other) for _ in range(2)] == [None, None]
    assert caplog.messages == ["texts begin with '<s>', as for base; for chat they would begin with '<|turn|>'"]


def test_ids_that_one_model_lacks_are_refused():
    def lm(tokenizer, name, d_vocab):
        config = GPT2Config(vocab_size=d_vocab, n_positions=32, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=1)
        return sl.LanguageModel(GPT2LMHeadModel(config).eval(), tokenizer, name=name)

    chat = fast(chat=["<|turn|>"])
    n = len(fast())
    several = as_model({"chat": lm(chat, "tuned", n + 64), "base": lm(fast(), "base", n)})
    hook = "base:blocks.0.hook_resid_pre"
    assert several.d_vocab == n
    assert several.run(["the old man"], hook)[hook].shape[2] == 8
    with pytest.raises(ShapeError, match=f"from 0 to {n - 1}; found .* {n}, which base lacks"):
        several.run(["the old man <|turn|>"], hook)
    with pytest.raises(ShapeError, match=f"from 0 to {n - 1}"):
        several.run(torch.tensor([[5, n]]), hook)
    with pytest.raises(ConfigError, match=r"do not read the same token ids: '\?' is token"):
        as_model({"base": lm(fast(), "base", n), "chat": lm(Slow(letters="the old"), "chat", n)})
