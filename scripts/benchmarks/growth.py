"""Measure how time, memory and stored bytes grow with the tokens: capture, training, evaluation and the feature store.

    python scripts/benchmarks/growth.py
    python scripts/benchmarks/growth.py --part store --base 8192
    python scripts/benchmarks/growth.py --part histories --dictionaries 50

Each part runs at four sizes, ×4 apart, with a GPT-2 of random weights that is so small that the library's own work shows, or
on random activations. Training is stopped before its end, which writes a checkpoint, and resumed. Each measurement is a process
of its own, which first does a small piece of the same work, so that no start-up is counted. Prints one line of JSON for each
part:

- seconds: CPU time of the process, of all its threads, which other processes hardly disturb.
- exponent: slope of log(difference of neighbouring sizes' seconds) over log(tokens). Differences take out what is constant.
- extra MiB: rise of the process's memory. Freed memory is returned to the system at once.
- bytes: of each kind of file, numbers in its name replaced by #, the most that was there at any moment; files of a run that
  is not complete count too, as another thread looks at the folder 20 times a second. "at 1e9" is a straight line through
  the two largest sizes. Capture and training run with smaller shards and more log lines than by default, and the line is
  drawn over shards and log lines: a billion tokens are 15,259 of both by default.

The part `histories` is not extrapolated: it writes checkpoints of 50 small dictionaries with the 15,259 log lines of a billion
tokens each, and resumes the run from the last.
"""

import argparse
import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from shared import FREE_AT_ONCE, forget_peak, high_water, parser, random_gpt2, write_report

import saelens_lite as sl
from saelens_lite.cache import TensorSource
from saelens_lite.tokens import named_text

BILLION, EACH = 10**9, 65_536  # tokens of a shard, and between two lines of a log, by default
HOOK, N_CTX, D_MODEL, D_SAE, K = "blocks.1.hook_resid_pre", 64, 32, 512, 8
SHARD, BATCH = 1024, 512  # tokens, so that there are many shards and lines
BASES = {"capture": 8192, "train": 32_768, "evaluate": 4096, "store": 4096}
TIMES, N_SIZES = 4, 4


class Watch(threading.Thread):
    """A thread that notes the largest total size of each kind of file below a folder."""

    def __init__(self, folder: Path):
        super().__init__(daemon=True)
        self.folder, self.most, self.seconds, self._over = folder, {}, 0.0, threading.Event()

    def run(self) -> None:
        while not self._over.wait(0.05):
            self.look()
        self.seconds = time.thread_time()

    def look(self) -> None:
        """Note the sizes of the files that are there now."""
        sizes: dict[str, int] = {}
        for above, _, names in os.walk(self.folder):
            for name in names:
                try:
                    size = os.stat(os.path.join(above, name)).st_size
                except OSError:  # it was removed or renamed
                    continue
                kind = re.sub(r"\d+", "#", re.sub(r"^\.(.+)\.saelens-lite-[0-9a-f]+\.tmp$", r"\1", name))
                if not name.endswith(".lock"):
                    sizes[kind] = sizes.get(kind, 0) + size
        self.most = {kind: max(sizes.get(kind, 0), self.most.get(kind, 0)) for kind in sizes | self.most}

    def end(self) -> dict[str, int]:
        """Look once more, stop, and return the sizes."""
        self._over.set()
        self.join()
        self.look()
        return self.most


