"""Load pushed dictionaries in SAELens by the code on their cards, and compare its results with those of this library.

    python scripts/comparisons/hub_saelens.py --peer-python /path/to/venv-with-sae-lens/bin/python

One dictionary of each rule is trained briefly on random data, and all are pushed in one commit to a Hub on this machine.
SAELens then runs the Python block of each card, which calls `SAE.from_pretrained`, with its own unmodified downloader. Prints
the largest absolute difference of codes and of outputs, beside the largest value of each. The exit code is 1 when a difference
is above 1e-5 times that value.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from shared import Difference, run_peer

HUB_SERVER = Path(__file__).parents[1] / "hub_server.py"
TOKEN = "hf_onthismachine"
REPO, D_IN, D_SAE = "me/dictionaries", 64, 256
RULES = {
    "topk": {"k": 8},
    "l1": {"coefficient": 0.5},
    "p_anneal": {},
    "gated": {},
    "jumprelu": {},
    "batch_topk": {"k": 8},
    "matryoshka": {"k": 8},
    "matching_pursuit": {"k": 8},
    "group_max": {"k": 8},
}
ACROSS = ("l1", "jumprelu", "batch_topk")  # rules whose transcoders SAELens knows
PEER = """
import json, sys
from safetensors.torch import load_file, save_file
where = sys.argv[1]
tensors, loaded = load_file(where + "/x.safetensors"), {}
for name, code in json.load(open(where + "/code.json")).items():
    names = {"activations": tensors["x"]}
    exec(code, names)
    tensors[name + " codes"] = names["feature_acts"].detach().contiguous()
    tensors[name + " output"] = names.get("x_hat", names.get("y_hat")).detach().contiguous()
    loaded[name] = [type(names["sae"]).__name__, names["sae"].cfg.metadata.hook_name]
save_file(tensors, where + "/peer.safetensors")
json.dump(loaded, open(where + "/loaded.json", "w"))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", required=True, help="Python of an environment with sae-lens")
    peer_python = parser.parse_args().peer_python
    command = [sys.executable, str(HUB_SERVER), TOKEN]
    with (
        tempfile.TemporaryDirectory() as home,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server,
    ):
        url = server.stdout.readline().strip()
        own = {"HF_ENDPOINT": url, "HF_HOME": home, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        os.environ |= own  # before huggingface_hub is imported
        return 0 if all(compare(Path(home), peer_python)) else 1


def compare(where: Path, peer_python: str) -> list[bool]:
    """Return whether SAELens agrees, for each dictionary that it can load; print one line of a table for each dictionary."""
    import saelens_lite as sl

    x = data(1)
    trained = {rule: fit(rule) for rule in RULES} | {f"{rule}-across": transcoder(rule) for rule in ACROSS}
    sl.push(trained, REPO)
    code = {name: block for name in trained if (block := sae_lens_block(name))}
    (where / "code.json").write_text(json.dumps(code))
    save_file({"x": x}, where / "x.safetensors")
    run_peer(peer_python, "-c", PEER, where, doing="running the code of the cards")
    theirs, loaded = load_file(where / "peer.safetensors"), json.loads((where / "loaded.json").read_text())
    print("| dictionary | in SAELens | codes differ by | of at most | output differs by | of at most | fires elsewhere |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    verdicts = []
    for name in trained:
        if name not in code:
            print(f"| {name} | cannot, as its card says | | | | | |")
            continue
        ours = sl.pull(REPO, name)
        codes, output = ours.encode(x).to_dense().detach(), ours(x).detach()
        difference = Difference.of(codes, output, theirs[f"{name} codes"], theirs[f"{name} output"])
        print(
            f"| {name} | {loaded[name][0]} | "
            + " | ".join(f"{value:.2g}" for value in difference[:4])
            + f" | {difference.fires_elsewhere} |"
        )
        verdicts.append(difference.is_small)
    return verdicts


def data(seed: int) -> torch.Tensor:
    """Return 2048 sums of a few of 128 random directions."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(128, D_IN, generator=torch.Generator().manual_seed(0)), dim=1)
    chosen = (torch.rand(2048, 128, generator=generator) < 0.04) * (torch.rand(2048, 128, generator=generator) + 0.5)
    return chosen @ directions + 0.01 * torch.randn(2048, D_IN, generator=generator)


def fit(rule: str):
    """Return a dictionary that has begun to learn."""
    import saelens_lite as sl

    settings = {"d_sae": D_SAE, "n_tokens": 40_000, "batch_size": 512, "lr": 1e-3, "options": RULES[rule]}
    return sl.fit(data(0), sparsity=rule, **settings)


def transcoder(rule: str):
    """Return a transcoder with random weights."""
    import saelens_lite as sl

    reads, writes = sl.Port(hook="blocks.0.hook_resid_mid", width=D_IN), sl.Port(hook="blocks.0.hook_mlp_out", width=48)
    d = sl.Dictionary.create(rule, reads=reads, writes=writes, skip=True, d_sae=D_SAE, options=RULES[rule])
    generator = torch.Generator().manual_seed(2)
    for parameter in d.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return d


def sae_lens_block(name: str) -> str | None:
    """Return the code for SAELens on a card, or None if the card has none."""
    from huggingface_hub import hf_hub_download

    card = Path(hf_hub_download(REPO, f"{name}/README.md")).read_text(encoding="utf-8")
    found = re.search(r"```python\n(from sae_lens.*?)```", card, re.DOTALL)
    return found[1] if found else None


if __name__ == "__main__":
    sys.exit(main())
