"""Event files for TensorBoard. Show them with `tensorboard --logdir runs`."""

from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from saelens_lite import Logger, TrainConfig


class TensorBoard(Logger):
    """Curves over tokens, in the folder tensorboard/ of the run."""

    def start(self, folder: Path, config: TrainConfig, tokens: int = 0) -> None:
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=tokens + 1 if tokens else None)
        self.writer.add_text("config", f"```json\n{config.model_dump_json(indent=2)}\n```", tokens)

    def log(self, line: dict[str, Any]) -> None:
        tokens = line.pop("tokens")
        for name, value in line.items():
            self.writer.add_scalar(name, value, tokens)

    def close(self) -> None:
        self.writer.close()
