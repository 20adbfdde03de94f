"""The description of a stream in a checkpoint, from which its model and text are opened again."""

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from saelens_lite.config import TextConfig
from saelens_lite.model import EMBEDDED, LanguageModel, load_model, mention_folder
from saelens_lite.model.spread import DeviceMap
from saelens_lite.schemas import Checked, Count, Positive, String
from saelens_lite.tensor_files import DTYPES


class DescribedModel(Checked):
    """The model in the description of a stream."""

    name: String
    revision: String | None
    center_writing_weights: bool
    device: String
    dtype: Literal["float32", "float16", "bfloat16", "float64"]
    tf32: bool = False
    device_map: String | dict[String, int | String] | None = None

    def load(self, device: str | torch.device | None) -> LanguageModel:
        """Return the model on a device, by default its own."""
        mention_folder(self.name)
        lm = load_model(
            name=self.name,
            device=None if self.device_map else device or self.device,
            device_map=self.device_map,
            dtype=DTYPES[self.dtype],
            revision=self.revision,
            center_writing_weights=self.center_writing_weights,
        )
        lm.tf32 = self.tf32 if lm.tf32 is not None else None
        return lm


class _Settings(Checked):
    """The settings in the description of a stream."""

    hooks: list[String]
    buffer_tokens: Positive
    batch_tokens: Positive | None
    text_name: String | None


class StreamDescription(Checked):
    """The description of a stream in a checkpoint."""

    text: String
    text_bytes: Count | None
    text_config: TextConfig
    held_out: Count
    stream: _Settings
    model: DescribedModel | None = None
    models: dict[String, DescribedModel] = Field({})


def described(lm: LanguageModel) -> dict[str, Any]:
    """Return a description from which `DescribedModel.load` loads the model."""
    folder = lm.name not in EMBEDDED and Path(lm.name).expanduser().is_dir()
    return {
        "name": str(Path(lm.name).expanduser().resolve()) if folder else lm.name,
        "revision": lm.revision,
        "center_writing_weights": bool(lm.processing),
        "device": str(lm.device),
        "dtype": str(lm.dtype).removeprefix("torch."),
        **({"tf32": True} if lm.tf32 else {}),
        **({"device_map": _plain(lm.device_map)} if lm.device_map else {}),
    }


def computing(lm: LanguageModel) -> dict[str, Any]:
    """Return the settings of a model that its activations depend on, besides its weights."""
    return {"processing": list(lm.processing), "dtype": str(lm.dtype), **({"tf32": True} if lm.tf32 else {})}


def _plain(device_map: DeviceMap) -> str | dict[str, int | str]:
    if isinstance(device_map, str):
        return device_map
    return {name: str(place) if isinstance(place, torch.device) else place for name, place in device_map.items()}
