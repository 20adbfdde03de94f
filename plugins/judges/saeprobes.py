"""Sparse probing: classification of labelled texts by the k most telling latents of a dictionary.

sae-probes does the work. It has 113 two-class data sets, chooses the latents with the largest difference between the classes'
means over the training texts, and fits logistic regressions. A probe reads the activation, or the latents, at the last token of
a text.

Source: Kantamneni et al. 2025, arXiv:2502.16681; the "normal" setting, in which both classes are equally frequent.
"""

import io
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from pydantic import Field
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from saelens_lite import Dictionary, LanguageModel
from saelens_lite.errors import ConfigError, near_matches
from saelens_lite.judges import Judge, JudgeConfig, after_bos, progress_bar
from saelens_lite_plugins.judges.saebench import DenseSAE, dense_sae

CHANCE = 0.5  # area under the curve, and accuracy, of a guess: both classes are equally frequent
LONGEST = 1024  # read at most this many tokens of a text, the last ones
log = logging.getLogger(__name__)


class SparseProbe(NamedTuple):
    """The scores of one probe on the test texts of a data set; k None: a probe of the whole activation."""

    dataset: str
    k: int | None
    auc: float
    accuracy: float
    f1: float


class SparseProbeReport(NamedTuple):
    """The probes of one dictionary, and those of the activations that it reads."""

    model: str
    hook: str
    probes: tuple[SparseProbe, ...]

    def mean_auc(self, k: int | None) -> float:
        """Return the mean over data sets of the area under the curve of probes of k latents; None: of the whole activation."""
        areas = [probe.auc for probe in self.probes if probe.k == k]
        if not areas:
            raise ConfigError(
                f"k = {k}: no such probe; the report has k = {sorted({p.k for p in self.probes if p.k is not None})}"
            )
        return sum(areas) / len(areas)

    def __str__(self) -> str:
        ks = list(dict.fromkeys(probe.k for probe in self.probes))
        titles = ["activation" if k is None else f"k = {k}" for k in ks]
        auc = {(probe.dataset, probe.k): probe.auc for probe in self.probes}
        rows = [(name, [auc[name, k] for k in ks]) for name in dict.fromkeys(probe.dataset for probe in self.probes)]
        rows.append(("mean", [self.mean_auc(k) for k in ks]))
        width = max(len(name) for name, _ in rows)
        lines = [f"area under the curve, {self.model}, {self.hook}; chance {CHANCE}"]
        lines.append(" " * width + "".join(f"{title:>12}" for title in titles))
        lines += [f"{name:{width}}" + "".join(f"{value:12.3f}" for value in values) for name, values in rows]
        return "\n".join(lines)


class SAEProbesOptions(JudgeConfig):
    """The data sets and latents to probe."""

    datasets: tuple[str, ...] | None = Field(None, description="Names of sae-probes' data sets; default: all 113.")
    ks: tuple[int, ...] = Field((1, 4, 16), description="Numbers of latents that a probe reads.")
    hook: str | None = Field(None, description="Hook of the dictionaries; default: the one that they name.")
    batch_size: int = Field(32, gt=0, description="Texts of a forward pass.")


class SAEProbes(Judge):
    """Probes of the k most telling latents, and of the whole activation, on labelled texts.

    Texts begin with the BOS token unless the dictionary was trained without it. The last 1,024 tokens of longer texts are read,
    or as many as the model takes. Probes of latents are L1-regularised, those of the activation L2-regularised, as in the
    package's own reports.
    """

    paper = "Kantamneni et al. 2025, Are sparse autoencoders useful? A case study in sparse probing, arXiv:2502.16681"
    Config = SAEProbesOptions
    config: SAEProbesOptions

    def evaluate(self, dictionaries: Sequence[Dictionary], lm: LanguageModel) -> list[SparseProbeReport]:
        """Return a report for each dictionary.

        Raises:
            ConfigError: sae-probes is not installed or lacks a data set; `datasets` is empty; k is not from 1 to d_sae; the
                dictionaries are of different hooks, name no hook, or belong to a model with other weight processing.
            HookError: the model lacks the hook.
            ShapeError: the dictionary and the hook differ in width.
        """
        judge = _judge()
        saes = [dense_sae(one, self.config.hook).to(lm.device) for one in dictionaries]
        for one in dictionaries:
            lm.check_origin(one.origin.of(one.reads[0].model))
        hook_name = _check(saes, self.config.ks)
        chosen = _known(self.config.datasets, judge.DATASETS)
        for one in dictionaries:  # before anything that takes long
            one.check_input(lm.run(torch.tensor([[0]]), hook_name)[hook_name])
        model = _ProbedModel(lm, prepend_bos=dictionaries[0].origin.prepend_bos is not False)
        probes: list[list[SparseProbe]] = [[] for _ in saes]
        with progress_bar("probe", len(chosen), "data sets") as advance:
            for dataset in chosen:
                with TemporaryDirectory() as folder:
                    task = _Task(judge, dataset, hook_name, model, Path(folder))
                    task.read_texts(self.config.batch_size)
                    of_activation = task.probe_activation()
                    for sae, its_probes in zip(saes, probes, strict=True):
                        its_probes += [*task.probe_latents(sae, self.config.ks), *of_activation]
                advance(1, dataset)
        return [SparseProbeReport(lm.name, hook_name, tuple(its_probes)) for its_probes in probes]


