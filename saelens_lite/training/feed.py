"""The batches of a training loop: shuffled activations, and whole rows for dictionaries whose loss has KL."""

from collections.abc import Iterator, Sequence
from typing import Any

from saelens_lite.cache import Batch
from saelens_lite.tokens import TokenRows
from saelens_lite.training.kl import Divergence, ModelOnRows
from saelens_lite.training.trainer import Trainer


class Feed:
    """The batches of dictionaries that are trained together. Close it at the end, which stops threads that read ahead.

    Args:
        activations: shuffled batches, from the present number on.
        source: with `row_batches` and a model, if any dictionary has kl_share.
        hooks: those of all dictionaries.
        seed: of the order of rows.
    """

    def __init__(self, activations: Iterator[Batch], source: Any, hooks: Sequence[str], batch_size: int, seed: int):
        self._activations, self._source = activations, source
        self._hooks, self._batch_size, self._seed = tuple(hooks), batch_size, seed
        self._rows: dict[int, _RowFeed] = {}  # by number of the first batch
        self._batch: Batch = {}

    def read(self, number: int, trainers: Sequence[Trainer]) -> int:
        """Read batch `number` for dictionaries that are in training, and return its most positions."""
        for trainer in trainers:
            trainer.note_phase(number)
        self._batch, sizes = {}, []
        if any(trainer.kl_from is None for trainer in trainers):
            self._batch = next(self._activations)
            sizes.append(len(self._batch[self._hooks[0]]))
        for first in dict.fromkeys(trainer.kl_from for trainer in trainers if trainer.kl_from is not None):
            if first not in self._rows:
                rows = self._source.row_batches(
                    self._batch_size, self._seed, skip=first * self._batch_size, start=number - first
                )
                self._rows[first] = _RowFeed(rows, ModelOnRows(self._source.lm, self._hooks))
            here = [trainer for trainer in trainers if trainer.kl_from == first]
            sizes.append(self._rows[first].read(here))
        return max(sizes)

    def of(self, trainer: Trainer) -> tuple[Batch, Divergence | None]:
        """Return the batch of a dictionary, and the divergence that its loss has in its last share of the tokens."""
        if trainer.kl_from is None:
            return self._batch, None
        rows = self._rows[trainer.kl_from]
        return rows.batch, rows.model.divergence(trainer.hooks.writes)

    def close(self) -> None:
        """Stop reading."""
        for iterator in (self._activations, *(feed.rows for feed in self._rows.values())):
            getattr(iterator, "close", lambda: None)()


class _RowFeed:
    """Whole rows from one place in the text on, and the model that runs on them."""

    def __init__(self, rows: Iterator[TokenRows], model: ModelOnRows):
        self.rows, self.model = rows, model
        self.batch: Batch = {}

    def read(self, trainers: Sequence[Trainer]) -> int:
        """Run the model on the next rows for some dictionaries, and return the number of positions that count."""
        for trainer in trainers:
            self.model.prepare(trainer.hooks.writes)
        self.batch = self.model.read(next(self.rows))
        return len(next(iter(self.batch.values())))
