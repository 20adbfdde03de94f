"""Kill one process of a training by two processes at random moments, resume it, and compare the results.

    python scripts/benchmarks/kills.py
    python scripts/benchmarks/kills.py --kills 4 --parallel latents

Two dictionaries are trained on a cache of the embedded model by `saelens-lite train --devices 2`, divided in turn by
dictionary, by latents and by rows. A random process of the two is killed by SIGKILL at a random moment of the training. The
command has to end with one message, which says which process was killed and how to resume, and with exit code 1. The run is
then resumed by two processes. Its dictionaries need the same bytes as those of an undisturbed run. At the end, one more run of
each kind is killed and resumed by one process; the fractions of variance unexplained (FVU) may differ by 0.001. Linux only. The
exit code is 1 if anything is not as it should be.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import saelens_lite as sl

HOOK = "blocks.2.hook_resid_pre"
WAYS = ("sweep", "latents", "data")
TOLERANCE = 1e-3  # of the FVU, if the number of processes has changed
SETTINGS = """
d_sae = 1536
batch_size = 512
n_tokens = {n_tokens}
log_every = 20000
checkpoint_seconds = 0.5
device = "cpu"

[[dictionary]]
sparsity = "topk"
options = {{k = 16}}

[[dictionary]]
sparsity = "l1"
"""


def started(*flags: object) -> subprocess.Popen[str]:
    """Start the command `train`."""
    command = [sys.executable, "-m", "saelens_lite", "train", *map(str, flags)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finished(*flags: object) -> None:
    """Run the command `train`, which has to succeed."""
    running = started(*flags)
    _, said = running.communicate()
    if running.returncode:
        raise SystemExit(f"train {' '.join(map(str, flags))} failed: {said}")


def processes_of(launcher: int) -> dict[int, int]:
    """Return the process id of each rank that a launcher has started."""
    found = {}
    for number in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        variables = dict(part.partition("=")[::2] for part in Path(f"/proc/{number}/environ").read_text().split("\0"))
        if "RANK" in variables:
            found[int(variables["RANK"])] = int(number)
    return found


def wait_for(running: subprocess.Popen[str], path: Path) -> None:
    """Wait until a command has written a file."""
    while not path.exists() and running.poll() is None:
        time.sleep(0.01)


def killed(running: subprocess.Popen[str], out: Path, after: float, rng: random.Random) -> tuple[str, list[str]]:
    """Kill a random process some seconds after its training has begun. Return the end and what is wrong with it."""
    wait_for(running, out / "0-topk" / "config.toml")
    time.sleep(after)
    rank = rng.randrange(2)
    if running.poll() is None and (found := processes_of(running.pid)).get(rank):
        os.kill(found[rank], signal.SIGKILL)
    said = running.communicate()[1]
    if running.returncode == 0:
        return "finished before", []
    lines = [line for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("saelens-lite: ")]
    wrong = [] if running.returncode == 1 else [f"exit code {running.returncode}"]
    if len(errors) != 1 or f"process {rank} of 2 was killed (SIGKILL" not in errors[0] or "Traceback" in said:
        wrong.append(f"printed {lines}")
    return f"rank {rank} after {after:.1f} s", wrong


def contents(out: Path) -> dict[str, bytes]:
    """Return the files of the dictionaries of a run."""
    files = sorted(path for path in out.rglob("dictionary/*") if path.is_file())
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def fvu(out: Path, cache: sl.ActivationCache) -> list[float]:
    """Return the fraction of variance unexplained of each dictionary of a run, on the first activations of the cache."""
    x = next(iter(cache.batches([HOOK], 8192, seed=1)))[HOOK].float()
    dictionaries = [sl.load(path) for path in sorted(out.glob("*-*/dictionary"))]
    with torch.no_grad():
        return [float((d(x) - x).square().sum() / (x - x.mean(0)).square().sum()) for d in dictionaries]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--parallel", choices=WAYS, nargs="+", default=WAYS)
    parser.add_argument("--tokens", type=int, default=300_000, help="of each training")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, bad, n_killed = random.Random(args.seed), 0, 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = [page.text for page in sl.python_docs()]
        cache = sl.capture(sl.load_model("tiny", device="cpu"), text, HOOK, folder / "cache", n_tokens=100_000, n_ctx=64)
        (folder / "run.toml").write_text(SETTINGS.format(n_tokens=args.tokens))
        seconds = {}
        for way in args.parallel:
            running = started(cache.path, *flags(folder, way, folder / way))
            wait_for(running, folder / way / "0-topk" / "config.toml")
            begin = time.perf_counter()
            wait_for(running, folder / way / "0-topk" / "dictionary")
            seconds[way] = time.perf_counter() - begin
            if running.communicate()[1] or running.returncode:
                raise SystemExit(f"the undisturbed training by {way} failed")
        for number in range(args.kills + len(args.parallel)):
            way, back = args.parallel[number % len(args.parallel)], 2 if number < args.kills else 1
            out = folder / "killed"
            running = started(cache.path, *flags(folder, way, out))
            end, wrong = killed(running, out, rng.uniform(0, 0.9 * seconds[way]), rng)
            n_killed += end != "finished before"
            if end == "finished before":
                resumed = ""
            elif any(out.glob("checkpoints/*")):
                resumed = f", resumed by {back}"
                finished("--resume", out, *(["--devices", 2] if back == 2 else []))
            else:
                resumed = ", begun again"
                finished(cache.path, *flags(folder, way, out), "--exists", "overwrite")
            if back == 2 or not resumed.startswith(", resumed"):
                here, wanted = contents(out), contents(folder / way)
                others = sorted(file for file in here.keys() | wanted.keys() if here.get(file) != wanted.get(file))
                same, result = not others, f"other bytes in {', '.join(others)}" if others else "same bytes"
            else:
                difference = max(abs(a - b) for a, b in zip(fvu(out, cache), fvu(folder / way, cache), strict=True))
                same, result = difference <= TOLERANCE, f"FVU differs by {difference:.1e}"
            bad += bool(wrong) or not same
            print(f"{number + 1:3} {way:8} {end}{resumed}: {result}{'; ' + '; '.join(wrong) if wrong else ''}", flush=True)
            shutil.rmtree(out)
    print(f"{n_killed} kills, {bad} bad results")
    sys.exit(bool(bad))


def flags(folder: Path, way: str, out: Path) -> list[object]:
    """Return the flags of a training by two processes."""
    return ["--config", folder / "run.toml", "--out", out, "--devices", 2, "--parallel", way]


if __name__ == "__main__":
    main()
