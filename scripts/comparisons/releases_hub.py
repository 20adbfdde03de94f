"""Fetch public dictionaries by name from a Hub on the loopback interface that holds files of the names that they have.

    PYTHONPATH=scripts python scripts/comparisons/releases_hub.py --n 200 --seed 0

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
from safetensors.torch import load, save

PLACEHOLDER = b"not the weights"
SINGLE_FILES = ("circuit_tracer", "deepseek_r1", "goodfire", "hook_z", "qwen_scope")  # one for each dictionary
CASE_OF = {
    "saelens": "standard",
    "sparsify": "sparsify topk",
    "dictionary_learning": "BatchTopKSAE",
    "deepseek_r1": "deepseek r1",
    "goodfire": "goodfire",
    "hook_z": "hook_z",
    "qwen_scope": "qwen scope",
}
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
        inside = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        inside = {file: _edited(content, entry) if file.endswith(".json") else content for file, content in inside.items()}
        inside = {
            file: _of_hook(content, entry) if file.endswith(".safetensors") else content for file, content in inside.items()
        }
        if "config.yaml" in inside and entry.hook and entry.target:
            read, written = (hook.split(".", 2)[2].encode() for hook in (entry.hook, entry.target))
            old = inside["config.yaml"]
            inside["config.yaml"] = old.replace(b"ln2.hook_normalized", read).replace(b"hook_mlp_out", written)
        if entry.format in SINGLE_FILES:
            weights = wrote.name if wrote.is_file() else next(file for file in inside if file.startswith("layer_"))
            stem, own = weights.removesuffix(".pt"), last.removesuffix(".pt")
            settings = {f"{own}_cfg.json": inside.get(f"{stem}_cfg.json")} | {
                file: inside.get(file) for file in ("config.yaml", "config.json")
            }
            beside = {f"{place}{file}": content for file, content in settings.items() if content is not None}
            return Files({path: inside[weights]} | beside, case)
        files = {f"{path}/{file}": content for file, content in inside.items()}
        return Files(files | ({"config.json": RUN} if entry.format == "sparsify" else {}), case)
    if entry.format == "temporal":
        return Files({f"{path}/conf.yaml": b"a: 1", f"{path}/latest_ckpt.safetensors": PLACEHOLDER})
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
    if entry.format == "llamascopium":
        kind = "R1-Distill" if "R1-Distill" in entry.repo else "transcoder" if entry.target else ""
        return {"R1-Distill": "llama scope, R1-Distill", "transcoder": "llama scope transcoder"}.get(kind, "llama scope")
    if entry.format == "sparsify" and entry.target:
        return "sparsify skip"
    return CASE_OF.get(entry.format)


def _edited(settings: bytes, entry) -> bytes:
    """Return settings that name the hooks and the layer of the entry; of an entry without a hook, none."""
    values = json.loads(settings)
    sides = {"act_name": entry.hook, "hook_name": entry.hook, "hook_point": entry.hook, "hook_point_in": entry.hook}
    sides |= {"hook_point_out": entry.target or entry.hook, "hf_hook_point_in": None, "hf_hook_point_out": None}
    block = re.match(r"blocks\.(\d+)\.", entry.hook or "")
    for part in (values, values.get("metadata", {}), values.get("trainer", {})):
        part.pop("submodule_name", None)
        if "layer" in part and block:
            part["layer"] = int(block[1])
        for key in sides.keys() & part.keys():
            if "." in str(part[key]) and sides[key] is None:
                del part[key]
            elif "." in str(part[key]):
                part[key] = sides[key]
    return json.dumps(values).encode()


def _of_hook(content: bytes, entry) -> bytes:
    """Return safetensors whose mean norms are those of the entry's hook."""
    tensors = load(content)
    norms = [name for name in tensors if name.startswith("dataset_average_activation_norm.blocks.")]
    for name in norms:
        tensors[f"dataset_average_activation_norm.{entry.hook}"] = tensors.pop(name)
    return save(tensors) if norms else content


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
            counts[f"of format {entry.format}"] += 1
            if entry.format == "temporal":
                counts["refused"] += 1
                continue
            fetched = fetch(entry.name)
            snapshot = (
                next(one for one in fetched.path.parents if one.parent.name == "snapshots") if entry.path else fetched.path
            )
            new = {path for path in cache.rglob("*") if path.is_file() and "snapshots" in path.parts} - before
            needed = {snapshot / path for path in made[entry.name].files}
            is_right = new <= needed | {snapshot / "README.md"} and all(path.is_file() for path in needed)
            counts["fetched exactly its files" if is_right else f"WRONG FILES {entry.name}"] += 1
            if (case := made[entry.name].case) is not None:
                dictionary = fetched.load()
                hooks = tuple(port.hook for port in (dictionary.reads[0], dictionary.writes[0]))
                if entry.hook is not None and hooks != (entry.hook, entry.target or entry.hook):
                    counts[f"WRONG HOOKS {entry.name}: {dictionary.place}"] += 1
                error = error_of(dictionary, case)
                worst = max(worst, error)
                counts["loaded, codes within 1e-5" if error < 1e-5 else f"WRONG CODES {entry.name}"] += 1
    print(f"{arguments.n} of {sum(1 for _ in releases.entries()):,} public dictionaries, seed {arguments.seed}")
    for text, n in sorted(counts.items()):
        print(f"{n:5} {text}")
    print(f"largest relative difference of codes from float64: {worst:.1e}")


if __name__ == "__main__":
    main()
