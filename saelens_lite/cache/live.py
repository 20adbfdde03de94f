"""Activations straight from the model, without a disk, shuffled in a ring buffer.

The buffer has two halves, and each block of activations fills one of them. A round trains on a random half of the newest block
and the remaining half of the block before it. Then the next block overwrites the older half. So each activation is used once
per epoch, batches mix neighbouring blocks, no memory is moved or allocated, and the content of the buffer at any time can be
computed again.
"""

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from saelens_lite.cache.capture import keys_of, origin_of
from saelens_lite.cache.dealt import dealt_activations, unread_batches
from saelens_lite.cache.described import StreamDescription, computing, described
from saelens_lite.cache.order import Pool, cut_into_batches, part_of, prefetched_pools
from saelens_lite.cache.resumed import SAME_SOURCE, refuse_others
from saelens_lite.cache.source import Batch, Moments, Statistics, TensorSource
from saelens_lite.cache.whole_rows import row_batches, row_pools
from saelens_lite.config import Origin, TextConfig
from saelens_lite.cuda_streams import to_device
from saelens_lite.errors import ConfigError, HookError, SourceChangedError, TextError, near_matches
from saelens_lite.files import check_fits_memory
from saelens_lite.model import AnyModel, LanguageModel, Models, as_model
from saelens_lite.model.passes import default_batch_tokens
from saelens_lite.processes import ALONE, Team, team
from saelens_lite.schemas import checked
from saelens_lite.seeds import permutation
from saelens_lite.tokens import RowBlocks, RowHash, RowRecord, Text, TokenRows, check_file, name_of, named_text, with_mask

log = logging.getLogger(__name__)


