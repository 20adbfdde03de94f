"""Chat models behind a real endpoint on the loopback interface: faults, limits, keys, structured output, kept answers."""

import json
import logging
import os
import re
import signal
import sys
import threading
import time
from email.utils import formatdate
from math import log
from pathlib import Path

import chat_faults
import pytest
from chat_server import FAULTS, Plan, Reply, question_hash, running_chat

import saelens_lite as sl
from saelens_lite.chat import EndpointModel
from saelens_lite.chat.connection import Dialect
from saelens_lite.chat.counting import expected_tokens
from saelens_lite.chat.kept import KeptAnswers, usual_folder
from saelens_lite.chat.pace import Pace
from saelens_lite.chat.reply import read_reply
from saelens_lite.chat.waits import demanded_wait, wait_before
from saelens_lite.errors import (
    BudgetError,
    BudgetReachedError,
    ChatAccessError,
    ChatError,
    ChatUnreachableError,
    ConfigError,
    DiskFullError,
    OutputExistsError,
    Stopped,
)

KEY = "sk-akeythatnobodymaysee"


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "SAELENS_LITE_ANSWERS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("keyring.get_password", lambda service, name: None)


@pytest.fixture
def server():
    with running_chat(lateness=0.6) as running:
        yield running


@pytest.fixture
def connect(server, tmp_path):
    """connect(**settings) → a chat model of the server that does not wait between attempts."""
    return lambda **settings: sl.chat_model(
        "judge", **{"base_url": server.url, "folder": str(tmp_path / "kept"), "backoff": 0.0, **settings}
    )


def questions(n, **others):
    return [sl.Question(f"question {i}", **others) for i in range(n)]


def messages(question):
    system = [{"role": "system", "content": question.system}] if question.system else []
    return [*system, {"role": "user", "content": question.user}]


def expected(asked):
    return [f"reply {question_hash(messages(question))}" for question in asked]


def test_answers_are_in_the_order_of_the_questions_and_sent_once(server, connect):
    asked = [*questions(12), sl.Question("question 3"), sl.Question("question 3", "a system message")]
    model = connect(concurrency=4)
    answers = model.ask(asked)
    assert [answer.text for answer in answers] == expected(asked)
    assert [answer.was_kept for answer in answers] == [False] * 12 + [True, False]
    assert set(server.asked.values()) == {1}
    assert server.requests[0] == {
        "model": "judge",
        "messages": server.requests[0]["messages"],
        "temperature": 0.0,
        "seed": 0,
        "max_tokens": 512,
    }
    assert model.spent[:2] == (sum(a.n_input for a in answers[:-2]) + answers[-1].n_input, 2 * 13)


def test_at_most_so_many_requests_are_in_progress(server, connect):
    server.delay = 0.05
    connect(concurrency=3).ask(questions(12))
    assert server.most_running == 3


@pytest.mark.parametrize("fault", FAULTS)
def test_a_request_is_repeated_after_a_fault(server, connect, fault):
    server.order(fault, fault)
    answers = connect(timeout=0.3).ask(questions(1))
    assert [answer.text for answer in answers] == expected(questions(1))
    assert server.met == {fault: 2, "none": 1}


@pytest.mark.parametrize(
    ("fault", "failure"),
    [
        ("500", r"status 500 \(a planned fault\), 3 times"),
        ("late", "no reply within 0.3 seconds, 3 times"),
        ("malformed", "a malformed reply"),
        ("no choices", r"a malformed reply \(no choices\), 3 times"),
        ("wrong types", "message is a list"),
        ("cut on the way", "the connection broke"),
    ],
)
def test_a_question_fails_alone_after_the_last_attempt(server, connect, fault, failure, caplog):
    bad = question_hash(messages(sl.Question("question 1")))
    server.plan = lambda question, n: fault if question == bad else None
    model = connect(retries=2, timeout=0.3)
    model.ask([sl.Question("before")])
    caplog.clear()
    answers = model.ask(questions(3))
    assert [answer.text is None for answer in answers] == [False, True, False]
    assert answers[1].failure
    assert re.search(failure, answers[1].failure)
    assert server.asked[bad] == 3
    assert "1 of 3 questions to judge have no usable answer" in caplog.text
    server.plan = None
    assert [a.text for a in model.ask(questions(3))] == expected(questions(3))  # failures are not kept
    assert server.asked[bad] == 4


