"""Dose–response: the effect and cost of growing amounts of a latent, compared with random latents.

A dose a adds a · W_dec[latent] to the activation at every counted position and keeps the error term. If the dictionary
normalises each activation, the sum is multiplied by the scale of that activation. Each control is a latent that fires on the
same text, with a dose that adds a vector of the same norm. The cost is KL(clean ‖ edited), nats per token.

Source: Turner et al. 2023, Steering language models with activation engineering, arXiv:2308.10248 (adding a direction; random
ones of equal norm for comparison).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saelens_lite.arrays import plain
from saelens_lite.dictionary import Dictionary
from saelens_lite.errors import ConfigError
from saelens_lite.features import FeatureStore
from saelens_lite.features.html import short
from saelens_lite.features.summary import About
from saelens_lite.interventions.edits import Add
from saelens_lite.interventions.metrics import LogProb, Metric, kl_divergence, metric_of, name_of, values_of
from saelens_lite.interventions.site import Reading, Site, pieces
from saelens_lite.model import AnyModel, LanguageModel
from saelens_lite.ports import PortNames
from saelens_lite.progress import progress_bar
from saelens_lite.tables import Result, grid
from saelens_lite.tokens import Given

N_PROMOTED = 10


@dataclass(frozen=True)
class DoseResponse(Result):
    """The effects and costs of doses. The first of `latents` is the one asked for; the others are controls of equal norm.

    `effect` is the change of the metric and `kl` the cost in nats per token, for each dose, latent and row of text.
    `max_activation` is the largest code of the latent at the counted positions: the scale of a natural dose.
    `about` has the label, the promoted token and the largest activation in a feature store; None without one.
    """

    latent: int
    controls: tuple[int, ...]
    doses: tuple[float, ...]
    metric: str
    hook: str
    n_tokens: int
    max_activation: float
    clean: Float[Tensor, " rows"]
    effect: Float[Tensor, "doses latents rows"]
    kl: Float[Tensor, "doses latents rows"]
    about: About | None = None

    def summary(self) -> list[dict[str, float]]:
        """Return one record per dose: means over rows, their standard error, and mean and standard deviation over controls.

        `beaten` counts the controls with a smaller effect than the latent's, in the direction of the latent's effect.
        """
        effects, costs = self.effect.mean(-1), self.kl.mean(-1)
        n_rows, n_controls = self.effect.shape[-1], len(self.controls)
        lines = []
        for dose, effect, cost, by_row in zip(self.doses, effects, costs, self.effect[:, 0], strict=True):
            line = {"dose": dose, "effect": float(effect[0]), "kl": float(cost[0])}
            if n_rows > 1:
                line["effect_se"] = float(by_row.std() / n_rows**0.5)
            if n_controls:
                line["beaten"] = int((effect[1:] * effect[0].sign() < effect[0].abs()).sum())
                line |= {"control_effect": float(effect[1:].mean()), "control_kl": float(cost[1:].mean())}
            if n_controls > 1:
                line["control_effect_sd"] = float(effect[1:].std())
            lines.append(line)
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Return the summary and its settings as plain data."""
        facts = ("latent", "metric", "hook", "n_tokens", "max_activation")
        return {
            **{key: getattr(self, key) for key in facts},
            "controls": list(self.controls),
            "n_rows": len(self.clean),
            "clean": float(self.clean.mean()),
            "doses": self.summary(),
            **({} if self.about is None else {"about": plain(self.about)}),
        }

    def columns(self) -> dict[str, list[Any]]:
        """Return the summary, column by column; with a store, also the doses as multiples of the maximum (`of_max`)."""
        lines = self.summary()
        columns = {name: [line[name] for line in lines] for name in lines[0]}
        largest = self.about.max if self.about else 0.0
        return columns | ({"of_max": [dose / largest for dose in self.doses]} if largest else {})

    def table(self) -> Any:
        """Return a rich table with one row per dose."""
        known = [] if self.about is None else [f"largest activation in the store {short(self.about.max)}", self.about.words]
        title = "; ".join([f"latent {self.latent}", *filter(None, known)])
        caption = (
            f"change of {self.metric} (clean {float(self.clean.mean()):.4f}) and KL in nats per token; {self.n_tokens:,} "
            f"tokens in {len(self.clean)} row{'s' * (len(self.clean) > 1)}, on which the latent reaches "
            f"{self.max_activation:.3g}; ± standard error over rows, of controls standard deviation"
        )
        rows = []
        for line in self.summary():
            of_max = [f"{line['dose'] / self.about.max:.2g}"] if self.about and self.about.max else []
            cells = [f"{line['dose']:.4g}", *of_max, _plus_minus(line, "effect", "effect_se"), f"{line['kl']:.4f}"]
            if self.controls:
                cells += [_plus_minus(line, "control_effect", "control_effect_sd"), f"{line['control_kl']:.4f}"]
                cells.append(f"{line['beaten']}/{len(self.controls)}")
            rows.append(cells)
        titles = (
            "dose",
            *["of max"] * bool(self.about and self.about.max),
            "effect",
            "KL",
            f"{len(self.controls)} controls",
            "KL of controls",
            "beaten",
        )
        settings = {"justify": "right", "no_wrap": True}
        return grid(titles, rows, title=title, caption=caption, column=lambda title: settings, collapse_padding=True)

    def plot(self) -> Any:
        """Return a matplotlib figure of the effect over dose and over cost, with the controls in grey.

        Raises:
            ConfigError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise ConfigError("plots need matplotlib: pip install 'saelens-lite[notebooks]'") from None
        figure = Figure(figsize=(9, 3.5), layout="constrained")
        by_dose, by_cost = figure.subplots(1, 2, sharey=True)
        order = sorted(range(len(self.doses)), key=self.doses.__getitem__)
        doses = [self.doses[i] for i in order]
        effects, costs = self.effect.mean(-1)[order], self.kl.mean(-1)[order]
        for j in reversed(range(effects.shape[1])):  # draws the latent on top
            style = {"color": "tab:red", "marker": "o", "label": f"latent {self.latent}"} if j == 0 else {"color": "0.75"}
            label = {"label": "controls of equal norm"} if j == 1 else {}
            by_dose.plot(doses, effects[:, j].tolist(), **style | label)
            by_cost.plot(costs[:, j].tolist(), effects[:, j].tolist(), **style | label)
        figure.suptitle(self.metric, size="medium")
        by_dose.set(xlabel="dose", ylabel="change")
        by_cost.set(xlabel="KL(clean ‖ edited), nats per token")
        by_dose.legend(frameon=False)
        return figure


def dose_response(
    dictionary: Dictionary,
    lm: AnyModel | Mapping[str, LanguageModel],
    latent: int,
    doses: Sequence[float | int],
    text: Given,
    *,
    attention_mask: Any = None,
    metric: Any = "promoted",
    position: int | None = None,
    n_controls: int = 8,
    seed: int = 0,
    store: FeatureStore | None = None,
    hook: str | None = None,
    ports: PortNames = None,
    in_model: str | None = None,
    batch_tokens: int = 2048,
) -> DoseResponse:
    """Return the effect on a metric and the cost of each dose of a latent, and the same for random live latents.

    Args:
        text, attention_mask: text or token ids, as `LanguageModel.to_tokens` takes them.
        metric: "promoted" is the log-probability, nats, that the next token is one of the 10 tokens whose logits the latent's
            direction raises most, as a mean over the counted positions. Or any metric that `attribute` takes.
        position: position of the metric.
        seed: seed that draws the controls from the latents that fire on the text.
        store: feature store of this dictionary, for the latent's label and largest activation. `store.strength(latent, 2)` is
            a dose of twice that.
        ports: keys or hooks of the write ports to change; default: all of the model that is measured.
        in_model: name of the model whose logits are measured, if the dictionary writes several.

    Raises:
        ConfigError: the latent does not exist, a dose is missing or not finite, the metric is unknown, there are fewer live
            latents than controls, the store is of another dictionary, or there are several models to choose from.
        HookError, ShapeError, TextError: the model lacks the hook, a width does not fit, or the text is empty.
        NonFiniteError: the metric is NaN or infinite.
    """
    given = tuple(Add(latent, dose).amount for dose in doses)
    if not given or n_controls < 0:
        raise ConfigError(f"doses = {list(doses)}, n_controls = {n_controls}; expected at least one dose, and n_controls ≥ 0")
    if store is not None:
        store.info.check_dictionary(dictionary)
    site = Site(dictionary, lm, hook, ports=ports, in_model=in_model)
    dictionary.check_edits([Add(latent, 0.0)])
    readings = [site.read(row) for row in site.rows(text, attention_mask)]
    controls = _controls(site, readings, latent, n_controls, seed)
    directions = _of_equal_norm(site, [latent, *controls])
    added = (torch.tensor(given, device=directions.device)[:, None, None] * directions).flatten(0, 1)  # [(doses latents) d_out]
    asked = (
        LogProb(_promoted(site.lm, site.parts(directions[0]))) if isinstance(metric, str) and metric == "promoted" else metric
    )
    clean, effect, kl = [], [], []
    with progress_bar("doses", len(readings), "rows") as advance:
        for reading in readings:
            measure = metric_of(asked, site.lm, reading.tokens, position, reading.counted)
            before, changes, costs = _respond(site, reading, added, measure, batch_tokens)
            clean.append(before)
            effect.append(changes.unflatten(0, (len(given), -1)))
            kl.append(costs.unflatten(0, (len(given), -1)))
            advance(1, "")
    return DoseResponse(
        latent=latent,
        controls=tuple(controls),
        doses=given,
        metric=name_of(asked, site.lm),
        hook=site.writes,
        n_tokens=sum(int(reading.counted.sum()) for reading in readings),
        max_activation=max(_largest_code(reading, latent) for reading in readings),
        clean=torch.stack(clean),
        effect=torch.stack(effect, -1),
        kl=torch.stack(kl, -1),
        about=None if store is None else store.about(latent),
    )


@torch.no_grad()
def _respond(
    site: Site, reading: Reading, added: Float[Tensor, "n d_out"], measure: Metric, batch_tokens: int
) -> tuple[Float[Tensor, ""], Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Return the metric of one row, then its change and the KL for each vector that is added at the counted positions."""
    tokens, counted = reading.tokens, reading.counted
    clean = site.clean_logits(tokens)
    before = values_of(measure, clean)
    changes, costs = [], []
    for piece in pieces(len(added), tokens, batch_tokens):
        logits = site.logits(tokens, added[piece, None] * reading.scale * counted[:, None])
        changes.append(values_of(measure, logits) - before)
        costs.append(kl_divergence(clean[0], logits, counted))
    return before[0].cpu(), torch.cat(changes).cpu(), torch.cat(costs).cpu()


