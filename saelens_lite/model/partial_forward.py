"""Forward passes from a hook onwards, without the blocks before a replaced activation."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saelens_lite.tokens.inputs import Ids

if TYPE_CHECKING:
    from saelens_lite.model import LanguageModel

PROBE_TOKENS = 16
TOLERANCE = 1e-5
log = logging.getLogger(__name__)


class PartialForward:
    """Logits of one model with the activations at some hooks replaced, repeatedly on the same tokens.

    `read` runs the whole model; `logits` then runs the part after the hook. Each block before the hook passes on its input. If
    the hook is inside a block, the input of that block is restored. A test on two rows first compares this with whole passes.
    Passes stay whole if the logits differ, if the hook is in no block, and with several hooks.

    `n_skipped` is the number of skipped blocks. `is_whole_stream`: the rest of the model reads only the hook, so that a
    constant in its place gives every row the same logits.
    """

    def __init__(self, lm: "LanguageModel", hooks: Sequence[str], tokens: Int[Tensor, "n pos"]):
        self.lm, self.hooks, self.hook = lm, tuple(hooks), hooks[0]
        self._enters: nn.Module | None = None
        self._entered: Tensor | None = None
        self._hand_on: list[tuple[nn.Module, Callable[..., Any]]] = []
        self.n_skipped, self.is_whole_stream = 0, False
        if len(hooks) > 1:
            acts, _ = self._run(tokens[:1, :1], self.hooks, [])
            self._widths = [acts[hook].shape[-1] for hook in self.hooks]
        else:
            self._look_behind(tokens)

    def _look_behind(self, tokens: Int[Tensor, "n pos"]) -> None:
        """Find the blocks before the only hook, and test whether they can be skipped."""
        lm, point = self.lm, self.lm.hook_point(self.hook)
        blocks = lm.blocks
        holding = next((i for i, block in enumerate(blocks) if any(part is point.module for part in block.modules())), 0)
        at_boundary = bool(blocks) and blocks[holding] is point.module
        self.n_skipped = holding + (at_boundary and point.side == "out")
        self.is_whole_stream = at_boundary
        self._enters = blocks[holding] if self.n_skipped and not at_boundary else None
        if self.n_skipped or at_boundary:
            row = tokens[:1, :PROBE_TOKENS]
            self._try_out(blocks[: self.n_skipped], torch.cat([row, (row + 1) % lm.d_vocab]))

    def _try_out(self, skipped: list[nn.Module], tokens: Int[Tensor, "two pos"]) -> None:
        """Return to whole passes unless shortened passes give the same logits."""
        x = self._run(tokens, (self.hook,), skipped)[0][self.hook]
        new, zeros = x.flip(0) / 2, torch.zeros_like(x)
        wanted, wanted_zero = self._whole(tokens, new), self._whole(tokens, zeros)
        try:
            same = _near(self.logits(tokens, new), wanted) and _near(self.logits(tokens, zeros), wanted_zero)
        except Exception as error:  # a block with an unusual input or output
            log.debug("%s: %s", type(error).__name__, error)
            same = False
        if not same:
            log.info("running the whole %s for each replacement of %s", type(self.lm.module).__name__, self.hook)
            self.n_skipped, self._enters, self._hand_on = 0, None, []
        self.is_whole_stream = self.is_whole_stream and _near(wanted_zero[:1], wanted_zero[1:])

    def read(
        self, tokens: Int[Tensor, "n pos"], hooks: Sequence[str], first: int = 0
    ) -> tuple[dict[str, Float[Tensor, "n pos _"]], Float[Tensor, "n n_logits d_vocab"]]:
        """Return the activations at the named hooks and the logits from position `first` on, from a whole pass."""
        return self._run(tokens, hooks, [], first)

    def _run(
        self, tokens: Tensor, hooks: Sequence[str], learn: list[nn.Module], first: int = 0
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Run a whole pass, and return the activations at hooks and the logits.

        Also record the input of the hook's block, and the form of the output of each block in `learn`.
        """
        acts: dict[str, Tensor] = {}
        with ExitStack() as stack:
            for hook in dict.fromkeys(hooks):
                stack.enter_context(self.lm.replace(hook, _noting(hook, acts)))
            stack.enter_context(self.noting())
            for block in learn:
                handle = block.register_forward_hook(lambda block, _, out: self._hand_on.append((block, _handing_on(out))))
                stack.callback(handle.remove)
            logits = self._logits(tokens, first)
        return acts, logits

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Note in whole passes within the block, such as those of `read`, the input from which `logits` continues."""
        with ExitStack() as stack:
            if self._enters is not None:
                handle = self._enters.register_forward_pre_hook(self._note_entry, with_kwargs=True)
                stack.callback(handle.remove)
            yield

    def _note_entry(self, _block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._entered = (args[0] if args else kwargs["hidden_states"]).clone()

    def _put_entry_back(self, _block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return ((self._entered, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": self._entered})

    def logits(
        self, tokens: Int[Tensor, "n pos"], new: Float[Tensor, "n pos d"], first: int = 0, *, differentiable: bool = False
    ) -> Float[Tensor, "n n_logits d_vocab"]:
        """Return the logits from position `first` on, with the activations at the hooks replaced by `new`.

        Args:
            tokens: The tokens of the last `read`, or of the last pass within `noting`; any others only if `is_whole_stream`.
            new: The activations; those of several hooks are concatenated.
            differentiable: Keep the graph back to `new`.
        """
        if not self.n_skipped:
            return self._whole(tokens, new, first, differentiable)
        with ExitStack() as stack:
            for block, hand_on in self._hand_on:
                stack.enter_context(_forward_of(block, hand_on))
            if self._enters is not None:
                handle = self._enters.register_forward_pre_hook(self._put_entry_back, with_kwargs=True)
                stack.callback(handle.remove)
            return self._whole(tokens, new, first, differentiable)

    def _whole(self, tokens: Tensor, new: Tensor, first: int = 0, differentiable: bool = False) -> Tensor:
        parts = new.split(self._widths, dim=-1) if len(self.hooks) > 1 else [new]
        with ExitStack() as stack:
            for hook, part in zip(self.hooks, parts, strict=True):
                stack.enter_context(self.lm.replace(hook, lambda _, part=part: part.clone()))  # Falcon overwrites it
            return self._logits(tokens, first, differentiable)

    def _logits(self, tokens: Tensor, first: int, differentiable: bool = False) -> Tensor:
        """Return the logits from position `first` on; if the unembedding is a module, compute only these."""
        head = self.lm.module.get_output_embeddings()
        if not first or head is None:
            return self.lm.logits(Ids(tokens, None), differentiable=differentiable)[:, first:]
        unembed = head.forward
        with _forward_of(head, lambda x: unembed(x[:, first:] if x.ndim == 3 else x)):
            logits = self.lm.logits(Ids(tokens, None), differentiable=differentiable)
        return logits[:, first - tokens.shape[1] :]


def _noting(hook: str, acts: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a replacement that changes nothing and keeps a copy of the activation."""

    def note(x: Tensor) -> Tensor:
        acts[hook] = x.clone()  # Falcon overwrites the original
        return x

    return note


def _handing_on(output: Any) -> Callable[..., Any]:
    """Return a forward function that passes on the stream unchanged, in the form of the block's own output."""
    rest = output[1:] if isinstance(output, tuple | list) else None

    def forward(hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Any:
        return hidden_states if rest is None else (hidden_states, *rest)

    return forward


@contextmanager
def _forward_of(block: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace a module's forward function within the block."""
    own = block.__dict__.get("forward")  # accelerate puts one there
    block.forward = forward
    try:
        yield
    finally:
        if own is None:
            del block.forward
        else:
            block.forward = own


def _near(logits: Tensor, wanted: Tensor) -> bool:
    return bool((logits - wanted).abs().max() <= TOLERANCE * wanted.abs().max().clamp(min=1))
