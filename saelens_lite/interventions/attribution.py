"""Attribution: the contribution of each active latent to a metric of the logits, measured in three ways.

Let y = Σ_i f_i W_dec[i] + b + error at the dictionary's hook, with a constant error. The effect of an active latent i at a
position is the drop of the metric m without it:

    ablation   m(y) − m(y − f_i W_dec[i])                                          exact, one forward pass each
    gradient   f_i ∂m/∂f_i = f_i ⟨W_dec[i], ∂m/∂y⟩                                  first order, one backward pass for all
    direct     f_i ⟨W_dec[i], W_Uᵀ ∂m/∂u⟩ / σ                                      the path that skips all later layers

u is the output of the unembedding (the logits, before some models scale or cap them). W_U includes the scale of the final norm.
σ is the divisor of that norm, also held constant. Direct effects exist only on the residual stream. If the dictionary
normalises each activation, f_i is multiplied by the scale of that activation.

Source: Marks et al. 2024, Sparse feature circuits, arXiv:2403.19647, section 3 (gradient, with error nodes; here the patch is 0
and the sign is reversed, so that a contribution is positive); Elhage et al. 2021, A mathematical framework for transformer
circuits (direct).
"""

import math
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelens_lite.arrays import plain
from saelens_lite.codes import SparseCodes
from saelens_lite.codes.products import pair_products
from saelens_lite.dictionary import Dictionary
from saelens_lite.errors import ConfigError, HookError
from saelens_lite.features import FeatureStore
from saelens_lite.features.html import quoted
from saelens_lite.features.summary import About
from saelens_lite.interventions.metrics import Metric, metric_of, name_of, values_of
from saelens_lite.interventions.site import CountedRow, Reading, Site, pieces
from saelens_lite.model import AnyModel, LanguageModel
from saelens_lite.ports import PortNames
from saelens_lite.progress import progress_bar
from saelens_lite.tables import Result, grid, legend
from saelens_lite.tokens import Given

LAST_STREAM, UNEMBEDDED = "ln_final.hook_in", "unembed.hook_out"
ON_STREAM = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post")
WAYS = ("ablation", "gradient", "direct")


class Agreement(NamedTuple):
    """The correlations of the effects by two ways, over all entries. NaN if one of them is constant."""

    spearman: float
    pearson: float


