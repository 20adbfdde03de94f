"""The error of a dictionary at the hook that it names, beside the same at the places that are often confused with it.

These are, in the same block, the activations before and after each norm and each sum of the residual stream, what the heads
give to the attention's output (hook_z), and the other heads of a hook of one head; then the same hook one block before and
after; the activation without its mean over d_model ("centred"); and the activation scaled so that its mean norm is √d
("scaled"), unless it is within 10 % of that. Of a transcoder, one side varies at a time.

    fvu = Σ‖y − ŷ‖² / Σ‖y − mean‖²      over the tokens that count, with y as the place has it, centred or scaled

Another place fits clearly better if its fvu is below 0.7 and at most two thirds of that at the hook, and if

- at most 1.5 times as many latents fire there, or
- fvu at the hook is above 0.9, so that the dictionary explains next to nothing there, and the number of latents that fire at
  the other place is below half of d_in and of d_sae.

The number of latents counts because most dictionaries have a lower error where more latents fire, such as on an activation of
twice the size. Where the stream changes little from one layer to the next, a wrong layer is not clearly worse, and only the
table shows it.
"""

import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from saelens_lite.config import TextConfig
from saelens_lite.devices import on_device, where_float64_is
from saelens_lite.dictionary import Dictionary
from saelens_lite.errors import ConfigError, HookError, ShapeError, TextError, not_a_dictionary
from saelens_lite.evaluation.text_rows import as_trained, row_blocks
from saelens_lite.model import AnyModel, LanguageModel, Models
from saelens_lite.model.passes import activations, default_batch_tokens
from saelens_lite.ports import Hooks, split_head
from saelens_lite.tables import Result, columns_of, grid, wrapped
from saelens_lite.tokens import Text, TokenRows, with_mask

if TYPE_CHECKING:
    from rich.table import Table

IN_BLOCK = (  # hooks of a block that are confused with each other
    "hook_resid_pre", "ln1.hook_normalized", "ln1.hook_out", "attn.hook_in", "attn.hook_z", "attn.hook_out", "hook_attn_out",
    "hook_resid_mid", "ln2.hook_normalized", "ln2.hook_out", "mlp.hook_in", "mlp.hook_out", "hook_mlp_out", "hook_resid_post",
)  # fmt: skip
UNSCALED = 0.1  # a factor that differs from 1 by less is no other place
SAME = 1e-4  # tensors that differ by less, relative to their norm, are one place
MOST_VALUES = 1 << 28  # activations held at once
SOME_TOKENS = 64  # on which tensors are compared
LONGEST_ROW = 1024
MOST_HEADS = 256
SHORT = 512  # tokens of the check that `evaluate` makes
CLEARLY, MORE_LATENTS, GOOD, USELESS = 2 / 3, 1.5, 0.7, 0.9
log = logging.getLogger(__name__)


class Spot(NamedTuple):
    """A hook, and the change of its activation: "", "centred" or "scaled"."""

    hook: str
    change: str = ""

    def __str__(self) -> str:
        return f"{self.hook}, {self.change}" if self.change else self.hook


class HookFit(NamedTuple):
    """A dictionary's error and its mean number of firing latents at a place. `claimed`: the place that it names."""

    reads: str
    writes: str
    fvu: float
    l0: float
    claimed: bool

    def __str__(self) -> str:
        return self.reads if self.reads == self.writes else f"{self.reads} → {self.writes}"


