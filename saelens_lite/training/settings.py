"""The config.toml of a run folder: a settings file that `saelens-lite train --config` takes as it is."""

from collections.abc import Sequence
from typing import Any

import tomli_w

from saelens_lite.config import RunConfig, TextConfig, TrainConfig


def settings_text(config: TrainConfig, request: dict[str, Any], loggers: Sequence[str]) -> str:
    """Return config.toml: the settings of a dictionary, and those of its run without the output folder.

    Args:
        request: the part of a checkpoint that describes the run. Its source is None for activations in memory. The file
            names no data then, nor for a stream of several models. It names no dictionary in memory that training started from.
    """
    run = {
        key: request[key]
        for key in ("data_seed", "validation_tokens", "checkpoint_seconds", "device", "parallel")
        if key in request
    }
    started = [str(one["source"]) for one in request.get("start_from", ()) if one and one["source"]]
    run |= {"start_from": started} if started else {}
    said = _of_source(request["source"] or {}) | run | {"loggers": list(loggers)}
    ordered = {key: said[key] for part in (RunConfig, TextConfig) for key in part.model_fields if key in said}
    return tomli_w.dumps(ordered | config.model_dump(mode="json", exclude_none=True))


def _of_source(source: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of a settings file for the description of a source."""
    if "cache" in source:
        return {"cache": source["cache"]}
    if "model" not in source:  # a settings file names one model at most
        return {}
    model = source["model"]
    named = {
        "text": source["text"],
        "buffer_tokens": source["stream"]["buffer_tokens"],
        "model": model["name"],
        "model_dtype": "auto" if model.get("tf32") else model["dtype"],
        "center_writing_weights": model["center_writing_weights"],
        **({"device_map": model["device_map"]} if model.get("device_map") in ("auto", "tp") else {}),
        **({"model_revision": model["revision"]} if model["revision"] else {}),
    }
    set_by_user = TextConfig(**source["text_config"]).model_dump(mode="json", exclude_defaults=True)
    return named | set_by_user
