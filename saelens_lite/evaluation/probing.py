"""Sparse probing: classify texts by a few latents, and compare with all latents and the raw activations.

A text is one vector, the mean of its tokens' activations or codes. The k latents whose class means differ most on the training
texts go into a logistic regression. Accuracy and area under the ROC curve (AUC) are those of held-out texts.
Source: Gurnee et al. 2023, Finding neurons in a haystack, arXiv:2305.01610 (choice by largest mean difference); Karvonen et al.
2025, SAEBench, arXiv:2503.09532 (mean over tokens); Kantamneni et al. 2025, arXiv:2502.16681 (regularisation of every probe
chosen by cross-validation, without which the probe on raw activations is too weak an opponent).
"""

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelens_lite.arrays import described, plain
from saelens_lite.devices import on_device
from saelens_lite.dictionary import Dictionary
from saelens_lite.errors import ConfigError, NonFiniteError, TextError
from saelens_lite.evaluation.comparison import DIFFERS, FLOOR, ComparedScores, NoiseFloors, floor_cell, noise_floors
from saelens_lite.evaluation.replicates import Replicates, weights_id
from saelens_lite.evaluation.sums import Metric, with_interval
from saelens_lite.files import write_json
from saelens_lite.model import AnyModel, LanguageModel, as_model
from saelens_lite.model.passes import activations
from saelens_lite.ports import Hooks, together
from saelens_lite.progress import progress_bar
from saelens_lite.tables import Result, grid, legend
from saelens_lite.tokens import DEFAULT_N_CTX, TokenRows, prompt_rows, text_hash

FORMAT = 1
POOLINGS = ("mean", "max", "last")
LEAST_TEXTS = 10  # of each class
N_FOLDS = 5
INVERSE_PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # scikit-learn's C, for inputs of unit variance
ALL_LATENTS, ACTIVATIONS = "all latents", "activations"
SCORES = ("accuracy", "auc")
N_SHOWN = 4  # latents of a probe in tables
CAPTION = "± half of the 95 % interval; AUC of chance: 0.5; shuffled: with labels in random order"
ONLY = "texts"  # the name of a dataset without a name

log = logging.getLogger(__name__)


class Probe(NamedTuple):
    """The scores of one regression on held-out texts, also with shuffled labels, its chosen C, and its latents, best first."""

    accuracy: Metric
    auc: Metric
    shuffled_accuracy: Metric
    shuffled_auc: Metric
    inverse_penalty: float
    latents: tuple[int, ...] | None


