"""Match the latents of two dictionaries by the directions that they write (decoder) and read (encoder).

    cos(i, j) = W_dec[i] · W_dec′[j] / (‖W_dec[i]‖ ‖W_dec′[j]‖)        and likewise for the columns of W_enc

The Hungarian algorithm matches latents one to one by decoder, so that the sum of the cosines is largest. A latent is shared
when both its decoder and its encoder cosine with its partner exceed the threshold. A row of zeros has cosine 0 with everything.
Source: Paulo and Belrose 2025, Sparse autoencoders trained on the same data learn different features, arXiv:2501.16615
(threshold 0.7). We differ: dead latents are left out, and a control stands beside each figure.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelens_lite.arrays import plain
from saelens_lite.devices import chosen_device
from saelens_lite.dictionary import Dictionary
from saelens_lite.errors import ConfigError, CorruptFileError, NonFiniteError, ShapeError
from saelens_lite.evaluation.comparison import DIFFERS, FLOOR, SHARES, ComparedScores, NoiseFloors, noise_floors
from saelens_lite.evaluation.replicates import KEPT, Recipe, Replicates, recipe_of, weights_id
from saelens_lite.evaluation.sums import with_interval
from saelens_lite.features.info import weights_hash
from saelens_lite.features.tensors import NONE
from saelens_lite.features.weights import cosines_at_once
from saelens_lite.files import parsed_json, write_file, write_json
from saelens_lite.outputs import new_file
from saelens_lite.progress import progress_bar
from saelens_lite.schemas import Checked, String, checked
from saelens_lite.tables import Result, grid, short_names, terminal_width
from saelens_lite.tensor_files import check_axes, check_header, read_tensors, tensor_specs

FORMAT = 1
STABILITY_FILE = "stability.safetensors"
THRESHOLD = 0.7
MOST_HUNGARIAN = 8192  # latents on either side; time grows with the cube, memory with the square (8192: 10 s, 1.5 GB)
TILE = 1024  # latents whose cosines with all others are held at once; more on a GPU that has room for them
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
WIDTH_OF_NUMBERS = 67  # of the columns beside the names in `comparison_table`
N_BINS = 20  # of a histogram of cosines, from −1 to 1

log = logging.getLogger(__name__)
METHODS = ("auto", "hungarian", "mutual")


class Directions(NamedTuple):
    """Unit vectors that some latents write (decoder) and read (encoder); rows of zeros stay zero."""

    decoder: Float[Tensor, "n d_out"]
    encoder: Float[Tensor, "n d_in"]


class Pairs(NamedTuple):
    """The partners of each latent in the other dictionary (−1: no partner) and the cosines with them (0 without a partner).

    `match` and `encoder_match` are one-to-one matchings by decoder and by encoder. `decoder_cosine` and `encoder_cosine` are
    cosines with `match`. `nearest` is the latent with the largest decoder cosine, `nearest_cosine`; several latents can share
    it. `mutual` is true where a latent and its nearest are each other's nearest.
    """

    match: Int[Tensor, " n"]
    decoder_cosine: Float[Tensor, " n"]
    encoder_cosine: Float[Tensor, " n"]
    encoder_match: Int[Tensor, " n"]
    nearest: Int[Tensor, " n"]
    nearest_cosine: Float[Tensor, " n"]
    mutual: Bool[Tensor, " n"]

    def shared(self, threshold: float) -> Bool[Tensor, " n"]:
        """Return a mask of the latents with a partner whose decoder and encoder cosines both exceed the threshold."""
        return (self.match != NONE) & (self.decoder_cosine > threshold) & (self.encoder_cosine > threshold)


class Cosines(NamedTuple):
    """Statistics of cosines: mean, quantiles (QUANTILES), and counts in N_BINS bins of equal width from −1 to 1."""

    mean: float
    quantiles: tuple[float, ...]
    histogram: tuple[int, ...]

    @classmethod
    def of(cls, cosines: Float[Tensor, " n"]) -> "Cosines":
        """Return the statistics of at least one cosine."""
        values = cosines.double().clamp(-1, 1)  # rounding can push the cosine of equal vectors above 1
        quantiles = torch.quantile(values, torch.tensor(QUANTILES, dtype=torch.float64))
        counts = torch.histc(values, N_BINS, -1, 1).long()
        return cls(float(values.mean()), tuple(quantiles.tolist()), tuple(counts.tolist()))


class Summary(NamedTuple):
    """Shares of the live latents, and the cosines of those that have a partner."""

    n_latents: int
    n_matched: int
    shared: float  # partner above the threshold in decoder and encoder
    agree: float  # decoder and encoder matching give the same partner
    mutual: float  # nearest of each other, by decoder
    decoder: Cosines
    encoder: Cosines
    nearest: Cosines  # largest decoder cosine of each live latent with any of the other dictionary

    @classmethod
    def of(cls, pairs: Pairs, threshold: float) -> "Summary":
        """Return the summary of pairs, all of live latents."""
        matched = pairs.match != NONE
        return cls(
            n_latents=len(matched),
            n_matched=int(matched.sum()),
            shared=_share(pairs.shared(threshold)),
            agree=_share(matched & (pairs.match == pairs.encoder_match)),
            mutual=_share(pairs.mutual),
            decoder=Cosines.of(pairs.decoder_cosine[matched]),
            encoder=Cosines.of(pairs.encoder_cosine[matched]),
            nearest=Cosines.of(pairs.nearest_cosine),
        )


@dataclass(frozen=True)
class Comparison(Result):
    """A matching of the latents of one dictionary with those of another.

    `pairs` has an entry for each latent of the dictionary; only `live` latents count. `chance` is the summary against a random
    dictionary with as many latents as the other, drawn from a normal distribution with the other's second moments. Its
    directions prefer the same subspace, so high cosines are more frequent than among uniformly random directions. `recipe` is
    that of the other dictionary, if it is known.
    """

    pairs: Pairs
    live: Bool[Tensor, " d_sae"]
    n_dead: tuple[int, int]
    summary: Summary
    chance: Summary
    threshold: float
    method: str
    sha256: tuple[str, str]
    recipe: Recipe | None = None

    def shares(self) -> ComparedScores:
        """Return the shares of `summary` with replicates in which each live latent counts a Poisson(1) number of times.

        The weights are the same for all comparisons of one dictionary. Latents are taken as independent, which they are not:
        one broad feature may be split among many latents. So intervals and noise floors are approximate, and rather too small.
        """
        pairs = Pairs(*(column[self.live] for column in self.pairs))
        is_matched = pairs.match != NONE
        chosen = (pairs.shared(self.threshold), is_matched & (pairs.match == pairs.encoder_match), pairs.mutual)
        counted, n = torch.stack(chosen).double(), len(is_matched)
        generator = torch.Generator().manual_seed(n)
        values = [counted.mean(1)]
        for _ in range(KEPT):
            weights = torch.poisson(torch.ones(n), generator=generator).double()
            values.append(counted @ weights / weights.sum())
        replicates = dict(zip(SHARES, torch.stack(values).unbind(1), strict=True))
        metrics = {name: with_interval(x) for name, x in replicates.items()}
        weights = weights_id(0, n, self.sha256[0])
        return ComparedScores(metrics, Replicates.of_values(weights, replicates), self.recipe, n)

    @property
    def shared(self) -> Bool[Tensor, " d_sae"]:
        """Mask of the latents that the other dictionary shares."""
        return self.pairs.shared(self.threshold)

    def to_dict(self) -> dict[str, Any]:
        """Return everything except the entries of single latents, as plain data."""
        return {
            "format": FORMAT,
            "summary": plain(self.summary),
            "chance": plain(self.chance),
            "quantiles": QUANTILES,
            **{key: getattr(self, key) for key in ("threshold", "method", "n_dead", "sha256")},
        }

    def to_json(self, path: str | Path | None = None) -> str:
        """Return the figures as JSON. With `path`, also write them to that file."""
        if path is not None:
            write_json(Path(path), self.to_dict())
        return json.dumps(self.to_dict(), indent=2)

    def columns(self) -> dict[str, list[Any]]:
        """Return a row for each latent, column by column: all of `pairs`, `live` and `shared`."""
        columns = self.pairs._asdict() | {"live": self.live, "shared": self.shared}
        return {"latent": list(range(len(self.live)))} | {name: x.tolist() for name, x in columns.items()}

    def table(self) -> Any:
        """Return a rich table of the summary, with chance below it."""
        return comparison_table({"the other": self})


class _Facts(Checked):
    """The metadata of a file of scores."""

    format: Literal[1]
    sha256: String
    other_sha256: list[String]
    threshold: float
    method: String


@dataclass(frozen=True)
class Stability(Result):
    """Scores that say how closely other dictionaries reproduce the latents of one dictionary.

    `score` is the largest decoder cosine with any live latent of another dictionary, averaged over the other dictionaries; it
    does not depend on the matching. `n_shared` counts the dictionaries that share a latent. Both are 0 for latents that are not
    `live`. `sha256` and `other_sha256` are hashes of weights (`weights_hash`), as a feature store records them.
    """

    score: Float[Tensor, " d_sae"]
    n_shared: Int[Tensor, " d_sae"]
    live: Bool[Tensor, " d_sae"]
    sha256: str
    other_sha256: tuple[str, ...]
    threshold: float
    method: str

    @classmethod
    def of(cls, comparisons: Sequence[Comparison]) -> "Stability":
        """Return the scores from comparisons of one dictionary with others, made with the same settings.

        Raises:
            ConfigError: there are no comparisons, or they are of different dictionaries or have different settings.
        """
        if len({(c.sha256[0], c.threshold, c.method, c.n_dead[0]) for c in comparisons}) != 1:
            raise ConfigError("stability needs comparisons of one dictionary with others, all with the same settings")
        first = comparisons[0]
        return cls(
            score=torch.stack([c.pairs.nearest_cosine for c in comparisons]).mean(0),
            n_shared=torch.stack([c.shared for c in comparisons]).sum(0),
            live=first.live,
            sha256=first.sha256[0],
            other_sha256=tuple(c.sha256[1] for c in comparisons),
            threshold=first.threshold,
            method=first.method,
        )

    @property
    def shared_in_all(self) -> float:
        """Share of the live latents that every other dictionary shares."""
        return _share(self.n_shared[self.live] == len(self.other_sha256))

    @property
    def shared_in_none(self) -> float:
        """Share of the live latents that no other dictionary shares."""
        return _share(self.n_shared[self.live] == 0)

    def columns(self) -> dict[str, list[Any]]:
        """Return a row for each latent, column by column."""
        columns = {"live": self.live, "score": self.score, "n_shared": self.n_shared}
        return {"latent": list(range(len(self.live)))} | {name: x.tolist() for name, x in columns.items()}

    def table(self) -> Any:
        """Return a rich table of the summary."""
        n = len(self.other_sha256)
        scores = self.score[self.live].double()
        titles = ("live latents", f"shared with all {n}", "with none", "5 %", "median score", "95 %")
        if not len(scores):
            return grid(titles, [("0", *["–"] * 5)], caption="No latent is live, so nothing is shared.")
        low, median, high = (f"{float(torch.quantile(scores, q)):.2f}" for q in (0.05, 0.5, 0.95))
        return grid(
            titles,
            [(f"{len(scores):,}", f"{self.shared_in_all:.1%}", f"{self.shared_in_none:.1%}", low, median, high)],
            caption=f"shared: decoder and encoder cosine above {self.threshold} ({self.method}); score: largest decoder cosine "
            f"with a latent of another dictionary, as a mean over dictionaries; noise of the shares over latents, as if these "
            f"were independent: ± {1.96 * (0.25 / len(scores)) ** 0.5:.1%} at most; another dictionary adds its own",
            column=lambda title: {"justify": "right"},
            collapse_padding=True,
        )

    def save(self, folder: str | Path, *, exists: Literal["error", "overwrite"] = "error") -> Path:
        """Write stability.safetensors into a folder, such as a dictionary or its feature store, and return the file's path.

        Raises:
            OutputExistsError: the file exists and `exists` is "error".
            LockedError: another process is writing it.
            DiskFullError: the disk is full.
        """
        from safetensors.torch import save_file

        path = Path(folder) / STABILITY_FILE
        facts = {key: value for key, value in vars(self).items() if not isinstance(value, Tensor)}
        tensors = {key: value.contiguous() for key, value in vars(self).items() if isinstance(value, Tensor)}
        metadata = {"stability": json.dumps({"format": FORMAT, **facts})}
        with new_file(path, "file of scores", exists):
            write_file(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))
        return path

    @classmethod
    def load(cls, folder: str | Path) -> "Stability":
        """Return the scores in a folder written by `save`. Compare `sha256` to check that they are of your dictionary.

        Raises:
            CorruptFileError: the file is missing, damaged or of another format.
        """
        path = Path(folder) / STABILITY_FILE
        said = check_header(path)[0].get("__metadata__")
        try:
            facts = parsed_json(said["stability"], finite=True)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise CorruptFileError(f"{path} is damaged: {type(error).__name__}: {error}") from None
        checked(path, facts, _Facts)
        specs = tensor_specs(path)
        check_axes(path, specs, dict.fromkeys(("score", "n_shared", "live"), "d_sae"), {})
        dtypes = (specs["score"].dtype.is_floating_point, specs["n_shared"].dtype, specs["live"].dtype)
        if dtypes != (True, torch.int64, torch.bool):
            raise CorruptFileError(f"{path} must hold score (float), n_shared (int64) and live (bool), but a dtype differs")
        del facts["format"]
        return cls(**read_tensors(path), **facts | {"other_sha256": tuple(facts["other_sha256"])})


def compare(
    a: Dictionary,
    b: Dictionary,
    *,
    threshold: float = THRESHOLD,
    method: str = "auto",
    include_dead: bool = False,
    seed: int = 0,
    device: str | torch.device | None = None,
) -> Comparison:
    """Match the latents of `a` with those of `b`, which may have another number of latents.

    A warning is logged if the dictionaries are of different models or hooks, have equal weights, or were trained with the same
    seed: then they started from the same directions, and their agreement says little about stability.

    Args:
        threshold: Cosine that a shared latent must exceed in both decoder and encoder.
        method: "hungarian" matches latents one to one. "mutual" matches only latents that are each other's nearest; it needs
            memory only for the directions and for the cosines of 1024 latents with all others. "auto" is "hungarian" up to
            8192 live latents on either side, else "mutual"; the result records the choice.
        include_dead: Keep latents whose recorded density is 0, which are otherwise left out on both sides.
        seed: Seed of the random dictionary for `chance`.
        device: Device to compute on. Default: that of `a`; for a dictionary on the CPU, CUDA if available, else MPS if it
            works, else the CPU.

    Raises:
        ShapeError: the dictionaries have different widths.
        NonFiniteError: a weight is NaN or infinite.
        ConfigError: the threshold, method or device is invalid, all latents are dead, or "hungarian" is chosen without scipy.
    """
    settings = {"threshold": threshold, "method": method, "include_dead": include_dead, "seed": seed, "device": device}
    return compare_all(a, [b], **settings)[0]


def stability(
    dictionary: Dictionary,
    others: Dictionary | Sequence[Dictionary],
    *,
    threshold: float = THRESHOLD,
    method: str = "auto",
    include_dead: bool = False,
    seed: int = 0,
    device: str | torch.device | None = None,
) -> Stability:
    """Score how closely other dictionaries, such as those of other seeds, reproduce each latent; settings as for `compare`.

    Raises:
        ShapeError, NonFiniteError, ConfigError: as for `compare`; ConfigError also when `others` is empty.
    """
    several = [others] if isinstance(others, Dictionary) else list(others)
    settings = {"threshold": threshold, "method": method, "include_dead": include_dead, "seed": seed, "device": device}
    return Stability.of(compare_all(dictionary, several, **settings))


def compare_all(
    a: Dictionary,
    others: Sequence[Dictionary],
    *,
    threshold: float = THRESHOLD,
    method: str = "auto",
    include_dead: bool = False,
    seed: int = 0,
    device: str | torch.device | None = None,
) -> list[Comparison]:
    """Compare `a` with each of the others by one method; "auto" chooses it for the largest. Raise as `compare` does."""
    if not -1 <= threshold < 1:
        raise ConfigError(f"threshold = {threshold}; expected a cosine from -1 to below 1")
    if method not in METHODS:
        raise ConfigError(f"method = {method!r}; expected one of {', '.join(METHODS)}")
    live = _live(a, include_dead)
    device = a.W_dec.device if device is None and a.W_dec.device.type != "cpu" else chosen_device(device)
    own, own_hash = _directions(a, live, device), weights_hash(a)
    others_live = [_live(b, include_dead) for b in others]
    if method == "auto":
        most = max(int(mask.sum()) for mask in (live, *others_live))
        method = "hungarian" if most <= MOST_HUNGARIAN else "mutual"
    comparisons = []
    with progress_bar("compare", len(others), "dictionaries") as advance:
        for number, (b, other_live) in enumerate(zip(others, others_live, strict=True), 1):
            _check_widths(a, b)
            which = f"the dictionary and number {number} of the others" if len(others) > 1 else "the compared dictionaries"
            other_hash = weights_hash(b)
            _warn_of_other_hooks(a, b, which)
            _warn_of_one_start(a, b, which, own_hash == other_hash)
            other = _directions(b, other_live, device)
            pairs = _pairs(own, other, method)
            comparisons.append(
                Comparison(
                    pairs=_of_all_latents(pairs, live, other_live),
                    live=live,
                    n_dead=(int((~live).sum()), int((~other_live).sum())),
                    summary=Summary.of(pairs, threshold),
                    chance=Summary.of(_pairs(own, random_like(other, seed), method), threshold),
                    threshold=threshold,
                    method=method,
                    sha256=(own_hash, other_hash),
                    recipe=recipe_of(b),
                )
            )
            advance(1)
    return comparisons


def _check_widths(a: Dictionary, b: Dictionary) -> None:
    """Raise ShapeError unless both dictionaries read vectors of one width and write vectors of one width."""
    widths = [(d.W_enc.shape[0], d.W_dec.shape[1]) for d in (a, b)]
    if widths[0] != widths[1]:
        raise ShapeError(
            f"dictionaries of widths {widths[0]} and {widths[1]} (read, written) cannot be compared; compare "
            "dictionaries of one hook, or of hooks of one width"
        )


def _warn_of_other_hooks(a: Dictionary, b: Dictionary, which: str) -> None:
    """Log a warning if the two are known to belong to different models or hooks."""
    for name in ("model", "hooks"):
        values = [_models(d) if name == "model" else d.place if all(port.hook for port in d.reads) else None for d in (a, b)]
        if None not in values and values[0] != values[1]:
            log.warning("%s differ in their %s: %s and %s", which, name, *values)


def _models(d: Dictionary) -> str | None:
    """Return the models of a dictionary in words; None if one is not known."""
    models = [origin.model for origin in d.origin.of_each.values()]
    return None if None in models else " and ".join(map(str, models))


def _warn_of_one_start(a: Dictionary, b: Dictionary, which: str, are_equal: bool) -> None:
    """Log a warning if the agreement of the two says nothing: their weights are equal, or they began with the same weights."""
    configs = [d.training_record.get("config") for d in (a, b)]
    seeds = [config.get("seed") if isinstance(config, dict) else None for config in configs]
    if are_equal:
        log.warning("%s have the same weights, so they agree in everything; give dictionaries of other seeds", which)
    elif None not in seeds and seeds[0] == seeds[1]:
        log.warning(
            "%s were both trained with seed %s, so they began with the same directions; their agreement says little about "
            "stability: train one with another seed",
            which,
            seeds[0],
        )


def _live(d: Dictionary, include_dead: bool) -> Bool[Tensor, " d_sae"]:
    """Return a mask of the latents that count. Without recorded densities, all do."""
    if include_dead or d.density is None:
        return torch.ones(d.d_sae, dtype=torch.bool)
    live = d.density.cpu() > 0
    if not live.any():
        raise ConfigError(f"no latent to compare: all {d.d_sae} have density 0; include_dead=True compares them anyway")
    return live


@torch.no_grad()
def _directions(d: Dictionary, live: Bool[Tensor, " d_sae"], device: torch.device) -> Directions:
    """Return the unit directions of the live latents, in float32 on a device."""
    units = Directions(*(F.normalize(rows[live.to(rows.device)].float().to(device), dim=1) for rows in (d.W_dec, d.W_enc.T)))
    for name, rows in units._asdict().items():
        if not torch.isfinite(rows).all():
            raise NonFiniteError(f"the {name} of a dictionary ({d.place}) holds NaN or infinity")
    return units


def random_like(directions: Directions, seed: int) -> Directions:
    """Return as many random directions, normal with the joint second moments of decoder and encoder rows."""
    widths, n = [rows.shape[1] for rows in directions], len(directions.decoder)
    tiles = [slice(start, start + TILE) for start in range(0, n, TILE)]
    moments = torch.zeros(sum(widths), sum(widths), dtype=torch.float64)
    for tile in tiles:
        joint = torch.cat([rows[tile] for rows in directions], 1).cpu().double()
        moments.addmm_(joint.T, joint)
    values, vectors = torch.linalg.eigh(moments / n)
    root = vectors * values.clamp(min=0).sqrt()
    randoms, generator = Directions(*map(torch.empty_like, directions)), torch.Generator().manual_seed(seed)
    for tile in tiles:
        size = len(directions.decoder[tile])
        drawn = torch.randn(size, sum(widths), generator=generator, dtype=torch.float64) @ root.T
        for rows, part in zip(randoms, drawn.split(widths, dim=1), strict=True):
            rows[tile] = F.normalize(part, dim=1).to(rows)
    return randoms


@torch.no_grad()
def _pairs(a: Directions, b: Directions, method: str) -> Pairs:
    """Return the partners of the latents of `a` in `b`."""
    nearest, nearest_cosine, mutual = _nearest(a.decoder, b.decoder)
    if method == "hungarian":
        match, encoder_match = _hungarian(a.decoder, b.decoder), _hungarian(a.encoder, b.encoder)
    else:
        encoder_nearest, _, encoder_mutual = _nearest(a.encoder, b.encoder)
        match, encoder_match = nearest.where(mutual, NONE), encoder_nearest.where(encoder_mutual, NONE)
    partner = match.clamp(min=0).to(a.decoder.device)
    cosines = ((x * y.index_select(0, partner)).sum(1).cpu().where(match != NONE, 0) for x, y in zip(a, b, strict=True))
    return Pairs(match, *cosines, encoder_match, nearest, nearest_cosine, mutual)


def _nearest(
    a: Float[Tensor, "n_a d"], b: Float[Tensor, "n_b d"]
) -> tuple[Int[Tensor, " n_a"], Float[Tensor, " n_a"], Bool[Tensor, " n_a"]]:
    """Return, for each unit vector of `a`, the nearest of `b` (the first of equals), the cosine, and if they are mutual."""
    to_b = []
    best, to_a = a.new_full((len(b),), -torch.inf), torch.zeros(len(b), dtype=torch.long, device=a.device)
    size = TILE if a.device.type == "cpu" else max(TILE, cosines_at_once(a.device) // len(b))
    for start in range(0, len(a), size):
        cosines = a[start : start + size] @ b.T
        to_b.append(cosines.max(1))
        column = cosines.max(0)
        better = column.values > best
        best, to_a = column.values.where(better, best), (column.indices + start).where(better, to_a)
    cosine, index = torch.cat([tile.values for tile in to_b]), torch.cat([tile.indices for tile in to_b])
    mutual = to_a[index] == torch.arange(len(a), device=a.device)
    return index.cpu(), cosine.cpu(), mutual.cpu()


def _hungarian(a: Float[Tensor, "n_a d"], b: Float[Tensor, "n_b d"]) -> Int[Tensor, " n_a"]:
    """Return the one-to-one matching with the largest sum of cosines; the larger side keeps latents without a partner."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise ConfigError(
            "the Hungarian algorithm needs scipy: pip install 'saelens-lite[analysis]', or pass method='mutual'"
        ) from None
    rows, columns = linear_sum_assignment((a @ b.T).cpu().numpy(), maximize=True)
    match = torch.full((len(a),), NONE)
    match[torch.from_numpy(rows)] = torch.from_numpy(columns)
    return match


