"""Kill, interrupt and race everything that writes a folder, and check that nothing else is touched.

    python scripts/attack_outputs.py --kills 20 --races 20 --saves 30

Each writer works in a folder full of neighbours whose names resemble its own temporary names. The script hashes their contents
before and after success, an error, Ctrl-C and SIGKILL at random moments. It lets two processes write the same output at once:
one must succeed, the other must raise LockedError. It kills saves that overwrite a dictionary: each time the old or the new
dictionary must be there. The exit code is 1 after any fault.
"""

import argparse
import hashlib
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the tokenizer is used on both sides of a fork

import torch
from forked import DONE, FAILED, child, ended
from rich.console import Console
from rich.table import Table

import saelens_lite as sl
from saelens_lite.cache import TensorSource
from saelens_lite.errors import LockedError
from saelens_lite.hub import Address, Fetched, copy_to
from saelens_lite.training.checkpoint import is_interrupted

HOOK = "blocks.1.hook_resid_pre"
TEXT = ["The old man looked at the sea and said nothing at all."] * 200
CONFIG = sl.TrainConfig(d_sae=256, options={"k": 8}, n_tokens=12_000, batch_size=200)
LOCKED = 4  # exit code of a child that is refused
TOKEN = "0123456789abcdef"

Write = Callable[[Path], None]


def writers(lm: sl.LanguageModel, folder: Path) -> dict[str, Write]:
    """Return everything that writes an output folder, by name; each replaces what is there."""
    d = sl.Dictionary.create(
        "topk", reads=sl.Port(hook=HOOK, width=lm.d_model), d_sae=1024, options={"k": 8}, origin=sl.Origin(model="m")
    )
    x = torch.randn(5000, 16, generator=torch.Generator().manual_seed(0))
    store = sl.FeatureStore.build(d, lm, TEXT[:20])
    given = d.save(folder / "given")
    fetched = Fetched(given, Address("somebody/something", None, "main"), given, tuple(path.name for path in given.iterdir()))

    def train(out: Path) -> None:
        if is_interrupted(out):
            sl.resume(out, TensorSource(x), checkpoint_seconds=0.05)
        else:
            sl.train(TensorSource(x), CONFIG, out, checkpoint_seconds=0.05, exists="overwrite")

    return {
        "save": lambda out: d.save(out, exists="overwrite"),
        "capture": lambda out: sl.capture(lm, TEXT, HOOK, out, shard_tokens=300, exists="overwrite"),
        "train": train,
        "build": lambda out: sl.FeatureStore.build(d, lm, TEXT[:60], out=out, exists="overwrite"),
        "save a store": lambda out: store.save(out, exists="overwrite"),
        "convert": lambda out: sl.convert(folder / "given", out, "sparsify", exists="overwrite"),
        "page": lambda out: store.dashboard(out, exists="overwrite"),
        "pull": lambda out: copy_to(fetched, out, exists="overwrite"),
        "export": lambda out: store.export("neuronpedia", out, set_name="s", creator_id="c", model_id="m", exists="overwrite"),
    }


def neighbours(out: Path) -> None:
    """Write files and folders beside `out` whose names resemble those of its temporary files."""
    n = out.name
    names = [f"{n}.v2", f"{n}.html", f"{n}.tmp", f"{n}.old", f".{n}", f"{n}~", f"{n}1", f"x{n}", f".{n}.tmp", f".{n}.old"]
    names += [f".{n}.v2.tmp", f".{n}.abc123.old", f".{n}.1234.tmp", f".{n}.v2.unfinished", f".{n}.html.unfinished"]
    names += [f".{n}.v2.saelens-lite-{TOKEN}.old", f".{n}.html.saelens-lite-{TOKEN}.tmp", f".{n}.saelens-lite-{TOKEN}"]
    names += [f".{n}.saelens-lite-{TOKEN[1:]}.tmp", f".x.{n}.saelens-lite-{TOKEN}.tmp", f".{n}.saelens-lite-{TOKEN}.tmp.txt"]
    for name in names:
        (out.parent / name / "inner").mkdir(parents=True)
        (out.parent / name / "inner" / "book.txt").write_text(f"the only copy in {name}")
    (out.parent / f".{n}.v2.saelens-lite.lock").write_text("")
    (out.parent / f"{n}.txt").write_text("the only copy")


