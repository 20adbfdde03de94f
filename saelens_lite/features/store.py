"""The feature store: everything collected of one dictionary, and the questions it answers."""

import os
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from saelens_lite.config import StoreConfig, TextConfig
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
from saelens_lite.features.queries import StoreQueries
from saelens_lite.features.weights import latent_weights
from saelens_lite.files import named_file, write_text
from saelens_lite.kinds import STORE
from saelens_lite.model import LanguageModel
from saelens_lite.model.passes import default_batch_tokens
from saelens_lite.outputs import followed, new_file, new_folder, refuse_existing, restore
from saelens_lite.paths import check_output
from saelens_lite.tokens import Text, TokenRows, files_of, with_mask
from saelens_lite.tokens.display import Vocabulary

if TYPE_CHECKING:
    import pyarrow


class FeatureStore(StoreQueries):
    """Everything there is to show about the latents of one dictionary; make one with `build` or `load`.

    A latent fires where its code is above zero. `control` is the store of the same dictionary on the model with its weights
    re-drawn, or None; `labels` are what people think that latents stand for.
    """

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
        config: StoreConfig | None = None,
        *,
        hook: str | None = None,
        out: str | Path | None = None,
        text_config: TextConfig | None = None,
        attention_mask: Any = None,
        stability: Stability | Sequence[Stability | None] | None = None,
        exists: Literal["error", "overwrite"] = "error",
        **settings: Any,
    ) -> "FeatureStore | list[FeatureStore]":
        """Collect the store of a dictionary; of several dictionaries, in one pass of the model, a list of stores.

        Codes go to disk while they are collected, 12 to 14 bytes each: memory holds a batch, the token ids with a few numbers
        for each, and afterwards the activations of some latents.

        Args:
            text: Text, cut into rows as the dictionary's training text was; or token ids, as `LanguageModel.to_tokens` takes
                them.
            config: Settings, by default those of `StoreConfig()`.
            hook: Hook to read in place of the dictionary's own.
            out: Folder for the store; several stores have the folders 0-topk, 1-l1, … (number and rule) in it. Repeat the
                call to resume an interrupted pass.
            text_config: How to cut the text instead.
            attention_mask: Of token ids: 1 where there is a token, 0 where there is padding.
            stability: Scores of `sl.stability`.
            settings: Fields of `StoreConfig` by name, in place of those of `config`: `n_tokens=100_000`.

        Raises:
            ConfigError: no hook is named; another processing of the model; an unknown setting, or one out of range; `codes`
                without `out` or without DuckDB; stability scores of another dictionary.
            HookError, ShapeError: a hook the model lacks, a width that does not fit.
            TextError: no text, or nothing fires on it.
            OutputExistsError: `out` holds something, or an unfinished pass of something else, and `exists` is "error".
            NonFiniteError: a dictionary or activations are NaN or infinite.
            LockedError, DiskFullError: another process is writing `out`; there is no room.
        """
        several = not isinstance(dictionary, Dictionary)
        dictionaries = list(dictionary) if several else [dictionary]
        config = (config or StoreConfig()).replace(**settings)
        out = None if out is None else Path(out)
        if out is not None:
            refuse_existing(followed(out), exists, STORE)
        if config.codes:
            check_extra()
            if out is None:
                raise ConfigError("codes=True writes a table; give out=, the folder for it")
        config = config.replace(batch_tokens=config.batch_tokens or default_batch_tokens(lm))
        job = Job.of(dictionaries, lm, with_mask(text, attention_mask), config, hook=hook, text_config=text_config)
        scores = _scores_of_each(stability, job.infos)
        names = folder_names(dictionaries) if several else ["."]
        with working_folder(out, job.request(lm), exists, files_of(text)) as work:
            code_logs = job.collected(lm, work, "features")
            others: list[CodeLog | None] = [None] * len(names)
            if config.control:
                others = job.collected(lm.redrawn(config.seed), work / "control", "features of the control")
            words = Vocabulary(lm.vocabulary, lm.vocabulary.parts)  # the store's own, for it may be changed
            with nullcontext() if out is None else new_folder(out, STORE, exists, lock=False) as new:
                stores = [
                    cls._made(job, i, lm, words, code_logs[i], others[i], scores[i], None if new is None else new / name)
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
    ) -> "FeatureStore":
        """Make the store of the i-th dictionary from its codes and those of the control, and write it if there is a folder."""
        info = job.infos[i]
        table = None
        if folder is not None:
            folder.mkdir(exist_ok=True)
            table = folder / CODES_FILE if job.config.codes else None
        tensors = reduced(code_log, job.rows, info, table)
        weights = latent_weights(job.hooked[i].dictionary, lm, raw_unembedding=info.raw_unembedding)
        store = cls(info, tensors, weights, words, codes=None if table is None else CodesTable.of(table), scores=scores)
        if other is not None:
            redrawn = info.replace(model=f"{info.model}, weights re-drawn", revision=None)
            store.control = cls(redrawn, reduced(other, job.rows, redrawn, must_fire=False), weights, words)
        if folder is not None:
            store._write(folder)
        return store

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
