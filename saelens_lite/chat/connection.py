"""One request to an endpoint: the only place that imports the openai client, whose own retries are turned off."""

import asyncio
import json
import logging
import re
from types import TracebackType
from typing import Any, Literal, NoReturn

from saelens_lite.chat.contract import Answer, Question
from saelens_lite.chat.kept import messages_of
from saelens_lite.chat.reply import MalformedReply, read_reply
from saelens_lite.chat.settings import ChatConfig, is_loopback
from saelens_lite.chat.waits import demanded_wait
from saelens_lite.errors import ChatAccessError, ChatError, ConfigError

N_TOP = (20, 5)  # log-probabilities to ask for; servers differ in how many they give
REPEATED = {408, 409, 429}  # statuses below 500 after which a request is repeated
NOT_REPEATED = {501, 505}
REFUSING = {400, 404, 422, 500, 501}  # statuses of a request with a field that the server does not accept
UNFIT = re.compile(
    r"support|implement|valid|should be|unexpected|unknown|unrecogni[sz]ed|allowed|permitted|logits_all", re.IGNORECASE
)
FORMS = ("json_schema", "json_object")  # of structured output, both with a schema; llama-cpp-python knows only the second
TOO_LONG = re.compile(r"context.?length|maximum context|too long|too many tokens|context window", re.IGNORECASE)
FILTERED = re.compile(r"content.?(filter|policy|management)", re.IGNORECASE)
KEYS = re.compile(r"\b(sk-|key-|Bearer )[\w*.-]{4,}")
MOST_REASON = 120  # characters
SECRET = 8  # characters of a key, at least; shorter ones are words such as none
log = logging.getLogger(__name__)


class LostReply(Exception):
    """A fault of the server or the network, after which the request may be repeated.

    `stage` says how far the request came: no connection, no answer, none within the time-out, a status that refuses
    it, or a damaged reply. `after` is the wait in seconds that the server demands.
    """

    def __init__(
        self, why: str, stage: Literal["unconnected", "silent", "late", "refused", "damaged"], after: float | None = None
    ):
        super().__init__(why)
        self.after = after
        self.is_unconnected = stage == "unconnected"
        self.is_late = stage == "late"
        self.is_answered = stage in ("refused", "damaged")
        self.may_be_paid = stage in ("silent", "late", "damaged")


class UnfitQuestion(Exception):
    """A question that the server does not take, such as one that is too long for the model."""


class Dialect:
    """The fields of a request that an endpoint accepts, learned from its refusals."""

    def __init__(self, structured: str):
        self.structured = structured
        self.form = 0 if structured != "off" else len(FORMS)  # index in FORMS
        self.n_top = 0  # index in N_TOP
        self.left_out: set[str] = set()
        self.most_tokens = "max_tokens"

    def body(self, config: ChatConfig, question: Question) -> dict[str, Any]:
        """Return the body of a request."""
        body = {
            "model": config.model,
            "messages": messages_of(question),
            "temperature": config.temperature,
            "seed": config.seed,
            self.most_tokens: question.max_tokens,
        }
        if question.schema is not None and self.form < len(FORMS):
            schema = dict(question.schema)
            forms = ({"json_schema": {"name": "answer", "schema": schema, "strict": True}}, {"schema": schema})
            body["response_format"] = {"type": FORMS[self.form], **forms[self.form]}
        if question.choices and self.n_top < len(N_TOP):
            body |= {"logprobs": True, "top_logprobs": N_TOP[self.n_top]}
        return {name: value for name, value in body.items() if value is not None and name not in self.left_out}

    def learns(self, body: dict[str, Any], refusal: str, status: int = 400, param: Any = None) -> bool:
        """Return whether a request can be sent again without what the server refused in it.

        param: the name of the field, if the server says it apart from the words of its refusal.
        """
        if status == 500 and not UNFIT.search(refusal):  # a fault of the server, whose words may repeat the request
            return False
        if "max_tokens" in body and "max_completion_tokens" in refusal:
            self.most_tokens = "max_completion_tokens"
        elif "response_format" in body and re.search(r"response_format|json_schema|structured output", refusal):
            form = FORMS.index(body["response_format"]["type"]) + 1
            if form == len(FORMS) and self.structured == "on":
                return False
            is_new, self.form = form > self.form, max(self.form, form)
            self._say("response_format", is_new and form == len(FORMS), "structured output")
        elif "logprobs" in body and "logprobs" in refusal:
            self.n_top = max(self.n_top, N_TOP.index(body["top_logprobs"]) + 1)
            self._say("logprobs", self.n_top == len(N_TOP), "log-probabilities")
        else:
            for name in ("seed", "temperature"):
                if name in body and status in (400, 422) and _names(name, refusal, param):
                    self._say(name, name not in self.left_out, f"a {name}, so its answers vary")
                    self.left_out.add(name)
                    return True
            return False
        return True

    def _say(self, name: str, is_new: bool, what: str) -> None:
        if is_new:
            log.warning("the endpoint does not accept %s: it offers no %s", name, what)


