"""A stream gives each activation of the text once an epoch, mixed, from any batch on, and can be opened again."""

import itertools
import threading
from collections import Counter
from importlib import import_module

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import saelens_lite as sl
from saelens_lite.cache import Source, TensorSource, open_source
from saelens_lite.errors import ConfigError, HookError, TextError
from saelens_lite.tokens import Document, PythonDocs, TokenRows, is_held_out, name_of, named_text, token_rows

HOOKS = ["blocks.1.hook_resid_pre", "blocks.2.hook_mlp_out"]
N = 192  # positions of the text that count


@pytest.fixture(scope="module")
def rows(random_lm, documents) -> TokenRows:
    return token_rows(random_lm, documents, n_ctx=16, n_tokens=N)


@pytest.fixture(scope="module")
def seen_by_hooks(random_lm, rows) -> dict[str, torch.Tensor]:
    """Return the activations at each counted position, computed without the stream: {hook: [N d_in]}."""
    return {hook: x[rows.keep] for hook, x in random_lm.run(rows, HOOKS).items()}


@pytest.fixture(scope="module")
def stream(random_lm, rows):
    """stream(buffer_tokens=…, …): a stream of the rows."""

    def make(text=rows, hooks=HOOKS, **settings):
        return sl.ActivationStream(random_lm, text, hooks, **{"buffer_tokens": 64, "batch_tokens": 48} | settings)

    return make


def take(n, batches):
    return list(itertools.islice(batches, n))


def joined(batches, hook=HOOKS[0]):
    return torch.cat([batch[hook] for batch in batches])


def places(x: torch.Tensor, among: torch.Tensor) -> list[int]:
    """Return the row of `among` that equals each row of x up to rounding. Fail unless exactly one does."""
    nearest = torch.cdist(x, among, compute_mode="donot_use_mm_for_euclid_dist").topk(2, largest=False)
    assert nearest.values[:, 0].max() < 1e-4
    assert nearest.values[:, 1].min() > 1e-2
    return nearest.indices[:, 0].tolist()


def test_it_is_a_source(stream):
    assert isinstance(stream(), Source)
    assert stream().n_tokens is None
    assert stream().d_in(HOOKS[1]) == 48


