"""The checks of a file format. Each returns a short result, or raises the fault and its remedy."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from saelens_lite import registry
from saelens_lite.config import Origin
from saelens_lite.dictionary import Dictionary
from saelens_lite.errors import ConfigError, CorruptFileError, PluginError, SaelensLiteError
from saelens_lite.formats import Format, write
from saelens_lite.ports import Port
from saelens_lite.testing.report import CheckFailed, NotChecked

D_IN, D_SAE = 8, 32
RULES = {"l1": {}, "topk": {"k": 4}, "gated": {}, "jumprelu": {}, "batch_topk": {"k": 4}, "matryoshka": {"k": 4}}
HOOKS = ("blocks.0.ln2.hook_normalized", "blocks.0.hook_resid_post")  # the second for formats that cannot name the first
TARGET = "blocks.0.hook_mlp_out"
JUNK = (b"", b"junk", b"PK\x03\x04", b"\x80\x02}q\x00.", b"{" * 1000, bytes(range(256)) * 40)


@dataclass
class Bench:
    """A format and the name that loads it."""

    format: type[Format]
    name: str

    @property
    def reads(self) -> bool:
        """True if the format can read files."""
        return self.format.outline is not Format.outline or self.format.read is not Format.read

    @property
    def writes(self) -> bool:
        """True if the format can write files."""
        return self.format.write is not Format.write

    @contextmanager
    def written(self) -> Iterator[dict[str, tuple[Dictionary, Path]]]:
        """Write random dictionaries of several rules, autoencoders and transcoders. Yield each with its path, by name.

        Dictionaries that the format refuses are left out.
        """
        with tempfile.TemporaryDirectory(prefix="check-plugin-") as parent:
            written = {}
            for rule, d_out in [(rule, d_out) for rule in RULES for d_out in (None, D_IN)]:
                name = f"{rule}{' transcoder' if d_out else ''}"
                for d in (random_dictionary(rule, d_out, hook) for hook in HOOKS):
                    with suppress(ConfigError):
                        written[name] = d, write(d, Path(parent) / name, self.format())
                        break
            yield written


def random_dictionary(rule: str, d_out: int | None, hook: str) -> Dictionary:
    """Return a dictionary with random parameters."""
    ports = {"reads": Port(hook=hook, width=D_IN), "writes": Port(hook=TARGET, width=d_out) if d_out else None}
    d = Dictionary.create(rule, **ports, d_sae=D_SAE, options=RULES[rule], origin=Origin(model="m"))
    generator = torch.Generator().manual_seed(0)
    for parameter in d.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return d


def does_something(bench: Bench) -> str:
    """Check that the format reads or writes, and that a reader detects its files."""
    if not bench.reads and not bench.writes:
        raise CheckFailed("neither outline(path) nor write(dictionary, folder) is defined")
    if bench.reads and bench.format.detect is Format.detect:
        raise CheckFailed("it reads files, but detect(path) is not defined")
    return " and ".join(verb for verb, does in (("reads", bench.reads), ("writes", bench.writes)) if does)


def junk(bench: Bench) -> str:
    """Check that a foreign file is not detected, and that reading it raises a typed error."""
    if not bench.reads:
        raise NotChecked("it only writes")
    with tempfile.TemporaryDirectory(prefix="check-plugin-") as parent:
        places = [Path(parent) / "empty", Path(parent) / "nowhere"]
        places[0].mkdir()
        for i, content in enumerate(JUNK):
            places.append(Path(parent) / str(i))
            places[-1].write_bytes(content)
        for path in places:
            if bench.format().detect(path):
                raise CheckFailed(f"detect accepts {path.name}, which holds {'junk' if path.is_file() else 'nothing'}")
            try:
                bench.format().read(path)
            except SaelensLiteError:
                continue
            raise CheckFailed(f"reading {path.name} raises no error; raise CorruptFileError")
    return f"{len(places)} places that hold nothing"


@torch.no_grad()
def comes_back(bench: Bench) -> str:
    """Check that only this format detects its own files, and that it reads back the same numbers."""
    if not (bench.reads and bench.writes):
        raise NotChecked("it does not both read and write")
    x = torch.randn(50, D_IN, generator=torch.Generator().manual_seed(1))
    with bench.written() as written:
        for name, (d, path) in written.items():
            if not bench.format().detect(path):
                raise CheckFailed(f"detect rejects its own file {name}")
            others = [p.name for p in registry.plugins("formats") if p.name != bench.name and _detects(p.name, path)]
            if others:
                raise CheckFailed(f"{', '.join(others)} detects {name} too; make detect check more than one name")
            again = bench.format().read(path)
            pairs = ((d.encode(x).to_dense(), again.encode(x).to_dense()), (d(x), again(x)))
            error = max(float((ours - theirs).abs().max() / ours.abs().max()) for ours, theirs in pairs)
            if error > 1e-5:
                raise CheckFailed(f"codes or x_hat of {name} are {error:.1e} (relative) off when read again")
        if not written:
            raise CheckFailed(f"none of {', '.join(RULES)} can be written")
    return f"{len(written)} dictionaries: {', '.join(written)}"


def damaged(bench: Bench) -> str:
    """Check that reading truncated files raises a typed error."""
    if not (bench.reads and bench.writes):
        raise NotChecked("it does not both read and write")
    with bench.written() as written:
        _, folder = next(iter(written.values()))
        for file in sorted(folder.iterdir()):
            whole = file.read_bytes()
            for length in (0, len(whole) // 2, len(whole) - 3):
                file.write_bytes(whole[:length])
                try:
                    bench.format().read(folder)
                except CorruptFileError:
                    continue
                raise CheckFailed(f"{file.name} cut to {length} of {len(whole)} bytes is read without CorruptFileError")
            file.write_bytes(whole)
        return f"{len(list(folder.iterdir()))} files, each cut in three places"


def _detects(name: str, path: Path) -> bool:
    try:
        return registry.load(name, "formats")().detect(path)
    except PluginError:  # broken, or not allowed
        return False


CHECKS: tuple[tuple[str, Callable[[Bench], str], tuple[str, ...]], ...] = (
    ("reads or writes", does_something, ()),
    ("junk", junk, ("reads or writes",)),
    ("round trip", comes_back, ("reads or writes",)),
    ("damage", damaged, ("round trip",)),
)
