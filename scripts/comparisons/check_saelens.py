"""Load dictionary folders in SAELens, and compare its codes and reconstructions with those of this library.

    python scripts/comparisons/check_saelens.py runs/topk/dictionary --peer-python /path/to/venv-with-sae-lens/bin/python

Prints the largest absolute difference of codes and of reconstructions, beside the largest value of each. The exit code is 1
when a difference is above 1e-5 times that value.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from shared import Difference, run_peer

import saelens_lite as sl
from saelens_lite.model import model_for

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
def compare(folder: Path, peer_python: str) -> tuple[dict[str, object], bool]:
    """Return the differences from SAELens on 4096 activations of the dictionary's model, and whether they are small."""
    d = sl.load(folder)
    lm = model_for(d)
    pages = [page.text for page in sl.python_docs()][:64]
    x = lm.run(lm.to_tokens(pages), d.hook)[d.hook][:, 1:].flatten(0, 1)[:4096]
    codes = d.encode(x).to_dense()
    with tempfile.TemporaryDirectory() as where:
        save_file({"x": x.contiguous()}, f"{where}/x.safetensors")
        printed = run_peer(peer_python, "-c", PEER, folder, where, doing=f"loading {folder} in SAELens")
        peer = load_file(f"{where}/peer.safetensors")
    difference = Difference.of(codes, d(x), peer["codes"], peer["x_hat"])
    row = {"folder": str(folder), "loaded as": printed.split("\n")[-2], **difference._asdict()}
    return row, difference.is_small


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="dictionary folders")
    parser.add_argument("--peer-python", required=True, help="Python of an environment with sae-lens")
    args = parser.parse_args()
    failed = False
    for folder in args.folders:
        row, agrees = compare(folder, args.peer_python)
        print(json.dumps(row))
        failed |= not agrees
    sys.exit(failed)


if __name__ == "__main__":
    main()
