"""Serve OpenAI's chat/completions on the loopback interface, with real HTTP, faults to order, and a count of what is paid.

    with running_chat(lambda messages, body: "a colour") as server:
        model = sl.chat_model("any", base_url=server.url, folder=str(tmp_path))

A reply is paid if the model answered, that is, each answer with status 200, even if its body is then damaged on the way. It is
delivered if its whole body was also handed to the client. A plan of faults depends only on its seed, on the question and on how
often the question was asked before, so not on the order in which requests arrive.
"""

import hashlib
import json
import random
import re
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import log
from typing import Any, NamedTuple

FAULTS = (
    *("429", "429 with a date", "500", "502", "503", "529"),  # answers without a reply
    *("reset", "late"),  # no answer
    *("malformed", "cut on the way", "no choices", "wrong types"),  # paid replies that do not arrive whole
)


class Reply(NamedTuple):
    """The words of the model. `tokens` are those of the text, each with the log-probabilities of the likeliest in its place."""

    text: str | None
    finish: str = "stop"
    refusal: str | None = None
    tokens: Sequence[tuple[str, dict[str, float]]] | None = None


class Plan(NamedTuple):
    """Seeded faults: each of the first `most` requests of a question fails with probability `rate`."""

    seed: int
    rate: float = 0.5
    most: int = 3
    kinds: tuple[str, ...] = FAULTS

    def __call__(self, question: str, n: int) -> str | None:
        draw = random.Random(f"{self.seed} {question} {n}")
        return draw.choice(self.kinds) if n < self.most and draw.random() < self.rate else None


Replying = Callable[[list[dict[str, str]], dict[str, Any]], str | Reply]


def question_hash(messages: list[dict[str, str]]) -> str:
    """Return the hash by which the server counts a question."""
    return hashlib.sha256(json.dumps(messages).encode()).hexdigest()[:16]


def echo(messages: list[dict[str, str]], body: dict[str, Any]) -> str:
    """Reply with a digest of the question."""
    return f"reply {question_hash(messages)}"


@dataclass
class ChatServer:
    """The state of the server: settings that may change at any time, and counts by `question_hash`."""

    reply: Replying = echo
    plan: Callable[[str, int], str | None] | None = None
    key: str | None = None  # needed, if not None
    models: tuple[str, ...] | None = None  # known, if not None
    refused: tuple[str, ...] = ()  # fields of a request that get status 400, such as response_format, top_logprobs
    forms: tuple[str, ...] | None = None  # of response_format; another is status 500, as llama-cpp-python 0.3.36 has it
    one_at_a_time: bool = False  # the others wait, and those whose client has hung up are answered too
    lateness: float = 1.0  # seconds before a late answer
    retry_after: str = "0"  # seconds, of a fault 429
    delay: float = 0.0  # seconds before each reply
    port: int = 0
    ordered: list[str] = field(default_factory=list)  # faults of the next requests, before those of the plan
    requests: list[dict[str, Any]] = field(default_factory=list)  # the bodies that arrived
    asked: Counter[str] = field(default_factory=Counter)
    paid: Counter[str] = field(default_factory=Counter)
    delivered: Counter[str] = field(default_factory=Counter)
    events: list[tuple[str, str]] = field(default_factory=list)  # "asked" or "delivered", and the question
    met: Counter[str] = field(default_factory=Counter)  # faults, by kind
    running: int = 0  # requests in progress
    most_running: int = 0
    lock: threading.RLock = field(default_factory=threading.RLock)
    turn: threading.Lock = field(default_factory=threading.Lock)
    stopping: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def order(self, *faults: str) -> None:
        """Let the next requests meet these faults, one each."""
        self.ordered = list(faults)

    def forget(self) -> None:
        """Set all counts to zero."""
        with self.lock:
            self.requests, self.events, self.most_running = [], [], 0
            self.asked, self.paid, self.delivered, self.met = Counter(), Counter(), Counter(), Counter()


