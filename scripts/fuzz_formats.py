"""Damage files of other tools and of this library at random, and check that reading them fails with a typed error or works.

    python scripts/fuzz_formats.py --n 5000

Each reader is a process that may use 1 GiB of data memory and 20 s of CPU time per file. A reader that crashes, hangs, runs out
of memory or raises any other error is a failure, reported with its case and seed; the exit code is then 1. The peak that is
printed is the resident memory of a reader, which is forked from a process that has imported everything.
"""

import argparse
import logging
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import foreign
import foreign_ports
import torch
from hostile import damage

import saelens_lite as sl
from saelens_lite import formats, registry
from saelens_lite.errors import SaelensLiteError

CASES = foreign.CASES | foreign_ports.CASES
BATCH = 100  # files a process reads
SECONDS = 20
Originals = dict[str, tuple[Path, Path]]  # a case's folder, and the place in it that is read


def read(path: Path, format: str | None) -> str:
    """Load a file. Return "error" or "loaded"; anything else is raised."""
    try:
        formats.inspect(path, format)
        d = sl.load(path, format=format)
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
        return read(copy / inside, case.format if case and (case.pickled or seed % 3 == 0) else None)
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
    resource.setrlimit(resource.RLIMIT_DATA, (1 << 30, 1 << 30))
    with tempfile.TemporaryDirectory() as where:
        for seed in seeds:
            os.write(out, attempt(originals, seed, Path(where))[0].encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=5000, help="files to read")
    parser.add_argument("--seed", type=int, default=0, help="where to start; a failure's seed with --n 1 repeats it")
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
        for first in range(args.seed, args.seed + args.n, BATCH):
            seeds = range(first, min(first + BATCH, args.seed + args.n))
            receiving, sending = os.pipe()
            pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    child(originals, seeds, sending)
                    status = 0
                finally:
                    os._exit(status)
            os.close(sending)
            with os.fdopen(receiving) as pipe:
                letters = pipe.read()
            _, status, used = os.wait4(pid, 0)
            peak = max(peak, used.ru_maxrss)
            totals.update(letters)
            if status or len(letters) < len(seeds):
                print(f"FAILED seed {first + len(letters)}: the process ended with status {status}", flush=True)
                totals["f"] += 1
    parent = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{args.n} files, {time.monotonic() - start:.0f} s: {totals['e']} errors, {totals['l']} loaded, {totals['f']} failed")
    print(f"peak of a reading process {peak / 1024:.0f} MiB; of the process they were forked from {parent / 1024:.0f} MiB")
    sys.exit(bool(totals["f"]))


if __name__ == "__main__":
    main()
