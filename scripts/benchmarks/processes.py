"""Compare two processes with one thread each with one process with two threads, on the same work on the same two cores.

    python scripts/benchmarks/processes.py
    python scripts/benchmarks/processes.py --jobs latents data --rounds 5

The work: a capture of the embedded model; a sweep of four dictionaries on one cache, divided by dictionary; one dictionary
divided by latents; one divided by rows. Both contestants run each job in turn, `--rounds` times. The time is that of the call
of the library, after a short call of the same kind: without start-up. Prints medians, the median of the ratios of the rounds,
and the bytes that each process exchanges in a step: of a sum the size of the tensor, of gathered tensors the size of the
result. The expected bytes are for rows those of the gradients; for latents those of x_hat, of the largest values and of the
gradient of the input bias.
"""

import argparse
import json
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from shared import parser, write_report

import saelens_lite as sl
from saelens_lite.processes import leave, team

HOOK, D_IN, K = "blocks.2.hook_resid_pre", 192, 32  # of the embedded model
JOBS = ("capture", "sweep", "latents", "data")


def counting(n_bytes: dict[str, int]) -> None:
    """Let torch.distributed count the bytes that it exchanges."""

    def counted(name: str, size: Callable[..., int]) -> None:
        call = getattr(dist, name)

        def counted_call(*args: Any, **kwargs: Any) -> Any:
            n_bytes[name] = n_bytes.get(name, 0) + size(*args)
            return call(*args, **kwargs)

        setattr(dist, name, counted_call)

    counted("all_reduce", lambda x, *_: x.nbytes)
    counted("all_gather", lambda parts, *_: sum(part.nbytes for part in parts))
    counted("all_gather_object", lambda values, value, *_: len(values) * len(pickle.dumps(value)))


def work_of(args: argparse.Namespace, job: str, folder: Path) -> Callable[[bool], int]:
    """Return the work of a job, which returns its number of steps. It is done in full, or in short if that is asked for."""
    if job == "capture":
        lm, text = sl.load_model("tiny", device="cpu"), 10 * [page.text for page in sl.python_docs()]  # several sections

        def capture(short: bool) -> int:
            n = 20_000 if short else args.tokens
            sl.capture(lm, text, HOOK, folder / "cache", n_tokens=n, n_ctx=128, shard_tokens=16_384, exists="overwrite")
            return n

        return capture
    cache = sl.ActivationCache.open(args.cache)
    d_sae = args.d_sae // 4 if job == "sweep" else args.d_sae
    options = [{"k": k} for k in (K // 4, K // 2, K, 2 * K)] if job == "sweep" else [{"k": K}]

    def train(short: bool) -> int:
        steps = 5 if short else args.steps
        shape = {"d_sae": d_sae, "batch_size": args.batch, "n_tokens": steps * args.batch, "log_every": 10**9}
        sl.train(cache, [sl.TrainConfig(sparsity="topk", options=o, **shape) for o in options], device="cpu", parallel=job)
        return steps

    return train


def worker(args: argparse.Namespace) -> None:
    """Do one job, and print its time and the bytes exchanged."""
    everyone = team()
    folder = Path(everyone.tell(tempfile.mkdtemp(dir=args.scratch)))
    work = work_of(args, args.worker, folder)
    work(True)
    n_bytes: dict[str, int] = {}
    counting(n_bytes)
    everyone.wait()
    n_bytes.clear()
    begin = time.perf_counter()
    n_steps = work(False)
    exchanged = {name: n / n_steps for name, n in n_bytes.items()}
    everyone.wait()
    if everyone.is_first:
        print(json.dumps({"seconds": time.perf_counter() - begin, "bytes": exchanged}), flush=True)
    leave()


def expected_bytes(args: argparse.Namespace, job: str, world: int) -> int:
    """Return the bytes of a step by calculation: 4 for each number in float32."""
    if job == "data":
        return 4 * (2 * D_IN * args.d_sae + args.d_sae + D_IN)
    return 4 * (args.batch * (D_IN + world * K) + D_IN) if job == "latents" else 0


def timed(args: argparse.Namespace, job: str, n: int, scratch: str) -> dict[str, Any]:
    """Run a job in n processes that share two threads, and return what the first one prints."""
    given = ["--worker", job, "--scratch", scratch, "--cache", f"{scratch}/cache"]
    given += [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in ("tokens", "steps", "batch", "d_sae")]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)] if n > 1 else []
    command = [sys.executable, *launcher, __file__, *given]
    env = os.environ | {"OMP_NUM_THREADS": str(args.threads // n)}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    made = parser(__doc__, rounds=3, peers=None)
    made.add_argument("--jobs", nargs="+", choices=JOBS, default=JOBS)
    made.add_argument("--tokens", type=int, default=530_000, help="of the capture, in sections of about 131,000")
    made.add_argument("--steps", type=int, default=60, help="of each training")
    made.add_argument("--batch", type=int, default=2048)
    made.add_argument("--d-sae", type=int, default=12_288, help="latents of one dictionary; four times those of the sweep")
    made.add_argument("--worker", choices=JOBS, help=argparse.SUPPRESS)
    made.add_argument("--scratch", help=argparse.SUPPRESS)
    made.add_argument("--cache", help=argparse.SUPPRESS)
    args = made.parse_args()
    if args.worker:
        worker(args)
        return
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        lm, text = sl.load_model("tiny", device="cpu"), [page.text for page in sl.python_docs()]
        sl.capture(lm, text, HOOK, f"{scratch}/cache", n_tokens=200_000, n_ctx=128, shard_tokens=16_384)
        del lm
        torch.set_num_threads(1)
        for job in args.jobs:
            rounds = []
            for number in range(args.rounds):
                order = (1, 2) if number % 2 == 0 else (2, 1)
                rounds.append({n: timed(args, job, n, scratch) for n in order})
            one, two = ([done[n]["seconds"] for done in rounds] for n in (1, 2))
            ratios = sorted(a / b for a, b in zip(one, two, strict=True))
            exchanged, expected = rounds[0][2]["bytes"], expected_bytes(args, job, 2)
            report[job] = {"one": one, "two": two, "bytes_per_step": exchanged, "expected_bytes": expected}
            print(
                f"{job:8} one process {statistics.median(one):6.2f} s  two {statistics.median(two):6.2f} s  "
                f"{statistics.median(ratios):.2f} times as fast ({ratios[0]:.2f} to {ratios[-1]:.2f})  "
                f"{sum(exchanged.values()) / 1e6:.3f} MB exchanged per {'token' if job == 'capture' else 'step'}, "
                f"expected {expected / 1e6:.3f}",
                flush=True,
            )
    write_report(args, report)


if __name__ == "__main__":
    main()