def _of_all_latents(pairs: Pairs, live: Bool[Tensor, " d_sae"], other_live: Bool[Tensor, " d_other"]) -> Pairs:
    """Return pairs of live latents, renumbered as the latents are in their dictionaries."""
    own, number = live.nonzero().squeeze(1), other_live.nonzero().squeeze(1)

    def full(column: Tensor) -> Tensor:
        if column.dtype != torch.long:
            return column.new_zeros(len(live)).index_copy(0, own, column)
        numbers = number[column.clamp(min=0)].where(column != NONE, NONE)
        return torch.full((len(live),), NONE).index_copy(0, own, numbers)

    return Pairs(*map(full, pairs))


def _share(chosen: Bool[Tensor, " n"]) -> float:
    return float(chosen.double().mean())


def comparison_table(comparisons: dict[str, Comparison]) -> Any:
    """Return a rich table of one dictionary against others: a row for each, and a row for chance below it.

    Of several, the last row has the noise floors of the shares; if some are seeds of one recipe, a row for each recipe comes
    before it.
    """
    from rich.text import Text

    thresholds = ", ".join(sorted({str(c.threshold) for c in comparisons.values()}))
    methods = ", ".join(sorted({c.method for c in comparisons.values()}))
    caption = (
        f"matched: latents with a partner ({methods}); shared: decoder and encoder cosine with it above {thresholds}; agree: "
        "same partner by encoder; mutual: each other's nearest; decoder, encoder: median cosine of partners, for decoder "
        "between the 5 % and 95 % quantiles; dead: left out; chance: against random directions with the other's second moments"
    )
    rows: list[list[Any] | None] = []
    names = short_names(list(comparisons), width=max(13, terminal_width() - WIDTH_OF_NUMBERS))
    floors = shared_floors(comparisons)
    for given, name, comparison in zip(comparisons, names, comparisons.values(), strict=True):
        differing = floors.differing(given) if not floors.has_seeds else ()
        rows.append([name, *_cells(comparison.summary, differing), "/".join(map(str, comparison.n_dead))])
        rows.append([Text(cell, style="dim") for cell in ("  chance", *_cells(comparison.chance), "")])
    if len(comparisons) > 1:
        rows.append(None)
        for name, members in floors.recipes.items() if floors.has_seeds else ():
            n_seeds = f"{len(members)} seed{'s' * (len(members) > 1)}"
            rows.append([f"{short_names([name])[0]}, {n_seeds}", "", *floors.cells(name, SHARES), "", "", ""])
        cells = floors.floor_cells(SHARES)
        rows += [[FLOOR, "", *cells, "", "", ""]] if set(cells) != {"–"} else []
        caption += f". {floors.caption}"
    else:
        share = next(iter(comparisons.values())).shares().metrics["shared"]
        caption += (
            f". No noise floor: that needs several dictionaries to compare with. Over latents alone, as if they were "
            f"independent, the 95 % interval of shared is {share.low:.1%} to {share.high:.1%}"
        )
    return grid(
        ("against", "matched", "shared", "agree", "mutual", "decoder", "encoder", "dead"),
        rows,
        caption=caption,
        column=lambda title: {"overflow": "fold", "no_wrap": title != "against"},
        collapse_padding=True,
    )


def shared_floors(comparisons: Mapping[str, Comparison]) -> NoiseFloors:
    """Return the noise floors of the shares that one dictionary has in common with others."""
    shares = {name: comparison.shares() for name, comparison in comparisons.items()}
    return noise_floors(shares, metrics=SHARES, resampled="latents, as if they were independent")


def _cells(s: Summary, differing: Sequence[str] = ()) -> list[str]:
    """Return the cells of a summary's row, with marks."""
    low, _, median, _, high = s.decoder.quantiles
    shares = [f"{getattr(s, name):.1%}" + DIFFERS * (name in differing) for name in SHARES]
    return [f"{s.n_matched}/{s.n_latents}", *shares, f"{low:.2f} {median:.2f} {high:.2f}", f"{s.encoder.quantiles[2]:.2f}"]
