"""Work on CUDA streams of its own: it is handed over after it is complete, and gives the same numbers as work done at once."""

import itertools
import shutil
import threading
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import saelens_lite as sl
from saelens_lite import cuda_streams
from saelens_lite.cache import TensorSource
from saelens_lite.cache.order import cut_into_batches, prefetched_pools
from saelens_lite.cache.shards import read_chunks
from saelens_lite.cuda_streams import SideStream, to_device, to_host, uploaded
from saelens_lite.errors import CorruptFileError

HOOKS = ["blocks.1.hook_resid_pre", "blocks.2.hook_mlp_out"]
CUDA = torch.device("cuda", 0)


class Mark(NamedTuple):
    """An event after a number of pieces of work."""

    n: int

    def synchronize(self) -> None: ...


class Pretended:
    """Streams that note each call. `done` has the numbers of pieces of work that a stream may rely on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.notes: list[tuple[Any, ...]] = []
        self.main = self.stream("main")
        self.here = threading.local()
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self.stream("side"))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: getattr(self.here, "stream", self.main))
        monkeypatch.setattr(torch.cuda, "stream", self.entered)
        monkeypatch.setattr(
            torch.Tensor, "record_stream", lambda x, stream: self.notes.append(("keeps", stream.name, x.data_ptr()))
        )

    def stream(self, name: str) -> Any:
        pretended = self

        class Stream:
            device = CUDA

            def __init__(self):
                self.name, self.n = name, 0

            def wait_stream(self, other):
                pretended.notes.append((name, "waits for all of", other.name))

            def record_event(self):
                self.n += 1
                pretended.notes.append((name, "marks", self.n))
                return Mark(self.n)

            def wait_event(self, event):
                pretended.notes.append((name, "waits for", event.n))

        return Stream()

    @contextmanager
    def entered(self, stream):
        self.here.stream = stream
        yield
        del self.here.stream

    def work(self, what: object) -> None:
        self.notes.append((torch.cuda.current_stream(CUDA).name, "works on", what))


@pytest.fixture
def pretended(monkeypatch) -> Pretended:
    return Pretended(monkeypatch)


def test_a_pool_is_used_after_the_stream_that_computed_it(pretended):
    ready = threading.Semaphore(0)
    tensors = [torch.full((2, 1), float(i)) for i in range(3)]

    def pools():
        for i, x in enumerate(tensors):
            pretended.work(i)
            ready.release()
            yield {"x": x}, torch.arange(2)

    known = torch.zeros(1)
    with prefetched_pools(pools(), CUDA, [known]) as taken:
        assert ready.acquire(timeout=60)  # in advance
        for i, (pool, order) in enumerate(taken):
            pretended.work(f"batch {i}")
            assert torch.equal(pool["x"], tensors[i])
            of_main = [note for note in pretended.notes if "side" not in note[:2]]  # the other thread notes between them
            last = of_main.index(("main", "works on", f"batch {i}"))
            assert of_main[last - 3 : last] == [
                ("main", "waits for", i + 1),
                ("keeps", "main", pool["x"].data_ptr()),
                ("keeps", "main", order.data_ptr()),
            ]
    begun = [("side", "waits for all of", "main"), ("keeps", "side", known.data_ptr()), ("side", "works on", 0)]
    assert pretended.notes[:3] == begun
    of_side = [note for note in pretended.notes if note[:1] == ("side",)][1:]
    assert of_side == [(*("side", does), n + (does == "marks")) for n in range(3) for does in ("works on", "marks")]


def test_work_after_the_current_stream_waits_for_it(pretended):
    side = SideStream(CUDA)
    pretended.work("activations")
    with side.queue(after_current=True):
        pretended.work("copy")
        mark = side.mark()
    pretended.work("next")
    assert pretended.notes[1:] == [
        ("main", "works on", "activations"),
        ("side", "waits for all of", "main"),
        ("side", "works on", "copy"),
        ("side", "marks", mark.n),
        ("main", "works on", "next"),
    ]


def test_batches_are_uploaded_once_on_a_stream_of_their_own(pretended, monkeypatch):
    def upload(x, device):
        pretended.work("upload")
        return x + 1

    monkeypatch.setattr(cuda_streams, "to_device", upload)
    closed = []

    def batches():
        try:
            yield {"x": torch.zeros(2, 3)}
            yield {"x": torch.ones(2, 3)}
        finally:
            closed.append(True)

    there = uploaded(batches(), CUDA)
    x = next(there)["x"]
    assert torch.equal(x, torch.ones(2, 3))
    assert pretended.notes[1:] == [
        ("side", "works on", "upload"),
        ("side", "marks", 1),
        ("main", "waits for", 1),
        ("keeps", "main", x.data_ptr()),
    ]
    there.close()
    assert closed == [True]


def test_on_a_cpu_nothing_is_moved(cache):
    cpu = torch.device("cpu")
    x = torch.randn(3)
    assert to_host(x) is x
    assert to_device(x, cpu) is x
    batches = iter([{"x": x}])
    assert uploaded(batches, cpu) is batches
    side = SideStream(cpu)
    with side.queue(after_current=True):
        assert side.mark() is None


@pytest.mark.parametrize("start", [0, 1, 5, 9])
def test_a_stream_that_runs_beside_training_gives_the_same_batches(random_lm, documents, start):
    def stream():
        config = sl.TextConfig(n_ctx=16)
        return sl.ActivationStream(random_lm, documents, HOOKS, text_config=config, buffer_tokens=64, batch_tokens=48)

    wanted = list(itertools.islice(stream().batches(HOOKS, 24, 3, start), 8))
    beside = stream()
    for known in (False, True):
        if known:
            beside.statistics(HOOKS[0])  # computes the first block
        first, skip = beside._round_of(start * 24)
        batches = beside._beside(HOOKS, 3, first, skip, 24, slice(0, 24))
        for batch in wanted:
            found = next(batches)
            assert all(torch.equal(found[hook], batch[hook]) for hook in HOOKS)
        batches.close()
    assert not [thread for thread in threading.enumerate() if "prefetch" in thread.name]


@pytest.mark.parametrize("readers", [2, 3, 50])
def test_several_threads_read_the_same_rows(cache, readers):
    chunks = np.random.default_rng(0).permutation(cache._training_chunks).tolist()
    for key in ("tokens", *HOOKS):
        assert torch.equal(read_chunks(cache._shards, chunks, key, readers=readers), read_chunks(cache._shards, chunks, key))


def test_damage_is_found_by_any_of_the_threads(cache_folder, tmp_path):
    copy = shutil.copytree(cache_folder, tmp_path / "cache")
    shard = copy / "shard-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[-500] ^= 1
    shard.write_bytes(content)
    cache = sl.ActivationCache.open(copy)
    with pytest.raises(CorruptFileError, match=r"shard-00002.* does not match its checksum"):
        cache._read(cache._training_chunks, ["tokens", *HOOKS], readers=4)


@pytest.mark.gpu
class TestOnCuda:
    def test_batches_of_a_cache_are_those_on_the_cpu(self, cache):
        wanted = cache.batches(HOOKS, 100, 1)
        batches = cache.batches(HOOKS, 100, 1, device=CUDA)
        for _ in range(25):
            found, right = next(batches), next(wanted)
            assert all(found[hook].device == CUDA for hook in HOOKS)
            assert all(torch.equal(found[hook].cpu(), right[hook]) for hook in HOOKS)
        batches.close()
        wanted.close()

    @pytest.mark.parametrize("where", ["uploaded", "gathered there", "there"])
    def test_batches_of_tensors_are_those_on_the_cpu(self, where):
        source = TensorSource(torch.randn(5000, 16, generator=torch.Generator().manual_seed(0)))
        wanted = source.batches(["x"], 700, 1)
        if where == "uploaded":
            found = uploaded(source.batches(["x"], 700, 1), CUDA)
        elif where == "there":
            found = TensorSource(source.x["x"].cuda()).batches(["x"], 700, 1)
        else:
            found = source.batches(["x"], 700, 1, device=CUDA)
        for _ in range(30):
            batch = next(found)["x"]
            assert batch.device == CUDA
            assert torch.equal(batch.cpu(), next(wanted)["x"])

    def test_a_stream_gives_the_batches_of_its_rounds(self, documents):
        lm = sl.load_model("tiny", device="cuda")

        def stream():
            config = sl.TextConfig(n_ctx=32)
            return sl.ActivationStream(lm, documents, HOOKS, text_config=config, buffer_tokens=128, batch_tokens=64)

        wanted = cut_into_batches(stream()._rounds(HOOKS, 2, 0, 0), 48)
        beside = stream().batches(HOOKS, 48, 2)
        for _ in range(30):
            found, right = next(beside), next(wanted)
            assert all(torch.equal(found[hook], right[hook]) for hook in HOOKS)
        beside.close()

    def test_a_capture_is_that_of_the_cpu_and_the_same_each_time(self, documents, tmp_path):
        caches = {}
        for name, device in {"cpu": "cpu", "a": "cuda", "b": "cuda"}.items():
            lm = sl.load_model("tiny", device=device, dtype="float32")
            caches[name] = sl.capture(lm, documents, HOOKS, tmp_path / name, n_ctx=32, dtype="float32", shard_tokens=101)
        files = [path.name for path in (tmp_path / "a").iterdir()]
        assert [(tmp_path / "a" / file).read_bytes() for file in files] == [
            (tmp_path / "b" / file).read_bytes() for file in files
        ]
        for number in range(len(caches["cpu"].manifest["shards"])):
            on_cpu, on_cuda = (caches[name].read_shard(number) for name in ("cpu", "a"))
            assert torch.equal(on_cpu["tokens"], on_cuda["tokens"])
            for hook in HOOKS:
                torch.testing.assert_close(on_cuda[hook], on_cpu[hook], rtol=1e-2, atol=1e-2)
        for hook in HOOKS:
            rows = torch.cat([caches["a"].read_shard(i)[hook] for i in range(len(caches["a"].manifest["shards"]))]).double()
            statistics = caches["a"].statistics(hook)
            torch.testing.assert_close(statistics.mean.double(), rows.mean(0), rtol=1e-6, atol=1e-6)
            assert statistics.rms_norm == pytest.approx(float(rows.square().sum(1).mean().sqrt()), rel=1e-9)