def _names(field: str, refusal: str, param: Any) -> bool:
    """Return whether a refusal is about a field. Words that repeat the request name all of its fields."""
    if isinstance(param, str) and param:
        return param == field
    mark = r"[\"'`\\]"
    if re.search(rf"{mark}messages{mark}", refusal):
        return False
    return re.search(rf"{mark}{field}{mark}+(?!{mark}|\s*[:=]\s*-?\d)", refusal) is not None


class Connection:
    """A client of an endpoint within an `async with` block."""

    def __init__(self, config: ChatConfig, dialect: Dialect, key: str):
        try:
            import openai
        except ImportError:
            raise ConfigError(
                "chat models behind an endpoint need the openai client: pip install 'saelens-lite[chat]'"
            ) from None
        self.config, self.dialect, self.openai = config, dialect, openai
        self._key = key

    async def __aenter__(self) -> "Connection":
        # A proxy of the environment cannot reach a server of this computer.
        direct = (
            {"http_client": self.openai.DefaultAsyncHttpxClient(trust_env=False)} if is_loopback(self.config.base_url) else {}
        )
        self._client = self.openai.AsyncOpenAI(
            api_key=self._key, base_url=self.config.base_url, max_retries=0, timeout=self.config.timeout, **direct
        )
        self._create = self._client.chat.completions.with_raw_response.create  # imports much, outside of any time limit
        return self

    async def __aexit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._client.close()

    async def answer(self, question: Question, expected_input: int) -> Answer:
        """Send a question once and return the answer.

        Raises:
            LostReply: the request may be repeated.
            UnfitQuestion: the server does not take this question.
            ChatError, ChatAccessError: the server will take no question.
        """
        while True:
            body = self.dialect.body(self.config, question)
            try:
                async with asyncio.timeout(self.config.timeout):
                    raw = await self._create(**body)
                content, kind = raw.content, raw.headers.get("content-type", "")
                break
            except (TimeoutError, self.openai.APITimeoutError):
                raise LostReply(f"no reply within {self.config.timeout:g} seconds", "late") from None
            except self.openai.APIStatusError as error:
                refusal = self._words(error)
                if error.status_code in REFUSING and self.dialect.learns(body, refusal, error.status_code, error.param):
                    continue
                self._refuse(error, refusal)
            except self.openai.APIConnectionError as error:
                cause = error.__cause__
                unconnected = type(cause).__name__ in ("ConnectError", "ConnectTimeout", "ProxyError", "UnsupportedProtocol")
                what = "no connection" if unconnected else "the connection broke"
                why = f"{what} ({type(cause).__name__}: {self._safe(str(cause))})" if cause else what
                raise LostReply(why, "unconnected" if unconnected else "silent") from None
        try:
            return read_reply(content, question, expected_input)
        except MalformedReply as error:
            if "html" in kind:
                raise ChatError(
                    f"{self.config.base_url} answered with a web page; is that the address? It often ends with /v1"
                ) from None
            raise LostReply(f"a malformed reply ({error})", "damaged") from None

    def _refuse(self, error: Any, refusal: str) -> NoReturn:
        """Raise what a status other than 200 means."""
        status, said = error.status_code, f"the server says: {refusal}"
        config = self.config
        if status in (401, 402, 403) or (status == 429 and "insufficient_quota" in refusal):
            raise ChatAccessError(
                f"{config.base_url} refused access (status {status}); is the key in {config.key_variable} valid for the model "
                f"{config.model}, with credit left? {said}"
            ) from None
        if status in REPEATED or (status >= 500 and status not in NOT_REPEATED):
            after = demanded_wait(error.response.headers.get("retry-after"))
            raise LostReply(f"status {status} ({self._message(error)})", "refused", after) from None
        if status == 413 or (status in (400, 422) and TOO_LONG.search(refusal)):
            raise UnfitQuestion("too long") from None
        if status == 400 and FILTERED.search(refusal):
            raise UnfitQuestion("refused") from None
        if status in (404, 405):
            raise ChatError(
                f"{config.base_url} has no model {config.model!r}, or is not the address of an endpoint, which often ends with "
                f"/v1; {said}"
            ) from None
        raise ChatError(f"{config.base_url} refused the request (status {status}); {said}") from None

    def _message(self, error: Any) -> str:
        """Return the beginning of the message of an error, without what the server wrote around it."""
        body = error.body.get("message") or error.body.get("detail") if isinstance(error.body, dict) else error.body
        return self._safe(body if isinstance(body, str) and body.strip() else "no reason given")[:MOST_REASON]

    def _words(self, error: Any) -> str:
        """Return what the server wrote about an error, on one line, without anything that looks like a key."""
        body = error.body if error.body is not None else error.message
        return self._safe(body if isinstance(body, str) else json.dumps(body, default=str))

    def _safe(self, text: str) -> str:
        hidden = text.replace(self._key, "…") if len(self._key) >= SECRET else text
        return KEYS.sub("…", " ".join(hidden.split()))[:400]