@dataclass(frozen=True)
class Attribution(Result):
    """Effects on a metric. Entry j belongs to `latent[j]`, which fires with `activation[j]` at `position[j]` of row `row[j]`.

    Effects are in the metric's unit. `value` is the metric of each row. `error` is the effect by gradient of the reconstruction
    error at the same positions. `direct` is None off the residual stream, and 0 at positions whose logits the metric does not
    read. `ablation` is None unless it was requested. `about` has the meaning and scale of each latent; None without a store.
    """

    metric: str
    hook: str
    tokens: tuple[tuple[str, ...], ...]
    value: Float[Tensor, " rows"]
    error: Float[Tensor, " rows"]
    row: Int[Tensor, " n"]
    position: Int[Tensor, " n"]
    latent: Int[Tensor, " n"]
    activation: Float[Tensor, " n"]
    gradient: Float[Tensor, " n"]
    direct: Float[Tensor, " n"] | None
    ablation: Float[Tensor, " n"] | None
    about: dict[int, About] | None = None

    @property
    def effects(self) -> dict[str, Float[Tensor, " n"]]:
        """The effects by way, the most exact way first."""
        return {way: getattr(self, way) for way in WAYS if getattr(self, way) is not None}

    @property
    def agreement(self) -> dict[tuple[str, str], Agreement]:
        """The agreement of each pair of ways."""
        effects = list(self.effects.items())
        return {(a, b): _agreement(x, y) for i, (a, x) in enumerate(effects) for b, y in effects[i + 1 :]}

    def only(self, keep: Bool[Tensor, " n"]) -> "Attribution":
        """Return the entries where `keep` is true."""
        entries = {"row": self.row, "position": self.position, "latent": self.latent, "activation": self.activation}
        return replace(self, **{name: x[keep] for name, x in (entries | self.effects).items()})

    def strongest(self, n: int = 10) -> Int[Tensor, " k"]:
        """Return the entries with the n largest absolute effects, by ablation if present, else by gradient."""
        effect = next(iter(self.effects.values()))
        return effect.abs().argsort(descending=True, stable=True)[:n]

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain data."""
        entries = {"row": self.row, "position": self.position, "latent": self.latent, "activation": self.activation}
        return {
            "metric": self.metric,
            "hook": self.hook,
            "tokens": [list(row) for row in self.tokens],
            "value": self.value.tolist(),
            "error": self.error.tolist(),
            **{name: x.tolist() for name, x in (entries | self.effects).items()},
            "agreement": {f"{a}, {b}": plain(both) for (a, b), both in self.agreement.items()},
            **({} if self.about is None else {"about": {str(latent): plain(one) for latent, one in self.about.items()}}),
        }

    def columns(self) -> dict[str, list[Any]]:
        """Return the entries, column by column; with a store, also `of_max`, `label` and `promoted`."""
        entries = {"row": self.row, "position": self.position, "latent": self.latent, "activation": self.activation}
        columns = {name: x.tolist() for name, x in (entries | self.effects).items()}
        places = zip(columns["row"], columns["position"], strict=True)
        columns["token"] = [self.tokens[row][position] for row, position in places]
        if self.about is not None:
            about = [self.about[latent] for latent in columns["latent"]]
            shares = zip(columns["activation"], about, strict=True)
            columns["of_max"] = [activation / one.max if one.max else math.nan for activation, one in shares]
            columns |= {"label": [one.label for one in about], "promoted": [one.promoted for one in about]}
        return columns

    def table(self, n: int = 10) -> Any:
        """Return a rich table of the n strongest effects and the agreement of the ways; with a store, also of the latents."""
        from rich.console import Group

        strongest = self.strongest(n)
        if self.about is None:
            return self._effects_table(strongest)
        latents = dict.fromkeys(self.latent[strongest].tolist())
        return Group(self._effects_table(strongest), legend({latent: self.about[latent] for latent in latents}))

    def _effects_table(self, entries: Int[Tensor, " k"]) -> Any:
        """Return a rich table of some entries."""
        several = len(self.tokens) > 1
        rows = []
        for j in entries.tolist():
            row, position = int(self.row[j]), int(self.position[j])
            place = [str(row)] * several + [str(position), quoted(self.tokens[row][position]), str(int(self.latent[j]))]
            numbers = [
                f"{float(self.activation[j]):.3g}",
                *self._share_of_max(j),
                *(f"{float(effect[j]):+.4f}" for effect in self.effects.values()),
            ]
            rows.append((*place, *numbers))
        return grid(
            (*["row"] * several, "position", "token", "latent", "activation", *["of max"] * bool(self.about), *self.effects),
            rows,
            caption="\n".join(self._remarks()),
            column=lambda title: {"justify": "left" if title == "token" else "right"},
            collapse_padding=True,
        )

    def _share_of_max(self, j: int) -> list[str]:
        """Return the activation of an entry as a share of its latent's maximum in the store, in a list; empty without one."""
        if not self.about:
            return []
        largest = self.about[int(self.latent[j])].max
        return [f"{float(self.activation[j]) / largest:.0%}" if largest else ""]

    def _remarks(self) -> list[str]:
        """Return a summary in words, one remark per line."""
        rest = f"what is not reconstructed {float(self.error.mean()):+.4f} by gradient"
        return [
            f"{self.metric} = {float(self.value.mean()):.4f}; {len(self.latent)} active latents; {rest}",
            *(f"{a} and {b}: Spearman {x.spearman:.3f}, Pearson {x.pearson:.3f}" for (a, b), x in self.agreement.items()),
        ]


