"""Log-probabilities belong to the characters of an answer: thoughts before it, end tokens and blanks do not shift them."""

import json
import math

import pytest

import saelens_lite as sl
from saelens_lite.chat import TokenChoice
from saelens_lite.chat.generating import Prompt, _answer
from saelens_lite.chat.kept import Asked, KeptAnswers
from saelens_lite.chat.reply import read_reply
from saelens_lite.features.explaining.judging import verdicts_in

QUESTION = sl.Question("Which?", choices=("0", "1"))
ANSWER = [*'{"answers":', " [", "1", ",", " 0", ",", "1", "]}"]
P = {12: 0.75, 14: 0.25, 16: 0.625}  # of "1", by number of the token in ANSWER
WANTED = [P[i] for i in sorted(P)]
THOUGHTS = ["<think>", "\n", "Is", " it", " 1", " or", " 0", "?", " ", "1", "</think>", "\n\n"]


def item(token, p=0.5, **more):
    """Return a token as servers write it, in whose place 1 has the probability p, and 0 the rest."""
    blank = " " if token.startswith(" ") else ""
    top = [{"token": f"{blank}1", "logprob": math.log(p)}, {"token": f"{blank}0", "logprob": math.log(1 - p)}]
    return {"token": token, "logprob": math.log(1 - p if token.strip() == "0" else p), "top_logprobs": top} | more


def answer_of(content, items, **message):
    choice = {"message": {"content": content, **message}, "finish_reason": "stop", "logprobs": {"content": items}}
    return read_reply(json.dumps({"choices": [choice]}).encode(), QUESTION, 5)


ITEMS = [item(token, P.get(i, 0.5)) for i, token in enumerate(ANSWER)]
BYTES = [item(token, P.get(i, 0.5), bytes=list(token.encode())) for i, token in enumerate(ANSWER)]
THOUGHT = [item(token) for token in THOUGHTS]
EURO = [item("\\xe2\\x82", bytes=[0xE2, 0x82]), item("\\xac", bytes=[0xAC])]  # a character of two tokens
UNKNOWN = [item("�"), item("�")]
TEXT, THINKING = "".join(ANSWER), "".join(THOUGHTS)
REPLIES = {
    "plain": (TEXT, ITEMS),
    "thoughts in the text": (THINKING + TEXT, THOUGHT + ITEMS),
    "thoughts that the server leaves out of the text": (TEXT, THOUGHT + ITEMS),
    "an end token": (TEXT, [*THOUGHT, *ITEMS, item("<|im_end|>")]),
    "blanks around the text": (f" \n{TEXT}\n", ITEMS),
    "blanks that the server leaves out of the text": (TEXT, [item(" \n"), *ITEMS, item("\n\n"), item("<eos>")]),
    "characters of several tokens": (f"<think>€ 1</think>{TEXT}", [*map(item, ["<think>"]), *EURO, *THOUGHT[4:5],
                                                                  item("</think>"), *BYTES]),
    "characters in thoughts whose bytes are not known": (f"<think>€ 1</think>{TEXT}",
                                                         [item("<think>"), *UNKNOWN, item(" 1"), item("</think>"), *ITEMS]),
    "digits in words around the array": (f"1. {TEXT} 0 or 1", [item("1"), item(". "), *ITEMS, item(" 0"), item(" or"),
                                                              item(" 1")]),
    "an item that is no token": (THINKING + TEXT, [{"token": 3}, *THOUGHT[1:], *ITEMS]),
}  # fmt: skip


@pytest.mark.parametrize("name", REPLIES)
def test_each_digit_has_its_own_log_probability(name, tmp_path):
    content, items = REPLIES[name]
    answer = answer_of(content, items)
    verdicts = verdicts_in(answer, 3)
    assert [one.fires for one in verdicts] == [True, False, True]
    assert all(one.is_graded for one in verdicts)
    assert [one.p for one in verdicts] == pytest.approx(WANTED)
    known = [token for token in answer.tokens if token.start is not None]
    assert len(known) >= 3
    assert all(answer.text.startswith(token.text.strip(), token.start) for token in known)
    kept, asked = KeptAnswers(tmp_path), Asked.of(QUESTION)
    kept.put(asked, answer)
    assert kept.get(asked.key) == answer._replace(was_kept=True)


def test_tokens_of_thoughts_that_are_not_in_the_text_are_left_out():
    answer = answer_of(TEXT, THOUGHT + ITEMS, reasoning_content=THINKING)
    assert [token.text for token in answer.tokens] == ["1", " 0", "1"]
    assert [token.start for token in answer.tokens] == [TEXT.index("1"), TEXT.index("0"), TEXT.rindex("1")]
    alone = answer_of("1", [*THOUGHT, item(" 1", 0.875), item("</s>")])
    assert [(token.start, token.log_p[" 1"]) for token in alone.tokens] == [(0, math.log(0.875))]


def test_tokens_that_do_not_spell_the_text_have_no_place():
    """Neither is any of them taken for another digit."""
    answer = answer_of(TEXT, [*map(item, ["x", "1", "y", " 0", "1", "z"])])
    assert [(token.text, token.start) for token in answer.tokens] == [("1", None), (" 0", None), ("1", None)]
    swapped = answer_of(TEXT, [*ITEMS[:12], ITEMS[14], *ITEMS[13:]])
    assert not any(one.is_graded for one in verdicts_in(swapped, 3))


def test_kept_answers_of_earlier_versions_are_read(tmp_path):
    kept, asked = KeptAnswers(tmp_path), Asked.of(QUESTION)
    answer = answer_of(TEXT, ITEMS)
    kept.put(asked, answer)
    (path,) = tmp_path.rglob("*.json")
    value = json.loads(path.read_text())
    for damaged in (None, -1, 1.0, True, "3"):
        value["answer"]["tokens"] = [[text, log_p, damaged] for text, log_p, _ in value["answer"]["tokens"]]
        path.write_text(json.dumps(value))
        assert [token.start for token in kept.get(asked.key).tokens] == [None] * 3
    value["answer"]["tokens"] = [[text, log_p] for text, log_p, _ in value["answer"]["tokens"]]  # as they were
    path.write_text(json.dumps(value))
    old = kept.get(asked.key)
    assert old.tokens == tuple(token._replace(start=None) for token in answer.tokens)
    assert verdicts_in(old, 3) == verdicts_in(answer, 3)


@pytest.mark.parametrize("text", ["[1, 0]", " \n\n<think>1 or 0?</think> [0,1]", "1 0\n 1 1\n0", "é € 1 0", "\n1 0 1\n"])
@pytest.mark.parametrize("by_line", [False, True])
def test_tokens_of_local_models_have_their_places(lm, text, by_line):
    ids = lm.tokenizer(text)["input_ids"]
    tokens = [lm.decode([token]) for token in ids]
    seen = {i: TokenChoice(token, {token: -0.1}) for i, token in enumerate(tokens) if token.strip() in ("0", "1")}
    answer = _answer(lm, Prompt(QUESTION, [5, 6], len(ids) + 1), [*ids, lm.bos_id], {lm.bos_id}, by_line, seen)
    n_wanted = sum(char in "01" for char in answer.text)
    assert len(answer.tokens) == n_wanted == len({token.start for token in answer.tokens})
    assert all(answer.text[token.start] == token.text.strip() for token in answer.tokens)
