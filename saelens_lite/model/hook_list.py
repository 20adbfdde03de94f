"""The hooks of a model and their widths, from its configuration alone. No weights are loaded."""

from pathlib import Path
from typing import Any

import torch

from saelens_lite.errors import ModelNotFoundError
from saelens_lite.model import hooks as _hooks
from saelens_lite.model.loading import _on_hub, model_place


def list_hooks(name: str | Path, revision: str | None = None) -> dict[str, int | None]:
    """Return the width of each hook of a model, the usual ones first; None if it is not known without the weights.

    The hooks that add up tensors, such as hook_resid_mid, are checked only when they are first used on the loaded model.

    Args:
        name: "tiny", a Hugging Face Hub id, or a folder with config.json.
        revision: branch, tag or commit on the Hub.

    Raises:
        ModelNotFoundError: there is no such model, or transformers or transformer-lens does not know its architecture.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    name, where, local = model_place(name)
    commit, only_cached = (revision, True) if local else _on_hub(str(name), revision)
    try:
        config = AutoConfig.from_pretrained(str(where), revision=commit, local_files_only=only_cached, trust_remote_code=False)
        with torch.device("meta"):
            module = AutoModelForCausalLM.from_config(config, trust_remote_code=False).eval()
    except Exception as error:  # transformers raises errors of many kinds for a damaged folder
        reason = " ".join(str(error).split())[:400]
        raise ModelNotFoundError(f"cannot read the configuration of the model {str(name)!r}: {reason}") from error
    known = _hooks.architecture(module, str(name))
    usual = _hooks.usual_names(module, known)
    return _widths(module, known, list(dict.fromkeys([*usual, *_hooks.spelled_names(module, known)])))


def _widths(module: Any, known: _hooks.Architecture, names: list[str]) -> dict[str, int | None]:
    """Return the width of each hook after a forward pass over shapes alone."""
    widths: dict[str, int | None] = dict.fromkeys(names)

    def noted(name: str) -> Any:
        def note(value: Any) -> None:
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                widths[name] = value.shape[2:].numel()

        return note

    points = {name: _hooks.find(name, module, known) for name in names}
    handles = [point.on_value(noted(name)) for name, point in points.items() if point is not None]
    try:
        ids, mask = torch.zeros(1, 4, dtype=torch.long, device="meta"), torch.ones(1, 1, 4, 4, dtype=torch.bool, device="meta")
        module(input_ids=ids, attention_mask=mask, use_cache=False)  # without a mask, transformers looks at values
    except Exception:  # some models look at values, which shapes alone do not have
        pass
    finally:
        for handle in handles:
            handle.remove()
    return widths