@dataclass(frozen=True)
class HookCheck(Result):
    """The places of a dictionary, those with the lowest error first.

    `claimed` is the place that the dictionary names, None if it names none. `better` is the place that fits clearly better than
    that, if any.
    """

    places: tuple[HookFit, ...]
    better: HookFit | None
    n_tokens: int
    model: str

    @property
    def claimed(self) -> HookFit | None:
        """The place that the dictionary names."""
        return next((place for place in self.places if place.claimed), None)

    @property
    def best(self) -> HookFit:
        """The place that fits clearly better, or else the claimed one; the one with the lowest error if none is claimed."""
        return self.better or self.claimed or self.places[0]

    @property
    def warning(self) -> str:
        """A sentence that names the better place; empty if the dictionary's own place stands."""
        if self.better is None or self.claimed is None:
            return ""
        return (
            f"{self.better} fits this dictionary clearly better than its hook {self.claimed}: fvu {self.better.fvu:.3g} at "
            f"l0 {self.better.l0:.3g}, against {self.claimed.fvu:.3g} at l0 {self.claimed.l0:.3g} on {self.n_tokens:,} tokens"
        )

    def columns(self) -> dict[str, list[Any]]:
        """Return a row for each place, column by column."""
        return columns_of(HookFit, self.places)

    def table(self) -> "Table":
        """Return a rich table of the places."""
        marks = {self.better: "better", self.claimed: "claimed"}
        rows = [(str(place), f"{place.fvu:.3g}", f"{place.l0:.3g}", marks.get(place, "")) for place in self.places]
        title = f"{self.n_tokens:,} tokens; {self.model}"
        return grid(("place", "fvu", "l0", ""), rows, title=title, caption=wrapped(self.warning) if self.warning else "")


@torch.no_grad()
def check_hook(
    dictionary: Dictionary,
    lm: AnyModel | Mapping[str, LanguageModel],
    text: Text | TokenRows,
    *,
    hook: str | None = None,
    n_tokens: int = 4096,
    text_config: TextConfig | None = None,
    attention_mask: Any = None,
) -> HookCheck:
    """Return the error of a dictionary at its hook and at the places that are often confused with it.

    A place that fits clearly better is logged as a warning; saelens_lite.evaluation.placement says which does. A dictionary
    without a hook is measured at all usual hooks of its width.

    Args:
        hook: the hook to read in place of the dictionary's own.
        text, text_config, attention_mask: see `evaluate`.
        n_tokens: number of tokens that count.

    Raises:
        ConfigError: the dictionary has several hooks on a side, or belongs to a model with other processing or to several
            models; several models are given; or it is a transcoder that does not name its hooks.
        HookError: the model lacks the hook.
        ShapeError: the hook has another width than the dictionary.
        TextError: there is no text.
    """
    if n_tokens < 1:
        raise ConfigError(f"n_tokens = {n_tokens}; expected at least 1")
    if not isinstance(dictionary, Dictionary):
        raise not_a_dictionary(dictionary)
    several = len({name for port in (*dictionary.reads, *dictionary.writes) for name in (port.model, port.minus)} - {None}) > 1
    if several or isinstance(lm, Mapping | Models):
        raise ConfigError(
            f"check_hook is for dictionaries of one hook of one model, and takes that model alone; this one is of "
            f"{dictionary.place}" + (": evaluate gives the error of each port" if several else "")
        )
    dictionary.check_finite()
    text = with_mask(text, attention_mask)
    config = None if isinstance(text, TokenRows) else as_trained([dictionary], lm, text, text_config or TextConfig())
    rows = list(first_rows(row_blocks(lm, text, n_tokens, config), n_tokens))
    result = check_rows(dictionary, lm, rows, hook)
    if result.warning:
        log.warning("%s", result.warning)
    return result


def first_rows(blocks: Iterable[TokenRows], n_tokens: int) -> Iterator[TokenRows]:
    """Yield the first rows of a text, until so many tokens count. Long rows are cut."""
    for block in blocks:
        rows = block.narrowed(LONGEST_ROW)
        n_before = rows.keep.sum(1).cumsum(0) - rows.keep.sum(1)
        rows = rows[: int((n_before < n_tokens).sum())]
        n_tokens -= rows.n_kept
        yield rows
        if n_tokens <= 0:
            return


