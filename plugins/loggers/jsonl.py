"""A log as a text file, without further packages."""

import json
import os
from pathlib import Path
from typing import Any

from saelens_lite import Logger, TrainConfig
from saelens_lite.formats import file_size

MAX_LINE_BYTES = 1 << 20


class Jsonl(Logger):
    """log.jsonl in the run folder, with one JSON object per line."""

    def start(self, folder: Path, config: TrainConfig, tokens: int = 0) -> None:
        self.path = folder / "log.jsonl"
        if os.path.lexists(self.path):
            file_size(self.path)  # raises for a link that leaves the folder, or for anything but a file
            os.truncate(self.path, _length_up_to(self.path, tokens))

    def log(self, line: dict[str, Any]) -> None:
        length = self.path.stat().st_size if self.path.exists() else 0
        try:
            with open(self.path, "a", encoding="utf-8", newline="\n") as file:
                file.write(json.dumps(line) + "\n")
        except OSError:
            os.truncate(self.path, length)  # on a full disk, half of the line may be written
            raise


def _length_up_to(path: Path, tokens: int) -> int:
    """Return the size in bytes of the leading complete lines with at most `tokens` tokens."""
    length = 0
    with open(path, "rb") as file:
        for line in iter(lambda: file.readline(MAX_LINE_BYTES), b""):
            try:
                if not line.endswith(b"\n") or json.loads(line)["tokens"] > tokens:
                    break
            except (ValueError, KeyError, TypeError, RecursionError):
                break
            length += len(line)
    return length