@pytest.mark.parametrize(
    ("fault", "failure"), [("refused", "refused"), ("filter", "refused"), ("length", "cut"), ("empty", "empty")]
)
def test_whole_replies_without_a_usable_answer_are_kept(server, connect, fault, failure):
    server.order(fault)
    answer = connect().ask(questions(1))[0]
    assert (answer.text, answer.failure, answer.was_kept) == (None, failure, False)
    assert connect().ask(questions(1))[0] == answer._replace(was_kept=True)
    assert len(server.requests) == 1
    assert connect(ask_again=True).ask(questions(1))[0].text == expected(questions(1))[0]
    assert connect().ask(questions(1))[0].text == expected(questions(1))[0]
    assert len(server.requests) == 2


def test_a_single_choice_is_whole_at_the_limit_of_tokens(server, connect):
    server.reply = lambda messages, body: Reply(" Yes", "length", tokens=[(" Yes", {" Yes": log(0.7), " No": log(0.3)})])
    plain, choosing = connect().ask([sl.Question("a", max_tokens=1), sl.Question("a", choices=("Yes", "No"), max_tokens=1)])
    assert (plain.failure, choosing.text) == ("cut", " Yes")
    assert choosing.tokens[0].text == " Yes"
    assert choosing.tokens[0].log_p == pytest.approx({" Yes": log(0.7), " No": log(0.3)})
    assert connect().ask([sl.Question("a", choices=("Yes", "No"), max_tokens=1)]) == [choosing._replace(was_kept=True)]


@pytest.mark.parametrize("fault", ["429", "429 with a date"])
def test_a_demanded_wait_is_kept_by_all_requests(server, connect, fault):
    server.retry_after = "2" if fault.endswith("date") else "1"  # dates are in whole seconds
    server.order(fault)
    began = time.monotonic()
    connect(concurrency=1).ask(questions(2))
    assert time.monotonic() - began >= 0.9


def test_a_demanded_wait_that_is_too_long_ends_the_call(server, connect):
    server.retry_after = "3600"
    server.order("429")
    with pytest.raises(ChatUnreachableError, match=r"demands a wait of 3,600 seconds .*longest_wait = 120.*0 of 1 questions"):
        connect().ask(questions(1))


def test_waits_double_and_vary():
    waits = [[wait_before(n, 1.0, 10.0) for _ in range(200)] for n in range(6)]
    for n, drawn in enumerate(waits):
        whole = min(10.0, 2.0**n)
        assert whole / 2 <= min(drawn) < max(drawn) <= whole
        assert max(drawn) - min(drawn) > whole / 4
    assert wait_before(0, 1.0, 10.0, demanded=7.0) == 7.0
    assert demanded_wait("2.5") == 2.5
    assert demanded_wait(formatdate(time.time() + 100, usegmt=True)) == pytest.approx(100, abs=2)
    assert demanded_wait(formatdate(time.time() - 100, usegmt=True)) == 0
    assert [demanded_wait(header) for header in (None, "soon", "nan", "inf")] == [None] * 4


def test_a_wrong_port_is_an_error_at_once(connect):
    began = time.monotonic()
    with pytest.raises(
        ChatUnreachableError,
        match=r"127\.0\.0\.1:9/v1 does not answer questions to judge as it should: no connection .*check the",
    ):
        connect(base_url="http://127.0.0.1:9/v1", retries=50).ask(questions(1000))
    assert time.monotonic() - began < 20


