"""The feature store: everything collected of one dictionary, and the questions it answers."""

import math
import os
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from jaxtyping import Bool, Float
from torch import Tensor, isin, tensor

from saelens_lite.cache.capture import default_batch_tokens
from saelens_lite.config import TextConfig
from saelens_lite.dictionary import Dictionary
from saelens_lite.errors import ConfigError, UserError
from saelens_lite.exporters import export
from saelens_lite.features import store_files
from saelens_lite.features.build import Job, reduced
from saelens_lite.features.code_log import CodeLog
from saelens_lite.features.codes import CODES_FILE, CodesTable, check_extra
from saelens_lite.features.collect import working_folder
from saelens_lite.features.compare import STABILITY_FILE, Stability
from saelens_lite.features.detection import Detection, Scorer, detection
from saelens_lite.features.info import StoreInfo
from saelens_lite.features.labels import LABELS_FILE, read_labels, write_labels
from saelens_lite.features.summary import Example, ExampleGroup, LatentSummary, Partner, PositionBin
from saelens_lite.features.tensors import NONE, FeatureTensors
from saelens_lite.features.weights import LatentWeights, latent_weights
from saelens_lite.files import named_file, write_text
from saelens_lite.kinds import STORE
from saelens_lite.model import LanguageModel
from saelens_lite.outputs import followed, new_file, new_folder, refuse_existing, restore
from saelens_lite.paths import check_output
from saelens_lite.tokens import Text, TokenRows, files_of, with_mask
from saelens_lite.tokens.display import Vocabulary

if TYPE_CHECKING:
    import pyarrow


