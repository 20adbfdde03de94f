"""Forge the folders of runs, caches, feature stores and dictionaries, load them, and count what comes of it.

    python scripts/forged_files.py --n 2000

Each folder is a copy of a small valid one in which something was changed, by a seed: values and keys of JSON, headers and
tensors of safetensors files, bytes, and files replaced by pipes, links, folders or a terabyte of holes. In two thirds of them
the checksums are made to fit again, as a forger would. A process of its own loads each, with 1 GiB of memory beyond what it
was born with and 10 s of time; Python's audit events show which files it opens, removes, renames or makes outside of the
folder. (Its lock beside it is its own. What safetensors opens itself is not seen; it gets paths that were checked just before.)

A typed error is right, and so is a folder that loads, works and can be saved again. Everything else is a fault, printed with
its kind and seed; `--kind run --seed 7 --n 1` repeats it. Exit code 1 when there are any.
"""

import argparse
import hashlib
import json
import logging
import math
import os
import random
import resource
import shutil
import signal
import struct
import sys
import sysconfig
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

import saelens_lite as sl
from saelens_lite import registry
from saelens_lite.cache import TensorSource
from saelens_lite.errors import SaelensLiteError

SECONDS, MEMORY, GIANT = 10, 1 << 30, 1 << 40
HOOKS = ["blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre"]
COLUMNS = ("typed", "loaded", "untyped", "slow", "memory", "outside", "wrong")
FAULTS = COLUMNS[2:]
EVENTS = {
    "open",
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.truncate",
    "os.link",
    "os.symlink",
    "os.chmod",
    "os.utime",
}
FORBIDDEN = {"socket.connect", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"}

INTEGERS = [0, -1, 1, 2, 7, 2**31, 2**53, 2**63, 2**64, 10**12, 10**30, 10**400, -(10**30)]
REALS = [0.5, -0.0, 1e-300, 1e300, float("nan"), float("inf"), float("-inf")]
STRINGS = [
    "", "x", "10", "float64", "F64", "I8", "BOOL", "tokens", "../state.json", "../../outside", "/etc/passwd", "a/b", "a\\b",
    "..", ".", "C:\\x", "\0", "x\0y", "n" * 5000, "\u202e\u0007", "é", "CON", "shard-00000.safetensors", "cfg.json", "cuda:99",
    "nan", "0" * 64, "f" * 64, "topk", "-1", "007",
]  # fmt: skip
VALUES: list[Any] = [
    None,
    True,
    False,
    *INTEGERS,
    *REALS,
    *STRINGS,
    [],
    {},
    [1, 2],
    [[[]]],
    {"k": 3},
    {"format": 1},
    [None] * 50,
]


class Enough(Exception):
    """The source has no more batches."""


class Short(TensorSource):
    """Activations in memory of which only a few batches are given."""

    def __init__(self, n_batches: int):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(200, 6, generator=generator)
        super().__init__({"a": x, "b": x @ torch.randn(6, 5, generator=generator)})
        self.n_batches = n_batches

    def hold_out(self, n_tokens: int) -> tuple[TensorSource, "Short"]:
        """Return activations to validate on; those that are left are as few as before."""
        return super().hold_out(n_tokens)[0], self

    def batches(self, hooks: Any, batch_size: int, seed: int, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Any]:
        """Yield a few batches, then Enough."""
        for number, batch in enumerate(super().batches(hooks, batch_size, seed, start, rank, world)):
            if number == self.n_batches:
                raise Enough
            yield batch


class Kind(NamedTuple):
    """A kind of folder: how to make one, and how to load and use it; a hash of what has to be right where checksums are."""

    make: Callable[[Path], Any]
    load: Callable[[Path], str]
    sign: Callable[[Path], None]


def hashed(tensors: dict[str, torch.Tensor]) -> str:
    """Return a hash of named tensors."""
    digest = hashlib.sha256()
    for name, x in sorted(tensors.items()):
        digest.update(
            f"{name} {x.dtype} {tuple(x.shape)}".encode() + x.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()


def make_run(folder: Path) -> None:
    """Write an interrupted run of an autoencoder and a transcoder."""
    shared = {"d_sae": 12, "batch_size": 16, "n_tokens": 10_000, "log_every": 20, "options": {"k": 2}}
    configs = [sl.TrainConfig(hook="a", **shared), sl.TrainConfig(hook="a", writes=("b",), skip=True, **shared)]
    try:
        sl.train(Short(6), configs, folder, validation_tokens=20, checkpoint_seconds=0.0, device="cpu")
    except Enough:
        for older in sorted(folder.glob("checkpoints/[0-9]*"))[:-1]:  # else it would be read in place of the damaged one
            shutil.rmtree(older)


def load_run(folder: Path) -> str:
    """Resume it for a few batches."""
    try:
        sl.resume(folder, Short(8), device="cpu", checkpoint_seconds=1e6)
    except Enough:
        return ""
    return ""


def sign_run(folder: Path) -> None:
    """Make checksums.json and the hashes of histories say what is there."""
    for path in folder.glob("checkpoints/*/checksums.json"):
        with_json(path.with_name("state.json"), lambda content, path=path: sign_histories(content, path.parent.parent))
        with_json(path, lambda content, path=path: content["sha256"].update(sums(path.parent, content["sha256"])))


def sign_histories(state: dict[str, Any], folder: Path) -> None:
    """Make the parts of histories in state.json those that the files hold."""
    for i, part in enumerate(state["histories"]):
        if hashes := sums(folder, [f"history-{i}.jsonl"]):
            part.update(bytes=(folder / f"history-{i}.jsonl").stat().st_size, sha256=hashes[f"history-{i}.jsonl"])


def make_cache(folder: Path) -> None:
    """Write a cache of two hooks of the embedded model."""
    text = ["the quick brown fox jumps over the lazy dog " * 9] * 3
    lm = sl.load_model("tiny", device="cpu")
    sl.capture(lm, text, HOOKS, folder, n_ctx=32, shard_tokens=60, dtype="float16")


def load_cache(folder: Path) -> str:
    """Read all of it, and some batches."""
    cache = sl.ActivationCache.open(folder)
    for hook in cache.hooks:
        cache.statistics(hook), cache.origin(hook), cache.d_in(hook)
    cache.verify()
    found = [cache.read_shard(i) for i in range(len(cache.manifest["shards"]))]
    next(cache.batches(cache.hooks, 8, seed=0))
    return hashed({f"{i} {name}": x for i, shard in enumerate(found) for name, x in shard.items()})


def sign_cache(folder: Path) -> None:
    """Make the manifest say the sizes and checksums that are there."""

    def sign(content: dict[str, Any]) -> None:
        for shard in content["shards"]:
            path = folder / Path(shard["file"]).name
            shard |= {"bytes": path.stat().st_size, "sha256": sums(folder, [path.name]).get(path.name, shard["sha256"])}

    with_json(folder / "manifest.json", sign)


def make_store(folder: Path) -> None:
    """Write the store of a small dictionary on the embedded model, with codes, control, labels and scores."""
    lm = sl.load_model("tiny", device="cpu")
    origin, reads = sl.Origin(model="tiny"), sl.Port(hook=HOOKS[0], width=lm.d_model)
    d, other = (sl.Dictionary.create("topk", reads=reads, d_sae=20, options={"k": 3}, seed=s, origin=origin) for s in (0, 1))
    scores = sl.stability(d, [other])
    text = ["the quick brown fox jumps over the lazy dog " * 9] * 3
    sizes = {"top_n": 2, "n_groups": 2, "group_size": 1, "n_random": 2, "n_silent": 2, "window": (2, 1)}
    store = sl.FeatureStore.build(d, lm, text, out=folder, control=True, stability=scores, **sizes)
    store.label(3, "foxes")
    store.write_labels()


def load_store(folder: Path) -> str:
    """Ask about some latents, and save it again."""
    store = sl.FeatureStore.load(folder)
    for latent in {0, 3, store.info.d_sae - 1}:
        store.latent(latent)
    store.save(folder / "again")
    control = {} if store.control is None else {f"control {name}": x for name, x in store.control.tensors._asdict().items()}
    return hashed(store.tensors._asdict() | store.weights._asdict() | control)


def sign_store(folder: Path) -> None:
    """Make features.json say the checksums that are there."""
    with_json(folder / "features.json", lambda content: content["sha256"].update(sums(folder, content["sha256"])))


def make_dictionary(folder: Path) -> None:
    """Write a dictionary of a rule with tensors of its own, a density and an evaluation."""
    origin = sl.Origin(model="tiny", n_ctx=32, excluded_positions=(0, 31))
    d = sl.Dictionary.create("jumprelu", reads=sl.Port(hook=HOOKS[0], width=6), d_sae=10, origin=origin)
    d.density = torch.linspace(0, 1, 10)
    d.training_record = {"config": {"lr": 0.1}, "tokens": 5}
    d.save(folder)
    metric = {"value": 0.5, "low": 0.4, "high": None}
    facts = {"n_tokens": 9, "n_sequences": 3, "text": "t", "text_sha256": "0" * 64, "disjoint": None, "disjoint_why": "?"}
    facts |= {"model": "tiny", "hook": HOOKS[0], "excluded": "none", "read_hook": None}
    report = {"format": 2, "metrics": {"fvu": metric, "l0": metric}, **facts}
    (folder / "eval.json").write_text(json.dumps(report))
    (folder / "README.md").write_text("a card")


def load_dictionary(folder: Path) -> str:
    """Use it, read its evaluation, and save it again."""
    d = sl.load(folder)
    if not torch.isfinite(d(torch.ones(2, d.d_in))).all():
        raise AssertionError("a dictionary that does not give numbers")
    d.save(folder / "again")
    if os.path.lexists(folder / "eval.json"):
        sl.EvalReport.from_json(folder / "eval.json").to_json(folder / "again.json")
    return ""


KINDS = {
    "run": Kind(make_run, load_run, sign_run),
    "cache": Kind(make_cache, load_cache, sign_cache),
    "store": Kind(make_store, load_store, sign_store),
    "dictionary": Kind(make_dictionary, load_dictionary, lambda folder: None),
}


# --- forging -----------------------------------------------------------------------------------------------------------------


def with_json(path: Path, change: Callable[[Any], Any]) -> None:
    """Change what a JSON file holds; nothing where it is none."""
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > 1 << 24:
            return
        content = json.loads(path.read_bytes())
        change(content)
        path.write_text(json.dumps(content))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError):
        return


def sums(folder: Path, names: Any) -> dict[str, str]:
    """Return the SHA-256 of files that are there and small."""
    paths = {name: folder / name for name in names if "/" not in name and "\0" not in name and len(name) < 200}
    whole = {n: p for n, p in paths.items() if p.is_file() and not p.is_symlink() and p.stat().st_size < 1 << 24}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in whole.items()}


