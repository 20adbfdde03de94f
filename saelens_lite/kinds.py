"""The kinds of output folders, and the files that each may hold.

A folder is replaced or removed only if it holds the files that mark its kind and no foreign files; `foreign` lists those.
Locks, files of the operating system and our own temporary names do not count.
"""

import os
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

TEMPORARY = re.compile(r"\.(.+)\.saelens-lite-[0-9a-f]{16}\.(tmp|old)", re.DOTALL)  # of NAME, see `outputs.temporary`
LOCK = re.compile(r"\.(.+)\.saelens-lite\.lock", re.DOTALL)
OF_THE_SYSTEM = {".DS_Store", "Thumbs.db", "desktop.ini"}
MAX_SETTINGS_BYTES = 1 << 20
RUN_MARK = r"config\.toml"


@dataclass(frozen=True)
class Kind:
    """A kind of folder: its name in messages, regular expressions for its files, and those for the files that mark it.

    Paths are relative to the folder, with slashes. Each expression in `marks` must match a file.
    """

    name: str
    files: tuple[str, ...]
    marks: tuple[str, ...]

    def allowing(self, *files: str) -> "Kind":
        """Return the kind with more allowed files, given as regular expressions."""
        return replace(self, files=(*self.files, *files))

    def like(self, folder: Path) -> "Kind":
        """Return the kind that also accepts folders whose file names all occur in `folder`."""
        names = [re.escape(name) for name in _names(folder) if name not in ("README.md", "eval.json")]
        return replace(self.allowing(*names), marks=("|".join([*self.marks, *names]),))

    def below(self, folder: str) -> tuple[str, ...]:
        """Return expressions for the files of such a folder inside another. `folder` is also an expression."""
        return tuple(f"{folder}/{file}" for file in self.files)


DICTIONARY = Kind(
    "dictionary",
    (
        *(r"cfg\.json", r"sae_weights\.safetensors", r"plugin\.safetensors", r"sparsity\.safetensors"),
        *(r"eval\.json", r"README\.md", r"density\.png", r"training\.png", r"stability\.safetensors"),
    ),
    (r"cfg\.json",),
)
CHECKPOINT = Kind(
    "checkpoint", (r"state\.json", r"checksums\.json", r"\d+(-\d+)?\.safetensors", r"\d+\.jsonl"), (r"checksums\.json",)
)
CHECKPOINTS = Kind(
    "folder of checkpoints",
    (*CHECKPOINT.below(r"\d{12,}"), r"history-\d+\.jsonl"),
    (r"\d{12,}/.*|history-\d+\.jsonl",),
)
RUN = Kind(
    "run",
    (
        *(RUN_MARK, r"log\.jsonl", r"data\.json"),
        *DICTIONARY.below("(dictionary|last_good)"),
        *CHECKPOINTS.below("checkpoints"),
    ),
    (RUN_MARK,),
)
CACHE = Kind("cache", (r"manifest\.json", r"shard-\d+\.safetensors"), (r"manifest\.json",))
_STORE_FILES = (
    *(r"features\.json", r"features\.safetensors", r"weights\.safetensors", r"control\.safetensors"),
    *(r"codes\.parquet", r"stability\.safetensors", r"rows\.safetensors", r"models\.safetensors"),
)
STORE = Kind("store", (*_STORE_FILES, *(rf"\d+-[^/]+/{file}" for file in _STORE_FILES)), (r"(\d+-[^/]+/)?features\.json",))
_UNFINISHED_FILES = (r"request\.json", r"journal\.jsonl", r"journal/\d+\.(jsonl|rows)", *CACHE.below("shards"))
UNFINISHED_CAPTURE = Kind(
    "folder of an unfinished capture",
    (
        *_UNFINISHED_FILES,
        *CACHE.below(r"parts/\d+"),  # of one model each
        *(rf"parts/\.\d+\.unfinished/{file}" for file in _UNFINISHED_FILES),
    ),
    (r"request\.json",),
)
UNFINISHED_STORE = Kind(
    "folder of an unfinished store",
    (
        r"request\.json",
        *(rf"(control/)?{file}" for file in (r"(\d+/)?progress\.json", r"(\d+/){1,2}[a-z]+\.bin")),
        r"(control/)?reduced/\d+/(\d+|codes)\.(safetensors|parquet)",
    ),
    (r"request\.json",),
)


def foreign(folder: Path, kind: Kind) -> list[str]:
    """Return the paths of the files and links in a folder that do not belong to this kind.

    If the files that mark the kind are missing, every file is foreign. Empty folders do not count.
    """
    names = {name: _meant(name) for name in _names(folder) if name.rpartition("/")[2] not in OF_THE_SYSTEM}
    marked = all(any(re.fullmatch(mark, meant) for meant in names.values()) for mark in kind.marks)
    if not marked or (RUN_MARK in kind.marks and not _is_config_of_a_run(folder / "config.toml")):
        return list(names)
    return [name for name, meant in names.items() if not any(re.fullmatch(file, meant) for file in kind.files)]


def _names(folder: Path) -> list[str]:
    """Return the paths of all files and links below a folder, relative to it. Links are not followed."""
    names: list[str] = []
    for above, folders, files in os.walk(folder):
        files += [name for name in folders if Path(above, name).is_symlink()]
        names += [Path(above, name).relative_to(folder).as_posix() for name in files if not LOCK.fullmatch(name)]
    return sorted(names)


def _meant(path: str) -> str:
    """Return the final path of a temporary path, and any other path unchanged."""
    return "/".join(match[1] if (match := TEMPORARY.fullmatch(part)) else part for part in path.split("/"))


def is_run(folder: Path) -> bool:
    """Return whether a folder is that of a training run."""
    return _is_config_of_a_run(folder / "config.toml")


def runs_in(folder: Path) -> list[Path]:
    """Return the folder itself if it is that of a run; else the runs in it and in its folders, by number and name."""
    if is_run(folder):
        return [folder]
    configs = [path for pattern in ("*/config.toml", "*/*/config.toml") for path in folder.glob(pattern)]
    runs = {path.parent for path in configs if not TEMPORARY.fullmatch(path.parent.name) and is_run(path.parent)}
    return sorted(runs, key=lambda path: [(int("0" + re.match(r"\d*", name)[0]), name) for name in path.parts])


def listed(runs: Sequence[Path]) -> str:
    """Return the number of several runs and the first of them, for messages."""
    more = f" and {len(runs) - 8} more" if len(runs) > 8 else ""
    return f"{len(runs)} runs: {', '.join(map(str, runs[:8]))}{more}"


def _is_config_of_a_run(path: Path) -> bool:
    """Return whether a config.toml holds the settings of a training run. Other tools use that name too."""
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > MAX_SETTINGS_BYTES:
            return False
        return {"sparsity", "d_sae"} <= tomllib.loads(path.read_text(encoding="utf-8")).keys()
    except (OSError, ValueError, RecursionError):
        return False
