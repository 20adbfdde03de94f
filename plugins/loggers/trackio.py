"""Trackio, which keeps its data on this machine unless TRACKIO_SPACE_ID says otherwise. Look at it with `trackio show`."""

import os
from contextvars import Context
from pathlib import Path
from typing import Any

import trackio

from saelens_lite import Logger, TrainConfig


class Trackio(Logger):
    """A Trackio run of the folder's name, in the project TRACKIO_PROJECT or saelens_lite."""

    def start(self, folder: Path, config: TrainConfig, tokens: int = 0) -> None:
        # In a context of its own: `init` finishes the run it finds in its context, and several are trained together.
        self.run = Context().run(
            trackio.init,
            project=os.environ.get("TRACKIO_PROJECT", "saelens_lite"),
            name=f"{folder.name}-{tokens}" if tokens else folder.name,  # nothing can be unlogged: a resumed run is a new one
            group=folder.name,
            config=config.model_dump(mode="json"),
            embed=False,
        )

    def log(self, line: dict[str, Any]) -> None:
        del line["step"]  # a name that Trackio keeps for the horizontal axis
        self.run.log(line, step=line.pop("tokens"))

    def close(self) -> None:
        self.run.finish()