@dataclass(frozen=True)
class ProbeReport(Result):
    """The probes that separate texts of two classes, with 95 % intervals bootstrapped over the held-out texts.

    `probes` are by name: "k = 4" uses four latents, "all latents" and "activations" use everything. The second of `classes` is
    the positive one. `majority` is the accuracy of always choosing the more frequent class; the AUC of chance is 0.5. For the
    control, labels are shuffled within the training texts and within the held-out texts, and every step is repeated.
    `about` has the meaning and scale of the best latents; None without a feature store.

    `replicates` of each probe, which are paired, say which differences are noise: see `floors`.
    """

    probes: dict[str, Probe]
    classes: tuple[str, str]
    majority: float
    n_train: int
    n_test: int
    pooling: str
    text_sha256: str
    model: str
    hook: str
    seed: int
    about: dict[int, Any] | None = None
    replicates: dict[str, Replicates] | None = field(default=None, compare=False, repr=False)

    @property
    def floors(self) -> NoiseFloors:
        """The differences of accuracy and AUC below which these probes cannot be told apart; the first is `activations`."""
        return _floors({"": self})

    def __getitem__(self, name: str) -> Probe:
        """Return the probe of that name."""
        return self.probes[name]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        facts = {key: value for key, value in vars(self).items() if key not in ("probes", "about", "replicates")}
        facts["noise_floors"] = {name: x if math.isfinite(x) else None for name, x in self.floors.floors.items()}
        if self.about is not None:
            facts["about"] = {str(latent): plain(one) for latent, one in self.about.items()}
        return {"format": FORMAT, **facts, "probes": {name: plain(probe) for name, probe in self.probes.items()}}

    def to_json(self, path: str | Path | None = None) -> str:
        """Return the report as JSON, and write it to `path` if that is given."""
        if path is not None:
            write_json(Path(path), self.to_dict())
        return json.dumps(self.to_dict(), indent=2)

    def columns(self) -> dict[str, list[Any]]:
        """Return the probes, column by column; `accuracy_low` and `accuracy_high` are the ends of an interval, and so on.

        `accuracy_differs` and `auc_differs` say whether a probe differs from that on activations by more than the noise floor.
        """
        columns: dict[str, list[Any]] = {"probe": list(self.probes)}
        for name in Probe._fields:
            values = [getattr(probe, name) for probe in self.probes.values()]
            if isinstance(values[0], Metric):
                ends = {f"{name}_{end}": [getattr(value, end) for value in values] for end in ("low", "high")}
                columns |= {name: [value.value for value in values], **ends}
            else:
                columns[name] = values
        floors = self.floors
        for name in SCORES:
            columns[f"{name}_differs"] = [
                floors.differ(name, _row_name("", probe), _row_name("", ACTIVATIONS)) for probe in self.probes
            ]
        return columns

    def table(self) -> Any:
        """Return a rich table of the probes, with the texts above it; with a store, also of the best latents."""
        from rich.console import Group
        from rich.text import Text

        head = (
            f"{self.classes[1]!r} against {self.classes[0]!r}: {self.n_train} texts to train, {self.n_test} held out, "
            f"{self.pooling} over tokens, {self.model}, {self.hook}"
        )
        return Group(Text(head, no_wrap=False, overflow="fold"), probe_table({"": self}))


class Labelled(NamedTuple):
    """Checked texts of two classes; y is true for the second class."""

    texts: list[str]
    y: Bool[Tensor, " n"]
    classes: tuple[str, str]


class Pooled(NamedTuple):
    """Two vectors for each text: its pooled activations, and its pooled codes."""

    x: Float[Tensor, "n d_in"]
    acts: Float[Tensor, "n d_sae"]


class Split(NamedTuple):
    """The indices of the training texts and of the held-out texts."""

    train: Int[Tensor, " n_train"]
    test: Int[Tensor, " n_test"]


