"""The feature store: everything collected about the latents of one dictionary, and the queries over it."""

import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from jaxtyping import Float
from torch import Tensor

from saelens_lite.arrays import ArrayLike
from saelens_lite.chat import ChatModel, Question
from saelens_lite.config import StoreConfig, TextConfig
from saelens_lite.dictionary import Dictionary
from saelens_lite.errors import ConfigError, UserError
from saelens_lite.features import store_files
from saelens_lite.features.activations import NamedRows, own_config, row_parts
from saelens_lite.features.build import Numbers, StorePlan
from saelens_lite.features.codes import CODES_FILE, CodesTable, check_extra
from saelens_lite.features.collect import working_folder
from saelens_lite.features.compare import STABILITY_FILE, Stability
from saelens_lite.features.detection import Scorer
from saelens_lite.features.explaining.explain import Explanations, explain, explainer, question_about
from saelens_lite.features.explaining.scores import Scores
from saelens_lite.features.explaining.scoring import ScoreConfig, questions_of, score
from saelens_lite.features.exporters import export
from saelens_lite.features.info import StoreInfo
from saelens_lite.features.label_scores import SCORES_FILE, add_to_stored, stored_scores, write_scores
from saelens_lite.features.labels import LABELS_FILE, checked_label, merged, read_labels, stored_labels, write_labels
from saelens_lite.features.per_model import ModelTensors, model_weights
from saelens_lite.features.queries import StoreQueries
from saelens_lite.features.rows import Rows
from saelens_lite.features.search import SearchResult, search
from saelens_lite.features.weights import LatentWeights, latent_weights
from saelens_lite.files import named_file, write_text
from saelens_lite.kinds import STORE
from saelens_lite.model import LanguageModel, as_model
from saelens_lite.model.models import AnyModel
from saelens_lite.model.passes import default_batch_tokens
from saelens_lite.outputs import followed, new_file, new_folder, refuse_existing, restore
from saelens_lite.paths import check_output
from saelens_lite.processes import Team, check_same, team
from saelens_lite.tokens import Text, TokenRows, files_of, with_mask
from saelens_lite.tokens.display import Vocabulary

if TYPE_CHECKING:
    import pyarrow

    from saelens_lite.features.dashboard.models import Diff


GivenModel = AnyModel | Mapping[str, LanguageModel]


