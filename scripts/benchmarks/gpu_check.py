"""Measure training and capture on a GPU within five minutes, beside predictions, floors and targets.

    python scripts/benchmarks/gpu_check.py
    python scripts/benchmarks/gpu_check.py --only topk live     # lines that contain one of these words
    python scripts/benchmarks/gpu_check.py --tiny               # small sizes on a CPU, to test this script

Prints a line for each measurement, the most important first. `LINES` holds the other figures, all for one H100. "before" was
measured with an earlier version of this library, "floor" was measured with kernels made for the purpose or computed from the
measured time of their parts, and "predicted" was estimated without a GPU. An experiment that fails prints its error, and the
next one runs, in a fresh process if the GPU no longer answers. The last lines name the kernels that take longest in a step.

Needs torch, Triton, transformers and the library, but neither a network nor transformer-lens. On a computer without pydantic,
bring the wheels of pydantic, pydantic-core, annotated-types, typing-inspection and tomli-w. The plugins are found once the
library is installed (pip install --no-deps --no-build-isolation --target SITE . with SITE in PYTHONPATH).
"""

import argparse
import gc
import itertools
import json
import logging
import os
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from shared import HOOK, N_CTX, now, random_gpt2
from step import ALL, COUNTING, dead_latents, planted, trainer

import saelens_lite as sl
from saelens_lite.tokens import TokenRows
from saelens_lite.training import Trainer
from saelens_lite.training.step import SparseStep


class Line(NamedTuple):
    """The figures beside a measurement; None if it is unknown. Fewer milliseconds and more tokens are better."""

    unit: str
    before: float | None
    floor: float | None
    predicted: float | None
    target: float | None


# Batches of 8,192. The floors of a step with dead latents add the bfloat16 products of the dead half; those of first steps are
# five bfloat16 products and four passes over [batch d_sae]; those of live training add the model's forward pass in bfloat16
# (3,313 ktokens/s) and the floor of the step.
LINES = {
    "topk 768 → 24,576": Line("ms", 9.28, 1.95, 2.4, 2.3),
    "topk 768 → 24,576, 2 % dead": Line("ms", 13.1, 2.1, 2.9, 3.0),
    "topk 768 → 24,576, 50 % dead": Line("ms", 17.6, 2.9, 4.8, 3.5),
    "live training, bfloat16 model": Line("ktokens/s", 658, 1850, 1600, 1500),
    "live training, default": Line("ktokens/s", 243, None, 1000, 700),
    "four dictionaries at once, bfloat16 model": Line("ktokens/s", 184, 800, 680, 600),
    "topk 2304 → 65,536": Line("ms", 25.1, 11.75, 12.8, 13),
    "topk 2304 → 65,536, 50 % dead": Line("ms", 133, 17.9, 24, 20),
    "waits of topk": Line("a step", 8, 0, 0, 0),
    "l1, L0 100": Line("ms", 12, 3.93, 4.4, 4.5),
    "batch_topk": Line("ms", 13.5, 2.1, 2.9, 3.5),
    "gated, L0 100": Line("ms", 15.8, 4.4, 4.9, 5),
    "jumprelu, L0 100": Line("ms", 15.6, 3.93, 4.7, 5),
    "matryoshka": Line("ms", 17.3, 2.6, 4.0, 5),
    "first steps of l1": Line("ms", 62, 3.5, 12.5, 12),
    "first steps of gated": Line("ms", 81, 4.5, 17, 15),
    "capture to disk, bfloat16 model": Line("ktokens/s", 130, 3313, 1500, 1500),
    "a file and fsync, as tokens": Line("ktokens/s", None, None, None, None),
    "training from a cache": Line("ktokens/s", 475, None, None, None),  # target: .9 of the step alone
    **{f"waits of {rule}": Line("a step", None, 0, 0, 0) for rule in ("batch_topk", "group_max")},
    **{f"waits of {rule}": Line("a step", None, 1, 1, 1) for rule in ("matryoshka", "l1", "gated", "jumprelu", "p_anneal")},
    "waits of matching_pursuit": Line("a step", None, None, None, None),
    "launches of topk": Line("a step", 239, 12, 100, None),
    "the GPU is busy in topk": Line("ms", 5.3, 1.95, 2.0, None),
}
REAL = {
    "size": (768, 24_576), "large": (2304, 65_536), "batch": 8192, "k": 32, "l0": 100, "seconds": 0.4, "steps": 200,
    "rows": 8192, "buffer": 262_144, "model": {},
}  # fmt: skip
TINY = {
    "size": (32, 256), "large": (48, 512), "batch": 64, "k": 4, "l0": 16, "seconds": 0.0, "steps": 20, "rows": 64,
    "buffer": 1024, "model": {"n_embd": 32, "n_layer": 9, "n_head": 2, "n_positions": N_CTX, "vocab_size": 500},
}  # fmt: skip

