"""Fetch public dictionaries by name from a Hub on the loopback interface that holds files of the names that they have.

    python scripts/comparisons/releases_hub.py --n 200 --seed 0

For formats that scripts/foreign.py writes, the files hold random tensors of that format; the dictionary is loaded, and its
codes are compared with the equation in float64. For other formats the files are placeholders, and only their list is compared.
"""

import argparse
import json
import os
import random
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from foreign import CASES, D_IN, Case
from hub_server import Blob, Hub, running_hub

PLACEHOLDER = b"not the weights"
RUN = json.dumps({"sae": {}, "exclude_tokens": [7, 3]}).encode()


class Files(NamedTuple):
    """The files of a dictionary by path in its repository, and the case that they hold; None for placeholders."""

    files: dict[str, bytes]
    case: Case | None = None


def files_of(entry, scratch: Path) -> Files:
    """Return the files that a public dictionary has in its repository."""
    path, name = entry.path, _case_of(entry)
    above, _, last = path.rpartition("/")
    place = f"{above}/" if above else ""
    if name is not None:
        case = CASES[name]
        wrote = case.write(scratch / "case")
        folder = wrote.parent if wrote.is_file() else wrote
        inside = {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.is_file()}
        inside = {file: _edited(content, entry) if file.endswith(".json") else content for file, content in inside.items()}
        if entry.format == "circuit_tracer":
            weights = next(file for file in inside if file.startswith("layer_"))
            return Files({f"{place}{last}": inside[weights], f"{place}config.yaml": inside["config.yaml"]}, case)
        files = {f"{path}/{file}": content for file, content in inside.items()}
        return Files(files | ({"config.json": RUN} if entry.format == "sparsify" else {}), case)
    if entry.format == "llamascopium" and "R1-Distill" not in entry.repo:
        return Files({f"{path}/hyperparams.json": b"{}", f"{path}/checkpoints/final.safetensors": PLACEHOLDER})
    if entry.format == "hook_z":
        return Files({path: PLACEHOLDER, f"{path.removesuffix('.pt')}_cfg.json": b"{}"})
    if entry.format == "temporal":
        return Files({f"{path}/conf.yaml": b"a: 1", f"{path}/latest_ckpt.safetensors": PLACEHOLDER})
    if entry.format == "qwen_scope":
        return Files({path: PLACEHOLDER, "config.json": b"{}"})
    if entry.format == "circuit_tracer":
        layers = [path] if path.isdigit() else range(3)
        parts = {f"W_{side}_{layer}.safetensors": PLACEHOLDER for layer in layers for side in ("enc", "dec")}
        return Files(parts | {"config.yaml": b"model_kind: cross_layer_transcoder"})
    if path.endswith((".pt", ".pth")):
        return Files({path: PLACEHOLDER})
    if not path or "." not in path.rpartition("/")[2] or entry.format == "llamascopium":
        return Files({f"{path}/config.json": b"{}", f"{path}/sae_weights.safetensors": PLACEHOLDER})
    return Files({path: PLACEHOLDER, f"{place}config.yaml": b"a: 1"})


def _case_of(entry) -> str | None:
    """Return the name of the case of scripts/foreign.py that has this dictionary's format."""
    if entry.format == "gemma_scope":
        if "gemma-scope-2-" not in entry.repo:
            return "gemma scope"
        return "gemma scope 2 skip" if entry.path.endswith("_affine") else "gemma scope 2"
    if entry.format == "circuit_tracer" and re.search(r"layer_\d+\.safetensors$", entry.path):
        return "circuit-tracer relu"
    return {"saelens": "standard", "sparsify": "sparsify topk", "dictionary_learning": "BatchTopKSAE"}.get(entry.format)


def _edited(settings: bytes, entry) -> bytes:
    """Return settings that name the hooks of the entry, or none."""
    values = json.loads(settings)
    for part in (values, values.get("metadata", {}), values.get("trainer", {})):
        for key in ("hook_name", "hook_point", "hf_hook_point_in", "hf_hook_point_out", "submodule_name"):
            if key in part and entry.hook is not None and key.startswith("hook_"):
                part[key] = entry.hook
            elif key in part:
                del part[key]
    return json.dumps(values).encode()


def serve(hub: Hub, entries, scratch: Path) -> dict[str, Files]:
    """Put the files of entries, and files that nobody needs, into the repositories of a Hub. Return the files by name."""
    repositories: dict[str, dict[str, bytes]] = {}
    all_files = {}
    for i, entry in enumerate(entries):
        made = all_files[entry.name] = files_of(entry, scratch / str(i))
        others = {"README.md": b"# read me", "optimizer.bin": PLACEHOLDER, "other/cfg.json": b"{}", "other/ae.pt": PLACEHOLDER}
        repositories.setdefault(entry.repo, others).update(made.files)
    for repo, files in repositories.items():
        large = (".safetensors", ".npz", ".pt", ".pth", ".bin")
        hub.create(repo).add("files", {path: Blob(content, lfs=path.endswith(large)) for path, content in files.items()})
    return all_files


@torch.no_grad()
def error_of(dictionary, case: Case) -> float:
    """Return the largest difference of codes from the equation in float64, relative to the largest code."""
    x = torch.randn(32, D_IN, generator=torch.Generator().manual_seed(0))
    wanted = case.codes(x.double())
    return float((dictionary.encode(x).to_dense().double() - wanted).abs().max() / wanted.abs().max())


def main() -> None:
    """Draw entries, fetch them, and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with running_hub() as hub, tempfile.TemporaryDirectory() as folder:
        cache = Path(folder, "cache")
        os.environ |= {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_XET": "1"}  # read on import
        from saelens_lite import releases
        from saelens_lite.hub import fetch

        entries = random.Random(arguments.seed).sample(list(releases.entries()), arguments.n)
        made, counts, worst = serve(hub, entries, Path(folder)), Counter(), 0.0
        for entry in entries:
            before = {path for path in cache.rglob("*") if path.is_file() and "snapshots" in path.parts}
            fetched = fetch(entry.name)
            snapshot = (
                next(one for one in fetched.path.parents if one.parent.name == "snapshots") if entry.path else fetched.path
            )
            new = {path for path in cache.rglob("*") if path.is_file() and "snapshots" in path.parts} - before
            needed = {snapshot / path for path in made[entry.name].files}
            is_right = new <= needed | {snapshot / "README.md"} and all(path.is_file() for path in needed)
            counts["fetched exactly its files" if is_right else f"WRONG FILES {entry.name}"] += 1
            if (case := made[entry.name].case) is not None:
                error = error_of(fetched.load(), case)
                worst = max(worst, error)
                counts["loaded, codes within 1e-5" if error < 1e-5 else f"WRONG CODES {entry.name}"] += 1
            counts[f"of format {entry.format}"] += 1
    print(f"{arguments.n} of {sum(1 for _ in releases.entries()):,} public dictionaries, seed {arguments.seed}")
    for text, n in sorted(counts.items()):
        print(f"{n:5} {text}")
    print(f"largest relative difference of codes from float64: {worst:.1e}")


if __name__ == "__main__":
    main()