def _controls(site: Site, readings: list[Reading], latent: int, n: int, seed: int) -> list[int]:
    """Return random other latents that fire at a counted position and have a direction."""
    W_dec = site.parts(site.dictionary.W_dec)
    fires = torch.zeros(len(W_dec), dtype=torch.bool, device=W_dec.device)
    for reading in readings:
        fires[reading.codes.latent[reading.counted[reading.codes.row]]] = True
    fires &= W_dec.norm(dim=1) > 0
    fires[latent] = False
    live = fires.nonzero().squeeze(1).tolist()
    if len(live) < n:
        raise ConfigError(f"only {len(live)} other latents fire on the text; give more text, or n_controls below {n}")
    order = torch.randperm(len(live), generator=torch.Generator().manual_seed(seed))
    return [live[i] for i in order[:n].tolist()]


def _largest_code(reading: Reading, latent: int) -> float:
    """Return the largest code of a latent at the counted positions, or 0 if it does not fire."""
    codes = reading.codes
    counts = reading.counted[codes.row] & (codes.latent == latent)
    return max([0.0, *codes.value[counts].tolist()])


def _of_equal_norm(site: Site, latents: list[int]) -> Float[Tensor, "n d_out"]:
    """Return the directions of latents at the changed ports, scaled to the norm of the first; zero at other ports."""
    directions = site.whole(site.parts(site.dictionary.W_dec.detach()[latents]))
    norm = directions.norm(dim=1, keepdim=True)
    if not norm[0] > 0:
        raise ConfigError(f"latent {latents[0]} has no direction: its row of W_dec is zero")
    return directions * (norm[0] / norm)


def _promoted(lm: LanguageModel, direction: Float[Tensor, " d_out"]) -> tuple[int, ...]:
    """Return the tokens whose logits a direction of the residual stream raises most."""
    if lm.d_vocab <= N_PROMOTED:
        raise ConfigError(
            f"metric 'promoted' needs more than {N_PROMOTED} tokens, but {lm.name} has only {lm.d_vocab}; give another metric="
        )
    if len(direction) != lm.d_model:
        raise ConfigError(
            f"metric 'promoted' needs directions of width d_model = {lm.d_model}, not {len(direction)}; give another metric="
        )
    return tuple((lm.unembedding() @ direction.float()).topk(N_PROMOTED).indices.tolist())


def _plus_minus(line: dict[str, float], value: str, spread: str) -> str:
    return f"{line[value]:+.4f}" + (f" ±{line[spread]:.2g}" if spread in line else "")