def forge(kind: Kind, folder: Path, rng: random.Random) -> tuple[str, bool]:
    """Change one or a few things in a folder; what was done, and whether the checksums fit again."""
    done = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
        if not files:
            break
        file = rng.choice(files)
        if file.stat().st_size > 1 << 24:
            continue
        acts = [flip, truncate, extend, replace, replace]
        acts += [edit] * 14 if file.suffix in (".json", ".jsonl") else []
        acts += [header] * 6 + [tensors] * 6 if file.suffix == ".safetensors" else []
        acts += [raw] * 2 if file.suffix in (".json", ".jsonl", ".toml") else []
        act = rng.choice(acts)
        done.append(f"{file.relative_to(folder)}: {act.__name__} {act(file, rng) or ''}")
    if signed := rng.random() < 2 / 3:
        kind.sign(folder)
    return "; ".join(done), signed


def flip(file: Path, rng: random.Random) -> None:
    """Other bits."""
    content = bytearray(file.read_bytes())
    for _ in range(rng.choice((1, 3, 30))):
        if content:
            content[rng.randrange(min(len(content), rng.choice((16, 600, len(content)))))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def truncate(file: Path, rng: random.Random) -> None:
    """Only the beginning."""
    content = file.read_bytes()
    file.write_bytes(content[: rng.randrange(len(content) + 1)])


def extend(file: Path, rng: random.Random) -> None:
    """Append bytes to the end."""
    with open(file, "ab") as stream:
        stream.write(rng.choice((b"\0", b"}", b"junk" * 99, b"\n{}\n")))


def replace(file: Path, rng: random.Random) -> str:
    """Replace a file by a folder or device, a link out of the folder, or a terabyte of holes."""
    how = rng.choice(("nothing", "pipe", "folder", "outside", "device", "dangling", "itself", "giant", "giant tail", "sibling"))
    outside = file.parents[len(file.parents) - 1 - file.parts.index("copies")] / "outside"
    if how == "giant tail":
        os.truncate(file, GIANT)
        return how
    content = file.read_bytes()
    file.unlink()
    if how == "pipe":
        os.mkfifo(file)
    elif how == "folder":
        file.mkdir()
    elif how == "outside":
        (outside / file.name).write_bytes(content)
        file.symlink_to(outside / file.name)
    elif how in ("device", "dangling", "itself", "sibling"):
        file.symlink_to({"device": "/dev/zero", "dangling": outside / "nowhere", "itself": file, "sibling": "cfg.json"}[how])
    elif how == "giant":
        file.touch()
        os.truncate(file, GIANT)
    return how


def edit(file: Path, rng: random.Random) -> str:
    """Return another value or key somewhere in a JSON file, or in one of its lines."""
    lines = file.read_text(errors="replace").splitlines() if file.suffix == ".jsonl" else [file.read_text(errors="replace")]
    at = rng.randrange(len(lines)) if lines else 0
    try:
        lines[at] = json.dumps(edited(json.loads(lines[at]), rng), ensure_ascii=rng.random() < 0.5)
        file.write_text("\n".join(lines), errors="surrogatepass")
    except (ValueError, IndexError, RecursionError):
        flip(file, rng)
    return ""


def edited(value: Any, rng: random.Random) -> Any:
    """Return a copy with one change at a random depth."""
    if isinstance(value, dict) and value and rng.random() < 0.93:
        key = rng.choice(sorted(value, key=str))
        luck = rng.random()
        if luck < 0.08:
            return {k: v for k, v in value.items() if k != key}
        if luck < 0.14:
            return {k if k != key else rng.choice(STRINGS): v for k, v in value.items()}
        if luck < 0.2:
            return value | {rng.choice(STRINGS): rng.choice(VALUES)}
        return value | {key: edited(value[key], rng)}
    if isinstance(value, list) and value:
        luck, at = rng.random(), rng.randrange(len(value))
        if luck < 0.1:
            return value + [value[at]] * rng.choice((1, 50, 5000))
        if luck < 0.2:
            return value[:at] + value[at + 1 :]
        if luck < 0.25:
            return value[::-1]
        if luck < 0.9:
            return [edited(item, rng) if i == at else item for i, item in enumerate(value)]
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.6:
        return rng.choice((value + 1, value - 1, -value, value * 1000, value << 40, value << 80, *INTEGERS))
    if isinstance(value, float) and rng.random() < 0.5:
        return rng.choice((value * 1e3, -value, *REALS))
    return rng.choice(VALUES)


def raw(file: Path, rng: random.Random) -> str:
    """Return text that is hard to read: deep, broken in its letters, or with a key twice."""
    content = file.read_text(errors="replace")
    how, text = rng.choice(
        (
            ("deep lists", '{"a": ' + "[" * 100_000),
            ("deep tables", '{"format": ' * 900 + "1" + "}" * 900),
            ("150 levels", content.replace(": ", ": " + "[" * 150 + "0" + "]" * 150 + ', "z": ', 1)),
            ("half a character", content.replace('"', '"\\ud800', 1)),
            ("byte order mark", "\ufeff" + content),
            ("key twice", content.replace("{", '{"format": 9, "shards": [], ', 1)),
            ("nan", content.replace(": ", ': NaN, "y": ', 1)),
            ("1e999", content.replace(": ", ': 1e999, "y": ', 1)),
            ("many digits", content.replace(": ", ": " + "9" * 10_000 + ', "y": ', 1)),
            ("many values", '{"format": [' + "{}," * 3_000_000 + "{}]}"),
            ("nothing", ""),
            ("a list", "[]"),
        )
    )
    file.write_text(text)
    if rng.random() < 0.1:
        file.write_bytes(b"\xff\xfe" + file.read_bytes())
    return how


def header(file: Path, rng: random.Random) -> str:
    """Return another value in the header of a safetensors file, whose tensors stay."""
    content = file.read_bytes()
    try:
        (size,) = struct.unpack("<Q", content[:8])
        found = json.loads(content[8 : 8 + size])
        name = rng.choice(sorted(found))
        entry = found[name]
        if "data_offsets" not in entry or rng.random() < 0.3:
            found = edited(found, rng)
        elif rng.random() < 0.5:
            first, stop = entry["data_offsets"]
            entry["data_offsets"] = rng.choice(([first + 1, stop], [first, stop + GIANT], [0, stop], [stop, first], [-1, stop]))
        else:
            shape = entry["shape"]
            entry["shape"] = rng.choice(
                ([0, 2**62], [2**40, *shape], [*shape, 0], [-n for n in shape], shape[::-1], [*shape, 1])
            )
        written = json.dumps(found).encode()
        file.write_bytes(struct.pack("<Q", len(written)) + written + content[8 + size :])
        if rng.random() < 0.2:
            os.truncate(file, GIANT)
    except (ValueError, struct.error, RecursionError, AttributeError, TypeError, KeyError, IndexError):
        flip(file, rng)
    return ""


def tensors(file: Path, rng: random.Random) -> str:
    """Return a sound safetensors file with another tensor: its shape, type, name or numbers."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file

    try:
        with safe_open(file, "pt") as opened:
            metadata, found = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError:
        return ""
    if not found:
        return ""
    name = rng.choice(sorted(found))
    x, changes = found[name], {}
    how = rng.choice(("shape", "dtype", "missing", "extra", "numbers", "empty", "scalar", "long"))
    if how == "missing":
        del found[name]
    elif how == "numbers":
        value = rng.choice((-1, 0, 1, 127, float("nan"), float("inf"), -1e30, 2**31 - 1, 2**62))
        if x.is_floating_point():
            x.view(-1)[: rng.choice((1, 1000))] = value
        elif not math.isnan(value) and x.dtype != torch.bool:
            x.view(-1)[: rng.choice((1, 1000))] = int(max(torch.iinfo(x.dtype).min, min(torch.iinfo(x.dtype).max, value)))
    else:
        types = [torch.float64, torch.float16, torch.int8, torch.int64, torch.bool, torch.uint8, torch.float32]
        changes = {
            "shape": lambda: {name: x.flatten() if rng.random() < 0.5 else x[None]},
            "dtype": lambda: {name: x.to(rng.choice(types))},
            "extra": lambda: {rng.choice([s for s in STRINGS if s != "__metadata__"]): x.clone()},
            "empty": lambda: {name: x.new_empty(0, *x.shape[1:])},
            "scalar": lambda: {name: x.new_zeros(())},
            "long": lambda: {name: torch.cat([x.flatten()] * 2)},
        }[how]()
    save_file({k: v.contiguous().clone() for k, v in (found | changes).items()}, file, metadata=metadata)
    return f"{how} of {name}"


# --- loading -----------------------------------------------------------------------------------------------------------------


class Watch:
    """Notes what is done to files outside of a folder. An audit hook cannot be removed; `folder` switches it on."""

    def __init__(self) -> None:
        self.folder: str | None = None
        self.found: list[str] = []
        paths = {*sysconfig.get_paths().values(), sys.prefix, sys.base_prefix, str(Path(sl.__file__).parents[1])}
        self.allowed = tuple({os.path.realpath(p) for p in paths} | {"/proc", "/sys", "/dev/null", "/dev/shm"})
        sys.addaudithook(self._see)

    def _see(self, event: str, args: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event in FORBIDDEN:
            self.found.append(f"{event} {args!r:.200}")
        if event not in EVENTS:
            return
        for path in args[: 2 if event in ("os.rename", "os.link") else 1]:
            if isinstance(path, str | bytes | os.PathLike):
                place = os.path.realpath(os.fsdecode(path)) if event == "open" else os.path.abspath(os.fsdecode(path))
                above, name = os.path.split(self.folder)
                own = [self.folder, f"{above}/.{name}.saelens-lite.lock", *([above] if event == "os.mkdir" else [])]
                if place not in own and not place.startswith((f"{self.folder}/", *self.allowed)):
                    self.found.append(f"{event} {place[:200]}")


def attempt(kind: Kind, folder: Path, watch: Watch) -> dict[str, Any]:
    """Load a folder in this process; the verdict."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(SECONDS)
    watch.folder = os.path.realpath(folder)
    found: dict[str, Any] = {"value": "", "said": ""}
    try:
        verdict, found["value"] = "loaded", kind.load(folder)
    except SaelensLiteError as error:
        verdict, found["said"] = "typed", f"{type(error).__name__}: {error}"
    except MemoryError:
        verdict, found["said"] = "memory", traceback.format_exc(limit=-4)
    except BaseException:
        verdict, found["said"] = "untyped", traceback.format_exc(limit=-6)
    watch.folder = None
    if watch.found:
        verdict, found["said"] = "outside", "; ".join(watch.found[:5])
    return found | {"verdict": verdict}


def in_a_process(kind: Kind, folder: Path, watch: Watch) -> dict[str, Any]:
    """Load a folder in a process of its own, which may crash or hang; the verdict, with its peak of memory in bytes."""
    receiving, sending = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(receiving)
            result = attempt(kind, folder, watch)
            os.write(
                sending, json.dumps(result)[:60_000].encode() if len(result["said"]) < 50_000 else b'{"verdict": "untyped"}'
            )
        finally:
            os._exit(0)
    os.close(sending)
    with os.fdopen(receiving, "rb") as pipe:
        content = pipe.read()
    _, status, used = os.wait4(pid, 0)
    if content:
        found = json.loads(content)
    else:
        verdict = "slow" if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM else "untyped"
        found = {"verdict": verdict, "value": "", "said": f"the process ended with status {status}"}
    return found | {"peak": used.ru_maxrss * 1024}


def fuzz(name: str, n: int, seed: int, where: Path, watch: Watch, say: Callable[[str], None]) -> Counter:
    """Forge and load n folders of a kind; how many came to what, and in "peak" the most memory beyond what was there."""
    kind, original = KINDS[name], where / name
    if not original.exists():
        kind.make(original)
    copies, outside = where / "copies", where / "copies" / "outside"
    outside.mkdir(parents=True, exist_ok=True)
    kind.load(Path(shutil.copytree(original, copies / "whole")))  # imports what loading needs, once for all processes
    shutil.rmtree(copies / "whole")
    whole = in_a_process(kind, Path(shutil.copytree(original, copies / "whole")), watch)
    if whole["verdict"] != "loaded":
        raise SystemExit(f"the {name} that was not changed: {whole}")
    shutil.rmtree(copies / "whole")
    totals: Counter = Counter()
    for number in range(seed, seed + n):
        copy = copies / f"{name}-{number}"
        shutil.copytree(original, copy)
        done, signed = forge(kind, copy, random.Random(f"{name} {number}"))
        found = in_a_process(kind, copy, watch)
        verdict = found["verdict"]
        if verdict == "loaded" and not signed and found["value"] != whole["value"]:
            verdict, found["said"] = "wrong", "numbers that do not fit their checksums were loaded"
        totals[verdict] += 1
        totals["peak"] = max(totals["peak"], found["peak"] - whole["peak"])
        if verdict in FAULTS:
            say(f"{verdict.upper()} --kind {name} --seed {number}: {done[:300]}\n{found['said']}")
        shutil.rmtree(copy)
        for left in outside.iterdir():
            left.unlink()
    return totals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=2000, help="folders of each kind")
    parser.add_argument("--seed", type=int, default=0, help="where to start")
    parser.add_argument("--kind", choices=sorted(KINDS), action="append", help="default: all")
    args = parser.parse_args()
    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    logging.disable(logging.WARNING)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for kind in ("formats", "sparsity", "loggers"):  # what plugins import is not what a folder opens
        for plugin in registry.plugins(kind):
            if registry.check(plugin).status == "ok":
                registry.load(plugin.name, kind)
    watch, faults = Watch(), 0
    with tempfile.TemporaryDirectory() as where:
        lines = [("kind", "n", *COLUMNS, "MiB more", "s")]
        for name in args.kind or KINDS:
            start = time.monotonic()
            totals = fuzz(name, args.n, args.seed, Path(where), watch, lambda text: print(text, flush=True))
            faults += sum(totals[fault] for fault in FAULTS)
            numbers = (args.n, *(totals[column] for column in COLUMNS), totals["peak"] >> 20, round(time.monotonic() - start))
            lines.append((name, *map(str, numbers)))
            print("  ".join(f"{cell:>8}" for cell in lines[-1]), flush=True)
    print("\n" + "\n".join("  ".join(f"{cell:>10}" for cell in line) for line in lines))
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
