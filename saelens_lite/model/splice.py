"""A dictionary in the forward passes of a model: its output, or edits of its codes, in place of activations."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from saelens_lite.config import Origin
from saelens_lite.devices import on_device
from saelens_lite.errors import ConfigError, HookError, ShapeError
from saelens_lite.model.hooks import alone
from saelens_lite.ports import Port, apart, together


@runtime_checkable
class Reconstructor(Protocol):
    """The part of a dictionary that `LanguageModel.splice` uses."""

    origin: Origin
    reads: tuple[Port, ...]
    writes: tuple[Port, ...]
    writes_what_it_reads: bool

    def __call__(self, x: Tensor) -> Tensor: ...

    def check_input(self, x: Tensor) -> None: ...


@runtime_checkable
class PositionedEdit(Protocol):
    """The part of an edit that `LanguageModel.splice` reads: its positions. The dictionary reads the rest."""

    @property
    def positions(self) -> tuple[int, ...] | slice | None: ...


class Splice:
    """A dictionary at its hooks in a model, with the tensors of the current forward pass."""

    def __init__(
        self,
        lm: Any,
        dictionary: Any,
        edits: PositionedEdit | Sequence[PositionedEdit],
        *,
        error_term: bool | None,
        hook: str | None,
        keep: Bool[Tensor, "batch pos"] | None,
    ):
        self.lm, self.dictionary, self.keep = lm, dictionary, keep
        self.hooks = lm.hooks_of(dictionary, hook)
        self.edits = [edits] if isinstance(edits, PositionedEdit) else edits
        self.error_term = bool(self.edits) if error_term is None else error_term
        if self.edits:
            dictionary.check_edits(self.edits)
        self.in_place = self.hooks.reads == self.hooks.writes and len(self.hooks.reads) == 1
        self.reads_first = len(self.hooks.reads) + len(self.hooks.writes) > 2  # in a separate pass
        self._read: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}  # by hook that is written: the reconstruction
        self._changes: dict[str, Tensor] = {}  # by hook that is written: what the edits add
        self._token_ids: Tensor | None = None
        self._offset = 0  # position of the first token of the pass; not 0 while generating with a cache
        self._is_reading = False

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Rewrite the activations of every forward pass within the block."""
        with ExitStack() as stack:
            beginning = self.lm.module.register_forward_pre_hook(self._begin, with_kwargs=True)
            stack.callback(beginning.remove)
            if not self.in_place and not self.reads_first:
                for name in self.hooks.reads:
                    stack.enter_context(self.lm.replace(name, self._look(name)))
            for target in self.hooks.writes:
                stack.enter_context(self.lm.replace(target, self._rewrite(target)))
            if self.reads_first:
                stack.enter_context(self.lm.in_whole_rows())
            yield

    def _begin(self, _module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Note the tokens of a forward pass, and read the hooks in a pass of their own if that is needed."""
        if self._is_reading:
            return
        self._token_ids = args[0] if args else kwargs.get("input_ids")
        self._offset = _n_cached(kwargs.get("past_key_values"))
        for tensors in (self._read, self._outputs, self._changes):
            tensors.clear()
        if not self.reads_first:
            return
        if self._offset:
            raise ConfigError("a dictionary of several hooks needs the whole row; run the model without a cache")
        self._is_reading = True
        try:
            with alone(), ExitStack() as stack:
                for name in self.hooks.reads:
                    stack.enter_context(self.lm.replace(name, self._look(name)))
                self.lm.module(*args, **(kwargs | {"use_cache": False, "past_key_values": None}))
        finally:
            self._is_reading = False

    def _look(self, name: str) -> Callable[[Tensor], Tensor]:
        def note(x: Tensor) -> Tensor:
            self._read[name] = x.clone()  # some models overwrite it later
            return x

        return note

    def _rewrite(self, target: str) -> Callable[[Tensor], Tensor]:
        """Return the function that gives the new activation at a hook."""

        def act(y: Tensor) -> Tensor:
            if self._is_reading:
                return y
            if self.in_place:
                self._read[target] = y
            if missing := [name for name in self.hooks.reads if name not in self._read]:
                raise target_first(missing[0], target)
            position = torch.arange(y.shape[1], device=y.device) + self._offset
            chosen = self._chosen(y, position, target)
            if self.in_place or not (self._outputs or self._changes):
                self._compute(chosen, position)
            new = y if self.error_term else torch.where(chosen[..., None], _as(y, self._outputs[target], target), y)
            return new + _as(y, self._changes[target], target) if self.edits else new

        return act

    def _compute(self, chosen: Bool[Tensor, "*batch pos"], position: Int[Tensor, " pos"]) -> None:
        """Compute the reconstruction at each hook, and what the edits add to its activation."""
        x = together(self._read, self.hooks.reads)
        if isinstance(self.dictionary, nn.Module):
            self.dictionary = on_device(self.dictionary, x.device)
        d = self.dictionary
        d.check_input(x)
        if not self.error_term:
            self._outputs.update(zip(self.hooks.writes, apart(d(x), d.writes), strict=True))
        if self.edits:
            at = [self._named(edit, position, chosen) for edit in self.edits]
            self._changes.update(zip(self.hooks.writes, apart(d.change(x, self.edits, at), d.writes), strict=True))

    def _chosen(
        self, y: Float[Tensor, "batch pos d"], position: Int[Tensor, " pos"], target: str
    ) -> Bool[Tensor, "*batch pos"]:
        """Return the positions that may change: `keep`, or those on which the dictionary was trained."""
        origin = self.dictionary.origin
        if self.keep is not None:
            if self.keep.shape != y.shape[:2]:
                raise ShapeError(
                    f"keep is {list(self.keep.shape)}; {target} is [batch pos d] = {list(y.shape)} in this forward pass"
                )
            return self.lm.as_run(self.keep.to(y.device))
        chosen = ~torch.isin(position, position.new_tensor(origin.excluded_positions))
        if self._token_ids is not None and self._token_ids.shape == y.shape[:2]:
            special = sorted(self.lm.special_ids | set(origin.excluded_token_ids))
            chosen = chosen & ~torch.isin(self._token_ids.to(y.device), position.new_tensor(special))
        return chosen

    def _named(
        self, edit: PositionedEdit, position: Int[Tensor, " pos"], chosen: Bool[Tensor, "*batch pos"]
    ) -> Bool[Tensor, "*_batch pos"]:
        """Return where an edit acts: at the positions it names, or at the chosen ones if it names none."""
        named = edit.positions
        if named is None:
            return chosen
        if isinstance(named, slice):
            span = range(*named.indices(self.lm.n_ctx))  # up to millions of positions in some models
            here = (position >= span.start) & (position < span.stop) & ((position - span.start) % span.step == 0)
        else:
            n = self.lm.row_length or int(position[-1]) + 1
            if beyond := [i for i in named if i >= n]:
                raise ShapeError(f"{edit} names position {beyond[0]}; this row has positions 0 to {n - 1}")
            here = torch.isin(position, position.new_tensor(named))
        return here & chosen if self.keep is not None else here


def target_first(hook: str, target: str) -> HookError:
    """Return the error for a model that computes `target` before `hook`."""
    return HookError(f"the model computes {target} before {hook}, from which the dictionary predicts it")


def _n_cached(past: Any) -> int:
    """Return how many tokens a key-value cache holds."""
    length = getattr(past, "get_seq_length", None)
    return 0 if length is None else int(length())


def _as(y: Float[Tensor, "batch pos d"], new: Tensor, hook: str) -> Float[Tensor, "batch pos d"]:
    """Return a dictionary's output in the dtype of the activation y. Raise ShapeError if their shapes differ."""
    if new.shape != y.shape:
        raise ShapeError(f"the dictionary gives {list(new.shape)}; {hook} of this model is {list(y.shape)}")
    return new.to(y.dtype)
