"""Damage to files: what accidents and malice do to the files of `foreign`, at random from a seed."""

import io
import json
import pickle
import random
import struct
import zipfile
from pathlib import Path
from typing import Any

MARKER = "was-executed"  # a file that hostile pickles would make
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


def repickle(file: Path, rng: random.Random) -> None:
    """Change the pickle in a PyTorch file, or a stored tensor, with correct checksums. Other files: as `edit`."""
    try:
        with zipfile.ZipFile(file) as archive:
            held = {member.filename: archive.read(member) for member in archive.infolist()}
    except Exception:  # any error of zipfile on a damaged file
        held = {}
    pickles = [name for name in held if name.endswith(".pkl") and held[name]]
    if not pickles:
        edit(file, rng)
        return
    name = pickles[0] if rng.random() < 0.8 else rng.choice(sorted(held))
    held[name] = _pickle(held[name], rng) if name == pickles[0] else held[name][: rng.randrange(len(held[name]) + 1)]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for inner, content in held.items():
            archive.writestr(inner, content)
    file.write_bytes(buffer.getvalue())


class Call:
    """An object whose pickle calls a function when it is loaded."""

    def __init__(self, *call: Any):
        self.call = call

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        function, *arguments = self.call
        return function, tuple(arguments)


def _pickle(content: bytes, rng: random.Random) -> bytes:
    """Return another pickle: changed bytes or names, a call before the tensors, or only a call."""
    how = rng.random()
    if how < 0.4:
        changed = bytearray(content)
        for _ in range(rng.choice((1, 2, 8))):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        return bytes(changed)
    if how < 0.6:  # a number or name of the state dict, of the same length
        old, new = rng.choice(((b"weight", b"weighs"), (b"W_dec", b"W_enc"), (b"bias", b"bits"), (b"Float", b"Short")))
        return content.replace(old, new)
    call = pickle.dumps(
        rng.choice((Call(open, MARKER, "w"), Call(eval, f"open({MARKER!r}, 'w')"), Call(bytearray, 1 << 40))), 2
    )
    return call if how < 0.8 else call[:-1] + b"0" + content[2:]  # its result is dropped, and the tensors follow


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


ACTS = (flip, flip, truncate, extend, splice, remove, nest, repickle, repickle, edit, edit, edit, edit, edit)