def probe(
    dictionary: Dictionary,
    lm: AnyModel | Mapping[str, LanguageModel],
    texts: Iterable[str] | Mapping[str, tuple[Iterable[str], Iterable[Any]]],
    labels: Iterable[Any] | None = None,
    *,
    ks: Sequence[int] = (1, 4, 16),
    hook: str | None = None,
    pooling: str = "mean",
    test_share: float = 0.25,
    batch_tokens: int = 8192,
    n_bootstrap: int = 1000,
    seed: int = 0,
    store: Any = None,
) -> ProbeReport | dict[str, ProbeReport]:
    """Return the report of probes on texts of two classes; for a mapping of datasets, a report for each name.

    Texts are cut at the length of the training rows. Special tokens and positions that were left out of training do not count.
    The matrix [texts d_sae] is held in memory.

    Args:
        texts: texts, or a mapping name → (texts, labels).
        labels: a label for each text, of two classes. Of several classes, probe one against the rest:
            labels=[label == "x" for label in labels].
        ks: numbers of latents.
        hook: the hook to read in place of the dictionary's own.
        pooling: "mean", "max" or "last" of the tokens that count. The mean does not grow with the length of a text, and does
            not rely on a single token.
        test_share: share of each class that is held out, drawn with `seed`.
        store: FeatureStore of this dictionary, for the labels, promoted tokens and largest activations of the best latents.

    Raises:
        ConfigError: there are not two classes, a class has fewer than 10 texts, texts lack labels, a setting is bad, the hook
            is not known, the model has other processing, the store is of another dictionary, or scikit-learn is not installed.
        TextError: a text is missing, or none of its tokens counts.
        HookError: the model lacks the hook.
        ShapeError: the dictionary does not fit the width of the hook.
        NonFiniteError: activations or codes are NaN or infinite.
    """
    ks = _checked_ks(ks, dictionary.d_sae)
    if pooling not in POOLINGS:
        raise ConfigError(f"pooling = {pooling!r}; expected one of {', '.join(POOLINGS)}")
    if not 0.1 <= test_share <= 0.5:
        raise ConfigError(f"test_share = {test_share}; expected 0.1 to 0.5")
    if not 0 <= seed < 2**32 or n_bootstrap < 0:
        raise ConfigError(f"seed = {seed}, n_bootstrap = {n_bootstrap}; expected a seed below 2^32, and no negative numbers")
    if store is not None:
        store.info.check_dictionary(dictionary)
    lm = as_model(lm)
    hooks = lm.hooks_of(dictionary, hook)
    dictionary.check_finite()
    dictionary = on_device(dictionary, lm.device)
    _require_sklearn()
    reports = {}
    for name, dataset in _datasets(texts, labels).items():
        rows = _rows(dictionary, lm, name, dataset.texts, pooling)
        pooled = _pool(dictionary, lm, rows, hooks, pooling, batch_tokens)
        split = _split(dataset.y, test_share, seed)
        mostly_positive = dataset.y[split.train].double().mean() > 0.5
        probes, replicates = _probes(pooled, dataset.y, split, ks, n_bootstrap, seed)
        best = probes[f"k = {max(ks)}"].latents or ()
        reports[name] = ProbeReport(
            probes=probes,
            classes=dataset.classes,
            majority=float((dataset.y[split.test] == mostly_positive).double().mean()),
            n_train=len(split.train),
            n_test=len(split.test),
            pooling=pooling,
            text_sha256=text_hash(rows),
            model=lm.name,
            hook=" + ".join(hooks.reads),
            seed=seed,
            about=None if store is None else {latent: store.about(latent) for latent in best},
            replicates=replicates,
        )
    return reports if isinstance(texts, Mapping) else reports[ONLY]


def _datasets(texts: Iterable[str] | Mapping[str, Any], labels: Iterable[Any] | None) -> dict[str, Labelled]:
    """Return the datasets by name. All are checked before the first is probed."""
    if not isinstance(texts, Mapping):
        return {ONLY: _checked(ONLY, texts, labels)}
    if labels is not None:
        raise ConfigError("a mapping of datasets holds its own labels: name → (texts, labels)")
    if not texts or not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in texts.values()):
        raise ConfigError("no dataset to probe; expected a mapping name → (texts, labels)")
    return {name: _checked(name, *pair) for name, pair in texts.items()}


def best_latents(acts: Float[Tensor, "n d_sae"], y: Bool[Tensor, " n"], k: int) -> Int[Tensor, " k"]:
    """Return the k latents with the largest |mean over the second class − mean over the first|, largest first.

    Of equal latents, the one with the smaller number comes first.
    """
    difference = acts[y].double().mean(0) - acts[~y].double().mean(0)
    return difference.abs().argsort(descending=True, stable=True)[:k]


