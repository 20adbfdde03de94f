"""The scores of a store's labels in scores.json, beside labels.json.

A score belongs to one text: that of another label is neither shown nor counted, and is shown again if its text comes back.
"""

import json
import logging
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from saelens_lite.dictionary import Dictionary
from saelens_lite.errors import ConfigError, CorruptFileError, UserError
from saelens_lite.evaluation.sums import Metric
from saelens_lite.features.explaining.scores import FLOORS, KINDS, RESULTS, Judged, Kind, LabelScore
from saelens_lite.features.info import StoreInfo, codes_hash, is_of_older, weights_hash
from saelens_lite.features.store_files import INFO_FILE, read_info
from saelens_lite.files import MAX_LIST_BYTES, write_text
from saelens_lite.locks import locked
from saelens_lite.schemas import Checked, Count, Sha256, String, read_checked
from saelens_lite.terminal import visible

SCORES_FILE = "scores.json"
FORMAT = 1
PATIENCE = 10.0  # seconds to wait for a process that is writing scores
MOST = 80_000  # scores in a file, about 70 values each, so that it can be read again
logger = logging.getLogger(__name__)
OfLatents = dict[int, dict[Kind, LabelScore]]
_Share = Annotated[float, Field(ge=0, le=1)]


def _value_and_ends(numbers: list[float]) -> list[float]:
    """Return the numbers of a metric, or raise if they are not a value alone or with the two ends of its interval."""
    if len(numbers) not in (1, 3):
        raise ValueError(f"{len(numbers)} numbers; expected a value, or a value and the ends of its interval")
    return numbers


_Metric = Annotated[list[_Share], AfterValidator(_value_and_ends)]


class _Judged(Checked):
    """A judge's result: each metric is its value, and the ends of its interval if it has one."""

    auroc: _Metric
    balanced_accuracy: _Metric
    n_unusable: Count


class _Score(Checked):
    """A score in the file. Its keys are the fields of `LabelScore`."""

    latent: Count
    label: String
    kind: Kind
    judge: String
    n_firing: Count
    n_silent: Count
    score: _Judged
    by_tokens: _Judged | None = None
    of_random_latent: _Judged | None = None
    shuffled: _Judged | None = None
    hard: _Judged | None = None
    n_hard: Count = 0
    recall: Annotated[list[_Share | None], Field(max_length=1000)] = Field([])
    is_graded: bool = False
    made_elsewhere: bool = False
    store: String = ""


class _Content(Checked):
    """The content of scores.json."""

    format: Literal[1]
    dictionary_sha256: Sha256
    scores: list[_Score]


def together(scores: Mapping[int, Mapping[Kind, LabelScore]], more: Iterable[LabelScore], d_sae: int) -> OfLatents:
    """Return scores with others added, in the order of latents. A new score of the same latent and kind replaces the old one.

    Raises:
        UserError: there is no such latent or kind, a value is not between 0 and 1, or there are more scores than a file holds.
    """
    all_of: OfLatents = {latent: dict(kinds) for latent, kinds in scores.items()}
    for one in more:
        _check(one, d_sae)
        all_of.setdefault(one.latent, {})[one.kind] = one
    if sum(map(len, all_of.values())) > MOST:
        raise UserError(f"a store holds at most {MOST:,} scores of labels")
    return {latent: {kind: all_of[latent][kind] for kind in KINDS if kind in all_of[latent]} for latent in sorted(all_of)}


def current(scores: Mapping[int, Mapping[Kind, LabelScore]], labels: Mapping[int, str]) -> OfLatents:
    """Return the scores whose text is the label that the latent has now."""
    kept = {latent: {k: one for k, one in kinds.items() if one.label == labels.get(latent)} for latent, kinds in scores.items()}
    return {latent: kinds for latent, kinds in kept.items() if kinds}


def write_scores(path: Path, scores: Mapping[int, Mapping[Kind, LabelScore]], dictionary_sha256: str) -> None:
    """Write scores to a file, with the hash of the dictionary whose labels they are of."""
    head = json.dumps({"format": FORMAT, "dictionary_sha256": dictionary_sha256, "scores": []})
    lines = [json.dumps(_line(one), ensure_ascii=False, allow_nan=False) for kinds in scores.values() for one in kinds.values()]
    body = ",\n".join(lines)
    write_text(path, f"{head.removesuffix(']}')}\n{body}\n]}}\n")  # one line for each score


