"""The command that asks a chat model what latents stand for."""

import re
import signal
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from saelens_lite.cli.base import app, console, say
from saelens_lite.cli.chat import NO_CHAT, ChatOptions
from saelens_lite.cli.options import Flag, StoreFolder
from saelens_lite.config import parse_options
from saelens_lite.errors import ConfigError, Stopped

if TYPE_CHECKING:
    from saelens_lite.features import FeatureStore

MOST_LATENTS = 1_000_000  # in a range
Latents = Annotated[str | None, Parameter(help="Numbers of latents: 1,2,5-9.")]
Top = Annotated[int | None, Parameter(help="Take the latents that fire most often, this many of them.")]


@app.command
def explain(
    store: StoreFolder,
    *,
    latents: Latents = None,
    top: Top = None,
    by: str = "max_act",
    options: dict[str, str] | None = None,
    chat: ChatOptions = NO_CHAT,
    show_prompt: Flag = False,
    replace: Flag = False,
) -> None:
    """Ask a chat model what latents stand for, and write its explanations as labels to labels.json in the store.

    Without --latents and --top, all latents are explained that fire on the text of the store and have no label of your own.
    Answers are kept, so a command that is repeated after Ctrl-C or a limit asks, and pays, only for what is left.

    Parameters
    ----------
    by
        Explainer, such as max_act or promoted; `saelens-lite plugins` lists them.
    options
        Options of the explainer, such as --options.n_contexts 10 or --options.template my.j2.
    show_prompt
        Print the questions as they would be sent, and ask nothing.
    replace
        Explain latents with a label of your own too, and replace it.
    """
    from saelens_lite import registry

    numbers = None if latents is None else numbers_in(latents)
    if numbers is not None and top is not None:
        raise ConfigError("--latents and --top both choose latents; give one of them")
    registry.find(by, "explainers")
    if not show_prompt:
        chat.check()

    import saelens_lite as sl
    from saelens_lite.features.explaining.explain import explainer, in_words, question_about
    from saelens_lite.features.label import Label
    from saelens_lite.features.labels import add_stored

    loaded, given = sl.FeatureStore.load(store), parse_options(options or {})
    own = {} if replace else {i: text for i, text in loaded.labels.items() if not isinstance(text, Label)}
    if numbers is None:
        numbers = [i for i in firing(loaded, top) if i not in own] if top is None else firing(loaded, top)
    if show_prompt:
        for number in numbers if latents or top else numbers[:1]:
            question = loaded.question(number, by, **given)
            say(f"--- latent {number}, system ---\n{question.system}\n--- latent {number}, user ---\n{question.user}")
        return
    loaded.info.check_text("an explanation in words")
    model, before, made = chat.load(), dict(loaded.labels), explainer(by, given)
    asked = [number for number in numbers if number not in own]
    questions = [question for number in asked if (question := question_about(loaded, number, made)) is not None]
    say(in_words(model.estimate(questions)))
    try:
        explanations = loaded.explain(numbers, by, model=model, replace=replace, **given)
    except KeyboardInterrupt as error:
        if isinstance(error, Stopped):
            raise
        raise Stopped("interrupted; answers are kept, so repeat the command to resume it", signal.SIGINT) from error
    finally:
        new = {i: label for i, label in loaded.labels.items() if before.get(i) is not label}
        if new:
            add_stored(store, new, loaded.info, replace)
    console().print(explanations)


def numbers_in(text: str) -> list[int]:
    """Return the numbers in a list such as 1,2,5-9. Raise ConfigError if it is not one."""
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})(?:-(\d{1,9}))?\s*", part, re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < first + MOST_LATENTS:
            raise ConfigError(f"--latents {text}: {part.strip()!r} is not a number or a range; expected a list such as 1,2,5-9")
        numbers += range(first, last + 1)
    return list(dict.fromkeys(numbers))


def firing(store: "FeatureStore", top: int | None) -> list[int]:
    """Return the latents that fire on the text of a store; with `top`, those that fire most often, the most frequent first."""
    if top is not None and top < 1:
        raise ConfigError(f"--top {top}: expected at least 1")
    counts = store.tensors.count.tolist()
    live = [latent for latent, count in enumerate(counts) if count]
    return live if top is None else sorted(live, key=lambda latent: -counts[latent])[:top]
