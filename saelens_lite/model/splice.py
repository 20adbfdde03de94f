"""A dictionary in the forward passes of models: its output, or edits of its codes, in place of activations."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from saelens_lite.config import Origin
from saelens_lite.devices import float32_products, on_device
from saelens_lite.errors import ConfigError, HookError, ShapeError
from saelens_lite.model.hooks import alone
from saelens_lite.model.port_places import PortPlace, splice_places
from saelens_lite.ports import Port, PortNames, apart, together
from saelens_lite.tokens.template import in_template


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
    """A dictionary at its ports in one or several models, with the tensors of the current forward pass."""

    def __init__(
        self,
        model: Any,
        dictionary: Any,
        edits: PositionedEdit | Sequence[PositionedEdit],
        *,
        ports: PortNames = None,
        error_term: bool | None = None,
        hook: str | None = None,
        keep: Bool[Tensor, "batch pos"] | None = None,
    ):
        self.model, self.dictionary, self.keep = model, dictionary, keep
        self.edits = [edits] if isinstance(edits, PositionedEdit) else list(edits)
        self.error_term = bool(self.edits) if error_term is None else error_term
        if self.edits:
            dictionary.check_edits(self.edits)
        needs_x = not self.error_term or bool(self.edits and dictionary.needs_input(self.edits))
        self.reads, self.writes = splice_places(model, dictionary, hook=hook, ports=ports, reads=needs_x)
        self.in_place = len(self.reads) == 1 and self.reads == tuple(self.writes.values()) and _is_plain(self.reads)
        self.reads_first = needs_x and not _is_plain((*self.reads, *self.writes.values()))  # in a separate pass
        self._acts: dict[tuple[Any, str], Tensor] = {}  # by model and hook
        self._outputs: dict[int, Tensor] = {}  # by write port: the reconstruction
        self._changes: dict[int, Tensor] = {}  # by write port: what the edits add
        self._token_ids: Tensor | None = None
        self._offset = 0  # position of the first token of the pass; not 0 while generating with a cache
        self._is_reading = False

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Rewrite the activations of every forward pass within the block."""
        with ExitStack() as stack:
            for lm in dict.fromkeys(place.lm for place in self.writes.values()):
                beginning = lm.module.register_forward_pre_hook(partial(self._begin, lm), with_kwargs=True)
                stack.callback(beginning.remove)
                if self.reads_first:
                    stack.enter_context(lm.in_whole_rows())
            if not self.in_place and not self.reads_first:
                self._look_at([part for place in self.reads for part in place.parts], stack)
            for number, place in self.writes.items():
                stack.enter_context(place.lm.replace(place.hook, self._rewrite(number, place)))
            yield

    def _begin(self, lm: Any, _module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Note the tokens of a forward pass, and read the hooks in passes of their own if that is needed."""
        if self._is_reading:
            return
        self._token_ids = args[0] if args else kwargs.get("input_ids")
        self._offset = _n_cached(kwargs.get("past_key_values"))
        for tensors in (self._acts, self._outputs, self._changes):
            tensors.clear()
        if not self.reads_first:
            return
        if self._offset:
            raise ConfigError("a dictionary of several hooks needs the whole row; run the model without a cache")
        self._is_reading = True
        try:
            self._read_first(lm, args, kwargs | {"use_cache": False, "past_key_values": None})
        finally:
            self._is_reading = False

    def _read_first(self, lm: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """Read the hooks in one pass of each model over the tokens of a forward pass of `lm`, with nothing replaced."""
        places = [*self.reads, *([] if self.error_term else self.writes.values())]
        parts = dict.fromkeys(part for place in places for part in place.parts)
        for other in dict.fromkeys(other for other, _ in parts):
            if other is not lm and self._token_ids is None:
                raise ConfigError(f"the dictionary also reads {other.name}, which needs token ids; this pass has none")
            moved_args, moved = _moved((args, kwargs), other.device)
            with alone(), ExitStack() as stack, float32_products(other.tf32):
                self._look_at([part for part in parts if part[0] is other], stack)
                other.module(*moved_args, **moved)

    def _look_at(self, parts: Sequence[tuple[Any, str]], stack: ExitStack) -> None:
        """Note the activations at hooks of models until the stack ends."""

        def note(x: Tensor, part: tuple[Any, str]) -> Tensor:
            self._acts[part] = x.clone()  # some models overwrite it later
            return x

        for part in parts:
            lm, hook = part
            stack.enter_context(lm.replace(hook, partial(note, part=part)))

    def _rewrite(self, number: int, place: PortPlace) -> Callable[[Tensor], Tensor]:
        """Return the function that gives the new activation at a write port."""

        def act(y: Tensor) -> Tensor:
            if self.in_place:
                self._acts[place.lm, place.hook] = y
            if missing := [part for read in self.reads for part in read.parts if part not in self._acts]:
                raise target_first(missing[0][1], place.hook)
            position = torch.arange(y.shape[1], device=y.device) + self._offset
            chosen = self._chosen(place, y, position)
            if self.in_place or not (self._outputs or self._changes):
                self._compute(place.lm, y, chosen, position)
            new = y
            if not self.error_term:
                new = torch.where(chosen[..., None], _as(y, self._with_subtracted(self._outputs[number], place), place.hook), y)
            return new + _as(y, self._changes[number], place.hook) if self.edits else new

        return act

    def _with_subtracted(self, output: Tensor, place: PortPlace) -> Tensor:
        """Return the new activation of the model whose activation, less that of another, is reconstructed."""
        return output if place.minus is None else output + self._acts[place.minus, place.hook].to(output.device)

    def _compute(self, lm: Any, y: Tensor, chosen: Bool[Tensor, "*batch pos"], position: Int[Tensor, " pos"]) -> None:
        """Compute the reconstruction at each port, and what the edits add to its activation."""
        if isinstance(self.dictionary, nn.Module):
            self.dictionary = on_device(self.dictionary, y.device)
        d, x = self.dictionary, None
        if self.reads:
            x = together([place.value(self._acts, y.device) for place in self.reads])
            d.check_input(x)
        if not self.error_term:
            self._outputs.update(enumerate(apart(d(x), d.writes)))
        if self.edits:
            at = [self._named(lm, edit, position, chosen).expand(y.shape[:2]) for edit in self.edits]
            self._changes.update(enumerate(apart(d.change(x, self.edits, at), d.writes)))

    def _chosen(
        self, place: PortPlace, y: Float[Tensor, "batch pos d"], position: Int[Tensor, " pos"]
    ) -> Bool[Tensor, "*batch pos"]:
        """Return the positions that may change: `keep`, or those on which the dictionary was trained."""
        origin = self.dictionary.origin
        if self.keep is not None:
            if self.keep.shape != y.shape[:2]:
                raise ShapeError(
                    f"keep is {list(self.keep.shape)}; {place.hook} is [batch pos d] = {list(y.shape)} in this forward pass"
                )
            return place.lm.as_run(self.keep.to(y.device))
        chosen = ~torch.isin(position, position.new_tensor(origin.excluded_positions))
        if self._token_ids is not None and self._token_ids.shape == y.shape[:2]:
            special = sorted(self.model.special_ids | set(origin.excluded_token_ids))
            tokens = self._token_ids.to(y.device)
            chosen = chosen & ~torch.isin(tokens, position.new_tensor(special))
            if origin.excluded_template:
                chosen = chosen & ~in_template(tokens, self.model.template)
        return chosen

    def _named(
        self, lm: Any, edit: PositionedEdit, position: Int[Tensor, " pos"], chosen: Bool[Tensor, "*batch pos"]
    ) -> Bool[Tensor, "*_batch pos"]:
        """Return where an edit acts: at the positions it names, or at the chosen ones if it names none."""
        named = edit.positions
        if named is None:
            return chosen
        if isinstance(named, slice):
            span = range(*named.indices(lm.n_ctx))  # up to millions of positions in some models
            here = (position >= span.start) & (position < span.stop) & ((position - span.start) % span.step == 0)
        else:
            n = lm.row_length or int(position[-1]) + 1
            if beyond := [i for i in named if i >= n]:
                raise ShapeError(f"{edit} names position {beyond[0]}; this row has positions 0 to {n - 1}")
            here = torch.isin(position, position.new_tensor(named))
        return here & chosen if self.keep is not None else here


def _is_plain(places: Sequence[PortPlace]) -> bool:
    """Return whether places can be read and written while a model runs: one or two of one model, not differences."""
    return len({place.lm for place in places}) == 1 and len(places) <= 2 and all(place.minus is None for place in places)


def _moved(value: Any, device: torch.device) -> Any:
    """Return a copy of nested arguments with their tensors on a device."""
    return tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, value)


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
