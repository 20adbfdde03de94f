"""The log that needs nothing installed: a text file that every language reads."""

import json
import os
from pathlib import Path
from typing import Any

from saelens_lite import Logger, TrainConfig


class Jsonl(Logger):
    """log.jsonl in the run folder, one JSON object a line."""

    def start(self, folder: Path, config: TrainConfig, tokens: int = 0) -> None:
        self.path = folder / "log.jsonl"
        if self.path.exists():
            os.truncate(self.path, _length_up_to(self.path, tokens))

    def log(self, line: dict[str, Any]) -> None:
        length = self.path.stat().st_size if self.path.exists() else 0
        try:
            with open(self.path, "a", encoding="utf-8", newline="\n") as file:
                file.write(json.dumps(line) + "\n")
        except OSError:
            os.truncate(self.path, length)  # a full disk may have taken half of the line
            raise


def _length_up_to(path: Path, tokens: int) -> int:
    """Bytes of the whole lines at the beginning that reach no further than `tokens`."""
    length = 0
    with open(path, "rb") as file:
        for line in file:
            try:
                if not line.endswith(b"\n") or json.loads(line)["tokens"] > tokens:
                    break
            except (ValueError, KeyError, TypeError):
                break
            length += len(line)
    return length