class ActivationStream:
    """The activations of a text at hooks, computed during training. When the text ends, it is read again.

    Memory holds buffer_tokens activations of each hook, in the model's dtype, and on CUDA as many that are ready to train on.
    Statistics are those of the first half buffer.

    In a team of processes, each runs its own copy of the model on a share of the text's batches, and all exchange their
    activations. So each has the buffer that one process would have, to the byte on devices of one kind. All must make the
    same stream, ask for widths or statistics if any does, and read the same number of batches. With
    `load_model(…, device_map="tp")` they run the model together on all batches.

    Several models, as {"base": lm, "chat": lm2}, read the same token ids, and the hooks are ports, such as
    "base:blocks.3.hook_mlp_out". A hook without a model stands for it in every model. The models may be on different devices;
    the buffer is on that of the first one.

    Raises:
        HookError, ConfigError: the hook is unknown, or settings do not fit the model.
        TextError: during reading: there is no text, it cannot be read again, or no position is left to train on.
    """

    def __init__(
        self,
        lm: AnyModel | Mapping[str, LanguageModel],
        text: Text | TokenRows,
        hooks: Sequence[str] | str,
        *,
        text_config: TextConfig | None = None,
        attention_mask: Any = None,
        buffer_tokens: int = 65_536,
        batch_tokens: int | None = None,
        text_name: str | None = None,
    ):
        lm = as_model(lm)
        batch_tokens = default_batch_tokens(lm) if batch_tokens is None else batch_tokens
        if buffer_tokens < 4 or batch_tokens < 1:
            raise ConfigError(f"buffer_tokens = {buffer_tokens}, batch_tokens = {batch_tokens}; expected at least 4 and 1")
        self.lm, self.text, self.text_name = lm, with_mask(text, attention_mask), text_name
        self.hooks: Sequence[str] = tuple(keys_of(lm, hooks))
        if not self.hooks:
            raise ConfigError("name at least one hook")
        if isinstance(text, Iterator):
            raise ConfigError("a stream reads its text more than once: give a string, list, file or dataset, not an iterator")
        self.block, self.batch_tokens = buffer_tokens // 2, batch_tokens
        self.n_tokens: int | None = None
        self._n_held_out = 0
        rows = RowBlocks(lm, self.text, text_config)
        self.text_config = rows.config  # with the length of rows, if it is not the model's context
        self._origin = origin_of(lm, rows, text_name)
        self._first: dict[str, Tensor] | None = None  # the first block, if it was computed but not yet trained on
        self._read = RowRecord(0, 0, "")  # the furthest point of the first pass over the text
        self._expected: RowRecord | None = None  # the record of a resumed run, until as much is read again

    def _rows(self) -> RowBlocks:
        return RowBlocks(self.lm, self.text, self.text_config)

    @property
    def _workers(self) -> Team:
        """The processes that share the batches of the model."""
        return ALONE if self.lm.is_shared else team()

    def _read_pieces(self, skip: int, read: RowHash) -> Iterator[tuple[dict[str, Tensor], RowRecord | None]]:
        """Yield the activations of one pass over the text, after the first `skip`, each with the record of the rows so far."""
        return dealt_activations(self.lm, self._rows(), self.hooks, self.batch_tokens, skip, read, self._workers)

    def _pieces(self, skip: int) -> Iterator[dict[str, Tensor]]:
        """Yield the activations to train on, after the first `skip`, epoch after epoch, without the held-out ones."""
        return self._epochs(skip, self._read_pieces)

    def _read_pools(self, skip: int, read: RowHash) -> Iterator[tuple[TokenRows, RowRecord | None]]:
        """Yield the whole rows of one pass over the text, after the first `skip` positions, in pools; see `_read_pieces`."""
        is_empty = True
        with closing(unread_batches(self.lm, self._rows(), self.batch_tokens, skip, read)) as batches:
            for pool in row_pools(batches, self.lm.pad_id):
                is_empty = False
                yield pool
        if is_empty and skip == self._n_held_out:
            raise TextError(f"{self._n_held_out:,} positions of the text are held out, and no whole row is left to train on")

    def row_batches(self, n_positions: int, seed: int, skip: int = 0, start: int = 0) -> Iterator[TokenRows]:
        """Yield whole token rows of the text, epoch after epoch without end, in batches, from number `start` on.

        A batch has as many rows as have at most n_positions positions that count, or one row with more. Rows that hold
        validation data are left out. The rows are shuffled by the seed, about 65,536 positions at a time.

        skip: Leave out rows with one of this many first positions, which earlier training has read.
        """
        with closing(self._epochs(skip, self._read_pools)) as pools:
            yield from itertools.islice(row_batches(pools, n_positions, seed), start, None)

    def _epochs(self, skip: int, read_once: Callable[[int, RowHash], Iterator[tuple[Any, RowRecord | None]]]) -> Iterator[Any]:
        """Yield what `read_once` reads of the text, after the first `skip` positions, epoch after epoch.

        The held-out positions are skipped in each. The first epoch is compared with the record of a resumed run.
        """
        first = None
        while True:
            read = RowHash(self._expected if first is None else None)
            try:
                with closing(read_once(self._n_held_out + skip, read)) as pieces:
                    for piece, record in pieces:
                        if first is None and record is not None:
                            self._note(record)
                        yield piece
            except SourceChangedError as error:
                raise self._other_text(error) from None
            if first is None:
                self._note(read.record)
            elif read.record != first:
                log.warning(
                    "the text has changed since it was first read (%d rows, now %d): held-out positions may be trained on, and "
                    "a resumed run will not give the same bytes",
                    first.n_rows,
                    read.n_rows,
                )
            first = first or read.record
            n = read.n_kept - self._n_held_out
            if n <= 0:
                raise TextError(f"{self._n_held_out:,} positions of the text are held out, and none is left to train on")
            skip = max(0, skip - n) % n  # skips whole epochs without reading them

    def _note(self, record: RowRecord) -> None:
        """Record how far the first pass over the text went."""
        self._expected = None
        self._read = max(self._read, record, key=lambda record: (record.n_kept, record.ended))

    def _other_text(self, error: SourceChangedError) -> SourceChangedError:
        name = self.text_name or name_of(self.text) or "the text that was given"
        return SourceChangedError(f"{name} is not the text the run was trained on: {error}; {SAME_SOURCE}")

    def _first_block(self) -> dict[str, Tensor]:
        if self._first is None:
            self._first = _Filler(self._pieces(0)).fill(None, self.block, slice(0, self.block))
        return self._first

    def d_in(self, hook: str) -> int:
        """Return the width of the activations at a hook. Raise HookError if the stream does not read it."""
        if hook not in self.hooks:
            raise HookError(f"the stream reads {', '.join(self.hooks)}, not {hook!r}{near_matches(hook, self.hooks)}")
        return self._first_block()[hook].shape[1]

    def statistics(self, hook: str) -> Statistics:
        """Return the mean and root mean square norm of the first half buffer."""
        moments = Moments(self.d_in(hook))
        moments.add(self._first_block()[hook])
        return moments.statistics()

    def sample(self) -> Batch:
        """Return the activations that statistics are of: the first half buffer."""
        return self._first_block()

    def origin(self, hook: str) -> Origin:
        """Return the model and text that the activations come from."""
        return self._origin

    def batches(
        self, hooks: Sequence[str], batch_size: int, seed: int, start: int = 0, rank: int = 0, world: int = 1
    ) -> Iterator[Batch]:
        """Return batches from the buffer, epoch after epoch without end, from number `start` on; see `Source.batches`."""
        part = part_of(batch_size, rank, world)
        for hook in hooks:
            self.d_in(hook)
        first, skip = self._round_of(start * batch_size)
        if self.lm.device.type == "cuda" and team().world == 1:  # collectives need the order of the reader's own thread
            return self._beside(hooks, seed, first, skip, batch_size, part)
        return cut_into_batches(self._rounds(hooks, seed, first, skip), batch_size, part)

    def _round_of(self, position: int) -> tuple[int, int]:
        """Return the number of the round that a position belongs to, and the number of positions before it in the round."""
        of_first_round = self.block // 2
        if position < of_first_round:
            return 0, position
        before, skip = divmod(position - of_first_round, self.block)
        return 1 + before, skip

    def _beside(self, hooks: Sequence[str], seed: int, first: int, skip: int, batch_size: int, part: slice) -> Iterator[Batch]:
        """Yield the same batches on CUDA. A thread runs the model a round ahead, on a stream of its own."""

        def pools() -> Iterator[Pool]:
            for ring, order in self._rounds(hooks, seed, first, skip):
                rows = to_device(order, self.lm.device)  # copied, because the next round overwrites the ring
                yield {hook: x.index_select(0, rows) for hook, x in ring.items()}, torch.arange(len(rows), device=rows.device)

        with prefetched_pools(pools(), self.lm.device, (self._first or {}).values()) as ready:
            yield from cut_into_batches(ready, batch_size, part)

    def _rounds(self, hooks: Sequence[str], seed: int, first: int, skip: int) -> Iterator[Pool]:
        """Yield the ring buffer and its rows to train on, round by round, from round `first` without its first `skip` rows."""
        start, ring = max(0, first - 1), None
        known, self._first = self._first, None
        if start or known is None:
            filler = _Filler(self._pieces(start * self.block))
        else:
            filler = _Filler(itertools.chain([known], self._pieces(self.block)))
        for number in itertools.count(start):
            place = number % 2 * self.block
            ring = filler.fill(ring, 2 * self.block, slice(place, place + self.block))
            if number >= first:
                yield {hook: ring[hook] for hook in hooks}, self._round(seed, number)[skip:]
                skip = 0

    def _round(self, seed: int, number: int) -> Int[Tensor, " n"]:
        """Return the shuffled rows of a round: half of the newest block and the other half of the block before."""
        half = self.block // 2
        rows = permutation(self.block, seed, "block", number)[:half] + number % 2 * self.block
        if number:
            old = permutation(self.block, seed, "block", number - 1)[half:] + (number - 1) % 2 * self.block
            rows = torch.cat([rows, old])
        return rows[permutation(len(rows), seed, "round", number)]

    def hold_out(self, n_tokens: int) -> tuple[TensorSource, "ActivationStream"]:
        """Return the first n_tokens activations of the stream, to validate on, and the stream without them.

        They come from random rows near the beginning of the text.

        Raises:
            ConfigError: the text has fewer activations, or n_tokens is 0.
        """
        held, n = [], 0
        with closing(self._read_pieces(self._n_held_out, RowHash())) as pieces:
            while n <= n_tokens and (piece := next(pieces, ({}, None))[0]):
                held.append({hook: piece[hook][: n_tokens - n] for hook in self.hooks})
                n += len(piece[self.hooks[0]])
        if not 0 < n_tokens < n:
            raise ConfigError(f"{n_tokens:,} activations to validate on: the text has {n:,}, and some must be left to train on")
        whole = {hook: torch.cat([piece[hook] for piece in held]) for hook in self.hooks}
        return TensorSource(whole, origin=self._origin), self._without(self._n_held_out + n_tokens)

    def _without(self, n_held_out: int) -> "ActivationStream":
        """Return the stream without its first positions that count."""
        rest = type(self)(
            self.lm, self.text, self.hooks, text_config=self.text_config, buffer_tokens=2 * self.block,
            batch_tokens=self.batch_tokens, text_name=self.text_name,
        )  # fmt: skip
        rest._n_held_out = n_held_out
        return rest

    def describe(self) -> dict[str, Any] | None:
        """Return a description that `reopen` takes, or None if the text is only in memory."""
        text = name_of(self.text)
        if text is None:
            return None
        return {
            "text": text,
            "text_bytes": _n_bytes(self.text),
            "text_config": self.text_config.model_dump(mode="json"),
            "held_out": self._n_held_out,
            **(
                {"models": {name: described(lm) for name, lm in self.lm.models.items()}}
                if isinstance(self.lm, Models)
                else {"model": described(self.lm)}
            ),
            "stream": {
                "hooks": list(self.hooks),
                "buffer_tokens": 2 * self.block,
                "batch_tokens": self.batch_tokens,
                "text_name": self.text_name,
            },
        }

    def record(self) -> dict[str, Any]:
        """Return the model, the settings of the stream and the token rows read so far, for a resumed run."""
        return self._settings() | {"rows": (self._expected or self._read)._asdict()}

    def expect(self, record: dict[str, Any]) -> None:
        """Compare the stream with a record: the model and settings now, the text as soon as as many rows are read.

        Raises:
            SourceChangedError: they differ.
        """
        refuse_others(record, self._settings(), "this is not the stream")
        self._expected, self._first = RowRecord(**record["rows"]), None

    def _settings(self) -> dict[str, Any]:
        return {
            "kind": "a stream",
            "weights": self._fingerprint,
            "buffer_tokens": 2 * self.block,
            "batch_tokens": self.batch_tokens,
            "held_out": self._n_held_out,
            **(
                {"models": {name: computing(lm) for name, lm in self.lm.models.items()}}
                if isinstance(self.lm, Models)
                else computing(self.lm)
            ),
        }

    @cached_property
    def _fingerprint(self) -> str:
        return self.lm.fingerprint()

    @classmethod
    def reopen(cls, description: dict[str, Any], device: str | torch.device | None = None) -> "ActivationStream":
        """Return the stream of a description; see `describe`.

        Args:
            device: Device of the model or models, unless they were on several; default: the one in the description.

        Raises:
            ModelNotFoundError, TextError: the model or the text is missing.
            SourceChangedError: the size of the text has changed.
        """
        said = checked("the activations of the run", description, StreamDescription)
        text = named_text(description["text"])
        if isinstance(text, Path):
            check_file(text, TextConfig(**description["text_config"]))
        if _n_bytes(text) != description["text_bytes"]:
            raise SourceChangedError(f"{text} is not the text the run was trained on: it has {_n_bytes(text):,} bytes now")
        if said.model is not None:
            lm = said.model.load(device)
        else:
            same = len({model.device for model in said.models.values()}) == 1
            lm = Models({name: model.load(device if same else None) for name, model in said.models.items()})
        n_bytes = said.stream.buffer_tokens * sum(_n_bytes_at(lm, hook) for hook in said.stream.hooks)
        check_fits_memory(f"a buffer of {said.stream.buffer_tokens:,} activations", n_bytes)
        config = TextConfig(**description["text_config"])
        if config.n_ctx is None:
            config = config.replace(n_ctx=lm.n_ctx)
        return cls(lm, text, text_config=config, **said.stream.model_dump())._without(said.held_out)


