"""The command that scores the labels of a feature store."""

import signal
from typing import Annotated

from cyclopts import Parameter

from saelens_lite.cli.base import app, console, say
from saelens_lite.cli.chat import NO_CHAT, ChatOptions
from saelens_lite.cli.explaining import Latents, numbers_in
from saelens_lite.cli.options import Flag, StoreFolder
from saelens_lite.errors import ConfigError, Stopped

KINDS = ("detection", "fuzzing")


@app.command
def score(
    store: StoreFolder,
    *,
    latents: Latents = None,
    kinds: str = ",".join(KINDS),
    contexts: int | None = None,
    per_question: int | None = None,
    answer_tokens: int | None = None,
    controls: Annotated[bool, Parameter(negative="--no-controls")] = True,
    seed: int | None = None,
    chat: ChatOptions = NO_CHAT,
    show_prompt: Flag = False,
) -> None:
    """Score labels: a chat model reads them and says where their latents fire. Write the scores to scores.json in the store.

    Each score is beside those of controls: the token baseline, another latent's explanation, and the explanation's words in
    another order. The contexts are those that explainers do not see. Answers are kept, so a command that is repeated after
    Ctrl-C or a limit asks, and pays, only for what is left.

    Parameters
    ----------
    latents
        Numbers of latents: 1,2,5-9; default: all that have a label.
    kinds
        detection: in which contexts the latent fires; fuzzing: on which tokens.
    contexts
        Most contexts of each sort for a latent: firing, silent, and of the nearest latent; default: 20.
    per_question
        Most contexts in a question; default: 5.
    answer_tokens
        Most tokens of an answer; default: 256. Models that think first need thousands.
    controls
        Let the chat model also read the two other explanations, at 3 times the cost.
    seed
        Seed of the contexts drawn, their order, and the controls; default: 0.
    show_prompt
        Print the first question of each kind as it would be sent, and ask nothing.
    """
    numbers = None if latents is None else numbers_in(latents)
    wanted = tuple(part.strip() for part in kinds.split(","))
    if unknown := [kind for kind in wanted if kind not in KINDS]:
        raise ConfigError(f"--kinds {kinds}: {unknown[0]!r} is not a kind of score; expected {' or '.join(KINDS)}, or both")
    if not show_prompt:
        chat.check()

    import saelens_lite as sl
    from saelens_lite.features import ScoreConfig
    from saelens_lite.features.explaining.explain import in_words

    settings = {"n_contexts": contexts, "per_question": per_question, "max_tokens": answer_tokens, "seed": seed}
    given = {name: value for name, value in settings.items() if value is not None}
    config = ScoreConfig(kinds=wanted, controls=controls, **given)
    loaded = sl.FeatureStore.load(store)
    if not loaded.labels:
        raise ConfigError(f"{store} has no labels; write some with `explain` or `label`")
    if show_prompt:
        for kind in wanted:
            for question in loaded.score_questions(numbers, config, kinds=(kind,))[:1]:
                say(f"--- {kind}, system ---\n{question.system}\n--- {kind}, user ---\n{question.user}")
        return
    model = chat.load()
    say(in_words(model.estimate(loaded.score_questions(numbers, config))))
    try:
        scores = loaded.score(numbers, model=model, config=config)
    except KeyboardInterrupt as error:
        if isinstance(error, Stopped):
            raise
        raise Stopped("interrupted; answers are kept, so repeat the command to resume it", signal.SIGINT) from error
    if loaded.record_scores(scores):
        loaded.write_scores()
    console().print(scores)