def _probes(
    pooled: Pooled, y: Bool[Tensor, " n"], split: Split, ks: list[int], n_bootstrap: int, seed: int
) -> tuple[dict[str, Probe], dict[str, Replicates]]:
    """Return all probes of one dataset, and the paired replicates of their scores."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = y.clone()
    for part in split:
        shuffled[part] = y[part[torch.randperm(len(part), generator=generator)]]
    weights = torch.poisson(torch.ones(n_bootstrap, len(split.test)), generator=generator).double()
    weights = torch.cat([torch.ones(1, len(split.test), dtype=torch.float64), weights])
    chosen = [best_latents(pooled.acts[split.train], labels[split.train], max(ks)) for labels in (y, shuffled)]
    inputs: dict[str, tuple[Tensor, Tensor]] = {f"k = {k}": tuple(pooled.acts[:, best[:k]] for best in chosen) for k in ks}
    inputs |= {ALL_LATENTS: (pooled.acts, pooled.acts), ACTIVATIONS: (pooled.x, pooled.x)}
    latents = {f"k = {k}": tuple(chosen[0][:k].tolist()) for k in ks}
    probes, replicates = {}, {}
    paired = weights_id(seed, len(split.test), repr(y[split.test].tolist()))
    with progress_bar("probe", len(inputs), "probes") as advance:
        for name, (x, x_shuffled) in inputs.items():
            scores, inverse_penalty = _held_out(x, y, split, weights, seed)
            control, _ = _held_out(x_shuffled, shuffled, split, weights, seed)
            four = (with_interval(of[score]) for of in (scores, control) for score in SCORES)
            probes[name] = Probe(*four, inverse_penalty, latents.get(name))
            replicates[name] = Replicates.of_values(paired, scores)
            advance(1, name)
    return probes, replicates


def _held_out(
    x: Float[Tensor, "n d"], y: Bool[Tensor, " n"], split: Split, weights: Float[Tensor, "replicates n_test"], seed: int
) -> tuple[dict[str, Float[Tensor, " replicates"]], float]:
    """Return accuracy and AUC on held-out texts, and the inverse penalty chosen by cross-validation on the training texts."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    search = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
        {"logisticregression__C": list(INVERSE_PENALTIES)},
        scoring="neg_log_loss",
        cv=StratifiedKFold(N_FOLDS, shuffle=True, random_state=seed),
    )
    search.fit(x[split.train].numpy(), y[split.train].numpy())
    score = torch.from_numpy(search.decision_function(x[split.test].numpy())).double()
    truth = y[split.test]
    correct = ((score > 0) == truth).double()
    accuracy = weights @ correct / weights.sum(1)
    auc = weighted_auc(score, truth, weights)  # NaN where a replicate lacks a class
    return {"accuracy": accuracy, "auc": auc}, search.best_params_["logisticregression__C"]


def weighted_auc(
    score: Float[Tensor, " n"], y: Bool[Tensor, " n"], weights: Float[Tensor, "replicates n"]
) -> Float[Tensor, " replicates"]:
    """Return the area under the ROC curve for each row of weights.

    This is the weighted share of pairs in which the positive scores above the negative. Ties count half.
    """
    level = score.unique(return_inverse=True)[1]
    empty = weights.new_zeros(len(weights), int(level.max()) + 1)
    positive, negative = (empty.index_add(1, level, weights * side) for side in (y, ~y))
    below = negative.cumsum(1) - negative / 2
    return (positive * below).sum(1) / (positive.sum(1) * negative.sum(1))


@torch.no_grad()
def _pool(dictionary: Dictionary, lm: AnyModel, rows: TokenRows, hooks: Hooks, pooling: str, batch_tokens: int) -> Pooled:
    """Return the pooled activations and codes of each row. The maximum of a latent that never fires in a text is 0."""
    n = len(rows.tokens)
    x = torch.zeros(n, dictionary.d_in)
    acts = torch.zeros(n * dictionary.d_sae)
    if pooling == "max":
        x.fill_(-torch.inf)
    with progress_bar("read", n, "texts") as advance:
        for read in activations(lm, rows, hooks.reads, batch_tokens, "as it is"):
            text, kept = read.row, together(read.acts, hooks.reads).to(dictionary.W_enc.device)
            dictionary.check_input(kept)
            codes = dictionary.encode(kept).to("cpu")
            kept = kept.float().cpu()
            if not (torch.isfinite(kept).all() and torch.isfinite(codes.value).all()):
                names = " + ".join(hooks.reads)
                raise NonFiniteError(
                    f"activations at {names} or their codes are NaN or infinite in texts {int(text[0])} and after"
                )
            cell, value = text[codes.row] * dictionary.d_sae + codes.latent, codes.value.float()
            if pooling == "max":
                x.scatter_reduce_(0, text[:, None].expand_as(kept), kept, "amax")
                acts.scatter_reduce_(0, cell, value, "amax")
            else:
                x.index_add_(0, text, kept)
                acts.index_add_(0, cell, value)
            advance(len(read.batch.number))
    acts = acts.reshape(n, dictionary.d_sae)
    if pooling == "max":
        return Pooled(x, acts)
    counts = rows.keep.sum(1, keepdim=True)
    return Pooled(x / counts, acts / counts)


