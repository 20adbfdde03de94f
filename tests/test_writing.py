"""Shards that threads write beside the model: the bytes of a plain writer, errors for the caller, complete shards kept."""

import base64
import hashlib
import itertools
import json
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from saelens_lite.cache import journal as journals
from saelens_lite.cache import writing
from saelens_lite.cache.journal import Heading, Journal
from saelens_lite.cache.source import Moments
from saelens_lite.cache.writing import ShardWriter
from saelens_lite.errors import CorruptFileError, DiskFullError, NonFiniteError
from saelens_lite.tensor_files import write_tensor_blocks

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.fixture(autouse=True)
def no_thread_left():
    before = threading.enumerate()
    yield
    assert threading.enumerate() == before


def pieces(sizes: list[int], seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Return pieces of activations at two hooks."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "tokens": torch.randint(1000, (n,), generator=generator, dtype=torch.int32),
            "b.hook": torch.randn(n, 37, generator=generator) * 3 + 1,
            "a.hook": torch.randn(n, 6, generator=generator),
        }
        for n in sizes
    ]


def heading(shard_tokens: int, n_kept: int = 0, first_shard: int = 0) -> Heading:
    return Heading(
        n_rows=1, n_kept=n_kept, rows_sha256="0" * 64, first_shard=first_shard, shard_tokens=shard_tokens, after=None
    )


def written(folder: Path, given, shard_tokens: int, dtype: torch.dtype) -> ShardWriter:
    """Return a writer that has written all pieces."""
    with ShardWriter(folder, shard_tokens, dtype) as writer:
        writer.begin(Journal(folder.with_name("journal.jsonl"), heading(shard_tokens)))
        for piece in given:
            writer.add(piece)
    return writer


def journal(folder: Path) -> list[dict]:
    path = folder.with_name("journal.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()[1:]] if path.exists() else []
    for line in lines:
        line["sums"] = {hook: np.frombuffer(base64.b64decode(x), "<f8").tolist() for hook, x in line["sums"].items()}
    return lines


def plainly(folder: Path, given, shard_tokens: int, dtype: torch.dtype) -> tuple[list[dict], dict[str, tuple]]:
    """Write the same shards one by one with safetensors, and return their facts and the sums of each shard."""
    whole = {key: torch.cat([piece[key] for piece in given]) for key in given[0]}
    facts, moments = [], []
    for number, start in enumerate(range(0, len(whole["tokens"]), shard_tokens)):
        shard = {key: x[start : start + shard_tokens] for key, x in whole.items()}
        shard = {key: (x if key == "tokens" else x.to(dtype)).contiguous() for key, x in shard.items()}
        crc = [[zlib.crc32(x.view(torch.uint8).numpy().tobytes()) for x in shard[key].split(128)] for key in sorted(shard)]
        path = folder / f"shard-{number:05d}.safetensors"
        save_file(shard | {"checksums": torch.tensor(crc)}, path)
        content = path.read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        facts.append({"file": path.name, "n_tokens": len(shard["tokens"]), "bytes": len(content), "sha256": sha256})
        sums = {}
        for hook in shard.keys() - {"tokens"}:
            exact = shard[hook].double()
            sums[hook] = [*exact.sum(0).tolist(), float(exact.square().sum())]
        moments.append(sums)
    return facts, moments


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("sizes", "shard_tokens"),
    [([100, 1, 28, 300], 101), ([9000, 9000, 7000], 20_000), ([50] * 6, 100), ([5000, 30_000], 8192), ([70], 1000)],
    ids=str,
)
def test_the_bytes_are_those_of_a_plain_writer(tmp_path, dtype, sizes, shard_tokens):
    (tmp_path / "plain").mkdir()
    given = pieces(sizes)
    facts, moments = plainly(tmp_path / "plain", given, shard_tokens, dtype)
    writer = written(tmp_path / "shards", given, shard_tokens, dtype)
    for path in (tmp_path / "plain").iterdir():
        assert path.read_bytes() == (tmp_path / "shards" / path.name).read_bytes()
    assert [line["facts"] for line in journal(writer.folder)] == facts
    for line, sums in zip(journal(writer.folder), moments, strict=True):
        assert line["sums"].keys() == sums.keys()
        for hook, wanted in sums.items():
            assert line["sums"][hook] == pytest.approx(wanted, rel=1e-12, abs=1e-9)


@given(cuts=st.lists(st.integers(0, 60), max_size=6), shard_tokens=st.integers(1, 50))
def test_the_cuts_between_pieces_do_not_matter(tmp_path_factory, cuts, shard_tokens):
    (whole,) = pieces([60])
    bounds = [0, *sorted(cuts), 60]
    parts = [{key: x[a:b] for key, x in whole.items()} for a, b in itertools.pairwise(bounds)]
    a, b = (tmp_path_factory.mktemp("x") / "shards" for _ in range(2))
    written(a, [whole], shard_tokens, torch.float16)
    written(b, parts, shard_tokens, torch.float16)
    assert [(p.name, p.read_bytes()) for p in sorted(a.iterdir())] == [(p.name, p.read_bytes()) for p in sorted(b.iterdir())]
    assert [line["sums"] for line in journal(a)] == [line["sums"] for line in journal(b)]


NAMES = ["tokens", "blocks.0.hook", 'a "quoted" \\ name', "größe", "control\x07", "del\x7f", "z", "i16", "i8", "u8", "bool"]


