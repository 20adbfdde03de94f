"""Local chat models: their answers are those of a plain greedy loop, alone or in batches, with or without a chat template."""

import copy

import pytest
import torch

import saelens_lite as sl
from saelens_lite.chat import TokenChoice
from saelens_lite.chat.generating import Prompt, _answer
from saelens_lite.errors import ConfigError, TextError

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE


def with_template(lm, template):
    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.chat_template = template
    return sl.LanguageModel(lm.module, tokenizer, name=f"{lm.name} that chats")


def greedy(lm, ids, n):
    """Return n tokens and the log-probabilities in their places, one pass over the whole row for each."""
    ids, places = list(ids), []
    for _ in range(n):
        log_p = lm.logits(torch.tensor([ids]))[0, -1].double().log_softmax(-1)
        places.append(log_p)
        ids.append(int(log_p.argmax()))
    return ids[-n:], places


@pytest.fixture
def questions():
    return [sl.Question("Name a colour. " * (i % 4 + 1) + str(i), max_tokens=6 + i) for i in range(9)]


def test_answers_of_a_batch_are_those_of_a_plain_greedy_loop(lm, questions, tmp_path):
    chatting = with_template(lm, TEMPLATE)
    seen = []
    for question in questions:
        ids = lm.tokenizer(f"<user>{question.user}\n<assistant>")["input_ids"]
        tokens, _ = greedy(lm, ids, question.max_tokens)
        text = lm.decode(tokens)
        seen.append(text.strip())
        asked = question._replace(choices=(text.strip(),))  # an answer that is a choice as a whole may end at its limit
        alone = sl.local_chat_model(chatting, folder=tmp_path / "alone", batch_size=1).ask([asked])[0]
        assert (alone.text, alone.n_input, alone.n_output) == (text.strip(), len(ids), question.max_tokens)
    choices = [q._replace(choices=(text,)) for q, text in zip(questions, seen, strict=True)]
    together = sl.local_chat_model(chatting, folder=tmp_path / "together", batch_size=4).ask(choices)
    assert [answer.text for answer in together] == seen
    assert len(set(seen)) > 1


def test_an_answer_ends_at_an_end_token_and_is_cut_at_its_limit(lm, tmp_path):
    chatting = with_template(lm, TEMPLATE)
    question = sl.Question("Name a colour.", max_tokens=5)
    tokens, _ = greedy(lm, lm.tokenizer("<user>Name a colour.\n<assistant>")["input_ids"], 5)
    cut = sl.local_chat_model(chatting, folder=tmp_path).ask([question])[0]
    assert (cut.text, cut.failure, cut.n_output) == (None, "cut", 5)
    end = next(token for token in tokens[1:] if token != tokens[0])
    before, chatting.tokenizer.eos_token = chatting.tokenizer.eos_token, lm.tokenizer.convert_ids_to_tokens(end)
    assert before != chatting.tokenizer.eos_token
    answer = sl.local_chat_model(chatting, folder=tmp_path).ask([question])[0]
    n = tokens.index(end)
    assert (answer.text, answer.n_output) == (lm.decode(tokens[:n]).strip(), n)


def test_without_a_template_an_answer_ends_with_its_line(lm, tmp_path):
    model = sl.local_chat_model(lm, folder=tmp_path)
    question = sl.Question("Line one.\nLine two.", "Be brief.", max_tokens=120)
    ids = [lm.bos_id, *lm.tokenizer("Be brief.\n\nLine one.\nLine two.\n\nAnswer:")["input_ids"]]
    tokens, _ = greedy(lm, ids, 120)
    answer = model.ask([question])[0]
    assert answer.text == lm.decode(tokens).strip().partition("\n")[0].strip()
    assert answer.n_input == len(ids)
    assert model.estimate([question, question._replace(user="Two")]).n_questions == 1


