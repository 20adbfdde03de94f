"""Commands that change latents, or trace their effects in a prompt."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from cyclopts import Parameter

from saelens_lite.cli.base import app, console
from saelens_lite.cli.options import THE_MODEL, DictionaryPath, JsonFile, ModelOptions, OfModel, StoreOption, store_of
from saelens_lite.errors import ConfigError

if TYPE_CHECKING:
    from saelens_lite.features import FeatureStore


@dataclass(frozen=True)
class TokenPair:
    """The pair of tokens whose logits are compared, in place of the command's default metric.

    Parameters
    ----------
    token
        With --against: measure effects on this token's logit minus the other's, at the end of the prompt. Most words begin with
        a space.
    against
        The other token.
    """

    token: str | None = None
    against: str | None = None

    def metric(self) -> tuple[str, str] | None:
        """Return the two tokens, or None if neither was given."""
        if self.token is not None and self.against is not None:
            return self.token, self.against
        if self.token is None and self.against is None:
            return None
        raise ConfigError("--token and --against go together: effects are measured on the difference of their logits")


class Strength(NamedTuple):
    """A number, such as 8, or a multiple of a latent's largest activation in a store, such as 2max."""

    value: float
    of_max: bool

    @classmethod
    def parse(cls, flag: str, text: str, store: StoreOption) -> "Strength | None":
        """Return the strength in a text, or None if it is not one. Raise ConfigError for a multiple without a store."""
        number = text.removesuffix("max")
        try:
            value = 1.0 if text == "max" else float(number)
        except ValueError:
            return None
        if number != text and store is None:
            raise ConfigError(
                f"--{flag}: {text} is a multiple of the latent's largest activation; add --store, the folder that "
                "`features --out` wrote"
            )
        return cls(value, number != text)

    def resolved(self, latent: int, store: "FeatureStore | None") -> float:
        """Return the strength as a number."""
        return store.strength(latent, self.value) if self.of_max else self.value


@dataclass(frozen=True)
class AtPorts:
    """The ports of a dictionary at which latents act, and the model in which their effects are measured.

    Parameters
    ----------
    port
        Port that is changed: a hook, or with several models NAME:HOOK, such as chat:blocks.3.hook_resid_pre; default: all of
        the model that is measured. May be repeated.
    in_model
        Name of the model that is measured, if the dictionary writes several.
    """

    port: list[str] | None = None
    in_model: str | None = None

    def chosen(self, of: OfModel) -> dict[str, Any]:
        """Return the arguments for the library. Raise ConfigError if --model does not give the model that is measured."""
        if of.named and self.in_model is not None and self.in_model not in of.named:
            raise ConfigError(f"--in-model {self.in_model}: --model gives {' and '.join(of.named)}")
        return {"ports": self.port, "in_model": self.in_model, "hook": of.hook}


AtPortsOptions = Annotated[AtPorts, Parameter(name="*")]
ALL_PORTS = AtPorts()
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
    store: StoreOption = None,
    at: AtPortsOptions = ALL_PORTS,
    of: ModelOptions = THE_MODEL,
) -> None:
    """Generate text with some latents changed. Show it beside the unchanged text, with the cost of the change.

    Parameters
    ----------
    prompt
        Beginning of the text.
    ablate
        Latent to switch off. This option, --scale, --clamp and --add may be repeated, and they apply in this order.
    scale
        LATENT=FACTOR: multiply the latent's code, e.g. 9=0.5.
    clamp
        LATENT=VALUE: set the latent's code, e.g. 7=8.0, or with --store 7=2max, twice its largest activation.
    add
        LATENT=AMOUNT: add to the latent's code, e.g. 3=2 or 3=0.5max.
    positions
        Positions to change, counted from BOS at 0; default: all positions that the dictionary was trained on.
    max_new_tokens
        Tokens to generate.
    temperature
        Sampling temperature. 0 always picks the most likely token.
    seed
        Seed of the sampling.
    """
    import saelens_lite as sl
    from saelens_lite.interventions.steering import steer as run_steer

    kinds = ((sl.Scale, "scale", scale), (sl.Clamp, "clamp", clamp), (sl.Add, "add", add))
    asked = [(kind, *_latent_and_strength(flag, text, store)) for kind, flag, given in kinds for text in given or ()]
    chosen = at.chosen(of)
    loaded, lm = of.load(dictionary)
    collected = store_of(store, loaded)
    edits = [sl.Ablate(latent, positions=positions) for latent in ablate or ()]
    edits += [kind(latent, strength.resolved(latent, collected), positions=positions) for kind, latent, strength in asked]
    settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    console().print(run_steer(loaded, lm, prompt, edits, store=collected, **chosen, **settings))