def test_tensors_in_blocks_have_the_bytes_of_safetensors(tmp_path):
    dtypes = [torch.int32, torch.float16, torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.float16]
    dtypes += [torch.int16, torch.int8, torch.uint8, torch.bool]
    blocks = {
        name: [torch.arange(n * 3).reshape(n, 3).to(dtype) for n in (4, 1, 7)]
        for name, dtype in zip(NAMES, dtypes, strict=True)
    }
    blocks["one axis"] = [torch.arange(5)]
    found = write_tensor_blocks(tmp_path / "a", blocks)
    save_file({name: torch.cat(parts) for name, parts in blocks.items()}, tmp_path / "b")
    content = (tmp_path / "a").read_bytes()
    assert content == (tmp_path / "b").read_bytes()
    assert found == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e6])
@pytest.mark.parametrize("at", [0, 3, 7])
def test_a_number_that_is_not_finite_is_an_error_and_complete_shards_stay(tmp_path, bad, at):
    given = pieces([30] * 8)
    given[at]["a.hook"][29, 5] = bad
    largest = f"{bad:.3g}".replace("+", r"\+")
    with pytest.raises(NonFiniteError, match=rf"a\.hook: NaN, .* too large for torch\.float16 \(largest {largest}"):
        written(tmp_path / "shards", given, 60, torch.float16)
    complete = at // 2
    assert [line["facts"]["file"] for line in journal(tmp_path / "shards")] == [
        f"shard-{i:05d}.safetensors" for i in range(complete)
    ]
    assert len(list((tmp_path / "shards").iterdir())) == complete


def test_shards_that_are_complete_early_wait_for_those_before_them(tmp_path, monkeypatch):
    write, later_ones = writing.write_shard, threading.Semaphore(0)

    def slow_first(path, *given):
        if path.name == "shard-00000.safetensors":
            assert later_ones.acquire(timeout=60)
            assert later_ones.acquire(timeout=60)
        facts = write(path, *given)
        later_ones.release()
        return facts

    monkeypatch.setattr(writing, "write_shard", slow_first)
    writer = written(tmp_path / "shards", pieces([300]), 100, torch.float32)
    names = [f"shard-{i:05d}.safetensors" for i in range(3)]
    assert (
        [line["facts"]["file"] for line in journal(writer.folder)] == names == sorted(p.name for p in writer.folder.iterdir())
    )


@pytest.mark.parametrize("failing", [0, 1, 3])
def test_a_full_disk_ends_the_capture_and_keeps_the_shards_before(tmp_path, monkeypatch, failing):
    write = writing.write_shard

    def full(path, *given):
        if path.name == f"shard-{failing:05d}.safetensors":
            raise DiskFullError(f"{path} cannot be written")
        return write(path, *given)

    monkeypatch.setattr(writing, "write_shard", full)
    with pytest.raises(DiskFullError, match=f"shard-{failing:05d}"):
        written(tmp_path / "shards", pieces([50] * 12), 100, torch.float32)
    kept = [f"shard-{i:05d}.safetensors" for i in range(failing)]
    assert [line["facts"]["file"] for line in journal(tmp_path / "shards")] == kept
    assert sorted(path.name for path in (tmp_path / "shards").iterdir()) == kept


def test_an_interrupt_keeps_the_shards_that_are_being_written(tmp_path, monkeypatch):
    write, interrupted = writing.write_shard, threading.Event()

    def slow(*given):
        assert interrupted.wait(60)
        return write(*given)

    monkeypatch.setattr(writing, "write_shard", slow)

    def given():
        yield from pieces([250])
        interrupted.set()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        written(tmp_path / "shards", given(), 100, torch.float32)
    assert len(journal(tmp_path / "shards")) == 2
    assert Journal.read(tmp_path / "journal.jsonl", tmp_path / "shards").n_done == 200


@pytest.mark.parametrize(("n_bytes", "most"), [(1, 1), (1 << 30, 4), (2 * 100 * (4 + 4 * 43), 2)])
def test_few_shards_wait_to_be_written(tmp_path, monkeypatch, n_bytes, most):
    write, lock, now, seen = writing.write_shard, threading.Lock(), set(), []
    all_there = threading.Event()

    def counted(path, *given):
        with lock:
            now.add(path.name)
            seen.append(len(now))
            if len(now) == most:
                all_there.set()
        assert all_there.wait(60)
        facts = write(path, *given)
        with lock:
            now.remove(path.name)
        return facts

    monkeypatch.setattr(writing, "write_shard", counted)
    monkeypatch.setattr(writing, "SHARDS_BYTES", n_bytes)
    writer = written(tmp_path / "shards", pieces([100] * 12), 100, torch.float32)
    assert max(seen) == most
    assert len(journal(writer.folder)) == 12


def test_a_second_error_does_not_replace_the_first(tmp_path, monkeypatch, caplog):
    def fail(*given):
        raise DiskFullError("the disk is full")

    def given():
        yield from pieces([100])
        raise KeyboardInterrupt

    monkeypatch.setattr(journals, "append_line", fail)
    with pytest.raises(KeyboardInterrupt):
        written(tmp_path / "shards", given(), 100, torch.float32)
    assert "shard-00000.safetensors is not in its journal: the disk is full" in caplog.text
    assert not list((tmp_path / "shards").iterdir())


def test_damaged_sums_in_a_journal_are_refused(tmp_path):
    for name, sums, match in (
        ("a", [torch.zeros(3), torch.zeros(2)], "the sums of x have 2 entries, those before have 3; delete it"),
        ("b", [torch.tensor([0.0, torch.nan])], "the sums of x cannot be read: .*NaN or infinity.*; delete it"),
    ):
        of_section = Journal(tmp_path / name, heading(64))
        for total in sums:
            moments = Moments(len(total))
            moments.add_sums(5, total, 1.0)
            of_section.note({"n_tokens": 5}, {"x": moments})
        with pytest.raises(CorruptFileError, match=f"{tmp_path / name} is damaged: {match}"):
            journals.merged([of_section], ["x"])
