"""A source that is interrupted by a signal."""

import signal


class Interrupted:
    """A source whose batch number `at` comes with a signal."""

    def __init__(self, source, at: int, number: signal.Signals = signal.SIGTERM):
        self.source, self.at, self.number = source, at, number

    def __getattr__(self, name):
        return getattr(self.source, name)

    def hold_out(self, n_tokens):
        held, rest = self.source.hold_out(n_tokens)
        return held, Interrupted(rest, self.at, self.number)

    def batches(self, hooks, batch_size, seed, start=0):
        for number, batch in enumerate(self.source.batches(hooks, batch_size, seed, start), start):
            if number == self.at:
                signal.raise_signal(self.number)
            yield batch