@pytest.mark.parametrize("batch_size", [1, 50, 500])
@pytest.mark.parametrize("block", [2, 24, 96, N, 3 * N])
def test_every_position_once_an_epoch(stream, seen_by_hooks, block, batch_size):
    source = stream(buffer_tokens=2 * block)
    epochs = max(2, 2 * block // N)
    n_rows = epochs * N + block // 2  # all of the blocks that fill these epochs, and half of the block behind them
    batches = take(-(-n_rows // batch_size), source.batches(HOOKS, batch_size, seed=3))
    assert {(*batch, *x.shape) for batch in batches for x in batch.values()} == {(*HOOKS, batch_size, 48)}
    found = places(joined(batches), seen_by_hooks[HOOKS[0]])
    assert found == places(joined(batches, HOOKS[1]), seen_by_hooks[HOOKS[1]])  # the hooks stay side by side
    counts = Counter(found[:n_rows])
    beyond = [counts[place] - epochs for place in range(N)]
    assert set(beyond) <= set(range(max(1, block // N) + 1))
    assert sum(beyond) == block // 2


def test_blocks_that_do_not_fit_into_the_text(stream, seen_by_hooks):
    found = places(joined(take(40, stream(buffer_tokens=71).batches(HOOKS[:1], 50, seed=0))), seen_by_hooks[HOOKS[0]])
    n_whole = (2000 - 17) // 35 * 35  # rows of the blocks that were used up
    counts = Counter(found[: 17 + n_whole])
    assert min(counts.values()) >= n_whole // N
    assert max(counts.values()) <= n_whole // N + 2
    assert len(counts) == N


def test_neighbours_are_mixed(stream, rows, seen_by_hooks):
    """A batch holds positions of the whole block and the one before, not a stretch of the text."""
    found = places(joined(take(1, stream(buffer_tokens=N).batches(HOOKS[:1], 96, seed=0))), seen_by_hooks[HOOKS[0]])
    row_of = rows.keep.nonzero()[:, 0][torch.tensor(found)].tolist()
    neighbours = sum(a == b for a, b in itertools.pairwise(row_of))
    assert neighbours < 30  # of 95, when rows have 15 positions and a block has 7
    assert found != sorted(found)


@given(
    buffer_tokens=st.sampled_from([10, 30, 129, N, 3 * N]),
    batch_tokens=st.sampled_from([40, 10**6]),
    batch_size=st.sampled_from([7, 64, 300]),
    first_row=st.integers(0, 400),
)
def test_a_reader_may_begin_anywhere(stream, buffer_tokens, batch_tokens, batch_size, first_row):
    start = first_row // batch_size
    source = stream(buffer_tokens=buffer_tokens, batch_tokens=batch_tokens)
    whole = joined(take(start + 2, source.batches(HOOKS, batch_size, seed=1)))
    assert torch.equal(joined(take(2, source.batches(HOOKS, batch_size, 1, start))), whole[start * batch_size :])


@pytest.mark.parametrize("start", [0, 3])
def test_the_batches_of_several_processes_are_those_of_one(stream, start):
    source = stream(buffer_tokens=129)
    batches = take(8, source.batches(HOOKS, 60, 1, start))
    ranks = [take(8, source.batches(HOOKS, 60, 1, start, rank, 3)) for rank in range(3)]
    for batch, *parts in zip(batches, *ranks, strict=True):
        for hook in HOOKS:
            assert torch.equal(torch.cat([part[hook] for part in parts]), batch[hook])


def test_statistics_first_or_not_makes_no_difference(stream):
    plain, asked = stream(), stream()
    statistics = asked.statistics(HOOKS[1])
    for _ in range(2):  # the second time the block that was looked at is gone
        assert torch.equal(*(joined(take(9, s.batches(HOOKS, 20, seed=0)), HOOKS[1]) for s in (plain, asked)))
    assert torch.equal(asked.statistics(HOOKS[1]).mean, statistics.mean)


def test_statistics_are_those_of_the_first_half_buffer(stream, seen_by_hooks):
    found = stream(buffer_tokens=2 * N).statistics(HOOKS[1])
    x = seen_by_hooks[HOOKS[1]].double()
    torch.testing.assert_close(found.mean.double(), x.mean(0), rtol=1e-4, atol=1e-6)
    assert found.rms_norm == pytest.approx(float(x.square().sum(1).mean().sqrt()), rel=1e-5)


def test_seeds_and_hooks(stream):
    source = stream()
    batches = take(12, source.batches(HOOKS, 25, seed=0))
    assert torch.equal(joined(take(12, source.batches(HOOKS, 25, seed=0))), joined(batches))
    assert not torch.equal(joined(take(12, source.batches(HOOKS, 25, seed=1))), joined(batches))
    (only,) = {tuple(batch) for batch in take(12, source.batches(HOOKS[1:], 25, seed=0))}
    assert only == (HOOKS[1],)
    one = take(12, stream(hooks=HOOKS[0]).batches(HOOKS[:1], 25, seed=0))
    assert torch.equal(joined(one), joined(batches))  # another hook beside it changes nothing


def test_what_is_held_out_is_never_trained_on(stream, seen_by_hooks):
    among = seen_by_hooks[HOOKS[0]]
    held, rest = stream().hold_out(50)
    kept_out = set(places(held.x[HOOKS[0]], among))
    assert isinstance(held, TensorSource)
    assert {tuple(x.shape) for x in held.x.values()} == {(50, 48)}
    assert places(held.x[HOOKS[1]], seen_by_hooks[HOOKS[1]]) == places(held.x[HOOKS[0]], among)
    trained_on = Counter(places(joined(take(20, rest.batches(HOOKS, 50, seed=0))), among))
    assert set(trained_on) == set(range(N)) - kept_out
    assert max(trained_on.values()) - min(trained_on.values()) <= 2
    more_held, less = rest.hold_out(30)
    more_kept_out = set(places(more_held.x[HOOKS[0]], among))
    assert len(kept_out | more_kept_out) == 80
    assert set(places(joined(take(20, less.batches(HOOKS, 50, seed=0))), among)) == set(range(N)) - kept_out - more_kept_out


@pytest.mark.parametrize("n_tokens", [-1, 0, N + 1, 10**12])
def test_what_cannot_be_held_out(stream, n_tokens):
    with pytest.raises(ConfigError, match=r"activations to validate on: the text has .* must be left"):
        stream().hold_out(n_tokens)


def test_all_held_out_leaves_nothing(stream):
    with pytest.raises(ConfigError, match="to validate on: the text has 192, and some must be left to train on"):
        stream().hold_out(N)


def test_what_is_no_stream(random_lm, stream):
    with pytest.raises(ConfigError, match="give a string, list, file or dataset, not an iterator"):
        stream(text=iter(["a", "b"]))
    with pytest.raises(HookError, match=r"no hook 'blocks\.9\.hook_resid_pre'"):
        stream(hooks="blocks.9.hook_resid_pre")
    with pytest.raises(ConfigError, match="name at least one hook"):
        stream(hooks=[])
    with pytest.raises(ConfigError, match="buffer_tokens = 3, batch_tokens = 8; expected at least 4 and 1"):
        stream(buffer_tokens=3, batch_tokens=8)
    with pytest.raises(HookError, match=r"the stream reads blocks\.1\.hook_resid_pre, blocks\.2\.hook_mlp_out, not 'x'"):
        stream().batches(["x"], 8, 0)
    with pytest.raises(TextError, match="no text"):
        stream(text=[]).statistics(HOOKS[0])


def test_a_text_that_can_be_read_only_once_says_so(stream):
    class Once:
        def __init__(self):
            self.items = iter(["some words and then some more " * 3])

        def __iter__(self):
            return self.items

    with pytest.raises(TextError, match="no text"):
        take(100, stream(text=Once()).batches(HOOKS, 10, 0))


def test_threads_end_with_the_reader(stream):
    before = threading.enumerate()
    batches = stream().batches(HOOKS, 10, 0)
    next(batches)
    batches.close()
    assert threading.enumerate() == before


def test_a_stream_of_a_file_is_found_again(lm, tmp_path, monkeypatch):
    text = tmp_path / "book.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 30)
    monkeypatch.chdir(tmp_path)
    settings = {"text_config": sl.TextConfig(n_ctx=32, bos="none"), "buffer_tokens": 128, "batch_tokens": 64}
    _, source = sl.ActivationStream(lm, text.relative_to(tmp_path), HOOKS, **settings, text_name="a book").hold_out(20)
    description, batches = source.describe(), joined(take(9, source.batches(HOOKS, 25, 0, 4)))
    monkeypatch.chdir("/")
    again = open_source(description)
    assert again.describe() == description
    assert again.origin(HOOKS[0]) == source.origin(HOOKS[0])
    assert again.origin(HOOKS[0]).text == "a book"
    assert torch.equal(joined(take(9, again.batches(HOOKS, 25, 0, 4))), batches)
    with open(text, "a") as file:
        file.write("More.")
    with pytest.raises(ConfigError, match=r"book\.txt is not the text the run was trained on: it has 1,595 bytes now"):
        open_source(description)
    text.unlink()
    with pytest.raises(TextError, match="no text file at"):
        open_source(description)


def test_a_stream_of_the_embedded_corpus_is_found_again(lm, documents, monkeypatch):
    module = import_module("saelens_lite.tokens.python_docs")
    named = tuple(Document(f"topic:{i}", text) for i, text in enumerate(documents * 8))
    monkeypatch.setattr(module, "python_docs", lambda: named)
    held_out = [document for document in named if is_held_out(document.name)]
    assert list(PythonDocs("python-docs:held-out")) == held_out != []
    source = sl.ActivationStream(lm, PythonDocs("python-docs:held-out"), HOOKS[0], buffer_tokens=256)
    in_memory = sl.ActivationStream(lm, held_out, HOOKS[0], buffer_tokens=256)
    again = open_source(source.describe())
    found = [joined(take(2, s.batches(HOOKS[:1], 50, 0))) for s in (source, in_memory, again)]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("name", [*PythonDocs.NAMES, "hf:org/name:config:split", "/somewhere/book.txt"])
def test_texts_with_a_name(name):
    assert name_of(named_text(name)) == name


def test_names_that_stand_for_nothing():
    with pytest.raises(
        TextError, match="no part 'python-docs:tset'; use python-docs, python-docs:train or python-docs:held-out"
    ):
        named_text("python-docs:tset")


def test_a_stream_of_text_in_memory_is_not_found_again(stream):
    assert stream(text=["some words"]).describe() is None
    with pytest.raises(ConfigError, match=r"activations in memory.*; give source="):
        open_source(None)
