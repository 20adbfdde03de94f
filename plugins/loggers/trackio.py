"""Trackio. It keeps its data on this machine unless TRACKIO_SPACE_ID is set. Show it with `trackio show`."""

import os
from contextvars import Context
from pathlib import Path
from typing import Any

import trackio

from saelens_lite import Logger, TrainConfig


class Trackio(Logger):
    """A Trackio run with the name of the folder, in the project TRACKIO_PROJECT or saelens_lite."""

    def start(self, folder: Path, config: TrainConfig, tokens: int = 0) -> None:
        # Its own context, because `init` finishes the run of its context, and several runs are trained together.
        self.run = Context().run(
            trackio.init,
            project=os.environ.get("TRACKIO_PROJECT", "saelens_lite"),
            name=f"{folder.name}-{tokens}"
            if tokens
            else folder.name,  # logged lines cannot be removed, so a resumed run is a new one
            group=folder.name,
            config=config.model_dump(mode="json"),
            embed=False,
        )

    def log(self, line: dict[str, Any]) -> None:
        del line["step"]  # Trackio's own name for the horizontal axis
        self.run.log(line, step=line.pop("tokens"))

    def close(self) -> None:
        self.run.finish()
