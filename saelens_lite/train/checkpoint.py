"""Checkpoints of a run: everything that training needs to go on as if nothing had happened; safetensors and JSON.

`<run>/checkpoints/<tokens>/` holds state.json and a safetensors file a dictionary. A folder appears when it is whole; the
last two are kept.
"""

import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from saelens_lite.errors import ConfigError, CorruptFileError
from saelens_lite.files import new_folder, read_json, read_tensors, write_json

FORMAT = 1
KEPT = 2
STATE = "state.json"


def save_checkpoint(run: Path, n_tokens: int, states: list[tuple[dict[str, Tensor], dict[str, Any]]], loop: dict[str, Any]) -> None:
    """Write a checkpoint and drop all but the last KEPT."""
    from safetensors.torch import save_file

    folder = run / "checkpoints"
    with new_folder(folder / f"{n_tokens:012d}", "overwrite") as new:
        for i, (tensors, _) in enumerate(states):
            save_file({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, new / f"{i}.safetensors")
        write_json(new / STATE, {"format": FORMAT, **loop, "dictionaries": [numbers for _, numbers in states]})
    for old in _checkpoints(run)[:-KEPT]:
        shutil.rmtree(old)


def _checkpoints(run: Path) -> list[Path]:
    return sorted(path for path in (run / "checkpoints").glob("[0-9]*") if (path / STATE).is_file())


def load_checkpoint(run: Path) -> tuple[list[tuple[dict[str, Tensor], dict[str, Any]]], dict[str, Any]]:
    """The newest checkpoint of a run: the dictionaries' states, and the loop's.

    Raises:
        ConfigError: the run has none: it never began, or it is finished.
        CorruptFileError: it is damaged.
    """
    found = _checkpoints(run)
    if not found:
        raise ConfigError(f"{run} has no checkpoints: there is nothing to resume, or the run is finished")
    loop = read_json(found[-1] / STATE)
    if loop.get("format") != FORMAT:
        raise CorruptFileError(f"{found[-1] / STATE}: format {loop.get('format')!r}, this version reads {FORMAT}")
    try:
        numbers = loop["dictionaries"]
        return [(read_tensors(found[-1] / f"{i}.safetensors"), n) for i, n in enumerate(numbers)], loop
    except (KeyError, TypeError) as error:
        raise CorruptFileError(f"{found[-1] / STATE} is damaged: {error!r}") from None


def remove_checkpoints(run: Path) -> None:
    """Drop the checkpoints of a run that is finished."""
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