def add_to_stored(path: Path, scores: Mapping[int, Mapping[Kind, LabelScore]], info: StoreInfo) -> None:
    """Add scores to those that a file has, which may be those of another process.

    Raises:
        CorruptFileError: the file is damaged.
        ConfigError: the file has the scores of another dictionary.
        LockedError: another process is writing it.
    """
    with locked(path, "scores", patience=PATIENCE):
        stored = _all_stored(path.parent, info)
        new = (one for kinds in scores.values() for one in kinds.values())
        write_scores(path, together(stored, new, info.d_sae), info.dictionary_sha256)


def read_scores(path: Path, dictionary_sha256: str, d_sae: int) -> OfLatents:
    """Return the scores in a file.

    Older versions did not distinguish stores whose rules differ in an option, so the labels of their scores count as made
    elsewhere.

    Raises:
        CorruptFileError: the file is missing, damaged or of another format.
        ConfigError: the scores belong to another dictionary.
    """
    content = read_checked(path, _Content, MAX_LIST_BYTES)
    if content.dictionary_sha256 != dictionary_sha256:
        raise ConfigError(f"{path} has the scores of another dictionary's labels; score the labels of this one")
    scores = [_read(one) for one in content.scores]
    if len({(one.latent, one.kind) for one in scores}) < len(scores):
        raise CorruptFileError(f"{path} has two scores of one kind for one latent")
    try:
        return together({}, scores, d_sae)
    except UserError as error:
        raise CorruptFileError(f"{path} is damaged: {error}") from None


def stored_scores(folder: Path, info: StoreInfo) -> OfLatents:
    """Return the scores in the folder of a store, also those of earlier labels; none if it has no such file.

    Scores on the contexts of another store are left out, with a warning.
    """
    stored = _all_stored(folder, info)
    return together({}, of_store((one for kinds in stored.values() for one in kinds.values()), info), info.d_sae)


def of_store(scores: Iterable[LabelScore], info: StoreInfo) -> list[LabelScore]:
    """Return the scores on the contexts of a store, and warn if there are others. One that does not say counts as such."""
    scores = list(scores)
    own = [one for one in scores if one.store in ("", info.contexts, info.older_contexts)]
    if len(own) < len(scores):
        logger.warning("%d scores are left out: they are on the contexts of another store", len(scores) - len(own))
    return own


def scores_beside(folder: Path, dictionary: Dictionary) -> OfLatents:
    """Return the scores in the folder of a dictionary or of a store, also those of earlier labels; none without such a file.

    In the folder of a store, scores on the contexts of another store, or on those of a dictionary with the same weights and
    other options, are left out with a warning.

    Raises:
        CorruptFileError: a file is damaged.
        ConfigError: the scores belong to another dictionary.
    """
    if not os.path.lexists(folder / SCORES_FILE):
        return {}
    scores = read_scores(folder / SCORES_FILE, weights_hash(dictionary), dictionary.d_sae)
    if not os.path.lexists(folder / INFO_FILE):
        return scores
    info = read_info(folder)
    if info.codes_sha256 != codes_hash(dictionary):
        logger.warning("the scores in %s are left out: its store is of a dictionary with other options", folder)
        return {}
    return together({}, of_store((one for kinds in scores.values() for one in kinds.values()), info), info.d_sae)


def check_room(scores: Mapping[int, Mapping[Kind, LabelScore]], more: Iterable[tuple[int, Kind]]) -> None:
    """Raise UserError if a store with these scores has no room for others, given by latent and kind."""
    n = len({(latent, kind) for latent, kinds in scores.items() for kind in kinds} | set(more))
    if n > MOST:
        raise UserError(
            f"these would be {n:,} scores with those that the store has; it holds at most {MOST:,}: take fewer latents"
        )


def _all_stored(folder: Path, info: StoreInfo) -> OfLatents:
    path = folder / SCORES_FILE
    return read_scores(path, info.dictionary_sha256, info.d_sae) if os.path.lexists(path) else {}


