"""The command that lists the hooks of a model."""

import json
import re
from typing import TYPE_CHECKING

from saelens_lite.cli import checks
from saelens_lite.cli.base import app, console, say
from saelens_lite.cli.options import PrintJson
from saelens_lite.embedded_hooks import hooks_of_embedded
from saelens_lite.errors import HookError
from saelens_lite.tables import grid

if TYPE_CHECKING:
    from rich.table import Table

BLOCK = re.compile(r"(?<=^blocks\.)(\d+)(?=\.)")


@app.command
def hooks(model: str = "tiny", *, layer: int | None = None, revision: str | None = None, as_json: PrintJson = False) -> None:
    """List the hooks of a model and their widths. No weights are loaded.

    Parameters
    ----------
    model
        "tiny", a Hugging Face Hub id, or a folder.
    layer
        Show the hooks of one block alone.
    revision
        Commit, branch or tag of the model on the Hub.
    """
    checks.model_has(model, [])
    if not (known := hooks_of_embedded(model)):
        from saelens_lite.model.hook_list import list_hooks

        known = list_hooks(model, revision)
    n_blocks = 1 + max((int(block[0]) for name in known if (block := BLOCK.search(name))), default=-1)
    if layer is not None:
        known = {name: width for name, width in known.items() if name.startswith(f"blocks.{layer}.")}
        if not known:
            raise HookError(f"{model} has no block {layer}; its blocks are 0 to {n_blocks - 1}")
    if as_json:
        say(json.dumps(known, indent=2))
    else:
        console().print(_table(model, known, n_blocks, together=layer is None))


def _table(model: str, known: dict[str, int | None], n_blocks: int, together: bool) -> "Table":
    """Return a table of hooks; `together` shows the same hook of all blocks in one row."""
    rows: dict[str, set[int | None]] = {}
    some_known = any(known.values())
    for name, width in known.items():
        if width is None and some_known:  # it holds token ids
            continue
        rows.setdefault(BLOCK.sub("N", name) if together else name, set()).add(width)
    return grid(
        ("hook", "width"),
        [(name, ", ".join("?" if w is None else str(w) for w in sorted(widths, key=str))) for name, widths in rows.items()],
        title=f"{model}: {len(known)} hooks" + (f"; N is 0 to {n_blocks - 1}" if together and n_blocks else ""),
        column=lambda title: {"justify": "right"} if title == "width" else {},
    )