class Stopping:
    """A source that asks its run to stop at batch number `at`, so that it writes a checkpoint there."""

    def __init__(self, source: TensorSource, at: int):
        self.source, self.at = source, at

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def batches(self, *arguments: Any, **settings: Any) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the batches of the source, and one signal."""
        for number, batch in enumerate(self.source.batches(*arguments, **settings)):
            if number == self.at:
                signal.raise_signal(signal.SIGTERM)
            yield batch


def prepare(folder: Path, n_tokens: int) -> None:
    """Write model/, dictionary/ and text.jsonl with at least n_tokens tokens."""
    tiny = sl.load_model("tiny", device="cpu")
    shape = {"n_positions": N_CTX, "n_embd": D_MODEL, "n_layer": 2, "n_head": 2}
    random_gpt2(vocab_size=tiny.d_vocab, **shape).save_pretrained(folder / "model")
    tiny.tokenizer.save_pretrained(folder / "model")
    origin = sl.Origin(model="model", n_ctx=N_CTX, prepend_bos=True)
    d = sl.Dictionary.create("topk", reads=sl.Port(hook=HOOK, width=D_MODEL), d_sae=D_SAE, options={"k": K}, origin=origin)
    d.save(folder / "dictionary")
    documents = [str(document) for document in named_text("python-docs:train")]
    n_letters, goal = 0, 8 * n_tokens
    with open(folder / "text.jsonl", "w", encoding="utf-8") as file:
        while n_letters < goal:
            for number, document in enumerate(documents):
                if n_letters < goal:
                    n_letters += len(document)
                    file.write(json.dumps({"text": f"{n_letters} {number} {document}"}) + "\n")


def work_of(part: str, folder: Path) -> Callable[[int, Path], object]:
    """Return the function that does a part of the work for a number of tokens and writes to a folder."""
    text = folder / "text.jsonl"
    if part == "train":
        x = torch.randn(16_384, D_MODEL, generator=torch.Generator().manual_seed(0))
        shared = {"d_sae": D_SAE, "options": {"k": K}, "batch_size": BATCH, "log_every": BATCH}

        def train(n: int, out: Path) -> None:
            config = sl.TrainConfig(n_tokens=n, **shared)
            with suppress(sl.errors.Stopped):
                sl.train(Stopping(TensorSource(x), n // BATCH - 2), config, out / "run", device="cpu")
            sl.resume(out / "run", TensorSource(x))

        return train
    lm, d = sl.load_model(str(folder / "model"), device="cpu"), sl.Dictionary.load(folder / "dictionary")
    if part == "capture":
        return lambda n, out: sl.capture(lm, text, HOOK, out / "cache", n_ctx=N_CTX, n_tokens=n, shard_tokens=SHARD)
    if part == "evaluate":
        return lambda n, out: sl.evaluate(d, lm, text, n_tokens=n).to_json(out / "eval.json")
    return lambda n, out: sl.FeatureStore.build(d, lm, text, n_tokens=n, out=out / "store", codes=True)


def measure(part: str, n_tokens: int, folder: Path) -> dict[str, Any]:
    """Return CPU seconds, the rise of memory and the bytes of the files of one part at one size."""
    work = work_of(part, folder)
    with tempfile.TemporaryDirectory(dir=folder) as where:
        work(4 * SHARD, Path(where))
    with tempfile.TemporaryDirectory(dir=folder) as where:
        forget_peak()
        before = high_water()[1]
        watch = Watch(Path(where))
        start = time.process_time()
        watch.start()
        work(n_tokens, Path(where))
        seconds, extra, sizes = time.process_time() - start, high_water()[0] - before, watch.end()
        return {"tokens": n_tokens, "seconds": seconds - watch.seconds, "extra": extra, "bytes": sizes}


def slope(xs: list[float], ys: list[float]) -> float:
    """Return the slope of the straight line with the least squared errors through the logarithms."""
    logs = [(math.log(x), math.log(y)) for x, y in zip(xs, ys, strict=True) if y > 0]
    mean_x, mean_y = (sum(values) / len(logs) for values in zip(*logs, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)


def at_a_billion(part: str, first: dict[str, Any], second: dict[str, Any]) -> dict[str, int]:
    """Return the bytes of each kind of file at a billion tokens, on the line through two sizes."""
    unit = {"capture": SHARD / EACH, "train": BATCH / EACH}.get(part, 1.0)  # as if shards and lines had the default distance
    goal = BILLION * unit
    found = {}
    for kind, there in second["bytes"].items():
        each = (there - first["bytes"].get(kind, 0)) / (second["tokens"] - first["tokens"])
        is_data = part == "capture" and kind.endswith((".safetensors", ".rows"))  # these do not depend on the distance
        found[kind] = round(there + max(0.0, each) * ((BILLION if is_data else goal) - second["tokens"]))
    return found


def child(*arguments: object) -> dict[str, Any]:
    """Return the answer of this script in a new process."""
    command = [sys.executable, __file__, "--child", *map(str, arguments)]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | FREE_AT_ONCE)
    return json.loads(answer.stdout.splitlines()[-1])


def row_of(part: str, sizes: list[int], folder: Path) -> dict[str, Any]:
    """Return the measurements of a part at all sizes, and what follows from them."""
    rows = [child(part, n, folder) for n in sizes]
    differences = [b["seconds"] - a["seconds"] for a, b in pairwise(rows)]
    return {
        "part": part,
        "tokens": sizes,
        "seconds": [round(row["seconds"], 2) for row in rows],
        "exponent": round(slope(sizes[1:], differences), 2),
        "extra MiB": [round(row["extra"] / 2**20, 1) for row in rows],
        "bytes": rows[-1]["bytes"],
        "bytes at 1e9": at_a_billion(part, *rows[-2:]),
    }


def histories(n_dictionaries: int, n_lines: int, folder: Path) -> dict[str, Any]:
    """Write checkpoints of many dictionaries near the end of a billion tokens, and resume the run."""
    from saelens_lite.training.distribution import Share
    from saelens_lite.training.loop import Group
    from saelens_lite.training.trainer import Trainer

    d_in, batch = 8, 4096
    x = torch.randn(batch, d_in, generator=torch.Generator().manual_seed(0))
    n_steps = n_lines * EACH // batch
    shared = {"d_sae": 16, "options": {"k": 2}, "batch_size": batch, "n_tokens": batch * (n_steps + 4)}
    source = TensorSource(x)
    trainers = [Trainer(sl.TrainConfig(seed=i, **shared), source) for i in range(n_dictionaries)]
    out, facts = folder / "runs", {"part": "histories", "dictionaries": n_dictionaries, "lines each": n_lines}
    folders = [out / f"{i}-topk" for i in range(n_dictionaries)] if n_dictionaries > 1 else [out]
    request = {"source": None, "validation_tokens": 0, "data_seed": 0, "device": "cpu", "checkpoint_seconds": 600.0}
    kept = {"data_seed": 0, "validation": None, "loggers": ["jsonl"], "checkpoint_seconds": 600.0, "request": request}
    share = Share(range(n_dictionaries))
    job = Group(source=source, trainers=trainers, folders=folders, out=out, share=share, **kept)
    for place in folders:
        place.mkdir(parents=True)
    for trainer in trainers:
        trainer.step(x)
    line = trainers[0].log_line()
    forget_peak()
    before, start = high_water()[1], time.process_time()
    for number in range(1, n_lines + 1):
        for history in job.histories:
            history.append(line | {"step": number * EACH // batch, "tokens": number * EACH})
    facts["seconds to append"] = round(time.process_time() - start, 2)
    for trainer in trainers:
        trainer.n_steps, trainer.n_seen = n_steps, n_steps * batch
    job.n_batches = n_steps
    for name in ("first", "next"):
        start = time.perf_counter()
        job.save()
        facts[f"seconds of the {name} checkpoint"] = round(time.perf_counter() - start, 2)
    files = {path.name: path.stat().st_size for path in out.rglob("*") if path.is_file()}
    facts["bytes of histories"] = sum(size for name, size in files.items() if name.endswith(".jsonl"))
    facts["bytes of state.json"] = files["state.json"]
    start = time.perf_counter()
    runs = sl.resume(out, source)
    facts["seconds to resume and finish"] = round(time.perf_counter() - start, 2)
    facts["extra MiB"] = round((high_water()[0] - before) / 2**20)
    counts = {len(run.history) for run in runs}
    return facts | {"runs": len(runs), "lines of each run": sorted(counts)}


def main() -> None:
    options = parser(__doc__, rounds=1, peers=None)
    options.add_argument("--part", choices=(*BASES, "histories"), nargs="+", default=[*BASES, "histories"])
    options.add_argument("--base", type=int, help="tokens of the smallest size; default: as fits in ten minutes")
    options.add_argument("--dictionaries", type=int, default=50, help="of the part histories")
    options.add_argument("--lines", type=int, default=-(-BILLION // EACH), help="of each log in the part histories")
    options.add_argument("--child", nargs=3, metavar=("PART", "TOKENS", "FOLDER"), help=argparse.SUPPRESS)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    if args.child:
        logging.disable(logging.WARNING)
        part, n, folder = args.child
        print(
            json.dumps(
                histories(args.dictionaries, int(n), Path(folder))
                if part == "histories"
                else measure(part, int(n), Path(folder))
            )
        )
        return
    sizes = {part: [(args.base or BASES[part]) * TIMES**i for i in range(N_SIZES)] for part in args.part if part in BASES}
    rows = []
    with tempfile.TemporaryDirectory() as where:
        if set(sizes) - {"train"}:
            prepare(Path(where), max(most[-1] for part, most in sizes.items() if part != "train"))
        for part in args.part:
            if part == "histories":
                rows.append(child(part, args.lines, where, "--dictionaries", args.dictionaries))
            else:
                rows.append(row_of(part, sizes[part], Path(where)))
            print(json.dumps(rows[-1]), flush=True)
    write_report(args, {"rows": rows})


if __name__ == "__main__":
    main()