def test_a_name_without_an_address_is_an_error_at_once(connect, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(ChatUnreachableError, match="no connection"):
        connect(base_url="http://nowhere.invalid/v1", retries=50).ask(questions(100))


def test_an_endpoint_that_fails_always_ends_the_call(server, connect):
    server.plan = lambda question, n: "503"
    with pytest.raises(ChatUnreachableError, match="status 503"):
        connect(retries=1).ask(questions(300))
    assert len(server.requests) < 60


@pytest.mark.parametrize("n", [1, 3])
def test_an_endpoint_that_fails_on_all_of_a_few_questions_ends_the_call(server, connect, n):
    server.plan = lambda question, n: "500"
    with pytest.raises(ChatUnreachableError, match=r"status 500 \(a planned fault\).*the name of the model"):
        connect(retries=1).ask(questions(n))
    server.plan = None
    assert connect().ask(questions(5))[0].text
    server.plan = lambda question, n: "late"
    answers = connect(retries=1, timeout=0.2).ask(questions(7))  # five are kept, so the endpoint is known to work
    assert [answer.failure for answer in answers] == [None] * 5 + ["no reply within 0.2 seconds, 2 times"] * 2


def test_a_server_that_answers_one_question_at_a_time_gets_fewer(server, connect, caplog):
    server.delay, server.one_at_a_time = 0.04, True
    asked = questions(24)
    answers = connect(concurrency=24, timeout=0.4, retries=6).ask(asked)
    assert [answer.text for answer in answers] == expected(asked)
    assert len(server.requests) < 24 * 4
    assert "a longer timeout may be better" in caplog.text


def test_a_single_late_answer_leaves_the_pace_as_it_is(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("saelens_lite.chat.pace.time.monotonic", lambda: now[0])
    pace = Pace(4, timeout=10.0)
    for _ in range(8):
        now[0] += 2
        pace.begin()
        pace.answered(now[0] - 2)
        pace.end()
    pace.timed_out(now[0] - 10)
    assert pace.now == 4  # five answers in the ten seconds
    pace.timed_out(now[0] - 3)
    assert pace.now == 2
    for running, waited, after in ((2, 4.0, 2), (2, 1.0, 3), (2, 1.0, 3), (3, 9.0, 3), (3, 1.0, 4), (4, 1.0, 4)):
        for _ in range(running):
            pace.begin()
        pace.answered(now[0] - waited)
        for _ in range(running):
            pace.end()
        assert pace.now == after


def test_a_wrong_path_and_a_missing_model_are_errors_at_once(server, connect):
    with pytest.raises(ChatError, match=r"has no model 'judge', or is not the address of an endpoint.*often ends with /v1"):
        connect(base_url=server.url.removesuffix("/v1")).ask(questions(50))
    server.models = ("other",)
    with pytest.raises(ChatError, match=r"has no model 'judge'.*does not exist"):
        connect().ask(questions(50))
    assert len(server.requests) <= 16
    assert server.paid.total() == 0


def test_a_wrong_key_is_an_error_at_once_and_is_not_shown(server, connect, monkeypatch, caplog, tmp_path):
    caplog.set_level(logging.DEBUG)
    server.key = KEY
    with pytest.raises(ChatAccessError, match=r"status 401.*is the key in OPENAI_API_KEY valid"):
        connect().ask(questions(50))
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}wrong")
    with pytest.raises(ChatAccessError) as refused:
        connect().ask(questions(3))
    assert KEY not in str(refused.value)
    monkeypatch.setenv("OTHER_KEY", KEY)
    model = connect(key_variable="OTHER_KEY")
    assert [answer.text for answer in model.ask(questions(3))] == expected(questions(3))
    assert KEY not in caplog.text
    assert KEY not in "".join(path.read_text() for path in tmp_path.rglob("*.json"))
    assert KEY not in f"{model.config!r} {vars(model)!r}"


def test_the_key_may_be_in_the_keyring(server, connect, monkeypatch):
    server.key = KEY
    monkeypatch.setattr(
        "keyring.get_password", lambda service, name: KEY if (service, name) == ("saelens_lite", "OPENAI_API_KEY") else None
    )
    assert connect().ask(questions(1))[0].text

    def locked(service, name):
        raise RuntimeError("the keyring is locked")

    monkeypatch.setattr("keyring.get_password", locked)
    with pytest.raises(ChatAccessError, match="401"):
        connect().ask(questions(2))


def test_without_a_key_nothing_is_sent_to_another_computer(connect, monkeypatch):
    monkeypatch.setattr("saelens_lite.chat.endpoint.Connection", lambda *_: pytest.fail("connected"))
    with pytest.raises(
        ChatAccessError, match=r"no key for https://api.openai.com/v1: set the environment variable OPENAI_API_KEY"
    ):
        connect(base_url=None).ask(questions(1))
    monkeypatch.setenv("OPENAI_BASE_URL", "https://models.example/v1")
    with pytest.raises(
        ChatAccessError, match=r"no key for https://models\.example/v1.*variable THEIR_KEY.*keyring set saelens_lite"
    ):
        connect(base_url=None, key_variable="THEIR_KEY").ask(questions(1))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"base_url": "localhost:8000"}, "expected an address such as http://localhost:8000/v1"),
        ({"base_url": ""}, "base_url is empty; expected an address"),
        ({"base_url": f"http://me:{KEY}@host/v1"}, "without a name, password"),
        ({"dollar_limit": 1.0}, "dollar_limit needs input_price and output_price"),
        ({"concurency": 3}, "unknown key 'concurency'; did you mean concurrency"),
        ({"api_key": KEY}, "unknown key 'api_key'"),
        ({"timeout": 0}, "timeout = 0"),
    ],
)
def test_wrong_settings_are_errors(settings, said):
    with pytest.raises(ConfigError, match=said) as wrong:
        sl.chat_model("judge", **settings)
    assert KEY not in str(wrong.value)