def _latent_and_strength(flag: str, text: str, store: StoreOption) -> tuple[int, Strength]:
    """Return the two sides of "7=8.0"."""
    latent, _, value = text.partition("=")
    strength = None if flag == "scale" and value.endswith("max") else Strength.parse(flag, value, store)
    if not latent.strip().isdecimal() or strength is None:
        multiple = "" if flag == "scale" else f" or --{flag} 7=2max"
        raise ConfigError(f"--{flag} {text}: expected LATENT=NUMBER, such as --{flag} 7=0.5{multiple}")
    return int(latent), strength


@app.command
def doses(
    dictionary: DictionaryPath,
    latent: int,
    *,
    prompt: list[str],
    doses: Annotated[list[str], Parameter(consume_multiple=True)],
    pair: TokenPairOptions = NO_PAIR,
    controls: int = 8,
    seed: int = 0,
    store: StoreOption = None,
    at: AtPortsOptions = ALL_PORTS,
    of: ModelOptions = THE_MODEL,
    json_out: JsonFile = None,
) -> None:
    """Measure the effect and cost of several doses of a latent, beside random latents whose push has the same norm.

    By default, the effect is on the log-probability of the ten tokens that the latent promotes most. --token and --against
    set a pair of tokens instead.

    Parameters
    ----------
    latent
        Number of the latent.
    prompt
        Text to measure on. May be repeated.
    doses
        Amounts to add to the latent's code, e.g. --doses 2 4 8, or with --store --doses 0.5max 1max 2max, multiples of its
        largest activation.
    controls
        Number of random latents to compare with.
    seed
        Seed that picks the random latents.
    """
    import saelens_lite as sl
    from saelens_lite.files import write_json

    metric = pair.metric() or "promoted"
    strengths = [_dose(text, store) for text in doses]
    chosen = at.chosen(of)
    loaded, lm = of.load(dictionary)
    collected = store_of(store, loaded)
    amounts = [strength.resolved(latent, collected) for strength in strengths]
    settings = {"n_controls": controls, "seed": seed, "store": collected, **chosen}
    response = sl.dose_response(loaded, lm, latent, amounts, prompt, metric=metric, **settings)
    console().print(response)
    if json_out:
        write_json(json_out, response.to_dict(), limit=math.inf)


def _dose(text: str, store: StoreOption) -> Strength:
    strength = Strength.parse("doses", text, store)
    if strength is None:
        raise ConfigError(f"--doses {text}: expected numbers, such as --doses 2 4, or multiples such as --doses 0.5max 1max")
    return strength


@app.command
def attribute(
    dictionary: DictionaryPath,
    *,
    prompt: str,
    pair: TokenPairOptions = NO_PAIR,
    top: int = 15,
    ablation: bool = True,
    store: StoreOption = None,
    at: AtPortsOptions = ALL_PORTS,
    of: ModelOptions = THE_MODEL,
    json_out: JsonFile = None,
) -> None:
    """Show which latents drive the model's prediction: by exact ablation, by gradient, and by direct effect on the logits.

    By default, effects are on the mean loss over the prompt. --token and --against set a pair of tokens instead.

    Parameters
    ----------
    prompt
        Text that the model reads. Only latents that fire on it are shown.
    top
        Rows to show.
    ablation
        Also ablate each latent. This takes one forward pass per latent.
    """
    import saelens_lite as sl
    from saelens_lite.files import write_json

    metric, chosen = pair.metric() or "loss", at.chosen(of)
    loaded, lm = of.load(dictionary)
    collected = store_of(store, loaded)
    attribution = sl.attribute(loaded, lm, prompt, metric, ablation=ablation, store=collected, **chosen)
    console().print(attribution.table(top))
    if json_out:
        write_json(json_out, attribution.to_dict(), limit=math.inf)


@app.command(name="prompt")
def show_prompt(
    dictionary: DictionaryPath,
    *,
    prompt: str,
    by: Literal["activation", "relative", "attribution"] = "activation",
    store: StoreOption = None,
    pair: TokenPairOptions = NO_PAIR,
    top: int = 5,
    at: AtPortsOptions = ALL_PORTS,
    of: ModelOptions = THE_MODEL,
    json_out: JsonFile = None,
) -> None:
    """Show which latents fire at each token of a text.

    Attributions are effects on the mean loss over the text. --token and --against set a pair of tokens instead.

    Parameters
    ----------
    prompt
        The text.
    by
        Order of the latents at a token: activation (largest first), relative (largest share of the latent's maximum; needs
        --store), or attribution (largest effect by gradient).
    top
        Latents to show per token.
    """
    import saelens_lite as sl
    from saelens_lite.files import write_json

    metric, chosen = pair.metric(), at.chosen(of)
    loaded, lm = of.load(dictionary)
    view = sl.prompt_view(loaded, lm, prompt, by, store=store_of(store, loaded), metric=metric, top=top, **chosen)
    console().print(view)
    if json_out:
        write_json(json_out, view.to_dict(), limit=math.inf)
