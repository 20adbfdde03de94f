"""Names of hooks in the settings of other tools: modules of transformers models, and names with a layer placeholder."""

import re
from pathlib import Path
from typing import Literal

from saelens_lite.errors import ConfigError

BLOCK = r"(?:.*\.)?(?:layers|h|blocks)\.(\d+)"
MODULES = (  # of transformers models, with transformer-lens's hooks of their input and output
    (rf"{BLOCK}", "blocks.{}.hook_resid_pre", "blocks.{}.hook_resid_post"),
    (rf"{BLOCK}\.mlp", "blocks.{}.mlp.hook_in", "blocks.{}.hook_mlp_out"),
    (rf"{BLOCK}\.(?:self_attn|attn|attention)", "blocks.{}.attn.hook_in", "blocks.{}.hook_attn_out"),
    (rf"{BLOCK}\.self_attn\.o_proj", "blocks.{}.attn.hook_z", "blocks.{}.hook_attn_out"),
    (rf"{BLOCK}\.pre_feedforward_layernorm", None, "blocks.{}.mlp.hook_in"),
    (rf"{BLOCK}\.post_feedforward_layernorm", None, "blocks.{}.hook_mlp_out"),
    (r"(?:.*\.)?(?:embed_tokens|wte|embed_in)", None, "hook_embed"),
)


def hook_of_module(module: str, side: Literal["input", "output"] = "output") -> str | None:
    """Return transformer-lens's hook of the input or output of a transformers module, or None if it is unknown."""
    for pattern, before, after in MODULES:
        if match := re.fullmatch(pattern, module):
            hook = before if side == "input" else after
            return hook and hook.format(*match.groups())
    return None


def fill_layer(path: Path, hook: str | None, layer: int | None) -> str | None:
    """Return a hook's name with the layer filled in: for layer 3, "blocks.{layer}.hook_mlp_out" is "blocks.3.hook_mlp_out".

    Raises:
        ConfigError: the name has another placeholder, or the layer is unknown.
    """
    if hook is None or not re.search(r"[{}]", hook):
        return hook
    filled = hook.replace("{layer}", str(layer))
    if layer is None or re.search(r"[{}]", filled):
        raise ConfigError(
            f"{path}: the hook {hook!r} has a placeholder that the settings do not fill; write the layer's number there"
        )
    return filled


def match_in_path(path: Path, pattern: str) -> re.Match[str] | None:
    """Return the match of a pattern in the name of a file or of a folder that it is in, the nearest first; else None."""
    return next((match for name in reversed(path.absolute().parts) if (match := re.search(pattern, name))), None)