def attribute(
    dictionary: Dictionary,
    lm: AnyModel | Mapping[str, LanguageModel],
    text: Given,
    metric: Any = "loss",
    *,
    attention_mask: Any = None,
    position: int | None = None,
    at: Iterable[int] | int | None = None,
    ablation: bool = True,
    store: FeatureStore | None = None,
    hook: str | None = None,
    ports: PortNames = None,
    in_model: str | None = None,
    batch_tokens: int = 2048,
) -> Attribution:
    """Return the effect of each active latent on a metric of the logits of its row.

    Args:
        text, attention_mask: text or token ids, as `LanguageModel.to_tokens` takes them.
        metric: "loss" (mean cross-entropy of the next token, nats); a pair of tokens (text or ids) for the difference of their
            logits; `saelens_lite.interventions.LogProb`; or a differentiable function from the logits [n pos d_vocab] of n
            variants of one row to a number [n].
        position: position of the metric; default: all for the loss, the last for a difference.
        at: positions whose latents are measured; default: all that the dictionary was trained on.
        ablation: also ablate each latent, one at a time, in batches of `batch_tokens` tokens.
        store: feature store of this dictionary, for labels, promoted tokens and largest activations.
        ports: keys or hooks of the write ports at which a latent has its effect; default: all of the model that is measured.
        in_model: name of the model whose logits are measured, if the dictionary writes several.

    Raises:
        ConfigError: the metric is unknown or has no gradient, a position is not in the row, no hook is named, the model is
            processed in another way, the store is of another dictionary, or there are several models to choose from.
        HookError, ShapeError, TextError: the model lacks the hook, a width does not fit, or the text is empty.
        NonFiniteError: the metric is NaN or infinite.
    """
    if store is not None:
        store.info.check_dictionary(dictionary)
    site = Site(dictionary, lm, hook, ports=ports, in_model=in_model)
    at = at if at is None or isinstance(at, int) else tuple(at)
    unembedding = _direct_unembedding(site)
    rows = [_RowEffects(site, row, metric, position, at, unembedding) for row in site.rows(text, attention_mask)]
    ablated = None
    if ablation:
        with progress_bar("ablate", sum(len(row.codes.latent) for row in rows), "latents") as advance:
            ablated = torch.cat([row.ablation(batch_tokens, advance) for row in rows])
    latent = torch.cat([row.codes.latent for row in rows]).cpu()
    return Attribution(
        metric=name_of(metric, site.lm),
        hook=site.writes,
        tokens=tuple(tuple(site.lm.vocabulary.row(row.reading.tokens.tolist())) for row in rows),
        value=torch.stack([row.value for row in rows]).cpu(),
        error=torch.stack([row.error for row in rows]).cpu(),
        row=torch.repeat_interleave(torch.tensor([len(row.codes.latent) for row in rows])),
        position=torch.cat([row.codes.row for row in rows]).cpu(),
        latent=latent,
        activation=torch.cat([row.codes.value for row in rows]).cpu(),
        gradient=torch.cat([row.gradient for row in rows]).cpu(),
        direct=torch.cat([row.direct for row in rows]).cpu() if unembedding is not None else None,
        ablation=ablated,
        about=None if store is None else {i: store.about(i) for i in latent.unique().tolist()},
    )


class _RowEffects:
    """One row: the codes at the measured positions, and their effects by gradient."""

    def __init__(
        self,
        site: Site,
        row: CountedRow,
        metric: Any,
        position: int | None,
        at: tuple[int, ...] | int | None,
        unembedding: Float[Tensor, "d_vocab d_model"] | None,
    ):
        self.site, self.metric = site, metric_of(metric, site.lm, row.tokens, position, row.counted)
        last = site.key(LAST_STREAM)
        self.reading = site.read(row, *([] if unembedding is None else [last]))
        here = _chosen(at, row.counted)
        self.codes = _at_positions(self.reading.codes, here)
        self.written = self.codes.value * self.reading.scale[self.codes.row, 0]  # f_i in the units of y
        at_target, at_unembedded, self.value = _gradients(site, self.reading, self.metric, direct=unembedding is not None)
        self.gradient = self._products(at_target)
        self.error = (at_target * self.reading.error)[here].sum()
        if unembedding is not None:
            divisor = site.lm.final_norm_divisor(self.reading.acts[last])
            self.direct = self._products(site.whole(at_unembedded.float() @ unembedding / divisor[:, None]))

    def _products(self, gradient: Float[Tensor, "pos d_out"]) -> Float[Tensor, " n"]:
        """Return f_i ⟨W_dec[i], gradient⟩ of each entry."""
        W_dec = self.site.dictionary.W_dec.detach()
        return self.written * pair_products(self.codes.support, gradient.to(W_dec.dtype), W_dec)

    @torch.no_grad()
    def ablation(self, batch_tokens: int, advance: Any) -> Float[Tensor, " n"]:
        """Return the effect of each entry, from one forward pass without it."""
        tokens, codes, W_dec = self.reading.tokens, self.codes, self.site.dictionary.W_dec
        effects = [codes.value.new_zeros(0).cpu()]
        for piece in pieces(len(codes.latent), tokens, batch_tokens):
            latent, place, value = codes.latent[piece], codes.row[piece], self.written[piece]
            added = W_dec.new_zeros(len(latent) + 1, len(tokens), W_dec.shape[1])  # the last is clean, rounded like the others
            added[torch.arange(len(latent), device=place.device), place] = -value[:, None] * W_dec.index_select(0, latent)
            values = values_of(self.metric, self.site.logits(tokens, added))
            effects.append((values[-1] - values[:-1]).cpu())
            advance(len(latent), "")
        return torch.cat(effects)


