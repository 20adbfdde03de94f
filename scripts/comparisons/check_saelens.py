"""Load dictionary folders in SAELens, and compare its codes and reconstructions with those of this library.

    python scripts/comparisons/check_saelens.py runs/topk/dictionary --peer-python /path/to/venv-with-sae-lens/bin/python

Prints the largest absolute difference of codes and of reconstructions, beside the largest value of each. The exit code is 1
when a difference is above 1e-5 times that value.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import saelens_lite as sl

PEER = """
import sys
from safetensors.torch import load_file, save_file
from sae_lens import SAE
folder, where = sys.argv[1:]
x = load_file(where + "/x.safetensors")["x"]
sae = SAE.load_from_disk(folder)
codes = sae.encode(x)
save_file({"codes": codes.detach().contiguous(), "x_hat": sae(x).detach().contiguous()}, where + "/peer.safetensors")
print(type(sae).__name__, sae.cfg.metadata.hook_name)
"""


@torch.no_grad()
def compare(folder: Path, peer_python: str) -> dict[str, object]:
    """The largest differences between SAELens and us on 4096 activations of the model the dictionary belongs to."""
    d = sl.Dictionary.load(folder)
    lm = sl.load_model(d.origin.model)
    pages = [page.text for page in sl.python_docs()][:64]
    x = lm.run(lm.to_tokens(pages), d.origin.hook)[d.origin.hook][:, 1:].flatten(0, 1)[:4096]
    codes = d.encode(x).to_dense()
    with tempfile.TemporaryDirectory() as where:
        save_file({"x": x.contiguous()}, f"{where}/x.safetensors")
        done = subprocess.run([peer_python, "-c", PEER, str(folder), where], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"SAELens cannot load {folder}:\n{done.stderr}")
        peer = load_file(f"{where}/peer.safetensors")
    return {
        "folder": str(folder),
        "loaded as": done.stdout.split("\n")[-2],
        "codes": float((codes - peer["codes"]).abs().max()),
        "largest code": float(codes.abs().max()),
        "x_hat": float((d(x) - peer["x_hat"]).abs().max()),
        "largest x_hat": float(d(x).abs().max()),
        "fires elsewhere": int(((codes != 0) != (peer["codes"] != 0)).sum()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="dictionary folders")
    parser.add_argument("--peer-python", required=True, help="Python of an environment with sae-lens")
    args = parser.parse_args()
    failed = False
    for folder in args.folders:
        row = compare(folder, args.peer_python)
        print(json.dumps(row))
        failed |= row["codes"] > 1e-5 * row["largest code"] or row["x_hat"] > 1e-5 * row["largest x_hat"]
    sys.exit(failed)


if __name__ == "__main__":
    main()
