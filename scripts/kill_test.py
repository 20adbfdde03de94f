"""Kill capture and training at random moments, resume them, and compare the results byte for byte.

    python scripts/kill_test.py --kills 30

The embedded model captures Python's documentation; a sweep is trained on that cache, and on the same text without a cache. Each
repetition starts the work in a child process, kills it one to three times after a random time, then lets it finish. The exit
code is 1 when a file differs from the file of undisturbed work, is missing, or should not be there.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the tokenizer is used on both sides of a fork

import torch
from forked import DONE, child, ended

import saelens_lite as sl
from saelens_lite.training.checkpoint import is_interrupted

HOOK = "blocks.2.hook_resid_pre"
CONFIGS = [
    sl.TrainConfig(
        sparsity="topk", options={"k": 16}, d_sae=512, batch_size=512, n_tokens=30_000, dead_after=4000, log_every=4096
    ),
    sl.TrainConfig(sparsity="l1", d_sae=384, batch_size=512, n_tokens=20_000, log_every=4096),
    sl.TrainConfig(sparsity="gated", d_sae=384, batch_size=512, n_tokens=25_000, log_every=4096),
]


def capture(lm: sl.LanguageModel, text: list[str]) -> Callable[[Path], None]:
    """Work that captures into a folder, or goes on capturing."""

    def work(folder: Path) -> None:
        sl.capture(lm, text, [HOOK, "blocks.1.hook_mlp_out"], folder / "cache", n_tokens=40_000, n_ctx=64, shard_tokens=3000)

    return work


def train(source: Callable[[], sl.ActivationCache | sl.ActivationStream]) -> Callable[[Path], None]:
    """Work that trains into a folder, or goes on training."""

    def work(folder: Path) -> None:
        if is_interrupted(folder):
            sl.resume(folder, source(), checkpoint_seconds=0.05)
        else:
            sl.train(source(), CONFIGS, folder, validation_tokens=1000, checkpoint_seconds=0.05, exists="overwrite")

    return work


def attempt(work: Callable[[Path], None], folder: Path, kill_after: float | None) -> bool:
    """Run the work in a child process, which may be killed, and return whether it finished."""
    running = child(lambda: work(folder))
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(running, signal.SIGKILL)
    code = ended(running)
    if code > 0:
        raise SystemExit("the work failed; its error stands above")
    return code == DONE


def contents(folder: Path) -> dict[str, bytes]:
    """Return all files of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def differences(found: dict[str, bytes], wanted: dict[str, bytes]) -> list[str]:
    """Return files that are not the same in both."""
    return sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))


def check(name: str, work: Callable[[Path], None], folder: Path, kills: int, rng: random.Random) -> int:
    """Repetitions in which something differed."""
    undisturbed = folder / "undisturbed"
    undisturbed.mkdir(parents=True)
    start = time.perf_counter()
    attempt(work, undisturbed, None)
    seconds = time.perf_counter() - start
    wanted = contents(undisturbed)
    bad = n_killed = 0
    for number in range(kills):
        place = folder / str(number)
        place.mkdir()
        for _ in range(rng.randint(1, 3)):
            if attempt(work, place, rng.uniform(0.02, 1.0) * seconds):
                break
            n_killed += 1
        else:
            attempt(work, place, None)
        wrong = differences(contents(place), wanted)
        if wrong:
            bad += 1
            print(f"{name}, repetition {number}: {', '.join(wrong)}", file=sys.stderr)
        shutil.rmtree(place)
    size = sum(map(len, wanted.values())) / 1e6
    print(
        f"{name:20} {kills:4} repetitions, {n_killed:4} kills, {len(wanted):3} files, {size:6.1f} MB: {bad} differ", flush=True
    )
    return bad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="repetitions; a third of them from a stream")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    rng = random.Random(args.seed)
    lm = sl.load_model("tiny", device="cpu")
    lm.hook_point(HOOK)
    text = [page.text for page in sl.python_docs()]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cache = sl.capture(lm, text, HOOK, folder / "cache", n_tokens=25_000, n_ctx=64, shard_tokens=3000)
        stream_of = {"text_config": sl.TextConfig(n_ctx=64), "buffer_tokens": 4000, "batch_tokens": 1024}
        bad = check("capture", capture(lm, text), folder / "capture", args.kills, rng)
        bad += check("train on a cache", train(lambda: sl.ActivationCache.open(cache.path)), folder / "train", args.kills, rng)
        stream = train(lambda: sl.ActivationStream(lm, text, HOOK, **stream_of))
        bad += check("train on a stream", stream, folder / "stream", -(-args.kills // 3), rng)
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