@pytest.mark.parametrize(
    "address",
    [
        *("http://[::1/v1", "http://localhost:port/v1", "http://localhost:99999/v1", "http://localhost:0/v1", "http:///v1"),
        *("http://host\x07/v1", "http://host /v1", "http://höst/v1", "http://999.1.1.1/v1", "http://a..b/v1", "ftp://host/v1"),
        *(f"http://{'a' * 64}.example/v1", f"https://host/{'a' * 3000}", "http://[::zz]/v1", "http://a%20b/v1", "//host/v1"),
        *(f"{KEY}@host/v1", f"me:{KEY}@host", f"http://@{KEY}/v1", f"http://host/{KEY}?", f"http://{KEY}:x@h:x/v1", KEY),
    ],
)
def test_an_address_that_is_none_is_refused_and_not_shown(address, monkeypatch):
    with pytest.raises(ConfigError, match=r"^base_url.* expected an address") as wrong:
        sl.chat_model("judge", base_url=address)
    assert address not in str(wrong.value)
    assert KEY not in str(wrong.value)
    monkeypatch.setenv("OPENAI_BASE_URL", address)
    if address.isprintable():
        with pytest.raises(ConfigError, match="the environment variable OPENAI_BASE_URL"):
            sl.chat_model("judge")
    with pytest.raises(ConfigError, match="base_url") as wrong:
        sl.chat_model("judge", base_url=address, dollar_limit=1)
    assert KEY not in str(wrong.value)


@pytest.mark.parametrize(
    "address", ["http://[::1]:8000/v1", "https://a-b.my_host.example./v1/", "http://10.0.0.1", "HTTP://h:1"]
)
def test_addresses_of_servers_are_accepted(address, monkeypatch):
    assert sl.chat_model("judge", base_url=address).config.base_url == address.rstrip("/")
    monkeypatch.setenv("OPENAI_BASE_URL", address)
    assert sl.chat_model("judge").config.base_url == address.rstrip("/")
    monkeypatch.setenv("OPENAI_BASE_URL", "")
    assert sl.chat_model("judge").config.base_url == "https://api.openai.com/v1"


@pytest.mark.parametrize("key", [f"{KEY}\nmore{KEY}", f"{KEY}é", f"{KEY}\x7f", f"{KEY}\r\nHost: other"])
@pytest.mark.parametrize("place", ["environment", "keyring"])
def test_a_key_that_cannot_be_sent_is_refused_and_not_shown(server, connect, monkeypatch, key, place):
    if place == "keyring":
        monkeypatch.setattr("keyring.get_password", lambda service, name: key)
    else:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ChatAccessError, match="the key in OPENAI_API_KEY has characters that no key has") as refused:
        connect().ask(questions(1))
    assert KEY not in str(refused.value)
    assert server.requests == []


def test_numbers_that_cannot_be_log_probabilities_or_counts_are_left_out(server, connect, tmp_path, monkeypatch):
    """A token whose every number is wrong has none; the others keep those that can be right."""
    good = {"1": -0.25, "0": 5e-4, "big": 1e3, "huge": 10**400, "small": -1e4, "text": "-1", "yes": True, "none": None}
    server.reply = lambda messages, body: Reply("1", tokens=[("1", dict(good))])
    monkeypatch.setattr("chat_server._token", odd_token)
    asked = [sl.Question("a", choices=("0", "1"))]
    answer = connect().ask(asked)[0]
    assert [token.log_p for token in answer.tokens] == [{"1": -0.25, "0": 0.0}]
    (path,) = (tmp_path / "kept").rglob("*.json")
    kept = json.loads(path.read_text())
    kept["answer"]["tokens"][0][1] |= good
    path.write_text(json.dumps(kept))
    assert connect().ask(asked) == [answer._replace(was_kept=True)]
    for n in (-1, 10**9, 10**400, True, 2.0):
        kept["answer"]["n_output"] = n
        path.write_text(json.dumps(kept))
        assert connect().estimate(asked).n_questions == 1


