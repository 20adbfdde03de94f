"""Hook names that promise an equation, checked on one forward pass over a few tokens.

    resid_pre + attn_out = resid_mid                resid_mid + mlp_out = resid_post
    resid_pre + attn_out + mlp_out = resid_post     (attention and MLP in parallel)
    embed + pos_embed = the first resid_pre

transformer-lens says which module of a transformers model each name stands for. Some models scale the module's output, pass
it through a norm, or add a third term to the sum. Then the module's output is not the tensor that the name means. The check
runs when such a name is first used, on four tokens. Active hooks do not act on this pass.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from saelens_lite.errors import HookError
from saelens_lite.model.hooks import Architecture, HookPoint, alone, find, no_such_hook, parts
from saelens_lite.model.spread import input_device

N_TOKENS = 4
ROUNDINGS = 8  # a sum may be off by this many times the rounding error of its terms
MID, ATTN, MLP = "hook_resid_mid", "hook_attn_out", "hook_mlp_out"
INSTEAD = {  # other places of each tensor, if transformer-lens names a wrong one
    MID: ("mlp.hook_in",),
    ATTN: ("ln1_post.hook_out", "attn.hook_out", "attn.o.hook_out", "ln2.hook_out"),
    MLP: ("ln2_post.hook_out", "mlp.hook_out", "mlp.out.hook_out"),
}
EMBED, POS_EMBED = "hook_embed", "hook_pos_embed"
EMBEDDINGS = (EMBED, "embed_ln.hook_out", "embed.hook_out")
READ_BY_MLP = ("mlp.hook_in", "mlp.in.hook_in")

Verdict = HookPoint | str  # the place that a name stands for, or the reason why the model has none


class Identities:
    """The hook names of a model that promise an equation, each with its place or the reason why it has none."""

    def __init__(self, module: nn.Module, known: Architecture):
        self.module, self.known = module, known

    def point(self, name: str) -> HookPoint:
        """Return the place of the tensor that a hook name means.

        Raises:
            HookError: the model has no such hook, or no tensor satisfies the name's equation.
        """
        point = self.find(name)
        if point is None:
            raise no_such_hook(name, self.module, self.known, self.holds)
        if not self._is_checked(name):
            return point
        block = ".".join(name.split(".")[:2])
        verdict = self._verdicts.get(block) or self._verdicts.get(name, point)
        if isinstance(verdict, HookPoint):
            return verdict
        raise HookError(f"{name} of {type(self.module).__name__} is not available: {verdict}")

    def holds(self, name: str) -> bool:
        """Return whether the model has a hook of this name."""
        if self.find(name) is None:
            return False
        try:
            self.point(name)
        except HookError:
            return False
        return True

    def find(self, name: str) -> HookPoint | None:
        """Return the place that transformer-lens names, or None."""
        return find(name, self.module, self.known)

    def _is_checked(self, name: str) -> bool:
        """Return whether a name needs a check: it promises an equation, or its block may run more than once in a pass."""
        stack, *path = name.split(".")
        is_stack = getattr(self.known.components.get(stack), "is_list_item", False)
        return name in (EMBED, POS_EMBED) or (is_stack and (stack != "blocks" or (path[-1] in INSTEAD and len(path) == 2)))

    def _blocks(self) -> Iterator[tuple[str, nn.Module, list[nn.Module]]]:
        """Yield the name of each block, its module, and the modules inside that transformer-lens names."""
        for key, component in self.known.components.items():
            if getattr(component, "is_list_item", False):
                for i, block in enumerate(self.module.get_submodule(component.name)):
                    yield f"{key}.{i}", block, list(dict.fromkeys(parts(block, component.submodules or {})))

    @cached_property
    def _verdicts(self) -> dict[str, Verdict]:
        """The verdict on each checked name, and, by the name of a block, the reason why none of its hooks exists."""
        noted, verdicts = Noted(), dict[str, Verdict]()
        embeddings = {
            key: self.known.components[key] for key in ("embed", "embed_ln", "pos_embed") if key in self.known.components
        }
        blocks = list(self._blocks())

        def judge(prefix: str, block: nn.Module, inside: list[nn.Module]) -> Callable[..., None]:
            def leave(*_: Any) -> None:
                if f"{prefix}.{MID}" in verdicts:
                    verdicts[prefix] = "its block runs more than once in a forward pass, so the name stands for several tensors"
                elif not verdicts:
                    verdicts.update(self._of_embeddings(noted, prefix, noted.of(block, "in")))
                verdicts.update(BlockIdentities(self, prefix, block, inside, noted).verdicts())
                noted.forget([block, *inside])

            return leave

        with alone(), torch.no_grad(), ExitStack() as stack:
            noted.note(parts(self.module, embeddings), stack)
            for prefix, block, inside in blocks:
                noted.note([*inside, block], stack)
                stack.callback(block.register_forward_hook(judge(prefix, block, inside)).remove)
            try:
                self.module(probe_tokens(self.module), use_cache=False)
            except Exception as error:  # a model that needs more than token ids
                reason = f"the forward pass on token ids that would check it fails ({' '.join(str(error).split())[:200]})"
                names = [EMBED, POS_EMBED, *(f"{prefix}.{hook}" for prefix, *_ in blocks for hook in INSTEAD)]
                return dict.fromkeys(names, f"{reason}: {type(error).__name__}")
        return verdicts

    def _of_embeddings(self, noted: "Noted", prefix: str, first: Tensor | None) -> dict[str, Verdict]:
        """Return the verdicts on hook_embed and hook_pos_embed.

        Args:
            prefix: Name of the first block.
            first: Input of the first block.
        """
        added = self.find(POS_EMBED)
        positions = noted.at(added)
        for name in EMBEDDINGS:
            point = self.find(name)
            embedding = noted.at(point)
            if point is None or embedding is None or first is None:
                continue
            point = point._replace(name=EMBED)
            if is_sum(first, embedding):
                reason = "the embedding that enters the first block already contains it; use pos_embed.hook_out for it alone"
                return {EMBED: point, POS_EMBED: reason}
            if added is not None and positions is not None and is_sum(first, embedding, positions):
                return {EMBED: point, POS_EMBED: added}
        reason = "the input of the first block is neither the embedding nor its sum with the position embedding; use "
        itself = "embed.hook_out for the embedding itself"
        if prefix == "blocks.0" and first is not None and len(first) == N_TOKENS:
            itself += ", blocks.0.hook_resid_pre for the input of the first block"
        return {EMBED: reason + itself, POS_EMBED: f"{reason}pos_embed.hook_out for the position embedding itself"}


class BlockIdentities:
    """The hooks of one block whose tensors add up along the residual stream."""

    def __init__(self, of: Identities, prefix: str, block: nn.Module, inside: list[nn.Module], noted: "Noted"):
        self.of, self.prefix, self.block, self.noted = of, prefix, block, noted
        self.pre, self.post = noted.of(block, "in"), noted.of(block, "out")
        self.entering, self.leaving = (
            [x for part in inside if (x := noted.of(part, side)) is not None] for side in ("in", "out")
        )
        self.last_norms = [
            x
            for part in inside
            if self.post is not None and is_sum(self.post, noted.of(part, "out")) and (x := noted.of(part, "in")) is not None
        ]

    def verdicts(self) -> dict[str, Verdict]:
        """Return the place of each name, or the reason why the block has none."""
        pre, post = self.pre, self.post
        if pre is None or post is None or pre.shape != post.shape:
            reason = f"the input and output of {self.prefix} are not single tensors [batch pos d_model]"
            return {f"{self.prefix}.{hook}": reason for hook in INSTEAD}
        attns, mlps = self._candidates(ATTN), self._candidates(MLP)
        streams, ends = [pre, *self.entering, *self.leaving], [post, *self.last_norms]
        attn = next((a for a in attns if any(is_sum(s, pre, a[1]) for s in [*self.entering, post])), None)
        mlp = next((m for m in mlps if any(is_sum(end, s, m[1]) for end in ends for s in streams)), None)
        if attn is None or mlp is None:
            parallel = ((a, m) for a in attns for m in mlps if is_sum(post, pre, a[1], m[1]))
            attn, mlp = next(parallel, (attn, mlp))
        added = [attn[1]] if attn else self.leaving
        mid = next(
            (
                m
                for m in self._candidates(MID)
                if any(is_sum(m[1], pre, a) for a in added) or (attn is None and mlp is not None and is_sum(post, m[1], mlp[1]))
            ),
            None,
        )
        if mid is not None:
            mid = (self._replaceable(*mid, [mlp[1]] if mlp else self.leaving), mid[1])
        chosen = {MID: mid, ATTN: attn, MLP: mlp}
        return {
            f"{self.prefix}.{hook}": candidate[0] if candidate else self._reason(hook, attn and attn[1])
            for hook, candidate in chosen.items()
        }

    def _replaceable(self, point: HookPoint, mid: Tensor, added: list[Tensor]) -> HookPoint:
        """Return the place of hook_resid_mid, where a change must reach the MLP and the block's output, or must be refused."""
        if any(is_sum(self.post, mid, x) for x in added):
            return point._replace(block=self.block)
        return point._replace(read_only="its block's output is not its sum with the MLP's output")

    def _candidates(self, hook: str) -> list[tuple[HookPoint, Tensor]]:
        """Return the places that may hold the tensor a name means, with their tensors."""
        places = [self.of.find(f"{self.prefix}.{other}") for other in (hook, *INSTEAD[hook])]
        name = f"{self.prefix}.{hook}"
        return [(at._replace(name=name), x) for at in places if at is not None and (x := self.noted.at(at)) is not None]

    def _first(self, hooks: tuple[str, ...], test: Callable[[Tensor], bool] = lambda _: True) -> str | None:
        """Return the first of some hooks of the block that exists and whose tensor passes a test."""
        for hook in hooks:
            x = self.noted.at(self.of.find(f"{self.prefix}.{hook}"))
            if x is not None and test(x):
                return f"{self.prefix}.{hook}"
        return None

    def _reason(self, hook: str, attn: Tensor | None) -> str:
        """Say why a name cannot be served, and what to use instead."""
        if hook == MID:
            norms = tuple(f"{part}.hook_in" for part in ("ln1", "ln2", "mlp"))
            summed = attn is not None and self._first(norms, lambda x: is_sum(x, self.pre, attn))
            read = self._first(READ_BY_MLP)
            why = "the MLP's output is not added to the sum of the block's input and the attention's output; use "
            if summed and read:
                return f"{why}{summed} for that sum, or {read} for what the MLP reads"
            return f"{why}{read + ' for what the MLP reads, or ' if read else ''}{self.prefix}.hook_resid_post"
        part = "attention" if hook == ATTN else "MLP"
        own = self._first(INSTEAD[hook])
        why = f"no sum in the block adds only the {part}'s output to the residual stream; it may be scaled or have other terms"
        return why + (f"; use {own} for the output as the model computes it" if own else "; the forward pass never reaches it")