def _n_bytes_at(lm: AnyModel, hook: str) -> int:
    """Return the size of an activation at a hook."""
    own, minus = (lm[lm.split(hook).model], lm.split(hook).minus) if isinstance(lm, Models) else (lm, None)
    return own.d_model * (max(own.dtype.itemsize, 4) if minus else own.dtype.itemsize)


def _n_bytes(text: Any) -> int | None:
    return text.stat().st_size if isinstance(text, Path) else None


class _Filler:
    """A copier of pieces of activations, of any size, into consecutive parts of a buffer."""

    def __init__(self, pieces: Iterator[dict[str, Tensor]]):
        self._pieces = pieces
        self._left: dict[str, Tensor] = {}

    def fill(self, buffer: dict[str, Tensor] | None, size: int, place: slice) -> dict[str, Tensor]:
        """Fill the rows `place` of a buffer, and return it. A missing buffer is made with `size` rows."""
        done = place.start
        while done < place.stop:
            piece = self._left or next(self._pieces)
            if buffer is None:
                buffer = {hook: x.new_empty(size, x.shape[1]) for hook, x in piece.items()}
            n = min(place.stop - done, len(next(iter(piece.values()))))
            for hook, x in piece.items():
                buffer[hook][done : done + n] = x[:n]
            self._left = {hook: x[n:] for hook, x in piece.items() if n < len(x)}
            done += n
        return buffer
