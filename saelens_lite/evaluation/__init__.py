"""Evaluate: measure how sparse a dictionary is, how well it reconstructs, and what its reconstruction costs the model.

```python
report = sl.evaluate(d, lm, "python-docs:held-out", n_tokens=20_000)
print(report)  # every number with its 95 % interval
report = sl.evaluate(d, lm, "python-docs:held-out", n_tokens=20_000, controls=True, by_frequency=True)
```

```sh
saelens-lite eval runs/topk/dictionary
```

The numbers to look at first:

- `l0`: the mean number of latents that fire on a token.
- `fvu`, the fraction of variance unexplained: Σ‖x − x̂‖² / Σ‖x − mean‖², pooled over all tokens. 0 is perfect; predicting the
  mean scores exactly 1.
- `ce_loss_score`, the share of the model's loss that the reconstruction recovers: 1 if the model predicts as well from it as
  from the activation itself, 0 if it predicts as badly as from zeros. `ce_loss_score_mean` uses the mean activation in place of
  zeros, and `kl_div_score` uses KL in place of the loss.

Intervals are 95 %, bootstrapped over documents, because the tokens of one text are not independent. If the text has fewer
than about five documents, sequences are drawn in their place, and intervals may be too narrow; the report says so. Values agree
with SAELens's `run_evals` on the same tokens, except `explained_variance_legacy`: ours uses the mean of all tokens that count,
theirs the mean of a batch.

**Several dictionaries.** Differences are noisy too. Below the rows of a table is the noise floor of each metric: differences
below it may be chance, and those from the first row that exceed it are marked ≠. Rows on one text share its noise, so floors
are much smaller than the intervals. Dictionaries that differ only in their seeds are seeds of one recipe: then recipes are
compared, and floors include the spread over seeds. With one seed of each recipe, the table says that it does not.
saelens_lite.evaluation.floors has the method.

```python
from saelens_lite.evaluation import noise_floors

recipes = {f"k={k}, seed {seed}": sl.fit(x, d_sae=256, k=k, seed=seed, n_tokens=20_000) for k in (4, 8) for seed in range(3)}
reports = dict(zip(recipes, sl.evaluate(list(recipes.values()), x), strict=True))
print(noise_floors(reports))
```

**Without a model.** Activations of your own, x [n d_in], need no text. `sl.evaluate(d, (x, y))` measures a transcoder.
Intervals are over rows. If rows belong together, such as several pictures of one person, give `groups`, a label for each row.

```python
own = sl.fit(x, d_sae=4096, k=8, n_tokens=1_000_000)
print(sl.evaluate(own, x, controls=True))
```

`controls=True` adds the same numbers for a random dictionary, for PCA, for the dictionary with 10 % of its decoder rows in
other places, and for the dictionary on a model with shuffled weights: the entries of each weight tensor change places. Metrics
that cannot tell a control from the dictionary are marked ≈. A report also says whether its text differs from the training text,
as far as names and hashes can tell. `by_frequency` and `by_position` split the errors by token frequency and by position in a
row.

**Several ports.** The report of a dictionary of several hooks or models has `by_port`: the fvu of each port, and the losses
with that port alone replaced. If these belong to several models, `by_model` has them for all ports of each, and `metrics` has
no losses. The fvu of all ports is that of the concatenated activations, in which ports with large norms count most.
A dictionary of the difference chat − base is spliced into chat: y_chat = x_base + x̂. So zeros give chat the activation of base.
Without a model, give activations by port: `sl.evaluate(d, {"base:blocks.1.hook_resid_pre": x, …})`.

```python
models = {"base": lm, "chat": sl.load_model("tiny")}  # two models that read the same token ids
ports = [sl.Port(hook="blocks.1.hook_resid_pre", width=192, model=name) for name in models]
crosscoder = sl.Dictionary.create("batch_topk", reads=ports, d_sae=256)
report = sl.evaluate(crosscoder, models, "python-docs:held-out", n_tokens=2_000)
report.by_port["chat:blocks.1.hook_resid_pre"]["fvu"].value, report.by_model["chat"]["ce_loss_score"].value
```

**The right tensor.** A dictionary of another tool may name a hook that is close to the one it was trained on: before a norm
in place of after it, or with another scale. `check_hook` measures it at its hook and at such neighbours, and warns if another
place fits clearly better. `evaluate` makes a short form of this check for dictionaries of other tools.

```python
print(sl.check_hook(d, lm, "python-docs:held-out"))
```

**Probes.** `sl.probe(d, lm, texts, labels)` compares the best 1, 4 and 16 latents with all latents and with the raw
activations. Each penalty is chosen by cross-validation, and each probe has a control with shuffled labels.

**Two seeds.** `sl.compare(a, b)` matches latents one to one and counts those whose decoder and encoder cosines both exceed 0.7,
beside the same count for random directions. `sl.stability(d, others)` gives a score for each latent. `compare` and `probe`
need `pip install 'saelens-lite[analysis]'`.

**Several processes.** `torchrun --nproc-per-node 4 evaluate.py` shares the batches of the text, or of the activations, among
four processes. Each of them gets the whole report, which is the same, to the last digit, for any number of processes with the
same number of threads. Memory does not grow with the text: its tokens are held in a temporary file (in `$TMPDIR`, 4 bytes a
token).

metrics.py has the definitions, measure.py the pass over the text, splices.py the models and the ports that are replaced in
them, held.py the batches, sums.py the sums and their bootstrap weights, controls.py the controls, placement.py the check of the
hook, report.py the result.
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from saelens_lite.arrays import ArrayLike, described
from saelens_lite.config import TextConfig
from saelens_lite.devices import on_device
from saelens_lite.dictionary import Dictionary
from saelens_lite.errors import ConfigError, SaelensLiteError, TextError
from saelens_lite.evaluation import metrics
from saelens_lite.evaluation.bands import frequency_markdown, frequency_table, position_table
from saelens_lite.evaluation.comparison import NoiseFloors, noise_floors
from saelens_lite.evaluation.controls import PERMUTED, REDRAWN, further_controls, moments, permuted_dictionary, untrained
from saelens_lite.evaluation.frequency import FrequencyBand, frequency_bands
from saelens_lite.evaluation.held import Held, held_batches
from saelens_lite.evaluation.measure import Grouping, kept_activations, mean_activation, measure
from saelens_lite.evaluation.overlap import overlap
from saelens_lite.evaluation.placement import SHORT, HookCheck, HookFit, check_hook, check_rows, first_rows
from saelens_lite.evaluation.positions import PositionBand, bands_of_positions
from saelens_lite.evaluation.replicates import Recipe, recipe_of, weights_id
from saelens_lite.evaluation.report import EvalReport, markdown, table
from saelens_lite.evaluation.rows import evaluate_rows, identity
from saelens_lite.evaluation.splices import SplicedModels, check_models, each_model
from saelens_lite.evaluation.sums import Metric, PooledSums, run_in_rounds
from saelens_lite.evaluation.text_rows import as_trained, row_blocks
from saelens_lite.model import AnyModel, LanguageModel, Models, as_model
from saelens_lite.model.passes import default_batch_tokens
from saelens_lite.ports import Hooks
from saelens_lite.processes import ALONE, Team, check_same, team
from saelens_lite.tokens import Text, TokenRows, source_name, with_mask

__all__ = [
    "EvalReport",
    "FrequencyBand",
    "HookCheck",
    "HookFit",
    "Metric",
    "NoiseFloors",
    "PositionBand",
    "Recipe",
    "check_hook",
    "evaluate",
    "frequency_markdown",
    "frequency_table",
    "markdown",
    "noise_floors",
    "position_table",
    "table",
]

log = logging.getLogger(__name__)


N_TOKENS = 100_000


@overload
def evaluate(
    dictionary: Dictionary, lm: AnyModel | ArrayLike, text: Text | TokenRows | None = None, **settings: Any
) -> EvalReport: ...
@overload
def evaluate(
    dictionary: Sequence[Dictionary], lm: AnyModel | ArrayLike, text: Text | TokenRows | None = None, **settings: Any
) -> list[EvalReport]: ...
@torch.no_grad()
def evaluate(
    dictionary: Dictionary | Sequence[Dictionary],
    lm: AnyModel | ArrayLike,
    text: Text | TokenRows | None = None,
    *,
    target: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    hook: str | None = None,
    n_tokens: int | None = N_TOKENS,
    text_config: TextConfig | None = None,
    attention_mask: Any = None,
    by_frequency: bool = False,
    by_position: bool = False,
    controls: bool | Mapping[str, Dictionary] = False,
    text_name: str | None = None,
    batch_tokens: int | None = None,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> EvalReport | list[EvalReport]:
    """Return the report of a dictionary; for several dictionaries of the same hooks, a list of reports from one pass.

    The model runs on the text unchanged, with zeros at the hook, with the mean activation at the hook, and with the
    reconstruction at the positions that count. The hook is the one that the dictionary writes. Several hooks are replaced
    together, and each alone; those of several models together in each model. Special tokens, padding and positions that were
    left out of training, such as position 0, do not count and keep their activation.

    Dictionaries on another device are copied to the model's; your own stay where they are.

    The report says whether the text differs from the training text, as far as names and hashes tell. If it may be the same, a
    warning is logged.

    With activations x [n d_in] in place of the model and the text, the report has the metrics that need no model. Intervals are
    then bootstrapped over rows, or over `groups` of rows that are not independent of each other.

    All processes of a job share the work, and each returns the whole report. They must call this with the same arguments. They
    meet after every 64 batches of each, which must take less than SAELENS_LITE_TIMEOUT.

    Args:
        lm: the model; models by name, such as {"base": lm, "chat": lm2}; or activations: a tensor, a numpy array, a DataFrame
            or a list of rows; (x, y) for a transcoder; or any of these by port key, {"base:blocks.3.hook_resid_pre": x, …}.
        target: for activations, those that a transcoder should return.
        groups: for activations, a label for each row, such as the number of its text or its subject.
        text: a text source, token rows, or token ids in any form that `LanguageModel.to_tokens` takes.
        hook: the hook to read in place of the dictionary's own.
        n_tokens: number of tokens that count; None for the whole text.
        text_config: settings of the token rows. By default each document is cut into rows as in training, or, if the
            dictionary does not record their length, into rows as long as the model's context but at most 1,024 tokens. Set
            it if the training text was packed or had a `min_context`, which dictionaries do not record.
        attention_mask: the mask of token ids.
        by_frequency: adds the fvu of tokens that occur 1 to 9, 10 to 99, … times among those that count.
        by_position: adds the fvu and the loss at positions 1, 2 to 3, 4 to 7, ….
        controls: adds the same metrics for a random dictionary of the same size and L0, for PCA with L0 components fitted on
            this text, for the dictionary with 10 % of its decoder rows permuted, and, with a model, for the dictionary on the
            model with its weights shuffled. Dictionaries by name, such as {"oracle": d}, are further controls beside these.
        text_name: the name of the text or the activations in the report.
        batch_tokens: tokens in a batch. It bounds the memory and changes no number. Default: 2,048 on a CPU and 16,384 on a
            GPU, fewer for large vocabularies. A longer row is a batch by itself; if it has more than 2^29 logits, the model
            runs on it several times.

    Raises:
        ConfigError: the dictionaries have different or unknown hooks, are of a model with other processing, or were trained
            on rows of different kinds and `text_config` does not choose one; several models are written and by_position is
            set; a model or the activations at a port are missing; or a setting is bad.
        HookError: the model lacks a hook; or the dictionary reads one hook and writes another that comes before it.
        ShapeError: a dictionary does not fit the width of its hook or of x, or x is not an array of numbers with two rows.
        TextError: there is no text.
        NonFiniteError: the activations or a dictionary hold NaN or infinity, or all rows of x are the same.
        DiskFullError: the tokens of the text do not fit into the folder for temporary files.
    """
    several = not isinstance(dictionary, Dictionary)
    dictionaries = list(dictionary) if several else [dictionary]
    further = further_controls(controls)
    if batch_tokens is not None and batch_tokens < 1:
        raise ConfigError(f"batch_tokens = {batch_tokens}; expected at least 1")
    if n_bootstrap < 0:
        raise ConfigError(f"n_bootstrap = {n_bootstrap}; expected 0 or more")
    if isinstance(lm, Mapping) and all(isinstance(one, LanguageModel) for one in lm.values()):
        lm = as_model(lm)
    if not isinstance(lm, AnyModel):
        of_text = {
            "hook": hook, "text_config": text_config, "attention_mask": attention_mask, "by_frequency": by_frequency or None,
            "by_position": by_position or None, "n_tokens": None if n_tokens == N_TOKENS else n_tokens,
        }  # fmt: skip
        _refuse_text(lm, text, [name for name, value in of_text.items() if value is not None])
        reports = evaluate_rows(
            dictionaries,
            lm,
            target,
            groups,
            controls=bool(controls),
            further=further,
            name=text_name,
            batch_rows=batch_tokens,
            n_bootstrap=n_bootstrap,
            seed=seed,
        )
        return reports if several else reports[0]
    if text is None or target is not None or groups is not None:
        raise ConfigError(
            "evaluate(d, lm, text) needs a text; target and groups belong to evaluate(d, x), which takes activations"
        )
    hooks = _common_hooks(dictionaries, lm, hook)
    if further:
        _common_hooks([dictionaries[0], *further.values()], lm, hook)
    for one in [*dictionaries, *further.values()]:
        lm.check_origin(one.origin)
        lm.warn_of_precision(one.origin)
        one.check_finite()
    dictionaries = [on_device(one, lm.device) for one in dictionaries]
    further = {name: on_device(one, lm.device) for name, one in further.items()}
    check_models(lm, hooks, by_position)
    batch_tokens = default_batch_tokens(lm, with_logits=True) if batch_tokens is None else batch_tokens
    text = with_mask(text, attention_mask)
    config = None if isinstance(text, TokenRows) else as_trained(dictionaries, lm, text, text_config or TextConfig())
    workers = ALONE if lm.is_shared else team()
    same: dict[str, Any] = {"text_config": None if config is None else config.model_dump(mode="json")}
    if workers.world > 1:
        same |= {"weights": lm.fingerprint(), "models": [[m.name, m.revision, m.precision] for m in each_model(lm).values()]}
        same |= {"dictionaries": [identity(one) for one in [*dictionaries, *further.values()]]}
    check_same(same, device=lm.device)
    with held_batches(lm, row_blocks(lm, text, n_tokens, config), batch_tokens, workers) as batches:
        if not batches.n_kept:
            raise TextError("there is no text to evaluate on: none of the positions of the token rows counts")
        job = _Plan(
            held=batches,
            team=workers,
            hooks=hooks,
            text=text_name or source_name(text, text_config),
            excluded=_excluded_by_mask(batches) if config is None else _excluded(config),
            batch_tokens=batch_tokens,
            n_bootstrap=n_bootstrap,
            seed=seed,
        )
        workers.agree(
            {"text": batches.sha256, "batch_tokens": batch_tokens, "n_bootstrap": n_bootstrap, "seed": seed,
             "bands": (by_frequency, by_position), "controls": bool(controls)},
            "evaluations",
        )  # fmt: skip
        _check_hooks(job, dictionaries, lm, hook)
        mean = mean_activation(lm, batches, hooks.writes, workers)
        reports = _reports(job, dictionaries, lm, mean, by_frequency, by_position)
        for caution in dict.fromkeys(report.caution for report in reports if report.caution):
            log.warning("%s", caution)
        if controls:
            reports = _with_controls(job, dictionaries, lm, mean, reports, further)
    return reports if several else reports[0]


def _refuse_text(x: Any, text: Any, given: Sequence[str]) -> None:
    """Raise ConfigError if the evaluation of activations was asked with a text, or with settings that only a text has."""
    if text is not None:
        raise ConfigError(
            f"the second argument is {described(x)}; for a text it must be a LanguageModel: evaluate(d, load_model(…), text). "
            "Activations take no text: evaluate(d, x)"
        )
    if given:
        raise ConfigError(f"{', '.join(given)} belong to the evaluation on a text; leave them out with activations")


class _Plan(NamedTuple):
    """The text and the settings that an evaluation shares with its controls, and the processes that work on it."""

    held: Held
    team: Team
    hooks: Hooks
    text: str | None
    excluded: str
    batch_tokens: int
    n_bootstrap: int
    seed: int


def _check_hooks(job: _Plan, dictionaries: Sequence[Dictionary], lm: AnyModel, hook: str | None) -> None:
    """Log a warning for each dictionary of another tool that fits clearly better at another place; see `check_hook`."""
    foreign = [d for d in dictionaries if "read_from" in d.training_record and len(d.reads) == len(d.writes) == 1]
    if not foreign or not job.team.is_first or isinstance(lm, Models):
        return
    rows = list(first_rows((batch.rows for batch in job.held), SHORT))
    for dictionary in foreign:
        try:
            warning = check_rows(dictionary, lm, rows, hook).warning
        except (SaelensLiteError, RuntimeError) as error:  # such as too little memory; the evaluation itself may succeed
            log.info("the hook of the dictionary was not compared with others: %s", error)
            continue
        if warning:
            log.warning("%s", warning)


def _reports(
    job: _Plan,
    dictionaries: Sequence[Dictionary],
    lm: AnyModel,
    mean: Tensor,
    by_frequency: bool = False,
    by_position: bool = False,
) -> list[EvalReport]:
    """Run the pass over the text, and return a report for each dictionary. mean: the mean activation at the written hooks."""
    held = job.held
    frequencies = frequency_bands(held.per_token) if by_frequency else None
    positions = bands_of_positions(held.per_position) if by_position else None
    groupings = [Grouping("frequency", frequencies.of, len(frequencies.exponent))] if frequencies else []
    groupings += [Grouping("position", positions.of, len(positions.low))] if positions else []
    sums = PooledSums(job.n_bootstrap, job.seed, held.units.n_effective)
    with job.team.failing_together():
        models = SplicedModels(lm, job.hooks, held.probe)
    steps = measure(dictionaries, models, held, sums=sums, mean=mean, groupings=groupings, batch_tokens=job.batch_tokens)
    run_in_rounds(steps, job.team)
    sums.pool(job.team)
    weights = weights_id(job.seed, held.n_rows, held.sha256, held.units.name, held.units_sha256)
    reports = []
    for i, dictionary in enumerate(dictionaries):
        name = str(i)
        shared = overlap(dictionary.origin, job.text, held.sha256)
        losses = metrics.prediction_metrics(sums, name) if len(models.of_model) == 1 else {}
        by_port, by_model = models.metrics(sums, name)
        reports.append(
            EvalReport(
                metrics=metrics.reconstruction_metrics(sums, name) | metrics.latent_metrics(sums, name) | losses,
                n_tokens=held.n_kept,
                n_sequences=held.n_rows,
                text=job.text,
                text_sha256=held.sha256,
                disjoint=shared.disjoint,
                disjoint_why=shared.why,
                model=lm.name,
                hook=" + ".join(job.hooks.writes),
                read_hook=" + ".join(job.hooks.reads),
                excluded=job.excluded,
                density=metrics.density(sums, name),
                by_frequency=tuple(frequencies.report(metrics.band_fvu(sums, "frequency", name))) if frequencies else None,
                by_position=tuple(
                    positions.report(metrics.band_fvu(sums, "position", name), metrics.band_ce(sums, "position", name))
                )
                if positions
                else None,
                by_port=by_port,
                by_model=by_model,
                replicates=metrics.kept_replicates(sums, name, weights, held.units, with_losses=bool(losses)),
                recipe=recipe_of(dictionary),
            )
        )
    return reports


def _with_controls(
    job: _Plan,
    dictionaries: Sequence[Dictionary],
    lm: AnyModel,
    mean: Tensor,
    reports: Sequence[EvalReport],
    further: Mapping[str, Dictionary],
) -> list[EvalReport]:
    """Return the reports together with those of their controls.

    Untrained controls write the hooks that they read. The others read those of the dictionaries: if they are the same, one pass
    serves all.
    """
    sizes = [report["l0"] for report in reports]
    read = partial(kept_activations, lm, job.held, job.hooks.writes)
    stats = moments(read("covariance"), mean.device, job.team)
    with job.team.failing_together():
        some = next(iter(read("random"))).cpu() if job.team.is_first else None
    others = untrained(stats, job.team.tell(some).to(lm.device), dictionaries, sizes)
    plain = [control for controls in others for control in controls.values()]
    altered = [
        permuted_dictionary(d, report.density, job.seed) for d, report in zip(dictionaries, reports, strict=True)
    ] + list(further.values())
    if job.hooks.reads == job.hooks.writes:
        measured = _reports(job, plain + altered, lm, mean)
    else:
        there = job._replace(hooks=Hooks(job.hooks.writes, job.hooks.writes))
        measured = _reports(there, plain, lm, mean) + _reports(job, altered, lm, mean)
    of_plain, of_altered = iter(measured[: len(plain)]), measured[len(plain) :]
    of_further = dict(zip(further, of_altered[len(dictionaries) :], strict=True))
    with ExitStack() as stack:
        with job.team.failing_together():
            untrained_lm = stack.enter_context(lm.redrawn(job.seed))
        its_mean = mean_activation(untrained_lm, job.held, job.hooks.writes, job.team)
        redrawn = _reports(job, dictionaries, untrained_lm, its_mean)
    return [
        replace(
            report,
            controls={name: next(of_plain) for name in controls} | {PERMUTED: permuted} | of_further | {REDRAWN: on_redrawn},
        )
        for report, controls, permuted, on_redrawn in zip(reports, others, of_altered, redrawn, strict=False)
    ]


def _excluded(config: TextConfig) -> str:
    """Describe the positions that do not count."""
    positions = config.exclude_positions
    several = f" and position{'s' * (len(positions) > 1)} {', '.join(map(str, positions))}"
    special = f"BOS, token ids {', '.join(map(str, ids))}" if (ids := config.exclude_token_ids) else "BOS"
    special += ", chat template" if config.exclude_template else ""
    return f"{special}, padding{several}" if positions else f"{special} and padding"


def _excluded_by_mask(rows: Held) -> str:
    """Describe the positions that do not count in rows that came with a mask."""
    first = "not always position 0" if rows.per_position[0] else "position 0 always"
    return f"positions that the mask of the rows leaves out ({first})"


def _common_hooks(dictionaries: list[Dictionary], lm: AnyModel, hook: str | None) -> Hooks:
    """Return the hooks that all the dictionaries read and write. `hook` is read in place of their own.

    Raises:
        ConfigError: there is no dictionary, or their hooks differ.
    """
    hooks = list(dict.fromkeys(lm.hooks_of(d, hook) for d in dictionaries))
    if len(hooks) != 1:
        named = sorted(d.place for d in dictionaries)
        raise ConfigError(
            f"dictionaries evaluated together need the same hooks; found {', '.join(dict.fromkeys(named)) or 'no dictionary'}; "
            "give hook="
        )
    return hooks[0]