class Noted:
    """The tensors that enter and leave some modules in a forward pass."""

    def __init__(self):
        self._values: dict[tuple[nn.Module, str], list[Tensor]] = {}

    def note(self, modules: "Iterator[nn.Module] | list[nn.Module]", stack: ExitStack) -> None:
        """Record the input and output of each module until the stack is closed."""
        for module in modules:
            for side in ("in", "out"):
                if (module, side) not in self._values:
                    values = self._values[module, side] = []
                    stack.callback(HookPoint("", module, side).on_value(_keep(values)).remove)

    def of(self, module: nn.Module, side: str) -> Tensor | None:
        """Return the input or output of a module, [tokens d]; None unless it was one tensor in one call."""
        values = self._values.get((module, side), [])
        return values[0] if len(values) == 1 else None

    def at(self, point: HookPoint | None) -> Tensor | None:
        """Return the tensor at a hook, [tokens d]."""
        value = None if point is None else self.of(point.module, point.side)
        return value if value is None or point is None or point.scale == 1 else value * point.scale

    def forget(self, modules: list[nn.Module]) -> None:
        """Drop the recorded tensors of some modules."""
        for module in modules:
            for side in ("in", "out"):
                self._values[module, side].clear()


def probe_tokens(module: nn.Module) -> Tensor:
    """Return one row of a few ordinary token ids."""
    n_vocab = module.config.get_text_config().vocab_size
    return (n_vocab // 3 + torch.arange(N_TOKENS, device=input_device(module)))[None] % n_vocab


def is_sum(total: Tensor | None, *terms: Tensor | None) -> bool:
    """Return whether a tensor is a sum, entry by entry, up to the rounding error of its terms."""
    tensors = [total, *terms]
    if any(x is None or x.shape != tensors[0].shape for x in tensors):
        return False
    eps = max(torch.finfo(x.dtype).eps for x in tensors)
    total, *terms = (x.cpu().double() for x in tensors)
    size = sum((x.abs() for x in terms), total.abs())
    return bool(((sum(terms) - total).abs() <= ROUNDINGS * eps * size).all())


def _keep(values: list[Tensor]) -> Callable[[Any], None]:
    def visit(value: Any) -> None:
        if isinstance(value, Tensor) and value.is_floating_point():
            values.append(value.detach().reshape(-1, value.shape[-1]).clone())  # some models overwrite it later

    return visit
