"""Commands that change latents, or trace what they do in a prompt."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from saelens_lite.cli.base import app, console
from saelens_lite.cli.options import THE_MODEL, DictionaryPath, JsonFile, ModelOptions
from saelens_lite.errors import ConfigError


@dataclass(frozen=True)
class TokenPair:
    """What effects are measured on, if not on what the command says.

    Parameters
    ----------
    token
        With --against: effects are on the logit of this token minus that of the other, at the end of the prompt. Mind the
        space in front of words.
    against
        The other token.
    """

    token: str | None = None
    against: str | None = None

    def metric(self) -> tuple[str, str] | None:
        """Return the two tokens, if they were given."""
        if self.token is not None and self.against is not None:
            return self.token, self.against
        if self.token is None and self.against is None:
            return None
        raise ConfigError("--token and --against go together: the difference of their logits is what is explained")


TokenPairOptions = Annotated[TokenPair, Parameter(name="*")]
NO_PAIR = TokenPair()


@app.command
def steer(
    dictionary: DictionaryPath,
    *,
    prompt: str,
    ablate: list[int] | None = None,
    scale: list[str] | None = None,
    clamp: list[str] | None = None,
    add: list[str] | None = None,
    positions: list[int] | None = None,
    max_new_tokens: int = 50,
    temperature: float = 0.8,
    seed: int = 0,
    of: ModelOptions = THE_MODEL,
) -> None:
    """See what a model writes when latents are changed, beside what it writes without, and what that costs.

    Parameters
    ----------
    prompt
        Beginning of the text.
    ablate
        Latent that is kept from firing; this and the next three may be given several times, and are applied in this order.
    scale
        LATENT=FACTOR: multiply its code, e.g. 9=0.5.
    clamp
        LATENT=VALUE: set its code, e.g. 7=8.0.
    add
        LATENT=AMOUNT: add to its code, e.g. 3=2.
    positions
        Positions that change, counted from BOS, which is 0; default: all that the dictionary was trained on.
    max_new_tokens
        Tokens to write.
    temperature
        0 takes the likeliest token each time.
    seed
        Seed of the draws.
    """
    import saelens_lite as sl
    from saelens_lite.interventions.steering import steer as run_steer
    from saelens_lite.interventions.steering import table

    edits = [sl.Ablate(latent, positions=positions) for latent in ablate or ()]
    for kind, flag, given in ((sl.Scale, "scale", scale), (sl.Clamp, "clamp", clamp), (sl.Add, "add", add)):
        edits += [kind(*_latent_and_value(flag, text), positions=positions) for text in given or ()]
    loaded, lm = of.load(dictionary)
    settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    console().print(table(run_steer(loaded, lm, prompt, edits, hook=of.hook, **settings)))


def _latent_and_value(flag: str, text: str) -> tuple[int, float]:
    """Return the two sides of "7=8.0"."""
    latent, _, value = text.partition("=")
    try:
        return int(latent), float(value)
    except ValueError:
        raise ConfigError(f"--{flag} {text}: expected LATENT=NUMBER, such as --{flag} 7=0.5") from None


@app.command
def doses(
    dictionary: DictionaryPath,
    latent: int,
    *,
    prompt: list[str],
    doses: Annotated[list[float], Parameter(consume_multiple=True)],
    pair: TokenPairOptions = NO_PAIR,
    controls: int = 8,
    seed: int = 0,
    of: ModelOptions = THE_MODEL,
    json_out: JsonFile = None,
) -> None:
    """Measure what amounts of a latent do and what they cost, beside random latents of equal norm.

    Without --token and --against: what they do to the log-probability of the ten tokens that the latent promotes most.

    Parameters
    ----------
    latent
        Its number.
    prompt
        Text to measure on; may be given several times.
    doses
        Amounts that are added to its code, e.g. --doses 2 4 8.
    controls
        Number of random latents.
    seed
        Seed of the draw of the random latents.
    """
    import saelens_lite as sl
    from saelens_lite.files import write_json

    metric = pair.metric() or "promoted"
    loaded, lm = of.load(dictionary)
    found = sl.dose_response(loaded, lm, latent, doses, prompt, metric=metric, n_controls=controls, seed=seed, hook=of.hook)
    console().print(found.table())
    if json_out:
        write_json(json_out, found.to_dict(), limit=math.inf)


@app.command
def attribute(
    dictionary: DictionaryPath,
    *,
    prompt: str,
    pair: TokenPairOptions = NO_PAIR,
    top: int = 15,
    ablation: bool = True,
    of: ModelOptions = THE_MODEL,
    json_out: JsonFile = None,
) -> None:
    """See which latents make the model say what it says: by exact ablation, by gradient, and directly.

    Without --token and --against: effects are on the mean loss over the prompt.

    Parameters
    ----------
    prompt
        The text; latents are those that fire on it.
    top
        Rows to show.
    ablation
        Also ablate each latent, a forward pass each.
    """
    import saelens_lite as sl
    from saelens_lite.files import write_json

    metric = pair.metric() or "loss"
    loaded, lm = of.load(dictionary)
    found = sl.attribute(loaded, lm, prompt, metric, ablation=ablation, hook=of.hook)
    console().print(found.table(top))
    if json_out:
        write_json(json_out, found.to_dict(), limit=math.inf)


@app.command(name="prompt")
def show_prompt(
    dictionary: DictionaryPath,
    *,
    prompt: str,
    by: Literal["activation", "relative", "attribution"] = "activation",
    store: Path | None = None,
    pair: TokenPairOptions = NO_PAIR,
    top: int = 5,
    of: ModelOptions = THE_MODEL,
    json_out: JsonFile = None,
) -> None:
    """See which latents fire at each token of a text.

    Without --token and --against: effects are on the mean loss over the text.

    Parameters
    ----------
    prompt
        The text.
    by
        What comes first at a token: the largest activation, the largest share of the latent's largest activation (needs
        --store), or the largest effect on what the model says, by gradient.
    store
        Folder written by `features --out`, for labels and promoted tokens.
    top
        Latents of each token.
    """
    import saelens_lite as sl
    from saelens_lite.files import write_json

    metric = pair.metric()
    loaded, lm = of.load(dictionary)
    collected = None if store is None else sl.FeatureStore.load(store, loaded)
    view = sl.prompt_view(loaded, lm, prompt, by, store=collected, metric=metric, top=top, hook=of.hook)
    console().print(view)
    if json_out:
        write_json(json_out, view.to_dict(), limit=math.inf)
