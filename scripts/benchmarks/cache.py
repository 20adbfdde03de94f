"""Measure the activation cache and the live buffer: speed beside a plain file copy, memory, quality of the shuffle.

    python scripts/benchmarks/cache.py --peer-python /path/to/venv-with-sae-lens/bin/python

Activations are random numbers of width 768; no model runs. With --device cuda they come from the GPU, and batches go there.
Times are medians over rounds in which the contestants take turns. The memory limit is on what the process may allocate
(RLIMIT_DATA), set after the imports; the system's file cache does not count. The quality of the shuffle is the share of pairs
within a batch that come from the same document of 500 tokens.
"""

import argparse
import itertools
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from shared import now, parser, source, write_report

import saelens_lite as sl
from saelens_lite.cache.journal import Heading, Journal, merged
from saelens_lite.cache.order import cut_into_batches
from saelens_lite.cache.stored import FORMAT, MANIFEST
from saelens_lite.cache.writing import ShardWriter
from saelens_lite.files import write_json

D_IN, BATCH = 768, 4096
DOCUMENT = 500

PEER = """
import sys, json, torch
from sae_lens.training.mixing_buffer import mixing_buffer
sizes, batch, n, threads, device = json.loads(sys.argv[1])
torch.set_num_threads(threads)
piece = torch.randn(4096, 768).to(device)
def loader():
    while True:
        yield piece
for size in sizes:
    batches = mixing_buffer(size, batch, loader())
    next(batches)
    start = now(device)
    for _ in range(n // batch):
        next(batches)
    print(json.dumps({"size": size, "tokens_per_s": n / (now(device) - start)}), flush=True)
"""


def write_cache(folder: Path, pieces: Iterator[dict[str, torch.Tensor]], dtype: torch.dtype) -> None:
    """Write a cache of random activations of the hook "x"."""
    folder.mkdir()
    heading = Heading(n_rows=0, n_kept=0, rows_sha256="0" * 64, first_shard=0, shard_tokens=65_536, after=None)
    journal = Journal(folder / "journal.jsonl", heading)
    with ShardWriter(folder, 65_536, dtype) as writer:
        writer.begin(journal)
        for piece in pieces:
            writer.add(piece)
    journal.path.unlink()
    shards, hooks = merged([journal], ["x"])
    manifest = {
        "format": FORMAT, "origin": sl.Origin().model_dump(), "dtype": str(dtype).removeprefix("torch."),
        "hooks": hooks, "shards": shards,
        "tokenizer_sha256": None, "text_sha256": "0" * 64, "n_rows": 0,
    }  # fmt: skip
    write_json(folder / MANIFEST, manifest)


