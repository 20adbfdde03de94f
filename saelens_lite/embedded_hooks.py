"""The hooks of the embedded model, known without loading it."""

import json
from pathlib import Path

LISTED = Path(__file__).parent / "data" / "tiny" / "hooks.json"  # `model.hook_list.list_hooks("tiny")`


def hooks_of_embedded(model: str) -> dict[str, int | None]:
    """Return the width of each hook of the embedded model, and nothing for other models."""
    return json.loads(LISTED.read_text(encoding="utf-8")) if model == "tiny" else {}
