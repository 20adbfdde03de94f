'''Explain latents in words, and score the explanations: by a chat model, with text as data and controls beside each score.

A label without a score misleads. So an explainer sees half of the contexts in which a latent fires, and a judge then tells from
the explanation alone in which contexts of the other half it fires.

```python
live = (~store.never_fires).nonzero().flatten().tolist()[:8]
question = store.question(live[0])  # what a chat model would be asked: question.system, question.user
```

```sh
export OPENAI_API_KEY=…                                                # or `keyring set saelens_lite OPENAI_API_KEY`
saelens-lite explain store --latents 7 --show-prompt                   # asks nothing
saelens-lite explain store --model gpt-4o-mini --top 100 --token-limit 500000
saelens-lite explain store --model my-model --base-url http://localhost:8000/v1 --by promoted
saelens-lite explain store --model Qwen/Qwen3-4B --local --latents 1,2,5-9
saelens-lite score store --model gpt-4o-mini                           # of all labels, beside controls
```

In Python, `sl.chat_model("gpt-4o-mini")` is a model behind an endpoint, and `sl.local_chat_model("Qwen/Qwen3-4B")` one of this
computer. Anything with a name, `ask` and `estimate` does too, such as this one, which names the marked tokens that it counts
most often:

```python
import re
from collections import Counter

from saelens_lite.chat import Answer, Estimate


class Counting:
    """A chat model that counts."""

    name = "counting"

    def ask(self, questions):
        marked = [Counter(re.findall("«(.+?)»", question.user)) for question in questions]
        return [Answer(", ".join(f"'{token.strip()}'" for token, _ in one.most_common(3))) for one in marked]

    def estimate(self, questions):
        return Estimate(len(questions), 0, 0, None)


explanations = store.explain(live, model=Counting())
print(explanations)  # the labels, and the latents without one: explanations.failures
store.labels  # your own labels stay, unless replace=True
promoted = store.explain(live, "promoted", model=Counting(), n_contexts=5)
```

Answers are kept on disk, so a call that is repeated after Ctrl-C or a limit asks, and pays, only for what is left. The
label says where it comes from: `label.source` is the explainer with the version of its question, and `label.author` the
chat model. An answer that is empty, cut, refused, too long, in another form or a copy of the question is a failure and
never becomes a label.

**Scores.** The judge may be a chat model or a function. Controls are scored on the same contexts: the tokens alone, the
explanation of another latent, and the words in another order. A score means little unless it is above the first two.

```python
from saelens_lite.features import words_of_label

scores = store.score(explanations, model=words_of_label)
print(scores)
store.record_scores(scores)  # tables and the page show them beside the labels
```

**Text as data.** The text of a corpus may try to instruct the reader. Each context is a JSON string in one line of a fenced
block, with the firing tokens in « ». Line ends, marks and fences that are part of the text are escaped, so the text can neither
leave its line nor forge a mark (`quoting`). That a model follows the text all the same cannot be excluded: read the
labels of a corpus by strangers as you would read its text.

**Your own words.** The question of max_act and of promoted is a template of Jinja. Copy `max_act.j2` from the folder of the
plugin, change it, and give it as `store.explain(…, template="mine.j2")` or `--options.template mine.j2`. Its hash is recorded
in place of the version. An explainer of your own is a class; see `features.explainers`.
'''