def odd_token(text, log_p, n_top):
    return {"token": text, "logprob": 1e3, "top_logprobs": [{"token": t, "logprob": p} for t, p in log_p.items()]}


@pytest.mark.parametrize("n", [-1, 10**9, 10**400, True, 2.0, "3", None])
def test_counts_of_a_server_that_cannot_be_tokens_are_estimated(n):
    reply = {"choices": [{"message": {"content": "12345"}}], "usage": {"prompt_tokens": n, "completion_tokens": n}}
    answer = read_reply(json.dumps(reply).encode(), sl.Question("a"), 17)
    assert (answer.text, answer.n_input, answer.n_output) == ("12345", 17, 3)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), PermissionError(13, "Permission denied")])
def test_a_folder_that_cannot_be_made_ends_the_call_in_words(server, connect, monkeypatch, error):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(DiskFullError if error.errno == 28 else ConfigError, match=r"the folder .* cannot be made"):
        connect().ask(questions(1))


def test_a_file_in_the_place_of_a_folder_ends_the_call_in_words(server, connect, tmp_path):
    connect().ask(questions(1))
    (path,) = (tmp_path / "kept").rglob("*.json")
    path.unlink()
    path.parent.rmdir()
    path.parent.write_text("")
    with pytest.raises(ConfigError, match=r"cannot be made.*0 of 1 questions"):
        connect().ask(questions(1))


def test_after_an_unexpected_fault_replies_in_progress_are_kept(server, connect, monkeypatch):
    usual, server.delay = KeptAnswers.put, 0.3
    first = threading.Lock()

    def put(self, asked, answer):
        if first.acquire(blocking=False):
            raise RuntimeError("a fault of the program")
        usual(self, asked, answer)

    monkeypatch.setattr(KeptAnswers, "put", put)
    with pytest.raises(RuntimeError, match="a fault of the program"):
        connect(concurrency=4).ask(questions(40))
    assert len(server.requests) == 4
    assert connect().estimate(questions(4)).n_questions == 1


@pytest.mark.parametrize(
    ("status", "refusal", "param", "learned"),
    [
        (400, "Unsupported parameter", "seed", True),
        (400, "Unrecognized request argument supplied: 'seed'", None, True),
        (
            422,
            json.dumps({"detail": [{"loc": ["body", "seed"], "msg": "Extra inputs are not permitted", "input": 0}]}),
            None,
            True,
        ),
        (422, json.dumps({"message": 'Unknown field "seed": not permitted'}), None, True),
        (400, "'seed' is not what is wrong", "model", False),
        (404, "Unsupported parameter: 'seed'", "seed", False),
        (400, "the model was seeded badly; the seed does not matter", None, False),
        (400, json.dumps({"message": "bad model", "input": {"model": "judge", "seed": 0}}), None, False),
        (400, json.dumps({"message": json.dumps({"model": "judge", "seed": 0})}), None, False),
        (400, str({"messages": [{"role": "user", "content": "the word 'seed'"}]}), None, False),
    ],
)
def test_a_field_is_left_out_only_if_the_server_refuses_that_field(status, refusal, param, learned):
    dialect = Dialect("auto")
    body = dialect.body(sl.chat.ChatConfig(model="judge"), sl.Question("a"))
    assert dialect.learns(body, refusal, status, param) == learned
    assert dialect.left_out == ({"seed"} if learned else set())