def _direct_unembedding(site: Site) -> Float[Tensor, "d_vocab d_model"] | None:
    """Return W_U if the dictionary writes to the residual stream and only one norm lies before W_U, else None."""
    if len(site.places) > 1 or not site.writes.endswith(ON_STREAM):
        return None
    try:
        for hook in (LAST_STREAM, UNEMBEDDED):
            site.lm.hook_point(hook)
        return site.lm.unembedding()
    except (HookError, ConfigError):
        return None


def _chosen(at: tuple[int, ...] | int | None, counted: Bool[Tensor, " pos"]) -> Bool[Tensor, " pos"]:
    """Return the positions whose latents are measured. Raise ConfigError if one is not in the row."""
    if at is None:
        return counted
    n, named = len(counted), [at] if isinstance(at, int) else list(at)
    if not named or not all(isinstance(i, int) and -n <= i < n for i in named):
        raise ConfigError(f"at = {at!r}; expected positions of the row, which has {n} tokens")
    here = torch.zeros_like(counted)
    here[named] = True
    return here


def _at_positions(codes: SparseCodes, here: Bool[Tensor, " pos"]) -> SparseCodes:
    """Return the codes at some positions."""
    keep = here[codes.row]
    return codes._replace(support=codes.support.where(keep), value=codes.value[keep])


def _gradients(
    site: Site, reading: Reading, metric: Metric, direct: bool
) -> tuple[Float[Tensor, "pos d_out"], Float[Tensor, "pos d_vocab"] | None, Float[Tensor, ""]]:
    """Return ∂m/∂y at the written hook, ∂m/∂u at the output of the unembedding (if `direct`), and m."""
    added = torch.zeros_like(reading.error)[None].requires_grad_()
    unembedded: list[Tensor] = []

    def note(u: Tensor) -> Tensor:
        unembedded[:] = [u]
        return u

    with site.lm.replace(UNEMBEDDED, note) if direct else nullcontext():
        logits = site.logits(reading.tokens, added, differentiable=True)
    with torch.enable_grad():
        (value,) = values_of(metric, logits)
    if not value.requires_grad:
        raise ConfigError(f"the metric {metric} has no gradient; it must be a differentiable function of the logits")
    at_target, *at_unembedded = torch.autograd.grad(value, (added, *unembedded))
    return at_target[0], at_unembedded[0][0] if direct else None, value.detach()


def _agreement(a: Float[Tensor, " n"], b: Float[Tensor, " n"]) -> Agreement:
    x, y = a.double().numpy(), b.double().numpy()
    return Agreement(_correlation(_ranks(x), _ranks(y)), _correlation(x, y))


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(np.corrcoef(x, y)[0, 1])


def _ranks(x: np.ndarray) -> np.ndarray:
    """Return ranks from 1; equal values share their mean rank."""
    _, place, count = np.unique(x, return_inverse=True, return_counts=True)
    return (count.cumsum() - (count - 1) / 2)[place]
