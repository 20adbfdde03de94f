"""Sparse probing: how well the k most telling latents of a dictionary tell the classes of labelled texts apart.

sae-probes does the work: its 113 two-class data sets, its choice of latents (largest difference between the classes' means over
the training texts), its logistic regressions. A probe reads the activation, or the latents, at the last token of a text.

Source: Kantamneni et al. 2025, arXiv:2502.16681; the setting in which both classes are equally frequent ("normal").
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

CHANCE = 0.5  # area under the curve, and accuracy, of guessing: both classes are equally frequent
LONGEST = 1024  # tokens of a text that are read, its last ones, as far as the model's context goes
log = logging.getLogger(__name__)


class SparseProbe(NamedTuple):
    """What one probe reached on the test texts of a data set; k None: a probe of the whole activation."""

    dataset: str
    k: int | None
    auc: float
    accuracy: float
    f1: float


class SparseProbeReport(NamedTuple):
    """The probes of one dictionary, and beside them those of the activations it reads."""

    model: str
    hook: str
    probes: tuple[SparseProbe, ...]

    def mean_auc(self, k: int | None) -> float:
        """Mean over data sets of the area under the curve of probes of k latents; None: of the whole activation."""
        found = [probe.auc for probe in self.probes if probe.k == k]
        if not found:
            raise ConfigError(f"k = {k}: no such probe; there are {sorted({p.k for p in self.probes if p.k is not None})}")
        return sum(found) / len(found)

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
    """What is probed."""

    datasets: tuple[str, ...] | None = Field(None, description="Names of sae-probes' data sets; default: all 113.")
    ks: tuple[int, ...] = Field((1, 4, 16), description="Numbers of latents that a probe sees.")
    hook: str | None = Field(None, description="Hook of the dictionaries; default: the one that they name.")
    batch_size: int = Field(32, gt=0, description="Texts of a forward pass.")


class SAEProbes(Judge):
    """Probes of the k most telling latents, and of the whole activation, on labelled texts.

    Texts are read with the BOS token in front unless the dictionary was trained without it; of a longer one the last 1024
    tokens, or as many as the model takes. Probes of latents are L1-regularised, those of the activation L2-regularised, as in
    the package's own reports.
    """

    paper = "Kantamneni et al. 2025, Are sparse autoencoders useful? A case study in sparse probing, arXiv:2502.16681"
    Config = SAEProbesOptions
    config: SAEProbesOptions

    def evaluate(self, dictionaries: Sequence[Dictionary], lm: LanguageModel) -> list[SparseProbeReport]:
        """Return a report for each dictionary.

        Raises:
            ConfigError: sae-probes is not installed, has no such data set, none is asked for, k is not from 1 to d_sae;
                dictionaries of different hooks, none that names its hook, or of a model with other processing.
            HookError, ShapeError: a hook the model lacks, or a width that does not fit.
        """
        judge = _judge()
        saes = [dense_sae(one, self.config.hook).to(lm.device) for one in dictionaries]
        for one in dictionaries:
            lm.check_origin(one.origin)
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
                    for sae, found in zip(saes, probes, strict=True):
                        found += [*task.probe_latents(sae, self.config.ks), *of_activation]
                advance(1, dataset)
        return [SparseProbeReport(lm.name, hook_name, tuple(found)) for found in probes]


def _judge() -> ModuleType:
    """The package sae-probes."""
    try:
        return import_module("sae_probes")
    except ModuleNotFoundError as error:
        raise ConfigError(f"sparse probing needs sae-probes ({error}): pip install 'saelens-lite[saeprobes]'") from None


def _check(saes: Sequence[DenseSAE], ks: Sequence[int]) -> str:
    """The hook all dictionaries belong to; ConfigError where there is no such hook, or k is out of range."""
    hooks = {sae.cfg.hook_name for sae in saes}
    if len(hooks) != 1:
        raise ConfigError(f"dictionaries probed together need one hook; found {', '.join(sorted(hooks)) or 'no dictionary'}")
    most = min(sae.cfg.d_sae for sae in saes)
    if not ks or not all(1 <= k <= most for k in ks):
        raise ConfigError(f"ks = {list(ks)}: expected numbers of latents from 1 to {most}")
    return hooks.pop()


def _known(asked: Sequence[str] | None, known: Sequence[str]) -> list[str]:
    """The data sets asked for, or all; ConfigError for a name that is not known, or no name."""
    if asked is not None and not asked:
        raise ConfigError("datasets is empty: name at least one, or leave it out for all")
    for name in asked or ():
        if name not in known:
            raise ConfigError(f"sae-probes has no data set {name!r}{near_matches(name, known)}")
    return list(dict.fromkeys(known if asked is None else asked))


class _Task:
    """One data set of sae-probes, and the folder where the package leaves activations and results."""

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
        """The probe of the whole activation."""
        return self._results(self.judge.run_baseline_evals)

    def probe_latents(self, sae: DenseSAE, ks: Sequence[int]) -> list[SparseProbe]:
        """The probes of k latents, for each k."""
        return self._results(self.judge.run_sae_evals, sae=sae, reg_type="l1", ks=list(ks))

    def _results(self, run: Callable[..., Any], **settings: Any) -> list[SparseProbe]:
        """The probes one of the package's functions fits; results go to a new folder, for it skips what it finds there."""
        with TemporaryDirectory() as results, _into_log():
            run(setting="normal", datasets=[self.dataset], hook_name=self.hook, results_path=results, **settings, **self.where)
            (file,) = Path(results).rglob("*.json")
            found = json.loads(file.read_text(encoding="utf-8"))
        return [SparseProbe(self.dataset, one.get("k"), one["test_auc"], one["test_acc"], one["test_f1"]) for one in found]


class _ProbedModel:
    """A language model as sae-probes calls it."""

    def __init__(self, lm: LanguageModel, *, prepend_bos: bool):
        self.lm = lm
        self.tokenizer = _Tokenizer(lm, prepend_bos)

    def run_with_cache(self, tokens: Int[Tensor, "batch pos"], names_filter: list[str], **_: Any) -> tuple[None, dict]:
        """(None, activations at the hooks)."""
        return None, {name: x.float() for name, x in self.lm.run(tokens, names_filter).items()}


class _Tokenizer:
    """A tokenizer as sae-probes calls it: BOS in front, and of a text that is too long the last tokens."""

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
        return BatchEncoding({"input_ids": pad_sequence(rows, batch_first=True)})  # attention is causal: any id will do


@contextmanager
def _into_log() -> Iterator[None]:
    """What the package prints, and its progress bars, go to this module's log."""
    said = io.StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(said):
            yield
    finally:
        log.debug("sae-probes: %s", said.getvalue())
