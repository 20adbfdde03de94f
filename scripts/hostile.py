"""Damage to files: what accidents and malice do to the files of `foreign`, at random from a seed."""

import json
import random
import struct
from pathlib import Path
from typing import Any

NUMBERS = [0, -1, 1, 7, 2**31, 2**63, 10**30, 0.5, -0.0, float("nan"), float("inf")]
STRINGS = ["", "x", "10", "float16", "../x", "F32", "BOOL", "cfg.json", "\x00" * 9]
VALUES: list[Any] = [None, True, False, *NUMBERS, *STRINGS, [], {}, [1, 2], [-1, 10], [2**40, 2**40], {"k": 3}, [[[[[]]]]]]


def damage(path: Path, seed: int) -> str:
    """Change one or several of the files of a dictionary; what was done, in words."""
    rng = random.Random(seed)
    done = []
    for _ in range(rng.choice((1, 1, 2, 4))):
        files = sorted(file for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())
        if not files:
            break
        file = rng.choice(files)
        act = rng.choice(ACTS)
        done.append(f"{file.name}: {act.__name__}")
        act(file, rng)
    return ", ".join(done)


def flip(file: Path, rng: random.Random) -> None:
    """Other bytes, at the beginning or end where headers are, or anywhere."""
    content = bytearray(file.read_bytes())
    for _ in range(rng.choice((1, 3, 30))):
        if content:
            near = min(len(content), rng.choice((16, 600, len(content))))
            at = rng.randrange(near)
            content[-1 - at if rng.random() < 0.4 else at] = rng.randrange(256)
    file.write_bytes(content)


def truncate(file: Path, rng: random.Random) -> None:
    """Only the beginning."""
    content = file.read_bytes()
    file.write_bytes(content[: rng.randrange(len(content) + 1)])


def extend(file: Path, rng: random.Random) -> None:
    """Append bytes to the end."""
    file.write_bytes(file.read_bytes() + rng.choice((b"\0", b"}", b"junk" * 99)))


def splice(file: Path, rng: random.Random) -> None:
    """Copy a piece over another."""
    content = bytearray(file.read_bytes())
    if content:
        a, b, n = rng.randrange(len(content)), rng.randrange(len(content)), rng.randrange(1, 40)
        content[a : a + n] = content[b : b + n]
    file.write_bytes(content)


def remove(file: Path, rng: random.Random) -> None:
    """Remove a file, or put a folder in its place."""
    file.unlink()
    if rng.random() < 0.3:
        file.mkdir()


def nest(file: Path, rng: random.Random) -> None:
    """JSON deeper than anybody reads."""
    depth = rng.choice((500, 100_000))
    file.write_text('{"trainer": ' * depth + "1" + "}" * depth)


def edit(file: Path, rng: random.Random) -> None:
    """Change a value or a name somewhere in a settings file or in the header of a safetensors file."""
    content = file.read_bytes()
    try:
        if file.suffix == ".safetensors":
            (size,) = struct.unpack("<Q", content[:8])
            header = _edited(json.loads(content[8 : 8 + size]), rng)
            written = json.dumps(header).encode()
            file.write_bytes(struct.pack("<Q", len(written)) + written + content[8 + size :])
        else:
            file.write_text(json.dumps(_edited(json.loads(content), rng)))
    except (ValueError, struct.error, RecursionError):
        flip(file, rng)


def _edited(value: Any, rng: random.Random) -> Any:
    """Return a copy with one change at a random depth."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value, key=str))
        if rng.random() < 0.15:
            return {k if k != key else rng.choice(("W_dec", "extra", "")): v for k, v in value.items()}
        if rng.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return value | {key: _edited(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        return [_edited(item, rng) if i == at else item for i, item in enumerate(value)]
    return rng.choice(VALUES)


ACTS = (flip, flip, truncate, extend, splice, remove, nest, edit, edit, edit, edit, edit)