def random_pieces(n: int, device: str) -> Iterator[dict[str, torch.Tensor]]:
    """Yield n activations in pieces of 8,192, with the same numbers in each."""
    x = torch.randn(8192, D_IN, generator=torch.Generator().manual_seed(0)).to(device)
    for _ in range(n // len(x)):
        yield {"tokens": torch.zeros(len(x), dtype=torch.int32), "x": x}


def seconds(work: Callable[[], object], device: str) -> float:
    """Return the seconds that it takes."""
    start = now(device)
    work()
    return now(device) - start


def epoch(cache: sl.ActivationCache, device: str) -> None:
    """Read everything once, in shuffled batches, on the device."""
    for batch in itertools.islice(cache.batches(["x"], BATCH, 0), cache.n_tokens // BATCH):
        batch["x"].to(device)


def copy(source: Path, to: Path) -> None:
    """Write the same bytes to the disk with the system's own tools."""
    for file in source.iterdir():
        shutil.copyfile(file, to / file.name)
        with open(to / file.name, "rb") as copied:
            os.fsync(copied.fileno())


def disk(folder: Path, n: int, rounds: int, device: str) -> dict[str, float]:
    """GB/s of writing, of a file copy, of reading with and without checking, and of a plain read."""
    times: dict[str, list[float]] = {}
    for i in range(rounds):
        path = folder / f"cache{i}"
        n_bytes = n * D_IN * 2

        def plain_read(path: Path = path) -> None:
            for file in path.iterdir():
                file.read_bytes()

        (folder / f"copy{i}").mkdir()
        found = {"write": seconds(lambda path=path: write_cache(path, random_pieces(n, device), torch.float16), device)}
        found["file copy"] = seconds(lambda path=path, i=i: copy(path, folder / f"copy{i}"), device)
        cache = sl.ActivationCache.open(path)
        found["read, checked"] = seconds(lambda cache=cache: epoch(cache, device), device)
        found["read again"] = seconds(lambda cache=cache: epoch(cache, device), device)
        found["plain read"] = seconds(plain_read, device)
        for name, value in found.items():
            times.setdefault(name, []).append(n_bytes / value / 1e9)
        shutil.rmtree(folder / f"copy{i}")
        if i < rounds - 1:
            shutil.rmtree(path)
    return {name: round(statistics.median(values), 2) for name, values in times.items()}


def limited(path: str, limit: int) -> None:
    """In a process of its own: read an epoch with at most `limit` bytes more than now; prints what it took."""

    def data_bytes(key: str) -> int:
        facts = dict(
            line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(("Vm", "Rss"))
        )
        return int(facts[key].split()[0]) * 1024

    cache = sl.ActivationCache.open(path)
    torch.zeros(1).sum()
    before = data_bytes("RssAnon")
    resource.setrlimit(resource.RLIMIT_DATA, (data_bytes("VmData") + limit,) * 2)
    peak = 0
    for batch in itertools.islice(cache.batches(["x"], BATCH, 0), cache.n_tokens // BATCH):
        peak = max(peak, data_bytes("RssAnon") - before)
        del batch
    print(json.dumps({"limit MiB": limit >> 20, "peak MiB": peak >> 20, "cache MiB": cache.n_tokens * D_IN * 2 >> 20}))


def same_document(batches: Iterator[torch.Tensor]) -> float:
    """Return the share of the pairs within a batch that come from the same document."""
    same = pairs = 0
    for ids in batches:
        counts = torch.unique(ids, return_counts=True)[1]
        same += int((counts * (counts - 1)).sum())
        pairs += len(ids) * (len(ids) - 1)
    return same / pairs


def shuffle(folder: Path, n: int) -> dict[str, float]:
    """Return pairs from the same document: as stored, ours, and a perfect shuffle."""
    ids = (torch.arange(n) // DOCUMENT).float()[:, None].expand(n, 2)
    write_cache(
        folder / "documents",
        ({"tokens": torch.zeros(len(x), dtype=torch.int32), "x": x} for x in ids.split(8192)),
        torch.float32,
    )
    cache = sl.ActivationCache.open(folder / "documents")
    perfect = ids[:, 0][torch.randperm(n, generator=torch.Generator().manual_seed(1))]
    ours = (batch["x"][:, 0] for batch in itertools.islice(cache.batches(["x"], BATCH, 0), n // BATCH))
    found = {"unshuffled": ids[:, 0].split(BATCH), "ours": ours, "perfect": perfect.split(BATCH)}
    return {name: round(same_document(iter(batches)), 6) for name, batches in found.items()}


class _Fed(sl.ActivationStream):
    """A live buffer that is fed the same made-up activations again and again."""

    def __init__(self, buffer_tokens: int, device: str):
        self.hooks, self.block, self._first = ("x",), buffer_tokens // 2, None
        self._piece = {"x": torch.randn(4096, D_IN).to(device)}

    def _pieces(self, skip: int) -> Iterator[dict[str, torch.Tensor]]:
        return itertools.repeat(self._piece)


def live(sizes: list[int], n: int, peer_python: str | None, threads: int, device: str) -> dict[str, dict[int, int]]:
    """Return tokens a second out of buffers of several sizes."""
    found: dict[str, dict[int, int]] = {"ours": {}}
    for size in sizes:
        batches = cut_into_batches(_Fed(size, device)._rounds(["x"], 0, 0, 0), BATCH)
        next(batches)
        taken = seconds(lambda batches=batches: [next(batches) and None for _ in range(n // BATCH)], device)
        found["ours"][size] = round(n / taken)
    if peer_python:
        command = [peer_python, "-c", source(now) + PEER, json.dumps([sizes, BATCH, n, threads, device])]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        answers = [json.loads(line) for line in lines if line.startswith("{")]
        found["SAELens"] = {answer["size"]: round(answer["tokens_per_s"]) for answer in answers}
    return found


def main() -> None:
    options = parser(__doc__, rounds=3, device=True)
    options.add_argument("--tokens", type=int, default=2**20, help="activations in the cache")
    options.add_argument("--limit", type=int, default=700, help="MiB a process may allocate while it reads the cache")
    options.add_argument("--buffers", type=int, nargs="+", default=[8192, 65_536, 262_144])
    options.add_argument("--limited", help=argparse.SUPPRESS)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    if args.limited:
        limited(args.limited, args.limit << 20)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        report = {"GB/s": disk(folder, args.tokens, args.rounds, args.device)}
        command = [sys.executable, __file__, "--limited", str(folder / f"cache{args.rounds - 1}"), "--limit", str(args.limit)]
        report["memory"] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
        report["pairs from one document"] = shuffle(folder, args.tokens)
        report["live buffer, tokens/s"] = live(args.buffers, 2**19, args.peer_python, args.threads, args.device)
    print(json.dumps(report, indent=1))
    write_report(args, report)


if __name__ == "__main__":
    main()