def test_log_probabilities_of_choices_are_those_of_the_model(lm, tmp_path):
    chatting = with_template(lm, TEMPLATE)
    ids = lm.tokenizer("<user>Say it\n<assistant>")["input_ids"]
    tokens, places = greedy(lm, ids, 8)
    third = lm.decode(tokens[2:3])
    other = next(t for t in (" zebra", " seven", " lamp", " go") if len(lm.tokenizer(t)["input_ids"]) == 1)
    question = sl.Question("Say it", choices=(third.strip(), other.strip(), lm.decode(tokens).strip()), max_tokens=8)
    answer = sl.local_chat_model(chatting, folder=tmp_path).ask([question])[0]
    at = [i for i, token in enumerate(tokens) if lm.decode([token]).strip() in question.choices]
    assert [token.text for token in answer.tokens] == [lm.decode([tokens[i]]) for i in at]
    assert 2 in at
    for i, token in zip(at, answer.tokens, strict=True):
        for text in (token.text, other):
            expected = float(places[i][lm.tokenizer(text)["input_ids"][0]])
            assert token.log_p[text] == pytest.approx(expected, abs=2e-4)


def test_a_template_without_system_messages_gets_them_in_the_user_message(lm, tmp_path):
    question = sl.Question("Name a colour.", "Be brief.", max_tokens=4)
    merged = sl.Question("Be brief.\n\nName a colour.", max_tokens=4)
    strict = sl.local_chat_model(with_template(lm, STRICT), folder=tmp_path)
    assert strict.ask([question])[0].n_input == strict.ask([merged])[0].n_input


def test_kept_answers_are_of_one_model_and_survive_in_the_folder(lm, random_lm, tmp_path, monkeypatch):
    question = sl.Question("Name a colour.", max_tokens=4)
    first = sl.local_chat_model(lm, folder=tmp_path).ask([question, question])
    assert [answer.was_kept for answer in first] == [False, True]
    monkeypatch.setattr("saelens_lite.chat.generating.answers_of", lambda *_: pytest.fail("the model was asked"))
    again = sl.local_chat_model(lm, folder=tmp_path).ask([question])
    assert again == [first[0]._replace(was_kept=True)]
    assert sl.local_chat_model(random_lm, folder=tmp_path).estimate([question]).n_questions == 1


def test_active_splices_do_not_change_answers(lm, tmp_path):
    question = sl.Question("Name a colour.", max_tokens=4)
    plain = sl.local_chat_model(lm, folder=tmp_path / "plain").ask([question])
    with lm.replace("blocks.2.hook_resid_pre", lambda x: x * 0):
        assert sl.local_chat_model(lm, folder=tmp_path / "spliced").ask([question]) == plain


def test_questions_that_fill_the_context_fail_alone(random_lm, tmp_path):
    model = sl.local_chat_model(random_lm, folder=tmp_path)  # 40 tokens
    long, short = sl.Question("word " * 60), sl.Question("Yes?", max_tokens=500)
    answers = model.ask([long, short, sl.Question("Yes? " * 9, max_tokens=30)])
    assert answers[0].failure == "too long"
    assert all(answer.n_output <= 40 - answer.n_input for answer in answers[1:])


def test_models_that_cannot_chat_are_refused(lm, tmp_path):
    with pytest.raises(TextError, match="no tokenizer"):
        sl.local_chat_model(sl.LanguageModel(lm.module, None, name="mute"), folder=tmp_path)
    with pytest.raises(ConfigError, match="batch_size = 0"):
        sl.local_chat_model(lm, batch_size=0)
    with pytest.raises(ConfigError, match="cannot be rendered"):
        sl.local_chat_model(with_template(lm, "{{ raise_exception('never') }}"), folder=tmp_path).ask([sl.Question("a")])


def test_log_probabilities_end_with_the_line_as_the_answer_does(lm):
    """Without a template, tokens after the line are no part of the answer, neither are their log-probabilities."""
    ids = lm.tokenizer("1 0\n1 1\n0")["input_ids"]
    texts = [lm.decode([token]) for token in ids]
    seen = {i: TokenChoice(text, {text: -0.1}) for i, text in enumerate(texts) if text.strip() in ("0", "1")}
    prompt = Prompt(sl.Question("Which?", choices=("0", "1")), [5, 6, 7], len(ids))
    answer = _answer(lm, prompt, ids, set(), True, seen)
    assert answer.text == "1 0"
    assert [token.text.strip() for token in answer.tokens] == ["1", "0"]
    assert answer.n_output == next(n for n in range(len(ids)) if "\n" in lm.decode(ids[:n]))
    whole = _answer(lm, prompt, ids, {ids[-1]}, False, seen)
    assert (whole.text, len(whole.tokens)) == ("1 0\n1 1", 4)