def contents(folder: Path, without: str) -> dict[str, str]:
    """Return the hash of each file below a folder, except those whose names are of the output called `without`."""
    own = (without, f".{without}.unfinished", f".{without}.saelens-lite.lock")
    found = {}
    for path in sorted(folder.rglob("*")):
        first = path.relative_to(folder).parts[0]
        temporary = re.fullmatch(rf"\.{without}\.saelens-lite-[0-9a-f]{{16}}\.(tmp|old)", first)
        if path.is_file() and first not in own and not temporary:
            found[path.relative_to(folder).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def started(write: Write, out: Path) -> int:
    """Run a writer in a child process, and return the process's number."""
    return child(lambda: write(out), {LockedError: LOCKED, **dict.fromkeys((OSError, KeyboardInterrupt), FAILED)})


def nothing_else_is_touched(write: Write, folder: Path, kills: int, rng: random.Random) -> dict[str, int]:
    """Return how many faults there were of each kind: neighbours touched, and a result that is missing at the end."""
    out = folder / "here" / "out"
    neighbours(out)
    before = contents(out.parent, out.name)
    faults = {"success": 0, "error": 0, "Ctrl-C": 0, "SIGKILL": 0, "end": 0}
    start = time.perf_counter()
    faults["success"] += ended(started(write, out)) != DONE or contents(out.parent, out.name) != before
    seconds = time.perf_counter() - start

    def failing(place: Path) -> None:
        os.fsync = _raise
        write(place)

    was_there = contents(out.parent, "")
    faults["error"] += ended(started(failing, out)) != FAILED or contents(out.parent, out.name) != before
    whole = {path: digest for path, digest in contents(out.parent, "").items() if path in was_there}
    faults["error"] += whole != was_there  # what is replaced is still there too
    for number in range(2 * kills):
        how = ("Ctrl-C", "SIGKILL")[number % 2]
        running = started(write, out)
        time.sleep(rng.uniform(0, 1.1) * seconds)
        os.kill(running, signal.SIGINT if how == "Ctrl-C" else signal.SIGKILL)
        ended(running)
        faults[how] += contents(out.parent, out.name) != before
    faults["end"] += ended(started(write, out)) != DONE or contents(out.parent, out.name) != before
    left = {path.name for path in out.parent.iterdir()} - {path.split("/")[0] for path in before}
    faults["end"] += left != {out.name}
    return faults


def _raise(*_given: object, **_named: object) -> None:
    raise OSError("the disk is gone")


def one_of_two(write: Write, folder: Path, races: int) -> int:
    """Return how often two processes that write one output did not end as one success and one LockedError."""
    bad = 0
    for number in range(races):
        out = folder / str(number) / "out"
        out.parent.mkdir(parents=True)
        read, go = os.pipe()
        arrived, tell = os.pipe()

        def both(place: Path, read: int = read, tell: int = tell) -> None:
            _meet_in_the_lock(read, tell)
            write(place)

        running = [started(both, out), started(both, out)]
        os.close(tell)  # so that reading ends when both have ended
        os.read(arrived, 1)  # one holds the lock and waits; the other has been refused or will be
        first, status = os.wait()
        codes = [os.waitstatus_to_exitcode(status)]
        os.write(go, b"1")
        codes.append(ended(next(n for n in running if n != first)))
        bad += sorted(codes) != [DONE, LOCKED]
        for end in (read, go, arrived):
            os.close(end)
    return bad


def _meet_in_the_lock(read: int, tell: int) -> None:
    """Have the first process that takes a lock wait there until it is told to go on."""
    from saelens_lite import locks

    acquire = locks.FileLock.acquire
    waited = False

    def waiting(self: locks.FileLock, *given: object, **named: object) -> object:
        nonlocal waited
        held = acquire(self, *given, **named)
        if not waited:
            waited = True
            os.write(tell, b"1")
            os.read(read, 1)
        return held

    locks.FileLock.acquire = waiting


def overwriting_saves(lm: sl.LanguageModel, folder: Path, kills: int, rng: random.Random, exchange: bool) -> int:
    """Return how often neither the old nor the new dictionary was there after a kill."""
    from saelens_lite import outputs

    if not exchange:
        outputs.exchange = lambda a, b: False
    d = sl.Dictionary.create("topk", reads=lm.d_model, d_sae=2048, options={"k": 8})
    out = folder / "d"
    start = time.perf_counter()
    d.save(out)
    d.save(out, exists="overwrite")
    seconds = (time.perf_counter() - start) / 2
    bad = 0
    for _ in range(kills):
        old = sl.load(out).W_dec.detach().clone()
        d.W_dec.data.neg_()
        running = started(lambda place: d.save(place, exists="overwrite"), out)
        time.sleep(rng.uniform(0.2, 1.2) * seconds)
        os.kill(running, signal.SIGKILL)
        ended(running)
        found = sl.load(out).W_dec
        bad += not (torch.equal(found, old) or torch.equal(found, d.W_dec))
    return bad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="moments of Ctrl-C and of SIGKILL for each writer")
    parser.add_argument("--races", type=int, default=20, help="pairs of processes for each writer")
    parser.add_argument("--saves", type=int, default=30, help="killed saves, with and without an exchange of names in one step")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    rng = random.Random(args.seed)
    lm = sl.load_model("tiny", device="cpu")
    lm.run("A pass before the fork.", [HOOK])
    table = Table("writer", *("success", "error", "Ctrl-C", "SIGKILL", "end"), "races", title="faults")
    total = 0
    with tempfile.TemporaryDirectory() as name:
        for writer, write in writers(lm, Path(name)).items():
            faults = nothing_else_is_touched(write, Path(name) / writer, args.kills, rng)
            races = one_of_two(write, Path(name) / f"{writer} races", args.races)
            table.add_row(writer, *map(str, faults.values()), str(races))
            total += sum(faults.values()) + races
        for exchange in (True, False):
            bad = overwriting_saves(lm, Path(name) / f"saves {exchange}", args.saves, rng, exchange)
            how = "names exchanged in one step" if exchange else "two renames"
            table.add_row(f"{args.saves} killed saves, {how}", "", "", "", str(bad), "", "")
            total += bad
    Console().print(table)
    sys.exit(bool(total))


if __name__ == "__main__":
    main()
