"""Weights & Biases. Its own environment variables choose where: WANDB_MODE=offline, WANDB_PROJECT, WANDB_ENTITY, …"""

import os
from pathlib import Path
from typing import Any

import wandb

from saelens_lite import Logger, TrainConfig


class Wandb(Logger):
    """A Weights & Biases run of the folder's name; WANDB_MODE=offline works without a network."""

    def start(self, folder: Path, config: TrainConfig, tokens: int = 0) -> None:
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "saelens_lite"),
            name=f"{folder.name}-{tokens}" if tokens else folder.name,  # nothing can be unlogged: a resumed run is a new one
            group=folder.name,
            dir=str(folder),
            config=config.model_dump(mode="json"),
            reinit="create_new",  # dictionaries that are trained together are runs of their own
            settings=wandb.Settings(console="off"),
        )

    def log(self, line: dict[str, Any]) -> None:
        self.run.log(line, step=line["tokens"])

    def close(self) -> None:
        self.run.finish()
