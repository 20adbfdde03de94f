"""Tokens of a chat template: left out on request, and only those."""

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import saelens_lite as sl
from saelens_lite.config import Origin, TextConfig
from saelens_lite.errors import ConfigError

HOOK = "blocks.1.hook_resid_pre"
MARKERS = ["<s>", "<|im_start|>", "<|im_end|>", "<|head|>", "<|/head|>", "<|eot|>"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "<s>{% for m in messages %}<|head|>{{ m.role }}<|/head|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
)
PLAIN = (  # no marker around messages, and no system message
    "<s>{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system message') }}{% endif %}"
    "### {{ m.role }}:\n{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}### assistant:\n{% endif %}"
)
TALK = ["hello user, what is\n\nthis?", "an assistant (says) 7 things.", "\nuser\nthe end. ", "### ok"]
ROLES = ["user", "assistant"] * 2


def chat_model(template: str | None) -> sl.LanguageModel:
    """Return a model with a byte-level tokenizer that merges words and newlines."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges, pieces = [("Ċ", "Ċ")], ["ĊĊ"]
    for word in ("user", "assistant", "system", "###"):
        for n in range(2, len(word) + 1):
            if word[:n] not in pieces:
                merges.append((word[: n - 1], word[n - 1]))
                pieces.append(word[:n])
    vocabulary = {token: i for i, token in enumerate([*alphabet, *pieces])}
    inner = Tokenizer(models.BPE(vocabulary, merges))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(marker, special=True) for marker in MARKERS])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="<|eot|>", chat_template=template)
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=320, n_positions=256, bos_token_id=0, eos_token_id=0)
    return sl.LanguageModel(GPT2LMHeadModel(config).eval(), tokenizer, name="chat")


def conversation(lm, talk=TALK, roles=ROLES):
    """Return a rendered conversation, its token ids, and a mask of the tokens that hold a character of a message."""
    messages = [{"role": role, "content": text} for role, text in zip(roles, talk, strict=True)]
    text = lm.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=roles[-1] == "user")
    read, at, spans = lm.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True), 0, []
    for role, content in zip(roles, talk, strict=True):
        shown = content.strip() if "trim" in lm.tokenizer.chat_template else content
        at = text.index(role, at) + len(role)  # content begins behind the role
        at = text.index(shown, at)
        spans.append((at, at + len(shown)))
        at += len(shown)
    inside = [any(a < stop and start < b for a, b in spans) for start, stop in read["offset_mapping"]]
    return text, torch.tensor([read["input_ids"]]), torch.tensor([inside])


@pytest.mark.parametrize("template", [CHATML, LLAMA, PLAIN])
@pytest.mark.parametrize("n", [1, 3, 4])
def test_exactly_the_tokens_of_messages_are_kept(template, n):
    lm = chat_model(template)
    _, ids, inside = conversation(lm, TALK[:n], ROLES[:n])
    kept = lm.countable(ids, Origin(excluded_template=True, excluded_positions=()))
    if template == PLAIN and n == 4:  # ends with a lone newline, which ordinary text has too
        inside[0, -1] = True
    assert kept.tolist() == inside.tolist()
    assert int(lm.countable(ids).sum()) > int(kept.sum())


@pytest.mark.parametrize("template", [CHATML, LLAMA, PLAIN])
def test_ordinary_text_is_untouched(template):
    lm = chat_model(template)
    text = "user\nassistant: the user\n\nsystem\n### user said\n\n"
    ids = torch.tensor([lm.tokenizer.encode(text, add_special_tokens=False)])
    assert torch.equal(lm.countable(ids, Origin(excluded_template=True)), lm.countable(ids))


def test_captures_and_evaluations_leave_out_the_same_positions(tmp_path):
    lm = chat_model(CHATML)
    text, ids, inside = conversation(lm)
    cache = sl.capture(lm, [text], HOOK, tmp_path / "c", text_config=TextConfig(exclude_template=True))
    assert cache.n_tokens == int(inside.sum()) < int(lm.countable(ids, Origin(excluded_positions=())).sum())
    origin = cache.origin(HOOK)
    assert origin.excluded_template
    assert Origin(**origin.model_dump(mode="json")) == origin
    d = sl.Dictionary.create("topk", reads=sl.Port(hook=HOOK, width=16), d_sae=32, options={"k": 4}, origin=origin)
    report = sl.evaluate(d, lm, [text], n_bootstrap=0)
    assert report.n_tokens == cache.n_tokens
    assert "chat template" in report.excluded
    with lm.splice(d, keep=inside):
        wanted = lm.logits(ids)
    with lm.splice(d):
        assert torch.equal(lm.logits(ids), wanted)


def test_the_last_of_several_models_with_a_template_gives_it(tmp_path):
    models = sl.Models({"base": chat_model(None), "chat": chat_model(CHATML)})
    text, _, inside = conversation(models["chat"])
    cache = sl.capture(models, [text], HOOK, tmp_path / "c", text_config=TextConfig(exclude_template=True))
    assert cache.n_tokens == int(inside.sum())


def test_what_is_not_asked_for_is_not_written():
    assert "exclude_template" not in TextConfig().model_dump(mode="json")
    assert TextConfig(exclude_template=True).model_dump(mode="json")["exclude_template"]
    assert "excluded_template" not in Origin().model_dump(mode="json")


def test_templates_that_tell_nothing_are_refused():
    said = TextConfig(exclude_template=True)
    for template, message in (
        (None, "has no chat template"),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "no tokens around messages"),
        ("{{ messages[0].content }}", "each message once"),
        ("{% for m in", "cannot be rendered"),
    ):
        with pytest.raises(ConfigError, match=message):
            sl.tokens.token_rows(chat_model(template), ["hello"], text_config=said)
