"""Ask a chat model: a model behind an endpoint that speaks OpenAI's chat/completions, or a model of this computer.

```python
model = sl.chat_model("gpt-4o-mini", folder="answers", input_price=0.15, output_price=0.6, dollar_limit=2)
questions = [sl.Question(f"What do {a} and {b} have in common?", max_tokens=60) for a, b in [("owls", "bats"), ("tea", "ink")]]
print(model.estimate(questions))  # tokens and dollars of the questions that have no kept answer
local = sl.local_chat_model("tiny", folder="answers")  # or a Hub id, a folder, a loaded model
for answer in local.ask(questions):
    print(answer.text or answer.failure)
```

`model.ask(questions)` does the same through the endpoint (`pip install 'saelens-lite[chat]'`). `base_url=` names another one,
such as a server of vLLM or llama.cpp; the default is the environment variable OPENAI_BASE_URL if it is not empty, or else
OpenAI's. The key comes from the environment variable OPENAI_API_KEY, or the one that `key_variable=` names, or else from the
keyring (`keyring set saelens_lite OPENAI_API_KEY`), and is sent to any server that `base_url=` names. It is no argument, and it
is not written or logged. A server of this computer needs none. `ChatConfig` lists all settings.

**Answers.** Questions are answered in their order. A question without a usable answer fails alone: its `Answer` has
`text=None` and a `failure` such as «refused», «cut» (at `max_tokens`), «empty», or the last fault after all repetitions.
Requests are repeated after a time-out, a broken connection, a damaged reply, status 408, 409, 429 and most from 500 on, with
growing waits, at least as long as the server's Retry-After demands. A wrong key, a missing model or an endpoint that cannot be
reached is an error at once.

**Kept answers.** Every whole reply is written to a folder, one JSON file for each question, so no answer is paid twice: a call
that was stopped or killed is repeated, and asks only what is left. Refused, cut and empty replies are kept too, because they
were paid; `ask_again=True` asks those of earlier runs once more. The folder is `folder=`, or the environment variable
SAELENS_LITE_ANSWERS names it, or it is saelens_lite/answers in the system's folder for caches (~/.cache on Linux). The files
hold the questions and so parts of your text. Two processes that ask the same question at the same moment both pay for it.

**Cost.** With `dollar_limit` or `token_limit`, nothing is sent unless the estimate of all questions fits the limit. During the
call, what the server counts is added up, and no question is sent whose estimate could pass the limit; what is done is kept. A
limit is kept as well as the estimates are: a question that is longer than its estimate may pass it, and until the first replies
show how far the estimates are off, so may all questions in progress. A limit holds for all calls of one chat model object. A
reply that is lost on the way counts as its estimate, since the server may charge it. The estimate guesses input
tokens by words and marks, unless `count_tokens=` counts them, and takes the most that is allowed for output tokens. Text that
is not English may have twice as many tokens. `token_limit` limits what is spent,
`Question.max_tokens` the length of one answer.

**Structured output and log-probabilities.** `Question(…, schema=…)` asks for JSON of that schema, `Question(…, choices=…)` for
the log-probabilities of tokens. If the server refuses one of them, the model remembers that and asks without. Servers
that only know JSON objects get the schema in that form.

**Slow servers.** A server of this computer may need minutes for an answer, and may answer one question at a time. Raise
`timeout`, 120 seconds by default. After a time-out, fewer questions are sent at a time, as many as were answered within it.
"""

from saelens_lite.chat.contract import Answer, ChatModel, Estimate, Question, TokenChoice
from saelens_lite.chat.endpoint import EndpointModel, chat_model
from saelens_lite.chat.local import LocalModel, local_chat_model
from saelens_lite.chat.settings import ChatConfig

__all__ = [
    "Answer",
    "ChatConfig",
    "ChatModel",
    "EndpointModel",
    "Estimate",
    "LocalModel",
    "Question",
    "TokenChoice",
    "chat_model",
    "local_chat_model",
]
