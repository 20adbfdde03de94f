"""Checkpoints of a run: everything that training needs to go on as if nothing had happened; safetensors and JSON.

`<run>/checkpoints/<tokens>/` holds state.json and a safetensors file a dictionary. A folder appears when it is whole; the
last two are kept.
"""

import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from saelens_lite.config import TrainConfig
from saelens_lite.errors import ConfigError, CorruptFileError
from saelens_lite.files import new_folder, read_json, read_tensors, write_json

FORMAT = 1
KEPT = 2
STATE = "state.json"


State = tuple[dict[str, Tensor], dict[str, Any]]  # of one dictionary: tensors and plain data


def save_checkpoint(run: Path, n_tokens: int, states: list[State], loop: dict[str, Any]) -> None:
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


def read_loop(run: Path) -> tuple[Path, dict[str, Any]]:
    """The folder of a run's newest checkpoint, and the loop's state in it.

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
    missing = {"configs", "request", "loggers", "histories", "n_batches", "dictionaries"} - loop.keys()
    if missing:
        raise CorruptFileError(f"{found[-1] / STATE} is damaged: {', '.join(sorted(missing))} missing")
    return found[-1], loop


def load_checkpoint(run: Path) -> tuple[list[State], dict[str, Any]]:
    """The newest checkpoint of a run: the dictionaries' states, and the loop's. Raises what `read_loop` does."""
    folder, loop = read_loop(run)
    return [(read_tensors(folder / f"{i}.safetensors"), numbers) for i, numbers in enumerate(loop["dictionaries"])], loop


def configs_of(run: Path) -> list[TrainConfig]:
    """The settings of the dictionaries of an interrupted run. Raises what `read_loop` does."""
    return [TrainConfig(**config) for config in read_loop(run)[1]["configs"]]


def remove_checkpoints(run: Path) -> None:
    """Drop the checkpoints of a run that is finished."""
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