class FeatureStore:
    """Everything there is to show about the latents of one dictionary; make one with `build` or `load`.

    A latent fires where its code is above zero. `control` is the store of the same dictionary on the model with its weights
    re-drawn, or None; `labels` are what people think that latents stand for.
    """

    def __init__(
        self,
        info: StoreInfo,
        tensors: FeatureTensors,
        weights: LatentWeights,
        vocabulary: list[str],
        *,
        codes: CodesTable | None = None,
        scores: Stability | None = None,
        control: "FeatureStore | None" = None,
        labels: dict[int, str] | None = None,
        folder: Path | None = None,
    ):
        self.info, self.tensors, self.weights = info, tensors, weights
        self.vocabulary = vocabulary if isinstance(vocabulary, Vocabulary) else Vocabulary(vocabulary)
        self.codes, self.scores, self.control, self.labels, self.folder = codes, scores, control, labels or {}, folder

    @overload
    @classmethod
    def build(cls, dictionary: Dictionary, lm: LanguageModel, text: Text | TokenRows, **settings: Any) -> "FeatureStore": ...
    @overload
    @classmethod
    def build(
        cls, dictionary: Sequence[Dictionary], lm: LanguageModel, text: Text | TokenRows, **settings: Any
    ) -> "list[FeatureStore]": ...
    @classmethod
    def build(
        cls,
        dictionary: Dictionary | Sequence[Dictionary],
        lm: LanguageModel,
        text: Text | TokenRows,
        *,
        hook: str | None = None,
        out: str | Path | None = None,
        top_n: int = 10,
        n_groups: int = 5,
        group_size: int = 5,
        n_random: int = 10,
        n_silent: int = 20,
        window: tuple[int, int] = (12, 6),
        codes: bool = False,
        control: bool = False,
        stability: Stability | Sequence[Stability | None] | None = None,
        raw_unembedding: bool = False,
        n_tokens: int | None = None,
        text_config: TextConfig | None = None,
        attention_mask: Any = None,
        batch_tokens: int | None = None,
        seed: int = 0,
        exists: Literal["error", "overwrite"] = "error",
    ) -> "FeatureStore | list[FeatureStore]":
        """The store of a dictionary; of several dictionaries, of one hook or more, in one pass of the model, a list of stores.

        With `out` it is also written to that folder, several to the folders 0-topk, 1-l1, … (number and rule) in it; an
        interrupted pass is then gone on with by the same call. Text is cut into rows as the dictionary's training text was;
        `text_config` says otherwise. `text` may be token ids in any form that `LanguageModel.to_tokens` takes, with their
        `attention_mask`. Codes go to disk while they are collected, 12 to 14 bytes each: what is in memory is a
        batch, the token ids with a few numbers for each, and afterwards the activations of some latents.

        Each of the `top_n` contexts of a latent comes from another row; of equal activations the earlier is taken. `group_size`
        more are drawn from each of `n_groups` groups of equally many activations, `n_random` from all of them, and `n_silent`
        from places where the latent does not fire. `window` counts the tokens shown before and after.

        `codes` keeps all activations as a table for `sql` (needs `out`). `control` adds the same of the model with its weights
        re-drawn. `stability` are scores of `sl.stability`. `raw_unembedding`: effects on logits by W_U as it is.
        `batch_tokens`: tokens of a forward pass (2,048 on a CPU, 16,384 on a GPU).

        Raises:
            ConfigError: no hook is named; another processing of the model; a setting out of range; `codes` without `out` or
                without DuckDB; stability scores of another dictionary.
            HookError, ShapeError: a hook the model lacks, a width that does not fit.
            TextError: no text, or nothing fires on it.
            OutputExistsError: `out` holds something, or an unfinished pass of something else, and `exists` is "error".
            NonFiniteError: a dictionary or activations are NaN or infinite.
            LockedError, DiskFullError: another process is writing `out`; there is no room.
        """
        several = not isinstance(dictionary, Dictionary)
        dictionaries = list(dictionary) if several else [dictionary]
        out = None if out is None else Path(out)
        if out is not None:
            refuse_existing(followed(out), exists, STORE)
        if codes:
            check_extra()
            if out is None:
                raise ConfigError("codes=True writes a table; give out=, the folder for it")
        batch_tokens = default_batch_tokens(lm) if batch_tokens is None else batch_tokens
        if batch_tokens < 1:
            raise ConfigError(f"batch_tokens = {batch_tokens}; expected at least 1")
        job = Job.of(
            dictionaries,
            lm,
            with_mask(text, attention_mask),
            hook,
            n_tokens,
            text_config,
            top_n=top_n,
            n_groups=n_groups,
            group_size=group_size,
            n_random=n_random,
            n_silent=n_silent,
            window=window,
            seed=seed,
            raw_unembedding=raw_unembedding,
        )
        scores = _scores_of_each(stability, job.infos)
        names = folder_names(dictionaries) if several else ["."]
        with working_folder(out, job.request(lm, batch_tokens, control), exists, files_of(text)) as work:
            code_logs = job.collected(lm, batch_tokens, work, "features")
            others: list[CodeLog | None] = [None] * len(names)
            if control:
                others = job.collected(lm.redrawn(seed), batch_tokens, work / "control", "features of the control")
            words = Vocabulary(lm.vocabulary, lm.vocabulary.parts)  # the store's own, for it may be changed
            with nullcontext() if out is None else new_folder(out, STORE, exists, lock=False) as new:
                stores = [
                    cls._made(job, i, lm, words, code_logs[i], others[i], scores[i], None if new is None else new / name, codes)
                    for i, name in enumerate(names)
                ]
        if out is not None:
            for store, name in zip(stores, names, strict=True):
                store._is_in(out / name)
        return stores if several else stores[0]

    @classmethod
    def _made(
        cls,
        job: Job,
        i: int,
        lm: LanguageModel,
        words: Vocabulary,
        code_log: CodeLog,
        other: CodeLog | None,
        scores: Stability | None,
        folder: Path | None,
        codes: bool,
    ) -> "FeatureStore":
        """The store of the i-th dictionary from its codes, those of the control beside them; with a folder it is written."""
        info = job.infos[i]
        table = None
        if folder is not None:
            folder.mkdir(exist_ok=True)
            table = folder / CODES_FILE if codes else None
        tensors = reduced(code_log, job.rows, info, table)
        weights = latent_weights(job.hooked[i].dictionary, lm, raw_unembedding=info.raw_unembedding)
        store = cls(info, tensors, weights, words, codes=None if table is None else CodesTable.of(table), scores=scores)
        if other is not None:
            redrawn = info.replace(model=f"{info.model}, weights re-drawn", revision=None)
            store.control = cls(redrawn, reduced(other, job.rows, redrawn, must_fire=False), weights, words)
        if folder is not None:
            store._write(folder)
        return store

    @property
    def density(self) -> Float[Tensor, " d_sae"]:
        """Share of the tokens on which each latent fires."""
        return (self.tensors.count.double() / self.info.n_tokens).float()

    @property
    def never_fires(self) -> Bool[Tensor, " d_sae"]:
        """Which latents did not fire once on the text."""
        return self.tensors.count == 0

    @property
    def stability(self) -> Float[Tensor, " d_sae"] | None:
        """How far other dictionaries have each latent (`sl.stability`), 0 for the dead; None where that is not known."""
        return None if self.scores is None else self.scores.score

    def top_examples(self, latent: int) -> list[Example]:
        """The contexts in which a latent fires most, best first; empty when it never fires.

        Raises:
            UserError: there is no such latent.
        """
        self._check(latent)
        return self._examples(self.tensors.top_place[latent], self.tensors.top_nearby[latent])

    def quantile_examples(self, latent: int) -> list[ExampleGroup]:
        """Contexts drawn from groups of equally many activations, the group of the largest first.

        Raises:
            UserError: there is no such latent.
        """
        self._check(latent)
        t = self.tensors
        n, numbers = int(t.count[latent]), (t.group_count, t.group_low, t.group_high, t.group_place, t.group_nearby)
        return [
            ExampleGroup(float(low), float(high), int(count) / n, self._examples(place, nearby))
            for count, low, high, place, nearby in zip(*(x[latent] for x in numbers), strict=True)
            if count > 0
        ]

    def random_examples(self, latent: int) -> list[Example]:
        """Contexts drawn from all in which a latent fires, in the order of the text.

        Raises:
            UserError: there is no such latent.
        """
        self._check(latent)
        return self._examples(self.tensors.random_place[latent], self.tensors.random_nearby[latent])

    def silent_examples(self, latent: int) -> list[Example]:
        """Contexts drawn from those in which a latent does not fire; fewer than asked for where it nearly always does.

        Raises:
            UserError: there is no such latent.
        """
        self._check(latent)
        place = self.tensors.silent_place[latent]
        return self._examples(place, self.tensors.top_nearby.new_zeros(len(place), sum(self.info.window) + 1))

    def _examples(self, places: Tensor, nearby: Tensor) -> list[Example]:
        """The contexts at places, and what the latent does there."""
        t, (before, after) = self.tensors, self.info.window
        examples = []
        for place, around in zip(places.tolist(), nearby.tolist(), strict=True):
            if place != NONE:
                row, position = divmod(place, t.tokens.shape[1])
                start, stop = max(0, position - before), min(int(t.length[row]), position + after + 1)
                tokens = tuple(self.vocabulary.window(t.tokens[row, : int(t.length[row])], start, stop))
                first = start - (position - before)
                values = tuple(around[first : first + len(tokens)])
                examples.append(Example(tokens, values, position - start, around[before], row, position))
        return examples

    def position_profile(self, latent: int) -> list[PositionBin]:
        """How often and how strongly a latent fires at positions 1, 2 to 3, 4 to 7, …, as far as tokens count there.

        Raises:
            UserError: there is no such latent.
        """
        self._check(latent)
        t = self.tensors
        columns = (t.band_low, t.band_high, t.band_tokens, t.band_count[latent], t.band_mean[latent])
        return [
            PositionBin(low, high, count / n, mean)
            for low, high, n, count, mean in zip(*(x.tolist() for x in columns), strict=True)
            if n
        ]

    def partners(self, latent: int, by: str = "pmi") -> list[Partner]:
        """The latents that fire together with one: by "pmi" those whose pointwise mutual information with it is largest, of
        those that do so on at least 5 tokens, or by "count" those that do so on most tokens.

        Raises:
            UserError: there is no such latent.
            ConfigError: another `by`.
        """
        self._check(latent)
        t = self.tensors
        lists = {"pmi": (t.specific_partner, t.specific_count), "count": (t.frequent_partner, t.frequent_count)}
        if by not in lists:
            raise ConfigError(f"by = {by!r}; expected pmi or count")
        own = int(t.count[latent])
        return [
            Partner(other, n, math.log(n * self.info.n_tokens / (own * int(t.count[other]))))
            for other, n in zip(*(x[latent].tolist() for x in lists[by]), strict=True)
            if other != NONE
        ]

    def promoted(self, latent: int) -> list[tuple[str, float]]:
        """The tokens whose logits a latent raises most, and by how much for each unit of its activation.

        Directly, past all later layers, and but for the positive factor by which the final norm divides.
        """
        return self._effects(latent, self.weights.promoted, self.weights.promoted_effect)

    def suppressed(self, latent: int) -> list[tuple[str, float]]:
        """The tokens whose logits a latent lowers most, as `promoted`."""
        return self._effects(latent, self.weights.suppressed, self.weights.suppressed_effect)

    def promoting(self, token: str) -> list[tuple[int, float]]:
        """The latents among whose `promoted` a token is, with the effect on its logit, largest first.

        Raises:
            UserError: the model has no such token; mind the space in front of words.
        """
        ids = self.vocabulary.ids_of(token)
        if not ids:
            raise UserError(f"{token!r} is no token of {self.info.model}{self.vocabulary.hint(token)}")
        latent, rank = isin(self.weights.promoted, tensor(ids)).nonzero(as_tuple=True)
        found = zip(latent.tolist(), self.weights.promoted_effect[latent, rank].tolist(), strict=True)
        return sorted(found, key=lambda pair: -pair[1])

    def _effects(self, latent: int, ids: Tensor, effects: Tensor) -> list[tuple[str, float]]:
        self._check(latent)
        return [(self.vocabulary[i], effect) for i, effect in zip(ids[latent].tolist(), effects[latent].tolist(), strict=True)]

    def latent(self, latent: int) -> LatentSummary:
        """All there is to know about one latent; UserError when there is no such latent."""
        self._check(latent)
        t = self.tensors
        return LatentSummary(
            latent=latent,
            label=self.labels.get(latent),
            count=int(t.count[latent]),
            density=int(t.count[latent]) / self.info.n_tokens,
            max=float(t.top_value[latent, 0]),
            **{name: float(getattr(t, name)[latent]) for name in ("mean", "std", "skew", "kurtosis", "bin_width")},
            histogram=t.histogram[latent].tolist(),
            promoted=self.promoted(latent),
            suppressed=self.suppressed(latent),
            examples=self.top_examples(latent),
            groups=self.quantile_examples(latent),
            random=self.random_examples(latent),
            positions=self.position_profile(latent),
            partners=self.partners(latent),
            stability=self._stability(latent),
        )

    def _stability(self, latent: int) -> float | None:
        """The score of a latent, None where there is none: no scores at all, or the latent was dead when they were made."""
        return float(self.scores.score[latent]) if self.scores is not None and self.scores.live[latent] else None

    def _check(self, latent: int) -> None:
        if not 0 <= latent < self.info.d_sae:
            raise UserError(f"no latent {latent}; this dictionary has latents 0 to {self.info.d_sae - 1}")

    def sql(self, query: str) -> "pyarrow.Table":
        """What a SELECT over the tables codes (latent, row, position, token, value) and tokens (token, text) gives.

        Raises:
            UserError: the store was built without codes, or the query is no SELECT, or DuckDB refuses it.
            CorruptFileError: the table is damaged.
            ConfigError: DuckDB is not installed.
        """
        if self.codes is None:
            raise UserError("this store has no table of its codes; build it with codes=True and out=")
        return self.codes.query(query, self.vocabulary)

    def label(self, latent: int, text: str) -> None:
        """Say what a latent stands for; an empty text takes the label away. `write_labels` keeps it.

        Raises:
            UserError: there is no such latent.
        """
        self._check(latent)
        self.labels.pop(latent, None)
        if text:
            self.labels[latent] = text

    def write_labels(self, path: str | Path | None = None) -> Path:
        """Put the labels in a JSON file, by default the one in the store's folder; its path.

        Raises:
            ConfigError: neither a path nor a folder.
        """
        if path is None and self.folder is None:
            raise ConfigError("the store is in no folder; say where the labels should go")
        path = check_output(self.folder / LABELS_FILE if path is None else path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_labels(path, self.labels, self.info.dictionary_sha256)
        return path

    def read_labels(self, path: str | Path) -> None:
        """Add the labels in a JSON file to those there are; they win, and an empty one takes a label away.

        Raises:
            CorruptFileError: the file is missing or damaged.
            ConfigError: they are of another dictionary.
        """
        for latent, text in read_labels(named_file(path), self.info.dictionary_sha256, self.info.d_sae).items():
            self.label(latent, text)

    def detection(self, latent: int, scorer: Scorer | None = None) -> Detection:
        """How well the label of a latent tells contexts in which it fires from others, beside the tokens alone.

        scorer: who reads the label, such as a client of a language model; default: its words are looked for.

        Raises:
            UserError: no such latent; too few contexts; a scorer that does not give a finite number a context.
        """
        return detection(self, latent, scorer)

    def export(
        self,
        exporter: str,
        folder: str | Path,
        *,
        dictionary: Dictionary | None = None,
        exists: Literal["error", "overwrite"] = "error",
        **options: Any,
    ) -> Path:
        """Write the store for another tool, such as "neuronpedia", and return the folder it is in.

        Args:
            exporter: the name of a plugin; `saelens-lite plugins` lists them.
            folder: the folder to write; some exporters write to a folder below it.
            dictionary: the dictionary of the store, for exporters that also write its weights.
            options: the exporter's own, the fields of its `Config`.

        Raises:
            PluginError: there is no such exporter.
            ConfigError: an option is unknown, missing or has a bad value; another dictionary; something that the tool has no
                place for.
            OutputExistsError: the folder holds something and `exists` is "error", or holds something else than an export.
            DiskFullError: there is no room for it.
        """
        return export(self, exporter, folder, dictionary=dictionary, exists=exists, **options)

    def save(self, folder: str | Path, *, exists: Literal["error", "overwrite"] = "error") -> Path:
        """Write the store as a folder, which appears whole or not at all; its path.

        Raises:
            OutputExistsError: the folder holds something and `exists` is "error".
            CorruptFileError: the table of codes, which is copied, is missing or damaged.
            DiskFullError: there is no room for it.
        """
        kind = STORE.allowing(r"labels\.json") if self.labels else STORE  # labels are somebody's work: replaced, but not lost
        with new_folder(Path(folder), kind, exists) as new:
            if self.codes is not None:
                self.codes.check()
                shutil.copyfile(self.codes.path, new / CODES_FILE)
            self._write(new)
        self._is_in(Path(folder))
        return Path(folder)

    def _is_in(self, folder: Path) -> None:
        """Note where the files are now."""
        self.folder = folder
        if self.codes is not None:
            self.codes = CodesTable(folder / CODES_FILE, self.codes.n_bytes, self.codes.sha256)

    def _write(self, folder: Path) -> None:
        """Fill a fresh folder, in which the codes are already."""
        control = None if self.control is None else store_files.Control(self.control.info, self.control.tensors)
        store_files.write(
            folder, store_files.Parts(self.info, self.tensors, self.weights, self.vocabulary, self.codes, control)
        )
        if self.scores is not None:
            self.scores.save(folder)
        if self.labels:
            self.write_labels(folder / LABELS_FILE)

    @classmethod
    def load(cls, folder: str | Path, dictionary: Dictionary | None = None) -> "FeatureStore":
        """The store in a folder written by `save` or `build`, with the labels and stability scores that are there.

        dictionary: the one that the store must be of.

        Raises:
            CorruptFileError: a file is missing, truncated or damaged, or they do not belong together.
            ConfigError: the store, its labels or its stability scores are of another dictionary.
        """
        folder = Path(folder)
        restore(folder)
        info, tensors, weights, words, codes, control = store_files.read(folder)
        if dictionary is not None:
            info.check_dictionary(dictionary)
        store = cls(info, tensors, weights, words, codes=codes, folder=folder)
        if control is not None:
            store.control = cls(control.info, control.tensors, weights, words)
        if os.path.lexists(folder / STABILITY_FILE):
            store.scores = _scores_of_each(Stability.load(folder), [info])[0]
        if os.path.lexists(folder / LABELS_FILE):
            found = read_labels(folder / LABELS_FILE, info.dictionary_sha256, info.d_sae)
            store.labels = {latent: text for latent, text in found.items() if text}
        return store

    def dashboard(self, path: str | Path = "features.html", *, exists: Literal["error", "overwrite"] = "error") -> Path:
        """Write the store as one HTML page that needs no network; its path.

        Raises:
            OutputExistsError: the file exists and `exists` is "error", or what is there is not a page.
            LockedError: another process is writing it.
        """
        from saelens_lite.features.dashboard import render

        path = check_output(path)
        with new_file(path, "page", exists, _is_page):
            write_text(path, render(self))
        return path

    def _repr_html_(self) -> str:
        from saelens_lite.features.card import store_card

        return store_card(self)

    def __repr__(self) -> str:
        i = self.info
        silent = int(self.never_fires.sum())
        return f"FeatureStore({i.d_sae} latents, {i.rule}, {i.model}, {i.place}, {i.n_tokens:,} tokens, {silent} never fire)"


def _is_page(path: Path) -> bool:
    """Return whether a file is an HTML page."""
    with open(path, "rb") as file:
        return file.read(64).lstrip().lower().startswith(b"<!doctype html")


def folder_names(dictionaries: Sequence[Dictionary]) -> list[str]:
    """What the folders of several stores are called: the number and the rule of each dictionary."""
    return [f"{i}-{d.rule.plugin_name}" for i, d in enumerate(dictionaries)]


def _scores_of_each(
    stability: Stability | Sequence[Stability | None] | None, infos: Sequence[StoreInfo]
) -> list[Stability | None]:
    """The scores of each dictionary, where there are any."""
    given = [stability] if stability is None or isinstance(stability, Stability) else list(stability)
    if stability is None:
        given *= len(infos)
    if len(given) != len(infos):
        raise ConfigError(f"{len(given)} stability scores for {len(infos)} dictionaries; give as many, or None among them")
    for scores, info in zip(given, infos, strict=True):
        if scores is not None and (scores.sha256, len(scores.score)) != (info.dictionary_sha256, info.d_sae):
            raise ConfigError("the stability scores are of another dictionary; compute them anew with sl.stability")
    return given