def test_structured_output_is_asked_for_and_left_out_if_refused(server, connect, caplog):
    schema = {
        "type": "object",
        "properties": {"label": {"type": "string"}},
        "required": ["label"],
        "additionalProperties": False,
    }
    asked = questions(6, schema=schema)
    connect().ask(asked[:1])
    assert server.requests[0]["response_format"]["json_schema"]["schema"] == schema
    server.refused = ("response_format",)
    model = connect(concurrency=2)
    assert [answer.text for answer in model.ask(asked)] == expected(asked)
    assert sum("response_format" in body for body in server.requests[1:]) in (2, 3, 4)  # two forms
    assert caplog.text.count("it offers no structured output") == 1
    server.forget()
    model.ask(questions(2, schema={"type": "string"}))
    assert not any("response_format" in body for body in server.requests)
    with pytest.raises(ChatError, match=r"status 400.*response_format"):
        connect(structured="on").ask(questions(1, schema={"type": "number"}))
    server.forget()
    connect(structured="off").ask(questions(1, schema={"type": "number"}))
    assert "response_format" not in server.requests[0]


def test_the_other_form_of_structured_output_is_used_where_the_first_is_a_fault_500(server, connect, caplog):
    schema = {"type": "object", "properties": {"label": {"type": "string"}}}
    server.forms = ("text", "json_object")
    model = connect(concurrency=3, structured="on")
    asked = questions(6, schema=schema)
    assert [answer.text for answer in model.ask(asked)] == expected(asked)
    assert server.requests[-1]["response_format"] == {"type": "json_object", "schema": schema}
    assert len(server.requests) <= 6 + 3
    assert not caplog.text
    server.forms = ("text",)
    with pytest.raises(ChatError, match=r"status 500.*Input should be 'text'"):
        connect(structured="on").ask(questions(1, schema={"type": "number"}))
    assert connect().ask(questions(1, schema={"type": "string"}))[0].text
    assert "it offers no structured output" in caplog.text


def test_a_fault_500_that_repeats_the_request_leaves_nothing_out():
    dialect = Dialect("auto")
    question = sl.Question("a", schema={"type": "object"}, choices=("0", "1"))
    body = dialect.body(sl.chat.ChatConfig(model="judge"), question)
    assert not dialect.learns(body, f"the worker died while it ran {json.dumps(body)}", 500)
    assert dialect.learns(body, "logprobs is not supported for models created with logits_all=False", 500)
    assert dialect.body(sl.chat.ChatConfig(model="judge"), question)["top_logprobs"] == 5


def test_log_probabilities_are_left_out_if_refused(server, connect, caplog):
    server.reply = lambda messages, body: "Yes, no"
    asked = questions(1, choices=("Yes", "no"))
    answer = connect().ask(asked)[0]
    assert [token.text for token in answer.tokens] == ["Yes", " no"]
    assert server.requests[0]["top_logprobs"] == 20
    server.refused = ("top_logprobs",)
    model = connect(seed=1)
    assert model.ask(asked)[0].tokens is None
    assert [body.get("top_logprobs") for body in server.requests[1:]] == [20, 5, None]
    model.ask(questions(3, choices=("no",)))
    assert len(server.requests) == 7
    assert caplog.text.count("it offers no log-probabilities") == 1


def test_other_fields_that_a_server_refuses_are_left_out(server, connect, caplog):
    server.refused = ("seed", "temperature")
    assert connect().ask(questions(1))[0].text
    assert not {"seed", "temperature"} & server.requests[-1].keys()
    assert "temperature, so its answers vary" in caplog.text
    server.refused = ("model",)
    with pytest.raises(ChatError, match="status 400"):
        connect(seed=2).ask(questions(1))


def test_the_estimate_counts_what_is_not_kept(server, connect):
    model = connect(input_price=2.0, output_price=10.0)
    asked = [
        sl.Question("x" * 400, max_tokens=50),
        sl.Question("y" * 400, max_tokens=50),
        sl.Question("y" * 400, max_tokens=50),
    ]
    assert model.estimate(asked) == (2, 2 * 75, 100, pytest.approx((150 * 2 + 100 * 10) / 1e6))
    model.ask(asked[:1])
    assert model.estimate(asked)[:3] == (1, 75, 50)
    assert model.spent.dollars == pytest.approx((model.spent.n_input * 2 + model.spent.n_output * 10) / 1e6)
    counting = sl.chat_model(
        "judge", base_url=server.url, folder=model.config.folder, count_tokens=lambda text: text.count("y")
    )
    assert counting.estimate(asked).n_input == 408