class Visit(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    state: ChatServer

    def log_message(self, *args: Any) -> None:
        """Say nothing."""

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        content = self.rfile.read(length)
        if len(content) < length:  # the client has ended
            self.close_connection = True
            return
        body = json.loads(content)
        state = self.state
        question = question_hash(body.get("messages", []))
        with state.lock:
            state.requests.append(body)
            fault = state.ordered.pop(0) if state.ordered else state.plan and state.plan(question, state.asked[question])
            state.asked[question] += 1
            state.events.append(("asked", question))
            state.met[fault or "none"] += 1
            state.running += 1
            state.most_running = max(state.most_running, state.running)
        try:
            self._answer(body, question, fault)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            with state.lock:
                state.running -= 1

    def _answer(self, body: dict[str, Any], question: str, fault: str | None) -> None:
        state = self.state
        if refusal := self._refusal(body):
            return self._send(*refusal)
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            return self.connection.close()
        if fault and fault[:3].isdigit():
            after = (
                formatdate(time.time() + float(state.retry_after), usegmt=True) if fault.endswith("date") else state.retry_after
            )
            headers = {"Retry-After": after} if fault.startswith("429") else {}
            return self._send(int(fault[:3]), {"error": {"message": "a planned fault", "code": "planned"}}, headers)
        wait = state.lateness if fault == "late" else state.delay
        if state.one_at_a_time:
            with state.turn:
                state.stopping.wait(wait)
        elif wait:
            state.stopping.wait(wait)
        said = state.reply(body["messages"], body)
        content = json.dumps(completion(said if isinstance(said, Reply) else Reply(said), body, fault)).encode()
        if fault == "malformed":
            content = content[: len(content) // 2]
        with state.lock:
            state.paid[question] += 1
        if fault == "cut on the way":
            self.close_connection = True
            return self._write(200, content[: len(content) // 2], {}, len(content))
        self._write(200, content, {}, len(content))
        if fault in (None, "refused", "length", "empty", "filter"):  # "late": the client may have hung up
            with state.lock:
                state.delivered[question] += 1
                state.events.append(("delivered", question))
        return None

    def _refusal(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]] | None:
        """Return the status and body of an answer to a request that the server does not accept."""
        state = self.state
        if state.key is not None and self.headers.get("Authorization") != f"Bearer {state.key}":
            sent = self.headers.get("Authorization", "").removeprefix("Bearer ")
            return 401, {"error": {"message": f"Incorrect API key provided: {sent}", "code": "invalid_api_key"}}
        if self.path != "/v1/chat/completions":
            return 404, {"detail": "Not Found"}
        if state.models is not None and body.get("model") not in state.models:
            return 404, {"error": {"message": f"The model {body.get('model')!r} does not exist", "code": "model_not_found"}}
        kind = body.get("response_format", {}).get("type", "text")
        if state.forms is not None and kind not in state.forms:
            wanted = " or ".join(map(repr, state.forms))
            where = (
                f"{{'type': 'literal_error', 'loc': ('body', 'response_format', 'type'), 'msg': \"Input should be {wanted}\""
            )
            message = f"1 validation error:\n  {where}, 'input': {kind!r}}}\n\n    POST /v1/chat/completions"
            return 500, {"error": {"message": message, "type": "internal_server_error", "param": None, "code": None}}
        for name in state.refused:
            if name in body:
                return 400, {"error": {"message": f"Unsupported parameter: '{name}'", "param": name}}
        return None

    def _send(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(value).encode()
        self._write(status, content, headers or {}, len(content))

    def _write(self, status: int, content: bytes, headers: dict[str, str], length: int) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(length), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()


def completion(reply: Reply, body: dict[str, Any], fault: str | None) -> dict[str, Any]:
    """Return a reply as chat/completions writes it, with the faults that are in its values."""
    if fault in ("refused", "length", "empty", "filter"):
        reply = {
            "refused": Reply(None, refusal="I cannot help with that."),
            "length": Reply((reply.text or "")[:3], "length"),
            "empty": Reply(""),
            "filter": Reply(None, "content_filter"),
        }[fault]
    tokens = reply.tokens or [(token, {token: log(0.9)}) for token in re.findall(r"\s*\w+|\W", reply.text or "")]
    choice: dict[str, Any] = {
        "index": 0,
        "message": {"role": "assistant", "content": reply.text, "refusal": reply.refusal},
        "finish_reason": reply.finish,
        "logprobs": None,
    }
    if body.get("logprobs"):
        choice["logprobs"] = {"content": [_token(*one, body.get("top_logprobs", 0)) for one in tokens]}
    if fault == "wrong types":
        choice = {"index": "0", "message": ["assistant", 3], "finish_reason": 7}
    n_input = sum(len(message["content"].encode()) + 12 for message in body["messages"]) // 4
    usage = {"prompt_tokens": n_input, "completion_tokens": len(tokens), "total_tokens": n_input + len(tokens)}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 0,
        "model": body["model"],
        "choices": [] if fault == "no choices" else [choice],
        "usage": usage,
    }


def _token(text: str, log_p: dict[str, float], n_top: int) -> dict[str, Any]:
    top = sorted(log_p.items(), key=lambda pair: -pair[1])[:n_top]
    return {"token": text, "logprob": log_p[text], "top_logprobs": [{"token": t, "logprob": p} for t, p in top]}


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, address: Any) -> None:
        """Say nothing of clients that hang up."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, address)


@contextmanager
def running_chat(reply: Replying = echo, **settings: Any) -> Iterator[ChatServer]:
    """Run a server in a thread. `settings` are fields of `ChatServer`."""
    state = ChatServer(reply, **settings)
    server = _Listener(("127.0.0.1", state.port), type("OneVisit", (Visit,), {"state": state}))
    state.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        state.stopping.set()
        server.shutdown()
        server.server_close()
        thread.join()
