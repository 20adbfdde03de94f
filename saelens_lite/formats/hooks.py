"""Names of hooks in the settings of other tools: modules of transformers models, and names with a layer placeholder.

A module stands for the tensor that it itself takes or returns: the output of layers.3.mlp is blocks.3.mlp.hook_out, before any
norm that follows. Where a norm follows the MLP, as in Gemma 2 and 3 and in OLMo 2, blocks.3.hook_mlp_out is the output of that
norm, post_feedforward_layernorm.
"""

import logging
import re
from pathlib import Path
from typing import Literal

from saelens_lite.errors import ConfigError

log = logging.getLogger(__name__)

OTHER_PARTS = r"(?!.*(?:vision|visual|audio|encoder))"  # layers of a multimodal model that are not the language model's
BLOCK = rf"{OTHER_PARTS}(?:.*\.)?(?:layers|h|blocks)\.(\d+)"
ATTENTION = r"(?:self_attn|attn|attention|self_attention|attn\.attention)"
MODULES = (  # of transformers models, with transformer-lens's hooks of their input and output
    (BLOCK, "blocks.{}.hook_resid_pre", "blocks.{}.hook_resid_post"),
    (rf"{BLOCK}\.mlp", "blocks.{}.mlp.hook_in", "blocks.{}.mlp.hook_out"),
    (rf"{BLOCK}\.mlp\.(?:down_proj|dense_4h_to_h|c_proj|fc2)", "blocks.{}.mlp.hook_post", "blocks.{}.mlp.out.hook_out"),
    (rf"{BLOCK}\.mlp\.(?:up_proj|dense_h_to_4h|c_fc|fc1)", "blocks.{}.mlp.hook_in", "blocks.{}.mlp.in.hook_out"),
    (rf"{BLOCK}\.mlp\.gate_proj", "blocks.{}.mlp.hook_in", "blocks.{}.mlp.gate.hook_out"),
    (rf"{BLOCK}\.{ATTENTION}", "blocks.{}.attn.hook_in", "blocks.{}.attn.hook_out"),
    (rf"{BLOCK}\.{ATTENTION}\.(?:o_proj|c_proj|dense|out_proj)", "blocks.{}.attn.hook_z", "blocks.{}.attn.o.hook_out"),
    (rf"{BLOCK}\.{ATTENTION}\.([qkv])_proj", "blocks.{}.attn.hook_in", "blocks.{}.attn.{}.hook_out"),
    (rf"{BLOCK}\.(?:input_layernorm|ln_1)", "blocks.{}.hook_resid_pre", "blocks.{}.ln1.hook_out"),
    (rf"{BLOCK}\.ln_2", "blocks.{}.ln2.hook_in", "blocks.{}.ln2.hook_out"),
    (rf"{BLOCK}\.pre_feedforward_layernorm", "blocks.{}.ln2.hook_in", "blocks.{}.mlp.hook_in"),
    (rf"{BLOCK}\.post_feedforward_layernorm", "blocks.{}.mlp.hook_out", "blocks.{}.hook_mlp_out"),
    (rf"{OTHER_PARTS}(?:.*\.)?(?:embed_tokens|wte|embed_in)", None, "hook_embed"),
    (rf"{OTHER_PARTS}(?:.*\.)?wpe", None, "hook_pos_embed"),
    (r"(?:model\.|transformer\.|gpt_neox\.)?(?:norm|ln_f|final_layer_?norm)", "ln_final.hook_in", "ln_final.hook_out"),
)
AFTER_ATTENTION = rf"{BLOCK}\.post_attention_layernorm"
AFTER_ATTENTION_MEANS = {  # in which models it reads the attention's output, and in which the MLP reads it
    r"gemma-?[234](?!b)|olmo-?[23]": ("blocks.{}.attn.hook_out", "blocks.{}.hook_attn_out"),
    r"llama|mistral|mixtral|qwen|deepseek|pythia|neox|phi-?3|granite|gemma-": (
        "blocks.{}.ln2.hook_in",
        "blocks.{}.ln2.hook_out",
    ),
}


def hook_of_module(module: str, side: Literal["input", "output"] = "output", model: str | None = None) -> str | None:
    """Return transformer-lens's hook of the input or output of a transformers module, or None if it is unknown.

    Args:
        module: the path of the module, also as nnsight writes it: model.layers[3].mlp.output. A side that it names counts.
        model: the name of the model. It decides what post_attention_layernorm is.
    """
    path = re.sub(r"\[(\d+)\]", r".\1", module)
    if named := re.fullmatch(r"(.+)\.(input|output)(?:\.0)?", path):
        path, side = named[1], named[2]  # type: ignore[assignment]
    if match := re.fullmatch(AFTER_ATTENTION, path):
        places = (places for name, places in AFTER_ATTENTION_MEANS.items() if re.search(name, (model or "").lower()))
        before, after = next(places, (None, None))
        if before is None:
            log.warning(
                "%s is the norm of the attention's output in some models and of the MLP's input in others; which it is in %s "
                "is not known, so the dictionary names no hook",
                module,
                model or "a model without a name",
            )
        hook = before if side == "input" else after
        return hook and hook.format(*match.groups())
    for pattern, before, after in MODULES:
        if match := re.fullmatch(pattern, path):
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