@pytest.mark.parametrize(
    ("text", "counted"),  # by the tokenizers of SmolLM2, DeepSeek and Claude 2
    [
        (
            '{"context": "self.assert«Equal»(x, y)\\\\n    def « test»_open(self):\\\\n", '
            '"activations": [["Equal", 10], [" test", 3]]}',
            (49, 45, 43),
        ),
        (
            "The old man looked at the sea, which was quiet in the morning, and thought about the fish that he had lost.",
            (25, 25, 25),
        ),
        (
            "def _names(field: str, refusal: str) -> bool:\\n    return re.search(rf'{mark}{field}', refusal) is not None\\n",
            (35, 33, 35),
        ),
    ],
)
def test_the_expected_tokens_are_about_those_of_tokenizers(text, counted):
    assert 0.95 * min(counted) < expected_tokens(text) < 1.12 * max(counted)


def test_a_limit_is_checked_before_the_first_question(server, connect):
    asked = questions(10, max_tokens=100)
    with pytest.raises(
        BudgetError, match=r"10 questions would take up to 1\d0 input and 1,000 output tokens; token_limit = 900.*Nothing was"
    ):
        connect(token_limit=900).ask(asked)
    with pytest.raises(BudgetError, match=r"\(1\.00 dollars\); dollar_limit = 0\.9\."):
        connect(input_price=0, output_price=1000, dollar_limit=0.9).ask(asked)
    assert server.requests == []
    model = connect(token_limit=1130)
    model.ask(asked[:5])
    assert model.ask(asked[:5])[0].was_kept
    with pytest.raises(BudgetError, match=r"10 questions would take up to 11\d .*, after \d+ input and 10 output tokens; tok"):
        model.ask(questions(15, max_tokens=100))
    connect(token_limit=1130).ask(questions(15, max_tokens=100))


def test_a_limit_that_is_reached_in_the_middle_keeps_what_is_done(server, connect):
    """For the server, each question is seven times as long as the estimate says."""
    long = [question._replace(user=question.user + "word " * 40) for question in questions(20, max_tokens=4)]
    model = connect(token_limit=260, concurrency=3)
    model = EndpointModel(model.config, count_tokens=lambda text: 0)
    assert model.estimate(long).n_input == 20 * 8
    server.reply = lambda messages, body: "a b c"
    with pytest.raises(
        BudgetReachedError,
        match=r"could pass token_limit = 260; raise that to ask the others\. (\d+) of 20 questions are answered and kept",
    ) as reached:
        model.ask(long)
    n = int(re.search(r"(\d+) of 20", str(reached.value))[1])
    assert 0 < n < 20
    assert server.delivered.total() == n
    largest = max(json.loads(path.read_text())["answer"]["n_input"] for path in Path(model.config.folder).rglob("*.json"))
    assert sum(model.spent[:2]) <= 260 + 3 * largest  # until the first reply, the estimate was believed
    server.forget()
    answers = connect().ask(long)
    assert sum(answer.was_kept for answer in answers) == n
    assert server.paid.total() == 20 - n


def test_damaged_kept_answers_are_asked_again(server, connect, tmp_path, caplog):
    connect().ask(questions(5))
    files = sorted((tmp_path / "kept").rglob("*.json"))
    assert len(files) == 5
    files[0].write_text(files[0].read_text()[:100])
    files[1].write_text("[]")
    files[2].write_bytes(b"\0" * 500)
    files[3].write_text(files[4].read_text())
    server.forget()
    assert [answer.text for answer in connect().ask(questions(5))] == expected(questions(5))
    assert len(server.requests) == 4
    assert caplog.text.count("is damaged, so its question is asked again") >= 4
    connect().ask(questions(5))
    assert len(server.requests) == 4


@pytest.mark.parametrize(
    "change",
    [
        *({"temperature": 1.0}, {"seed": 1}, {"model": "other"}, {"of question": {"system": "Be brief."}}),
        *({"of question": {"max_tokens": 3}}, {"of question": {"choices": ("a",)}}),
        {"of question": {"schema": {"type": "string"}}},
    ],
)
def test_everything_that_decides_an_answer_is_in_its_key(server, connect, change):
    question = sl.Question("a")
    model = connect()
    model.ask([question])
    other = question._replace(**change.pop("of question", {}))
    changed = sl.chat_model(**{"name": change.pop("model", "judge"), **model.config.model_dump(exclude={"model"}), **change})
    assert changed.estimate([other]).n_questions == 1
    assert model.estimate([question]).n_questions == 0


