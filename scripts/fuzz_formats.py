"""Damage files of other tools and of this library at random, and check that reading them fails with a typed error or works.

    python scripts/fuzz_formats.py --n 5000
    python scripts/fuzz_formats.py --n 5000 --only "scope|goodfire|deepseek|hook_z|crosscoder"

Each reader is a process that may use 1 GiB of data memory and 20 s of CPU time per file. A reader that crashes, hangs, runs out
of memory or raises any other error is a failure, reported with its case and seed; the exit code is then 1. So is a reader that
starts a process, opens a connection, or calls what a hostile pickle names. The counts are printed for each format. The peak
that is printed is the resident memory of a reader, which is forked from a process that has imported everything.
"""

import argparse
import logging
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import foreign
import foreign_crosscoders
import foreign_ports
import torch
from hostile import MARKER, damage

import saelens_lite as sl
from saelens_lite import formats, registry
from saelens_lite.errors import SaelensLiteError

CASES = foreign.CASES | foreign_ports.CASES | foreign_crosscoders.CASES
BATCH = 100  # files a process reads
SECONDS = 20
Originals = dict[str, tuple[Path, Path]]  # a case's folder, and the place in it that is read
FORBIDDEN = {"socket.connect", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork"}
executed: list[str] = []  # what a reader did that reading never does


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Note what reading never does. Errors raised here could be taken for those of a damaged file."""
    if event in FORBIDDEN or (event == "open" and str(arguments[0]).endswith(MARKER)):
        executed.append(f"{event} {arguments[0]!r}")


def format_of(name: str) -> str:
    """Return the format of a case."""
    return CASES[name].format if name in CASES else "saelens_lite"


def read(path: Path, format: str | None, facts: dict[str, Any]) -> str:
    """Load a file. Return "error" or "loaded"; anything else is raised."""
    try:
        formats.inspect(path, format)
        d = sl.load(path, format=format, **facts)
    except SaelensLiteError:
        return "error"
    x_hat = d(torch.ones(2, d.d_in))
    if x_hat.shape != (2, d.d_out) or not all(torch.isfinite(tensor).all() for tensor in d.state_dict().values()):
        raise AssertionError("a dictionary that is not sound")
    return "loaded"


def attempt(originals: Originals, seed: int, where: Path) -> str:
    """Damage a copy of one case and read it."""
    name = sorted(originals)[seed % len(originals)]
    case, copy, (root, inside) = CASES.get(name), Path(tempfile.mkdtemp(dir=where)) / "files", originals[name]
    shutil.copytree(root, copy)
    what = damage(copy, seed)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    signal.alarm(10 * SECONDS)
    try:
        format = case.format if case and (case.pickled or seed % 3 == 0) else None
        outcome = read(copy / inside, format, case.facts if case else {})
        if executed:
            raise AssertionError(f"executed: {executed.pop()}")
        return outcome
    except BaseException:
        print(f"FAILED {name}, seed {seed}: {what}\n{traceback.format_exc(limit=-4)}", flush=True)
        return "failed"
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.alarm(0)
        shutil.rmtree(copy.parent)


def child(originals: Originals, seeds: range, out: int) -> None:
    """Read a batch under limits; writes a letter a file: e, l or f."""

    def hang(*_: object) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    signal.signal(signal.SIGVTALRM, hang)
    signal.signal(signal.SIGALRM, hang)
    sys.addaudithook(watch)
    resource.setrlimit(resource.RLIMIT_DATA, (1 << 30, 1 << 30))
    with tempfile.TemporaryDirectory() as where:
        for seed in seeds:
            os.write(out, attempt(originals, seed, Path(where))[0].encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=5000, help="files to read")
    parser.add_argument("--seed", type=int, default=0, help="where to start; a failure's seed with --n 1 repeats it")
    parser.add_argument("--only", default="", help="regular expression: cases whose name or format it matches")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # what is said of some files whenever they are read
    for name in registry.names("formats"):
        registry.load(name, "formats")
    totals, start, peak = Counter(), time.monotonic(), 0
    with tempfile.TemporaryDirectory() as folder:
        roots = {name: Path(folder) / str(i) for i, name in enumerate(CASES)} | {"ours": Path(folder) / "ours"}
        originals = {name: (roots[name], case.write(roots[name]).relative_to(roots[name])) for name, case in CASES.items()}
        sl.Dictionary.create("topk", reads=8, d_sae=16, options={"k": 2}).save(roots["ours"])
        originals["ours"] = roots["ours"], Path()
        originals = {name: place for name, place in originals.items() if re.search(args.only, f"{name} {format_of(name)}")}
        names = sorted(originals)
        for first in range(args.seed, args.seed + args.n, BATCH):
            seeds = range(first, min(first + BATCH, args.seed + args.n))
            receiving, sending = os.pipe()
            pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    child(originals, seeds, sending)
                    status = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(status)
            os.close(sending)
            with os.fdopen(receiving) as pipe:
                letters = pipe.read()
            _, status, used = os.wait4(pid, 0)
            peak = max(peak, used.ru_maxrss)
            totals.update((format_of(names[seed % len(names)]), letter) for seed, letter in zip(seeds, letters, strict=False))
            if status or len(letters) < len(seeds):
                print(f"FAILED seed {first + len(letters)}: the process ended with status {status}", flush=True)
                totals[format_of(names[(first + len(letters)) % len(names)]), "f"] += 1
    parent = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{'format':20} {'errors':>8} {'loaded':>8} {'failed':>8}")
    for format in sorted({format for format, _ in totals}):
        print(f"{format:20} " + " ".join(f"{totals[format, letter]:8}" for letter in "elf"))
    failed = sum(n for (_, letter), n in totals.items() if letter == "f")
    print(f"{args.n} files of {len(names)} cases, {time.monotonic() - start:.0f} s: {failed} failed")
    print(f"peak of a reading process {peak / 1024:.0f} MiB; of the process they were forked from {parent / 1024:.0f} MiB")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
