"""The model card of a dictionary: a README.md with its description, code to load it, its metrics and its limits."""

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from textwrap import indent
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from saelens_lite import registry
from saelens_lite.config import Origin
from saelens_lite.dictionary import Dictionary
from saelens_lite.dictionary.folder import CONFIG_FILE
from saelens_lite.errors import OutputExistsError
from saelens_lite.evaluation import EvalReport
from saelens_lite.files import read_json, write_file
from saelens_lite.hub.label_card import PublishedLabels, labels_text
from saelens_lite.hub.plots import density_plot, log_plot
from saelens_lite.hub_client.client import NAME, Address
from saelens_lite.markdown import cell, code, one_line
from saelens_lite.paths import check_output
from saelens_lite.ports import names

CARD_FILE, EVALUATION_FILE = "README.md", "eval.json"
OWN_LIBRARY, SAE_LENS = "saelens_lite", "saelens"
TAGS = (OWN_LIBRARY, "sparse-autoencoder", "interpretability")
FIGURES = {
    "density.png": "How often the latents fire",
    "training.png": "Error and sparsity in the course of training",
}


def write_card(
    folder: str | Path,
    dictionary: Dictionary,
    report: EvalReport | None = None,
    *,
    text: str | None = None,
    license: str | None = None,
    tags: Sequence[str] = (),
) -> Path:
    """Write README.md, eval.json and figures into a dictionary folder. Return the path of README.md.

    `text` names the evaluation text, in place of the report's own name. Figures need matplotlib. If the folder has labels.json
    and scores.json, which `store.write_labels` and `store.write_scores` write, the card also has the labels' scores.
    """
    folder = check_output(folder)
    card = folder / CARD_FILE
    if card.exists() and OWN_LIBRARY.encode() not in card.read_bytes():
        raise OutputExistsError(f"{card} is not the card of a dictionary; move it, or give the dictionary's own folder")
    if report is not None:
        report = report if text is None else dataclasses.replace(report, text=text)
        report.to_json(folder / EVALUATION_FILE)
    labels = PublishedLabels.read(folder, dictionary)
    for name, content in card_files(folder, dictionary, report, labels=labels, license=license, tags=tags).items():
        write_file(folder / name, lambda path, content=content: path.write_bytes(content))
    return folder / CARD_FILE


def card_files(
    folder: Path,
    dictionary: Dictionary,
    report: EvalReport | None = None,
    *,
    labels: PublishedLabels | None = None,
    license: str | None = None,
    tags: Sequence[str] = (),
) -> dict[str, bytes]:
    """Return the card of a dictionary folder and its figures, by file name. The report defaults to the one in the folder."""
    report = report or stored_report(folder)
    density = dictionary.density if report is None or report.density is None else report.density
    log = folder.resolve().parent / "log.jsonl"  # if the dictionary belongs to a run
    drawn = {"density.png": density_plot(density), "training.png": log_plot(log)}
    figures = {name: png for name, png in drawn.items() if png is not None}
    results = evaluation_results(dictionary.place, report.to_dict()) if report is not None else []
    name = f"{dictionary.rule.plugin_name} {dictionary.place}"
    sae_lens = loads_in_sae_lens(folder)
    data = metadata([dictionary], results, name=name, sae_lens=sae_lens, license=license, tags=tags)
    body = _template("card.md.j2").render(
        **_facts(dictionary),
        load=section("load", load_text(folder, dictionary)),
        evaluation=section("evaluation", evaluation_text(report)),
        labels=section("labels", labels_text(labels)) if labels else "",
        figures=[(name, FIGURES[name]) for name in figures],
    )
    return {CARD_FILE: f"---\n{data.to_yaml()}\n---\n{body}\n".encode(), **figures}


def metadata(
    dictionaries: Sequence[Dictionary],
    results: list[EvalResult],
    *,
    name: str,
    sae_lens: bool,
    license: str | None = None,
    tags: Sequence[str] = (),
) -> ModelCardData:
    """Return the metadata for the Hub: library, models, datasets and evaluation.

    `sae_lens`: true if SAELens can load the dictionary.
    """
    origins = [origin for d in dictionaries for origin in d.origin.of_each.values()]
    kinds = {
        SAE_LENS: sae_lens,
        "transcoder": any(not d.writes_what_it_reads for d in dictionaries),
        "crosscoder": any(d.writes_what_it_reads and len(d.reads) > 1 for d in dictionaries),
    }
    models = _unique(o.model for o in origins if o.model and _is_hub_model(o.model))
    datasets = _unique(dataset for o in origins if (dataset := _dataset(o.text)))
    return ModelCardData(
        library_name=SAE_LENS if sae_lens else OWN_LIBRARY,
        license=license,
        base_model=models or None,
        datasets=datasets or None,
        tags=[*TAGS, *(kind for kind, holds in kinds.items() if holds), *map(one_line, tags)],
        model_name=one_line(name) if results else None,
        eval_results=results or None,
    )