Found = tuple[float, str]  # a measurement and a remark


class Check:
    """The experiments, by the names of their lines."""

    def __init__(self, device: str, tiny: bool, folder: Path):
        self.device, self.of, self.folder = device, SimpleNamespace(**(TINY if tiny else REAL)), folder
        self.step_ms: float | None = None
        k = self.of.k
        self.experiments: dict[str, Callable[[], Found]] = {
            "topk 768 → 24,576": lambda: self.step("topk"),
            "topk 768 → 24,576, 2 % dead": lambda: self.step("topk", dead=0.02),
            "topk 768 → 24,576, 50 % dead": lambda: self.step("topk", dead=0.5),
            "live training, bfloat16 model": lambda: self.live(True, [k]),
            "live training, default": lambda: self.live(False, [k]),
            "four dictionaries at once, bfloat16 model": lambda: self.live(True, [k // 2, k, 2 * k, 4 * k]),
            "topk 2304 → 65,536": lambda: self.step("topk", large=True),
            "topk 2304 → 65,536, 50 % dead": lambda: self.step("topk", large=True, dead=0.5),
            "l1, L0 100": lambda: self.step("l1"),
            "batch_topk": lambda: self.step("batch_topk"),
            "gated, L0 100": lambda: self.step("gated"),
            "jumprelu, L0 100": lambda: self.step("jumprelu"),
            "matryoshka": lambda: self.step("matryoshka"),
            "first steps of l1": lambda: self.step("l1", first=True),
            "first steps of gated": lambda: self.step("gated", first=True),
            "capture to disk, bfloat16 model": self.capture,
            "a file and fsync, as tokens": self.plain_file,
            "training from a cache": self.from_cache,
        }
        if device == "cuda":
            self.experiments |= {f"waits of {rule}": partial(self.waits, rule) for rule in ALL}
            self.experiments |= {"launches of topk": self.launches, "the GPU is busy in topk": self.busy}

    # --- steps ---

    def made(self, rule: str, large: bool = False, dead: float = 0.0, first: bool = False) -> tuple[Trainer, torch.Tensor]:
        """Return a trainer that has begun, and its batches. Rules without a k get biases that make l0 latents fire."""
        d_in, d_sae = self.of.large if large else self.of.size
        shape = {"d_in": d_in, "d_sae": d_sae, "k": self.of.k, "batch": self.of.batch, "batches": 3}
        args = argparse.Namespace(**shape, device=self.device, dead=dead, first_steps=first)
        x, directions, bias = planted(args)
        made = trainer(rule, SparseStep, x, directions, bias, args)
        made.since_fired[dead_latents(args)] = made.config.dead_after
        made.step(x[0])  # scales the untrained encoder
        d = made.dictionary
        if rule not in COUNTING and not first:
            h = (x[0][:256] - d.b_dec.detach()) @ d.W_enc.detach()
            per_row = h.topk(self.of.l0, dim=1).values[:, -1]
            (d.rule.b_gate if rule == "gated" else d.b_enc).data.fill_(-float(per_row.mean()))
        return made, x

    def step(self, rule: str, **how: Any) -> Found:
        """Return the milliseconds of a step."""
        made, x = self.made(rule, **how)
        batches = itertools.cycle(x)

        def seconds(n: int) -> float:
            start = now(self.device)
            for batch in itertools.islice(batches, n):
                made.step(batch)
            return (now(self.device) - start) / n

        seconds(5)
        n = min(100, max(3, round(self.of.seconds / seconds(2))))
        made.log_line()
        found = 1000 * statistics.median(seconds(n) for _ in range(3))
        line = made.log_line()
        if rule == "topk" and not how:
            self.step_ms = found
        return found, f"L0 {line['l0']:.0f}, {line['dead']:.0%} dead"

    # --- from the model ---

    def model(self, halves: bool) -> sl.LanguageModel:
        """Return a model with the shape of GPT-2 small and random weights, loaded as a user loads it."""
        path = self.folder / "gpt2"
        if not path.exists():
            random_gpt2(**self.of.model).save_pretrained(path)
        lm = sl.load_model(path, device=self.device, **({"dtype": torch.bfloat16} if halves else {}))
        if find_spec("transformer_lens") is None:  # it would say no more than this of GPT-2's residual stream
            from saelens_lite.model.hooks import Architecture

            aliases = {"hook_resid_pre": "hook_in", "hook_resid_post": "hook_out"}
            blocks = SimpleNamespace(name="transformer.h", is_list_item=True, submodules={}, hook_aliases=aliases)
            lm.__dict__["_architecture"] = Architecture({"blocks": blocks}, {})
        return lm

    def text(self) -> TokenRows:
        """Return rows of random tokens."""
        vocabulary = self.of.model.get("vocab_size", 50_257)
        tokens = torch.randint(vocabulary, (self.of.rows, N_CTX), generator=torch.Generator().manual_seed(0))
        return TokenRows(tokens, torch.ones_like(tokens, dtype=torch.bool))

    def train(self, source: Any, ks: list[int]) -> float:
        """Return thousands of tokens a second that `train` takes from a source, after a tenth of the steps."""
        n_steps, batch, d_sae = self.of.steps, self.of.batch, self.of.size[1]
        common = {"d_sae": d_sae, "batch_size": batch, "n_tokens": n_steps * batch, "log_every": 10**9, "lr": 1e-5}
        first, last = n_steps // 10 * len(ks), n_steps * len(ks)
        ends, original, counted = {}, Trainer.step, itertools.count(1)

        def step(trainer: Trainer, *args: Any, **kwargs: Any) -> None:
            original(trainer, *args, **kwargs)
            if (number := next(counted)) in (first, last):
                ends[number] = now(self.device)

        with patch.object(Trainer, "step", step):
            sl.train(source, [sl.TrainConfig(options={"k": k}, **common) for k in ks], device=self.device)
        return (n_steps - n_steps // 10) * batch / (ends[last] - ends[first]) / 1000

    def live(self, halves: bool, ks: list[int]) -> Found:
        """Return the speed of training straight from the model."""
        lm = self.model(halves)
        stream = sl.ActivationStream(lm, self.text(), HOOK, buffer_tokens=self.of.buffer)
        return self.train(stream, ks), f"{self.of.steps} steps, {lm.dtype} model"

    def capture(self) -> Found:
        """Return the speed of writing activations to a cache."""
        lm, text, start = self.model(halves=True), self.text(), now(self.device)
        cache = sl.capture(lm, text, HOOK, self.folder / "cache", dtype="bfloat16")
        return cache.n_tokens / (now(self.device) - start) / 1000, f"{cache.n_tokens * lm.d_model * 2 / 1e9:.2f} GB"

    def plain_file(self) -> Found:
        """Return the speed of writing as many bytes to one file."""
        n_tokens, d_model = self.of.rows * N_CTX, self.of.model.get("n_embd", 768)
        piece, start = os.urandom(1 << 20), time.perf_counter()
        with open(self.folder / "plain", "wb") as file:
            for _ in range(max(1, n_tokens * d_model * 2 >> 20)):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        seconds = time.perf_counter() - start
        (self.folder / "plain").unlink()
        return n_tokens / seconds / 1000, f"{n_tokens * d_model * 2 / seconds / 1e9:.2f} GB/s"

    def from_cache(self) -> Found:
        """Return the speed of training from the cache that `capture` wrote."""
        found, remark = self.train(sl.ActivationCache.open(self.folder / "cache"), [self.of.k]), f"{self.of.steps} steps"
        if self.step_ms:
            remark += f"; {found * self.step_ms / self.of.batch:.2f} of the step alone, target .9"
        return found, remark

    # --- what the host does ---

    def waits(self, rule: str) -> Found:
        """Return the waits in a step that torch notices, as a mean over 16 steps, and the lines that wait."""
        made, x = self.made(rule)
        steps = [batch for batch, _ in zip(itertools.cycle(x), range(16), strict=False)]
        for batch in steps:
            made.step(batch)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                for batch in steps:
                    made.step(batch)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        noted = [w for w in caught if "synchronizing CUDA operation" in str(w.message)]
        places = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in noted)
        return len(noted) / len(steps), ", ".join(f"{place} ({n})" for place, n in places.most_common(6))

    @cached_property
    def kernels(self) -> list[tuple[str, float, float]]:
        """The kernels and copies of a top-k step: name, milliseconds and number in a step, the longest first."""
        from torch.profiler import ProfilerActivity, profile

        made, x = self.made("topk")
        for batch in itertools.chain(x, x):
            made.step(batch)
        now(self.device)
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            for batch in x:
                made.step(batch)
            now(self.device)
        of_device = [e for e in found.key_averages() if e.self_device_time_total > 0]
        kernels = [(e.key, e.self_device_time_total / len(x) / 1000, e.count / len(x)) for e in of_device]
        return sorted(kernels, key=lambda kernel: -kernel[1])

    def launches(self) -> Found:
        """Return the number of kernels and copies in a top-k step."""
        return sum(n for _, _, n in self.kernels), "kernels and copies"

    def busy(self) -> Found:
        """Return the milliseconds in which the GPU works on a top-k step, and print the kernels that take longest."""
        for name, ms, n in self.kernels[:20]:
            print(f"    {ms:8.3f} ms {n:6.1f} × {name[:100]}")
        return sum(ms for _, ms, _ in self.kernels), ""


def table_row(name: str, found: float, remark: str) -> str:
    """Return a line: the measurement, the figures beside it, and whether the target is met."""
    line = LINES[name]
    met = ""
    if line.target is not None:
        met = "yes" if (found >= line.target if line.unit == "ktokens/s" else found <= line.target) else "NO"
    figures = (found, line.predicted, line.floor, line.target, line.before)
    shown = "".join(f"{'–' if x is None else f'{x:,.2f}':>11}" for x in figures)
    return f"{name:42}{line.unit:>10}{shown}{met:>5}  {remark}"


@contextmanager
def card_described(device: str) -> Iterator[None]:
    """Print what the figures depend on: the card, the versions and the speed of a copy; at the end, the most memory in use."""
    print(f"torch {torch.__version__}, triton {_version('triton')}, transformers {_version('transformers')}, device {device}")
    if device == "cuda":
        a = torch.empty(1 << 28, device="cuda")
        b = torch.empty_like(a)
        for _ in range(3):
            b.copy_(a)
        start = now(device)
        for _ in range(20):
            b.copy_(a)
        copied = 20 * 2 * a.nbytes / (now(device) - start) / 1e12
        print(f"{torch.cuda.get_device_name()}, copies at {copied:.2f} TB/s (3.0 on the H100 of the other figures)")
        del a, b
    yield
    if device == "cuda":
        print(f"most memory in use: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "(none)"


def answers() -> bool:
    """Return whether the GPU still answers; after an illegal access it does not, in this process."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def run(check: Check, name: str, report: Callable[[dict[str, Any]], None]) -> None:
    """Run an experiment and print its line, or its error."""
    try:
        found, remark = check.experiments[name]()
    except Exception as error:  # the other experiments still count
        where = traceback.extract_tb(error.__traceback__)[-1]
        report({"line": name, "error": traceback.format_exc()})
        reason = f"{type(error).__name__}: {str(error)[:300]} ({Path(where.filename).name}:{where.lineno})"
        print(f"{name:42} failed: {reason}", flush=True)
        return
    report({"line": name, "found": found, "remark": remark, **LINES[name]._asdict()})
    print(table_row(name, found, remark), flush=True)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--tiny", action="store_true", help="small sizes, on a CPU unless there is a GPU")
    options.add_argument("--only", nargs="+", default=[""], help="words; measure the lines that contain one of them")
    options.add_argument("--minutes", type=float, default=5.0, help="time after which no experiment starts")
    options.add_argument("--json", type=Path, help="file to which a line of JSON is added for each measurement")
    args = options.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.tiny:
        raise SystemExit("torch finds no CUDA device here; --tiny tests this script on a CPU")
    logging.getLogger("saelens_lite").setLevel(logging.ERROR)
    end = time.monotonic() + 60 * args.minutes

    def report(entry: dict[str, Any]) -> None:
        if args.json:
            with args.json.open("a") as file:
                file.write(json.dumps(entry) + "\n")

    with tempfile.TemporaryDirectory() as folder, card_described(device):
        titles = ("measured", "predicted", "floor", "target", "before")
        print(f"{'':52}{''.join(f'{title:>11}' for title in titles)}  met", flush=True)
        check = Check(device, args.tiny, Path(folder))
        names = [name for name in LINES if name in check.experiments and any(word in name for word in args.only)]
        for i, name in enumerate(names):
            if (left := end - time.monotonic()) < 0:
                print(f"left out, the time is up: {'; '.join(names[i:])}", flush=True)
                break
            run(check, name, report)
            gc.collect()
            if device == "cuda" and not answers() and names[i + 1 :]:
                again = ["--minutes", str(left / 60), *(["--tiny"] if args.tiny else [])]
                again += ["--json", str(args.json)] if args.json else []
                os.execv(sys.executable, [sys.executable, __file__, *again, "--only", *names[i + 1 :]])
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
