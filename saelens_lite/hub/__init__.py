"""A dictionary folder made ready to be published: its evaluation and its card beside the weights."""

from pathlib import Path
from typing import Any

from saelens_lite.dictionary import Dictionary
from saelens_lite.evaluate import EvalReport
from saelens_lite.files import write_text


def write_card(
    folder: str | Path, dictionary: Dictionary, report: EvalReport | None = None, *, text: str | None = None
) -> Path:
    """The README.md of a dictionary folder, written with eval.json beside it; `text` says what it was evaluated on."""
    from jinja2 import Environment, PackageLoader

    folder = Path(folder)
    origin, rule = dictionary.origin, dictionary.rule
    form = rule.inference_form()
    template = Environment(loader=PackageLoader("saelens_lite", "hub"), autoescape=False).get_template("card.md.j2")
    values: dict[str, Any] = {
        "title": f"{rule.plugin_name} dictionary of {origin.model or 'a model'}, {origin.hook or 'unnamed hook'}",
        "model": origin.model,
        "hook": origin.hook,
        "d_in": dictionary.d_in,
        "d_sae": dictionary.d_sae,
        "rule": rule.plugin_name,
        "options": ", ".join(f"{k} = {v}" for k, v in rule.config.model_dump(exclude_none=True).items()),
        "paper": rule.paper,
        "architecture": form.architecture if form else None,
        "tokens": dictionary.training_record.get("tokens"),
        "report": report,
        "text": text,
        "excluded": ", ".join(map(str, origin.excluded_positions)) or "none",
        "trained_text": origin.text,
    }
    if report is not None:
        report.to_json(folder / "eval.json")
    write_text(folder / "README.md", template.render(values) + "\n")
    return folder / "README.md"
