"""Weights & Biases. Its environment variables choose the destination, e.g. WANDB_MODE=offline, WANDB_PROJECT, WANDB_ENTITY."""

import os
from pathlib import Path
from typing import Any

import wandb

from saelens_lite import Logger, TrainConfig


class Wandb(Logger):
    """A Weights & Biases run with the name of the folder. WANDB_MODE=offline works without a network."""

    def start(self, folder: Path, config: TrainConfig, tokens: int = 0) -> None:
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "saelens_lite"),
            name=f"{folder.name}-{tokens}"
            if tokens
            else folder.name,  # logged lines cannot be removed, so a resumed run is a new one
            group=folder.name,
            dir=str(folder),
            config=config.model_dump(mode="json"),
            reinit="create_new",  # dictionaries that are trained together are separate runs
            settings=wandb.Settings(console="off"),
        )

    def log(self, line: dict[str, Any]) -> None:
        self.run.log(line, step=line["tokens"])

    def close(self) -> None:
        self.run.finish()