def _rows(dictionary: Dictionary, lm: AnyModel, name: str, texts: list[str], pooling: str) -> TokenRows:
    """Return a row for each text, in which `keep` is true at the positions to pool over; for "last" this is one position."""
    origin = dictionary.origin
    n_ctx = min(origin.n_ctx or DEFAULT_N_CTX, lm.n_ctx)
    try:
        rows = prompt_rows(lm, texts, n_ctx=n_ctx, prepend_bos=lm.wants_bos(origin))
    except TextError as error:
        raise TextError(f"{name}: {error}; leave it out") from None
    counted = lm.countable(rows.tokens, origin)
    rows = rows._replace(keep=counted if rows.holds_token is None else counted & rows.holds_token)
    nothing = (~rows.keep.any(1)).nonzero().squeeze(1).tolist()
    if nothing:
        raise TextError(
            f"{name}: text {nothing[0]} has no token that counts, only special tokens or excluded positions; leave it out"
        )
    keep = rows.keep
    if pooling == "last":
        keep = torch.arange(1, keep.shape[1] + 1) == rows.counted_lengths[:, None]
    return rows._replace(keep=keep).to("cpu")


def _split(y: Bool[Tensor, " n"], test_share: float, seed: int) -> Split:
    """Return a split that holds out a share of each class."""
    from sklearn.model_selection import train_test_split

    parts = train_test_split(range(len(y)), test_size=test_share, stratify=y.numpy(), random_state=seed)
    return Split(*(torch.tensor(part) for part in parts))


def _checked(name: str, texts: Iterable[str], labels: Iterable[Any] | None) -> Labelled:
    """Return the texts and labels of a dataset.

    Raises:
        TextError: the texts are not a list of strings, or one is empty.
        ConfigError: the labels are not one for each text, of two classes with at least 10 texts each.
    """
    if getattr(texts, "ndim", 1) != 1 or isinstance(texts, str | set | frozenset | Mapping):
        raise TextError(f"{name}: the texts are {described(texts)}; expected a list of strings, or one column of a table")
    texts = list(texts)
    if not all(isinstance(text, str) for text in texts):
        raise TextError(f"{name}: expected a list of strings")
    labels = labels.tolist() if hasattr(labels, "tolist") else list(() if labels is None else labels)
    if len(texts) != len(labels):
        raise ConfigError(f"{name}: {len(texts)} texts and {len(labels)} labels; give a label for each text")
    for number, (text, label) in enumerate(zip(texts, labels, strict=True)):
        if not text.strip():
            raise TextError(f"{name}: text {number} is empty")
        if label is None or label != label:  # noqa: PLR0124 (NaN)
            raise ConfigError(f"{name}: text {number} has no label ({label})")
    try:
        classes = sorted(set(labels))
    except TypeError:
        raise ConfigError(f"{name}: labels must all be of one kind: all words, or all numbers") from None
    if len(classes) != 2:
        shown = ", ".join(map(repr, classes[:5]))
        raise ConfigError(
            f"{name}: {len(classes)} classes ({shown}); expected two. Of several classes, probe one against the rest: "
            'labels=[label == "x" for label in labels]'
        )
    y = torch.tensor([label == classes[1] for label in labels])
    for label, count in zip(classes, (int((~y).sum()), int(y.sum())), strict=True):
        if count < LEAST_TEXTS:
            raise ConfigError(f"{name}: {count} texts of class {label!r}; each class needs at least {LEAST_TEXTS}")
    if repeated := len(texts) - len(set(texts)):
        log.warning(
            "%s: %d texts are repetitions; texts that are both trained on and held out make every probe look better than it is",
            name,
            repeated,
        )
    return Labelled(texts, y, (str(classes[0]), str(classes[1])))