class FeatureStore(StoreQueries):
    """Everything collected about the latents of one dictionary; make one with `build`, `from_activations` or `load`.

    A latent fires where its code is above zero. `control` is the store of the same dictionary on the model with shuffled
    weights, or None. `labels` say what people think the latents stand for. `models` has the numbers about each of several
    models (see `ModelTensors`), or is None.
    """

    @overload
    @classmethod
    def build(cls, dictionary: Dictionary, lm: GivenModel, text: Text | TokenRows, **settings: Any) -> "FeatureStore": ...
    @overload
    @classmethod
    def build(
        cls, dictionary: Sequence[Dictionary], lm: GivenModel, text: Text | TokenRows, **settings: Any
    ) -> "list[FeatureStore]": ...
    @classmethod
    def build(
        cls,
        dictionary: Dictionary | Sequence[Dictionary],
        lm: GivenModel,
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
        """Build the store of a dictionary. For several dictionaries, build a list of stores in one pass of the model.

        A dictionary on another device is copied to the model's.

        Codes go to disk as they are computed, 10 to 14 bytes each. The rows of a long text are kept in files too, so memory
        holds one batch, a few numbers for each row and latent, and later about 4 million activations at a time; only a latent
        with more takes memory for all of its own. Beyond about 4 million tokens, partners of latents are counted on a sample
        of so many (`StoreInfo.partner_tokens`); all other numbers are exact.

        All processes of a job that torchrun started share the work, and each returns the stores. Without `out` they need a
        common folder for temporary files.

        Args:
            lm: The model; for dictionaries whose ports name several, all of them: {"base": lm, "chat": lm2}. The store then
                also has the part of each model in what a latent fires on, and each model's own direction; see `models`. That
                takes a second product with the encoder's weights, and 4 bytes on disk for each activation and model.
            text: Text, which is cut into rows as the dictionary's training text was, or token ids, as
                `LanguageModel.to_tokens` takes them.
            config: Settings, by default those of `StoreConfig()`.
            hook: Hook to read instead of the dictionary's own.
            out: Folder for the store. Several stores go to its subfolders 0-topk, 1-l1, … (number and rule). Repeat the call to
                resume an interrupted pass.
            text_config: Settings to cut the text with, instead of those of the training text.
            attention_mask: For token ids: 1 for tokens, 0 for padding.
            stability: Scores of `sl.stability`.
            settings: Fields of `StoreConfig` by name, which replace those of `config`, such as `n_tokens=100_000`.

        Raises:
            ConfigError: no hook is named; the model is processed otherwise than in training; a setting is unknown or out of
                range; `codes` without `out` or without DuckDB; the stability scores belong to another dictionary.
            HookError, ShapeError: the model lacks a hook; a width does not match.
            TextError: there is no text, or no latent fires on it.
            OutputExistsError: `out` is not empty, or holds an unfinished pass with other inputs, and `exists` is "error".
            NonFiniteError: a weight or an activation is NaN or infinite.
            LockedError, DiskFullError: another process is writing `out`; the disk is full.
            ProcessLostError: another process of the job ended or does not answer. The codes so far are kept.
        """
        several, lm = not isinstance(dictionary, Dictionary), as_model(lm)
        dictionaries, workers = list(dictionary) if several else [dictionary], team()
        with workers.failing_together():
            config = (config or StoreConfig()).replace(**settings)
            out = None if out is None else Path(out)
            if out is not None:
                refuse_existing(followed(out), exists, STORE)
            if config.codes:
                _check_table(out)
            config = config.replace(batch_tokens=config.batch_tokens or default_batch_tokens(lm))
            given, place = with_mask(text, attention_mask), None if out is None else out.absolute().parent
            place = place if place is not None and place.is_dir() else None
            job = StorePlan.of(dictionaries, lm, given, config, hook=hook, text_config=text_config, folder=place)
            scores, request = _scores_of_each(stability, job.infos), job.request(lm)
        check_same(request, device=lm.device)
        names = folder_names(dictionaries) if several else ["."]
        with working_folder(out, request, exists, files_of(text), workers) as work:
            numbers, weights, of_models = job.numbers(lm, work, workers), [], []
            with workers.failing_together():
                if workers.is_first or lm.is_shared:  # a shared model may need all processes for its unembedding
                    raw = config.raw_unembedding
                    weights = [latent_weights(one.dictionary, lm, raw_unembedding=raw) for one in job.hooked]
                    of_models = [
                        model_weights(one.dictionary, lm, job.rows, config) if one.models else None for one in job.hooked
                    ]

            def make(i: int) -> "FeatureStore":
                words = Vocabulary(lm.vocabulary, lm.vocabulary.parts)  # a copy, because the store may change it
                return cls._made(job, i, numbers[i], weights[i], of_models[i], words, scores[i])

            stores = cls._in_all(workers, make, names, out, exists, work)
        return stores if several else stores[0]

    @classmethod
    def _made(
        cls,
        job: StorePlan,
        i: int,
        numbers: tuple[Numbers, Numbers | None],
        weights: LatentWeights,
        of_models: dict[str, Tensor] | None,
        words: Vocabulary,
        scores: Stability | None,
    ) -> "FeatureStore":
        """Return the store of the i-th dictionary, made from its numbers and the control's."""
        own, control = numbers
        info = job.infos[i].replace(partner_tokens=own.partner_tokens)
        models = None if of_models is None else ModelTensors(**of_models, **own.of_models)
        store = cls(info, own.tensors, weights, words, codes=own.codes, scores=scores, models=models)
        if control is not None:
            redrawn = job.control_info(i).replace(partner_tokens=control.partner_tokens)
            store.control = cls(redrawn, control.tensors, weights, words)
        return store

    @classmethod
    def _in_all(
        cls,
        workers: Team,
        make: Callable[[int], "FeatureStore"],
        names: Sequence[str],
        out: Path | None,
        exists: str,
        work: Path,
    ) -> "list[FeatureStore]":
        """Return the stores that the first process makes and writes to subfolders of `out`. The others read them from there."""
        place, stores = work / "made" if out is None else out, []
        with workers.failing_together(), _new_store(out, exists, place, workers) as new:
            for i, name in enumerate(names if workers.is_first else []):
                stores.append(make(i))
                if new is not None:
                    stores[i]._write_new(new / name)
        with workers.failing_together():  # also waits until all have read what may be in the working folder
            stores = stores if workers.is_first else [cls.load(place / name) for name in names]
        for store, name in zip(stores, names, strict=True):
            store._is_in(None if out is None else out / name)
        return stores

    @classmethod
    def from_activations(
        cls,
        dictionary: Dictionary,
        x: Float[Tensor, "n d_in"] | ArrayLike,
        names: Any = None,
        groups: Any = None,
        config: StoreConfig | None = None,
        *,
        out: str | Path | None = None,
        stability: Stability | None = None,
        exists: Literal["error", "overwrite"] = "error",
        **settings: Any,
    ) -> "FeatureStore":
        """Build the store of a dictionary from activations alone, such as embeddings of images or proteins.

        It shows rows by name in place of contexts, and has nothing that needs a model or a text.

        Args:
            x: A tensor, a numpy array (also one in a file: it is read in batches), a DataFrame or a list of rows, in the
                scale of the training data.
            names: One name for each row, such as the path of an image; default: the index of a DataFrame, or row numbers.
            groups: One label for each row, such as its class, to show in which groups each latent fires.
            config: Settings, by default those of `StoreConfig()`; those of tokens apply to rows.
            out: Folder for the store.
            stability: Scores of `sl.stability`.
            settings: Fields of `StoreConfig` by name, which replace those of `config`, such as `top_n=20`.

        Raises:
            ShapeError: x is not an array [n d_in] of floating-point numbers; names or groups have another length.
            ConfigError: a name or group is missing; a setting is unknown, out of range or needs a text; as for `build`.
            UserError: no latent fires.
            NonFiniteError: a weight, an activation or a code is NaN or infinite.
            OutputExistsError, LockedError, DiskFullError: as for `build`.
        """
        workers = team()
        with workers.failing_together():
            config = own_config(config, settings)
            if config.codes:
                _check_table(out)
            given, out = NamedRows.of(dictionary, x, names, groups), None if out is None else Path(out)
            if out is not None:
                refuse_existing(followed(out), exists, STORE)
        with working_folder(out, None, exists, team=workers) as work:
            parts = row_parts(dictionary, given, config, work, workers)

            def make(_: int) -> "FeatureStore":
                info, numbers, rows = parts
                scores, weights = _scores_of_each(stability, [info])[0], latent_weights(dictionary, None)
                own = Rows(rows, built_here=True)
                return cls(info, numbers.tensors, weights, given.names, codes=numbers.codes, scores=scores, rows=own)

            store = cls._in_all(workers, make, ["."], out, exists, work)[0]
        store.rows.built_here = True
        return store

    def sql(self, query: str) -> "pyarrow.Table":
        """Return the result of a SELECT over codes (latent, row, position, token, value) and tokens (token, text).

        In a store of activations, the token of a row is its number, and the text is its name.

        Raises:
            UserError: the store was built without codes, the query is not a SELECT, or DuckDB rejects it.
            CorruptFileError: the table is missing or damaged.
            ConfigError: DuckDB is not installed.
        """
        if self.codes is None:
            raise UserError("this store has no table of its codes; build it with codes=True and out=")
        return self.codes.query(query, self.vocabulary)

    def search(self, text: str, n: int = 20) -> SearchResult:
        """Return the latents whose label, promoted tokens or strongest contexts contain a text, best first.

        Capitals do not matter. The text is looked for as whole words; if no latent has it as such, also inside words. Latents
        with the text in their label come first. The others are ranked by the share of contexts with the text on the firing
        token, plus a quarter of the share with the text only near it, plus a quarter if a promoted token contains it.

        Args:
            n: Latents to return.

        Raises:
            UserError: the text is empty, or n is below 1.
        """
        return search(self, text, n)

    def label(self, latent: int, text: str) -> None:
        """Set the label of a latent; an empty text removes it. Call `write_labels` or `save` to keep it.

        Raises:
            UserError: there is no such latent, the label is too long, or it is not text.
        """
        self._check(latent)
        checked_label(text)
        self.labels.pop(latent, None)
        if text:
            self.labels[latent] = text

    def label_all(self, labels: Mapping[int, str], *, replace: bool = False) -> int:
        """Set many labels, such as those of `sl.labels.from_neuronpedia`, and return the number that was set or changed.

        They replace labels that were set so before. Your own labels stay. Call `write_labels` or `save` to keep them.

        Args:
            labels: Labels by latent.
            replace: Replace your own labels too.

        Raises:
            ConfigError: the labels belong to another dictionary.
            UserError: there is no such latent, a label is too long, or it is not text.
        """
        together = merged(self.labels, labels, self.info, replace)
        n_changed = sum(self.labels.get(latent) is not label for latent, label in together.items())
        self.labels.update(together)
        return n_changed

    def write_labels(self, path: str | Path | None = None) -> Path:
        """Write the labels to a JSON file, by default in the store's folder, and return its path.

        Raises:
            ConfigError: no path is given, and the store has no folder.
        """
        if path is None and self.folder is None:
            raise ConfigError("the store has no folder; give the path of a file for the labels")
        path = check_output(self.folder / LABELS_FILE if path is None else path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_labels(path, self.labels, self.info.dictionary_sha256)
        return path

    def read_labels(self, path: str | Path) -> None:
        """Add the labels from a JSON file. They replace existing ones, and an empty one removes a label.

        Raises:
            CorruptFileError: the file is missing or damaged.
            ConfigError: the labels belong to another dictionary.
        """
        for latent, text in read_labels(named_file(path), self.info.dictionary_sha256, self.info.d_sae).items():
            self.label(latent, text)

    def write_scores(self, path: str | Path | None = None) -> Path:
        """Write the scores of the labels to a JSON file, by default in the store's folder, and return its path.

        Scores that the store's file already has of other labels, such as those that another process wrote, stay there.

        Raises:
            ConfigError: no path is given, and the store has no folder.
            CorruptFileError, LockedError: the file in the store's folder is damaged, or another process is writing it.
        """
        if path is None and self.folder is None:
            raise ConfigError("the store has no folder; give the path of a file for the scores")
        path = check_output(self.folder / SCORES_FILE if path is None else path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if self.folder is not None and path == check_output(self.folder / SCORES_FILE):
            add_to_stored(path, self.label_scores, self.info)
        else:
            write_scores(path, self.label_scores, self.info.dictionary_sha256)
        return path

    def score(
        self,
        latents: Iterable[int] | None = None,
        *,
        model: ChatModel | Scorer,
        config: ScoreConfig | None = None,
        **settings: Any,
    ) -> Scores:
        """Score labels: a judge who reads them says in which contexts, and on which tokens, their latents fire.

        The contexts are those that explainers do not see. Beside each score are those of controls on the same contexts: the
        token baseline, another latent's explanation, and the words of the explanation in another order; see `LabelScore`. In a
        store with `codes=True`, the judge must also tell the latent from the nearest one. Call `record_scores` to keep them.

        Args:
            latents: Latents to score; default: all with a label.
            model: The judge: a chat model such as `sl.chat_model("gpt-4o-mini")`, or a function such as `words_of_label`.
            config: Settings, by default those of `ScoreConfig()`.
            settings: Fields of `ScoreConfig` by name, which replace those of `config`, such as `kinds=("detection",)`.

        Raises:
            ConfigError: a setting is unknown or out of range; `model` is neither a chat model nor a function.
            UserError: there is no such latent; the store was built from activations; a function does not return a finite number
                for each context; a chat model would give more scores than a store holds.
            BudgetError: the questions would cost more than the limit of the model.
            ChatError: the endpoint cannot be reached, or refuses the questions.
        """
        return score(self, latents, model, (config or ScoreConfig()).replace(**settings))

    def score_questions(
        self, latents: Iterable[int] | None = None, config: ScoreConfig | None = None, **settings: Any
    ) -> list[Question]:
        """Return all questions that `score` asks, without asking them, for `model.estimate` or to read.

        Raises:
            ConfigError, UserError: as for `score`.
        """
        return questions_of(self, latents, (config or ScoreConfig()).replace(**settings))

    def explain(
        self,
        latents: Iterable[int] | None = None,
        by: str = "max_act",
        *,
        model: ChatModel,
        replace: bool = False,
        **options: Any,
    ) -> Explanations:
        """Ask a chat model what latents stand for, and set its explanations as labels; see `label_all`.

        An explainer sees half of a latent's contexts. The others are kept for scores. A latent without a usable answer gets no
        label; `failures` of the result has the reason. If the work ends early, by Ctrl-C or a limit of the chat model, the
        answers until then become labels, and a repeated call asks only what is left. Call `write_labels` or `save` to keep the
        labels.

        Args:
            latents: Latents to explain; default: all that fire on the text of the store. Nothing is asked about those with a
                label of your own; `own` of the result has them.
            by: Name of an explainer; `saelens-lite plugins` lists them.
            model: The chat model, such as `sl.chat_model("gpt-4o-mini")`.
            replace: Explain latents with your own label too, and replace it.
            options: Options of the explainer: the fields of its `Config`.

        Raises:
            PluginError: there is no such explainer.
            ConfigError: an option is unknown, missing or invalid; `model` is not a chat model.
            UserError: there is no such latent; the store was built from activations.
            BudgetError: the questions would cost more than the chat model's limit, or it was reached.
            ChatError: the chat model cannot be reached, or refuses to answer.
        """
        self.info.check_text("an explanation in words")
        if latents is None:
            latents = (~self.never_fires).nonzero().flatten().tolist()
        return explain(
            self, latents, explainer(by, options), model, lambda made: self.label_all(made, replace=replace), replace
        )

    def question(self, latent: int, by: str = "max_act", **options: Any) -> Question:
        """Return the question that `explain` asks about a latent, without asking it.

        Raises:
            PluginError, ConfigError, UserError: as for `explain`; or the latent has no contexts.
        """
        self.info.check_text("an explanation in words")
        question = question_about(self, latent, explainer(by, options))
        if question is None:
            raise UserError(f"latent {latent} does not fire on the text of the store, so {by} has no question about it")
        return question

    def export(
        self,
        exporter: str,
        folder: str | Path,
        *,
        dictionary: Dictionary | None = None,
        exists: Literal["error", "overwrite"] = "error",
        **options: Any,
    ) -> Path:
        """Write the store for another tool, such as "neuronpedia", and return the folder.

        Args:
            exporter: Name of an exporter plugin; `saelens-lite plugins` lists them.
            folder: Folder to write; some exporters write to a folder below it.
            dictionary: Dictionary of the store, for exporters that also write its weights.
            options: Options of the exporter: the fields of its `Config`.

        Raises:
            PluginError: there is no such exporter.
            ConfigError: an option is unknown, missing or invalid; `dictionary` is another one; the tool cannot hold something.
            OutputExistsError: the folder is not empty and `exists` is "error", or it holds something other than an export.
            UserError: the store was built from activations, or is of several models.
            DiskFullError: the disk is full.
        """
        self.info.check_text(f"an export for {exporter}")
        self.info.check_one_model(f"an export for {exporter}")
        return export(self, exporter, folder, dictionary=dictionary, exists=exists, **options)

    def save(self, folder: str | Path, *, exists: Literal["error", "overwrite"] = "error") -> Path:
        """Write the store as a folder, which appears complete or not at all, and return its path.

        Raises:
            OutputExistsError: the folder is not empty and `exists` is "error".
            CorruptFileError: the table of codes, which is copied, is missing or damaged.
            DiskFullError: the disk is full.
        """
        own = {
            LABELS_FILE: self.labels,
            SCORES_FILE: self.label_scores,
        }  # a person's work, and paid for: only others replace them
        kind = STORE.allowing(*(re.escape(name) for name, there in own.items() if there))
        with new_folder(Path(folder), kind, exists) as new:
            if self.codes is not None:
                self.codes.check()
                shutil.copyfile(self.codes.path, new / CODES_FILE)
            self._write(new)
        self._is_in(Path(folder))
        return Path(folder)

    def _is_in(self, folder: Path | None) -> None:
        """Record the folder that the files are in now."""
        self.folder = folder
        if self.codes is not None and folder is not None:
            self.codes = CodesTable(folder / CODES_FILE, self.codes.n_bytes, self.codes.sha256)

    def _write_new(self, folder: Path) -> None:
        """Write all files into a new folder. The table of codes is moved there."""
        folder.mkdir(exist_ok=True)
        if self.codes is not None:
            shutil.move(self.codes.path, folder / CODES_FILE)
        self._write(folder)

    def _write(self, folder: Path) -> None:
        """Write all files except the table of codes into a new folder, which already holds that table."""
        control = None if self.control is None else store_files.Control(self.control.info, self.control.tensors)
        store_files.write(
            folder,
            store_files.Parts(
                self.info,
                self.tensors,
                self.weights,
                self.vocabulary,
                self.codes,
                control,
                None if self.rows is None else self.rows.tensors,
                self.models,
            ),
        )
        if self.scores is not None:
            self.scores.save(folder)
        if self.labels:
            self.write_labels(folder / LABELS_FILE)
        if scores := self.label_scores:
            write_scores(folder / SCORES_FILE, scores, self.info.dictionary_sha256)

    @classmethod
    def load(cls, folder: str | Path, dictionary: Dictionary | None = None) -> "FeatureStore":
        """Return the store in a folder written by `save` or `build`, with its labels, their scores and stability, if any.

        Args:
            dictionary: Dictionary that the store must belong to; default: not checked.

        Raises:
            CorruptFileError: a file is missing, truncated or damaged, or the files do not belong together.
            ConfigError: the store, its labels or its stability scores belong to another dictionary.
        """
        folder = Path(folder)
        restore(folder)
        info, tensors, weights, words, codes, control, rows, models = store_files.read(folder)
        if dictionary is not None:
            info.check_dictionary(dictionary)
        rows = None if rows is None else Rows(rows)
        store = cls(info, tensors, weights, words, codes=codes, folder=folder, rows=rows, models=models)
        if control is not None:
            store.control = cls(control.info, control.tensors, weights, words)
        if os.path.lexists(folder / STABILITY_FILE):
            store.scores = _scores_of_each(Stability.load(folder), [info])[0]
        store.labels = stored_labels(folder, info)
        store._label_scores = stored_scores(folder, info)
        return store

    def dashboard(
        self,
        path: str | Path = "features.html",
        *,
        images: str | Path | Literal[False] | None = None,
        diff: "Diff | None" = None,
        exists: Literal["error", "overwrite"] = "error",
    ) -> Path:
        """Write the store as one HTML page, which needs no network, and return its path.

        Args:
            diff: Report of `sl.diff` on the same dictionary, whose numbers and classes the page then shows. Without it, a page
                of two models has the classes that follow from the norms of their directions alone.
            images: For rows named by image files, the folder that holds them; files outside of it are not read. False leaves
                thumbnails out. By default, a store that was just built reads the files, and a loaded one does not, because its
                names may be a stranger's.

        Raises:
            UserError: none of the images is in the folder.
            ConfigError: the diff is of other models or of another dictionary.
            OutputExistsError: the file exists and `exists` is "error", or it is not an HTML page.
            LockedError: another process is writing it.
        """
        from saelens_lite.features.dashboard import render
        from saelens_lite.features.dashboard.images import images_of

        path = check_output(path)
        with new_file(path, "page", exists, _is_page):
            write_text(path, render(self, images_of(self, images), diff))
        return path

    def _repr_html_(self) -> str:
        from saelens_lite.features.card import store_card

        return store_card(self)

    def __repr__(self) -> str:
        i = self.info
        silent, place = int(self.never_fires.sum()), f"{i.model}, {i.place}" if i.model else i.place
        return f"FeatureStore({i.d_sae} latents, {i.rule}, {place}, {i.n_tokens:,} {i.unit}s, {silent} never fire)"


@contextmanager
def _new_store(out: Path | None, exists: str, place: Path, workers: Team) -> Iterator[Path | None]:
    """Yield a new folder for stores to the first process, which becomes `out`. Without `out`, a team gets `place`, one None."""
    if workers.is_first and out is not None:
        with new_folder(out, STORE, exists, lock=False) as new:
            yield new
        return
    if workers.is_first and workers.world > 1:
        place.mkdir()
    yield place if workers.is_first and workers.world > 1 else None


def _is_page(path: Path) -> bool:
    """Return whether a file is an HTML page."""
    with open(path, "rb") as file:
        return file.read(64).lstrip().lower().startswith(b"<!doctype html")


def _check_table(out: str | Path | None) -> None:
    """Raise ConfigError unless a table of codes can be written."""
    check_extra()
    if out is None:
        raise ConfigError("codes=True writes a table to the folder of the store; give out=")


def folder_names(dictionaries: Sequence[Dictionary]) -> list[str]:
    """Return the folder names of several stores: the number and the rule of each dictionary."""
    return [f"{i}-{d.rule.plugin_name}" for i, d in enumerate(dictionaries)]


def _scores_of_each(
    stability: Stability | Sequence[Stability | None] | None, infos: Sequence[StoreInfo]
) -> list[Stability | None]:
    """Return the stability scores of each dictionary, None where they are not given."""
    given = [stability] if stability is None or isinstance(stability, Stability) else list(stability)
    if stability is None:
        given *= len(infos)
    if len(given) != len(infos):
        raise ConfigError(
            f"{len(given)} stability scores for {len(infos)} dictionaries; give one for each, or None in its place"
        )
    for scores, info in zip(given, infos, strict=True):
        if scores is not None and (scores.sha256, len(scores.score)) != (info.dictionary_sha256, info.d_sae):
            raise ConfigError("the stability scores are of another dictionary; compute them again with sl.stability")
    return given