def metric_values(evaluation: dict[str, Any]) -> dict[str, float]:
    """Return the numeric metrics of an eval.json."""
    metrics = evaluation.get("metrics")
    values = {name: m.get("value") for name, m in metrics.items() if isinstance(m, dict)} if isinstance(metrics, dict) else {}
    return {name: value for name, value in values.items() if isinstance(value, int | float) and math.isfinite(value)}


def evaluation_results(name: str, evaluation: dict[str, Any]) -> list[EvalResult]:
    """Return the metrics of an eval.json for the model-index. `name` distinguishes the dictionaries of a repository.

    huggingface_hub merges results by the type of their dataset, not by its name. So the type holds the name.
    """
    text = one_line(evaluation.get("text") or "text without a name")
    return [
        EvalResult(
            task_type="feature-extraction",
            task_name="Sparse dictionary of activations",
            dataset_type=_dataset(text) or re.sub(r"\W+", "-", text.lower()).strip("-") or "text",
            dataset_name=text,
            metric_type=one_line(metric),
            metric_name=f"{one_line(name)}: {one_line(metric)}",
            metric_value=float(f"{value:.6g}"),
        )
        for metric, value in metric_values(evaluation).items()
    ]


def stored_report(folder: Path) -> EvalReport | None:
    """Return the evaluation in a dictionary folder, or None.

    Raises:
        CorruptFileError: eval.json cannot be read.
    """
    return EvalReport.from_json(folder / EVALUATION_FILE) if (folder / EVALUATION_FILE).exists() else None


def evaluation_text(report: EvalReport | None) -> str:
    """Return the metrics of a report as Markdown, with intervals and the evaluation text."""
    if report is None:
        return "## Evaluation\nNone yet."
    notes = [f"It was not trained on this text: {one_line(report.disjoint_why)}."] if report.disjoint else []
    if any("ce_loss_score" in fit for fit in (report.metrics, *report.parts.values())):
        notes.append("`ce_loss_score` is the share of the loss added by zeroing the hook that the reconstruction recovers.")
    if report.by_port:
        notes.append("A line that begins with `at` is of one port, or of all ports of one model: only these are replaced.")
    return "\n\n".join([f"## Evaluation\n{report.to_markdown()}", *notes])


def load_text(folder: Path, dictionary: Dictionary, address: Address | None = None) -> str:
    """Return Markdown with the code that loads a dictionary, from its folder or from its address on the Hub."""
    several = bool(dictionary.origin.models)
    return _template("load.md.j2").render(
        address=address,
        load_model=_load_models_call(dictionary.origin) if all(port.hook for port in dictionary.reads) else None,
        several=several,
        hooks=[port.key if several else port.hook for port in dictionary.reads],
        d_in=dictionary.d_in,
        d_out=dictionary.d_out,
        target=_target(dictionary),
        architecture=_architecture(folder),
        sae_lens=loads_in_sae_lens(folder),
    )


def loads_in_sae_lens(folder: Path) -> bool:
    """Return whether SAELens knows the architecture of a dictionary folder."""
    return _architecture(folder) in registry.load(SAE_LENS, "formats").architectures


def _architecture(folder: Path) -> str:
    return str(read_json(folder / CONFIG_FILE).get("architecture"))


def _load_models_call(origin: Origin) -> str | None:
    """Return the code that loads the dictionary's models, or None if a name means nothing on another machine."""
    calls = {name: _load_model_call(one) for name, one in origin.of_each.items()}
    if None in calls.values():
        return None
    if None in calls:
        return calls[None]
    inside = "".join(f"{_literal(str(name))}: {call},\n" for name, call in calls.items())
    return f"sl.Models({{\n{indent(inside, '    ')}}})"


def _load_model_call(origin: Origin) -> str | None:
    """Return the line of code that loads a model, or None if its name means nothing on another machine."""
    if not origin.model or not (origin.model == "tiny" or _is_hub_model(origin.model)):
        return None
    options = {"revision": _literal(origin.revision)} if origin.revision else {}
    options |= dict.fromkeys(origin.processing, "True")
    arguments = [_literal(origin.model), *(f"{key}={value}" for key, value in options.items())]
    inside = "".join(f"\n    {argument}," for argument in arguments) + "\n" if options else arguments[0]
    return f"sl.load_model({inside})"