def _checked_ks(ks: Sequence[int], d_sae: int) -> list[int]:
    """Return the numbers of latents, ascending, without repeats."""
    if not ks or min(ks) < 1 or max(ks) > d_sae:
        raise ConfigError(f"ks = {list(ks)}; expected numbers of latents from 1 to {d_sae}")
    return sorted(set(ks))


def _require_sklearn() -> None:
    try:
        import sklearn  # noqa: F401
    except ImportError:
        raise ConfigError("probing needs scikit-learn: pip install 'saelens-lite[analysis]'") from None


def _paired(reports: Mapping[str, ProbeReport]) -> list[dict[str, ProbeReport]]:
    """Return the reports in groups that are of the same held-out texts, and so of the same bootstrap weights."""
    groups: dict[Any, dict[str, ProbeReport]] = {}
    for name, report in reports.items():
        one = next(iter((report.replicates or {}).values()), None)
        groups.setdefault(name if one is None else (one.weights, report.text_sha256), {})[name] = report
    return list(groups.values())


def _row_name(report: str, probe_name: str) -> str:
    return f"{report}: {probe_name}"


def _floors(reports: Mapping[str, ProbeReport]) -> NoiseFloors:
    """Return the noise floors of all probes of reports on the same held-out texts; the first row is that on activations."""
    scores = {
        _row_name(name, probe_name): ComparedScores(
            {score: getattr(one, score) for score in SCORES}, (report.replicates or {}).get(probe_name), None, report.n_test
        )
        for name, report in reports.items()
        for probe_name, one in report.probes.items()
    }
    first = _row_name(next(iter(reports)), ACTIVATIONS)
    ordered = {first: scores[first]} | scores if first in scores else scores
    words = {"resampled": "the held-out texts", "reference": ACTIVATIONS}
    return noise_floors(ordered, {name: [name] for name in ordered}, metrics=SCORES, **words)


def probe_table(reports: Mapping[str, ProbeReport]) -> Any:
    """Return a rich table of several reports: a row for each probe, with its first four latents, and one for the majority.

    Below the reports on one set of held-out texts, such as those of one dataset, is the noise floor of accuracy and AUC. Marked
    probes differ from that on activations, of the first of these reports, by more. A second table has what the feature store
    knows about these latents.
    """
    from rich.console import Group

    several = len(reports) > 1
    rows: list[tuple[str, ...] | None] = []
    notes: list[str] = []
    for paired in _paired(reports):
        floors = _floors(paired)
        for name, report in paired.items():
            for probe_name, one in report.probes.items():
                differing = floors.differing(_row_name(name, probe_name))
                cells = [
                    f"{m.value:.3f} ±{(m.high - m.low) / 2:.1g}" + DIFFERS * (score in differing)
                    for score, m in (("accuracy", one.accuracy), ("auc", one.auc), ("", one.shuffled_auc))
                ]
                rows.append((*[name] * several, probe_name, *cells, ", ".join(map(str, (one.latents or ())[:N_SHOWN]))))
            rows += [(*[name] * several, "majority", f"{report.majority:.3f}", "0.500", "", ""), None]
        cells = [floor_cell(score, floors.floors.get(score, math.nan)) for score in SCORES]
        rows[-1:] = [(*[""] * several, FLOOR, *cells, "", ""), None]
        notes.append(floors.caption)
    table = grid(
        (*["dataset"] * several, "probe", "accuracy", "AUC", "shuffled AUC", "best latents"),
        rows,
        title="" if several else next(iter(reports), ""),
        caption="\n".join([CAPTION, *dict.fromkeys(notes)]),
        column=lambda title: {"overflow": "fold", "no_wrap": title not in ("dataset", "best latents")},
        collapse_padding=True,
    )
    shown = {
        latent for report in reports.values() for one in report.probes.values() for latent in (one.latents or ())[:N_SHOWN]
    }
    about = {latent: one for report in reports.values() for latent, one in (report.about or {}).items() if latent in shown}
    return Group(table, legend(about)) if about else table