def _judge() -> ModuleType:
    """Import the package sae-probes."""
    try:
        return import_module("sae_probes")
    except ModuleNotFoundError as error:
        raise ConfigError(f"sparse probing needs sae-probes ({error}): pip install 'saelens-lite[saeprobes]'") from None


def _check(saes: Sequence[DenseSAE], ks: Sequence[int]) -> str:
    """Return the hook of all dictionaries. Raise ConfigError if they have no common hook or k is out of range."""
    hooks = {sae.cfg.hook_name for sae in saes}
    if len(hooks) != 1:
        raise ConfigError(
            f"dictionaries that are probed together need one hook; found {', '.join(sorted(hooks)) or 'no dictionary'}"
        )
    most = min(sae.cfg.d_sae for sae in saes)
    if not ks or not all(1 <= k <= most for k in ks):
        raise ConfigError(f"ks = {list(ks)}: expected numbers of latents from 1 to {most}")
    return hooks.pop()


def _known(asked: Sequence[str] | None, known: Sequence[str]) -> list[str]:
    """Return the requested data sets, or all. Raise ConfigError for an unknown name, or if none is named."""
    if asked is not None and not asked:
        raise ConfigError("datasets is empty: name at least one, or leave it out for all")
    for name in asked or ():
        if name not in known:
            raise ConfigError(f"sae-probes has no data set {name!r}{near_matches(name, known)}")
    return list(dict.fromkeys(known if asked is None else asked))


class _Task:
    """One data set of sae-probes, and the folder in which the package keeps its activations."""

    def __init__(self, judge: ModuleType, dataset: str, hook: str, model: "_ProbedModel", folder: Path):
        self.judge, self.dataset, self.hook, self.model = judge, dataset, hook, model
        self.device = str(model.lm.device)
        self.where = {"model_name": "model", "model_cache_path": folder / "activations", "device": self.device}

    def read_texts(self, batch_size: int) -> None:
        """Run the model over the texts and keep the activation at the last token of each."""
        generate = import_module("sae_probes.generate_model_activations").ensure_dataset_activations
        with _into_log():
            generate(
                dataset_short_names=[self.dataset],
                hook_names=[self.hook],
                max_seq_len=min(LONGEST, self.model.lm.n_ctx),
                batch_size=batch_size,
                model=self.model,
                **self.where,
            )

    def probe_activation(self) -> list[SparseProbe]:
        """Return the probe of the whole activation."""
        return self._results(self.judge.run_baseline_evals)

    def probe_latents(self, sae: DenseSAE, ks: Sequence[int]) -> list[SparseProbe]:
        """Return the probes of k latents, for each k."""
        return self._results(self.judge.run_sae_evals, sae=sae, reg_type="l1", ks=list(ks))

    def _results(self, run: Callable[..., Any], **settings: Any) -> list[SparseProbe]:
        """Return the probes that a function of the package fits. Results go to a new folder, because it skips existing ones."""
        with TemporaryDirectory() as results, _into_log():
            run(setting="normal", datasets=[self.dataset], hook_name=self.hook, results_path=results, **settings, **self.where)
            (file,) = Path(results).rglob("*.json")
            results_of_probes = json.loads(file.read_text(encoding="utf-8"))
        return [
            SparseProbe(self.dataset, one.get("k"), one["test_auc"], one["test_acc"], one["test_f1"])
            for one in results_of_probes
        ]


class _ProbedModel:
    """A language model with the interface that sae-probes uses."""

    def __init__(self, lm: LanguageModel, *, prepend_bos: bool):
        self.lm = lm
        self.tokenizer = _Tokenizer(lm, prepend_bos)

    def run_with_cache(self, tokens: Int[Tensor, "batch pos"], names_filter: list[str], **_: Any) -> tuple[None, dict]:
        """Return None and the activations at the hooks."""
        return None, {name: x.float() for name, x in self.lm.run(tokens, names_filter).items()}


class _Tokenizer:
    """A tokenizer with the interface that sae-probes uses: it puts BOS in front and keeps the end of a long text."""

    def __init__(self, lm: LanguageModel, prepend_bos: bool):
        self.tokenizer = lm.text_tokenizer
        self.front = [lm.bos_id] if prepend_bos and lm.bos_id is not None else []

    def __call__(self, text: str | list[str], *, max_length: int | None = None, **_: Any) -> Any:
        from transformers import BatchEncoding

        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        bos = self.front[0] if self.front else None
        ids = after_bos(bos, ids) if isinstance(text, str) else [after_bos(bos, row) for row in ids]
        if isinstance(text, str):
            return BatchEncoding({"input_ids": self.front + ids})
        n = None if max_length is None else max_length - len(self.front)
        rows = [torch.tensor(self.front + (row if n is None else row[-n:])) for row in ids]
        return BatchEncoding(
            {"input_ids": pad_sequence(rows, batch_first=True)}
        )  # attention is causal, so any padding id will do


@contextmanager
def _into_log() -> Iterator[None]:
    """Send the package's output and progress bars to this module's log."""
    said = io.StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(said):
            yield
    finally:
        log.debug("sae-probes: %s", said.getvalue())