def stored_scores_of(folder: Path, labels: Mapping[int, str]) -> OfLatents:
    """Return the scores of these labels in the folder of a store."""
    return current(stored_scores(folder, read_info(folder)), labels) if os.path.lexists(folder / SCORES_FILE) else {}


def exceeds_controls(one: LabelScore) -> bool | None:
    """Return whether the AUROC exceeds that of the token baseline and of another latent's label; None if it has neither."""
    return not one.not_better_than if any(getattr(one, name) is not None for name in FLOORS) else None


def kinds_of(scores: Mapping[int, Mapping[Kind, LabelScore]]) -> list[Kind]:
    """Return the kinds of which there is a score."""
    return [kind for kind in KINDS if any(kind in of_latent for of_latent in scores.values())]


def auroc_of(one: LabelScore | None) -> str:
    """Return the AUROC of a score for a table; an asterisk marks one that is not better than a control."""
    return "" if one is None else f"{one.score.auroc.value:.2f}" + "*" * bool(one.not_better_than)


def in_words(one: LabelScore) -> str:
    """Return a score in one line, beside its controls."""
    others = {told.removeprefix("… "): getattr(one, name) for name, told in RESULTS.items() if name != "score"}
    beside = [f"{told} {of.auroc.value:.2f}" for told, of in others.items() if of is not None]
    parts = [
        f"AUROC {_short(one.score.auroc)}, balanced accuracy {_short(one.score.balanced_accuracy)}",
        *[f"AUROC beside it: {', '.join(beside)}"] * bool(beside),
        *[f"not better than: {', '.join(one.not_better_than)}"] * bool(one.not_better_than),
        *[f"{one.score.n_unusable} contexts without a usable answer"] * bool(one.score.n_unusable),
        *["the label may have been made from these contexts"] * one.made_elsewhere,
        f"judge {one.judge}",
    ]
    return visible("; ".join(parts))


def _short(metric: Metric) -> str:
    """Return a metric to two decimals, with its interval."""
    return f"{metric.value:.2f}" + (f" [{metric.low:.2f}, {metric.high:.2f}]" if metric.has_interval else "")


def _check(one: LabelScore, d_sae: int) -> None:
    """Raise UserError unless a score is of a latent of the dictionary, and its values are possible."""
    if not 0 <= one.latent < d_sae:
        raise UserError(f"a score is of latent {one.latent}; this dictionary has latents 0 to {d_sae - 1}")
    if one.kind not in KINDS:
        raise UserError(f"latent {one.latent}: {one.kind!r} is not a kind of score; expected {' or '.join(KINDS)}")
    results = [judged for name in RESULTS if (judged := getattr(one, name)) is not None]
    for metric in (metric for judged in results for metric in (judged.auroc, judged.balanced_accuracy)):
        ends = (metric.low, metric.high) if metric.has_interval else ()
        if not all(0 <= x <= 1 for x in (metric.value, *ends)):
            raise UserError(f"latent {one.latent}: a score of {metric} is not between 0 and 1")


def _line(one: LabelScore) -> dict[str, object]:
    """Return a score as an entry of the file."""
    plain = {name: value for name, value in one._asdict().items() if name not in RESULTS}
    return plain | {name: _plain(of) for name in RESULTS if (of := getattr(one, name)) is not None}


def _plain(judged: Judged) -> dict[str, object]:
    return {
        "auroc": _numbers(judged.auroc),
        "balanced_accuracy": _numbers(judged.balanced_accuracy),
        "n_unusable": judged.n_unusable,
    }


def _numbers(metric: Metric) -> list[float]:
    return [float(x) for x in (metric if metric.has_interval else metric[:1])]


def _read(one: _Score) -> LabelScore:
    plain = {name: getattr(one, name) for name in LabelScore._fields if name not in (*RESULTS, "recall")}
    results = {name: None if (of := getattr(one, name)) is None else _judged(of) for name in RESULTS}
    plain["made_elsewhere"] |= is_of_older(one.store)
    return LabelScore(**plain, **results, recall=tuple(one.recall))


def _judged(of: _Judged) -> Judged:
    return Judged(_metric(of.auroc), _metric(of.balanced_accuracy), of.n_unusable)


def _metric(numbers: list[float]) -> Metric:
    return Metric(*numbers) if len(numbers) == 3 else Metric(numbers[0], math.nan, math.nan)