def test_text_with_half_characters_and_controls_survives(server, connect):
    server.reply = lambda messages, body: "half \ud83d of a smile\u202e"
    asked = [sl.Question("a \udc00 b \x00 é 🙂")]
    answer = connect().ask(asked)[0]
    assert answer.text == "half � of a smile\u202e"
    assert server.requests[0]["messages"][0]["content"] == "a � b \x00 é 🙂"
    assert connect().ask(asked) == [answer._replace(was_kept=True)]


def test_threads_may_share_a_model_and_a_folder(server, connect):
    model, results = connect(), {}
    threads = [
        threading.Thread(target=lambda i=i: results.update({i: model.ask(questions(8 * i + 8)[8 * i :])})) for i in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [a.text for i in range(3) for a in results[i]] == expected(questions(24))


def test_a_folder_that_cannot_be_written_is_an_error_before_the_first_request(server, connect, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputExistsError, match="is not a folder"):
        connect(folder=str(tmp_path / "file")).ask(questions(1))
    assert server.requests == []


def test_the_usual_folder_is_in_the_cache_of_the_system(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("sys.platform", "linux")
    assert usual_folder() == tmp_path / "saelens_lite" / "answers"
    monkeypatch.setenv("SAELENS_LITE_ANSWERS", str(tmp_path / "mine"))
    assert usual_folder() == tmp_path / "mine"
    assert sl.chat_model("a").config.folder is None
    assert sl.chat_model("a", folder=tmp_path).config.folder == str(tmp_path)


def test_a_missing_client_is_said_in_words(server, connect, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ConfigError, match=r"pip install 'saelens-lite\[chat\]'"):
        connect().ask(questions(1))


def test_a_plan_of_faults_depends_on_the_question_alone():
    plan = Plan(3, 0.5, 2)
    drawn = [plan(f"{i}", n) for i in range(300) for n in range(3)]
    assert drawn == [Plan(3, 0.5, 2)(f"{i}", n) for i in range(300) for n in range(3)]
    assert not any(drawn[2::3])
    assert {fault for fault in drawn if fault} == set(FAULTS)
    assert 0.4 < sum(map(bool, drawn)) / 600 < 0.6
    assert os.environ.get("OPENAI_API_KEY") is None


@pytest.mark.parametrize("second", [False, True], ids=["once", "twice"])
def test_ctrl_c_keeps_what_is_in_progress_unless_it_comes_twice(server, connect, second):
    """The replies in progress take half a second; the second Ctrl-C does not wait for them."""
    server.delay = 0.5
    model = connect(concurrency=2)

    def interrupt():
        while len(server.requests) < 4:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        if second:
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    n = 2 if second else 4
    with pytest.raises(Stopped, match=rf"stopped; {n} of 50 questions are answered and kept in .*kept\. Repeat the call"):
        model.ask(questions(50))
    thread.join()
    assert len(server.requests) == 4
    server.delay = 0
    assert [answer.text for answer in model.ask(questions(8))] == expected(questions(8))
    assert [server.asked[question_hash(messages(q))] for q in questions(4)] == [1, 1, *([2, 2] if second else [1, 1])]


@pytest.mark.parametrize(("seed", "kind"), [*enumerate([*chat_faults.KINDS, chat_faults.KINDS[1]])])
def test_faulty_runs_lose_nothing_and_pay_nothing_twice(seed, kind):
    outcome = chat_faults.one_run(kind, seed, n=20, timeout=1.0)
    assert not chat_faults.is_bad(kind, outcome)
    assert outcome.counts["faults"] > 0
    assert outcome.counts["paid"] >= outcome.counts["delivered"] >= 20
    assert (outcome.counts["stops"] > 0) == (kind != "faults")


def test_the_check_of_faulty_runs_sees_a_folder_that_forgets(monkeypatch):
    """Kept answers that disappear between two calls are lost, and asked again."""
    kept = chat_faults.kept_answers

    def forgetting(folder):
        answers = kept(folder)
        for path in folder.rglob("*.json"):
            path.unlink()
        return answers

    monkeypatch.setattr(chat_faults, "kept_answers", forgetting)
    outcome = chat_faults.one_run("faults and SIGKILL", 1, n=12, timeout=1.0)
    assert outcome.counts["asked again"] > 0
    assert chat_faults.is_bad("faults and SIGKILL", outcome)