def check_rows(dictionary: Dictionary, lm: LanguageModel, rows: Sequence[TokenRows], hook: str | None = None) -> HookCheck:
    """Return the error of a dictionary at its hook and its neighbours on some token rows; see `check_hook`."""
    if len(dictionary.reads) + len(dictionary.writes) > 2:
        raise ConfigError(f"check_hook compares places of one hook; this dictionary has several: {dictionary.place}")
    if not sum(block.n_kept for block in rows):
        raise TextError("there is no text to check the hook on: none of the positions of the token rows counts")
    dictionary = on_device(dictionary, lm.device)
    search = hook is None and dictionary.reads[0].hook is None and dictionary.writes_what_it_reads
    if search:
        lm.check_origin(dictionary.origin)
        hooks = _readable(lm, rows, [f"blocks.{i}.{name}" for i in range(lm.n_layers) for name in IN_BLOCK], dictionary.d_in)
        if not hooks:
            raise ConfigError(f"none of the usual hooks of {lm.name} has the width of this dictionary, {dictionary.d_in}")
        size = max(1, MOST_VALUES // (default_batch_tokens(lm) * dictionary.d_in))
        groups = [hooks[i : i + size] for i in range(0, len(hooks), size)]
        places = [p for some in groups for p in _measured(dictionary, lm, rows, [(Spot(h), Spot(h)) for h in some], None)]
    else:
        claimed = lm.hooks_of(dictionary, hook)
        places = _measured(dictionary, lm, rows, _neighbours(dictionary, lm, rows, claimed), claimed)
    places = sorted(places, key=lambda place: math.inf if math.isnan(place.fvu) else place.fvu)
    n_tokens = sum(block.n_kept for block in rows)
    return HookCheck(tuple(places), _better(places, dictionary), n_tokens, lm.name)


def _neighbours(
    dictionary: Dictionary, lm: LanguageModel, rows: Sequence[TokenRows], claimed: Hooks
) -> list[tuple[Spot, Spot]]:
    """Return the places to compare, as pairs of a read and a written spot; the claimed one first."""
    read, written = Spot(claimed.reads[0]), Spot(claimed.writes[0])
    if claimed.reads == claimed.writes:
        return [(spot, spot) for spot in _beside(lm, rows, read.hook, dictionary.d_in)]
    varied = [(spot, written) for spot in _beside(lm, rows, read.hook, dictionary.d_in)]
    return varied + [(read, spot) for spot in _beside(lm, rows, written.hook, dictionary.d_out)[1:]]


def _beside(lm: LanguageModel, rows: Sequence[TokenRows], hook: str, width: int) -> list[Spot]:
    """Return a hook and its neighbours, as spots of one width."""
    names = []
    if match := re.fullmatch(r"blocks\.(\d+)\.(.+)", hook):
        layer, name = int(match[1]), match[2]
        names = [f"blocks.{layer}.{other}" for other in IN_BLOCK]
        names += [f"blocks.{near}.{name}" for near in (layer - 1, layer + 1)]
    whole, head = split_head(hook)
    if head is not None:
        names += [f"{whole}.head_{other}" for other in range(MOST_HEADS) if lm.has_hook(f"{whole}.head_{other}")]
    others = [name for name in _readable(lm, rows, list(dict.fromkeys(names)), width) if name != hook]
    return [Spot(hook), Spot(hook, "centred"), Spot(hook, "scaled"), *map(Spot, others)]


def _readable(lm: LanguageModel, rows: Sequence[TokenRows], hooks: list[str], width: int) -> list[str]:
    """Return the hooks that the model has and that hold activations of this width."""
    probe = rows[0][:1].narrowed(2)

    def widths(names: list[str]) -> dict[str, int]:
        try:
            return {name: x.shape[-1] for name, x in lm.run(probe, names).items()} if names else {}
        except HookError:
            return {name: n for one in names for name, n in widths([one]).items()} if len(names) > 1 else {}

    known = widths([name for name in hooks if lm.has_hook(name)])
    return [name for name in hooks if known.get(name) == width]


def _measured(
    dictionary: Dictionary, lm: LanguageModel, rows: Sequence[TokenRows], pairs: list[tuple[Spot, Spot]], claimed: Hooks | None
) -> list[HookFit]:
    """Return the results at pairs of spots, without those whose tensors are those of an earlier pair."""
    hooks = list(dict.fromkeys(spot.hook for pair in pairs for spot in pair))
    size = max(1, min(default_batch_tokens(lm), MOST_VALUES // (len(hooks) * max(dictionary.d_in, dictionary.d_out))))

    def batches() -> Iterator[dict[str, Tensor]]:
        for block in rows:
            for read in activations(lm, block, hooks, size):
                yield {hook: x.float() for hook, x in read.acts.items()}

    norms, n, kept = dict.fromkeys(hooks, 0.0), 0, list[tuple[Spot, Spot]]()
    for i, acts in enumerate(batches()):
        n += len(acts[hooks[0]])
        norms = {hook: norms[hook] + float(x.norm(dim=-1).double().sum()) for hook, x in acts.items()}
        if i == 0:
            for read, written in pairs:
                dictionary.check_input(acts[read.hook])
                if acts[written.hook].shape[-1] != dictionary.d_out:
                    raise ShapeError(f"{written.hook} has width {acts[written.hook].shape[-1]}; expected {dictionary.d_out}")
            kept = _distinct({hook: x[:SOME_TOKENS] for hook, x in acts.items()}, pairs)
    scales = {hook: math.sqrt(acts[hook].shape[-1]) * n / total if total else 1.0 for hook, total in norms.items()}
    sums = {pair: _Sums() for pair in kept if all(s.change != "scaled" or abs(scales[s.hook] - 1) > UNSCALED for s in pair)}
    for acts in batches():
        for pair, of_pair in sums.items():
            x, y = (_changed(acts[spot.hook], spot.change, scales[spot.hook]) for spot in pair)
            codes = dictionary.encode(x)
            of_pair.add(y, dictionary.decode(codes, x).float(), int(codes.l0.sum()))
    own = None if claimed is None else (Spot(claimed.reads[0]), Spot(claimed.writes[0]))
    return [HookFit(*map(str, pair), one.fvu, one.l0 / n, pair == own) for pair, one in sums.items()]


def _distinct(acts: dict[str, Tensor], pairs: list[tuple[Spot, Spot]]) -> list[tuple[Spot, Spot]]:
    """Return the pairs without those whose tensors are those of an earlier pair. Scaled ones stay."""
    kept: list[tuple[Spot, Spot]] = []
    for pair in pairs:
        here = [_changed(acts[spot.hook], spot.change) for spot in pair]
        if not any(
            all(
                spot.change != "scaled" != other.change and _same(x, _changed(acts[other.hook], other.change))
                for x, spot, other in zip(here, pair, earlier, strict=True)
            )
            for earlier in kept
        ):
            kept.append(pair)
    return kept


def _same(a: Float[Tensor, "n d"], b: Float[Tensor, "n d"]) -> bool:
    return bool((a - b).norm() <= SAME * a.norm())


def _changed(x: Float[Tensor, "n d"], change: str, scale: float = 1.0) -> Float[Tensor, "n d"]:
    if change == "centred":
        return x - x.mean(-1, keepdim=True)
    return x * scale if change == "scaled" else x


class _Sums:
    """Sums over the tokens of a place."""

    def __init__(self) -> None:
        self.error = self.square = 0.0
        self.n = self.l0 = 0
        self.total: Tensor | float = 0.0

    def add(self, y: Float[Tensor, "n d"], y_hat: Float[Tensor, "n d"], l0: int) -> None:
        y, y_hat = (where_float64_is(part).double() for part in (y, y_hat))
        self.error += float((y - y_hat).square().sum())
        self.square += float(y.square().sum())
        self.total = self.total + y.sum(0)
        self.n, self.l0 = self.n + len(y), self.l0 + l0

    @property
    def fvu(self) -> float:
        """Σ‖y − ŷ‖² / (Σ‖y‖² − n‖mean‖²); NaN if all activations are the same."""
        variance = self.square - float(torch.as_tensor(self.total).square().sum()) / self.n
        return self.error / variance if variance > 0 else math.nan


def _better(places: Sequence[HookFit], dictionary: Dictionary) -> HookFit | None:
    """Return the first of the places in order that fits clearly better than the claimed one."""
    own = next((place for place in places if place.claimed), None)
    if own is None:
        return None
    narrowest = min(dictionary.d_in, dictionary.d_sae)
    for place in places:
        few = 0 < place.l0 <= MORE_LATENTS * own.l0 or (own.fvu > USELESS and 0 < place.l0 < narrowest / 2)
        if place.fvu < GOOD and place.fvu <= CLEARLY * own.fvu and few:
            return place
    return None