def _literal(text: str) -> str:
    """Return a string as a Python literal in which every character is visible and none is code."""
    return json.dumps(text) if text.isascii() and text.isprintable() else repr(text)


def _target(dictionary: Dictionary) -> str | None:
    """Return the predicted hooks in words, or None if they equal the hooks that are read."""
    return None if dictionary.writes_what_it_reads else names(dictionary.writes)


def section(name: str, text: str) -> str:
    """Return a section of a card between marks that Markdown hides. A push rewrites it."""
    return f"<!-- saelens_lite: {name} -->\n{text.strip()}\n<!-- /saelens_lite: {name} -->"


def find_section(card: str, name: str) -> re.Match[str] | None:
    """Find a section of a card by name."""
    return re.search(rf"<!-- saelens_lite: {name} -->\r?\n(.*?)\r?\n<!-- /saelens_lite: {name} -->", card, re.DOTALL)


def with_section(card: str, name: str, text: str) -> str:
    """Replace a section of a card. Return a card without that section unchanged."""
    match = find_section(card, name)
    return card if match is None else card[: match.start()] + section(name, text) + card[match.end() :]


def with_labels(card: str, text: str) -> str:
    """Replace the section about labels, or add it behind the evaluation. A card without either stays unchanged."""
    evaluation = find_section(card, "evaluation")
    if find_section(card, "labels") or not text or evaluation is None:
        return with_section(card, "labels", text)
    return f"{card[: evaluation.end()]}\n\n{section('labels', text)}{card[evaluation.end() :]}"


def _facts(dictionary: Dictionary) -> dict[str, Any]:
    """Return the facts about a dictionary that the template needs."""
    origin, rule = dictionary.origin, dictionary.rule
    config = dictionary.training_record.get("config")
    config = config if isinstance(config, dict) else {}
    settings = {key: value for key, value in config.items() if value not in (None, {}, []) and value is not False}
    each = origin.of_each
    at = _listed_by_model({name: code(one.revision) for name, one in each.items() if one.revision})
    return {
        "title": _title(dictionary),
        "models": _listed_by_model({name: code(one.model or "a model without a name") for name, one in each.items()}),
        "belongs": ("these models" if origin.models else "this model") + (f" at commit {at}" if at else ""),
        "n_ports": len({*dictionary.reads, *dictionary.writes}),
        "hook": names(dictionary.reads),
        "target": _target(dictionary),
        "skip": dictionary.W_skip is not None,
        "d_in": dictionary.d_in,
        "d_out": dictionary.d_out,
        "d_sae": dictionary.d_sae,
        "rule": rule.plugin_name,
        "options": _listed(rule.config.model_dump(exclude_none=True)),
        "paper": rule.paper,
        "tokens": dictionary.training_record.get("tokens"),
        "settings": {key: _listed(value) if isinstance(value, dict) else value for key, value in settings.items()},
        "processing": _listed_by_model({name: ", ".join(one.processing) for name, one in each.items() if one.processing}),
        "precision": _listed_by_model({name: one.precision for name, one in each.items() if one.precision}),
        "excluded": ", ".join(map(str, origin.excluded_positions)) or "none",
        "trained_text": origin.text,
    }


def _listed_by_model(values: dict[str | None, str]) -> str:
    """Return the value of the only model, or "value (name) and value (name)" of several."""
    return " and ".join(value if name is None else f"{value} ({one_line(name)})" for name, value in values.items())


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} = {value}" for key, value in values.items())


def _title(dictionary: Dictionary) -> str:
    kind = "dictionary" if dictionary.writes_what_it_reads else "transcoder"
    models = " and ".join(one.model or "a model" for one in dictionary.origin.of_each.values())
    return one_line(f"{dictionary.rule.plugin_name} {kind} of {models}, {dictionary.place}")


def _template(name: str) -> Any:
    """Return a template of this package. Its filters escape text from users, so that the text breaks no table or line."""
    environment = Environment(loader=PackageLoader("saelens_lite", "hub"), autoescape=False, undefined=StrictUndefined)
    environment.filters.update(cell=cell, line=one_line, code=code)
    return environment.get_template(name)


def _unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def _is_hub_model(model: str) -> bool:
    """Return whether a model's name can be an id on the Hub, not the embedded model or a local folder."""
    return bool(re.fullmatch(rf"{NAME}(/{NAME})?", model)) and model not in ("tiny", "random") and not Path(model).exists()


def _dataset(text: str | None) -> str | None:
    """Return the Hub id of the dataset in a text name hf:org/name:config:split."""
    match = re.match(rf"hf:({NAME}(?:/{NAME})?)", text or "")
    return match[1] if match else None
