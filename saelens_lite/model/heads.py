"""One attention head as a hook: blocks.5.attn.hook_z.head_3 is the part of blocks.5.attn.hook_z that belongs to head 3."""

from typing import Any, NamedTuple

from torch import nn

HEADED = ("hook_q", "hook_k", "hook_v", "hook_z")  # hooks of an attention whose values lie head by head
WIDTHS = {"in": ("in_features", "nx"), "out": ("out_features", "nf")}  # of a linear layer; those of GPT-2 have other names


class Heads(NamedTuple):
    """The attention heads side by side in a tensor: their number, and the width of each."""

    number: int
    width: int

    def part(self, head: int) -> slice | None:
        """Return the part of the last axis that belongs to a head, or None if there are fewer heads."""
        return slice(head * self.width, (head + 1) * self.width) if head < self.number else None


def heads_at(hook: str, linear: nn.Module, side: str, attention: nn.Module | None, config: Any) -> Heads | None:
    """Return the heads in the tensor that enters or leaves a linear layer, or None if its values do not lie head by head.

    Args:
        hook: The last part of the hook's name.
        attention: The attention that the layer belongs to.
        config: The settings of the text model.
    """
    width = next((size for key in WIDTHS[side] if isinstance(size := getattr(linear, key, None), int)), None)
    n_heads = getattr(config, "num_attention_heads", None)
    if hook not in HEADED or width is None or attention is None or not isinstance(n_heads, int):
        return None
    if hook == "hook_z":
        return None if width % n_heads else Heads(n_heads, width // n_heads)
    d_head = getattr(attention, "head_dim", None) or getattr(config, "head_dim", None) or config.hidden_size // n_heads
    number = width // d_head
    shared = hook != "hook_q" and number and n_heads % number == 0  # several queries share a key and a value
    return Heads(number, d_head) if width == number * d_head and (shared or number == n_heads) else None
